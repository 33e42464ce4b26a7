"""The host loop on its own: what it logs, when it evaluates, saves, stops; and that it never waits for the device."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from lm import checkpoint, loop, report, summary
from lm.errors import CheckpointError, ConfigError, Diverged, Interrupted, Preempted

DEVICE_GET = jax.device_get


class Rows:
  """Stands for `Logs`."""

  def __init__(self):
    self.rows, self.said = [], []

  def row(self, step, values):
    self.rows.append({'step': step} | values)

  def amend(self, step, values):
    if self.rows and self.rows[-1]['step'] == step:
      self.rows[-1] |= values
    else:
      self.row(step, values)

  def say(self, text):
    self.said.append(text)


class Clock:
  """Stands for `time`: only what the world below does takes time."""

  def __init__(self):
    self.now = 100.0

  def perf_counter(self):
    return self.now


class Number(np.float32):
  """A metric on a device."""

  ready = True

  def is_ready(self):
    return self.ready


class World:
  """A program whose state counts its steps; loss of step n is 1 / n, `bad` steps are skipped.

  A call of the step returns at once (the first compiles for 50 s); the device then takes 2 s for each step, an
  evaluation 1,000 s, a save 300 s. `waits_for_steps`: of a device that takes those 2 s before the call returns.
  """

  def __init__(self, steps=20, losses=(), mode='min', save_every=1000, bad=(), skipped=0, at=None, done=(),
               waits_for_steps=False):
    self.waits_for_steps = waits_for_steps
    self.losses, self.bad, self.at, self.clock, self.fetched = list(losses), set(bad), at or {}, Clock(), []
    self.saves, self.waits, self.polls, self.evaluated, self.dispatched, self.done = [], 0, 0, [], 0, dict(done)
    self.logs, self.signals, self.skipped = Rows(), loop.Signals(), skipped
    self.program = loop.Program(
        step=self.step, evaluate=self.evaluate, save=self.save, poll=self.poll, wait=self.wait, steps=steps, key=None,
        learning_rate=lambda updates: 1000.0 + updates, elapsed=lambda: self.clock.now,
        tokens=lambda n: 100 * n, tokens_per_step=100,
        flops_per_step=10.0, peak_flops=20.0, save_every=save_every, metric='val_loss', mode=mode)

  def step(self, state, batch, key):
    n = state.n + 1
    self.clock.now += 50.0 if not self.dispatched else 0.0
    self.done[n] = max(self.clock.now, self.done.get(n - 1, 0.0)) + 2.0
    self.dispatched = n
    self.at.get(n, lambda: None)()
    skipped, loss = state.skipped + (n in self.bad), Number(1 / n)
    if self.waits_for_steps:
      self.wait_for(n)
    loss.ready = self.waits_for_steps
    return (types.SimpleNamespace(n=n, skipped=skipped),
            {'loss': loss, 'skipped': np.float32(skipped), 'n': n})

  def wait_for(self, n):
    self.clock.now = max(self.clock.now, self.done[n])

  def evaluate(self, state):
    self.wait_for(state.n)
    self.clock.now += 1000.0
    self.evaluated.append(state.n)
    value = self.losses[len(self.evaluated) - 1] if self.losses else 1 / state.n
    return {'val_loss': value}

  def save(self, step, state, evaluations, finished):
    self.wait_for(step)
    self.clock.now += 300.0
    assert step == state.n
    assert not self.logs.rows or self.logs.rows[-1]['step'] == step, 'rows come before the save that covers them'
    self.saves.append((step, finished, [e[0] for e in evaluations]))

  def poll(self):
    self.polls += 1

  def wait(self):
    self.waits += 1

  def fit(self, start=0, evaluations=(), deferred=True, **fields):
    state = types.SimpleNamespace(n=start, skipped=self.skipped)
    c = loop.Config(**{'log_every': 10, 'eval_every': 0} | fields)
    with self.signals:
      with self.signals.deferred():
        return loop.fit(self.program, c, state, iter(range(10**6)), start, list(evaluations), self.logs, self.signals)

  def steps_logged(self):
    return [r['step'] for r in self.logs.rows]


def world(monkeypatch, **fields):
  w = World(**fields)
  monkeypatch.setattr(report, 'time', w.clock)

  def device_get(tree):
    w.fetched.append((max(n for n, _ in tree), w.dispatched))
    w.wait_for(w.fetched[-1][0])
    return DEVICE_GET(tree)
  monkeypatch.setattr(jax, 'device_get', device_get)
  return w


@pytest.mark.parametrize('values, min_delta, mode, want', [
    ([], 0, 'min', 0),
    ([3.0], 0, 'min', 0),
    ([3.0, 2.9, 2.8], 0, 'min', 0),
    ([3.0, 3.0, 3.0], 0, 'min', 2),  # ties do not count
    ([3.0, 2.0, 2.5, 2.1], 0, 'min', 2),
    ([3.0, 2.0, 2.5, 1.9], 0, 'min', 0),
    ([3.0, 2.95, 2.85], 0.1, 'min', 0),  # 2.85 betters 3.0, the last improvement, by enough
    ([3.0, 2.95, 2.91], 0.1, 'min', 2),
    ([0.5, 0.6, 0.55], 0, 'max', 1),
    ([0.5, 0.6, 0.7], 0, 'max', 0),
    ([0.5, 0.6, 0.6], 0, 'max', 1),
    ([float('nan'), float('nan')], 0, 'min', 2),
    ([float('nan'), 2.0], 0, 'min', 0),
    ([2.0, float('nan')], 0, 'min', 1),
    ([2.0, float('-inf'), 1.0], 0, 'max', 2),
    ([-1.0, -2.0], 0, 'min', 0),
])
def test_stale(values, min_delta, mode, want):
  assert loop.stale(values, min_delta, mode) == want


@pytest.mark.parametrize('field', [{'log_every': 0}, {'eval_every': -1}, {'patience': -1}, {'min_delta': -0.1},
                                   {'min_delta': float('nan')}, {'min_delta': float('inf')}, {'max_skipped': 0}])
def test_config_is_checked(field):
  with pytest.raises(ConfigError, match=f'loop.{next(iter(field))}'):
    loop.Config(**field)


def test_a_loss_that_improves_never_stops(monkeypatch):
  w = world(monkeypatch, steps=40, losses=[10 - i / 100 for i in range(20)])
  _, evaluations = w.fit(eval_every=2, patience=1)
  assert [e[0] for e in evaluations] == list(range(2, 41, 2))
  assert w.logs.said == []


@pytest.mark.parametrize('mode, losses, stop', [
    ('min', [3.0, 2.0, 2.1, 2.0, 1.0, 0.5], 8),  # 2.0 again is a tie
    ('max', [0.1, 0.2, 0.2, 0.1, 0.9, 0.9], 8),
    ('min', [3.0, 2.0, 2.1, 1.9, 2.0, 1.95], 12),
    ('min', [float('nan'), float('nan'), 1.0, 1.0, 1.0, 1.0], 4),
])
def test_stops_after_patience_without_improvement(monkeypatch, mode, losses, stop):
  w = world(monkeypatch, steps=100, losses=losses, mode=mode)
  state, evaluations = w.fit(eval_every=2, patience=2)
  assert state.n == stop == evaluations[-1][0] == w.steps_logged()[-1]
  assert w.saves[-1][:2] == (stop, True)
  assert f'stopped early at step {stop}' in w.logs.said[0]


def test_min_delta_counts_small_gains_as_none(monkeypatch):
  losses = [3.0, 2.99, 2.98, 2.97]
  w = world(monkeypatch, steps=100, losses=losses + [2.0] * 50)
  assert w.fit(eval_every=2, patience=3, min_delta=0.1)[0].n == 8
  assert [s[0] for s in w.saves] == [2, 4, 6, 8]  # each was the best, whatever min_delta


def test_patience_counts_evaluations_before_a_restart(monkeypatch):
  w = world(monkeypatch, steps=100, losses=[3.0])
  state, _ = w.fit(start=4, evaluations=[[2, {'val_loss': 2.0}], [4, {'val_loss': 2.5}]], eval_every=2, patience=2)
  assert state.n == 6


def test_the_last_step_is_evaluated_saved_and_no_early_stop(monkeypatch):
  w = world(monkeypatch, steps=5, losses=[1.0, 1.0, 1.0])
  _, evaluations = w.fit(eval_every=2, patience=2)
  assert [e[0] for e in evaluations] == [2, 4, 5]
  assert w.logs.said == []
  assert w.saves == [(2, False, [2]), (5, True, [2, 4, 5])]


def test_what_watches_sees_each_evaluated_state_while_the_clock_stands(monkeypatch):
  def run(watching_s):
    w, seen = world(monkeypatch, steps=7), []

    def watch(step, state):
      assert w.logs.rows[-1]['step'] == step == state.n
      seen.append(step)
      w.clock.now += watching_s
    w.program = dataclasses.replace(w.program, watch=watch)
    w.fit(eval_every=3, log_every=1)
    return seen, [row['tokens_per_s'] for row in w.logs.rows]
  assert run(500.0) == run(0.0)
  assert run(0.0)[0] == [3, 6, 7]


def test_saves_on_schedule_and_when_better(monkeypatch):
  w = world(monkeypatch, steps=12, losses=[3.0, 2.0, 2.5, 1.0], save_every=5)
  w.fit(eval_every=3)
  assert [s[0] for s in w.saves] == [3, 5, 6, 10, 12]


@pytest.mark.parametrize('losses, mode, saved', [
    ([3.0, 2.0, 2.5, 2.4], 'min', [3, 6, 12]), ([2.0, 2.0, 3.0, 3.0], 'min', [3, 12]),
    ([0.5, 0.5, 0.4, 0.6], 'max', [3, 12]), ([0.5, 0.4, 0.6, 0.6], 'max', [3, 9, 12])])
def test_the_best_is_the_step_that_the_summary_names(losses, mode, saved, monkeypatch):
  """Of equal ones the first; that of step 0, better than all, is in no checkpoint."""
  w = world(monkeypatch, steps=12, losses=losses, mode=mode)
  w.done[0] = 0.0
  w.losses.insert(0, 0.0 if mode == 'min' else 1.0)
  _, evaluations = w.fit(eval_every=3, eval_first=True)
  assert [s[0] for s in w.saves] == saved
  c = checkpoint.Config(metric='val_loss', mode=mode)
  assert summary.best(evaluations, c)['step'] in saved
  assert summary.best(evaluations, dataclasses.replace(c, keep_best=0)) is None


def test_one_row_a_step_and_one_every_log_every(monkeypatch):
  w = world(monkeypatch, steps=25)
  w.fit()
  assert w.steps_logged() == [10, 20, 25]
  assert w.logs.rows[0]['loss'] == pytest.approx(0.1)
  assert w.logs.rows[-1]['val_loss'] == 1 / 25
  assert 'val_loss' not in w.logs.rows[0]
  w = world(monkeypatch, steps=7, save_every=2)
  w.fit(log_every=1, eval_every=3)
  assert w.steps_logged() == [1, 2, 3, 4, 5, 6, 7]
  assert [r['step'] for r in w.logs.rows if 'val_loss' in r] == [3, 6, 7]


def test_rows_of_a_resumed_run_continue(monkeypatch):
  w = world(monkeypatch, steps=25)
  w.fit(start=13)
  assert w.steps_logged() == [20, 25]
  assert w.logs.rows[0]['tokens'] == 2000
  assert w.logs.rows[0]['tokens_per_s'] == 50.0


def test_rates_leave_out_compiling_evaluating_and_saving(monkeypatch):
  w = world(monkeypatch, steps=40, save_every=8)
  w.fit(eval_every=6, log_every=5)
  assert w.steps_logged() == [5, 6, 8, 10, 12, 15, 16, 18, 20, 24, 25, 30, 32, 35, 36, 40]
  assert {r['tokens_per_s'] for r in w.logs.rows} == {50.0}
  assert {r['mfu'] for r in w.logs.rows} == {10 / 2 / 20}
  assert w.logs.rows[-1]['elapsed_s'] == 100 + 50 + 80 + 6 * 1000 + 9 * 300  # the last row is before the last two


@pytest.mark.parametrize('start', [0, 5, 7])
def test_rates_of_a_device_that_each_call_waits_for(start, monkeypatch):
  """As a CPU is: a step is over before the rows of those before it are written. The first, with compiling, is none."""
  for log_every in (1, 3, 50):
    w = world(monkeypatch, steps=20, save_every=8, waits_for_steps=True)
    w.fit(start, [[start, {'val_loss': 1.0}]] if start else [], eval_every=6, log_every=log_every)
    rows = w.logs.rows
    assert {r['tokens_per_s'] for r in rows if r['step'] > start + 1} == {50.0}
    assert {r['mfu'] for r in rows if r['step'] > start + 1} == {10 / 2 / 20}
    assert not any('tokens_per_s' in r for r in rows if r['step'] == start + 1)


def test_the_loop_never_waits_for_a_step_it_just_started(monkeypatch):
  """Metrics are fetched once in log_every steps, and then while the device is busy with a later step."""
  w = world(monkeypatch, steps=1000)
  w.fit()
  assert w.fetched == [(n, n + 1) for n in range(10, 1000, 10)] + [(1000, 1000)]


def test_no_leaf_is_read_before_its_row(monkeypatch):
  """As above, for any way of reading: a metric says when it was looked at."""
  looked = []

  class Metric:
    def __init__(self, n):
      self.n = n

    def __array__(self, dtype=None, copy=None):
      looked.append(w.dispatched)
      return np.zeros((), np.float32)

    def __float__(self):
      return float(np.asarray(self))
    __int__ = __float__

  w = world(monkeypatch, steps=50)
  step = w.step
  w.program = loop.dataclasses.replace(w.program, step=lambda *a: (lambda s, m: (s, {'loss': Metric(s.n),
                                                                                    'skipped': 0.0}))(*step(*a)))
  w.fit()
  assert set(looked) == {11, 21, 31, 41, 50}


def test_learning_rate_counts_updates_not_steps(monkeypatch):
  """The optimizer's count stands still in a skipped step: logged is schedule(updates made before the step)."""
  w = world(monkeypatch, steps=8, bad={3, 4, 6})
  w.fit(log_every=1)
  assert [r['learning_rate'] - 1000 for r in w.logs.rows] == [0, 1, 2, 2, 2, 3, 3, 4]
  w = world(monkeypatch, steps=12, bad={3, 4, 6})
  w.fit(log_every=4)
  assert [r['learning_rate'] - 1000 for r in w.logs.rows] == [2, 4, 8]
  w = world(monkeypatch, steps=12, skipped=5)
  w.fit(start=10, log_every=1)
  assert [r['learning_rate'] - 1000 for r in w.logs.rows] == [5, 6]


