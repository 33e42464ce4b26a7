"""Tokenizers of every origin behind one small value: text -> int32 ids -> text.

Kinds, by the files they come from: `tokenizer.model` (SentencePiece), `tokenizer.json` (HF), `vocab.json` and
`merges.txt` or `encoder.json` and `vocab.bpe` (GPT-2's byte-level BPE), `vocab.txt` (BERT's WordPiece), `char.json`,
`byte.json`.
Control ids (begin, end, padding, roles) come from code only: `encode` never returns one, whatever the text says.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import re
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from lm.errors import ConfigError, DataError

_BPE = {'vocab.bpe': ('encoder.json', 'vocab.bpe'), 'encoder.json': ('encoder.json', 'vocab.bpe'),
        'merges.txt': ('vocab.json', 'merges.txt'), 'vocab.json': ('vocab.json', 'merges.txt')}
_HF_NAMES = ('tokenizer_config.json', 'special_tokens_map.json')  # beside tokenizer.json: which token plays which role
_BOS = ('<|begin_of_text|>', '<s>', '[CLS]', '<|endoftext|>')
_EOS = ('<|end_of_text|>', '</s>', '[SEP]', '<|endoftext|>')
_PAD = ('<pad>', '[PAD]', '<|pad|>')
_UNTRAINABLE = re.compile('[\n\u2585]')  # SentencePiece's trainer drops a line with U+2585, its mark for unknown,
_LINE_CHARS, _LINE_BYTES = 4096, 16384  # and a line that is too long


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """A tokenizer as a value.

  Attributes:
    kind: 'byte', 'char', 'sentencepiece', 'hf', 'bpe' or 'wordpiece'.
    vocab_size: ids are in [0, vocab_size).
    control: name -> id of the tokens that text can never produce.
    bos_id, eos_id, pad_id: None where the tokenizer has none; GPT-2 has bos_id == eos_id.
    files: canonical name -> content; `save` writes them, `sha256` hashes them.
  """

  kind: str
  vocab_size: int
  control: Mapping[str, int]
  bos_id: int | None
  eos_id: int | None
  pad_id: int | None
  files: Mapping[str, bytes]
  to_ids: Callable[[str], Any]
  to_text: Callable[[list[int]], str]

  @functools.cached_property
  def sha256(self) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(self.files.items()):
      digest.update(f'{name}\0{len(content)}\0'.encode() + content)
    return digest.hexdigest()

  def encode(self, text: str) -> np.ndarray:
    """int32 ids, none of them a control id.

    Raises:
      DataError: a lone surrogate, or (char) a character that the vocabulary lacks.
    """
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise DataError(f'character {error.start}: lone surrogate U+{ord(text[error.start]):04X}; expected Unicode text; '
                      'remove it from the text') from None
    return np.asarray(self.to_ids(text), np.int32)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Text of the ids; control ids and ids beyond the vocabulary (a padded model head has them) stand for nothing."""
    ids = np.asarray(ids, np.int64).reshape(-1)
    plain = (ids >= 0) & (ids < self.vocab_size) & ~np.isin(ids, list(self.control.values()))
    return self.to_text(ids[plain].tolist())

  def document(self, text: str) -> np.ndarray:
    """A whole document as it stands in a shard: [bos, where distinct from eos] ids [eos]."""
    bos = [self.bos_id] if self.bos_id is not None and self.bos_id != self.eos_id else []
    eos = [] if self.eos_id is None else [self.eos_id]
    return np.concatenate([np.array(bos, np.int32), self.encode(text), np.array(eos, np.int32)])

  def save(self, folder: str | os.PathLike) -> None:
    """Writes the files under their canonical names, so that `load(folder)` gives this tokenizer."""
    os.makedirs(folder, exist_ok=True)
    for name, content in self.files.items():
      write_atomically(os.path.join(folder, name), content)


def write_atomically(path: str, content: bytes) -> None:
  with open(f'{path}.tmp{os.getpid()}', 'wb') as f:
    f.write(content)
    f.flush()
    os.fsync(f.fileno())
  os.replace(f.name, path)


def byte() -> Tokenizer:
  """The 256 bytes of UTF-8, then <|endoftext|> (both bos and eos) and <|pad|>."""
  return _byte({'byte.json': b'{"kind": "byte"}\n'})


