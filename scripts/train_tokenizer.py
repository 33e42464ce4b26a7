r"""Trains a tokenizer on text files and says how well it does.

  python -m scripts.train_tokenizer --vocab=16000 --out=tokenizers/en.model --text=corpora/sotu.jsonl
  python -m scripts.train_tokenizer --kind=bpe --vocab=32000 --out=tokenizers/mixed.model --text='corpora/*.jsonl'
  python -m scripts.train_tokenizer --kind=char --out=tokenizers/shakespeare --text=shakespeare.txt
  python -m scripts.train_tokenizer --vocab=30000 --out=tokenizers/bert.model --text='corpora/*.jsonl' \
      --control_symbols='[CLS],[SEP],[MASK]'

unigram: SentencePiece, the best default; encodes several times faster than bpe. bpe: trains ten times faster.
char: one id per character, for tiny experiments. The same files and flags give the same bytes. unigram and bpe models
give every text back exactly (newlines, tabs, emoji, any script), except the character U+2581. Encoders (BERT, ELECTRA)
need the control symbols of the last line, in English as in Chinese; <pad> is always there. So that validation text has
no part in the tokenizer, give --validation_fraction what the run has as data.validation_fraction (0.05 by default).

Exit status: 0 done, 2 a flag is wrong, 3 a file is missing or damaged.
"""

from collections.abc import Iterable, Iterator
import itertools
import os

from absl import flags
import tqdm

from experiments import cli
from lm.data import corpora, records
from lm.errors import ConfigError, Error
from lm.text import tokenizer as tokenizers, tokenizer_files, training

_TEXT = flags.DEFINE_list('text', [], '.txt and .jsonl files, directories or globs, comma-separated.')
_KIND = flags.DEFINE_enum('kind', 'unigram', ['unigram', 'bpe', 'char'], 'What to train.')
_VOCAB = flags.DEFINE_integer('vocab', 16000, 'Number of ids, control symbols and 256 bytes included (not for char).',
                              lower_bound=300, upper_bound=1 << 24)
_OUT = flags.DEFINE_string('out', '', 'The .model file to write (char: a directory).')
_CONTROL = flags.DEFINE_list('control_symbols', [], 'Extra control symbols, e.g. "<|user|>,<|assistant|>,[MASK]": they '
                             'get ids from 4 on, and text that spells them stays text.')
_COVERAGE = flags.DEFINE_float('character_coverage', 0.9995, 'Share of the characters that get an id of their own; the '
                               'rest are spelled in bytes.', lower_bound=0.9, upper_bound=1.0)
_HELD_OUT = flags.DEFINE_float('validation_fraction', 0.0, 'Leave out the documents that a run with data.split=hash '
                               'and this data.validation_fraction validates on; 0 = none.', lower_bound=0.0)
_MAX_LINES = flags.DEFINE_integer('max_lines', 0, 'Train on a random sample of this many lines; 0 = all of them.',
                                  lower_bound=0)

CHECKED = 1000  # documents measured afterwards


def main(_: list[str]) -> None:
  for flag in (_TEXT, _OUT):
    if not flag.value:
      raise ConfigError(f'--{flag.name}: not given; expected --text=PATHS --out=FILE.model; see --help')
  files = corpora.Files(tuple(p for path in _TEXT.value for p in corpora.find(path).paths))
  failed: list[Error] = []
  documents = tqdm.tqdm(files, desc='reading', unit=' documents', disable=None)
  texts = trained(remembered(documents, failed), _HELD_OUT.value)
  if _KIND.value == 'char':
    if _HELD_OUT.value:
      raise ConfigError(f'--validation_fraction={_HELD_OUT.value} with --kind=char: it has no id for a character '
                        'that it did not see; drop the flag')
    if _CONTROL.value or _MAX_LINES.value:
      raise ConfigError('--control_symbols, --max_lines: not for --kind=char, which has all characters and no other; '
                        'drop them, or choose another kind')
    if others := set(tokenizer_files.names_in(_OUT.value)) - {'char.json'}:
      raise ConfigError(f'--out={_OUT.value}: holds {min(others)}, of another tokenizer; expected a folder of its own; '
                        'choose another')
    tokenizer = tokenizers.char(texts)
    tokenizer.save(_OUT.value)
  else:
    if not _OUT.value.endswith('.model'):
      raise ConfigError(f'--out={_OUT.value}: expected a name ending in .model; e.g. --out={_OUT.value}.model')
    try:
      tokenizer = training.train_sentencepiece(
          texts, _OUT.value, _VOCAB.value, _KIND.value, control_symbols=_CONTROL.value,
          character_coverage=_COVERAGE.value, max_lines=_MAX_LINES.value)
    except Error as error:
      raise (failed[0] if failed else error) from error
  count = size = inexact = 0
  for document in itertools.islice(files, CHECKED):
    ids = tokenizer.encode(document.text)
    count, size = count + len(ids), size + len(document.text.encode())
    inexact += tokenizer.decode(ids) != document.text
  print(f'{_OUT.value}: {tokenizer.vocab_size:,} ids, {size / max(count, 1):.2f} bytes per token, {inexact} of the '
        f'first {CHECKED:,} documents not given back exactly, sha256 {tokenizer.sha256[:16]}')
  print(f'next: python -m scripts.prepare_corpus --text={",".join(_TEXT.value)} --tokenizer={_OUT.value} --out='
        + (os.path.dirname(_OUT.value) or '.'))


def remembered(documents: Iterable[corpora.Document], failed: list[Error]) -> Iterator[corpora.Document]:
  """The documents; an error on the way is kept, too, as SentencePiece makes another of it."""
  try:
    yield from documents
  except Error as error:
    failed.append(error)
    raise


def trained(documents: Iterable[corpora.Document], held_out: float) -> Iterator[str]:
  """Their texts, without the share that is held out."""
  if not held_out:
    return (d.text for d in documents)
  return (d.text for split, d in records.assign(documents, records.Split('hash', held_out)) if split == 'train')


if __name__ == '__main__':
  cli.guard(main, __doc__)
