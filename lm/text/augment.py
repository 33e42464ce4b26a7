"""Other wordings of labelled texts: what may change in a text, combinators, back-translation, copies of a training set.

An augmentation is a pure function of a text and a generator, and keeps the label: numbers, addresses, code, control
strings, negations and protected words stay, and no text becomes empty. English and Chinese, also mixed in one text.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
import dataclasses
import functools
import importlib
import re
import shutil
import subprocess
from typing import Any

import numpy as np

from lm.errors import ConfigError, DataError

Augment = Callable[[str, np.random.Generator], str]
Translate = Callable[[list[str]], list[str]]
Span = tuple[int, int]

HAN = '\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd'
_HAN_WORD, _LATIN, _APOSTROPHES = f'[{HAN}\u3040-\u30ff]', 'A-Za-zÀ-ÖØ-öø-ɏ', "'’‘´`ʼ＇"
_LETTER = rf'(?!{_HAN_WORD})[^\W\d_]'
_WORD = re.compile(rf"{_HAN_WORD}|{_LETTER}(?:{_LETTER}|[{_APOSTROPHES}](?={_LETTER})|[\u0300-\u036f])*")
_NUMBER_WORDS = frozenset(
    'zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen '
    'eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion first '
    'second third half twice double dozen hundreds thousands millions billions once'.split())
_NEGATIONS = frozenset(
    'no not never none nobody noone nothing nowhere nope nah neither nor cannot without unable hardly scarcely barely '
    'rarely seldom non'.split()) | {f'{verb}nt' for verb in 'do does did is are was were ca could wo would should has '
                                    'have had must need ai'.split()}
_NUMERALS, _NO = '零〇一二两三四五六七八九十百千万亿兩萬億壹贰叁肆伍陆柒捌玖拾佰仟', '不没沒无無未别別非否莫勿甭毋冇唔'
_FIXED = rf"""(?P<no>[{_NO}])|[{_NUMERALS}]+
  |```.{{0,9999}}?```|`[^`\n]+`|</?[A-Za-z|!][^<>\n]{{0,99}}>|\{{[^{{}}\n]{{0,99}}\}}|\[/?[A-Z_]{{1,20}}\]|[@\#][\w-]+
  |(?:https?://|ftp://|www\.)[!-~]+
  |[A-Za-z0-9._%+-]{{1,64}}@[A-Za-z0-9-]{{1,63}}(?:\.[A-Za-z0-9-]{{1,63}}){{1,8}}
  |(?:[A-Za-z0-9-]{{1,63}}\.){{1,8}}(?:com|org|net|edu|gov|io|cn|co|uk|html?)(?![A-Za-z])(?:/[!-~]*)?
  |(?:[A-Za-z_]{{1,40}}-?)?[+\-$€£¥]?\d[A-Za-z_\d]*(?:[.,:/'’~+-][A-Za-z_]{{0,9}}\d[A-Za-z_\d]*)*[%‰°％℃]?
  |(?<![\w:;=])[:;=8][-o']?[()\[\]DPp/|*](?!\w)
  |(?P<word>[{_LATIN}]+(?:[{_APOSTROPHES}][{_LATIN}]+)*)"""
_END = re.compile(rf'[。！？｡]+[”’」』）】》"]*|[.!?]+["\'”’)\]]*(?=\s|$)|[!?]+(?=[{HAN}])|\n')
_ABBREVIATED = re.compile(
    r'(?:^|[\s(.])(?:[A-Za-z]|Mrs?|Ms|Dr|Prof|St|Jr|Sr|vs|etc|No|Fig|cf|al|Inc|Ltd|Co)\.$|^\s*\d+\.$')
_BRACKETS = re.compile('["“”()（）「」『』《》【】]')
_OPENED = dict(zip('”)）」』》】', '“(（「『《【', strict=True))


def chain(*augments: Augment) -> Augment:
  """One after the other, all from the same generator; of none, the identity."""
  def augment(text: str, rng: np.random.Generator) -> str:
    for f in augments:
      text = f(text, rng)
    return text
  return augment


def choose(*augments: Augment) -> Augment:
  """One of them, each equally likely."""
  if not augments:
    raise ConfigError('choose: nothing to choose from; expected at least one augmentation; name one')
  return lambda text, rng: augments[rng.integers(len(augments))](text, rng)


def with_probability(p: float, augment: Augment) -> Augment:
  """`augment` with probability `p`, else the text as it is."""
  check_rate(p, 'with_probability')
  return lambda text, rng: augment(text, rng) if rng.random() < p else text


def augmented(text: str, augment: Augment, index: int, epoch: int, seed: int) -> str:
  """Example number `index` as `epoch` sees it: the same on every host and after every resume."""
  return augment(text, np.random.default_rng((seed, epoch, index)))


def optional(name: str) -> Any:
  """The module of this name, from the packages that only fine-tuning needs."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ConfigError(f"package {name}: not installed; expected it for this; pip install -e '.[finetune]'") from error


def check_rate(rate: float, name: str) -> None:
  """ConfigError unless `rate` is a share."""
  if not 0 <= rate <= 1:
    raise ConfigError(f'{name}: rate {rate}; expected 0 to 1; give the share of words to change')


def fixed(text: str, protect: Collection[str] = ()) -> list[Span]:
  """Where the text may not change: numbers, URLs, e-mails, code, control strings, negations, `protect` (any case)."""
  return [m.span() for m, _ in _fixed(text, protect)]


def keeps(before: str, after: str, protect: Collection[str] = ()) -> bool:
  """Has `after` the same protected parts, in any order and case, and as many negations, however worded?"""
  count = lambda text: Counter('' if negation else m[0].casefold() for m, negation in _fixed(text, protect))
  return count(before) == count(after)


def _fixed(text, protect):
  """(match, is it a negation?) of each protected part. Whole words are read too, and passed over."""
  for m in _pattern(frozenset(protect)).finditer(text):
    word = m['word'] and re.sub(f'[{_APOSTROPHES}]', "'", m['word'].lower()).removesuffix("'s")
    if not word:
      yield m, m['no'] is not None
    elif word in _NEGATIONS or "n't" in word:
      yield m, True
    elif word in _NUMBER_WORDS:
      yield m, False


@functools.lru_cache(maxsize=64)
def _pattern(protect):
  own = [rf'(?<![{_LATIN}\d_]){re.escape(p)}(?![{_LATIN}\d_])' if p[0].isascii() else re.escape(p)
         for p in sorted(protect, key=lambda p: (-len(p), p)) if p]
  return re.compile((f'(?i:{"|".join(own)})|' if own else '') + _FIXED, re.DOTALL | re.VERBOSE)


def sentences(text: str, protect: Collection[str] = ()) -> list[Span]:
  """Where sentences lie, without the space between them; never cut inside quotes, brackets or protected parts."""
  frozen = {i for a, b in fixed(text, protect) for i in range(a, b)}
  stops, start, seen, still_open = [], 0, 0, Counter()
  for m in _END.finditer(text):
    for c in _BRACKETS.findall(text, seen, m.end()):
      still_open[_OPENED.get(c, c)] += -1 if c in _OPENED or c == '"' and still_open[c] else 1
    seen, goes_on = m.end(), m[0].startswith('..') and text[m.end():m.end() + 2].strip().islower()
    if m[0] == '\n' or not (goes_on or m.start() in frozen or max(still_open.values(), default=0) > 0
                            or _ABBREVIATED.search(text[max(start, m.start() - 9):m.start() + 1])):
      stops.append((start, m.end()))
      start = m.end()
      still_open.clear()
  spans = [*stops, (start, len(text))]
  return [(b - len(text[a:b].lstrip()), a + len(text[a:b].rstrip())) for a, b in spans if text[a:b].strip()]


def words(text: str) -> list[Span]:
  """Runs of letters with inner apostrophes; each CJK character is a word of its own."""
  return [m.span() for m in _WORD.finditer(text)]


def some(rate: float, total: int, rng: np.random.Generator) -> int:
  """A whole number whose expectation is rate * total, one of the two nearest."""
  return int(rate * total + rng.random())


def edit(rate: float, change: Callable[[str, int, int, np.random.Generator], str], protect: Collection[str] = (),
         segment: Callable[[str], list[Span]] = words) -> Augment:
  """Changes words in place.

  Args:
    rate: share of all words to change, in expectation; fewer change where fewer can.
    change: (text, start, stop, rng) -> what stands for that word instead; the word itself where there is nothing.
    protect: words that stay.
    segment: where the words are.
  """
  check_rate(rate, 'edit')

  def augment(text: str, rng: np.random.Generator) -> str:
    spans, closed = segment(text), fixed(text, protect)
    wanted, done = some(rate, len(spans), rng), {}
    frozen = {i for a, b in closed for i in range(a, b)}
    for i in rng.permutation(len(spans)):
      if len(done) == wanted:
        break
      a, b = spans[i]
      if frozen.isdisjoint(range(a, b)):
        new = change(text, a, b, rng)
        if new != text[a:b] and not fixed(new, protect):
          done[spans[i]] = new
    return replace(text, done, protect)
  return augment


def replace(text: str, new: Mapping[Span, str], protect: Collection[str] = ()) -> str:
  """`text` with `new` in the place of these spans; the text itself where that is empty or loses what is protected."""
  out, end = '', 0
  for (a, b), part in sorted(new.items()):
    out, end = out + text[end:a] + part, b
  out += text[end:]
  return out if out.strip() and keeps(text, out, protect) else text


def back_translate(to: Translate, back: Translate, rate: float = 1.0, protect: Collection[str] = (),
                   texts: Iterable[str] = (), batch: int = 1000) -> Augment:
  """Sentences there and back: the same meaning in a translator's words.

  A sentence stays as it was where numbers, addresses, protected words or the count of negations would change, or where
  it would be half or twice as long.

  Args:
    to, back: any translators, of lists of sentences; functions of each sentence alone.
    rate: share of the sentences to translate.
    protect: words that stay.
    texts: translated now, in batches; others are translated one text at a time, when they come.
    batch: sentences a call.
  """
  check_rate(rate, 'back_translate')
  pieces = lambda text: [text[a:b] for a, b in sentences(text, protect)]

  def translated(parts: list[str]) -> dict[str, str]:
    again = [' '.join(a.split()) for a in _same_number(back, _same_number(to, parts))]
    again = [a[:1].upper() + a[1:] if p[0].isupper() else a for p, a in zip(parts, again, strict=True)]
    return {p: a for p, a in zip(parts, again, strict=True)
            if a and len(p) <= 2 * len(a) <= 4 * len(p) and keeps(p, a, protect)}
  known = list(dict.fromkeys(p for text in texts for p in pieces(text)))
  memory = dict.fromkeys(known) | {
      p: a for i in range(0, len(known), batch) for p, a in translated(known[i:i + batch]).items()}

  def augment(text: str, rng: np.random.Generator) -> str:
    spans = sentences(text, protect)
    chosen = [spans[i] for i in rng.permutation(len(spans))[:some(rate, len(spans), rng)]]
    unknown = list(dict.fromkeys(p for p in (text[a:b] for a, b in chosen) if p not in memory))
    found = translated(unknown) if unknown else {}
    return replace(text, {(a, b): memory.get(text[a:b]) or found.get(text[a:b], text[a:b]) for a, b in chosen}, protect)
  return augment


def _same_number(translate, texts):
  out = translate(texts)
  if len(out) != len(texts):
    raise DataError(f'translator: {len(out)} texts for {len(texts)}; expected one for each; mend the function')
  return out


def apertium(pair: str) -> Translate:
  """The Apertium program as a translator, offline: 'eng-spa' and 'spa-eng' are there and back.

  Raises:
    ConfigError: the program or the pair is not installed.
    DataError: (when translating) it failed.
  """
  program = shutil.which('apertium')
  if program is None:
    raise ConfigError("apertium: no such program on PATH; expected Apertium; on Debian: apt-get install "
                      'apertium-eng-spa')
  pairs = subprocess.run([program, '-l'], capture_output=True, text=True, check=False, timeout=60).stdout.split()
  if pair not in pairs:
    raise ConfigError(f'apertium: pair {pair!r} is not installed; expected one of {", ".join(pairs) or "none"}; '
                      'install its package, on Debian apertium-...')

  def translate(texts: list[str]) -> list[str]:
    if not texts:
      return []
    lines = ''.join(' '.join(text.split()) + '\n\n' for text in texts)  # a blank line ends a sentence, too
    done = subprocess.run([program, '-u', pair], input=lines, capture_output=True, encoding='utf-8', check=False,
                          timeout=600)
    if done.returncode:
      raise DataError(f'apertium {pair}: exit status {done.returncode}; expected 0; try it by hand on a text')
    return [text.strip() for text in done.stdout.removesuffix('\n\n').split('\n\n')]
  return translate


def apply(examples: Sequence[Any], augment: Augment, seed: int, copies: int = 1, split: str = 'train') -> list[Any]:
  """The examples, and after each one of `split` up to `copies` others that differ from it in their wording only.

  Copy number n is what `augmented` gives for epoch n. A copy whose text is already there, in whatever split, is left
  out. Copies say where they come from: `id` and `origin`, or without either `metadata['origin']`, are 'ORIGINAL#n',
  where ORIGINAL is the id, origin or number of the example.

  Args:
    examples: frozen dataclasses with `text` and `split`, and one of those fields at least.
    split: the split to augment; the others pass unchanged.

  Raises:
    ConfigError: `split` is not a training split, or has no example; an example without a split.
  """
  if not split.startswith('train'):
    raise ConfigError(f'split={split}: held-out examples stay as they are; expected a training split; give train')
  for index, e in enumerate(examples):
    if e.split is None:
      raise ConfigError(f'example {index}: no split; expected one before augmentation, so that no copy of a validation '
                        'text is trained on; split first')
  if split not in {e.split for e in examples}:
    raise ConfigError(f'split={split}: no example among {sorted({e.split for e in examples})}; see the field split')
  out, seen = [], {e.text for e in examples}
  for index, e in enumerate(examples):
    out.append(e)
    for n in range(copies if e.split == split else 0):
      text = augmented(e.text, augment, index, n, seed)
      if text not in seen:
        seen.add(text)
        out.append(dataclasses.replace(e, text=text, **_origin(e, index, n)))
  return out


def _origin(example, index, n):
  names = {f.name for f in dataclasses.fields(example)}
  known = [getattr(example, name, None) for name in ('id', 'origin')]
  own = next((x for x in known if x not in (None, '')), index)
  marks = dict.fromkeys(names & {'id', 'origin'}, f'{own}#{n}')
  if not marks and 'metadata' in names:
    marks = {'metadata': {**(example.metadata or {}), 'origin': f'{own}#{n}'}}
  if not marks:
    raise ConfigError(f'{type(example).__name__}: no field to mark a copy with; add id, origin or metadata')
  return marks
