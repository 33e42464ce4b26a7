"""Records out of CSV and TSV, streamed, each with the line where it begins."""

from collections.abc import Iterator
import csv
import itertools
import re

from lm.data import json_io
from lm.data.json_io import Fault, Limits, Row

_QUOTED = re.compile('"(?:[^"]|"")*"')
_LISTED = ('messages', 'conversation', 'conversations', 'metadata', 'history', 'answers', 'grades')
_NESTED = dict.fromkeys(_LISTED, re.compile(r'\s*[\[{]')) | dict.fromkeys(  # when a CSV cell holds JSON
    ('prompt', 'chosen', 'rejected'), re.compile(r"""\s*\[?\s*\{\s*["'](?:role|content|from|value)["']"""))


class _Long(Exception):
  pass


class _Texts:
  """Lines for `csv`; a byte that is not of the encoding becomes a lone surrogate. A generator would end at `_Long`."""

  def __init__(self, path, encoding, size):
    self.lines, self.encoding, self.number, self.room = json_io.lines(path, size), encoding, 0, size

  def __iter__(self):
    return self

  def __next__(self):
    self.number, line, _ = next(self.lines)
    self.room -= len(line or b'')
    if line is None or self.room < -2:  # the end of the row's last line does not count
      raise _Long
    return line.decode(self.encoding, 'surrogateescape')


def _cells(path, encoding, size, delimiter):
  """(origin of the line where it begins, cells or Fault) of each row."""
  texts, columns = _Texts(path, encoding, size), 0
  while True:
    origin, texts.room = f'{path}:{texts.number + 1}', size
    before = csv.field_size_limit(size)  # one for all readers of the process: it is put back
    try:
      line = next(texts)
      found = line.rstrip('\r\n').split('\t') if delimiter == '\t' else ()
      if columns and len(found) == columns:  # most TSV has no quotes that mean more than quotes
        found = [cell[1:-1].replace('""', '"') if _QUOTED.fullmatch(cell) else cell for cell in found]
      else:
        found = next(csv.reader(itertools.chain([line], texts), delimiter=delimiter, strict=True))
      columns = columns or len(found)
    except StopIteration:
      return
    except (csv.Error, _Long) as error:
      if isinstance(error, _Long) or 'larger than' in str(error):
        found = Fault('too long', origin, f'row of more than {size} bytes; expected a shorter one, or its quote closed')
      else:
        kind = 'truncated' if 'unexpected end' in str(error) else 'csv'
        found = Fault(kind, origin, f'{error}; expected cells quoted as RFC 4180 has it')
    finally:
      csv.field_size_limit(before)
    yield origin, found


def read(path: str, encoding: str, limits: Limits, delimiter: str) -> Iterator[Row | Fault]:
  """A record a row, its fields named by the first; a Fault is raised where that row is wrong. TSV may be unquoted."""
  parser, header = json_io.Parser(), None
  for origin, cells in _cells(path, encoding, limits.size, delimiter):
    if isinstance(cells, Fault):
      if header is None:
        raise cells
      yield cells
    elif header is None and cells:
      header = [name.strip() for name in cells]
      header[0] = header[0] or 'index'  # pandas writes its index so
      if len(set(header)) < len(header) or '' in header:
        raise Fault('header', origin, 'a field name twice, or empty; expected distinct names', 'rename the columns')
    elif cells and len(cells) != len(header):
      yield Fault('cells', origin, f'{len(cells)} cells; expected {len(header)}: {", ".join(header)[:60]}',
                  'quote a cell that holds the delimiter or a newline')
    elif cells:
      fields, fault = dict(zip(header, cells, strict=True)), None
      for name, begins in _NESTED.items():
        if begins.match(fields.get(name, '')):
          item = parser.record(fields[name].strip(), f'{origin}: field {name}')
          fields[name], fault = (None, item) if isinstance(item, Fault) else (item.fields, fault)
      yield fault or Row(origin, fields)
