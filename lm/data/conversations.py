"""Conversations to fine-tune a decoder on, a source of `lm.run.Task`: files -> examples -> templates -> rows.

Instructions and dialogues become conversations, conversations tokens with a mask of the assistant's own, tokens packed
rows. The whole set fits in memory.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import os
from typing import Any, Literal

import numpy as np

from lm.data import assign, examples, memory, packing, sft, turns
from lm.data.json_io import Fault
from lm.data.memory import check, eval_batches, train_batches  # noqa: F401, the names of a source
from lm.errors import ConfigError, DataError
from lm.text import chat, scan

TEMPLATES = {'chatml': chat.chatml, 'llama2': chat.llama2, 'alpaca': chat.alpaca, 'plain': chat.plain}


@dataclasses.dataclass(frozen=True)
class Config:
  """Which conversations, and how they become rows.

  Attributes:
    corpus: one or several files or folders, see `lm.data.examples.read`.
    template: how turns are written.
    system: what 'chatml' and 'alpaca' say first where a conversation has no system turn; '' = as the template does.
    tokenizer: a path.
    length: T, targets a row; rows hold T + 1 tokens. Longer conversations are cut on their left, see `lm.data.sft`.
    batch: rows of the global batch.
    loss: which tokens are targets: the 'assistant' turns, the 'last' of them, or 'all'.
    pack: several conversations in a row, isolated from each other.
    validation_fraction: of conversations that say no split, or of those that say 'train' where none validates; by a
      hash of the first user turn, for every seed the same.
    rename: (('dialog', 'messages'),): pairs of what the records call a field, and what it is called here.
    encoding: of text files.
    on_error: a record that is wrong, or that the tokenizer or template cannot write, ends the run ('stop') or is left
      out and counted ('skip'); of a conversation of which records say two splits, those that train are.
    threads: batches built ahead, 0 = none.
  """

  corpus: str | tuple[str, ...] = ''
  template: Literal['chatml', 'llama2', 'alpaca', 'plain'] = 'chatml'
  system: str = ''
  tokenizer: str = ''
  length: int = 512
  batch: int = 8
  loss: Literal['assistant', 'last', 'all'] = 'assistant'
  pack: bool = True
  validation_fraction: float = 0.1
  rename: tuple[tuple[str, str], ...] = ()
  encoding: str = 'utf-8'
  on_error: Literal['stop', 'skip'] = 'stop'
  threads: int = 2

  def __post_init__(self):
    memory.check_config(self, shortest=1)
    check_template(self, TEMPLATES)

  @property
  def written(self) -> chat.Template:
    """The template as a function of messages."""
    return template_of(self, TEMPLATES)


def check_template(c: Any, templates: Mapping[str, chat.Template]) -> None:
  """ConfigError unless the fields `template` and `system` name one of them, and what it can say."""
  if c.template not in templates:
    raise ConfigError(f'data.template={c.template!r}; expected one of {", ".join(templates)}')
  if c.system and c.template not in ('chatml', 'alpaca'):
    raise ConfigError(f'data.system: {c.template!r} has none of its own; put a system turn into the records')


def template_of(c: Any, templates: Mapping[str, chat.Template]) -> chat.Template:
  """What the fields `template` and `system` mean, as a function of messages."""
  write = templates[c.template]
  return functools.partial(write, system=c.system) if c.system else write


def prepare(c: Config, folder: str | os.PathLike, seed: int = 0) -> memory.Data:
  """The rows of `c.corpus`; writes nothing, and prints what was cut or left out.

  Raises:
    ConfigError, DataError: no corpus or tokenizer, a wrong record, a conversation in two splits, nothing left.
  """
  del folder
  memory.check_paths(c)
  tokenizer, parts = memory.read_tokenizer(c.tokenizer), {'train': [], 'validation': [], 'test': []}
  files = usable(_read(c, 'cut'), lambda e: _rows(e, c, tokenizer), c.on_error)
  found = _divided(files, c, lambda w: w.record.messages)
  assign.check_parts([part for _, part in found], c.validation_fraction)
  for written, part in found:
    parts[part].append(written)
  sets = {}
  for part, some in parts.items():
    if some or part != 'test':
      sets[part], report = sft.gathered([w.rows for w in some], c.length, pack=c.pack, seed=seed,
                                        names=[w.origin for w in some])
      print(f'{part}: {report}', flush=True)
  return memory.Data(c, seed, tokenizer, sets, packing.Batch(np.int32(0), np.int32(0), np.int32(0), np.bool_(False)))


def divided(c: Config, unanswered: str = 'cut') -> list[tuple[examples.Chat, str]]:
  """The conversations of `c.corpus` that can be used, each with its split; prints what cannot.

  Args:
    unanswered: what becomes of last turns without an answer, see `examples.read`.

  Raises:
    ConfigError, DataError: a wrong record, a conversation in two splits, nothing left for a part by chance.
  """
  return _divided(_read(c, unanswered), c, lambda e: e.messages)


def _read(c, unanswered):
  paths = (c.corpus,) if isinstance(c.corpus, str) else c.corpus
  return [(path, *examples.read(path, 'chat', c.on_error, c.encoding, rename=dict(c.rename), unanswered=unanswered))
          for path in paths]


def _divided(files, c, messages):
  text = lambda e: scan.duplicate_key(*(m.content for m in messages(e)))
  return assign.divided(files, c, text, lambda e: user_first(messages(e)))


def _rows(e, c, tokenizer):
  try:
    return sft.written(e.messages, c.written, tokenizer, c.length, c.loss)
  except DataError as error:
    raise turns.refused(error, e.origin) from error


@dataclasses.dataclass(frozen=True)
class Written:
  """A record and the rows that it becomes, with the `split` and `origin` of a record (`lm.data.assign`)."""

  record: Any
  rows: Any
  split: str | None
  origin: str


def usable(files: Sequence[tuple[str, Sequence[Any], examples.Report]], write: Callable[[Any], Any], on_error: str
           ) -> list[tuple[str, list[Written], examples.Report]]:
  """The files of `assign.divided` with each record `Written`; one of which `write` raises a Fault is a fault as others.

  Raises:
    DataError: a Fault, if it is to stop; a file without a record to keep.
  """
  out = []
  for path, found, report in files:
    kept, faults = [], []
    for e in found:
      try:
        kept.append(Written(e, write(e), e.split, e.origin))
      except Fault as fault:
        if on_error == 'stop':
          raise
        faults.append(fault)
    if not kept:
      raise DataError(f'{path}: none of {report.seen} records can be used; the first: {faults[0]}')
    out.append((path, kept, report.without(faults)))
  return out


def user_first(messages: Sequence[chat.Message], default: str = '') -> str:
  """What the user says first."""
  return next((m.content for m in messages if m.role == 'user'), default)
