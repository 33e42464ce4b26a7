"""DeBERTa against transformers on random weights: hidden states, logits, gradients, the decoder, folders both ways."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import params
from lm.kernels.cross_entropy import weighted_nll
from lm.models import deberta, disentangled, heads, hf

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.oracle

V = 53
BASE = {'vocab_size': V, 'hidden_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 4, 'intermediate_size': 48,
        'max_position_embeddings': 24, 'relative_attention': True, 'pos_att_type': ['c2p', 'p2c'],
        'position_biased_input': False, 'initializer_range': 0.3}
NEW = BASE | {'share_att_key': True, 'position_buckets': 8, 'max_relative_positions': 16, 'norm_rel_ebd': 'layer_norm'}
MODELS = {
    'v1': ('Deberta', BASE),
    'v1-near': ('Deberta', BASE | {'max_relative_positions': 5, 'layer_norm_eps': 1e-2}),
    'v1-c2p': ('Deberta', BASE | {'pos_att_type': 'c2p', 'position_biased_input': True, 'type_vocab_size': 2}),
    'v1-p2c': ('Deberta', BASE | {'pos_att_type': 'p2c', 'embedding_size': 20, 'hidden_act': 'gelu_new'}),
    'v1-content': ('Deberta', BASE | {'pos_att_type': None, 'relative_attention': False}),
    'v2': ('DebertaV2', NEW | {'conv_kernel_size': 3, 'conv_act': 'gelu'}),
    'v2-tanh': ('DebertaV2', NEW | {'conv_kernel_size': 5, 'embedding_size': 20, 'max_relative_positions': -1}),
    'v2-separate': ('DebertaV2', NEW | {'share_att_key': False, 'norm_rel_ebd': 'none'}),
    'v2-c2p': ('DebertaV2', NEW | {'pos_att_type': ['c2p'], 'position_buckets': -1, 'max_relative_positions': 6}),
    'v2-p2c': ('DebertaV2', NEW | {'pos_att_type': ['p2c'], 'share_att_key': False, 'position_biased_input': True,
                                   'type_vocab_size': 2}),
    'v2-content': ('DebertaV2', NEW | {'pos_att_type': None, 'relative_attention': False, 'norm_rel_ebd': 'none'}),
}


def _theirs(kind, fields):
  """A model whose every parameter is random: biases and norms, too."""
  torch.manual_seed(0)
  model = getattr(transformers, f'{kind}ForMaskedLM')(getattr(transformers, f'{kind}Config')(**fields)).eval()
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.2 * torch.randn_like(p))
  return model


@pytest.fixture(scope='module', params=MODELS)
def pair(request, tmp_path_factory):
  """(their model, our config, our parameters as JAX arrays)."""
  model = _theirs(*MODELS[request.param])
  folder = tmp_path_factory.mktemp(request.param)
  model.save_pretrained(folder)
  c, p = hf.load(folder)
  return model, c, jax.tree.map(jnp.asarray, p)


def _inputs(B, T, c, seed=0):
  """ids, types, and a mask of rows padded right, left and not at all."""
  rng = np.random.default_rng(seed)
  ids_BT = rng.integers(V, size=(B, T), dtype=np.int32)
  mask_BT = np.ones((B, T), np.int32)
  mask_BT[0, T // 2 + 1:] = 0
  mask_BT[1, :T // 3] = 0
  return ids_BT, mask_BT, rng.integers(max(c.types, 1), size=(B, T), dtype=np.int32)


def _run(model, ids_BT, mask_BT, types_BT):
  long = lambda x: torch.from_numpy(np.asarray(x)).long()
  return model(input_ids=long(ids_BT), attention_mask=long(mask_BT), token_type_ids=long(types_BT),
               output_hidden_states=True)


def _close(ours, theirs, tolerance=1e-4):
  np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def _logits(p, c, x_BTD):
  y_BTE = heads.mlm(p['mlm'], x_BTD, c.activation, c.norm_eps)
  return y_BTE @ p['embed']['tokens'].T + p['mlm']['bias'][None, None]


def test_every_number_is_taken(pair):
  model, c, p = pair
  assert params.count(p) == sum(x.numel() for x in model.parameters())


@pytest.mark.parametrize('T', [1, 7, 24, 41])
def test_forward(pair, T):
  """41 tokens are more than any table reaches, where the table is relative."""
  model, c, p = pair
  T = min(T, c.length) if c.positions else T
  ids_BT, mask_BT, types_BT = _inputs(3, T, c)
  with torch.no_grad():
    theirs = _run(model, ids_BT, mask_BT, types_BT)
  x_BTD = deberta.apply(p, c, ids_BT, segments_BT=mask_BT, types_BT=types_BT)
  real_BT = mask_BT > 0
  _close(x_BTD[real_BT], theirs.hidden_states[-1].numpy()[real_BT])
  _close(_logits(p, c, x_BTD)[real_BT], theirs.logits.numpy()[real_BT])


@pytest.mark.parametrize('scan_layers', [True, False])
def test_gradients_of_masked_words(pair, scan_layers, tmp_path):
  model, c, p = pair
  c = dataclasses.replace(c, scan_layers=scan_layers)
  ids_BT, mask_BT, types_BT = _inputs(3, 19, c)
  rng = np.random.default_rng(1)
  targets_BT, weights_BT = rng.integers(V, size=(3, 19)), mask_BT * (rng.random((3, 19)) < 0.4)
  model.zero_grad()
  logprobs = _run(model, ids_BT, mask_BT, types_BT).logits.log_softmax(-1)
  nll = -logprobs.gather(-1, torch.from_numpy(targets_BT)[..., None])[..., 0]
  loss = (nll * torch.from_numpy(weights_BT)).sum() / weights_BT.sum()
  loss.backward()

  def ours(p):
    x_BTD = deberta.apply(p, c, ids_BT, segments_BT=jnp.asarray(mask_BT), types_BT=types_BT)
    y_BTE = heads.mlm(p['mlm'], x_BTD, c.activation, c.norm_eps)
    return weighted_nll(y_BTE, p['embed']['tokens'], jnp.asarray(targets_BT), jnp.asarray(weights_BT),
                        bias_V=p['mlm']['bias'])[0] / weights_BT.sum()
  value, grads = jax.jit(jax.value_and_grad(ours))(p)
  _close(value, loss.item())
  theirs = {name: x.grad for name, x in model.named_parameters()}
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.copy_(torch.zeros_like(x) if theirs[name] is None else theirs[name])
  model.save_pretrained(tmp_path)  # their gradients come through the same table of names as their weights
  with torch.no_grad():
    model.load_state_dict(_restored(model, p, c, tmp_path / 'again'))
  wanted = hf.load(tmp_path)[1]
  # torch's embedding gives the padding word no gradient of its lookup, and adds that of the output matrix.
  pad = model.config.pad_token_id
  grads['embed']['tokens'] = grads['embed']['tokens'].at[pad].set(wanted['embed']['tokens'][pad])
  jax.tree.map(lambda a, b: _close(a, b, 1e-3), grads, wanted)


def _restored(model, p, c, folder):
  hf.save(folder, c, jax.tree.map(np.asarray, p))
  return type(model).from_pretrained(folder).state_dict()


@pytest.mark.parametrize('name', ['v2', 'v2-tanh', 'v2-separate', 'v2-c2p', 'v2-p2c'])
def test_enhanced_mask_decoder(tmp_path, name):
  """Their last layer run twice by hand (v1's layer there cannot take queries of its own)."""
  model = _theirs(*MODELS[name])
  model.save_pretrained(tmp_path)
  c, p = hf.load(tmp_path)
  ids_BT, mask_BT, types_BT = _inputs(3, 21, c)
  positions = np.random.default_rng(3).normal(size=(c.length, c.embed)).astype(np.float32)
  encoder = model.deberta.encoder
  with torch.no_grad():
    hidden = _run(model, ids_BT, mask_BT, types_BT).hidden_states[-2]
    query, mask = hidden + torch.from_numpy(positions[:21]), encoder.get_attention_mask(torch.from_numpy(mask_BT))
    for _ in range(2):
      query, _ = encoder.layer[-1](hidden, mask, query_states=query, relative_pos=encoder.get_rel_pos(hidden),
                                   rel_embeddings=encoder.get_rel_embedding())
  p = jax.tree.map(jnp.asarray, p) | {'decoder': {'positions': jnp.asarray(positions)}}
  ours = deberta.decode_masked(p, c, ids_BT, segments_BT=jnp.asarray(mask_BT), types_BT=types_BT)
  _close(ours[mask_BT > 0], query.numpy()[mask_BT > 0])


@pytest.mark.parametrize(('buckets', 'limit'), [(256, 512), (32, 128), (8, 16), (6, 12), (7, 40)])
def test_buckets(buckets, limit):
  make = transformers.models.deberta_v2.modeling_deberta_v2.make_log_bucket_position
  distance = np.arange(-3 * limit, 3 * limit)
  np.testing.assert_array_equal(disentangled.bucket(distance, buckets, limit),
                                make(torch.from_numpy(distance), buckets, limit).long().numpy())


@pytest.mark.parametrize('name', MODELS)
def test_their_folder_survives_import_and_export(tmp_path, name):
  model = _theirs(*MODELS[name])
  model.save_pretrained(tmp_path / 'a')
  hf.save(tmp_path / 'b', *hf.load(tmp_path / 'a'))
  again, report = type(model).from_pretrained(tmp_path / 'b', output_loading_info=True)
  assert not any(report[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  theirs = model.state_dict()
  assert theirs.keys() == again.state_dict().keys()
  assert all(torch.equal(x, again.state_dict()[key]) for key, x in theirs.items())


@pytest.mark.parametrize('name', ['v1', 'v2', 'v3'])
def test_export(tmp_path, name):
  c = deberta.Config(vocab=V, length=24, layers=2, embed=32, heads=4, head_dim=8, mlp=48, relative=9)
  if name != 'v1':
    c = dataclasses.replace(c, buckets=6, shared=True, key_bias=True, relative_norm=True, conv=3 * (name == 'v2'))
  rng = np.random.default_rng(0)
  p = jax.tree.map(lambda s: 0.3 * rng.normal(size=s.shape).astype(np.float32),
                   deberta.specs(c) | {'mlm': heads.mlm_specs(V, 32, 32)})
  hf.save(tmp_path / 'out', c, p)
  model, report = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / 'out', output_loading_info=True)
  assert not any(report[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  ids_BT, mask_BT, types_BT = _inputs(2, 17, c)
  with torch.no_grad():
    theirs = _run(model.eval(), ids_BT, mask_BT, types_BT).logits.numpy()
  q = jax.tree.map(jnp.asarray, p)
  ours = _logits(q, c, deberta.apply(q, c, ids_BT, segments_BT=jnp.asarray(mask_BT)))
  _close(ours[mask_BT > 0], theirs[mask_BT > 0])
  back, again = hf.load(tmp_path / 'out')
  assert back == c
  jax.tree.map(np.testing.assert_array_equal, p, again)
  body = {key: x for key, x in p.items() if key != 'mlm'}
  hf.save(tmp_path / 'body', c, body)
  model = transformers.AutoModel.from_pretrained(tmp_path / 'body').eval()
  with torch.no_grad():
    theirs = _run(model, ids_BT, mask_BT, types_BT).last_hidden_state.numpy()
  _close(deberta.apply(q, c, ids_BT, segments_BT=jnp.asarray(mask_BT))[mask_BT > 0], theirs[mask_BT > 0])


def test_config_of_the_published_models(tmp_path):
  """v3-base's config.json as microsoft published it, at a smaller size."""
  fields = {'model_type': 'deberta-v2', 'attention_probs_dropout_prob': 0.1, 'hidden_act': 'gelu',
            'hidden_dropout_prob': 0.1, 'hidden_size': 32, 'initializer_range': 0.02, 'intermediate_size': 64,
            'max_position_embeddings': 512, 'relative_attention': True, 'position_buckets': 256,
            'norm_rel_ebd': 'layer_norm', 'share_att_key': True, 'pos_att_type': 'p2c|c2p', 'layer_norm_eps': 1e-7,
            'max_relative_positions': -1, 'position_biased_input': False, 'num_attention_heads': 4,
            'num_hidden_layers': 2, 'type_vocab_size': 0, 'vocab_size': V}
  transformers.DebertaV2Model(transformers.DebertaV2Config(**fields)).save_pretrained(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(fields))
  c, p = hf.load(tmp_path)
  assert c == deberta.Config(vocab=V, layers=2, embed=32, heads=4, head_dim=8, mlp=64, buckets=256, shared=True,
                             key_bias=True, relative_norm=True)
  assert p.keys() == deberta.specs(c).keys()
