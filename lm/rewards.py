"""Rewards that are rules: plain functions (records, responses) -> a number for each, on the host.

A record is what `lm.data.prompts` keeps of a prompt. `checked` stands between any such function, yours too, and
training.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
import numbers
import re

import numpy as np

from lm.data.prompts import Record
from lm.errors import ConfigError, DataError, Error

Reward = Callable[[Sequence[Record], Sequence[str]], Sequence[float]]

_CUT = 60  # characters of a value in an error
_MOST = 1e18  # of a reward: the square of f32's largest is none
_SENTENCE = re.compile(r'(?<=[.!?])\s+|\n+')
_CJK = '\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f'  # written without spaces
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+(?:['’-][^\W_{_CJK}]+)*")
# A full-width comma is a mark between clauses, never one between thousands.
_PLAIN = str.maketrans('０１２３４５６７８９－−–．，', '0123456789---.;')
_UNSIGNED = r'(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)'
_NUMBER = re.compile(rf'(?:(?<![A-Za-z0-9)])(?<![0-9)] )-)?{_UNSIGNED}')  # behind a number, '-' takes away
_MARKED = re.compile(rf'(?:^|\n)####[ ]*-?{_UNSIGNED}\s*$')


def sentiment(records: Sequence[Record], responses: Sequence[str]) -> list[float]:
  """How positive each response is, -1 to 1: the mean over its sentences of VADER's compound score; '' has 0.

  VADER (Hutto and Gilbert, ICWSM 2014) is a lexicon with rules, of English alone: Chinese words have 0. No rule here
  knows them; a reward of yours can ask a classifier that experiments.classify has trained.

  Raises:
    ConfigError: vaderSentiment is not installed.
  """
  del records
  score = _vader()
  found = [[s for s in _SENTENCE.split(text) if s.strip()] for text in responses]
  return [sum(map(score, some)) / len(some) if some else 0.0 for some in found]


@functools.cache
def _vader() -> Callable[[str], float]:
  try:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
  except ImportError as error:
    raise ConfigError(f"reward sentiment: no vaderSentiment ({error}); run pip install -e '.[rl]'") from error
  analyzer = SentimentIntensityAnalyzer()
  return lambda text: analyzer.polarity_scores(text)['compound']


def length(target: int) -> Reward:
  """A reward for n words, of Chinese characters: 1 - |n - target| / target, at least 0."""
  if target < 1:
    raise ConfigError(f'length: target={target}; expected at least 1 word')

  def reward(records, responses):
    del records
    return [max(0.0, 1 - abs(len(_WORD.findall(text)) - target) / target) for text in responses]
  return _named(reward, f'length({target})')


def arithmetic(records: Sequence[Record], responses: Sequence[str]) -> list[float]:
  """1 where the last number of a response is the last of the record's answer, a whole one; else 0.

  Digits may be full-width, thousands have commas between them ('1,234'), '25.' and '25.0' are 25. Numbers in words
  ('twenty-five', '二十五') are none.

  Raises:
    DataError: a record whose answer has no whole number.
  """
  out = []
  for record, text in zip(records, responses, strict=True):
    want = _integer(record.answer or '')
    if want is None:
      raise DataError(f'{record.origin or "record"}: answer {repr(record.answer)[:_CUT]}; expected one with a whole '
                      'number, the last of it; mend the record')
    out.append(float(_integer(text) == want))
  return out


def _integer(text: str) -> str | None:
  """The last number as sign and digits (a policy may write more of them than `int` takes); None if it is not whole."""
  found = _NUMBER.findall(text.translate(_PLAIN))
  if not found:
    return None
  whole, _, fraction = found[-1].replace(',', '').partition('.')
  digits = whole.removeprefix('-').lstrip('0')
  if fraction.strip('0'):
    return None
  return ('-' if whole.startswith('-') and digits else '') + (digits or '0')


def formatted(records: Sequence[Record], responses: Sequence[str]) -> list[float]:
  """1 where a response ends with a line '#### 25', as GSM8K's answers do, right or wrong, and has no other; else 0."""
  del records
  return [float(text.count('####') == 1 and _MARKED.search(text.translate(_PLAIN)) is not None) for text in responses]


def combine(weights: Mapping[Reward, float]) -> Reward:
  """The weighted sum of rewards, each `checked`: combine({arithmetic: 1.0, formatted: 0.1})."""
  if not weights or not all(map(math.isfinite, weights.values())):
    raise ConfigError(f'combine: weights {list(weights.values())}; expected at least one reward, and finite numbers')

  def reward(records, responses):
    parts = [weight * checked(part, records, responses).astype(float) for part, weight in weights.items()]
    return sum(parts).tolist()
  return _named(reward, f'combine({", ".join(map(_name, weights))})')


def checked(reward: Reward, records: Sequence[Record], responses: Sequence[str]) -> np.ndarray:
  """f32 [B], what `reward` says of each response; ints and bools become floats, fractions stay.

  Raises:
    DataError: the reward fails, or does not give a finite number for each response; its name, the row and what it
      gave. Errors that are meant for people already (`lm.errors`) pass.
  """
  where = f'reward {_name(reward)}'
  try:
    found = reward(records, responses)
  except Error:
    raise
  except Exception as error:
    first = (str(error).splitlines() or [''])[0][:200]
    raise DataError(f'{where}: {type(error).__name__}: {first}; expected a number for each of {len(responses)} '
                    'responses; mend the function') from error
  found = found.tolist() if hasattr(found, 'tolist') else found  # an array of any library
  if not isinstance(found, Sequence) or isinstance(found, str | bytes):
    raise DataError(f'{where}: gave {repr(found)[:_CUT]}; expected a list of {len(responses)} numbers; mend the '
                    'function')
  if len(found) != len(responses):
    raise DataError(f'{where}: gave {len(found)} numbers for {len(responses)} responses; expected one each; mend the '
                    'function')
  return np.array([_number(x, where, row, record) for row, (x, record) in enumerate(zip(found, records, strict=True))],
                  np.float32)


def _number(value, where, row, record):
  plain = value.tolist() if hasattr(value, 'tolist') else value
  shown = 'a very large int' if isinstance(plain, int) and plain.bit_length() > 1024 else repr(value)[:_CUT]
  at = f'{where}: row {row}{f" ({record.origin})" if record.origin else ""}: gave {shown}'
  if not isinstance(plain, numbers.Real):
    raise DataError(f'{at}; expected a number; mend the function')
  if not abs(plain) <= _MOST:
    raise DataError(f'{at}; expected a finite number, at most 1e18; mend the function')
  return float(plain)


def _name(reward):
  return getattr(reward, '__name__', None) or repr(reward)[:_CUT]


def _named(reward, name):
  reward.__name__ = reward.__qualname__ = name
  return reward
