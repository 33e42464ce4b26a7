"""Writes labelled texts in other words: a JSONL file, and after each training example of it copies that differ.

  python -m scripts.augment --list
  python -m scripts.augment --in=reviews.jsonl --out=more.jsonl --methods=synonyms_en:0.1,typos:0.05
  python -m scripts.augment --in=reviews.jsonl --out=more.jsonl --methods=synonyms_zh+clauses,homophones --copies=2
  python -m scripts.augment --in=reviews.jsonl --out=more.jsonl --methods=back_translation --translate=eng-spa,spa-eng

A line of --in is {"text", "label", "split"}, of pairs with "text_pair"; any other fields are kept. A method is NAME or
NAME:RATE, the share of words (sentences, marks) to change. Each copy is made by one of the methods between commas,
drawn by chance; a plus sign applies several, one after the other. Numbers, URLs, e-mails, code, negations and the words
of --protect never change.

Only examples of --split are copied, and --split must be a training split: held-out text is never augmented. Copies
come after their original with its label, the id 'ID#N' and "origin": ID, by which data.folds keeps both on one side; an
original without an id gets the number of its line as id. Copies equal to a text that is there already are left out,
and those that differ from a held-out one only in case, width or space. The same input, flags and seed give the same
file. To augment while training, give the same names to experiments.classify by data.augment: each epoch then reads
other wordings.

Exit status: 0 done, 2 a flag is wrong or a package missing, 3 the data.
"""

import codecs
from collections import Counter
import dataclasses
import difflib
import json
import pathlib
from typing import Any

from absl import flags
import numpy as np

from experiments import cli
from lm import disk
from lm.data import corpora
from lm.errors import ConfigError, DataError
from lm.text import augment, methods, scan, synonyms

_LIST = flags.DEFINE_bool('list', False, 'Print the methods and stop.')
_IN = flags.DEFINE_string('in', '', 'JSONL file of {"text", "label", "split"}.')
_OUT = flags.DEFINE_string('out', '', 'JSONL file to write; must not exist.')
_METHODS = flags.DEFINE_list('methods', [], 'What to do, NAME[:RATE][+NAME[:RATE]...], comma-separated (see --list).')
_COPIES = flags.DEFINE_integer('copies', 1, 'Copies of each training example, at most.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Of all choices.', lower_bound=0)
_SPLIT = flags.DEFINE_string('split', 'train', 'The split to augment.')
_PROTECT = flags.DEFINE_list('protect', [], 'Words that stay as they are, comma-separated: names, terms.')
_WORDNET = flags.DEFINE_string('wordnet', synonyms.DEBIAN, 'Folder of WordNet, for synonyms_en.')
_TRANSLATE = flags.DEFINE_list('translate', list(methods.SPANISH), 'Apertium pairs there and back, for '
                               'back_translation.')
_SHOW = flags.DEFINE_integer('show', 3, 'Pairs of original and copy to print.', lower_bound=0)

