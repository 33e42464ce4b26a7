"""Texts, or pairs of texts, as rows of an encoder or a decoder.

BERT, ELECTRA, DeBERTa: [CLS] a [SEP], or [CLS] a [SEP] b [SEP]; RoBERTa: <s> a </s>, or <s> a </s></s> b </s>; a
decoder: a, or a newline between a and b, and the end of text. A text too long loses its end; of a pair the longer text
loses a token until both fit, the second of equals (google-research/bert, `_truncate_seq_pair`).

Shapes: N examples, B rows of a batch, T tokens a row, M most examples of a row where they are packed.
"""

from collections.abc import Sequence
import dataclasses

from flax import struct
import jax
import numpy as np

from lm.data import packing
from lm.errors import ConfigError
from lm.text import vocabulary
from lm.text.tokenizer import Tokenizer


@struct.dataclass
class Labelled:
  """Rows and their classes.

  Attributes:
    ids_BT: int32 token ids.
    segments_BT: int32, 1 = tokens, of packed examples 1, 2, ...; 0 = padding.
    labels_B: int32, or f32 where they are numbers; `no_label` in a row that fills up the last batch. Of packed examples
      [B, M], of segments 1, 2, ...; `no_label` where there is none.
    types_BT: int32, of pairs for encoders: 1 from the second text to its [SEP], else 0; None = all 0.
    positions_BT: int32, from 0 in each packed example; None = from 0 in each row.
  """

  ids_BT: jax.Array
  segments_BT: jax.Array
  labels_B: jax.Array
  types_BT: jax.Array | None = None
  positions_BT: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Frame:
  """Ids before, between and after the texts of a row, and of padding; types: rows have token types."""

  before: tuple[int, ...]
  between: tuple[int, ...]
  after: tuple[int, ...]
  pad: int
  types: bool = False

  @property
  def around(self) -> int:
    """How many of a row's tokens are not of its texts."""
    return len(self.before) + len(self.between) + len(self.after)


def frame_of(tokenizer: Tokenizer, encoder: bool, pairs: bool) -> Frame:
  """Of an encoder or a decoder, of texts or of pairs; ConfigError: the tokenizer lacks what stands there."""
  if encoder:
    special = vocabulary.special_ids(tokenizer)
    roberta = '[SEP]' not in tokenizer.control  # it closes the first text and opens the second, and has one type
    return Frame((special.cls,), (special.sep,) * (1 + roberta) * pairs, (special.sep,), special.pad,
                  pairs and not roberta)
  # By itself some put a space before the newline.
  newline = tuple(tokenizer.encode('a\n')[len(tokenizer.encode('a')):].tolist()) if pairs else ()
  if pairs and not newline:
    raise ConfigError('data.tokenizer: no newline to stand between the texts of a pair; expected one; name another')
  return Frame((), newline, () if tokenizer.eos_id is None else (tokenizer.eos_id,), 0)


def framed(ids_N: Sequence[Sequence[np.ndarray]], frame: Frame, longest: int
           ) -> tuple[list[tuple[np.ndarray, int]], int]:
  """([(tokens of an example, where its second text begins)], how many were cut), of one text's ids each, or two's."""
  room, found, cut = longest - frame.around, [], 0
  for texts in ids_N:
    kept = _fit([len(ids) for ids in texts], room)
    first, *second = (ids[:n] for ids, n in zip(texts, kept, strict=True))
    head = [*frame.before, *first, *frame.between]
    found.append((np.concatenate([head, *second, frame.after]).astype(np.int32), len(head)))
    cut += sum(kept) < sum(map(len, texts))
  return found, cut


def rows(found_N: Sequence[tuple[np.ndarray, int]], labels_N: np.ndarray, frame: Frame, length: int) -> Labelled:
  """A row of `length` tokens an example; arguments as `framed` gives them."""
  ids_NT = np.full((len(found_N), length), frame.pad, np.int32)
  segments_NT, types_NT = np.zeros_like(ids_NT), np.zeros_like(ids_NT)
  for row, (tokens, second) in enumerate(found_N):
    ids_NT[row, :len(tokens)] = tokens
    segments_NT[row, :len(tokens)] = 1
    types_NT[row, second:len(tokens)] = 1
  return Labelled(ids_NT, segments_NT, labels_N, types_NT if frame.types else None)


def packed(found_N: Sequence[tuple[np.ndarray, int]], labels_N: np.ndarray, frame: Frame, length: int, seed: int
           ) -> Labelled:
  """Rows of several examples; `seed`: of which share one."""
  fit = packing.Fit(np.array([len(tokens) for tokens, _ in found_N]), length - 1, seed)
  plan = [fit.row(i)[:, 0] for i in range(fit.rows)]
  spans = [np.array([(i, 0, len(found_N[i][0])) for i in row]) for row in plan]
  segments_BT, positions_BT, _ = packing.layout(spans, length, isolate=True)
  order, used_BT = np.concatenate(plan), segments_BT > 0
  ids_BT, types_BT = np.full_like(segments_BT, frame.pad), np.zeros_like(segments_BT)
  ids_BT[used_BT] = np.concatenate([found_N[i][0] for i in order])
  types_BT[used_BT] = np.concatenate([np.arange(len(found_N[i][0])) >= found_N[i][1] for i in order])
  labels_BM = np.full((fit.rows, max(map(len, plan))), no_label(labels_N.dtype))
  for row, some in enumerate(plan):
    labels_BM[row, :len(some)] = labels_N[some]
  return Labelled(ids_BT, segments_BT, labels_BM, types_BT if frame.types else None, positions_BT)


def no_label(kind: np.dtype | type) -> np.generic:
  """What counts for no label: -1 for a class, NaN for a number."""
  return np.dtype(kind).type(np.nan if np.issubdtype(kind, np.floating) else -1)


def _fit(lengths: Sequence[int], room: int) -> list[int]:
  """How many tokens to keep of one text, or of two of which the longer gives way, the second of equals."""
  if len(lengths) == 1 or sum(lengths) <= room:
    return [min(n, room) for n in lengths]
  a, b = lengths
  first = min(a, max(room - b, room - room // 2))
  return [first, room - first]
