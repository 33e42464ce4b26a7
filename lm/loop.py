"""The host loop around a jitted step: log, evaluate, save, stop. It never waits for the device inside a step.

Nothing here knows a model, a loss or a checkpoint: it drives the functions of a `Program` and writes through `Logs`.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import math
import os
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

from lm import host, hosts, logs as logs_lib, seal, train
from lm.errors import ConfigError, Error, Interrupted, Preempted
from lm.report import Report

Evaluations = list[list]  # [[step, {metric: value}], ...], ascending; plain JSON


@dataclasses.dataclass(frozen=True)
class Config:
  """When to look up from training.

  Attributes:
    log_every: steps between rows of metrics.jsonl.
    eval_every: steps between evaluations; 0 = only at the end.
    eval_first: also before the first step.
    eval_batch: rows of an evaluation's batch; 0 = data.batch. It needs no activations, so that more may fit.
    patience: evaluations without improvement before stopping early; 0 = never.
    min_delta: an improvement betters the best value so far by more than this.
    max_skipped: consecutive steps that change nothing, as they are not finite or spikes, or that had no targets, before
      giving up; looked at whenever a row is written, also if better steps came since: `log_every` changes nothing.
  """

  log_every: int = 10
  eval_every: int = 250
  eval_first: bool = False
  eval_batch: int = 0
  patience: int = 0
  min_delta: float = 0.0
  max_skipped: int = 5

  def __post_init__(self):
    for name, least in (('log_every', 1), ('eval_every', 0), ('eval_batch', 0), ('patience', 0), ('min_delta', 0),
                        ('max_skipped', 1)):
      if not least <= getattr(self, name) < math.inf:
        raise ConfigError(f'loop.{name}={getattr(self, name)}; expected a finite number, at least {least}')
    if self.patience and not self.eval_every:
      raise ConfigError(f'loop.patience={self.patience} with loop.eval_every=0: one evaluation, at the end, stops '
                        'nothing; set loop.eval_every')


def stale(values: list[float], min_delta: float, mode: str) -> int:
  """How many values came since the last improvement: one better than the best by more than `min_delta`.

  The best is the value of the last improvement. `mode` is 'min' or 'max'. Neither a tie nor NaN improves.
  """
  best, since = math.inf, 0
  for value in (v if mode == 'min' else -v for v in values):
    best, since = (value, 0) if best - value > min_delta else (best, since + 1)
  return since


class Signals:
  """Turns SIGTERM and Ctrl-C into Preempted and Interrupted; a context manager for the main thread.

  At once where nothing is trained yet. Inside `deferred` they are remembered until the loop has saved its step; there a
  second one ends the process on the spot, which costs no sealed checkpoint; of SIGTERM one that is a second later, as
  `timeout` sends two at once. In a job of several processes SIGTERM to
  one of them is a notice to all (`jax.distributed` handles it), Ctrl-C there is one too, and they agree on the step.
  """

  def __init__(self):
    self.received: int | None = None  # the first: who preempts a job reads its exit status
    self._deferred, self._first = False, {}  # {signal: when it came first}
    self._old: dict[int, Any] = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,):
        self._old[number] = signal.signal(number, self._on)
    return self

  def __exit__(self, kind, error, trace):
    for number, handler in self._old.items():
      signal.signal(number, handler)
    if kind is KeyboardInterrupt and self.received is not None:
      raise self.error('no step was under way, and nothing is lost') from error

  def deferred(self) -> contextlib.AbstractContextManager[None]:
    return self._set(True)

  def at_once(self) -> contextlib.AbstractContextManager[None]:
    """Inside `deferred`, for what can be done again: a signal raises KeyboardInterrupt and need not wait for its end.

    Not in a job of several processes, as they must agree on where they stop.
    """
    return self._set(self._deferred and jax.process_count() > 1)

  @contextlib.contextmanager
  def _set(self, deferred):
    before, self._deferred = self._deferred, deferred
    try:
      yield
    finally:
      self._deferred = before

  def stop_at(self, step: int) -> bool:
    """Whether to save this step and leave; to be asked at every step, by every process."""
    if jax.process_count() == 1:
      return self.received is not None
    stop = multihost_utils.reached_preemption_sync_point(step)
    if stop and self.received is None:
      self.received = signal.SIGTERM
    return stop

  def error(self, what: str) -> Error:
    kind, name = (Preempted, 'SIGTERM') if self.received == signal.SIGTERM else (Interrupted, 'interrupted')
    return kind(f'{name}: {what}; start again to resume')

  def _on(self, number, frame):
    del frame
    again = number in self._first and (number == signal.SIGINT or time.monotonic() - self._first[number] > 1)
    self._first.setdefault(number, time.monotonic())
    if self._deferred and again:
      kind, name = (Interrupted, 'interrupted') if number == signal.SIGINT else (Preempted, 'SIGTERM')
      hosts.fail(kind.code, f'{name} twice: stopped without saving; start again to resume from the last save')
    self.received = self.received or number
    if not self._deferred:
      raise KeyboardInterrupt  # no `except Exception` on the way may take it for a fault of its own
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)


@dataclasses.dataclass(frozen=True)
class Program:
  """What the loop drives.

  Attributes:
    step: jitted (state, batch, key) -> (state, metrics), donating the state.
    evaluate: state -> metrics of the whole validation split, as floats.
    save: (step, state, evaluations, is the run finished?) -> None, asynchronous.
    poll: raises the error of a save that failed in the background, and never waits; wait: returns when all is saved.
    steps: train up to this step.
    key: base key; the step folds its number in.
    learning_rate: updates made before -> float; a step's own metric of this name goes before it.
    elapsed: seconds that the run has taken so far, over all its restarts.
    tokens: step -> those that the run has computed on up to it.
    tokens_per_step, flops_per_step, peak_flops: for tokens/s and MFU (peak over all devices; 0 = unknown).
    save_every: steps between saves. The end, and an evaluation better than all before, are saved too.
    metric, mode: what early stopping watches, 'min' or 'max'.
    watch: (step, state) -> None, after each evaluation.
  """

  step: Callable[..., tuple[train.State, train.Metrics]]
  evaluate: Callable[[train.State], dict[str, float]]
  save: Callable[[int, train.State, Evaluations, bool], None]
  poll: Callable[[], None]
  wait: Callable[[], None]
  steps: int
  key: jax.Array
  learning_rate: Callable[[int], float]
  elapsed: Callable[[], float]
  tokens: Callable[[int], int]
  tokens_per_step: int
  flops_per_step: float
  peak_flops: float
  save_every: int
  metric: str
  mode: str
  watch: Callable[[int, train.State], None] = lambda step, state: None


def fit(program: Program, c: Config, state: train.State, batches: Iterator[Any], start: int, evaluations: Evaluations,
        logs: logs_lib.Logs, signals: Signals) -> tuple[train.State, Evaluations]:
  """Trains from step `start` to the end, or until early stopping.

  Args:
    evaluations: of the steps up to `start`, when resuming. If that of `start` is missing, it is made up for.
    signals: deferred; whether one came is looked at after every step. An evaluation does not delay the save: it is
      left out, or broken off in a job of one process.

  Returns:
    The final state and all evaluations; the last is at the last step.

  Raises:
    Diverged: too many consecutive non-finite steps. Preempted, Interrupted: after saving.
  """
  due = lambda n: n == program.steps or bool(c.eval_every and n % c.eval_every == 0)
  if (due(start) if start else c.eval_first) and (not evaluations or evaluations[-1][0] != start):
    with signals.at_once():
      evaluations = [*evaluations, [start, program.evaluate(state)]]
    logs.amend(start, evaluations[-1][1])
    _, last = _follow(program, c, evaluations, state, logs)
    if start:
      program.save(start, state, evaluations, last)  # with what it was saved without
    if start and last:
      return state, evaluations
  report = Report(program, c, start, int(state.skipped), logs)
  for n in range(start + 1, program.steps + 1):
    state, metrics = program.step(state, next(batches), program.key)
    program.poll()
    if n == start + 1:
      host.release_freed_memory()  # what loading and compiling took
    if (n - 1) % c.log_every == 0:
      report.flush()  # of the steps before this one, on which the device is busy now
    report.add(n, metrics)
    last, best, stopping = False, False, signals.stop_at(n)
    found = report.flush(functools.partial(_evaluate, program, state, signals)) if due(n) and not stopping else None
    if found is not None:
      evaluations = [*evaluations, [n, found]]
      with report.paused():
        best, last = _follow(program, c, evaluations, state, logs)
        host.release_freed_memory()
    stopping = stopping or (due(n) and found is None)
    if last or best or stopping or n % program.save_every == 0:
      report.flush()  # rows come before the save that covers them
      with report.paused():
        program.save(n, state, evaluations, last)
        host.release_freed_memory()
    if last:
      break
    if stopping:
      program.wait()
      raise signals.error(f'step {n} is saved')
  return state, evaluations


def _evaluate(program, state, signals):
  """Its metrics; None where a signal broke it off."""
  try:
    with signals.at_once():
      return program.evaluate(state)
  except KeyboardInterrupt:
    if signals.received is None:
      raise
    return None


def _follow(program, c, evaluations, state, logs):
  """What follows an evaluation: (is it the best so far? does the run end here, at its last step or early?)"""
  n = evaluations[-1][0]
  program.watch(n, state)
  watched = [values.get(program.metric, math.nan) for _, values in evaluations]
  worn_out = bool(c.patience and n) and stale(watched, c.min_delta, program.mode) >= c.patience
  if worn_out and n != program.steps:
    logs.say(f'stopped early at step {n}: no better {program.metric} in {c.patience} evaluations')
  kept = {step: value for (step, _), value in zip(evaluations, watched, strict=True) if step}
  return seal.ranked(kept, program.mode)[:1] == [n], n == program.steps or worn_out
