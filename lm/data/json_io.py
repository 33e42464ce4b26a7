"""Records out of JSON lines and JSON lists, each with its line; what a record may hold at all, whatever its format.

A reader yields a `Row` for a record and a `Fault` for one that cannot be used, in the order of the file, and raises a
`Fault` where no record can be told from the next any more.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import itertools
import json
import pathlib
import re
from typing import Any

from lm.errors import DataError

_BOM = b'\xef\xbb\xbf'
_SPACE = re.compile(r'[ \t\r\n]*')
_SURROGATE = re.compile('[\ud800-\udfff]')


class Fault(DataError):
  """One record that cannot be used.

  Attributes:
    kind: what a report counts it under: 'json', 'missing', 'label', ...
    origin: 'file:line' or 'file, row N'.
  """

  def __init__(self, kind: str, origin: str, what: str, todo: str = 'repair or remove the record'):
    what = ''.join(c if c.isprintable() else ' ' for c in what)  # names of fields may hold anything
    super().__init__(f'{origin or "example"}: {what}; {todo}')
    self.kind, self.origin = kind, origin


@dataclasses.dataclass(frozen=True)
class Row:
  """A record as it was read: `fields` is a mapping wherever the file is sound; `split` is that of its file, if any."""

  origin: str
  fields: Any
  split: str | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a record may be: `size` bytes of a line (characters of all strings together), `depth` levels of nesting."""

  size: int = 1 << 20
  depth: int = 16


def sound(items: Iterable[Row | Fault], limits: Limits) -> Iterator[Row | Fault]:
  """The items, with a Fault in place of a record that is too long or deep, or holds NUL or what is not Unicode."""
  for item in items:
    found = _flaw(item.fields, limits) if isinstance(item, Row) else None
    yield Fault(found[0], item.origin, found[1]) if found else item


def _flaw(value, limits):
  room = limits.size

  def walk(value, depth, where):
    nonlocal room
    if isinstance(value, str):
      room -= len(value)
      if room < 0:
        return 'too long', f'record of more than {limits.size} characters; expected a shorter one'
      if '\0' in value:
        return 'nul', f'field {where[:60]}: NUL at character {value.index(chr(0))}; expected text'
      if bad := _SURROGATE.search(value):
        return 'encoding', (f'field {where[:60]}: character {bad.start()} is not of the encoding, or a lone surrogate; '
                            'expected Unicode text')
      return None
    if not isinstance(value, Mapping | list):
      return None
    if depth > limits.depth:
      return 'depth', f'field {where[:60]}: nested deeper than {limits.depth} levels; expected a flatter record'
    listed = isinstance(value, list)
    names = () if listed else (walk(str(key), depth, f'{where or "record"}, a name in it') for key in value)
    found = (walk(item, depth + 1, f'{where}[{key}]' if listed else f'{where}.{key}'.lstrip('.'))
             for key, item in (enumerate(value) if listed else value.items()))
    return next(filter(None, itertools.chain(names, found)), None)
  return walk(value, 1, '')


class Parser:
  """Strict JSON. What Python lets pass against the standard is noted, so that a reader can go on behind it."""

  def __init__(self):
    self._notes = []
    self._json = json.JSONDecoder(object_pairs_hook=self._pairs, parse_constant=self._constant)

  def _pairs(self, items):
    found = dict(items)
    if len(found) < len(items):
      keys = [k for k, _ in items]
      seen = set()
      twice = next(k for k in keys if k in seen or seen.add(k))
      self._notes.append(('duplicate key', f'key {twice[:60]!r} twice in one object; expected distinct keys'))
    return found

  def _constant(self, name):
    self._notes.append(('nan', f'{name}, which JSON does not have; expected a value'))

  def record(self, text: str, origin: str) -> Row | Fault:
    """The record that `text` is; the kind is 'truncated' where it breaks only because it ends."""
    try:
      item, end = self.first(text, 0, origin)
    except Fault as fault:
      return fault
    return Fault('json', origin, f'text after the record, from character {end}; expected one record'
                 ) if text[end:].strip() else item

  def first(self, text: str, at: int, origin: str) -> tuple[Row | Fault, int]:
    """(the record that begins at `at`, where it ends); raises the Fault of one whose end cannot be found."""
    self._notes.clear()
    try:
      value, end = self._json.raw_decode(text, at)
    except RecursionError as error:
      raise Fault('depth', origin, 'nested too deep to be read; expected a flatter record') from error
    except ValueError as error:
      cut = isinstance(error, json.JSONDecodeError) and (
          error.pos >= len(text.rstrip()) or error.msg.startswith('Unterminated'))
      what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)[:60]
      raise Fault('truncated' if cut else 'json', origin, f'broken JSON ({what}); expected a record') from error
    return (Fault(self._notes[0][0], origin, self._notes[0][1]) if self._notes else Row(origin, value)), end


