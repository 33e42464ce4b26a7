"""LoRA, prefixes and prompts against PEFT: what is exported loads there, what was made there loads here."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm import classification, params, peft, peft_hf
from lm.errors import CheckpointError, ConfigError
from lm.models import deberta, decoder, encoder, heads, hf

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
theirs = pytest.importorskip('peft')
pytestmark = pytest.mark.oracle

V, IDS_BT = 67, np.random.default_rng(0).integers(4, 67, size=(2, 9))
MODELS = {
    'gpt2': ('GPT2LMHeadModel', transformers.GPT2Config(
        n_positions=24, n_embd=32, n_layer=2, n_head=4, vocab_size=V, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)),
    'llama': ('LlamaForCausalLM', transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=24, vocab_size=V)),
    'bert': ('BertForMaskedLM', transformers.BertConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=24, hidden_act='gelu')),
}
QV = {'gpt2': ['c_attn'], 'llama': ['q_proj', 'v_proj'], 'bert': ['query', 'value']}
EVERY = {'gpt2': ['c_attn', 'c_proj', 'c_fc'], 'llama': ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'gate_proj',
                                                         'down_proj'],
         'bert': ['query', 'key', 'value', 'dense']}
PATTERN = {'gpt2': r'.*\.attn\.c_(attn|proj)', 'llama': r'.*self_attn\.[qo]_proj',
           'bert': r'.*attention\.(self\.key|output\.dense)'}


@pytest.fixture(params=MODELS)
def pair(request, tmp_path):
  """(kind, their model, our config, our parameters)."""
  torch.manual_seed(0)
  name, config = MODELS[request.param]
  model = getattr(transformers, name)(config).eval()
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.1 * torch.randn_like(p))
  model.save_pretrained(tmp_path / 'base')
  return request.param, model, *hf.load(tmp_path / 'base')


def hidden(c, p, ids_BT=IDS_BT):
  """Before their head."""
  family = decoder if isinstance(c, decoder.Config) else encoder
  return np.asarray(jax.jit(lambda p: family.apply(peft.materialise(p), c, jnp.asarray(ids_BT)))(p))


def logits(kind, model, ids_BT=IDS_BT):
  del kind
  with torch.no_grad():
    return model(torch.from_numpy(np.asarray(ids_BT)), output_hidden_states=True).hidden_states[-1].numpy()


def moved(tree):
  rng = np.random.default_rng(1)
  shift = lambda path, w: w + 0.1 * rng.normal(size=w.shape).astype(np.float32) if 'lora_b' in path else w
  return params.map_with_path(shift, tree)


def assert_exact(loaded, folder):
  """Their model has LoRA where we exported it and nowhere else: it lacks no tensor of the file, and made none up."""
  want = load_file(folder / 'adapter_model.safetensors')
  got = theirs.get_peft_model_state_dict(loaded)
  assert {name: tuple(x.shape) for name, x in got.items()} == {name: x.shape for name, x in want.items()}


@pytest.mark.parametrize('stabilised', [False, True])
@pytest.mark.parametrize('targets', [r'attn/[qv]$', r'^blocks/(attn/[qkvo]|mlp/(up|gate|down))$', 'attn/[qkvo]$',
                                     'attn/o$', 'mlp/down$'])
def test_exported_lora_loads_there(pair, targets, stabilised, tmp_path):
  kind, model, c, p = pair
  few = peft.Config('lora', train='', rank=3, alpha=7, targets=targets, rank_stabilised=stabilised)
  specs = peft.specs(few, (decoder if kind != 'bert' else encoder).specs(c))
  body = {k: v for k, v in p.items() if k in specs}
  tree = moved(jax.jit(lambda p, key: peft.graft(p, specs, key))(body, jax.random.key(0)))
  peft_hf.save(tmp_path / 'lora', c, tree | {k: v for k, v in p.items() if k not in specs}, few,
               task=None if kind == 'bert' else 'CAUSAL_LM')
  loaded = theirs.PeftModel.from_pretrained(model, tmp_path / 'lora').eval()
  np.testing.assert_allclose(hidden(c, tree), logits(kind, loaded), atol=1e-4)
  assert_exact(loaded, tmp_path / 'lora')
  few_again, again = peft_hf.load(tmp_path / 'lora', c, p)
  assert few_again.scale == pytest.approx(few.scale) or kind == 'gpt2'
  np.testing.assert_allclose(hidden(c, again), hidden(c, tree), atol=1e-5)


@pytest.mark.parametrize('modules', [QV, EVERY, PATTERN], ids=['qv', 'every', 'pattern'])
@pytest.mark.parametrize('stabilised', [False, True])
def test_lora_made_there_loads_here(pair, modules, stabilised, tmp_path):
  kind, model, c, p = pair
  config = theirs.LoraConfig(r=3, lora_alpha=7, target_modules=modules[kind], use_rslora=stabilised,
                             fan_in_fan_out=kind == 'gpt2',
                             exclude_modules='.*(cls|pooler).*' if kind == 'bert' else None)
  tuned = theirs.get_peft_model(model, config).eval()
  with torch.no_grad():
    for name, w in tuned.named_parameters():
      if 'lora_B' in name:
        w.add_(0.1 * torch.randn_like(w))
  tuned.save_pretrained(tmp_path / 'lora')
  few, tree = peft_hf.load(tmp_path / 'lora', c, p)
  assert few.method == 'lora' and few.rank == 3 and few.rank_stabilised == stabilised
  np.testing.assert_allclose(hidden(c, tree), logits(kind, tuned), atol=1e-4)


@pytest.mark.parametrize('hidden_width', [0, 5])
@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_a_prefix_there_and_back(kind, hidden_width, tmp_path):
  torch.manual_seed(0)
  model = getattr(transformers, MODELS[kind][0])(MODELS[kind][1]).eval()
  model.save_pretrained(tmp_path / 'base')
  c, p = hf.load(tmp_path / 'base')
  few = peft.Config('prefix', train='', length=4, hidden=hidden_width)
  tree = jax.jit(lambda p, key: peft.graft(p, peft.specs(few, decoder.specs(c)), key))(p, jax.random.key(0))
  peft_hf.save(tmp_path / 'prefix', c, tree, few)
  loaded = theirs.PeftModel.from_pretrained(model, tmp_path / 'prefix').eval()
  with torch.no_grad():
    want = loaded(torch.from_numpy(IDS_BT)).logits.numpy()
  got = np.asarray(decoder.logits(p, c, jnp.asarray(hidden(c, tree))))
  np.testing.assert_allclose(got, want, atol=1e-4)
  _, again = peft_hf.load(tmp_path / 'prefix', c, p)
  np.testing.assert_allclose(hidden(c, again), hidden(c, tree), atol=1e-5)


@pytest.mark.parametrize('projection', [False, True])
@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_a_prefix_made_there_loads_here(kind, projection, tmp_path):
  """With a projection they save what it makes, as we do."""
  torch.manual_seed(0)
  model = getattr(transformers, MODELS[kind][0])(MODELS[kind][1]).eval()
  model.save_pretrained(tmp_path / 'base')
  c, p = hf.load(tmp_path / 'base')
  config = theirs.PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=5, prefix_projection=projection,
                                     encoder_hidden_size=7)
  tuned = theirs.get_peft_model(model, config).eval()
  tuned.save_pretrained(tmp_path / 'prefix')
  few, tree = peft_hf.load(tmp_path / 'prefix', c, p)
  assert (few.method, few.length, few.hidden) == ('prefix', 5, 0)
  with torch.no_grad():
    want = tuned(torch.from_numpy(IDS_BT)).logits.numpy()
    without = tuned.get_base_model()(torch.from_numpy(IDS_BT)).logits.numpy()
  np.testing.assert_allclose(decoder.logits(p, c, jnp.asarray(hidden(c, tree))), want, atol=1e-4)
  assert np.abs(want - without).max() > 1e-2
  peft_hf.save(tmp_path / 'again', c, tree, few)
  made, again = (load_file(tmp_path / folder / 'adapter_model.safetensors') for folder in ('prefix', 'again'))
  assert made.keys() == again.keys() == {'prompt_embeddings'}
  np.testing.assert_array_equal(again['prompt_embeddings'], made['prompt_embeddings'])


def test_virtual_tokens_of_another_model_are_refused(tmp_path):
  """Where as many numbers are shared out among other heads, or a trained head would be lost."""
  name, config = MODELS['llama']
  model = getattr(transformers, name)(config)
  model.save_pretrained(tmp_path / 'base')
  c, p = hf.load(tmp_path / 'base')
  prefix = theirs.PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=5)
  theirs.get_peft_model(model, prefix).save_pretrained(tmp_path / 'prefix')
  peft_hf.load(tmp_path / 'prefix', c, p)
  fields = json.loads((tmp_path / 'prefix/adapter_config.json').read_text())
  (tmp_path / 'prefix/adapter_config.json').write_text(json.dumps(fields | {'num_layers': 4, 'token_dim': 8}))
  with pytest.raises(CheckpointError, match=r'token_dim: \(4, 2, 8\); expected \(2, 2, 16\); it was made for another'):
    peft_hf.load(tmp_path / 'prefix', c, p)
  for kind in (theirs.PrefixTuningConfig, theirs.PromptTuningConfig):
    judge = transformers.LlamaForSequenceClassification(config)
    theirs.get_peft_model(judge, kind(task_type='SEQ_CLS', num_virtual_tokens=3)).save_pretrained(tmp_path / 'judge')
    with pytest.raises(CheckpointError, match='base_model.score.weight has no place in this model'):
      peft_hf.load(tmp_path / 'judge', c, p)


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_a_prompt_made_there_loads_here(kind, tmp_path):
  torch.manual_seed(0)
  model = getattr(transformers, MODELS[kind][0])(MODELS[kind][1]).eval()
  model.save_pretrained(tmp_path / 'base')
  c, p = hf.load(tmp_path / 'base')
  tuned = theirs.get_peft_model(model, theirs.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=3)).eval()
  tuned.save_pretrained(tmp_path / 'prompt')
  few, tree = peft_hf.load(tmp_path / 'prompt', c, p)
  with torch.no_grad():
    want = tuned(torch.from_numpy(IDS_BT)).logits.numpy()[:, -IDS_BT.shape[1]:]
  ids_BT = np.concatenate([np.tile(np.arange(V, V + 3), (2, 1)), IDS_BT], axis=1)
  got = np.asarray(decoder.logits(p, c, jnp.asarray(hidden(c, tree, ids_BT))))[:, 3:]
  np.testing.assert_allclose(got, want, atol=1e-4)
  peft_hf.save(tmp_path / 'again', c, tree, few)
  _, again = peft_hf.load(tmp_path / 'again', c, p)
  np.testing.assert_array_equal(again['embed']['tokens'].prompt, tree['embed']['tokens'].prompt)


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_an_exported_prompt_loads_there(kind, tmp_path):
  torch.manual_seed(0)
  model = getattr(transformers, MODELS[kind][0])(MODELS[kind][1]).eval()
  model.save_pretrained(tmp_path / 'base')
  c, p = hf.load(tmp_path / 'base')
  few = peft.Config('prompt', train='', length=3)
  specs = peft.specs(few, decoder.specs(c))
  tree = jax.jit(lambda p, key: peft.graft(p, specs, key))(p, jax.random.key(0))
  tree = params.map_with_path(lambda path, x: 20 * x if path.endswith('/prompt') else x, tree)  # to be felt
  peft_hf.save(tmp_path / 'prompt', c, tree, few)
  loaded = theirs.PeftModel.from_pretrained(model, tmp_path / 'prompt').eval()
  assert_exact(loaded, tmp_path / 'prompt')
  with torch.no_grad():
    want = loaded(torch.from_numpy(IDS_BT)).logits.numpy()[:, -IDS_BT.shape[1]:]
    without = loaded.get_base_model()(torch.from_numpy(IDS_BT)).logits.numpy()
  ids_BT = np.concatenate([np.tile(np.arange(V, V + 3), (2, 1)), IDS_BT], axis=1)
  got = np.asarray(decoder.logits(p, c, jnp.asarray(hidden(c, tree, ids_BT))))[:, 3:]
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.abs(want - without).max() > 1e-2


def test_lora_of_a_classifier_loads_there_beside_its_head(tmp_path):
  """The head is not in PEFT's files: the model that they are loaded beside has it."""
  c = encoder.Config(vocab=V, length=24, layers=2, embed=32, heads=4, head_dim=8, mlp=48)
  base = encoder.specs(c) | {'pooler': heads.pooler_specs(c.embed), 'classify': heads.classify_specs(c.embed, 3)}
  few = peft.Config('lora', train='^(classify|pooler)/', rank=3, alpha=7, targets='^blocks/attn/[qkvo]$')
  rng = np.random.default_rng(0)
  tree = jax.tree.map(lambda s: (0.3 * rng.normal(size=s.shape)).astype(np.float32), peft.specs(few, base))
  hf.save(tmp_path / 'base', c, peft.without(tree), classes=['a', 'b', 'c'])
  peft_hf.save(tmp_path / 'lora', c, tree, few, task=None)
  model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'base').eval()
  ids = torch.from_numpy(IDS_BT)
  with torch.no_grad():
    without = model(ids).logits.numpy()
    loaded = theirs.PeftModel.from_pretrained(model, tmp_path / 'lora').eval()
    want = loaded(ids).logits.numpy()
  assert_exact(loaded, tmp_path / 'lora')
  got = classification.head(tree, encoder.apply(tree, c, jnp.asarray(IDS_BT)), jnp.ones(IDS_BT.shape, jnp.int32), None,
                            model=c, pooling='pooler', examples=0)
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.abs(want - without).max() > 1e-2


