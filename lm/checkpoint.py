"""Checkpoints: asynchronous, sharded, sealed (see `lm.seal`), restored onto any mesh and any number of hosts.

A step directory is one Orbax tree of the state's leaves as nested dicts of strings: 'params/blocks/attn/q',
'opt_state/0/mu/blocks/attn/q', 'step'. Holes (None) and containers (tuples, named tuples) are not stored: they come
from the abstract state of whoever restores. What else there is (metrics, metadata, leaf shapes) is in the step's seal.
`Saver`, `restore` and `restore_params` are collective: every process calls them, on one shared file system.
"""

from collections.abc import Iterator
from concurrent import futures
import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import re
import socket
from typing import Any, Literal, Self

from flax import traverse_util
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from lm import disk, ema, hosts, params, seal
from lm.errors import CheckpointError, ConfigError

FORMAT = 1
_SHOWN = 4  # items of a list in one message
_READ_S = 3600  # the others wait while process 0 reads all of a step, to seal or to verify it
_NONE, _BROKEN = -1, -2  # what process 0 broadcasts when it has no step
_kind = lambda x: f'{x.dtype}{list(x.shape)}'
Tree = params.Tree
Path = str | os.PathLike


@dataclasses.dataclass(frozen=True)
class Config:
  """Save each `every` steps; keep the `keep` newest, `keep_best` best by `metric` and multiples of `keep_every` > 0."""

  every: int = 1000
  keep: int = 2
  keep_best: int = 1
  keep_every: int = 0
  metric: str = 'val_loss'
  mode: Literal['min', 'max'] = 'min'

  def __post_init__(self):
    for name, least in (('every', 1), ('keep', 1), ('keep_best', 0), ('keep_every', 0)):
      if getattr(self, name) < least:
        raise ConfigError(f'checkpoint.{name}: {getattr(self, name)}; expected at least {least}')
    if self.keep_every % self.every:
      raise ConfigError(f'checkpoint.keep_every: {self.keep_every}; expected a multiple of every={self.every}')


class Saver:
  """Writes sealed steps into one directory. A context manager; leaving it waits for the save under way.

  `start` is the step that this run continues from (None: from nothing). Opening removes what an interrupted run left
  behind and moves sealed steps newer than `start`, which this run will write again, into `abandoned/`.
  A save that fails in the background raises CheckpointError at the next `save`, `poll`, `wait` or `close`.
  """

  def __init__(self, directory: Path, c: Config, start: int | None, log: seal.Log = print):
    self._directory, self._c, self._log = _absolute(directory), c, log
    self._newest = -1 if start is None else start
    self._pending: futures.Future | None = None
    with disk.failing(f'--workdir: cannot open {self._directory} for saving', disk.WRITABLE):
      self._directory.mkdir(parents=True, exist_ok=True)
      if jax.process_index() == 0:
        seal.clean(self._directory, log)
        seal.abandon(self._directory, self._newest, log)
    # Created in the background, a directory that cannot be leaves threads that hold up the exit for many minutes.
    self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), async_options=ocp.options.AsyncOptions(
        create_directories_asynchronously=False))
    self._thread = futures.ThreadPoolExecutor(1, 'seal')

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind, error, trace):
    try:
      self.close()
    except CheckpointError as failure:
      if error is None:
        raise
      self._log(f'error: {failure}')  # the error that ended the run stays the one that is raised

  def save(self, step: int, state: Tree, meta: dict, metrics: dict[str, float], finite: bool = True) -> bool:
    """Starts saving `state` and returns once the state may be donated; sealing and pruning follow in the background.

    Waits first for the save before this one. `meta` must be plain JSON. The newest sealed step, saved again, gets its
    new `meta` and `metrics` alone. Returns whether a save began: a state that is not `finite` is not saved.

    Raises:
      CheckpointError: this save or the one before failed, or `step` is older than the newest.
    """
    if not finite:
      return False
    self.wait()
    if step < self._newest:
      raise CheckpointError(f'{self._directory}: step {step}; expected one newer than {self._newest}; restore it first')
    leaves = params.flatten(state)
    record = json.loads(json.dumps({
        'format_version': FORMAT, 'step': step, 'meta': meta, 'metrics': {k: float(v) for k, v in metrics.items()},
        'leaves': {path: _kind(x) for path, x in leaves.items()}}))
    with self._saving(step):
      if step == self._newest:
        if jax.process_index() == 0:
          seal.amend(self._directory, step, record)
        return False
      self._orbax.save(self._directory / str(step),
                       args=ocp.args.PyTreeSave(traverse_util.unflatten_dict(leaves, sep='/')))
    self._pending = self._thread.submit(self._finish, step, record)
    return True

  def poll(self) -> None:
    """Raises the failure of a save that has ended, if there is one; never waits. Call it every step."""
    if self._pending is not None and self._pending.done():
      self.wait()

  def wait(self) -> None:
    """Returns when the last save is sealed and old steps are pruned."""
    pending, self._pending = self._pending, None
    if pending is not None:
      pending.result()

  def close(self) -> None:
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      self._orbax.close()

  def _finish(self, step, record):
    c = self._c
    with self._saving(step):
      self._orbax.wait_until_finished()
      if jax.process_index() == 0:
        seal.write(self._directory, step, record)
        seal.prune(self._directory, seal.metrics(self._directory, c.metric), c.keep, c.keep_best, c.mode, c.keep_every)
    hosts.meet('a seal', _READ_S)
    self._newest = step

  def _saving(self, step):
    return disk.failing(f'--workdir: saving {self._directory / str(step)} failed',
                        f'sealed steps are intact ({seal.steps(self._directory)}); mend the disk and start again')


