"""Policy training as a run: each objective learns, resumes bitwise, runs on a mesh, and refuses bad rewards."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import fake_devices
import jax
import jobs
import numpy as np
import pytest
import tiny

from lm import (
  budget,
  checkpoint,
  config,
  logs,
  loop,
  optim,
  params,
  peft,
  policy,
  reinforce,
  reward_model,
  run,
  samples,
  sharding,
  start,
  train,
  weights,
)
from lm.data import loader, preferences, prompts
from lm.errors import ConfigError, DataError, Preempted
from lm.kernels import attention
from lm.losses import ar, grpo, ppo
from lm.models import decoder, hf
from lm.text import tokenizer

MODEL = decoder.Config(vocab=258, length=40, layers=2, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32)
EVERY = dict(data=2, fsdp=2, tensor=2)
KINDS = {policy.PPO: ppo.Config(kl=ppo.KL(coef=0.02, target=1.0, horizon=50)), policy.GRPO: grpo.Config(beta=0.02),
         policy.BestOf: ar.Config()}


def low(records, responses):
  """The share of tokens that are ASCII characters: half of them at the start."""
  return [sum(c.isascii() for c in text) / 8 for text in responses]


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('rl')
  lines = [json.dumps({'prompt': f'{word} {i}', 'split': 'validation' if i > 15 else 'train'}, ensure_ascii=False)
           for i in range(20) for word in ('say', '说')]
  (root / 'prompts.jsonl').write_text('\n'.join(lines), encoding='utf-8')
  tiny.write_text(root / 'text.txt')
  hf.save(root / 'base', MODEL, jax.device_get(params.init(decoder.specs(MODEL), jax.random.key(3))))
  return root


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  tiny.share_compiled(monkeypatch)


def make(root, kind=policy.PPO, **changes):
  c = kind(
      model=MODEL, init_from=str(root / 'base'), peft=peft.Config('full', train=''), loss=KINDS[kind],
      data=prompts.Config(str(root / 'prompts.jsonl'), template='none', tokenizer='byte', length=12, batch=8),
      rollout=policy.Rollout(new_tokens=8, end=False, epochs=2, group=1 if kind is policy.PPO else 4, samples=3),
      optim=optim.Config(lr=0.01, schedule='constant', steps=12, weight_decay=0.0, b2=0.99),
      loop=loop.Config(log_every=1, eval_every=3, eval_first=True),
      checkpoint=checkpoint.Config(every=2, metric='val_score', mode='max'))
  return config.replace(c, **changes)


def rows_of(workdir):
  """What was logged, but for what a clock says."""
  return [{k: v for k, v in row.items() if k not in ('tokens_per_s', 'mfu', 'elapsed_s')} for row in logs.read(workdir)]


def state_of(c, task, workdir):
  parts = run.build(c, task)
  abstract = start.abstract(task, parts)
  kept = abstract.replace(frozen=jax.tree.map(lambda x: None, abstract.frozen))
  step, state, _ = checkpoint.restore(workdir / 'checkpoints', kept, log=lambda line: None)
  return step, params.flatten(state.params) | (state.carry or {})


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_the_score_rises(kind, root, tmp_path, capsys):
  c = make(root, kind, data__batch=16, optim__steps=40, loop__eval_every=20, optim__lr=0.02)
  summary = run.run(c, reinforce.task(c, low, held_out=lambda records, texts: [-x for x in low(records, texts)]),
                    tmp_path)
  first = logs.read(tmp_path)[0]
  assert first['step'] == 0 and abs(first['val_kl']) < 1e-4
  assert summary['val_score'] > first['val_score'] + 0.1 and summary['val_held_out'] == -summary['val_score']
  assert summary['val_kl'] > 0.1 and summary['steps'] == 20 and summary['best']['step'] == 20
  assert summary['tokens'] == 20 * c.rows * 20
  assert capsys.readouterr().out.count('alarm: ') >= 1  # what nobody trains for fell
  shown = samples.read(tmp_path)
  assert [row['step'] for row in shown] == [0] * 3 + [20] * 3
  assert all(math.isclose(row['score'], low(None, [row['reply']])[0], abs_tol=1e-6) for row in shown)


class Stop:
  """`low`, until SIGTERM comes at its `call`-th call, or an end that leaves no time to save anything."""

  def __init__(self, call, number=None):
    self._left, self._number = call, number

  def __call__(self, records, responses):
    self._left -= 1
    if not self._left and self._number is None:
      raise KeyError('gone')
    if not self._left:
      os.kill(os.getpid(), self._number)
    return low(records, responses)


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'method'), [
    (policy.PPO, 'lora'), (policy.GRPO, 'full'), (policy.BestOf, 'full')])
def test_a_run_stopped_in_the_middle_of_an_iteration_goes_on_as_if_it_had_not(kind, method, root, tmp_path):
  c = make(root, kind, peft__method=method, peft__targets='^blocks/attn/[qkvo]$')
  run.run(c, reinforce.task(c, low), tmp_path / 'straight')
  task = reinforce.task(c, Stop(4 + 2))  # one call at step 0, then one an iteration, one at the evaluation after three
  with pytest.raises(DataError, match='KeyError'):
    run.run(c, task, tmp_path / 'killed')
  assert checkpoint.steps(tmp_path / 'killed' / 'checkpoints')[-1] < 5
  with pytest.raises(Preempted):
    run.run(c, reinforce.task(c, Stop(2, signal.SIGTERM)), tmp_path / 'killed')
  run.run(c, reinforce.task(c, low), tmp_path / 'killed')
  assert rows_of(tmp_path / 'straight') == rows_of(tmp_path / 'killed')
  assert samples.read(tmp_path / 'straight') == samples.read(tmp_path / 'killed')
  (step, one), (_, other) = (state_of(c, reinforce.task(c, low), tmp_path / name) for name in ('straight', 'killed'))
  assert step == 6 and all(np.array_equal(one[k], other[k]) for k in one)
  assert kind is not policy.PPO or float(one['kl_coef']) != c.loss.kl.coef  # it has adapted, and went on from there


@pytest.mark.slow
def test_evaluations_count_the_penalty_of_what_did_not_end(root, tmp_path):
  c = make(root, loss=ppo.Config(missing_eos=1.0, missing_eos_mode='replace'), rollout__end=True, optim__steps=4)
  run.run(c, reinforce.task(c, lambda records, responses: [0.5] * len(responses)), tmp_path)
  rows = logs.read(tmp_path)
  assert any(row['val_ended'] < 1 for row in rows if 'val_ended' in row)
  for row in rows:
    for name in {'score', 'val_score'} & row.keys():
      ended = row[name.replace('score', 'ended')]
      assert row[name] == pytest.approx(0.5 * ended - (1 - ended), abs=1e-6)
      assert row[f'{name}_std'] == pytest.approx(1.5 * math.sqrt(ended * (1 - ended)), abs=1e-6)


@pytest.mark.slow
def test_a_fixed_coefficient_may_be_another_after_resuming(root, tmp_path):
  changes = dict(loss=ppo.Config(kl=ppo.KL(coef=0.02)), loop__eval_first=False, loop__eval_every=0, checkpoint__every=1)
  c = make(root, optim__steps=2, **changes)
  run.run(c, reinforce.task(c, low), tmp_path)
  c = config.replace(c, optim__steps=4, loss__kl__coef=0.5)
  run.run(c, reinforce.task(c, low), tmp_path, resume_with_changes=True)
  assert [row['kl_coef'] for row in logs.read(tmp_path)] == [np.float32(0.02), 0.5]


@pytest.mark.slow
def test_a_killed_process_leaves_what_a_new_one_goes_on_from(root, tmp_path):
  """SIGKILL between the rollout and its updates, in the middle of the fifth iteration."""
  code = ("import sys; sys.path.insert(0, 'tests'); import conftest, pathlib, reinforce_test as t; from lm import "
          f"reinforce, run; c = t.make(pathlib.Path({str(root)!r})); run.run(c, reinforce.task(c, t.Stop(7, 9)), "
          f"{str(tmp_path / 'killed')!r})")
  done = subprocess.run([sys.executable, '-c', code], cwd=pathlib.Path(__file__).parent.parent, check=False)
  assert done.returncode == -signal.SIGKILL and 0 < checkpoint.steps(tmp_path / 'killed' / 'checkpoints')[-1] < 5
  c = make(root)
  for name in ('killed', 'straight'):
    run.run(c, reinforce.task(c, low), tmp_path / name)
  assert rows_of(tmp_path / 'straight') == rows_of(tmp_path / 'killed')


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'changes', 'meshes'), [
    (policy.PPO, {}, [dict(data=8), EVERY]), (policy.GRPO, {}, [EVERY]),
    (policy.PPO, {'value': 'separate', 'rollout__logprobs': 'sampler'}, [EVERY]), (policy.BestOf, {}, [dict(fsdp=8)])])
def test_any_mesh_gives_the_curve_of_one_device(kind, changes, meshes, root, tmp_path):
  curves = []
  for i, mesh in enumerate([{}, *meshes]):
    # A large eps, so that Adam makes no steps of full size out of gradients that are near rounding.
    c = make(root, kind, mesh=sharding.Config(**mesh), optim__steps=6, loop__eval_every=3, optim__lr=1e-3,
             optim__eps=1e-3, **changes)
    run.run(c, reinforce.task(c, low), tmp_path / str(i))
    curves.append(rows_of(tmp_path / str(i)))
  for curve in curves[1:]:
    same(curves[0], curve)


def same(curve, other):
  for one, two in zip(curve, other, strict=True):
    assert one.keys() == two.keys()
    for k in one:
      if k not in ('mfu', 'explained_variance'):  # the latter divides by what is near 0 at the start
        assert one[k] == pytest.approx(two[k], rel=2e-3, abs=2e-4), k


def judge(root, tmp_path, method='full'):
  """The workdir of a reward model."""
  graded = [{'prompt': '', 'answers': [f'aaa {i}', f'bbb {i}'], 'grades': [1, 0], 'split': 'validation' if i > 9 else
             'train'} for i in range(16)]
  (tmp_path / 'graded.jsonl').write_text('\n'.join(map(json.dumps, graded)))
  scored = reward_model.Decoder(
      model=MODEL, init_from=str(root / 'base'), peft=peft.Config(method, rank=2), optim=optim.Config(lr=0.01, steps=4),
      data=preferences.Config(str(tmp_path / 'graded.jsonl'), template='none', tokenizer='byte', length=19, batch=4),
      loop=loop.Config(eval_every=4), checkpoint=checkpoint.Config(every=4, metric='val_accuracy', mode='max'))
  run.run(scored, reward_model.task(scored), tmp_path / 'reward')
  reward_model.finish(scored, tmp_path / 'reward')
  return tmp_path / 'reward'


@pytest.mark.slow
@pytest.mark.parametrize('method, mesh', [('full', dict(data=8)), ('lora', EVERY)])
def test_models_of_workdirs_serve_on_any_mesh(method, mesh, root, tmp_path):
  """Policy, critic and reward model from runs on one device, whose arrays lie there."""
  judge(root, tmp_path, method)
  first = make(root, optim__steps=2, loop__eval_first=False)
  run.run(first, reinforce.task(first, low), tmp_path / 'first')
  for name, where in (('one', {}), ('eight', mesh)):
    run.run(*of_workdirs(root, tmp_path, mesh=sharding.Config(**where)), tmp_path / name)
  same(rows_of(tmp_path / 'one'), rows_of(tmp_path / 'eight'))


def of_workdirs(root, folder, **changes):
  """A policy, its critic and judge out of the workdirs in a folder."""
  c = make(root, value='separate', critic_from=str(folder / 'reward'), init_from=str(folder / 'first'), optim__lr=1e-3,
           optim__steps=4, optim__eps=1e-3, **changes)
  return c, reinforce.task(c, reward_model.reward(folder / 'reward', 'reward_from'))


@pytest.mark.slow
def test_two_processes_are_one(root, tmp_path):
  """With models that each process reads for itself, on the first of its four devices."""
  judge(root, tmp_path, 'lora')
  first = make(root, optim__steps=2, loop__eval_first=False)
  run.run(first, reinforce.task(first, low), tmp_path / 'first')
  run.run(*of_workdirs(root, tmp_path), tmp_path / 'one')
  code = ("import pathlib, sys; sys.path.insert(0, 'tests'); import fake_devices; fake_devices.use(4); "
          "from lm import hosts, run, sharding; hosts.join(sys.argv[1], 30, 120); import reinforce_test as t; "
          "root, out = map(pathlib.Path, sys.argv[2:]); "
          "run.run(*t.of_workdirs(root, out, mesh=sharding.Config(data=8)), out / 'two'); hosts.leave()")
  where, env = f'127.0.0.1:{jobs.port()}', os.environ | {'XLA_FLAGS': fake_devices.QUICK}
  both = [subprocess.Popen([sys.executable, '-c', code, f'{where},2,{i}', root, tmp_path], cwd=jobs.ROOT, env=env,
                           stderr=subprocess.PIPE, text=True) for i in range(2)]
  said = [process.communicate(timeout=280)[1] for process in both]
  assert [process.returncode for process in both] == [0, 0], said
  same(rows_of(tmp_path / 'one'), rows_of(tmp_path / 'two'))


@pytest.mark.slow
@pytest.mark.parametrize('method', ['full', 'lora', 'prefix'])
def test_a_critic_starts_as_the_reward_model_scores(method, root, tmp_path):
  found = reward_model.load(judge(root, tmp_path, method))
  c = make(root, value='separate', critic_from=str(tmp_path / 'reward'))
  if method == 'prefix':  # a critic has no place for one
    with pytest.raises(ConfigError, match='critic_from=.*parts beside its weights'):
      policy.critic(c)
    return
  base = params.init(decoder.specs(MODEL), jax.random.key(3))
  p = policy.graft(base, policy.specs(c), jax.random.key(1), policy.critic(c))
  rows = found.rows([((), 'aab'), ((), 'bbc d')])
  values_BT = policy.bind(c, attention.attend)[1](p, rows.ids_BT, positions_BT=rows.positions_BT,
                                                  segments_BT=rows.segments_BT)[1]
  last_B = (rows.segments_BT > 0).sum(1) - 1
  np.testing.assert_allclose(values_BT[np.arange(2), last_B], found.score(found.params, rows), atol=1e-5)
  run.run(config.replace(c, optim__steps=2), reinforce.task(config.replace(c, optim__steps=2), low), tmp_path / 'run')
  (tmp_path / 'reward' / 'tokenizer' / 'byte.json').unlink()
  other = tokenizer.char('abc')
  other.save(tmp_path / 'reward' / 'tokenizer')
  with pytest.raises(ConfigError, match='critic_from=.*its tokenizer gives other ids'):
    run.run(c, reinforce.task(c, low), tmp_path / 'other')
  with pytest.raises(ConfigError, match='critic_from=.*of another shape'):
    policy.critic(config.replace(c, model__mlp=24))
  with pytest.raises(ConfigError, match="critic_from=.*value='shared'"):
    make(root, critic_from='x')


@pytest.mark.slow
def test_a_mixture_with_text_learns_from_both_and_goes_on(root, tmp_path):
  said = (root / 'text.txt').read_text()
  (tmp_path / 'text.txt').write_text(said)
  text = loader.Config(str(tmp_path / 'text.txt'), tokenizer='byte', split='tail', validation_fraction=0.1, length=16,
                       batch=4)
  c = make(root, text=text, text_weight=5.0, optim__steps=10, rollout__stop_kl=1e-4, rollout__epochs=2)
  run.run(c, reinforce.task(c, low), tmp_path / 'straight')
  with pytest.raises(Preempted):  # some iterations have ended early by then: texts are counted by updates
    run.run(c, reinforce.task(c, Stop(6, signal.SIGTERM)), tmp_path / 'killed')
  (tmp_path / 'text.txt').write_text(f'{said}and more')
  with pytest.raises(ConfigError, match='data differs from the saved run .text: '):
    run.run(c, reinforce.task(c, low), tmp_path / 'killed')
  (tmp_path / 'text.txt').write_text(said)
  run.run(c, reinforce.task(c, low), tmp_path / 'killed')
  rows = rows_of(tmp_path / 'straight')
  assert rows[-1]['ptx_loss'] < rows[1]['ptx_loss'] - 0.05 and rows == rows_of(tmp_path / 'killed')
  c = config.replace(c, text__tokenizer='char')
  with pytest.raises(ConfigError, match="text.tokenizer='char' is not data.tokenizer='byte'"):
    run.run(c, reinforce.task(c, low), tmp_path / 'other')


@pytest.mark.slow
def test_a_run_goes_on_under_the_judge_that_it_began_with(root, tmp_path):
  c, judge, other = make(root), Stop(4, signal.SIGTERM), Stop(99)
  judge.fingerprint, other.fingerprint = lambda: 'one', lambda: 'another'
  with pytest.raises(Preempted):
    run.run(c, reinforce.task(c, judge), tmp_path)
  with pytest.raises(ConfigError, match="reward: 'one' -> 'another'"):
    run.run(c, reinforce.task(c, other), tmp_path)


@pytest.mark.slow
def test_no_further_pass_once_the_policy_has_moved_enough(root, tmp_path):
  c = make(root, rollout__epochs=4, rollout__stop_kl=1e-9, optim__steps=8)
  run.run(c, reinforce.task(c, low), tmp_path)
  rows = [row for row in logs.read(tmp_path) if row['step']]
  assert [row['updates'] for row in rows] == [2, 2]  # the first moves nothing before it, the second stops


@pytest.mark.slow
def test_the_logged_rate_is_that_of_an_iterations_first_update(root, tmp_path):
  c = make(root, optim__schedule='linear')
  run.run(c, reinforce.task(c, low), tmp_path)
  rates = [row['learning_rate'] for row in logs.read(tmp_path) if row['step']]
  assert rates == pytest.approx([float(optim.schedule(c.optim)(2 * i)) for i in range(6)]) and rates[0] > rates[-1] > 0


@pytest.mark.parametrize(('kind', 'changes', 'steps'), [
    (policy.PPO, {}, 3), (policy.PPO, {'value': 'separate'}, 16 / 3), (policy.GRPO, {}, 3),
    (policy.GRPO, {'loss__beta': 0.0, 'rollout__epochs': 1}, 4 / 3), (policy.BestOf, {}, 1 / 3 + 2 / 4),
    (policy.PPO, {'text': loader.Config('x', length=20, batch=4)}, 3 + 2 * 4 / 8)])
def test_flops_are_those_of_every_pass(kind, changes, steps, root):
  """In training steps on an iteration's rows: a forward pass is a third of one."""
  c = make(root, kind, **changes)
  plain = budget.training_flops(decoder.specs(MODEL), 16, 2, 20)
  assert reinforce.task(c, low).flops.total == pytest.approx(steps * plain.total)