def test_what_cannot_be_read_is_refused(pair, tmp_path):
  kind, model, c, p = pair
  with pytest.raises(CheckpointError, match='expected adapter_config.json'):
    peft_hf.load(tmp_path / 'nothing', c, p)
  with pytest.raises(ConfigError, match='expected lora, prefix or prompt'):
    peft_hf.save(tmp_path / 'x', c, p, peft.Config('houlsby'))
  tuned = theirs.get_peft_model(model, theirs.LoraConfig(r=3, target_modules=QV[kind], use_dora=True))
  tuned.save_pretrained(tmp_path / 'dora')
  with pytest.raises(ConfigError, match='use_dora=True'):
    peft_hf.load(tmp_path / 'dora', c, p)
  fields = json.loads((tmp_path / 'dora/adapter_config.json').read_text()) | {'peft_type': 'IA3'}
  (tmp_path / 'dora/adapter_config.json').write_text(json.dumps(fields))
  with pytest.raises(ConfigError, match="peft_type='IA3'"):
    peft_hf.load(tmp_path / 'dora', c, p)


def write_fields(folder, **fields):
  path = folder / 'adapter_config.json'
  found = json.loads(path.read_text()) | fields
  path.write_text(json.dumps({k: v for k, v in found.items() if v != 'gone'}))


