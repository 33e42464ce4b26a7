"""Layers against flax, closed forms and plain numpy loops."""

import math

from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import nn
from lm.models import transformer_xl


def normal(*shape, seed=0, dtype=np.float32):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


# --- dot, norms


@pytest.mark.parametrize('equation, x, w', [
    ('BTD,DNH->BTNH', (2, 3, 4), (4, 5, 6)), ('BTNH,NHD->BTD', (2, 3, 5, 6), (5, 6, 4)),
    ('BTD,DF->BTF', (2, 3, 4), (4, 7))])
def test_dot_is_einsum_in_the_dtype_of_x(equation, x, w):
  x, w = normal(*x), normal(*w, seed=1)
  np.testing.assert_allclose(nn.dot(w, x, equation), np.einsum(equation, np.float64(x), np.float64(w)), 1e-5, 1e-5)
  assert nn.dot(w, x.astype(jnp.bfloat16), equation).dtype == jnp.bfloat16


def test_dot_dispatches_on_the_type_of_the_leaf():
  class Doubled:
    pass
  nn.dot.register(Doubled)(lambda w, x, equation: 2 * x)
  assert nn.dot(Doubled(), 21, '') == 42


@pytest.mark.parametrize('eps', [1e-5, 1e-12])
@pytest.mark.parametrize('shape', [(8,), (3, 8), (2, 3, 8)])
def test_layer_norm_is_flax(shape, eps):
  x, scale, bias = 3 * normal(*shape) + 5, normal(8, seed=1), normal(8, seed=2)
  want = linen.LayerNorm(epsilon=eps, use_fast_variance=False).apply({'params': {'scale': scale, 'bias': bias}}, x)
  np.testing.assert_allclose(nn.layer_norm(x, scale, bias, eps), want, 1e-5, 1e-5)
  np.testing.assert_allclose(nn.layer_norm(x, scale, None, eps), want - bias[(None,) * (x.ndim - 1)], 1e-5, 1e-5)


@pytest.mark.parametrize('eps', [1e-5, 1e-2])
def test_rms_norm_is_flax(eps):
  x, scale, bias = 3 * normal(2, 3, 8) + 5, normal(8, seed=1), normal(8, seed=2)
  layer = nnx.RMSNorm(8, epsilon=eps, rngs=nnx.Rngs(0))
  layer.scale[...] = scale
  np.testing.assert_allclose(nn.rms_norm(x, scale, None, eps), layer(x), 1e-5, 1e-5)
  np.testing.assert_allclose(nn.rms_norm(x, scale, bias, eps), layer(x) + bias[None, None], 1e-5, 1e-5)


@pytest.mark.parametrize('norm', [nn.layer_norm, nn.rms_norm])
def test_norms_compute_in_f32(norm):
  """In bf16 the mean of 1,000 + noise would be all rounding."""
  x = (1000 + 8 * normal(4, 64)).astype(jnp.bfloat16)
  got = norm(x, jnp.ones(64), jnp.zeros(64))
  assert got.dtype == jnp.bfloat16
  want = norm(x.astype(jnp.float32), jnp.ones(64), jnp.zeros(64))
  np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


# --- positions


def test_rotary_turns_each_pair_by_its_angle():
  x, positions = normal(2, 5, 3, 8), jnp.array([[0, 1, 2, 3, 4], [7, 0, 1, 5000, 1]])
  got = nn.rotary(x, positions, 10000.0)
  for b, t, n, i in np.ndindex(2, 5, 3, 4):
    angle = int(positions[b, t]) * 10000.0 ** (-2 * i / 8)
    z = complex(x[b, t, n, i], x[b, t, n, i + 4]) * complex(math.cos(angle), math.sin(angle))
    pair = [got[b, t, n, i], got[b, t, n, i + 4]]
    np.testing.assert_allclose(pair, [z.real, z.imag], atol=2e-3 if angle > 99 else 1e-5)


