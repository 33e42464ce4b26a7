"""Seals: a step directory counts as a checkpoint only beside a manifest with the sha256 of every file in it.

Orbax detects no bit flip in array data, lists half-deleted steps and does not fsync its own metadata files. So a step
exists when `<step>.sha256.json` does: the seal is written last, after everything it lists is on disk, and goes first
when the step is pruned. A kill between any two system calls leaves every sealed step whole.

    checkpoints/
      400/  400.sha256.json          a sealed step; the seal holds {files, leaves, meta, metrics, ...} and its own hash
      410.orbax-checkpoint-tmp/      unfinished save: `clean` removes it
      390/                           without a seal, saved or deleted half way: `clean` removes it
      abandoned/                     steps that a restart from an older step left behind; never read, never deleted
"""

from collections.abc import Callable
from concurrent import futures
import contextlib
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import tempfile

from lm import disk
from lm.errors import CheckpointError

SUFFIX = '.sha256.json'
ABANDONED = 'abandoned'
_STEP = r'(0|[1-9][0-9]{0,17})'
_SEAL = re.compile(_STEP + r'\.sha256\.json')
_LEFTOVER = re.compile(_STEP + r'\.(orbax-checkpoint-tmp.*|sha256\.json\.tmp)')
_ORBAX = re.compile(r'_.*|d|manifest\.ocdbt|ocdbt\.process_[0-9]+|array_metadatas|commit_success\.txt')

Log = Callable[[str], None]


def path_of(directory: pathlib.Path, step: int) -> pathlib.Path:
  return directory / f'{step}{SUFFIX}'


def steps(directory: pathlib.Path) -> list[int]:
  """Steps that have a seal, ascending; whether they are intact is for `check` to say."""
  if not directory.is_dir():
    return []
  return sorted(int(m[1]) for m in map(_SEAL.fullmatch, os.listdir(directory)) if m)


def strays(directory: pathlib.Path) -> list[pathlib.Path]:
  """Everything in `directory` that belongs to no sealed step, `abandoned` excepted."""
  known = {ABANDONED} | {name for s in steps(directory) for name in (str(s), f'{s}{SUFFIX}')}
  return sorted(p for p in directory.iterdir() if p.name not in known) if directory.is_dir() else []


def write(directory: pathlib.Path, step: int, record: dict) -> None:
  """Seals `step`: fsyncs and hashes its files, then puts the manifest beside it, atomically and durably.

  `record` must come back unchanged from JSON; 'files' {relative path: [bytes, sha256]} is added to it.
  """
  folder = directory / str(step)
  files = _files(folder)
  for path in [*files.values(), *(p for p in folder.rglob('*') if p.is_dir()), folder]:
    _fsync(path)
  sums = zip(files.items(), _hashes(files), strict=True)
  _put(directory, step, record | {'files': {name: [p.stat().st_size, sha] for (name, p), sha in sums}})


def amend(directory: pathlib.Path, step: int, record: dict) -> None:
  """Puts another record beside the files of a sealed step, atomically."""
  _put(directory, step, record | {'files': read(directory, step)['files']})


def _put(directory, step, record):
  final = path_of(directory, step)
  tmp = final.with_name(final.name + '.tmp')
  with tmp.open('w') as f:
    json.dump({'sha256': _digest(record), 'record': record}, f)
    f.flush()
    os.fsync(f.fileno())
  tmp.replace(final)
  _fsync(directory)


def read(directory: pathlib.Path, step: int) -> dict:
  """The record of a sealed step.

  Raises:
    CheckpointError: the seal is missing or damaged.
  """
  path = path_of(directory, step)
  try:
    sealed = json.loads(path.read_bytes())
    record = sealed['record']
    if sealed['sha256'] != _digest(record):
      raise ValueError('its own sha256 does not match')
    return record
  except FileNotFoundError as error:
    have = ', '.join(map(str, steps(directory))) or 'none'
    raise CheckpointError(f'{path}: missing, step {step} is not sealed; expected one of the steps {have}') from error
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise CheckpointError(f'{path}: damaged seal ({error})') from error


def check(directory: pathlib.Path, step: int) -> str | None:
  """None where every file of the step is as it was sealed; else 'path: what is wrong'. Reads the whole step."""
  folder = directory / str(step)
  try:
    listed = read(directory, step)['files']
    if folder.is_symlink():
      return f'{folder}: is a symbolic link'
    found = _files(folder)
    for name, (size, _) in listed.items():
      path = folder / name
      if name not in found:
        return f'{path}: missing'
      if path.stat().st_size != size:
        return f'{path}: {path.stat().st_size} bytes, expected {size}'
    for (name, (_, want)), have in zip(listed.items(), _hashes({n: found[n] for n in listed}), strict=True):
      if have != want:
        return f'{folder / name}: sha256 does not match'
  except CheckpointError as error:
    return str(error)
  except OSError as error:
    return str(error)
  return None


def delete(directory: pathlib.Path, step: int) -> None:
  """Unseals the step for good, then deletes it: at no moment does a sealed step lack a file."""
  path_of(directory, step).unlink(missing_ok=True)
  _fsync(directory)
  if (directory / str(step)).is_dir():
    shutil.rmtree(directory / str(step))