def lines(path: str, size: int) -> Iterator[tuple[int, bytes | None, bool]]:
  """(number from 1, bytes without a byte order mark or None where longer than `size`, does it end with a newline)."""
  with open(path, 'rb') as f:
    number = 0
    while line := f.readline(size + 1):
      number += 1
      whole = line.endswith(b'\n')
      fits = whole or len(line) <= size
      while not whole and (more := f.readline(1 << 20)):
        whole = more.endswith(b'\n')
      yield number, (line.removeprefix(_BOM) if number == 1 else line) if fits else None, whole


def read_lines(path: str, encoding: str, limits: Limits) -> Iterator[Row | Fault]:
  """A record a line, blank lines left out; streamed, and never more than `limits.size` of a line in memory."""
  parser = Parser()
  for number, line, whole in lines(path, limits.size):
    origin = f'{path}:{number}'
    if line is None:
      yield Fault('too long', origin, f'line of more than {limits.size} bytes; expected a shorter one')
      continue
    try:
      text = line.decode(encoding).strip(' \t\r\n')
    except UnicodeDecodeError as error:
      cut = not whole and error.end == len(line)
      yield Fault('truncated' if cut else 'encoding', origin, f'byte {error.start} of the line is not {encoding} '
                  f'({error.reason}); expected {encoding}', 're-encode it, as scripts.quality_check --encoding does')
      continue
    if '\0' in text:
      yield Fault('nul', origin, f'NUL at character {text.index(chr(0))} of the line; expected text')
    elif text:
      item = parser.record(text, origin)
      if isinstance(item, Fault) and item.kind == 'truncated' and whole:
        item.kind = 'json'  # cut short, but not where the file ends
      yield item


def read_list(path: str, encoding: str, limits: Limits) -> Iterator[Row | Fault]:
  """The records of one list, held in memory; a file that begins with anything but '[' is read as JSON lines."""
  text = pathlib.Path(path).read_bytes().removeprefix(_BOM).decode(encoding, 'surrogateescape')
  at = _SPACE.match(text).end()
  if text[at:at + 1] != '[':
    del text
    yield from read_lines(path, encoding, limits)
    return
  parser, line, counted = Parser(), 1, 0
  at = _SPACE.match(text, at + 1).end()
  closed = text[at:at + 1] == ']'
  while not closed:
    line, counted = line + text.count('\n', counted, at), at
    try:
      item, at = parser.first(text, at, f'{path}:{line}')
    except Fault as fault:
      raise Fault(fault.kind, f'{path}:{line}', 'the list breaks in this record; expected JSON',
                  'repair the file, or write a record a line, so that a bad one costs one line') from fault
    yield item
    at = _SPACE.match(text, at).end()
    closed = text[at:at + 1] == ']'
    if not closed and text[at:at + 1] != ',':
      raise Fault('json' if at < len(text) else 'truncated', f'{path}:{line}', "the list breaks after this record; "
                  "expected ',' or ']'", 'repair the file')
    at = at if closed else _SPACE.match(text, at + 1).end()
  if text[at + 1:].strip():
    raise Fault('json', path, "text after the list; expected the file to end with its ']'", 'write one list')