@pytest.mark.parametrize('log_every', [1, 2, 3, 7, 50])
@pytest.mark.parametrize('bad, where', [
    (range(4, 100), 6), ({4, 5, 7, 8, 10, 11}, None), ({4, 5, 7, 8, 10, 11, 12}, 12), ({1, 2, 3}, 3),
    (range(18, 21), 20), ({2, 3, 4, 5, 6, 7}, 4)])
def test_gives_up_after_consecutive_bad_steps(monkeypatch, bad, where, log_every):
  w = world(monkeypatch, steps=20, bad=bad, save_every=5)
  if where is None:
    w.fit(max_skipped=3, log_every=log_every)
    return
  with pytest.raises(Diverged, match=f'step {where}: loss or gradient was not finite .* 3 times in a row') as error:
    w.fit(max_skipped=3, log_every=log_every)
  assert error.value.code == 5
  assert all(step < where for step, *_ in w.saves)
  assert w.steps_logged()[-1] >= where  # the bad steps are on record
  assert w.evaluated == [] or max(w.evaluated) < where


def test_the_count_goes_on_from_what_was_skipped_before_a_restart(monkeypatch):
  w = world(monkeypatch, steps=20, bad={11, 12}, skipped=7)
  with pytest.raises(Diverged, match='step 12'):
    w.fit(start=10, max_skipped=2, log_every=1)
  w = world(monkeypatch, steps=20, skipped=7)
  w.fit(start=10, max_skipped=1)


