"""What a run leaves to be read by people and by other programs: summary.json."""

from collections.abc import Callable
import math
import pathlib
import resource
import statistics
from typing import Any

import jax

from lm import checkpoint, logs, params, seal


def write(c: Any, task: Any, workdir: pathlib.Path, step: int, meta: dict[str, Any]) -> dict[str, Any]:
  """summary.json of a run of `lm.run`, from its last evaluation and metrics.jsonl; rates are medians over its rows."""
  values = meta['evaluations'][-1][1] if meta['evaluations'] else {}
  rows = logs.read(workdir)
  middle = lambda name: statistics.median([r[name] for r in rows if name in r] or [math.nan])
  per_step, planned = tokens_per_step(c, task), c.optim.steps // task.around.updates
  summary = values | {
      'steps': step, 'tokens': meta['tokens'], 'flops': meta['tokens'] * task.flops.total, 'wall_s': meta['wall_s'],
      'tokens_per_s': middle('tokens_per_s'), 'mfu': middle('mfu'), 'peak_bytes': meta['peak_bytes'],
      'parameters': params.count(task.specs), 'best': best(meta['evaluations'], c.checkpoint),
      'planned': {'steps': planned, 'tokens': planned * per_step, 'flops': planned * per_step * task.flops.total},
  } | ({} if c.published is None else {'published': c.published})
  if jax.process_index() == 0:
    logs.write_summary(workdir, summary)
  return summary


def tokens_per_step(c: Any, task: Any) -> int:
  """Tokens that a step of the run computes on."""
  return task.around.tokens or c.data.batch * c.data.length


def tokens(c: Any, task: Any, before: int, start: int) -> Callable[[int], int]:
  """step -> tokens that the run has computed on; `before` up to step `start`, when data.batch may have been another."""
  return lambda step: before + (step - start) * tokens_per_step(c, task)


def best(evaluations: list, c: checkpoint.Config) -> dict[str, float] | None:
  """The evaluation whose checkpoint is kept as the best (of equal ones the first, as in `seal.ranked`); that of
  step 0 has none."""
  values = {step: v.get(c.metric) for step, v in evaluations if step}
  return next(({'step': step, c.metric: values[step]} for step in seal.ranked(values, c.mode) if c.keep_best), None)


def peak_bytes() -> int:
  """Most memory in use at once: of the device; of the whole process where the device does not tell, as a CPU."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('peak_bytes_in_use', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
