"""Which items train, validate and test: by shares, by time, by hash, and k-fold.

Texts that are equal but for case, width and white space, and items of one group, form a unit, which no boundary cuts.
Folds are scikit-learn's; shares, and stratified folds of units of several items, are allotted here: its three-part
shares, rounded twice, missed a class by up to 1.6 items, its StratifiedGroupKFold by 2.6 where texts repeat (here 0.8).

Shapes: N items, U units, C classes, P parts.
"""

from collections.abc import Callable, Hashable, Sequence
import dataclasses
import datetime
import hashlib
from typing import Any

import numpy as np
import scipy  # its modules are imported where they are first used: over a second

from lm.errors import ConfigError
from lm.text import scan

KINDS = {'random': (), 'stratified': ('labels',), 'grouped': ('groups',), 'stratified_grouped': ('labels', 'groups'),
         'time': ('times',)}  # of folds, with what each needs


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """Item numbers of each part, int64, ascending.

  Attributes:
    test: empty where two shares were asked for, and in folds.
    dropped: by time only: items of a later part whose text or group an earlier part has.
  """

  train: np.ndarray
  validation: np.ndarray
  test: np.ndarray
  dropped: np.ndarray


def random(texts: Sequence[str], fractions: Sequence[float], seed: int = 0) -> Split:
  """Parts of the given shares of the items, whatever they are: within one item where no text repeats.

  Args:
    fractions: shares of (train, validation) or (train, validation, test).

  Raises:
    ConfigError: shares that do not add up or leave a part empty, a field of another length, or a missing value.
  """
  return _by_share(texts, fractions, seed, None, None)


def stratified(texts: Sequence[str], labels: Sequence[Hashable], fractions: Sequence[float], seed: int = 0) -> Split:
  """As `random`; and each class is within one item of its share of each part, where no text of it repeats."""
  return _by_share(texts, fractions, seed, labels, None)


def grouped(texts: Sequence[str], groups: Sequence[Hashable], fractions: Sequence[float], seed: int = 0) -> Split:
  """As `random`; and the items of a group stay together. Shares are of items, not of groups."""
  return _by_share(texts, fractions, seed, None, groups)


def stratified_grouped(texts: Sequence[str], labels: Sequence[Hashable], groups: Sequence[Hashable],
                       fractions: Sequence[float], seed: int = 0) -> Split:
  """As `grouped`, with the classes spread as evenly as the groups allow."""
  return _by_share(texts, fractions, seed, labels, groups)


def by_time(texts: Sequence[str], times: Sequence[Any], fractions: Sequence[float], *,
            groups: Sequence[Hashable] | None = None) -> Split:
  """The first items train, the next validate, the last test; items of one moment stay together.

  An item whose text or group an earlier part has is dropped from the later one: on either side it would leak.

  Args:
    times: of one kind: numbers, dates, datetimes, numpy.datetime64, or ISO 8601 strings.
    fractions: shares of (train, validation) or (train, validation, test), before any are dropped.
  """
  _check_fractions(fractions)
  units_N, moments_N = units(texts, groups), moments(times, len(texts))
  cuts = _cuts(moments_N, np.cumsum(fractions)[:-1] * len(texts))
  return _parts(np.searchsorted(cuts, moments_N, 'right'), len(fractions), units_N)


def by_hash(texts: Sequence[str], fractions: Sequence[float], seed: int = 0,
            key: Callable[[str], str] = scan.duplicate_key) -> Split:
  """Each item goes by its text alone, so it stays where it is when items are added or removed.

  The part is sha1(key(text)) modulo 10, or 100, ...: test takes the lowest values, then validation, then train.

  Args:
    fractions: whole tenths, hundredths, thousandths or ten-thousandths; part sizes are right on average only.
    seed: hashed before the text unless 0.
    key: what texts that belong together have in common; `str` tells texts apart by their exact characters.
  """
  return _parts(hashed(texts, fractions, seed, key), len(fractions))


