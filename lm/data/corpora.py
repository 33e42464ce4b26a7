"""Documents out of text files: plain text and JSON lines, read strictly. Documents come in a fixed order."""

from collections.abc import Iterable, Iterator
import dataclasses
import functools
import glob
import hashlib
import json
import os
import pathlib
import re
from typing import Any

from lm import disk
from lm.errors import DataError

_KINDS = ('.txt', '.jsonl')


@dataclasses.dataclass(frozen=True)
class Document:
  """One text; `split` is 'train', 'validation' or None (the split rule decides), `label` its class if it has one.

  `where`: file, or file:line, for errors.
  """

  id: str
  text: str
  split: str | None = None
  label: str | None = None
  where: str | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Files:
  """The documents of text files, read again on each iteration.

  A .txt file is one document, a line of a .jsonl file is one: {"text": ..., "id": ..., "split": ..., "label": ...}, all
  but the text optional. Files are split at newline bytes only; bytes are UTF-8, kept as they are.
  """

  paths: tuple[str, ...]

  def __iter__(self) -> Iterator[Document]:
    for path in self.paths:
      yield from _jsonl(path) if path.endswith('.jsonl') else _txt(path)

  def source(self) -> list[dict[str, str]]:
    """Name and sha256 of each file: provenance for a manifest."""
    printable = lambda name: os.fsencode(name).decode(errors='backslashreplace')
    return [{'name': printable(os.path.basename(path)), 'sha256': sha256_file(path)} for path in self.paths]


def sha256_file(path: str | os.PathLike) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def find(path: str) -> Files:
  """The .txt and .jsonl files of `path`: one file, a directory (searched below, in sorted order) or a glob.

  What lies in a prepared dataset is left out: its validation.txt is held out of texts that lie beside it. So is what
  lies in the workdir of a run, or below it.

  Raises:
    DataError: nothing there, or a file of another kind.
  """
  if os.path.isfile(path):
    if not path.endswith(_KINDS):
      raise DataError(f'{path}: neither .txt (one document of UTF-8) nor .jsonl (one a line); expected a file of these '
                      'names, or a prepared dataset; convert it, or rename it if it is one of them')
    return Files((path,))
  pattern = os.path.join(glob.escape(path), '**', '*') if os.path.isdir(path) else path
  base = path if os.path.isdir(path) else os.path.dirname(re.split(r'[*?[]', path)[0])
  prepared = functools.cache(is_prepared)

  @functools.cache
  def in_run(folder):
    above = os.path.dirname(folder)
    return _is_run(folder) or (above != folder and len(above) >= len(base) and in_run(above))
  found = sorted(p for p in glob.glob(pattern, recursive=True) if p.endswith(_KINDS) and os.path.isfile(p)
                 and not prepared(os.path.dirname(p)) and not in_run(os.path.dirname(p)))
  if not found:
    several = '; several are a tuple, data.corpus=("a.txt", "b.txt")' if ',' in path else ''
    raise DataError(f'{path}: no text; expected a .txt or .jsonl file, a directory or glob of them, or a prepared '
                    f'dataset; check the path{several}')
  return Files(tuple(found))


def is_prepared(path: str | os.PathLike) -> bool:
  """Is it the folder of a prepared dataset, or of one that was being written?"""
  names = set(os.listdir(path)) if os.path.isdir(path) else set()
  ours = 'manifest.json' in names and not names.isdisjoint(('train.npy', 'validation.txt'))
  return ours or any('.array_record' in n for n in names)


def _is_run(path):
  names = set(os.listdir(path)) if os.path.isdir(path) else set()
  return 'config.json' in names and not names.isdisjoint(('checkpoints', 'metrics.jsonl'))


def write_jsonl(path: str | os.PathLike, documents: Iterable[Document]) -> int:
  """Writes `documents` so that `find(path)` gives them back, in one move; their number."""
  count = 0
  with disk.replacing(path) as f:
    for d in documents:
      row = {k: v for k, v in vars(d).items() if v is not None and k != 'where'}
      f.write(json.dumps(row, ensure_ascii=False) + '\n')
      count += 1
  return count


def strict_json(data: bytes, where: str) -> Any:
  """JSON as the standard has it: UTF-8, no duplicate keys, no NaN; anything else is a DataError naming `where`."""
  def pairs(items):
    keys = [k for k, _ in items]
    if len(set(keys)) < len(keys):
      raise ValueError(f'duplicate key {next(k for k in keys if keys.count(k) > 1)!r}')
    return dict(items)

  def constant(name):
    raise ValueError(f'{name} is not JSON')
  try:
    found = json.loads(data.decode(), object_pairs_hook=pairs, parse_constant=constant)
    if b'\\u' in data:
      json.dumps(found, ensure_ascii=False).encode()
    return found
  except UnicodeDecodeError as error:
    raise DataError(f'{where}: byte {error.start} is not UTF-8 ({error.reason}); expected UTF-8; re-encode the file'
                    ) from error
  except UnicodeEncodeError as error:
    raise DataError(f'{where}: half a character, \\u{ord(error.object[error.start]):04x}; expected Unicode text; '
                    'repair or remove it') from error
  except (ValueError, RecursionError) as error:
    raise DataError(f'{where}: {error}; expected strict JSON; repair or remove it') from error


def _txt(path: str) -> Iterator[Document]:
  data = pathlib.Path(path).read_bytes()
  try:
    yield Document(os.path.basename(path), data.decode(), where=path)
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    raise DataError(f'{path}:{line}: byte {error.start} of the file is not UTF-8 ({error.reason}); expected UTF-8; '
                    're-encode the file') from error


def _jsonl(path: str) -> Iterator[Document]:
  with open(path, 'rb') as f:
    for number, line in enumerate(f, 1):
      if not line.strip():
        continue
      where = f'{path}:{number}'
      row = strict_json(line, where)
      text, name, split, label = (
          row.get(k) for k in ('text', 'id', 'split', 'label')) if isinstance(row, dict) else (None,) * 4
      if not isinstance(text, str) or split not in (None, 'train', 'validation') or not isinstance(
          label, str | None):
        raise DataError(f'{where}: expected {{"text": string, "id": optional, "split": optional "train" or '
                        '"validation", "label": optional string}; repair or remove the line')
      try:
        text.encode()
      except UnicodeEncodeError as error:
        raise DataError(f'{where}: character {error.start} of the text is a lone surrogate; expected Unicode text; '
                        'repair or remove the line') from error
      yield Document(str(number) if name is None else str(name), text, split, label, where)
