"""The state that a run of `lm.run` begins or goes on with, on its mesh.

c, task, parts: a `run.Config`, `run.Task` and `run.Parts`.
"""

import pathlib
from typing import Any

import jax

from lm import checkpoint, params, train, weights
from lm.data import loader
from lm.errors import CheckpointError


def abstract(task: Any, parts: Any) -> train.State:
  """The state as `jax.ShapeDtypeStruct`s on the mesh."""
  first = lambda: train.init(task.specs, parts.tx, parts.trainable, jax.random.key(0), task.around.carry)
  shapes = jax.eval_shape(first)
  return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, parts.state)


def resume(c: Any, task: Any, parts: Any, abstract: train.State, data: Any, workdir: pathlib.Path,
           resume_with_changes: bool) -> tuple[int, train.State, dict[str, Any]]:
  """(step, state, meta): restored from the workdir, or else `first`'s.

  Frozen leaves are not in checkpoints: they are made again, and must be those that the run began with.

  Raises:
    CheckpointError: they are not. DataError: the data are not those that it was trained on.
  """
  kept = abstract.replace(frozen=jax.tree.map(lambda x: None, abstract.frozen))
  restored = checkpoint.restore(workdir / 'checkpoints', kept)
  frozen = bool(jax.tree.leaves(abstract.frozen))
  if restored is None:
    state = first(c, task, parts)
    meta = {'evaluations': [], 'wall_s': 0.0, 'finished': False}
    return 0, state, meta | {'base': _fingerprint(task, state) if frozen else ''}
  step, state, meta = restored
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
    return jax.jit(make, out_shardings=parts.state)(key)
  base = task.base
  given = weights.params_from(c.init_from, params.abstract(base.specs if base else task.specs), partial=bool(base))
  more = [base.more()] if base and base.more else []
  make = lambda p, key, *more: train.state_of(base.graft(p, task.specs, key, *more) if base else p, parts.tx,
                                              parts.trainable, task.around.carry)
  if not base:
    given = jax.device_put(given, params.join(parts.state.params, parts.state.frozen))
  return jax.jit(make, out_shardings=parts.state)(given, key, *more)


def _fingerprint(task, state):
  return weights.fingerprint(task.base.own(state.frozen) if task.base else state.frozen)
