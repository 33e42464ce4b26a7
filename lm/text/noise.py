"""The mistakes of people and machines: slips of the keyboard, misread shapes, homophones, punctuation, case, disorder.

A slip is an `Augment` of one word; `typos` puts it into a text. No mistake makes a number or a negation.
"""

from collections.abc import Callable, Collection
import functools
import itertools
import re
from typing import Any

import numpy as np

from lm.text.augment import Augment, check_rate, edit, fixed, HAN, optional, replace, sentences, some, Span, words

_ROWS = ('qwertyuiop', 'asdfghjkl', 'zxcvbnm')
_PLACES = {key: (x + 0.25 * y * (y + 1) / 2, y) for y, row in enumerate(_ROWS) for x, key in enumerate(row)}
_KEYS = {a: ''.join(b for b, (u, v) in _PLACES.items() if b != a and abs(u - x) <= 1 and abs(v - y) <= 1)
         for a, (x, y) in _PLACES.items()}
_ALPHABETIC = re.compile('[A-Za-zÀ-ÖØ-öø-ɏͰ-ӿ]')  # a cased script, whose letters can change places
_HAN = re.compile(f'[{HAN}]+')
# What a scanner takes for one another, without digits: those would make numbers.
_LATIN_SHAPES = 'rn m|cl d|vv w|li h|ii u|nn m|e c|a o|l I|i l|i j|f t|h b|u v|g q|n h|O Q|B E|C G|P F|V Y|M N'
_HAN_SHAPES = (
    '己已 土士 大太 天夫 人入 日曰 王玉 候侯 免兔 鸟乌 斤斥 拔拨 今令 传侍 清请情晴睛 推椎堆 辩辨辫瓣 戊戌戍 刺剌 治冶 '
    '特持待侍 低抵底 徒徙 历厉 折拆析 祟崇 幕墓慕暮 密蜜 荼茶 货贷 肓盲 壁璧 竟竞 炙灸 几凡 风凤 园圆 困因 住往 '
    '体休 问间 喝渴 跑抱 很狠恨 鳥烏 貨貸 競竟 辯辨 園圓 問間 請情 歷曆 體禮')
_OPPOSITES = ('买卖', '買賣', '授受')  # of one sound
_GROUPS = (*(pair.split() for pair in _LATIN_SHAPES.split('|')), *_HAN_SHAPES.split())
_SHAPES = {a: [b for other in _GROUPS if a in other for b in other if b != a] for group in _GROUPS for a in group}
GO_ON = re.compile(  # what refers to the sentence before: neither may move without the other
    r"(?:and|but|or|so|yet|then|thus|therefore|hence|however|moreover|furthermore|besides|also|still|instead|because|"
    r"meanwhile|otherwise|finally|next|another|other|both|neither|nor|too|(?:[\w'’]+,?\s+){0,4}?(?:this|that|these|those|"
    r"its?|he|she|they|his|hers?|theirs?|him|them|such))\b|但|而|所以|因此|因为|因為|于是|於是|然后|然後|接着|接著|后来|後來|"
    '最后|最後|另外|此外|同时|同時|否则|否則|其|那|这|這|它|他|她|也|还|還|就|又|再|却|卻|反|总之|總之|例如|比如|并|並|可是|不过|'
    '不過|不然', re.IGNORECASE)
_WIDE = dict(zip('，。！？；：、', ',.!?;:,', strict=True))
_NARROW = {narrow: wide for wide, narrow in _WIDE.items() if wide != '、'}


@functools.cache
def segmenter() -> Any:
  """jieba's dictionary, loaded once; nobody changes it."""
  return optional('rjieba').Jieba()


def chinese_words(text: str) -> list[Span]:
  """Words as jieba cuts them where the text is Chinese, runs of letters elsewhere.

  Raises:
    ConfigError: rjieba is missing.
  """
  cut = [(a, b) for _, a, b in segmenter().tokenize(text) if _HAN.fullmatch(text, a, b)]
  return sorted(cut + [(a, b) for a, b in words(text) if not _HAN.match(text, a)])


