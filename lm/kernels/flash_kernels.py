"""What runs in one program of `lm.kernels.flash`: a tile of queries against the keys they see, or of keys.

Shapes: q and k are the queries and the keys of a tile, H head dim, 1 a dimension that broadcasts. `x` is a dict of
references to what a program is given: all positions of its row's head, of which it reads tiles.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp

from lm import nn

LOG2E = math.log2(math.e)


class Call(NamedTuple):
  """What a kernel knows when it is compiled; queries and keys: of its tile."""

  mask: nn.Mask
  scale: float
  rate: float
  T: int
  S: int
  G: int
  queries: int
  keys: int
  packed: bool


def forward(x, out_ref, sums_ref, *, c):
  """Output and log-sum-exp of a tile of queries: softmax with a running maximum (arXiv:2205.14135 algorithm 1)."""
  i, member = _place(c)
  first = i * c.queries
  t_q1 = first + jnp.arange(c.queries, dtype=jnp.int32)[:, None]
  q_qH = _load(x['q'], first, c.queries, c.T)
  q_segments = _load(x['q_segments'], first, c.queries, c.T)[:, None] if c.packed else None

  def step(j, carry, masked):
    top_q1, total_q1, sum_qH = carry
    s_1k, k_kH, v_kH, visible = _key_tile(x, c, j, t_q1, q_segments, masked)
    logits_qk = _dot(q_qH, k_kH, 1, 1) * (c.scale * LOG2E)
    if masked:
      logits_qk = jnp.where(visible, logits_qk, -jnp.inf)
    new_q1 = jnp.maximum(top_q1, logits_qk.max(1)[:, None])
    base_q1 = jnp.where(new_q1 == -jnp.inf, 0.0, new_q1) if masked else new_q1
    p_qk, shrink_q1 = jnp.exp2(logits_qk - base_q1), jnp.exp2(top_q1 - base_q1)
    total_q1 = total_q1 * shrink_q1 + p_qk.sum(1)[:, None]
    if c.rate:
      p_qk = jnp.where(_kept(c, x['words'], member, t_q1, s_1k), p_qk, 0.0)
    return new_q1, total_q1, sum_qH * shrink_q1 + _dot(p_qk.astype(v_kH.dtype), v_kH, 1, 0)

  zeros_q1 = jnp.zeros((c.queries, 1), jnp.float32)
  top_q1, total_q1, sum_qH = _over(step, _keys_seen(x, c, i), (
      zeros_q1 - jnp.inf, zeros_q1, jnp.zeros(q_qH.shape, jnp.float32)))
  seen_q1 = total_q1 > 0
  total_q1 = jnp.where(seen_q1, total_q1, 1.0)
  _store(out_ref, first, c.T, sum_qH / (total_q1 * (1 - c.rate)))
  _store(sums_ref, first, c.T, (jnp.where(seen_q1, top_q1, 0.0) / LOG2E + jnp.log(total_q1)).reshape(c.queries))


def gradient_of_queries(x, dq_ref, *, c):
  """Of a tile of queries, over the keys that they see."""
  i, member = _place(c)
  first = i * c.queries
  t_q1 = first + jnp.arange(c.queries, dtype=jnp.int32)[:, None]
  q_qH, g_qH, sums_q, delta_q = (_load(x[name], first, c.queries, c.T) for name in ('q', 'g', 'sums', 'delta'))
  q_segments = _load(x['q_segments'], first, c.queries, c.T)[:, None] if c.packed else None
  sums_q1, delta_q1 = sums_q[:, None] * LOG2E, delta_q[:, None]

  def step(j, dq_qH, masked):
    s_1k, k_kH, v_kH, visible = _key_tile(x, c, j, t_q1, q_segments, masked)
    p_qk = jnp.exp2(_dot(q_qH, k_kH, 1, 1) * (c.scale * LOG2E) - sums_q1)
    if masked:
      p_qk = jnp.where(visible, p_qk, 0.0)
    dp_qk = _dot(g_qH, v_kH, 1, 1)
    if c.rate:
      dp_qk = jnp.where(_kept(c, x['words'], member, t_q1, s_1k), dp_qk / (1 - c.rate), 0.0)
    return dq_qH + _dot((p_qk * (dp_qk - delta_q1)).astype(k_kH.dtype), k_kH, 1, 0)

  dq_qH = _over(step, _keys_seen(x, c, i), jnp.zeros(q_qH.shape, jnp.float32))
  _store(dq_ref, first, c.T, dq_qH * c.scale)


def gradient_of_keys(x, dk_ref, dv_ref, *, c):
  """Of a tile of keys and its values, over the queries that see them and, in turn, the heads that share them.

  Scores are formed transposed, [keys, queries], which is how both gradients take them.
  """
  i = pl.program_id(0)
  first = i * c.keys
  s_k1 = first + jnp.arange(c.keys, dtype=jnp.int32)[:, None]
  k_kH, v_kH = (_load(x[name], first, c.keys, c.S) for name in 'kv')
  k_segments = _load(x['k_segments'], first, c.keys, c.S)[:, None] if c.packed else None

  def step(j, carry, masked, member):
    dk_kH, dv_kH = carry
    at, length = j * c.queries, c.T if masked else None
    t_1q = at + jnp.arange(c.queries, dtype=jnp.int32)[None]
    q_qH, g_qH = (_load(x[name], at, c.queries, length, lambda rows: (rows, member)) for name in 'qg')
    sums_q, delta_q = (_load(x[name], at, c.queries, length, lambda rows: (member, rows)) for name in ('sums', 'delta'))
    p_kq = jnp.exp2(_dot(k_kH, q_qH, 1, 1) * (c.scale * LOG2E) - sums_q[None] * LOG2E)
    if masked:
      q_segments = _load(x['q_segments'], at, c.queries, length)[None] if c.packed else None
      p_kq = jnp.where(_visible(c, t_1q, s_k1, q_segments, k_segments), p_kq, 0.0)
    dp_kq, kept_kq = _dot(v_kH, g_qH, 1, 1), p_kq
    if c.rate:
      keep = _kept(c, x['words'], member, t_1q, s_k1)
      dp_kq, kept_kq = jnp.where(keep, dp_kq / (1 - c.rate), 0.0), jnp.where(keep, p_kq, 0.0)
    dv_kH = dv_kH + _dot(kept_kq.astype(g_qH.dtype), g_qH, 1, 0)
    return dk_kH + _dot((p_kq * (dp_kq - delta_q[None])).astype(q_qH.dtype), q_qH, 1, 0), dv_kH

  seen = _queries_seen(x, c, i)
  head = lambda member, carry: _over(functools.partial(step, member=member), seen, carry)
  carry = jnp.zeros(k_kH.shape, jnp.float32), jnp.zeros(v_kH.shape, jnp.float32)
  dk_kH, dv_kH = head(jnp.int32(0), carry) if c.G == 1 else jax.lax.fori_loop(0, c.G, head, carry)
  _store(dk_ref, first, c.S, dk_kH * c.scale)
  _store(dv_ref, first, c.S, dv_kH / (1 - c.rate))


def _place(c):
  """(tile of queries, which of the query heads that share keys) of a program.

  Under a causal mask the last tiles see most; they start first.
  """
  i, member = pl.program_id(0), jax.lax.rem(pl.program_id(1), jnp.int32(c.G))
  return (pl.num_programs(0) - 1 - i if c.mask.causal else i), member


def _key_tile(x, c, j, t_q1, q_segments, masked):
  """(places, keys, values, which of them each query sees) of the j-th tile; all, where it is not `masked`."""
  at, length = j * c.keys, c.S if masked else None
  s_1k = at + jnp.arange(c.keys, dtype=jnp.int32)[None]
  k_kH, v_kH = (_load(x[name], at, c.keys, length) for name in 'kv')
  if not masked:
    return s_1k, k_kH, v_kH, None
  k_segments = _load(x['k_segments'], at, c.keys, length)[None] if c.packed else None
  return s_1k, k_kH, v_kH, _visible(c, t_q1, s_1k, q_segments, k_segments)


def _visible(c, t, s, q_segments, k_segments):
  """`nn.Mask.block` of queries t and keys s, which broadcast; keys behind the last are not visible."""
  inside = s < c.S
  seen = inside
  if c.mask.causal:
    seen = seen & (s - t <= c.mask.start)
  if c.mask.window is not None:
    seen = seen & (t - s < c.mask.window - c.mask.start)
  if c.packed:
    seen = seen & (q_segments == k_segments) & (q_segments > 0)
  return seen | (s < min(c.mask.prefix, c.S)) if c.mask.prefix else seen


def _kept(c, words_ref, member, t, s):
  """Whether dropout keeps the pair of query t of the group's head `member` and key s."""
  as_word = lambda x: jnp.asarray(x).astype(jnp.uint32)
  of_t = _mixed(words_ref[0] ^ _mixed(as_word(t) * jnp.uint32(c.G) + as_word(member)))
  of_s = _mixed(words_ref[1] + as_word(s) * jnp.uint32(0x9E3779B9))
  return _mixed(of_t ^ of_s) >= jnp.uint32(round(c.rate * 2**32))


