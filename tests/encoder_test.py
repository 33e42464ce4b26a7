"""BERT and RoBERTa: frozen outputs of transformers, identities of the forward pass, folders both ways, exact sizes."""

import dataclasses
import functools
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as st

from lm import nn, params, sharding
from lm.errors import CheckpointError, ConfigError
from lm.kernels import attention
from lm.models import blocks, encoder, heads, hf, hf_encoder
from lm.text import training

GOLDEN = pathlib.Path(__file__).parent / 'golden'
NAMES = ('bert', 'roberta', 'electra', 'electra-generator')
NONE = nn.Dropout()
SMALL = encoder.Config(vocab=96, length=64, layers=3, embed=32, heads=4, head_dim=8, mlp=64, dropout=NONE)
KINDS = {
    'bert': SMALL,
    'roberta': dataclasses.replace(SMALL, offset=2, types=1, activation='gelu_erf', norm_eps=1e-5),
    'electra': dataclasses.replace(SMALL, token_embed=16, activation='gelu_erf'),
}
apply = jax.jit(encoder.apply, static_argnums=1, static_argnames='attend')


def tree_of(c, *names):
  make = {'mlm': lambda: heads.mlm_specs(c.vocab, c.width, c.embed), 'pooler': lambda: heads.pooler_specs(c.embed),
          'nsp': lambda: heads.nsp_specs(c.embed), 'rtd': lambda: heads.rtd_specs(c.embed)}
  return encoder.specs(c) | {name: make[name]() for name in names}


def randomised(specs):
  """Random everywhere, so that no bias is 0 and no scale is 1."""
  start = params.init(specs, jax.random.key(0))
  return params.map_with_path(
      lambda path, x: x + 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(1), len(path) + x.size), x.shape),
      start)


@functools.cache
def weights(name):
  return randomised(tree_of(KINDS[name], 'mlm'))


def words(p, c, x_BTD):
  """Logits of the masked language model, [B, T, V]."""
  y_BTE = heads.mlm(p['mlm'], x_BTD, c.activation, c.norm_eps)
  return blocks.bias(jnp.einsum('BTE,VE->BTV', y_BTE, p['embed']['tokens']), p['mlm']['bias'])


def random_ids(B, T, seed=2):
  return jax.random.randint(jax.random.key(seed), (B, T), 0, SMALL.vocab)


# What transformers computes


@functools.cache
def golden(name):
  """(config, parameters, inputs and outputs, bool [B, T] of the real tokens)."""
  c, p = hf.load(GOLDEN / name)
  io = st.load_file(GOLDEN / name / 'io.safetensors')
  return c, jax.tree.map(jnp.asarray, p), io, io['mask'] > 0


def forward(p, c, io):
  return apply(p, c, io['ids'], positions_BT=io['positions'], segments_BT=io['mask'], types_BT=io['types'])


@pytest.mark.parametrize('name', NAMES)
def test_outputs_of_transformers(name):
  c, p, io, real_BT = golden(name)
  x_BTD = forward(p, c, io)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  close(x_BTD[real_BT], io['hidden'][real_BT])
  if 'mlm' in p:
    close(words(p, c, x_BTD)[real_BT], io['mlm'][real_BT])
  if 'rtd' in p:
    close(heads.rtd(p['rtd'], x_BTD, c.activation, c.norm_eps)[real_BT], io['rtd'][real_BT])
  if 'nsp' in p:  # row 1 is padded on the left: its first token is padding, whose vector means nothing
    close(heads.nsp(p['nsp'], heads.pooler(p['pooler'], x_BTD[:, 0]))[::2], io['nsp'][::2])
  assert {'mlm', 'rtd', 'nsp'} & set(io) == {'mlm', 'rtd', 'nsp'} & set(p)


