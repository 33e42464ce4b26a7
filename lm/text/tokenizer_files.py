"""Which files hold a tokenizer, by the names that they have everywhere, and what those beside it say of roles."""

from collections.abc import Mapping
import json
import os
import pathlib
from typing import Any

from lm.errors import DataError

HF_CONFIG, _HF_SPECIAL, HF_ADDED = 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json'
MADE_FROM = 'made_from'  # field of HF_CONFIG: the file that tokenizer.json repeats for transformers
NAMES = ('tokenizer.model', 'tokenizer.json', HF_CONFIG, _HF_SPECIAL, HF_ADDED, 'vocab.json', 'merges.txt',
         'vocab.txt', 'char.json', 'byte.json')  # canonical
_BPE = {'vocab.bpe': ('encoder.json', 'vocab.bpe'), 'encoder.json': ('encoder.json', 'vocab.bpe'),
        'merges.txt': ('vocab.json', 'merges.txt'), 'vocab.json': ('vocab.json', 'merges.txt')}


def names_in(folder: str | os.PathLike) -> list[str]:
  """Names of the files there that hold a tokenizer, or a part of one."""
  ours = lambda name: name.endswith('.model') or name in {*NAMES, *_BPE} - {HF_CONFIG, _HF_SPECIAL, HF_ADDED}
  return sorted(filter(ours, os.listdir(folder))) if os.path.isdir(folder) else []


def collect(path: pathlib.Path) -> dict[str, bytes]:
  """{canonical name: content} of the tokenizer at `path`, a file or folder; the file that decides the kind comes first.

  Raises:
    DataError: there is none.
  """
  if path.is_dir():
    models = sorted(path.glob('*.model'))
    names = ('tokenizer.json', models[0].name if len(models) == 1 else 'tokenizer.model', 'char.json', 'byte.json',
             'vocab.json', 'encoder.json', 'vocab.txt')
    found = [path / name for name in sorted(names, key=lambda n: n != _made_from(path)) if (path / name).is_file()]
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
  beside = lambda *names: {n: path.with_name(n).read_bytes() for n in names if path.with_name(n).is_file()}
  if path.suffix == '.model':
    return {'tokenizer.model': path.read_bytes()} | ({} if _made_from(path.parent) else beside(HF_CONFIG, HF_ADDED))
  if path.suffix == '.txt':
    return {'vocab.txt': path.read_bytes()} | beside(HF_CONFIG)  # says whether case counts
  if path.name in ('char.json', 'byte.json'):
    return {path.name: path.read_bytes()}
  if path.suffix != '.json':
    raise DataError(f'{path}: unknown kind of tokenizer; expected .model, tokenizer.json, vocab.json, vocab.bpe, '
                    'vocab.txt, char.json or byte.json')
  return {'tokenizer.json': path.read_bytes()} | beside(HF_CONFIG, _HF_SPECIAL)


def settings(files: Mapping[str, bytes]) -> dict[str, Any]:
  """The fields of tokenizer_config.json."""
  return json.loads(files.get(HF_CONFIG, b'{}'))


def roles(files: Mapping[str, bytes]) -> dict[str, str]:
  """{'bos_token': text, ...} as the files beside a tokenizer name them."""
  found = {}
  for fields in (json.loads(files.get(_HF_SPECIAL, b'{}')), settings(files)):
    found |= {k: v['content'] if isinstance(v, dict) else v for k, v in fields.items()
              if k.endswith('_token') and isinstance(v, str | dict)}
  return found


def added(files: Mapping[str, bytes]) -> dict[str, int]:
  """{text: id} of tokens that the files beside a tokenizer add to it."""
  listed = {entry['content']: int(i) for i, entry in settings(files).get('added_tokens_decoder', {}).items()}
  return json.loads(files.get(HF_ADDED, b'{}')) | listed


def _made_from(folder: pathlib.Path) -> str | None:
  """The file that the folder's tokenizer.json only repeats for transformers."""
  try:
    return json.loads((folder / HF_CONFIG).read_bytes()).get(MADE_FROM)
  except (OSError, ValueError, AttributeError):
    return None