@pytest.mark.parametrize('updates, ends', [(1, True), (4, False)])
def test_a_step_of_several_updates_is_bad_where_all_were_skipped(monkeypatch, updates, ends):
  w = world(monkeypatch, steps=20, bad={4, 5, 6})  # each skips one update
  step = w.program.step

  def several(*args):
    state, metrics = step(*args)
    return state, metrics | {'updates': updates}
  w.program = dataclasses.replace(w.program, step=several)
  with pytest.raises(Diverged, match='step 6') if ends else contextlib.nullcontext():
    w.fit(max_skipped=3, log_every=1)


@pytest.mark.parametrize('number, kind, code', [(signal.SIGTERM, Preempted, 75), (signal.SIGINT, Interrupted, 130)])
@pytest.mark.parametrize('step', [1, 7])
def test_a_signal_saves_the_step_under_way(monkeypatch, number, kind, code, step):
  """Step 1 is the call that compiles."""
  before = signal.getsignal(number)
  w = world(monkeypatch, steps=20, at={step: lambda: os.kill(os.getpid(), number)})
  with pytest.raises(kind, match=f'step {step} is saved; start again to resume') as error:
    w.fit()
  assert error.value.code == code
  assert w.saves == [(step, False, [])]
  assert w.waits == 1, 'it may not claim that the step is saved before it is'
  assert w.steps_logged() == [step]
  assert signal.getsignal(number) is before


