"""Prompts with several answers, some better than others, as rows: what reward models, DPO and their kin learn from.

A row is a prompt and one of its answers. Of all that is cut, the answers of a prompt lose the same part of the prompt
(`lm.data.sft`). Encoders read [CLS] prompt [SEP] answer [SEP], or [CLS] answer [SEP], all of token type 0.

The whole set fits in memory; `prepare`, `check`, `train_batches` and `eval_batches` are those of a source of
`lm.run.Task`. Shapes: N prompts of a set, B of a batch, K answers, T + 1 tokens of a row.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import os
from typing import Literal, NamedTuple

from flax import struct
import jax
import numpy as np

from lm.data import assign, conversations, examples, memory, packing, sft, turns
from lm.data.examples import Graded
from lm.data.json_io import Fault
from lm.data.memory import check, eval_batches, train_batches  # noqa: F401, the names of a source
from lm.errors import ConfigError, DataError
from lm.text import chat, scan, vocabulary
from lm.text.tokenizer import Tokenizer


def bare(messages: Sequence[chat.Message]) -> list[chat.Piece]:
  """A template without marks: prompt and answer as one running text, begun and ended as documents are."""
  return [piece for piece in chat.plain(messages, between='') if piece.text or piece.is_target]


TEMPLATES = conversations.TEMPLATES | {'none': bare}


@dataclasses.dataclass(frozen=True)
class Config:
  """Which prompts and answers, and how they become rows.

  Attributes:
    corpus: one or several files or folders, see `lm.data.examples.read` of 'graded': {prompt, answers, grades}, or
      {prompt, chosen, rejected} in any spelling.
    template: how turns are written; 'none', and wherever the prompt is '': as running text (`bare`).
    system: what 'chatml' and 'alpaca' say first where a conversation has no system turn; '' = as the template does.
    tokenizer: a path.
    length: T; rows hold T + 1 tokens. What is longer is cut, see `lm.data.sft`.
    batch: prompts of the global batch, each of `answers` rows.
    answers: K, most answers of a prompt; the first that differ are taken, of unequal grades where there are any.
    validation_fraction: of prompts whose file does not say; by a hash of the first user turn, or of the answers.
    rename: (('question', 'prompt'),): pairs of what the records call a field, and what it is called here.
    encoding: of text files.
    on_error: a record that is wrong, or that the tokenizer or template cannot write, ends the run ('stop') or is left
      out and counted ('skip').
    threads: batches built ahead, 0 = none.
  """

  corpus: str | tuple[str, ...] = ''
  template: Literal['chatml', 'llama2', 'alpaca', 'plain', 'none'] = 'chatml'
  system: str = ''
  tokenizer: str = ''
  length: int = 512
  batch: int = 8
  answers: int = 2
  validation_fraction: float = 0.1
  rename: tuple[tuple[str, str], ...] = ()
  encoding: str = 'utf-8'
  on_error: Literal['stop', 'skip'] = 'stop'
  threads: int = 2

  def __post_init__(self):
    memory.check_config(self, shortest=3)
    conversations.check_template(self, TEMPLATES)
    if self.answers < 2:
      raise ConfigError(f'data.answers={self.answers}; expected at least 2, of which one is better')

  @property
  def written(self) -> chat.Template:
    """The template of prompts that are not '', as a function of messages."""
    return conversations.template_of(self, TEMPLATES)


@struct.dataclass
class Ranked:
  """Rows of a set [N, ...] or of a batch [B, ...]; what fills up a prompt's K answers, or a batch, is all 0.

  Attributes:
    answers: every array [N, K, T + 1]: prompt and answer, padded on the right; masks: the answer's tokens, the end of
      its turn included.
    grades_NK: f32, higher is better; of equal ones neither is preferred.
    exists_NK: bool, the answer is there.
  """

  answers: packing.Batch
  grades_NK: jax.Array
  exists_NK: jax.Array


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of the prompts of a set.

  Attributes:
    prompts, answers: in the set.
    truncated: answers (with their prompt) that lost a token.
    repeated: answers left out because another of the prompt is the same, or becomes so when both are cut.
    surplus: answers left out because the prompt has more than K.
    dropped: prompts left out: no answer is better than another.
    first: where the first of these stands, '' = nowhere.
  """

  prompts: int
  answers: int
  truncated: int
  repeated: int
  surplus: int
  dropped: int
  first: str

  def __str__(self) -> str:
    first = f' (the first: {self.first})' if self.first else ''
    return (f'{self.prompts} prompts with {self.answers} answers, {self.truncated} of them truncated; left out: '
            f'{self.repeated} answers given twice, {self.surplus} above data.answers, {self.dropped} prompts of which '
            f'no answer is the better one{first}')