@pytest.mark.slow
def test_gradients_of_transformers(tmp_path):
  c, p, io, _ = golden('bert')
  fields = json.loads((GOLDEN / 'bert' / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(fields | {'architectures': ['BertForMaskedLM']}))
  shutil.copy(GOLDEN / 'bert' / 'grads.safetensors', tmp_path / 'model.safetensors')
  _, want = hf.load(tmp_path)

  @jax.grad
  def gradient(p):
    logp_BTV = jax.nn.log_softmax(words(p, c, forward(p, c, io)))
    nll_BT = -jnp.take_along_axis(logp_BTV, io['targets'][..., None], -1)[..., 0]
    return (nll_BT * io['weights']).sum() / io['weights'].sum()

  got = gradient({key: x for key, x in p.items() if key in want})
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, want)


@pytest.mark.parametrize('name', NAMES)
def test_their_tensors_survive_import_and_export(tmp_path, name):
  hf.save(tmp_path / 'out', *hf.load(GOLDEN / name))
  theirs, again = (st.load_file(folder / 'model.safetensors') for folder in (GOLDEN / name, tmp_path / 'out'))
  assert theirs.keys() == again.keys()
  assert all(np.array_equal(theirs[key], again[key]) for key in theirs)
  before, after = (json.loads((folder / 'config.json').read_text()) for folder in (GOLDEN / name, tmp_path / 'out'))
  same = before.keys() & after.keys() - {'pad_token_id', 'bos_token_id', 'eos_token_id', 'classifier_dropout'}
  assert {key: before[key] for key in same} == {key: after[key] for key in same}


# Identities


@pytest.mark.slow
@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('left', [0, 5])
def test_padding_changes_nothing(name, left):
  c, p, ids_BT = KINDS[name], weights(name), random_ids(2, 7)
  want = apply(p, c, ids_BT)
  np.testing.assert_allclose(apply(p, c, ids_BT, segments_BT=jnp.ones_like(ids_BT)), want, atol=2e-5)
  pad = ((0, 0), (left, 3))
  got = apply(p, c, jnp.pad(ids_BT, pad, constant_values=9), segments_BT=jnp.pad(jnp.ones_like(ids_BT), pad),
              positions_BT=jnp.pad(jnp.arange(7)[None], pad))
  np.testing.assert_allclose(got[:, left:left + 7], want, atol=2e-5)
  assert np.isfinite(got).all()


@pytest.mark.parametrize('name', KINDS)
def test_packed_equals_unpacked(name):
  c, p = KINDS[name], weights(name)
  a, b = random_ids(1, 9, 3), random_ids(1, 14, 4)
  packed_BT = jnp.concatenate([a, b, jnp.zeros((1, 2), jnp.int32)], 1)
  segments_BT = jnp.array([[1] * 9 + [2] * 14 + [0] * 2])
  positions_BT = jnp.concatenate([jnp.arange(9), jnp.arange(14), jnp.zeros(2, jnp.int32)])[None]
  got = apply(p, c, packed_BT, positions_BT=positions_BT, segments_BT=segments_BT)
  np.testing.assert_allclose(got[:, :9], apply(p, c, a), atol=2e-5)
  np.testing.assert_allclose(got[:, 9:23], apply(p, c, b), atol=2e-5)


def test_attention_by_blocks_is_the_same():
  c = dataclasses.replace(SMALL, length=300)
  p, ids_BT = randomised(encoder.specs(c)), random_ids(2, 300)
  segments_BT = (jnp.arange(300)[None] < jnp.array([[300], [171]])).astype(jnp.int32)
  want, got = (apply(p, c, ids_BT, segments_BT=segments_BT, attend=f) for f in (nn.attend, attention.attend))
  np.testing.assert_allclose(got[segments_BT > 0], want[segments_BT > 0], atol=2e-5)


def test_every_token_sees_every_other():
  p, ids_BT = weights('bert'), random_ids(1, 12)
  a, b = apply(p, SMALL, ids_BT), apply(p, SMALL, ids_BT.at[0, 7].set((ids_BT[0, 7] + 1) % SMALL.vocab))
  assert (np.abs(a - b).max(-1) > 1e-4).all()


