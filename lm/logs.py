"""What a run writes about itself: config.json (and changes.jsonl), metrics.jsonl, TensorBoard events, curves.png,
summary.json; and tells.

metrics.jsonl is the record: one row a step, cut back when a run resumes. The events and the curves are made from it.
"""

from collections.abc import Callable, Sequence
import contextlib
import importlib.metadata
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import tqdm

from lm import disk, events
from lm.errors import CheckpointError

# What of a row a person is shown.
TOLD = ('loss', 'val_loss', 'val_accuracy', 'val_bits_per_byte', 'score', 'kl', 'val_score', 'val_kl', 'tokens_per_s')
_FLUSH_S = 10.0  # TensorBoard's files may lag by this
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'sentencepiece')


class Logs:
  """The open logs of one workdir, at step `start` of `steps`: rows after it, which a killed run left, are cut off.

  Processes other than 0 write nothing and say nothing.

  Raises (in every method that writes):
    CheckpointError: naming the workdir.
  """

  def __init__(self, workdir: str | os.PathLike, steps: int, start: int):
    self._dir = pathlib.Path(workdir)
    self._quiet, self._bar = jax.process_index() != 0, None
    if self._quiet:
      return
    rows = [row for row in read(self._dir) if row['step'] <= start]
    with self._failing():
      self._file = _rewritten(self._dir, rows)
      self._events = events.fresh(self._dir / 'tensorboard')
      self._began = time.time() - (rows[-1].get('elapsed_s', 0.0) if rows else 0.0)
      self._flushed = 0.0
      for row in rows:
        self._event(row)
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=steps, initial=start, unit='step', dynamic_ncols=True)

  def row(self, step: int, values: dict[str, float]) -> None:
    """One line of metrics.jsonl, one point of every curve, and what of it is `TOLD`."""
    if self._quiet:
      return
    row = {'step': step} | {k: _jsonable(v) for k, v in values.items()}
    with self._failing():
      self._file.write(json.dumps(row) + '\n')
      self._event(row)
    self._show(step, values)

  def amend(self, step: int, values: dict[str, float]) -> None:
    """Adds to the row of `step` if that is the last, and makes one otherwise; a kill leaves it as it was, or whole."""
    rows = [] if self._quiet else read(self._dir)
    if not rows or rows[-1]['step'] != step:
      self.row(step, values)
      return
    more = {k: _jsonable(v) for k, v in values.items()}
    with self._failing():
      self._file.close()
      self._file = _rewritten(self._dir, [*rows[:-1], rows[-1] | more])
      self._event({k: rows[-1][k] for k in ('step', 'elapsed_s') if k in rows[-1]} | more)
    self._show(step, values)

  def _show(self, step, values):
    shown = {k: _short(values[k]) for k in TOLD if k in values}
    if self._bar is not None:
      self._bar.set_postfix(shown, refresh=False)
      self._bar.update(step - self._bar.n)
    if self._bar is None or any(k.startswith('val_') for k in shown):  # the next rows would overwrite it in the bar
      self.say(f'step {step}: ' + ', '.join(f'{k} {v}' for k, v in shown.items()))

  def say(self, text: str) -> None:
    """A line for the person, which does not tear the progress bar."""
    if self._bar is not None:
      tqdm.tqdm.write(text, file=sys.stderr)
    else:
      say(text)

  def close(self) -> None:
    if self._quiet:
      return
    for file in (self._file, self._events):
      with contextlib.suppress(OSError):  # a row that could not be written has raised already
        file.close()
    if self._bar is not None:
      self._bar.close()

  def _event(self, row):
    events.scalars(self._events, row['step'], self._began + row.get('elapsed_s', 0.0),
                   {k: v for k, v in row.items() if k != 'step'})
    if time.monotonic() > self._flushed + _FLUSH_S:
      self._events.flush()
      self._flushed = time.monotonic()

  def _failing(self):
    return disk.failing(f'--workdir: cannot log into {self._dir}', 'sealed checkpoints are intact; mend the disk and '
                        'start again')


def _rewritten(workdir, rows):
  """metrics.jsonl with these rows alone, open for more."""
  path = workdir / 'metrics.jsonl'
  disk.write(path, ''.join(json.dumps(row) + '\n' for row in rows).encode())
  return open(path, 'a', buffering=1, encoding='utf-8')