def test_ctrl_c_after_sigterm_leaves_the_exit_status_to_the_first(monkeypatch):
  def both():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
  w = world(monkeypatch, steps=20, at={7: both})
  with pytest.raises(Preempted, match='SIGTERM: step 7 is saved'):
    w.fit()


@pytest.mark.parametrize('step, evaluated', [(4, []), (6, [4])])
def test_a_signal_where_an_evaluation_is_due_leaves_it_out(monkeypatch, step, evaluated):
  """Who ends a job gives it seconds; an evaluation may take minutes. 6 is the last step."""
  w = world(monkeypatch, steps=6, at={step: lambda: os.kill(os.getpid(), signal.SIGTERM)})
  with pytest.raises(Preempted, match=f'step {step} is saved'):
    w.fit(eval_every=4)
  assert (w.saves[-1], w.steps_logged()[-1]) == ((step, False, evaluated), step)
  assert w.evaluated == evaluated


@pytest.mark.parametrize('number, kind', [(signal.SIGTERM, Preempted), (signal.SIGINT, Interrupted)])
def test_a_signal_breaks_an_evaluation_off(monkeypatch, number, kind):
  w = world(monkeypatch, steps=20)

  def evaluate(state):
    os.kill(os.getpid(), number)
    pytest.fail('went on')
  w.program = dataclasses.replace(w.program, evaluate=evaluate)
  with pytest.raises(kind, match='step 4 is saved; start again to resume'):
    w.fit(eval_every=4)
  assert (w.saves, w.waits, w.logs.rows[-1]['loss'], len(w.logs.rows)) == ([(4, False, [])], 1, 0.25, 1)
  with pytest.raises(kind, match='nothing is lost; start again'):  # that before the first step
    w.fit(eval_first=True)