def test_types():
  p, ids_BT = weights('bert'), random_ids(2, 8)
  types_BT = jnp.array([[0] * 4 + [1] * 4] * 2)
  want = apply(p, SMALL, ids_BT)
  same = functools.partial(np.testing.assert_allclose, atol=2e-5)
  same(apply(p, SMALL, ids_BT, types_BT=jnp.zeros_like(types_BT)), want)
  assert not np.allclose(apply(p, SMALL, ids_BT, types_BT=types_BT), want, atol=1e-3)
  roberta = functools.partial(apply, weights('roberta'), KINDS['roberta'], ids_BT)
  same(roberta(types_BT=types_BT), roberta())
  bare = dataclasses.replace(SMALL, types=0)
  assert 'types' not in encoder.specs(bare)['embed']
  zero = {**p, 'embed': {**p['embed'], 'types': jnp.zeros((2, 32))}}
  same(apply(p, bare, ids_BT, types_BT=types_BT), apply(zero, SMALL, ids_BT))


def test_roberta_counts_positions_from_its_offset():
  c, p, ids_BT = KINDS['roberta'], weights('roberta'), random_ids(1, 5)
  assert p['embed']['positions'].shape == (66, 32)
  shifted = {**p, 'embed': {**p['embed'], 'positions': p['embed']['positions'][2:]}}
  np.testing.assert_allclose(apply(p, c, ids_BT), apply(shifted, dataclasses.replace(c, offset=0), ids_BT), atol=2e-5)


@pytest.mark.slow  # decoder_test has it in the default suite
def test_scan_unroll_and_remat_agree():
  ids_BT = random_ids(2, 10)

  def value_and_grad(unstack=False, **changes):
    c = dataclasses.replace(KINDS['electra'], dropout=nn.Dropout(0.1, 0.1, 0.2), **changes)

    def f(p):
      p = {**p, 'blocks': params.unstack(p['blocks'])} if unstack else p
      return (apply(p, c, ids_BT, key=jax.random.key(9)) * jnp.arange(32.0)[None, None]).sum()
    return jax.jit(jax.value_and_grad(f))(weights('electra'))
  want = value_and_grad()
  for changes in ({'remat': 'full'}, {'remat': 'dots', 'scan_layers': False}, {'unstack': True}):
    got = value_and_grad(**changes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3), got, want)


@pytest.mark.slow
def test_dropout_needs_a_key_and_follows_it():
  ids_BT = random_ids(1, 8)
  for rates in (nn.Dropout(embedding=0.1), nn.Dropout(attention=0.1), nn.Dropout(hidden=0.1)):
    c = dataclasses.replace(SMALL, dropout=rates)
    f = lambda key, c=c: apply(weights('bert'), c, ids_BT, key=key)
    np.testing.assert_allclose(f(None), apply(weights('bert'), SMALL, ids_BT), atol=2e-5)
    np.testing.assert_array_equal(f(jax.random.key(0)), f(jax.random.key(0)))
    assert not np.array_equal(f(jax.random.key(0)), f(jax.random.key(1)))
    assert not np.array_equal(f(jax.random.key(0)), f(None))
  assert encoder.Config().dropout == nn.Dropout(0.1, 0.1, 0.1, 0.1)


def test_bfloat16_activations_stay_near():
  c = dataclasses.replace(SMALL, dtype='bfloat16')
  x_BTD = apply(weights('bert'), c, random_ids(2, 9))
  assert x_BTD.dtype == jnp.bfloat16
  np.testing.assert_allclose(x_BTD.astype(jnp.float32), apply(weights('bert'), SMALL, random_ids(2, 9)), atol=0.2)


