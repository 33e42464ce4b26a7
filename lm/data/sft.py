"""Conversations and preference pairs as rows to train on; a whole set fits in memory.

Shapes: N rows of a set, B rows of a batch, T + 1 tokens a row. Conversations share rows, each a segment of its own
(`packing.Fit`), or have a row each. One that is longer than a row is cut on its left, whole exchanges first:

1. the oldest exchanges go, until the rest fits or only the last is left;
2. then the system turn is cut at its end, the last user turn at its beginning and the answer at its end, in this order
   of giving way: each keeps all that the others leave free, and at least half of what those before it left. Only words
   go, never a mark of the template, such as the one between an instruction and its input;
3. an answer that is cut loses the end of its turn, so that no model learns to stop there; one of which nothing is left
   is dropped. What was cut or dropped is in the `Report`.
"""

import bisect
from collections.abc import Iterable, Sequence
import contextlib
import dataclasses
import functools
from typing import Literal, NamedTuple

from flax import struct
import jax
import numpy as np

from lm.data import packing
from lm.data.examples import Preference
from lm.errors import ConfigError, DataError
from lm.text import chat
from lm.text.tokenizer import Tokenizer

LOSSES = ('assistant', 'last', 'all')
_BESIDE = 8  # tokens beside a cut that show whether it splits a character, which has at most 4