def restore(directory: Path, abstract_state: Tree, step: int | None = None,
            log: seal.Log = print) -> tuple[int, Tree, dict] | None:
  """(step, state, meta) of the newest intact step, or of `step`; None where nothing was ever sealed.

  Args:
    abstract_state: `jax.ShapeDtypeStruct`s, each with the sharding to restore onto (none: this process's first device).
    step: this one or none; otherwise damaged steps are passed over and named in one line of `log`.

  Raises:
    CheckpointError: steps exist and none is intact, or `step` is missing or damaged.
    ConfigError: leaves differ from the checkpoint's in shape, dtype or name; nothing is cast.
  """
  directory = _absolute(directory)
  chosen = _agree(directory, step, log)
  if chosen is None:
    return None
  record = _read(directory, chosen)
  wanted = params.flatten(abstract_state)
  _match(directory / str(chosen), wanted, record['leaves'], partial=False)
  leaves = _load(directory / str(chosen), wanted)
  return chosen, jax.tree.unflatten(jax.tree.structure(abstract_state), [leaves[p] for p in wanted]), record['meta']


def restore_params(directory: Path, abstract_params: Tree, pattern: str = '', step: int | None = None,
                   log: seal.Log = print) -> Tree:
  """The parameters of a checkpoint whose path matches `pattern` (`re.search`); None elsewhere: `params.join` fills it.

  Takes a leaf from either half of the state, trainable (its average where there is one) or frozen, and reads no other.

  Raises:
    CheckpointError: there is no intact checkpoint.
    ConfigError: a matching leaf is missing there, or has another shape or dtype; or no leaf matches.
  """
  directory = _absolute(directory)
  chosen = _agree(directory, step, log)
  if chosen is None:
    raise CheckpointError(f'{directory}: no checkpoint; expected at least one sealed step; name another directory')
  stored = _read(directory, chosen)['leaves']
  paths = params.flatten(abstract_params)
  wanted = {p: x for p, x in paths.items() if re.search(pattern, p)}
  if not wanted:
    raise ConfigError(f'{directory}: no parameter matches {pattern!r}; expected one of {", ".join([*paths][:_SHOWN])}')
  homes = {p: next((h for h in (f'{ema.PATH}/{p}', f'frozen/{p}') if h in stored), f'params/{p}') for p in wanted}
  there = {homes[p]: x for p, x in wanted.items()}
  _match(directory / str(chosen), there, stored, partial=True)
  leaves = _load(directory / str(chosen), there)
  return params.map_with_path(lambda p, _: leaves[homes[p]] if p in wanted else None, abstract_params)


