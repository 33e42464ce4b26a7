"""What the loop knows of its steps: metrics that wait on the device, rates without pauses, when to give up."""

from collections.abc import Callable, Iterator
import contextlib
import time
from typing import Any

import jax

from lm.errors import DataError, Diverged


class Report:
  """Metrics that still wait on the device, and the time spent training: compiling, evaluating, saving left out.

  Args:
    program, c, logs: of the loop.
    start, skipped: steps before the first one that is added, and how many of them were skipped.
  """

  def __init__(self, program: Any, c: Any, start: int, skipped: int, logs: Any):
    self._program, self._c, self._logs = program, c, logs
    self._waiting = []
    self._start = self._reported = start
    self._skipped, self._in_a_row = skipped, 0
    self._since, self._ended = 0.0, None

  def add(self, n: int, metrics: dict[str, jax.Array]) -> None:
    """After step `n` was dispatched, or on a device that does not go on by itself, such as a CPU, done."""
    now, done = time.perf_counter(), all(
        x.is_ready() for x in metrics.values() if hasattr(x, 'is_ready'))
    self._ended = now if done else None
    if n == self._start + 1:
      self._since = now  # the first call of the step, just over, compiled it
      self._reported += done
    self._waiting.append((n, metrics))

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """The clock stands."""
    began = time.perf_counter()
    yield
    self._since += time.perf_counter() - began

  def flush(self, more: Callable[[], dict[str, float] | None] = dict) -> dict[str, float] | None:
    """Writes one row, of the newest waiting step, and adds what `more` finds, if it does, while the clock stands.

    Raises:
      Diverged: `c.max_skipped` steps in a row changed nothing. DataError: and the last of them had no targets.
    """
    if not self._waiting:
      return {}
    rows, self._waiting = jax.device_get(self._waiting), []
    before, hopeless = self._skipped, None
    for n, metrics in rows:
      before, self._skipped = self._skipped, int(metrics['skipped'])
      # Of a step of several updates: all of them.
      self._in_a_row = self._in_a_row + 1 if self._skipped - before >= metrics.get('updates', 1) else 0
      if self._in_a_row == self._c.max_skipped:
        hopeless, targets = n, metrics.get('targets', 1)
    n, metrics = rows[-1]
    row = {'learning_rate': self._program.learning_rate(n - 1 - before)} | {k: float(v) for k, v in metrics.items()}
    row |= self._rates(n) | {'elapsed_s': self._program.elapsed()}
    with self.paused():
      found = {} if hopeless else more()
    self._logs.row(n, row | (found or {}))
    if hopeless:
      raise self._hopeless(hopeless, targets)
    return found

  def _hopeless(self, n, targets):
    often, see = f'{self._c.max_skipped} times in a row', f'look at what it read (--show_batch={n})'
    if not targets:
      return DataError(f'step {n}: a batch without targets, or skipped, {often}; {see}: prompts are no targets, and '
                       'may fill whole rows; choose a larger data.length or other data')
    left_out = f'skip_batches=(({n - self._c.max_skipped},{self._c.max_skipped}),)'
    return Diverged(f'step {n}: loss or gradient was not finite (or a spike, by optim.spike_sigma) {often}; nothing '
                    f'of it reached the parameters; {see}, lower optim.lr or leave it out (--set {left_out}), then '
                    'start again with --resume_with_changes')

  def _rates(self, n):
    p, now = self._program, self._ended or time.perf_counter()
    seconds, steps = max(now - self._since, 1e-9), n - self._reported
    self._since, self._reported = now, n
    rates = {'tokens': p.tokens(n)}
    if steps:
      rates['tokens_per_s'] = steps * p.tokens_per_step / seconds
      rates |= {'mfu': steps * p.flops_per_step / seconds / p.peak_flops} if p.peak_flops else {}
    return rates
