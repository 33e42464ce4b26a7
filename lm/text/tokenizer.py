"""Tokenizers of every origin behind one small value: text -> int32 ids -> text.

Kinds, by the files they come from: `tokenizer.model` (SentencePiece), `tokenizer.json` (HF), `vocab.json` and
`merges.txt` or `encoder.json` and `vocab.bpe` (GPT-2's byte-level BPE), `vocab.txt` (BERT's WordPiece), `char.json`,
`byte.json`.
Control ids (begin, end, padding, roles) come from code only: `encode` never returns one, whatever the text says.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from lm import disk
from lm.errors import DataError
from lm.text import tokenizer_files

_BREAK = re.compile(r'(?<=\S)\n{1,2}(?=\S)')
PART = 1 << 18  # characters that are encoded at once
_AROUND, _TRIES = 256, 100  # characters on each side that show whether a text may be cut there; places that are tried
_BOS = ('<|begin_of_text|>', '<s>', '[CLS]', '<|endoftext|>')
_EOS = ('<|end_of_text|>', '</s>', '[SEP]', '<|endoftext|>')
_PAD = ('<pad>', '[PAD]', '<|pad|>')


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """A tokenizer as a value.

  Attributes:
    kind: 'byte', 'char', 'sentencepiece', 'hf', 'bpe' or 'wordpiece'.
    vocab_size: ids are in [0, vocab_size).
    control: name -> id of the tokens that text can never produce.
    bos_id, eos_id, pad_id: None where the tokenizer has none; GPT-2 has bos_id == eos_id.
    files: canonical name -> content; `save` writes them, `sha256` hashes them.
    adds_bos: False where its files say that no document begins with bos.
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
  adds_bos: bool = True

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
    return self._joined([text] if self.kind in ('byte', 'char') else self._parts(text))

  def _joined(self, parts: Iterable[str]) -> np.ndarray:
    """Ids of a text that is given in parts, each but the first of which begins with a line or within a line break."""
    first, *more = parts
    begin = len(self.to_ids('\n')) if more else 0  # behind it a part does not begin anew, by a space
    return np.concatenate([np.asarray(self.to_ids(first), np.int32),
                           *(np.asarray(self.to_ids('\n' + part), np.int32)[begin:] for part in more)])

  def _parts(self, text: str) -> Iterator[str]:
    """A long text cut at line breaks, in or behind them, where the ids stay the same: memory grows with its part.

    What is around a break tells, as no usual tokenizer looks further. One may join the two of an empty line, and
    another at the end of a text only.
    """
    def fits(at):
      around = text[max(at - _AROUND, start):at], text[at:at + _AROUND]
      return np.array_equal(self.to_ids(''.join(around)), self._joined(around))
    start = 0
    while len(text) - start > PART:
      breaks = itertools.islice(_BREAK.finditer(text, start + PART), _TRIES)
      cut = next(filter(fits, (at for found in breaks for at in sorted({found.start() + 1, found.end()}))), None)
      if cut is None:
        break
      yield text[start:cut]
      start = cut
    yield text[start:]

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Text of the ids; control ids and ids beyond the vocabulary (a padded model head has them) stand for nothing."""
    ids = np.asarray(ids, np.int64).reshape(-1)
    plain = (ids >= 0) & (ids < self.vocab_size) & ~np.isin(ids, list(self.control.values()))
    return self.to_text(ids[plain].tolist())

  @property
  def begin(self) -> list[int]:
    """What begins a document: [bos], or nothing where that token ends documents, too, or begins the turns of a chat."""
    unfit = (None, self.eos_id, self.control.get('<|im_start|>'))
    return [self.bos_id] if self.adds_bos and self.bos_id not in unfit else []

  def document(self, text: str) -> np.ndarray:
    """A whole document as it stands in a shard: `begin`, ids, [eos]."""
    eos = [] if self.eos_id is None else [self.eos_id]
    return np.concatenate([np.array(self.begin, np.int32), self.encode(text), np.array(eos, np.int32)])

  def save(self, folder: str | os.PathLike) -> None:
    """Writes the files under their canonical names in place of another tokenizer's: `load(folder)` gives this one."""
    os.makedirs(folder, exist_ok=True)
    for name in set(tokenizer_files.NAMES) - self.files.keys():
      pathlib.Path(folder, name).unlink(missing_ok=True)
    for name, content in self.files.items():
      disk.write(os.path.join(folder, name), content)


def byte() -> Tokenizer:
  """The 256 bytes of UTF-8, then <|endoftext|> (both bos and eos) and <|pad|>."""
  return _byte({'byte.json': b'{"kind": "byte"}\n'})


