"""scripts/bench_run: what it is given wrong, and, with PyTorch, that both sides learn the same text; no timing."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run(*arguments):
  command = [sys.executable, '-m', 'scripts.bench_run', *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize('flags, part', [
    ((), "--corpus='': no such file"), (('--set=optim.name=muon',), '--set optim.name=muon: PyTorch\'s side')])
def test_a_wrong_flag_is_one_line(flags, part, tmp_path):
  (tmp_path / 'text.txt').write_text('to be or not to be')
  done = run(*flags, *([f'--corpus={tmp_path}/text.txt'] if flags else []))
  assert (done.returncode, done.stderr.count('\n')) == (2, 1) and part in done.stderr, done.stderr


@pytest.mark.oracle
def test_both_sides_learn_the_text(tmp_path):
  pytest.importorskip('torch')
  (tmp_path / 'text.txt').write_text('to be or not to be, that is the question. ' * 400)
  done = run(f'--corpus={tmp_path}/text.txt', '--peer=torch', '--set=optim.steps=100', '--set=optim.warmup=10',
             '--set=loop.eval_every=50')
  assert done.returncode == 0, done.stderr
  found = {words[0]: list(map(float, words[2:])) for words in map(str.split, done.stdout.splitlines())
           if words[0] in ('lm', 'torch') and words[1] == '0'}
  for loss, training, whole in found.values():
    assert 0 < loss < 1 and 0 < training < whole  # the letters' entropy is 2.38 nats
  assert set(found) == {'lm', 'torch'}
