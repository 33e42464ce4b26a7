"""What a run writes about itself: metrics.jsonl, TensorBoard events, curves.png, and a progress bar or plain lines."""

import json
import math
import os
import pathlib
import sys
from typing import Any

import tensorboardX
import tqdm


class Logs:
  """The open log files of one workdir. Only process 0 of a job should make one."""

  def __init__(self, workdir: str | os.PathLike, steps: int, start: int):
    """Continues at step `start`: later rows, which a killed run may have left, are cut off."""
    self._dir = pathlib.Path(workdir)
    self._path = self._dir / 'metrics.jsonl'
    rows = [row for row in read(workdir) if row['step'] <= start]
    _write_rows(self._path, rows)
    self._file = open(self._path, 'a', buffering=1, encoding='utf-8')
    self._events = tensorboardX.SummaryWriter(str(self._dir / 'tensorboard'), purge_step=start + 1)
    self._bar = tqdm.tqdm(total=steps, initial=start, unit='step', dynamic_ncols=True) if sys.stderr.isatty() else None

  def row(self, step: int, values: dict[str, Any], tell: tuple[str, ...] = ()) -> None:
    """One line of metrics.jsonl and one point of every curve; `tell` names what is also shown to a person."""
    self._file.write(json.dumps({'step': step} | {k: _jsonable(v) for k, v in values.items()}) + '\n')
    for name, value in values.items():
      if isinstance(value, (int, float)):
        self._events.add_scalar(name, value, step)
    shown = {k: f'{values[k]:.4g}' for k in tell if k in values}
    if self._bar is not None:
      self._bar.set_postfix(shown, refresh=False)
      self._bar.update(step - self._bar.n)
    elif shown:
      print(f'step {step}: ' + ', '.join(f'{k} {v}' for k, v in shown.items()), flush=True)

  def say(self, text: str) -> None:
    """A line for the person, which does not tear the progress bar."""
    if self._bar is None:
      print(text, flush=True)
    else:
      tqdm.tqdm.write(text, file=sys.stderr)

  def close(self) -> None:
    self._file.close()
    self._events.close()
    if self._bar is not None:
      self._bar.close()


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of metrics.jsonl; a torn last line, which a kill may leave, is dropped."""
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  rows = []
  if path.exists():
    for line in path.read_text(encoding='utf-8').split('\n'):
      try:
        rows.append(json.loads(line))
      except ValueError:
        continue
  return rows


def curves(workdir: str | os.PathLike) -> pathlib.Path:
  """Draws curves.png from metrics.jsonl: loss (training and validation) and learning rate over tokens or steps."""
  import matplotlib.figure  # a second of import that most calls of this module do not need

  rows = read(workdir)
  figure = matplotlib.figure.Figure(figsize=(9, 6), layout='constrained')
  upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
  for name, style in (('loss', {'lw': 0.8, 'alpha': 0.8}), ('val_loss', {'marker': 'o', 'ms': 3})):
    points = [(r['step'], r[name]) for r in rows if isinstance(r.get(name), float) and math.isfinite(r[name])]
    if points:
      upper.plot(*zip(*points, strict=True), label=name, **style)
  points = [(r['step'], r['learning_rate']) for r in rows if 'learning_rate' in r]
  if points:
    lower.plot(*zip(*points, strict=True), color='grey')
  upper.set(ylabel='nats / token')
  upper.grid(alpha=0.3)
  if upper.get_legend_handles_labels()[0]:
    upper.legend()
  lower.set(xlabel='step', ylabel='learning rate')
  lower.grid(alpha=0.3)
  path = pathlib.Path(workdir) / 'curves.png'
  figure.savefig(path, dpi=120)
  return path


def _write_rows(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  part = path.with_suffix('.part')
  part.write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')
  os.replace(part, path)


def _jsonable(value: Any) -> Any:
  """JSON has no infinities: they are written as strings, so a strict reader never chokes."""
  return str(value) if isinstance(value, float) and not math.isfinite(value) else value