def test_an_evaluation_that_the_run_was_stopped_in_is_made_up_for(monkeypatch):
  w = world(monkeypatch, steps=20, done={8: 0.0})
  w.logs.row(8, {'loss': 0.125})
  _, evaluations = w.fit(start=8, evaluations=[[4, {'val_loss': 0.25}]], eval_every=4)
  assert [n for n, _ in evaluations] == [4, 8, 12, 16, 20]
  assert w.logs.rows[0] == {'step': 8, 'loss': 0.125, 'val_loss': 0.125}
  assert w.saves[0] == (8, False, [4, 8])
  w = world(monkeypatch, steps=20, done={20: 0.0})
  assert [n for n, _ in w.fit(start=20, evaluations=[[16, {'val_loss': 0.1}]], eval_every=8)[1]] == [16, 20]
  assert w.saves == [(20, True, [16, 20])] and not w.dispatched
  w = world(monkeypatch, steps=20, losses=[0.3], done={8: 0.0})
  w.fit(start=8, evaluations=[[4, {'val_loss': 0.2}]], eval_every=4, patience=1)
  assert w.saves == [(8, True, [4, 8])] and not w.dispatched
  assert w.logs.said == ['stopped early at step 8: no better val_loss in 1 evaluations']


@pytest.mark.parametrize('number, kind', [(signal.SIGTERM, Preempted), (signal.SIGINT, Interrupted)])
def test_a_signal_before_training_acts_at_once(number, kind):
  before = signal.getsignal(number)
  with pytest.raises(kind, match='nothing is lost; start again'):
    with loop.Signals():
      try:
        os.kill(os.getpid(), number)
        pytest.fail('went on')
      except Exception:  # noqa: BLE001
        pytest.fail('taken for a fault of whatever was under way')
  assert signal.getsignal(number) is before