def typos(rate: float, slip: Augment | None = None, protect: Collection[str] = (),
          segment: Callable[[str], list[Span]] = words) -> Augment:
  """A slip in a share `rate` of the words.

  Args:
    slip: of one word; by default a neighbouring key, two letters exchanged, one left out or one typed twice, of words
      in an alphabet. `misread` is another.
    segment: `chinese_words` lets `exchange` and `omit` work on Chinese too.
  """
  slip = slip or _any_slip
  return edit(rate, lambda text, a, b, rng: slip(text[a:b], rng), protect, segment)


def _any_slip(word, rng):
  slips = (neighbour, exchange, omit, repeat)
  return next((new for i in rng.permutation(len(slips)) if (new := slips[i](word, rng)) != word), word)


def neighbour(word: str, rng: np.random.Generator) -> str:
  """The key beside the right one (QWERTY); never for the first letter."""
  return _at(word, rng, [i for i, c in enumerate(word) if i and c.lower() in _KEYS], 1, lambda c: _beside(c, rng))


def _beside(letter, rng):
  near = _KEYS[letter.lower()]
  new = near[rng.integers(len(near))]
  return new.upper() if letter.isupper() else new


def exchange(word: str, rng: np.random.Generator) -> str:
  """Two characters that stand side by side change places: not the first letter, but any in a Chinese word."""
  first = 0 if _HAN.fullmatch(word) else 1
  places = [i for i in range(first, len(word) - 1) if word[i] != word[i + 1] and _movable(word[i:i + 2])]
  return _at(word, rng, places, 2, lambda two: two[::-1])


def omit(word: str, rng: np.random.Generator) -> str:
  """One letter is missing, not the first and of four at least; or one character of three at least."""
  han = bool(_HAN.fullmatch(word))
  places = [i for i in range(1 - han, len(word)) if _movable(word[i])] if len(word) >= 4 - han else []
  return _at(word, rng, places, 1, lambda _: '')


def repeat(word: str, rng: np.random.Generator) -> str:
  """One letter, not the first, typed twice."""
  return _at(word, rng, [i for i, c in enumerate(word) if i and _ALPHABETIC.match(c)], 1, lambda c: c + c)


def misread(word: str, rng: np.random.Generator) -> str:
  """A shape taken for another, as a scanner or a hurried reader does: rn for m, 己 for 已; no digits."""
  found = [(i, shape) for i in range(len(word)) for shape in {word[i]: 0, word[i:i + 2]: 0} if shape in _SHAPES]
  if not found or _marked(word):
    return word
  i, shape = found[rng.integers(len(found))]
  others = _SHAPES[shape]
  return word[:i] + others[rng.integers(len(others))] + word[i + len(shape):]


def _at(word, rng, places, length, change):
  if not places or _marked(word):
    return word
  i = places[rng.integers(len(places))]
  return word[:i] + change(word[i:i + length]) + word[i + length:]


def _movable(letters):
  return all(_ALPHABETIC.match(c) or _HAN.match(c) for c in letters)


def _marked(word):
  """A combining mark belongs to the letter before it: such words stay."""
  return any('\u0300' <= c <= '\u036f' for c in word)


def homophones(rate: float, protect: Collection[str] = ()) -> Augment:
  """A share `rate` of the words (Chinese: characters) becomes another common character of the same sound.

  The sound is the reading in its context, without the tone, as typed; common is what the first levels of GB 2312 and
  Big5 hold, so that Simplified text stays Simplified and Traditional text Traditional.

  Raises:
    ConfigError: pypinyin is missing.
  """
  read = optional('pypinyin').lazy_pinyin
  levels, by_sound = _common()

  @functools.lru_cache(maxsize=1 << 16)
  def others(c: str, sound: str) -> list[str]:
    return [o for o in by_sound.get(sound, ()) if o != c and levels[c] <= levels[o]
            and not any(c in pair and o in pair for pair in _OPPOSITES)]

  @functools.lru_cache(maxsize=1 << 16)
  def several(c: str) -> bool:
    return len(optional('pypinyin').pinyin(c, heteronym=True, style=optional('pypinyin').Style.NORMAL)[0]) > 1

  def change(text: str, a: int, b: int, rng: np.random.Generator) -> str:
    c = text[a:b]
    if c not in levels:
      return c
    left = _HAN.search(text[max(a - 8, 0):b][::-1])[0][::-1]  # what leads up to the character, and what follows it
    whole = left + (_HAN.match(text[b:b + 8]) or [''])[0]
    sounds = read(whole)
    sound = sounds[len(left) - 1] if len(sounds) == len(whole) else read(c)[0]
    if several(c) and any(o in levels and 'gb2312' not in levels[o] for o in whole):
      return c  # the readings of words are known in simplified characters only
    found = others(c, sound)
    return found[rng.integers(len(found))] if found else c
  return edit(rate, change, protect)


