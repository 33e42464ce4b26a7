"""Fine-tuning of an encoder on labelled texts that fit in memory."""

from collections.abc import Callable
import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from lm import nn, optim, params, sharding, train
from lm.data import labelled
from lm.losses import classify
from lm.models import heads


def classifier(family: types.ModuleType, model: Any, p: params.Tree, sets: dict[str, labelled.Set], classes: int,
               c: optim.Config, *, batch: int, seeds: int, **options: Any) -> list[float]:
  """Accuracy on sets['validation'] after `c.steps` updates on sets['train'], for each of `seeds` orders and heads.

  The head is RoBERTa's (dropout, dense, tanh, dropout, logits) on the first token; all parameters train.

  Args:
    family, model, p: a module such as `lm.models.encoder`, its config, and parameters; heads among them are left out.
    options: more arguments of `family.apply`, such as `attend`.
  """
  specs = family.specs(model) | {'classify': heads.classify_specs(model.embed, classes, dense=True)}
  tx = optim.make(c, specs)
  step = jax.jit(train.make_step(_loss(family, model, options), tx), donate_argnums=0)
  evaluate = jax.jit(train.make_eval(_loss(family, dataclasses.replace(model, dropout=nn.Dropout()), options)))
  trainable = jax.tree.map(lambda _: True, specs)

  @jax.jit
  def start(key, p):
    fresh = params.init(specs, key)
    return train.state_of({name: fresh[name] if name == 'classify' else jax.tree.map(jnp.copy, p[name])
                           for name in fresh}, tx, trainable)
  accuracies = []
  with sharding.use(sharding.make_mesh(sharding.Config())):
    for seed in range(seeds):
      key = jax.random.key(seed)
      state = start(jax.random.fold_in(key, 0), {name: p[name] for name in specs if name != 'classify'})
      for batch_NT in tqdm.tqdm(_forever(sets['train'], batch, seed, c.steps), total=c.steps, disable=None,
                                desc=f'fine-tuning, seed {seed}'):
        state, _ = step(state, batch_NT, jax.random.fold_in(key, 1))
      accuracies.append(_accuracy(evaluate, state.params, sets['validation'], batch))
  return accuracies


def _forever(examples, batch, seed, steps):
  for n in range(steps):
    epoch, at = divmod(n, len(examples) // batch)
    if at == 0:
      batches = examples.epoch(batch, seed, epoch)
    yield next(batches)


def _accuracy(evaluate: Callable[..., Any], p, examples, batch):
  sums = None
  for some in examples.once(batch):
    sums = evaluate(p, some, None, sums)
  return float(sums['accuracy'].total) / float(sums['accuracy'].weight)


def _loss(family, model, options):
  def logits(p, ids_BT, *, segments_BT, key):
    x_BTD = family.apply(p, model, ids_BT, segments_BT=segments_BT, key=nn.fold(key, 0), **options)
    return heads.classify(p['classify'], x_BTD[:, 0], 'tanh', model.dropout.classifier, nn.fold(key, 1))
  return functools.partial(classify.loss, logits=logits)
