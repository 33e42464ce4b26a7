"""Which split a record goes to: what it says, else what another record of its text says, else what a config chooses.

Records have `split` (one of `examples.SPLITS`, or None) and `origin`, 'file:line'. Texts that are equal but for case,
width, white space and what is invisible (`scan.duplicate_key`) are one text, and no text is in two splits.
"""

from collections.abc import Callable, Hashable, Sequence
import dataclasses
import datetime
import itertools
from typing import Any

from lm.data import examples, splits, turns
from lm.data.json_io import Fault
from lm.errors import ConfigError, DataError
from lm.text import scan


def divided(files: Sequence[tuple[str, Sequence[Any], examples.Report]], c: Any, text: Callable[[Any], str],
            question: Callable[[Any], str]) -> list[tuple[Any, str]]:
  """The records of files that can be used, each with its split; prints what cannot.

  Args:
    files: (path, records, what was wrong with others) of each.
    c: with `on_error` and `validation_fraction`.
    text: what records have in common that may not be in two splits. question: what a split is drawn by.

  Raises:
    DataError: one text in two splits. ConfigError: nothing left for a part by chance.
  """
  found = [e for _, some, _ in files for e in some]
  keys_N = keys(found, list(map(text, found)))
  wrong_N = conflicts(found, keys_N) if c.on_error == 'skip' else [None] * len(found)
  at = iter(wrong_N)
  for path, some, report in files:
    report = report.without([fault for fault in itertools.islice(at, len(some)) if fault])
    if not report.complete:
      print(f'{path}:\n{report.table()}', flush=True)
  kept = [i for i, fault in enumerate(wrong_N) if fault is None]
  found = [found[i] for i in kept]
  said = declared(found, [keys_N[i] for i in kept])
  found = [dataclasses.replace(e, split=part) for e, part in zip(found, said, strict=True)]
  return list(zip(found, assigned(found, list(map(question, found)), c.validation_fraction), strict=True))


def open_to_chance(found: Sequence[Any], texts: Sequence[str], validation_fraction: float) -> Sequence[Any]:
  """The records; where all are for training or testing, those for training say nothing, so that some are held out.

  But not where scripts.augment wrote copies of them, or none would be held out.
  """
  copies = {_id(e) for e in found} & {_copied(e) for e in found}
  if copies or any(e.split not in ('train', 'test') for e in found):
    return found
  train = [scan.duplicate_key(text) for e, text in zip(found, texts, strict=True) if e.split == 'train']
  parts = set(_hashed(train, validation_fraction)) if train else ()
  return found if len(parts) < 2 else [
      dataclasses.replace(e, split=None) if e.split == 'train' else e for e in found]


def keys(found: Sequence[Any], texts: Sequence[str]) -> list[str]:
  """What records of one text have in common, after a look at the splits that they say (DataError)."""
  for e in found:
    if e.split not in (None, *examples.SPLITS):
      raise DataError(f'{e.origin}: split {e.split!r}; expected {", ".join(examples.SPLITS)}')
  return [scan.duplicate_key(text) for text in texts]


def declared(found: Sequence[Any], keys_N: Sequence[Hashable], by: str = '') -> list[str | None]:
  """The split that each record says, else that of another record of the same key, None where none says one.

  Args:
    by: the field that the keys are of, besides the text; '' = of the text alone.

  Raises:
    DataError: two splits of one key.
  """
  said = {}
  for e, key in zip(found, keys_N, strict=True):
    other = e if e.split is None else said.setdefault(key, e)
    if other.split != e.split:
      raise _clash(e, other, by)
  return [said[key].split if key in said else None for key in keys_N]


def conflicts(found: Sequence[Any], keys_N: Sequence[Hashable], by: str = '') -> list[Fault | None]:
  """The faults (kind 'split') of records to leave out so that `declared` raises nothing; None for the others.

  What is held out stays, and what is for training goes; of validation and test, test stays.
  """
  stays = {}
  for part, (e, key) in itertools.product(examples.SPLITS, zip(found, keys_N, strict=True)):
    if e.split == part and (key not in stays or stays[key].split != part):
      stays[key] = e
  return [_clash(e, stays[key], by) if e.split and e.split != stays[key].split else None
          for e, key in zip(found, keys_N, strict=True)]


def _clash(e, other, by):
  same, todo = 'text', 'remove one of the two, as scripts.quality_check --clean does'
  if by:
    same, todo = f'text or {by}, or a chain of them,', "take out the field split, or set data.on_error='skip'"
  return Fault('split', e.origin, f'split {e.split!r}, but the same {same} at {other.origin} has split '
               f'{other.split!r}; expected one split for each {by or "text"}, or what is held out is trained on', todo)


