"""Cross-entropy over a large vocabulary without ever holding [B, T, V], forward or backward.

Shapes: B batch, T length, C chunk of the length, D embed, V vocabulary. Rows are taken a chunk of the length at a time;
the chunk's logits die before the next one's are made. L is what has the shape of a chunk's logits, R of its rows:
[V, X] and [X], all rows in one dimension, on a CPU, elsewhere [B, C, V] and [B, C] (`_laid`). `axis` is V's, 0 or -1.
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
    targets_BT: ids; one that is not in the vocabulary, as a learned prompt's are, needs weight 0.
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
  def chunk(axis, x_RD, *targets):
    return _sums(_logits(x_RD, w_VD, bias_V, axis), *targets, axis, *extra)[0], ()
  return _laid(chunk, columns, x_BTD, targets_BT, weights_BT)[0]


def _forward(x_BTD, w_VD, bias_V, targets_BT, weights_BT, columns, extra):
  """The gradient is formed beside the value, while the chunk's logits are there: recomputing costs a third more."""
  z, smoothing = extra
  def chunk(axis, x_RD, targets_R, weights_R):
    logits_L = _logits(x_RD, w_VD, bias_V, axis)
    sums, (lse_R, hit_L) = _sums(logits_L, targets_R, weights_R, axis, *extra)
    weights_L, lse_L = (jnp.expand_dims(x_R, axis) for x_R in (weights_R, lse_R))
    wanted_L = hit_L if not smoothing else (1 - smoothing) * hit_L + smoothing / w_VD.shape[0]
    g_L = weights_L * (jnp.exp(logits_L - lse_L) * (1 + 2 * z * lse_L) - wanted_L)
    dx_RD, *more = _derivatives(g_L, x_RD, w_VD, bias_V, axis)
    return (sums, more), dx_RD
  (sums, (dw_VD, db_V)), dx_BTD = _laid(chunk, columns, x_BTD, targets_BT, weights_BT)
  return sums, (dx_BTD, dw_VD.astype(w_VD.dtype), None if bias_V is None else db_V.astype(bias_V.dtype))


def _backward(columns, extra, residuals, cotangents):
  del columns, extra
  g = cotangents[0]
  return *jax.tree.map(lambda d: (d * g).astype(d.dtype), residuals), None, None


_nll.defvjp(_forward, _backward)


def _logits(x_RD, w_VD, bias_V, axis=-1):
  a, b, equation = (x_RD, w_VD, 'BCD,VD->BCV') if axis else (w_VD, x_RD, 'VD,XD->VX')
  logits_L = jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
  if bias_V is not None:
    logits_L = logits_L + jnp.expand_dims(bias_V.astype(jnp.float32), (0, 1) if axis else 1)
  return _constrain(logits_L, axis)


def _derivatives(g_L, x_RD, w_VD, bias_V, axis):
  """(dx_RD, dw_VD in f32, db_V or None) of the logits' g_L."""
  L, R = ('BCV', 'BC') if axis else ('VX', 'X')
  db_V = None if bias_V is None else g_L.sum((0, 1) if axis else 1)
  g_L = _constrain(g_L.astype(x_RD.dtype), axis)
  dx_RD = jnp.einsum(f'{L},VD->{R}D', g_L, w_VD).astype(x_RD.dtype)
  return dx_RD, jnp.einsum(f'{L},{R}D->VD', g_L, x_RD, preferred_element_type=jnp.float32), db_V


def _constrain(x_L, axis):
  return constrain(x_L, 'batch', 'length', 'vocab') if axis else x_L


def _hit(targets_R, like_L, axis):
  """Where a position's target is, bool L."""
  return jnp.expand_dims(targets_R, axis) == jax.lax.broadcasted_iota(jnp.int32, like_L.shape, axis % like_L.ndim)


