"""Documents as token shards on disk: ArrayRecord files, one index per split, and a manifest written last.

DIR/train-00000.array_record ...   one record = at most PIECE tokens of one document, uint16 or uint32 little-endian
DIR/validation-00000.array_record ...
DIR/{train,validation}.npy         int64 [pieces, 2]: tokens in the piece, number of its document
DIR/validation.txt                 the validation documents joined by newlines: feed it to `xz -9e`
DIR/tokenizer/                     the tokenizer's files
DIR/manifest.json                  sizes, sha256, counts, provenance; a directory without it was never finished
"""

import array
from collections.abc import Iterable, Iterator
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

from array_record.python import array_record_module
import numpy as np

from lm import disk
from lm.data import corpora
from lm.errors import ConfigError, DataError
from lm.text import tokenizer as tokenizers

FORMAT = 1
PIECE = 4096
PIECES_KEPT = 1024  # of each open dataset: 16 MiB of tokens, decompressed once
SPLITS = ('train', 'validation')


@dataclasses.dataclass(frozen=True)
class Split:
  """Which text is held out.

  Attributes:
    kind: 'hash': documents whose text hashes below `fraction`, so that equal texts never straddle, but for those that
      name their own split, which they keep; 'tail': the last `fraction` of the characters of all documents, one after
      another.
    fraction: in [0, 1).
  """

  kind: str = 'hash'
  fraction: float = 0.05

  def __post_init__(self):
    if self.kind not in ('hash', 'tail'):
      raise ConfigError(f"split={self.kind!r}; expected 'hash' or 'tail'")
    if not 0 <= self.fraction < 1:
      raise ConfigError(f'validation_fraction={self.fraction}; expected 0 <= fraction < 1')


def assign(documents: Iterable[corpora.Document], split: Split) -> Iterator[tuple[str | None, corpora.Document]]:
  """(split, document) of every document in order, (None, document) where it is blank.

  'tail' may cut one document in two, and reads `documents` twice.
  """
  if split.kind == 'tail' and iter(documents) is documents:
    raise TypeError("split 'tail' reads the documents twice; give a list, not an iterator")
  total = sum(len(d.text) for d in documents if d.text.strip()) if split.kind == 'tail' else 0
  left = int(total * (1 - split.fraction))
  for d in documents:
    if not d.text.strip():
      yield None, d
    elif split.kind == 'hash':
      bucket = int.from_bytes(hashlib.sha256(d.text.encode(errors='surrogatepass')).digest()[:8]) / 2**64
      yield d.split or SPLITS[bucket < split.fraction], d
    else:
      parts = d.text[:left], d.text[left:]
      left = max(left - len(d.text), 0)
      yield from ((name, dataclasses.replace(d, text=part)) for name, part in zip(SPLITS, parts, strict=True) if part)


def provenance(tokenizer: tokenizers.Tokenizer, split: Split, source: Any) -> dict[str, Any]:
  """The part of the manifest that is known beforehand; equal provenance means equal bytes."""
  head = {'format_version': FORMAT, 'source': source, 'split': dataclasses.asdict(split), 'piece': PIECE,
          'tokenizer': {'kind': tokenizer.kind, 'vocab_size': tokenizer.vocab_size, 'sha256': tokenizer.sha256}}
  return json.loads(json.dumps(head))


