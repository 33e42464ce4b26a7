r"""Classifies texts with a model of experiments.classify, or of transformers, or scores that model.

  python -m scripts.classify --model=runs/movies --text='A fine, quiet film.' --text='Two hours I want back.'
  python -m scripts.classify --model=runs/movies --corpus=new.csv --out=classified.jsonl
  cat lines.txt | python -m scripts.classify --model=runs/movies            # a text a line
  python -m scripts.classify --model=runs/movies --split=validation         # the run's own held-out texts: scores alone

--model is a workdir (its best checkpoint), or a Hugging Face folder of a class ...ForSequenceClassification of BERT,
RoBERTa or DeBERTa. --corpus takes records {text} or {text, text_pair}, in the formats that the experiment reads (JSON,
JSON lines, CSV, TSV, Parquet, a folder of them), read as the run read its own (data.rename, data.encoding); records
that have a label as well are scored. A line of JSON is written for each text, in order: text, text_pair and label as
given, the likeliest class as `predicted`, and the probability of each class; of a model of numbers the number alone.
Scores go to stderr: accuracy, macro F1, Matthews' correlation, and a table of the classes; of numbers the correlations
of Pearson and Spearman. A text too long loses its end, as in training; it is said how many.

Exit status: 0 done, 2 a flag is wrong, 3 a record, a text or the tokenizer, 4 the weights.
"""

import contextlib
import json
import sys

from absl import flags
import numpy as np

from experiments import cli
from lm import classification, classifier, disk, host, metrics, weights
from lm.data import examples, labelled, tables_io, turns
from lm.data.json_io import Fault, Row
from lm.errors import ConfigError, DataError

_MODEL = flags.DEFINE_string('model', '', "A classifier's workdir, or its Hugging Face folder.")
_TEXT = flags.DEFINE_multi_string('text', [], 'What to classify; may be repeated.')
_CORPUS = flags.DEFINE_string('corpus', '', 'A file or folder of records with texts.')
_SPLIT = flags.DEFINE_string('split', '', 'Scores the model on this split of the data of its run: validation, or test '
                             'where records say so.')
_OUT = flags.DEFINE_string('out', '', 'A file for the lines; without it they are printed.')


def main(_: list[str]) -> None:
  if not _MODEL.value:
    raise ConfigError('--model: not given; expected a workdir, or a Hugging Face folder, of a classifier; see --help')
  if sum(map(bool, (_TEXT.value, _CORPUS.value, _SPLIT.value))) > 1:
    raise ConfigError('--text, --corpus, --split: two of them; expected one')
  if _SPLIT.value and _OUT.value:
    raise ConfigError('--out: with --split nothing but scores is told; leave it out, or give --corpus')
  if _SPLIT.value and weights.kind_of(_MODEL.value) != 'workdir':
    raise ConfigError(f'--split: {_MODEL.value} is no workdir, which knows its data; expected --corpus=FILE')
  host.keep_compiled_programs()
  found = classifier.load(_MODEL.value)
  if _SPLIT.value:
    report(found.config, *classification.predictions(found.config, _MODEL.value, _SPLIT.value))
    return
  records = list(_given(found.config.data))
  pairs = {'text_pair' in r for r in records}
  if len(pairs) != 1:
    raise DataError(f'{_CORPUS.value or "stdin"}: {"texts and pairs" if pairs else "no texts"}; expected '
                    f'{"one kind" if pairs else "at least one"}')
  probabilities_NC, cut = found.probabilities([[r['text'], *([r['text_pair']] if 'text_pair' in r else [])]
                                               for r in records])
  if cut:
    print(f'{cut} of {len(records)} cut to {found.config.data.room} tokens', file=sys.stderr, flush=True)
  numbers = found.config.data.numbers
  said_N = probabilities_NC[:, 0] if numbers else probabilities_NC.argmax(-1)
  with disk.replacing(_OUT.value) if _OUT.value else contextlib.nullcontext(sys.stdout) as out:
    for record, n, p_C in zip(records, said_N, probabilities_NC.tolist(), strict=True):
      told = {'predicted': round(float(n), 6)} if numbers else {
          'predicted': found.names[n],
          'probabilities': {name: round(p, 6) for name, p in zip(found.names, p_C, strict=True)}}
      out.write(json.dumps(record | told, ensure_ascii=False) + '\n')
  if all('label' in r for r in records):
    if numbers:
      report(found.config, np.array([r['label'] for r in records]), said_N, found.names)
      return
    if other := {r['label'] for r in records} - set(found.names):
      raise DataError(f'{_CORPUS.value}: label {min(other)[:40]!r}; the model tells apart {", ".join(found.names)}; '
                      'nothing was scored')
    report(found.config, np.array([found.names.index(r['label']) for r in records]), said_N, found.names)


def report(c: classification.Config, labels_N: np.ndarray, said_N: np.ndarray, names: tuple[str, ...]) -> None:
  """Prints scores and, of classes, their table to stderr."""
  scores = ', '.join(f'{name} {f(labels_N, said_N):.4f}' for name, f in classification.scores(c).items())
  table = '' if c.data.numbers else metrics.table(metrics.per_class(labels_N, said_N, names))
  print(f'{len(labels_N)} texts: {scores}\n{table}', file=sys.stderr, flush=True)


def _given(c: labelled.Config):
  """{text, text_pair, label} of each text, the latter two where there are any."""
  if not _CORPUS.value:
    lines = _TEXT.value or _lines()
    yield from (_checked(Row(f'{"--text" if _TEXT.value else "stdin"}:{i}', {'text': text}))
                for i, text in enumerate(lines, 1))
    return
  if left := tables_io.left_alone(_CORPUS.value):
    print(f'{_CORPUS.value}: not read: {", ".join(left)}', file=sys.stderr, flush=True)
  for row in tables_io.rows(_CORPUS.value, c.encoding):
    if isinstance(row, Fault):
      raise row
    yield _checked(examples.renamed(row, dict(c.rename)), c.numbers)


def _checked(row, numbers=False):
  has = lambda name: row.fields.get(name) is not None
  pair = {'text_pair': turns.text(row, 'text_pair')} if has('text_pair') else {}
  return {'text': turns.text(row, 'text')} | pair | (
      {'label': (examples.number_of if numbers else examples.label_of)(row)} if has('label') else {})


def _lines():
  if sys.stdin.isatty():
    print('a text a line, then Ctrl-D:', file=sys.stderr, flush=True)
  try:
    return sys.stdin.buffer.read().decode().splitlines()
  except UnicodeDecodeError as error:
    raise DataError(f'stdin: byte {error.start} is not UTF-8; expected UTF-8; re-encode it') from error


if __name__ == '__main__':
  cli.guard(main, __doc__)
