"""The whole validation split through a task's evaluation loss, batch by batch, summed on the device."""

from collections.abc import Callable
import contextlib
import math
from typing import Any

import jax

from lm import sharding, train
from lm.errors import ConfigError


def check(c: Any, task: Any, parts: Any, abstract: train.State, data: Any) -> None:
  """Of a run as in `lm.run`: will `c.checkpoint.metric` be among the metrics? Compiles nothing.

  Raises:
    DataError: nothing to evaluate. ConfigError: it will not.
  """
  known = task.around.metrics or _means(jax.tree.map(lambda x: 0.0, _sums(c, task, parts, abstract, data)), data)
  if c.checkpoint.metric not in known:
    raise ConfigError(f'checkpoint.metric={c.checkpoint.metric!r}; expected one of {", ".join(sorted(known))}')


def make(c: Any, task: Any, parts: Any, data: Any) -> Callable[[train.State], dict[str, float]]:
  """state -> {'val_loss': ..., ...} of the whole validation split."""
  key = _key(c)

  def evaluate(state):
    sums = train.summed(parts.evaluate(state, batch, key) for batch in _batches(c, task, parts, data))
    return _means(jax.device_get(sums), data)
  return evaluate


def _key(c):
  return jax.random.fold_in(jax.random.key(c.seed), 2)


def _batches(c, task, parts, data):
  return task.source.eval_batches(data, 'validation', c.eval_batch, sharding.batch_sharding(parts.mesh))


def _sums(c, task, parts, abstract, data):
  with contextlib.closing(_batches(c, task, parts, data)) as some:
    return jax.eval_shape(parts.evaluate, abstract, next(some), _key(c))


def _means(sums, data):
  """Sums over the validation split -> 'val_<metric>' means."""
  return {f'val_{k}': v for k, v in means(sums, data).items()}


def means(sums: dict[str, Any], data: Any, split: str = 'validation') -> dict[str, float]:
  """Sums of metrics over a split -> their means (NaN of nothing), and of a decoder's running text the bits per byte."""
  values = {k: float(t.total) / float(t.weight) if t.weight else math.nan for k, t in sums.items()}
  if 'loss' in sums and data.utf8_bytes(split) and not getattr(data.config, 'encoder', False):
    nats, targets, said = float(sums['loss'].total), float(sums['loss'].weight), data.said(split)
    if said - targets > 1 and targets:  # first tokens of isolated documents without bos: as the mean of the others
      nats *= said / targets
    values['bits_per_byte'] = nats / math.log(2) / data.utf8_bytes(split)
  return values
