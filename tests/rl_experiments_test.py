"""Every config of the experiments that train policies: two iterations at toy size, by the command line where quick."""

import dataclasses
import json

from marks import slow
import pytest
import tiny

from experiments import cli, grpo, ppo, reward, sft
from lm import config, instruct, policy, reinforce, reward_model, run
from lm.data import loader
from lm.losses import grpo as grpo_loss
from lm.text import training

ALL = [pytest.param(m, f, id=f'{m.__name__.split(".")[1]}-{f.__name__}') for m in (ppo, grpo) for f in m.CONFIGS]
SMALL = {'vocab': 300, 'length': 64, 'layers': 2, 'embed': 16, 'heads': 2, 'kv_heads': 1, 'head_dim': 8, 'mlp': 24,
         'remat': 'none', 'dtype': 'float32'}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('rl')
  texts = ['the film is good 好电影 bad 坏 1 + 2'] * 20
  training.train_sentencepiece(texts, root / 'x.model', vocab=284, control_symbols=('<|im_start|>', '<|im_end|>'))
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


def task_of(experiment):
  """(task, after) as its command line has them."""
  return (instruct.task, None) if experiment is sft else (reward_model.task, reward_model.finish)


@pytest.mark.slow
@pytest.mark.parametrize('module, make', ALL)
def test_two_iterations(module, make, root, tmp_path, monkeypatch):
  monkeypatch.setattr('lm.budget.peak_flops', lambda device: 1e9)
  c = made(make, root)
  if c.reward == 'model':  # the model is another run's; here the policy alone is tried
    c = config.replace(c, reward='sentiment')
  summary = run.run(c, module.task(c), tmp_path)
  assert summary['steps'] == 2 and 0 <= summary['val_ended'] <= 1 and summary['val_length'] <= 4


@pytest.mark.parametrize('module', [slow(ppo), slow(grpo)])
def test_the_command_line_from_start_to_end(module, root, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr('lm.budget.peak_flops', lambda device: 1e9)
  argv = ['x', '--config=cpu', f'--workdir={tmp_path}', *changes(module.cpu(), root)]
  assert cli.run_argv(argv, module.__doc__, module.CONFIGS, module.task, module.after) == 0
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert isinstance(summary['alarms'], list)
  assert (tmp_path / 'rl.png').stat().st_size > 1000 and 'step 0' in capsys.readouterr().out
  first = json.loads((tmp_path / 'samples.jsonl').read_text(encoding='utf-8').split('\n')[0])
  assert {'prompt', 'reply', 'score', 'step'} <= first.keys()


@pytest.mark.slow
@pytest.mark.parametrize('module', [ppo, grpo])
def test_from_conversations_by_a_reward_model_to_a_policy(module, root, tmp_path, capsys, monkeypatch):
  """sft, then reward on top of it, then a policy that starts from the first and is judged by the second."""
  monkeypatch.setattr('lm.budget.peak_flops', lambda device: 1e9)
  chats = [{'prompt': f'{i} + 8?', 'chosen': 'good 好电影', 'rejected': 'bad 坏'} for i in range(40)]
  (tmp_path / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, chats)))
  talks = [{'messages': [{'role': 'user', 'content': c['prompt']}, {'role': 'assistant', 'content': c['chosen']}]}
           for c in chats]
  (tmp_path / 'talks.jsonl').write_text('\n'.join(map(json.dumps, talks)))

  def train(experiment, name, out, *more):
    make = getattr(experiment, name)
    fields = {f'model.{k}': v for k, v in SMALL.items()} | {
        'data.tokenizer': root / 'x.model', 'optim.steps': 4, 'optim.warmup': 1, 'loop.log_every': 1,
        'loop.eval_every': 4, 'checkpoint.every': 4}
    sets = [f'--set={k}={v}' for k, v in fields.items()]
    argv = ['x', f'--config={name}', f'--workdir={tmp_path / out}', *sets, *more]
    assert cli.run_argv(argv, experiment.__doc__, (make,), *task_of(experiment)) == 0, capsys.readouterr().err
    return tmp_path / out

  rows = lambda name: ['--set=data.length=40', '--set=data.batch=8', f'--set=data.corpus={tmp_path / name}']
  first = train(sft, 'smollm2', 'sft', '--set=samples.new_tokens=4', *rows('talks.jsonl'))
  model = train(reward, 'smollm2', 'rm', f'--set=init_from={first}', *rows('pairs.jsonl'))
  argv = ['x', '--config=cpu', f'--workdir={tmp_path / "rl"}', *changes(module.cpu(), root), f'--set=init_from={first}',
          '--set=reward=model', f'--set=reward_from={model}', f'--set=held_out_from={model}']
  assert cli.run_argv(argv, module.__doc__, module.CONFIGS, module.task, module.after) == 0
  summary = json.loads((tmp_path / 'rl' / 'summary.json').read_text())
  assert summary['val_held_out'] == summary['val_score'] != 0


@pytest.mark.slow
@pytest.mark.parametrize(('given', 'part'), [
    ((), "reward_from='': expected the workdir of a finished run"),
    (('--set=reward_from=nowhere',), 'reward_from=nowhere: FileNotFoundError'),
    (('--set=reward_from=x', '--set=reward=sentiment'), "reward_from=x with reward='sentiment'"),
    (('--set=reward=sentiment', '--set=held_out_from=nowhere'), 'held_out_from=nowhere: FileNotFoundError')])
def test_a_missing_judge_is_named_before_anything_is_drawn(given, part, root, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr('lm.rollout.generate', None)
  argv = ['x', '--config=cpu', f'--workdir={tmp_path}', *changes(ppo.cpu(), root), '--set=reward=model', *given]
  assert cli.run_argv(argv, ppo.__doc__, ppo.CONFIGS, ppo.task, ppo.after) == 2
  assert part in capsys.readouterr().err


def test_a_config_is_its_papers(root):
  c = ppo.instructgpt_1b()
  assert c.kept // c.rollout.minibatches == 64 and c.text.batch == 8 * 64 and c.text_weight == 27.8
  assert c.optim.steps // c.updates * c.rows == 256_000 and c.optim.ema == 0.992
  for make in (ppo.ziegler_124m, ppo.tldr_1b):
    c = make()
    assert c.optim.steps // c.updates * c.rows == pytest.approx(1e6, rel=1e-3) and c.updates == 4
  assert ppo.tldr_1b().model == reward.tldr_pythia_1b().model and ppo.tldr_1b().optim.weight_decay == 0.01
  c = ppo.instructgpt_1b().optim  # the value's rate: 9e-6
  assert [c.lr * factor for pattern, factor in c.multipliers if pattern == '^critic/'] == pytest.approx([9e-6])
  c = grpo.dapo_7b()  # 512 x 16 answers, updates of 512
  assert (c.rows, c.rows // c.rollout.minibatches, c.rollout.epochs, c.loss.clip_high) == (8192, 512, 1, 0.28)
  c = grpo.deepseekmath_7b()
  assert (c.rows, c.updates, c.loss.beta, c.rollout.group) == (1024, 1, 0.04, 64)
  assert grpo.dr_grpo_7b().loss == grpo_loss.Config(mean='constant', length=1024, std=False, beta=0.0)
  assert reinforce.task(grpo.cpu(), lambda records, texts: []).around.updates == 1
