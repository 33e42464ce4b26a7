"""scripts.evaluate: what a run measured of its held-out text, and any model on any text."""

import json
import math
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from experiments import cli, gpt2
from lm import params, pretrain
from lm.models import decoder, hf
from lm.text import tokenizer

ROOT = pathlib.Path(__file__).parent.parent


def run(*flags):
  return subprocess.run([sys.executable, '-m', 'scripts.evaluate', *map(str, flags)], cwd=ROOT, capture_output=True,
                        text=True, timeout=300, check=False)


@pytest.mark.slow
def test_the_held_out_text_of_a_run_is_as_the_run_measured_it(tmp_path):
  corpus = tiny.write_text(tmp_path / 'text.txt')
  argv = tiny.argv(data__corpus=corpus, workdir=tmp_path / 'run')
  assert cli.run_argv(['gpt2', *argv], '', gpt2.CONFIGS, pretrain.task) == 0
  want = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  done = run(f'--model={tmp_path}/run', f'--corpus={corpus}', '--part=validation', '--split=tail',
             '--validation_fraction=0.1', '--length=16', '--newest')
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)['validation']
  for name in ('loss', 'accuracy', 'bits_per_byte'):
    assert found[name] == pytest.approx(want[f'val_{name}'], rel=1e-5)
  assert found['perplexity'] == pytest.approx(math.exp(want['val_loss']), rel=1e-5)
  both = json.loads(run(f'--model={tmp_path}/run', f'--corpus={corpus}', '--length=16', '--newest').stdout)
  assert both.keys() == {'train'} and both['train']['bytes'] == corpus.stat().st_size


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A model that finds every token equally likely."""
  c = decoder.Config(vocab=258, length=32, layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32)
  root = tmp_path_factory.mktemp('model')
  p = jax.tree.map(np.zeros_like, params.init(decoder.specs(c), jax.random.key(0)))
  hf.save(root / 'hf', c, p, tokenizer.byte())
  (root / 'a.jsonl').write_text(''.join(json.dumps({'text': f'poem {i:03}'}) + '\n' for i in range(40)))
  return root


@pytest.mark.slow
@pytest.mark.parametrize('isolate', [False, True])
def test_a_uniform_model_needs_all_bits(folder, isolate):
  """Of 258 tokens; each document is 8 bytes and its end, isolated or not."""
  done = run(f'--model={folder}/hf', f'--corpus={folder}/a.jsonl', f'--isolate={isolate}')
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)['train']
  assert found['targets'] == 40 * (8 if isolate else 9) - (not isolate)
  assert found['loss'] == pytest.approx(math.log(258), rel=1e-5)
  tokens = 360 if isolate else 359
  assert found['bits_per_byte'] == pytest.approx(math.log2(258) * tokens / 320, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('flags, code, part', [
    ((), 2, '--model: not given'), (('--model={}/hf', '--corpus=nowhere'), 3, 'nowhere: no text'),
    (('--model={}/hf', '--corpus={}/a.jsonl', '--length=64'), 2, 'data.length=64 is more than model.length=32'),
    (('--model={}/hf', '--corpus={}/a.jsonl', '--part=validation', '--validation_fraction=0'), 3, 'no text of')])
def test_what_is_wrong_is_one_line(folder, flags, code, part):
  done = run(*(flag.format(folder) for flag in flags))
  assert done.returncode == code and part in done.stderr and done.stderr.count('\n') == 1, done.stderr