def write(documents: Iterable[corpora.Document], tokenizer: tokenizers.Tokenizer, out_dir: str | os.PathLike, *,
          split: Split = Split(), source: Any = None, shard_tokens: int = 2**27) -> 'Dataset':
  """Tokenises the documents into `out_dir` and opens it; a finished `out_dir` of the same provenance is just opened.

  A rerun after a kill writes the same bytes. A second process waits for the first and then opens its work.

  Args:
    documents: in order; a list (or other re-readable iterable) where `split.kind` is 'tail'.
    tokenizer: gives each document its ids, bos and eos.
    out_dir: created.
    split: what is held out.
    source: json-able provenance (names, hashes) for the manifest; it must be the same to reuse a finished `out_dir`.
    shard_tokens: a shard is closed once it holds this many.

  Raises:
    DataError: nothing to write, text that cannot be encoded, or `out_dir` holds another dataset.
  """
  out = pathlib.Path(out_dir)
  out.mkdir(parents=True, exist_ok=True)
  head = provenance(tokenizer, split, source)
  with _locked(out / '.lock'):
    if (out / 'manifest.json').exists():
      old = _manifest(out)
      if differing := [k for k in head if old.get(k) != head[k]]:
        raise DataError(f'{out}: holds another dataset ({", ".join(differing)} differ); expected an empty directory; '
                        'remove it or choose another')
      return Dataset(out)
    for stale in (*out.glob('*.tmp*'), *out.glob('*.array_record')):  # of a run that was killed
      stale.unlink(missing_ok=True)
    tokenizer.save(out / 'tokenizer')
    dtype = np.dtype('<u2' if tokenizer.vocab_size <= 2**16 else '<u4')
    writers = {name: _Writer(out, name, dtype, shard_tokens) for name in SPLITS}
    empty = 0
    with open(out / 'validation.txt.tmp', 'wb') as text_file:
      for number, (name, document) in enumerate(assign(documents, split)):
        try:
          ids = tokenizer.document(document.text) if name else ()
        except DataError as error:
          raise DataError(f'{document.where or f"document {number + 1}"}: {error}') from error
        if not len(ids):
          empty += 1
          continue
        content = document.text.encode()
        if name == 'validation':
          text_file.write(b'\n' * (writers[name].documents > 0) + content)
        writers[name].add(ids, len(content))
    os.replace(text_file.name, out / 'validation.txt')
    done = {name: writer.close() for name, writer in writers.items()}
    if not sum(d['documents'] for d in done.values()):
      names = [s['name'] for s in source] if isinstance(source, list) else [source or 'the documents']
      more = f' and {len(names) - 3} more' if len(names) > 3 else ''
      raise DataError(f'{out}: no text in {", ".join(map(str, names[:3]))}{more} ({empty} empty documents); expected '
                      'at least one document with text; check the corpus')
    manifest = head | {'dtype': dtype.str, 'skipped': {'empty': empty}, 'splits': done}
    disk.write(out / 'manifest.json', (json.dumps(manifest, indent=1) + '\n').encode())
  return Dataset(out)


@contextlib.contextmanager
def _locked(path):
  with open(path, 'w') as f:
    fcntl.flock(f, fcntl.LOCK_EX)
    yield


class _Writer:
  """Shards and index of one split."""

  def __init__(self, out, name, dtype, shard_tokens):
    self.out, self.name, self.dtype, self.shard_tokens = out, name, dtype, shard_tokens
    self.documents = self.utf8_bytes = 0
    self.index, self.shards, self.file = array.array('q'), [], None

  def add(self, ids, utf8_bytes):
    for start in range(0, len(ids), PIECE):
      piece = ids[start:start + PIECE]
      if self.file is None:
        self.shard = {'name': f'{self.name}-{len(self.shards):05}.array_record', 'records': 0, 'tokens': 0}
        self.file = array_record_module.ArrayRecordWriter(str(self.out / self.shard['name']) + '.tmp', 'group_size:1')
      self.file.write(piece.astype(self.dtype).tobytes())
      self.index.extend((len(piece), self.documents))
      self.shard['records'] += 1
      self.shard['tokens'] += len(piece)
      if self.shard['tokens'] >= self.shard_tokens:
        self.end_shard()
    self.documents += 1
    self.utf8_bytes += utf8_bytes

  def end_shard(self):
    self.file.close()
    self.file = None
    path = self.out / self.shard['name']
    os.replace(f'{path}.tmp', path)
    self.shards.append(self.shard | {'bytes': path.stat().st_size, 'sha256': corpora.sha256_file(path)})

  def close(self):
    if self.file is not None:
      self.end_shard()
    path = self.out / f'{self.name}.npy'
    with disk.replacing(path, 'wb') as f:
      np.save(f, np.array(self.index, np.int64).reshape(-1, 2))
    return {'documents': self.documents, 'tokens': sum(s['tokens'] for s in self.shards),
            'utf8_bytes': self.utf8_bytes, 'shards': self.shards,
            'index': {'name': path.name, 'bytes': path.stat().st_size, 'sha256': corpora.sha256_file(path)}}


def _manifest(path: pathlib.Path) -> dict[str, Any]:
  file = path / 'manifest.json'
  if not file.is_file():
    raise DataError(f'{file}: no such file; expected a finished dataset; run scripts.prepare_corpus again')
  try:
    manifest = corpora.strict_json(file.read_bytes(), str(file))
    for name in ('sha256', 'vocab_size'):
      manifest['tokenizer'][name]
    for name in SPLITS:
      manifest['splits'][name]['shards'], manifest['splits'][name]['index']
  except (KeyError, TypeError) as error:
    raise DataError(f'{file}: lacks {error}; expected a manifest of format {FORMAT}; prepare the corpus again'
                    ) from error
  if manifest.get('format_version') != FORMAT:
    raise DataError(f'{file}: format {manifest.get("format_version")}; expected {FORMAT}; prepare the corpus again')
  return manifest


