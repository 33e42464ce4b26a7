"""Positions of Transformer-XL (arXiv:1901.02860), which a decoder may take in place of learned or rotary ones.

Shapes: B batch, T query length, S key length, X distances, D model, N heads, H head dim.
"""

import jax
import jax.numpy as jnp

from lm import nn


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
  """[..., width] of sin then cos of position * 10000^(-2i/width) (arXiv:1706.03762 §3.5, halves concatenated)."""
  half = width // 2
  freq = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions[..., None].astype(jnp.float32) * jnp.expand_dims(freq, range(positions.ndim))
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def relative_scores(w: jax.Array, content_NH: jax.Array, position_NH: jax.Array, q_BTNH: jax.Array, S: int,
                    start: int | jax.Array) -> tuple[jax.Array, jax.Array]:
  """Transformer-XL's scores (arXiv:1901.02860 §3.3): (q + u) k + (q + v) W r(i - j), for query t in slot start + t.

  Args:
    w: W, [D, N, H]. content_NH, position_NH: u and v.
    S: number of keys.

  Returns:
    q + u, and the second term [B, N, T, S] times H ** -0.5, to be added to the logits.
  """
  T, H = q_BTNH.shape[1], q_BTNH.shape[3]
  content, position = (u.astype(q_BTNH.dtype)[None, None] for u in (content_NH, position_NH))
  r_1XD = sinusoids(jnp.arange(S - 1, -T, -1), w.shape[0])[None]  # X: all distances, the largest first
  r_XNH = nn.dot(w, r_1XD.astype(q_BTNH.dtype), 'BXD,DNH->BXNH')[0]
  scores_BNTX = jnp.einsum('BTNH,XNH->BNTX', q_BTNH + position, r_XNH, preferred_element_type=jnp.float32)
  column_TS = S - 1 - (start + jnp.arange(T)[:, None] - jnp.arange(S)[None])
  index = jnp.broadcast_to(jnp.clip(column_TS, 0, S + T - 2)[None, None], (*scores_BNTX.shape[:3], S))
  return q_BTNH + content, jnp.take_along_axis(scores_BNTX, index, axis=-1) * H**-0.5