def _sums(logits_L, targets_R, weights_R, axis, z, smoothing):
  top_R = logits_L.max(axis)
  lse_R = top_R + jnp.log(jnp.exp(logits_L - jnp.expand_dims(top_R, axis)).sum(axis))
  hit_L = _hit(targets_R, logits_L, axis)
  if sharding.local():
    target_R = jnp.take_along_axis(logits_L, jnp.expand_dims(targets_R, axis), axis, mode='clip').squeeze(axis)
  else:  # where the vocabulary is divided, reading one logit would gather them all
    target_R = jnp.where(hit_L, logits_L, 0.0).sum(axis)
  nll = (weights_R * (lse_R - target_R)).sum()
  correct = (weights_R * (target_R >= top_R)).sum()
  total = nll + z * (weights_R * lse_R**2).sum()
  if smoothing:
    total = total + smoothing * (weights_R * (target_R - logits_L.mean(axis))).sum()
  return (total, nll, correct), (lse_R, hit_L)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _token_logprobs(x_BTD, w_VD, bias_V, targets_BT, columns, temperature, entropy):
  def chunk(axis, x_RD, targets_R):
    logits_L = _logits(x_RD, w_VD, bias_V, axis) / temperature
    _, shifted_L, sum_R, entropy_R = _softmax(logits_L, entropy, axis)
    # Not an index: where the vocabulary is divided, reading one logit would gather them all.
    target_R = jnp.where(_hit(targets_R, shifted_L, axis), shifted_L, 0.0).sum(axis)
    return (), (target_R - jnp.log(sum_R), entropy_R)
  return _laid(chunk, columns, x_BTD, targets_BT)[1]


def _token_forward(x_BTD, w_VD, bias_V, targets_BT, columns, temperature, entropy):
  out = _token_logprobs(x_BTD, w_VD, bias_V, targets_BT, columns, temperature, entropy)
  return out, (x_BTD, w_VD, bias_V, targets_BT)


def _token_backward(columns, temperature, entropy, residuals, cotangents):
  x_BTD, w_VD, bias_V, targets_BT = residuals

  def chunk(axis, x_RD, targets_R, a_R, b_R=None):
    p_L, shifted_L, sum_R, entropy_R = _softmax(_logits(x_RD, w_VD, bias_V, axis) / temperature, entropy, axis)
    g_L = jnp.expand_dims(a_R, axis) * (_hit(targets_R, p_L, axis) - p_L)
    if entropy:  # d entropy / d logit = -p (log p + entropy)
      g_L = g_L - jnp.expand_dims(b_R, axis) * p_L * (shifted_L + jnp.expand_dims(entropy_R - jnp.log(sum_R), axis))
    dx_RD, *more = _derivatives(g_L / temperature, x_RD, w_VD, bias_V, axis)
    return more, dx_RD
  (dw_VD, db_V), dx_BTD = _laid(chunk, columns, x_BTD, targets_BT, *cotangents[:1 + entropy])
  return dx_BTD, dw_VD.astype(w_VD.dtype), None if bias_V is None else db_V.astype(bias_V.dtype), None


_token_logprobs.defvjp(_token_forward, _token_backward)


def _softmax(logits_L, entropy, axis):
  """(softmax, logits less their largest, the sum of those exponentials, the entropy or None)."""
  shifted_L = logits_L - logits_L.max(axis, keepdims=True)
  exp_L = jnp.exp(shifted_L)
  sum_R = exp_L.sum(axis)
  p_L = exp_L / jnp.expand_dims(sum_R, axis)
  return p_L, shifted_L, sum_R, jnp.log(sum_R) - (p_L * shifted_L).sum(axis) if entropy else None


def _laid(f, columns, *arrays):
  """`_over_chunks` of f(axis, chunks), which lays logits out as their products are fastest.

  On a CPU that is with the vocabulary first: the product then reads w in order (of 1,024 rows of 768 with 50,257 words
  Eigen's takes half the time), and dw needs no transposed copy of the logits' gradient.
  """
  last = lambda *arrays: _over_chunks(functools.partial(f, -1), columns, *arrays)
  if not sharding.local():
    return last(*arrays)

  def flat(*chunks):  # with two dimensions of rows XLA would copy operands transposed
    B, C = chunks[0].shape[:2]
    sums, rows = f(0, *(a.reshape(B * C, *a.shape[2:]) for a in chunks))
    return sums, jax.tree.map(lambda r: r.reshape(B, C, *r.shape[1:]), rows)
  return jax.lax.platform_dependent(*arrays, cpu=lambda *arrays: _over_chunks(flat, columns, *arrays), default=last)


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
