"""The marks of chat templates as ids, and text beside them; `lm.text.chat` says what a mark is."""

import dataclasses
import functools
import re

import numpy as np

from lm.errors import ConfigError, DataError
from lm.text import vocabulary
from lm.text.tokenizer import Tokenizer

BEGIN, END = '<s>', '</s>'  # of a document, whatever the tokenizer calls them
_ENDS = (END, '<|im_end|>')
ANCHORS = ('\n', '.', 'a')


@dataclasses.dataclass(frozen=True)
class Guard:
  """The marks that a tokenizer spells as text, and how to keep them out of other text."""

  marks: tuple[str, ...]

  def neutralise(self, text: str) -> str:
    return self._change(r'(?<={})(?= *{})', ' ', text)

  def restore(self, text: str) -> str:
    return self._change(r'(?<={}) (?= *{})', '', text)

  def _change(self, pattern, by, text):
    if not self.marks:
      return text
    return re.sub('|'.join(pattern.format(re.escape(m[0]), re.escape(m[1:])) for m in self.marks), by, text)


def ids(text: str, tokenizer: Tokenizer) -> list[int] | None:
  """Ids of a mark; none for a beginning that the tokenizer does not have, None where the mark is spelled as text."""
  name = text.strip()
  if name in tokenizer.control:
    return [tokenizer.control[name]]
  if is_word(name, tokenizer):
    return text_ids(name, tokenizer, True).tolist()
  if name == BEGIN:  # as documents begin
    return tokenizer.begin
  if name not in _ENDS:
    return None
  if tokenizer.eos_id is None:
    raise ConfigError(f'data.tokenizer: no {name} and no other end token among its control tokens; expected one that '
                      f"ends a turn; train one with python -m scripts.train_tokenizer --control_symbols='{name}'")
  return [tokenizer.eos_id]


def is_word(name: str, tokenizer: Tokenizer) -> bool:
  """Is it a mark in angles or brackets that the tokenizer has as one plain word? Any text may spell that."""
  if name in tokenizer.control or not re.fullmatch(r'<.+>|\[.+\]', name):
    return False
  try:
    return len(text_ids(name, tokenizer, True)) == 1
  except DataError:  # a character that it lacks
    return False


def text_ids(text: str, tokenizer: Tokenizer, inside: bool) -> np.ndarray:
  """Ids of a text; `inside`: it goes on after other text, so a tokenizer that begins each text by a space must not."""
  if not text:
    return np.zeros(0, np.int32)
  for anchor in ANCHORS if inside and adds_space(tokenizer) else ():
    first, ids = tokenizer.encode(anchor), tokenizer.encode(anchor + text)
    if np.array_equal(ids[:len(first)], first):
      return ids[len(first):]
  return tokenizer.encode(text)


@functools.lru_cache(maxsize=64)
def adds_space(tokenizer: Tokenizer) -> bool:
  """Whether it encodes a text as if a space stood before, as SentencePiece does."""
  if tokenizer.kind not in ('sentencepiece', 'hf'):
    return False
  first = tokenizer.encode('a')[:1]
  return bool(len(first)) and vocabulary.pieces(tokenizer)[first[0]].startswith(b' ')
