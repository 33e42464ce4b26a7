"""Every config of the fine-tuning experiments: what it trains, and three steps at toy size."""

import dataclasses
import json

import pytest
import tiny

from experiments import adapters, classify, lora, prefix, sft
from lm import classification, config, instruct, optim, params, run
from lm.text import tokenizer as tokenizers

MODULES = (adapters, classify, lora, prefix, sft)
QUICK = ('minilm', 'smollm2', 'deberta_base')
ALL = [pytest.param(m, f, id=f'{m.__name__.split(".")[1]}-{f.__name__}') for m in MODULES for f in m.CONFIGS]
HEAVY = [pytest.param(*p.values, id=p.id, marks=[pytest.mark.slow] * (p.values[1].__name__ not in QUICK)) for p in ALL]
SMALL = {'vocab': 300, 'length': 48, 'layers': 3, 'embed': 16, 'heads': 2, 'kv_heads': 2, 'head_dim': 8, 'mlp': 24,
         'remat': 'none', 'dtype': 'float32'}
# With the heads: RoBERTa's LoRA alone is 294,912.
TRAINED = {'roberta_base_mnli': 887_811, 'gpt2_medium_webnlg': 25_744_896}


def task(c):
  return (instruct if isinstance(c, instruct.Config) else classification).task(c)


def shrunk(c, root):
  chat = isinstance(c, instruct.Config)
  model = {k: v for k, v in SMALL.items() if hasattr(c.model, k)}
  if getattr(c.model, 'positions', '') == 'rotary' and c.model.kv_heads < c.model.heads:
    model['kv_heads'] = 1
  data = {'corpus': str(root / ('chat.jsonl' if chat else 'films.jsonl')), 'tokenizer': str(root / 'x.model'),
          'length': 24, 'batch': 4}
  multipliers = optim.layer_decay(3, 0.8) if c.optim.multipliers else ()
  return config.replace(
      c, model=dataclasses.replace(c.model, **model), data=dataclasses.replace(c.data, **data),
      peft=dataclasses.replace(c.peft, rank=2, width=3, length=3, hidden=min(c.peft.hidden, 5)),
      optim=dataclasses.replace(c.optim, steps=3, warmup=1, decay_steps=0, multipliers=multipliers),
      loop__log_every=1, loop__eval_every=3, checkpoint__every=3)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('tuning')
  texts = ['good film 好电影 bad film 坏电影 the a of say'] * 20
  tokenizers.train_sentencepiece(texts, root / 'x.model', vocab=286, control_symbols=('[CLS]', '[SEP]', '[MASK]',
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
  summary = run.run(c, task(c), tmp_path)
  assert summary['steps'] == 3 and summary['val_loss'] > 0


@pytest.mark.parametrize('module, make', ALL)
def test_what_trains_is_counted(module, make):
  c = make()
  a_task = task(c)
  assert f'{params.count(a_task.specs):,}' in run.describe(c, a_task)
  mask = optim.trainable_mask(optim.Config(freeze=a_task.base.freeze), a_task.specs)
  trained = params.count(params.split(a_task.specs, mask)[0])
  assert 0 < trained <= params.count(a_task.specs)
  assert trained == TRAINED.get(make.__name__, trained)
