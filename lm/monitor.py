"""Watching a policy learn: alarms where it may fool its reward rather than please, and one picture of the run.

Pure functions of numbers that the run wrote. An evaluation is [step, {metric: value}]; what is missing or no finite
number is left out.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import io
import math
import os
import pathlib
from typing import Any

from lm import disk, logs
from lm.errors import ConfigError

PANELS = {  # title: the metrics drawn there
    'score': ('score', 'val_score'), 'held-out reward': ('val_held_out',), 'KL, nats a response': ('kl', 'val_kl'),
    "reference's nats a token": ('val_reference_nll',), 'entropy': ('entropy', 'val_entropy'),
    'clip fraction': ('clip_fraction', 'value_clip_fraction'), 'explained variance': ('explained_variance',),
    'length, tokens': ('length', 'val_length'), 'share ended': ('ended', 'val_ended')}
_COLUMNS = 3


@dataclasses.dataclass(frozen=True)
class Limits:
  """What is too much.

  Attributes:
    window: evaluations back to which the newest is compared; 0 = to the first. A held-out reward, and the share that
      ends, also to their largest since.
    errors: standard errors of a difference that count as a change, where the metric has one ('NAME_se').
    change: a change of a score or reward that has none, in its own units.
    nll: rise of the reference's negative log-likelihood, nats a token, at the temperature of drawing.
    kl_target: nats a response that the KL is steered to; 0 = there is no target.
    kl: multiple of the target.
    ended: share of responses that end, below which hardly any does.
    length: factor by which the mean length may grow or shrink.
  """

  window: int = 0
  errors: float = 2.0
  change: float = 0.05
  nll: float = 1.0
  kl_target: float = 0.0
  kl: float = 1.5
  ended: float = 0.05
  length: float = 3.0

  def __post_init__(self):
    for name, least in (('window', 0), ('errors', 0), ('change', 0), ('nll', 0), ('kl_target', 0), ('kl', 1),
                        ('ended', 0), ('length', 1)):
      if not least <= getattr(self, name) < math.inf:
        raise ConfigError(f'limits.{name}={getattr(self, name)}; expected a finite number, at least {least}')


def alarms(evaluations: Sequence[tuple[int, Mapping[str, Any]]], limits: Limits = Limits(), *, score: str = 'val_score',
           held_out: str = 'val_held_out', reference: str = 'val_reference_nll', kl: str = 'val_kl',
           ended: str = 'val_ended', length: str = 'val_length') -> list[str]:
  """A sentence for each thing that looks wrong at the newest evaluation; [] where nothing does.

  A reward that rises while one that nobody trains for falls is fooled (arXiv:2210.10760); text that the reference finds
  ever less likely, or far from it in KL, is where that happens. Responses that stop ending, or whose length runs away,
  are its usual forms.

  Args:
    evaluations: in the order of their steps.
    score and so on: names of the metrics.
  """
  if not evaluations:
    return []
  seen = evaluations[-1 - (limits.window or len(evaluations) - 1):]
  before, now, found = seen[0], evaluations[-1], []
  best = lambda name: max(seen, key=lambda e: -math.inf if _value(e, name) is None else _value(e, name))

  def pair(name, start=before):
    values = _value(start, name), _value(now, name)
    return None if None in values else values

  def told(name, start=before):
    old, new = pair(name, start)
    return f'{name} {"rose" if new > old else "fell"} from {old:.4g} to {new:.4g}'

  def moved(name, start, more=0.0):
    """Whether a score rose (1) or fell (-1) by more than chance has it, or did neither (0)."""
    values = pair(name, start)
    if values is None or values[0] == values[1]:
      return 0
    errors = pair(f'{name}_se', start)
    least = (limits.errors + more) * math.hypot(*errors) if errors else limits.change
    return (values[1] > values[0]) * 2 - 1 if abs(values[1] - values[0]) > least else 0
  when = f'from step {before[0]} to step {now[0]}'
  for start, more in ((before, 0.0), (best(held_out), 1.0)):  # the best of several is partly luck
    if moved(score, start, more) > 0 and moved(held_out, start, more) < 0:
      found.append(f'from step {start[0]} to step {now[0]}, {told(score, start)} while {told(held_out, start)}: the '
                   'policy may be fooling its reward')
      break
  if pair(reference) and pair(reference)[1] - pair(reference)[0] > limits.nll:
    found.append(f'{when}, {told(reference)} nats a token, by more than {limits.nll:g}: the policy writes what the '
                 'reference finds unlikely')
  far = _value(now, kl)
  if limits.kl_target and far is not None and far > limits.kl * limits.kl_target:
    found.append(f'at step {now[0]}, {kl} is {far:.4g} nats a response, more than {limits.kl:g} times its target of '
                 f'{limits.kl_target:g}: the policy is too far from the reference')
  if (ends := pair(ended, best(ended))) and ends[1] < limits.ended <= ends[0]:
    found.append(f'from step {best(ended)[0]} to step {now[0]}, {told(ended, best(ended))}: hardly any response ends')
  if pair(length) and min(pair(length)) > 0:
    old, new = pair(length)
    if max(new / old, old / new) > limits.length:
      found.append(f'{when}, {told(length)} tokens, by a factor of more than {limits.length:g}: responses '
                   f'{"run on" if new > old else "shrink away"}')
  return found


def plot(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike, kl_target: float = 0.0) -> pathlib.Path:
  """Draws the `PANELS` that the rows of metrics.jsonl have numbers for, over steps; scores with two standard errors.

  Raises:
    ConfigError: no row has any of these metrics.
    CheckpointError: the file cannot be written.
  """
  import matplotlib.figure  # a second of import that most calls of this module do not need

  points = {name: _points(rows, name) for names in PANELS.values() for name in names}
  panels = {title: names for title, names in PANELS.items() if any(points[name] for name in names)}
  if not panels:
    raise ConfigError(f'{path}: nothing to draw; expected rows with one of {", ".join(points)}')
  height = -(-len(panels) // _COLUMNS)
  figure = matplotlib.figure.Figure(figsize=(4.2 * min(len(panels), _COLUMNS), 3 * height), layout='constrained')
  for number, (title, names) in enumerate(panels.items(), 1):
    axes = figure.add_subplot(height, min(len(panels), _COLUMNS), number, title=title, xlabel='step')
    for i, name in enumerate(names):
      if points[name]:
        xs, ys = zip(*points[name], strict=True)
        style = {'marker': 'o', 'ms': 3} if name.startswith('val_') else {'lw': 0.8, 'alpha': 0.8}
        axes.plot(xs, ys, color=f'C{i}', label=name, **style)
        _band(axes, points[name], dict(_points(rows, f'{name}_se')), f'C{i}')
    if 'kl' in names and kl_target:
      axes.axhline(kl_target, color='black', ls='--', label=f'target {kl_target:g}')
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
  buffer = io.BytesIO()
  figure.savefig(buffer, dpi=120, format='png')
  with disk.failing(f'{path}: cannot write the picture', 'expected a writable directory; choose another path'):
    disk.write(path, buffer.getvalue())
  return pathlib.Path(path)


def report(workdir: str | os.PathLike) -> dict[str, Any]:
  """Draws WORKDIR/rl.png, and gives {'alarms': [...]} of the whole run for its summary.

  The KL's target is that of config.json, if it has one (loss.kl.target).
  """
  workdir = pathlib.Path(workdir)
  target = _target(logs.read_config(workdir)['config'])
  rows = logs.read(workdir)
  plot(rows, workdir / 'rl.png', target)
  evaluations = [(row['step'], row) for row in rows if any(name.startswith('val_') for name in row)]
  return {'alarms': alarms(evaluations, Limits(kl_target=target))}


def _target(config):
  kl = config.get('loss', {}).get('kl', {})
  return float(kl.get('target', 0.0))


def _value(evaluation, name):
  value = evaluation[1].get(name)
  return value if isinstance(value, int | float) and math.isfinite(value) else None


def _points(rows, name):
  found = [(row['step'], _value((0, row), name)) for row in rows]
  return [(step, value) for step, value in found if value is not None]


def _band(axes, points, errors, colour):
  """Two standard errors on either side, where there are any."""
  some = [(x, y, 2 * errors[x]) for x, y in points if x in errors]
  if some:
    xs, ys, reach = zip(*some, strict=True)
    low, high = ([y + sign * r for y, r in zip(ys, reach, strict=True)] for sign in (-1, 1))
    axes.fill_between(xs, low, high, color=colour, alpha=0.2, lw=0)
