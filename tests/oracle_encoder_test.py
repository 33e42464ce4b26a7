"""BERT, RoBERTa and ELECTRA against transformers on random weights: outputs, gradients, and folders both ways."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import classification, params
from lm.models import blocks, deberta, electra, encoder, heads, hf

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.oracle

V, T = 67, 24
SIZE = {'vocab_size': V, 'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 48,
        'max_position_embeddings': T}
ROBERTA = SIZE | {'max_position_embeddings': T + 2, 'type_vocab_size': 1, 'layer_norm_eps': 1e-5}
MODELS = {
    'bert-pretraining': ('Bert', 'ForPreTraining', SIZE),
    'bert-mlm-tanh': ('Bert', 'ForMaskedLM', SIZE | {'hidden_act': 'gelu_new', 'layer_norm_eps': 1e-3}),
    'bert-bare': ('Bert', 'Model', SIZE | {'type_vocab_size': 3}),
    'roberta': ('Roberta', 'ForMaskedLM', ROBERTA),
    'roberta-bare': ('Roberta', 'Model', ROBERTA | {'pad_token_id': 4, 'max_position_embeddings': T + 5}),
    'electra': ('Electra', 'ForPreTraining', SIZE | {'embedding_size': 24}),
    'electra-wide': ('Electra', 'ForPreTraining', SIZE | {'embedding_size': 32}),
    'electra-generator': ('Electra', 'ForMaskedLM', SIZE | {'embedding_size': 48, 'hidden_size': 16}),
    'electra-bare': ('Electra', 'Model', SIZE | {'embedding_size': 24}),
}
_C = encoder.Config(vocab=V, length=T, layers=2, embed=32, heads=4, head_dim=8, mlp=48, activation='gelu_erf')
OURS = {  # config, heads, architecture
    'bert': (dataclasses.replace(_C, activation='gelu_tanh', norm_eps=1e-3), ('mlm', 'pooler', 'nsp'),
             'BertForPreTraining'),
    'bert-mlm': (_C, ('mlm',), 'BertForMaskedLM'),
    'bert-pooler': (_C, ('pooler',), 'BertModel'),
    'roberta': (dataclasses.replace(_C, offset=2, types=1), ('mlm',), 'RobertaForMaskedLM'),
    'roberta-pooler': (dataclasses.replace(_C, offset=3, types=1), ('pooler',), 'RobertaModel'),
    'electra': (dataclasses.replace(_C, token_embed=16), ('rtd',), 'ElectraForPreTraining'),
    'electra-wide': (_C, ('rtd',), 'ElectraForPreTraining'),
    'electra-generator': (dataclasses.replace(_C, token_embed=48), ('mlm',), 'ElectraForMaskedLM'),
}


def _theirs(kind, head, fields):
  """A model whose every parameter is random: biases and norms, too."""
  torch.manual_seed(0)
  model = getattr(transformers, f'{kind}{head}')(getattr(transformers, f'{kind}Config')(**fields)).eval()
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.3 * torch.randn_like(p))
  return model


def _batch(model, B, T, side=None):
  """ids, mask, types, positions [B, T] as NumPy; rows of different lengths, padded on `side`."""
  rng, c = np.random.default_rng(0), model.config
  lengths = np.array([T, 1, T // 2, T - 2])[:B] if side else np.full(B, T)
  mask_BT = np.arange(T)[None] < lengths[:, None]
  mask_BT = mask_BT[:, ::-1].copy() if side == 'left' else mask_BT
  ids_BT = np.where(mask_BT, rng.integers(c.pad_token_id + 1, V, size=(B, T)), c.pad_token_id).astype(np.int32)
  types_BT = rng.integers(c.type_vocab_size, size=(B, T)).astype(np.int32)
  return ids_BT, mask_BT.astype(np.int32), types_BT, np.maximum(mask_BT.cumsum(1) - 1, 0).astype(np.int32)


def _run_theirs(model, ids_BT, mask_BT, types_BT, positions_BT):
  """Outputs by our names; RoBERTa counts its positions itself."""
  as_torch = lambda x: torch.from_numpy(np.asarray(x)).long()
  inputs = {'input_ids': as_torch(ids_BT), 'attention_mask': as_torch(mask_BT), 'token_type_ids': as_torch(types_BT)}
  if model.config.model_type != 'roberta':
    inputs['position_ids'] = as_torch(positions_BT)
  out, name = model(**inputs, output_hidden_states=True), type(model).__name__
  outputs = {'hidden': out.hidden_states[-1]}
  if name == 'ElectraForPreTraining':
    outputs['rtd'] = out.logits
  elif name.endswith('ForMaskedLM'):
    outputs['mlm'] = out.logits
  elif name == 'BertForPreTraining':
    outputs |= {'mlm': out.prediction_logits, 'nsp': out.seq_relationship_logits}
  elif name != 'ElectraModel':
    outputs['pooled'] = out.pooler_output
  return outputs


def _run_ours(p, c, ids_BT, mask_BT, types_BT, positions_BT):
  x_BTD = encoder.apply(p, c, ids_BT, segments_BT=mask_BT, types_BT=types_BT, positions_BT=positions_BT)
  outputs = {'hidden': x_BTD}
  if 'mlm' in p:
    y_BTE = heads.mlm(p['mlm'], x_BTD, c.activation, c.norm_eps)
    outputs['mlm'] = blocks.bias(jnp.einsum('BTE,VE->BTV', y_BTE, p['embed']['tokens']), p['mlm']['bias'])
  if 'pooler' in p:
    outputs['pooled'] = heads.pooler(p['pooler'], x_BTD[:, 0])
  if 'nsp' in p:
    outputs['nsp'] = heads.nsp(p['nsp'], outputs['pooled'])
  if 'rtd' in p:
    outputs['rtd'] = heads.rtd(p['rtd'], x_BTD, c.activation, c.norm_eps)
  return outputs


_jitted = jax.jit(_run_ours, static_argnums=1)


def _compare(model, p, c, batch):
  """Real tokens' outputs to 1e-4; vectors of a row where its first token is real."""
  real_BT = batch[1] > 0
  with torch.no_grad():
    theirs = _run_theirs(model, *batch)
  ours = _jitted(p, c, *batch)
  assert theirs.keys() <= ours.keys()
  for name, want in theirs.items():
    real = real_BT[:, 0] if name in ('pooled', 'nsp') else real_BT
    np.testing.assert_allclose(ours[name][real], want.numpy()[real], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.fixture(scope='module', params=MODELS)
def pair(request, tmp_path_factory):
  """(their model, our config, our parameters as JAX arrays)."""
  model = _theirs(*MODELS[request.param])
  folder = tmp_path_factory.mktemp(request.param)
  model.save_pretrained(folder)
  c, p = hf.load(folder)
  return model, c, jax.tree.map(jnp.asarray, p)


def test_every_number_is_taken(pair):
  model, _, p = pair
  assert params.count(p) == sum(x.numel() for x in model.parameters())


@pytest.mark.parametrize('length', [1, 7, T])
def test_forward(pair, length):
  model, c, p = pair
  _compare(model, p, c, _batch(model, 3, length))


@pytest.mark.parametrize('side', ['left', 'right'])
def test_padded_batch(pair, side):
  model, c, p = pair
  _compare(model, p, c, _batch(model, 4, 13, side))


def test_default_positions_and_types(pair):
  model, c, p = pair
  ids_BT, mask_BT, types_BT, positions_BT = _batch(model, 2, 9)
  with torch.no_grad():
    want = _run_theirs(model, ids_BT, mask_BT, np.zeros_like(types_BT), positions_BT)['hidden']
  np.testing.assert_allclose(encoder.apply(p, c, ids_BT), want.numpy(), rtol=1e-4, atol=1e-4)


def test_gradients_of_the_masked_language_model_and_of_detection(pair, tmp_path):
  model, c, p = pair
  batch = _batch(model, 4, 13, 'right')
  rng = np.random.default_rng(1)
  targets_BT, weights_BT = rng.integers(V, size=(4, 13)), batch[1] * (rng.random((4, 13)) < 0.4)
  head = next((head for head in ('mlm', 'rtd') if head in p), None)
  if head is None:
    pytest.skip('an encoder without a head has no loss')

  def loss(p):
    logits = _run_ours(p, c, *batch)[head]
    if head == 'rtd':
      signs_BT = 2.0 * (targets_BT % 2) - 1
      nll_BT = jax.nn.softplus(-signs_BT * logits)
    else:
      nll_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets_BT[..., None], -1)[..., 0]
    return (nll_BT * weights_BT).sum() / weights_BT.sum()

  logits, weights = _run_theirs(model, *batch)[head], torch.from_numpy(weights_BT).float()
  if head == 'rtd':
    nll = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.from_numpy(targets_BT % 2).float(), reduction='none')
  else:
    nll = -logits.log_softmax(-1).gather(-1, torch.from_numpy(targets_BT)[..., None])[..., 0]
  total = (nll * weights).sum() / weights.sum()
  model.zero_grad()
  total.backward()
  value, got = jax.jit(jax.value_and_grad(loss))(p)
  np.testing.assert_allclose(value, total.item(), rtol=1e-5)
  grads = {name: (torch.zeros_like(x) if x.grad is None else x.grad).numpy() for name, x in model.named_parameters()}
  model.save_pretrained(tmp_path)
  hf.st.save_file(grads, tmp_path / 'model.safetensors')
  _, want = hf.load(tmp_path)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, want)