def test_flops_leave_out_gradients_of_frozen_weights(root):
  flops = reinforce.task(make(root, peft=peft.Config('lora', train='')), low).flops
  plain = budget.training_flops(decoder.specs(MODEL), 16, 2, 20)
  assert flops.matmul == pytest.approx((1 + 2 * 2 / 3) * plain.matmul)  # three forward passes, two epochs of updates
  assert flops.attention == pytest.approx(3 * plain.attention)


def test_microbatches_are_of_responses_not_of_prompts(root):
  assert make(root, policy.GRPO, optim__microbatches=16).kept == 32
  for changes in ({'optim__microbatches': 64}, {'mesh': sharding.Config(data=16)}):
    with pytest.raises(ConfigError, match='data.batch=8: 32 rows .* are not divisible by .*, or prompts'):
      make(root, policy.GRPO, **changes)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:optim.lr')
def test_the_same_weights_answer_the_same_prompts_anew_in_each_iteration(root, tmp_path, monkeypatch):
  seen, batches = [], prompts.train_batches

  def first_again(data, place, start=0):
    batch = next(batches(data, place))
    while True:
      yield batch
  monkeypatch.setattr(prompts, 'train_batches', first_again)
  c = make(root, optim__lr=0.0, optim__steps=4, loop__eval_first=False, loop__eval_every=0)
  run.run(c, reinforce.task(c, lambda records, texts: seen.append((records, texts)) or low(records, texts)), tmp_path)
  (one, some), (same, others), *_ = seen
  assert one == same and some != others


