"""What the ids of a tokenizer stand for: bytes, begins of words, ends of sentences, and the special ids of encoders.

Shapes: V vocabulary.
"""

from collections.abc import Mapping
import dataclasses
import json
import re
import unicodedata

import numpy as np
import sentencepiece
import tokenizers

from lm.errors import ConfigError
from lm.text.tokenizer import Tokenizer, wordpieces

# BERT's Chinese characters, and kana: scripts without spaces, in which each character is a word of its own.
_CJK = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FA1F))
_ENDS = tuple('.!?。！？；…｡\n')
_CLOSERS, _QUOTES = ')]}”’」』）》】〉\r', '"\''  # the latter close only where no space stands before them
_NAMES = {'cls': ('[CLS]', '<s>'), 'sep': ('[SEP]', '</s>'), 'mask': ('[MASK]', '<mask>'),
          'pad': ('[PAD]', '<pad>', '<|pad|>')}


@dataclasses.dataclass(frozen=True)
class Special:
  """Ids of [CLS], [SEP], [MASK] and [PAD], whatever the tokenizer calls them."""

  cls: int
  sep: int
  mask: int
  pad: int


def special_ids(tokenizer: Tokenizer) -> Special:
  """The special ids of encoders: control tokens [CLS] [SEP] [MASK] [PAD], or <s> </s> <mask> <pad>.

  Raises:
    ConfigError: the vocabulary lacks one of them.
  """
  found = {role: next((tokenizer.control[n] for n in names if n in tokenizer.control), None)
           for role, names in _NAMES.items()}
  for role in ('mask', 'cls', 'sep', 'pad'):
    if found[role] is None:
      raise ConfigError(f'data.tokenizer: vocabulary without a {role} token; expected {" or ".join(_NAMES[role])} '
                        'among its control tokens; train one with python -m scripts.train_tokenizer '
                        "--control_symbols='[CLS],[SEP],[MASK]'")
  return Special(**found)


def pieces(tokenizer: Tokenizer) -> list[bytes]:
  """The UTF-8 of every id; a leading space says that a word begins there, control ids and unused ids are empty."""
  files = tokenizer.files
  if tokenizer.kind == 'byte':
    found = {i: bytes([i]) for i in range(256)}
  elif tokenizer.kind == 'char':
    found = {i: c.encode() for i, c in enumerate(json.loads(files['char.json'])['chars'])}
  elif tokenizer.kind == 'sentencepiece':
    model = sentencepiece.SentencePieceProcessor(model_proto=files['tokenizer.model'])
    found = _metaspace({model.id_to_piece(i): i for i in range(model.vocab_size())})
  elif tokenizer.kind == 'bpe':
    found = _byte_level(json.loads(files['vocab.json']))
  elif tokenizer.kind == 'wordpiece':
    found = _continued({word: i for i, word in enumerate(wordpieces(files))}, '##')
  else:
    found = _hf(files['tokenizer.json'].decode())
  control = set(tokenizer.control.values())
  return [b'' if i in control else found.get(i, b'') for i in range(tokenizer.vocab_size)]


def word_starts(tokenizer: Tokenizer) -> np.ndarray:
  """bool[V]: a word begins with this id: after a space, and at every CJK character and punctuation mark.

  WordPiece: all but '##...'; SentencePiece: '▁...'; byte-level BPE: 'Ġ...'. What follows a control id begins a word
  too, but that no vocabulary can tell.
  """
  return np.array([_starts(piece) for piece in pieces(tokenizer)], bool)


def _starts(piece):
  if not piece:
    return False
  first = piece.decode(errors='replace')[0]
  if first == '\ufffd':
    return piece[0] >= 0xE3  # the first byte of a character from U+3000 on, whose others are in the next pieces
  return (first.isspace() or unicodedata.category(first)[0] in 'PS'
          or any(low <= ord(first) <= high for low, high in _CJK))


def sentence_ends(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """(ends_V, closers_V), bool[V]: a sentence may end with this id; a quote or bracket that still belongs to it."""
  texts = [piece.decode(errors='replace') for piece in pieces(tokenizer)]
  ends = [text.rstrip(' ').rstrip(_CLOSERS + _QUOTES).endswith(_ENDS) for text in texts]
  closers = [text.strip(' ') and not text.lstrip(' ').strip(_CLOSERS if text[0] == ' ' else _CLOSERS + _QUOTES)
             for text in texts]
  return np.array(ends, bool), np.array(closers, bool)


def _metaspace(vocab: Mapping[str, int]) -> dict[int, bytes]:
  spelled = {piece: re.fullmatch('<0x([0-9A-F]{2})>', piece) for piece in vocab}
  return {i: bytes.fromhex(spelled[piece][1]) if spelled[piece] else piece.replace('▁', ' ').encode()
          for piece, i in vocab.items()}


def _continued(vocab, prefix):
  return {i: (word.removeprefix(prefix) if word.startswith(prefix) else ' ' + word).encode()
          for word, i in vocab.items()}


def byte_letters() -> dict[str, int]:
  """The letters that GPT-2 writes bytes with: those that print are themselves, the others U+0100, U+0101, ..."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [b for b in range(256) if b not in plain]
  return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def _byte_level(vocab):
  byte = byte_letters()
  return {i: bytes(byte[c] for c in piece) if all(c in byte for c in piece) else piece.encode()
          for piece, i in vocab.items()}


def _hf(content):
  spec, vocab = json.loads(content), tokenizers.Tokenizer.from_str(content).get_vocab()
  model = spec['model']
  if '"ByteLevel"' in json.dumps([spec.get('pre_tokenizer'), spec.get('decoder')]):
    return _byte_level(vocab)
  if model.get('type') == 'WordPiece':
    return _continued(vocab, model['continuing_subword_prefix'])
  if model.get('type') == 'WordLevel':
    return {i: (' ' + word).encode() for word, i in vocab.items()}
  return _metaspace(vocab)
