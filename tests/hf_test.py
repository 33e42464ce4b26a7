"""HF folders: frozen logits of transformers, export and import bitwise, and every fault named in one line."""

import dataclasses
import functools
import json
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as st

from lm import params
from lm.errors import CheckpointError, ConfigError, Error
from lm.models import decoder, hf, hf_decoder, tables
from lm.text import tokenizer

GOLDEN = pathlib.Path(__file__).parent / 'golden'
GPT2 = decoder.Config(vocab=40, length=16, layers=2, embed=16, heads=4, kv_heads=4, head_dim=4, mlp=24)
LLAMA = decoder.Config(vocab=40, length=16, layers=3, embed=16, heads=4, kv_heads=2, head_dim=4, mlp=24,
                       positions='rotary', rope_theta=5e5, norm='rms', norm_eps=1e-6, norm_bias=False,
                       activation='swiglu', bias=False, tied=False)
OURS = {'gpt2': GPT2, 'gpt2-untied': dataclasses.replace(GPT2, tied=False, activation='gelu_erf'), 'llama': LLAMA,
        'llama-tied-bias': dataclasses.replace(LLAMA, tied=True, bias=True),
        'llama-multi-query': dataclasses.replace(LLAMA, kv_heads=1, head_dim=6, vocab=48)}


def _random(c):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), decoder.specs(c))


def _same(p, q):
  assert jax.tree.structure(p) == jax.tree.structure(q)
  jax.tree.map(np.testing.assert_array_equal, p, q)


@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_logits_of_transformers(name):
  io = st.load_file(GOLDEN / name / 'io.safetensors')
  c, p = hf.load(GOLDEN / name)
  p, real_BT = jax.tree.map(jnp.asarray, p), io['mask'] > 0
  positions_BT = np.maximum(io['mask'].cumsum(1) - 1, 0)
  apply = jax.jit(functools.partial(decoder.apply, p, c))
  x_BTD = apply(io['ids'], segments_BT=io['mask'], positions_BT=positions_BT)
  np.testing.assert_allclose(decoder.logits(p, c, x_BTD)[real_BT], io['logits'][real_BT], rtol=1e-4, atol=1e-4)
  cache, out = decoder.init_cache(c, 3, 9), []
  for t in [slice(0, 5), *(slice(t, t + 1) for t in range(5, 9))]:
    x_BTD, cache = apply(io['ids'][:, t], segments_BT=io['mask'][:, t], cache=cache)
    out.append(decoder.logits(p, c, x_BTD))
  np.testing.assert_allclose(np.concatenate(out, 1)[real_BT], io['logits'][real_BT], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_their_tensors_survive_import_and_export(tmp_path, name):
  hf.save(tmp_path / 'out', *hf.load(GOLDEN / name))
  theirs, again = (st.load_file(folder / 'model.safetensors') for folder in (GOLDEN / name, tmp_path / 'out'))
  assert theirs.keys() == again.keys()
  assert all(np.array_equal(theirs[key], again[key]) for key in theirs)
  assert hf.load(tmp_path / 'out')[0] == hf.load(GOLDEN / name)[0]


@pytest.mark.parametrize('shard_bytes', [1 << 30, 5_000, 1])
@pytest.mark.parametrize('name', OURS)
def test_export_and_import_are_bitwise(tmp_path, name, shard_bytes):
  c = OURS[name]
  p = _random(c)
  hf.save(tmp_path / 'out', c, p, shard_bytes=shard_bytes)
  back, q = hf.load(tmp_path / 'out')
  assert back == dataclasses.replace(c, init=back.init)
  _same(p, q)
  assert ((tmp_path / 'out' / 'model.safetensors.index.json').is_file()) == (shard_bytes < 1 << 30)
  assert [f.name for f in tmp_path.iterdir()] == ['out']


def test_every_parameter_has_a_row():
  for c in OURS.values():
    _, family = hf_decoder.family(c)
    placed = [path for row in family.rows for path in row.paths]
    assert set(params.flatten(decoder.specs(c))) <= set(placed)
    assert len(placed) == len(set(placed))


def test_fused_layouts():
  """c_attn lays q, k, v side by side; DeBERTa's in_proj has them side by side within each head."""
  D, N, H = 2, 3, 4
  q, k, v = np.arange(3 * D * N * H, dtype=np.float32).reshape(3, D, N, H)
  outside = tables.Row('w', 'D,cNH->DNH', 'q', 'k', 'v')
  inside = tables.Row('w', 'NcH,D->DNH', 'q', 'k', 'v')
  np.testing.assert_array_equal(outside.merge([q, k, v]), np.concatenate([x.reshape(D, N * H) for x in (q, k, v)], 1))
  rows = [x[:, n, h] for n in range(N) for x in (q, k, v) for h in range(H)]
  np.testing.assert_array_equal(inside.merge([q, k, v]), np.stack(rows))
  for row in (outside, inside):
    theirs = row.merge([q, k, v])
    assert theirs.shape == row.shape((D, N, H))
    np.testing.assert_array_equal(row.split(theirs, (D, N, H)), [q, k, v])


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_half_precision_is_widened(tmp_path, dtype):
  shutil.copytree(GOLDEN / 'gpt2', tmp_path / 'x')
  half = {key: x.astype(dtype) for key, x in st.load_file(tmp_path / 'x' / 'model.safetensors').items()}
  st.save_file(half, tmp_path / 'x' / 'model.safetensors')
  _, p = hf.load(tmp_path / 'x')
  np.testing.assert_array_equal(p['embed']['tokens'], half['transformer.wte.weight'].astype(np.float32))
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(p))