@pytest.mark.slow
def test_an_evaluation_is_of_the_average_on_each_held_out_prompt_once(root, tmp_path):
  seen = []
  reward = lambda records, texts: seen.append(records) or [float(record.prompt.split()[1]) for record in records]
  c = make(root, optim__ema=1 - 1e-6, optim__steps=4, optim__lr=0.05, data__batch=6, loop__eval_first=False)
  summary = run.run(c, reinforce.task(c, reward), tmp_path)
  held_out = sorted(record.prompt for records in seen[2:] for record in records)
  assert held_out == sorted(f'{word} {i}' for i in range(16, 20) for word in ('say', '说'))
  assert summary['val_score'] == 17.5 and abs(summary['val_kl']) < 1e-4
  assert abs(logs.read(tmp_path)[-1]['kl']) > 1e-2  # of the policy itself


def test_a_summary_is_of_responses_and_of_tokens():
  of = {'score': [1.0, 4.0, 1.0, 2.0], 'length': [2.0, 4.0, 1.0, 3.0], 'ended': [1.0, 0.0, 1.0, 1.0],
        'policy': [-1.0, -8.0, -2.0, -4.0], 'reference': [-3.0, -9.0, -2.0, -11.0], 'held_out': [5.0, 1.0, 1.0, 5.0]}
  found = reinforce._summary({k: np.array(x) for k, x in of.items()})
  assert found == pytest.approx({
      'val_score': 2, 'val_score_std': math.sqrt(1.5), 'val_score_se': math.sqrt(1.5) / 2, 'val_kl': 10 / 4,
      'val_entropy': 15 / 10, 'val_reference_nll': 25 / 10, 'val_length': 2.5, 'val_ended': 0.75, 'val_held_out': 3,
      'val_held_out_se': 1})


