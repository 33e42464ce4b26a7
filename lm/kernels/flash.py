"""Exact attention as three Pallas kernels for NVIDIA GPUs (Triton): a tile of scores never leaves the registers.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, G = N / K heads a group, H head dim; in
a kernel q and k are the queries and the keys of one tile.

The forward pass keeps, beside the output, the logarithm of each query's sum of exponentials; the backward pass forms
the probabilities anew from it, once in the order of keys for their gradients and once in the order of queries
(arXiv:2307.08691 §3). Tiles that causality, the window or the segments rule out are not visited. Softmax and sums are
f32. f32 inputs, which only tests have, are multiplied as f32 and not as TF32.

Dropout is a hash of (the row's key, head, query, key), formed where it is used. It is another draw than that of
`lm.kernels.attention`'s blocks, with the same promise: it depends on the row's key and not on batch or mesh.

A kernel's name ends in its FLOPs, which no compiler tells of it: `lm.hlo` reads them there.
"""

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp
import numpy as np

from lm import nn
from lm.kernels import flash_kernels

DTYPES = jnp.bfloat16, jnp.float16  # f32 products have no tensor cores: XLA's blocks are quicker
SMALLEST = 16  # rows of the least product that tensor cores form


class Tile(NamedTuple):
  """Queries and keys that one step of a kernel takes (powers of two), warps of a program, stages of its pipeline."""

  queries: int
  keys: int
  warps: int
  stages: int


class Tiles(NamedTuple):
  """Of the three kernels: forward, gradients of keys and values, gradient of queries."""

  forward: Tile
  keys: Tile
  queries: Tile


def tiles(H: int, dtype: jax.typing.DTypeLike) -> Tiles:
  """The tiles for a head dim and dtype; the one place to tune."""
  if jnp.dtype(dtype) == jnp.float32:  # no tensor cores: what fits into registers
    return Tiles(*(Tile(16 if H > 64 else 32, 16 if H > 128 else 32, 4, 1),) * 3)
  if H > 128:
    return Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2))
  if H > 64:
    return Tiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3))
  return Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3))


def fits(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> bool:
  """Whether the kernels take these: a head dim of 16, 32, 64, 128 or 256, and one dtype of `DTYPES`."""
  H = q_BTNH.shape[3]
  return (16 <= H <= 256 and H & (H - 1) == 0 and q_BTNH.dtype == k_BSKH.dtype == v_BSKH.dtype
          and q_BTNH.dtype in DTYPES)


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: nn.Mask, *, scale: float | None = None,
           rate: float = 0.0, key: nn.Key | None = None, sizes: Tiles | None = None, interpret: bool = False
           ) -> jax.Array:
  """`nn.attend` without a bias, for what `fits`, on an NVIDIA GPU or (`interpret`) anywhere, slowly.

  The mask's start must be a Python int. A query that sees no key gets zeros, and gives no gradient.
  """
  scale = q_BTNH.shape[3] ** -0.5 if scale is None else scale
  words_BK2 = words(nn.row_keys(key, q_BTNH.shape[0], k_BSKH.shape[2])) if rate and key is not None else None
  segments, static = (mask.q_segments_BT, mask.k_segments_BS), mask.replace(q_segments_BT=None, k_segments_BS=None)
  return _attend(q_BTNH, k_BSKH, v_BSKH, segments, words_BK2, (static, scale, rate, sizes, interpret))


def words(keys_BK: jax.Array) -> jax.Array:
  """What dropout is drawn from: uint32 [B, K, 2] of a key for each row and key head."""
  draw = lambda key: jax.random.bits(jax.random.fold_in(key, 0), (2,), 'uint32')
  return jax.vmap(jax.vmap(draw))(keys_BK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BTNH, k_BSKH, v_BSKH, segments, words_BK2, options):
  return forward((q_BTNH, k_BSKH, v_BSKH), segments, words_BK2, *options)[0]


def _attend_forward(q_BTNH, k_BSKH, v_BSKH, segments, words_BK2, options):
  arrays = q_BTNH, k_BSKH, v_BSKH
  out_BTNH, sums_BNT = forward(arrays, segments, words_BK2, *options)
  return out_BTNH, (arrays, out_BTNH, sums_BNT, segments, words_BK2)


