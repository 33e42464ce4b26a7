"""The command line: help that teaches, exit codes, and what a person sees of a run."""

import errno
import json
import os
import pathlib
import re
import signal

import jax
import pytest
import tiny

from experiments import cli, gpt2
from lm import config, pretrain, run
from lm.errors import CheckpointError, ConfigError, DataError, Diverged, Interrupted, Preempted
from lm.models import hf_decoder


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return tiny.write_text(tmp_path_factory.mktemp('corpus') / 'text.txt')


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  tiny.share_compiled(monkeypatch)


def gpt(*argv):
  return cli.run_argv(['gpt2', *map(str, argv)], 'Doc of the paper.', gpt2.CONFIGS, pretrain.task)


@pytest.mark.parametrize('flag', ['--help', '-h', '-help'])
def test_help_teaches(capsys, flag):
  assert gpt(flag, '--config=shakespeare_char_gpu') == 0
  out, err = capsys.readouterr()
  assert err == ''
  assert out.startswith('Doc of the paper.')
  for c in gpt2.CONFIGS:
    assert f'  {c.__name__}: {c.__doc__.splitlines()[0]}' in out
  for name in ('--config', '--set', '--workdir', '--[no]describe', '--[no]resume_with_changes', '--[no]traceback',
               '--distributed', '--resume', '--restore_step', '--show_batch'):
    assert name in out
  assert '--set optim.lr=1e-4' in out
  assert '  optim.steps=5000\n' in out  # the fields, as the chosen config has them
  assert '  model.dropout.hidden=0.2\n' in out
  for code in ('0 done', '2 a flag', '3 the data', '4 a checkpoint', '5 diverged', '75 SIGTERM', '130 Ctrl-C'):
    assert code in ' '.join(out.split())


def test_what_the_readme_trains_first_is_an_architecture_to_export():
  text = (pathlib.Path(__file__).parent.parent / 'README.md').read_text(encoding='utf-8')
  command = text[text.index('experiments.gpt2 --config=quickstart'):text.index('scripts.convert --from=runs/first')]
  c = config.override(gpt2.quickstart(), *re.findall(r'--set (model\S+)', command))
  assert hf_decoder.family(c.model)[0] == 'gpt2'
  with pytest.raises(ConfigError, match='norm_bias'):
    hf_decoder.family(gpt2.quickstart().model)


def test_describe_needs_no_workdir_and_no_data(capsys):
  before = len(jax.live_arrays())
  assert gpt('--config=gpt2_1558m', '--describe') == 0
  out = capsys.readouterr().out
  assert '1,557,611,200' in out
  assert 'blocks/attn/q' in out
  assert len(jax.live_arrays()) == before


@pytest.mark.slow
def test_a_run_from_start_to_end_and_again(corpus, tmp_path, capsys, monkeypatch):
  argv = tiny.argv(config='quickstart', workdir=tmp_path / 'run', data__corpus=corpus)
  assert gpt(*argv) == 0
  out, err = capsys.readouterr()
  assert err == ''
  lines = out.splitlines()
  assert lines[0].startswith('step 1: loss 5.')
  assert [line.split(':')[0] for line in lines[:6]] == [f'step {n}' for n in range(1, 7)]
  assert 'val_loss' in lines[5]
  assert json.loads('\n'.join(lines[6:-1])) == json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert lines[-1] == (f'done: {tmp_path}/run/curves.png shows how it went; sample with: python -m scripts.sample '
                       f'--model={tmp_path}/run --prompt="..."')
  assert gpt(*argv) == 0
  out, err = capsys.readouterr()
  assert out.startswith('already complete: step 6 of 6')
  assert err == ''
  assert gpt(*argv, '--set=optim.steps=8') == 2
  assert '--resume_with_changes' in capsys.readouterr().err
  tiny.stop_before_the_step(monkeypatch)
  with pytest.raises(tiny.Reached):
    gpt(*argv, '--set=optim.steps=8', '--resume_with_changes')
  assert 'resumed from step 6' in capsys.readouterr().out


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_stopped_by_a_signal(corpus, tmp_path, capsys, monkeypatch, number, code):
  argv = tiny.argv(config='quickstart', workdir=tmp_path, data__corpus=corpus)
  with tiny.batches_through(monkeypatch, tiny.signal_at(3, number)):
    assert gpt(*argv) == code
  err = capsys.readouterr().err
  assert err.endswith('step 3 is saved; start again to resume\n')
  assert err.startswith('error: ') and err.count('\n') == 1
  assert (tmp_path / 'checkpoints' / '3.sha256.json').exists()