@pytest.mark.slow
def test_updates_see_every_row_once_a_pass(root, tmp_path, monkeypatch):
  seen = []
  c = make(root, rollout__minibatches=2, optim__steps=4)
  task = reinforce.task(c, low)
  build = run.build

  def recording(*args):
    parts = build(*args)

    def step(state, batch, key):
      seen.append(np.asarray(batch.batch.ids_BT))
      return parts.step(state, batch, key)
    return run.Parts(*(step if name == 'step' else getattr(parts, name) for name in run.Parts.__dataclass_fields__))
  monkeypatch.setattr(run, 'build', recording)
  run.run(c, task, tmp_path)
  assert [x.shape for x in seen] == [(4, 20)] * 4
  one, two = (sorted(map(bytes, np.concatenate(seen[i:i + 2]))) for i in (0, 2))
  assert one == two and not np.array_equal(seen[0], seen[2])


@pytest.mark.slow
@pytest.mark.parametrize(('reward', 'said'), [
    (lambda records, texts: [math.nan] * len(texts), 'nan'), (lambda records, texts: [0.5], '1 numbers for 8'),
    (lambda records, texts: 1 / 0, 'ZeroDivisionError')], ids=['nan', 'short', 'raises'])
def test_a_reward_that_fails_ends_the_run_with_its_name(reward, said, root, tmp_path):
  reward.__name__ = 'mine'
  c = make(root, loop__eval_first=False)
  with pytest.raises(DataError, match=f'mine.*{said}'):
    run.run(c, reinforce.task(c, reward), tmp_path)


