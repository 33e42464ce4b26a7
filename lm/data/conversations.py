"""Conversations to fine-tune a decoder on, a source of `lm.run.Task`: files -> examples -> templates -> rows.

Instructions and dialogues become conversations, conversations tokens with a mask of the assistant's own, tokens packed
rows. The whole set fits in memory.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import os
from typing import Any, Literal

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
    ConfigError, DataError: no corpus or tokenizer, a wrong record, nothing left.
  """
  del folder
  memory.check_paths(c)
  tokenizer, parts = memory.read_tokenizer(c.tokenizer), {'train': [], 'validation': [], 'test': []}
  for path in (c.corpus,) if isinstance(c.corpus, str) else c.corpus:
    found, report = examples.read(path, 'chat', c.on_error, unanswered='cut')
    if report.kept < report.seen:
      print(f'{path}:\n{report.table()}', flush=True)
    asked = [user_first(e.messages) for e in found]
    for example, part in zip(found, assigned(found, asked, c.validation_fraction), strict=True):
      parts[part].append(example.messages)
  sets = {}
  for part, talks in parts.items():
    if talks or part != 'test':
      sets[part], report = sft.conversations(talks, c.written, tokenizer, c.length, loss=c.loss, pack=c.pack,
                                             seed=seed)
      print(f'{part}: {report}', flush=True)
  return memory.Data(c, seed, tokenizer, sets, packing.Batch(np.int32(0), np.int32(0), np.int32(0), np.bool_(False)))


def user_first(messages: Sequence[chat.Message], default: str = '') -> str:
  """What the user says first."""
  return next((m.content for m in messages if m.role == 'user'), default)


def assigned(found: Sequence[Any], texts: Sequence[str], validation_fraction: float) -> list[str]:
  """The split of each record: its own, or by a hash of its text, so that no text is in two.

  Args:
    found: records with `split` (one of `examples.SPLITS`, or None) and `origin`.

  Raises:
    DataError: another split.
  """
  for e in found:
    if e.split not in (None, *examples.SPLITS):
      raise DataError(f'{e.origin}: split {e.split!r}; expected {", ".join(examples.SPLITS)}')
  parts, undecided = [e.split for e in found], [i for i, e in enumerate(found) if e.split is None]
  if undecided:
    drawn = splits.by_hash([texts[i] for i in undecided], (1 - validation_fraction, validation_fraction))
    for name in ('train', 'validation'):
      for i in getattr(drawn, name):
        parts[undecided[i]] = name
  return parts
