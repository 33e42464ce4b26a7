"""A trainer that is killed, stopped or finds a damaged checkpoint ends where an uninterrupted one does, bit for bit.

Real processes of `python -m experiments.gpt2`, a tiny GPT with dropout, a checkpoint every second step. The numbers of
metrics.jsonl are compared as `float.hex` of what was parsed: JSON keeps doubles exactly.
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny

from lm import checkpoint, logs, pretrain

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 80
KILLS, MID_SAVE = 8, 3  # how many, and how many of them provably while a checkpoint is being written
EXACT = ('loss', 'accuracy', 'objective', 'grad_norm', 'skipped', 'learning_rate', 'tokens', 'val_loss', 'val_accuracy',
         'val_bits_per_byte')


class Trainer:
  """Starts runs of one config; restarts are cheap through a compilation cache of their own."""

  def __init__(self, root):
    self.root = root
    self.corpus = tiny.write_text(root / 'text.txt', lines=400)
    self.env = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_COMPILATION_CACHE_DIR')} | {
        'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': str(root / 'cache'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'XDG_CACHE_HOME': str(root / 'cache')}

  def start(self, workdir, *more, cached=True):
    flags = tiny.argv(config='shakespeare_char_cpu', workdir=workdir, data__corpus=self.corpus, optim__steps=STEPS,
                      loop__eval_every=20, model__layers=2, model__dropout__hidden=0.2, model__dropout__attention=0.1,
                      model__dropout__embedding=0.1, optim__warmup=5)
    env = self.env | ({} if cached else {'JAX_ENABLE_COMPILATION_CACHE': 'false'})
    return subprocess.Popen([sys.executable, '-m', 'experiments.gpt2', *flags, *more], cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

  def run(self, workdir, *more):
    process = self.start(workdir, *more)
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.fixture(scope='module')
def trainer(tmp_path_factory):
  return Trainer(tmp_path_factory.mktemp('trainer'))


@pytest.fixture(scope='module')
def straight(trainer):
  """The workdir of the uninterrupted run. Not to be changed."""
  code, _, err = trainer.run(trainer.root / 'straight')
  assert code == 0, err
  assert err == ''
  return trainer.root / 'straight'


def exact(workdir):
  return [(r['step'], {k: float.hex(float(r[k])) for k in EXACT if k in r}) for r in logs.read(workdir)]


def sha(workdir):
  """(step, sha256 of the whole restored state) of the newest checkpoint."""
  c = tiny.gpt_config(workdir)
  return tiny.state_sha(c, pretrain.task(c), workdir)


def equal(workdir, straight):
  got = exact(workdir)
  assert [step for step, _ in got] == list(range(1, STEPS + 1)), 'a step is missing or there twice'
  assert got == exact(straight)
  assert sha(workdir) == sha(straight)


def wait_for(process, condition):
  """Until the condition holds; False if the process ends first."""
  while process.poll() is None:
    if condition():
      return True
    time.sleep(0.002)
  return False


def newest_row(workdir):
  rows = logs.read(workdir)
  return rows[-1]['step'] if rows else 0


def unsealed(workdir):
  """Directories of saves under way: Orbax's temporary ones, or written but without a seal."""
  folder = workdir / 'checkpoints'
  names = os.listdir(folder) if folder.exists() else []
  return [n for n in names if '.orbax-checkpoint-tmp' in n or (n.isdigit() and f'{n}.sha256.json' not in names)]


def kill(process):
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()


def test_sigkill_at_random_moments(trainer, straight, tmp_path):
  rng = random.Random(0)
  hits = kills = reached = 0
  while kills < KILLS or hits < MID_SAVE:
    process = trainer.start(tmp_path)
    target = min(reached + rng.randint(2, 8), STEPS - 8)
    alive = wait_for(process, lambda: newest_row(tmp_path) >= target)  # noqa: B023
    if kills % 2:
      alive = alive and wait_for(process, lambda: unsealed(tmp_path))
    else:
      time.sleep(rng.uniform(0, 0.2))
    assert alive, process.communicate()
    kill(process)
    kills += 1
    hits += bool(unsealed(tmp_path))
    sealed = checkpoint.steps(tmp_path / 'checkpoints')
    assert all(checkpoint.seal.check(tmp_path / 'checkpoints', s) is None for s in sealed)
    reached = sealed[-1] if sealed else 0
    assert kills < 30
  code, out, err = trainer.run(tmp_path)
  assert (code, err) == (0, '')
  assert f'resumed from step {reached} ' in out
  print(f'{kills} SIGKILLs, {hits} in mid-save')
  assert unsealed(tmp_path) == []
  equal(tmp_path, straight)


