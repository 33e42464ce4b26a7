"""Reads llama.cpp's GGUF files of the llama architecture, quantised or not, and the byte-level BPE inside.

The `gguf` package dequantises; its reader trusts every count in the file, so the walk through the header is here, and
each count and size is held against the bytes that are left before it is believed.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Shape letters: as in `lm.models.tables`.
"""

import functools
import json
import math
import os
import tempfile
from typing import Any

from gguf import constants, quants
import numpy as np
import tokenizers

from lm import params
from lm.errors import CheckpointError, ConfigError
from lm.models import decoder, tables
from lm.models.tables import Row
from lm.text import tokenizer

_NUMBERS = {0: 'u1', 1: 'i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4', 7: '?', 10: '<u8', 11: '<i8', 12: '<f8'}
_STRING, _ARRAY = 8, 9
_CONTROL, _USER = 3, 4  # token types
_MAX_DIMS = 4
_ROWS = (
    Row('token_embd.weight', 'V,D->VD', 'embed/tokens'),
    Row('blk.{}.attn_norm.weight', 'D->D', 'blocks/attn_norm/scale'),
    *tables.linear('blk.{}.attn_q', 'NH,D->DNH', 'blocks/attn/q'),
    *tables.linear('blk.{}.attn_k', 'KH,D->DKH', 'blocks/attn/k'),
    *tables.linear('blk.{}.attn_v', 'KH,D->DKH', 'blocks/attn/v'),
    *tables.linear('blk.{}.attn_output', 'D,NH->NHD', 'blocks/attn/o'),
    Row('blk.{}.ffn_norm.weight', 'D->D', 'blocks/mlp_norm/scale'),
    *tables.linear('blk.{}.ffn_gate', 'F,D->DF', 'blocks/mlp/gate'),
    *tables.linear('blk.{}.ffn_up', 'F,D->DF', 'blocks/mlp/up'),
    *tables.linear('blk.{}.ffn_down', 'D,F->FD', 'blocks/mlp/down'),
    Row('output_norm.weight', 'D->D', 'final_norm/scale'),
    Row('output.weight', 'V,D->VD', 'unembed'),
)


def load(path: str | os.PathLike) -> tuple[decoder.Config, params.Tree, tokenizer.Tokenizer | None, tuple[int, ...]]:
  """(config, f32 NumPy parameters, tokenizer, ids that end a text besides the tokenizer's end) of a GGUF file.

  The tokenizer is None where the file holds another kind than GPT-2's or SmolLM's byte-level BPE. What it saves is
  tokenizer.json and tokenizer_config.json, which transformers reads too.

  Raises:
    ConfigError: another architecture, or an option that the decoder lacks.
    CheckpointError: not a GGUF file, damaged, or with tensors that do not fit its own config.
  """
  meta, tensors = _scan(path)
  c = _config(path, meta, tensors)
  c, p = tables.fill(c, decoder.specs, _ROWS, tensors, path)
  for name in ('q', 'k', 'q_bias', 'k_bias'):
    if name in p['blocks']['attn']:
      p['blocks']['attn'][name] = _halves(p['blocks']['attn'][name])
  tokens = meta.get('tokenizer.ggml.tokens', [])
  if len(tokens) > c.vocab:
    raise CheckpointError(f'{path}: {len(tokens)} tokens; expected at most {c.vocab}, the rows of token_embd.weight; '
                          'copy the file again')
  ends = {meta.get(f'tokenizer.ggml.{name}_token_id') for name in ('eot', 'eom')} - {None}
  return c, p, _tokenizer(path, meta, tokens), tuple(sorted(ends))


def read_tokenizer(path: str | os.PathLike) -> tokenizer.Tokenizer | None:
  """The tokenizer of `load`, without reading a weight."""
  meta, _ = _scan(path)
  return _tokenizer(path, meta, meta.get('tokenizer.ggml.tokens', []))


def _halves(x: np.ndarray) -> np.ndarray:
  """llama.cpp turns neighbours (2i, 2i+1) of a head by one angle; `nn.rotary` turns (i, i + H/2)."""
  return np.ascontiguousarray(x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape))