def steps(directory: Path) -> list[int]:
  """The sealed steps, ascending; not verified."""
  return seal.steps(_absolute(directory))


def best(directory: Path, metric: str, mode: str = 'min') -> int | None:
  """The sealed step with the best finite `metric`; None where no step has it."""
  return next(iter(seal.ranked(seal.metrics(_absolute(directory), metric), mode)), None)


def read_meta(directory: Path, step: int) -> dict[str, Any]:
  """The `meta` that `step` was saved with."""
  return _read(_absolute(directory), step)['meta']


def preflight(directory: Path, nbytes: int, c: Config, steps: int = 0) -> None:
  """Refuses, before anything is compiled, a directory without room for all that `steps` steps keep and one more, x 1.2.

  Raises:
    CheckpointError: not a directory, not writable, or too little space (sealed steps already there count as free).
  """
  copies = c.keep + c.keep_best + 1 + (steps // c.keep_every if c.keep_every else 0)
  seal.require_room(_absolute(directory), int(1.2 * nbytes * copies), f'1.2 x {copies} checkpoints')


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
  """Holds `workdir/lock` (flock) so that one job writes there; the kernel frees it however the process ends.

  Raises:
    CheckpointError: another process holds it; the message names its host and pid.
  """
  path = _absolute(workdir) / 'lock'
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      with disk.failing(f'--workdir: cannot lock {path}', disk.WRITABLE):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(path.open('a+'))
        try:
          fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
          file.seek(0)
          raise CheckpointError(f'--workdir: {path.parent} is in use by {file.read().strip() or "another process"}; '
                                'expected no other run; wait for it or choose another --workdir') from error
        file.truncate(0)
        print(f'host {socket.gethostname()} pid {os.getpid()}', file=file, flush=True)
    yield


def _absolute(directory: Path) -> pathlib.Path:
  return pathlib.Path(os.path.abspath(directory))


def _agree(directory: pathlib.Path, step: int | None, log: seal.Log) -> int | None:
  """The step that all processes restore: process 0 looks and verifies, the others are told."""
  chosen, failure = _BROKEN, CheckpointError(f'{directory}: process 0 found no intact checkpoint; see its message')
  if jax.process_index() == 0:
    try:
      found = seal.newest_intact(directory, step, log)
      chosen = _NONE if found is None else found
    except CheckpointError as error:
      failure = error
  hosts.meet('a checkpoint', _READ_S)
  chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
  if chosen == _BROKEN:
    raise failure
  return None if chosen == _NONE else chosen


def _read(directory, step):
  record = seal.read(directory, step)
  if record['format_version'] != FORMAT:
    raise CheckpointError(f'{directory / str(step)}: format {record["format_version"]}; expected {FORMAT}; update lm')
  return record


def _match(where: pathlib.Path, wanted: dict[str, Any], stored: dict[str, str], partial: bool) -> None:
  """Refuses leaves that are not stored as wanted and, unless `partial`, stored ones that are not wanted."""
  kinds = {path: _kind(x) for path, x in wanted.items()}
  lines = [f'{path} is {stored[path]} in the checkpoint, {kind} in this config' if path in stored else
           f'{path} {kind} is not in the checkpoint' for path, kind in kinds.items() if stored.get(path) != kind]
  if not partial:
    lines += [f'{path} {kind} is in the checkpoint only' for path, kind in stored.items() if path not in kinds]
  if lines:
    more = f' and {len(lines) - _SHOWN} more' * (len(lines) > _SHOWN)
    what = ': another optimizer' if all(line.startswith('opt_state/') for line in lines) else ''
    raise ConfigError(f'{where}{what}: {"; ".join(lines[:_SHOWN])}{more}; expected the same leaves; set the config as '
                      f'it was, or start anew from its weights: --set init_from={where.parents[1]} in a new --workdir')


def _load(path: pathlib.Path, leaves: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """{path: array} of the given leaves alone, each on its sharding."""
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  wanted = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here) for p, x in leaves.items()}
  item = traverse_util.unflatten_dict(wanted, sep='/')
  args = ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                                partial_restore=True)
  with disk.failing(f'{path}: cannot be restored', 'restore an older step'):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
      return params.flatten(orbax.restore(path, args=args))
