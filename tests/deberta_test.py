"""DeBERTa against a plain form of its attention, itself, transformers' frozen outputs and the published sizes."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
from marks import few
import numpy as np
import pytest
from safetensors.numpy import load_file

from lm import config, nn, params, sharding
from lm.errors import ConfigError
from lm.kernels import attention
from lm.models import deberta, deberta_pair, disentangled, heads, hf

GOLDEN = pathlib.Path(__file__).parent / 'golden'
V1 = deberta.Config(vocab=41, length=16, layers=3, embed=16, heads=4, head_dim=4, mlp=32, relative=6,
                    dropout=nn.Dropout())
V2 = dataclasses.replace(V1, relative=12, buckets=6, shared=True, key_bias=True, relative_norm=True, conv=3,
                         conv_activation='gelu_erf')
KINDS = {
    'v1': V1,
    'v1-positions-types': dataclasses.replace(V1, positions=True, types=2, token_embed=8, relative=16),
    'v2': V2,
    'v2-c2p': dataclasses.replace(V2, terms=('c2p',), shared=False, conv=0),
    'v2-p2c': dataclasses.replace(V2, terms=('p2c',), shared=False, buckets=0, relative=4, conv=5),
    'content': dataclasses.replace(V2, terms=(), conv=0),
}


def random_tree(specs, seed=0):
  """Random everywhere, so that no bias is 0 and no scale is 1."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32), specs)


@functools.cache
def weights(name):
  return random_tree(deberta.specs(KINDS[name]))


apply = jax.jit(deberta.apply, static_argnums=1, static_argnames='attend')
decode = jax.jit(deberta.decode_masked, static_argnums=1)


def random_ids(B, T, seed=2):
  return jax.random.randint(jax.random.key(seed), (B, T), 0, V1.vocab)