def hashed(texts: Sequence[str], fractions: Sequence[float], seed: int, key: Callable[[str], str]) -> np.ndarray:
  """int64 [N]: the part of each item in `by_hash`, 0 = train; a part may be empty."""
  _check_fractions(fractions)
  ends = np.cumsum(fractions[::-1])
  whole = [b for b in (10, 100, 1000, 10_000) if np.allclose(ends * b, np.round(ends * b), rtol=0, atol=1e-6)]
  if not whole:
    raise ConfigError(f'fractions={tuple(fractions)}; expected multiples of 1/10000 where a hash decides; round them')
  salt, buckets = f'{seed}\n' if seed else '', whole[0]
  digests = (hashlib.sha1((salt + key(t)).encode('utf-8', 'surrogatepass')).hexdigest() for t in texts)
  return len(ends) - 1 - np.searchsorted(np.round(ends * buckets), [int(d, 16) % buckets for d in digests], 'right')


def folds(texts: Sequence[str], k: int, kind: str = 'random', *, labels: Sequence[Hashable] | None = None,
          groups: Sequence[Hashable] | None = None, times: Sequence[Any] | None = None, repeats: int = 1,
          seed: int = 0) -> list[Split]:
  """k splits into train and validation, `repeats` times over; each item validates once in each k.

  By time, the window expands: of k + 1 runs of items each but the first validates what came before it, less the items
  whose text or group came before.

  Args:
    kind: one of `KINDS`; it must use every field that is given ('time' may use groups too).

  Raises:
    ConfigError: a field that `kind` lacks or does not use, or fewer units, or units of a class, or moments, than k.
  """
  given = {name for name, x in (('labels', labels), ('groups', groups), ('times', times)) if x is not None}
  _check_folds(k, kind, repeats, given)
  units_N = units(texts, groups)
  if kind == 'time':
    return _time_folds(units_N, moments(times, len(texts)), k)
  if units_N.max() < k - 1:
    raise ConfigError(f'k={k}: more than the {units_N.max() + 1} groups, or distinct texts; lower it')
  classes_N = None if labels is None else _classes(labels, units_N, k)
  return [_parts(np.isin(np.arange(len(units_N)), validation), 2) for r in range(repeats)
          for validation in _validations(units_N, classes_N, k, np.random.default_rng((seed, r)))]


def _check_folds(k, kind, repeats, given):
  if kind not in KINDS:
    raise ConfigError(f'kind={kind!r}; expected one of {", ".join(KINDS)}')
  if missing := set(KINDS[kind]) - given:
    raise ConfigError(f'{min(missing)}: not given; kind={kind!r} needs them')
  if unused := given - set(KINDS[kind]) - ({'groups'} if kind == 'time' else set()):
    raise ConfigError(f'{min(unused)}: given, but not used by kind={kind!r}; choose another kind, or leave them out')
  if k < 2 or repeats < 1 or repeats > 1 and kind == 'time':
    raise ConfigError(f'k={k}, repeats={repeats}; expected k >= 2 and repeats >= 1 (by time 1: nothing is random)')


def _validations(units_N, classes_N, k, rng):
  if classes_N is None:  # largest units first, each into the smallest fold; equal ones in the order of their numbers
    units_N = rng.permutation(units_N.max() + 1)[units_N]
    return [found for _, found in _model_selection().GroupKFold(k).split(units_N, groups=units_N)]
  if np.bincount(units_N).max() == 1:
    splitter = _model_selection().StratifiedKFold(k, shuffle=True, random_state=int(rng.integers(2 ** 31)))
    return [found for _, found in splitter.split(units_N, classes_N)]
  fold_N = _allot(units_N, classes_N, [1 / k] * k, rng)
  return [np.flatnonzero(fold_N == i) for i in range(k)]


