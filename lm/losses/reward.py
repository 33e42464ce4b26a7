"""Reward models: a score for each answer, such that P(w is preferred to l) = sigmoid(r_w - r_l) (Bradley-Terry).

Or such that P(b is the best) = softmax(r)_b, of the answers to one prompt (arXiv:1909.08593 eq. 1).
Scores are f32 whatever they come as. Shapes: B prompts (or rows), K answers a prompt, T tokens, N bins or scores. In
BKK the first answer is the better one.
"""

import dataclasses
import math
from typing import Literal

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import ConfigError
from lm.losses import Term

_NEVER = -1e30  # a score that no softmax sees


@dataclasses.dataclass(frozen=True)
class Config:
  """What the scores are trained for.

  Attributes:
    kind: 'pairs' (Bradley-Terry) or 'best': only which answer is the best counts.
    centre: coefficient of (r_w + r_l)^2, which keeps scores around 0 (arXiv:2312.09244; 0.01 is usual).
  """

  kind: Literal['pairs', 'best'] = 'pairs'
  centre: float = 0.0

  def __post_init__(self):
    if self.kind not in ('pairs', 'best'):
      raise ConfigError(f"loss.kind={self.kind!r}; expected 'pairs' or 'best'")
    if not 0 <= self.centre < math.inf:
      raise ConfigError(f'loss.centre={self.centre}; expected a finite number, at least 0 (0: scores may drift)')


def loss(scores_BK: jax.Array, ranks_BK: jax.Array, mask_BK: jax.Array, *, c: Config,
         margins_BKK: jax.Array | None = None) -> tuple[dict[str, Term], dict[str, Term]]:
  """Terms {'preference'} and, where c.centre is set, {'centre'}: means over prompts of means over a prompt's pairs.

  That is the 1 / C(K, 2) of InstructGPT (arXiv:2203.02155 eq. 1), over the pairs that are there: answers of equal rank
  make none, nor do those that are masked out; a prompt without a pair does not count. With c.kind 'best', 'preference'
  is the mean over these prompts of -log softmax(r) at the best answer, or the mean of that over those tied for it.

  Args:
    ranks_BK: lower is better.
    mask_BK: bool, the answer exists.
    margins_BKK: what r_w - r_l has to exceed for the same loss (Llama 2, arXiv:2307.09288 §3.2.2); read at [w, l], and
      of 'pairs' only.

  Returns:
    Metrics, means over all pairs: loss (of prompts, as trained but without `centre`), accuracy (equal scores count
    half), gap (r_w - r_l) and brier ((1 - P)^2; 1/4 is knowing nothing).
  """
  gap_BKK, sum_BKK, better_BKK = _pairs(scores_BK, ranks_BK, mask_BK)
  pairs_B = better_BKK.sum((1, 2))
  weights_BKK = better_BKK / jnp.maximum(pairs_B, 1.0)[:, None, None]
  over_BKK = gap_BKK if margins_BKK is None else gap_BKK - margins_BKK.astype(jnp.float32)
  prompts, pairs = (pairs_B > 0).sum().astype(jnp.float32), pairs_B.sum()
  nll_B = (_best(scores_BK, ranks_BK, mask_BK) * (pairs_B > 0) if c.kind == 'best' else
           (weights_BKK * jax.nn.softplus(-over_BKK)).sum((1, 2)))
  nll = Term(nll_B.sum(), prompts)
  terms = {'preference': nll}
  if c.centre:
    terms['centre'] = Term((weights_BKK * sum_BKK**2).sum(), prompts, c.centre)
  mean = lambda x_BKK: Term((better_BKK * x_BKK).sum(), pairs)
  return terms, {'loss': nll, 'accuracy': mean(_right(gap_BKK)), 'gap': mean(gap_BKK),
                 'brier': mean(jax.nn.sigmoid(-gap_BKK)**2)}