def close(a, b, tolerance=2e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


# The attention.

@pytest.mark.parametrize(('buckets', 'limit', 'golden'), [
    (256, 512, {0: 0, 64: 64, 127: 127, 128: 128, 129: 129, 140: 137, 160: 149, 200: 169, 256: 192, 300: 207, 400: 233,
                500: 254, 511: 255, -200: -169}),
    (32, 128, {16: 16, 17: 17, 20: 18, 32: 22, 48: 24, 64: 27, 100: 30, 127: 31, -127: -31}),
    (0, 5, {0: 0, 4: 4, -9: -9}),
])
def test_buckets(buckets, limit, golden):
  np.testing.assert_array_equal(disentangled.bucket(np.array([*golden]), buckets, limit), [*golden.values()])


def plain_attention(q, k, v, tables, visible, scale):
  """The paper's eq. 4 with an index for every pair; tables by distance T - 1 .. -T and 1 - T .. T."""
  T = q.shape[1]
  behind = np.arange(T)[:, None] - np.arange(T)[None]
  scores = jnp.einsum('BiNH,BjNH->BNij', q, k)
  if 'c2p' in tables:
    scores += jnp.einsum('BiNH,ijNH->BNij', q, tables['c2p'][T - 1 - behind])
  if 'p2c' in tables:
    scores += jnp.einsum('BjNH,ijNH->BNij', k, tables['p2c'][T - 1 + behind])
  probs = jax.nn.softmax(jnp.where(visible[:, None], scores * scale, -1e30))
  return jnp.einsum('BNij,BjNH->BiNH', probs, v)


@pytest.mark.slow
@pytest.mark.parametrize('terms', [('c2p', 'p2c'), ('c2p',), ('p2c',), ()])
@pytest.mark.parametrize('T', [1, 2, 5, 13])
def test_attention_equals_the_plain_form(monkeypatch, terms, T):
  monkeypatch.setattr(disentangled, 'BLOCK', 4)
  keys = jax.random.split(jax.random.key(T), 6)
  q, k, v, g = (jax.random.normal(key, (2, T, 3, 4)) for key in keys[:4])
  tables = {term: jax.random.normal(key, (2 * T, 3, 4)) for term, key in zip(terms, keys[4:], strict=False)}
  segments = jnp.asarray(np.array([[1] * T, [1] * (T // 2) + [0] * (T - T // 2)], np.int32))
  mask = nn.Mask(causal=False, q_segments_BT=segments, k_segments_BS=segments)
  ways = [lambda *a: plain_attention(*a, mask.all(T, T), 0.3)]
  ways += [lambda *a, attend=attend: disentangled.attention(*a, mask, scale=0.3, attend=attend)
           for attend in (None, nn.attend, attention.attend)]
  results = [[out, *vjp(g)] for out, vjp in (jax.vjp(f, q, k, v, tables) for f in ways)]
  monkeypatch.setattr(disentangled, 'CACHE', 0)  # head by head
  out, vjp = jax.vjp(ways[1], q, k, v, tables)
  for got in (*results[1:], [out, *vjp(g)]):
    close(got, results[0])


@pytest.mark.slow
@pytest.mark.parametrize('cache', [0, 1 << 20])
def test_dropout_of_probabilities(monkeypatch, cache):
  """The derivative drops what the value dropped, and the mean over keys is the value without dropout."""
  monkeypatch.setattr(disentangled, 'CACHE', cache)
  q, k, v = (jax.random.normal(key, (1, 6, 2, 3)) for key in jax.random.split(jax.random.key(0), 3))
  tables = {'c2p': jax.random.normal(jax.random.key(1), (12, 2, 3))}
  f = lambda v, q, key: disentangled.attention(q, k, v, tables, nn.Mask(causal=False), scale=0.5, rate=0.4, key=key)
  out, vjp = jax.vjp(lambda v: f(v, q, jax.random.key(5)), v)
  np.testing.assert_allclose((vjp(jnp.ones_like(out))[0] * v).sum(), out.sum(), rtol=1e-5)  # out is linear in v
  direction = jax.random.normal(jax.random.key(9), q.shape)
  value = lambda s: f(v, q + s * direction, jax.random.key(5)).sum()
  slope = (value(1e-2) - value(-1e-2)) / 2e-2
  np.testing.assert_allclose(jax.grad(value)(0.0), slope, rtol=2e-2)
  mean = jax.jit(jax.vmap(lambda key: f(v, q, key)))(jax.random.split(jax.random.key(6), 4000)).mean(0)
  np.testing.assert_allclose(mean, f(v, q, None), atol=0.1)


def test_far_distances_are_one():
  table = disentangled.rows(9, 0, 4)
  np.testing.assert_array_equal(table['c2p'], [7] * 6 + [6, 5, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0])
  np.testing.assert_array_equal(table['c2p'][:-1], table['p2c'][:-1][::-1])


# The encoder.

@pytest.mark.parametrize('name', few(KINDS, 'v1', 'v2'))
def test_padding_changes_nothing(name):
  c, p, ids_BT = KINDS[name], weights(name), random_ids(2, 7)
  want = apply(p, c, ids_BT)
  for left, right in ((0, 4), (3, 0), (2, 5)):
    pad = lambda x, value=0, left=left, right=right: jnp.pad(x, ((0, 0), (left, right)), constant_values=value)
    got = apply(p, c, pad(ids_BT, 5), segments_BT=pad(jnp.ones_like(ids_BT)),
                positions_BT=pad(jnp.broadcast_to(jnp.arange(7)[None], ids_BT.shape)))
    close(got[:, left:left + 7], want)


@pytest.mark.slow
@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('attend', [None, attention.attend])
def test_packed_equals_unpacked(name, attend):
  c, p = KINDS[name], weights(name)
  a, b = random_ids(1, 4, 3), random_ids(1, 9, 4)
  got = apply(p, c, jnp.concatenate([a, b, jnp.zeros((1, 2), jnp.int32)], 1), attend=attend,
              positions_BT=jnp.concatenate([jnp.arange(4), jnp.arange(9), jnp.zeros(2, jnp.int32)])[None],
              segments_BT=jnp.array([[1] * 4 + [2] * 9 + [0] * 2]))
  close(got[:, :4], apply(p, c, a))
  close(got[:, 4:13], apply(p, c, b))
  assert np.isfinite(got).all()


def test_order_is_seen_only_through_the_terms():
  ids_BT = random_ids(1, 9)
  for name, seen in (('content', False), ('v1', True), ('v2-c2p', True), ('v2-p2c', True)):
    got, turned = (apply(weights(name), KINDS[name], x) for x in (ids_BT, ids_BT[:, ::-1]))
    assert np.allclose(got, turned[:, ::-1], atol=1e-5) != seen


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'model'), [('v1', deberta.apply), ('v2', deberta.decode_masked)])
def test_scan_unroll_and_remat_agree(name, model):
  ids_BT, c = random_ids(2, 10), dataclasses.replace(KINDS[name], dropout=nn.Dropout(0.1, 0.2, 0.2))
  p = {**weights(name), 'decoder': random_tree(deberta.decoder_specs(c))}

  def value_and_grad(unstacked=False, **changes):
    f = lambda p: jnp.square(model({**p, 'blocks': params.unstack(p['blocks'])} if unstacked else p,
                                   dataclasses.replace(c, **changes), ids_BT, key=jax.random.key(9))).mean()
    return jax.jit(jax.value_and_grad(f))(p)
  want = value_and_grad()
  for changes in ({'remat': 'full'}, {'remat': 'dots', 'unstacked': True}):
    close(value_and_grad(**changes), want, 2e-4)


@pytest.mark.parametrize('name', ['v1', 'v2'])
def test_one_layer(name):
  c = dataclasses.replace(KINDS[name], layers=1)
  p = random_tree(deberta.specs(c) | {'decoder': deberta.decoder_specs(c)})
  close(apply(p, c, random_ids(2, 5)), apply(p, dataclasses.replace(c, scan_layers=False), random_ids(2, 5)))
  assert np.isfinite(decode(p, c, random_ids(2, 5))).all()


@pytest.mark.slow
@pytest.mark.parametrize('place', ['embedding', 'attention', 'hidden'])
def test_dropout_needs_a_key_and_follows_it(place):
  c = dataclasses.replace(V2, dropout=nn.Dropout(**{place: 0.3}))
  f = lambda key: apply(weights('v2'), c, random_ids(1, 8), key=key)
  np.testing.assert_array_equal(f(None), apply(weights('v2'), V2, random_ids(1, 8)))
  np.testing.assert_array_equal(f(jax.random.key(0)), f(jax.random.key(0)))
  assert not np.allclose(f(jax.random.key(0)), f(jax.random.key(1)))


@pytest.mark.parametrize('name', ['v1', 'v2'])
def test_bfloat16_activations_stay_near(name):
  c = dataclasses.replace(KINDS[name], dtype='bfloat16')
  x_BTD = apply(weights(name), c, random_ids(2, 9))
  assert x_BTD.dtype == jnp.bfloat16
  np.testing.assert_allclose(x_BTD.astype(jnp.float32), apply(weights(name), KINDS[name], random_ids(2, 9)), atol=0.15)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['v1', 'v2'])
def test_a_mesh_changes_nothing(name):
  c, p = KINDS[name], {**weights(name), 'decoder': random_tree(deberta.decoder_specs(KINDS[name]))}
  ids_BT = random_ids(4, 9)
  segments_BT = jnp.asarray(np.repeat([[1] * 9, [1] * 5 + [0] * 4], 2, 0))
  loss = lambda p: sum(jnp.square(f(p, c, ids_BT, segments_BT=segments_BT)).mean()
                       for f in (deberta.apply, deberta.decode_masked))
  want = jax.jit(jax.value_and_grad(loss))(p)
  mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2, tensor=2))
  specs = deberta.specs(dataclasses.replace(c, vocab=41)) | {'decoder': deberta.decoder_specs(c)}
  specs['embed']['tokens'] = params.Spec(specs['embed']['tokens'].shape, (None, 'embed'))  # 41 words do not divide
  with sharding.use(mesh):
    got = jax.jit(jax.value_and_grad(loss))(jax.device_put(p, sharding.shardings(specs, mesh)))
  close(got, want, 1e-4)