def test_rotary_scores_depend_on_the_distance_only():
  q, k = normal(1, 1, 1, 16), normal(1, 1, 1, 16, seed=1)
  score = lambda i, j: jnp.sum(nn.rotary(q, jnp.array([[i]]), 5e5) * nn.rotary(k, jnp.array([[j]]), 5e5))
  np.testing.assert_allclose([score(3, 1), score(103, 101)], [score(12, 10)] * 2, rtol=1e-4)
  np.testing.assert_allclose(jnp.linalg.norm(nn.rotary(q, jnp.array([[9]]), 1e4)), jnp.linalg.norm(q), rtol=1e-5)
  np.testing.assert_array_equal(nn.rotary(q, jnp.array([[0]]), 1e4), q)
  assert nn.rotary(q.astype(jnp.bfloat16), jnp.array([[9]]), 1e4).dtype == jnp.bfloat16


def test_sines_are_computed_once_and_are_the_same(monkeypatch):
  """Not for every head of every layer that turns by them."""
  x, positions = jax.random.normal(jax.random.key(0), (2, 8, 4, 16)), jnp.arange(16).reshape(2, 8)
  turned = jax.jit(lambda x, positions: nn.rotary(jnp.sin(nn.rotary(x, positions, 1e4) @ jnp.eye(16)), positions, 1e4))
  got, text = turned(x, positions), turned.lower(x, positions).compile().as_text()
  assert text.count(' cosine(') == 1
  monkeypatch.setattr(nn, '_sines_once', nn._sines)
  jax.clear_caches()
  np.testing.assert_array_equal(got, turned(x, positions))


def test_sinusoids():
  got = transformer_xl.sinusoids(jnp.array([[0, 3], [7, -2]]), 6)
  for (i, j), p in np.ndenumerate([[0, 3], [7, -2]]):
    want = [f(p / 10000 ** (2 * r / 6)) for f in (math.sin, math.cos) for r in range(3)]
    np.testing.assert_allclose(got[i, j], want, atol=1e-6)


# --- dropout


def test_dropout_keeps_the_mean_and_zeroes_its_share():
  x = jnp.full((400, 500), 3.0)
  for rate in 0.1, 0.5:
    y = nn.dropout(x, rate, jax.random.key(0))
    np.testing.assert_allclose(y.mean(), 3.0, rtol=0.01)
    np.testing.assert_allclose((y == 0).mean(), rate, atol=0.005)
    np.testing.assert_allclose(np.unique(y), [0, 3 / (1 - rate)], rtol=1e-6)
  np.testing.assert_array_equal(nn.dropout(x, 0.1, jax.random.key(1)), nn.dropout(x, 0.1, jax.random.key(1)))
  assert (nn.dropout(x, 0.1, jax.random.key(1)) != nn.dropout(x, 0.1, jax.random.key(2))).any()
  assert nn.dropout(x.astype(jnp.bfloat16), 0.1, jax.random.key(0)).dtype == jnp.bfloat16


def test_dropout_is_the_identity_without_a_key_or_a_rate():
  x = normal(3, 4)
  assert nn.dropout(x, 0.5, None) is x and nn.dropout(x, 0.0, jax.random.key(0)) is x


# --- attention


def visible(mask, b, t, s):
  """The contract of `nn.Mask`, one pair at a time."""
  here = int(mask.start) + t
  return ((not mask.causal or s <= here) and (mask.window is None or here - s < mask.window) and
          (mask.q_segments_BT is None or
           int(mask.q_segments_BT[b, t]) == int(mask.k_segments_BS[b, s]) > 0))


