"""Direct preference optimisation: a policy learns from pairs of answers, without a reward model and without sampling.

DPO (arXiv:2305.18290 eq. 7), conservative DPO (label smoothing, as its authors' code has it) and IPO (arXiv:2310.12036
eq. 17). Log-probabilities of an answer are sums over its tokens. Shapes: B pairs, T targets a row.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Literal

from flax import struct
import jax
import jax.numpy as jnp

from lm import logprobs, nn, params
from lm.data.sft import Pair
from lm.errors import ConfigError
from lm.losses import Term

_ROUNDING = 2e-6  # of f32 sums of log-probabilities, relative, where two programs compute the same


@struct.dataclass
class Batch:
  """Pairs, and what the reference says of their answers: `score` of the model that training starts from, kept.

  Attributes:
    chosen_reference_B, rejected_reference_B: f32, log-probability of the whole answer; both None: reference-free, as if
      the reference took all answers for equally likely.
  """

  pair: Pair
  chosen_reference_B: jax.Array | None = None
  rejected_reference_B: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Config:
  """h is the log-ratio of policy to reference, of the chosen answer less that of the rejected one.

  Attributes:
    kind: 'dpo': -log sigmoid(beta h); 'ipo': (h - 1 / (2 beta))^2.
    beta: how dear distance from the reference is; > 0. Published: 0.1 (summaries 0.5), Zephyr 0.01.
    smoothing: probability that a label is wrong (conservative DPO); of 'dpo' only.
    average: log-ratios are means over an answer's tokens, not sums; so IPO's authors compute theirs.
    chunk: tokens whose logits exist at once.
  """

  kind: Literal['dpo', 'ipo'] = 'dpo'
  beta: float = 0.1
  smoothing: float = 0.0
  average: bool = False
  chunk: int = 1024

  def __post_init__(self):
    if self.kind not in ('dpo', 'ipo'):
      raise ConfigError(f"loss.kind={self.kind!r}; expected 'dpo' or 'ipo'")
    if not 0 < self.beta < math.inf:
      raise ConfigError(f'loss.beta={self.beta}; expected more than 0')
    if not 0 <= self.smoothing < 0.5:
      raise ConfigError(f'loss.smoothing={self.smoothing}; expected 0 <= smoothing < 0.5')
    if self.smoothing and self.kind == 'ipo':
      raise ConfigError(f"loss.smoothing={self.smoothing} with loss.kind='ipo', which has none; set loss.smoothing=0")
    if self.chunk < 1:
      raise ConfigError(f'loss.chunk={self.chunk}; expected at least 1')


def loss(p: params.Tree, batch: Batch, key: nn.Key | None, *, apply: Callable[..., jax.Array],
         head: Callable[[params.Tree], jax.Array], c: Config) -> tuple[dict[str, Term], dict[str, Term]]:
  """Terms {'preference'}, a mean over pairs; a pair counts if both rows have targets.

  Metrics: 'loss'; 'accuracy', share of pairs whose chosen answer has the larger reward (those equal but for rounding
  count half, so that it starts at 1/2); 'chosen_reward', 'rejected_reward', beta times the log-ratio of the whole
  answer; 'margin', their difference; 'chosen_logprob', 'rejected_logprob'.

  Args:
    apply, head: as for `lm.logprobs.score`.
  """
  chosen, rejected = score(p, batch.pair, key, apply=apply, head=head, chunk=c.chunk)
  weights_B = ((chosen.count_B > 0) & (rejected.count_B > 0)).astype(jnp.float32)
  ratio = lambda s, reference_B: jnp.where(weights_B > 0, s.row_B - (0 if reference_B is None else reference_B), 0.0)
  chosen_B, rejected_B = ratio(chosen, batch.chosen_reference_B), ratio(rejected, batch.rejected_reference_B)
  each = lambda s, ratio_B: ratio_B / jnp.maximum(s.count_B, 1) if c.average else ratio_B
  weight = weights_B.sum()
  mean = lambda x_B: Term((weights_B * x_B).sum(), weight)
  value = mean(objective(each(chosen, chosen_B) - each(rejected, rejected_B), c))
  gap_B, noise_B = chosen_B - rejected_B, _ROUNDING * (jnp.abs(chosen.row_B) + jnp.abs(rejected.row_B))
  return {'preference': value}, {
      'loss': value, 'accuracy': mean(jnp.where(jnp.abs(gap_B) <= noise_B, 0.5, gap_B > 0)),
      'chosen_reward': mean(c.beta * chosen_B), 'rejected_reward': mean(c.beta * rejected_B),
      'margin': mean(c.beta * gap_B), 'chosen_logprob': mean(chosen.row_B),
      'rejected_logprob': mean(rejected.row_B)}


def score(p: params.Tree, pair: Pair, key: nn.Key | None, **kwargs) -> tuple[logprobs.Scores, logprobs.Scores]:
  """(chosen, rejected), in one pass over both; `row_B` of each is what `Batch` keeps of a reference.

  Args:
    kwargs: of `lm.logprobs.score`.
  """
  both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), pair.chosen, pair.rejected)
  B = pair.chosen.ids_BT.shape[0]
  if key is not None:
    rows_B = key.rows_B if isinstance(key, nn.Keys) else jnp.arange(B)
    key = nn.Keys(nn.shared(key), jnp.concatenate([2 * rows_B, 2 * rows_B + 1]))
  scores = logprobs.score(p, both, key, **kwargs)
  return jax.tree.map(lambda x: x[:B], scores), jax.tree.map(lambda x: x[B:], scores)


def objective(h_B: jax.Array, c: Config) -> jax.Array:
  """The loss of each pair, from its difference of log-ratios."""
  if c.kind == 'ipo':
    return (h_B - 1 / (2 * c.beta))**2
  right_B, wrong_B = jax.nn.softplus(-c.beta * h_B), jax.nn.softplus(c.beta * h_B)  # -log sigmoid
  return (1 - c.smoothing) * right_B + c.smoothing * wrong_B