def test_tokenizer_goes_beside(tmp_path):
  tok = tokenizer.char('abc')
  hf.save(tmp_path / 'out', GPT2, _random(GPT2), tok)
  assert tokenizer.load(tmp_path / 'out').sha256 == tok.sha256
  with pytest.raises(ConfigError, match='258 ids; expected at most model.vocab=40'):
    hf.save(tmp_path / 'out2', GPT2, _random(GPT2), tokenizer.byte())
  c = dataclasses.replace(GPT2, vocab=320)  # padded beyond the 258 ids
  hf.save(tmp_path / 'out3', c, _random(c), tokenizer.byte())
  fields = json.loads((tmp_path / 'out3' / 'config.json').read_text())
  assert (fields['bos_token_id'], fields['eos_token_id'], fields['pad_token_id']) == (256, 256, 257)
  assert hf.load(tmp_path / 'out3')[0].vocab == 320


def test_fields_that_are_off_or_of_generation_change_nothing(tmp_path):
  shutil.copytree(GOLDEN / 'llama', tmp_path / 'x')
  fields = json.loads((tmp_path / 'x' / 'config.json').read_text())
  more = {'is_encoder_decoder': False, 'pruned_heads': {}, 'cross_attention_hidden_size': None, 'temperature': 0.7,
          'top_p': 0.9, 'unsloth_version': '1', 'something_new': False}
  (tmp_path / 'x' / 'config.json').write_text(json.dumps(fields | more))
  assert hf.load(tmp_path / 'x')[0] == hf.load(GOLDEN / 'llama')[0]
  (tmp_path / 'x' / 'config.json').write_text(json.dumps(fields | {'something_new': 0}))
  with pytest.raises(ConfigError, match='something_new=0; .* take it out if it changes nothing'):
    hf.load(tmp_path / 'x')


@pytest.mark.parametrize('files, want', [
    ({}, ()), ({'config.json': None}, ()), ({'config.json': 3}, (3,)), ({'config.json': [3, 5]}, (3, 5)),
    ({'config.json': 3, 'generation_config.json': [4, 3]}, (4, 3)),
    ({'config.json': 3, 'generation_config.json': None}, (3,)), ({'config.json': -1}, ())])
def test_ends_of_texts_are_those_that_the_folder_names(tmp_path, files, want):
  for name, ids in files.items():
    (tmp_path / name).write_text(json.dumps({'eos_token_id': ids}))
  assert hf.ends(tmp_path) == want


def test_ends_of_texts_are_written(tmp_path):
  c, p = hf.load(GOLDEN / 'gpt2')
  for i, (given, field) in enumerate((((), None), ((3,), 3), ((3, 5), [3, 5]))):
    hf.save(tmp_path / str(i), c, p, ends=given)
    assert json.loads((tmp_path / str(i) / 'config.json').read_text())['eos_token_id'] == field
    assert hf.ends(tmp_path / str(i)) == given
  (tmp_path / '0' / 'generation_config.json').write_text('{"eos_token_id": "</s>"}')
  with pytest.raises(CheckpointError, match="generation_config.json: eos_token_id='</s>'; expected a token id"):
    hf.ends(tmp_path / '0')


# Config fields