def prepare(c: Config, folder: str | os.PathLike, seed: int = 0, encoder: bool = False) -> memory.Data:
  """The rows of `c.corpus`, `Ranked`; writes nothing, and prints what was cut or left out.

  Args:
    encoder: rows as encoders take them; else of a decoder.

  Raises:
    ConfigError, DataError: no corpus or tokenizer, a wrong record.
  """
  del folder
  memory.check_paths(c)
  tokenizer, parts = memory.read_tokenizer(c.tokenizer), {'train': [], 'validation': [], 'test': []}
  paths = (c.corpus,) if isinstance(c.corpus, str) else c.corpus
  files = [(path, *examples.read(path, 'graded', c.on_error, c.encoding, rename=dict(c.rename))) for path in paths]
  files = conversations.usable(files, lambda e: _answered(e, c, tokenizer, encoder), c.on_error)
  text = lambda w: scan.duplicate_key(*(m.content for m in w.record.prompt), '', *sorted(w.record.answers))
  for written, part in assign.divided(files, c, text, lambda w: _question(w.record)):
    parts[part].append(written.rows)
  sets = {}
  for part, chosen in parts.items():
    if chosen or part != 'test':
      sets[part], report = _gathered(chosen, c)
      print(f'{part}: {report}', flush=True)
  blank = packing.Batch(np.int32(0), np.int32(0), np.int32(0), np.bool_(False))
  return memory.Data(c, seed, tokenizer, sets, Ranked(blank, np.float32(0), np.bool_(False)))


def assigned(found: Sequence[Graded], validation_fraction: float) -> list[str]:
  """The split of each: its own, or by a hash of what the user says first, so that no question is in two of them.

  Of answers without a prompt, all of them together decide.
  """
  return assign.assigned(found, list(map(_question, found)), validation_fraction)


def _question(e):
  return conversations.user_first(e.prompt, '\0'.join(sorted(e.answers)))


def ranked(found: Sequence[Graded], c: Config, tokenizer: Tokenizer, encoder: bool = False) -> tuple[Ranked, Report]:
  """The prompts as a `Ranked` of all that teach something, [N, ...]; N may be 0. Raises what `chat.encode` does."""
  return _gathered([_answered(e, c, tokenizer, encoder) for e in found], c)


class _Answered(NamedTuple):
  """A prompt with its answers as rows, and how many were left out; without rows where it teaches nothing."""

  origin: str
  rows: list[sft.Row]
  grades: list[float]
  repeated: int = 0
  surplus: int = 0


def _answered(e, c, tokenizer, encoder) -> _Answered:
  grade_of, once = {}, {}  # of two alike the first grade counts
  for text, grade in zip(e.answers, e.grades, strict=True):
    grade_of.setdefault(text, grade)
  texts, rest = [*grade_of][:c.answers], [*grade_of][c.answers:]
  if len({grade_of[text] for text in texts}) == 1:  # one that differs teaches more than one more of these
    texts[-1] = next((text for text in rest if grade_of[text] != grade_of[texts[0]]), texts[-1])
  for text, row in zip(texts, _rows(e, texts, c, tokenizer, encoder), strict=False):
    once.setdefault(row.ids.tobytes(), (row, grade_of[text]))
  if len({grade for _, grade in once.values()}) < 2:
    return _Answered(e.origin, [], [])
  repeated = len(e.answers) - len(grade_of) + len(texts) - len(once)
  rows, grades = map(list, zip(*once.values(), strict=True))
  return _Answered(e.origin, rows, grades, repeated, len(grade_of) - len(texts))


