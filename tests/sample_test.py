"""scripts.sample: a tiny model from the command line."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from lm import params
from lm.models import decoder, hf
from lm.text import tokenizer, training

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  c = decoder.Config(vocab=258, length=32, layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32)
  path = tmp_path_factory.mktemp('model') / 'hf'
  hf.save(path, c, params.init(decoder.specs(c), jax.random.key(0)), tokenizer.byte())
  return path


def run(*flags, text=''):
  return subprocess.run([sys.executable, '-m', 'scripts.sample', *flags], cwd=ROOT, input=text.encode(),
                        capture_output=True, timeout=300, check=False)


@pytest.mark.slow
def test_one_prompt_streams_and_the_seed_decides(folder):
  flags = (f'--model={folder}', '--max_new=12')
  one, two, other = run(*flags, '--prompt=你'), run(*flags, text='你\n'), run(*flags, '--prompt=你', '--seed=1')
  assert one.returncode == 0, one.stderr
  assert one.stdout.startswith('你'.encode()) and one.stdout == two.stdout != other.stdout


@pytest.mark.slow
def test_several_prompts_make_a_block_each(folder):
  done = run(f'--model={folder}', '--prompt=ab', '--prompt=c', '--dtype=int8', '--temperature=0')
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith(b'ab') and b'\n\nc' in done.stdout


@pytest.mark.slow
def test_the_space_behind_a_prompt_is_not_lost(tmp_path):
  """A model that says one word of SentencePiece's again and again, alone and beside another prompt."""
  text = 'the cat sat on the mat, and that cat and a dog sat there.'
  t = training.train_sentencepiece([text] * 50, tmp_path / 't.model', 300, 'bpe')
  word, = t.encode('the').tolist()
  c = decoder.Config(vocab=t.vocab_size, length=32, layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32)
  p = jax.tree.map(np.zeros_like, params.init(decoder.specs(c), jax.random.key(0)))
  p['embed']['tokens'][word], p['final_norm']['bias'][:] = 1, 1
  hf.save(tmp_path / 'hf', c, p, t)
  flags = (f'--model={tmp_path}/hf', '--max_new=2', '--temperature=0', '--prompt=the cat')
  assert run(*flags).stdout == b'the cat the the\n'
  assert run(*flags, '--prompt=sat').stdout == b'the cat the the\n\nsat the the\n\n'


@pytest.mark.slow
def test_text_ends_where_the_folder_says(folder, tmp_path):
  """At any of its end tokens, one of them among what is most likely here."""
  flags = ('--prompt=ab', '--temperature=0', '--max_new=8')
  whole = run(f'--model={folder}', *flags).stdout
  shutil.copytree(folder, tmp_path / 'x')
  drawn = whole.removeprefix(b'ab')[:3]
  fields = json.loads((tmp_path / 'x' / 'config.json').read_text())
  assert fields['eos_token_id'] == 256
  (tmp_path / 'x' / 'generation_config.json').write_text(json.dumps({'eos_token_id': [256, drawn[0]]}))
  assert run(f'--model={tmp_path}/x', *flags).stdout.rstrip(b'\n') == b'ab' + drawn[:1]


@pytest.mark.slow
@pytest.mark.parametrize('flags, code, part', [
    (('--model=nowhere', '--prompt=a'), 2, b'nowhere'), ((), 2, b'--model'),
    (('--model={}', '--prompt=a', '--max_new=40'), 2, b'max_new=40'),
    (('--model={}', '--prompt=a', '--chat'), 2, b'--chat'),
    (('--model={}', '--prompt=a', '--chat=x'), 2, b'--chat'),
    (('--model={}', '--prompt=a', '--top_p=2'), 2, b'top_p=2')])
def test_a_wrong_flag_is_one_line(folder, flags, code, part):
  done = run(*(f.format(folder) for f in flags))
  assert done.returncode == code and part in done.stderr and done.stderr.count(b'\n') == 1, done.stderr
