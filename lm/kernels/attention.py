"""Exact attention in query blocks: a causal block never touches keys ahead of it, and no large [B, N, T, S] is held.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, G = N / K heads a group, H head dim; t
and s a block's queries and its keys, X = G * t rows of queries that share keys.

The derivative recomputes each block's probabilities from the saved logarithm of their sum, as FlashAttention does
(arXiv:2205.14135 §3.1), so nothing of a block outlives it. Programs for NVIDIA GPUs do the same in the kernels of
`lm.kernels.flash`, where these fit the arrays. Of short sequences in f32 the probabilities are few, and are kept.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm import nn, sharding
from lm.kernels import flash

SMALLEST, MOST = 128, 8  # a block has at least so many queries; there are at most so many blocks, which are unrolled
KEPT = 16 << 20  # bytes of scores, if they are one block: to keep them saves a CPU a seventh to a third of its time
CACHE = 5 << 18  # bytes of a block's scores that a CPU core works on at once


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: nn.Mask, *,
           bias_BNTS: jax.Array | None = None, scale: float | None = None, rate: float = 0.0,
           key: nn.Key | None = None, kernels: bool = True) -> jax.Array:
  """`nn.attend` by blocks of queries; the same arguments, shapes and values.

  A mask whose start is traced (decoding) and few queries go to the reference; so does each block where there is a bias.
  `kernels`: on an NVIDIA GPU, use those of `flash` where they fit; their dropout is another draw.
  """
  T, H = q_BTNH.shape[1], q_BTNH.shape[3]
  scale = H**-0.5 if scale is None else scale
  if T <= SMALLEST // 8 or not isinstance(mask.start, int):
    return nn.attend(q_BTNH, k_BSKH, v_BSKH, mask, bias_BNTS=bias_BNTS, scale=scale, rate=rate, key=key)
  if bias_BNTS is None:
    segments, static = (mask.q_segments_BT, mask.k_segments_BS), mask.replace(q_segments_BT=None, k_segments_BS=None)
    keys_BK = nn.row_keys(key, q_BTNH.shape[0], k_BSKH.shape[2]) if rate and key is not None else None
    if _is_short(q_BTNH, k_BSKH, v_BSKH, mask):
      return _short(q_BTNH, k_BSKH, v_BSKH, segments, keys_BK, static, scale, rate)
    return _attend(q_BTNH, k_BSKH, v_BSKH, segments, keys_BK, static, scale, rate, kernels)
  out = [nn.attend(q_BTNH[:, rows], k_BSKH[:, columns], v_BSKH[:, columns], mask.cut(rows, columns),
                   bias_BNTS=bias_BNTS[:, :, rows, columns], scale=scale, rate=rate, key=nn.fold(key, i))
         for i, (rows, columns) in enumerate(_blocks(mask, T, k_BSKH.shape[1]))]
  return jnp.concatenate(out, axis=1)


def _blocks(mask: nn.Mask, T: int, S: int) -> list[tuple[slice, slice]]:
  """(queries, keys that any of them may see) of each block."""
  size = max(SMALLEST, -(-T // MOST // SMALLEST) * SMALLEST)
  blocks = []
  for first in range(0, T, size):
    rows = slice(first, min(first + size, T))
    start = 0 if mask.window is None or mask.prefix else max(0, mask.start + first - mask.window + 1) // size * size
    blocks.append((rows, slice(start, min(mask.start + rows.stop, S) if mask.causal else S)))
  return blocks


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _attend(q_BTNH, k_BSKH, v_BSKH, segments, keys_BK, static, scale, rate, kernels):
  return _forward(q_BTNH, k_BSKH, v_BSKH, segments, keys_BK, static, scale, rate, kernels)[0]


def _forward(q_BTNH, k_BSKH, v_BSKH, segments, keys_BK, static, scale, rate, kernels):
  arrays = (q_BTNH, k_BSKH, v_BSKH)
  options = dict(static=static, scale=scale, rate=rate)
  out_BTNH, sums_BNT = _by_parts(functools.partial(_forward_part, **options), static, arrays, segments, keys_BK,
                                 _kernels(flash.forward, (4, 3), **options) if kernels else None)
  return out_BTNH, (arrays, out_BTNH, sums_BNT, segments, keys_BK)


def _backward(static, scale, rate, kernels, residuals, g_BTNH):
  arrays, out_BTNH, sums_BNT, segments, keys_BK = residuals
  delta_BNT = (g_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
  options = dict(static=static, scale=scale, rate=rate)
  grads = _by_parts(functools.partial(_backward_part, **options), static, (*arrays, g_BTNH, sums_BNT, delta_BNT),
                    segments, keys_BK, _kernels(flash.backward, (4, 4, 4), **options) if kernels else None)
  return *grads, None, None


_attend.defvjp(_forward, _backward)


def _by_parts(f, static, arrays, segments, keys_BK, kernels):
  """f over parts of the batch and heads whose scores stay in a CPU's cache; `kernels` or f over the whole elsewhere.

  Both backward parts take what either forward part saves, as they differ in nothing but dropout's draw.
  """
  B, T, K, S = arrays[0].shape[0], arrays[0].shape[1], arrays[1].shape[2], arrays[1].shape[1]
  groups = arrays[0].shape[2] // K
  rows, columns = _blocks(static, T, S)[-1]
  heads = CACHE // (4 * groups * (rows.stop - rows.start) * (columns.stop - columns.start))
  most = lambda whole, bound: max(d for d in range(1, whole + 1) if whole % d == 0 and d <= max(bound, 1))
  k = most(K, heads)
  b = most(B, heads // K)
  ways = {}
  if sharding.local():  # elsewhere a loop over parts would gather what the mesh keeps apart
    ways['cpu'] = lambda arrays, segments, keys_BK: _mapped(f, b, k, arrays, _seen(static, segments, T, S), keys_BK)
  if kernels is not None and flash.fits(*arrays[:3]) and _places(arrays) is not None:
    ways['cuda'] = kernels
  whole = lambda arrays, segments, keys_BK: f(arrays, _seen(static, segments, T, S), keys_BK)
  return jax.lax.platform_dependent(arrays, segments, keys_BK, **ways, default=whole) if ways else whole(
      arrays, segments, keys_BK)


def _places(arrays):
  """(axes of the mesh that rows are divided over, that heads are) of those left to the compiler; None: unevenly."""
  mesh = jax.sharding.get_abstract_mesh()
  free = lambda axes: tuple(a for a in axes if a in mesh.axis_names and a not in mesh.manual_axes)
  rows, heads = free(sharding.ROWS), free(('tensor',))
  ways = lambda axes: math.prod(mesh.shape[a] for a in axes)
  even = arrays[0].shape[0] % ways(rows) == 0 and arrays[1].shape[2] % ways(heads) == 0
  return (rows, heads) if even else None


def _kernels(f, outs, *, static, scale, rate):
  """`flash.forward` or `backward`, whose results have `outs` dimensions; on a mesh, of each device's rows and heads:
  the compiler cannot divide a kernel."""
  part = lambda arrays, segments, words_BK2: f(arrays, segments, words_BK2, static, scale, rate)

  def run(arrays, segments, keys_BK):
    words_BK2 = None if keys_BK is None else flash.words(keys_BK)
    if sharding.local():
      return part(arrays, segments, words_BK2)
    rows, heads = _places(arrays)
    by_row, by_head = PartitionSpec(rows), {3: PartitionSpec(rows, heads), 4: PartitionSpec(rows, None, heads)}
    parts = jax.shard_map(part, mesh=jax.sharding.get_abstract_mesh(), axis_names={*rows, *heads}, check_vma=False,
                          in_specs=(tuple(by_head[x.ndim] for x in arrays), by_row, by_head[3]),
                          out_specs=tuple(by_head[dimensions] for dimensions in outs))
    return parts(arrays, segments, words_BK2)
  return run


def _mapped(f, b, k, arrays, seen, keys_BK):
  B, K = arrays[0].shape[0], arrays[1].shape[2]
  shape = (B // b, K // k)

  def part(ij):
    i, j = ij // shape[1], ij % shape[1]
    rows = lambda x: jax.lax.dynamic_slice_in_dim(x, i * b, b, 0) if len(x) > 1 else x
    heads = lambda x, n: jax.lax.dynamic_slice_in_dim(x, j * n, n, x.ndim - 2)  # the last dimension but one
    cut = lambda x: heads(rows(x), x.shape[-2] // shape[1])
    keys = None if keys_BK is None else jax.lax.dynamic_slice_in_dim(rows(keys_BK), j * k, k, 1)
    return f(jax.tree.map(cut, arrays), jax.tree.map(rows, seen), keys)
  if shape == (1, 1):
    return f(arrays, seen, keys_BK)
  outs = jax.lax.map(part, jnp.arange(shape[0] * shape[1]))

  def whole(x):  # [parts, b, ..., n, last] -> [B, ..., N, last]
    x = jnp.moveaxis(x.reshape(*shape, *x.shape[1:]), 1, -3)
    return x.reshape(B, *x.shape[2:-3], -1, x.shape[-1])
  return jax.tree.map(whole, outs)


def _forward_part(arrays, seen, keys_BK, *, static, scale, rate):
  """(out [B, T, N, H], log-sum-exp of the logits [B, N, T])."""
  q_BTNH, k_BKSH, v_BKSH = arrays[0], _heads_first(arrays[1]), _heads_first(arrays[2])
  outs, sums = [], []
  for i, (rows, columns) in enumerate(_blocks(static, q_BTNH.shape[1], k_BKSH.shape[2])):
    q_BKXH = _group(q_BTNH[:, rows] * scale, k_BKSH.shape[1])
    logits_BKXs = _product('BKXH,BKSH->BKXS', q_BKXH, k_BKSH[:, :, columns])
    if seen[i] is not None:
      shape = *logits_BKXs.shape[:2], -1, *seen[i].shape[1:]  # [B, K, G, t, s]
      logits_BKXs = jnp.where(seen[i][:, None, None], logits_BKXs.reshape(shape), nn.NEVER).reshape(logits_BKXs.shape)
    top_BKX1 = logits_BKXs.max(-1, keepdims=True)
    p_BKXs = jnp.exp(logits_BKXs - top_BKX1)
    sum_BKX1 = p_BKXs.sum(-1, keepdims=True)
    if keys_BK is not None:
      p_BKXs = p_BKXs * _keep(keys_BK, i, p_BKXs.shape, rate)
    p_BKXs = p_BKXs.astype(v_BKSH.dtype)
    x_BKXH = _product('BKXS,BKSH->BKXH', p_BKXs, v_BKSH[:, :, columns]) / sum_BKX1
    outs.append(_ungroup(x_BKXH, rows).astype(v_BKSH.dtype))
    sums.append((top_BKX1 + jnp.log(sum_BKX1)).reshape(q_BTNH.shape[0], q_BTNH.shape[2], -1))
  return jnp.concatenate(outs, axis=1), jnp.concatenate(sums, axis=2)


def _backward_part(arrays, seen, keys_BK, *, static, scale, rate):
  """Gradients of q, k, v. Scores are formed transposed, [keys, queries]: fewer products of them need a transpose."""
  q_BTNH, k_BSKH, v_BSKH, g_BTNH, sums_BNT, delta_BNT = arrays
  k_BKSH, v_BKSH = _heads_first(k_BSKH), _heads_first(v_BSKH)
  # Sharding is stated, as the compiler would keep these sums whole on every device.
  zeros = sharding.constrain(jnp.zeros(k_BKSH.shape, jnp.float32), 'batch', 'kv_heads', 'length', 'head_dim')
  dk_BKSH = dv_BKSH = zeros
  dqs = []
  for i, (rows, columns) in enumerate(_blocks(static, q_BTNH.shape[1], k_BKSH.shape[2])):
    k_BKsH, v_BKsH = k_BKSH[:, :, columns], v_BKSH[:, :, columns]
    q_BKXH, g_BKXH = (_group(x[:, rows], k_BKSH.shape[1]) for x in (q_BTNH * scale, g_BTNH))
    logits_BKsX = _product('BKSH,BKXH->BKSX', k_BKsH, q_BKXH)
    shape = *logits_BKsX.shape[:3], q_BTNH.shape[2] // k_BKSH.shape[1], rows.stop - rows.start  # [B, K, s, G, t]
    sums_BK1Gt, delta_BK1Gt = (x[:, :, rows].reshape(*shape[:2], 1, *shape[3:]) for x in (sums_BNT, delta_BNT))
    p_BKsGt = jnp.exp(logits_BKsX.reshape(shape) - sums_BK1Gt)
    if seen[i] is not None:
      p_BKsGt = jnp.where(_by_key(seen[i]), p_BKsGt, 0.0)
    dp_BKsGt = _product('BKSH,BKXH->BKSX', v_BKsH, g_BKXH).reshape(shape)
    kept_BKsGt = p_BKsGt
    if keys_BK is not None:
      keep = _keep(keys_BK, i, logits_BKsX.swapaxes(2, 3).shape, rate).swapaxes(2, 3).reshape(shape)
      kept_BKsGt, dp_BKsGt = p_BKsGt * keep, dp_BKsGt * keep
    kept_BKsX = kept_BKsGt.astype(g_BKXH.dtype).reshape(logits_BKsX.shape)
    ds_BKsX = (p_BKsGt * (dp_BKsGt - delta_BK1Gt)).astype(q_BKXH.dtype).reshape(logits_BKsX.shape)
    dv_BKSH = dv_BKSH.at[:, :, columns].add(_product('BKSX,BKXH->BKSH', kept_BKsX, g_BKXH))
    dk_BKSH = dk_BKSH.at[:, :, columns].add(_product('BKSX,BKXH->BKSH', ds_BKsX, q_BKXH))
    dqs.append(_ungroup(_product('BKSX,BKSH->BKXH', ds_BKsX, k_BKsH) * scale, rows))
  grads = jnp.concatenate(dqs, axis=1), _heads_first(dk_BKSH), _heads_first(dv_BKSH)
  return tuple(d.astype(x.dtype) for d, x in zip(grads, arrays, strict=False))


def _is_short(q_BTNH, k_BSKH, v_BSKH, mask):
  """Is it for `_short`? On one device, f32, one block, scores of at most `KEPT` bytes."""
  (B, T, N, _), S = q_BTNH.shape, k_BSKH.shape[1]
  exact = all(x.dtype == jnp.float32 for x in (q_BTNH, k_BSKH, v_BSKH))  # a GPU's kernels take the others
  return exact and sharding.local() and len(_blocks(mask, T, S)) == 1 and 4 * B * N * T * S <= KEPT


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _short(q_BTNH, k_BSKH, v_BSKH, segments, keys_BK, static, scale, rate):
  """Attention in one block. Where there will be a derivative the probabilities are kept, [keys, queries], for it."""
  return _forward(q_BTNH, k_BSKH, v_BSKH, segments, keys_BK, static, scale, rate, False)[0]


def _short_forward(q_BTNH, k_BSKH, v_BSKH, segments, keys_BK, static, scale, rate):
  (B, T, N, _), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
  q_BKXH, k_BKSH, v_BKHS = _group(q_BTNH * scale, K), _heads_first(k_BSKH), _heads_first(v_BSKH).swapaxes(2, 3)
  logits_BKSX = _product('BKSH,BKXH->BKSX', k_BKSH, q_BKXH)
  (seen_BTS,) = _seen(static, segments, T, S)
  if seen_BTS is not None:
    logits_BKSGT = logits_BKSX.reshape(B, K, S, N // K, T)
    logits_BKSX = jnp.where(_by_key(seen_BTS), logits_BKSGT, nn.NEVER).reshape(logits_BKSX.shape)
  p_BKSX = jax.nn.softmax(logits_BKSX, axis=2)
  keep = None if keys_BK is None else _keep(keys_BK, 0, (B, K, N // K * T, S), rate).swapaxes(2, 3)
  out_BKHX = _product('BKHS,BKSX->BKHX', v_BKHS, _kept(p_BKSX, keep))
  return _ungroup(out_BKHX.swapaxes(2, 3), slice(0, T)), (q_BKXH, k_BKSH, v_BKHS, p_BKSX, keep)


def _short_backward(static, scale, rate, residuals, g_BTNH):
  del static, rate
  q_BKXH, k_BKSH, v_BKHS, p_BKSX, keep = residuals
  g_BKXH = _group(g_BTNH, k_BKSH.shape[1])
  dp_BKSX = _kept(_product('BKSH,BKXH->BKSX', v_BKHS.swapaxes(2, 3), g_BKXH), keep)
  ds_BKSX = p_BKSX * (dp_BKSX - (p_BKSX * dp_BKSX).sum(2, keepdims=True))
  dq_BKHX = _product('BKHS,BKSX->BKHX', k_BKSH.swapaxes(2, 3), ds_BKSX) * scale
  dk_BKSH = _product('BKSX,BKXH->BKSH', ds_BKSX, q_BKXH)
  dv_BKSH = _product('BKSX,BKXH->BKSH', _kept(p_BKSX, keep), g_BKXH)
  dq_BTNH = _ungroup(dq_BKHX.swapaxes(2, 3), slice(0, g_BTNH.shape[1]))
  return dq_BTNH, _heads_first(dk_BKSH), _heads_first(dv_BKSH), None, None


_short.defvjp(_short_forward, _short_backward)


def _kept(x, keep):
  return x if keep is None else x * keep


def _product(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _heads_first(x_BSKH):
  """[B, S, K, H] <-> [B, K, S, H]."""
  return x_BSKH.swapaxes(1, 2)


def _group(x_BtNH, K):
  """[B, t, N, H] -> [B, K, G * t, H]: the queries that share keys are rows of one matrix."""
  B, t, N, H = x_BtNH.shape
  if N == K:
    return _heads_first(x_BtNH)  # XLA on a CPU does not see that it is no more than this
  return x_BtNH.reshape(B, t, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * t, H)


def _ungroup(x_BKXH, rows):
  """Inverse of `_group`."""
  (B, K, X, H), t = x_BKXH.shape, rows.stop - rows.start
  if X == t:
    return _heads_first(x_BKXH)
  return x_BKXH.reshape(B, K, X // t, t, H).transpose(0, 3, 1, 2, 4).reshape(B, t, K * X // t, H)


def _seen(static, segments, T, S):
  """Of each block bool [B or 1, t, s], which keys a query sees, or None where it sees all.

  What loops over parts do with scores XLA vectorises on a CPU only if this is formed before, and no dimension of the
  scores stands for two, such as X. For that up to [B, T, S] bytes are held, of all heads and layers the same.
  """
  mask = static.replace(q_segments_BT=segments[0], k_segments_BS=segments[1])
  return [mask.block(rows, columns) for rows, columns in _blocks(mask, T, S)]


def _by_key(seen_Bts):
  """[B, t, s] -> [B, 1, s, 1, t], for scores [B, K, s, G, t]."""
  return seen_Bts.swapaxes(1, 2)[:, None, :, None]


def _keep(keys_BK, i, shape, rate):
  """Dropout's factors of the i-th block, f32 [B, K, X, s]: 0 or 1 / (1 - rate)."""
  one = lambda key: jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, shape[2:])
  return jax.vmap(jax.vmap(one))(keys_BK) / jnp.float32(1 - rate)
