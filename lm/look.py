"""What a run would do, without doing it: what it trains and costs, and what a step of it reads.

c, task: a `run.Config` and a `run.Task`. Shapes: B rows, T tokens a row.
"""

from collections.abc import Iterator
import dataclasses
import itertools
import os
import pathlib
from typing import Any

import jax
import numpy as np

from lm import budget, params, start, summary
from lm.errors import ConfigError
from lm.text.tokenizer import Tokenizer

OPENS, CLOSES = '⟦', '⟧'  # around targets


def describe(c: Any, task: Any) -> str:
  """The parameter table, exact counts by group, training tokens and FLOPs; allocates nothing."""
  tokens = c.optim.steps // task.around.updates * summary.tokens_per_step(c, task)
  trained = params.count(params.split(task.specs, start.trainable(c, task))[0])
  groups = [(name, f'{n:,}') for name, n in budget.counts(task.specs).items()]
  groups += [('training tokens', f'{tokens:,}'),
             ('FLOPs a token', f'{task.flops.total:.4g} ({task.flops.attention / task.flops.total:.1%} attention)'),
             ('training FLOPs', f'{tokens * task.flops.total:.4g}'),
             ('trained', f'{trained:,}'),
             (f'bytes, f32 with AdamW{" and an average" if c.optim.ema else ""}',
              budget.human(4.0 * params.count(task.specs) + (16.0 if c.optim.ema else 12.0) * trained, 'B'))]
  return budget.table(task.specs) + '\n\n' + budget.columns(groups)


def batch(c: Any, task: Any, workdir: str | os.PathLike, step: int) -> str:
  """The texts that step `step` (1 is the first) of the run reads, row by row; control tokens by name.

  Targets stand in brackets where some token of a row, other than a document's first, is none. What the step itself
  draws, such as the masked words of an encoder, is not shown. Raw text is tokenised into `workdir` first.

  Raises:
    ConfigError: the run has no such step. DataError: as `data` says.
  """
  steps = c.optim.steps // task.around.updates
  if not 1 <= step <= steps:
    raise ConfigError(f'--show_batch={step}: the run has steps 1 to {steps}; choose one of them')
  data = task.source.prepare(c.data, pathlib.Path(workdir) / 'data', seed=c.seed)
  task.source.check(data, task.vocab)
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  read = jax.device_get(next(start.batches(c, task, data, here, step - 1)))
  return '\n'.join(_rows(read, data.tokenizer))


def with_controls(tokenizer: Tokenizer, ids: np.ndarray) -> str:
  """Text of the ids with control tokens as their names."""
  names = {i: name for name, i in tokenizer.control.items()}
  runs = itertools.groupby(ids.tolist(), lambda i: names.get(i))
  return ''.join(tokenizer.decode(list(run)) if name is None else name * len(list(run)) for name, run in runs)


def _rows(node: Any, tokenizer: Tokenizer, name: str = '') -> Iterator[str]:
  """Two lines a row of every array of ids in a batch: where it is and how long, its text."""
  fields = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
  of = lambda kind: next((x.reshape(-1, x.shape[-1]) for k, x in fields.items() if k.startswith(f'{kind}_')), None)
  ids, segments, targets = of('ids'), of('segments'), of('mask')
  if ids is not None:
    for i, (ids_T, segments_T) in enumerate(zip(ids, segments, strict=True)):
      inside_T = segments_T > 0
      first_T = np.diff(segments_T, prepend=0) != 0
      yield f'{name} row {i}: {inside_T.sum()} tokens'.strip() + (
          '' if targets is None else f', {targets[i].sum()} targets')
      told = targets is not None and not (targets[i] | first_T)[inside_T].all()
      yield _marked(tokenizer, ids_T[inside_T], targets[i][inside_T] if told else np.zeros(inside_T.sum(), bool)) + '\n'
  for field, value in fields.items():
    if dataclasses.is_dataclass(value):
      yield from _rows(value, tokenizer, f'{name} {field}'.strip())


def _marked(tokenizer, ids, targets):
  edges = [0, *(np.flatnonzero(np.diff(targets)) + 1).tolist(), len(ids)]
  parts = [(with_controls(tokenizer, ids[a:b]), targets[a]) for a, b in itertools.pairwise(edges) if b > a]
  return ''.join(f'{OPENS}{text}{CLOSES}' if target else text for text, target in parts)
