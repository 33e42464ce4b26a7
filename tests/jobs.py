"""Jobs of several real processes on one machine: `experiments.gpt2`, four fake devices each, faults put in by code."""

import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import fake_devices
import tiny

from lm import logs

ROOT = pathlib.Path(__file__).parent.parent
LAST = 400  # steps: more than any job here comes to before its fault
PROGRAM = """
import os, sys, time
ME = {index}
sys.path.insert(0, 'tests')
import fake_devices
fake_devices.use({devices})
from experiments import cli, gpt2
from lm import checkpoint, hosts, loop, pretrain, run
from lm.data import loader

def at(step, act):
  batches = loader.train_batches
  def some(data, sharding, start=0):
    for n, batch in enumerate(batches(data, sharding, start), start + 1):
      if n == step:
        act()
      yield batch
  loader.train_batches = some

{fault}
cli.main('', gpt2.CONFIGS, pretrain.task)
"""


def port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def argv(corpus, workdir):
  return tiny.argv(config='quickstart', workdir=workdir, data__corpus=corpus, optim__steps=LAST, checkpoint__every=10,
                   loop__eval_every=10, mesh__data=2, mesh__fsdp=4, model__dropout__hidden=0.1)


class Job:
  """Two processes; `fault` is Python that runs before `main` in each, with ME, `at` and the modules of PROGRAM.

  `flags` are of both; {i: [flags]} of `own` and {i: {variable: value}} of `env` are of one process.
  """

  def __init__(self, workdir, corpus, *flags, fault='', own=(), env=(), heartbeat=10, wait=60, processes=2, join=True):
    self.workdir, address = pathlib.Path(workdir), f'127.0.0.1:{port()}'
    # Compiled quickly: as long as one process takes longer than the other counts as waiting.
    devices = {'XLA_FLAGS': fake_devices.QUICK, 'JAX_PLATFORMS': 'cpu',
               'JAX_COMPILATION_CACHE_DIR': str(pathlib.Path(corpus).parent / 'cache'),
               'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'TF_CPP_MIN_LOG_LEVEL': '1'}
    self.processes, self._out = [], {}
    for i in range(processes):
      flags_i = [*argv(corpus, workdir), f'--heartbeat_s={heartbeat}', f'--wait_s={wait}', *flags,
                 *dict(own).get(i, [])]
      if join:
        flags_i.append(f'--distributed={address},{processes},{i}')
      program = PROGRAM.format(index=i, fault=fault, devices=8 // processes)
      self.processes.append(subprocess.Popen(
          [sys.executable, '-c', program, *flags_i], cwd=ROOT, env=os.environ | devices | dict(env).get(i, {}),
          text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for i, process in enumerate(self.processes):
      if process.poll() is None:
        process.kill()
      if i not in self._out:
        process.communicate()

  def reach(self, step):
    """Waits until metrics.jsonl has that step."""
    while len(logs.read(self.workdir)) < step:
      assert all(p.poll() is None for p in self.processes), self.finish()
      time.sleep(0.01)

  def send(self, index, number):
    os.kill(self.processes[index].pid, number)

  def finish(self, timeout=60):
    """([exit statuses], [stderr of each], [seconds from now]); who is there after `timeout` is killed: -9."""
    began, ended = time.monotonic(), {}
    readers = [threading.Thread(target=self._drain, args=(i, began, ended)) for i in range(len(self.processes))]
    for reader in readers:
      reader.start()
    for reader in readers:
      reader.join(max(0.0, timeout - (time.monotonic() - began)))
    for process in self.processes:
      if process.poll() is None:
        process.kill()
    for reader in readers:
      reader.join()
    seconds, errors = zip(*(ended[i] for i in range(len(readers))), strict=True)
    return [p.returncode for p in self.processes], list(errors), list(seconds)

  def output(self, index):
    """stdout of a process; after `finish`."""
    return self._out[index]

  def _drain(self, index, began, ended):
    self._out[index], err = self.processes[index].communicate()
    ended[index] = time.monotonic() - began, err