def _random(specs):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: 0.3 * rng.normal(size=s.shape).astype(np.float32), specs)


@pytest.mark.parametrize('shard_bytes', [4 << 30, 10_000])
@pytest.mark.parametrize('name', OURS)
def test_export(tmp_path, name, shard_bytes):
  c, found, architecture = OURS[name]
  make = {'mlm': lambda: heads.mlm_specs(V, c.width, c.embed), 'pooler': lambda: heads.pooler_specs(c.embed),
          'nsp': lambda: heads.nsp_specs(c.embed), 'rtd': lambda: heads.rtd_specs(c.embed)}
  p = _random(encoder.specs(c) | {head: make[head]() for head in found})
  hf.save(tmp_path / 'out', c, p, shard_bytes=shard_bytes)
  model, report = getattr(transformers, architecture).from_pretrained(tmp_path / 'out', output_loading_info=True)
  assert not any(report[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  model.config.pad_token_id = c.offset - 1 if c.offset else 0  # a folder without a tokenizer names none
  _compare(model.eval(), jax.tree.map(jnp.asarray, p), c, _batch(model, 3, 11, 'right'))
  back, q = hf.load(tmp_path / 'out')
  assert back == c
  jax.tree.map(np.testing.assert_array_equal, p, q)


@pytest.mark.parametrize('name', MODELS)
def test_their_folder_survives_import_and_export(tmp_path, name):
  model = _theirs(*MODELS[name])
  model.save_pretrained(tmp_path / 'a')
  hf.save(tmp_path / 'b', *hf.load(tmp_path / 'a'))
  again = type(model).from_pretrained(tmp_path / 'b')
  theirs = model.state_dict()
  assert theirs.keys() == again.state_dict().keys()
  assert all(torch.equal(x, again.state_dict()[key]) for key, x in theirs.items())


def test_electras_networks_are_their_models(tmp_path):
  """Both networks of one tied tree, each in a folder of its own, give what the torch classes give."""
  c = electra.Config(dataclasses.replace(_C, embed=16, heads=2, token_embed=24, mlp=20),
                     dataclasses.replace(_C, token_embed=24))
  p = _random(electra.specs(c))
  for ours, cc, theirs in ((electra.generator(p), c.generator, 'ElectraForMaskedLM'),
                           (electra.discriminator(p), c.discriminator, 'ElectraForPreTraining')):
    hf.save(tmp_path / theirs, cc, ours)
    model = getattr(transformers, theirs).from_pretrained(tmp_path / theirs).eval()
    model.config.pad_token_id = 0
    _compare(model, jax.tree.map(jnp.asarray, ours), cc, _batch(model, 3, 11, 'right'))


def test_names_of_the_published_bert(tmp_path):
  """LayerNorm.gamma and beta, the tied matrix and position_ids among the weights, more heads than the class has."""
  model = _theirs('Bert', 'ForPreTraining', SIZE)
  model.save_pretrained(tmp_path)
  flat = hf.st.load_file(tmp_path / 'model.safetensors')
  flat |= {'cls.predictions.decoder.weight': flat['bert.embeddings.word_embeddings.weight'],
           'bert.embeddings.position_ids': np.arange(T)[None]}
  old = lambda name: name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')
  hf.st.save_file({old(name): x for name, x in flat.items()}, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
  fields = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(fields | {'architectures': ['BertForMaskedLM']}))
  c, p = hf.load(tmp_path)
  _compare(model, jax.tree.map(jnp.asarray, p), c, _batch(model, 3, 11))


CLASSIFIERS = {  # config, pooling, their class
    'bert': (_C, 'pooler', 'BertForSequenceClassification'),
    'roberta': (dataclasses.replace(_C, offset=2, types=1), 'first', 'RobertaForSequenceClassification'),
    'deberta': (deberta.Config(vocab=V, length=T, layers=2, embed=32, heads=4, head_dim=8, mlp=48, relative=8, types=2),
                'first', 'DebertaForSequenceClassification'),
    'deberta-v2': (deberta.Config(vocab=V, length=T, layers=2, embed=32, heads=4, head_dim=8, mlp=48, relative=16,
                                  buckets=8, key_bias=True, shared=True, types=2), 'first',
                   'DebertaV2ForSequenceClassification')}


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_an_exported_classifier_gives_their_logits(tmp_path, name):
  c, pooling, architecture = CLASSIFIERS[name]
  family = deberta if isinstance(c, deberta.Config) else encoder
  specs = family.specs(c) | {'classify': heads.classify_specs(c.embed, 3, dense=pooling == 'first')}
  specs |= {'pooler': heads.pooler_specs(c.embed)} if pooling == 'pooler' else {}
  rng = np.random.default_rng(0)
  p = jax.tree.map(lambda s: (0.3 * rng.normal(size=s.shape)).astype(np.float32), specs)
  hf.save(tmp_path / 'out', c, p, classes=['a', '好', 'c'])
  model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'out').eval()
  assert type(model).__name__ == architecture and model.config.id2label == {0: 'a', 1: '好', 2: 'c'}
  model.config.pad_token_id = model.config.pad_token_id or 0
  ids_BT, mask_BT, types_BT, positions_BT = _batch(model, 4, T, 'right')
  as_torch = lambda x: torch.from_numpy(np.asarray(x)).long()
  with torch.no_grad():
    want = model(as_torch(ids_BT), attention_mask=as_torch(mask_BT), token_type_ids=as_torch(types_BT)).logits.numpy()
  x_BTD = family.apply(p, c, ids_BT, segments_BT=mask_BT, types_BT=types_BT, positions_BT=positions_BT)
  got = classification.head(p, x_BTD, mask_BT, None, model=c, pooling=pooling, examples=0)
  np.testing.assert_allclose(got, want, atol=1e-4)
  model.save_pretrained(tmp_path / 'theirs')
  for folder in ('out', 'theirs'):
    back, q = hf.load(tmp_path / folder)
    assert back == c and hf.classes(tmp_path / folder) == ('a', '好', 'c')
    jax.tree.map(np.testing.assert_array_equal, p, q)
