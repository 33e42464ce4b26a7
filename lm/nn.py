"""The layers that models are written in: pure functions of arrays, nothing is stored.

Shapes: B batch, T query length, S key length, D model, N query heads, K key/value heads (N = K * G), H head dim,
R rotary half (H // 2). Norms and softmax are computed in f32 whatever the activations' dtype, and cast back.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp

from lm import products
from lm.errors import ConfigError

NEVER = -1e30  # a logit that softmax turns into zero; finite, so that a row with no key stays finite


@dataclasses.dataclass(frozen=True)
class Dropout:
  """Rates of a model: of the embedding, attention probabilities, each block's two outputs, a classifier's input."""

  embedding: float = 0.0
  attention: float = 0.0
  hidden: float = 0.0
  classifier: float = 0.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if not 0 <= getattr(self, field.name) < 1:
        raise ConfigError(f'dropout.{field.name}={getattr(self, field.name)}; expected 0 <= rate < 1')


@functools.singledispatch
def dot(w: jax.Array, x: jax.Array, equation: str, key: 'Key | None' = None) -> jax.Array:
  """einsum(equation, x, w) in x's dtype, for equations 'batch in, in out -> batch out' such as 'BTD,DNH->BTNH'.

  Dispatches on the type of `w`: a LoRA leaf registers its own rule here, whose dropout `key` turns on.
  """
  del key
  return products.product(equation, x, w)


def dots(ws: Sequence[jax.Array], x: jax.Array, equations: Sequence[str], key: 'Key | None' = None
         ) -> tuple[jax.Array, ...]:
  """`dot` of one x with several weights, such as those of queries, keys and values; see `products.products`."""
  if not all(isinstance(w, jax.Array) for w in ws):
    return several(ws[0], ws, x, equations, key)
  return products.products(tuple(equations), x, tuple(ws))


@functools.singledispatch
def several(first: object, ws: Sequence[object], x: jax.Array, equations: Sequence[str], key: 'Key | None'
            ) -> tuple[jax.Array, ...]:
  """`dots` by the type of the first weight, which may stand for all."""
  del first
  pairs = zip(ws, equations, strict=True)
  return tuple(dot(w, x, equation, fold(key, i)) for i, (w, equation) in enumerate(pairs))


@functools.singledispatch
def residual(w: jax.Array, x: jax.Array, y: jax.Array, equation: str, bias: jax.Array | None, *, rate: float = 0.0,
             key: 'Key | None' = None, norm: Callable[[jax.Array], jax.Array] = lambda x: x) -> jax.Array:
  """norm(x + dropout(y w + bias)): the end of a block's branch; x is the residual stream, y the branch's last input.

  Dispatches on the type of `w`: an adapter stands between dropout and sum.
  """
  return norm(x + branch(w, y, equation, bias, rate, key))


def branch(w: jax.Array, y: jax.Array, equation: str, bias: jax.Array | None, rate: float, key: 'Key | None'
           ) -> jax.Array:
  """dropout(y w + bias)."""
  out = dot(w, y, equation, fold(key, 1))
  out = out if bias is None else out + jnp.expand_dims(bias.astype(out.dtype), range(out.ndim - bias.ndim))
  return dropout(out, rate, key)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None = None, eps: float = 1e-5) -> jax.Array:
  """(x - mean) / sqrt(var + eps) * scale + bias over the last axis; f32 inside (arXiv:1607.06450)."""
  y = x.astype(jnp.float32)
  y = y - y.mean(-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
  return _affine(y, scale, bias).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None = None, eps: float = 1e-5) -> jax.Array:
  """x / sqrt(mean(x^2) + eps) * scale (+ bias) over the last axis; f32 inside (arXiv:1910.07467)."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
  return _affine(y, scale, bias).astype(x.dtype)


def _affine(y, scale, bias):
  scale, bias = jax.tree.map(lambda p: jnp.expand_dims(p, range(y.ndim - 1)), (scale, bias))
  return y * scale if bias is None else y * scale + bias


