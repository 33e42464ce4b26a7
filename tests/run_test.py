"""A whole run in its workdir: what it writes, resumes exactly, refuses, and leaves behind when it fails."""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm import checkpoint, config, logs, look, params, run, start
from lm.data import loader
from lm.errors import CheckpointError, ConfigError, DataError, Diverged, Interrupted, Preempted
from lm.text import tokenizer

ROOT = pathlib.Path(__file__).parent.parent
TASK = tiny.task()
EXACT = ('loss', 'accuracy', 'objective', 'grad_norm', 'skipped', 'learning_rate', 'val_loss', 'val_accuracy',
         'val_bits_per_byte', 'tokens')


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  tiny.share_compiled(monkeypatch)


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return tiny.write_text(tmp_path_factory.mktemp('corpus') / 'text.txt')


@pytest.fixture(scope='module')
def straight(corpus, tmp_path_factory):
  """(config, workdir, summary) of an uninterrupted run: what others are compared with. Not to be changed."""
  c, workdir = tiny.make_config(corpus), tmp_path_factory.mktemp('straight') / 'run'
  with pytest.MonkeyPatch.context() as m:
    tiny.share_compiled(m)
    return c, workdir, run.run(c, TASK, workdir)


@pytest.fixture
def finished(straight, tmp_path):
  """A copy of it, for a test that changes it."""
  shutil.copytree(straight[1], tmp_path / 'run')
  return straight[0], tmp_path / 'run'


def exact(workdir):
  """What must be equal bit for bit: {step: {metric: hex}}, and the number of rows."""
  rows = logs.read(workdir)
  assert len({r['step'] for r in rows}) == len(rows)
  return {r['step']: {k: float.hex(float(r[k])) for k in EXACT if k in r} for r in rows}


def test_summary_has_what_a_reader_compares(straight, corpus):
  c, workdir, summary = straight
  on_disk = json.loads((workdir / 'summary.json').read_text())
  assert on_disk == summary
  assert summary.keys() == {'val_loss', 'val_accuracy', 'val_bits_per_byte', 'tokens', 'steps', 'wall_s', 'mfu',
                            'tokens_per_s', 'peak_bytes', 'parameters', 'flops', 'best', 'planned'}
  assert summary['steps'] == 12
  assert summary['tokens'] == 12 * 8 * 16
  assert summary['parameters'] == 2 * 258 * 8
  assert summary['planned'] == {'steps': 12, 'tokens': summary['tokens'], 'flops': summary['flops']}
  assert summary['flops'] == summary['tokens'] * TASK.flops.total
  assert summary['peak_bytes'] > 1e6
  rates = [r['tokens_per_s'] for r in logs.read(workdir)[1:]]  # a first step that was done at once has none
  assert min(rates) < summary['tokens_per_s'] < max(rates)
  assert summary['mfu'] == pytest.approx(summary['tokens_per_s'] * TASK.flops.total / 1e9)
  assert summary['wall_s'] > logs.read(workdir)[-1]['elapsed_s'] > 0


def test_workdir_holds_everything(straight):
  c, workdir, _ = straight
  assert {p.name for p in workdir.iterdir()} == {
      'config.json', 'metrics.jsonl', 'tensorboard', 'checkpoints', 'curves.png', 'summary.json', 'tokenizer', 'data',
      'lock'}
  assert config.from_json(run.Config, json.loads((workdir / 'config.json').read_text())['config']) == c
  assert tokenizer.load(workdir / 'tokenizer').kind == 'byte'
  assert checkpoint.steps(workdir / 'checkpoints') == [10, 12]
  rows = logs.read(workdir)
  assert [r['step'] for r in rows] == list(range(1, 13))
  assert [r['step'] for r in rows if 'val_loss' in r] == [4, 8, 12]
  assert rows[1].keys() >= {'loss', 'accuracy', 'grad_norm', 'learning_rate', 'tokens_per_s', 'mfu', 'elapsed_s',
                            'tokens'}
  assert rows[-1]['loss'] < rows[0]['loss'] - 0.5  # it learns


def test_published_is_copied(straight, tmp_path, corpus):
  c = tiny.make_config(corpus, published=1.25, optim__steps=2)
  assert run.run(c, TASK, tmp_path)['published'] == 1.25