@pytest.mark.parametrize('error, code, line', [
    (ConfigError('a'), 2, 'a'), (DataError('a'), 3, 'a'), (CheckpointError('a'), 4, 'a'), (Diverged('a'), 5, 'a'),
    (DataError('a\x1b[2K\rb\u202ec 红'), 3, r'a\x1b[2K b\u202ec 红'), (Preempted('a'), 75, 'a'),
    (Interrupted('a'), 130, 'a'), (ConfigError('two\n  lines'), 2, 'two lines'),
    (KeyboardInterrupt(), 130, 'interrupted: nothing was under way; start again'),
    (PermissionError(13, 'Permission denied', '/x/text.txt'), 3, '/x/text.txt: Permission denied; expected to read'),
    (OSError(28, 'No space left on device'), 4, 'disk: [Errno 28] No space left on device; free space'),
    (RuntimeError('write() failed: No space left on device; x'), 4, 'disk: write() failed: No space left'),
    (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), '/x/shard'), 4, f'disk: [Errno {errno.EDQUOT}] '),
    (OSError(errno.EFBIG, os.strerror(errno.EFBIG), '/x/shard'), 4, f'disk: [Errno {errno.EFBIG}] '),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes'), 2,
     'device memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes; lower data.batch or --max_new'),
])
def test_an_expected_failure_is_one_line(monkeypatch, capsys, error, code, line):
  def fail(*unused, **more):
    raise error
  monkeypatch.setattr(run, 'run', fail)
  assert gpt('--workdir=x') == code
  err = capsys.readouterr().err
  assert err.startswith(f'error: {line}') and err.count('\n') == 1
  assert gpt('--workdir=x', '--traceback') == code
  assert 'Traceback' in capsys.readouterr().err


@pytest.mark.parametrize('error', [ValueError('a'), RuntimeError('a'), jax.errors.JaxRuntimeError('INTERNAL: a'),
                                   OSError('a')])
def test_a_fault_of_the_program_shows_itself(monkeypatch, capsys, error):
  def fail(*unused, **more):
    raise error
  monkeypatch.setattr(run, 'run', fail)
  try:
    code = gpt('--workdir=x')
  except ValueError:
    return
  assert code == 1
  err = capsys.readouterr().err
  assert 'Traceback' in err and err.endswith('a\n')


def test_flags_of_one_run_do_not_reach_the_next(monkeypatch):
  seen = []
  monkeypatch.setattr(run, 'run', lambda c, task, workdir, **how: seen.append((c.optim.lr, workdir, how)) or {})
  assert gpt('--workdir=/a', '--set=optim.lr=0.5', '--resume_with_changes', '--resume=must', '--restore_step=3') == 0
  assert gpt('--workdir=/b') == 0
  assert seen == [(0.5, '/a', {'resume_with_changes': True, 'resume': 'must', 'restore_step': 3}),
                  (0.003, '/b', {'resume_with_changes': False, 'resume': 'auto', 'restore_step': None})]


def test_a_run_that_changes_the_working_directory(tmp_path, monkeypatch, capsys):
  """A relative --workdir means the same place before and after it."""
  (tmp_path / 'elsewhere').mkdir()
  monkeypatch.chdir(tmp_path)
  seen = []

  def moves(c, task, workdir, **how):
    os.makedirs(workdir)
    os.chdir('elsewhere')
    return {'loss': 1.0}
  monkeypatch.setattr(run, 'run', moves)
  assert cli.run_argv(['gpt2', '--workdir=run'], '', gpt2.CONFIGS, pretrain.task,
                      lambda c, workdir: seen.append(workdir) or {'more': 2.0}) == 0
  assert seen == [str(tmp_path / 'run')]
  assert json.loads((tmp_path / 'run' / 'summary.json').read_text()) == {'loss': 1.0, 'more': 2.0}
  assert f'done: {tmp_path}/run/curves.png' in capsys.readouterr().out


def test_main_exits_with_the_code(monkeypatch):
  monkeypatch.setattr('sys.argv', ['gpt2', '--set=optim.lrr=1'])
  with pytest.raises(SystemExit) as stop:
    cli.main('', gpt2.CONFIGS, pretrain.task)
  assert stop.value.code == 2