def rotary(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
  """Rotates dimension pairs (i, i + H/2) by position * theta^(-2i/H): the half-split layout of HF Llama
  (arXiv:2104.09864). f32 inside."""
  half = x_BTNH.shape[-1] // 2
  freq_R = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_BT1R = positions_BT[..., None, None].astype(jnp.float32) * jnp.expand_dims(freq_R, (0, 1, 2))
  sin, cos = jax.lax.platform_dependent(angle_BT1R, cpu=_sines_once, default=_sines)
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def _sines(angle):
  return jnp.sin(angle), jnp.cos(angle)


def _sines_once(angle_BT1R):
  """The same, bit for bit, behind a product with the identity.

  XLA computes a sine anew in each element that reads it, so for every head of every layer, unless they are scanned; a
  product it computes once. On a CPU that was 6% of a training step of 4 x 512.
  """
  both_BT1R = jnp.concatenate(_sines(angle_BT1R), -1)
  same = jax.lax.dot_general(both_BT1R, jnp.eye(both_BT1R.shape[-1]), (((3,), (0,)), ((), ())), precision='highest')
  return tuple(jnp.split(same, 2, -1))


@struct.dataclass
class Keys:
  """Randomness of some rows of a batch: what is drawn for a row depends on its number in the whole batch.

  It does not depend on the rows beside it, so dropout is the same on every mesh and in microbatches of any size.

  Attributes:
    shared: a key, for what all rows have in common.
    rows_B: int32, the rows' numbers.
  """

  shared: jax.Array
  rows_B: jax.Array


Key = jax.Array | Keys  # a plain key counts the rows at hand from 0


def fold(key: Key | None, i: int | jax.Array) -> Key | None:
  """Another key of the same kind, for the i-th use; None stays None, which means: no randomness."""
  if isinstance(key, Keys):
    return key.replace(shared=jax.random.fold_in(key.shared, i))
  return None if key is None else jax.random.fold_in(key, i)


def shared(key: Key | None) -> jax.Array | None:
  """The plain key behind either kind."""
  return key.shared if isinstance(key, Keys) else key


def row_keys(key: Key, rows: int, heads: int | None = None) -> jax.Array:
  """A plain key for each of the B = `rows` rows, [B], or for each head of each, [B, heads]."""
  rows_B = key.rows_B if isinstance(key, Keys) else jnp.arange(rows)
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(shared(key), rows_B)
  each = jax.vmap(jax.random.fold_in, (None, 0))
  return keys_B if heads is None else jax.vmap(each, (0, None))(keys_B, jnp.arange(heads))


def dropout(x: jax.Array, rate: float, key: Key | None) -> jax.Array:
  """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate); identity without a key.

  The first dimension of x is the batch.
  """
  if rate == 0.0 or key is None:
    return x
  keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - rate, x.shape[1:]))(row_keys(key, x.shape[0]))
  return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