def test_validation_is_the_whole_split_and_bits_are_per_byte_of_text(straight, corpus):
  """Recomputed with numpy from the final parameters and the text itself."""
  c, workdir, summary = straight
  state = {'params': {'embed': {'tokens': jax.ShapeDtypeStruct((258, 8), jnp.float32)},
                      'unembed': jax.ShapeDtypeStruct((258, 8), jnp.float32)}}
  p = checkpoint.restore_params(workdir / 'checkpoints', state['params'], log=lambda line: None)
  text = corpus.read_text()
  held_out = text[int(len(text) * 0.9):]
  ids = tokenizer.byte().document(held_out)
  logits = np.asarray(p['embed']['tokens'])[ids[:-1]] @ np.asarray(p['unembed']).T
  logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nll = -logprobs[np.arange(len(ids) - 1), ids[1:]]
  assert summary['val_loss'] == pytest.approx(nll.mean(), rel=1e-5)
  assert summary['val_bits_per_byte'] == pytest.approx(nll.sum() / math.log(2) / len(held_out.encode()), rel=1e-5)
  assert summary['val_accuracy'] == pytest.approx((logits.argmax(-1) == ids[1:]).mean(), abs=1e-6)


def test_rows_of_an_evaluation_are_its_own_number(straight, tmp_path, corpus, monkeypatch):
  c, workdir, _ = straight
  seen, batches = [], loader.eval_batches
  monkeypatch.setattr(loader, 'eval_batches', lambda data, split, batch, *rest: (
      seen.append(batch), batches(data, split, batch, *rest))[1])
  run.run(config.replace(c, loop__eval_batch=24), TASK, tmp_path)
  assert set(seen) == {24}
  mine, theirs = (logs.read(folder)[-1] for folder in (tmp_path, workdir))
  assert mine['loss'] == theirs['loss']
  assert mine['val_loss'] == pytest.approx(theirs['val_loss'], rel=1e-6)


@pytest.mark.parametrize('number, kind', [(signal.SIGTERM, Preempted), (signal.SIGINT, Interrupted)])
def test_stopped_and_started_again_equals_the_straight_run(straight, tmp_path, monkeypatch, capsys, number, kind):
  """At steps that neither an evaluation nor the schedule would have saved, the first (compiling) one among them."""
  c, want, _ = straight
  for step in (1, 6, 11):
    with tiny.batches_through(monkeypatch, tiny.signal_at(step, number)), pytest.raises(kind, match=f'step {step} is'):
      run.run(c, TASK, tmp_path)
    assert checkpoint.steps(tmp_path / 'checkpoints')[-1] == step
    assert not (tmp_path / 'summary.json').exists()
  summary = run.run(c, TASK, tmp_path)
  assert f'resumed from step 11 in {tmp_path}' in capsys.readouterr().out
  assert exact(tmp_path) == exact(want)
  assert tiny.state_sha(c, TASK, tmp_path) == tiny.state_sha(c, TASK, want)
  assert summary['best'] == straight[2]['best']


@pytest.mark.parametrize('number, kind', [(signal.SIGTERM, Preempted), (signal.SIGINT, Interrupted)])
def test_stopped_in_an_evaluation_and_started_again_is_the_straight_run(straight, tmp_path, monkeypatch, number, kind):
  """In those of steps 8 and 12, the last; and in that which makes up for it."""
  c, want, summary = straight
  batches, left = loader.eval_batches, []

  def stopping(*args):
    last = left and not left.pop()
    for n, batch in enumerate(batches(*args)):
      if last and n == 1:
        os.kill(os.getpid(), number)
      yield batch
  monkeypatch.setattr(loader, 'eval_batches', stopping)
  for evaluation, said in ((2, 'step 8 is saved'), (1, 'no step was under way'), (2, 'step 12 is saved')):
    left[:] = range(1 + evaluation)  # before, the check looks at its first batch
    with pytest.raises(kind, match=said):
      run.run(c, TASK, tmp_path)
    assert checkpoint.steps(tmp_path / 'checkpoints')[-1] == (12 if '12' in said else 8)
    assert 'val_loss' not in logs.read(tmp_path)[-1]
  left.clear()
  assert run.run(c, TASK, tmp_path)['best'] == summary['best']
  assert exact(tmp_path) == exact(want)
  assert tiny.state_sha(c, TASK, tmp_path) == tiny.state_sha(c, TASK, want)


def test_rows_after_the_restored_step_are_written_again(straight, tmp_path, monkeypatch):
  """A kill leaves rows that no checkpoint covers."""
  c, want, _ = straight

  def fault(n, batch):
    if n == 9:
      raise ZeroDivisionError
    return batch
  with tiny.batches_through(monkeypatch, fault), pytest.raises(ZeroDivisionError):
    run.run(c, TASK, tmp_path)
  with open(tmp_path / 'metrics.jsonl', 'a') as f:
    f.write('{"step": 9, "loss": 99.0}\n{"step": 10, "lo')
  assert checkpoint.steps(tmp_path / 'checkpoints')[-1] == 8
  run.run(c, TASK, tmp_path)
  assert exact(tmp_path) == exact(want)


