"""Records out of files of any format and out of folders of them, each with where it stands.

JSON lines, CSV, TSV, Parquet and Arrow are streamed; a JSON list and YAML are held in memory. What is wrong with a file
as a whole is raised: damaged Parquet, a broken JSON list, two header cells alike.
"""

from collections.abc import Iterator
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import re

from lm.data import corpora, csv_io, json_io
from lm.data.json_io import Fault, Limits, Row
from lm.errors import ConfigError, DataError

_BATCH = 1024  # rows of Parquet that are Python objects at a time
_DICTIONARY, _STATE = 'dataset_dict.json', 'state.json'  # by which `datasets` knows what it saved
_SPLITS = {'valid': 'validation', 'val': 'validation', 'dev': 'validation'}
_SPLIT_NAME = re.compile(r'(?i)((train|validation|valid|val|dev|test)(?:_(?:sft|gen|prefs|matched|(mismatched)))?)'
                         r'(?:-\d+-of-\d+(?:-\w+)?)?')


def rows(path: str | os.PathLike, encoding: str = 'utf-8', limits: Limits | None = None) -> Iterator[Row | Fault]:
  """The records of a file or folder, in a fixed order.

  By ending: .jsonl .ndjson (a record a line), .json (a list of records, or lines), .csv .tsv (the first row names the
  fields), .parquet, .yml .yaml (ChatterBot's conversations). A folder is one that the `datasets` library saved to disk,
  or holds files of one format, at any depth; where it holds Parquet, other files are left alone. Class numbers of
  `datasets` become their names. The split of a row is that of the saved dictionary, or of the file or else the nearest
  folder, up to `path`, that is called 'train', 'validation' or 'test' ('valid', 'val', 'dev'; 'train_sft', 'train_gen',
  'train_prefs', 'validation_matched' and the numbers that the Hub puts behind).

  Of a folder, 'validation_mismatched' and its like are not read, nor are splits of a saved dictionary with any other
  name: `left_alone` names them. One that is itself the path is read, and says no split.

  Raises:
    ConfigError: an unknown encoding, or a library that the format needs is missing.
    DataError: nothing to read, or a file that is damaged as a whole.
  """
  path, limits = os.fspath(path), limits or Limits()
  check_encoding(encoding)
  encoding = encoding.lower().replace('-sig', '').replace('_sig', '')  # a byte order mark is dropped anyway
  parts, left = _parts(path)
  if left and not parts:
    raise DataError(f'{path}: {", ".join(left)}; expected a split called train, validation or test; name one of these')
  saved = any(os.path.exists(os.path.join(path, name)) for name in (_DICTIONARY, _STATE))
  for part, split in parts:
    for item in json_io.sound(_saved(part), limits) if saved else _file(part, encoding, limits):
      yield dataclasses.replace(item, split=split) if split and isinstance(item, Row) else item


def left_alone(path: str | os.PathLike) -> tuple[str, ...]:
  """The names of the splits of a folder that `rows` does not read: they neither train, nor validate, nor test."""
  return tuple(_parts(os.fspath(path))[1])


def split_of(name: str) -> str | None:
  """'train', 'validation' or 'test', whichever a name means ('dev', 'test_matched'); None: none of them."""
  found = _SPLIT_NAME.fullmatch(name)
  return _SPLITS.get(found[2].lower(), found[2].lower()) if found and not found[3] else None


def _parts(path):
  """([(a file, or a dataset that was saved, and its split)], names of the splits that are left alone)."""
  if os.path.exists(os.path.join(path, _DICTIONARY)):
    folders = {name: _inside(path, name) for name in _manifest(path, _DICTIONARY, 'splits')}
    return ([(folder, split_of(name)) for name, folder in folders.items() if split_of(name)],
            [name for name in folders if not split_of(name)])
  if not os.path.isdir(path):
    return [(path, split_of(pathlib.Path(path).stem))], []
  here = split_of(pathlib.Path(os.path.abspath(path)).name)
  if os.path.exists(os.path.join(path, _STATE)):
    return [(path, here)], []
  parts, left = [], {}
  for file in _found(path):
    names = file.stem, *file.relative_to(path).parts[-2::-1]
    said = next(filter(None, map(_SPLIT_NAME.fullmatch, names)), None)
    if said and said[3]:
      left[said[1]] = True
    else:
      parts.append((str(file), split_of(said[0]) if said else here))
  return parts, list(left)


