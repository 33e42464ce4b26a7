"""Proximal policy optimisation of a language model (arXiv:1707.06347; for language arXiv:1909.08593, arXiv:2203.02155).

A rollout is turned into `Experience` once, over all its rows; `loss` then takes the gradient of a minibatch of it.

Shapes: B rows, T targets a row (rows hold T + 1 ids), D model, V vocabulary. Arrays [B, T] belong to the tokens
ids_BT[:, 1:] and to the states that predict them. mask_BT is bool, true at the tokens of the one response of a row,
which may have gaps: what somebody else said. Where it is false nothing is read, so padding, on either side, changes
nothing.

Everything is f32. Scores may be ints or bools, and become f32; ints where log-probabilities, rewards or values are
expected are refused.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, Literal

from flax import struct
import jax
import jax.numpy as jnp

from lm import nn, params
from lm.data.packing import Batch
from lm.errors import ConfigError
from lm.kernels.cross_entropy import token_logprobs
from lm.losses import Term

Terms = dict[str, Term]
Estimator = Literal['k1', 'k2', 'k3']


@dataclasses.dataclass(frozen=True)
class KL:
  """The penalty for leaving the reference.

  Attributes:
    coef: beta at the start.
    target: nats a response that `adapt` steers to; 0: coef is fixed.
    horizon: episodes over which it does.
    estimator: of each token's KL, see `divergence`.
  """

  coef: float = 0.05
  target: float = 0.0
  horizon: int = 10_000
  estimator: Estimator = 'k1'

  def __post_init__(self):
    for name in ('coef', 'target'):
      if not 0 <= getattr(self, name) < math.inf:
        raise ConfigError(f'loss.kl.{name}={getattr(self, name)}; expected a finite number, at least 0')
    if self.horizon < 1:
      raise ConfigError(f'loss.kl.horizon={self.horizon}; expected at least 1 episode')
    if self.target and not self.coef:
      raise ConfigError(f'loss.kl.target={self.target} with loss.kl.coef=0, which no factor moves; set loss.kl.coef')
    if self.estimator not in ('k1', 'k2', 'k3'):
      raise ConfigError(f'loss.kl.estimator={self.estimator!r}; expected one of k1, k2, k3')


@dataclasses.dataclass(frozen=True)
class Config:
  """Discounts, clips and weights of arXiv:2403.17031 by default.

  Attributes:
    gamma, lam: of the advantages (arXiv:1506.02438).
    whiten_rewards: divide rewards by their spread, keeping the mean (lm-human-preferences).
    whiten: advantages have mean 0 and spread 1.
    missing_eos: penalty for a response that did not end by itself.
    missing_eos_mode: 'subtract' it from the score, or 'replace' the score by minus it (lm-human-preferences: 1).
    clip: the ratio counts within 1 - clip to 1 + clip.
    value_clip: the value counts within this distance of the old one; 0: at any.
    value_weight, entropy_weight: of the value's loss, and of the entropy that is added to the objective.
    chunk: tokens whose logits exist at once.
    temperature: at which the responses were drawn: the policy is softmax(logits / temperature).
  """

  gamma: float = 1.0
  lam: float = 0.95
  kl: KL = KL()
  whiten_rewards: bool = False
  whiten: bool = True
  missing_eos: float = 0.0
  missing_eos_mode: Literal['subtract', 'replace'] = 'subtract'
  clip: float = 0.2
  value_clip: float = 0.2
  value_weight: float = 0.1
  entropy_weight: float = 0.0
  chunk: int = 1024
  temperature: float = 1.0

  def __post_init__(self):
    for name in ('gamma', 'lam'):
      if not 0 <= getattr(self, name) <= 1:
        raise ConfigError(f'loss.{name}={getattr(self, name)}; expected 0 <= {name} <= 1')
    for name in ('missing_eos', 'value_clip', 'value_weight', 'entropy_weight'):
      if not 0 <= getattr(self, name) < math.inf:
        raise ConfigError(f'loss.{name}={getattr(self, name)}; expected a finite number, at least 0')
    if self.missing_eos_mode != 'subtract' and not (self.missing_eos_mode == 'replace' and self.missing_eos):
      raise ConfigError(f"loss.missing_eos_mode={self.missing_eos_mode!r} with loss.missing_eos={self.missing_eos}; "
                        "expected 'subtract', or 'replace' with more than 0")
    for name, right, expected in (('clip', 0 < self.clip < 1, '0 < clip < 1'), ('chunk', self.chunk >= 1, 'at least 1'),
                                  ('temperature', 0 < self.temperature < math.inf, 'a finite number above 0')):
      if not right:
        raise ConfigError(f'loss.{name}={getattr(self, name)}; expected {expected}')

  def penalised(self, scores_B: jax.Array, ended_B: jax.Array) -> jax.Array:
    """The scores, f32, less what responses without their eos lose."""
    return jnp.where(ended_B, scores_B, (scores_B if self.missing_eos_mode == 'subtract' else 0) - self.missing_eos)


@struct.dataclass
class Experience:
  """What `loss` gets. The arrays beside the batch are f32 [B, T], 0 outside the response.

  Attributes:
    batch: prompts and responses, whose mask is true at a response's tokens, its eos included.
    logprobs_BT, values_BT: of the policy that drew the responses.
    advantages_BT, returns_BT: what to learn.
    start: no response begins before this column.
  """

  batch: Batch
  logprobs_BT: jax.Array
  values_BT: jax.Array
  advantages_BT: jax.Array
  returns_BT: jax.Array
  start: int = struct.field(pytree_node=False, default=0)


def experience(batch: Batch, logprobs_BT: jax.Array, reference_BT: jax.Array, values_BT: jax.Array, scores_B: jax.Array,
               ended_B: jax.Array, coef: jax.Array | float, c: Config) -> tuple[Experience, dict[str, jax.Array]]:
  """A rollout made ready, and what it is like. Takes all rows at once: moments for whitening are of the whole set.

  Args:
    logprobs_BT, reference_BT: of the tokens under the policy that drew them and under the reference.
    scores_B: of whole responses.
    ended_B: bool, the response has its eos.
    coef: of the KL; see `adapt`.

  Returns:
    Experience and f32 scalars. Means over responses: kl (nats, k1: what `adapt` steers), entropy (estimated, -log P),
    score (penalty included), reward (all of them, whitened or not), length, ended. Over tokens: explained_variance.
  """
  mask_BT = batch.mask_BT[:, 1:]
  logprobs_BT, reference_BT, values_BT = (jax.lax.stop_gradient(_inside(name, x_BT, mask_BT)) for name, x_BT in (
      ('logprobs', logprobs_BT), ('reference', reference_BT), ('values', values_BT)))
  scores_B = c.penalised(scores_B.astype(jnp.float32), ended_B)
  rewards_BT = rewards(logprobs_BT, reference_BT, scores_B, mask_BT, coef, c.kl.estimator)
  if c.whiten_rewards:
    rewards_BT = whiten(rewards_BT, mask_BT, shift=False)
  advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, c.gamma, c.lam)
  some_B = mask_BT.any(1)
  mean = lambda x_B: jnp.where(some_B, x_B, 0).sum() / jnp.maximum(some_B.sum(), 1).astype(jnp.float32)
  stats = {'kl': mean((logprobs_BT - reference_BT).sum(1)), 'entropy': mean(-logprobs_BT.sum(1)),
           'score': mean(scores_B), 'reward': mean(rewards_BT.sum(1)), 'length': mean(mask_BT.sum(1)),
           'ended': mean(ended_B), 'explained_variance': explained_variance(values_BT, returns_BT, mask_BT)}
  advantages_BT = whiten(advantages_BT, mask_BT) if c.whiten else advantages_BT
  return Experience(batch, logprobs_BT, values_BT, advantages_BT, returns_BT), stats


def loss(p: params.Tree, e: Experience, key: nn.Key | None, *, apply: Callable[..., tuple[jax.Array, jax.Array]],
         head: Callable[[params.Tree], jax.Array], c: Config) -> tuple[Terms, Terms]:
  """Terms and metrics as of `objective`. There is no dropout: the ratio would not be 1 at the start.

  Args:
    apply: (params, ids_BT, *, positions_BT, segments_BT, key) -> (x_BTD, values_BT); of one trunk or two.
    head: params -> w_VD.
  """
  del key
  b = e.batch
  x_BTD, values_BT = apply(p, b.ids_BT[:, :-1], positions_BT=b.positions_BT[:, :-1], segments_BT=b.segments_BT[:, :-1],
                           key=None)
  logprobs_BT, entropy_BT = token_logprobs(x_BTD, head(p), b.ids_BT[:, 1:], c.chunk, temperature=c.temperature,
                                           entropy=True, start=e.start)
  return objective(logprobs_BT, entropy_BT, values_BT, e, c)


def objective(logprobs_BT: jax.Array, entropy_BT: jax.Array, values_BT: jax.Array, e: Experience, c: Config
              ) -> tuple[Terms, Terms]:
  """Terms {'policy', 'value'}: means over tokens of max(-A ratio, -A clip(ratio)), and of half the larger of
  (v - R)^2 and (clip(v) - R)^2; and where c.entropy_weight is set, {'entropy'}, negated.

  Metrics: policy_loss, value_loss; means over tokens: entropy, ratio, approx_kl (half of the squared difference in
  log-probability from the policy that drew), clip_fraction and value_clip_fraction (what is clipped learns nothing);
  ratio_max: the mean over responses of each one's largest.
  """
  mask_BT = e.batch.mask_BT[:, 1:]
  logprobs_BT, entropy_BT, values_BT = (_inside(name, x_BT, mask_BT) for name, x_BT in (
      ('logprobs', logprobs_BT), ('entropy', entropy_BT), ('values', values_BT)))
  change_BT = logprobs_BT - e.logprobs_BT
  ratio_BT = jnp.exp(change_BT)
  free_BT = -e.advantages_BT * ratio_BT
  clipped_BT = -e.advantages_BT * jnp.clip(ratio_BT, 1 - c.clip, 1 + c.clip)
  near_BT = e.values_BT + jnp.clip(values_BT - e.values_BT, -c.value_clip, c.value_clip) if c.value_clip else values_BT
  error_BT, near_error_BT = (values_BT - e.returns_BT)**2, (near_BT - e.returns_BT)**2
  weights_BT = mask_BT.astype(jnp.float32)
  weight = weights_BT.sum()
  mean = lambda x_BT: Term((weights_BT * x_BT).sum(), weight)
  policy, value = mean(jnp.maximum(free_BT, clipped_BT)), mean(0.5 * jnp.maximum(error_BT, near_error_BT))
  largest = Term((weights_BT * ratio_BT).max(1).sum(), mask_BT.any(1).sum().astype(jnp.float32))
  terms = {'policy': policy, 'value': value.replace(scale=c.value_weight)}
  if c.entropy_weight:
    terms['entropy'] = mean(-entropy_BT).replace(scale=c.entropy_weight)
  return terms, {
      'policy_loss': policy, 'value_loss': value, 'entropy': mean(entropy_BT), 'approx_kl': mean(0.5 * change_BT**2),
      'ratio': mean(ratio_BT), 'ratio_max': largest, 'clip_fraction': mean(clipped_BT > free_BT),
      'value_clip_fraction': mean(near_error_BT > error_BT)}


def with_pretraining(rl: Callable[..., tuple[Terms, Terms]], text: Callable[..., tuple[Terms, Terms]], weight: float
                     ) -> Callable[[params.Tree, tuple[Experience, Any], nn.Key | None], tuple[Terms, Terms]]:
  """PPO-ptx (arXiv:2203.02155 eq. 2): a loss of (experience, batch of text) that adds weight * nll a token as 'ptx'.

  Args:
    rl, text: losses; the second has the term 'nll', as that of `lm.losses.ar`, and gets no dropout either.
    weight: 27.8 in InstructGPT.
  """
  def both(p, batch, key):
    terms, metrics = rl(p, batch[0], key)
    nll = text(p, batch[1], None)[0]['nll']
    return terms | {'ptx': nll.replace(scale=weight)}, metrics | {'ptx_loss': nll}
  return both


def rewards(logprobs_BT: jax.Array, reference_BT: jax.Array, scores_B: jax.Array, mask_BT: jax.Array,
            coef: jax.Array | float, estimator: Estimator = 'k1') -> jax.Array:
  """-coef * KL at each token, and the score at the last one of the response: [B, T]."""
  logprobs_BT, reference_BT = _inside('logprobs', logprobs_BT, mask_BT), _inside('reference', reference_BT, mask_BT)
  last_BT = mask_BT & (jnp.cumsum(mask_BT[:, ::-1], axis=1)[:, ::-1] == 1)
  return (jnp.where(last_BT, scores_B.astype(jnp.float32)[:, None], 0.0)
          - coef * divergence(logprobs_BT, reference_BT, estimator))


def divergence(logprobs: jax.Array, reference: jax.Array, estimator: Estimator = 'k1') -> jax.Array:
  """KL(policy || reference) estimated from a token that the policy drew, with log r = reference - logprobs.

  k1 = -log r and k3 = r - 1 - log r are unbiased, and k3 is never negative; k2 = (log r)^2 / 2 is biased, little
  where the two are near. (http://joschu.net/blog/kl-approx.html)
  """
  log_r = reference - logprobs
  if estimator == 'k1':
    return -log_r
  return 0.5 * log_r**2 if estimator == 'k2' else jnp.expm1(log_r) - log_r


def adapt(coef: jax.Array | float, kl: jax.Array | float, episodes: int, c: KL) -> jax.Array:
  """The coefficient after `episodes` responses of mean KL `kl` (arXiv:1909.08593 §2.2); unchanged if c.target is 0."""
  coef = jnp.float32(coef)
  return coef * (1 + jnp.clip(kl / c.target - 1, -0.2, 0.2) * episodes / c.horizon) if c.target else coef


def gae(rewards_BT: jax.Array, values_BT: jax.Array, mask_BT: jax.Array, gamma: float, lam: float
        ) -> tuple[jax.Array, jax.Array]:
  """(advantages_BT, returns_BT), 0 outside the response, behind which all values are 0 (arXiv:1506.02438 eq. 16)."""
  rewards_BT, values_BT = _inside('rewards', rewards_BT, mask_BT), _inside('values', values_BT, mask_BT)

  def step(after, now):
    (advantage_B, value_B), (r_B, v_B, mask_B) = after, now
    a_B = r_B + gamma * value_B - v_B + gamma * lam * advantage_B
    return (jnp.where(mask_B, a_B, advantage_B), jnp.where(mask_B, v_B, value_B)), jnp.where(mask_B, a_B, 0.0)
  zero_B = jnp.zeros_like(rewards_BT[:, 0])
  advantages_TB = jax.lax.scan(step, (zero_B, zero_B), (rewards_BT.T, values_BT.T, mask_BT.T), reverse=True)[1]
  return advantages_TB.T, advantages_TB.T + values_BT


def whiten(x_BT: jax.Array, mask_BT: jax.Array, shift: bool = True) -> jax.Array:
  """(x - mean) / sqrt(variance + 1e-8) over all tokens of the mask, 0 elsewhere; without `shift` the mean is put back.

  Not for use inside a loss, where a device sees its own rows only.
  """
  x_BT = _inside('x', x_BT, mask_BT)
  centred_BT, mean, variance = _moments(x_BT, mask_BT)
  white_BT = centred_BT * jax.lax.rsqrt(variance + 1e-8)
  return jnp.where(mask_BT, white_BT if shift else white_BT + mean, 0.0)


def explained_variance(values_BT: jax.Array, returns_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
  """1 - Var(R - v) / Var(R) over all tokens of the mask; 0 where returns do not vary."""
  _, _, wanted = _moments(returns_BT, mask_BT)
  _, _, left = _moments(returns_BT - values_BT, mask_BT)
  return jnp.where(wanted > 0, 1 - left / jnp.where(wanted > 0, wanted, 1.0), 0.0)


def _moments(x_BT, mask_BT):
  """(x - mean, mean, variance) over the mask. The mean is taken twice: equal numbers have no spread, not that of its
  rounding."""
  weights_BT = mask_BT.astype(jnp.float32)
  average = lambda y_BT: (weights_BT * y_BT).sum() / jnp.maximum(weights_BT.sum(), 1.0)
  mean = average(x_BT)
  rest = average(x_BT - mean)
  centred_BT = x_BT - mean - rest
  return centred_BT, mean + rest, average(centred_BT**2)


def _inside(name, x_BT, mask_BT):
  """x as f32, 0 outside the mask."""
  if not jnp.issubdtype(x_BT.dtype, jnp.floating):
    raise ConfigError(f'{name}: {x_BT.dtype}; expected floats; only scores are taken as ints')
  return jnp.where(mask_BT, x_BT.astype(jnp.float32), 0.0)
