"""Pictures: a confusion matrix, curves over runs, bars of methods, lengths by label; PNG files, written in one move.

A name is drawn as it is where an installed font has its characters; what no font has is written as \\uXXXX, so that no
name becomes boxes.

Shapes: C classes.
"""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import io
import os
import pathlib
import re

import numpy as np

from lm import disk, metrics
from lm.errors import ConfigError

_LONGEST = 32  # characters of a name
_NUMBERED = 20  # classes up to which the cells of a confusion matrix say their number
_NAMED = 60  # names that fit on an axis
_DRAWN = 8  # histograms that can be told apart
_PREFERRED = ('Noto Sans CJK', 'Noto Sans SC', 'Source Han Sans', 'WenQuanYi', 'Microsoft YaHei', 'PingFang', 'SimHei')
# Fonts that draw boxes, or other glyphs than the characters say, or in colours, which fails.
_UNFIT = re.compile('.*(Last ?Resort|Emoji)|cm[a-z]+10$|STIX(Non|Size)')


def confusion(path: str | os.PathLike, counts_CC: np.ndarray, names: Sequence[str], title: str = '') -> pathlib.Path:
  """Draws `metrics.confusion`: items by target (row) and prediction (column), coloured by their share of the row.

  Raises:
    ConfigError: not one name for each class.
    CheckpointError: the file cannot be written; so for all pictures.
  """
  counts_CC = np.asarray(counts_CC)
  c = len(names)
  if counts_CC.shape != (c, c) or not c:
    raise ConfigError(f'counts: shape {counts_CC.shape} for {c} names; expected [C, C], and a name for each class')
  family, names, (title,) = _legible(names, [title])
  share_CC = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
  room = max(map(len, names))  # for the names, at the left and, slanted, below
  figure, axes = _figure(min(2.5 + 0.5 * c, 14) + 0.09 * room, min(1.5 + 0.5 * c, 13) + 0.065 * room)
  image = axes.imshow(share_CC, cmap='Blues', vmin=0, vmax=1)
  shown = np.arange(0, c, -(-c // _NAMED))
  labels = [names[i] for i in shown]
  axes.set_xticks(shown, labels, fontfamily=family, rotation=45, ha='right', rotation_mode='anchor')
  axes.set_yticks(shown, labels, fontfamily=family)
  for row, column in np.ndindex(c, c) if c <= _NUMBERED else ():
    axes.text(column, row, f'{counts_CC[row, column]:,}', ha='center', va='center',
              color='white' if share_CC[row, column] > 0.5 else 'black')
  axes.set(xlabel='predicted', ylabel='target')
  figure.suptitle(title, fontfamily=family)
  figure.colorbar(image, label='share of the target class', shrink=0.9)
  return _save(figure, path)


def curves(path: str | os.PathLike, runs: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
           xlabel: str = 'step', ylabel: str = '', title: str = '', level: float = 0.95) -> pathlib.Path:
  """Draws for each name the mean over its runs (folds or seeds) and its Student-t band; the runs as thin lines.

  Args:
    runs: {name: [(xs, ys) of each run]}; runs may end early, and a value that is not finite is left out.
  """
  if not runs or not all(runs.values()) or any(len(xs) != len(ys) for some in runs.values() for xs, ys in some):
    raise ConfigError('runs: expected at least one name, at least one run for each, and a y for every x')
  family, names, (xlabel, ylabel, title) = _legible(runs, [xlabel, ylabel, title])
  figure, axes = _figure(8, 5)
  bands = []
  for number, (name, some) in enumerate(zip(names, runs.values(), strict=True)):
    colour = f'C{number % 10}'
    for xs, ys in some if len(some) > 1 else ():
      axes.plot(xs, ys, color=colour, lw=0.6, alpha=0.35)
    xs, intervals = _over_runs(some, level)
    axes.plot(xs, [i.value for i in intervals], color=colour, lw=1.8, label=f'{name} ({len(some)})',
              marker='o' if len(xs) < 30 else None, ms=3)
    bands.append((xs, [i.low for i in intervals], [i.high for i in intervals], colour))
  axes.set_ylim(axes.get_ylim())  # of the lines: the band of two runs may be many times as wide
  for xs, low, high, colour in bands:
    axes.fill_between(xs, low, high, color=colour, alpha=0.15, lw=0)
  axes.grid(alpha=0.3)
  axes.set_xlabel(xlabel, fontfamily=family)
  axes.set_ylabel(ylabel, fontfamily=family)
  figure.suptitle(title, fontfamily=family)
  axes.legend(prop={'family': family})
  return _save(figure, path)


def bars(path: str | os.PathLike, intervals: Mapping[str, metrics.Interval], xlabel: str = '',
         title: str = '') -> pathlib.Path:
  """Draws a bar for each method, first at the top, with its interval; one that is NaN has none."""
  if not intervals:
    raise ConfigError('intervals: none; expected one for each method')
  family, names, (xlabel, title) = _legible(intervals, [xlabel, title])
  found = list(intervals.values())
  figure, axes = _figure(8, 1.5 + 0.45 * len(found))
  at, values = np.arange(len(found)), np.array([i.value for i in found])
  reach = np.array([[i.value - i.low, i.high - i.value] for i in found]).T.clip(0)  # a value may lie outside
  axes.barh(at, np.nan_to_num(values), color='C0', alpha=0.6)
  axes.errorbar(values, at, xerr=reach, fmt='none', ecolor='black', capsize=4)
  for y, interval in enumerate(found):
    right = np.nanmax([interval.value, interval.high, 0])
    axes.annotate(str(interval) if np.isfinite(interval.low) else f'{interval.value:.4g}', (right, y), (6, 0),
                  textcoords='offset points', va='center', fontsize='small')
  axes.set_yticks(at, names, fontfamily=family)
  axes.invert_yaxis()
  axes.margins(x=0.35)
  axes.grid(axis='x', alpha=0.3)
  axes.set_xlabel(xlabel, fontfamily=family)
  figure.suptitle(title, fontfamily=family)
  return _save(figure, path)


def lengths(path: str | os.PathLike, sizes: Mapping[str, Sequence[int]], unit: str = 'characters', limit: int = 0,
            title: str = '') -> pathlib.Path:
  """Draws how long the items of each label are, as shares of the label, and how many items each has, most first.

  Args:
    sizes: {label: length of each item}; labels beyond the 8 with the most items share a histogram, beyond 60 a bar.
    limit: a length to mark; 0 = none.
  """
  if not sizes or not all(map(len, sizes.values())):
    raise ConfigError('sizes: expected at least one label, and at least one length for each')
  by_count = sorted(sizes.items(), key=lambda item: -len(item[1]))
  family, names, (unit, title) = _legible([name for name, _ in by_count], [unit, title])
  found = [(name, list(some)) for name, (_, some) in zip(names, by_count, strict=True)]
  drawn, named = _first(found, _DRAWN), _first(found, _NAMED)
  figure, (left, right) = _figure(12, max(4, 1.5 + 0.25 * len(named)), columns=2)
  most = max(max(some) for _, some in found)
  edges = np.unique(np.geomspace(1, max(most, limit, 1) + 1, 41).round())
  for name, some in drawn:
    left.hist(np.maximum(some, 1), edges, weights=np.full(len(some), 1 / len(some)), histtype='step', label=name)
  if limit:
    left.axvline(limit, color='black', ls='--', label=f'limit {limit:,}')
  left.set_xscale('log')
  left.set_xlabel(unit, fontfamily=family)
  left.set_ylabel('share of the label')
  left.legend(prop={'family': family})
  at = np.arange(len(named))
  for y, (_, some) in enumerate(named):
    right.annotate(f'{len(some):,}', (len(some), y), (4, 0), textcoords='offset points', va='center', fontsize='small')
  right.barh(at, [len(some) for _, some in named], color=[f'C{min(i, _DRAWN)}' for i in at], alpha=0.6)
  right.set_yticks(at, [name for name, _ in named], fontfamily=family)
  right.invert_yaxis()
  right.margins(x=0.12)
  right.set_xlabel('items')
  figure.suptitle(title, fontfamily=family)
  return _save(figure, path)


def _first(found, most):
  """The first of (name, lengths), and all others as one where there are more than `most`."""
  if len(found) <= most:
    return found
  rest = found[most - 1:]
  return [*found[:most - 1], (f'{len(rest)} others', [n for _, some in rest for n in some])]


def _over_runs(runs, level):
  """(every x that a run has, in order; the interval of the finite values there)."""
  at: dict[float, list[float]] = {}
  for xs, ys in runs:
    for x, y in zip(xs, ys, strict=True):
      at.setdefault(float(x), []).extend([float(y)] if np.isfinite(y) else [])
  return sorted(at), [metrics.interval(at[x], level) for x in sorted(at)]


def _figure(width, height, columns=1):
  """(a figure outside pyplot's global state, its axes: an array where there are several)."""
  import matplotlib.figure  # a second of import

  figure = matplotlib.figure.Figure(figsize=(width, height), layout='constrained')
  return figure, figure.subplots(1, columns)


def _save(figure, path):
  buffer = io.BytesIO()
  figure.savefig(buffer, dpi=120, format='png')
  with disk.failing(f'{path}: cannot write the picture', 'expected a writable directory; choose another path'):
    disk.write(path, buffer.getvalue())
  return pathlib.Path(path)


def _legible(names: Iterable[str], others: Iterable[str]) -> tuple[list[str], list[str], list[str]]:
  """(font families that together have what can be had, names and other texts as they can be drawn)."""
  texts = [[' '.join(str(text).split()) for text in some] for some in (names, others)]
  texts[0] = [name if len(name) <= _LONGEST else name[:_LONGEST - 1] + '…' for name in texts[0]]
  family, missing = _fonts({c for some in texts for text in some for c in text})
  table = {ord(c): c.encode('unicode_escape').decode() for c in missing} | {ord('$'): r'\$'}  # '$' begins mathematics
  drawn = [[text.translate(table) for text in some] for some in texts]
  return family, [f' {name}' if name.startswith('_') else name for name in drawn[0]], drawn[1]  # '_' hides from legends


def _fonts(characters):
  """(families, to be tried in this order for each character; the characters that none has)."""
  from matplotlib import font_manager

  family = ['sans-serif']
  missing = characters - _charset(font_manager.findfont(font_manager.FontProperties(family=family)))
  if not missing:
    return family, missing
  files = {font.name: font.fname for font in font_manager.fontManager.ttflist if not _UNFIT.match(font.name)}
  for name in sorted(files, key=lambda name: (not name.startswith(_PREFERRED), name)):
    if found := missing & _charset(files[name]):
      family.append(name)
      missing = missing - found
  return family, missing


def _charset(file):
  """The characters that a font file has; none where it cannot be read."""
  from matplotlib import font_manager

  with contextlib.suppress(RuntimeError, OSError, ValueError):
    return set(map(chr, font_manager.get_font(file).get_charmap()))
  return set()
