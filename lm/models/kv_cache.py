"""Keys and values of the tokens so far, so that a step computes its own alone.

Shapes: B rows, K key/value heads, S slots, H head dim, L layers, T new tokens, R rows that are taken.
"""

from flax import struct
import jax
import jax.numpy as jnp


@struct.dataclass
class Cache:
  """Keys and values of the tokens so far; slots fill from the left. Per-layer tuples, so that no step copies all.

  Attributes:
    keys, values: L arrays [B, K, S, H], the order in which attention reads them, without B or K where it is 1: with
      such a dimension XLA on a CPU does not see that a step writes in place, and copies each array four times.
    segments_BS: int32, 0 = empty or padding.
    length: int32 scalar, slots in use.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  segments_BS: jax.Array
  length: jax.Array


def empty(B: int, K: int, S: int, H: int, L: int, dtype: str) -> Cache:
  """Of no tokens."""
  slots = lambda: tuple(jnp.zeros((*_lead(B, K), S, H), dtype) for _ in range(L))
  return Cache(slots(), slots(), jnp.zeros((B, S), jnp.int32), jnp.int32(0))


def append(old: jax.Array, new_BTKH: jax.Array, length: jax.Array) -> jax.Array:
  """A layer's keys or values with T new slots from `length` on."""
  B, T, K, H = new_BTKH.shape
  lead = _lead(B, K)
  return jax.lax.dynamic_update_slice_in_dim(old, new_BTKH.swapaxes(1, 2).reshape(*lead, T, H), length, len(lead))


def take(cache: Cache, rows_R: jax.Array) -> Cache:
  """The cache of these rows, which may come more than once or not at all."""
  B, S = cache.segments_BS.shape

  def pick(x):
    H = x.shape[-1]
    return x.reshape(B, -1)[rows_R].reshape(*_lead(len(rows_R), x.size // (B * S * H)), S, H)
  return cache.replace(keys=tuple(map(pick, cache.keys)), values=tuple(map(pick, cache.values)),
                       segments_BS=cache.segments_BS[rows_R])


def next_positions(cache: Cache, segments_BT: jax.Array | None, ids_BT: jax.Array) -> jax.Array:
  """Position = number of earlier real tokens in the row, so left padding shifts nothing."""
  real_BT = jnp.ones_like(ids_BT) if segments_BT is None else (segments_BT > 0).astype(jnp.int32)
  before_B1 = (cache.segments_BS > 0).sum(1, keepdims=True)
  return jnp.maximum(before_B1 + jnp.cumsum(real_BT, 1) - 1, 0)


def _lead(B, K):
  return tuple(n for n in (B, K) if n > 1)