def char(text: str | Iterable[str]) -> Tokenizer:
  """One id per distinct character of the text(s), in code point order; no control ids."""
  chars = sorted(set(itertools.chain.from_iterable(text)))
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
  files = tokenizer_files.collect(pathlib.Path(path))
  build = {'tokenizer.model': _sentencepiece, 'tokenizer.json': _hf, 'vocab.json': _bpe, 'vocab.txt': _wordpiece,
           'char.json': _char, 'byte.json': _byte}[next(iter(files))]
  try:
    return build(files)
  except Exception as error:  # the libraries raise bare Exception, RuntimeError, KeyError and more
    raise DataError(f'{path}: {type(error).__name__}: {str(error)[:200]!r}; expected a {build.__name__[1:]} '
                    'tokenizer; copy or train it again') from error


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
  control |= {name: i for name, i in tokenizer_files.added(files).items() if i >= model.vocab_size()}
  roles = tokenizer_files.roles(files)
  ids = (control.get(roles.get(f'{role}_token'), None if i < 0 else i) for role, i in (
      ('bos', model.bos_id()), ('eos', model.eos_id()), ('pad', model.pad_id())))
  return Tokenizer('sentencepiece', max([model.vocab_size(), *(i + 1 for i in control.values())]), control, *ids, files,
                   lambda text: model.encode(text, return_type='numpy'), model.decode,
                   tokenizer_files.settings(files).get('add_bos_token') is not False)


def _hf(files):
  model = tokenizers.Tokenizer.from_str(files['tokenizer.json'].decode())
  model.no_padding()
  model.no_truncation()
  roles, settings = tokenizer_files.roles(files), tokenizer_files.settings(files)
  found = _from_hf('hf', model, files, *([roles[k] for k in keys if k in roles] for keys in (
      ('bos_token', 'cls_token'), ('eos_token', 'sep_token'), ('pad_token',))))
  adds_bos = settings.get('add_bos_token')
  if adds_bos is None:  # then what tokenizer.json does itself
    adds_bos = found.bos_id in model.encode('a').ids[:1]
  return dataclasses.replace(found, adds_bos=adds_bos)


def _bpe(files):
  return _from_hf('bpe', bpe_model(files), files)


def bpe_model(files: Mapping[str, bytes]) -> tokenizers.Tokenizer:
  """GPT-2's, of vocab.json and merges.txt."""
  merges = [tuple(line.split(' ')) for line in files['merges.txt'].decode().split('\n')
            if line and not line.startswith('#version')]
  model = tokenizers.Tokenizer(tokenizers.models.BPE(json.loads(files['vocab.json']), merges))
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  names = dict.fromkeys((*_BOS, *_EOS, *_PAD, '<mask>'))
  model.add_special_tokens([name for name in names if model.token_to_id(name) is not None])
  return model


def wordpieces(files: Mapping[str, bytes]) -> list[str]:
  """The lines of a vocab.txt."""
  return files['vocab.txt'].decode().replace('\r\n', '\n').rstrip('\n').split('\n')


def _wordpiece(files):
  words = wordpieces(files)
  if '[UNK]' not in words:
    raise ValueError('no line [UNK], for words that it lacks')
  special = [w for w in words if re.fullmatch(r'\[[A-Z]+\]', w)]
  guess = not any(w != w.lower() for w in words if w not in special and w not in ('<S>', '<T>'))  # Chinese BERT's
  lowercase = tokenizer_files.settings(files).get('do_lower_case', guess)
  model = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token='[UNK]'))
  model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
  model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  model.decoder = tokenizers.decoders.WordPiece()
  model.add_special_tokens(special)
  return _from_hf('wordpiece', model, files)


def _from_hf(kind, model, files, bos=(), eos=(), pad=()):
  vocab = model.get_vocab()
  unknown, named = getattr(model.model, 'unk_token', None), {*bos, *eos, *_BOS, *_EOS}
  control = {t.content: i for i, t in model.get_added_tokens_decoder().items()
             if t.special and (t.content != unknown or t.content in named)}
  model.encode_special_tokens = True  # text that spells a special token is text
  ids = (next((control[name] for name in (*given, *names) if name in control), None)
         for given, names in ((bos, _BOS), (eos, _EOS), (pad, _PAD)))
  inside = re.compile('|'.join(f'(?<={re.escape(t[:1])})(?={re.escape(t[1:])})' for t in control) or '(?!)')
  banned = np.array(list(control.values()), np.int64)

  def to_ids(text):
    found = model.encode(text, add_special_tokens=False).ids
    if np.isin(found, banned).any():  # a vocabulary that holds the special token as a plain word: spell it in two parts
      found = [i for part in inside.split(text) for i in model.encode(part, add_special_tokens=False).ids]
    if unknown in control and control[unknown] in found:
      raise DataError(f'{text[:40]!r}: has characters that are {unknown!r} to the tokenizer, which also ends texts; '
                      'expected text that it knows; choose another tokenizer')
    return found
  return Tokenizer(kind, max(vocab.values()) + 1, control, *ids, files, to_ids,
                   lambda found: model.decode(found, skip_special_tokens=False))