def test_the_two_forms_of_gelu_differ():
  x = jnp.linspace(-3, 3, 50)
  np.testing.assert_allclose(blocks.activate(x, 'gelu_erf'), x * (1 + jax.scipy.special.erf(x / 2**0.5)) / 2, atol=1e-6)
  inner = (2 / np.pi)**0.5 * (x + 0.044715 * x**3)
  np.testing.assert_allclose(blocks.activate(x, 'gelu_tanh'), x * (1 + jnp.tanh(inner)) / 2, atol=1e-6)
  erf = dataclasses.replace(SMALL, activation='gelu_erf')
  ids_BT = random_ids(1, 9)
  assert np.abs(apply(weights('bert'), SMALL, ids_BT) - apply(weights('bert'), erf, ids_BT)).max() > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('dtype, digits', [('float32', 1e-6), ('bfloat16', 5e-2)])
def test_gelu_with_erf_is_exact_to_its_type(dtype, digits):
  """In bfloat16 relatively, where 1 + erf of the least one would be 0; gradients too."""
  x = np.linspace(-4, 4, 65)
  cdf = np.array([math.erfc(-v / 2**0.5) / 2 for v in x])
  y, slope = jax.vmap(jax.value_and_grad(lambda v: blocks.activate(v, 'gelu_erf')))(jnp.asarray(x, dtype))
  exact = {'float32': {'atol': digits}, 'bfloat16': {'rtol': digits, 'atol': 1e-6}}[dtype]
  np.testing.assert_allclose(y.astype(jnp.float32), x * cdf, **exact)
  np.testing.assert_allclose(slope.astype(jnp.float32), cdf + x * np.exp(-x**2 / 2) / (2 * np.pi)**0.5, atol=digits)


def test_rows_longer_than_the_position_table_are_refused():
  with pytest.raises(ConfigError, match='model.length=64; expected at least 65'):
    encoder.apply(weights('bert'), SMALL, random_ids(1, 65))
  apply(weights('roberta'), KINDS['roberta'], random_ids(1, 64))


@pytest.mark.parametrize(('field', 'value'), [('layers', 0), ('vocab', -1), ('offset', -1), ('types', -2),
                                              ('token_embed', -1), ('std', -0.1), ('length', 0)])
def test_impossible_shapes_are_refused(field, value):
  with pytest.raises(ConfigError, match=f'model.{field}='):
    dataclasses.replace(SMALL, **{field: value})


@pytest.mark.slow
@pytest.mark.parametrize('axes', [{'data': 2, 'fsdp': 2, 'tensor': 2}, {'fsdp': 4, 'tensor': 2}])
def test_any_mesh_equals_one_device(axes):
  c = dataclasses.replace(KINDS['electra'], dropout=nn.Dropout(0.1, 0.1, 0.1))
  names = ('mlm', 'pooler', 'nsp', 'rtd')
  p, ids_BT = randomised(tree_of(c, *names)), random_ids(8, 12)
  segments_BT = (jnp.arange(12)[None] < jnp.arange(5, 13)[:, None]).astype(jnp.int32)

  def loss(p, ids_BT, segments_BT):
    x_BTD = encoder.apply(p, c, ids_BT, segments_BT=segments_BT, key=jax.random.key(3), attend=attention.attend)
    logp_BTV = jax.nn.log_softmax(words(p, c, x_BTD))
    nsp_B2 = heads.nsp(p['nsp'], heads.pooler(p['pooler'], x_BTD[:, 0]))
    rtd_BT = heads.rtd(p['rtd'], x_BTD, c.activation, c.norm_eps)
    return (logp_BTV[..., 3] * segments_BT).sum() + nsp_B2[:, 0].sum() + (jnp.tanh(rtd_BT) * segments_BT).sum()

  want = jax.jit(jax.value_and_grad(loss))(p, ids_BT, segments_BT)
  mesh = sharding.make_mesh(sharding.Config(**axes))
  placed = jax.device_put(p, sharding.shardings(tree_of(c, *names), mesh))
  batch = jax.device_put((ids_BT, segments_BT), sharding.batch_sharding(mesh))
  with sharding.use(mesh):
    got = jax.jit(jax.value_and_grad(loss))(placed, *batch)
  assert not placed['blocks']['attn']['q'].sharding.is_fully_replicated
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3), got, want)


