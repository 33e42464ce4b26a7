"""Classification begins where an encoder's pretraining ended: which leaves it takes, what it says if it cannot."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from experiments import bert, deberta, electra
from lm import (
  checkpoint,
  classification,
  config,
  ema,
  loop,
  nn,
  optim,
  params,
  peft,
  pretrain_encoder,
  run,
  start,
  weights,
)
from lm.data import labelled
from lm.errors import ConfigError
from lm.models import deberta as deberta_model, deberta_pair, electra as electra_model
from lm.text import tokenizer as tokenizers, training

SMALL = {'vocab': 300, 'length': 32, 'layers': 2, 'embed': 16, 'heads': 2, 'head_dim': 8, 'mlp': 32}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  tiny.share_compiled(monkeypatch)


def shrink(c, **changes):
  """Without dropout, which is half of what compiles."""
  def small(model):
    if hasattr(model, 'generator'):
      return dataclasses.replace(model, generator=small(model.generator), discriminator=small(model.discriminator))
    fields = SMALL | ({'token_embed': 16} if model.token_embed else {})
    fields |= {'relative': 16, 'buckets': 8 * bool(model.buckets)} if hasattr(model, 'relative') else {}
    return dataclasses.replace(model, dropout=nn.Dropout(), **fields)
  data = dataclasses.replace(c.data, length=32, batch=8, copies=1)
  return config.replace(dataclasses.replace(c, model=small(c.model), data=data), **changes)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('init_from')
  texts = ['good film 好电影 bad film 坏电影 the a of'] * 20
  training.train_sentencepiece(texts, root / 'x.model', vocab=282, control_symbols=('[CLS]', '[SEP]', '[MASK]'))
  (root / 'text.jsonl').write_text('\n'.join(json.dumps({'text': '\n'.join(f'{t} {i} {j}.' for j in range(12))})
                                             for i, t in enumerate(texts * 2)))
  rows = [{'text': f'{"good" if i % 2 else "bad"} film {i}', 'label': str(i % 2),
           'split': 'train' if i % 5 else 'validation'} for i in range(40)]
  (root / 'films.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  return root


def saved(workdir, c):
  """A workdir with a checkpoint of initial values, as a run of `c` would leave it, and these values."""
  specs = pretrain_encoder.task(c).specs
  p = jax.jit(lambda key: params.init(specs, key))(jax.random.key(5))
  with checkpoint.Saver(workdir / 'checkpoints', c.checkpoint, start=None) as saver:
    saver.save(0, {'params': p}, meta={}, metrics={})
  tokenizers.char('abc').save(workdir / 'tokenizer')
  (workdir / 'config.json').write_text(json.dumps({'config': config.to_json(c)}))
  return jax.device_get(p)


def films(root, model, init_from, **changes):
  kind = classification.Disentangled if isinstance(model, deberta_model.Config) else classification.Encoder
  c = kind(model=model, init_from=str(init_from), data=labelled.Config(
      corpus=str(root / 'films.jsonl'), tokenizer=str(root / 'x.model'), length=16, batch=8),
      optim=optim.Config(lr=0.01, steps=2, warmup=1), loop=loop.Config(log_every=1, eval_every=2),
      checkpoint=checkpoint.Config(every=2, metric='val_accuracy', mode='max'))
  return config.replace(c, **changes)


def begun(c, tmp_path, monkeypatch):
  """The parameters at step 0 of that run."""
  tiny.stop_before_the_step(monkeypatch)
  with pytest.raises(tiny.Reached) as reached:
    run.run(c, classification.task(c), tmp_path / 'tuned')
  return params.join(reached.value.state.params, reached.value.state.frozen)


def same(got, want):
  got, want = params.flatten(got), params.flatten(want)
  assert want and want.keys() == {path for path in got if path in want}
  for path, x in want.items():
    np.testing.assert_array_equal(got[path], x, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['full', 'lora'])
def test_a_pair_gives_its_discriminator(method, root, tmp_path, monkeypatch):
  c = shrink(electra.electra_cpu())
  p = saved(tmp_path / 'run', c)
  few = peft.Config(method, rank=2)
  p0 = begun(films(root, c.model.discriminator, tmp_path / 'run', peft=few), tmp_path, monkeypatch)
  want = electra_model.discriminator(p)
  assert 'rtd' not in p0 and 'generator' not in p0 and p0['classify']
  same(p0['embed'], want['embed'])
  same(peft.merge(p0)['blocks'] if method == 'lora' else p0['blocks'], want['blocks'])


@pytest.mark.slow
def test_embeddings_that_are_a_sum_are_summed(root, tmp_path, monkeypatch):
  """DeBERTa-v3: the discriminator's are those of the generator and what it learned beside them."""
  c = shrink(deberta.deberta_v3_cpu())
  p = saved(tmp_path / 'run', c)
  p0 = begun(films(root, c.model.discriminator, tmp_path / 'run'), tmp_path, monkeypatch)
  same({k: v for k, v in p0.items() if k != 'classify'},
       {k: v for k, v in deberta_pair.discriminator(p, c.model).items() if k != 'rtd'})


