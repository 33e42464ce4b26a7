"""What a plan compiles: the task of a config of experiments/, and the shapes of its batch; no data is read.

Shapes: B rows of the global batch, K answers, T targets a row.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lm import (
  classification,
  instruct,
  policy,
  preference,
  pretrain,
  pretrain_encoder,
  reinforce,
  reward_model,
  run,
  sharding,
)
from lm.data import framing, inputs, masking, packing, preferences
from lm.losses import grpo, ppo
from lm.models import decoder


def task_of(c: run.Config) -> run.Task:
  """Encoders get a stand-in for their tokenizer, policies for their reward: neither changes the step's program."""
  if isinstance(c, policy.Config):
    return reinforce.task(c, lambda records, responses: [])
  for kind, module in ((classification.Config, classification), (reward_model.Config, reward_model),
                       (preference.Config, preference), (instruct.Config, instruct)):
    if isinstance(c, kind):
      return module.task(c)
  if isinstance(c.model, decoder.Config):
    return pretrain.task(c)
  vocab = next(iter(pretrain_encoder.networks(c.model).values())).vocab
  return pretrain_encoder.task(c, masking.Tokens(mask=4, vocab=vocab, special=(0, 1, 2, 3, 4)))


def batch_of(c: run.Config, mesh: jax.sharding.Mesh) -> Any:
  """A global batch as `jax.ShapeDtypeStruct`s on the mesh; of a policy, what one optimizer step learns from."""
  place = sharding.batch_sharding(mesh)
  B, T = c.data.batch, c.data.length
  if isinstance(c, policy.Config):
    B, T = c.kept // c.rollout.minibatches, c.data.length + c.rollout.new_tokens - 1
  array = lambda dtype, *shape: jax.ShapeDtypeStruct((B, *shape), dtype, sharding=place)
  rows = lambda *lead: packing.Batch(*(array(dtype, *lead, T + 1) for dtype in (*3 * [jnp.int32], jnp.bool_)))
  if isinstance(c, policy.PPO):
    return ppo.Experience(rows(), *(array(jnp.float32, T) for _ in range(4)))
  if isinstance(c, policy.GRPO):
    return grpo.Batch(rows(), array(jnp.float32), array(jnp.float32, T) if c.updates > 1 else None,
                      array(jnp.float32, T) if c.loss.beta else None)
  if isinstance(c, reward_model.Config | preference.Config):
    K = c.data.answers
    ranked = preferences.Ranked(rows(K), array(jnp.float32, K), array(jnp.bool_, K))
    return ranked if isinstance(c, reward_model.Config) else preference.Referred(ranked, array(jnp.float32, K))
  if isinstance(c, classification.Config):
    return framing.Labelled(array(jnp.int32, T), array(jnp.int32, T), array(jnp.int32))
  if not isinstance(c.model, decoder.Config):
    return inputs.Inputs(*(array(jnp.int32, T) for _ in range(4)), array(jnp.bool_, T), array(jnp.bool_),
                         array(jnp.uint32))
  return rows()