@pytest.mark.slow
def test_initial_values():
  c = dataclasses.replace(SMALL, embed=128, heads=8, head_dim=16, mlp=512)
  p = params.init(tree_of(c, 'mlm', 'pooler', 'nsp', 'rtd'), jax.random.key(0))
  for path, x in params.flatten(p).items():
    if path.endswith('scale'):
      assert (x == 1).all(), path
    elif 'bias' in path:
      assert (x == 0).all(), path
    else:
      assert 0.035 < np.abs(x).max() <= 0.04 or x.size < 1000, path
      assert np.std(x) == pytest.approx(0.0176, rel=0.05) or x.size < 1000, path


# Sizes: nothing is allocated


def _count(c, *names):
  return params.count(tree_of(c, *names))


BERT_BASE = encoder.Config()
BERT_LARGE = dataclasses.replace(BERT_BASE, layers=24, embed=1024, heads=16, mlp=4096)
ROBERTA = {'vocab': 50265, 'offset': 2, 'types': 1}
CASED = {'vocab': 28996}


@pytest.mark.parametrize(('c', 'names', 'want'), [
    (BERT_BASE, ('pooler',), 109_482_240),
    (BERT_BASE, ('mlm', 'pooler', 'nsp'), 110_106_428),
    (BERT_BASE, ('mlm',), 109_514_298),
    (BERT_LARGE, ('pooler',), 335_141_888),
    (BERT_LARGE, ('mlm', 'pooler', 'nsp'), 336_226_108),
    (dataclasses.replace(BERT_BASE, **CASED), ('pooler',), 108_310_272),
    (dataclasses.replace(BERT_LARGE, **CASED), ('pooler',), 333_579_264),
    (dataclasses.replace(BERT_BASE, **ROBERTA), ('pooler',), 124_645_632),
    (dataclasses.replace(BERT_BASE, **ROBERTA), ('mlm',), 124_697_433),
    (dataclasses.replace(BERT_LARGE, **ROBERTA), ('pooler',), 355_359_744),
    (dataclasses.replace(BERT_LARGE, **ROBERTA), ('mlm',), 355_412_057),
])
def test_published_sizes(c, names, want):
  assert _count(c, *names) == want


# Heads


def test_heads_by_numpy():
  rng = np.random.default_rng(0)
  x_BTD = rng.normal(size=(2, 5, 8)).astype(np.float32)
  draw = lambda specs: jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), specs)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  gelu = lambda x: np.asarray(jax.nn.gelu(x, approximate=False))
  p = draw(heads.pooler_specs(8))
  close(heads.pooler(p, x_BTD[:, 0]), np.tanh(x_BTD[:, 0] @ p['kernel'] + p['bias']))
  p = draw(heads.rtd_specs(8, norm=True))
  y = x_BTD + x_BTD[:, :1]
  y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-7)
  y = y * p['norm']['scale'] + p['norm']['bias']
  close(heads.rtd(p, x_BTD, 'gelu_erf', 1e-7), gelu(y @ p['dense'] + p['dense_bias']) @ p['out'] + p['out_bias'])
  p = draw(heads.classify_specs(8, 3))
  close(heads.classify(p, x_BTD[:, 0]), x_BTD[:, 0] @ p['out'] + p['out_bias'])
  p = draw(heads.classify_specs(8, 3, dense=True))
  dense = x_BTD[:, 0] @ p['dense'] + p['dense_bias']
  close(heads.classify(p, x_BTD[:, 0]), np.tanh(dense) @ p['out'] + p['out_bias'])
  close(heads.classify(p, x_BTD[:, 0], 'gelu_erf'), gelu(dense) @ p['out'] + p['out_bias'])
  p = draw(heads.tokens_specs(8, 3))
  close(heads.tokens(p, x_BTD), x_BTD @ p['out'] + p['out_bias'])
  segments_BT = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
  close(heads.mean_pool(x_BTD, segments_BT), [x_BTD[0, :3].mean(0), x_BTD[1, 1:].mean(0)])
  close(heads.mean_pool(x_BTD), x_BTD.mean(1))


