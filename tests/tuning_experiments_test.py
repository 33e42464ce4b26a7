"""Every config of the fine-tuning experiments: what it trains, and three steps at toy size."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from experiments import adapters, classify, lora, prefix, sft
from lm import classification, config, instruct, look, optim, params, plan_tasks, run
from lm.nn import Dropout
from lm.text import chat, training

MNLI, SST2, MRPC, E2E, WEBNLG = 392_702, 67_349, 3_668, 42_061, 18_025  # training rows
# name, lr, schedule, warm-up, steps, b2, eps, weight decay, clip, rows: of the papers and their code.
ADAMW, ADAM = 'adamw', 'adam_no_bias_correction'
RECIPES = {
    classify.bert_base: (ADAM, 3e-5, 'bert_linear', 0.1, 3 * MNLI // 32, 0.999, 1e-6, 0.01, 1.0, 32),
    classify.roberta_base: (ADAMW, 1e-5, 'linear', 7432, 123_873, 0.98, 1e-6, 0.1, 0.0, 32),
    classify.electra_small: (ADAM, 3e-4, 'electra_linear', 0.1, 3 * MNLI // 32, 0.999, 1e-6, 0.0, 1.0, 32),
    classify.electra_base: (ADAM, 1e-4, 'electra_linear', 0.1, 3 * MNLI // 32, 0.999, 1e-6, 0.0, 1.0, 32),
    classify.electra_large: (ADAM, 5e-5, 'electra_linear', 0.1, 3 * MNLI // 32, 0.999, 1e-6, 0.0, 1.0, 32),
    classify.deberta_base: (ADAM, 3e-5, 'bert_linear', 1000, 3 * MNLI // 64, 0.999, 1e-6, 0.01, 1.0, 64),
    lora.roberta_base_mnli: (ADAMW, 5e-4, 'linear', 0.06, 30 * MNLI // 128, 0.999, 1e-8, 0.1, 1.0, 128),
    lora.roberta_base_sst2: (ADAMW, 5e-4, 'linear', 0.06, 60 * SST2 // 128, 0.999, 1e-8, 0.1, 1.0, 128),
    lora.gpt2_medium_e2e: (ADAMW, 2e-4, 'linear', 500, 5 * E2E // 8, 0.999, 1e-6, 0.01, 0.0, 8),
    sft.instructgpt_1b: (ADAMW, 9.65e-6, 'cosine', 0, 16 * 12_725 // 32, 0.95, 1e-8, 0.0, 1.0, 32),
    sft.zephyr_7b: (ADAMW, 2e-5, 'cosine', 0.1, 1090, 0.999, 1e-8, 0.0, 1.0, 128),
    sft.smollm2_recipe: (ADAMW, 1e-3, 'cosine', 0.1, 2000, 0.999, 1e-8, 0.0, 1.0, 128),
    adapters.bert_large: (ADAM, 3e-4, 'bert_linear', 0.1, 5 * MRPC // 32, 0.999, 1e-6, 0.01, 1.0, 32),
    prefix.gpt2_medium_webnlg: (ADAMW, 5e-5, 'linear', 0, 5 * WEBNLG // 5, 0.999, 1e-8, 0.0, 1.0, 5),
    prefix.gpt2_medium_e2e: (ADAMW, 8e-5, 'linear', 0, 5 * E2E // 10, 0.999, 1e-8, 0.0, 1.0, 10),
}
MODULES = (adapters, classify, lora, prefix, sft)
ALL = [pytest.param(m, f, id=f'{m.__name__.split(".")[1]}-{f.__name__}') for m in MODULES for f in m.CONFIGS]
HEAVY = [pytest.param(*p.values, id=p.id, marks=[pytest.mark.slow]) for p in ALL]
SMALL = {'vocab': 300, 'length': 48, 'layers': 3, 'embed': 16, 'heads': 2, 'kv_heads': 2, 'head_dim': 8, 'mlp': 24,
         'remat': 'none', 'dtype': 'float32'}
# With the heads: RoBERTa's LoRA alone is 294,912.
TRAINED = {'roberta_base_mnli': 887_811, 'gpt2_medium_webnlg': 25_744_896}


def shrunk(c, root):
  chat = isinstance(c, instruct.Config)
  model = {k: v for k, v in SMALL.items() if hasattr(c.model, k)}
  if getattr(c.model, 'positions', '') == 'rotary' and c.model.kv_heads < c.model.heads:
    model['kv_heads'] = 1
  data = {'corpus': str(root / ('chat.jsonl' if chat else 'films.jsonl')), 'tokenizer': str(root / 'x.model'),
          'length': 24, 'batch': 4} | ({'system': ''} if chat else {})
  multipliers = optim.layer_decay(3, 0.8) if c.optim.multipliers else ()
  return config.replace(
      c, model=tiny.quiet(dataclasses.replace(c.model, **model)), data=dataclasses.replace(c.data, **data),
      peft=dataclasses.replace(c.peft, rank=2, width=3, length=3, hidden=min(c.peft.hidden, 5)),
      optim=dataclasses.replace(c.optim, steps=3, warmup=1, decay_steps=0, multipliers=multipliers),
      loop__log_every=1, loop__eval_every=3, checkpoint__every=3)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('tuning')
  texts = ['good film 好电影 bad film 坏电影 the a of say'] * 20
  training.train_sentencepiece(texts, root / 'x.model', vocab=286, control_symbols=('[CLS]', '[SEP]', '[MASK]',
                                                                                     '<|im_start|>', '<|im_end|>'))
  labels = ('contradiction', 'neutral', 'entailment')
  rows = [{'text': f'film {i}', 'label': labels[i % 3], 'split': 'train' if i % 4 else 'validation'} for i in range(32)]
  (root / 'films.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  talks = [{'messages': [{'role': 'user', 'content': f'say {i}'}, {'role': 'assistant', 'content': 'good 好'}]}
           for i in range(40)]
  (root / 'chat.jsonl').write_text('\n'.join(json.dumps(t, ensure_ascii=False) for t in talks))
  return root


@pytest.mark.parametrize('module, make', HEAVY)
def test_three_steps(module, make, root, tmp_path, monkeypatch):
  monkeypatch.setattr('lm.budget.peak_flops', lambda device: 1e9)
  c = shrunk(make(), root)
  if hasattr(c, 'classes'):
    c = dataclasses.replace(c, classes=3)
  tiny.share_compiled(monkeypatch)
  summary = run.run(c, plan_tasks.task_of(c), tmp_path)
  assert summary['steps'] == 3 and summary['val_loss'] > 0


@pytest.mark.parametrize('module, make', ALL)
def test_what_trains_is_counted(module, make):
  c = make()
  a_task = plan_tasks.task_of(c)
  assert f'{params.count(a_task.specs):,}' in look.describe(c, a_task)
  mask = optim.trainable_mask(optim.Config(freeze=a_task.base.freeze), a_task.specs)
  trained = params.count(params.split(a_task.specs, mask)[0])
  assert 0 < trained <= params.count(a_task.specs) and f'trained                {trained:,}' in look.describe(c, a_task)
  assert trained == TRAINED.get(make.__name__, trained)


@pytest.mark.parametrize('make', RECIPES, ids=lambda make: f'{make.__module__.split(".")[1]}-{make.__name__}')
def test_a_recipe_has_the_published_numbers(make):
  c = make()
  o, (*rule, warmup, steps, b2, eps, decay, clip, rows) = c.optim, RECIPES[make]
  warmup = warmup if isinstance(warmup, int) else round(warmup * steps)
  assert [o.name, o.lr, o.schedule] == rule
  assert (o.steps, o.b1, o.b2, o.eps, o.weight_decay, o.clip, c.data.batch) == (steps, 0.9, b2, eps, decay, clip, rows)
  assert o.warmup == pytest.approx(warmup, abs=1)  # whole steps


def test_what_the_papers_say_besides():
  multipliers = lambda c: dict(c.optim.multipliers)
  small, large = multipliers(classify.electra_small()), multipliers(classify.electra_large())
  assert small['^blocks/'][0] == pytest.approx(0.0549756, abs=1e-7) and small['^blocks/'][-1] == pytest.approx(0.64)
  assert min(small.values(), key=np.size) == pytest.approx(0.0439805, abs=1e-7)
  assert large['^blocks/'][-1] == pytest.approx(0.81)
  for make, rank, alpha, rate in ((lora.roberta_base_mnli, 8, 16, 0), (lora.gpt2_medium_e2e, 4, 32, 0.1)):
    assert (make().peft.rank, make().peft.alpha, make().peft.rate) == (rank, alpha, rate)
  assert lora.gpt2_medium_e2e().loss.smoothing == 0.1 and adapters.bert_large().peft.width == 64
  assert (prefix.gpt2_medium_webnlg().peft.length, prefix.gpt2_medium_webnlg().peft.hidden) == (5, 512)
  given = sft.instructgpt_1b()
  assert given.model.dropout.hidden == 0.2 and given.optim.min_lr == pytest.approx(0.1 * given.optim.lr)
  assert [make().data.length + 1 for make in (sft.smollm2_recipe, sft.zephyr_7b)] == [8192, 2049]


def test_the_recipe_of_smollm2_says_who_it_is():
  """As its chat_template: a system turn where the conversation has none of its own."""
  written = sft.smollm2_recipe().data.written
  text = ''.join(piece.text for piece in written([chat.Message('user', 'Hi')]))
  assert text == ('<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n'
                  '<|im_start|>user\nHi<|im_end|>\n')
  own = [chat.Message('system', 'Be brief.'), chat.Message('user', 'Hi')]
  assert 'SmolLM' not in ''.join(piece.text for piece in written(own))


@pytest.mark.parametrize('name, dense, by_hand', [
    ('roberta_base', True, np.tanh), ('electra_small', False, None), ('bert_base', False, np.tanh),
    ('deberta_base', True, lambda x: jax.nn.gelu(x, approximate=False))], ids=lambda x: x if isinstance(x, str) else '')
def test_the_head_is_that_of_the_family(name, dense, by_hand):
  """RoBERTa: tanh of a dense layer; DeBERTa: gelu; ELECTRA: the first token as it is; BERT: the pooler."""
  c = getattr(classify, name)()
  small = {k: v for k, v in SMALL.items() if hasattr(c.model, k)}
  c = config.replace(c, model=dataclasses.replace(c.model, **small), data__length=24)
  specs = {k: v for k, v in plan_tasks.task_of(c).specs.items() if k in ('classify', 'pooler')}
  assert ('dense' in specs['classify']) == dense and ('pooler' in specs) == (c.pooling == 'pooler')
  p = jax.tree.map(lambda w: w + 0.1, params.init(specs, jax.random.key(0)))
  x_BTD = jax.random.normal(jax.random.key(1), (2, 5, 16))
  found = classification.head(p, x_BTD, jnp.ones((2, 5), int), None, model=c.model, pooling=c.pooling, examples=0)
  p, x_BD = jax.tree.map(np.asarray, (p, x_BTD[:, 0]))
  if by_hand:
    w, bias = ((p['classify']['dense'], p['classify']['dense_bias']) if dense else
               (p['pooler']['kernel'], p['pooler']['bias']))
    x_BD = np.asarray(by_hand(x_BD @ w + bias))
  np.testing.assert_allclose(found, x_BD @ p['classify']['out'] + p['classify']['out_bias'], atol=1e-5)


def test_deberta_drops_out_behind_its_dense_layer_alone():
  model = dataclasses.replace(classify.deberta_base().model, dropout=Dropout(classifier=0.5))
  x_BTD = jax.random.normal(jax.random.key(1), (2, 5, 16))
  p = {'classify': {'dense': jnp.eye(16), 'dense_bias': jnp.zeros(16), 'out': jnp.eye(16), 'out_bias': jnp.zeros(16)}}
  found = np.asarray(classification.head(p, x_BTD, jnp.ones((2, 5), int), jax.random.key(0), model=model,
                                         pooling='first', examples=0))
  whole = np.asarray(jax.nn.gelu(x_BTD[:, 0], approximate=False))
  assert 0 < (found == 0).sum() < found.size
  np.testing.assert_allclose(found, np.where(found == 0, 0, 2 * whole), atol=1e-5)