@pytest.fixture
def folder(tmp_path, request):
  name = getattr(request, 'param', 'llama')
  return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def _edit(folder, **changes):
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(('folder', 'changes'), [
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}),
    ('gpt2', {'scale_attn_weights': False}),
    ('gpt2', {'reorder_and_upcast_attn': True}),
    ('gpt2', {'add_cross_attention': True}),
    ('gpt2', {'activation_function': 'relu'}),
    ('gpt2', {'n_head': 3}),
    ('gpt2', {'layer_norm_epsilon': float('nan')}),
    ('gpt2', {'n_positions': '16'}),
    ('gpt2', {'resid_pdrop': 1.5}),
    ('gpt2', {'n_layer': None}),
    ('gpt2', {'model_type': 'gpt_neox'}),
    ('gpt2', {'architectures': ['GPT2ForSequenceClassification']}),
    ('gpt2', {'auto_map': {'AutoModel': 'evil.py'}}),
    ('gpt2', {'quantization_config': {'bits': 4}}),
    ('llama', {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}),
    ('llama', {'rope_parameters': {'rope_theta': 500.0, 'rope_type': 'yarn', 'factor': 2.0}}),
    ('llama', {'rope_parameters': {'rope_theta': 500.0, 'factor': 2.0}}),
    ('llama', {'rope_parameters': {'rope_theta': 500.0, 'partial_rotary_factor': 0.5}}),
    ('llama', {'rope_theta': 1e4}),
    ('llama', {'sliding_window': 128}),
    ('llama', {'attention_multiplier': 0.1}),
    ('llama', {'mlp_bias': False}),
    ('llama', {'mlp_bias': None}),
    ('llama', {'hidden_act': 'gelu'}),
    ('llama', {'num_key_value_heads': 3}),
    ('llama', {'num_hidden_layers': 0}),
    ('llama', {'num_hidden_layers': True}),
    ('llama', {'head_dim': 3}),
], indirect=['folder'])
def test_option_that_the_decoder_lacks_is_refused(folder, changes):
  _edit(folder, **changes)
  name = list(changes)[0]
  ours = {'num_key_value_heads': 'kv_heads', 'resid_pdrop': 'dropout.hidden'}.get(name, name)
  with pytest.raises(ConfigError, match=ours) as error:
    hf.load(folder)
  assert '\n' not in str(error.value)


def test_rope_theta_of_transformers_4(folder):
  fields = json.loads((folder / 'config.json').read_text())
  del fields['rope_parameters'], fields['head_dim']
  (folder / 'config.json').write_text(json.dumps(fields | {'rope_theta': 500, 'rope_scaling': None}))
  assert hf.load(folder)[0] == hf.load(GOLDEN / 'llama')[0]


@pytest.mark.parametrize(('folder', 'changes'), [
    ('gpt2', {'n_ctx': 16, 'n_special': 0, '_num_labels': 1, 'num_return_sequences': 1, 'no_repeat_ngram_size': 0,
              'length_penalty': 1.0, 'diversity_penalty': 0.0, 'summary_type': 'cls_index',
              'task_specific_params': {'text-generation': {}}}),
    ('llama', {'_name_or_path': 'x', 'torch_dtype': 'bfloat16', 'pretraining_tp': 1, 'rope_interleaved': False,
               'is_llama_config': True, 'transformers.js_config': {'kv_cache_dtype': 'float16'}, 'sep_token_id': 3,
               'max_sequence_length': 64, 'partial_rotary_factor': 1.0}),
], indirect=['folder'])
def test_fields_of_published_configs_that_change_nothing(folder, changes):
  _edit(folder, **changes)
  assert hf.load(folder)[0] == hf.load(GOLDEN / folder.name)[0]


def test_every_field_of_the_config_is_written_or_refused():
  """A new field of the decoder must be decided on here, or exports would silently compute something else."""
  how_not_what = {'dropout', 'init', 'dtype', 'scan_layers', 'remat'}
  needed = {'positions', 'norm', 'norm_bias', 'activation', 'parallel', 'logit_scale'}
  written = {'vocab', 'length', 'layers', 'embed', 'heads', 'kv_heads', 'head_dim', 'mlp', 'norm_eps', 'tied', 'bias',
             'rope_theta'}  # GPT-2 needs bias, and without rotary positions no theta is used
  assert all(needed <= set(family.needs(GPT2)) for family in hf_decoder.FAMILIES.values())
  assert {f.name for f in dataclasses.fields(decoder.Config)} == how_not_what | written | needed


@pytest.mark.parametrize(('c', 'changes'), [
    (GPT2, {'norm': 'rms'}), (GPT2, {'bias': False}), (GPT2, {'norm_bias': False}), (GPT2, {'kv_heads': 2}),
    (GPT2, {'head_dim': 8}), (GPT2, {'activation': 'swiglu'}), (GPT2, {'parallel': True}),
    (GPT2, {'positions': 'relative'}), (GPT2, {'logit_scale': 0.5}), (LLAMA, {'norm': 'layer'}),
    (LLAMA, {'norm_bias': True}), (LLAMA, {'activation': 'gelu_tanh'}), (LLAMA, {'parallel': True})])