def char(text: str | Iterable[str]) -> Tokenizer:
  """One id per distinct character of the text(s), in code point order; no control ids."""
  chars = sorted(set(text) if isinstance(text, str) else set().union(*map(set, text)))
  if not chars:
    raise DataError('char tokenizer: the text is empty; expected at least one character; give it the training text')
  return _char({'char.json': (json.dumps({'kind': 'char', 'chars': ''.join(chars)}) + '\n').encode()})


def load(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer at `path`: one of its files, or a directory that holds them; 'byte' needs no file.

  Raises:
    DataError: nothing there, or a damaged file.
  """
  if str(path) == 'byte':
    return byte()
  files = _collect(pathlib.Path(path))
  build = {'tokenizer.model': _sentencepiece, 'tokenizer.json': _hf, 'vocab.json': _bpe, 'vocab.txt': _wordpiece,
           'char.json': _char, 'byte.json': _byte}[next(iter(files))]
  try:
    return build(files)
  except Exception as error:  # the libraries raise bare Exception, RuntimeError, KeyError and more
    raise DataError(f'{path}: {type(error).__name__}: {str(error)[:200]!r}; expected a {build.__name__[1:]} '
                    'tokenizer; copy or train it again') from error


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
    ConfigError: a vocabulary that the text cannot fill, or an unknown model type.
  """
  if model_type not in ('unigram', 'bpe'):
    raise ConfigError(f"model_type={model_type!r}; expected 'unigram' or 'bpe'")
  if 0 < max_lines <= 100:
    raise ConfigError(f'max_lines={max_lines}; expected 0 (all) or more than 100')
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
    reason = str(error).rpartition('] ')[-1].strip() or str(error)
    raise ConfigError(f'vocab={vocab}: {reason}; change the vocabulary size or give more text') from error
  os.makedirs(os.path.dirname(os.path.abspath(out_path)), exist_ok=True)
  write_atomically(os.fspath(out_path), model.getvalue())
  return load(out_path)


def _lines(texts):
  for text in texts:
    for line in _UNTRAINABLE.split(text):
      for start in range(0, len(line), _LINE_CHARS):
        yield line[start:start + _LINE_CHARS]


def _collect(path: pathlib.Path) -> dict[str, bytes]:
  """{canonical name: content}, the file that decides the kind first."""
  if path.is_dir():
    models = sorted(path.glob('*.model'))
    names = ('tokenizer.json', models[0].name if len(models) == 1 else 'tokenizer.model', 'char.json', 'byte.json',
             'vocab.json', 'encoder.json', 'vocab.txt')
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
      raise DataError(f'{path}: no tokenizer inside; expected one of {", ".join(names)}')
    path = found[0]
  if not path.is_file():
    raise DataError(f"{path}: no such file; expected a tokenizer file, a directory holding one, 'byte' or 'char'")
  if path.name in _BPE:
    vocab, merges = (path.with_name(name) for name in _BPE[path.name])
    for file in (vocab, merges):
      if not file.is_file():
        raise DataError(f'{file}: no such file; byte-level BPE needs {vocab.name} beside {merges.name}')
    return {'vocab.json': vocab.read_bytes(), 'merges.txt': merges.read_bytes()}
  if path.suffix == '.model':
    return {'tokenizer.model': path.read_bytes()}
  if path.suffix == '.txt':
    config = path.with_name(_HF_NAMES[0])  # says whether case counts
    return {'vocab.txt': path.read_bytes()} | ({config.name: config.read_bytes()} if config.is_file() else {})
  if path.name in ('char.json', 'byte.json'):
    return {path.name: path.read_bytes()}
  if path.suffix != '.json':
    raise DataError(f'{path}: unknown kind of tokenizer; expected .model, tokenizer.json, vocab.json, vocab.bpe, '
                    'vocab.txt, char.json or byte.json')
  beside = {name: path.with_name(name).read_bytes() for name in _HF_NAMES if path.with_name(name).is_file()}
  return {'tokenizer.json': path.read_bytes()} | beside


def _byte(files):
  control = {'<|endoftext|>': 256, '<|pad|>': 257}
  return Tokenizer('byte', 258, control, 256, 256, 257, files, lambda text: np.frombuffer(text.encode(), np.uint8),
                   lambda ids: bytes(ids).decode(errors='replace'))


def _char(files):
  chars = json.loads(files['char.json'])['chars']
  codes = np.frombuffer(chars.encode('utf-32-le'), '<u4')
  if np.any(codes[1:] <= codes[:-1]):
    raise ValueError('characters are not in code point order')

  def to_ids(text):
    points = np.frombuffer(text.encode('utf-32-le'), '<u4')
    ids = np.minimum(np.searchsorted(codes, points), len(codes) - 1)
    if np.any(bad := codes[ids] != points):
      at = int(np.argmax(bad))
      raise DataError(f'character {at}: U+{points[at]:04X} is not among the {len(codes)} characters of the tokenizer; '
                      'build the char tokenizer from this corpus too, or use byte')
    return ids
  return Tokenizer('char', len(chars), {}, None, None, None, files, to_ids,
                   lambda ids: ''.join(chars[i] for i in ids))


def _sentencepiece(files):
  model = sentencepiece.SentencePieceProcessor(model_proto=files['tokenizer.model'])
  control = {model.id_to_piece(i): i for i in range(model.vocab_size()) if model.is_control(i)}
  bos, eos, pad = (None if i < 0 else i for i in (model.bos_id(), model.eos_id(), model.pad_id()))
  return Tokenizer('sentencepiece', model.vocab_size(), control, bos, eos, pad, files,
                   lambda text: model.encode(text, return_type='numpy'), model.decode)


def _hf(files):
  model = tokenizers.Tokenizer.from_str(files['tokenizer.json'].decode())
  model.no_padding()
  model.no_truncation()
  roles = {}
  for name in reversed(_HF_NAMES):
    roles |= {k: v['content'] if isinstance(v, dict) else v for k, v in json.loads(files.get(name, b'{}')).items()
              if k.endswith('_token') and isinstance(v, str | dict)}
  return _from_hf('hf', model, files, *([roles[k] for k in keys if k in roles] for keys in (
      ('bos_token', 'cls_token'), ('eos_token', 'sep_token'), ('pad_token',))))


def _bpe(files):
  merges = [tuple(line.split(' ')) for line in files['merges.txt'].decode().split('\n')
            if line and not line.startswith('#version')]
  model = tokenizers.Tokenizer(tokenizers.models.BPE(json.loads(files['vocab.json']), merges))
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  names = dict.fromkeys((*_BOS, *_EOS, *_PAD, '<mask>'))
  model.add_special_tokens([name for name in names if model.token_to_id(name) is not None])
  return _from_hf('bpe', model, files)


def _wordpiece(files):
  words = files['vocab.txt'].decode().rstrip('\n').split('\n')
  special = [w for w in words if re.fullmatch(r'\[[A-Z]+\]', w)]
  guess = not any(w != w.lower() for w in words if w not in special and w not in ('<S>', '<T>'))  # Chinese BERT's
  lowercase = json.loads(files.get(_HF_NAMES[0], b'{}')).get('do_lower_case', guess)
  model = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token='[UNK]'))
  model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
  model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  model.decoder = tokenizers.decoders.WordPiece()
  model.add_special_tokens(special)
  return _from_hf('wordpiece', model, files)


def _from_hf(kind, model, files, bos=(), eos=(), pad=()):
  vocab = model.get_vocab()
  unknown = getattr(model.model, 'unk_token', None)
  control = {t.content: i for i, t in model.get_added_tokens_decoder().items() if t.special and t.content != unknown}
  model.encode_special_tokens = True  # text that spells a special token is text
  ids = (next((control[name] for name in (*given, *names) if name in control), None)
         for given, names in ((bos, _BOS), (eos, _EOS), (pad, _PAD)))
  inside = re.compile('|'.join(f'(?<={re.escape(t[:1])})(?={re.escape(t[1:])})' for t in control) or '(?!)')
  banned = np.array(list(control.values()), np.int64)

  def to_ids(text):
    found = model.encode(text, add_special_tokens=False).ids
    if np.isin(found, banned).any():  # a vocabulary that holds the special token as a plain word: spell it in two parts
      found = [i for part in inside.split(text) for i in model.encode(part, add_special_tokens=False).ids]
    return found
  return Tokenizer(kind, max(vocab.values()) + 1, control, *ids, files, to_ids,
                   lambda found: model.decode(found, skip_special_tokens=False))