def say(text: str) -> None:
  """A line on stdout, from process 0 alone."""
  if jax.process_index() == 0:
    try:
      print(text, flush=True)
    except BrokenPipeError:  # whoever read it is gone; the run goes on
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of metrics.jsonl; what is no row, such as the torn last line that a kill may leave, is left out."""
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  rows = []
  for line in path.read_bytes().split(b'\n') if path.exists() else ():
    with contextlib.suppress(ValueError):
      row = json.loads(line)
      if isinstance(row, dict) and isinstance(row.get('step'), int):
        rows.append(row)
  return rows


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
  """What a run's config.json holds, of which 'config' is the config as JSON.

  Raises:
    CheckpointError: there is none, or it is damaged.
  """
  path = pathlib.Path(workdir) / 'config.json'
  try:
    found = json.loads(path.read_bytes())
    if not isinstance(found['config'], dict):
      raise TypeError('config is no object')
    return found
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f"{path}: {type(error).__name__}: {error}; expected a run's config; copy it again, or name "
                          'another workdir') from error


def check_config(workdir: str | os.PathLike, config: dict[str, Any], complete: Callable[[Any], Any] = lambda old: old
                 ) -> tuple[dict[str, tuple[Any, Any]], str | None]:
  """Compares with the config.json that is there, if any: ({field: (there, now)} of what differs, a note of packages).

  Args:
    complete: gives the config that is there with the fields that it was too old to have.

  Raises:
    CheckpointError: it is damaged.
  """
  path = pathlib.Path(workdir) / 'config.json'
  if not path.exists():
    return {}, None
  try:
    old = json.loads(path.read_bytes())
    differing = differences(complete(old['config']), config)
    packages = differences(old.get('packages', {}), _packages())
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise CheckpointError(f'{path}: {error!r}; expected what a run wrote; move the file away, or choose another '
                          '--workdir') from error
  return differing, f'other packages than at the last start: {beside(packages)}' if packages else None


def beside(differing: dict[str, tuple[Any, Any]]) -> str:
  """What `check_config` found, for a message."""
  return '; '.join(f'{name}: {there!r} there, {now!r} now' for name, (there, now) in differing.items())


def write_changes(workdir: str | os.PathLike, step: int, changes: dict[str, tuple[Any, Any]]) -> None:
  """Says what a run goes on with in place of what it had up to `step`, and adds a line of it to changes.jsonl."""
  for name, (old, new) in changes.items():
    say(f'changed from step {step} on: {name}: {old!r} -> {new!r}')
  path = pathlib.Path(workdir) / 'changes.jsonl'
  with disk.failing(f'--workdir: cannot write {path}', disk.WRITABLE), open(path, 'a', encoding='utf-8') as file:
    file.write(json.dumps({'step': step, 'changes': changes}) + '\n')


def write_config(workdir: str | os.PathLike, config: dict[str, Any], classes: Sequence[str] = ()) -> None:
  """config.json: the config, what it ran on and with, and the names of the classes that a model tells apart."""
  record = {'config': config, 'git': _git(), 'packages': _packages(), 'devices': [str(d) for d in jax.devices()]}
  record |= {'classes': list(classes)} if classes else {}
  _write(pathlib.Path(workdir) / 'config.json', record)


def write_summary(workdir: str | os.PathLike, summary: dict[str, Any]) -> None:
  """summary.json, and curves.png beside it."""
  _write(pathlib.Path(workdir) / 'summary.json', {k: _jsonable(v) for k, v in summary.items()})
  curves(workdir)


def curves(workdir: str | os.PathLike) -> pathlib.Path:
  """Draws curves.png from metrics.jsonl: training and validation loss (score, where a policy has no loss to speak of),
  and the learning rate, over steps."""
  import matplotlib.figure  # a second of import that most calls of this module do not need

  rows = read(workdir)
  figure = matplotlib.figure.Figure(figsize=(9, 6), layout='constrained')
  upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
  told = 'score' if any('val_score' in row for row in rows) else 'loss'
  for axes, name, style in ((upper, told, {'lw': 0.8, 'alpha': 0.8}), (upper, f'val_{told}', {'marker': 'o', 'ms': 3}),
                            (lower, 'learning_rate', {'color': 'grey'})):
    points = [(r['step'], r[name]) for r in rows if isinstance(r.get(name), float)]
    if points:
      axes.plot(*zip(*points, strict=True), label=name, **style)
  upper.set(ylabel='nats / token' if told == 'loss' else 'score')
  lower.set(xlabel='step', ylabel='learning rate')
  for axes in (upper, lower):
    axes.grid(alpha=0.3)
  if upper.get_legend_handles_labels()[0]:
    upper.legend()
  path = pathlib.Path(workdir) / 'curves.png'
  figure.savefig(path, dpi=120)
  return path


def differences(old, new, prefix=''):
  found = {}
  for key in sorted(old.keys() | new.keys()):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      found |= differences(a, b, f'{prefix}{key}.')
    elif json.dumps(a) != json.dumps(b):
      found[prefix + key] = a, b
  return found


def _write(path: pathlib.Path, record: dict[str, Any]) -> None:
  with disk.failing(f'--workdir: cannot write {path}', disk.WRITABLE):
    disk.write(path, json.dumps(record, indent=1).encode())


def _jsonable(value: Any) -> Any:
  """JSON has no infinities and no NaN: they are written as strings, so a strict reader never chokes."""
  return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: float) -> str:
  return f'{value:,.0f}' if 1e3 <= abs(value) < 1e15 else f'{value:.4g}'


def _packages():
  return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _git():
  """Commit of this source tree, with '+' if it has changes; None outside a checkout."""
  def git(*args):
    return subprocess.run(['git', *args], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent, check=True)
  try:
    return git('rev-parse', 'HEAD').stdout.strip() + ('+' if git('status', '--porcelain').stdout.strip() else '')
  except (OSError, subprocess.CalledProcessError):
    return None