def _attend_backward(options, residuals, g_BTNH):
  arrays, out_BTNH, sums_BNT, segments, words_BK2 = residuals
  delta_BNT = (g_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
  return *backward((*arrays, g_BTNH, sums_BNT, delta_BNT), segments, words_BK2, *options), None, None


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))  # traced once for all layers
def forward(arrays: tuple[jax.Array, ...], segments: tuple[jax.Array | None, ...], words_BK2: jax.Array | None,
            static: nn.Mask, scale: float, rate: float, sizes: Tiles | None = None, interpret: bool = False
            ) -> tuple[jax.Array, jax.Array]:
  """(out [B, T, N, H], log-sum-exp of the logits f32 [B, N, T]) of arrays q_BTNH, k_BSKH, v_BSKH."""
  q_BTNH, k_BSKH, v_BSKH = arrays
  B, T, N, H = q_BTNH.shape
  sizes = tiles(H, q_BTNH.dtype) if sizes is None else sizes
  c, inputs, specs = _setting(sizes.forward, dict(q=q_BTNH, k=k_BSKH, v=v_BSKH), segments, words_BK2, static, scale,
                              rate, by_keys=False)
  return pl.pallas_call(
      functools.partial(flash_kernels.forward, c=c), grid=(pl.cdiv(T, c.queries), N, B), in_specs=[specs],
      out_specs=(specs['q'], pl.BlockSpec((None, None, T), lambda i, n, b: (b, n, 0))),
      out_shape=(jax.ShapeDtypeStruct((B, T, N, H), v_BSKH.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)),
      compiler_params=_params(sizes.forward), interpret=interpret, name=_name('forward', 2, B, N, H, c))(inputs)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def backward(arrays: tuple[jax.Array, ...], segments: tuple[jax.Array | None, ...], words_BK2: jax.Array | None,
             static: nn.Mask, scale: float, rate: float, sizes: Tiles | None = None, interpret: bool = False
             ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of q, k and v, from arrays q_BTNH, k_BSKH, v_BSKH, g_BTNH, sums_BNT, delta_BNT.

  g is the gradient of the output, delta its product with the output, summed over H, and sums the log-sum-exp.
  """
  q_BTNH, k_BSKH, v_BSKH, g_BTNH, sums_BNT, delta_BNT = arrays
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  sizes = tiles(H, q_BTNH.dtype) if sizes is None else sizes
  arrays = dict(q=q_BTNH, k=k_BSKH, v=v_BSKH, g=g_BTNH.astype(q_BTNH.dtype), sums=sums_BNT, delta=delta_BNT)
  setting = functools.partial(_setting, arrays=arrays, segments=segments, words_BK2=words_BK2, static=static,
                              scale=scale, rate=rate)
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  c, inputs, specs = setting(sizes.keys, by_keys=True)
  dk_BSKH, dv_BSKH = pl.pallas_call(
      functools.partial(flash_kernels.gradient_of_keys, c=c), grid=(pl.cdiv(S, c.keys), K, B), in_specs=[specs],
      out_specs=[specs['k'], specs['v']], out_shape=[shape(k_BSKH), shape(v_BSKH)],
      compiler_params=_params(sizes.keys), interpret=interpret, name=_name('keys', 4, B, N, H, c))(inputs)
  c, inputs, specs = setting(sizes.queries, by_keys=False)
  dq_BTNH = pl.pallas_call(
      functools.partial(flash_kernels.gradient_of_queries, c=c), grid=(pl.cdiv(T, c.queries), N, B), in_specs=[specs],
      out_specs=specs['q'], out_shape=shape(q_BTNH), compiler_params=_params(sizes.queries), interpret=interpret,
      name=_name('queries', 3, B, N, H, c))(inputs)
  return dq_BTNH, dk_BSKH, dv_BSKH


def pairs(mask: nn.Mask, T: int, S: int) -> int:
  """Pairs of query and key that are visible in a row whose segments are all one; the mask's start is a Python int."""
  t_T = mask.start + np.arange(T)
  high_T = np.clip(t_T + 1, 0, S) if mask.causal else np.full(T, S)
  low_T = np.zeros(T, int) if mask.window is None else np.clip(t_T - mask.window + 1, 0, S)
  prefix = min(mask.prefix, S)
  return int((np.maximum(high_T - low_T, 0) + prefix - np.maximum(np.minimum(high_T, prefix) - low_T, 0)).sum())


def _name(what, products, B, N, H, c):
  return f'flash_{what}_flops{2 * products * B * N * H * pairs(c.mask, c.T, c.S)}'


def _params(tile):
  return triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)


