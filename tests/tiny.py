"""Runs small enough for any test: a bigram model, flags that shrink a GPT, text, and ways to stop a run midway."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import signal

import jax
import numpy as np

from lm import budget, checkpoint, config, loop, nn, optim, params, pretrain, run
from lm.data import loader
from lm.losses import ar

# A GPT of one layer on bytes; `--set` for experiments.gpt2.
GPT = {'data.tokenizer': 'byte', 'data.split': 'tail', 'data.validation_fraction': '0.1', 'data.length': '16',
       'data.batch': '8', 'model.vocab': '258', 'model.length': '16', 'model.layers': '1', 'model.embed': '16',
       'model.heads': '2', 'model.kv_heads': '2', 'model.head_dim': '8', 'model.mlp': '32', 'optim.warmup': '1',
       'optim.steps': '6', 'loop.log_every': '1', 'loop.eval_every': '2', 'checkpoint.every': '2'}
SHARED = {}  # {what decides the program: (the task, so that its id stays its own, Parts)}
DEAF = -1  # no loss can be computed from such positions: see `task`


def argv(**flags):
  """Flags of experiments.gpt2 for `GPT` with changes: dots of a field are written as double underscores."""
  fields = GPT | {k.replace('__', '.'): str(v) for k, v in flags.items() if '__' in k}
  plain = [f'--{k}={v}' for k, v in flags.items() if '__' not in k]
  return [*plain, *(f'--set={k}={v}' for k, v in fields.items())]


def write_text(path: pathlib.Path, lines: int = 150) -> pathlib.Path:
  rng = random.Random(0)
  words = 'the quick brown fox jumps over lazy dogs while seven wizards box'.split()
  path.write_text('\n'.join(' '.join(rng.choice(words) for _ in range(8)) for _ in range(lines)), encoding='utf-8')
  return path


def quiet(model):
  """Without dropout; of a pair, both."""
  if hasattr(model, 'dropout'):
    return dataclasses.replace(model, dropout=nn.Dropout())
  return dataclasses.replace(model, **{f.name: quiet(getattr(model, f.name)) for f in dataclasses.fields(model)
                                       if dataclasses.is_dataclass(getattr(model, f.name))})


def make_config(corpus: pathlib.Path, **changes) -> run.Config:
  """12 steps, a row each, evaluation every 4, a checkpoint every 5."""
  c = run.Config(
      data=loader.Config(corpus=str(corpus), tokenizer='byte', split='tail', validation_fraction=0.1, length=16,
                         batch=8),
      optim=optim.Config(lr=0.1, steps=12, warmup=2), loop=loop.Config(log_every=1, eval_every=4),
      checkpoint=checkpoint.Config(every=5))
  return config.replace(c, **changes)


def task(vocab: int = 258, embed: int = 8, drop: float = 0.2) -> run.Task:
  """P(next | this) as a matrix of low rank, with dropout; the loss is NaN where a position is `DEAF`."""
  specs = {'embed': {'tokens': params.Spec((vocab, embed), ('vocab', 'embed'))},
           'unembed': params.Spec((vocab, embed), ('vocab', 'embed'))}

  def loss(rate):
    def apply(p, ids_BT, *, positions_BT, segments_BT, key):
      x_BTD = p['embed']['tokens'][ids_BT]
      x_BTD = nn.dropout(x_BTD, rate, key)
      return x_BTD * jax.numpy.where((positions_BT == DEAF).any(), jax.numpy.nan, 1.0)
    return lambda p, batch, key: ar.loss(p, batch, key, apply=apply, head=lambda q: q['unembed'], c=ar.Config())
  return run.Task(specs, loss(drop), loss(0.0), vocab, budget.Flops(6.0 * vocab * embed, 0.0))


def share_compiled(monkeypatch):
  """From here on equal runs share their jitted functions, and none measures the machine's peak."""
  build = run.build

  def shared(c, a_task, devices=None):
    what = (c.model, c.loss, c.data, c.peft) if isinstance(c, pretrain.Config) else id(a_task)
    key = c.optim, c.mesh, what
    if key not in SHARED:
      SHARED[key] = a_task, build(c, a_task, devices)
    return SHARED[key][1]
  monkeypatch.setattr(run, 'build', shared)
  monkeypatch.setattr(budget, 'peak_flops', lambda device: 1e9)


class Reached(BaseException):
  """The step would have been compiled now, for this state."""

  def __init__(self, state):
    super().__init__()
    self.state = state


def stop_before_the_step(monkeypatch):
  """From here on `run` ends in `Reached` where it would compile and train."""
  build = run.build

  def step(state, batch, key):
    raise Reached(state)
  monkeypatch.setattr(run, 'build', lambda *a: dataclasses.replace(build(*a), step=step))


@contextlib.contextmanager
def batches_through(monkeypatch, change):
  """Every training batch goes through change(step, batch) -> batch first."""
  original = loader.train_batches

  def changed(data, sharding, start=0):
    for n, batch in enumerate(original(data, sharding, start), start + 1):
      yield change(n, batch)
  with monkeypatch.context() as m:
    m.setattr(loader, 'train_batches', changed)
    yield


def signal_at(step: int, number: int = signal.SIGTERM):
  """For `batches_through`: the signal arrives while that step is made."""
  def change(n, batch):
    if n == step:
      os.kill(os.getpid(), number)
    return batch
  return change


def deaf_from(first: int, last: int = 10**9):
  """For `batches_through`: steps first..last cannot be learned from."""
  return lambda n, batch: batch.replace(
      positions_BT=batch.positions_BT * 0 + DEAF) if first <= n <= last else batch


def state_sha(c: run.Config, a_task: run.Task, workdir: pathlib.Path) -> tuple[int, str]:
  """(step, sha256 of every array of the newest sealed state: parameters, moments, counters)."""
  parts = run.build(c, a_task)
  shapes = jax.eval_shape(lambda: run.train.init(a_task.specs, parts.tx, parts.trainable, jax.random.key(0)))
  step, state, _ = checkpoint.restore(workdir / 'checkpoints', shapes, log=lambda line: None)
  digest = hashlib.sha256()
  for path, leaf in params.flatten(state).items():
    digest.update(path.encode() + np.asarray(leaf).tobytes())
  return step, digest.hexdigest()


def gpt_config(workdir: pathlib.Path) -> pretrain.Config:
  """The config of a finished experiments.gpt2 run."""
  return config.from_json(pretrain.Config, json.loads((workdir / 'config.json').read_text())['config'])