def assigned(found: Sequence[Any], texts: Sequence[str], validation_fraction: float) -> list[str]:
  """The split of each record: its own, else that of a record of the same text, else by a hash of the text.

  No text is in two splits but where the records say so: then the others of this text are held out as any is.

  Raises:
    DataError: another split. ConfigError: nothing to train on or to validate with, of all records.
  """
  keys_N = keys(found, texts)
  found = open_to_chance(found, texts, validation_fraction)
  said = {key: part for part in examples.SPLITS for e, key in zip(found, keys_N, strict=True) if e.split == part}
  parts = [e.split or said.get(key) for e, key in zip(found, keys_N, strict=True)]
  if undecided := [i for i, part in enumerate(parts) if part is None]:
    drawn = _hashed([keys_N[i] for i in undecided], validation_fraction)
    for i, part in zip(undecided, drawn, strict=True):
      parts[i] = examples.SPLITS[part]
    check_parts(parts, validation_fraction)
  return parts


def _hashed(keys, validation_fraction):
  """0 = train, 1 = validation, of each; the share in ten thousandths, as a hash decides."""
  share = max(round(validation_fraction, 4), 0.0001)
  return splits.hashed(keys, (1 - share, share), 0, str)


def check_parts(parts: Sequence[str | None], validation_fraction: float) -> None:
  """ConfigError unless something trains and something validates."""
  for part in ('train', 'validation'):
    if part not in parts:
      raise ConfigError(f'data.validation_fraction={validation_fraction}: of {len(parts)} records none is left for '
                        f'{part}; expected at least one; change the share, say the split of some, or add records')


def faults(found: Sequence[examples.Labelled], texts: Sequence[str], c: Any) -> list[Fault | None]:
  """Why `labelled` could not split with a record in the set, None of those with which it can.

  Args:
    c: a `lm.data.labelled.Config`.
  """
  wrong: list[Fault | None] = [None] * len(found)
  value_of = _reader(found, c)
  for i, e in enumerate(found if c.by else ()):
    try:
      value_of(e)
    except Fault as fault:
      wrong[i] = fault
  if rest := [i for i, fault in enumerate(wrong) if fault is None]:
    some = conflicts(*_said([found[i] for i in rest], [texts[i] for i in rest], c))
    for i, fault in zip(rest, some, strict=True):
      wrong[i] = fault
  return wrong


def labelled(found: Sequence[examples.Labelled], texts: Sequence[str], c: Any) -> list[str | None]:
  """The split of each example as a `lm.data.labelled.Config` chooses, None: left out.

  Raises:
    DataError: two splits of a text or group, no field `c.by`, or one trains that is later than one held out.
    ConfigError: too few texts, groups or times for the shares or folds.
  """
  said = declared(*_said(found, texts, c))
  if not c.folds and (opened := open_to_chance(found, texts, c.validation_fraction)) is not found:
    found, said = opened, declared(*_said(opened, texts, c))
  if c.split == 'hash' and not c.folds:
    return assigned(found, texts, c.validation_fraction)
  values = list(map(_reader(found, c), found)) if c.by else None
  if c.split == 'time':
    values = splits.moments(values, len(found)).tolist()
  if c.folds:
    parts = _folded(found, texts, said, values, c)
  else:
    parts = _shared(found, texts, said, values, c)
  if c.split == 'time':
    _check_order(found, parts, values, c.by)
  return parts


def _class(e):
  """What shares are equal in; numbers are of one kind."""
  return e.label if isinstance(e.label, str) else ''


def _shared(found, texts, said, values, c):
  """By shares. What a text's own time does not put where the text is said to be is left out."""
  parts = [e.split for e in found] if c.split == 'time' else list(said)
  if open_ := [i for i, part in enumerate(parts) if part is None]:
    some, shares = [texts[i] for i in open_], (1 - c.validation_fraction, c.validation_fraction)
    labels, by = [_class(found[i]) for i in open_], [values[i] for i in open_] if values else None
    split = (splits.by_time(some, by, shares) if c.split == 'time' else
             splits.stratified_grouped(some, labels, by, shares) if c.split == 'grouped' else
             splits.stratified(some, labels, shares))
    for name in ('train', 'validation'):
      for i in getattr(split, name):
        parts[open_[i]] = name if said[open_[i]] in (None, name) else None
  return parts