@struct.dataclass
class Pair:
  """Two answers to the same prompt, row for row; both batches are padded on the right to one width.

  Attributes:
    chosen, rejected: masks hold the answer and the end of its turn; the prompt's ids are the same in both.
    chosen_last_B, rejected_last_B: int32, index of each row's last real token; 0 in a row that fills up a batch.
  """

  chosen: packing.Batch
  rejected: packing.Batch
  chosen_last_B: jax.Array
  rejected_last_B: jax.Array


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of the conversations (or pairs).

  Attributes:
    kept: in the set, the truncated ones too.
    truncated: of those kept, how many lost a token.
    dropped: nothing to learn was left: no target (or, of a pair, no difference) in the first T + 1 tokens.
    dropped_at: their places in the input, from 0; first: the name of the first.
    targets: tokens that count in the loss.
    cut_targets: targets that the kept ones lost.
    tokens: real tokens, in `rows` rows.
    rows: of the set.
  """

  kept: int
  truncated: int
  dropped: int
  dropped_at: tuple[int, ...]
  targets: int
  cut_targets: int
  tokens: int
  rows: int
  first: str = ''

  def __str__(self) -> str:
    dropped = f' (the first: {self.first})' if self.dropped else ''
    return (f'{self.kept} kept in {self.rows} rows, {self.truncated} of them truncated by {self.cut_targets} targets, '
            f'{self.dropped} dropped{dropped}; {self.targets} targets of {self.tokens} tokens')


class Row(NamedTuple):
  """An example that fits a row, and what it lost."""

  ids: np.ndarray
  mask: np.ndarray
  cut: bool
  cut_targets: int


def conversations(found: Iterable[Sequence[chat.Message]], template: chat.Template, tokenizer: Tokenizer, length: int,
                  *, loss: Literal['assistant', 'last', 'all'] = 'assistant', pack: bool = True, seed: int = 0,
                  names: Sequence[str] = ()) -> tuple[packing.Batch, Report]:
  """The conversations as a `packing.Batch` of all rows: [N, T + 1].

  Args:
    found: messages of each, see `chat.check`; what follows the end of the last answer is left out.
    length: T; a row has T + 1 tokens.
    loss: 'assistant': its words and ends of turns, in every turn; 'last': in its last turn; 'all': every token.
    pack: several in a row, each a segment with positions from 0 (isolated from one another); else one in a row.
    seed: of the order in which they are packed.
    names: what to call each where it is told of, such as 'file:line'.

  Raises:
    DataError: a conversation that `chat.encode` refuses; nothing left.
    ConfigError: length or loss out of range, or a tokenizer without an end of a turn.
  """
  tally = _Tally(length, names)
  for messages in found:
    with tally.naming():
      rows = written(messages, template, tokenizer, length, loss)
    tally.add(rows)
  return tally.packed(pack, seed)


def written(messages: Sequence[chat.Message], template: chat.Template, tokenizer: Tokenizer, length: int, loss: str
            ) -> list[Row]:
  """What `conversations` makes of one before it is packed: its row, or [] where no answer is left."""
  if loss not in LOSSES:
    raise ConfigError(f'data.loss={loss!r}; expected one of {", ".join(LOSSES)}')
  chat.check(messages)
  last = max((i for i, m in enumerate(messages) if m.role == 'assistant'), default=None)
  return [] if last is None else fitted(messages[:last], messages[last:last + 1], template, tokenizer, length + 1, loss)


def gathered(found: Iterable[Sequence[Row]], length: int, *, pack: bool = True, seed: int = 0,
             names: Sequence[str] = ()) -> tuple[packing.Batch, Report]:
  """`conversations` of those that `written` has made rows of."""
  tally = _Tally(length, names)
  for rows in found:
    tally.add(rows)
  return tally.packed(pack, seed)


def pairs(found: Iterable[Preference], template: chat.Template, tokenizer: Tokenizer, length: int
          ) -> tuple[Pair, Report]:
  """The preferences as a `Pair` of all rows: [N, T + 1], and [N]. A prompt too long is cut alike for both answers.

  A pair whose answers are the same, or become so when they are cut, is dropped. Raises what `conversations` does.
  """
  tally = _Tally(length)
  for p in found:
    answers = [chat.Message('assistant', text) for text in (p.chosen, p.rejected)]
    with tally.naming():
      for answer in answers:
        chat.check([*p.prompt, answer])
      rows = fitted(p.prompt, answers, template, tokenizer, length + 1, 'last')
    tally.add([] if rows and np.array_equal(rows[0].ids, rows[1].ids) else rows)
  sides = [[rows[side] for rows in tally.kept] for side in (0, 1)]
  batches = [arrange(rows, None, length + 1) for rows in sides]
  last = [np.array([len(row.ids) - 1 for row in rows], np.int32) for rows in sides]
  return Pair(*batches, *last), tally.report(batches)


class _Tally:
  """The examples kept, each a list of rows, and the counts of a `Report`."""

  def __init__(self, length, names=()):
    if length < 1:
      raise ConfigError(f'data.length={length}; expected at least 1')
    self.kept, self.dropped_at, self._seen, self._names, self._length = [], [], 0, names, length

  def _name(self, i):
    return self._names[i] if self._names else f'example {i}'

  @contextlib.contextmanager
  def naming(self):
    try:
      yield
    except DataError as error:
      raise DataError(f'{self._name(self._seen)}: {error}') from error

  def add(self, rows):
    if rows and all(row.mask[1:].any() for row in rows):
      self.kept.append(rows)
    else:
      self.dropped_at.append(self._seen)
    self._seen += 1

  def packed(self, pack, seed):
    rows, length = [row for row, in self.kept], self._length
    fit = packing.Fit(np.array([len(row.ids) for row in rows]), length, seed) if pack else None
    batch = arrange(rows, [fit.row(i) for i in range(fit.rows)] if pack else None, length + 1)
    return batch, self.report([batch])

  def report(self, batches):
    rows = [row for rows in self.kept for row in rows]
    return Report(len(self.kept), sum(any(row.cut for row in rows) for rows in self.kept), len(self.dropped_at),
                  tuple(self.dropped_at), sum(int(b.mask_BT.sum()) for b in batches), sum(r.cut_targets for r in rows),
                  sum(len(r.ids) for r in rows), sum(len(b.ids_BT) for b in batches),
                  self._name(self.dropped_at[0]) if self.dropped_at else '')


def arrange(rows: Sequence[Row], plan: Sequence[np.ndarray] | None, width: int) -> packing.Batch:
  """The rows as planned, or one by one."""
  if not rows:
    raise DataError(f'data.length={width - 1}: no example has a target left in so many tokens; expected one at least; '
                    'raise the length, or look into the data')
  plan = [np.array([[i, 0, len(row.ids)]]) for i, row in enumerate(rows)] if plan is None else plan
  arrays, used_BT = packing.blank(plan, width, isolate=True)
  order = np.concatenate(plan)[:, 0]
  arrays['ids_BT'][used_BT] = np.concatenate([rows[i].ids for i in order])
  arrays['mask_BT'][used_BT] &= np.concatenate([rows[i].mask for i in order])
  return packing.Batch(**arrays)


class _Written(NamedTuple):
  """A conversation as ids; the places of the words of the system turn and of the last user turn; the answer's begin."""

  ids: np.ndarray
  mask: np.ndarray
  system: np.ndarray
  user: np.ndarray
  answer: int  # up to the end: its words and the end of its turn