def _found(folder):
  found = sorted(p for p in pathlib.Path(folder).rglob('*') if p.suffix.lower() in _READERS and p.is_file())
  found = [p for p in found if p.suffix.lower() == '.parquet'] or found
  if len({_READERS[p.suffix.lower()] for p in found}) != 1:
    raise DataError(f'{folder}: {", ".join(sorted({p.suffix for p in found})) or "no file that can be read"}; expected '
                    f'files of one format ({" ".join(_READERS)}), or a dataset saved to disk; name one file')
  return found


def _file(path, encoding, limits):
  suffix = pathlib.Path(path).suffix.lower()
  if suffix not in _READERS:
    raise DataError(f'{path}: ending {suffix!r}; expected one of {" ".join(_READERS)}; rename or convert the file')
  try:
    yield from json_io.sound(_READERS[suffix](path, encoding, limits), limits)
  except OSError as error:
    raise DataError(f'{path}: {error.strerror or _line(error)}; expected a file that can be read; check the path'
                    ) from error


def check_encoding(encoding: str, name: str = 'encoding') -> None:
  """ConfigError unless text files can be read by it; `name`: of the field that says so."""
  try:
    plain = all(text.encode('ascii').decode(encoding) == text for text in (''.join(map(chr, range(128))), '\x1b$B!!'))
  except UnicodeDecodeError:
    plain = False
  except LookupError as error:
    raise ConfigError(f'{name}={encoding!r}: {error}; expected one that Python knows, such as utf-8 or gb18030'
                      ) from error
  if not plain:
    raise ConfigError(f'{name}={encoding!r}: not every ASCII character is its byte in it; expected utf-8, gb18030 or '
                      'another where it is; convert the file to utf-8')


def _library(name, format):
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ConfigError(f"{format}: {name} is not installed; expected it; pip install -e '.[finetune]'") from error


def _parquet(path, encoding, limits):
  arrow, parquet = _library('pyarrow', path), _library('pyarrow.parquet', path)
  try:
    with parquet.ParquetFile(path) as f:
      yield from _batches(f.iter_batches(_BATCH), f.schema_arrow, path)
  except (arrow.ArrowException, ValueError, OSError) as error:
    if getattr(error, 'errno', None):  # the file system's; without a number it is Parquet's
      raise
    raise DataError(f'{path}: {_line(error)}; expected a whole Parquet file; copy or write it again') from error


def _saved(folder):
  """Rows of a folder that `datasets` saved: streams of Arrow, listed in its state."""
  arrow, ipc = _library('pyarrow', folder), _library('pyarrow.ipc', folder)
  state = _manifest(folder, _STATE)
  if state.get('_indices_data_files') or state.get('_indices_files'):
    raise DataError(f'{folder}: saved as a selection of rows of another dataset; expected rows in their own order; '
                    'call flatten_indices() and save it again')
  for entry in _manifest(folder, _STATE, '_data_files'):
    path = _inside(folder, entry.get('filename') if isinstance(entry, dict) else entry)
    try:
      with arrow.memory_map(path) as source, ipc.open_stream(source) as reader:
        yield from _batches(reader, reader.schema, path)
    except (arrow.ArrowException, ValueError, OSError) as error:
      raise DataError(f'{path}: {_line(error)}; expected a stream of Arrow batches; save the dataset again') from error


def _batches(batches, schema, path):
  classes, number = _classes(schema), 0
  if len(set(schema.names)) < len(schema.names):
    raise Fault('header', path, 'a column name twice; expected distinct names', 'rename the columns')
  for batch in batches:
    for fields in _records(batch):
      number += 1
      origin = f'{path}, row {number}'
      if isinstance(fields, Exception):
        known = isinstance(fields, UnicodeDecodeError)
        yield (Fault('encoding', origin, 'a string that is not UTF-8; expected UTF-8') if known else
               Fault('type', origin, f'a value that cannot be read ({_line(fields)}); expected a date in range'))
        continue
      yield _with_names(fields, classes, origin)


