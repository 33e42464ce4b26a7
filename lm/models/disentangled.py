"""Disentangled attention of DeBERTa (arXiv:2006.03654 §3.1): content to content, content to position, and back.

Shapes: B batch, T length, N heads, H head dim, X = 2 T distances; t queries of a block, W = t + T distances it meets.
A term's scores depend on i - j through a row of a projected table. They are one product with the rows of all
distances, each query's row of which is then shifted into place: nothing is gathered, so no gradient is scattered.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lm import nn, sharding

BLOCK = 128  # queries that share a product: t + T distances are formed where each of them meets T
CACHE = 1 << 20  # bytes of all scores above which a CPU goes head by head

Tables = dict[str, jax.Array]  # 'c2p', 'p2c' -> [X, N, H]; one or both


def bucket(distance: np.ndarray, buckets: int, limit: int) -> np.ndarray:
  """Buckets of distances: exact up to buckets / 2, then logarithmic, buckets - 1 at limit - 1; 0 buckets: all exact.

  Odd in the distance; not clipped (DeBERTa-v2; microsoft/DeBERTa da_utils.py).
  """
  if not buckets:
    return distance
  middle = buckets // 2
  far = np.maximum(np.abs(distance), middle)
  log = middle + np.ceil(np.log(far / middle) / np.log((limit - 1) / middle) * (middle - 1))
  return np.where(np.abs(distance) <= middle, distance, np.sign(distance) * log).astype(np.int64)


def rows(T: int, buckets: int, limit: int) -> dict[str, np.ndarray]:
  """Row of the relative table for each of a term's X distances i - j: T - 1 .. -T for c2p, 1 - T .. T for p2c.

  The table has 2 k rows for buckets -k .. k - 1, where k is `buckets`, or `limit` without any.
  """
  k = buckets or limit
  row = lambda distance: np.clip(bucket(distance, buckets, limit) + k, 0, 2 * k - 1)
  return {'c2p': row(np.arange(T - 1, -T - 1, -1)), 'p2c': row(np.arange(1 - T, T + 1))}


def attention(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, tables: Tables, mask: nn.Mask, *, scale: float,
              rate: float = 0.0, key: nn.Key | None = None, attend: Callable[..., jax.Array] | None = None
              ) -> jax.Array:
  """softmax((q_i k_j + q_i K_d + Q_d k_j) * scale) v over j, where d = i - j -> [B, T, N, H].

  Keeps the probabilities for its derivative, and no other array of their size.

  Args:
    tables: K ('c2p') and Q ('p2c'), a projected row for each distance of `rows`; without a table, without its term.
    rate, key: dropout of the probabilities.
    attend: any function with the contract of `nn.attend`, to which the two terms are a bias; None = this module's own.
  """
  T, N = q_BTNH.shape[1:3]
  q, k, v = (x.transpose(2, 0, 1, 3) for x in (q_BTNH * scale, k_BTNH, v_BTNH))
  tables = {name: (r * scale if name == 'p2c' else r).swapaxes(0, 1) for name, r in tables.items()}
  if attend is not None:
    bias_BNTT = jax.vmap(_positions, out_axes=1)(q, k, tables) if tables else None
    return attend(q_BTNH, k_BTNH, v_BTNH, mask, bias_BNTS=bias_BNTT, scale=scale, rate=rate, key=key)
  keys_NB = None
  if key is not None and rate:
    keys_NB = jax.vmap(lambda n: nn.row_keys(nn.fold(key, n), q_BTNH.shape[0]))(jnp.arange(N))
  return _attention((q, k, tables, v), mask.all(T, T), keys_NB, rate).transpose(1, 2, 0, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(arrays, visible_BTT, keys_NB, rate):
  return _forward(arrays, visible_BTT, keys_NB, rate)[0]


def _forward(arrays, visible_BTT, keys_NB, rate):
  out, p, keep = _by_head(functools.partial(_head_forward, rate=rate), (*arrays, keys_NB), visible_BTT)
  return out, (arrays, p, keep, visible_BTT)


def _backward(rate, residuals, g_NBTH):
  arrays, p, keep, visible_BTT = residuals
  f = functools.partial(_head_backward, rate=rate)
  return _by_head(f, (*arrays, p, keep, g_NBTH), visible_BTT), None, None


_attention.defvjp(_forward, _backward)


def _by_head(f, arrays, visible_BTT):
  """f of each head: one after the other on a CPU, whose cache holds a head's scores but not all; else all at once."""
  N, B, T, _ = arrays[0].shape
  together = lambda arrays, seen: jax.vmap(lambda head: f(*head, seen))(arrays)
  if N * B * T * T * 4 <= CACHE or not sharding.local():
    return together(arrays, visible_BTT)
  one_by_one = lambda arrays, seen: jax.lax.map(lambda head: f(*head, seen), arrays)
  return jax.lax.platform_dependent(arrays, visible_BTT, cpu=one_by_one, default=together)