def test_an_error_of_its_own_passes_signals_unchanged():
  with pytest.raises(ZeroDivisionError), loop.Signals():
    1 / 0  # noqa: B018
  with pytest.raises(KeyboardInterrupt), loop.Signals():
    raise KeyboardInterrupt


def test_second_interrupt_ends_the_process_at_once():
  code = ('import os, signal, time\nfrom lm import loop\nwith loop.Signals() as s, s.deferred():\n'
          '  os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n'
          '  os.kill(os.getpid(), signal.SIGINT); print("still here", flush=True)\n'
          '  os.kill(os.getpid(), signal.SIGINT); time.sleep(60)')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=False)
  assert (done.returncode, done.stdout) == (130, 'still here\n')
  assert done.stderr == ('error: interrupted twice: stopped without saving; start again to resume from the last save\n')


def test_a_later_sigterm_ends_the_process_at_once():
  code = ('import os, signal, time\nfrom lm import loop\nwith loop.Signals() as s, s.deferred():\n'
          '  os.kill(os.getpid(), signal.SIGTERM); time.sleep(1.1); print("still here", flush=True)\n'
          '  os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=False)
  assert (done.returncode, done.stdout) == (75, 'still here\n')
  assert done.stderr == 'error: SIGTERM twice: stopped without saving; start again to resume from the last save\n'


def test_a_failed_save_is_noticed_at_the_next_step(monkeypatch):
  w = world(monkeypatch, steps=100, save_every=10)

  def poll():
    if w.dispatched == 12:
      raise CheckpointError('disk')
  w.program = loop.dataclasses.replace(w.program, poll=poll)
  with pytest.raises(CheckpointError):
    w.fit()
  assert w.dispatched == 12


def test_polls_every_step(monkeypatch):
  w = world(monkeypatch, steps=30)
  w.fit()
  assert w.polls == 30
