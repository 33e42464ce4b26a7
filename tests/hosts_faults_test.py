"""What ends one process of a job ends all, soon, with a status that says whether to start again, and a line why.

Real processes. Where the heartbeat is 100 s and the wait 600 s, neither can be what ended the job.
"""

import signal
import socket
import time

import jax
import jobs
import pytest
import tiny

from lm import checkpoint, hosts
from lm.errors import CheckpointError, Lost

SOON = 20.0
LONG = {'heartbeat': 100, 'wait': 600}
BOTH = pytest.mark.parametrize('index', [0, 1])


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  """Text; beside it the cache of compiled steps, which a first run fills."""
  text = tiny.write_text(tmp_path_factory.mktemp('corpus') / 'text.txt')
  with jobs.Job(text.parent / 'first', text, '--set=optim.steps=20') as job:
    codes, errors, _ = job.finish(180)
  assert codes == [0, 0], errors
  return text


def soon(job, since=0.0):
  """(exit statuses, stderr of each) of a job that ends soon after `since` seconds from now."""
  codes, errors, seconds = job.finish(since + 60)
  assert max(seconds) < since + SOON, (seconds, codes, errors)
  return codes, errors


def line(err):
  """The one error line in a stderr."""
  found, = [text for text in err.splitlines() if text.startswith('error: ')]
  return found.removeprefix('error: ')


@pytest.mark.slow
@BOTH
def test_sigkill(corpus, tmp_path, index):
  """Heartbeats: 10 s here, 100 s unless told. Without its coordinator, which is process 0, the other ends at once."""
  with jobs.Job(tmp_path, corpus) as job:
    job.reach(12)
    job.send(index, signal.SIGKILL)
    codes, errors = soon(job)
  assert codes[index] == -signal.SIGKILL
  assert codes[1 - index] in (-signal.SIGABRT, 70), errors


@pytest.mark.slow
@BOTH
def test_stopped(corpus, tmp_path, index):
  """Who is stopped can do nothing; the other does not wait for it."""
  with jobs.Job(tmp_path, corpus, wait=600) as job:
    job.reach(12)
    job.send(index, signal.SIGSTOP)
    began = time.monotonic()
    while job.processes[1 - index].poll() is None and time.monotonic() < began + 25:
      time.sleep(0.1)
    codes, errors, _ = job.finish(0.5)
  assert codes[index] == -signal.SIGKILL and codes[1 - index] == -signal.SIGABRT, errors


@pytest.mark.slow
@BOTH
def test_alive_but_stuck(corpus, tmp_path, index):
  """Its heart beats, but its data does not come: the other names it, and it ends too."""
  with jobs.Job(tmp_path, corpus, wait=15, fault=f'if ME == {index}: at(15, lambda: time.sleep(1000))') as job:
    job.reach(12)
    codes, errors = soon(job, since=15)
  assert codes == [70, 70], errors
  why = f'a batch: process {index} did not come within 15 s; expected every process here: one is stuck or gone; '
  assert why in line(errors[1 - index])
  assert line(errors[index]).startswith(f'process {1 - index}: {why}')


BEFORE = 'def bad(*_, **__): raise ValueError("bad shard")\n'
FULL = 'def full(*_, **__): raise OSError(28, "No space left on device")\nimport orbax.checkpoint as ocp\n'
FAULTS = {
    'preparing data': (BEFORE + 'if ME == {i}: loader.prepare = bad', 1, 'ValueError: bad shard'),
    'training': (BEFORE + 'if ME == {i}: at(15, bad)', 1, 'ValueError: bad shard'),
    'evaluating': (BEFORE + 'if ME == {i}: at(15, lambda: setattr(loader, "eval_batches", bad))', 1, 'bad shard'),
    'saving': (FULL + 'if ME == {i}: at(15, lambda: setattr(ocp.AsyncCheckpointer, "save", full))', 4, 'No space left'),
    'writing': (FULL + 'if ME == {i}: at(15, lambda: setattr(ocp.AsyncCheckpointer, "wait_until_finished", full))', 4,
                'No space left'),
    'sealing': (FULL + 'at(15, lambda: setattr(checkpoint.seal, "write", full))', 4, 'No space left'),  # by process 0
}


@pytest.mark.slow
@pytest.mark.parametrize('index, what', [(1, 'preparing data'), (0, 'training'), (1, 'evaluating'),
                                         (0, 'saving'), (1, 'writing'), (0, 'sealing')])
def test_exception_on_one(corpus, tmp_path, index, what):
  fault, code, why = FAULTS[what]
  with jobs.Job(tmp_path, corpus, fault=fault.replace('{i}', str(index)), **LONG) as job:
    began = time.monotonic()
    while all(p.poll() is None for p in job.processes):
      time.sleep(0.05)
      assert time.monotonic() - began < 120
    codes, errors = soon(job)  # from the end of the first
  assert codes == [code, code], errors
  assert why in errors[index]
  assert line(errors[1 - index]).startswith(f'process {index}: ') and why in line(errors[1 - index])
  if what not in ('preparing data', 'training', 'evaluating'):
    assert checkpoint.steps(tmp_path / 'checkpoints') == [10]


@pytest.mark.slow
@BOTH
def test_ctrl_c_on_one(corpus, tmp_path, index):
  """Both save the same step."""
  with jobs.Job(tmp_path, corpus, **LONG) as job:
    job.reach(12)
    job.send(index, signal.SIGINT)
    codes, errors = soon(job)
  assert (codes[index], codes[1 - index]) == (130, 75), errors
  step = checkpoint.steps(tmp_path / 'checkpoints')[-1]
  assert step >= 12
  assert line(errors[index]) == f'interrupted: step {step} is saved; start again to resume'
  assert line(errors[1 - index]) == f'SIGTERM: step {step} is saved; start again to resume'