@pytest.mark.parametrize('fields, message', [
    ({'init_lora_weights': 'pissa'}, "init_lora_weights='pissa' changes the base"),
    ({'init_lora_weights': 'olora'}, "init_lora_weights='olora' changes the base"),
    ({'alora_invocation_tokens': [5]}, 'alora_invocation_tokens'),
    ({'layers_to_transform': [1]}, 'layers_to_transform'),
    ({'lora_alpha': 'gone'}, 'lora_alpha=None; expected a number'), ({'lora_alpha': 'x'}, "lora_alpha='x'"),
    ({'r': None}, 'r=None; expected a whole number'), ({'lora_dropout': 'a'}, "lora_dropout='a'"),
    ({'alpha_pattern': {'(': 2}}, 'alpha_pattern'), ({'alpha_pattern': [1]}, 'alpha_pattern')])
def test_fields_that_cannot_be_are_named(pair, tmp_path, fields, message):
  kind, model, c, p = pair
  theirs.get_peft_model(model, theirs.LoraConfig(r=3, target_modules=QV[kind])).save_pretrained(tmp_path / 'lora')
  write_fields(tmp_path / 'lora', **fields)
  with pytest.raises((ConfigError, CheckpointError), match=message) as error:
    peft_hf.load(tmp_path / 'lora', c, p)
  assert '\n' not in str(error.value)


