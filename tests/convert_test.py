"""scripts.convert as a program: to a workdir and back is bitwise, and a failure is one line with its exit code."""

import json
import pathlib
import subprocess
import sys

import jax
from marks import slow
import numpy as np
import pytest
from safetensors import numpy as st

from experiments import bert, deberta, electra
from lm import checkpoint, classification, config, instruct, params, peft, peft_hf, pretrain_encoder, weights
from lm.data import conversations, labelled
from lm.models import decoder, encoder, hf, pretrained
from lm.text import tokenizer

ROOT = pathlib.Path(__file__).parent.parent


def _convert(*args):
  return subprocess.run([sys.executable, '-m', 'scripts.convert', *map(str, args)], cwd=ROOT, capture_output=True,
                        text=True, timeout=120, check=False)


@pytest.mark.slow
def test_to_a_workdir_and_back(tmp_path):
  golden = ROOT / 'tests' / 'golden' / 'llama'
  tokenizer.char('abc').save(tmp_path / 'tok')
  out = _convert(f'--from={golden}', '--to=workdir', f'--out={tmp_path}/run', f'--tokenizer={tmp_path}/tok')
  assert out.returncode == 0, out.stderr
  out = _convert(f'--from={tmp_path}/run', f'--out={tmp_path}/hf')
  assert out.returncode == 0, out.stderr
  want, got = (st.load_file(folder / 'model.safetensors') for folder in (golden, tmp_path / 'hf'))
  assert want.keys() == got.keys()
  assert all(np.array_equal(want[name], got[name]) for name in want)
  assert tokenizer.load(tmp_path / 'hf').sha256 == tokenizer.load(tmp_path / 'tok').sha256
  tokenizer.char(map(chr, range(97, 97 + 20_000))).save(tmp_path / 'many')
  out = _convert(f'--from={golden}', '--to=workdir', f'--out={tmp_path}/other', f'--tokenizer={tmp_path}/many')
  assert out.returncode == 2 and 'many: 20,0' in out.stderr and not (tmp_path / 'other').exists(), out.stderr
  out = _convert(f'--from={golden}', f'--out={tmp_path}/hf')
  assert (out.returncode, out.stderr.count('\n')) == (4, 1)
  assert 'not empty' in out.stderr


@pytest.mark.slow
def test_what_ends_texts_goes_along(tmp_path):
  c = decoder.Config(vocab=258, length=16, layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32)
  hf.save(tmp_path / 'a', c, jax.device_get(params.init(decoder.specs(c), jax.random.key(0))), tokenizer.byte())
  (tmp_path / 'a' / 'generation_config.json').write_text('{"eos_token_id": [256, 5]}')
  for source, kind, out in (('a', 'workdir', 'b'), ('b', 'hf', 'c')):
    done = _convert(f'--from={tmp_path / source}', f'--to={kind}', f'--out={tmp_path / out}')
    assert done.returncode == 0, done.stderr
    assert weights.load(tmp_path / out).ends == (256, 5)


@pytest.mark.slow
def test_a_run_of_an_encoder_becomes_a_folder_that_loads_to_the_same_values(tmp_path):
  for name, kind in (('bert_cpu', bert), ('electra_cpu', electra), ('deberta_v3_cpu', deberta)):
    c = getattr(kind, name)()
    specs = pretrain_encoder.task(c).specs
    p = jax.jit(lambda key, specs=specs: params.init(specs, key))(jax.random.key(0))
    run = tmp_path / name
    with checkpoint.Saver(run / 'checkpoints', c.checkpoint, start=None) as saver:
      saver.save(0, {'params': p}, meta={}, metrics={})
    tokenizer.char('abc').save(run / 'tokenizer')
    (run / 'config.json').write_text(json.dumps({'config': config.to_json(c)}))
    out = _convert(f'--from={run}', f'--out={tmp_path}/{name}.hf')
    assert out.returncode == 0, out.stderr
    got_config, got = hf.load(tmp_path / f'{name}.hf')
    want_config, want = pretrained.network(c.model, p)
    assert got_config.layers == want_config.layers
    want = params.flatten(want)
    got = params.flatten(got)
    assert want.keys() == got.keys()
    assert all(np.array_equal(want[path], got[path]) for path in want)



@pytest.fixture(scope='module')
def bases(tmp_path_factory):
  """A decoder and an encoder as folders of transformers' layout, with their configs."""
  root = tmp_path_factory.mktemp('bases')
  small = {'vocab': 258, 'length': 16, 'layers': 2, 'embed': 16, 'heads': 4, 'head_dim': 4, 'mlp': 24}
  gpt2, bert = decoder.Config(**small, kv_heads=4), encoder.Config(**small)
  for name, c, specs in (('gpt2', gpt2, decoder.specs(gpt2)), ('bert', bert, encoder.specs(bert))):
    hf.save(root / name, c, params.init(specs, jax.random.key(1)), tokenizer.byte())
  return root, gpt2, bert


