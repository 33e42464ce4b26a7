"""Texts, or pairs of texts, with a class each: which are trained on, and their rows (`lm.data.framing`).

The whole set fits in memory; `prepare`, `check`, `train_batches` and `eval_batches` are those of a source of
`lm.run.Task`. Shapes: N examples, B rows of a batch, T tokens a row.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import os
import re
from typing import Literal

import numpy as np

from lm.data import assign, examples, framing, memory
from lm.data.json_io import Fault
from lm.data.memory import check, eval_batches, train_batches  # noqa: F401, the names of a source
from lm.errors import ConfigError, DataError
from lm.text import methods, scan


@dataclasses.dataclass(frozen=True)
class Config:
  """Which texts, and how they become rows.

  Attributes:
    corpus: a file or folder of records {text, label, split} or {text, text_pair, label, split}, see
      `lm.data.examples.read`.
    classes: names of the labels in order; () = those of the training split, sorted, integers by their value.
    numbers: labels are numbers, such as how alike two texts are (STS-B), and no classes.
    tokenizer: a path, see `lm.text.tokenizer.load`.
    length: T, tokens of a row; longer texts are cut at their end, and it is said how many.
    batch: rows of the global batch.
    pack: several examples in a row, isolated from each other, so that little of a row is padding; `batch` still counts
      rows. They are packed once; an epoch shuffles the rows.
    longest: most tokens of an example, where it is to be less than a row; 0 = length.
    split: how records that say none (where none validates, those that say 'train') are split, for every seed the same:
      by a hash of their texts; 'stratified', in equal shares of each class; 'grouped', nearly so, and no group is in
      two splits; 'time', the first train and the last validate, and a text is left out where an earlier split has it.
    by: the field of the records that groups, e.g. author (authors that share a text are one group), or that orders: a
      number, or an ISO 8601 date.
    validation_fraction: of those.
    folds, fold: with folds > 1, cross-validation: all records but those of the test split are split anew into so many
      folds in equal shares of each class, and fold number `fold` validates. By time, of folds + 1 runs all up to number
      `fold` train, the next validates, and later ones are left out. The copies that scripts.augment wrote train where
      their originals do, and validate nowhere.
    augment: other wordings of training texts, each as `scripts.augment --methods` names it: ('typos:0.05',
      'clauses+homophones'). One of them, by chance, changes a row; every epoch draws anew.
    augment_share: of the rows of an epoch, how many are changed, in expectation.
    rename: (('sentence', 'text'),): pairs of what the records call a field, and what it is called here.
    encoding: of text files.
    on_error: a record that is wrong, or that the tokenizer cannot write, ends the run ('stop') or is left out and
      counted ('skip'); of a text, or group, of which records say two splits, those that train are. Of the test split
      those without a label are left out and counted in any case.
    threads: batches built ahead, 0 = none.
  """

  corpus: str = ''
  classes: tuple[str, ...] = ()
  numbers: bool = False
  tokenizer: str = ''
  length: int = 128
  batch: int = 32
  pack: bool = False
  longest: int = 0
  split: Literal['hash', 'stratified', 'grouped', 'time'] = 'hash'
  by: str = ''
  validation_fraction: float = 0.1
  folds: int = 0
  fold: int = 0
  augment: tuple[str, ...] = ()
  augment_share: float = 0.5
  rename: tuple[tuple[str, str], ...] = ()
  encoding: str = 'utf-8'
  on_error: Literal['stop', 'skip'] = 'stop'
  threads: int = 2

  def __post_init__(self):
    memory.check_config(self, shortest=3)
    if self.folds == 1 or not 0 <= self.fold < max(self.folds, 1):
      raise ConfigError(f'data.folds={self.folds}, data.fold={self.fold}; expected 0 folds, or at least 2 and one of '
                        'them')
    if bool(self.by) != (self.split in ('grouped', 'time')):
      raise ConfigError(f"data.by={self.by!r}, data.split={self.split!r}; expected the name of a field with 'grouped' "
                        "or 'time', and '' with any other")
    if self.numbers and self.classes:
      raise ConfigError(f'data.classes={self.classes} with data.numbers=True; expected () where labels are numbers')
    if not 0 < self.augment_share <= 1:
      raise ConfigError(f'data.augment_share={self.augment_share}; expected a share above 0, at most 1')
    if self.longest < 0 or 0 < self.longest < 3:
      raise ConfigError(f'data.longest={self.longest}; expected 0, or at least 3')
    if self.pack and self.augment:
      raise ConfigError('data.pack=True: texts that change each epoch are not packed; set data.pack=False or '
                        'data.augment=()')
    for name in self.augment:
      methods.parse(name, methods.known(), 'data.augment')

  @property
  def room(self) -> int:
    """Most tokens of an example."""
    return min(self.longest or self.length, self.length)


def prepare(c: Config, folder: str | os.PathLike, seed: int = 0, encoder: bool = True) -> memory.Data:
  """The rows of `c.corpus`; writes nothing, and prints what was cut or left out.

  Args:
    seed: of packing and of what is drawn in training; which records are held out does not depend on it.
    encoder: rows as encoders take them; else of a decoder.

  Raises:
    ConfigError, DataError: no corpus or tokenizer; a wrong record; fewer than two classes; pairs and single texts.
  """
  del folder
  memory.check_paths(c)
  tokenizer = memory.read_tokenizer(c.tokenizer)
  found, ids, names = _read(c, tokenizer)
  pairs = found[0].text_pair is not None
  frame = framing.frame_of(tokenizer, encoder, pairs)
  least = frame.around + 1 + pairs
  if c.room < least:
    raise ConfigError(f'data.length={c.room}; expected at least {least}, so that a token of each text fits')
  parts = {'train': [], 'validation': [], 'test': [], None: []}
  for example, own, part in zip(found, ids, assigned(found, c), strict=True):
    parts[part].append((example, own))
  if rest := parts.pop(None):
    why = ('records left out; this fold ends before them, or another split has their texts' if c.split == 'time' else
           'copies left out; their originals, or texts, do not train')
    print(f'{c.corpus}: {len(rest)} {why}', flush=True)
  sets, again, by = {}, None, ''
  for part, chosen in parts.items():
    if chosen or part != 'test':
      ids_N = [own for _, own in chosen]
      labels_N = (np.array([e.label for e, _ in chosen], np.float32) if c.numbers else
                  np.array([names.index(e.label) for e, _ in chosen], np.int32))
      found_N, cut = framing.framed(ids_N, frame, c.room)
      sets[part] = (framing.packed(found_N, labels_N, frame, c.length, seed) if c.pack and found_N else
                    framing.rows(found_N, labels_N, frame, c.length))
      name, rows = 'length' if c.room == c.length else 'longest', len(sets[part].ids_BT)
      print(f'{part}: {len(chosen)} examples in {rows} rows' + f', {cut} cut to data.{name}={c.room} tokens' * (cut > 0)
            + f'; an epoch is {rows // c.batch} steps' * (part == 'train'), flush=True)
      if part == 'train' and c.augment:
        again, by = _reworded(c, [e.texts for e, _ in chosen], ids_N, labels_N, frame, tokenizer)
  none = framing.no_label(np.float32 if c.numbers else np.int32)
  blank = framing.Labelled(np.int32(frame.pad), np.int32(0), none, np.int32(0) if frame.types else None,
                           np.int32(0) if c.pack else None)
  return memory.Data(c, seed, tokenizer, sets, blank, again, by, tuple(names))


def _read(c, tokenizer):
  """(the records that can be used, the ids of their texts, the names of their classes: of numbers one); prints what
  cannot."""
  found, report = examples.read(c.corpus, 'classification', c.on_error, c.encoding, classes=c.classes or None,
                                rename=dict(c.rename), numbers=c.numbers)
  faults = []
  pairs = 2 * sum(e.text_pair is not None for e in found) >= len(found)
  says = 'no field text_pair, which most have' if pairs else 'a field text_pair, which most have not'
  faults += [Fault('pair', e.origin, f'{says}; expected it in all or in none', 'mend or take out that record')
             for e in found if (e.text_pair is None) == pairs]
  found, ids, some = _written([e for e in found if (e.text_pair is not None) == pairs], tokenizer)
  faults += some
  names = ['number'] if c.numbers else list(c.classes) or sorted(
      {e.label for e in found if e.split in (None, 'train')}, key=_in_order)
  wrong = [None if c.numbers or e.label in names else Fault(
      'label', e.origin, f'label {e.label[:40]!r} is not among those of the training split, {", ".join(names)[:200]}; '
      'expected one of them') for e in found]
  found, ids, some = _without(wrong, found, ids)
  faults += some
  if c.on_error == 'skip':
    found, ids, some = _without(assign.faults(found, [_whole(e) for e in found], c), found, ids)
    faults += some
  if faults and c.on_error == 'stop':
    raise faults[0]
  report = report.without(faults)
  if not report.complete:
    print(f'{c.corpus}:\n{report.table()}', flush=True)
  if not found:
    raise DataError(f'{c.corpus}: none of {report.seen} records can be used; the first left out: {faults[0]}')
  if len(names) < 2 and not c.numbers:
    raise DataError(f'{c.corpus}: labels {names}; expected at least two in the training split')
  return found, ids, names


def _in_order(name):
  return (0, int(name), name) if re.fullmatch(r'-?\d{1,18}', name) else (1, 0, name)


def _written(found, tokenizer):
  """(the records that the tokenizer can write, the ids of their texts, why it cannot the others)."""
  ids, wrong = [], []
  for e in found:
    try:
      ids.append(memory.encoded(e.texts, tokenizer, e.origin))
      wrong.append(None)
    except Fault as fault:
      ids.append([])
      wrong.append(fault)
  return _without(wrong, found, ids)


def _without(wrong, found, ids):
  """(the records that nothing is wrong with, the ids of their texts, the faults of the others)."""
  fine = [i for i, fault in enumerate(wrong) if fault is None]
  return [found[i] for i in fine], [ids[i] for i in fine], [fault for fault in wrong if fault]


def assigned(found: Sequence[examples.Labelled], c: Config) -> list[str | None]:
  """The split of each example: its own, or that of `c.split`; never one text, or one pair, in two; None: left out."""
  return assign.labelled(found, [_whole(e) for e in found], c)


def _whole(example):
  """A text that two examples have in common if they are duplicates; of a pair, both texts decide."""
  return example.text if example.text_pair is None else scan.duplicate_key(*example.texts)


def _reworded(c, texts_N, ids_N, labels_N, frame, tokenizer):
  """(`memory.Data.again`, its `again_by`): other wordings of a share of the rows, drawn from (seed, epoch, row)."""
  texts = lambda: [text for some in texts_N for text in some]
  change = methods.one_of(c.augment, methods.known(texts=texts), where='data.augment')

  def row_of(row, epoch, seed):
    rng = np.random.default_rng((seed, epoch, row))
    return ids_N[row] if rng.random() >= c.augment_share else [
        tokenizer.encode(change(text, rng)) for text in texts_N[row]]

  def again(rows_B: np.ndarray, epoch: int, seed: int) -> framing.Labelled:
    found_N, _ = framing.framed([row_of(row, epoch, seed) for row in rows_B.tolist()], frame, c.room)
    return framing.rows(found_N, labels_N[rows_B], frame, c.length)
  digest = hashlib.sha256(json.dumps(texts_N).encode()).hexdigest()
  return again, {'methods': list(c.augment), 'share': c.augment_share, 'texts': digest}
