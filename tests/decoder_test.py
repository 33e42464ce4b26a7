"""The decoder against itself: cache, packing, padding, scan and remat are all the same function."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from marks import few
import numpy as np
import pytest

from lm import hlo, nn, params
from lm.errors import ConfigError
from lm.kernels import attention
from lm.models import deberta, decoder, encoder

SMALL = decoder.Config(vocab=97, length=64, layers=3, embed=32, heads=4, kv_heads=4, head_dim=8, mlp=64)
LLAMA = dataclasses.replace(SMALL, kv_heads=2, positions='rotary', norm='rms', norm_bias=False, bias=False,
                            activation='swiglu', tied=False)
KINDS = {
    'gpt2': SMALL,
    'llama': LLAMA,
    'palm': dataclasses.replace(SMALL, kv_heads=1, positions='rotary', parallel=True, activation='swiglu',
                                norm_bias=False, bias=False, logit_scale=0.2),
    'chinchilla': dataclasses.replace(SMALL, positions='relative', norm='rms'),
}


@functools.cache
def weights(name):
  """Random everywhere, so that no bias is 0 and no scale is 1."""
  shapes = params.init(decoder.specs(KINDS[name]), jax.random.key(0))
  return params.map_with_path(
      lambda path, x: x + 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(1), len(path) + x.size), x.shape),
      shapes)


apply = jax.jit(decoder.apply, static_argnums=1, static_argnames='attend')


def random_ids(B, T, seed=2):
  return jax.random.randint(jax.random.key(seed), (B, T), 0, SMALL.vocab)


@pytest.mark.parametrize('name', few(KINDS, 'llama', 'chinchilla'))
def test_cache_equals_forward(name):
  c, p, ids_BT = KINDS[name], weights(name), random_ids(2, 11)
  want = apply(p, c, ids_BT)
  cache, got = decoder.init_cache(c, 2, 16), []
  for first, last in ((0, 4), (4, 5), (5, 9), (9, 11)):
    x_BTD, cache = apply(p, c, ids_BT[:, first:last], cache=cache)
    got.append(x_BTD)
  np.testing.assert_allclose(jnp.concatenate(got, 1), want, atol=2e-5)
  assert int(cache.length) == 11


@pytest.mark.parametrize('name', few(KINDS, 'llama', 'chinchilla'))
def test_left_padding_changes_nothing(name):
  c, p, ids_BT = KINDS[name], weights(name), random_ids(2, 7)
  want = apply(p, c, ids_BT)
  for pad in (1, 17):
    padded_BT = jnp.pad(ids_BT, ((0, 0), (pad, 0)), constant_values=5)
    segments_BT = jnp.pad(jnp.ones_like(ids_BT), ((0, 0), (pad, 0)))
    got, _ = apply(p, c, padded_BT, segments_BT=segments_BT, cache=decoder.init_cache(c, 2, pad + 7))
    np.testing.assert_allclose(got[:, pad:], want, atol=2e-5)


@pytest.mark.parametrize('name', few(KINDS, 'llama', 'chinchilla'))
def test_packed_equals_unpacked(name):
  c, p = KINDS[name], weights(name)
  a, b = random_ids(1, 9, 3), random_ids(1, 14, 4)
  packed_BT = jnp.concatenate([a, b, jnp.zeros((1, 2), jnp.int32)], 1)
  segments_BT = jnp.array([[1] * 9 + [2] * 14 + [0] * 2])
  positions_BT = jnp.concatenate([jnp.arange(9), jnp.arange(14), jnp.zeros(2, jnp.int32)])[None]
  for attend in (nn.attend, attention.attend):
    got = apply(p, c, packed_BT, positions_BT=positions_BT, segments_BT=segments_BT, attend=attend)
    np.testing.assert_allclose(got[:, :9], apply(p, c, a), atol=2e-5)
    np.testing.assert_allclose(got[:, 9:23], apply(p, c, b), atol=2e-5)
    assert np.isfinite(got).all()


@pytest.mark.parametrize('name', KINDS)
def test_a_token_never_sees_the_future(name):
  c, p, ids_BT = KINDS[name], weights(name), random_ids(1, 12)
  changed_BT = ids_BT.at[0, 7].set((ids_BT[0, 7] + 1) % c.vocab)
  a, b = apply(p, c, ids_BT), apply(p, c, changed_BT)
  np.testing.assert_array_equal(a[:, :7], b[:, :7])
  assert not np.allclose(a[:, 7:], b[:, 7:])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['gpt2', 'palm'])
def test_scan_unroll_and_remat_agree(name):
  ids_BT = random_ids(2, 10)
  drop = nn.Dropout(0.1, 0.1, 0.2)

  def value_and_grad(**changes):
    c = dataclasses.replace(KINDS[name], dropout=drop, **changes)
    f = lambda p: jnp.square(apply(p, c, ids_BT, key=jax.random.key(9))).sum()
    return jax.jit(jax.value_and_grad(f))(weights(name))
  want = value_and_grad()
  for changes in ({'scan_layers': False}, {'remat': 'full'}, {'remat': 'dots', 'scan_layers': False}):
    got = value_and_grad(**changes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3), got, want)


def test_dropout_needs_a_key_and_follows_it():
  c = dataclasses.replace(SMALL, dropout=nn.Dropout(0.1, 0.1, 0.1))
  f = lambda key: apply(weights('gpt2'), c, random_ids(1, 8), key=key)
  np.testing.assert_array_equal(f(None), apply(weights('gpt2'), SMALL, random_ids(1, 8)))
  np.testing.assert_array_equal(f(jax.random.key(0)), f(jax.random.key(0)))
  assert not np.array_equal(f(jax.random.key(0)), f(jax.random.key(1)))


def test_bfloat16_activations_stay_near():
  c = dataclasses.replace(SMALL, dtype='bfloat16')
  x_BTD = apply(weights('gpt2'), c, random_ids(2, 9))
  assert x_BTD.dtype == jnp.bfloat16
  assert decoder.logits(weights('gpt2'), c, x_BTD).dtype == jnp.float32
  np.testing.assert_allclose(x_BTD.astype(jnp.float32), apply(weights('gpt2'), SMALL, random_ids(2, 9)), atol=0.2)


@pytest.mark.parametrize(('field', 'value'), [('kv_heads', 3), ('layers', 0), ('vocab', -1)])
def test_impossible_shapes_are_refused(field, value):
  with pytest.raises(ConfigError, match=field):
    dataclasses.replace(SMALL, **{field: value})


@pytest.mark.parametrize('where, kind, fields, values, least', [
    ('model', decoder.Config, ('rope_theta', 'norm_eps', 'logit_scale'), (0.0, -1.0, math.inf, math.nan), ' above 0'),
    ('model.init', decoder.Init, ('std', 'tokens', 'positions', 'residual'), (-1.0, math.inf), ', at least 0')])
def test_numbers_that_only_diverge_are_refused(where, kind, fields, values, least):
  for field, value in itertools.product(fields, values):
    with pytest.raises(ConfigError, match=f'^{where}.{field}={value}; expected a finite number{least}$'):
      kind(**{field: value})


@pytest.mark.parametrize('kind', [encoder.Config, deberta.Config])
def test_so_are_those_of_encoders(kind):
  for field, value in (('norm_eps', 0.0), ('norm_eps', -1.0), ('norm_eps', math.inf), ('std', -1.0), ('std', math.nan)):
    with pytest.raises(ConfigError, match=f'^model.{field}={value}; expected a finite number'):
      kind(**{field: value})


def test_residual_projections_start_smaller():
  c = dataclasses.replace(SMALL, embed=128, mlp=512, init=decoder.Init(residual=decoder.residual_std(3)))
  p = params.init(decoder.specs(c), jax.random.key(0))
  assert np.std(p['blocks']['mlp']['down']) == pytest.approx(0.02 / 6**0.5, rel=0.03)
  assert np.std(p['blocks']['mlp']['up']) == pytest.approx(0.02, rel=0.03)
  assert np.std(p['blocks']['attn']['o']) == pytest.approx(0.02 / 6**0.5, rel=0.05)


def test_what_is_recomputed():
  """'dots' keeps the products with weights: attention's are formed once more. 'full' forms all of a block once more."""
  def flops(remat):
    c = decoder.Config(vocab=32, length=32, layers=3, embed=32, heads=4, kv_heads=4, head_dim=8, mlp=128, remat=remat)
    p = jax.eval_shape(lambda: params.init(decoder.specs(c), jax.random.key(0)))
    gradient = jax.jit(jax.grad(lambda p, ids: decoder.apply(p, c, ids).sum()))
    program = gradient.lower(p, jax.ShapeDtypeStruct((4, 32), jnp.int32)).compile()
    return sum(hlo.flops(program.as_text()).values())
  tokens, blocks = 4 * 32, 3
  weights = 2.0 * tokens * blocks * (4 * 32 * 32 + 2 * 32 * 128)
  scores = 2.0 * 2 * tokens * blocks * 32 * 32
  none = flops('none')
  assert none == 3 * (weights + scores)
  assert none < flops('dots') <= none + scores
  assert none + scores < flops('full') <= none + weights + scores
