"""Texts with a class each, as rows of an encoder: [CLS] text [SEP]. The whole set fits in memory.

Shapes: N examples, B rows of a batch, T tokens a row.
"""

from collections.abc import Iterable, Iterator
import dataclasses

from flax import struct
import jax
import numpy as np

from lm.data.corpora import Document
from lm.errors import ConfigError, DataError
from lm.text import vocabulary
from lm.text.tokenizer import Tokenizer


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
  special = vocabulary.special_ids(tokenizer)
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
  return {split: _set(found, names, special, length) for split, found in rows.items()}, names


def _set(rows, names, special, length):
  ids_NT = np.full((len(rows), length), special.pad, np.int32)
  segments_NT = np.zeros((len(rows), length), np.int32)
  for row, (ids, _) in enumerate(rows):
    tokens = [special.cls, *ids[:length - 2], special.sep]
    ids_NT[row, :len(tokens)] = tokens
    segments_NT[row, :len(tokens)] = 1
  labels_N = np.array([names.index(label) for _, label in rows], np.int32)
  return Set(Labelled(ids_NT, segments_NT, labels_N), sum(len(ids) > length - 2 for ids, _ in rows))