# The enhanced mask decoder.

@pytest.mark.slow
@pytest.mark.parametrize('name', ['v1', 'v2'])
def test_decoder_runs_the_last_block_twice(name):
  """With positions of 0 the first run is that of the encoder; the second takes its output as queries."""
  c, ids_BT = dataclasses.replace(KINDS[name], scan_layers=False), random_ids(2, 8)
  p = {**weights(name), 'decoder': {'positions': jnp.zeros((16, 16))}}
  layers = params.unstack(p['blocks'])
  hidden = deberta.apply({**p, 'blocks': layers[:-1]}, dataclasses.replace(c, layers=2), ids_BT)
  block = functools.partial(deberta._block, layers[-1], hidden, None, None, c=c,
                            relative=deberta._relative(p, c, 8), attend=None)
  first = block()
  close(first, apply(p, c, ids_BT))
  close(block(first), decode(p, c, ids_BT))
  assert not np.allclose(first, block(first), atol=1e-2)


@pytest.mark.slow
def test_gradient_reaches_the_last_block_from_both_passes(monkeypatch):
  p = {**weights('v1'), 'decoder': random_tree(deberta.decoder_specs(V1))}
  grads = []
  for passes in (1, 2):
    monkeypatch.setattr(deberta, '_PASSES', passes)
    f = lambda p: jnp.square(deberta.decode_masked(p, V1, random_ids(2, 8))).sum()
    grads.append(jax.grad(f)(p))
    last = np.abs(grads[-1]['blocks']['mlp']['up'][-1])
    assert last.max() > 1e-3 and np.abs(grads[-1]['decoder']['positions'][:8]).max() > 1e-3
    assert not np.any(grads[-1]['decoder']['positions'][8:])
    moved = jax.tree.map(lambda x: x.at[-1].add(0.1), p['blocks'])
    assert not np.allclose(f({**p, 'blocks': moved}), f(p))
  assert not np.allclose(grads[0]['blocks']['mlp']['up'][-1], grads[1]['blocks']['mlp']['up'][-1], atol=1e-3)


