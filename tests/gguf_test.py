"""GGUF: files written by the gguf package come back exactly, damaged ones end in one line, and SmolLM2 answers."""

import functools
import importlib.util
import os
import pathlib
import random
import resource
import struct

import gguf as package
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import params
from lm.errors import CheckpointError, ConfigError, Error
from lm.models import decoder, gguf
from lm.text import tokenizer

CONFIG = decoder.Config(vocab=300, length=64, layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=64,
                        positions='rotary', rope_theta=5e5, norm='rms', norm_eps=1e-6, norm_bias=False,
                        activation='swiglu', bias=False, tied=False)
NAMES = {'blocks/attn_norm/scale': 'attn_norm.weight', 'blocks/mlp_norm/scale': 'ffn_norm.weight',
         'blocks/mlp/gate': 'ffn_gate.weight', 'blocks/mlp/up': 'ffn_up.weight', 'blocks/mlp/down': 'ffn_down.weight',
         'blocks/attn/q': 'attn_q.weight', 'blocks/attn/k': 'attn_k.weight', 'blocks/attn/v': 'attn_v.weight',
         'blocks/attn/o': 'attn_output.weight', 'embed/tokens': 'token_embd.weight', 'unembed': 'output.weight',
         'final_norm/scale': 'output_norm.weight'}
BYTES = list(tokenizer.tokenizers.pre_tokenizers.ByteLevel.alphabet())


def _params(c):
  key = jax.random.key(1)
  return params.map_with_path(lambda path, x: np.asarray(x) + len(path), params.init(decoder.specs(c), key))


def _rows(path, x):
  """One layer's parameter as llama.cpp's converter stores it: torch's Linear, q and k rows permuted per head."""
  if path.endswith(('attn/q', 'attn/k')):
    D, N, H = x.shape
    w = x.reshape(D, N * H).T
    return w.reshape(N, 2, H // 2, D).swapaxes(1, 2).reshape(N * H, D)  # convert_hf_to_gguf.py: LlamaModel.permute
  if path.endswith('attn/o'):
    return x.reshape(-1, x.shape[-1]).T
  return x.reshape(x.shape[0], -1).T if path.startswith('blocks') and x.ndim > 1 else x


def _write(path, c, p, kind=package.GGMLQuantizationType.F32, edit=lambda writer: None):
  """A small file through the official writer."""
  w = package.GGUFWriter(path, 'llama')
  w.add_block_count(c.layers)
  w.add_context_length(c.length)
  w.add_embedding_length(c.embed)
  w.add_feed_forward_length(c.mlp)
  w.add_head_count(c.heads)
  w.add_head_count_kv(c.kv_heads)
  w.add_rope_freq_base(c.rope_theta)
  w.add_layer_norm_rms_eps(c.norm_eps)
  w.add_vocab_size(c.vocab)
  w.add_rope_dimension_count(c.head_dim)
  tokens = ['<|endoftext|>', '<|im_end|>', *BYTES, 'ab', '12']
  w.add_tokenizer_model('gpt2')
  w.add_tokenizer_pre('smollm')
  w.add_token_list(tokens)
  w.add_token_types([3, 3] + [1] * (len(tokens) - 2))
  w.add_token_merges(['a b', '1 2'])
  w.add_bos_token_id(0)
  w.add_eos_token_id(1)
  edit(w)
  for name, x in params.flatten(p).items():
    layers = x if name.startswith('blocks') else [x]
    for i, layer in enumerate(layers):
      stored = NAMES[name] if layers is not x else f'blk.{i}.{NAMES[name]}'
      data = np.ascontiguousarray(_rows(name, layer))
      raw = kind if data.ndim > 1 else package.GGMLQuantizationType.F32
      w.add_tensor(stored, package.quants.quantize(data, raw), raw_dtype=raw)
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  return path


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  return _write(tmp_path_factory.mktemp('gguf') / 'small.gguf', CONFIG, _params(CONFIG))


@pytest.mark.parametrize('tied', [False, True])
def test_f32_file_comes_back_bitwise(tmp_path, tied):
  c = decoder.config_replace(CONFIG, tied=tied) if hasattr(decoder, 'config_replace') else CONFIG
  p = _params(c)
  got, q, files = gguf.load(_write(tmp_path / 'x.gguf', c, p))
  assert got == c
  assert jax.tree.structure(p) == jax.tree.structure(q)
  jax.tree.map(np.testing.assert_array_equal, p, q)
  assert set(files) == {'tokenizer.json', 'tokenizer_config.json'}