def test_a_damaged_checkpoint_is_passed_over(straight, finished, capsys):
  c, workdir = finished
  big = max((workdir / 'checkpoints' / '12').rglob('*'), key=lambda p: p.stat().st_size * p.is_file())
  data = bytearray(big.read_bytes())
  data[len(data) // 2] ^= 1
  big.write_bytes(data)
  run.run(c, TASK, workdir)
  out = capsys.readouterr().out
  assert 'rejected step 12' in out and 'using step 10' in out
  assert exact(workdir) == exact(straight[1])
  assert tiny.state_sha(c, TASK, workdir) == tiny.state_sha(c, TASK, straight[1])


def test_a_finished_run_is_left_alone(straight, finished, monkeypatch, capsys):
  c, workdir = finished
  tiny.stop_before_the_step(monkeypatch)
  before = (workdir / 'metrics.jsonl').read_bytes(), (workdir / 'config.json').read_bytes()
  summary = run.run(c, TASK, workdir)
  assert f'already complete: step 12 of 12 in {workdir}' in capsys.readouterr().out
  assert summary.keys() == straight[2].keys()
  assert {k: summary[k] for k in summary if k not in ('wall_s', 'peak_bytes')} == {
      k: straight[2][k] for k in summary if k not in ('wall_s', 'peak_bytes')}
  assert summary['wall_s'] == pytest.approx(straight[2]['wall_s'], abs=5)
  assert ((workdir / 'metrics.jsonl').read_bytes(), (workdir / 'config.json').read_bytes()) == before


@pytest.mark.draws
def test_killed_between_the_last_save_and_the_summary(straight, finished, monkeypatch):
  c, workdir = finished
  (workdir / 'summary.json').unlink()
  (workdir / 'curves.png').unlink()
  tiny.stop_before_the_step(monkeypatch)
  run.run(c, TASK, workdir)
  assert json.loads((workdir / 'summary.json').read_text())['val_loss'] == straight[2]['val_loss']
  assert (workdir / 'curves.png').stat().st_size > 1000


def test_another_config_is_refused_and_nothing_changes(finished, monkeypatch):
  c, workdir = finished
  tiny.stop_before_the_step(monkeypatch)
  before = (workdir / 'config.json').read_bytes()
  changed = config.replace(c, optim__lr=0.2, data__batch=16, seed=3)
  with pytest.raises(ConfigError, match=r'--workdir.*data.batch: 8 there, 16 now; optim.lr: 0.1 there, 0.2 now; '
                                        r'seed: 0 there, 3 now; .*--resume_with_changes') as error:
    run.run(changed, TASK, workdir)
  assert error.value.code == 2
  assert (workdir / 'config.json').read_bytes() == before


def test_a_workdir_older_than_a_field_resumes_with_its_default(finished, monkeypatch):
  c, workdir = finished
  tiny.stop_before_the_step(monkeypatch)
  path, old = workdir / 'config.json', json.loads((workdir / 'config.json').read_text())
  del old['config']['checkpoint']['keep_every']
  path.write_text(json.dumps(old))
  assert run.run(c, TASK, workdir)['steps'] == c.optim.steps  # complete already
  path.write_text(json.dumps(old))
  with pytest.raises(ConfigError, match='checkpoint.keep_every: 0 there, 400 now'):
    run.run(config.replace(c, checkpoint__keep_every=400), TASK, workdir)


def test_resume_with_changes(finished, monkeypatch, capsys):
  c, workdir = finished
  more = config.replace(c, optim__steps=16, optim__lr=0.05, loop__eval_every=8)
  wall = json.loads((workdir / 'summary.json').read_text())['wall_s']
  summary = run.run(more, TASK, workdir, resume_with_changes=True)
  assert summary['steps'] == 16
  assert summary['wall_s'] > wall + 0.01
  rows = logs.read(workdir)
  assert [r['step'] for r in rows] == list(range(1, 17))
  assert all(a['elapsed_s'] < b['elapsed_s'] for a, b in zip(rows, rows[1:], strict=False))
  assert rows[12]['elapsed_s'] > wall / 2
  assert json.loads((workdir / 'config.json').read_text())['config']['optim']['lr'] == 0.05
  changes = {'loop.eval_every': [4, 8], 'optim.lr': [0.1, 0.05], 'optim.steps': [12, 16]}
  said = capsys.readouterr().out
  assert all(f'changed from step 12 on: {name}: {old} -> {new}\n' in said for name, (old, new) in changes.items())
  assert json.loads((workdir / 'changes.jsonl').read_text()) == {'step': 12, 'changes': changes}
  tiny.stop_before_the_step(monkeypatch)
  run.run(more, TASK, workdir)  # now this is its config
  with pytest.raises(ConfigError, match='optim.lr: 0.05 there, 0.1 now'):
    run.run(c, TASK, workdir)
  fewer = config.replace(more, optim__steps=3, optim__warmup=0)
  assert run.run(fewer, TASK, workdir, resume_with_changes=True)['steps'] == 16
  assert (workdir / 'changes.jsonl').read_text().count('\n') == 1  # nothing was trained with other values


def test_a_longer_run_that_dies_before_its_first_save_resumes(finished, monkeypatch, capsys):
  """The newest checkpoint is the finished one of the shorter run; its end is not that of the longer one."""
  c, workdir = finished
  more = config.replace(c, optim__steps=16)
  with monkeypatch.context() as m:
    tiny.stop_before_the_step(m)
    with pytest.raises(tiny.Reached):
      run.run(more, TASK, workdir, resume_with_changes=True)
  assert run.run(more, TASK, workdir)['steps'] == 16
  assert 'already complete' not in capsys.readouterr().out


def test_a_run_that_stopped_early_stays_so_whatever_flags_are_repeated(corpus, tmp_path, monkeypatch):
  c = tiny.make_config(corpus, loop__patience=1, loop__min_delta=10.0, optim__steps=40)
  assert run.run(c, TASK, tmp_path)['steps'] == 8
  with monkeypatch.context() as m:
    tiny.stop_before_the_step(m)
    assert run.run(c, TASK, tmp_path, resume_with_changes=True)['steps'] == 8
  assert run.run(config.replace(c, loop__patience=2), TASK, tmp_path, resume_with_changes=True)['steps'] == 12


def test_tokens_are_those_of_the_batches_that_were(finished):
  c, workdir = finished
  wide = config.replace(c, data__batch=16, optim__steps=16)
  assert run.run(config.replace(c, data__batch=16), TASK, workdir, resume_with_changes=True)['tokens'] == 12 * 8 * 16
  assert run.run(wide, TASK, workdir, resume_with_changes=True)['tokens'] == 12 * 8 * 16 + 4 * 16 * 16
  assert [r['tokens'] for r in logs.read(workdir)][-5:] == [1536 + n * 256 for n in range(5)]
  assert run.run(wide, TASK, workdir)['tokens'] == 12 * 8 * 16 + 4 * 16 * 16  # from the checkpoint


def test_batches_are_left_out_where_a_run_resumes_or_after(finished):
  c, workdir = finished
  changed = config.replace(c, skip_batches=((3, 5),), optim__steps=16)
  with pytest.raises(ConfigError, match=r'skip_batches: \(3, 5\) lies before step 12, .*--restore_step=N .* up to 3'):
    run.run(changed, TASK, workdir, resume_with_changes=True)
  here = config.replace(changed, skip_batches=((12, 5),))
  assert run.run(here, TASK, workdir, resume_with_changes=True)['steps'] == 16
  again = config.replace(changed, skip_batches=((12, 5), (16, 1)), optim__steps=17)
  assert run.run(again, TASK, workdir, resume_with_changes=True)['steps'] == 17  # the first was so before


def test_without_config_json_the_checkpoint_says_what_was_trained(finished, monkeypatch):
  c, workdir = finished
  (workdir / 'config.json').unlink()
  tiny.stop_before_the_step(monkeypatch)
  with pytest.raises(ConfigError, match='optim.lr: 0.1 there, 9.0 now'):
    run.run(config.replace(c, optim__lr=9), TASK, workdir, restore_step=10)
  assert run.run(c, TASK, workdir)['steps'] == 12


def test_other_data_is_said_and_kept(finished, tmp_path, monkeypatch, capsys):
  """The text behind a path, and batches that are counted by steps."""
  c, workdir = finished
  other = tiny.write_text(tmp_path / 'text.txt', lines=151)
  changed = config.replace(c, data__corpus=str(other), data__batch=16, optim__steps=16)
  tiny.stop_before_the_step(monkeypatch)
  with pytest.raises(tiny.Reached):
    run.run(changed, TASK, workdir, resume_with_changes=True)
  found = json.loads((workdir / 'changes.jsonl').read_text())['changes']
  assert found.keys() == {'data.corpus', 'data.batch', 'optim.steps', 'fingerprint.datasets'}
  assert found['data.batch'] == [8, 16] and found['data.corpus'] == [c.data.corpus, str(other)]
  assert 'fingerprint.datasets: [' in capsys.readouterr().out


def test_going_back_to_a_step(straight, finished, capsys):
  """Newer checkpoints are moved aside, and what is trained again is what was."""
  c, workdir = finished
  run.run(c, TASK, workdir, restore_step=10)
  out = capsys.readouterr().out
  assert f'resumed from step 10 in {workdir}' in out
  assert re.search(r'checkpoints/12: newer than step 10, .*; moved to .*/checkpoints/abandoned/12\n', out)
  assert checkpoint.steps(workdir / 'checkpoints') == [10, 12]
  assert checkpoint.steps(workdir / 'checkpoints' / 'abandoned') == [12]
  assert exact(workdir) == exact(straight[1])
  assert tiny.state_sha(c, TASK, workdir) == tiny.state_sha(c, TASK, straight[1])


def test_going_back_and_leaving_batches_out(finished, tmp_path, capsys):
  """PaLM's remedy for a spike: what follows is what a run that was to leave them out from the start would do."""
  c, workdir = finished
  before, changed = exact(workdir), config.replace(c, skip_batches=((10, 3),))
  with pytest.raises(ConfigError, match=r'skip_batches: \[\] there, \[\[10, 3\]\] now'):
    run.run(changed, TASK, workdir, restore_step=10)
  run.run(changed, TASK, workdir, restore_step=10, resume_with_changes=True)
  assert 'changed from step 10 on: skip_batches: [] -> [[10, 3]]' in capsys.readouterr().out
  run.run(changed, TASK, tmp_path / 'planned')
  after = exact(workdir)
  assert after == exact(tmp_path / 'planned')
  assert {n: row['loss'] for n, row in after.items() if n <= 10} == {n: r['loss'] for n, r in before.items() if n <= 10}
  assert all(after[n]['loss'] != before[n]['loss'] for n in (11, 12))


@pytest.mark.parametrize('skips', [(), ((0, 2),), ((5, 3), (2, 1)), ((4, 1), (5, 2), (40, 1))])
def test_batches_that_are_left_out(corpus, tmp_path, skips):
  c = tiny.make_config(corpus, skip_batches=skips)
  data = loader.prepare(c.data, tmp_path, seed=c.seed)
  here, numbers, at = jax.sharding.SingleDeviceSharding(jax.devices()[0]), [], 0
  for step in range(12):  # the batch after step `step`
    at += sum(n for after, n in skips if after == step)
    numbers.append(at)
    at += 1
  for start_at in range(9):
    for number, batch in zip(numbers[start_at:], start.batches(c, TASK, data, here, start_at), strict=False):
      np.testing.assert_array_equal(batch.ids_BT, loader.host_batch(data, number)['ids_BT'])


@pytest.mark.parametrize('skips', [((-1, 3),), ((5, 0),), ((5, 1), (5, 2))])
def test_batches_that_cannot_be_left_out(skips):
  with pytest.raises(ConfigError, match='skip_batches=.*; expected .step, batches. pairs'):
    run.Config(skip_batches=skips)


def test_a_save_that_a_kill_interrupted_is_removed(straight, finished, capsys):
  """What is there of step 12 has no seal: it is named and goes, the step before is used and named too."""
  c, workdir = finished
  folder = workdir / 'checkpoints'
  (folder / '12.sha256.json').unlink()
  (folder / '12').rename(folder / '12.orbax-checkpoint-tmp')
  run.run(c, TASK, workdir)
  lines = capsys.readouterr().out.splitlines()
  assert f'{folder}/12.orbax-checkpoint-tmp: left by an interrupted run; removed' in lines
  assert f'resumed from step 10 in {workdir}' in lines
  assert sorted(p.name for p in folder.iterdir()) == ['10', '10.sha256.json', '12', '12.sha256.json']
  assert exact(workdir) == exact(straight[1])


@pytest.mark.draws
def test_a_relative_workdir_whatever_the_working_directory_becomes(straight, tmp_path, monkeypatch):
  c, want, _ = straight
  (tmp_path / 'elsewhere').mkdir()

  def leave(n, batch):
    if n == 3:
      os.chdir(tmp_path / 'elsewhere')
    return batch
  monkeypatch.chdir(tmp_path)
  with tiny.batches_through(monkeypatch, leave):
    run.run(c, TASK, 'run')
  assert exact(tmp_path / 'run') == exact(want)
  assert {p.name for p in (tmp_path / 'run').iterdir()} == {p.name for p in want.iterdir()}
  assert list((tmp_path / 'elsewhere').iterdir()) == []


def test_a_wall_clock_that_jumps_back(straight, tmp_path, monkeypatch):
  """By an hour whenever it is asked, over a stop and a resume; files of checkpoints have dates of the future too."""
  c, want, _ = straight
  hours = itertools.count(500_000, -1)
  monkeypatch.setattr(time, 'time', lambda: 3600.0 * next(hours))
  with tiny.batches_through(monkeypatch, tiny.signal_at(6)), pytest.raises(Preempted):
    run.run(c, TASK, tmp_path)
  for path in (tmp_path / 'checkpoints').rglob('*'):
    os.utime(path, (4e9, 4e9))
  summary = run.run(c, TASK, tmp_path)
  assert next(hours) < 499_990  # it was asked
  seconds = [r['elapsed_s'] for r in logs.read(tmp_path)]
  assert 0 < seconds[0] and all(a < b for a, b in itertools.pairwise(seconds)) and seconds[-1] < summary['wall_s'] < 600
  assert exact(tmp_path) == exact(want)
  assert checkpoint.steps(tmp_path / 'checkpoints') == [10, 12]


def test_tokens_are_counted_beyond_32_bits(corpus, tmp_path, monkeypatch):
  many = 2**31 + 1
  task = dataclasses.replace(TASK, around=run.Around(tokens=many))
  c = tiny.make_config(corpus, optim__steps=3, loop__eval_every=0)
  with tiny.batches_through(monkeypatch, tiny.signal_at(2)), pytest.raises(Preempted):
    run.run(c, task, tmp_path)
  summary = run.run(c, task, tmp_path)
  assert [r['tokens'] for r in logs.read(tmp_path)] == [many, 2 * many, 3 * many]
  assert summary['tokens'] == json.loads((tmp_path / 'summary.json').read_text())['tokens'] == 3 * many
  assert summary['planned']['tokens'] == 3 * many


def test_a_run_that_never_trained_binds_nobody(tmp_path, corpus, monkeypatch):
  """A first start that fails (here: out of memory while compiling) may be mended in the same workdir."""
  c = tiny.make_config(corpus, optim__steps=2)
  with monkeypatch.context() as m:
    tiny.stop_before_the_step(m)
    with pytest.raises(tiny.Reached):
      run.run(c, TASK, tmp_path)
  assert (tmp_path / 'config.json').exists()
  run.run(config.replace(c, data__batch=4), TASK, tmp_path)
  assert json.loads((tmp_path / 'config.json').read_text())['config']['data']['batch'] == 4


def test_the_data_of_a_saved_run_may_not_change(finished, tmp_path, monkeypatch):
  c, workdir = finished
  other = tiny.write_text(tmp_path / 'text.txt', lines=151)
  for name in ('config.json',):
    saved = json.loads((workdir / name).read_text())
    saved['config']['data']['corpus'] = str(other)
    (workdir / name).write_text(json.dumps(saved))
  tiny.stop_before_the_step(monkeypatch)
  with pytest.raises(DataError, match='data differs from the saved run.*datasets'):
    run.run(config.replace(c, data__corpus=str(other)), TASK, workdir)


def test_resumes_on_another_mesh(straight, tmp_path, monkeypatch):
  """Eight devices that share parameters, then eight that share the batch, then one: equal but for the order of sums."""
  c, want, _ = straight
  with tiny.batches_through(monkeypatch, tiny.signal_at(4)), pytest.raises(Preempted):
    run.run(config.replace(c, mesh__fsdp=8), TASK, tmp_path)
  with tiny.batches_through(monkeypatch, tiny.signal_at(8)), pytest.raises(Preempted):
    run.run(config.replace(c, mesh__data=8), TASK, tmp_path, resume_with_changes=True)
  summary = run.run(c, TASK, tmp_path, resume_with_changes=True)
  for got, right in zip(logs.read(tmp_path), logs.read(want), strict=True):
    assert got['step'] == right['step']
    assert got['loss'] == pytest.approx(right['loss'], rel=2e-6)
  assert summary['val_loss'] == pytest.approx(straight[2]['val_loss'], rel=2e-6)


@pytest.mark.slow
def test_bad_steps_end_the_run_and_the_good_checkpoint_stays(straight, tmp_path, monkeypatch):
  c, want, _ = straight
  with tiny.batches_through(monkeypatch, tiny.deaf_from(7)):
    with pytest.raises(Diverged, match='step 11: loss or gradient was not finite .* 5 times in a row') as error:
      run.run(c, TASK, tmp_path)
  assert error.value.code == 5
  rows = logs.read(tmp_path)
  assert rows[-1]['step'] == 11 and rows[-1]['loss'] == 'nan'
  assert checkpoint.steps(tmp_path / 'checkpoints')[-1] == 10  # saved with 4 bad steps that changed nothing
  assert run.run(c, TASK, tmp_path)['val_loss'] < 4  # with the data mended, it goes on from there
  rows = logs.read(tmp_path)
  assert [rows[n]['skipped'] for n in (5, 6, 9, 11)] == [0, 1, 4, 4]
  assert {n: row for n, row in exact(tmp_path).items() if n < 7} == {n: r for n, r in exact(want).items() if n < 7}


def test_batches_without_targets_are_counted_and_end_the_run(straight, tmp_path, monkeypatch):
  c, _, _ = straight
  with tiny.batches_through(monkeypatch, lambda n, b: b.replace(mask_BT=b.mask_BT & False) if n == 3 or n > 6 else b):
    with pytest.raises(DataError, match='step 11: a batch without targets, or skipped, 5 times in a row') as error:
      run.run(c, TASK, tmp_path)
  assert error.value.code == 3
  rows = {row['step']: row for row in logs.read(tmp_path)}
  assert [rows[n]['skipped'] for n in (2, 3, 6, 11)] == [0, 1, 1, 6]
  assert [rows[n]['targets'] > 0 for n in (2, 3, 6, 11)] == [True, False, True, False]


def test_single_bad_steps_are_passed_over(straight, tmp_path, monkeypatch):
  c, _, _ = straight
  with tiny.batches_through(monkeypatch, tiny.deaf_from(6, 7)):
    summary = run.run(c, TASK, tmp_path)
  rows = {r['step']: r for r in logs.read(tmp_path)}
  assert rows[6]['loss'] == rows[7]['objective'] == 'nan'
  assert rows[12]['skipped'] == 2
  assert math.isfinite(summary['val_loss'])
  assert [rows[n]['learning_rate'] for n in (8, 9)] == [logs.read(straight[1])[n]['learning_rate'] for n in (5, 6)]


def test_parameters_that_are_not_finite_are_never_saved(straight, tmp_path, monkeypatch):
  """They cannot arise from a step, whose updates are guarded; from memory or a device they can."""
  c, _, _ = straight
  build = run.build

  def broken(*args):
    parts = build(*args)

    def step(state, batch, key):
      state, metrics = parts.step(state, batch, key)
      if metrics['loss'] < 5.2:
        state = state.replace(params=jax.tree.map(lambda x: x * jnp.inf, state.params))
      return state, metrics
    return dataclasses.replace(parts, step=step)
  monkeypatch.setattr(run, 'build', broken)
  with pytest.raises(Diverged, match='a parameter is not finite'):
    run.run(config.replace(c, loop__max_skipped=100, checkpoint__every=1, loop__eval_every=0), TASK, tmp_path)
  monkeypatch.setattr(run, 'build', build)
  step, state, _ = checkpoint.restore(tmp_path / 'checkpoints', start.abstract(TASK, build(c, TASK)), log=print)
  assert step >= 1
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_compressed_is_the_text_that_the_model_was_evaluated_on(finished, corpus):
  """Not what an earlier text, or a preparation that was killed, left beside it."""
  _, workdir = finished
  compare = lambda: subprocess.run([sys.executable, '-m', 'scripts.compare_xz', f'--workdir={workdir}'], cwd=ROOT,
                                   capture_output=True, text=True, timeout=300, check=False)
  alone = compare()
  held_out = len(corpus.read_text()) - int(len(corpus.read_text()) * 0.9)
  assert alone.stdout.startswith(f'bits per byte on {held_out:,} bytes of validation text: model ')
  for name, files in (('killed', ('validation.txt',)), ('earlier', ('validation.txt', 'manifest.json'))):
    (workdir / 'data' / name).mkdir()
    for file in files:
      (workdir / 'data' / name / file).write_text('{"other": "text"}')
  assert compare().stdout == alone.stdout
  shutil.rmtree(workdir / 'data')
  gone = compare()
  assert gone.returncode == 3 and '0 of the 1 datasets' in gone.stderr and gone.stderr.count('\n') == 1


@pytest.mark.slow
def test_stops_early_and_keeps_the_best(corpus, tmp_path, monkeypatch):
  """Trained far too fast, the model gets worse; the run ends there, and the best step outlives newer ones."""
  c = tiny.make_config(corpus, optim__lr=5.0, optim__schedule='constant', optim__steps=60, loop__eval_every=2,
                       loop__patience=3, checkpoint__keep=1, optim__warmup=0)
  summary = run.run(c, TASK, tmp_path)
  values = {r['step']: r['val_loss'] for r in logs.read(tmp_path) if 'val_loss' in r}
  best = min(values, key=values.get)
  assert summary['steps'] == best + 6 == max(values) < 60
  assert summary['best'] == {'step': best, 'val_loss': values[best]}
  assert summary['val_loss'] == values[best + 6] > values[best]
  assert checkpoint.steps(tmp_path / 'checkpoints') == [best, best + 6]
  assert checkpoint.best(tmp_path / 'checkpoints', 'val_loss') == best
  tiny.stop_before_the_step(monkeypatch)
  assert run.run(c, TASK, tmp_path)['steps'] == best + 6  # complete, though not at the planned step


def test_metric_to_watch_must_exist(corpus, tmp_path, monkeypatch):
  tiny.stop_before_the_step(monkeypatch)
  with pytest.raises(ConfigError, match="checkpoint.metric='val_los'; expected one of val_accuracy, val_bits_per_byte"):
    run.run(tiny.make_config(corpus, checkpoint__metric='val_los'), TASK, tmp_path)


def test_watching_a_metric_to_maximise(corpus, tmp_path):
  c = tiny.make_config(corpus, checkpoint__metric='val_accuracy', checkpoint__mode='max', optim__steps=8,
                       loop__eval_every=2)
  summary = run.run(c, TASK, tmp_path)
  values = [r['val_accuracy'] for r in logs.read(tmp_path) if 'val_accuracy' in r]
  assert summary['best']['val_accuracy'] == max(values)


def test_nothing_to_validate_is_known_before_training(corpus, tmp_path, monkeypatch):
  tiny.stop_before_the_step(monkeypatch)
  with pytest.raises(DataError, match="nothing to evaluate in 'validation'.*validation_fraction"):
    run.run(tiny.make_config(corpus, data__validation_fraction=0.0), TASK, tmp_path)


@pytest.mark.parametrize('mesh', [{}, {'mesh__fsdp': 8}])
def test_a_state_larger_than_the_memory_is_refused_before_anything_is_made(corpus, tmp_path, monkeypatch, mesh):
  """Devices of a CPU share its memory, so a state divided over them takes no less there; of others each has its own."""
  c = tiny.make_config(corpus, **mesh)
  with monkeypatch.context() as m:
    task = tiny.task(embed=1 << 10)  # 2 x 258 x 1024 values, and two moments of each: 6,193 KiB
    m.setattr(start.host, 'memory', lambda device: 6_300_000)
    with pytest.raises(ConfigError, match=r'^mesh: parameters and the optimizer.s state take 0.00591 GiB of the 0.00587'
                       ' GiB of cpu; expected less'):
      run.run(c, task, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
    state = start.abstract(task, run.build(c, task))
    m.setattr(start.host, 'memory', lambda device: 6_400_000)
    start.preflight(state)


def test_stopped_while_data_is_prepared(corpus, tmp_path, monkeypatch):
  """Nothing to save: it ends at once, also where a library would have caught an Exception."""
  def prepare(*args, **kwargs):
    try:
      os.kill(os.getpid(), signal.SIGTERM)
    except Exception:  # noqa: BLE001
      pytest.fail('taken for bad data')
  with monkeypatch.context() as m:
    m.setattr(loader, 'prepare', prepare)
    with pytest.raises(Preempted, match='no step was under way'):
      run.run(tiny.make_config(corpus, optim__steps=2), TASK, tmp_path)
  assert run.run(tiny.make_config(corpus, optim__steps=2), TASK, tmp_path)['steps'] == 2


def test_a_save_that_fails_after_sigterm_is_not_called_saved(corpus, tmp_path, monkeypatch):
  def full(*args):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(checkpoint.seal, 'write', full)
  with tiny.batches_through(monkeypatch, tiny.signal_at(3)), pytest.raises(CheckpointError, match='No space left'):
    run.run(tiny.make_config(corpus), TASK, tmp_path)


def test_one_writer_at_a_time(straight, corpus, tmp_path, monkeypatch):
  tiny.stop_before_the_step(monkeypatch)
  with checkpoint.lock(tmp_path), pytest.raises(CheckpointError, match=f'in use by host .* pid {os.getpid()}'):
    run.run(tiny.make_config(corpus), TASK, tmp_path)


def test_seed_and_batch_are_checked():
  with pytest.raises(ConfigError, match='seed=-1'):
    run.Config(seed=-1)
  with pytest.raises(ConfigError, match='seed=4294967296'):
    run.Config(seed=2**32)
  with pytest.raises(ConfigError, match='data.batch=8 is not divisible .* = 3;'):
    config.replace(run.Config(), mesh__data=3)


def test_describe_allocates_nothing(corpus):
  before = len(jax.live_arrays())
  text = look.describe(tiny.make_config(corpus), TASK)
  assert 'embed/tokens' in text and '4,128' in text
  assert f'{12 * 8 * 16:,}' in text
  assert len(jax.live_arrays()) == before
  assert params.count(TASK.specs) == 4128


def test_bits_per_byte_of_isolated_documents_count_their_first_tokens(tmp_path):
  """No target says them, so each counts as the mean of the others: runs with and without isolation compare."""
  with open(tmp_path / 'a.jsonl', 'w', encoding='utf-8') as f:
    f.writelines(json.dumps({'text': f'poem {i}'}) + '\n' for i in range(200))
  for isolate in (False, True):
    c = tiny.make_config(tmp_path / 'a.jsonl', data__split='hash', data__validation_fraction=0.4, optim__steps=2,
                         data__isolate=isolate)
    summary = run.run(c, TASK, tmp_path / str(isolate))
    data = loader.prepare(c.data, tmp_path / str(isolate) / 'data')
    tokens = data.tokens('validation') - (not isolate)  # of one stream, all but the first
    assert summary['val_bits_per_byte'] == pytest.approx(
        summary['val_loss'] / math.log(2) * tokens / data.utf8_bytes(), rel=1e-6)