def test_fractions_of_a_score_stay(root, tmp_path):
  c = make(root, optim__steps=2, loop__eval_every=0)
  summary = run.run(c, reinforce.task(c, lambda records, texts: [0.73] * len(texts)), tmp_path)
  assert summary['val_score'] == pytest.approx(0.73) and logs.read(tmp_path)[1]['score'] == pytest.approx(0.73)
  assert summary['val_score_std'] == 0


@pytest.mark.slow
@pytest.mark.parametrize(('method', 'value'), [('lora', 'separate'), ('houlsby', 'shared')])
def test_a_trained_policy_is_loaded_without_what_served_training(method, value, root, tmp_path):
  c = make(root, peft__method=method, peft__width=4, value=value, optim__steps=4, loop__eval_every=0)
  run.run(c, reinforce.task(c, low), tmp_path)
  found = weights.load(tmp_path)
  learned = checkpoint.restore_params(tmp_path / 'checkpoints', params.abstract(policy.specs(c)), '/(lora_b|expand)$')
  assert found.config == MODEL and jax.tree.leaves(learned)
  loaded = params.flatten(found.params)
  base = params.flatten(params.init(decoder.specs(MODEL), jax.random.key(3)))
  assert {path.removesuffix('/w') for path in loaded} >= base.keys()
  changed = {path for path, x in base.items() if not np.array_equal(x, loaded.get(path, loaded.get(f'{path}/w')))}
  assert changed and all(('attn/' in path) == (method == 'lora') for path in changed)


@pytest.mark.slow
def test_responses_are_cut_behind_a_token(root, tmp_path):
  c = make(root, optim__steps=2, rollout__cut='e', rollout__cut_after=2, rollout__new_tokens=20, data__evaluated=0)
  seen = []
  run.run(c, reinforce.task(c, lambda records, texts: seen.extend(texts) or [0.0] * len(texts)), tmp_path)
  assert any(len(text) < 20 for text in seen)
  assert not any('e' in text[2:-1] for text in seen)
  c = config.replace(c, rollout__cut='ab')
  with pytest.raises(ConfigError, match="rollout.cut='ab' is 2 tokens"):
    run.run(c, reinforce.task(c, low), tmp_path / 'x')


def test_what_a_step_hands_on_is_kept_in_checkpoints_alone(root):
  c = make(root)
  task = reinforce.task(c, low)
  state = jax.eval_shape(lambda: train.init(task.specs, run.build(c, task).tx, jax.tree.map(lambda s: True, task.specs),
                                            jax.random.key(0), task.around.carry))
  assert state.carry['kl_coef'].shape == () and reinforce.task(make(root, policy.GRPO), low).around.carry is None