@pytest.mark.slow
@pytest.mark.parametrize('model, message', [
    (dict(embed=32), 'blocks/attn/k is (2, 16, 2, 8) there and (2, 32, 2, 8) in this model; set model.*'),
    (dict(types=0), 'embed/types is (2, 16) there and absent in this model'),
    (dict(layers=3), 'blocks/attn/k is (2, 16, 2, 8) there and (3, 16, 2, 8) in this model')])
def test_what_does_not_fit_is_named(model, message, root, tmp_path, monkeypatch):
  c = shrink(bert.bert_cpu())
  saved(tmp_path / 'run', c)
  with pytest.raises(ConfigError) as raised:
    begun(films(root, dataclasses.replace(c.model, **model), tmp_path / 'run'), tmp_path, monkeypatch)
  assert str(raised.value).startswith(f'init_from={tmp_path}/run: ') and message in str(raised.value)


def test_a_pooler_that_was_not_pretrained_is_named(root, tmp_path, monkeypatch):
  c = shrink(bert.bert_cpu(), nsp=False)
  saved(tmp_path / 'run', c)
  with pytest.raises(ConfigError, match='pooler/bias is absent there and .* or name a model that has it'):
    begun(films(root, c.model, tmp_path / 'run', pooling='pooler'), tmp_path, monkeypatch)


@pytest.mark.slow
def test_from_pretraining_to_predictions(root, tmp_path):
  """A run of BERT with an average, tuned by LoRA on its averaged weights and pooler, read again from both workdirs."""
  c = shrink(bert.bert_cpu(), data__corpus=str(root / 'text.jsonl'), data__tokenizer=str(root / 'x.model'),
             data__validation_fraction=0.2, optim__steps=2, optim__warmup=1, optim__ema=0.5, optim__lr=0.01,
             loop__log_every=1, loop__eval_every=2, checkpoint__every=2)
  task = pretrain_encoder.task(c)
  run.run(c, task, tmp_path / 'run')
  tuned = films(root, c.model, tmp_path / 'run', pooling='pooler', peft=peft.Config('lora', rank=2),
                data__tokenizer=str(tmp_path / 'run/tokenizer'))
  run.run(tuned, classification.task(tuned), tmp_path / 'tuned')
  abstract = start.abstract(task, run.build(c, task))
  average = ema.of(checkpoint.restore(tmp_path / 'run/checkpoints', abstract.replace(
      frozen=jax.tree.map(lambda x: None, abstract.frozen)))[1].opt_state)
  base, whole = classification._specs(tuned)
  p = weights.restore(tmp_path / 'tuned', whole, base=base)
  same(p['embed'], average['embed'])
  same(p['blocks']['mlp'], average['blocks']['mlp'])
  labels_N, classes_N, _ = classification.predictions(tuned, tmp_path / 'tuned')
  assert len(labels_N) == len(classes_N) == 8