def _tuned(workdir, c, task):
  """Writes the workdir of a run of `c` whose learned leaves are noise, and returns all leaves."""
  base = weights.params_from(c.init_from, params.abstract(task.base.specs))
  tree = jax.jit(lambda p, key: peft.graft(p, task.specs, key))(base, jax.random.key(0))
  rng, frozen = np.random.default_rng(0), params.match(tree, peft.freeze(c.peft, c.model.layers))
  tree = jax.tree.map(lambda x, kept: x if kept else 0.1 * rng.normal(size=x.shape).astype(np.float32), tree, frozen)
  rest, own = params.split(tree, frozen)
  with checkpoint.Saver(workdir / 'checkpoints', c.checkpoint, start=None) as saver:
    saver.save(0, {'params': own}, meta={'base': weights.fingerprint(rest)}, metrics={})
  tokenizer.byte().save(workdir / 'tokenizer')
  (workdir / 'config.json').write_text(json.dumps({'config': config.to_json(c)}))
  return tree


def _talks(bases, method):
  root, model, _ = bases
  return instruct.Config(model=model, init_from=str(root / 'gpt2'), data=conversations.Config(length=8),
                         peft=peft.Config(method, train='', rank=2, length=3, hidden=5))


@pytest.mark.parametrize('kind', [slow('gpt2'), slow('bert')])
def test_lora_of_a_run_goes_to_peft_and_back_onto_its_base(bases, kind, tmp_path):
  root, _, model = bases
  c, task = _talks(bases, 'lora'), instruct.task
  if kind == 'bert':
    c, task = classification.Encoder(model=model, init_from=str(root / kind), data=labelled.Config(length=8),
                                     peft=peft.Config('lora', rank=2)), classification.task
  tree = _tuned(tmp_path / 'run', c, task(c))
  out = _convert(f'--from={tmp_path}/run', '--to=peft', f'--out={tmp_path}/adapter')
  assert out.returncode == 0, out.stderr
  assert ('left out' in out.stdout) == (kind == 'bert')  # its head
  assert json.loads((tmp_path / 'adapter/adapter_config.json').read_text())['base_model_name_or_path'] == c.init_from
  out = _convert(f'--from={tmp_path}/adapter', f'--base={root}/{kind}', f'--out={tmp_path}/merged')
  assert out.returncode == 0, out.stderr
  got, base = (params.flatten(hf.load(folder)[1]) for folder in (tmp_path / 'merged', root / kind))
  want = params.flatten(peft.merge(tree))
  for path, w in got.items():
    np.testing.assert_allclose(w, want[path], atol=1e-5)
    assert np.array_equal(w, base[path]) != path.endswith(('attn/q', 'attn/v'))
  assert tokenizer.load(tmp_path / 'merged').sha256 == tokenizer.byte().sha256


@pytest.mark.slow
def test_a_prefix_goes_to_peft_and_is_merged_with_nothing(bases, tmp_path):
  root, model, _ = bases
  c = _talks(bases, 'prefix')
  tree = _tuned(tmp_path / 'run', c, instruct.task(c))
  out = _convert(f'--from={tmp_path}/run', '--to=peft', f'--out={tmp_path}/adapter')
  assert out.returncode == 0 and 'prefix of 192 parameters' in out.stdout, out.stderr
  _, got = peft_hf.load(tmp_path / 'adapter', *hf.load(root / 'gpt2'))
  want = peft.materialise(tree)
  for name in ('prefix_k', 'prefix_v'):
    np.testing.assert_allclose(got['blocks']['attn'][name], want['blocks']['attn'][name], atol=1e-6)
  for flags, part in (([f'--from={tmp_path}/run'], 'write a prefix or prompt with --to=peft'),
                      ([f'--from={tmp_path}/adapter', f'--base={root}/gpt2'], 'let PEFT load it beside')):
    out = _convert(*flags, f'--out={tmp_path}/out')
    assert (out.returncode, out.stderr.count('\n')) == (2, 1) and part in out.stderr, out.stderr
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_what_has_no_adapter_or_no_base_is_told(bases, tmp_path):
  root, run, adapter = bases[0], tmp_path / 'run', tmp_path / 'adapter'
  (run / 'checkpoints').mkdir(parents=True)
  (run / 'config.json').write_text(json.dumps({'config': config.to_json(_talks(bases, 'full'))}))
  adapter.mkdir()
  (adapter / 'adapter_config.json').write_text('{}')
  for flags, code, part in (([f'--from={run}', '--to=peft'], 2, "peft.method='full'"),
                            ([f'--from={root}/gpt2', '--to=peft'], 2, 'no workdir'),
                            ([f'--from={adapter}'], 2, '--base: not given'),
                            ([f'--from={adapter}', f'--base={root}/gpt2'], 4, 'adapter_model.safetensors')):
    out = _convert(*flags, f'--out={tmp_path}/out')
    assert (out.returncode, out.stderr.count('\n')) == (code, 1) and part in out.stderr, out.stderr
