"""Cross-entropy over a large vocabulary without ever holding [B, T, V], forward or backward.

Shapes: B batch, T length, C chunk of the length, D embed, V vocabulary. Rows are taken a chunk of the length at a time;
the chunk's logits die before the next one's are made.
"""

import functools

import jax
import jax.numpy as jnp

from lm import sharding
from lm.sharding import constrain


def weighted_nll(x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array,
                 chunk: int = 1024, z: float = 0.0, bias_V: jax.Array | None = None, smoothing: float = 0.0
                 ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sums over positions of weight * (-log softmax(x w^T + bias)[target] + z * logsumexp^2).

  Args:
    chunk: tokens whose logits exist at once, at most; at least one column of the batch.
    z: coefficient of the z-loss (PaLM §5: 1e-4).
    smoothing: share of the target that is spread over all V (arXiv:1512.00567 §7).

  Returns:
    (objective, nll, correct): f32 sums over B and T, weighted; objective includes z-loss and smoothing and is the only
    one with a gradient; `correct` counts positions whose target has the largest logit. Logits and sums are f32.
  """
  return _nll(x_BTD, w_VD, bias_V, targets_BT, weights_BT.astype(jnp.float32), _columns(x_BTD, chunk), (z, smoothing))


def sample(keys_B: jax.Array, x_BTD: jax.Array, w_VD: jax.Array, bias_V: jax.Array | None = None, chunk: int = 1024
           ) -> jax.Array:
  """ids [B, T] drawn from softmax(x w^T + bias): the largest logit after Gumbel noise, both f32. No gradient.

  Each draw depends on the key of its row and its place there, not on the chunk.
  """
  def draw(x_BCD, index_BC):
    noise = lambda key, index: jax.random.gumbel(jax.random.fold_in(key, index), w_VD.shape[:1])
    noise_BCV = jax.vmap(jax.vmap(noise, (None, 0)))(keys_B, index_BC)
    return (), (_logits(x_BCD, w_VD, bias_V) + noise_BCV).argmax(-1)
  x_BTD, w_VD, bias_V = jax.lax.stop_gradient((x_BTD, w_VD, bias_V))
  index_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1])[None], x_BTD.shape[:2])
  return _over_chunks(draw, _columns(x_BTD, chunk), x_BTD, index_BT)[1]


def token_logprobs(x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, chunk: int = 1024,
                   bias_V: jax.Array | None = None, temperature: float = 1.0, entropy: bool = False, start: int = 0
                   ) -> tuple[jax.Array, jax.Array | None]:
  """log softmax((x w^T + bias) / temperature)[target] of every position, in nats, and the entropy of that softmax.

  Both have gradients. Each position's needs a cotangent of its own, so the backward pass forms the logits of a chunk
  once more: four matmuls where `weighted_nll` needs three.

  Args:
    chunk: tokens whose logits exist at once, at most; at least one column of the batch.
    temperature: > 0, of the distribution that is scored.
    entropy: also return entropies.
    start: column from which on there is something to score; before it no logits are formed, and 0 is returned.

  Returns:
    (logprobs_BT, entropies_BT or None), f32.
  """
  x_BTD, targets_BT = x_BTD[:, start:], targets_BT[:, start:]
  found = _token_logprobs(x_BTD, w_VD, bias_V, targets_BT, _columns(x_BTD, chunk), temperature, entropy)
  return jax.tree.map(lambda x_BT: jnp.pad(x_BT, ((0, 0), (start, 0))), found) if start else found


def _columns(x_BTD, chunk):
  """The length of a chunk: no more chunks than must be, of equal length as far as that goes."""
  T = x_BTD.shape[1]
  most = max(1, min(chunk // x_BTD.shape[0], T))
  return -(-T // -(-T // most))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _nll(x_BTD, w_VD, bias_V, targets_BT, weights_BT, columns, extra):
  """Without a gradient wanted: one matmul a chunk. extra: (z, smoothing)."""
  chunk = lambda x_BCD, *targets: (_sums(_logits(x_BCD, w_VD, bias_V), *targets, *extra)[0], ())
  return _over_chunks(chunk, columns, x_BTD, targets_BT, weights_BT)[0]


def _forward(x_BTD, w_VD, bias_V, targets_BT, weights_BT, columns, extra):
  """The gradient is formed beside the value, while the chunk's logits are there: recomputing costs a third more."""
  z, smoothing = extra
  def chunk(x_BCD, targets_BC, weights_BC):
    logits_BCV = _logits(x_BCD, w_VD, bias_V)
    sums, (lse_BC, hit_BCV) = _sums(logits_BCV, targets_BC, weights_BC, *extra)
    p_BCV = jnp.exp(logits_BCV - lse_BC[..., None])
    wanted_BCV = hit_BCV if not smoothing else (1 - smoothing) * hit_BCV + smoothing / w_VD.shape[0]
    g_BCV = weights_BC[..., None] * (p_BCV * (1 + 2 * z * lse_BC[..., None]) - wanted_BCV)
    db_V = None if bias_V is None else g_BCV.sum((0, 1))
    g_BCV = constrain(g_BCV.astype(x_BCD.dtype), 'batch', 'length', 'vocab')
    dx_BCD = jnp.einsum('BCV,VD->BCD', g_BCV, w_VD)
    dw_VD = jnp.einsum('BCV,BCD->VD', g_BCV, x_BCD, preferred_element_type=jnp.float32)
    return (sums, dw_VD, db_V), dx_BCD
  (sums, dw_VD, db_V), dx_BTD = _over_chunks(chunk, columns, x_BTD, targets_BT, weights_BT)
  return sums, (dx_BTD, dw_VD.astype(w_VD.dtype), None if bias_V is None else db_V.astype(bias_V.dtype))


def _backward(columns, extra, residuals, cotangents):
  del columns, extra
  g = cotangents[0]
  return *jax.tree.map(lambda d: (d * g).astype(d.dtype), residuals), None, None


_nll.defvjp(_forward, _backward)


def _logits(x_BCD, w_VD, bias_V):
  logits_BCV = jnp.einsum('BCD,VD->BCV', x_BCD, w_VD, preferred_element_type=jnp.float32)
  if bias_V is not None:
    logits_BCV = logits_BCV + bias_V.astype(jnp.float32)[None, None]
  return constrain(logits_BCV, 'batch', 'length', 'vocab')


def _sums(logits_BCV, targets_BC, weights_BC, z, smoothing):
  top_BC = logits_BCV.max(-1)
  lse_BC = top_BC + jnp.log(jnp.exp(logits_BCV - top_BC[..., None]).sum(-1))
  hit_BCV = targets_BC[..., None] == jnp.arange(logits_BCV.shape[-1])[None, None]
  if sharding.local():
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
  else:  # where the vocabulary is divided, reading one logit would gather them all
    target_BC = jnp.where(hit_BCV, logits_BCV, 0.0).sum(-1)
  nll = (weights_BC * (lse_BC - target_BC)).sum()
  correct = (weights_BC * (target_BC >= top_BC)).sum()
  total = nll + z * (weights_BC * lse_BC**2).sum()
  if smoothing:
    total = total + smoothing * (weights_BC * (target_BC - logits_BCV.mean(-1))).sum()
  return (total, nll, correct), (lse_BC, hit_BCV)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _token_logprobs(x_BTD, w_VD, bias_V, targets_BT, columns, temperature, entropy):
  def chunk(x_BCD, targets_BC):
    logits_BCV = _logits(x_BCD, w_VD, bias_V) / temperature
    _, shifted_BCV, sum_BC, entropy_BC = _softmax(logits_BCV, entropy)
    hit_BCV = targets_BC[..., None] == jnp.arange(w_VD.shape[0])[None, None]
    # Not an index: where the vocabulary is divided, reading one logit would gather them all.
    target_BC = jnp.where(hit_BCV, shifted_BCV, 0.0).sum(-1)
    return (), (target_BC - jnp.log(sum_BC), entropy_BC)
  return _over_chunks(chunk, columns, x_BTD, targets_BT)[1]


def _token_forward(x_BTD, w_VD, bias_V, targets_BT, columns, temperature, entropy):
  out = _token_logprobs(x_BTD, w_VD, bias_V, targets_BT, columns, temperature, entropy)
  return out, (x_BTD, w_VD, bias_V, targets_BT)


def _token_backward(columns, temperature, entropy, residuals, cotangents):
  x_BTD, w_VD, bias_V, targets_BT = residuals

  def chunk(x_BCD, targets_BC, a_BC, b_BC=None):
    p_BCV, shifted_BCV, sum_BC, entropy_BC = _softmax(_logits(x_BCD, w_VD, bias_V) / temperature, entropy)
    hit_BCV = targets_BC[..., None] == jnp.arange(w_VD.shape[0])[None, None]
    g_BCV = a_BC[..., None] * (hit_BCV - p_BCV)
    if entropy:  # d entropy / d logit = -p (log p + entropy)
      g_BCV = g_BCV - b_BC[..., None] * p_BCV * (shifted_BCV + (entropy_BC - jnp.log(sum_BC))[..., None])
    g_BCV = g_BCV / temperature
    db_V = None if bias_V is None else g_BCV.sum((0, 1))
    g_BCV = constrain(g_BCV.astype(x_BCD.dtype), 'batch', 'length', 'vocab')
    dx_BCD = jnp.einsum('BCV,VD->BCD', g_BCV, w_VD).astype(x_BCD.dtype)
    dw_VD = jnp.einsum('BCV,BCD->VD', g_BCV, x_BCD, preferred_element_type=jnp.float32)
    return (dw_VD, db_V), dx_BCD
  (dw_VD, db_V), dx_BTD = _over_chunks(chunk, columns, x_BTD, targets_BT, *cotangents[:1 + entropy])
  return dx_BTD, dw_VD.astype(w_VD.dtype), None if bias_V is None else db_V.astype(bias_V.dtype), None


_token_logprobs.defvjp(_token_forward, _token_backward)


def _softmax(logits_BCV, entropy):
  """(softmax, logits less their largest, the sum of those exponentials, the entropy or None)."""
  shifted_BCV = logits_BCV - logits_BCV.max(-1, keepdims=True)
  exp_BCV = jnp.exp(shifted_BCV)
  sum_BC = exp_BCV.sum(-1)
  p_BCV = exp_BCV / sum_BC[..., None]
  return p_BCV, shifted_BCV, sum_BC, jnp.log(sum_BC) - (p_BCV * shifted_BCV).sum(-1) if entropy else None


def _over_chunks(f, columns, *arrays):
  """(sums, rows) of f(chunks [B, C, ...]) -> (tree to sum, tree of rows [B, C, ...], laid end to end).

  A remainder is padded with zeros, so a prime length costs one partly empty chunk; what f makes of it must not count.
  """
  B, T = arrays[0].shape[:2]
  if columns == T:
    return f(*arrays)

  def cut(a):
    padded = jnp.pad(a, ((0, 0), (0, -T % columns), *((0, 0),) * (a.ndim - 2)))
    return jnp.moveaxis(padded.reshape(B, -1, columns, *a.shape[2:]), 1, 0)

  def body(sums, chunks):
    more, rows = f(*chunks)
    return jax.tree.map(jnp.add, sums, more), rows
  chunks = tuple(map(cut, arrays))
  zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f, *(a[0] for a in chunks))[0])
  sums, rows = jax.lax.scan(body, zero, chunks)
  return sums, jax.tree.map(lambda r: jnp.moveaxis(r, 0, 1).reshape(B, -1, *r.shape[3:])[:, :T], rows)
