"""Trains tokenizers."""

from collections.abc import Iterable, Sequence
import io
import os
import re

import sentencepiece

from lm import disk
from lm.errors import ConfigError, DataError
from lm.text.tokenizer import load, Tokenizer

_UNTRAINABLE = re.compile('[\n\u2585]')  # SentencePiece's trainer drops a line with U+2585, its mark for unknown,
_LINE_CHARS, _LINE_BYTES = 4096, 16384  # and a line that is too long


def train_sentencepiece(texts: Iterable[str], out_path: str | os.PathLike, vocab: int, model_type: str = 'unigram', *,
                        control_symbols: Sequence[str] = (), character_coverage: float = 0.9995, max_lines: int = 0
                        ) -> Tokenizer:
  """Trains a SentencePiece model that gives every text back exactly, but for U+2581, its own mark for a space.

  The same texts give the same bytes: the number of threads and the trainer's seed are fixed. Long documents are cut
  into lines and lines into pieces; nothing is dropped. `control_symbols` take the ids from 4 on and cannot be written
  in text.

  Args:
    texts: documents.
    out_path: the .model file, written in one move.
    vocab: number of ids, 256 byte pieces and the control ids included.
    model_type: 'unigram' (encodes 4x faster) or 'bpe' (trains 10x faster).
    character_coverage: fraction of the characters that get a piece; the rest are spelled in bytes.
    max_lines: train on a random sample of this many lines (0 = all); unigram needs about 20 bytes of memory per byte.

  Raises:
    ConfigError: a vocabulary that the text cannot fill, an unknown model type, or control symbols that exist.
    DataError: no text.
  """
  if model_type not in ('unigram', 'bpe'):
    raise ConfigError(f"model_type={model_type!r}; expected 'unigram' or 'bpe'")
  if 0 < max_lines <= 100:
    raise ConfigError(f'max_lines={max_lines}; expected 0 (all) or more than 100')
  for i, name in enumerate(control_symbols):
    if name in ('<unk>', '<s>', '</s>', '<pad>', '\n') or re.fullmatch('<0x[0-9A-F]{2}>', name) or (
        name in control_symbols[:i]):
      raise ConfigError(f'control_symbols: {name!r} is there already; expected others, each once; take it out')
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(texts), model_writer=model, vocab_size=vocab, model_type=model_type,
        character_coverage=character_coverage, byte_fallback=True, normalization_rule_name='identity',
        split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False, pad_id=0, eos_id=1,
        bos_id=2, unk_id=3, control_symbols=list(control_symbols), user_defined_symbols=['\n'], num_threads=2,
        max_sentence_length=_LINE_BYTES, input_sentence_size=max_lines, shuffle_input_sentence=max_lines > 0,
        minloglevel=2)
  except (RuntimeError, OSError) as error:
    if 'sentences_.empty()' in str(error):
      raise DataError('no text to train on; expected some documents; see what --validation_fraction holds out'
                      ) from error
    reason = str(error).rpartition('] ')[-1].strip() or str(error)
    raise ConfigError(f'vocab={vocab}: {reason}; change the vocabulary size or give more text') from error
  os.makedirs(os.path.dirname(os.path.abspath(out_path)), exist_ok=True)
  disk.write(out_path, model.getvalue())
  return load(out_path)


def _lines(texts):
  for text in texts:
    for line in _UNTRAINABLE.split(text):
      for start in range(0, len(line), _LINE_CHARS):
        yield line[start:start + _LINE_CHARS]
