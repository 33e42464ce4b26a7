"""One training run as a value: from a config and a task to a trained, sealed, summarised workdir.

A task says what is trained (specs, loss); everything an experiment shares with every other (data, optimizer, mesh,
checkpoints, logs, resuming) is here. The order is deliberate: all that can be refused is refused before compilation.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import (
  budget,
  checkpoint as checkpoint_lib,
  config,
  evaluate,
  host,
  logs,
  loop as loop_lib,
  optim as optim_lib,
  parallel,
  params,
  peft,
  sharding,
  start,
  summary,
  train,
)
from lm.data import loader
from lm.errors import ConfigError, Diverged
from lm.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
  """The fields that every experiment has; experiments add `model` and `loss`.

  Attributes:
    init_from: a workdir, an HF folder or a GGUF file whose parameters training starts from.
    seed: of the initial values, data order, dropout.
    skip_batches: (step, n): after that step the next n batches are left out, as PaLM did about a spike of the loss
      (arXiv:2204.02311 §5.1); go back before it with --restore_step.
    published: the number the paper or peer reports for `val_loss`, copied into summary.json.
  """

  data: loader.Config = loader.Config()
  optim: optim_lib.Config = optim_lib.Config()
  mesh: sharding.Config = sharding.Config()
  loop: loop_lib.Config = loop_lib.Config()
  checkpoint: checkpoint_lib.Config = checkpoint_lib.Config()
  init_from: str = ''
  seed: int = 0
  skip_batches: tuple[tuple[int, int], ...] = ()
  published: float | None = None

  def __post_init__(self):
    self.check_batch()
    if self.loop.eval_batch % self.mesh.rows:
      raise ConfigError(f'loop.eval_batch={self.loop.eval_batch} is not divisible by mesh.data x mesh.fsdp x mesh.pipe '
                        f'= {self.mesh.rows}; choose a multiple')
    if not 0 <= self.seed < 2**32:
      raise ConfigError(f'seed={self.seed}; expected 0 <= seed < 2**32')
    skips = self.skip_batches
    if any(step < 0 or n < 1 for step, n in skips) or len(dict(skips)) < len(skips):
      raise ConfigError(f'skip_batches={skips}; expected (step, batches) pairs of different steps from 0 on, each with '
                        'at least 1 batch')

  def check_batch(self) -> None:
    rows = self.optim.microbatches * self.mesh.rows
    if self.data.batch % rows:
      raise ConfigError(f'data.batch={self.data.batch} is not divisible by optim.microbatches x mesh.data x mesh.fsdp '
                        f'x mesh.pipe = {rows}; choose data.batch as a multiple of {rows}')

  @property
  def eval_batch(self) -> int:  # rows of an evaluation's batch
    return self.loop.eval_batch or self.data.batch


@dataclasses.dataclass(frozen=True)
class Base:
  """The model that `Config.init_from` gives, where training changes its tree or holds some of it still.

  Attributes:
    specs: of that model.
    freeze: pattern of leaves that do not train; '' = as `optim.freeze` says.
    graft: (parameters of `specs`, those of the task, key) -> parameters of the task; what `more()` reads comes fourth.
    own: of a tree of parameters, the part that `lm.weights` finds in a workdir: without what serves training alone.
  """

  specs: params.Tree
  freeze: str = ''
  graft: Callable[..., params.Tree] = peft.graft
  more: Callable[[], Any] | None = None
  own: Callable[[params.Tree], params.Tree] = lambda tree: tree


@dataclasses.dataclass(frozen=True)
class Around:
  """What a task does beside the optimizer's step on a batch.

  Attributes:
    data: (parts, first, data, workdir) -> the data with what a model must say of it before training; `first()` makes
      the state of step 0.
    program: (program, parts, data, workdir, start) -> a context of the `loop.Program` that runs in its place.
    updates: optimizer steps in a step of that program. tokens: that it computes on; 0 = data.batch x data.length.
    metrics: of its evaluation, where that is not the task's loss.
    carry: scalars that its steps hand on to each other, f32.
  """

  data: Callable[..., Any] | None = None
  program: Callable[..., Any] | None = None
  updates: int = 1
  tokens: int = 0
  metrics: tuple[str, ...] = ()
  carry: Any = None


@dataclasses.dataclass(frozen=True)
class Task:
  """What is trained.

  Attributes:
    specs: the parameter tree.
    loss: for training. eval_loss: the same without dropout; None where `around` evaluates.
    vocab: rows of the embedding: the tokenizer must fit it.
    flops: FLOPs of one training token.
    bind: the task once its tokenizer is known, where the losses need ids of special tokens; the same parameters.
    source: a module with the functions of `lm.data.loader` for `Config.data`.
    base: what training starts from, if that is not all of `specs`.
  """

  specs: params.Tree
  loss: train.Loss
  eval_loss: train.Loss | None
  vocab: int
  flops: budget.Flops
  bind: Callable[[Tokenizer], 'Task'] | None = None
  source: Any = loader
  base: Base | None = None
  around: Around = Around()


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
  config.check(c)
  mesh = sharding.make_mesh(c.mesh, devices)
  tx = optim_lib.make(c.optim, task.specs)
  trainable = start.trainable(c, task)
  places = train.shardings(task.specs, tx, trainable, mesh, c.mesh.zero, task.around.carry)
  layout = parallel.layout(mesh, c.mesh, task.specs, trainable)
  options = host.compiler_options(mesh.devices.flat[0].platform, params.count(task.specs))
  jit = functools.partial(jax.jit, compiler_options=options)
  norm = optim_lib.gradient_norm(c.optim, task.specs)
  step = jit(train.make_step(task.loss, tx, c.optim.microbatches, layout, norm), donate_argnums=0,
             out_shardings=(places, None))
  metrics = train.make_eval(task.eval_loss, layout)
  evaluate = jit(lambda state, batch, key: metrics(train.averaged(state), batch, key),
                 out_shardings=sharding.replicated(mesh))
  return Parts(mesh, tx, trainable, places, step, evaluate)


def run(c: Config, task: Task, workdir: str | os.PathLike, resume_with_changes: bool = False, resume: str = 'auto',
        restore_step: int | None = None) -> dict[str, Any]:
  """Trains in `workdir`, or resumes there, and returns what it writes to summary.json.

  Args:
    resume: 'auto', 'never', 'must': whether a run may or must be there. restore_step: resume from this sealed step.

  Raises:
    lm.errors.Error: see its subclasses; nothing that was sealed is lost.
  """
  began = time.perf_counter()
  workdir = pathlib.Path(os.path.abspath(workdir))
  if not str(workdir).isprintable():  # it is told in lines of logs
    raise ConfigError(f'--workdir: {str(workdir)!r} has a character that cannot be shown; choose another name')
  if workdir.exists() and not workdir.is_dir():
    raise ConfigError(f'--workdir: {workdir} is a file; expected a directory, or a new name; choose another --workdir')
  parts = build(c, task)
  abstract = start.abstract(task, parts)
  start.preflight(abstract)
  kept = abstract.replace(frozen=None)  # checkpoints hold no frozen weights
  nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
  steps = c.optim.steps // task.around.updates
  checkpoint_lib.preflight(workdir / 'checkpoints', nbytes, c.checkpoint, steps)
  with checkpoint_lib.lock(workdir), loop_lib.Signals() as signals, sharding.use(parts.mesh, c.mesh.sequence):
    changes = start.refuse(c, workdir, resume_with_changes, resume, restore_step)
    data = task.source.prepare(c.data, workdir / 'data', seed=c.seed)
    task.source.check(data, task.vocab)
    if task.bind:
      task = task.bind(data.tokenizer)
      parts = build(c, task)
    evaluate.check(c, task, parts, abstract, data)
    at, state, meta = start.resume(c, task, parts, abstract, data, workdir, resume_with_changes, restore_step)
    owed = at == steps and (not meta['evaluations'] or meta['evaluations'][-1][0] != at)  # its evaluation: `loop.fit`
    finished = meta['finished'] and start.completed(type(c), meta['config']) == config.to_json(c)
    if (at >= steps and not owed) or finished:
      logs.say(f'already complete: step {at} of {steps} in {workdir}; nothing was trained')
      return summary.write(c, task, workdir, at, meta)
    if at:
      logs.say(f'resumed from step {at} in {workdir}')
    fingerprint = data.fingerprint
    changes |= {f'fingerprint.{name}': values for name, values in loader.differences(
        meta.get('data', fingerprint), fingerprint).items() if values not in changes.values()}
    if task.around.data:
      data = task.around.data(parts, lambda: start.first(c, task, parts), data, workdir)
    with signals.deferred(), contextlib.ExitStack() as stack:
      _record(c, data, workdir, at, changes)
      evaluation = evaluate.make(c, task, parts, data) if task.eval_loss else None
      log = stack.enter_context(contextlib.closing(logs.Logs(workdir, steps, at)))
      saver = stack.enter_context(checkpoint_lib.Saver(workdir / 'checkpoints', c.checkpoint, at or None, log.say))
      batches = stack.enter_context(contextlib.closing(
          start.batches(c, task, data, sharding.batch_sharding(parts.mesh), at)))
      wall = lambda: meta['wall_s'] + time.perf_counter() - began
      tokens = summary.tokens(c, task, meta['tokens'], at)
      program = _program(c, task, parts, fingerprint, saver, evaluation, wall, tokens, meta['base'])
      if task.around.program:
        program = stack.enter_context(task.around.program(program, parts, data, workdir, at))
      _, evaluations = loop_lib.fit(program, c.loop, state, batches, at, meta['evaluations'], log, signals)
    end = evaluations[-1][0]
    done = {'evaluations': evaluations, 'wall_s': wall(), 'peak_bytes': summary.peak_bytes(), 'tokens': tokens(end)}
    return summary.write(c, task, workdir, end, done)


def _record(c, data, workdir, at, changes):
  """Makes the workdir stand on its own: the config, the tokenizer; a summary is there only once all is done."""
  if jax.process_index() == 0:
    if changes:
      logs.write_changes(workdir, at, changes)
    logs.write_config(workdir, config.to_json(c), data.names)
    data.tokenizer.save(workdir / 'tokenizer')
    (workdir / 'summary.json').unlink(missing_ok=True)


def _program(c, task, parts, fingerprint, saver, evaluation, wall, tokens, base):
  # All of it now, on the host: asking the device for a rate would wait for the step that it is busy with.
  rates = np.asarray(jax.jit(optim_lib.schedule(c.optim))(jnp.arange(c.optim.steps)))
  per_step = summary.tokens_per_step(c, task)
  finite = jax.jit(lambda s: jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(s.params)]).all())

  def save(step, state, evaluations, finished):
    if not finite(state):
      raise Diverged(f'step {step}: a parameter is not finite; the checkpoints before it are intact; lower optim.lr')
    meta = {'evaluations': evaluations, 'data': fingerprint, 'config': config.to_json(c), 'wall_s': wall(),
            'peak_bytes': summary.peak_bytes(), 'finished': finished, 'tokens': tokens(step), 'base': base}
    metrics = evaluations[-1][1] if evaluations and evaluations[-1][0] == step else {}
    saver.save(step, state.replace(frozen=None), meta, metrics)

  return loop_lib.Program(
      step=parts.step, evaluate=evaluation, save=save, poll=saver.poll, wait=saver.wait,
      steps=c.optim.steps // task.around.updates,
      key=jax.random.fold_in(jax.random.key(c.seed), 1), learning_rate=lambda n: float(rates[n]), elapsed=wall,
      tokens=tokens, tokens_per_step=per_step, flops_per_step=task.flops.total * per_step,
      peak_flops=budget.peak_flops(jax.local_devices()[0]) * parts.mesh.size, save_every=c.checkpoint.every,
      metric=c.checkpoint.metric, mode=c.checkpoint.mode)
