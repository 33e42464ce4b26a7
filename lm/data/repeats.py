"""What examples have in common: the same text, nearly the same text, a first or last line that many share.

A template that many prompts share is no fault of theirs: near duplicates are compared without such lines, and where
examples have answers, the answers have to be near, too.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
import importlib

from lm.errors import ConfigError
from lm.text import scan

_HASHES, _BANDS = 120, 20  # a pair of similarity 0.8 is a candidate with probability 0.998


def edges(parts: Sequence[str]) -> Iterator[str]:
  """First and last lines of texts of several lines, if they say something."""
  for text in parts:
    lines = [line.strip() for line in text.strip().split('\n')]
    if len(lines) > 1:
      yield from (line for line in (lines[0], lines[-1]) if len(scan.tokens(line)) >= 4)


def shared_lines(parts: Sequence[Sequence[str]], share: float) -> set[str]:
  """Those edges that more than `share` of the examples of several lines have, and more than 4."""
  several = [set(edges(some)) for some in parts]
  most = max(share * sum(map(bool, several)), 4)
  return {line for line, count in Counter(line for lines in several for line in lines).items() if count > most}


def duplicates(parts: Sequence[Sequence[str]], learnt: Sequence[Sequence[str]], near: float | None,
               templates: Callable[[], set[str]], watch: Callable) -> Iterator[tuple[int, str, int]]:
  """(number, kind, number of the earlier one that it repeats).

  Args:
    parts: all texts of each example. learnt: those of them that are answers.
    near: share of 3-grams that near duplicates have in common; None: not looked for.
    templates: () -> lines that do not count; asked for only where near duplicates are.
    watch: wraps what is gone through, as a progress bar does.

  Raises:
    ConfigError: near duplicates are asked for and the library `rensa` is not installed.
  """
  first: dict[str, int] = {}
  for i, some in enumerate(parts):
    at = first.setdefault(scan.duplicate_key(*some), i)
    if at != i:
      yield i, 'duplicate', at
  if near is None:
    return
  try:
    rensa = importlib.import_module('rensa')
  except ImportError as error:
    raise ConfigError("near: rensa is not installed; expected it, or None; pip install -e '.[finetune]'") from error
  index, kept, common = rensa.RMinHashLSH(near, _HASHES, _BANDS), list(first.values()), templates()
  alike = lambda a, b: len(a & b) >= near * len(a | b)
  own = lambda i: _shingles(parts[i], common)
  answer = lambda i: _shingles(learnt[i], set())
  for k, i in enumerate(watch(kept)):
    grams = own(i)
    if not any(grams):
      continue
    sketch = rensa.RMinHash(_HASHES, 0)
    sketch.update(sorted(grams))
    candidates = (kept[j] for j in sorted(index.query(sketch)))
    like = next((j for j in candidates if alike(grams, own(j)) and alike(answer(i), answer(j))), None)
    if like is None:
      index.insert(k, sketch)
    else:
      yield i, 'near duplicate', like


def _shingles(parts, without):
  lines = (line for part in parts for line in part.split('\n') if line.strip() not in without)
  return scan.shingles(scan.fold('\n'.join(lines)))
