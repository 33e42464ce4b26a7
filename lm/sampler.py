"""How tokens are chosen: the distribution that logits, a temperature, top-k and top-p give, and draws from it.

Shapes: B rows, V vocabulary, C candidates.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lm.errors import ConfigError

_CHUNK = 256  # of the vocabulary


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are chosen and when to stop.

  Attributes:
    max_new: most new tokens.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep the k most likely tokens, of equal ones those of lower id; 0 keeps all.
    top_p: then keep the fewest most likely tokens whose probability reaches top_p, and any as likely as the last of
      them (arXiv:1904.09751).
    stop: ids that end a row; the id is part of the row.
  """

  max_new: int = 128
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  stop: tuple[int, ...] = ()

  def __post_init__(self):
    if self.max_new < 1:
      raise ConfigError(f'max_new={self.max_new}; expected at least 1')
    if self.temperature and not 1e-6 <= self.temperature < math.inf:  # less, and logits overflow
      raise ConfigError(f'temperature={self.temperature}; expected 0 (the most likely token), or 1e-6 and more')
    if self.top_k < 0:
      raise ConfigError(f'top_k={self.top_k}; expected at least 0 (0: all tokens)')
    if not 0 < self.top_p <= 1:
      raise ConfigError(f'top_p={self.top_p}; expected 0 < top_p <= 1 (1: all tokens)')
    if any(i < 0 for i in self.stop):
      raise ConfigError(f'stop={self.stop}; expected token ids')


def sample_token(logits_BV: jax.Array, keys_B: jax.Array | None, s: Sampling) -> jax.Array:
  """int32 ids_B drawn from `candidates`, each row by its own key; at temperature 0 the first of the largest logits."""
  if s.temperature == 0:
    # Two plain reductions: XLA's argmax on a CPU takes four times as long.
    least_BV = jnp.where(logits_BV < logits_BV.max(-1, keepdims=True), logits_BV.shape[-1], _ids(logits_BV))
    return least_BV.min(-1)
  logits_BC, ids_BC = candidates(logits_BV, s)
  return jnp.take_along_axis(ids_BC, jax.vmap(_categorical)(keys_B, logits_BC)[:, None], 1)[:, 0]


def candidates(logits_BV: jax.Array, s: Sampling) -> tuple[jax.Array, jax.Array]:
  """(logits_BC, ids_BC): softmax of the former, f32, is the distribution over the latter that `s` asks for.

  C is top_k where it is set, else V; -inf marks tokens outside top_p.
  """
  logits_BC, ids_BC = logits_BV.astype(jnp.float32) / s.temperature, _ids(logits_BV)
  if 0 < s.top_k < logits_BV.shape[-1]:
    logits_BC, ids_BC = jax.lax.top_k(logits_BC, s.top_k)
  if s.top_p < 1:
    logits_BC = _nucleus(logits_BC, s.top_p)
  return logits_BC, ids_BC


def _ids(logits_BV):
  return jnp.broadcast_to(jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)[None], logits_BV.shape)


def _nucleus(logits_BV, top_p):
  """-inf for all but the fewest most likely tokens whose probability is at least top_p, ties included.

  The threshold is found bit by bit in 32 passes over the row: exact, and 20 times as fast as sorting a vocabulary.
  """
  p_BV = jax.nn.softmax(logits_BV)
  bits = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
  order_BV = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # floats in the order of unsigned integers

  def lower(i, threshold_B1):
    higher_B1 = threshold_B1 | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    enough_B1 = jnp.where(order_BV >= higher_B1, p_BV, 0).sum(-1, keepdims=True) >= top_p
    return jnp.where(enough_B1, higher_B1, threshold_B1)
  threshold_B1 = jax.lax.fori_loop(0, 32, lower, jnp.zeros_like(order_BV[:, :1]))
  return jnp.where(order_BV >= threshold_B1, logits_BV, -jnp.inf)


def _categorical(key, logits_C):
  """Draws a chunk of 256, then one of its members: a random number for each of V took a third of a step."""
  chunks = jnp.pad(logits_C, (0, -len(logits_C) % _CHUNK), constant_values=-jnp.inf).reshape(-1, _CHUNK)
  outer, inner = jax.random.split(key)
  chunk = jax.random.categorical(outer, jax.nn.logsumexp(chunks, -1))
  return chunk * _CHUNK + jax.random.categorical(inner, chunks[chunk])