@functools.cache
def _common() -> tuple[dict[str, set[str]], dict[str, list[str]]]:
  """Each common character and which of the two standards have it at their first level; those of each sound."""
  simplified = bytes(x for hi in range(0xB0, 0xD8) for lo in range(0xA1, 0xFF) for x in (hi, lo))
  traditional = bytes(x for hi in range(0xA4, 0xC7) for lo in [*range(0x40, 0x7F), *range(0xA1, 0xFF)]
                      if (hi, lo) <= (0xC6, 0x7E) for x in (hi, lo))
  levels: dict[str, set[str]] = {}
  for name, level in (('gb2312', simplified), ('big5', traditional)):
    for c in filter(_HAN.match, level.decode(name, 'ignore')):
      levels.setdefault(c, set()).add(name)
  by_sound: dict[str, list[str]] = {}
  for c in sorted(levels):
    if not fixed(c):
      by_sound.setdefault(optional('pypinyin').lazy_pinyin(c)[0], []).append(c)
  return levels, by_sound


def punctuation(rate: float, protect: Collection[str] = ()) -> Augment:
  """A share `rate` of the marks is dropped, doubled or, beside Chinese, of the other width."""
  def marks(text: str) -> list[Span]:
    return [m.span() for m in re.finditer(r'[,.!?;:，。！？；：、]', text)]

  def change(text: str, a: int, b: int, rng: np.random.Generator) -> str:
    before, mark, after = text[max(a - 1, 0):a], text[a], text[b:b + 1]
    joins = before.isalnum() and after.isalnum()
    if joins and (before.isdigit() or after.isdigit() or not (_HAN.match(before) or _HAN.match(after))):
      return mark  # '3，5' and 'e.g' are more than a mark between words
    wide = _WIDE.get(mark) or (_NARROW.get(mark) if _HAN.match(before) else None)
    options = ['', mark * 2] + [wide] * bool(wide)
    return options[rng.integers(len(options))]
  return edit(rate, change, protect, marks)


def case(rate: float, protect: Collection[str] = ()) -> Augment:
  """A share `rate` of the words in lower case, UPPER CASE or with a Capital, whichever they are not."""
  def change(text: str, a: int, b: int, rng: np.random.Generator) -> str:
    word = text[a:b]
    options = sorted({word.lower(), word.upper(), word[:1].upper() + word[1:].lower()} - {word})
    return options[rng.integers(len(options))] if options else word
  return edit(rate, change, protect)


def shuffle_sentences(rate: float, protect: Collection[str] = ()) -> Augment:
  """A share `rate` of the sentences of each paragraph change places with one another (BART, section 2.2).

  What refers to the sentence before ('However', 'It', '但是') goes with it, and an answer with its question. A last
  sentence without a stop stays last; a paragraph that mixes ways of putting space between sentences stays.
  """
  check_rate(rate, 'shuffle_sentences')

  def augment(text: str, rng: np.random.Generator) -> str:
    new = {}
    for units in _paragraphs(text, protect):
      moved = some(rate, len(units), rng)
      moved = 2 * int(rng.integers(2)) if moved == 1 else moved  # one alone cannot change places
      order = rng.permutation(len(units))[:moved]
      new |= {units[i]: text[slice(*units[j])] for i, j in zip(order, np.roll(order, 1), strict=True)}
    return replace(text, new, protect)
  return augment


def _paragraphs(text, protect):
  """Of each paragraph, the runs of sentences that may change places with one another."""
  units: list[Span] = []
  for span in [*sentences(text, protect), (len(text), len(text))]:
    between = text[units[-1][1]:span[0]] if units else ''
    if units and ('\n' in between or span[0] == len(text)):
      if text[units[-1][1] - 1].isalnum():
        units.pop()
      if len({text[b:c] for (_, b), (c, _) in itertools.pairwise(units)}) == 1:
        yield units
      units = []
    if units and (GO_ON.match(text, span[0]) or text[units[-1][1] - 1] in '?？'):
      units[-1] = units[-1][0], span[1]
    else:
      units.append(span)