def attend_by_loops(q, k, v, mask, bias=None, scale=None):
  (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros((B, T, N, H))
  for b, t, n in np.ndindex(B, T, N):
    head = n // (N // K)
    keys = [s for s in range(S) if visible(mask, b, t, s)]
    logits = np.array([q[b, t, n] @ k[b, s, head] * (H**-0.5 if scale is None else scale)
                       + (0 if bias is None else float(bias[min(b, len(bias) - 1), n, t, s])) for s in keys])
    if keys:
      weights = np.exp(logits - logits.max())
      out[b, t, n] = weights / weights.sum() @ v[b, keys, head]
  return out


SEGMENTS = jnp.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 4, 4]])
MASKS = {
    'causal': nn.Mask(),
    'full': nn.Mask(causal=False),
    'window': nn.Mask(window=2),
    'window of one': nn.Mask(window=1),
    'window, both ways': nn.Mask(causal=False, window=3),
    'packed': nn.Mask(q_segments_BT=SEGMENTS, k_segments_BS=SEGMENTS),
    'packed, full': nn.Mask(causal=False, q_segments_BT=SEGMENTS, k_segments_BS=SEGMENTS),
    'packed, window': nn.Mask(window=2, q_segments_BT=SEGMENTS, k_segments_BS=SEGMENTS),
}