def _write(messages, template, tokenizer, loss) -> _Written:
  found = chat.tokenise(template, messages, tokenizer)
  while not found[-1][0].is_target:
    found.pop()
  lengths = [len(ids) for _, ids in found]
  of_T = np.repeat([-1 if piece.message is None else piece.message for piece, _ in found], lengths)
  last = len(messages) - 1
  answer = sum(lengths[:next(i for i, (piece, _) in enumerate(found) if piece.message == last)])
  mask = np.repeat([piece.is_target or loss == 'all' for piece, _ in found], lengths)
  if loss == 'last':
    mask[:answer] = False
  system = np.flatnonzero(of_T == 0) if messages[0].role == 'system' else np.zeros(0, int)
  user = np.flatnonzero(of_T == last - 1) if last else np.zeros(0, int)
  return _Written(np.concatenate([ids for _, ids in found]), mask, system, user, answer)


def fitted(before: Sequence[chat.Message], answers: Sequence[chat.Message], template: chat.Template,
           tokenizer: Tokenizer, width: int, loss: str) -> list[Row]:
  """One prompt with each of the answers, cut to `width` tokens; [] where nothing is left of an answer."""
  first = int(before[0].role == 'system')
  write = functools.cache(lambda exchanges: [
      _write([*before[:first], *before[first + 2 * exchanges:], answer], template, tokenizer, loss)
      for answer in answers])
  fits = lambda exchanges: max(len(w.ids) for w in write(exchanges)) <= width
  found = write(0 if fits(0) else bisect.bisect_left(range((len(before) - first) // 2), True, key=fits))
  prompt, room = _prompt(found[0], width, max(len(w.ids) - w.answer for w in found), tokenizer)
  rows = []
  for whole, w in zip(write(0), found, strict=True):
    stop = w.answer + kept_whole(w.ids[w.answer:], room, tokenizer)
    if stop <= w.answer:
      return []
    keep = np.concatenate([prompt, np.arange(w.answer, stop)])
    cut = int(whole.mask[1:].sum() - w.mask[keep][1:].sum())
    rows.append(Row(w.ids[keep], w.mask[keep], len(keep) < len(whole.ids), cut))
  return rows


def _prompt(w: _Written, width: int, answer: int, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
  """(places of the prompt's tokens that stay, room for an answer), the longest of which has `answer` tokens."""
  room = max(0, width - (w.answer - len(w.system) - len(w.user)))
  system = kept_whole(w.ids[w.system], max(room - len(w.user) - answer, room // 2), tokenizer)
  room -= system
  user = kept_whole(w.ids[w.user], max(room - answer, room // 2), tokenizer, tail=True)
  keep = np.ones(w.answer, bool)
  keep[w.system[system:]] = keep[w.user[:len(w.user) - user]] = False
  return np.flatnonzero(keep), room - user


def kept_whole(ids: np.ndarray, most: int, tokenizer: Tokenizer, tail: bool = False) -> int:
  """How many of the first (or last) ids to keep, at most `most`, such that no character is split."""
  if most >= len(ids):
    return len(ids)
  for n in range(most, max(most - 4, -1), -1):
    text = tokenizer.decode(ids[len(ids) - n:][:_BESIDE] if tail else ids[:n][-_BESIDE:])
    if not (text.startswith('\ufffd') if tail else text.endswith('\ufffd')):
      return n
  return most