def test_dropout_of_classifiers():
  x_BD = jnp.ones((4, 8))
  for dense in (False, True):
    p = params.init(heads.classify_specs(8, 3, dense=dense), jax.random.key(0))
    f = lambda key, p=p: heads.classify(p, x_BD, 'tanh', 0.5, key)
    assert not np.allclose(f(jax.random.key(1)), f(jax.random.key(2)))
    np.testing.assert_array_equal(f(None), heads.classify(p, x_BD))
  p = params.init(heads.tokens_specs(8, 3), jax.random.key(0))
  assert not np.allclose(heads.tokens(p, x_BD[None], 0.5, jax.random.key(1)), heads.tokens(p, x_BD[None]))


# Folders


OURS = {
    'bert': (KINDS['bert'], ('mlm', 'pooler', 'nsp'), 'BertForPreTraining'),
    'bert-mlm': (dataclasses.replace(SMALL, dropout=nn.Dropout(0.2, 0.1, 0.2, 0.3), std=0.1), ('mlm',),
                 'BertForMaskedLM'),
    'bert-bare': (dataclasses.replace(SMALL, types=1), (), 'BertModel'),
    'bert-pooler': (SMALL, ('pooler',), 'BertModel'),
    'roberta': (KINDS['roberta'], ('mlm',), 'RobertaForMaskedLM'),
    'roberta-pooler': (dataclasses.replace(KINDS['roberta'], offset=4), ('pooler',), 'RobertaModel'),
    'electra': (KINDS['electra'], ('rtd',), 'ElectraForPreTraining'),
    'electra-wide': (dataclasses.replace(SMALL, activation='gelu_erf'), ('rtd',), 'ElectraForPreTraining'),
    'electra-generator': (KINDS['electra'], ('mlm',), 'ElectraForMaskedLM'),
}


def _random(c, names):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), tree_of(c, *names))


def _same(p, q):
  assert jax.tree.structure(p) == jax.tree.structure(q)
  jax.tree.map(np.testing.assert_array_equal, p, q)


@pytest.mark.parametrize('shard_bytes', [1 << 30, 5_000])
@pytest.mark.parametrize('name', OURS)
def test_export_and_import_are_bitwise(tmp_path, name, shard_bytes):
  c, names, architecture = OURS[name]
  p = _random(c, names)
  hf.save(tmp_path / 'out', c, p, shard_bytes=shard_bytes)
  back, q = hf.load(tmp_path / 'out')
  assert back == c
  _same(p, q)
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['architectures'] == [architecture]


def test_every_parameter_has_a_row():
  for c, names, _ in OURS.values():
    _, family = hf_encoder.family(c, names)
    placed = [path for row in family.rows for path in row.paths]
    assert set(params.flatten(tree_of(c, *names))) <= set(placed)
    assert len(placed) == len(set(placed))


def test_a_roberta_whose_padding_id_stands_in_texts_has_no_export(tmp_path):
  """transformers would give that id no position: here '</s>' is 1 and separates, where [SEP] does not."""
  for symbols in (['<mask>'], ['[CLS]', '[SEP]', '[MASK]']):
    text = training.train_sentencepiece(['a b c d e f'] * 20, tmp_path / 'x.model', 272, 'bpe', control_symbols=symbols)
    c = dataclasses.replace(KINDS['roberta'], vocab=272)
    p = _random(c, ('mlm',))
    if len(symbols) > 1:
      hf.save(tmp_path / 'out', c, p, text)
    else:
      with pytest.raises(ConfigError, match='id 1 of the tokenizer stands in texts'):
        hf.save(tmp_path / 'out', c, p, text)