@pytest.mark.parametrize('name', MASKS)
@pytest.mark.parametrize('kv_heads', [4, 2, 1])
def test_attention_is_the_loop(name, kv_heads):
  mask = MASKS[name]
  q, k, v = normal(2, 6, 4, 8), normal(2, 6, kv_heads, 8, seed=1), normal(2, 6, kv_heads, 8, seed=2)
  got = np.array(nn.attend(q, k, v, mask))
  assert np.isfinite(got).all()
  if mask.q_segments_BT is not None:
    got[np.asarray(mask.q_segments_BT) == 0] = 0  # a padding query: finite, means nothing
  np.testing.assert_allclose(got, attend_by_loops(q, k, v, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('bias_rows', [1, 2])
def test_bias_and_scale(bias_rows):
  q, k, v = normal(2, 5, 4, 8), normal(2, 5, 2, 8, seed=1), normal(2, 5, 2, 8, seed=2)
  bias = normal(bias_rows, 4, 5, 5, seed=3)
  got = nn.attend(q, k, v, nn.Mask(), bias_BNTS=bias, scale=0.7)
  np.testing.assert_allclose(got, attend_by_loops(q, k, v, nn.Mask(), bias, 0.7), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('start', [3, jnp.int32(3)], ids=['python', 'traced'])
@pytest.mark.parametrize('window', [None, 3])
def test_queries_that_start_inside_a_cache(start, window):
  """Keys behind the last query are empty slots and must not be seen."""
  mask = nn.Mask(start=start, window=window)
  q, k, v = normal(2, 2, 4, 8), normal(2, 9, 2, 8, seed=1), normal(2, 9, 2, 8, seed=2)
  want = attend_by_loops(q, k, v, mask)
  np.testing.assert_allclose(jax.jit(nn.attend)(q, k, v, mask), want, rtol=1e-5, atol=1e-5)
  full = nn.attend(jnp.concatenate([normal(2, 3, 4, 8, seed=5), q], 1), k[:, :5], v[:, :5], nn.Mask(window=window))
  np.testing.assert_allclose(full[:, 3:], want, rtol=1e-5, atol=1e-5)


def test_attention_dropout_keeps_the_mean():
  q, k, v = normal(2, 6, 4, 8), normal(2, 6, 4, 8, seed=1), normal(2, 6, 4, 8, seed=2)
  drop = jax.jit(jax.vmap(lambda key: nn.attend(q, k, v, nn.Mask(), rate=0.25, key=key)))
  many = drop(jax.random.split(jax.random.key(0), 3000))
  np.testing.assert_allclose(many.mean(0), nn.attend(q, k, v, nn.Mask(), rate=0.25), atol=0.1)
  assert many.std(0)[:, 0].min() > 0.01  # the first query sees one key, kept or dropped


def test_rows_without_a_key_are_finite_and_so_is_their_gradient():
  segments = jnp.zeros((1, 4), jnp.int32)
  mask = nn.Mask(q_segments_BT=segments, k_segments_BS=segments)
  q, k, v = normal(1, 4, 2, 8), normal(1, 4, 2, 8, seed=1), normal(1, 4, 2, 8, seed=2)
  value, grads = jax.value_and_grad(lambda qkv: jnp.sum(nn.attend(*qkv, mask) ** 2))((q, k, v))
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def test_what_is_masked_has_no_influence():
  segments = jnp.array([[1, 1, 2, 2]])
  mask = nn.Mask(q_segments_BT=segments, k_segments_BS=segments)
  q, k, v = normal(1, 4, 2, 8), normal(1, 4, 2, 8, seed=1), normal(1, 4, 2, 8, seed=2)
  grads = jax.grad(lambda kv: jnp.sum(nn.attend(q, *kv, mask)[:, 2:]), argnums=0)((k, v))
  assert all((g[:, :2] == 0).all() and (g[:, 2:] != 0).any() for g in grads)


def test_bf16_keeps_the_softmax_in_f32():
  """Logits of 300 and 301 are one number in bf16."""
  q, v = jnp.full((1, 1, 1, 1), 1.0, jnp.bfloat16), jnp.array([[[[0.0]], [[1.0]]]], jnp.bfloat16)
  bias = jnp.array([300.0, 301.0]).reshape(1, 1, 1, 2)
  got = nn.attend(q, jnp.zeros_like(v), v, nn.Mask(causal=False), bias_BNTS=bias)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(jnp.float32).item(), 1 / (1 + math.exp(-1)), atol=4e-3)
  q, k = normal(1, 64, 1, 64, dtype=jnp.bfloat16) * 8, normal(1, 64, 1, 64, seed=1, dtype=jnp.bfloat16)
  logits = np.einsum('BTNH,BSNH->BNTS', np.float64(q), np.float64(k)) / 8
  want = np.exp(logits - logits.max(-1, keepdims=True))
  want = want / want.sum(-1, keepdims=True)
  one_hot = jnp.eye(64, dtype=jnp.bfloat16)[None, :, None]
  np.testing.assert_allclose(nn.attend(q, k, one_hot, nn.Mask(causal=False))[0, :, 0].astype(jnp.float32), want[0, 0],
                             rtol=2**-8, atol=1e-6)


# --- masks by blocks


@pytest.mark.parametrize('name', MASKS)
@pytest.mark.parametrize('start', [0, 2, jnp.int32(2)], ids=['0', '2', 'traced'])
def test_a_block_of_the_mask_is_that_part_of_it(name, start):
  mask = MASKS[name].replace(start=start)
  whole = np.array([[[visible(mask, b, t, s) for s in range(6)] for t in range(6)] for b in range(2)])
  for rows, columns in ((slice(0, 6), slice(0, 6)), (slice(2, 4), slice(0, 3)), (slice(3, 6), slice(2, 5)),
                        (slice(0, 1), slice(5, 6)), (slice(5, 6), slice(0, 1))):
    want = whole[:, rows, columns]
    for got in (mask.block(rows, columns), mask.cut(rows, columns).all(want.shape[1], want.shape[2])):
      if got is None:
        assert want.all()
      else:
        np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want)


def test_a_block_is_none_only_where_all_is_visible():
  assert nn.Mask(causal=False).all(4, 4) is None
  assert nn.Mask().block(slice(3, 5), slice(0, 4)) is None
  assert nn.Mask().block(slice(3, 5), slice(0, 5)) is not None
  assert nn.Mask(start=2).block(slice(0, 1), slice(0, 3)) is None
  assert nn.Mask(start=jnp.int32(2)).block(slice(0, 1), slice(0, 3)) is not None  # not known when compiling
  assert nn.Mask(window=9).block(slice(3, 5), slice(0, 4)) is not None
  assert MASKS['packed'].block(slice(3, 5), slice(0, 4)) is not None