def newest_intact(directory: pathlib.Path, step: int | None, log: Log) -> int | None:
  """The newest step that passes `check`, or `step` alone if given; None where nothing is sealed and none was asked for.

  One line of `log` names every rejected step, its file and reason, and the step used instead; one more each stray.

  Raises:
    CheckpointError: steps are sealed, or one was asked for, and none is intact.
  """
  for path in strays(directory):
    name = path if str(path).isprintable() else repr(str(path))
    log(f'warning: {name}: not a sealed checkpoint; ignored')
  rejected = []
  for s in reversed(steps(directory)) if step is None else [step]:
    reason = check(directory, s)
    if reason is None:
      if rejected:
        log(f'warning: rejected {"; ".join(rejected)}; using step {s} of {directory}')
      return s
    rejected.append(f'step {s} ({reason})')
  if rejected:
    raise CheckpointError(f'{directory}: no intact checkpoint: rejected {"; ".join(rejected)}; expected a sealed and '
                          'undamaged step; copy one back, or start in a new --workdir')
  return None


def metrics(directory: pathlib.Path, metric: str) -> dict[int, float | None]:
  """{sealed step: its metric}; None where it has none or the seal is damaged."""
  def one(step):
    try:
      return read(directory, step)['metrics'].get(metric)
    except CheckpointError:
      return None
  return {s: one(s) for s in steps(directory)}


def ranked(values: dict[int, float | None], mode: str) -> list[int]:
  """Steps with a finite value, best first by `mode` ('min' or 'max'); ties go to the older step."""
  sign = 1 if mode == 'min' else -1
  return [s for _, s in sorted((sign * v, s) for s, v in values.items() if v is not None and math.isfinite(v))]


def prune(directory: pathlib.Path, values: dict[int, float | None], keep: int, keep_best: int, mode: str,
          keep_every: int = 0) -> None:
  """Deletes the steps of `values` but the `keep` newest, the `keep_best` best and the multiples of `keep_every` > 0."""
  kept = {*sorted(values)[-keep:], *ranked(values, mode)[:keep_best]}
  kept |= {step for step in values if keep_every and step % keep_every == 0}
  for step in sorted(values.keys() - kept):
    delete(directory, step)


def size(directory: pathlib.Path) -> int:
  """Bytes in the files of the steps whose seals can be read."""
  total = 0
  for step in steps(directory):
    with contextlib.suppress(CheckpointError):
      total += sum(n for n, _ in read(directory, step)['files'].values())
  return total


def clean(directory: pathlib.Path, log: Log) -> None:
  """Removes what a kill left behind, so that the same step can be saved again. Files that are not ours stay."""
  for path in strays(directory):
    if _LEFTOVER.fullmatch(path.name):
      log(f'{path}: left by an interrupted run; removed')
      shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif re.fullmatch(_STEP, path.name) and path.is_dir() and not path.is_symlink() and all(
        _ORBAX.fullmatch(name) for name in os.listdir(path)):
      log(f'{path}: saved but never sealed; removed')
      delete(directory, int(path.name))


def abandon(directory: pathlib.Path, after: int, log: Log) -> None:
  """Moves the sealed steps newer than `after` into `abandoned/`: intact or not, they belong to another future."""
  for step in steps(directory):
    if step > after:
      attic = directory / ABANDONED
      attic.mkdir(exist_ok=True)
      names = (f'{step}.{n}' if n else str(step) for n in itertools.count())
      name = next(n for n in names if not (attic / n).exists() and not (attic / f'{n}{SUFFIX}').exists())
      if (directory / str(step)).exists():
        (directory / str(step)).rename(attic / name)
      path_of(directory, step).rename(attic / f'{name}{SUFFIX}')
      log(f'{directory / str(step)}: newer than step {after}, from which this run continues; moved to {attic / name}')


def require_room(directory: pathlib.Path, nbytes: int, what: str) -> None:
  """Refuses a directory that cannot be written or has less than `nbytes` (for `what`); what it holds counts as free.

  Raises:
    CheckpointError: naming --workdir.
  """
  with disk.failing(f'--workdir: cannot write into {directory}', disk.WRITABLE):
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as probe:
      probe.write(b'probe')
      probe.flush()
      os.fsync(probe.fileno())
    free = shutil.disk_usage(directory).free + size(directory)
  if free < nbytes:
    raise CheckpointError(f'--workdir: {free / 2**20:,.0f} MiB free for {directory}; expected {nbytes / 2**20:,.0f} '
                          f'({what}); free space, or keep fewer: checkpoint.keep, keep_best, keep_every')


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob('*')) if p.is_file() and not p.is_symlink()}


def _hashes(files: dict[str, pathlib.Path]) -> list[str]:
  def one(path):
    with path.open('rb') as f:
      return hashlib.file_digest(f, 'sha256').hexdigest()
  with futures.ThreadPoolExecutor() as pool:  # hashing releases the GIL
    return list(pool.map(one, files.values()))


def _digest(record: dict) -> str:
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _fsync(path: pathlib.Path) -> None:
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)