@struct.dataclass
class Mask:
  """Which keys each query may see; the parts are and-ed. Order is by slot (place in the row), not by position.

  Attributes:
    causal: query t sees slots s <= start + t.
    window: at most this many slots back, the query's own included; None = no bound.
    start: slot of query 0 (scalar): a Python int unless decoding into a cache.
    prefix: that many first slots are seen by every query, whatever its segment.
    q_segments_BT, k_segments_BS: ids >= 1 of packed documents, 0 = padding; a query sees its own segment only. None =
      one segment. A query of segment 0 sees no key: its output is finite and means nothing.
  """

  causal: bool = struct.field(pytree_node=False, default=True)
  window: int | None = struct.field(pytree_node=False, default=None)
  start: int | jax.Array = 0
  prefix: int = struct.field(pytree_node=False, default=0)
  q_segments_BT: jax.Array | None = None
  k_segments_BS: jax.Array | None = None

  def block(self, rows: slice, columns: slice) -> jax.Array | None:
    """bool [B or 1, t, s] of the given queries and keys; None where every pair is visible by construction."""
    q_t, k_s = jnp.arange(rows.start, rows.stop), jnp.arange(columns.start, columns.stop)
    behind_ts = self.start + q_t[:, None] - k_s[None, :]
    parts = []
    if self.causal and not (isinstance(self.start, int) and self.start + rows.start >= columns.stop - 1):
      parts.append((behind_ts >= 0)[None])
    if self.window is not None:
      parts.append((behind_ts < self.window)[None])
    if self.q_segments_BT is not None:
      q_Bt1, k_B1s = self.q_segments_BT[:, rows, None], self.k_segments_BS[:, None, columns]
      parts.append((q_Bt1 == k_B1s) & (q_Bt1 > 0))
    if parts and self.prefix > columns.start:
      parts = [functools.reduce(jnp.logical_and, parts) | (k_s < self.prefix)[None, None]]
    return functools.reduce(jnp.logical_and, parts) if parts else None

  def cut(self, rows: slice, columns: slice) -> 'Mask':
    """The mask of a block of queries and keys, as a mask of its own."""
    pick = lambda x, part: None if x is None else x[:, part]
    return self.replace(start=self.start + rows.start - columns.start, prefix=max(self.prefix - columns.start, 0),
                        q_segments_BT=pick(self.q_segments_BT, rows), k_segments_BS=pick(self.k_segments_BS, columns))

  def all(self, queries: int, keys: int) -> jax.Array | None:
    """The whole mask, bool [B or 1, T, S]."""
    return self.block(slice(0, queries), slice(0, keys))


def prefixed(p: dict, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array, Mask]:
  """Keys, values and mask behind the learned ones that p may hold: 'prefix_k' and 'prefix_v', [slots, K, H]."""
  if 'prefix_k' not in p:
    return k_BSKH, v_BSKH, mask
  def behind(name, x_BSKH):
    first_BPKH = jnp.broadcast_to(p[name].astype(x_BSKH.dtype)[None], (x_BSKH.shape[0], *p[name].shape))
    return jnp.concatenate([first_BPKH, x_BSKH], axis=1)
  P, segments_BS = p['prefix_k'].shape[0], mask.k_segments_BS
  if segments_BS is not None:
    segments_BS = jnp.pad(segments_BS, ((0, 0), (P, 0)))
  return behind('prefix_k', k_BSKH), behind('prefix_v', v_BSKH), mask.replace(
      start=mask.start + P, prefix=P, k_segments_BS=segments_BS)


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, *, bias_BNTS: jax.Array | None = None,
           scale: float | None = None, rate: float = 0.0, key: Key | None = None) -> jax.Array:
  """Reference attention, softmax(q k^T * scale + bias) v -> [B, T, N, H] (arXiv:1706.03762 eq. 1).

  Holds the whole [B, N, T, S]. N must be a multiple of K: each key head serves N // K query heads (arXiv:2305.13245).
  `scale` defaults to H ** -0.5; `rate` is dropout on the probabilities. Logits and softmax are f32.
  Any function of this signature can stand in for it (see `lm.kernels.attention`).
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  logits = jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  logits = logits * (H**-0.5 if scale is None else scale)
  if bias_BNTS is not None:
    logits = logits + bias_BNTS.reshape(bias_BNTS.shape[0], K, N // K, T, S).astype(jnp.float32)
  mask_BTS = mask.all(T, S)
  if mask_BTS is not None:
    logits = jnp.where(mask_BTS[:, None, None], logits, NEVER)
  probs = dropout(jax.nn.softmax(logits), rate, key).astype(v_BSKH.dtype)
  # In this order of operands einsum's dot needs no transpose of v: 10-20% of the forward pass on a CPU.
  return jnp.einsum('BSKH,BKGTS->BTKGH', v_BSKH, probs).reshape(B, T, N, H)
