"""Labelled texts as rows, the classification loss, and fine-tuning from end to end at toy size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import finetune, nn, optim, params
from lm.data import labelled
from lm.data.corpora import Document
from lm.errors import ConfigError, DataError
from lm.losses import classify
from lm.models import deberta, encoder
from lm.text import tokenizer as tokenizers, vocabulary

MODEL = encoder.Config(vocab=300, length=16, layers=1, embed=16, heads=2, head_dim=8, mlp=32, scan_layers=False,
                       dropout=nn.Dropout())


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  texts = ['good film 好电影 bad film 坏电影 the a of'] * 20
  return tokenizers.train_sentencepiece(texts, tmp_path_factory.mktemp('t') / 'x.model', vocab=282,
                                        control_symbols=('[CLS]', '[SEP]', '[MASK]'))


def documents(n=64, split='train'):
  for i in range(n):
    good = i % 2 == 0
    yield Document(f'{split}{i}', ('good film ' if good else 'bad film ') + '好坏'[not good] * (i % 3), split,
                   'positive' if good else 'negative')


def test_rows_have_their_special_tokens_and_are_cut_at_the_end(tokenizer):
  texts = [Document('a', 'good film', 'train', 'yes'), Document('b', 'bad ' * 40, 'train', 'no'),
           Document('c', '好电影', 'validation', 'yes')]
  sets, names = labelled.sets(texts, tokenizer, 12)
  special = vocabulary.special_ids(tokenizer)
  assert names == ['no', 'yes'] and sets['train'].truncated == 1 and sets['validation'].truncated == 0
  rows = sets['train'].examples
  assert rows.labels_B.tolist() == [1, 0]
  ids = tokenizer.encode('good film').tolist()
  n = len(ids) + 2
  assert rows.ids_BT[0].tolist() == [special.cls, *ids, special.sep] + [special.pad] * (12 - n)
  assert rows.segments_BT[0].tolist() == [1] * n + [0] * (12 - n)
  assert rows.ids_BT[1, -1] == special.sep and rows.segments_BT[1].all()


def test_epochs_are_permutations_and_evaluation_is_complete(tokenizer):
  sets, _ = labelled.sets([*documents(22), *documents(5, 'validation')], tokenizer, 12)
  order = lambda number, seed=0: np.concatenate([b.labels_B for b in sets['train'].epoch(4, seed, number)])
  assert len(order(0)) == 20
  np.testing.assert_array_equal(order(3), order(3))
  assert not np.array_equal(order(0), order(1)) or not np.array_equal(order(0), order(2))
  batches = list(sets['validation'].once(4))
  assert [b.labels_B.tolist() for b in batches] == [[1, 0, 1, 0], [1, -1, -1, -1]]
  with pytest.raises(ConfigError, match='batch=40: more than the 22 examples'):
    next(sets['train'].epoch(40, 0, 0))


@pytest.mark.parametrize(('bad', 'message'), [
    (Document('x', 'good', 'train'), 'document x: no label'), (Document('x', 'good', None, 'yes'), 'x: no split'),
    (Document('x', '', 'train', 'yes'), 'document x: empty'),
    (Document('x', 'good', 'validation', 'maybe'), "validation: label 'maybe' is not among those of the training")])
def test_what_cannot_be_learned_from_is_named(tokenizer, bad, message):
  with pytest.raises(DataError, match=message):
    labelled.sets([*documents(4), bad], tokenizer, 12)


def test_one_class_is_refused(tokenizer):
  with pytest.raises(DataError, match='expected at least two'):
    labelled.sets([Document('x', 'good', 'train', 'yes')], tokenizer, 12)


def test_the_loss_is_the_mean_over_real_rows():
  logits_BC = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
  batch = labelled.Labelled(jnp.zeros((4, 2), jnp.int32), jnp.ones((4, 2), jnp.int32), jnp.array([2, 0, -1, 1]))
  terms, metrics = classify.loss({}, batch, None, logits=lambda p, ids_BT, **_: logits_BC)
  p_BC = np.exp(logits_BC) / np.exp(logits_BC).sum(1, keepdims=True)
  want = -np.log([p_BC[0, 2], p_BC[1, 0], p_BC[3, 1]])
  assert float(terms['nll'].total) == pytest.approx(want.sum(), rel=1e-5)
  assert float(terms['nll'].weight) == 3
  right = [int(np.argmax(logits_BC[i])) == label for i, label in ((0, 2), (1, 0), (3, 1))]
  assert float(metrics['accuracy'].total) == sum(right)


@pytest.mark.parametrize('family', [encoder, deberta])
def test_a_word_that_decides_is_learned(tokenizer, family):
  model = MODEL
  if family is deberta:
    fields = {f.name: getattr(MODEL, f.name) for f in dataclasses.fields(MODEL)}
    model = deberta.Config(relative=16, **{k: v for k, v in fields.items() if k not in ('offset', 'types')})
  sets, names = labelled.sets([*documents(64), *documents(20, 'validation')], tokenizer, 16)
  p = jax.jit(lambda k: params.init(family.specs(model), k))(jax.random.key(1))
  kept = jax.tree.map(np.asarray, p)
  c = optim.Config(lr=3e-3, schedule='linear', steps=60, warmup=6, b2=0.98, weight_decay=0.01)
  assert finetune.classifier(family, model, p, sets, len(names), c, batch=16, seeds=1) == [1.0]
  jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(np.asarray, p))  # the given parameters are not used up