def _with_names(fields, classes, origin):
  """The row, with the names of classes for their numbers."""
  for name, names in classes.items():
    number = fields.get(name)
    if isinstance(number, int):
      if not -1 <= number < len(names):
        return Fault('label', origin, f'field {name}: found the number {number}; expected one of its {len(names)} '
                     'classes, from 0, or -1')
      fields[name] = names[number] if number >= 0 else None  # -1 stands for: has none
  return Row(origin, fields)


def _classes(schema):
  """{column: names of its classes}, as `datasets` notes them beside the schema."""
  try:
    features = json.loads((schema.metadata or {})[b'huggingface'])['info']['features']
    return {name: list(feature['names']) for name, feature in features.items()
            if isinstance(feature, dict) and feature.get('_type') == 'ClassLabel'}
  except (ValueError, KeyError, TypeError, AttributeError):
    return {}


def _records(batch):
  """Python objects of a batch; the error for a row with a string of other bytes than UTF-8, or a date out of range."""
  try:
    return batch.to_pylist()
  except (ValueError, OverflowError) as error:
    if batch.num_rows == 1:
      return [error]
    half = batch.num_rows // 2
    return _records(batch.slice(0, half)) + _records(batch.slice(half))


def _manifest(folder, name, key=None):
  path = os.path.join(folder, name)
  try:
    found = corpora.strict_json(pathlib.Path(path).read_bytes(), path)
  except OSError as error:
    raise DataError(f'{path}: {error.strerror}; expected what save_to_disk writes; save the dataset again') from error
  if not isinstance(found, dict) or key and not isinstance(found.get(key), list):
    raise DataError(f'{path}: no list {key}; expected what save_to_disk writes; save the dataset again')
  return found[key] if key else found


def _inside(folder, name):
  if not isinstance(name, str) or name in ('', '.', '..') or name != os.path.basename(name):
    raise DataError(f'{folder}: lists {str(name)[:60]!r}; expected names of its own files; save the dataset again')
  return os.path.join(folder, name)


def _line(error):
  return ' '.join(str(error).split())[:120]


def _yaml(path, encoding, limits):
  """ChatterBot's dialogues. Texts are taken as they are written: a plain `No` or `42` is what somebody says."""
  yaml = _library('yaml', path)
  try:
    text = pathlib.Path(path).read_bytes().decode(encoding).removeprefix('\ufeff')
    top = yaml.compose(text, getattr(yaml, 'CSafeLoader', yaml.SafeLoader))
  except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
    mark, what = getattr(error, 'problem_mark', None), getattr(error, 'problem', None) or error  # no text of the file
    raise DataError(f'{path}{f":{mark.line + 1}" if mark else ""}: {_line(what)}; expected YAML in {encoding}; repair '
                    'the file') from error
  found = [value for key, value in getattr(top, 'value', ()) if key.value == 'conversations'] if isinstance(
      top, yaml.MappingNode) else []
  if len(found) != 1 or not isinstance(found[0], yaml.SequenceNode):
    raise DataError(f'{path}: {len(found)} lists called conversations; expected one; repair the file')
  for node in found[0].value:
    turns = [turn.value if isinstance(turn, yaml.ScalarNode) else {} for turn in node.value] if isinstance(
        node, yaml.SequenceNode) else node.value
    yield Row(f'{path}:{node.start_mark.line + 1}', {'conversation': turns})


_READERS = {'.jsonl': json_io.read_lines, '.ndjson': json_io.read_lines, '.json': json_io.read_list,
            '.csv': functools.partial(csv_io.read, delimiter=','),
            '.tsv': functools.partial(csv_io.read, delimiter='\t'),
            '.parquet': _parquet, '.yml': _yaml, '.yaml': _yaml}
