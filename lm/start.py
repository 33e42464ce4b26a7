"""The state that a run of `lm.run` begins or goes on with, on its mesh.

c, task, parts: a `run.Config`, `run.Task` and `run.Parts`.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
from typing import Any

import jax

from lm import checkpoint, config, host, logs, optim, params, sharding, summary, train, weights
from lm.data import loader
from lm.errors import CheckpointError, ConfigError


def trainable(c: Any, task: Any) -> params.Tree:
  """Tree of bools: what trains, by the task's pattern or else `optim.freeze`; raises as `optim.trainable_mask`."""
  freeze = task.base and task.base.freeze or c.optim.freeze
  return optim.trainable_mask(dataclasses.replace(c.optim, freeze=freeze), task.specs)


def abstract(task: Any, parts: Any) -> train.State:
  """The state as `jax.ShapeDtypeStruct`s on the mesh."""
  first = lambda: train.init(task.specs, parts.tx, parts.trainable, jax.random.key(0), task.around.carry)
  shapes = jax.eval_shape(first)
  return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, parts.state)


def preflight(state: train.State) -> None:
  """Refuses a state, of ShapeDtypeStructs, that alone is more than the memory of its devices.

  A step takes more, gradients and activations: `scripts.compile_for` says how much.
  """
  leaves = jax.tree.leaves(state)
  on_one = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
  devices = [device for device in leaves[0].sharding.mesh.devices.flat if device.process_index == jax.process_index()]
  together = len(devices) if devices[0].platform == 'cpu' else 1  # devices of a CPU are parts of one memory
  limit, gib = host.memory(devices[0]), 2 ** 30
  if on_one * together > limit:
    raise ConfigError(
        f'mesh: parameters and the optimizer\'s state take {on_one * together / gib:.3g} GiB of the '
        f'{limit / gib:.3g} GiB of {devices[0].device_kind}; expected less, as a step takes more still; raise '
        'mesh.fsdp, mesh.tensor or mesh.pipe on more devices, train fewer parameters (experiments/lora.py), or take a '
        'smaller model')


def refuse(c: Any, workdir: pathlib.Path, resume_with_changes: bool, resume: str, restore_step: int | None
           ) -> dict[str, tuple[Any, Any]]:
  """{field: (trained with, now)} where it may differ. Refuses what can be told before any text is read.

  Raises:
    ConfigError: another config than the one trained here, no model at `c.init_from`; what `require` raises.
  """
  sealed = checkpoint.steps(workdir / 'checkpoints')
  trained = bool(sealed or logs.read(workdir))
  require(workdir, trained, resume, restore_step)
  complete = functools.partial(completed, type(c))
  differing, note = logs.check_config(workdir, config.to_json(c), complete)
  if sealed and not (workdir / 'config.json').exists():
    saved = checkpoint.read_meta(workdir / 'checkpoints', sealed[-1])['config']
    differing = logs.differences(complete(saved), config.to_json(c))
  if differing and trained and not resume_with_changes:
    raise ConfigError(f'--workdir: {workdir} was trained with another config: {logs.beside(differing)}; choose another '
                      '--workdir, or pass --resume_with_changes')
  if note and trained:
    logs.say(note)
  if c.init_from and not sealed:
    try:
      weights.kind_of(c.init_from)
    except ConfigError as error:
      raise ConfigError(f'init_from={error}') from error
  return differing if trained else {}


def completed(kind: type, saved: Any) -> Any:
  """A saved config with the fields that it was too old to have; as it is where it has what is no more."""
  try:
    return config.to_json(config.from_json(kind, saved))
  except ConfigError:
    return saved


def require(workdir: pathlib.Path, trained: bool, resume: str, restore_step: int | None) -> None:
  """Refuses a workdir that is not as `resume` ('auto': either; 'never', 'must') and `restore_step` expect it.

  Raises:
    ConfigError: `trained` but never to be resumed; no such step. CheckpointError: must resume, and nothing is there.
  """
  sealed = checkpoint.steps(workdir / 'checkpoints')
  have = f'sealed steps: {", ".join(map(str, sealed)) or "none"}'
  if trained and resume == 'never':
    raise ConfigError(f'--resume=never: {workdir} holds a run ({have}); expected none; choose another --workdir, or '
                      'pass --resume=auto')
  if not sealed and resume == 'must':
    raise CheckpointError(f'--resume=must: {workdir} has no checkpoint; expected a run to resume; correct --workdir, '
                          'or pass --resume=auto to begin one')
  if restore_step is not None and restore_step not in sealed:
    raise ConfigError(f'--restore_step={restore_step}: not in {workdir} ({have}); expected a sealed step; name one')