def test_config_without_an_architecture_is_not_exported(tmp_path, c, changes):
  c = dataclasses.replace(c, **changes)
  with pytest.raises(ConfigError, match=f'model.{list(changes)[0]}='):
    hf.save(tmp_path / 'out', c, _random(c))
  assert not list(tmp_path.iterdir())


# Weights


def _weights(folder, change):
  path = folder / 'model.safetensors'
  tensors = st.load_file(path)
  change(tensors)
  st.save_file(tensors, path)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda w: w.pop('model.layers.1.mlp.up_proj.weight'),
     r'tensor model.layers.1.mlp.up_proj.weight is missing; expected one of shape \(24, 16\)'),
    (lambda w: w.update({'model.layers.2.mlp.up_proj.weight': np.ones((24, 16), np.float32)}),
     r'.model.layers.2.mlp.up_proj.weight. of shape \(24, 16\) has no place'),
    (lambda w: w.update({'model.norm.weight': np.ones((4, 4), np.float32)}),
     r'tensor model.norm.weight has shape \(4, 4\); expected \(16,\)'),
    (lambda w: w.update({'model.embed_tokens.weight': np.ones((39, 16), np.float32)}),
     r'\(39, 16\); expected \(40, 16\)'),
    (lambda w: w.update({'lm_head.weight': np.ones((48, 16), np.float32)}), r'\(48, 16\); expected \(40, 16\)'),
    (lambda w: w.update({'model.norm.weight': np.ones(16, np.int8)}),
     'model.norm.weight is I8; expected F32, F16, BF16'),
    (lambda w: w.update({'../../x': np.ones(1, np.float32)}), r'\.\./\.\./x. .*has no place'),
])
def test_tensors_are_accounted_for(folder, change, message):
  _weights(folder, change)
  with pytest.raises(CheckpointError, match=message) as error:
    hf.load(folder)
  assert '\n' not in str(error.value)


def test_absurd_sizes_are_refused_before_anything_is_allocated(folder):
  for change in ({'num_hidden_layers': 10**9}, {'vocab_size': 10**12}, {'intermediate_size': 10**12}):
    _edit(folder, **change)
    with pytest.raises(CheckpointError):
      hf.load(folder)
    shutil.copy(GOLDEN / 'llama' / 'config.json', folder)


def test_padded_vocabulary_keeps_its_rows(folder):
  pad = lambda x: np.concatenate([x, np.ones((8, 16), np.float32)])
  _weights(folder, lambda w: w.update({k: pad(w[k]) for k in ('lm_head.weight', 'model.embed_tokens.weight')}))
  c, p = hf.load(folder)
  assert c.vocab == p['embed']['tokens'].shape[0] == p['unembed'].shape[0] == 48


@pytest.mark.parametrize('folder', ['gpt2'], indirect=True)
def test_names_that_hold_no_parameter_are_known(folder):
  wte = st.load_file(folder / 'model.safetensors')['transformer.wte.weight']
  mask = {'transformer.h.0.attn.bias': np.ones((1, 1, 16, 16), bool), 'transformer.h.1.attn.masked_bias': np.float32(0)}
  _weights(folder, lambda w: w.update({'lm_head.weight': wte, **{k: np.asarray(v) for k, v in mask.items()}}))
  _same(hf.load(folder)[1], hf.load(GOLDEN / 'gpt2')[1])
  _weights(folder, lambda w: w.update({'lm_head.weight': wte + 1}))
  with pytest.raises(CheckpointError, match='lm_head.weight differs from transformer.wte.weight'):
    hf.load(folder)


@pytest.mark.parametrize('folder', ['gpt2'], indirect=True)
def test_bare_names(folder):
  bare = {k.removeprefix('transformer.'): v for k, v in st.load_file(folder / 'model.safetensors').items()}
  st.save_file(bare, folder / 'model.safetensors')
  _same(hf.load(folder)[1], hf.load(GOLDEN / 'gpt2')[1])


@pytest.mark.parametrize('file', ['../evil.safetensors', '/etc/x.safetensors', 'a/b.safetensors', '.x.safetensors',
                                  'x.bin', None, 3])