def _head_forward(q_BTH, k_BTH, tables, v_BTH, keys_B, visible_BTT, *, rate):
  """(out [B, T, H], probabilities [B, T, T], which of them dropout kept)."""
  T = q_BTH.shape[1]
  logits_BTT = _product('BTH,BSH->BTS', q_BTH, k_BTH)
  if tables:
    logits_BTT = logits_BTT + _positions(q_BTH, k_BTH, tables)
  if visible_BTT is not None:
    logits_BTT = jnp.where(visible_BTT, logits_BTT, nn.NEVER)
  p_BTT = jax.nn.softmax(logits_BTT).astype(v_BTH.dtype)
  keep_BTT = None if keys_B is None else jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (T, T)))(keys_B)
  out_BTH = _product('BTS,BSH->BTH', _kept(p_BTT, keep_BTT, rate), v_BTH)
  return out_BTH.astype(v_BTH.dtype), p_BTT, keep_BTT


def _head_backward(q_BTH, k_BTH, tables, v_BTH, p_BTT, keep_BTT, g_BTH, visible_BTT, *, rate):
  """Gradients of q, k, the tables and v."""
  dv_BTH = _product('BTS,BTH->BSH', _kept(p_BTT, keep_BTT, rate), g_BTH)
  dp_BTT = _kept(_product('BTH,BSH->BTS', g_BTH, v_BTH), keep_BTT, rate)
  p_BTT = p_BTT.astype(jnp.float32)
  ds_BTT = p_BTT * (dp_BTT - (p_BTT * dp_BTT).sum(-1, keepdims=True))
  if visible_BTT is not None:  # matters to queries that see no key: their probabilities are constant, not 0
    ds_BTT = jnp.where(visible_BTT, ds_BTT, 0.0)
  ds_BTT = ds_BTT.astype(q_BTH.dtype)
  dq_BTH, dk_BTH = _product('BTS,BSH->BTH', ds_BTT, k_BTH), _product('BTS,BTH->BSH', ds_BTT, q_BTH)
  d_tables = {}
  if 'c2p' in tables:
    dx_BTH, d_tables['c2p'] = _shifted_backward(q_BTH, tables['c2p'], ds_BTT)
    dq_BTH = dq_BTH + dx_BTH
  if 'p2c' in tables:
    dx_BTH, d_tables['p2c'] = _shifted_backward(k_BTH, tables['p2c'], ds_BTT.swapaxes(1, 2))
    dk_BTH = dk_BTH + dx_BTH
  return jax.tree.map(lambda d, x: d.astype(x.dtype), (dq_BTH, dk_BTH, d_tables, dv_BTH),
                      (q_BTH, k_BTH, tables, v_BTH))


def _positions(q_BTH, k_BTH, tables):
  """The terms' scores of one head, [B, T, T]."""
  parts = []
  if 'c2p' in tables:
    parts.append(_shifted(q_BTH, tables['c2p']))
  if 'p2c' in tables:
    parts.append(_shifted(k_BTH, tables['p2c']).swapaxes(1, 2))
  return sum(parts)


def _shifted(x_BTH, r_XH):
  """[B, T, T]: x_i . r[T - 1 - i + j].

  Query i of a block finds its row for j = 0 in column t - 1 - i of the product: in the flat product, with rows taken to
  be one element shorter, that is column 0 for every i.
  """
  B, T, _ = x_BTH.shape
  out = []
  for first, t, part in _blocks(T):
    y_BtW = _product('BtH,WH->BtW', x_BTH[:, first:first + t], r_XH[part])
    W = t + T
    out.append(y_BtW.reshape(B, t * W)[:, t - 1:t * W - 1].reshape(B, t, W - 1)[..., :T])
  return jnp.concatenate(out, axis=1)


def _shifted_backward(x_BTH, r_XH, g_BTT):
  """Gradients of x and r, f32, from that of `_shifted`: the same shift backwards."""
  B, T, _ = x_BTH.shape
  dx, dr_XH = [], jnp.zeros(r_XH.shape, jnp.float32)
  for first, t, part in _blocks(T):
    W = t + T
    g_BtV = jnp.pad(g_BTT[:, first:first + t], ((0, 0), (0, 1), (t - 1, 0)))  # V = W - 1
    g_BtW = g_BtV.reshape(B, (t + 1) * (W - 1))[:, :t * W].reshape(B, t, W)
    dx.append(_product('BtW,WH->BtH', g_BtW, r_XH[part]))
    dr_XH = dr_XH.at[part].add(_product('BtW,BtH->WH', g_BtW, x_BTH[:, first:first + t]))
  return jnp.concatenate(dx, axis=1), dr_XH


def _blocks(T):
  """(first query, queries, the rows of their distances) of each block."""
  sizes = [(first, min(BLOCK, T - first)) for first in range(0, T, BLOCK)]
  return [(first, t, slice(T - first - t, 2 * T - first)) for first, t in sizes]


def _kept(x, keep, rate):
  return x if keep is None else jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def _product(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