def _time_folds(units_N, moments_N, k):
  if len(moments_N) <= k:
    raise ConfigError(f'k={k}: not below the {len(moments_N)} items; lower it')
  windows = _model_selection().TimeSeriesSplit(k).split(moments_N)
  cuts = [*_cuts(moments_N, [validation[0] for _, validation in windows]), moments_N.max() + 1]
  return [_parts(np.where(moments_N < last, moments_N >= first, -1), 2, units_N)
          for first, last in zip(cuts, cuts[1:], strict=False)]


def _model_selection():
  try:
    from sklearn import model_selection
  except ImportError as error:
    raise ConfigError(f"folds: no scikit-learn ({error}); run pip install -e '.[finetune]'") from error
  return model_selection


def _by_share(texts, fractions, seed, labels, groups):
  _check_fractions(fractions)
  units_N = units(texts, groups)
  classes_N = np.zeros_like(units_N) if labels is None else _classes(labels, units_N, len(fractions))
  return _parts(_allot(units_N, classes_N, fractions, np.random.default_rng(seed)), len(fractions))


def _allot(units_N, classes_N, fractions, rng):
  """Part of each item: larger units where they raise chi-square least, largest first; then single items, exactly."""
  sizes_U, totals_C = np.bincount(units_N), np.bincount(classes_N)
  goal_PC = np.outer(fractions, totals_C)
  have_PC, part_N = np.zeros_like(goal_PC), np.full(len(units_N), -1)
  members = np.split(np.argsort(units_N, kind='stable'), np.cumsum(sizes_U)[:-1])
  large = rng.permutation(np.flatnonzero(sizes_U > 1))
  for unit in large[np.argsort(-sizes_U[large], kind='stable')]:
    count_C = np.bincount(classes_N[members[unit]], minlength=len(totals_C))
    part = len(goal_PC) - 1 - np.argmin(((have_PC + count_C / 2) / goal_PC @ count_C)[::-1])  # of equals, the last
    part_N[members[unit]] = part
    have_PC[part] += count_C
  left_PC = np.maximum(goal_PC - have_PC, 0)
  singles_C = np.bincount(classes_N[part_N < 0], minlength=len(totals_C))
  for c, counts_P in enumerate(_whole(left_PC * singles_C / np.maximum(left_PC.sum(0), 1e-9), rng).T):
    single = rng.permutation(np.flatnonzero((part_N < 0) & (classes_N == c)))
    part_N[single] = np.repeat(np.arange(len(counts_P)), counts_P)
  return part_N


def _whole(goal_PC, rng):
  """Whole numbers next to those of `goal_PC`, of the same column sums, the row sums rounded too.

  The bounds of this transport problem are whole, so its vertices are. The rows of the largest remainders, of equals
  the smallest, are rounded up; beyond that, random costs choose the vertex.
  """
  parts, classes = goal_PC.shape
  goal_PC = np.round(goal_PC, 9)
  rows_P, columns_C = np.round(goal_PC.sum(1), 6), np.round(goal_PC.sum(0))
  turn_P = np.argsort(np.lexsort((-rows_P, rows_P % 1)))
  cost_PC = rng.random((parts, classes)) - parts * classes * turn_P[:, None]
  by_row = scipy.sparse.kron(scipy.sparse.eye_array(parts), np.ones((1, classes)))
  found = scipy.optimize.linprog(
      cost_PC.ravel(), A_ub=scipy.sparse.vstack([by_row, -by_row]), b_ub=[*np.ceil(rows_P), *-np.floor(rows_P)],
      A_eq=scipy.sparse.kron(np.ones((1, parts)), scipy.sparse.eye_array(classes)), b_eq=columns_C,
      bounds=np.stack([np.floor(goal_PC), np.ceil(goal_PC)], -1).reshape(-1, 2), method='highs-ds')
  return np.round(found.x).astype(int).reshape(parts, classes)