def _mixed(x):
  """MurmurHash3's finaliser: every bit of a uint32 changes half of those that come out."""
  x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> jnp.uint32(16))


def _keys_seen(x, c, i):
  """Tiles of keys that the i-th tile of queries sees, as `_over` takes them."""
  m, first, end = c.mask, i * c.queries, (i + 1) * c.queries
  low, high, low_all, high_all = 0, c.S, 0, c.S
  if m.causal:
    high, high_all = m.start + end, m.start + first + 1
  if m.window is not None:
    low, low_all = m.start + first - m.window + 1, m.start + end - m.window
  if c.packed:
    low, high, low_all, high_all = _within(x['bounds'], i, low, high, low_all, high_all)
  if m.prefix:  # seen by every query
    low, high = 0, jnp.maximum(high, m.prefix)
  return _ranges((low, high, low_all, high_all), c.S, c.keys, m.window is not None or c.packed, m.causal or c.packed)


def _queries_seen(x, c, i):
  """Tiles of queries that see the i-th tile of keys."""
  m, first, end = c.mask, i * c.keys, (i + 1) * c.keys
  low, high, low_all, high_all = 0, c.T, 0, c.T
  if m.causal:
    low, low_all = first - m.start, end - 1 - m.start
  if m.window is not None:
    high, high_all = end - 1 + m.window - m.start, first + m.window - m.start
  if c.packed:
    low, high, low_all, high_all = _within(x['bounds'], i, low, high, low_all, high_all)
  if m.prefix:
    low, high = jnp.where(first < m.prefix, 0, low), jnp.where(first < m.prefix, c.T, high)
  return _ranges((low, high, low_all, high_all), c.T, c.queries, m.causal or c.packed, m.window is not None or c.packed)