def test_every_field_of_the_config_is_written_or_refused():
  """A new field must be decided on here, or exports would silently compute something else."""
  how_not_what = {'dropout', 'std', 'dtype', 'scan_layers', 'remat'}
  needed = {'types', 'head_dim', 'offset'}
  written = {'vocab', 'length', 'layers', 'embed', 'heads', 'mlp', 'norm_eps', 'token_embed', 'activation'}
  assert all(needed <= set(family.needs(SMALL)) for family in hf_encoder.FAMILIES.values())
  assert all({'token_embed', 'activation'} & set(family.needs(SMALL)) for family in hf_encoder.FAMILIES.values())
  assert {f.name for f in dataclasses.fields(encoder.Config)} == how_not_what | needed | written


@pytest.mark.parametrize(('name', 'changes', 'field'), [
    ('bert', {'types': 0}, 'types'), ('bert', {'head_dim': 4}, 'head_dim'), ('bert', {'offset': 1}, 'offset'),
    ('roberta', {'activation': 'gelu_tanh'}, 'activation'), ('roberta', {'token_embed': 8}, 'token_embed'),
    ('electra', {'activation': 'gelu_tanh'}, 'activation'), ('electra', {'offset': 2}, 'token_embed')])
def test_config_without_an_architecture_is_not_exported(tmp_path, name, changes, field):
  c = dataclasses.replace(KINDS[name], **changes)
  with pytest.raises(ConfigError, match=f'model.{field}='):
    hf.save(tmp_path / 'out', c, _random(c, ()))
  assert not list(tmp_path.iterdir())


def test_heads_that_an_architecture_lacks_are_not_exported(tmp_path):
  c = KINDS['electra']
  with pytest.raises(CheckpointError, match='parameter pooler/bias has shape .*; expected None'):
    hf.save(tmp_path / 'out', c, _random(c, ('rtd', 'pooler')))


@pytest.fixture
def folder(tmp_path, request):
  return pathlib.Path(shutil.copytree(GOLDEN / request.param, tmp_path / request.param))


def _edit(folder, **changes):
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(('folder', 'changes'), [
    ('bert', {'is_decoder': True}), ('bert', {'add_cross_attention': True}), ('bert', {'tie_word_embeddings': False}),
    ('bert', {'position_embedding_type': 'relative_key'}), ('bert', {'hidden_act': 'relu'}),
    ('bert', {'num_attention_heads': 3}), ('bert', {'architectures': ['BertForSequenceClassification']}),
    ('bert', {'architectures': ['BertModel', 'BertForMaskedLM']}), ('bert', {'architectures': 'BertModel'}),
    ('bert', {'model_type': 'albert'}), ('bert', {'embedding_size': 8}), ('bert', {'num_hidden_layers': 0}),
    ('roberta', {'hidden_act': 'gelu_new'}), ('roberta', {'pad_token_id': 16}), ('roberta', {'pad_token_id': 0}),
    ('electra', {'hidden_act': 'gelu_new'}), ('electra', {'layer_norm_eps': float('nan')}),
], indirect=['folder'])
def test_option_that_the_encoder_lacks_is_refused(folder, changes):
  _edit(folder, **changes)
  name = 'max_position_embeddings' if changes == {'pad_token_id': 16} else list(changes)[0]
  with pytest.raises(ConfigError, match=name) as error:
    hf.load(folder)
  assert '\n' not in str(error.value)


def _weights(folder, change):
  path = folder / 'model.safetensors'
  tensors = st.load_file(path)
  st.save_file(change(tensors) or tensors, path)


def _drop(pattern):
  return lambda w: {key: x for key, x in w.items() if pattern not in key}