def _gathered(found: Sequence[_Answered], c) -> tuple[Ranked, Report]:
  taught, dropped = [a for a in found if a.rows], [a.origin for a in found if not a.rows]
  kept = [row for a in taught for row in a.rows]
  report = Report(len(taught), len(kept), sum(row.cut for row in kept), sum(a.repeated for a in taught),
                  sum(a.surplus for a in taught), len(dropped), dropped[0] if dropped else '')
  return _arranged(kept, [a.grades for a in taught], c), report


def rows(found: Iterable[tuple[Sequence[chat.Message], str]], c: Config, tokenizer: Tokenizer, encoder: bool = False
         ) -> packing.Batch:
  """Prompts, () = none, with an answer each, written and cut as `ranked` does: [N, T + 1].

  Raises:
    DataError: what `chat.encode` refuses; nothing left of an answer, or nothing found.
  """
  kept = []
  for i, (prompt, text) in enumerate(found):
    row = _rows(Graded(tuple(prompt), (text,), (0.0,), origin=f'example {i}'), [text], c, tokenizer, encoder)
    if not row:
      raise DataError(f'example {i}: nothing is left of its answer in data.length={c.length} tokens; raise the length')
    kept += row
  return sft.arrange(kept, None, c.length + 1)


def _arranged(rows, grades, c):
  N, K, width = len(grades), c.answers, c.length + 1
  exists_NK = np.arange(K)[None] < np.array([len(some) for some in grades], np.int32).reshape(N, 1)
  grades_NK = np.zeros((N, K), np.float32)
  grades_NK[exists_NK] = [grade for some in grades for grade in some]
  arrays = {}
  for name in ('ids_BT', 'segments_BT', 'positions_BT', 'mask_BT'):
    arrays[name] = np.zeros((N, K, width), bool if name == 'mask_BT' else np.int32)
    if rows:
      arrays[name][exists_NK] = getattr(sft.arrange(rows, None, width), name)
  return Ranked(packing.Batch(**arrays), grades_NK, exists_NK)


def _rows(e: Graded, texts: Sequence[str], c: Config, tokenizer: Tokenizer, encoder: bool) -> list[sft.Row]:
  """The prompt with each of the texts; [] where nothing would be left of one; a Fault where they cannot be written."""
  if c.template == 'none' and len(e.prompt) > 1 and not encoder:
    raise Fault('turns', e.origin, f"a prompt of {len(e.prompt)} turns; expected one, as data.template='none' does not "
                'tell turns apart', 'set data.template=chatml, or remove the record')
  try:
    if encoder:
      return _encoder_rows('\n'.join(m.content for m in e.prompt), texts, tokenizer, c.length + 1)
    said = [turns.Message('assistant', text, where=_field(e, text)) for text in texts]
    return sft.fitted(e.prompt or (chat.Message('user', ''),), said, c.written if e.prompt else bare, tokenizer,
                      c.length + 1, 'last')
  except DataError as error:
    raise turns.refused(error, e.origin) from error


def _field(e, text):
  """Where the record says the answer; of two that are graded as a pair is, either spelling may be the record's."""
  i = e.answers.index(text)
  return f'{("chosen", "rejected")[i]} or answers[{i}]' if e.grades == (1.0, 0.0) else f'answers[{i}]'


def _encoder_rows(prompt: str, texts: Sequence[str], tokenizer: Tokenizer, width: int) -> list[sft.Row]:
  """The prompt keeps its end and all that the longest answer leaves free, at least half; an answer its beginning."""
  special = vocabulary.special_ids(tokenizer)
  asked, said = tokenizer.encode(prompt), [tokenizer.encode(text) for text in texts]
  room = width - 2 - bool(prompt)
  head = sft.kept_whole(asked, max(room - max(map(len, said)), room // 2), tokenizer, tail=True)
  before = [special.cls, *asked[len(asked) - head:], *[special.sep] * bool(prompt)]
  rows = []
  for ids in said:
    n = sft.kept_whole(ids, room - head, tokenizer)
    if not n and len(ids):
      return []
    mask = np.arange(len(before) + n + 1) >= len(before)
    rows.append(sft.Row(np.array([*before, *ids[:n], special.sep], np.int32), mask, head < len(asked) or n < len(ids),
                        len(ids) - n))
  return rows
