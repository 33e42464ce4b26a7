"""Two processes of four devices each are one run: same numbers, one writer, one decision to stop."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny

from experiments import cli, gpt2
from lm import checkpoint, logs, pretrain

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent


def argv(corpus, workdir):
  return tiny.argv(config='quickstart', workdir=workdir, data__corpus=corpus, optim__steps=30, checkpoint__every=10,
                   loop__eval_every=10, mesh__data=2, mesh__fsdp=4, model__dropout__hidden=0.1)


def start(corpus, workdir):
  """Both processes of a job."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  env = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=4', 'JAX_PLATFORMS': 'cpu'}
  return [subprocess.Popen([sys.executable, '-m', 'experiments.gpt2', *argv(corpus, workdir),
                            f'--distributed=127.0.0.1:{port},2,{i}'], cwd=ROOT, env=env, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) for i in range(2)]


def finish(job):
  outputs = [process.communicate() for process in job]
  return [process.returncode for process in job], outputs


def test_two_processes(tmp_path):
  corpus = tiny.write_text(tmp_path / 'text.txt')
  job = start(corpus, tmp_path / 'run')
  while all(p.poll() is None for p in job) and len(logs.read(tmp_path / 'run')) < 8:
    time.sleep(0.01)
  job[1].send_signal(signal.SIGTERM)  # the notice reaches the other through the coordinator
  codes, outputs = finish(job)
  assert codes == [75, 75], outputs
  step = checkpoint.steps(tmp_path / 'run' / 'checkpoints')[-1]
  assert 8 <= step < 30
  for _, err in outputs:
    assert f'error: SIGTERM: step {step} is saved; start again to resume' in err
  codes, outputs = finish(start(corpus, tmp_path / 'run'))
  assert codes == [0, 0], outputs
  assert f'resumed from step {step} ' in outputs[0][0]
  assert 'val_loss' in outputs[0][0] and 'val_loss' not in outputs[1][0]

  assert cli.run_argv(['gpt2', *argv(corpus, tmp_path / 'one')], '', gpt2.CONFIGS, pretrain.task) == 0
  two, one = logs.read(tmp_path / 'run'), logs.read(tmp_path / 'one')
  assert [r['step'] for r in two] == list(range(1, 31))
  for got, want in zip(two, one, strict=True):
    assert got['loss'] == pytest.approx(want['loss'], rel=1e-5)
    assert got.get('val_loss', 0) == pytest.approx(want.get('val_loss', 0), rel=1e-5)


@pytest.mark.parametrize('text', ['127.0.0.1:1,2', 'here', '127.0.0.1:1,two,0', '127.0.0.1:1,2,0,1'])
def test_a_job_that_cannot_be_joined(tmp_path, capsys, text):
  code = cli.run_argv(['gpt2', *argv(tmp_path, tmp_path), f'--distributed={text}'], '', gpt2.CONFIGS, pretrain.task)
  assert code == 2
  err = capsys.readouterr().err
  assert err.startswith(f'error: --distributed={text}: ')
  assert err.endswith("expected 'auto' or HOST:PORT,PROCESSES,INDEX\n") and err.count('\n') == 1