@pytest.mark.parametrize('folder', ['bert'], indirect=True)
def test_heads_are_those_of_the_architecture_and_of_the_weights(folder):
  _edit(folder, architectures=['BertForMaskedLM'])
  assert {'mlm', 'pooler', 'nsp'} <= set(hf.load(folder)[1])
  _weights(folder, _drop('cls.seq_relationship'))
  assert {'mlm', 'pooler'} == set(hf.load(folder)[1]) - {'embed', 'blocks'}
  _weights(folder, _drop('cls.predictions.bias'))
  with pytest.raises(CheckpointError, match=r'tensor cls.predictions.bias is missing'):
    hf.load(folder)
  _weights(folder, _drop('cls.'))
  with pytest.raises(CheckpointError, match=r'tensor cls.predictions.transform.dense.weight is missing'):
    hf.load(folder)
  for architectures in (['BertModel'], None):
    _edit(folder, architectures=architectures)
    assert set(hf.load(folder)[1]) == {'embed', 'blocks', 'pooler'}


@pytest.mark.parametrize('folder', ['bert'], indirect=True)
def test_names_of_old_and_bare_folders(folder):
  want = hf.load(folder)[1]
  old = lambda key: key.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')
  _weights(folder, lambda w: {old(key): x for key, x in w.items()})
  _same(hf.load(folder)[1], want)
  _weights(folder, lambda w: w.update({'bert.embeddings.LayerNorm.weight': np.ones(16, np.float32)}))
  with pytest.raises(CheckpointError, match='are one; expected it once'):
    hf.load(folder)
  _weights(folder, lambda w: {key.removeprefix('bert.'): x for key, x in w.items() if 'cls.' not in key
                              and key != 'bert.embeddings.LayerNorm.weight'})
  _edit(folder, architectures=['BertModel'])
  _same(hf.load(folder)[1], {key: want[key] for key in ('embed', 'blocks', 'pooler')})


@pytest.mark.parametrize(('folder', 'copy', 'original'), [
    ('bert', 'cls.predictions.decoder', 'cls.predictions.bias'), ('roberta', 'lm_head.decoder', 'lm_head.bias')],
    indirect=['folder'])
def test_copies_of_tied_weights(folder, copy, original):
  tokens = next(x for key, x in st.load_file(folder / 'model.safetensors').items() if 'word_embeddings' in key)
  _weights(folder, lambda w: w.update({f'{copy}.weight': tokens, f'{copy}.bias': w[original],
                                       f'{folder.name}.embeddings.position_ids': np.arange(16)[None]}))
  _same(hf.load(folder)[1], hf.load(GOLDEN / folder.name)[1])
  _weights(folder, lambda w: w.update({f'{copy}.bias': w[original] + 1}))
  with pytest.raises(CheckpointError, match=f'{copy}.bias differs from {original}'):
    hf.load(folder)


@pytest.mark.parametrize('folder', ['roberta'], indirect=True)
def test_padded_vocabulary_keeps_its_rows(folder):
  grow = lambda x: np.concatenate([x, np.ones((8, *x.shape[1:]), np.float32)])
  _weights(folder, lambda w: w.update({key: grow(w[key]) for key in ('lm_head.bias',
                                                                     'roberta.embeddings.word_embeddings.weight')}))
  c, p = hf.load(folder)
  assert c.vocab == p['embed']['tokens'].shape[0] == p['mlm']['bias'].shape[0] == 48


@pytest.mark.parametrize(('folder', 'changes'), [
    ('bert', {'gradient_checkpointing': False, 'position_embedding_type': 'absolute', 'directionality': 'bidi',
              'pooler_fc_size': 768, 'pooler_type': 'first_token_transform', 'torch_dtype': 'float32'}),
    ('electra', {'summary_last_dropout': 0.3, 'classifier_dropout': 0.1})], indirect=['folder'])
def test_fields_of_published_configs_that_change_nothing(folder, changes):
  _edit(folder, **changes)
  assert hf.load(folder)[0] == hf.load(GOLDEN / folder.name)[0]
