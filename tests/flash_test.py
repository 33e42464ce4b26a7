"""The kernels of lm/kernels/flash.py: interpreted they equal the reference; for an H100 they compile."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import hlo, nn, sharding, targets
from lm.kernels import attention, flash

SIZES = flash.Tiles(flash.Tile(16, 32, 4, 2), flash.Tile(16, 16, 4, 2), flash.Tile(32, 16, 4, 2))
attend = functools.partial(flash.attend, sizes=SIZES, interpret=True)


def inputs(T, S, N, K, H=16, B=2, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 4)
  return [jax.random.normal(k, (B, t, n, H), dtype)
          for k, t, n in zip(keys, (T, S, S, T), (N, K, K, N), strict=True)]


def documents(*rows):
  """Segments of rows of documents with these lengths; 0 is padding."""
  return jnp.array([[i for i, n in row for _ in range(n)] for row in rows], jnp.int32)


def run(f, mask, q, k, v, g):
  """(out, gradients of q, k, v)."""
  def both(q, k, v, g):
    out, pull = jax.vjp(lambda q, k, v: f(q, k, v, mask), q, k, v)
    return out, *pull(g)
  return jax.jit(both)(q, k, v, g)


PACKED = documents([(1, 7), (2, 30), (3, 8), (0, 5)], [(4, 50)])
PADDED = documents([(1, 50)], [(0, 3), (1, 30), (0, 17)])


@pytest.mark.slow
@pytest.mark.parametrize('mask, T, S, N, K', [
    (nn.Mask(), 50, 50, 4, 2), (nn.Mask(), 1, 1, 1, 1), (nn.Mask(causal=False), 33, 70, 2, 2),
    (nn.Mask(window=7), 64, 64, 4, 1), (nn.Mask(start=20, window=25), 31, 51, 2, 2),
    (nn.Mask(causal=False, window=9), 40, 40, 1, 1), (nn.Mask(start=5, prefix=5, window=9), 50, 55, 2, 1),
    (nn.Mask(q_segments_BT=PACKED, k_segments_BS=PACKED), 50, 50, 4, 2),
    (nn.Mask(causal=False, q_segments_BT=PADDED, k_segments_BS=PADDED), 50, 50, 2, 2),
    (nn.Mask(start=4, prefix=4, q_segments_BT=PACKED, k_segments_BS=jnp.pad(PACKED, ((0, 0), (4, 0)))), 50, 54, 2, 2)],
    ids=['causal', 'one', 'full', 'window', 'start', 'behind', 'prefix', 'packed', 'padded', 'prefix_packed'])
def test_equals_reference(mask, T, S, N, K):
  q, k, v, g = inputs(T, S, N, K)
  seen = jnp.ones((1, T, S), bool) if mask.all(T, S) is None else mask.all(T, S)
  real = seen.any(-1)[..., None, None]  # the output of a query that sees no key means nothing
  got, want = (run(f, mask, q, k, v, g * real) for f in (attend, nn.attend))
  np.testing.assert_allclose(got[0] * real, want[0] * real, atol=1e-5)
  assert not np.any(got[0] * ~real)
  for a, b in zip(got[1:], want[1:], strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize('mask, T, S', [
    (nn.Mask(), 50, 50), (nn.Mask(causal=False), 33, 70), (nn.Mask(window=7), 64, 64), (nn.Mask(start=20), 31, 40),
    (nn.Mask(start=20, window=25), 31, 51), (nn.Mask(causal=False, window=9), 40, 40),
    (nn.Mask(start=9, window=3), 5, 6), (nn.Mask(start=5, prefix=5, window=9), 50, 55),
    (nn.Mask(start=2, prefix=90, window=2), 20, 22)])
def test_visible_pairs_are_counted(mask, T, S):
  seen = mask.all(T, S)
  assert flash.pairs(mask, T, S) == (T * S if seen is None else int(seen.sum()))


def test_a_query_that_sees_no_key_gives_no_gradient():
  q, k, v, g = inputs(50, 50, 2, 2)
  mask = nn.Mask(q_segments_BT=PADDED, k_segments_BS=PADDED)
  empty = (PADDED == 0)[..., None, None]
  for gradient in run(attend, mask, q, k, v, g * empty)[1:]:
    assert not np.any(gradient)


def test_scale():
  q, k, v, g = inputs(20, 20, 1, 1)
  got, want = (run(functools.partial(f, scale=0.7), nn.Mask(), q, k, v, g) for f in (attend, nn.attend))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_half_precision():
  """Output and gradients are as near to f32's as the inputs' rounding."""
  q, k, v, g = inputs(40, 40, 2, 1, dtype=jnp.bfloat16)
  got = run(attend, nn.Mask(), q, k, v, g)
  want = run(nn.attend, nn.Mask(), *(x.astype(jnp.float32) for x in (q, k, v, g)))
  for a, b in zip(got, want, strict=True):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * float(jnp.abs(b).max()))


def kept(key, rate, B, T, N, K, S=64, f=attend):
  """bool [B, T, N, S] that dropout keeps: with equal scores and the identity as values the output is the mask."""
  eye = jnp.broadcast_to(jnp.eye(S)[None, :, None], (B, S, K, S))
  zeros = jnp.zeros((B, T, N, S))
  out = jax.jit(lambda key: f(zeros, jnp.zeros_like(eye), eye, nn.Mask(causal=False), rate=rate, key=key))(key)
  np.testing.assert_allclose(out[out > 0], 1 / S / (1 - rate), rtol=1e-5)
  return np.asarray(out > 0)


def test_dropout_is_fair_and_independent():
  rate = 0.25
  keep = kept(jax.random.key(1), rate, 2, 128, 4, 2).astype(float)
  n = keep.size
  assert abs(keep.mean() - (1 - rate)) < 4 * (rate * (1 - rate) / n) ** 0.5  # so probabilities are kept on average
  for axis in range(4):  # row, query, head (of one key head, and of two), key
    a, b = (np.take(keep, range(i, keep.shape[axis] - 1 + i), axis) - keep.mean() for i in (0, 1))
    assert abs((a * b).mean() / keep.var()) < 4 / a.size**0.5
  x = keep - keep.mean()
  corners = x[:, 1:, :, 1:] * x[:, :-1, :, 1:] * x[:, 1:, :, :-1] * x[:, :-1, :, :-1]  # a hash of t ^ s would tie them
  assert abs(corners.mean() / keep.var() ** 2) < 4 / n**0.5


@pytest.mark.slow
def test_dropout_depends_on_the_rows_key_alone():
  key, rate = jax.random.key(2), 0.5
  want = kept(key, rate, 3, 20, 4, 2)
  rows = kept(nn.Keys(key, jnp.array([2, 0])), rate, 2, 20, 4, 2)
  np.testing.assert_array_equal(rows, want[jnp.array([2, 0])])
  one = flash.Tiles(*(flash.Tile(32, 64, 4, 1),) * 3)
  np.testing.assert_array_equal(kept(key, rate, 3, 20, 4, 2, f=functools.partial(attend, sizes=one)), want)
  assert (kept(jax.random.key(3), rate, 3, 20, 4, 2) != want).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_dropout_is_the_same_backward():
  """Against softmax and a given mask, with the gradients of all three."""
  T, N, K, rate, key = 64, 4, 2, 0.4, jax.random.key(4)
  keep = kept(key, rate, 2, T, N, K, S=T) / (1 - rate)
  q, k, v, g = inputs(T, T, N, K, H=16)

  def reference(q, k, v, mask):
    k, v = (jnp.repeat(x, N // K, 2) for x in (k, v))
    logits = jnp.where(mask.all(T, T)[:, None], jnp.einsum('BTNH,BSNH->BNTS', q, k) / 4, nn.NEVER)
    return jnp.einsum('BNTS,BTNS,BSNH->BTNH', jax.nn.softmax(logits), keep, v)
  got = run(lambda *a: attend(*a, rate=rate, key=key), nn.Mask(), q, k, v, g)
  for a, b in zip(got, run(reference, nn.Mask(), q, k, v, g), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_fits():
  array = lambda H, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, 32, 2, H), dtype)
  assert all(flash.fits(*[array(H)] * 3) for H in (16, 64, 256))
  assert not any(flash.fits(*[array(H)] * 3) for H in (8, 48, 512))
  assert not flash.fits(array(64), array(64), array(64, jnp.float32))


def test_on_a_cpu_nothing_of_the_kernels_is_left():
  q, k, v, g = inputs(64, 64, 2, 2)
  dropped = functools.partial(attention.attend, rate=0.1, key=jax.random.key(0))
  text = jax.jit(functools.partial(run, dropped, nn.Mask())).lower(q, k, v, g).as_text()
  assert 'triton' not in text and 'flash' not in text


@pytest.mark.slow
@pytest.mark.parametrize('dtype, H, rate', [(jnp.bfloat16, 64, 0.1), (jnp.bfloat16, 256, 0.0), (jnp.float16, 128, 0.0)])
@pytest.mark.filterwarnings('ignore:Error reading persistent compilation cache entry')
def test_for_an_h100(dtype, H, rate):
  """Forward and backward are three kernels, and no [T, S] is held; on a mesh each device runs its rows and heads."""
  pytest.importorskip('jax_plugins.xla_cuda12')
  B, T, N, K = 4, 1024, 4, 2
  mesh = sharding.make_mesh(sharding.Config(data=2, tensor=2), targets.devices(targets.parse('h100:1x4')))
  key = jax.random.key(0)
  with sharding.use(mesh):
    place = jax.NamedSharding(mesh, sharding.partition(('batch', 'length', 'heads', 'head_dim')))
    array = lambda n: jax.ShapeDtypeStruct((B, T, n, H), dtype, sharding=place)
    segments = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=sharding.batch_sharding(mesh))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))

    def step(q, k, v, g, segments, key):
      mask = nn.Mask(q_segments_BT=segments, k_segments_BS=segments)
      return run(functools.partial(attention.attend, rate=rate, key=key), mask, q, k, v, g)
    done = jax.jit(step).lower(array(N), array(K), array(K), array(N), segments, key).compile()
  text = done.as_text()
  assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3
  assert sum(hlo.flops(text).values()) == 2 * 9 * H * (B // 2) * (N // 2) * T * (T + 1) / 2  # nine products of pairs
  assert f'[{B // 2},{T},{N // 2},{H}]' in text and f'{T},{T}]' not in text and 'all-gather' not in text
  assert done.memory_analysis().temp_size_in_bytes < T * T
