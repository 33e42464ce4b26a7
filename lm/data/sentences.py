"""Where sentences lie in the documents of a dataset, and how encoders' papers cut rows out of them.

Shapes: S sentences of a split, in the order of its documents. A sentence is a run of tokens up to a piece that ends
with . ! ? 。 or a newline (`lm.text.vocabulary.sentence_ends`), told by tokens alone: 'Mr.' ends one too, as any
contiguous text would do. A longer one than a row takes is cut, so that no sentence is ever truncated for its length
alone. Documents are stored as [bos] ids [eos]; those two belong to no sentence.
"""

from collections.abc import Iterator
import dataclasses

import numpy as np

from lm.data import records
from lm.text import vocabulary
from lm.text.tokenizer import Tokenizer

READ = 2**22  # tokens looked at in one go
SHORT = 0.1  # BERT: documents cut into pairs shorter than a row
SINGLE, SHRUNK, SHORTEST = 0.1, 0.05, 5  # ELECTRA: examples of one segment; of a random target length, from this one on


@dataclasses.dataclass(frozen=True)
class Sentences:
  """int64 [S] each: number of the document, and the sentence's place in it as stored."""

  document: np.ndarray
  start: np.ndarray
  stop: np.ndarray

  def __len__(self) -> int:
    return len(self.start)

  def take(self, order: np.ndarray) -> 'Sentences':
    return Sentences(self.document[order], self.start[order], self.stop[order])

  def bounds(self) -> np.ndarray:
    """Where each document's sentences begin, and S at the end; documents without any are left out."""
    return np.flatnonzero(np.diff(self.document, prepend=-1, append=-1)) if len(self) else np.zeros(1, np.int64)


@dataclasses.dataclass(frozen=True)
class Cut:
  """Rows cut out of sentences: spans of row r are spans[first[r]:first[r + 1]].

  Attributes:
    spans: int64 [pieces, 3] of (document, start, stop); [SEP] follows each.
    first: int64 [rows + 1].
    random: bool [rows], the second span of the row comes from another document (next-sentence prediction).
  """

  spans: np.ndarray
  first: np.ndarray
  random: np.ndarray


