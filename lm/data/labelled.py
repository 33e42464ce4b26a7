"""Texts with a class each, as rows of an encoder: [CLS] text [SEP], or of a decoder: the text and the end of text.

The whole set fits in memory; `prepare`, `check`, `train_batches` and `eval_batches` are those of a source of
`lm.run.Task`. Shapes: N examples, B rows of a batch, T tokens a row.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import os
from typing import Literal

from flax import struct
import jax
import numpy as np

from lm.data import examples, memory, splits
from lm.data.corpora import Document
from lm.data.memory import check, eval_batches, train_batches  # noqa: F401, the names of a source
from lm.errors import ConfigError, DataError
from lm.text import vocabulary
from lm.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
  """Which texts, and how they become rows.

  Attributes:
    corpus: a file or folder of records {text, label, split}, see `lm.data.examples.read`.
    classes: names of the labels in order; () = those of the training split, sorted.
    tokenizer: a path, see `lm.text.tokenizer.load`.
    length: T, most tokens of a row; longer texts are cut at their end.
    batch: rows of the global batch.
    split: how records that do not say are split: by a hash of the text, or in equal shares of each class.
    validation_fraction: of those.
    folds, fold: with folds > 1, cross-validation: all records but those of the test split are split anew into so many
      folds in equal shares of each class, and fold number `fold` validates.
    on_error: a record that is wrong ends the run ('stop') or is left out and counted ('skip').
    threads: batches built ahead, 0 = none.
  """

  corpus: str = ''
  classes: tuple[str, ...] = ()
  tokenizer: str = ''
  length: int = 128
  batch: int = 32
  split: Literal['hash', 'stratified'] = 'hash'
  validation_fraction: float = 0.1
  folds: int = 0
  fold: int = 0
  on_error: Literal['stop', 'skip'] = 'stop'
  threads: int = 2

  def __post_init__(self):
    for name, low in (('length', 3), ('batch', 1), ('threads', 0)):
      if getattr(self, name) < low:
        raise ConfigError(f'data.{name}={getattr(self, name)}; expected at least {low}')
    if not 0 < self.validation_fraction < 1:
      raise ConfigError(f'data.validation_fraction={self.validation_fraction}; expected a share between 0 and 1')
    if self.folds == 1 or not 0 <= self.fold < max(self.folds, 1):
      raise ConfigError(f'data.folds={self.folds}, data.fold={self.fold}; expected 0 folds, or at least 2 and one of '
                        'them')


def prepare(c: Config, folder: str | os.PathLike, seed: int = 0, encoder: bool = True) -> memory.Data:
  """The rows of `c.corpus`; writes nothing.

  Args:
    encoder: rows as encoders take them; else of a decoder.

  Raises:
    ConfigError, DataError: no corpus or tokenizer; a wrong record; fewer than two classes.
  """
  del folder
  for name in ('corpus', 'tokenizer'):
    if not getattr(c, name):
      raise ConfigError(f'data.{name} is empty; expected a path; e.g. --set data.{name}=...')
  found, report = examples.read(c.corpus, 'classification', c.on_error, classes=c.classes or None)
  if report.kept < report.seen:
    print(f'{c.corpus}:\n{report.table()}', flush=True)
  names = list(c.classes) or sorted({e.label for e in found if e.label is not None and e.split in (None, 'train')})
  if len(names) < 2:
    raise DataError(f'{c.corpus}: labels {names}; expected at least two in the training split')
  tokenizer = memory.read_tokenizer(c.tokenizer)
  parts = {'train': [], 'validation': [], 'test': []}
  for example, part in zip(found, assigned(found, c, seed), strict=True):
    if example.label not in names:
      raise DataError(f'{example.origin}: label {example.label!r} is not among those of the training split, {names}')
    parts[part].append((tokenizer.encode(example.text), example.label))
  wrap = _encoder_wrap(tokenizer) if encoder else _decoder_wrap(tokenizer)
  sets = {part: _set(rows, names, wrap, c.length).examples for part, rows in parts.items() if rows or part != 'test'}
  return memory.Data(c, seed, tokenizer, sets, Labelled(np.int32(wrap.pad), np.int32(0), np.int32(-1)))


def assigned(found: Sequence[examples.Labelled], c: Config, seed: int) -> list[str]:
  """The split of each example: its own, or that of `c.split`; never one text in two."""
  parts = [e.split for e in found]
  if unknown := [e for e in found if e.split not in (None, 'train', 'validation', 'test')]:
    raise DataError(f'{unknown[0].origin}: split {unknown[0].split!r}; expected train, validation or test')
  if c.folds:
    pool = [i for i, part in enumerate(parts) if part != 'test']
    split = splits.folds([found[i].text for i in pool], c.folds, 'stratified', labels=[found[i].label for i in pool],
                         seed=0)[c.fold]
    for name in ('train', 'validation'):
      for i in getattr(split, name):
        parts[pool[i]] = name
  open_ = [i for i, part in enumerate(parts) if part is None]
  if open_:
    texts, shares = [found[i].text for i in open_], (1 - c.validation_fraction, c.validation_fraction)
    split = (splits.by_hash(texts, shares, seed) if c.split == 'hash' else
             splits.stratified(texts, [found[i].label for i in open_], shares, seed))
    for name in ('train', 'validation'):
      for i in getattr(split, name):
        parts[open_[i]] = name
  return [part or 'train' for part in parts]


@struct.dataclass
class Labelled:
  """ids_BT int32, segments_BT int32 (1, or 0 = padding), labels_B int32 (-1 = a row that fills up the last batch)."""

  ids_BT: jax.Array
  segments_BT: jax.Array
  labels_B: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Set:
  """The examples of one split, and how many of them were cut to fit."""

  examples: Labelled
  truncated: int

  def __len__(self) -> int:
    return len(self.examples.labels_B)

  def epoch(self, batch: int, seed: int, number: int) -> Iterator[Labelled]:
    """Batches of one training epoch, in an order drawn from (seed, number); a last, partial batch is left out."""
    if len(self) < batch:
      raise ConfigError(f'batch={batch}: more than the {len(self)} examples; lower it')
    order = np.random.default_rng((seed, number)).permutation(len(self))
    for i in range(0, len(self) - batch + 1, batch):
      yield jax.tree.map(lambda x, rows=order[i:i + batch]: x[rows], self.examples)

  def once(self, batch: int) -> Iterator[Labelled]:
    """All examples in order; the last batch is filled up with rows of label -1."""
    for i in range(0, len(self), batch):
      part = jax.tree.map(lambda x, i=i: x[i:i + batch], self.examples)
      fill = batch - len(part.labels_B)
      pad = lambda x, value=0, fill=fill: np.pad(x, [(0, fill)] + [(0, 0)] * (x.ndim - 1), constant_values=value)
      yield Labelled(pad(part.ids_BT), pad(part.segments_BT), pad(part.labels_B, -1))


def sets(documents: Iterable[Document], tokenizer: Tokenizer, length: int) -> tuple[dict[str, Set], list[str]]:
  """({'train': ..., 'validation': ...}, names of the classes in order), of documents that have a label and a split.

  Raises:
    DataError: a document without one, an empty text, fewer than two classes, or a class that only validation has.
  """
  wrap = _encoder_wrap(tokenizer)
  rows: dict[str, list[tuple[np.ndarray, str]]] = {'train': [], 'validation': []}
  for d in documents:
    if d.label is None or d.split is None:
      raise DataError(f'document {d.id}: no {"label" if d.label is None else "split"}; expected both; prepare the set '
                      'with scripts.prepare_corpus, or add the field')
    ids = tokenizer.encode(d.text)
    if not len(ids):
      raise DataError(f'document {d.id}: empty; expected text; remove it')
    rows[d.split].append((ids, d.label))
  names = sorted({label for _, label in rows['train']})
  for split, found in rows.items():
    if unknown := {label for _, label in found} - set(names):
      raise DataError(f'{split}: label {sorted(unknown)[0]!r} is not among those of the training split, {names}')
  if len(names) < 2:
    raise DataError(f'labels: {names}; expected at least two in the training split')
  return {split: _set(found, names, wrap, length) for split, found in rows.items()}, names


@dataclasses.dataclass(frozen=True)
class _Wrap:
  """Ids before and after a text, and of padding."""

  before: tuple[int, ...]
  after: tuple[int, ...]
  pad: int


def _encoder_wrap(tokenizer):
  special = vocabulary.special_ids(tokenizer)
  return _Wrap((special.cls,), (special.sep,), special.pad)


def _decoder_wrap(tokenizer):
  return _Wrap((), () if tokenizer.eos_id is None else (tokenizer.eos_id,), 0)


def _set(rows, names, wrap, length):
  room = length - len(wrap.before) - len(wrap.after)
  ids_NT = np.full((len(rows), length), wrap.pad, np.int32)
  segments_NT = np.zeros((len(rows), length), np.int32)
  for row, (ids, _) in enumerate(rows):
    tokens = [*wrap.before, *ids[:room], *wrap.after]
    ids_NT[row, :len(tokens)] = tokens
    segments_NT[row, :len(tokens)] = 1
  labels_N = np.array([names.index(label) for _, label in rows], np.int32)
  return Set(Labelled(ids_NT, segments_NT, labels_N), sum(len(ids) > room for ids, _ in rows))