@pytest.mark.slow
def test_ctrl_c_twice(corpus, tmp_path):
  with jobs.Job(tmp_path, corpus, fault='at(15, lambda: time.sleep(30))', **LONG) as job:
    job.reach(12)
    for _ in range(2):
      time.sleep(1)
      job.send(1, signal.SIGINT)
    codes, errors = soon(job)
  assert codes == [130, 130], errors
  assert line(errors[0]).startswith('process 1: interrupted twice: ')
  assert checkpoint.steps(tmp_path / 'checkpoints') == [10]


@pytest.mark.slow
def test_two_jobs_in_one_workdir(corpus, tmp_path):
  with jobs.Job(tmp_path, corpus) as first:
    first.reach(3)
    with jobs.Job(tmp_path, corpus, **LONG) as second:
      codes, errors, _ = second.finish()
    assert codes == [4, 4], errors
    assert 'is in use by host' in line(errors[0]) and line(errors[1]) == f'process 0: {line(errors[0])}'
    first.send(0, signal.SIGTERM)
    assert soon(first)[0] == [75, 75]


DIFFERENT = {
    'a field': (['--set=optim.lr=0.5'], 2, 'optim.lr: 0.003 on process 0, 0.5 on process 1; expected the same'),
    'no such field': (['--set=optim.lrr=0.5'], 2, "did you mean 'lr'?"),
    'another workdir': (['--workdir={tmp}/elsewhere'], 2, 'process 1 does not see what process 0 writes there'),
    'another number of processes': (['--distributed=127.0.0.1:{port},3,1'], 2, ",2' on process 0, '127.0.0.1:"),
}


@pytest.mark.slow
@pytest.mark.parametrize('what', DIFFERENT)
def test_process_1_is_started_otherwise(corpus, tmp_path, what):
  more, code, why = DIFFERENT[what]
  port = jobs.port()
  own = {i: [f'--distributed=127.0.0.1:{port},2,{i}'] for i in range(2)}
  own[1] += [flag.replace('{tmp}', str(tmp_path)).replace('{port}', str(port)) for flag in more]
  with jobs.Job(tmp_path / 'run', corpus, own=own, join=False, **LONG) as job:
    codes, errors, _ = job.finish()
  assert codes == [code, code], errors
  for err in errors:
    assert why in line(err)
  assert checkpoint.steps(tmp_path / 'run' / 'checkpoints') == []


@pytest.mark.slow
@BOTH
def test_the_other_never_comes(corpus, tmp_path, index):
  flag = f'--distributed=127.0.0.1:{jobs.port()},2,{index}'
  with jobs.Job(tmp_path, corpus, flag, processes=1, join=False, wait=5) as job:
    codes, errors, _ = job.finish()
  assert codes == [70], errors
  assert line(errors[0]).startswith(f'{flag}: not all processes of the job came within 5 s; ')


@pytest.mark.slow
def test_without_jaxs_client(corpus, tmp_path):
  """Should JAX move what has no public name: the one that raises ends, the other by what it finds itself."""
  fault = f'hosts._coordination = lambda: None\n{BEFORE}if ME == 1: at(15, bad)'
  with jobs.Job(tmp_path, corpus, fault=fault) as job:
    job.reach(12)
    codes, errors = soon(job)
  assert codes[1] == 1 and codes[0] in (70, -signal.SIGABRT), errors


@pytest.mark.parametrize('address, resolved, bound', [
    ('10.0.0.7:1234', '10.0.0.7', '10.0.0.7:1234'), ('127.0.0.1:80', '127.0.0.1', '127.0.0.1:80'),
    ('localhost:80', '127.0.0.1', 'localhost:80'), ('node1:80', '10.0.0.7', 'node1:80'),
    ('node1:80', '127.0.1.1', '[::]:80'), ('nowhere:80', None, 'nowhere:80')])
def test_where_the_coordinator_listens(monkeypatch, address, resolved, bound):
  def resolve(host):
    if resolved is None:
      raise socket.gaierror(host)
    return resolved
  monkeypatch.delenv('JAX_COORDINATOR_BIND_ADDRESS', raising=False)
  monkeypatch.setattr(socket, 'gethostbyname', resolve)
  assert hosts._bind(address) == bound
  monkeypatch.setenv('JAX_COORDINATOR_BIND_ADDRESS', '[::]:9')
  assert hosts._bind(address) == '[::]:9'


def test_what_counts_as_a_lost_process(monkeypatch):
  gone = jax.errors.JaxRuntimeError('UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:5')
  wrapped = CheckpointError('saving failed')
  wrapped.__cause__ = gone
  assert hosts.lost(gone) is None  # a single process has nobody to lose
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  assert isinstance(hosts.lost(gone), Lost) and isinstance(hosts.lost(wrapped), Lost)
  lost = Lost('a batch: process 1 did not come')
  assert hosts.lost(lost) is lost
  for error in (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory'), RuntimeError('NCCL'),
                CheckpointError('no space')):
    assert hosts.lost(error) is None


def test_one_process_needs_nobody(tmp_path):
  hosts.meet('a batch', 0.0)
  hosts.require_same({'optim.lr': 0.1})
  hosts.require_shared(tmp_path)
  hosts.leave()
  assert hosts.share('x') == ['x'] and list(tmp_path.iterdir()) == []