def test_sigkill_while_compiling_and_before(trainer, straight, tmp_path):
  """No checkpoint yet: the next start begins at step 1."""
  for moment in ('lock', 'config.json', 'tensorboard'):
    process = trainer.start(tmp_path, cached=False)
    assert wait_for(process, lambda: (tmp_path / moment).exists())  # noqa: B023
    kill(process)
  assert trainer.run(tmp_path)[0] == 0
  equal(tmp_path, straight)


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_save_and_resume(trainer, straight, tmp_path, number, code):
  for target in (7, 40):
    process = trainer.start(tmp_path)
    assert wait_for(process, lambda: newest_row(tmp_path) >= target)  # noqa: B023
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code, err
    step = checkpoint.steps(tmp_path / 'checkpoints')[-1]
    assert err.startswith('error: ') and err.endswith(f': step {step} is saved; start again to resume\n'), err
    assert newest_row(tmp_path) == step >= target
  assert trainer.run(tmp_path)[0] == 0
  equal(tmp_path, straight)


@pytest.mark.parametrize('moment', ['lock', 'tensorboard'])
def test_sigterm_before_and_while_compiling(trainer, straight, tmp_path, moment):
  """From the lock on it stops at once; from the logs on (they are opened, then the step is compiled) after step 1."""
  process = trainer.start(tmp_path, cached=False)
  assert wait_for(process, lambda: (tmp_path / moment).exists())
  time.sleep(0.2)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate()
  assert process.returncode == 75, err
  assert err.split('\n')[-2].startswith('error: SIGTERM: ')
  # Python drops what is raised while it collects garbage, and says so; then, too, the run stops after step 1.
  assert err.count('\n') == 1 or err.startswith('Exception ignored in: <function _xla_gc_callback'), err
  if moment == 'tensorboard':
    assert checkpoint.steps(tmp_path / 'checkpoints') == [1]
  assert trainer.run(tmp_path)[0] == 0
  equal(tmp_path, straight)


def flip_a_bit(workdir, step):
  path = max((workdir / 'checkpoints' / str(step)).rglob('*'), key=lambda p: p.stat().st_size * p.is_file())
  data = bytearray(path.read_bytes())
  data[len(data) // 3] ^= 8
  path.write_bytes(data)


def test_one_flipped_bit(trainer, straight, tmp_path):
  """In the newest checkpoint: sampling and the next start use the one before, and say so."""
  process = trainer.start(tmp_path)
  assert wait_for(process, lambda: newest_row(tmp_path) >= 15)
  kill(process)
  before, newest = checkpoint.steps(tmp_path / 'checkpoints')[-2:]
  flip_a_bit(tmp_path, newest)
  sample = subprocess.run([sys.executable, '-m', 'scripts.sample', f'--model={tmp_path}', '--prompt=the quick',
                           '--max_new=4'], cwd=ROOT, env=trainer.env, capture_output=True, text=True, check=False)
  assert sample.returncode == 0, sample.stderr
  assert sample.stdout.startswith('the quick')
  assert f'rejected step {newest} ' in sample.stderr and f'using step {before} ' in sample.stderr
  code, out, err = trainer.run(tmp_path)
  assert (code, err) == (0, '')
  assert f'rejected step {newest} ' in out and f'using step {before} ' in out
  assert f'resumed from step {before} ' in out
  equal(tmp_path, straight)


def test_second_writer_and_second_run(trainer, straight, tmp_path):
  first = trainer.start(tmp_path)
  assert wait_for(first, lambda: newest_row(tmp_path) >= 3)
  os.kill(first.pid, signal.SIGSTOP)
  try:
    code, _, err = trainer.run(tmp_path)
  finally:
    os.kill(first.pid, signal.SIGCONT)
  assert code == 4
  assert 'is in use by host' in err and f'pid {first.pid};' in err and err.count('\n') == 1
  out, err = first.communicate()
  assert (first.returncode, err) == (0, '')
  equal(tmp_path, straight)
  code, out, err = trainer.run(tmp_path)
  assert (code, err) == (0, '')
  assert out.startswith(f'already complete: step {STEPS} of {STEPS} in {tmp_path}; nothing was trained\n')
  code, _, err = trainer.run(tmp_path, '--set=optim.lr=0.5')
  assert code == 2
  assert 'optim.lr: 0.001 there, 0.5 now' in err
