r"""Tells what is wrong with fine-tuning data before a model learns it, and writes what passes.

  python -m scripts.quality_check --in=reviews.jsonl
  python -m scripts.quality_check --in=chat.parquet --tokenizer=MODEL.gguf --length=512 --out=report.json
  python -m scripts.quality_check --in=评论.csv --encoding=gb18030 --picture=report.png --clean=clean.jsonl
  python -m scripts.quality_check --in=glue_sst2 --rename=sentence=text
  python -m scripts.quality_check --in=saved_dataset --strict --set near=0.9 --set "classes=('pos', 'neg')"

--in is a file or folder of JSON lines, JSON, CSV, TSV, Parquet, YAML or a saved Hugging Face dataset, in English,
Chinese or both. What its records are (--kind) is told from the first of them:

  classification  {"text", "label"}, of pairs with "text_pair"; any other field is metadata
  instruction     {"instruction", "input", "output"}
  chat            {"messages": [{"role", "content"}, ...]}, ShareGPT's "conversations", instructions with a history
  preference      {"prompt", "chosen", "rejected"}

Printed are the malformed records by kind, the first of each with file and line; then of those that can be read the
languages, labels and how uneven they are, lengths in characters, and what was found: another language; labels missing,
unknown, contradictory; too short, too long; duplicates and near duplicates, control and damaged characters,
repetition, boilerplate, personal data, profanity. Nothing that is printed or written to --out holds any of the text.
With --tokenizer, lengths are also in tokens, as training would write them, and those longer than --length (which
training would cut) are counted. The rules can be changed with --set; profanity needs a list: --set "words=('...',)".

--clean gets the records that are sound and without a finding of the kinds in --drop, in their order and in the
spelling above; any split that they say, or that the name of their file or folder says, stays with them. Each of the
others is counted once, under the first thing found.

Exit status: 0 done, whatever was found; 1 something was found (or, with --length, is longer) and --strict is on; 2 a
flag is wrong or a package missing; 3 the data cannot be read, none of it is sound, or --on_error=stop met a record.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
import itertools
import json
import math
import os
import pathlib
from typing import Any

from absl import flags
import numpy as np
import tqdm

from experiments import cli
from lm import config, disk, pictures
from lm.data import conversations, examples, framing, memory, quality, tables_io, turns
from lm.data.examples import Chat, Example, Instruction, Labelled, Preference
from lm.data.json_io import Row
from lm.errors import ConfigError, DataError, Error
from lm.text import chat, vocabulary
from lm.text.tokenizer import Tokenizer

_IN = flags.DEFINE_string('in', '', 'File or folder of records.')
_KIND = flags.DEFINE_enum('kind', None, ['classification', 'instruction', 'chat', 'preference'], 'What the records '
                          'are; told from the first one if not given.')
_ON_ERROR = flags.DEFINE_enum('on_error', 'skip', ['skip', 'stop'], 'A malformed record is left out and counted, or '
                              'ends the check.')
_ENCODING = flags.DEFINE_string('encoding', 'utf-8', 'Of text files; older Chinese ones are often gb18030.')
_RENAME = flags.DEFINE_list('rename', [], 'What the records call a field, and its name above: premise=text,'
                            'hypothesis=text_pair. As data.rename of the training to come.')
_SET = flags.DEFINE_multi_string('set', [], 'Changes to the rules, typed and checked: ' + ', '.join(
    f'{name}={value!r}' for name, value in config.flatten(quality.Rules()).items() if name != 'boilerplate') +
    ', boilerplate=(phrases). near=None looks for no near duplicates.')
_TOKENIZER = flags.DEFINE_string('tokenizer', '', 'Also measure in tokens: a tokenizer, a model\'s folder, .gguf.')
_LENGTH = flags.DEFINE_integer('length', 0, 'data.length of the training to come; needs --tokenizer.', lower_bound=0)
_TEMPLATE = flags.DEFINE_enum('template', 'chatml', list(conversations.TEMPLATES), 'How conversations are written in '
                              'tokens.')
_OUT = flags.DEFINE_string('out', '', 'JSON file for the whole report, every finding with its place.')
_PICTURE = flags.DEFINE_string('picture', '', 'PNG file: lengths by label, and how many there are of each.')
_CLEAN = flags.DEFINE_string('clean', '', 'JSONL file for the records that pass; must not exist.')
_DROP = flags.DEFINE_list('drop', list(quality.CHECKS), 'Findings that keep a record out of --clean: whole checks '
                          f'({", ".join(quality.CHECKS)}) or some of: {", ".join(quality.KINDS)}.')
_STRICT = flags.DEFINE_bool('strict', False, 'Exit with 1 where anything was found.')


def main(_: list[str]) -> None:
  check_flags()
  rules = config.override(quality.Rules(), *_SET.value)
  quality.keep([], quality.check([], rules), _DROP.value)  # a wrong flag is told before the long part
  tokenizer = memory.read_tokenizer(_TOKENIZER.value) if _TOKENIZER.value else None
  names = tuple(tuple(item.split('=')) for item in _RENAME.value)
  memory.check_rename(names, '--rename')
  kind = _KIND.value or kind_of(_IN.value, _ENCODING.value, dict(names))
  found, reading = examples.read(_IN.value, kind, _ON_ERROR.value, _ENCODING.value, rename=dict(names),
                                 unanswered='cut')
  tokens = None
  if tokenizer:
    files = [(_IN.value, _watched(found), reading)]
    (_, counted, reading), = conversations.usable(files, lambda e: count(e, tokenizer), _ON_ERROR.value)
    found, tokens = [w.record for w in counted], [w.rows for w in counted]
  report = quality.check(found, rules, _watched)
  rejected = reasons(report, _DROP.value)
  whole = {'in': _IN.value, 'kind': kind} | summary(found, reading, report, tokens)
  print(text(kind, reading, report, whole))
  if _CLEAN.value:
    passed = [e for i, e in enumerate(found) if i not in rejected]
    if not passed:
      raise DataError(f'{_IN.value}: no record passes; expected some to write to --clean; see --drop and --set')
    whole['clean'] = {'kept': len(passed), 'rejected': {f'malformed: {k}': n for k, n in reading.faults.items()} |
                      dict(Counter(rejected.values()).most_common())}
    write(passed, pathlib.Path(_CLEAN.value))
    print(f'{_CLEAN.value}: {len(passed)} of {reading.seen} records; rejected: ' + (
        ', '.join(f'{name} {n}' for name, n in whole['clean']['rejected'].items()) or 'none'))
  if _OUT.value:
    content = json.dumps(whole, ensure_ascii=False, indent=1, allow_nan=False) + '\n'
    disk.write(_OUT.value, content.encode())
    print(f'{_OUT.value}: every finding with its place')
  if _PICTURE.value:
    draw(found, tokens)
  if _STRICT.value:
    refuse(reading, report, whole)


def check_flags() -> None:
  if not _IN.value:
    raise ConfigError('--in: not given; expected a file or folder of records; see --help')
  if _LENGTH.value and not _TOKENIZER.value:
    raise ConfigError(f'--length={_LENGTH.value}: no tokenizer to count with; add --tokenizer')
  if os.path.exists(_CLEAN.value):
    raise ConfigError(f'--clean={_CLEAN.value}: exists already; it is not overwritten; choose another name')
  named = [(flag, os.path.realpath(value)) for flag, value in (
      ('in', _IN.value), ('out', _OUT.value), ('picture', _PICTURE.value), ('clean', _CLEAN.value)) if value]
  for (first, one), (second, other) in itertools.combinations(named, 2):
    if one == other:
      raise ConfigError(f'--{second}={other}: the same as --{first}; expected another file; choose another name')
  for flag, value in (('out', _OUT.value), ('picture', _PICTURE.value), ('clean', _CLEAN.value)):
    if value and not pathlib.Path(value).absolute().parent.is_dir():
      raise ConfigError(f'--{flag}={value}: no such folder; expected one to write to; make it')


def kind_of(path: str, encoding: str, names: Mapping[str, str]) -> str:
  """What `examples.read` is to take the records for, by the fields of the first that can be read at all."""
  known = {'text', 'label', 'instruction', 'prompt', 'chosen', *turns.CONVERSATIONS}
  own = ({names.get(name, name) for name in item.fields} for item in tables_io.rows(path, encoding)
         if isinstance(item, Row) and isinstance(item.fields, Mapping))
  fields = next((fields for fields in own if known & fields), ())
  if 'chosen' in fields:
    return 'preference'
  if any(name in fields for name in turns.CONVERSATIONS) or 'instruction' in fields and (
      'history' in fields or 'system' in fields):
    return 'chat'
  return 'instruction' if 'instruction' in fields else 'classification'


def count(example: Example, tokenizer: Tokenizer) -> int:
  """Tokens of the example as training reads it; of a preference, with the longer answer; a Fault if it cannot."""
  if isinstance(example, Labelled):
    found = memory.encoded(example.texts, tokenizer, example.origin)
    return sum(map(len, found)) + _around(tokenizer, example.text_pair is not None)
  talks = (example.as_chats() if isinstance(example, Preference) else
           (example.as_chat() if isinstance(example, Instruction) else example,))
  template = conversations.TEMPLATES[_TEMPLATE.value]
  try:
    masks = [chat.encode(template, talk.messages, tokenizer).mask for talk in talks]
  except DataError as error:
    raise turns.refused(error, example.origin) from error
  return max(int(np.flatnonzero(mask)[-1]) + 1 for mask in masks)  # what comes behind the last target is left out


def summary(found: Sequence[Example], reading: examples.Report, report: quality.Report,
            tokens: Sequence[int] | None) -> dict[str, Any]:
  """All that was found, as JSON takes it."""
  percentiles = lambda values: dict(zip(map(str, quality.PERCENTILES), values, strict=True))
  out = {'records': {'seen': reading.seen, 'read': reading.kept, 'last turn cut': reading.cut,
                     'not read': list(reading.left),
                     'malformed': dict(reading.faults), 'first malformed': {k: list(v) for k, v in
                                                                            reading.messages.items()}},
         'languages': dict(report.languages), 'labels': dict(report.classes),
         'imbalance': max(report.classes.values()) / min(report.classes.values()) if report.classes else None,
         'characters': {code: percentiles(values) for code, values in report.lengths.items()}}
  if tokens is not None:
    room = _LENGTH.value + (not isinstance(found[0], Labelled))  # rows of conversations hold one token more
    out['tokens'] = percentiles(np.percentile(tokens, quality.PERCENTILES, method='inverted_cdf').astype(int).tolist())
    out['longer'] = {'length': _LENGTH.value, 'examples': sum(n > room for n in tokens)} if _LENGTH.value else None
  if report.longer[1]:
    out['preferences'] = dict(zip(('chosen longer', 'pairs'), report.longer, strict=True))
  return out | {'findings': report.counts(), 'places': [
      {'example': f.number, 'at': f.origin, 'kind': f.kind, 'detail': f.detail} for f in report.findings],
                'notes': list(report.notes)}


def text(kind: str, reading: examples.Report, report: quality.Report, whole: Mapping[str, Any]) -> str:
  """For people."""
  out = [f'{_IN.value}: {kind}']
  if not reading.complete:
    out += [reading.table(), '']
  out.append(report.text())
  if 'tokens' in whole:
    out.append('tokens       ' + '  '.join(f'{p}%: {n}' for p, n in whole['tokens'].items()))
  if whole.get('longer'):
    n = whole['longer']['examples']
    out.append(f'longer than --length={_LENGTH.value}: {n} ({n / report.total:.1%}); training would cut these')
  return '\n'.join(out)


def reasons(report: quality.Report, drop: Sequence[str]) -> dict[int, str]:
  """{number of an example that is to be dropped: the first finding that says so}."""
  kinds, first = {kind for name in drop for kind in quality.CHECKS.get(name, (name,))}, {}
  for finding in report.findings:
    if finding.kind in kinds:
      first.setdefault(finding.number, finding.kind)
  return first


def record(example: Example) -> dict[str, Any]:
  """The example in the spelling that all readers here take; `examples.read` gives it back."""
  if isinstance(example, Labelled):
    own = dict(zip(('text', 'text_pair'), example.texts, strict=False)) | {'label': example.label}
    clash = {'text', 'text_pair', 'label', 'split', 'metadata'} & set(example.metadata)
    out = own | ({'metadata': dict(example.metadata)} if clash else dict(example.metadata))
  elif isinstance(example, Instruction):
    out = {'instruction': example.instruction, 'input': example.input, 'output': example.output}
    out |= {'task_type': example.task_type} if example.task_type else {}
  elif isinstance(example, Chat):
    out = {'messages': _messages(example.messages)}
  else:
    out = {'prompt': _messages(example.prompt), 'chosen': example.chosen, 'rejected': example.rejected}
  return out | ({'split': example.split} if example.split in examples.SPLITS else {})


def write(passed: Iterable[Example], path: pathlib.Path) -> None:
  with disk.replacing(path) as f:
    f.writelines(json.dumps(_plain(record(e)), ensure_ascii=False, allow_nan=False) + '\n' for e in passed)


def draw(found: Sequence[Example], tokens: Sequence[int] | None) -> None:
  """The picture of lengths by label; of preferences in characters by answer, of other kinds all together."""
  sizes: dict[str, list[int]] = {}
  if isinstance(found[0], Preference):
    sizes = {name: [len(getattr(e, name)) for e in found] for name in ('chosen', 'rejected')}
  else:
    for i, e in enumerate(found):
      label = e.label if isinstance(e, Labelled) else getattr(e, 'task_type', '') or type(e).__name__.lower()
      sizes.setdefault(str(label), []).append(tokens[i] if tokens else sum(map(len, quality.texts(e))))
  in_tokens = tokens is not None and not isinstance(found[0], Preference)
  pictures.lengths(_PICTURE.value, sizes, 'tokens' if in_tokens else 'characters', _LENGTH.value if in_tokens else 0,
                   os.path.basename(os.path.abspath(_IN.value)))
  print(f'{_PICTURE.value}: lengths and labels')


def refuse(reading: examples.Report, report: quality.Report, whole: Mapping[str, Any]) -> None:
  """Raises where anything was found."""
  found = {'malformed': reading.seen - reading.kept, 'last turn cut': reading.cut} | report.counts()
  found['longer'] = (whole.get('longer') or {}).get('examples', 0)
  if named := ', '.join(f'{name} {n}' for name, n in found.items() if n):
    raise Error(f'{_IN.value}: {named}; --strict expects none; repair the records, or train on --clean=NAME.jsonl')


def _watched(items: Sequence[Any]) -> Iterable[Any]:
  return tqdm.tqdm(items, desc='checking', unit=' examples', disable=None, leave=False)


def _around(tokenizer: Tokenizer, pair: bool) -> int:
  """Tokens that a classifier's row has around the text or texts: an encoder's, or a decoder's."""
  try:
    vocabulary.special_ids(tokenizer)
  except ConfigError:
    return framing.frame_of(tokenizer, encoder=False, pairs=pair).around
  return framing.frame_of(tokenizer, encoder=True, pairs=pair).around


def _messages(some):
  return [{'role': m.role, 'content': m.content} | ({'input': m.input} if m.input else {}) for m in some]


def _plain(value: Any) -> Any:
  """What Parquet has and JSON has not: a number that is none is null, a date is its ISO string."""
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value if isinstance(value, str | int | float | bool | None) else str(value)


if __name__ == '__main__':
  cli.guard(main, __doc__)
