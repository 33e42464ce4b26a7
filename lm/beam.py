"""Beam search: the continuations of each prompt that a model finds likeliest, for their length.

As transformers' `generate` with num_beams: of the 2 K likeliest continuations of K beams, those that end compete as
whole answers, by the sum of log-probabilities over length ** penalty, the end counted; a prompt is done when K answers
are there and no beam, by its score at its present length, is better than the worst of them. Shapes: B prompts, K beams,
R = B K rows, M candidates, T new tokens, V vocabulary.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from lm import decode, params
from lm.errors import ConfigError
from lm.models import kv_cache


@dataclasses.dataclass(frozen=True)
class Config:
  """How it searches and when to stop.

  Attributes:
    beams: K, how many are kept.
    max_new: most new tokens.
    penalty: of length; 0 compares sums of log-probabilities, 1 means, more favours long answers.
    distinct: no sequence of so many tokens comes twice in an answer; 0 = it may.
    stop: ids that end an answer; the id is part of it.
  """

  beams: int = 4
  max_new: int = 128
  penalty: float = 1.0
  distinct: int = 0
  stop: tuple[int, ...] = ()

  def __post_init__(self):
    for name, least in (('beams', 2), ('max_new', 1), ('distinct', 0)):
      if getattr(self, name) < least:
        raise ConfigError(f'{name}={getattr(self, name)}; expected at least {least}')
    if not math.isfinite(self.penalty):
      raise ConfigError(f'penalty={self.penalty}; expected a number, such as 0.8')
    if any(i < 0 for i in self.stop):
      raise ConfigError(f'stop={self.stop}; expected token ids')


@struct.dataclass
class Answers:
  """The K best of each prompt, the best first.

  Attributes:
    tokens_BKT: int32; 0 beyond an answer's length.
    lengths_BK: int32, the stop token included; 0 where there are fewer than K answers.
    scores_BK: f32, the sum of log-probabilities over length ** penalty; -inf there.
  """

  tokens_BKT: jax.Array
  lengths_BK: jax.Array
  scores_BK: jax.Array


@struct.dataclass
class _Search:
  """Beams of t tokens, the logits of the next, and the answers so far."""

  t: jax.Array
  tokens_BKT: jax.Array
  totals_BK: jax.Array  # sums of log-probabilities, falling
  logits_RV: jax.Array
  cache: Any
  found: Answers
  open_B: jax.Array


def generate(model: decode.Model, p: params.Tree, prompts: Sequence[Sequence[int]], c: Config) -> Answers:
  """Continues every prompt; compiles once for a number of prompts, prompt bucket and config.

  Args:
    p: as for `model.apply`; best from `decode.prepare`.

  Raises:
    ConfigError: an empty prompt, or more tokens than the model has positions.
  """
  decode.check(model, prompts, c)
  return _run(model, c, p, *decode.pad(prompts))


def run(model: decode.Model, c: Config, p: params.Tree, ids_BT: jax.Array, segments_BT: jax.Array) -> Answers:
  """`generate` on arrays (see `decode.pad`), for a program of one's own."""
  B, K = ids_BT.shape[0], c.beams
  x_B1D, cache = decode.prefill(model, c.max_new, p, ids_BT, segments_BT)
  blank_BKT = jnp.zeros((B, K, c.max_new), jnp.int32)
  nothing = Answers(blank_BKT, blank_BKT[..., 0], jnp.full((B, K), -jnp.inf))
  each_R = jnp.repeat(jnp.arange(B), K)
  first = _Search(
      jnp.int32(0), blank_BKT, jnp.where(jnp.arange(K) == 0, 0.0, -jnp.inf)[None].repeat(B, 0),  # K times the same
      _logits(model, p, x_B1D)[each_R], kv_cache.take(cache, each_R), nothing, jnp.ones(B, bool))
  wanted = lambda s: (s.t < c.max_new) & s.open_B.any()
  return jax.lax.while_loop(wanted, lambda s: _step(model, c, p, s), first).found