def _config(path, meta: dict[str, Any], tensors: dict[str, tables.Tensor]) -> decoder.Config:
  kind = meta.get('general.architecture')
  if kind != 'llama':
    raise ConfigError(f"{path}: general.architecture={kind!r}; expected 'llama'; convert another model")
  f = tables.Fields(path, {k: v for k, v in meta.items() if k.startswith('llama.')})
  D, N = f.take('llama.embedding_length', int), f.take('llama.attention.head_count', int)
  H = f.take('llama.attention.key_length', int, max(D // N, 1))
  f.fixed('llama.attention.value_length', H)
  f.fixed('llama.rope.dimension_count', H)
  f.fixed('llama.rope.scaling.type', 'none')
  f.fixed('llama.attention.causal', True)
  c = decoder.Config(
      vocab=f.take('llama.vocab_size', int, 1), length=f.take('llama.context_length', int),
      layers=f.take('llama.block_count', int), embed=D, heads=N, head_dim=H,
      kv_heads=f.take('llama.attention.head_count_kv', int, N), mlp=f.take('llama.feed_forward_length', int),
      positions='rotary', rope_theta=f.take('llama.rope.freq_base', float, 10000.0), norm='rms', norm_bias=False,
      norm_eps=f.take('llama.attention.layer_norm_rms_epsilon', float), activation='swiglu',
      bias='blk.0.attn_q.bias' in tensors, tied='output.weight' not in tensors)
  f.done()
  return c


def _tokenizer(path, meta: dict[str, Any], tokens: list[str]) -> tokenizer.Tokenizer | None:
  get = lambda name, default: meta.get(f'tokenizer.ggml.{name}', default)
  split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  if get('pre', '') == 'smollm':
    split = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Digits(individual_digits=True), split])
  if get('model', '') != 'gpt2' or get('pre', '') not in ('smollm', 'gpt-2'):
    return None
  try:
    merges = [tuple(merge.split(' ')) for merge in get('merges', [])]
    model = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    model.pre_tokenizer = split
    model.decoder = tokenizers.decoders.ByteLevel()
    for token, kind in zip(tokens, get('token_type', [1] * len(tokens)), strict=True):
      if kind in (_CONTROL, _USER):
        model.add_tokens([tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)])
    roles = {role: tokens[meta[key]] for role, key in (
        ('bos_token', 'tokenizer.ggml.bos_token_id'), ('eos_token', 'tokenizer.ggml.eos_token_id'),
        ('pad_token', 'tokenizer.ggml.padding_token_id')) if key in meta}
    if model.get_vocab_size() != len(tokens):
      raise ValueError('a token stands twice in the vocabulary')
  except Exception as error:  # the library raises bare Exception
    raise CheckpointError(f'{path}: tokenizer: {type(error).__name__}: {str(error)[:200]!r}; expected byte-level BPE; '
                          'copy the file again') from error
  info = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False, **roles}
  if get('add_bos_token', False):
    info['add_bos_token'] = True
  if 'tokenizer.chat_template' in meta:
    info['chat_template'] = meta['tokenizer.chat_template']  # carried for other programs; nothing here runs it
  with tempfile.TemporaryDirectory() as folder:
    model.save(os.path.join(folder, 'tokenizer.json'), pretty=False)
    with open(os.path.join(folder, 'tokenizer_config.json'), 'w', encoding='utf-8') as f:
      json.dump(info, f, indent=2)
    return tokenizer.load(folder)


def _scan(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, tables.Tensor]]:
  """({key: value}, {name: tensor}) of a file whose every count and size fits its length."""
  try:
    data = np.memmap(path, mode='r')
  except (OSError, ValueError) as error:
    raise CheckpointError(f'{path}: {error}; expected a GGUF file; name another') from error
  try:
    return _walk(_Cursor(data))
  except ValueError as error:  # UnicodeDecodeError is one
    raise CheckpointError(f'{path}: {str(error)[:200]}; expected a whole GGUF file; copy it again') from error