def test_index_names_files_of_its_own_folder(folder, file):
  (folder / 'model.safetensors').rename(folder.parent / 'evil.safetensors')
  index = {'weight_map': {'model.norm.weight': file}}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(CheckpointError, match='file name'):
    hf.load(folder)


def test_index_and_shards_agree(tmp_path):
  hf.save(tmp_path / 'x', LLAMA, _random(LLAMA), shard_bytes=5_000)
  path = tmp_path / 'x' / 'model.safetensors.index.json'
  index = json.loads(path.read_text())
  shards, home = sorted(set(index['weight_map'].values())), index['weight_map']['model.norm.weight']
  moved = index['weight_map'] | {'model.norm.weight': shards[0]}
  path.write_text(json.dumps({'weight_map': moved}))
  with pytest.raises(CheckpointError, match=f"'model.norm.weight' in {shards[0]}; expected {home}"):
    hf.load(tmp_path / 'x')
  path.write_text(json.dumps(index))
  (tmp_path / 'x' / shards[1]).unlink()
  with pytest.raises(CheckpointError, match=shards[1]):
    hf.load(tmp_path / 'x')


def test_pickles_are_never_opened(folder):
  (folder / 'model.safetensors').unlink()
  with pytest.raises(CheckpointError, match='no weights; expected model.safetensors'):
    hf.load(folder)
  (folder / 'pytorch_model.bin').write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
  with pytest.raises(CheckpointError, match='pytorch_model.bin is a pickle, which can run code'):
    hf.load(folder)


@pytest.mark.parametrize('content', [b'', b'{', b'[]', b'\xff', b'[' * 100_000])
def test_damaged_config(folder, content):
  (folder / 'config.json').write_bytes(content)
  with pytest.raises(CheckpointError, match='expected a JSON object'):
    hf.load(folder)
  with pytest.raises(CheckpointError, match='config.json'):
    hf.load(folder / 'nowhere')


def test_damaged_weights_end_in_one_line(folder):
  path = folder / 'model.safetensors'
  data, draw = path.read_bytes(), random.Random(0)
  for size in (*range(16), 100, len(data) - 1):
    path.write_bytes(data[:size])
    with pytest.raises(CheckpointError, match='model.safetensors'):
      hf.load(folder)
  header = int.from_bytes(data[:8], 'little') + 8
  refused = 0
  for _ in range(200):
    broken = bytearray(data)
    broken[draw.randrange(header)] ^= 1 << draw.randrange(8)
    path.write_bytes(broken)
    try:
      hf.load(folder)
    except Error as error:
      refused += 1
      assert '\n' not in str(error)
  assert refused > 150


def test_name_that_stands_twice_in_the_header(folder):
  entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
  header = b'{' + entry + b',' + entry + b'}'
  (folder / 'model.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + bytes(4))
  with pytest.raises(CheckpointError, match='a name stands twice'):
    hf.load(folder)


def test_flipped_bit_in_the_numbers_is_caught_by_the_sums(tmp_path):
  hf.save(tmp_path / 'x', GPT2, _random(GPT2))
  path = tmp_path / 'x' / 'model.safetensors'
  data = bytearray(path.read_bytes())
  data[-5] ^= 1
  path.write_bytes(data)
  with pytest.raises(CheckpointError, match='sha256'):
    hf.load(tmp_path / 'x')


# Saving


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
  def full(*_, **__):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(hf.st, 'save_file', full)
  with pytest.raises(CheckpointError, match='No space left'):
    hf.save(tmp_path / 'out', GPT2, _random(GPT2))
  assert not list(tmp_path.iterdir())


def test_a_folder_is_never_overwritten(tmp_path):
  (tmp_path / 'out').mkdir()
  hf.save(tmp_path / 'out', GPT2, _random(GPT2))  # empty is fine
  before = (tmp_path / 'out' / 'model.safetensors').read_bytes()
  with pytest.raises(CheckpointError, match='not empty'):
    hf.save(tmp_path / 'out', LLAMA, _random(LLAMA))
  assert (tmp_path / 'out' / 'model.safetensors').read_bytes() == before


def test_parameters_that_do_not_fit_are_not_saved(tmp_path):
  p = _random(GPT2)
  with pytest.raises(CheckpointError, match=r'parameter final_norm/scale has shape \(3,\); expected \(16,\)'):
    hf.save(tmp_path / 'out', GPT2, {**p, 'final_norm': {**p['final_norm'], 'scale': np.ones(3)}})
  with pytest.raises(CheckpointError, match=r'parameter extra has shape \(3,\); expected None'):
    hf.save(tmp_path / 'out', GPT2, {**p, 'extra': np.ones(3)})