def _step(model, c, p, s):
  """One more token for every beam; answers that it ends."""
  B, K, T = s.tokens_BKT.shape
  logprobs_RV = _distinct(jax.nn.log_softmax(s.logits_RV), s.tokens_BKT.reshape(-1, T), s.t, c.distinct)
  V = logprobs_RV.shape[-1]
  totals_BX = (s.totals_BK.reshape(-1, 1) + logprobs_RV).reshape(B, K * V)
  # Enough for K that go on, whatever ends.
  totals_BM, at_BM = jax.lax.top_k(totals_BX, min(max(2, 1 + len(c.stop)) * K, K * V))
  parents_BM, ids_BM = at_BM // V, at_BM % V
  tokens_BMT = jnp.take_along_axis(s.tokens_BKT, parents_BM[..., None], 1).at[:, :, s.t].set(ids_BM)
  ends_BM = (ids_BM[..., None] == jnp.array(c.stop, jnp.int32)[None, None]).any(-1)

  length = (s.t + 1).astype(jnp.float32)
  likely_BM = (jnp.arange(ends_BM.shape[1]) < K)[None] & (totals_BM > -jnp.inf)
  whole_BM = (ends_BM | (s.t + 1 == T)) & likely_BM & s.open_B[:, None]
  scores_BM = jnp.where(whole_BM, totals_BM / length**c.penalty, -jnp.inf)
  lengths_BM = jnp.where(whole_BM, s.t + 1, 0)
  both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), s.found, Answers(tokens_BMT, lengths_BM, scores_BM))
  scores_BK, best_BK = jax.lax.top_k(both.scores_BK, K)
  found = Answers(jnp.take_along_axis(both.tokens_BKT, best_BK[..., None], 1),
                  jnp.take_along_axis(both.lengths_BK, best_BK, 1), scores_BK)

  totals_BK, on_BK = jax.lax.top_k(jnp.where(ends_BM, -jnp.inf, totals_BM), K)
  pick = lambda x_BM: jnp.take_along_axis(x_BM, on_BK, 1)
  tokens_BKT = jnp.take_along_axis(tokens_BMT, on_BK[..., None], 1)
  open_B = s.open_B & (totals_BK[:, 0] / length**c.penalty > scores_BK.min(1))
  rows_R = (jnp.arange(B)[:, None] * K + pick(parents_BM)).reshape(-1)
  x_R1D, cache = model.apply(p, pick(ids_BM).reshape(-1, 1), segments_BT=None, cache=kv_cache.take(s.cache, rows_R))
  return _Search(s.t + 1, tokens_BKT, totals_BK, _logits(model, p, x_R1D), cache, found, open_B)


def _logits(model, p, x_R1D):
  return model.logits(p, x_R1D)[:, 0].astype(jnp.float32)


def _distinct(logprobs_RV, tokens_RT, t, n):
  """-inf for each token t that would end n tokens which its row has already."""
  R, T = tokens_RT.shape
  if not n or n > T:
    return logprobs_RV
  starts_S = jnp.arange(T - n + 1)
  last_RN = jax.lax.dynamic_slice_in_dim(jnp.pad(tokens_RT, ((0, 0), (n, 0))), t + 1, n - 1, 1)  # those before t
  same_RS = (starts_S + n <= t)[None] & jnp.ones((R, 1), bool)
  for i in range(n - 1):
    same_RS &= tokens_RT[:, i:i + T - n + 1] == last_RN[:, i:i + 1]
  told_RS = jnp.where(same_RS, tokens_RT[:, n - 1:], logprobs_RV.shape[1])  # beyond the vocabulary: dropped
  return logprobs_RV.at[jnp.arange(R)[:, None], told_RS].set(-jnp.inf, mode='drop')


_run = jax.jit(run, static_argnums=(0, 1))