@pytest.mark.slow
def test_decoder_ignores_words_of_padding_and_needs_its_positions():
  p = {**weights('v2'), 'decoder': random_tree(deberta.decoder_specs(V2))}
  ids_BT, segments_BT = random_ids(1, 9), jnp.asarray([[1] * 6 + [0] * 3])
  close(decode(p, V2, ids_BT, segments_BT=segments_BT)[:, :6], decode(p, V2, ids_BT[:, :6]))
  with pytest.raises(ConfigError, match='model.length=16; expected at least 17'):
    deberta.decode_masked(p, V2, random_ids(1, 17))


# The pair.

PAIR = deberta_pair.Config(dataclasses.replace(V2, layers=1, positions=True), dataclasses.replace(V2, positions=True))


def pair(sharing, seed=0):
  c = dataclasses.replace(PAIR, sharing=sharing)
  return c, random_tree(deberta_pair.specs(c), seed)


def discriminate(p, c, ids_BT):
  tree, D = deberta_pair.discriminator(p, c), c.discriminator
  return heads.rtd(tree['rtd'], deberta.apply(tree, D, ids_BT), D.activation, D.norm_eps)


@pytest.mark.slow
@pytest.mark.parametrize('sharing', ['gdes', 'tied', 'untied'])
def test_gradients_of_the_discriminator_alone(sharing):
  c, p = pair(sharing)
  grads = jax.grad(lambda p: jnp.square(discriminate(p, c, random_ids(2, 8))).sum())(p)
  for name in ('tokens', 'positions'):
    assert np.any(grads['generator']['embed'][name]) == (sharing == 'tied')
    assert (name in grads['discriminator']['embed']) == (sharing != 'tied')
    assert sharing == 'tied' or np.any(grads['discriminator']['embed'][name])
  rest = {**grads['generator'], 'embed': grads['generator']['embed']['norm']}
  assert not any(np.any(x) for x in jax.tree.leaves(rest))


@pytest.mark.slow
@pytest.mark.parametrize('sharing', ['gdes', 'tied', 'untied'])
def test_gradients_of_the_generator_alone(sharing):
  c, p = pair(sharing)
  f = lambda p: jnp.square(deberta.decode_masked(deberta_pair.generator(p), c.generator, random_ids(2, 8))).sum()
  grads = jax.grad(f)(p)
  assert np.any(grads['generator']['embed']['tokens'])
  assert not any(np.any(x) for x in jax.tree.leaves(grads['discriminator']))


def test_differences_start_at_zero_and_are_added():
  c, p = pair('gdes')
  start = params.init(deberta_pair.specs(c), jax.random.key(0))
  for name in ('tokens', 'positions'):
    assert not np.any(start['discriminator']['embed'][name])
    close(deberta_pair.discriminator(start, c)['embed'][name], start['generator']['embed'][name], 0)
    close(deberta_pair.discriminator(p, c)['embed'][name],
          p['generator']['embed'][name] + p['discriminator']['embed'][name], 0)
  untied = dataclasses.replace(c, sharing='untied')
  assert np.any(params.init(deberta_pair.specs(untied), jax.random.key(0))['discriminator']['embed']['tokens'])


