"""Rows of exactly T tokens for encoders, special tokens included, as pure functions of the row number.

Shapes: B rows, T tokens a row. A row is planned as spans (`lm.data.sentences`) and its number; whoever holds the tokens
fills it (`lm.data.loader`): [CLS] span [SEP] span [SEP] ... and padding.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

from flax import struct
import jax
import numpy as np

from lm.data import records, sentences
from lm.text import vocabulary
from lm.text.tokenizer import Tokenizer

PAIRS = ('bert_pairs', 'electra_pairs')
PACKINGS = (*PAIRS, 'full_sentences', 'doc_sentences')  # of BERT, ELECTRA, RoBERTa; see `lm.data.sentences`
SHORTEST = 8  # tokens a row: three special ones and something to learn from


@struct.dataclass
class Inputs:
  """What a loss of encoders gets; [B, T] but for the last two.

  Attributes:
    ids_BT: int32 token ids, the pad id where padded.
    segments_BT: int32, 1 = tokens, which all see each other; 0 = padding.
    types_BT: int32, 1 from the second span of a pair on, 0 elsewhere.
    positions_BT: int32, from 0.
    special_BT: bool, [CLS] and [SEP].
    random_B: bool, the second span does not follow the first.
    draw_B: uint32, number of the example in its corpus, the same in every epoch: masks are drawn from it.
  """

  ids_BT: jax.Array
  segments_BT: jax.Array
  types_BT: jax.Array
  positions_BT: jax.Array
  special_BT: jax.Array
  random_B: jax.Array
  draw_B: jax.Array


class Row(NamedTuple):
  """A planned row: spans (document, start, stop), `Inputs.draw_B` and `Inputs.random_B` of it."""

  spans: np.ndarray
  draw: int = 0
  random: bool = False


class Plan:
  """The rows of some cuts of a corpus, which make up one epoch; every epoch permutes them (`shuffle`).

  Args:
    cuts: laid end to end.
    seed: of the permutations.
    first: draw number of the first row.
  """

  def __init__(self, cuts: Sequence[sentences.Cut], seed: int = 0, shuffle: bool = True, first: int = 0):
    self.cuts, self.first = cuts, first
    self._ends = np.cumsum([len(c.random) for c in cuts])
    self.rows = int(self._ends[-1])
    self._epoch = functools.lru_cache(2)(
        lambda epoch: np.random.default_rng((seed, epoch)).permutation(self.rows) if shuffle else np.arange(self.rows))

  def row(self, number: int) -> Row:
    """Row `number` of the endless run of epochs."""
    epoch, k = divmod(number, self.rows)
    at = int(self._epoch(epoch)[k])
    c = int(np.searchsorted(self._ends, at, 'right'))
    cut, i = self.cuts[c], at - int(self._ends[c])  # counted from the cut's end
    return Row(cut.spans[cut.first[i - 1]:cut.first[i]], (self.first + at) % 2**32, bool(cut.random[i]))


def plans(packing: str, datasets: Sequence[records.Dataset], split: str, tokenizer: Tokenizer, length: int,
          copies: int = 1, seed: int = 0, shuffle: bool = True) -> tuple[Plan, ...]:
  """The rows of one split of each dataset, numbered through.

  Training: 'bert_pairs' cuts the documents `copies` times, each time anew, and an epoch holds all of these (BERT's
  dupe_factor); the others cut once, RoBERTa's over the documents in an order drawn from the seed. Evaluation
  (`shuffle=False`): one cut, in the order of the file, always the same.

  Raises:
    ConfigError: the tokenizer has no mask token, or lacks another of the special ones.
  """
  vocabulary.special_ids(tokenizer)  # before the corpus is read for its sentences
  found, rows = [], 0
  for dataset in datasets:
    s = sentences.find(dataset, split, tokenizer, length - (3 if packing == 'bert_pairs' else 2))
    found.append(Plan(_cuts(packing, s, length, copies, seed, shuffle), seed, shuffle, rows))
    rows += found[-1].rows
  return tuple(found)


def _cuts(packing, s, length, copies, seed, shuffle):
  rng = lambda copy: np.random.default_rng((seed, copy, 1) if shuffle else 0)
  if packing == 'bert_pairs':
    return [sentences.bert_pairs(s, length, rng(copy)) for copy in range(copies if shuffle else 1)]
  if packing == 'electra_pairs':
    return [sentences.electra_pairs(s, length, rng(0))]
  if shuffle:
    place = rng(0).permutation(s.document.max(initial=0) + 1)
    s = s.take(np.argsort(place[s.document], kind='stable'))
  return [sentences.packed(s, length, packing == 'full_sentences')]


def layout(rows: Sequence[Row], length: int, special: vocabulary.Special, pairs: bool
           ) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """(the fields of `Inputs` with every special token in place, bool [B, T]: where the tokens of the spans go).

  A row without spans is all padding.
  """
  spans = np.concatenate([row.spans for row in rows])
  pieces_B = np.array([len(row.spans) for row in rows])
  row = np.repeat(np.arange(len(rows)), pieces_B)
  end = np.cumsum(spans[:, 2] - spans[:, 1] + 1)
  first_B = np.cumsum(pieces_B) - pieces_B
  sep = end - np.append(0, end)[first_B][row]  # where each span's [SEP] stands in its row, [CLS] being at 0
  ids_BT = np.full((len(rows), length), special.pad, np.int32)
  special_BT = np.zeros(ids_BT.shape, bool)
  ids_BT[pieces_B > 0, 0], special_BT[pieces_B > 0, 0] = special.cls, True
  ids_BT[row, sep], special_BT[row, sep] = special.sep, True
  tokens_B = np.zeros(len(rows), np.int64)
  tokens_B[row] = sep + 1  # the last of a row wins
  segments_BT = (np.arange(length)[None] < tokens_B[:, None]).astype(np.int32)
  behind_BT = np.cumsum(special_BT, 1) - special_BT > 1  # [CLS] and the first [SEP] are behind
  types_BT = (behind_BT & (segments_BT > 0) & pairs).astype(np.int32)
  positions_BT = np.arange(length, dtype=np.int32)[None] * segments_BT
  arrays = {'ids_BT': ids_BT, 'segments_BT': segments_BT, 'types_BT': types_BT, 'positions_BT': positions_BT,
            'special_BT': special_BT, 'random_B': np.array([row.random for row in rows], bool),
            'draw_B': np.array([row.draw for row in rows], np.uint32)}
  return arrays, (segments_BT > 0) & ~special_BT
