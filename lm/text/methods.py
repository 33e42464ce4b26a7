"""Augmentations by name, NAME[:RATE][+NAME[:RATE]...]: what `scripts.augment --methods` and `data.augment` take."""

from collections.abc import Callable, Collection, Mapping, Sequence
import difflib
import os
from typing import NamedTuple

from lm.errors import ConfigError
from lm.text import augment, noise, synonyms

SPANISH = ('eng-spa', 'spa-eng')  # Apertium's pairs, there and back


class Method(NamedTuple):
  """make: (rate, protected words) -> the augmentation; rate: where none is given; about: what it does."""

  about: str
  rate: float
  make: Callable[[float, Collection[str]], augment.Augment]


def known(wordnet: str | os.PathLike = synonyms.DEBIAN, translate: Sequence[str] = SPANISH,
          texts: Callable[[], Sequence[str]] = list) -> dict[str, Method]:
  """All methods by name; nothing is read before one is made.

  Args:
    wordnet: folder of WordNet, for synonyms_en.
    translate: Apertium's pairs, there and back, for back_translation.
    texts: those to be translated beforehand, which takes less time.
  """
  def back_translation(rate, protect):
    return augment.back_translate(*map(augment.apertium, translate), rate, protect, texts())
  return {
      'synonyms_en': Method('English words by WordNet', 0.1,
                            lambda rate, protect: synonyms.wordnet(rate, wordnet, protect)),
      'synonyms_zh': Method('Chinese words by Cilin', 0.1, synonyms.cilin),
      'clauses': Method('clauses of a sentence change places, English and Chinese', 1.0, synonyms.reorder_clauses),
      'sentences': Method('sentences of a paragraph change places', 0.5, noise.shuffle_sentences),
      'back_translation': Method('sentences there and back by Apertium', 1.0, back_translation),
      'typos': Method('slips of the keyboard, in words of an alphabet', 0.05,
                      lambda rate, protect: noise.typos(rate, protect=protect)),
      'misread': Method('shapes taken for others, rn for m, 己 for 已', 0.05,
                        lambda rate, protect: noise.typos(rate, noise.misread, protect)),
      'homophones': Method('Chinese characters of the same sound', 0.05, noise.homophones),
      'punctuation': Method('marks dropped, doubled, of another width', 0.2, noise.punctuation),
      'case': Method('lower, UPPER, Capital', 0.1, noise.case),
  }


def parse(text: str, methods: Mapping[str, Method], where: str = '--methods') -> list[tuple[Method, float]]:
  """(method, rate) of each part of 'NAME:RATE+NAME', made of nothing yet.

  Raises:
    ConfigError: no such method, or a rate that is no share; the message begins with `where`.
  """
  found = []
  for one in text.split('+'):
    name, colon, rate = one.partition(':')
    if name not in methods:
      near = difflib.get_close_matches(name, methods, n=1)
      raise ConfigError(f'{where}={name}: unknown; ' + (
          f'did you mean {near[0]}?' if near else 'see python -m scripts.augment --list'))
    try:
      share = float(rate) if colon else methods[name].rate
    except ValueError:
      raise ConfigError(f'{where}={one}: {rate!r} is no number; expected NAME:RATE; give e.g. {name}:0.1') from None
    augment.check_rate(share, f'{where}={one}')
    found.append((methods[name], share))
  return found


def one_of(names: Sequence[str], methods: Mapping[str, Method], protect: Collection[str] = (),
           where: str = '--methods') -> augment.Augment:
  """Any one of the named augmentations, each equally likely; raises what `parse` does, or that a package is missing."""
  each = [parse(name, methods, where) for name in names]
  return augment.choose(*(augment.chain(*(method.make(rate, protect) for method, rate in parts)) for parts in each))