def units(texts: Sequence[str], groups: Sequence[Hashable] | None) -> np.ndarray:
  """int64 [N], the unit of each item: equal keys of texts, and equal groups, join items."""
  keys_N = _codes('texts', [scan.duplicate_key(text) for text in texts], len(texts))
  if groups is None:
    return keys_N
  groups_N = keys_N.max() + 1 + _codes('groups', groups, len(texts))
  joined = scipy.sparse.coo_array((np.ones(len(keys_N)), (keys_N, groups_N)), (groups_N.max() + 1,) * 2)
  return scipy.sparse.csgraph.connected_components(joined, directed=False)[1][keys_N].astype(np.int64)


def _classes(labels, units_N, least):
  """Class of each item; an error where one has fewer units than folds or parts."""
  classes_N = _codes('labels', labels, len(units_N))
  units_C = np.bincount(np.unique(np.stack([classes_N, units_N]), axis=1)[0])
  if units_C.min() < least:
    name = str(labels[int(np.argmax(classes_N == units_C.argmin()))])[:60]
    raise ConfigError(f'labels: class {name!r} has {units_C.min()} distinct texts or groups, fewer than the {least} '
                      'folds or parts; merge or remove it')
  return classes_N


def _codes(name, values, n):
  """int64 [n]: 0, 1, ... in the order in which the values first come."""
  if not n or len(values) != n:
    raise ConfigError(f'{name}: {len(values)} for {n} texts; expected one each, and at least one')
  if missing := [i for i, value in enumerate(values) if value is None or value != value]:
    raise ConfigError(f'{name}: item {missing[0]} has none; fill it in or leave the item out')
  number: dict[Hashable, int] = {}
  return np.array([number.setdefault(v, len(number)) for v in values], np.int64)


def moments(times: Sequence[Any], n: int) -> np.ndarray:
  """int64 [n]: the rank of each item's time among the distinct times; ConfigError unless all are of one kind."""
  _codes('times', times, n)
  try:
    times = [datetime.datetime.fromisoformat(t) if isinstance(t, str) else t for t in times]
    rank = {t: i for i, t in enumerate(sorted(set(times)))}
  except (TypeError, ValueError) as error:
    raise ConfigError(f'times: {str(error)[:90]}; expected one kind: all numbers, or all dates (ISO 8601 if strings), '
                      'all with or all without a zone; convert them') from error
  return np.array([rank[t] for t in times], np.int64)


def _cuts(moments_N, wanted):
  """The moments at which parts begin, each with as near as can be to `wanted` items before it."""
  before = np.cumsum(np.bincount(moments_N))  # items up to each moment
  cuts = [int(np.argmin(np.abs(before - count))) + 1 for count in wanted]
  if any(a >= b for a, b in zip([0, *cuts], [*cuts, len(before)], strict=True)):
    raise ConfigError(f'times: {len(before)} distinct ones do not give {len(cuts) + 1} parts, for items of one moment '
                      'stay together; ask for fewer parts, or give finer times')
  return cuts


def _parts(part_N, parts, units_N=None):
  """The split by part numbers (below 0: in none), less what, by `units_N`, an earlier part has."""
  units_N, first_U = np.arange(len(part_N)) if units_N is None else units_N, np.full(len(part_N), parts)
  np.minimum.at(first_U, units_N[part_N >= 0], part_N[part_N >= 0])
  dropped_N = part_N > first_U[units_N]
  found = [np.flatnonzero((part_N == i) & ~dropped_N) for i in range(3)]
  if empty := [name for name, x in zip(('train', 'validation', 'test'), found[:parts], strict=False) if not len(x)]:
    raise ConfigError(f'fractions: {empty[0]} would be empty, of {len(part_N)} items ({dropped_N.sum()} dropped, which '
                      'repeat earlier ones); raise its share, ask for fewer parts, or add items')
  return Split(*found, np.flatnonzero(dropped_N))


def _check_fractions(fractions):
  if not (len(fractions) in (2, 3) and all(f > 0 for f in fractions) and abs(sum(fractions) - 1) < 1e-6):
    raise ConfigError(f'fractions={tuple(fractions)}; expected two or three shares above 0 that add up to 1, not to '
                      f'{sum(fractions):.6g}')