def _setting(tile, arrays, segments, words_BK2, static, scale, rate, by_keys):
  """(flash_kernels.Call, inputs, their specs) of a kernel whose programs have a tile of queries, or `by_keys`, of keys.

  A program is given all positions of its row's head, and reads what it needs. By keys its head is a
  key head, and it is given all query heads of the group.
  """
  T, N, H = arrays['q'].shape[1:]
  S, K = arrays['k'].shape[1:3]
  G = N // K
  c = flash_kernels.Call(static, scale, rate if words_BK2 is not None else 0.0, T, S, G, min(tile.queries, _rows(T)),
                         min(tile.keys, _rows(S)), segments[0] is not None)
  group = G if by_keys else None
  head = lambda n: n if by_keys or G == 1 else jax.lax.div(n, jnp.int32(G))
  wide = pl.BlockSpec((None, T, group, H), lambda i, n, b: (b, 0, n, 0))
  high = pl.BlockSpec((None, group, T), lambda i, n, b: (b, n, 0))
  keys = pl.BlockSpec((None, S, None, H), lambda i, n, b: (b, 0, head(n), 0))
  specs = dict(q=wide, g=wide, k=keys, v=keys, sums=high, delta=high)
  inputs, specs = dict(arrays), {name: specs[name] for name in arrays}
  if words_BK2 is not None:
    inputs['words'], specs['words'] = words_BK2, pl.BlockSpec((None, None, 2), lambda i, n, b: (b, head(n), 0))
  if c.packed:
    q_BT, k_BS = (jnp.broadcast_to(x, (arrays['q'].shape[0], x.shape[1])).astype(jnp.int32) for x in segments)
    bounds = _bounds(k_BS, q_BT, c.keys) if by_keys else _bounds(q_BT, k_BS, c.queries)
    inputs |= dict(q_segments=q_BT, k_segments=k_BS, bounds=bounds)
    specs |= dict(q_segments=pl.BlockSpec((None, T), lambda i, n, b: (b, 0)),
                  k_segments=pl.BlockSpec((None, S), lambda i, n, b: (b, 0)),
                  bounds=pl.BlockSpec((None, *bounds.shape[1:]), lambda i, n, b: (b, 0, 0)))
  return c, inputs, specs


def _rows(length):
  return max(SMALLEST, pl.next_power_of_2(length))


def _bounds(a_BT, b_BS, size):
  """int32 [B, tiles of a, 4]: places of b, as (first, behind the last), that some of a tile's segments may be at.

  Then those that are of the one segment that the whole tile has, where these lie side by side; else none.
  """
  a_Bit = jnp.pad(a_BT, ((0, 0), (0, -a_BT.shape[1] % size)), mode='edge').reshape(a_BT.shape[0], -1, size)
  least, most = jnp.where(a_Bit > 0, a_Bit, jnp.iinfo(jnp.int32).max).min(-1), a_Bit.max(-1)
  S, b_B1S = b_BS.shape[1], b_BS[:, None]
  place_11S = jnp.arange(S, dtype=jnp.int32)[None, None]
  match_BiS = (b_B1S > 0) & (b_B1S >= least[..., None]) & (b_B1S <= most[..., None])
  first_Bi, last_Bi = jnp.where(match_BiS, place_11S, S).min(-1), jnp.where(match_BiS, place_11S + 1, 0).max(-1)
  one_Bi = (a_Bit.min(-1) == most) & (most > 0) & (match_BiS.sum(-1) == last_Bi - first_Bi)
  return jnp.stack([first_Bi, last_Bi, *(jnp.where(one_Bi, x, 0) for x in (first_Bi, last_Bi))], -1)
