"""From rollouts to what a loss takes, for each way to train a policy; and how a policy is judged.

All are functions of a config of `lm.policy`, made once and jitted by `lm.reinforce`. Shapes: B rows, P prompts, G
responses to each, T targets a row.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm import parallel, params, peft, policy, rollout, train
from lm.losses import ar, grpo, ppo
from lm.policy import BestOf, Config, GRPO, PPO


def loss(c: Config, tree: params.Tree, attend: Callable[..., jax.Array]) -> train.Loss:
  """Of a minibatch of what `learn` makes."""
  stack = parallel.stack(c.mesh, peft.block_specs(c.peft, tree), c.model.dtype)
  apply, valued, head = policy.bind(c, attend, stack)
  if isinstance(c, GRPO):
    return functools.partial(grpo.loss, apply=apply, head=head, c=c.loss)
  if isinstance(c, BestOf):
    return functools.partial(ar.loss, apply=apply, head=head, c=c.loss)
  found = functools.partial(ppo.loss, apply=valued, head=head, c=c.loss)
  if not c.text.corpus:
    return found
  text = functools.partial(ar.loss, apply=apply, head=head, c=ar.Config(chunk=c.loss.chunk))
  return ppo.with_pretraining(found, text, c.text_weight)


def learn(c: Config, attend: Callable[..., jax.Array]) -> Callable[..., tuple[Any, dict[str, jax.Array], Any]]:
  """(params, rollout, scores_B, carry) -> (rows for `loss`, f32 scalars to report, carry); to be jitted."""
  apply, valued, head = policy.bind(c, attend)
  said = functools.partial(rollout.score, s=policy.sampling(c), head=head, chunk=c.loss.chunk)
  asked = c.rollout.logprobs == 'model'

  def by_value(p, r, scores_B, carry):
    old_BT, values_BT = said(p, r, apply=valued)  # with a critic of its own, compiled without the policy if not asked
    old_BT = old_BT if asked else r.drawn_BT
    reference_BT, _ = said(policy.reference(p), r, apply=apply)
    coef = carry['kl_coef'] if c.loss.kl.target else jnp.float32(c.loss.kl.coef)  # a fixed one may change on resuming
    made, stats = ppo.experience(r.batch, old_BT, reference_BT, values_BT, scores_B, r.ended_B, coef, c.loss)
    del stats['entropy']  # an estimate of what the loss knows exactly
    after = {'kl_coef': ppo.adapt(coef, stats['kl'], c.rows, c.loss.kl)}
    return made.replace(start=r.width - 1), stats | {'kl_coef': coef}, after

  def by_group(p, r, scores_B, carry):
    advantages_PG = grpo.advantages(scores_B.reshape(-1, c.rollout.group), c.loss)
    old_BT = (said(p, r, apply=apply)[0] if asked else r.drawn_BT) if c.updates > 1 else None
    reference_BT = said(policy.reference(p), r, apply=apply)[0] if c.loss.beta else None
    stats = {'score': scores_B.mean(), 'length': r.lengths_B.mean(), 'ended': r.ended_B.mean(dtype=jnp.float32),
             'equal_groups': (advantages_PG == 0).all(1).mean(dtype=jnp.float32)}
    return grpo.Batch(r.batch, advantages_PG.reshape(-1), old_BT, reference_BT, r.width - 1), stats, carry

  def the_best(p, r, scores_B, carry):
    del p
    kept = rollout.best_of(r, scores_B, c.rollout.group)
    best_P = scores_B.reshape(-1, c.rollout.group).max(1)
    return kept.batch, {'score': scores_B.mean(), 'best': best_P.mean(), 'length': r.lengths_B.mean(),
                        'ended': r.ended_B.mean(dtype=jnp.float32)}, carry
  return by_value if isinstance(c, PPO) else by_group if isinstance(c, GRPO) else the_best


def judge(c: Config, attend: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """(params, rollout) -> f32 [B] each: log-probability of the response under the policy and under the reference."""
  apply, _, head = policy.bind(c, attend)
  said = lambda p, r: rollout.score(p, r, policy.sampling(c), apply=apply, head=head, chunk=c.loss.chunk)[0].sum(1)
  return lambda p, r: (said(p, r), said(policy.reference(p), r))