def score_at_last(values_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
  """f32 [B]: the value at each row's last real token; 0 for a row without any.

  Which tokens are real is given, not read from the ids: an eos that doubles as padding is real where it was said.

  Args:
    segments_BT: bool, or int with 0 for padding; on either side of a row, or both.
  """
  real_BT = segments_BT > 0
  last_B = real_BT.shape[1] - 1 - real_BT[:, ::-1].argmax(1)
  found_B = jnp.take_along_axis(values_BT, last_B[:, None], axis=1)[:, 0].astype(jnp.float32)
  return jnp.where(real_BT.any(1), found_B, 0.0)


@struct.dataclass
class Reliability:
  """Sums over pairs by the model's confidence in its favourite, in N equal bins of [1/2, 1], all f32 [N].

  Tables of two batches add up: `jax.tree.map(jnp.add, a, b)`. In each bin predicted / count and observed / count are
  alike where the model is calibrated.

  Attributes:
    count_N: pairs.
    predicted_N: of P(favourite is preferred).
    observed_N: favourites that were preferred; of equal scores, half of one.
  """

  count_N: jax.Array
  predicted_N: jax.Array
  observed_N: jax.Array


def reliability(scores_BK: jax.Array, ranks_BK: jax.Array, mask_BK: jax.Array, bins: int = 10) -> Reliability:
  """The table of some prompts, whose arrays are those of `loss`."""
  gap_BKK, _, better_BKK = _pairs(scores_BK, ranks_BK, mask_BK)
  predicted_BKK = jax.nn.sigmoid(jnp.abs(gap_BKK))
  bin_BKK = jnp.minimum(((predicted_BKK - 0.5) * 2 * bins).astype(jnp.int32), bins - 1)
  add = lambda x_BKK: jnp.zeros(bins, jnp.float32).at[bin_BKK].add(better_BKK * x_BKK)
  return Reliability(add(jnp.ones_like(gap_BKK)), add(predicted_BKK), add(_right(gap_BKK)))


def calibration_error(table: Reliability) -> jax.Array:
  """Expected calibration error: mean over pairs of |observed - predicted| of their bin; 0 without pairs."""
  return jnp.abs(table.observed_N - table.predicted_N).sum() / jnp.maximum(table.count_N.sum(), 1.0)


@dataclasses.dataclass(frozen=True)
class Affine:
  """Maps a score r to r * scale + shift."""

  scale: float = 1.0
  shift: float = 0.0

  def __call__(self, scores: jax.Array) -> jax.Array:
    return scores.astype(jnp.float32) * self.scale + self.shift


def normalise(scores_N: np.ndarray, std: float | None = 1.0) -> Affine:
  """What brings the mean of these scores to 0 and their standard deviation to `std`; None leaves the latter as it is.

  lm-human-preferences takes mean 0 and std 1 over samples of the policy; InstructGPT mean 0 over demonstrations.

  Raises:
    ConfigError: no scores, one that is not finite, or a spread of 0 that `std` cannot be made of.
  """
  scores_N = np.asarray(scores_N, np.float64)
  if not scores_N.size or not np.isfinite(scores_N).all():
    raise ConfigError(f'scores: {scores_N.size}, {int((~np.isfinite(scores_N)).sum())} of them not finite; expected '
                      'finite numbers to normalise by; score some answers with the trained model')
  mean, spread = float(scores_N.mean()), float(scores_N.std())
  if std is None:
    return Affine(1.0, -mean)
  if spread <= 1e-6 * max(abs(mean), 1e-6):
    raise ConfigError(f'scores: all {scores_N.size} are {mean:.4g}; expected a spread to bring to {std}; score answers '
                      'that differ, or pass std=None to shift only')
  return Affine(std / spread, -mean * std / spread)


def _pairs(scores_BK, ranks_BK, mask_BK):
  """(r_w - r_l, r_w + r_l, 1.0 where w is better than l), f32 [B, K, K] each."""
  scores_BK = jnp.where(mask_BK, scores_BK.astype(jnp.float32), 0.0)  # whatever stood there is not to reach a gradient
  w_BK1, l_B1K = scores_BK[:, :, None], scores_BK[:, None]
  better_BKK = (ranks_BK[:, :, None] < ranks_BK[:, None]) & mask_BK[:, :, None] & mask_BK[:, None]
  return w_BK1 - l_B1K, w_BK1 + l_B1K, better_BKK.astype(jnp.float32)


def _best(scores_BK, ranks_BK, mask_BK):
  """-log softmax at the answers of lowest rank, their mean: f32 [B], finite also where no answer exists."""
  logs_BK = jax.nn.log_softmax(jnp.where(mask_BK, scores_BK.astype(jnp.float32), _NEVER))
  lowest_B1 = jnp.where(mask_BK, ranks_BK.astype(jnp.float32), jnp.inf).min(1, keepdims=True)
  best_BK = mask_BK & (ranks_BK == lowest_B1)
  return -jnp.where(best_BK, logs_BK, 0.0).sum(1) / jnp.maximum(best_BK.sum(1), 1)


def _right(gap_BKK):
  return (jnp.sign(gap_BKK) + 1) / 2
