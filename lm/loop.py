"""The host loop around a jitted step: log, evaluate, save, stop. It never waits for the device inside a step.

Nothing here knows a model or a loss; it is given functions and writes through `Logs` and a checkpoint `Saver`.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import math
import signal
import time
from typing import Any

import jax

from lm import logs as logs_lib, train
from lm.errors import ConfigError, Diverged, Interrupted, Preempted


@dataclasses.dataclass(frozen=True)
class Config:
  """When to look up from training.

  Attributes:
    log_every: steps between rows of metrics.jsonl.
    eval_every: steps between evaluations; 0 = only at the end.
    patience: evaluations without improvement before stopping early; 0 = never.
    min_delta: an improvement is larger than this.
    max_skipped: consecutive non-finite steps before giving up.
  """

  log_every: int = 10
  eval_every: int = 250
  patience: int = 0
  min_delta: float = 0.0
  max_skipped: int = 5

  def __post_init__(self):
    for name, least in (('log_every', 1), ('eval_every', 0), ('patience', 0), ('min_delta', 0), ('max_skipped', 1)):
      if getattr(self, name) < least:
        raise ConfigError(f'loop.{name}={getattr(self, name)}; expected at least {least}')


def stale(values: list[float], min_delta: float, mode: str) -> int:
  """How many values came since the last one that beat all before it by more than `min_delta`."""
  best, since = math.inf, 0
  for value in values:
    value = value if mode == 'min' else -value
    if best - value > min_delta or not math.isfinite(best):
      best, since = value, 0
    else:
      since += 1
  return since


class Signals:
  """Remembers SIGTERM and Ctrl-C until the loop asks; a second Ctrl-C acts at once."""

  def __init__(self):
    self.received: int | None = None
    self._old: dict[int, Any] = {}

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      self._old[number] = signal.signal(number, self._on)
    return self

  def __exit__(self, *unused):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _on(self, number, frame):
    del frame
    if self.received == signal.SIGINT and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.received = number


@dataclasses.dataclass(frozen=True)
class Program:
  """What the loop drives.

  Attributes:
    step: jitted (state, batch, key) -> (state, metrics), donating the state.
    evaluate: state -> metrics of the whole validation split, as floats.
    save: (step, state, evaluations, is the run finished?) -> None, asynchronous.
    steps: train up to this step.
    key: base key; the step folds its number in.
    learning_rate: step -> float.
    tokens_per_step, flops_per_step, peak_flops: for tokens/s and MFU (peak over all devices; 0 = unknown).
    save_every: steps between saves; 0 = only at the end.
    metric, mode: what early stopping watches.
  """

  step: Callable[..., tuple[train.State, train.Metrics]]
  evaluate: Callable[[train.State], dict[str, float]]
  save: Callable[[int, train.State, list, bool], None]
  steps: int
  key: jax.Array
  learning_rate: Callable[[int], float]
  tokens_per_step: int
  flops_per_step: float
  peak_flops: float
  save_every: int
  metric: str
  mode: str


def fit(program: Program, c: Config, state: train.State, batches: Iterator[Any], start: int, evaluations: list,
        logs: logs_lib.Logs, signals: Signals) -> tuple[train.State, list]:
  """Trains from step `start` to the end, or until early stopping.

  Args:
    evaluations: [[step, {metric: value}], ...] of earlier evaluations, when resuming.

  Returns:
    The final state and all evaluations; the last is at the last step.

  Raises:
    Diverged: too many consecutive non-finite steps. Preempted, Interrupted: after saving.
  """
  report = _Report(program, c, start, logs)
  for n in range(start + 1, program.steps + 1):
    state, metrics = program.step(state, next(batches), program.key)
    if (n - 1) % c.log_every == 0:
      report.flush()  # of the steps before this one, on which the device is busy now
    report.add(n, metrics)
    last = n == program.steps
    best = False
    if last or (c.eval_every and n % c.eval_every == 0):
      report.flush()
      with report.paused():
        values = program.evaluate(state)
      logs.row(n, values, ('val_loss', 'val_bits_per_byte'))
      evaluations = [*evaluations, [n, values]]
      watched = [v[program.metric] for _, v in evaluations]
      best = stale(watched, 0.0, program.mode) == 0
      if c.patience and stale(watched, c.min_delta, program.mode) >= c.patience and not last:
        last = True
        logs.say(f'stopped early at step {n}: no better {program.metric} in {c.patience} evaluations')
    if last or best or signals.received or (program.save_every and n % program.save_every == 0):
      report.flush()  # rows come before the save that covers them
      with report.paused():
        program.save(n, state, evaluations, last)
    if last:
      break
    if signals.received:
      _leave(signals.received, n)
  return state, evaluations


def _leave(number, step):
  if number == signal.SIGTERM:
    raise Preempted(f'SIGTERM: step {step} is saved; start again to resume')
  raise Interrupted(f'interrupted: step {step} is saved; start again to resume')


class _Report:
  """Metrics that still wait on the device, and wall time spent training (evaluating and saving left out)."""

  def __init__(self, program, c, start, logs):
    self._program, self._c, self._logs = program, c, logs
    self._waiting = []
    self._reported = start
    self._skipped_in_a_row, self._skipped = 0, None
    self._begin = self._since = time.perf_counter()

  def add(self, n, metrics):
    self._waiting.append((n, metrics))

  @contextlib.contextmanager
  def paused(self):
    start = time.perf_counter()
    yield
    self._since += time.perf_counter() - start

  def flush(self):
    """Writes one row, of the newest waiting step; looks at each for non-finite ones."""
    if not self._waiting:
      return
    rows = jax.device_get(self._waiting)
    for n, metrics in rows:
      self._watch(n, float(metrics['skipped']))
    n, metrics = rows[-1]
    values = {k: float(v) for k, v in metrics.items()} | {'learning_rate': self._program.learning_rate(n - 1)}
    self._logs.row(n, values | self._rates(n), ('loss', 'tokens_per_s'))
    self._waiting = []

  def _watch(self, n, skipped):
    more = self._skipped is not None and skipped > self._skipped
    self._skipped_in_a_row = self._skipped_in_a_row + 1 if more else 0
    self._skipped = skipped
    if self._skipped_in_a_row >= self._c.max_skipped:
      raise Diverged(f'step {n}: loss or gradient was not finite {self._skipped_in_a_row} times in a row; nothing of it '
                     'reached the parameters; lower optim.lr or look at the data, then start again')

  def _rates(self, n):
    p, now = self._program, time.perf_counter()
    seconds, steps = max(now - self._since, 1e-9), n - self._reported
    self._since, self._reported = now, n
    rates = {'tokens': n * p.tokens_per_step, 'tokens_per_s': steps * p.tokens_per_step / seconds,
             'elapsed_s': now - self._begin}
    return rates | ({'mfu': steps * p.flops_per_step / seconds / p.peak_flops} if p.peak_flops else {})
