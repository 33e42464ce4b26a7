"""Group-relative policy optimisation: an answer is judged by the other answers to its prompt; there is no value model.

GRPO (arXiv:2402.03300 §4.1), Dr. GRPO (arXiv:2503.20783) and DAPO (arXiv:2503.14476) are settings of `Config`.
Shapes: P prompts, G answers to each, B rows (an answer each), T targets a row (rows hold T + 1 ids; column t is of
token t + 1).
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Literal

from flax import struct
import jax
import jax.numpy as jnp

from lm import logprobs, nn, params
from lm.data import packing
from lm.errors import ConfigError
from lm.losses import Term


@struct.dataclass
class Batch:
  """Answers drawn from the policy. Groups need not stay together: what a group is for is in the advantages.

  Attributes:
    rows: prompt and answer; masks hold the answer.
    advantages_B: f32, of `advantages`.
    old_BT: f32, log-probabilities of the targets under the policy that drew them, at the loss's temperature; None: it
      is the policy itself (one update a rollout), and the ratio is 1.
    reference_BT: f32, the same under the reference; None: no penalty for leaving it.
    start: no target lies before this column.
  """

  rows: packing.Batch
  advantages_B: jax.Array
  old_BT: jax.Array | None = None
  reference_BT: jax.Array | None = None
  start: int = struct.field(pytree_node=False, default=0)


@dataclasses.dataclass(frozen=True)
class Config:
  """The defaults are GRPO's, with PPO's clip. Dr. GRPO: mean='constant', std=False, beta=0. DAPO: mean='token',
  clip_high=0.28, beta=0.

  Attributes:
    clip, clip_high: the ratio counts from 1 - clip to 1 + clip_high.
    beta: of the divergence from the reference (k3), which is in the loss and not in the reward.
    mean: of the loss over tokens: 'sequence': over the tokens of an answer, then over answers; 'token': over all tokens
      of the batch; 'constant': a sum over an answer's tokens divided by `length`, then over answers.
    length: tokens, for 'constant': the most that an answer may have.
    std: advantages are divided by the standard deviation of their group.
    temperature: of the sampler.
    chunk: tokens whose logits exist at once.
  """

  clip: float = 0.2
  clip_high: float = 0.2
  beta: float = 0.04
  mean: Literal['sequence', 'token', 'constant'] = 'sequence'
  length: int = 0
  std: bool = True
  temperature: float = 1.0
  chunk: int = 1024

  def __post_init__(self):
    if not 0 < self.clip <= 1:
      raise ConfigError(f'loss.clip={self.clip}; expected 0 < clip <= 1')
    if not 0 < self.clip_high < math.inf:
      raise ConfigError(f'loss.clip_high={self.clip_high}; expected a finite number above 0')
    if not 0 <= self.beta < math.inf:
      raise ConfigError(f'loss.beta={self.beta}; expected a finite number, at least 0')
    if self.mean not in ('sequence', 'token', 'constant'):
      raise ConfigError(f"loss.mean={self.mean!r}; expected 'sequence', 'token' or 'constant'")
    if self.length < 0 or (self.length > 0) != (self.mean == 'constant'):
      raise ConfigError(f"loss.length={self.length} with loss.mean={self.mean!r}; expected the most tokens of an "
                        "answer with 'constant', else 0; set loss.length")
    if not 0 < self.temperature < math.inf:
      raise ConfigError(f'loss.temperature={self.temperature}; expected a finite number above 0')
    if self.chunk < 1:
      raise ConfigError(f'loss.chunk={self.chunk}; expected at least 1')


def advantages(rewards_PG: jax.Array, c: Config) -> jax.Array:
  """Reward less the group's mean and, with c.std, over the group's standard deviation + 1e-4; f32 [P, G].

  The deviation has G - 1 below (as in TRL; the paper does not say). A group of equal rewards gets exactly 0. A reward
  that is not finite spoils its group: check before.

  Raises:
    ConfigError: groups of one, which have nothing to be compared with.
  """
  if rewards_PG.shape[1] < 2:
    raise ConfigError(f'group={rewards_PG.shape[1]}; expected at least 2 answers to a prompt')
  rewards_PG = jnp.asarray(rewards_PG, jnp.float32)
  rewards_PG = rewards_PG - rewards_PG[:, :1]  # the mean of equal numbers may be off by a bit, of zeros it is not
  centred_PG = rewards_PG - rewards_PG.mean(1, keepdims=True)
  return centred_PG / (rewards_PG.std(1, ddof=1, keepdims=True) + 1e-4) if c.std else centred_PG


def loss(p: params.Tree, batch: Batch, key: nn.Key | None, *, apply: Callable[..., jax.Array],
         head: Callable[[params.Tree], jax.Array], c: Config) -> tuple[dict[str, Term], dict[str, Term]]:
  """Terms {'policy'} and, with a reference, {'kl'}, averaged as c.mean says; an answer without targets does not count.

  Metrics, means over tokens: 'entropy'; 'clip_fraction', whose gradient the clip stops; 'token_kl' to the reference.
  Also 'policy', which has only its gradient to tell: while the ratio is 1 it is the mean of -advantage.

  Args:
    apply, head: as for `lm.logprobs.score`.
  """
  scores = logprobs.score(p, batch.rows, key, apply=apply, head=head, chunk=c.chunk, temperature=c.temperature,
                          entropy=True, start=batch.start)
  old_BT = jax.lax.stop_gradient(scores.logprobs_BT) if batch.old_BT is None else batch.old_BT
  policy_BT, stopped_BT = clipped(_where(scores, scores.logprobs_BT - old_BT), batch.advantages_B[:, None], c)
  share_BT, weight = _shares(scores, c)
  over_tokens = lambda x_BT: Term((scores.weights_BT * x_BT).sum(), scores.weights_BT.sum())
  terms = {'policy': Term((share_BT * policy_BT).sum(), weight)}
  metrics = {'policy': terms['policy'], 'entropy': over_tokens(scores.entropies_BT),
             'clip_fraction': over_tokens(stopped_BT)}
  if batch.reference_BT is not None:
    kl_BT = k3(_where(scores, batch.reference_BT - scores.logprobs_BT))
    terms['kl'], metrics['token_kl'] = Term((share_BT * kl_BT).sum(), weight, c.beta), over_tokens(kl_BT)
  return terms, metrics


def clipped(log_ratio_BT: jax.Array, advantages_B1: jax.Array, c: Config) -> tuple[jax.Array, jax.Array]:
  """(-min(ratio A, clip(ratio) A), whether the clip stops the gradient) of each token."""
  ratio_BT = jnp.exp(log_ratio_BT)
  free_BT = -ratio_BT * advantages_B1
  bound_BT = -jnp.clip(ratio_BT, 1 - c.clip, 1 + c.clip_high) * advantages_B1
  return jnp.maximum(free_BT, bound_BT), bound_BT > free_BT


def k3(log_ratio_BT: jax.Array) -> jax.Array:
  """Estimates KL(policy || reference) from log(reference / policy) of what the policy drew; unbiased, at least 0."""
  return jnp.expm1(log_ratio_BT) - log_ratio_BT


def _where(scores, x_BT):
  return jnp.where(scores.weights_BT > 0, x_BT, 0.0)


def _shares(scores, c):
  """(what each token counts, [B, T]; the weight of the whole, f32)."""
  if c.mean == 'token':
    return scores.weights_BT, scores.weights_BT.sum()
  length_B1 = jnp.maximum(scores.count_B, 1)[:, None] if c.mean == 'sequence' else jnp.float32(c.length)
  return scores.weights_BT / length_B1, (scores.count_B > 0).sum().astype(jnp.float32)