def find(dataset: records.Dataset, split: str, tokenizer: Tokenizer, longest: int) -> Sentences:
  """Every sentence of the split, none longer than `longest` tokens; reads all of its tokens once."""
  ends_V, closers_V = vocabulary.sentence_ends(tokenizer)
  lead = len(tokenizer.begin)
  stop = dataset.lengths[split] - (tokenizer.eos_id is not None)
  documents = np.flatnonzero(stop > lead)
  found = [(np.zeros(0, np.int64),) * 3]
  for part in np.split(documents, np.flatnonzero(np.diff(np.cumsum(stop[documents]) // READ)) + 1):
    if len(part):
      ids = dataset.read(split, np.stack([part, np.full_like(part, lead), stop[part]], axis=1))
      found.append(_cut(ends_V[ids], closers_V[ids], part, stop[part] - lead, lead, longest))
  return Sentences(*map(np.concatenate, zip(*found, strict=True)))


def _cut(ends, closers, documents, count, lead, longest):
  """(document, start, stop) of the sentences of some documents of `count` tokens each, laid end to end."""
  last = np.cumsum(count)
  before = np.concatenate([[False], ends[:-1]])
  before[last[:-1]] = False  # of another document
  ends = ends | closers & before
  cut = ends & ~np.append(ends[1:], False)  # of '?!' or '.\n' the last
  cut[last - 1] = True
  stop = np.flatnonzero(cut) + 1
  document = np.searchsorted(last, stop, 'left')
  start = np.concatenate([[0], stop[:-1]])
  n = -(-(stop - start) // longest)
  k = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
  base = np.repeat((last - count)[document] - lead, n)
  start = np.repeat(start, n) + k * longest
  return documents[np.repeat(document, n)], start - base, np.minimum(start + longest, np.repeat(stop, n)) - base


def packed(s: Sentences, length: int, crossing: bool) -> Cut:
  """RoBERTa's FULL-SENTENCES (`crossing`) and DOC-SENTENCES: [CLS] sentences [SEP], as many as go in.

  A row that crosses into another document has a [SEP] more there. Without crossing the last row of a document stays
  short; the paper raises the number of rows in a batch to make up for it, fairseq's released code does not, nor does
  this. Each sentence is used once (arXiv:1907.11692 §4.2).
  """
  n, first = len(s), s.bounds()
  ordinal = np.repeat(np.arange(len(first) - 1), np.diff(first))
  begin = np.concatenate([[0], np.cumsum(s.stop - s.start)])
  filled = begin[1:] + ordinal  # tokens up to and with a sentence, and the separators before it
  rows = [0]
  while rows[-1] < n:
    i = rows[-1]
    j = int(np.searchsorted(filled, length - 2 + begin[i] + ordinal[i], 'right'))
    rows.append(j if crossing else min(j, int(first[ordinal[i] + 1])))
  pieces = np.union1d(rows, first)  # a span of its own for each document of a row
  at = np.searchsorted(pieces, rows)
  spans = np.stack([s.document[pieces[:-1]], s.start[pieces[:-1]], s.stop[pieces[1:] - 1]], axis=1)
  return Cut(spans, at, np.zeros(len(rows) - 1, bool))


def bert_pairs(s: Sentences, length: int, rng: np.random.Generator) -> Cut:
  """BERT's [CLS] A [SEP] B [SEP]: half of the Bs follow A, half are random (google-research/bert
  create_pretraining_data.py:create_instances_from_document).

  Each sentence of a document is in one A or in one B that follows its A, but for what truncation takes: tokens from
  either end of the longer one. A document's last sentence alone gets a random B. A corpus of one document draws random
  Bs from that one, as the original does.
  """
  room, first = length - 3, s.bounds()
  return _gather(row for d in range(len(first) - 1) for row in _document_pairs(s, first, d, room, rng))


def _document_pairs(s, first, d, room, rng) -> Iterator:
  target = int(rng.integers(2, room + 1)) if rng.random() < SHORT else room
  i, last = int(first[d]), int(first[d + 1])
  while i < last:
    j = _reach(s, i, last, target)
    middle = int(rng.integers(i + 1, j)) if j - i > 1 else j
    a, random = (s.document[i], s.start[i], s.stop[middle - 1]), bool(j - i == 1 or rng.random() < 0.5)
    if random:
      other = int(rng.integers(len(first) - 2)) if len(first) > 2 else -1
      other += other >= d or len(first) == 2
      begin = int(rng.integers(first[other], first[other + 1]))
      b = begin, _reach(s, begin, int(first[other + 1]), target - int(a[2] - a[1]))
      i = middle  # what a random B displaced comes next
    else:
      b, i = (middle, j), j
    yield *_truncate(a, (s.document[b[0]], s.start[b[0]], s.stop[b[1] - 1]), room, rng), random


def _reach(s, i, last, target):
  """The least j > i so that sentences [i, j) hold `target` tokens, or `last`."""
  return min(i + 1 + int(np.searchsorted(s.stop[i:last], s.start[i] + max(target, 1))), last)


def _truncate(a, b, room, rng):
  """BERT's truncate_seq_pair in one go: one token at a time from the longer (of equal ones b), at a random end."""
  over = max(int(a[2] - a[1] + b[2] - b[1]) - room, 0)
  longer = int(a[2] - a[1] - (b[2] - b[1]))
  first = min(over, abs(longer))
  off_b = (over - first + 1) // 2 + first * (longer < 0)
  cut = []
  for (document, start, stop), off in ((a, over - off_b), (b, off_b)):
    front = int(rng.binomial(off, 0.5))
    cut.append((document, start + front, stop - off + front))
  return cut


def electra_pairs(s: Sentences, length: int, rng: np.random.Generator) -> Cut:
  """ELECTRA's [CLS] A [SEP] B [SEP] of neighbouring text, or A alone (google-research/electra
  build_pretraining_dataset.py:ExampleBuilder).

  Sentences are gathered until they fill a row, what goes beyond is dropped, the end of a document ends the example.
  Each sentence is used once. Unlike the original, A never takes a short sentence from behind B's first.
  """
  return _gather(_examples(s, length, rng))


def _examples(s, length, rng) -> Iterator:
  target, first = length, s.bounds()
  for i, last in zip(first[:-1].tolist(), first[1:].tolist(), strict=True):
    while i < last:
      j = _reach(s, i, last, target)
      half = np.inf if rng.random() < SINGLE else (target - 3) // 2
      length_a = s.stop[i:j] - s.start[i]
      n = max(int(np.searchsorted(length_a, half)), 1)
      if n < j - i and length_a[n - 1] < half and rng.random() < 0.5:
        n += 1
      document, start, middle = s.document[i], s.start[i], s.stop[i + n - 1]
      a = document, start, min(middle, start + length - 2)
      b = document, middle, min(s.stop[j - 1], middle + max(length - 3 - (a[2] - start), 0))
      yield a, b, False
      target = int(rng.integers(SHORTEST, length + 1)) if rng.random() < SHRUNK else length
      i = j


def _gather(rows: Iterator) -> Cut:
  """Rows of (a, b, random) as a `Cut`; an empty b is left out."""
  rows = list(rows)
  spans = np.array([span for a, b, _ in rows for span in (a, b)], np.int64).reshape(-1, 3)
  some = spans[:, 2] > spans[:, 1]
  first = np.concatenate([[0], np.cumsum(some.reshape(-1, 2).sum(1))])
  return Cut(spans[some], first, np.array([random for *_, random in rows], bool))