def test_tensors_that_cannot_be_are_named(pair, tmp_path):
  kind, model, c, p = pair
  theirs.get_peft_model(model, theirs.LoraConfig(r=3, target_modules=QV[kind])).save_pretrained(tmp_path / 'lora')
  path = tmp_path / 'lora/adapter_model.safetensors'
  whole = load_file(path)
  b = sorted(name for name in whole if 'lora_B' in name)
  for tensors, message in (({}, 'no LoRA matrices'), (whole | {b[0]: whole[b[0]] * np.nan}, 'is not finite'),
                           (whole | {name: whole[name][:, :2].copy() for name in b}, 'rank of lora_B')):
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
      peft_hf.load(tmp_path / 'lora', c, p)


@pytest.mark.parametrize('name', ['BertModel', 'DebertaV2Model', 'DebertaV2ForMaskedLM'])
def test_lora_of_an_encoder_with_or_without_a_head_and_with_shared_keys(name, tmp_path):
  torch.manual_seed(0)
  sizes = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
               max_position_embeddings=24, hidden_act='gelu')
  config = transformers.BertConfig(**sizes) if name == 'BertModel' else transformers.DebertaV2Config(
      **sizes, relative_attention=True, pos_att_type=['p2c', 'c2p'], share_att_key=True, position_buckets=4,
      max_relative_positions=24, norm_rel_ebd='layer_norm', position_biased_input=False, type_vocab_size=0)
  model = getattr(transformers, name)(config).eval()
  model.save_pretrained(tmp_path / 'base')
  c, p = hf.load(tmp_path / 'base')
  modules = ['query', 'value'] if name == 'BertModel' else ['query_proj', 'value_proj']
  tuned = theirs.get_peft_model(model, theirs.LoraConfig(r=3, target_modules=modules)).eval()
  with torch.no_grad():
    for weight, w in tuned.named_parameters():
      if 'lora_B' in weight:
        w.add_(0.3 * torch.randn_like(w))
  tuned.save_pretrained(tmp_path / 'lora')
  family = encoder if name == 'BertModel' else deberta
  tree = peft_hf.load(tmp_path / 'lora', c, p)[1]
  ours = lambda tree: np.asarray(family.apply({k: v for k, v in tree.items() if k in family.specs(c)}, c,
                                              jnp.asarray(IDS_BT)))
  np.testing.assert_allclose(ours(tree), logits(name, tuned), atol=1e-4)
  assert np.abs(ours(tree) - ours(p)).max() > 1e-2
