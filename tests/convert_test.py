"""scripts.convert as a program: to a workdir and back is bitwise, and a failure is one line with its exit code."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
from safetensors import numpy as st

from experiments import bert, deberta, electra
from lm import checkpoint, config, params, pretrain_encoder
from lm.models import hf
from lm.text import tokenizer

ROOT = pathlib.Path(__file__).parent.parent


def _convert(*args):
  return subprocess.run([sys.executable, '-m', 'scripts.convert', *map(str, args)], cwd=ROOT, capture_output=True,
                        text=True, timeout=120, check=False)


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
  out = _convert(f'--from={golden}', f'--out={tmp_path}/hf')
  assert (out.returncode, out.stderr.count('\n')) == (4, 1)
  assert 'not empty' in out.stderr


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
    want_config, want = pretrain_encoder.network(c.model, p)
    assert got_config.layers == want_config.layers
    want = params.flatten(want)
    got = params.flatten(got)
    assert want.keys() == got.keys()
    assert all(np.array_equal(want[path], got[path]) for path in want)
