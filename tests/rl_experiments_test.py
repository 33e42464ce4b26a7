"""Every config of the experiments that train policies: two iterations at toy size, by the command line where quick."""

import dataclasses
import json

import pytest
import tiny

from experiments import cli, grpo, ppo
from lm import config, policy, reinforce, run
from lm.data import loader
from lm.losses import grpo as grpo_loss
from lm.text import tokenizer as tokenizers

ALL = [pytest.param(m, f, id=f'{m.__name__.split(".")[1]}-{f.__name__}',
                    marks=[pytest.mark.slow] * (f.__name__ != 'cpu_best_of')) for m in (ppo, grpo) for f in m.CONFIGS]
SMALL = {'vocab': 300, 'length': 64, 'layers': 2, 'embed': 16, 'heads': 2, 'kv_heads': 1, 'head_dim': 8, 'mlp': 24,
         'remat': 'none', 'dtype': 'float32'}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('rl')
  texts = ['the film is good 好电影 bad 坏 1 + 2'] * 20
  tokenizers.train_sentencepiece(texts, root / 'x.model', vocab=284, control_symbols=('<|im_start|>', '<|im_end|>'))
  rows = [{'prompt': f'{i} + 8?', 'answer': str(i + 8), 'text': f'{i} film is good and 好电影 bad'}
          for i in range(60)]
  (root / 'rows.jsonl').write_text('\n'.join(json.dumps(r, ensure_ascii=False) for r in rows), encoding='utf-8')
  tiny.write_text(root / 'text.txt')
  return root


def changes(c, root):
  """`--set` of what shrinks a config."""
  data = {'corpus': root / 'rows.jsonl', 'tokenizer': root / 'x.model', 'length': 40 if not c.data.cut else 8,
          'batch': 8, 'cut': min(c.data.cut, 6), 'evaluated': 4}
  rollout = {'new_tokens': 4, 'group': min(c.rollout.group, 2)}
  fields = {f'model.{k}': v for k, v in SMALL.items()} | {f'data.{k}': v for k, v in data.items()}
  fields |= {f'rollout.{k}': v for k, v in rollout.items()}
  fields |= {'optim.steps': 2 * c.updates, 'optim.warmup': 1, 'loop.log_every': 1, 'loop.eval_every': 2}
  return [f'--set={k}={v}' for k, v in fields.items()]


def made(make, root):
  c = config.override(make(), *(s.removeprefix('--set=') for s in changes(make(), root)))
  if isinstance(c, policy.PPO) and c.text != loader.Config():  # a mixture with text, whose corpus a config cannot know
    c = dataclasses.replace(c, text=loader.Config(str(root / 'text.txt'), tokenizer=str(root / 'x.model'), length=16,
                                                  batch=4, split='tail', validation_fraction=0.2))
  return c


@pytest.mark.parametrize('module, make', ALL)
def test_two_iterations(module, make, root, tmp_path, monkeypatch):
  monkeypatch.setattr('lm.budget.peak_flops', lambda device: 1e9)
  c = made(make, root)
  if c.reward == 'model':  # the model is another run's; here the policy alone is tried
    c = config.replace(c, reward='sentiment')
  summary = run.run(c, module.task(c), tmp_path)
  assert summary['steps'] == 2 and 0 <= summary['val_ended'] <= 1 and summary['val_length'] <= 4


@pytest.mark.parametrize('module', [ppo, grpo])
def test_the_command_line_from_start_to_end(module, root, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr('lm.budget.peak_flops', lambda device: 1e9)
  argv = ['x', '--config=cpu', f'--workdir={tmp_path}', *changes(module.cpu(), root)]
  assert cli.run_argv(argv, module.__doc__, module.CONFIGS, module.task, module.after) == 0
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert summary['alarms'] == [] or all(isinstance(a, str) for a in summary['alarms'])
  assert (tmp_path / 'rl.png').stat().st_size > 1000 and 'step 0' in capsys.readouterr().out
  first = json.loads((tmp_path / 'samples.jsonl').read_text(encoding='utf-8').split('\n')[0])
  assert {'prompt', 'reply', 'score', 'step'} <= first.keys()


def test_a_config_is_its_papers(root):
  c = ppo.instructgpt_1b()
  assert c.kept // c.rollout.minibatches == 64 and c.text.batch == 8 * 64 and c.text_weight == 27.8
  assert c.optim.steps // c.updates * c.rows == 256_000 and c.optim.ema == 0.992
  for make in (ppo.ziegler_124m, ppo.tldr_1b):
    c = make()
    assert c.optim.steps // c.updates * c.rows == pytest.approx(1e6, rel=1e-3) and c.updates == 4
  c = grpo.deepseekmath_7b()
  assert (c.rows, c.updates, c.loss.beta, c.rollout.group) == (1024, 1, 0.04, 64)
  assert grpo.dr_grpo_7b().loss == grpo_loss.Config(mean='constant', length=1024, std=False, beta=0.0)
  assert reinforce.task(grpo.cpu(), lambda records, texts: []).around.updates == 1
