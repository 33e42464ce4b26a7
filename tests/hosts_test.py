"""Two processes of four devices each are one run: same numbers, one writer, one decision to stop, any mesh later."""

import os
import shutil
import signal

import jobs
import pytest
import tiny

from experiments import cli, gpt2
from lm import checkpoint, logs, pretrain

pytestmark = pytest.mark.slow

STEPS = '--set=optim.steps=30'


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return tiny.write_text(tmp_path_factory.mktemp('corpus') / 'text.txt')


@pytest.fixture(scope='module')
def alone(corpus, tmp_path_factory):
  """The rows of an uninterrupted run in one process."""
  workdir = tmp_path_factory.mktemp('alone')
  argv = [*jobs.argv(corpus, workdir), STEPS]
  assert cli.run_argv(['gpt2', *argv], '', gpt2.CONFIGS, pretrain.task) == 0
  return logs.read(workdir)


@pytest.fixture(scope='module')
def killed(corpus, tmp_path_factory):
  """The workdir of a job that lost a process after step 15."""
  workdir = tmp_path_factory.mktemp('killed') / 'run'
  with jobs.Job(workdir, corpus, STEPS, fault='at(20, lambda: time.sleep(2))') as job:  # not done before the signal
    job.reach(15)
    job.send(1, signal.SIGKILL)
    codes, errors, _ = job.finish()
  assert codes[1] == -signal.SIGKILL and codes[0] in (-signal.SIGABRT, 70), errors
  assert checkpoint.steps(workdir / 'checkpoints')[-1] in (10, 20)
  return workdir


def agree(workdir, alone):
  rows = logs.read(workdir)
  assert [r['step'] for r in rows] == list(range(1, 31))
  for got, want in zip(rows, alone, strict=True):
    assert got['loss'] == pytest.approx(want['loss'], rel=1e-5)
    assert got.get('val_loss', 0) == pytest.approx(want.get('val_loss', 0), rel=1e-5)


def test_sigterm_to_one_and_on(corpus, alone, tmp_path):
  with jobs.Job(tmp_path, corpus, STEPS, fault='at(20, lambda: time.sleep(1))') as job:
    job.reach(8)
    job.send(1, signal.SIGTERM)  # the notice reaches the other through the coordinator
    codes, errors, _ = job.finish()
  assert codes == [75, 75], errors
  step = checkpoint.steps(tmp_path / 'checkpoints')[-1]
  assert 8 <= step < 30
  for err in errors:
    assert f'error: SIGTERM: step {step} is saved; start again to resume' in err
  with jobs.Job(tmp_path, corpus, STEPS) as job:
    codes, errors, _ = job.finish(120)
  assert codes == [0, 0], errors
  assert f'resumed from step {step} ' in job.output(0)
  assert 'val_loss' in job.output(0) and 'val_loss' not in job.output(1)
  agree(tmp_path, alone)


@pytest.mark.parametrize('mesh', [(8, 1, 1), (2, 2, 2)], ids=str)
def test_a_killed_job_goes_on_in_one_process(corpus, alone, killed, tmp_path, mesh):
  shutil.copytree(killed, tmp_path / 'run')
  axes = [f'--set=mesh.{name}={n}' for name, n in zip(('data', 'fsdp', 'tensor'), mesh, strict=True)]
  with jobs.Job(tmp_path / 'run', corpus, STEPS, *axes, '--resume_with_changes', processes=1, join=False) as job:
    codes, errors, _ = job.finish(180)
  assert codes == [0], errors
  assert 'resumed from step ' in job.output(0)
  agree(tmp_path / 'run', alone)


def slurm(index):
  return {'SLURM_JOB_ID': str(os.getpid()), 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2',
          'SLURM_PROCID': str(index), 'SLURM_LOCALID': str(index)}


def open_mpi(index):
  return {'OMPI_MCA_orte_hnp_uri': f'{os.getpid() * 2**12}.0;tcp://127.0.0.1:1', 'OMPI_COMM_WORLD_SIZE': '2',
          'OMPI_COMM_WORLD_RANK': str(index), 'OMPI_COMM_WORLD_LOCAL_RANK': str(index)}


@pytest.mark.parametrize('cluster', [slurm, open_mpi])
def test_a_job_found_in_the_environment(corpus, tmp_path, cluster):
  """What the engine would set; JAX reads it. The port comes of the job's number."""
  env = {i: cluster(i) for i in range(2)}
  with jobs.Job(tmp_path, corpus, '--set=optim.steps=2', '--distributed=auto', env=env, join=False) as job:
    codes, errors, _ = job.finish(120)
  assert codes == [0, 0], errors
  assert [r['step'] for r in logs.read(tmp_path)] == [1, 2]
  assert 'val_loss' in job.output(0) and 'val_loss' not in job.output(1)


def test_a_job_without_a_mesh_ends_in_one_line(corpus, tmp_path):
  with jobs.Job(tmp_path, corpus, '--set=mesh.data=1', '--set=mesh.fsdp=1') as job:
    codes, errors, _ = job.finish(120)
  assert codes == [2, 2], errors
  for err in errors:
    assert 'error: mesh: data=1' in err and 'set mesh.data' in err and 'Traceback' not in err


@pytest.mark.parametrize('text', ['127.0.0.1:1,2', 'here', '127.0.0.1:1,two,0', '127.0.0.1:1,2,0,1'])
def test_a_job_that_cannot_be_joined(tmp_path, capsys, text):
  argv = [*jobs.argv(tmp_path, tmp_path), f'--distributed={text}']
  assert cli.run_argv(['gpt2', *argv], '', gpt2.CONFIGS, pretrain.task) == 2
  err = capsys.readouterr().err
  assert err.startswith(f'error: --distributed={text}: ')
  assert err.endswith("expected 'auto' or HOST:PORT,PROCESSES,INDEX\n") and err.count('\n') == 1