def resume(c: Any, task: Any, parts: Any, abstract: train.State, data: Any, workdir: pathlib.Path,
           resume_with_changes: bool, restore_step: int | None) -> tuple[int, train.State, dict[str, Any]]:
  """(step, state, meta): restored from the workdir's newest intact step, or `restore_step`; or else `first`'s.

  Frozen leaves are not in checkpoints: they are made again, and must be those that the run began with.

  Raises:
    CheckpointError: they are not. DataError: the data are not those that it was trained on.
  """
  kept = abstract.replace(frozen=jax.tree.map(lambda x: None, abstract.frozen))
  restored = checkpoint.restore(workdir / 'checkpoints', kept, restore_step)
  frozen = bool(jax.tree.leaves(abstract.frozen))
  if restored is None:
    state = first(c, task, parts)
    meta = {'evaluations': [], 'wall_s': 0.0, 'finished': False, 'tokens': 0}
    return 0, state, meta | {'base': _fingerprint(task, state) if frozen else ''}
  step, state, meta = restored
  meta.setdefault('tokens', step * summary.tokens_per_step(c, task))  # of a checkpoint from before it was counted
  if early := set(c.skip_batches) - {tuple(pair) for pair in meta['config'].get('skip_batches', ())}:
    if (first_step := min(early)[0]) < step:
      raise ConfigError(f'skip_batches: {min(early)} lies before step {step}, where this run resumes; expected pairs '
                        f'from there on; pass --restore_step=N of a sealed step up to {first_step}')
  if not resume_with_changes:
    loader.check_fingerprint(meta['data'], data.fingerprint)
  if frozen:
    state = state.replace(frozen=first(c, task, parts).frozen)
    if _fingerprint(task, state) != meta['base']:
      raise CheckpointError(f'init_from={c.init_from}: other weights than this run began with; expected those, as its '
                            'checkpoints hold only what trains; restore that model, or choose another --workdir')
  return step, state, meta


def first(c: Any, task: Any, parts: Any) -> train.State:
  """The state at step 0: initialised, or grown from what `c.init_from` gives."""
  key = jax.random.fold_in(jax.random.key(c.seed), 0)
  if not c.init_from:
    make = lambda key: train.init(task.specs, parts.tx, parts.trainable, key, task.around.carry)
    return params.jit_once(make, out_shardings=parts.state)(key)
  base, specs = task.base, task.base.specs if task.base else task.specs
  with sharding.use(sharding.alone()):  # a workdir's model is read, merged and fingerprinted on one device
    given = weights.params_from(c.init_from, params.abstract(specs), bool(base), getattr(c, 'model', None))
    more = [base.more()] if base and base.more else []
  if jax.process_count() > 1:  # a device gives nothing to those of another process
    given, more = jax.device_get((given, more))
  given = jax.device_put(given, sharding.shardings(specs, parts.mesh, fsdp=c.mesh.zero == 3))
  more = [jax.device_put(tree, sharding.like(tree, specs, parts.mesh)) for tree in more]
  make = lambda p, key, *more: train.state_of(base.graft(p, task.specs, key, *more) if base else p, parts.tx,
                                              parts.trainable, task.around.carry)
  return params.jit_once(make, out_shardings=parts.state)(given, key, *more)


def batches(c: Any, task: Any, data: Any, sharding: jax.sharding.Sharding, at: int) -> Iterator[Any]:
  """Endless batches of steps `at` + 1, `at` + 2, ..., without those that `c.skip_batches` leaves out."""
  ahead = lambda step: sum(n for after, n in c.skip_batches if after <= step)
  made = lambda step: task.source.train_batches(data, sharding, step + ahead(step))
  if all(after <= at for after, _ in c.skip_batches):
    return made(at)

  def parts():
    starts = [at, *sorted(after for after, _ in c.skip_batches if after > at), None]
    for start, stop in itertools.pairwise(starts):
      with contextlib.closing(made(start)) as part:
        yield from itertools.islice(part, stop and stop - start)
  return parts()


def _fingerprint(task, state):
  return weights.fingerprint(task.base.own(state.frozen) if task.base else state.frozen)