def _walk(cursor: '_Cursor') -> tuple[dict[str, Any], dict[str, tables.Tensor]]:
  if bytes(cursor.take(4)) != b'GGUF':
    raise ValueError('does not begin with GGUF')
  if (version := cursor.number('<u4')) not in (2, 3):
    raise ValueError(f'GGUF version {version}, not 2 or 3 in little-endian order')
  tensor_count, key_count = cursor.count(24), cursor.count(13)  # bytes that the smallest entry takes
  meta = {}
  for _ in range(key_count):
    key = cursor.text()
    if key in meta:
      raise ValueError(f'key {key[:80]!r} stands twice')
    meta[key] = cursor.value(cursor.number('<u4'))
  heads = {}
  for _ in range(tensor_count):
    name = cursor.text()
    if name in heads:
      raise ValueError(f'tensor {name[:80]!r} stands twice')
    heads[name] = cursor.tensor()
  align = meta.get('general.alignment', 32)
  if type(align) is not int or align < 1 or align & (align - 1):
    raise ValueError(f'alignment {align!r}, not a power of two')
  start = -(-cursor.at // align) * align
  tensors, end = {}, start
  for name, (shape, kind, offset) in sorted(heads.items(), key=lambda item: item[1][2]):
    block, size = constants.GGML_QUANT_SIZES[kind]
    nbytes = math.prod(shape) // block * size
    begin = start + offset
    if offset % align or shape[-1] % block or begin < end or begin + nbytes > len(cursor.data):
      raise ValueError(f'tensor {name[:80]!r} of shape {shape} and type {kind.name} at byte {begin} lies outside the '
                       f'{len(cursor.data)} bytes of the file or across its neighbour')
    end = begin + nbytes
    rows = cursor.data[begin:end].reshape(*shape[:-1], shape[-1] // block * size)
    tensors[name] = tables.Tensor(shape, functools.partial(_dequantize, name, rows, kind))
  return meta, tensors


def _dequantize(name, rows, kind):
  try:
    return quants.dequantize(rows, kind)
  except NotImplementedError as error:
    raise CheckpointError(f'tensor {name}: {error}; expected one that can be dequantised; use another file') from error


class _Cursor:
  """Reads on from byte `at`; every take is held against the bytes that are left (ValueError)."""

  def __init__(self, data: np.ndarray):
    self.data, self.at = data, 0

  def take(self, nbytes: int) -> np.ndarray:
    left = len(self.data) - self.at
    if nbytes > left:
      raise ValueError(f'{nbytes} bytes wanted at byte {self.at}, {left} are left')
    self.at += nbytes
    return self.data[self.at - nbytes:self.at]

  def number(self, kind: str) -> Any:
    value = np.frombuffer(self.take(np.dtype(kind).itemsize), kind)[0]
    return float(str(value)) if kind == '<f4' else value.item()  # 1e-05 stays 1e-05

  def count(self, least: int) -> int:
    """A number of things that take `least` bytes each."""
    n, left = self.number('<u8'), len(self.data) - self.at
    if n * least > left:
      raise ValueError(f'{n} entries announced at byte {self.at - 8}, {left} bytes are left')
    return n

  def text(self) -> str:
    return str(self.take(self.count(1)).tobytes(), 'utf-8')

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.text()
    if kind in _NUMBERS:
      return self.number(_NUMBERS[kind])
    if kind != _ARRAY:
      raise ValueError(f'value of type {kind} before byte {self.at}')
    inner = self.number('<u4')
    if inner == _STRING:
      return [self.text() for _ in range(self.count(8))]
    if inner not in _NUMBERS:
      raise ValueError(f'array of type {inner} before byte {self.at}')
    size = np.dtype(_NUMBERS[inner]).itemsize
    return np.frombuffer(self.take(self.count(size) * size), _NUMBERS[inner]).tolist()

  def tensor(self) -> tuple[tuple[int, ...], constants.GGMLQuantizationType, int]:
    """(shape, slowest dimension first; type; offset)."""
    if not 1 <= (dims := self.number('<u4')) <= _MAX_DIMS:
      raise ValueError(f'{dims} dimensions before byte {self.at}')
    shape = tuple(self.number('<u8') for _ in range(dims))[::-1]
    kind = constants.GGMLQuantizationType(self.number('<u4'))  # ValueError where there is no such type
    return shape, kind, self.number('<u8')
