"""Conversations to fine-tune a decoder on, a source of `lm.run.Task`: files -> examples -> templates -> rows.

Instructions and dialogues become conversations, conversations tokens with a mask of the assistant's own, tokens packed
rows. The whole set fits in memory.
"""

import dataclasses
import functools
import os
from typing import Literal

import numpy as np

from lm.data import examples, memory, packing, sft, splits
from lm.data.memory import check, eval_batches, train_batches  # noqa: F401, the names of a source
from lm.errors import ConfigError, DataError
from lm.text import chat

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
    validation_fraction: of conversations whose file does not say; by a hash of the first user turn.
    on_error: a record that is wrong ends the run ('stop') or is left out and counted ('skip').
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
  on_error: Literal['stop', 'skip'] = 'stop'
  threads: int = 2

  def __post_init__(self):
    memory.check_config(self, shortest=1)
    if self.template not in TEMPLATES:
      raise ConfigError(f'data.template={self.template!r}; expected one of {", ".join(TEMPLATES)}')
    if self.system and self.template not in ('chatml', 'alpaca'):
      raise ConfigError(f'data.system: {self.template!r} has none of its own; put a system turn into the conversations')

  @property
  def written(self) -> chat.Template:
    """The template as a function of messages."""
    write = TEMPLATES[self.template]
    return functools.partial(write, system=self.system) if self.system else write


def prepare(c: Config, folder: str | os.PathLike, seed: int = 0) -> memory.Data:
  """The rows of `c.corpus`; writes nothing, and prints what was cut or left out.

  Raises:
    ConfigError, DataError: no corpus or tokenizer, a wrong record, nothing left.
  """
  del folder
  memory.check_paths(c)
  tokenizer, parts = memory.read_tokenizer(c.tokenizer), {'train': [], 'validation': [], 'test': []}
  for path in (c.corpus,) if isinstance(c.corpus, str) else c.corpus:
    found, report = examples.read(path, 'chat', c.on_error, unanswered='cut')
    if report.kept < report.seen:
      print(f'{path}:\n{report.table()}', flush=True)
    for example, part in zip(found, _assigned(found, c), strict=True):
      parts[part].append(example.messages)
  sets = {}
  for part, talks in parts.items():
    if talks or part != 'test':
      sets[part], report = sft.conversations(talks, c.written, tokenizer, c.length, loss=c.loss, pack=c.pack,
                                             seed=seed)
      print(f'{part}: {report}', flush=True)
  return memory.Data(c, seed, tokenizer, sets, packing.Batch(np.int32(0), np.int32(0), np.int32(0), np.bool_(False)))


def _assigned(found, c):
  """Splits by the first words of the user, so that no question is asked in two of them."""
  first = [next((m.content for m in e.messages if m.role == 'user'), '') for e in found]
  split = splits.by_hash(first, (1 - c.validation_fraction, c.validation_fraction))
  drawn = ['train'] * len(found)
  for i in split.validation:
    drawn[i] = 'validation'
  for e in found:
    if e.split not in (None, 'train', 'validation', 'test'):
      raise DataError(f'{e.origin}: split {e.split!r}; expected train, validation or test')
  return [e.split or drawn[i] for i, e in enumerate(found)]
