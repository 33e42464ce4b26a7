"""ELECTRA's pair: what is tied, exact sizes, and each network as a folder of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import config, nn, params
from lm.errors import ConfigError
from lm.models import blocks, electra, encoder, heads, hf

G = encoder.Config(vocab=50, length=16, layers=2, embed=16, heads=2, head_dim=8, mlp=24, token_embed=24,
                   activation='gelu_erf', dropout=nn.Dropout())
D = dataclasses.replace(G, embed=32, heads=4, mlp=48)
PAIR = electra.Config(G, D)


def _networks(p):
  return ((electra.generator(p), G), (electra.discriminator(p), D))


def test_tree():
  p = electra.specs(PAIR)
  assert set(p) == {'embed', 'generator', 'discriminator'}
  assert set(p['generator']) == {'project', 'blocks', 'mlm'}
  assert set(p['discriminator']) == {'project', 'blocks', 'rtd'}
  same_width = electra.specs(dataclasses.replace(PAIR, discriminator=dataclasses.replace(D, embed=24, heads=3)))
  assert set(same_width['discriminator']) == {'blocks', 'rtd'}
  untied = electra.specs(dataclasses.replace(PAIR, tied=False))
  assert set(untied) == {'generator', 'discriminator'}
  assert params.count(untied) == params.count(p) + params.count(p['embed'])
  for (tied, c), (own, _) in zip(_networks(p), _networks(untied), strict=True):
    assert tied == own
    assert {key: tied[key] for key in encoder.specs(c)} == encoder.specs(c)


@pytest.mark.slow
@pytest.mark.parametrize('tied', [True, False])
def test_gradients_meet_in_the_shared_embeddings_only(tied):
  c = dataclasses.replace(PAIR, tied=tied)
  p, ids_BT = params.init(electra.specs(c), jax.random.key(0)), jnp.arange(14).reshape(2, 7)

  def words(p):
    y_BTE = heads.mlm(p['mlm'], encoder.apply(p, G, ids_BT), G.activation, G.norm_eps)
    return blocks.bias(jnp.einsum('BTE,VE->BTV', y_BTE, p['embed']['tokens']), p['mlm']['bias'])

  scores = lambda p: heads.rtd(p['rtd'], encoder.apply(p, D, ids_BT), D.activation, D.norm_eps)
  assert words(electra.generator(p)).shape == (2, 7, 50)
  assert scores(electra.discriminator(p)).shape == (2, 7)
  moved = lambda loss: {path for path, g in params.flatten(jax.jit(jax.grad(loss))(p)).items() if np.abs(g).max() > 0}
  by_words = moved(lambda p: jax.nn.log_softmax(words(electra.generator(p)))[..., 3].sum())
  by_scores = moved(lambda p: scores(electra.discriminator(p)).sum())
  shared = {path for path in params.flatten(p) if path.startswith('embed/')}
  assert by_words & by_scores == shared
  assert by_words - shared <= {path for path in params.flatten(p) if path.startswith('generator/')}
  assert by_scores - shared <= {path for path in params.flatten(p) if path.startswith('discriminator/')}
  if tied:  # the norm of the embeddings and the types are shared, too
    assert {'embed/tokens', 'embed/positions', 'embed/types', 'embed/norm/scale', 'embed/norm/bias'} == shared


@pytest.mark.parametrize(('field', 'value'), [('vocab', 51), ('length', 8), ('offset', 2), ('types', 1),
                                              ('token_embed', 16)])
def test_networks_that_cannot_share_are_refused(field, value):
  with pytest.raises(ConfigError, match=f'model.generator.{field}={value}; expected'):
    dataclasses.replace(PAIR, generator=dataclasses.replace(G, **{field: value}))


def test_untied_networks_may_differ_in_their_embeddings():
  c = electra.Config(dataclasses.replace(G, token_embed=16), D, tied=False)
  assert 'project' not in electra.specs(c)['generator']
  with pytest.raises(ConfigError, match='model.generator.vocab=51'):
    dataclasses.replace(c, generator=dataclasses.replace(G, vocab=51))


def test_config_is_set_from_the_command_line():
  c = config.override(electra.Config(), 'discriminator.layers=2', 'tied=False')
  assert (c.discriminator.layers, c.generator.layers, c.tied) == (2, 12, False)
  assert config.from_json(electra.Config, config.to_json(c)) == c


@pytest.mark.slow
@pytest.mark.parametrize('name', ['generator', 'discriminator'])
def test_each_network_is_a_folder(tmp_path, name):
  p = params.init(electra.specs(PAIR), jax.random.key(0))
  c, tree = getattr(PAIR, name), getattr(electra, name)(p)
  hf.save(tmp_path / 'out', c, tree)
  back, q = hf.load(tmp_path / 'out')
  assert back == c
  assert jax.tree.structure(q) == jax.tree.structure(tree)
  jax.tree.map(np.testing.assert_array_equal, q, tree)


# Sizes: nothing is allocated

SMALL = electra.Config()
_BASE = encoder.Config(activation='gelu_erf', token_embed=768)
BASE = electra.Config(dataclasses.replace(_BASE, embed=256, heads=4, mlp=1024), _BASE)
_LARGE = dataclasses.replace(_BASE, layers=24, embed=1024, heads=16, mlp=4096, token_embed=1024)
LARGE = electra.Config(dataclasses.replace(_LARGE, embed=256, heads=4, mlp=1024), _LARGE)


@pytest.mark.parametrize(('c', 'backbone', 'discriminator', 'generator', 'joint'), [
    (SMALL, 13_483_008, 13_549_057, 4_620_026, 14_196_219),
    (BASE, 108_891_648, 109_483_009, 33_740_602, 119_386_427),
    (LARGE, 334_092_288, 335_142_913, 51_295_290, 354_655_291),
])
def test_published_sizes(c, backbone, discriminator, generator, joint):
  p = electra.specs(c)
  assert params.count(encoder.specs(c.discriminator)) == backbone
  assert params.count(electra.discriminator(p)) == discriminator
  assert params.count(electra.generator(p)) == generator
  assert params.count(p) == joint