def _folded(found, texts, said, values, c):
  """By folds. Copies that scripts.augment wrote change nothing for the others, and train where their originals do.

  But not if what is held out has their text: then they are left out, as those are of what does not train.
  """
  own, copied = [e.split for e in found] if c.split == 'time' else said, [_copied(e) for e in found]
  if not {_id(e) for e in found} & set(copied):  # ids that only look so
    copied = [None] * len(found)
  parts = ['test' if part == 'test' else None for part in own]
  pool = [i for i, part in enumerate(said) if part != 'test' and copied[i] is None]
  fields = {} if c.split == 'time' else {'labels': [_class(found[i]) for i in pool]}
  if values:
    fields['times' if c.split == 'time' else 'groups'] = [values[i] for i in pool]
  kind = {'grouped': 'stratified_grouped', 'time': 'time'}.get(c.split, 'stratified')
  split = splits.folds([texts[i] for i in pool], c.folds, kind, seed=0, **fields)[c.fold]
  for name in ('train', 'validation'):
    for i in getattr(split, name):
      parts[pool[i]] = name
  trains, held = {}, set()  # {id: whether all records of it train}; keys of texts that are held out
  for e, text, part, of in zip(found, texts, parts, copied, strict=True):
    if of is None:
      trains[_id(e)] = part == 'train' and trains.get(_id(e), True)
      held |= {scan.duplicate_key(text)} if part != 'train' else set()
  for i, of in enumerate(copied):
    if of is not None and parts[i] != 'test':
      trains[_id(found[i])] = trains.get(of, False) and scan.duplicate_key(texts[i]) not in held
      parts[i] = 'train' if trains[_id(found[i])] else None
  return parts


def _id(example):
  return str(getattr(example, 'metadata', {}).get('id'))


def _copied(example):
  """The id of the record that scripts.augment made this one of; None of what is no copy."""
  origin = str(getattr(example, 'metadata', {}).get('origin'))
  return origin if _id(example).rpartition('#')[0] == origin else None


def _said(found, texts, c):
  """What `declared` is given. Groups that share a text are one; to folds what is not for testing is all the same."""
  keys_N = keys(found, texts)
  if c.split != 'grouped':
    return found, keys_N, ''
  units_N = splits.units(texts, list(map(_reader(found, c), found))).tolist()
  if c.folds:
    found = [dataclasses.replace(e, split='train') if e.split == 'validation' else e for e in found]
  return found, units_N, c.by


def _reader(found, c):
  """A function: a record's group or time. Times in strings, as in CSV, are numbers if more can be these than dates."""
  if c.split != 'time':
    return lambda e: _value(e, c, None)
  written = [value for e in found if isinstance(value := e.metadata.get(c.by), str)]
  fitting = lambda read: sum(_parsed(read, value) is not None for value in written)
  read = float if fitting(float) > fitting(datetime.datetime.fromisoformat) else datetime.datetime.fromisoformat
  return lambda e: _value(e, c, read)


def _parsed(read, value):
  try:
    return read(value)
  except ValueError:
    return None


def _value(e, c, read):
  """The group or time of a record; read: of a time that is a string."""
  value, timed = e.metadata.get(c.by), c.split == 'time'
  if timed and isinstance(value, str) and (parsed := _parsed(read, value)) is not None:
    value = parsed
  fits = isinstance(value, str | int | float | datetime.date) and value == value and value != ''
  fits = fits and not (timed and isinstance(value, str))
  if not fits:
    want = 'a number, or a date as ISO 8601 writes it' if timed else 'a string or a number'
    what = 'no such field' if c.by not in e.metadata else (
        f'found {value[:40]!r}' if isinstance(value, str) else f'found {turns.describe(value)}')
    raise Fault('missing' if value in (None, '') else 'type', e.origin, f'field {c.by} of data.by: {what}; expected '
                f'{want}')
  return value


def _check_order(found, parts, moments_N, by):
  placed = [(moment, i) for i, moment in enumerate(moments_N) if parts[i]]
  last = max((x for x in placed if parts[x[1]] == 'train'), default=None)
  first = min((x for x in placed if parts[x[1]] != 'train'), default=None)
  if last and first and last[0] > first[0]:
    (e, part), (other, held) = ((found[i], parts[i]) for _, i in (last, first))
    raise DataError(f'{e.origin}: split {part!r}, {by} {e.metadata[by]!r}, is later than {other.origin}, split '
                    f"{held!r}, {by} {other.metadata[by]!r}; expected what trains to come first, as data.split='time' "
                    'has it; take out the field split, or choose another data.split')