class Dataset:
  """A finished dataset, verified on opening: size and (unless told otherwise) sha256 of its shards and indices.

  Attributes:
    path: its directory.
    manifest: the parsed manifest.
    sha256: of the manifest, hence of everything.
    lengths: split -> int64 tokens of each document.

  Raises:
    DataError: a missing, truncated or changed file, by name.
  """

  def __init__(self, path: str | os.PathLike, verify: bool = True):
    self.path = pathlib.Path(path)
    self.manifest = _manifest(self.path)
    self.sha256 = corpora.sha256_file(self.path / 'manifest.json')
    self.vocab_size = self.manifest['tokenizer']['vocab_size']
    self.lengths, self._first, self._shard_ends, self._readers = {}, {}, {}, {}
    self._piece = functools.lru_cache(PIECES_KEPT)(self._read_piece)
    for name in SPLITS:
      split = self.manifest['splits'][name]
      for entry in (*split['shards'], split['index']):
        _verify(self.path / entry['name'], entry, verify)
      index = np.load(self.path / split['index']['name'], allow_pickle=False)
      self.lengths[name] = np.bincount(index[:, 1], index[:, 0], split['documents']).astype(np.int64)
      self._first[name] = np.searchsorted(index[:, 1], np.arange(split['documents']))
      self._shard_ends[name] = np.cumsum([s['records'] for s in split['shards']])
      self._readers[name] = [self._guarded(s['name'], array_record_module.ArrayRecordReader, str(self.path / s['name']),
                                           'readahead_buffer_size:0,max_parallelism:0') for s in split['shards']]

  def tokenizer(self) -> tokenizers.Tokenizer:
    found = tokenizers.load(self.path / 'tokenizer')
    if found.sha256 != self.manifest['tokenizer']['sha256']:
      raise DataError(f'{self.path}/tokenizer: changed since the corpus was prepared (sha256 differs); copy it again '
                      'or prepare the corpus again')
    return found

  def tokens(self, split: str) -> int:
    return self.manifest['splits'][split]['tokens']

  def utf8_bytes(self, split: str) -> int:
    """UTF-8 bytes of the split's text: the denominator of bits per byte."""
    return self.manifest['splits'][split]['utf8_bytes']

  def read(self, split: str, spans: np.ndarray) -> np.ndarray:
    """The tokens of the spans (document, start, stop), one after another, int32.

    Raises:
      DataError: an unreadable record, or an id beyond the vocabulary, as shard:record:position.
    """
    parts = [np.zeros(0, np.int32)]
    for document, start, stop in np.asarray(spans, np.int64).reshape(-1, 3).tolist():
      first = int(self._first[split][document])
      for n in range(start // PIECE, -(-stop // PIECE)):
        parts.append(self._piece(split, first + n)[max(start - n * PIECE, 0):stop - n * PIECE])
    return np.concatenate(parts)

  def document(self, split: str, number: int) -> np.ndarray:
    return self.read(split, [(number, 0, self.lengths[split][number])])

  def _read_piece(self, split, record):
    """The tokens of one record, int32."""
    shard = int(np.searchsorted(self._shard_ends[split], record, 'right'))
    entry = self.manifest['splits'][split]['shards'][shard]
    local = record - int(self._shard_ends[split][shard]) + entry['records']
    raw, = self._guarded(entry['name'], self._readers[split][shard].read, [local])
    ids = np.frombuffer(raw, self.manifest['dtype'])
    if ids.max() >= self.vocab_size:
      at = int(np.argmax(ids >= self.vocab_size))
      raise DataError(f'{self.path / entry["name"]}:{local}:{at}: id {ids[at]}; expected less than {self.vocab_size}; '
                      'prepare the dataset again')
    return ids.astype(np.int32)

  def _guarded(self, shard, f, *args):
    try:
      return f(*args)
    except Exception as error:  # riegeli's errors arrive as RuntimeError, IndexError or ValueError
      raise DataError(f'{self.path / shard}: {str(error)[:200]!r}; expected a shard as it was written; delete '
                      f'{self.path} and prepare it again') from error


def _verify(file, entry, content):
  if not file.is_file():
    raise DataError(f'{file}: missing; the manifest lists it; delete {file.parent} and prepare it again')
  if (size := file.stat().st_size) != entry['bytes']:
    raise DataError(f'{file}: {size} bytes; expected {entry["bytes"]}; delete {file.parent} and prepare it again')
  if content and corpora.sha256_file(file) != entry['sha256']:
    raise DataError(f'{file}: damaged (sha256); expected the content that the manifest lists; delete {file.parent} and '
                    'prepare it again')
