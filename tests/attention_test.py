"""Attention in blocks equals the reference, value and gradient, for every kind of mask."""

import jax
import jax.numpy as jnp
from marks import few
import numpy as np
import pytest

from lm import nn
from lm.kernels import attention


def inputs(T, N=4, K=2, H=8, B=2):
  keys = jax.random.split(jax.random.key(0), 3)
  return [jax.random.normal(k, (B, T, n, H)) for k, n in zip(keys, (N, K, K), strict=True)]


@pytest.mark.parametrize('T', few([5, 100, 129, 300], 5, 300))
@pytest.mark.parametrize('kind', ['causal', 'full', 'segments', 'window', 'bias'])
def test_equals_reference(T, kind):
  q, k, v = inputs(T)
  segments_BT = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (2, T)))[:, ::-1].copy(), jnp.int32)
  mask = {'full': nn.Mask(causal=False), 'segments': nn.Mask(q_segments_BT=segments_BT, k_segments_BS=segments_BT),
          'window': nn.Mask(window=37)}.get(kind, nn.Mask())
  bias_BNTS = jax.random.normal(jax.random.key(1), (2, 4, T, T)) if kind == 'bias' else None

  def run(attend):
    f = lambda q, k, v: attend(q, k, v, mask, bias_BNTS=bias_BNTS)
    def value_and_grads(q, k, v):
      value, pull = jax.vjp(f, q, k, v)
      return value, pull(jnp.cos(jnp.arange(value.size, dtype=jnp.float32)).reshape(value.shape))
    return jax.jit(value_and_grads)(q, k, v)
  real = np.asarray(segments_BT > 0)[..., None, None] if kind == 'segments' else 1.0
  (got, got_grads), (want, want_grads) = run(attention.attend), run(nn.attend)
  np.testing.assert_allclose(got * real, want * real, atol=1e-5)
  for a, b in zip(got_grads, want_grads, strict=True):
    assert np.isfinite(a).all()
    if kind != 'segments':
      np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize('window', [None, 37])
def test_a_prefix_is_seen_from_everywhere(window):
  """Also by blocks whose window begins behind it."""
  (q, _, _), (_, k, v), mask = inputs(300), inputs(316), nn.Mask(window=window, prefix=16, start=16)
  got, want = (jax.jit(lambda q, k, v, f=f: f(q, k, v, mask))(q, k, v) for f in (attention.attend, nn.attend))
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_padding_rows_do_not_leak_gradients():
  """Queries of segment 0 mean nothing; with their output unused, both agree to the last gradient."""
  T = 200
  q, k, v = inputs(T)
  segments_BT = jnp.where(jnp.arange(T)[None] < jnp.array([[150], [180]]), 1, 0)
  mask = nn.Mask(q_segments_BT=segments_BT, k_segments_BS=segments_BT)
  used = (segments_BT > 0)[..., None, None]
  grads = [jax.jit(jax.grad(lambda q, k, v, f=f: jnp.square(jnp.where(used, f(q, k, v, mask), 0)).sum(),
                            (0, 1, 2)))(q, k, v)
           for f in (attention.attend, nn.attend)]
  for a, b in zip(*grads, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
def test_dropout_drops_and_keeps_the_mean():
  q, k, _ = inputs(256)
  ones = jnp.ones_like(k)
  out = attention.attend(q, k, ones, nn.Mask(), rate=0.5, key=jax.random.key(3))
  assert np.asarray(out)[:, 100:].mean() == pytest.approx(1.0, abs=0.02)
  assert np.asarray(out)[:, 100:].std() > 0.02


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['causal', 'window', 'segments'])
def test_short_attention_equals_blocks_with_dropout_and_earlier_keys(kind, monkeypatch):
  """The probabilities that are kept give what those formed anew give, with the same draw."""
  S, T = 96, 64
  q, k, v = inputs(S)
  segments_BS = jnp.asarray(np.sort(np.random.default_rng(0).integers(1, 4, (2, S))), jnp.int32)
  segments = {'q_segments_BT': segments_BS[:, S - T:], 'k_segments_BS': segments_BS} if kind == 'segments' else {}
  mask = nn.Mask(start=S - T, window=20 if kind == 'window' else None, **segments)

  def run():
    f = lambda *arrays: attention.attend(*arrays, mask, rate=0.3, key=jax.random.key(5))
    value, pull = jax.vjp(f, q[:, S - T:], k, v)
    return value, f(q[:, S - T:], k, v), *pull(jnp.cos(jnp.arange(value.size, dtype=jnp.float32)).reshape(value.shape))
  short = run()
  monkeypatch.setattr(attention, 'KEPT', 0)
  for a, b in zip(short, run(), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_no_square_of_scores_is_ever_held():
  """The compiled gradient's largest temporary is far below one [B, N, T, T] array."""
  T, N = 1024, 8
  q, k, v = inputs(T, N=N, K=N, B=1)
  f = jax.jit(jax.grad(lambda q: attention.attend(q, k, v, nn.Mask()).sum()))
  text = f.lower(q).compile().as_text()
  assert f'{T},{T}]' not in text