TEXTS = ('text', 'text_pair')


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the file.

  Attributes:
    text: the text, or both of a pair.
    fields: as read, with the id; `json` says what a copy has instead.
    origin: 'ID#N' of a copy, else empty.
  """

  id: str
  text: tuple[str, ...]
  split: str
  fields: dict[str, Any]
  origin: str = ''

  @property
  def original(self) -> str:
    return self.origin.rpartition('#')[0]

  @property
  def key(self) -> tuple[str, ...]:
    return tuple(map(scan.duplicate_key, self.text))

  def json(self) -> str:
    more = dict(zip(TEXTS, self.text, strict=False)) | {'id': self.id, 'origin': self.original} if self.origin else {}
    return json.dumps(self.fields | more, ensure_ascii=False)


def main(_: list[str]) -> None:
  if _LIST.value:
    for name, (about, rate, _) in methods.known().items():
      print(f'{name}:{rate:<{20 - len(name)}} {about}')
    return
  out = pathlib.Path(_OUT.value)
  for flag, value in (('in', _IN.value), ('out', _OUT.value), ('methods', _METHODS.value)):
    if not value:
      raise ConfigError(f'--{flag}: not given; expected a value; see --help')
  if out.exists():
    raise ConfigError(f'--out={out}: exists already; it is not overwritten; choose another name or delete it')
  if len(_TRANSLATE.value) != 2:
    raise ConfigError(f'--translate={",".join(_TRANSLATE.value)}: expected two pairs, there and back; give '
                      'eng-spa,spa-eng')
  rows = read(_IN.value)
  known = methods.known(_WORDNET.value, _TRANSLATE.value,
                        lambda: [text for row in rows if row.split == _SPLIT.value for text in row.text])
  one_of = methods.one_of(_METHODS.value, known, frozenset(_PROTECT.value))
  made = augment.apply(rows, lambda texts, rng: tuple(one_of(text, rng) for text in texts), _SEED.value, _COPIES.value,
                       _SPLIT.value)
  held = {row.key for row in rows if row.split != _SPLIT.value}
  made = [row for row in made if not row.origin or row.key not in held]
  out.parent.mkdir(parents=True, exist_ok=True)
  with disk.replacing(out) as f:
    f.writelines(row.json() + '\n' for row in made)
  report(rows, made)
  print(f'next: {out} goes wherever {_IN.value} went; compare held-out scores with and without, same seed')


def read(path: str) -> list[Row]:
  """The lines of a JSONL file; the number of the line is the id where there is none."""
  rows = []
  with open(path, 'rb') as f:
    for number, line in enumerate(f, 1):
      line = line.removeprefix(codecs.BOM_UTF8)
      if not line.strip():
        continue
      fields = corpora.strict_json(line, f'{path}:{number}')
      for name in ('text', 'split'):
        if not isinstance(fields, dict) or not isinstance(fields.get(name), str):
          raise DataError(f'{path}:{number}: no {name}; expected {{"text": string, "label": ..., "split": string}}; '
                          'add the field')
      texts = tuple(fields[name] for name in TEXTS if name in fields)
      if not isinstance(texts[-1], str):
        raise DataError(f'{path}:{number}: text_pair is no string; expected the second text; mend it or drop the field')
      if fields.get('id') is None:
        fields['id'] = str(number)
      rows.append(Row(str(fields['id']), texts, fields['split'], fields))
  return rows


def report(rows: list[Row], made: list[Row]) -> None:
  """Prints how many copies there are of each split and label, how much they differ, and a few of them."""
  group = lambda row: (row.split, str(row.fields.get('label', '')))
  before, after = Counter(map(group, rows)), Counter(map(group, made))
  originals = {(row.id, row.split): ' / '.join(row.text) for row in rows}
  pairs = [(originals[row.original, row.split], ' / '.join(row.text)) for row in made if row.origin]
  print(f'{"split":12} {"label":16} {"examples":>9} {"copies":>9} {"left out":>9}')
  for key in sorted(before):
    copies = after[key] - before[key]
    left_out = _COPIES.value * before[key] - copies if key[0] == _SPLIT.value else 0
    print(f'{key[0]:12} {key[1][:16]:16} {before[key]:9,} {copies:9,} {left_out:9,}')
  if pairs:
    print(f'words changed in a copy: {np.mean([changed(pair) for pair in pairs[:1000]]):.1%}')
  for old, new in pairs[::max(len(pairs) // max(_SHOW.value, 1), 1)][:_SHOW.value]:
    print(f'- {old[:200]}\n+ {new[:200]}')


def changed(pair: tuple[str, str]) -> float:
  """Share of the words of the first text (1000 at most) that the second has not, in their order."""
  old, new = ([text[a:b] for a, b in augment.words(text)[:1000]] for text in pair)
  same = sum(m.size for m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks())
  return 1 - same / max(len(old), 1)


if __name__ == '__main__':
  cli.guard(main, __doc__)
