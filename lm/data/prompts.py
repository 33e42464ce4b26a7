"""Prompts that a policy answers, as rows padded on the left, with the records that a reward function looks at.

The whole set fits in memory; `prepare`, `check`, `train_batches` and `eval_batches` are those of a source of
`lm.run.Task`. What is drawn after a row is read with `chat.stop_ids` and `chat.parse` of `Config.written`.
Shapes: N prompts of a set, B of a batch, P tokens of a row.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import hashlib
import json
import os
from typing import Any, Literal

from flax import struct
import jax
import numpy as np

from lm.data import assign, conversations, examples, memory, preferences, tables_io, turns
from lm.data.json_io import Fault, Row
from lm.data.memory import check, eval_batches, train_batches  # noqa: F401, the names of a source
from lm.data.preferences import TEMPLATES
from lm.data.turns import Message
from lm.errors import ConfigError, DataError
from lm.text import chat
from lm.text.tokenizer import Tokenizer

LEFT_OUT = ('prompt too long', 'text too short')  # kinds of records that never end a run: they are counted


@dataclasses.dataclass(frozen=True)
class Config:
  """Which prompts, and how they become rows.

  Attributes:
    corpus: one or several files or folders of records {prompt, answer, split}, all but the prompt optional; a prompt is
      a text or a list of turns, of which the user has the last. With `cut`, of records {text, answer, split}.
    template: how turns are written; 'none', and wherever the prompt is '': as running text (`preferences.bare`).
    system: what 'chatml' and 'alpaca' say first where a prompt has no system turn; '' = as the template does.
    tokenizer: a path.
    length: P, tokens of a row. A longer prompt is left out, and counted.
    batch: prompts of the global batch.
    cut: the first so many tokens of each text are its prompt (fewer, so that no character is halved; a token that
      begins documents is not counted); shorter texts are left out, and counted. 0 = records have prompts.
    evaluated: most prompts of each held-out set, drawn by chance, the same for every seed; 0 = all.
    validation_fraction: of prompts whose file does not say; by a hash of the first user turn.
    rename: (('question', 'prompt'),): pairs of what the records call a field, and what it is called here.
    encoding: of text files.
    on_error: a record that is wrong ends the run ('stop') or is left out and counted ('skip').
    threads: batches built ahead, 0 = none.
  """

  corpus: str | tuple[str, ...] = ''
  template: Literal['chatml', 'llama2', 'alpaca', 'plain', 'none'] = 'chatml'
  system: str = ''
  tokenizer: str = ''
  length: int = 64
  batch: int = 8
  cut: int = 0
  evaluated: int = 0
  validation_fraction: float = 0.1
  rename: tuple[tuple[str, str], ...] = ()
  encoding: str = 'utf-8'
  on_error: Literal['stop', 'skip'] = 'stop'
  threads: int = 2

  def __post_init__(self):
    memory.check_config(self, shortest=1)
    conversations.check_template(self, TEMPLATES)
    if not 0 <= self.cut <= self.length:
      raise ConfigError(f'data.cut={self.cut}; expected 0 to data.length={self.length}')
    if self.cut and self.template != 'none':
      raise ConfigError(f"data.cut={self.cut}: the beginning of a text is no turn of {self.template!r}; set "
                        "data.template='none', or data.cut=0")
    if self.evaluated < 0:
      raise ConfigError(f'data.evaluated={self.evaluated}; expected at least 0 prompts (0: all)')

  @property
  def written(self) -> chat.Template:
    """The template of prompts that are not '', as a function of messages."""
    return conversations.template_of(self, TEMPLATES)


@dataclasses.dataclass(frozen=True)
class Record:
  """What a reward function sees of a prompt.

  Attributes:
    prompt: what the user says last, or the text that is to be continued, as its tokens spell it.
    messages: all turns; of running text, the user's alone.
    answer: what the file says is right, None where it does not.
    text: the whole text that the prompt was cut from, None where none was.
    split: 'train', 'validation', 'test', or None: not said.
    origin: 'file:line'; no part of the value.
  """

  prompt: str
  messages: tuple[Message, ...] = ()
  answer: str | None = None
  text: str | None = None
  split: str | None = None
  origin: str = dataclasses.field(default='', compare=False)


@struct.dataclass
class Prompts:
  """Rows of a set [N, ...] or of a batch [B, ...], int32.

  A row that fills up the last batch has one token, as every row has at least, and the index -1.

  Attributes:
    ids_NP: against the right edge.
    segments_NP: 1 = a token, 0 = padding.
    index_N: number in `Data.records`.
  """

  ids_NP: jax.Array
  segments_NP: jax.Array
  index_N: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Data(memory.Data):
  """As `memory.Data`; and `records`, of all splits one after another, on the host.

  `beside` says, json-able, what else decides a run that draws from these: text that it learns, models that judge.
  """

  records: tuple[Record, ...] = ()
  beside: Callable[[], dict[str, Any]] = dict

  @functools.cached_property
  def fingerprint(self) -> dict[str, Any]:
    """All that decides the batches and what rewards can see, json-able."""
    seen = [[r.prompt, [[m.role, m.content] for m in r.messages], r.answer, r.text] for r in self.records]
    return super().fingerprint | {'records': hashlib.sha256(json.dumps(seen).encode()).hexdigest()} | self.beside()


def prepare(c: Config, folder: str | os.PathLike, seed: int = 0) -> Data:
  """The prompts of `c.corpus`; writes nothing, and prints what was left out.

  Raises:
    ConfigError, DataError: no corpus or tokenizer, a wrong record, nothing left.
  """
  del folder
  memory.check_paths(c)
  tokenizer, found = memory.read_tokenizer(c.tokenizer), []
  for path in (c.corpus,) if isinstance(c.corpus, str) else c.corpus:
    some, report = read(path, c, tokenizer)
    if not report.complete:
      print(f'{path}:\n{report.table()}', flush=True)
    found += some
  asked = [conversations.user_first(record.messages) for record, _ in found]
  parts = assign.assigned([record for record, _ in found], asked, c.validation_fraction)
  sets, records = {}, []
  for part in examples.SPLITS:
    chosen = [item for item, own in zip(found, parts, strict=True) if own == part]
    if part != 'train' and 0 < c.evaluated < len(chosen):
      drawn = np.random.default_rng(0).permutation(len(chosen))[:c.evaluated]
      chosen = [chosen[i] for i in np.sort(drawn)]
    if chosen or part != 'test':
      sets[part] = _rows([ids for _, ids in chosen], len(records), c.length)
      records += [record for record, _ in chosen]
  _say(sets)
  edge_P = (np.arange(c.length) == c.length - 1).astype(np.int32)
  blank = Prompts(np.int32(0), edge_P, np.int32(-1))
  return Data(c, seed, tokenizer, sets, blank, records=tuple(records))


def read(path: str | os.PathLike, c: Config, tokenizer: Tokenizer
         ) -> tuple[list[tuple[Record, np.ndarray]], examples.Report]:
  """Each record of a file or folder that can be used, with the int32 ids of its prompt; and what became of the others.

  Raises:
    DataError: a fault, if it is to stop; a file damaged as a whole; no record at all, or none to keep.
  """
  found, seen, faults, messages = [], 0, {}, {}
  for item in tables_io.rows(path, c.encoding):
    seen += 1
    try:
      if isinstance(item, Fault):
        raise item
      found.append(_prompt(examples.renamed(item, dict(c.rename)), c, tokenizer))
    except Fault as fault:
      if c.on_error == 'stop' and fault.kind not in LEFT_OUT:
        raise
      faults[fault.kind] = faults.get(fault.kind, 0) + 1
      messages[fault.kind] = (*messages.get(fault.kind, ()), str(fault))[:examples.SHOWN]
  if not found:
    first = f'; the first: {next(iter(messages.values()))[0]}' if messages else '; check that it is the right file'
    raise DataError(f'{os.fspath(path)}: none of {seen} records is a prompt that can be used{first}')
  return found, examples.Report(seen, len(found), 0, faults, messages, tables_io.left_alone(path))


def _prompt(row: Row, c: Config, tokenizer: Tokenizer) -> tuple[Record, np.ndarray]:
  split = examples.split_of(row)
  answer, text = None, None
  if row.fields.get('answer') is not None:
    answer = turns.text(row, 'answer')
  if c.cut:
    text = turns.text(row, 'text')
    ids = _ids(row, [Message('user', text, where='text')], preferences.bare, tokenizer)
    ids, said = _cut(row, ids, text, c.cut, tokenizer)
    messages = (Message('user', said),)
  else:
    messages = _messages(row, c)
    ids = _ids(row, messages, c.written if messages[0].content else preferences.bare, tokenizer)
  if len(ids) > c.length:
    raise Fault('prompt too long', row.origin, f'a prompt of {len(ids)} tokens; expected at most {c.length}',
                'raise data.length')
  if not len(ids):
    raise Fault('empty', row.origin, 'a prompt of no tokens, and none of this tokenizer begins a document; expected '
                'text')
  return Record(messages[-1].content, messages, answer, text, split, row.origin), ids


def _messages(row, c):
  said = row.fields.get('prompt')
  if not isinstance(said, list):
    messages = turns.system(row) + (Message('user', said if said == '' else turns.text(row, 'prompt'), where='prompt'),)
  else:
    messages = turns.system(row) + turns.turns(row, said, 'prompt')
    turns.alternate(messages, 'user', row.origin, 'prompt')
  if len(messages) > 1 and (c.template == 'none' or not messages[-1].content):
    raise Fault('turns', row.origin, f'a prompt of {len(messages)} turns; expected one, as running text does not tell '
                'turns apart', 'set data.template=chatml, or remove the record')
  return messages


def _ids(row, messages, template, tokenizer):
  try:
    ids = chat.prompt(template, messages, tokenizer)
  except DataError as error:
    raise turns.refused(error, row.origin) from error
  begin = tokenizer.bos_id
  if not len(ids) and begin not in (None, tokenizer.control.get('<|im_start|>')):
    return np.array([begin], np.int32)  # it ends documents too, which is why `chat` does not write it
  return ids


def _cut(row, ids, text, cut, tokenizer):
  """(the begin of a document and the first `cut` tokens of the text, those as text)."""
  begin = len(chat.prompt(preferences.bare, [Message('user', '')], tokenizer))
  if len(ids) < begin + cut:
    raise Fault('text too short', row.origin, f'a text of {len(ids) - begin} tokens; expected at least data.cut={cut}',
                'lower data.cut')
  for end in range(begin + cut, begin, -1):
    said = tokenizer.decode(ids[begin:end])
    if not said.endswith('\ufffd') or '\ufffd' in text:
      return ids[:end], said
  raise Fault('text too short', row.origin, f'its first {cut} tokens hold no whole character; expected some',
              'raise data.cut')


def _rows(ids_N: Sequence[np.ndarray], first: int, length: int) -> Prompts:
  ids_NP = np.zeros((len(ids_N), length), np.int32)
  segments_NP = np.zeros_like(ids_NP)
  for row, ids in enumerate(ids_N):
    ids_NP[row, length - len(ids):] = ids
    segments_NP[row, length - len(ids):] = 1
  return Prompts(ids_NP, segments_NP, np.arange(first, first + len(ids_N), dtype=np.int32))


def _say(sets):
  """How many prompts there are, and how many of the held-out ones training has too."""
  keys = {name: [row.tobytes() for row in rows.ids_NP] for name, rows in sets.items()}
  trained = set(keys['train'])
  for name, some in keys.items():
    both = sum(key in trained for key in some) if name != 'train' else 0
    print(f'{name}: {len(some)} prompts' + (f', {both} of which training has too' if both else ''), flush=True)
