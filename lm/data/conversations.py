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
    validation_fraction: of conversations whose file does not say; by a hash of the first user turn, for every seed the
      same.
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
    ConfigError, DataError: no corpus or tokenizer, a wrong record, a conversation in two splits, nothing left.
  """
  del folder
  memory.check_paths(c)
  tokenizer, found, parts = memory.read_tokenizer(c.tokenizer), [], {'train': [], 'validation': [], 'test': []}
  for path in (c.corpus,) if isinstance(c.corpus, str) else c.corpus:
    some, report = examples.read(path, 'chat', c.on_error, unanswered='cut')
    if report.kept < report.seen or report.cut:
      print(f'{path}:\n{report.table()}', flush=True)
    found += some
  said = declared(found, ['\0'.join(splits.duplicate_key(m.content) for m in e.messages) for e in found])
  found = [dataclasses.replace(e, split=part) for e, part in zip(found, said, strict=True)]
  asked = [user_first(e.messages) for e in found]
  chosen = assigned(found, asked, c.validation_fraction)
  _check_parts(chosen, c.validation_fraction)
  for example, part in zip(found, chosen, strict=True):
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


def declared(found: Sequence[Any], texts: Sequence[str]) -> list[str | None]:
  """The split that each record says, else that of another record of the same text, None where none says one.

  Args:
    found: records with `split` (one of `examples.SPLITS`, or None) and `origin`.

  Raises:
    DataError: another split; two splits of one text.
  """
  keys, said = _keys(found, texts), {}
  for e, key in zip(found, keys, strict=True):
    other = e if e.split is None else said.setdefault(key, e)
    if other.split != e.split:
      raise DataError(f'{e.origin}: split {e.split!r}, but the same text at {other.origin} has split {other.split!r}; '
                      'expected one split of a text, or what is held out is trained on; remove one of the two, as '
                      'scripts.quality_check --clean does')
  return [said[key].split if key in said else None for key in keys]


def assigned(found: Sequence[Any], texts: Sequence[str], validation_fraction: float) -> list[str]:
  """The split of each record: its own, else that of a record of the same text, else by a hash of the text.

  No text is in two splits but where the records say so: then the others of this text are held out as any is.

  Args:
    found: records with `split` (one of `examples.SPLITS`, or None) and `origin`.

  Raises:
    DataError: another split. ConfigError: nothing to train on or to validate with, of all records.
  """
  keys = _keys(found, texts)
  said = {key: part for part in examples.SPLITS for e, key in zip(found, keys, strict=True) if e.split == part}
  parts = [e.split or said.get(key) for e, key in zip(found, keys, strict=True)]
  if undecided := [i for i, part in enumerate(parts) if part is None]:
    drawn = splits.hashed([keys[i] for i in undecided], (1 - validation_fraction, validation_fraction), 0, str)
    for i, part in zip(undecided, drawn, strict=True):
      parts[i] = examples.SPLITS[part]
    _check_parts(parts, validation_fraction)
  return parts


def folded(found: Sequence[examples.Labelled], texts: Sequence[str], said: Sequence[str | None], k: int, fold: int
           ) -> list[str | None]:
  """The split of each record but those of the test split by k folds in equal shares of each class, seed 0.

  Copies that scripts.augment wrote change nothing for the others: they train where their originals do, but not if what
  is held out has their text, and are else left out, None.

  Args:
    said: of each record, by `declared`.
  """
  parts, copied = list(said), [_copied(e) for e in found]
  pool = [i for i, part in enumerate(parts) if part != 'test' and copied[i] is None]
  split = splits.folds([texts[i] for i in pool], k, 'stratified', labels=[found[i].label for i in pool], seed=0)[fold]
  for name in ('train', 'validation'):
    for i in getattr(split, name):
      parts[pool[i]] = name
  trains, held = {}, set()  # {id: whether all records of it train}; keys of texts that are held out
  for e, text, part, of in zip(found, texts, parts, copied, strict=True):
    if of is None:
      trains[_id(e)] = part == 'train' and trains.get(_id(e), True)
      held |= {splits.duplicate_key(text)} if part != 'train' else set()
  for i, of in enumerate(copied):
    if of is not None and parts[i] != 'test':
      trains[_id(found[i])] = trains.get(of, False) and splits.duplicate_key(texts[i]) not in held
      parts[i] = 'train' if trains[_id(found[i])] else None
  return parts


def _id(example):
  return str(example.metadata.get('id'))


def _copied(example):
  """The id of the record that scripts.augment made this one of; None of what is no copy."""
  origin = str(example.metadata.get('origin'))
  return origin if _id(example).rpartition('#')[0] == origin else None


def _check_parts(parts, validation_fraction):
  for part in ('train', 'validation'):
    if part not in parts:
      raise ConfigError(f'data.validation_fraction={validation_fraction}: of {len(parts)} records none is left for '
                        f'{part}; expected at least one; change the share, say the split of some, or add records')


def _keys(found, texts):
  """What records of one text have in common, after a look at the splits that they say."""
  for e in found:
    if e.split not in (None, *examples.SPLITS):
      raise DataError(f'{e.origin}: split {e.split!r}; expected {", ".join(examples.SPLITS)}')
  return [splits.duplicate_key(text) for text in texts]
