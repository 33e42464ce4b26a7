"""One training run as a value: from a config and a task to a trained, sealed, summarised workdir.

A task says what is trained (specs, loss); everything an experiment shares with every other (data, optimizer, mesh,
checkpoints, logs, resuming) is here. The order is deliberate: all that can be refused is refused before compilation.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import resource
import subprocess
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm import (
  budget,
  checkpoint as checkpoint_lib,
  config,
  logs,
  loop as loop_lib,
  optim as optim_lib,
  params,
  sharding,
  train,
  weights,
)
from lm.data import loader
from lm.errors import CheckpointError, ConfigError


@dataclasses.dataclass(frozen=True)
class Config:
  """The fields that every experiment has; experiments add `model` and `loss`.

  Attributes:
    init_from: a workdir, an HF folder or a GGUF file whose parameters training starts from.
    seed: of the initial values, data order, dropout.
    published: the number the paper or peer reports for `val_loss`, copied into summary.json.
  """

  data: loader.Config = loader.Config()
  optim: optim_lib.Config = optim_lib.Config()
  mesh: sharding.Config = sharding.Config()
  loop: loop_lib.Config = loop_lib.Config()
  checkpoint: checkpoint_lib.Config = checkpoint_lib.Config()
  init_from: str = ''
  seed: int = 0
  published: float | None = None

  def __post_init__(self):
    rows = self.optim.microbatches * self.mesh.data * self.mesh.fsdp
    if self.data.batch % rows:
      raise ConfigError(f'data.batch={self.data.batch} is not divisible by optim.microbatches x mesh.data x mesh.fsdp = '
                        f'{rows}; choose data.batch as a multiple of {rows}')


@dataclasses.dataclass(frozen=True)
class Task:
  """What is trained.

  Attributes:
    specs: the parameter tree.
    loss: for training. eval_loss: the same without dropout.
    vocab: rows of the embedding: the tokenizer must fit it.
    flops: FLOPs of one training token.
  """

  specs: params.Tree
  loss: train.Loss
  eval_loss: train.Loss
  vocab: int
  flops: budget.Flops


@dataclasses.dataclass(frozen=True)
class Parts:
  """The jitted pieces of a run on its mesh."""

  mesh: jax.sharding.Mesh
  tx: optax.GradientTransformation
  trainable: params.Tree
  state: train.State  # of NamedSharding
  step: Callable[..., Any]
  evaluate: Callable[..., Any]


def build(c: Config, task: Task, devices: list[jax.Device] | None = None) -> Parts:
  """Mesh, optimizer, shardings, and the jitted step and evaluation; compiles nothing yet."""
  mesh = sharding.make_mesh(c.mesh, devices)
  tx, trainable = optim_lib.make(c.optim, task.specs), optim_lib.trainable_mask(c.optim, task.specs)
  with sharding.use(mesh):
    places = train.shardings(task.specs, tx, trainable, mesh)
  step = jax.jit(train.make_step(task.loss, tx, c.optim.microbatches), donate_argnums=0, out_shardings=(places, None))
  evaluate = jax.jit(train.make_eval(lambda s, batch, key: task.eval_loss(params.join(s.params, s.frozen), batch, key)))
  return Parts(mesh, tx, trainable, places, step, evaluate)


def run(c: Config, task: Task, workdir: str | os.PathLike, resume_with_changes: bool = False) -> dict[str, Any]:
  """Trains in `workdir`, or resumes there, and returns what it writes to summary.json.

  Raises:
    lm.errors.Error: see its subclasses; nothing that was sealed is lost.
  """
  began = time.perf_counter()
  workdir = pathlib.Path(os.path.abspath(workdir))
  planned = 14 * params.count(task.specs)
  checkpoint_lib.preflight(workdir / 'checkpoints', planned, c.checkpoint)
  with checkpoint_lib.lock(workdir), loop_lib.Signals() as signals:
    _remember(c, workdir, resume_with_changes)
    data = loader.prepare(c.data, workdir / 'data', seed=c.seed)
    loader.check(data, task.vocab)
    data.tokenizer.save(workdir / 'tokenizer')
    parts = build(c, task)
    with sharding.use(parts.mesh):
      start, state, meta = _start(c, task, parts, data, workdir, resume_with_changes)
      if start >= c.optim.steps or (meta.get('finished') and not resume_with_changes):
        print(f'already complete: step {start} of {c.optim.steps} in {workdir}; nothing was trained', flush=True)
        return _summarise(c, task, workdir, meta['evaluations'], meta['wall_s'])
      with contextlib.ExitStack() as stack:
        log = logs.Logs(workdir, c.optim.steps, start)
        stack.callback(log.close)
        saver = stack.enter_context(checkpoint_lib.Saver(workdir / 'checkpoints', c.checkpoint, start or None, log.say))
        wall = lambda: meta['wall_s'] + time.perf_counter() - began
        program = _program(c, task, parts, data, saver, wall)
        batches = loader.train_batches(data, sharding.batch_sharding(parts.mesh), start)
        state, evaluations = loop_lib.fit(program, c.loop, state, batches, start, meta['evaluations'], log, signals)
      return _summarise(c, task, workdir, evaluations, wall())


def describe(c: Config, task: Task) -> str:
  """The parameter table, exact counts by group, training tokens and FLOPs; allocates nothing."""
  tokens = c.optim.steps * c.data.batch * c.data.length
  groups = [(name, f'{n:,}') for name, n in budget.counts(task.specs).items()]
  groups += [('training tokens', f'{tokens:,}'),
             ('FLOPs a token', f'{task.flops.total:.4g} ({task.flops.attention / task.flops.total:.1%} attention)'),
             ('training FLOPs', f'{tokens * task.flops.total:.4g}'),
             ('bytes, f32 with AdamW', budget.human(16.0 * params.count(task.specs), 'B'))]
  return budget.table(task.specs) + '\n\n' + budget.columns(groups)


def _program(c, task, parts, data, saver, wall):
  key = jax.random.fold_in(jax.random.key(c.seed), 1)
  eval_key = jax.random.fold_in(jax.random.key(c.seed), 2)
  schedule = optim_lib.schedule(c.optim)
  finite = jax.jit(lambda s: jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(s.params)]).all())

  def evaluate(state):
    sums = None
    for batch in loader.eval_batches(data, 'validation', c.data.batch, sharding.batch_sharding(parts.mesh)):
      sums = parts.evaluate(state, batch, eval_key, sums)
    return _validation(jax.device_get(sums), data)

  def save(step, state, evaluations, finished):
    meta = {'evaluations': evaluations, 'data': data.fingerprint, 'config': config.to_json(c), 'wall_s': wall(),
            'finished': finished}
    metrics = evaluations[-1][1] if evaluations and evaluations[-1][0] == step else {}
    saver.save(step, state, meta, metrics, finite=bool(finite(state)))

  devices = parts.mesh.devices.ravel()
  return loop_lib.Program(
      step=parts.step, evaluate=evaluate, save=save, steps=c.optim.steps, key=key,
      learning_rate=lambda n: float(schedule(n)), tokens_per_step=c.data.batch * c.data.length,
      flops_per_step=task.flops.total * c.data.batch * c.data.length,
      peak_flops=budget.peak_flops(devices[0]) * len(devices), save_every=c.checkpoint.every,
      metric=c.checkpoint.metric, mode=c.checkpoint.mode)


def _validation(sums, data):
  """Sums over the validation split -> 'val_<metric>' means, and bits per byte of its raw text."""
  values = {f'val_{k}': float(t.total) / max(float(t.weight), 1e-9) for k, t in sums.items()}
  if 'loss' in sums and data.utf8_bytes('validation'):
    values['val_bits_per_byte'] = float(sums['loss'].total) / math.log(2) / data.utf8_bytes('validation')
  return values


def _start(c, task, parts, data, workdir, resume_with_changes):
  """(step, state, meta): restored, imported or initialised on the mesh."""
  specs_like = jax.eval_shape(lambda: train.init(task.specs, parts.tx, parts.trainable, jax.random.key(0)))
  abstract = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), specs_like, parts.state)
  restored = checkpoint_lib.restore(workdir / 'checkpoints', abstract)
  if restored is not None:
    step, state, meta = restored
    if not resume_with_changes:
      loader.check_fingerprint(meta['data'], data.fingerprint)
    print(f'resumed from step {step} in {workdir}', flush=True)
    return step, state, meta
  key = jax.random.fold_in(jax.random.key(c.seed), 0)
  if c.init_from:
    p = weights.params_from(c.init_from, params.abstract(task.specs))
    state = jax.jit(functools.partial(train.state_of, tx=parts.tx, trainable=parts.trainable), out_shardings=parts.state)(p)
  else:
    state = jax.jit(lambda k: train.init(task.specs, parts.tx, parts.trainable, k), out_shardings=parts.state)(key)
  return 0, state, {'evaluations': [], 'wall_s': 0.0}


def _remember(c, workdir, resume_with_changes):
  """Writes config.json; refuses another config in a workdir that has one."""
  path = workdir / 'config.json'
  new = config.to_json(c)
  if path.exists():
    try:
      old = json.loads(path.read_text(encoding='utf-8'))['config']
    except (ValueError, KeyError) as error:
      raise CheckpointError(f'{path}: not a config that this package wrote ({error}); choose another --workdir') from error
    changed = _differences(old, new)
    if changed and not resume_with_changes:
      raise ConfigError(f'--workdir: {workdir} was made with another config: {"; ".join(changed)}; choose another '
                        '--workdir, or pass --resume_with_changes')
  record = {'config': new, 'git': _git(), 'packages': _packages(), 'devices': [str(d) for d in jax.devices()]}
  part = path.with_suffix('.part')
  part.write_text(json.dumps(record, indent=1), encoding='utf-8')
  os.replace(part, path)


def _differences(old, new, prefix=''):
  lines = []
  for key in sorted(old.keys() | new.keys()):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      lines += _differences(a, b, f'{prefix}{key}.')
    elif json.dumps(a) != json.dumps(b):
      lines.append(f'{prefix}{key}: {a!r} there, {b!r} now')
  return lines


def _summarise(c, task, workdir, evaluations, wall):
  rows = [r for r in logs.read(workdir) if 'tokens_per_s' in r]
  last = rows[-1] if rows else {}
  tokens = c.optim.steps * c.data.batch * c.data.length
  steps = evaluations[-1][0] if evaluations else 0
  summary = (evaluations[-1][1] if evaluations else {}) | {
      'steps': steps, 'tokens': steps * c.data.batch * c.data.length, 'wall_s': wall,
      'tokens_per_s': last.get('tokens_per_s'), 'mfu': last.get('mfu'), 'peak_bytes': _peak_bytes(),
      'parameters': params.count(task.specs), 'published': c.published,
      'best': _best(evaluations, c.checkpoint),
      'planned': {'steps': c.optim.steps, 'tokens': tokens, 'flops': tokens * task.flops.total},
  }
  (workdir / 'summary.json').write_text(json.dumps(summary, indent=1), encoding='utf-8')
  logs.curves(workdir)
  return summary


def _best(evaluations, c):
  values = [(v[c.metric], step) for step, v in evaluations if c.metric in v]
  if not values:
    return None
  value, step = (min if c.mode == 'min' else max)(values)
  return {'step': step, c.metric: value}


def _peak_bytes():
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('peak_bytes_in_use', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _packages():
  names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'sentencepiece')
  return {name: importlib.metadata.version(name) for name in names}


def _git():
  """Commit of this source tree, with '+' if it has changes; None outside a checkout."""
  def git(*args):
    return subprocess.run(['git', *args], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent, check=True)
  try:
    return git('rev-parse', 'HEAD').stdout.strip() + ('+' if git('status', '--porcelain').stdout.strip() else '')
  except (OSError, subprocess.CalledProcessError):
    return None