def test_a_pair_that_shares_is_equally_wide():
  narrow = dataclasses.replace(PAIR.generator, token_embed=8)
  with pytest.raises(ConfigError, match='model.generator.token_embed=8; expected 16'):
    dataclasses.replace(PAIR, generator=narrow)
  dataclasses.replace(PAIR, generator=narrow, sharing='untied')


# Sizes and configs.

def sized(layers, width, **changes):
  return deberta.Config(layers=layers, embed=width, heads=width // 64, mlp=4 * width, **changes)


NEW = {'vocab': 128100, 'buckets': 256, 'shared': True, 'key_bias': True, 'relative_norm': True}


@pytest.mark.parametrize(('c', 'total', 'without_words'), [
    (deberta.Config(), 138_601_728, 99_998_208),
    (sized(24, 1024), 405_163_008, 353_691_648),
    (sized(48, 1024), 757_804_032, 706_332_672),
    (sized(24, 1536, conv=3, **NEW), 884_593_152, 687_831_552),
    (sized(48, 1536, conv=3, **NEW), 1_564_549_632, 1_367_788_032),
    (sized(12, 384, **NEW), 70_682_112, 21_491_712),
    (sized(6, 768, **NEW), 141_304_320, 42_923_520),
    (sized(12, 768, **NEW), 183_831_552, 85_450_752),
    (sized(24, 1024, **NEW), 434_012_160, 302_837_760),
])
def test_published_sizes(c, total, without_words):
  """base, large, xlarge; v2 xlarge, xxlarge; v3 xsmall, small, base, large."""
  specs = deberta.specs(c)
  assert params.count(specs) == total
  assert total - params.count(specs, '^embed/tokens$') == without_words


@pytest.mark.parametrize('changes', [
    {'layers': 0}, {'conv': 2}, {'terms': ('p2c', 'c2p')}, {'terms': ('c2p', 'c2p')}, {'buckets': 1},
    {'buckets': 10, 'relative': 6}, {'types': -1}])
def test_impossible_configs_are_refused(changes):
  with pytest.raises(ConfigError, match=f'model.{next(iter(changes))}'):
    dataclasses.replace(V1, **changes)


def test_config_survives_json_and_flags():
  assert config.from_json(deberta.Config, config.to_json(V2)) == V2
  assert config.override(V2, "terms=('c2p',)").terms == ('c2p',)
  assert config.from_json(deberta_pair.Config, config.to_json(PAIR)) == PAIR


def test_default_initial_values():
  p = params.init(deberta.specs(dataclasses.replace(V2, embed=64, mlp=256)), jax.random.key(0))
  assert np.std(p['blocks']['mlp']['up']) == pytest.approx(0.02, rel=0.03)
  assert not np.any(p['blocks']['attn']['q_bias']) and np.all(p['conv']['norm']['scale'] == 1)


# transformers.

@pytest.mark.parametrize('name', ['deberta', 'deberta-v2'])
def test_golden_outputs(name):
  c, p = hf.load(GOLDEN / name)
  io = load_file(GOLDEN / name / 'io.safetensors')
  p, real_BT = jax.tree.map(jnp.asarray, p), io['mask'] > 0
  x_BTD = apply(p, c, io['ids'], segments_BT=io['mask'], types_BT=io['types'], positions_BT=io['positions'])
  y_BTE = heads.mlm(p['mlm'], x_BTD, c.activation, c.norm_eps)
  np.testing.assert_allclose(x_BTD[real_BT], io['hidden'][real_BT], rtol=1e-4, atol=1e-4)
  logits_BTV = y_BTE @ p['embed']['tokens'].T + p['mlm']['bias'][None, None]
  np.testing.assert_allclose(logits_BTV[real_BT], io['mlm'][real_BT], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['deberta', 'deberta-v2'])
def test_golden_folder_survives_import_and_export(tmp_path, name):
  c, p = hf.load(GOLDEN / name)
  hf.save(tmp_path / 'out', c, p)
  back, q = hf.load(tmp_path / 'out')
  assert back == c
  jax.tree.map(np.testing.assert_array_equal, p, q)
  theirs, ours = (load_file(folder / 'model.safetensors') for folder in (GOLDEN / name, tmp_path / 'out'))
  for key, x in ours.items():
    np.testing.assert_array_equal(x, theirs[key])


def test_no_architecture_of_theirs():
  c = dataclasses.replace(V1, shared=True)
  with pytest.raises(ConfigError, match='model.shared=True; expected False'):
    hf.save('/nowhere', c, random_tree(deberta.specs(c)))