def _within(bounds, i, low, high, low_all, high_all):
  return (jnp.maximum(low, bounds[i, 0]), jnp.minimum(high, bounds[i, 1]), jnp.maximum(low_all, bounds[i, 2]),
          jnp.minimum(high_all, bounds[i, 3]))


def _ranges(places, length, size, left, right):
  """[(first tile, behind the last, whether a mask is needed)] of places low..high, all visible in low_all..high_all.

  left, right: whether the mask has an edge there; a range that is always empty would be compiled all the same.
  """
  low, high, low_all, high_all = (jnp.clip(jnp.asarray(x, jnp.int32), 0, length) for x in places)
  start, stop = _divided(low, size), _divided(high + size - 1, size)
  right = right or length % size > 0
  from_ = jnp.clip(_divided(low_all + size - 1, size), start, jnp.maximum(start, stop)) if left else start
  to = jnp.clip(_divided(high_all, size), from_, jnp.maximum(from_, stop)) if right else stop
  return [(start, from_, True)] * left + [(from_, to, False)] + [(to, stop, True)] * right


def _divided(x, size):
  return jax.lax.div(x, jnp.int32(size))


def _over(step, ranges, carry):
  """The carry after step(j, carry, masked) for all tiles j of the ranges."""
  for start, stop, masked in ranges:
    carry = jax.lax.fori_loop(start, stop, functools.partial(step, masked=masked), carry)
  return carry


def _load(ref, first, size, length, index=lambda rows: rows):
  """[size, ...] from place `first` on, zeros behind `length`; length None: all are there."""
  cut = ref.at[index(pl.ds(first, size))]
  if length is None or length % size == 0:
    return triton.load(cut)
  return triton.load(cut, mask=_inside(first, cut.shape, length), other=0)


def _store(ref, first, length, x):
  cut = ref.at[pl.ds(first, x.shape[0])]
  whole = length % x.shape[0] == 0
  triton.store(cut, x.astype(ref.dtype), mask=None if whole else _inside(first, x.shape, length))


def _inside(first, shape, length):
  return first + jax.lax.broadcasted_iota(jnp.int32, shape, 0) < length


def _dot(a, b, a_axis, b_axis):
  """The product of matrices over those axes, f32; f32 factors keep all their bits."""
  return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), precision=jax.lax.Precision.HIGHEST
                             if a.dtype == jnp.float32 else None, preferred_element_type=jnp.float32)
