"""Exact attention in query blocks: a causal block never touches keys ahead of it, and [B, N, T, S] is never held.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim, C block of queries.
"""

import jax
import jax.numpy as jnp

from lm import nn

BLOCK = 128  # queries; large enough for full-rate matmuls, small enough to skip nearly half of a causal square


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: nn.Mask, *, bias_BNTS: jax.Array | None = None,
           scale: float | None = None, rate: float = 0.0, key: jax.Array | None = None) -> jax.Array:
  """`nn.attend` by blocks of `BLOCK` queries; the same arguments, shapes and values.

  One query block, or a mask whose start is traced (decoding), goes to the reference.
  """
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  if T <= BLOCK or not isinstance(mask.start, int):
    return nn.attend(q_BTNH, k_BSKH, v_BSKH, mask, bias_BNTS=bias_BNTS, scale=scale, rate=rate, key=key)
  out = []
  for i, first in enumerate(range(0, T, BLOCK)):
    rows = slice(first, min(first + BLOCK, T))
    columns = slice(_first_key(mask, rows), min(mask.start + rows.stop, S) if mask.causal else S)
    part = None if bias_BNTS is None else bias_BNTS[:, :, rows, columns]
    k_BsKH, v_BsKH = k_BSKH[:, columns], v_BSKH[:, columns]
    out.append(nn.attend(q_BTNH[:, rows], k_BsKH, v_BsKH, mask.cut(rows, columns), bias_BNTS=part, scale=scale, rate=rate,
                         key=None if key is None else jax.random.fold_in(key, i)))
  return jnp.concatenate(out, axis=1)


def _first_key(mask: nn.Mask, rows: slice) -> int:
  """The first key that any of these queries may see, rounded down to a block."""
  if mask.window is None:
    return 0
  return max(0, mask.start + rows.start - mask.window + 1) // BLOCK * BLOCK
