"""Policies: what trains, what the reference is, values and log-probabilities before any update, bad configs."""

import dataclasses

import jax
import jax.numpy as jnp
from marks import few, slow
import numpy as np
import pytest

from lm import config, decode, experience, nn, optim, params, peft, policy, rollout, sampler
from lm.data import loader, prompts
from lm.errors import ConfigError
from lm.kernels import attention
from lm.losses import grpo, ppo
from lm.models import decoder

MODEL = decoder.Config(vocab=40, length=48, layers=2, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=32)
METHODS = {'full': peft.Config('full', train=''), 'top': peft.Config('top', train='', layers=1),
           'lora': peft.Config('lora', train='', targets='^blocks/(attn/[qkvo]|mlp/(up|down))$', rank=2),
           'houlsby': peft.Config('houlsby', train='', width=4), 'pfeiffer': peft.Config('pfeiffer', train='', width=4),
           'prefix': peft.Config('prefix', train='', length=3, hidden=5)}


QUICK = few(METHODS, 'lora')


def make(method='lora', kind=policy.PPO, **changes):
  c = kind(model=MODEL, peft=METHODS[method], data=prompts.Config(length=8, batch=4),
           rollout=policy.Rollout(new_tokens=6, epochs=2, group=1 if kind is policy.PPO else 2),
           optim=optim.Config(steps=8))
  return config.replace(c, **changes)


def tree_of(c):
  """(the model's parameters, those of the policy made from them)."""
  given = params.init(decoder.specs(MODEL), jax.random.key(0))
  return given, policy.graft(given, policy.specs(c), jax.random.key(1))


def drawn(c, p, key=2):
  ids_BP = jax.random.randint(jax.random.key(5), (4, 8), 3, 40)
  segments_BP = (jnp.arange(8)[None] >= jnp.array([0, 2, 5, 7])[:, None]).astype(jnp.int32)
  ids_BP, segments_BP = rollout.groups(ids_BP, segments_BP, c.rollout.group)
  s = policy.sampling(c, stop=(1,))

  @jax.jit
  def draw(p):
    q = decode.prepare(peft.plain(policy.policy(p)))
    return rollout.generate(decode.of(decoder, MODEL), q, ids_BP, segments_BP, s, jax.random.key(key))
  return draw(p)


def equal(a, b):
  return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


@pytest.mark.parametrize('method', QUICK)
@pytest.mark.parametrize('value', ['shared', 'separate'])
def test_the_reference_is_what_training_began_with(method, value):
  if (method, value) == ('top', 'separate'):
    pytest.skip('refused')
  c = make(method, value=value)
  given, p = tree_of(c)
  assert params.flatten(policy.specs(c)).keys() == params.flatten(p).keys()
  assert ('reference' in p) == (method in ('full', 'top', 'houlsby'))  # those change weights of the decoder
  changed = jax.tree.map(lambda x, frozen: x if frozen else x + 1, p, params.match(p, policy.freeze(c)))
  assert equal(policy.reference(changed), given)
  assert not equal(policy.policy(changed), policy.policy(p))
  assert 'value' in (changed if value == 'shared' else changed['critic'])


@pytest.mark.parametrize('method', METHODS)
def test_heads_train_and_references_do_not(method):
  c = make(method)
  frozen = params.flatten(params.match(policy.specs(c), policy.freeze(c)))
  assert not frozen['value/kernel'] and not frozen['value/bias']
  assert all(x for path, x in frozen.items() if path.startswith('reference/'))
  assert method == 'full' or any(x for path, x in frozen.items() if path.startswith('blocks/'))


@pytest.mark.parametrize('method', QUICK)
def test_before_any_update_the_ratio_is_one_and_nothing_has_moved(method):
  c = make(method, loss__kl__coef=0.3, loss__temperature=0.7)
  _, p = tree_of(c)
  r = drawn(c, p)
  made, stats, carry = experience.learn(c, attention.attend)(p, r, jnp.array([1.0, -2, 0.5, 3]), {'kl_coef': 0.3})
  terms, metrics = experience.loss(c, policy.specs(c), attention.attend)(p, made, None)
  mean = {k: float(t.total / t.weight) for k, t in metrics.items()}
  assert abs(mean['ratio'] - 1) < 1e-6 and mean['approx_kl'] < 1e-11 and mean['clip_fraction'] == 0
  assert (abs(stats['kl']) < 1e-5) == (method != 'prefix')  # which starts anywhere
  assert not np.asarray(made.values_BT).any()  # the value head starts at 0
  assert float(stats['score']) == pytest.approx(0.625) and carry['kl_coef'] == pytest.approx(0.3)
  assert float(terms['policy'].total) == pytest.approx(0, abs=1e-4)  # whitened advantages have mean 0


@pytest.mark.slow
def test_log_probabilities_of_a_rollout_are_the_samplers():
  c = make('full', loss__temperature=1.0)
  _, p = tree_of(c)
  r = drawn(c, p)
  sample = decode.run(decode.of(decoder, MODEL), sampler.Sampling(6, stop=(1,)), decode.prepare(policy.policy(p)),
                      r.batch.ids_BT[:, :8], r.batch.segments_BT[:, :8], jax.random.key(2))
  policy_B, reference_B = experience.judge(c, attention.attend)(p, r)
  np.testing.assert_allclose(policy_B, sample.logprobs_BT.sum(1), atol=2e-4)
  np.testing.assert_array_equal(policy_B, reference_B)


@pytest.mark.parametrize('kind, fields', [
    (policy.PPO, dict(value='separate')), slow(policy.PPO, {}), slow(policy.GRPO, dict(loss__beta=0.1))])
def test_the_samplers_log_probabilities_save_a_pass(kind, fields):
  """They are the model's to rounding, and with them the program that learns runs a trunk less where it can."""
  some = {name: make('lora', kind, loss__temperature=0.7, rollout__logprobs=name, **fields)
          for name in ('model', 'sampler')}
  _, p = tree_of(some['model'])
  r, scores_B = drawn(some['model'], p), jnp.arange(4.0 * some['model'].rollout.group)
  found, flops = {}, {}
  for name, c in some.items():
    program = jax.jit(experience.learn(c, attention.attend)).lower(p, r, scores_B, {'kl_coef': 0.3}).compile()
    made = program(p, r, scores_B, {'kl_coef': 0.3})[0]
    found[name], flops[name] = made.logprobs_BT if kind is policy.PPO else made.old_BT, program.cost_analysis()['flops']
  np.testing.assert_allclose(found['sampler'], found['model'], atol=1e-5)
  forward = some['model'].passes[0] - 1  # without the drawing
  if some['sampler'].passes == some['model'].passes:
    assert kind is policy.PPO and fields == {}  # the value is asked of the policy's trunk
  else:
    assert flops['sampler'] == pytest.approx(flops['model'] * (forward - 1) / forward, rel=0.1)


@pytest.mark.slow
def test_a_critic_reads_its_own_trunk():
  c = make('full', value='separate')
  _, p = tree_of(c)
  p['critic']['value']['kernel'] = jnp.arange(16.0)
  r = drawn(c, p)
  values = lambda p: experience.learn(c, attention.attend)(p, r, jnp.zeros(4), {'kl_coef': 0.1})[0].values_BT
  bent = lambda tree: tree | {'final_norm': jax.tree.map(lambda x: x * 2 + 1, tree['final_norm'])}
  np.testing.assert_array_equal(values(bent(p)), values(p))
  assert not np.array_equal(values(p | {'critic': bent(p['critic'])}), values(p))


@pytest.mark.slow
@pytest.mark.parametrize('kind', [policy.PPO, policy.GRPO])
def test_the_penalty_is_for_leaving_what_training_began_with(kind):
  c = make('lora', kind, **({'loss__kl': ppo.KL(coef=0.3, target=0.1, horizon=40)} if kind is policy.PPO else {}))
  given, p = tree_of(c)
  moved = lambda x: x + 0.5 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
  p = jax.tree.map(lambda x, frozen: x if frozen else moved(x), p, params.match(p, policy.freeze(c)))
  r, scores_B = drawn(c, p), jnp.arange(4.0 * c.rollout.group)
  apply, _, head = policy.bind(c, attention.attend)

  @jax.jit
  def found(p, given):
    said = lambda p: rollout.score(p, r, policy.sampling(c), apply=apply, head=head)[0]
    made = experience.learn(c, attention.attend)(p, r, scores_B, {'kl_coef': jnp.float32(0.3)})
    return said(p), said(given), made, experience.judge(c, attention.attend)(p, r)
  now_BT, began_BT, (made, stats, carry), judged = found(p, given)
  assert abs(now_BT - began_BT).max() > 0.1
  if kind is policy.PPO:
    kl = float((now_BT - began_BT).sum(1).mean())
    np.testing.assert_allclose(made.logprobs_BT, now_BT, atol=1e-5)
    assert float(stats['kl']) == pytest.approx(kl, rel=1e-5)
    assert float(carry['kl_coef']) == pytest.approx(float(ppo.adapt(0.3, kl, c.rows, c.loss.kl))) != pytest.approx(0.3)
  else:
    np.testing.assert_allclose(made.old_BT, now_BT, atol=1e-5)
    np.testing.assert_allclose(made.reference_BT, began_BT, atol=1e-5)
  for got_B, want_BT in zip(judged, (now_BT, began_BT), strict=True):
    np.testing.assert_allclose(got_B, want_BT.sum(1), atol=1e-5)


@pytest.mark.slow
def test_groups_and_the_best_of_them():
  c = make('full', policy.GRPO, loss=grpo.Config(beta=0.1))
  _, p = tree_of(c)
  r, scores_B = drawn(c, p), jnp.array([0.0, 1, 2, 2, 5, 3, 1, 0.5])
  made, stats, _ = experience.learn(c, attention.attend)(p, r, scores_B, None)
  assert float(stats['equal_groups']) == 0.25 and made.old_BT is not None and made.reference_BT is not None
  assert np.asarray(made.advantages_B)[2:4].tolist() == [0, 0] and made.advantages_B[1] > 0 > made.advantages_B[0]
  once = config.replace(c, rollout=dataclasses.replace(c.rollout, epochs=1), loss=grpo.Config(beta=0.0))
  made, _, _ = experience.learn(once, attention.attend)(p, r, scores_B, None)
  assert made.old_BT is None and made.reference_BT is None
  best = make('full', policy.BestOf)
  rows, stats, _ = experience.learn(best, attention.attend)(p, r, scores_B, None)
  np.testing.assert_array_equal(rows.ids_BT, r.batch.ids_BT[jnp.array([1, 2, 4, 6])])
  assert float(stats['best']) == 2.25 and best.kept == 4 and best.rows == 8


@pytest.mark.slow
@pytest.mark.parametrize('kind', [policy.PPO, policy.GRPO])
def test_what_a_prompt_says_is_not_scored(kind):
  """Logits begin where responses do; the gradient is that of scoring all and masking."""
  c = make('full', kind)
  _, p = tree_of(c)
  r, scores_B = drawn(c, p), jnp.arange(4.0 * c.rollout.group) ** 2
  made, _, _ = experience.learn(c, attention.attend)(p, r, scores_B, {'kl_coef': 0.1})
  assert made.start == 7
  loss = experience.loss(c, policy.specs(c), attention.attend)
  grad = jax.grad(lambda p, made: sum(t.total for t in loss(p, made, None)[0].values()))
  got, want = grad(p, made), grad(p, made.replace(start=0))
  assert max(abs(g).max() for g in jax.tree.leaves(want)) > 0.1
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


@pytest.mark.parametrize(('changes', 'named'), [
    ({'rollout__new_tokens': 41}, 'rollout.new_tokens=41'), ({'rollout__minibatches': 3}, 'data.batch=4'),
    ({'optim__steps': 7}, 'optim.steps=7'), ({'peft': peft.Config('prompt', train='')}, "peft.method='prompt'"),
    ({'model__dropout': nn.Dropout(hidden=0.1)}, 'model.dropout='), ({'optim__freeze': 'embed'}, 'optim.freeze=embed'),
    ({'peft': peft.Config('lora', train='', targets='attn/q', rate=0.1)}, 'peft.rate=0.1'),
    ({'loss': ppo.Config(missing_eos=1.0), 'rollout__end': False}, 'loss.missing_eos=1.0: no response ends'),
    ({'value': 'separate', 'peft': METHODS['top']}, "value='separate'"),
    ({'text': loader.Config('x', length=65, batch=4)}, 'text.length=65 is more'),
    ({'loss': ppo.Config(kl=ppo.KL(target=6.0, horizon=1)), 'data__batch': 8}, 'loss.kl.horizon=1'),
    ({'rollout__epochs': 0}, 'rollout.epochs=0'), ({'text_weight': -1.0}, 'text_weight=-1.0')])
def test_what_cannot_be_is_refused(changes, named):
  with pytest.raises(ConfigError, match=named.replace('.', r'\.').replace('(', r'\(')):
    make('full', **changes)


def test_groups_need_two():
  with pytest.raises(ConfigError, match=r'rollout\.group=1'):
    make('full', policy.GRPO, rollout=policy.Rollout(new_tokens=6, epochs=2, group=1))
  with pytest.raises(ConfigError, match=r'loss\.length=5'):
    make('full', policy.GRPO, loss=grpo.Config(mean='constant', length=5))
  with pytest.raises(ConfigError, match=r'rollout\.stop_kl=0\.1'):
    make('full', policy.GRPO, rollout=policy.Rollout(new_tokens=6, epochs=2, group=2, stop_kl=0.1))
  with pytest.raises(ConfigError, match='sampling_temperature=0'):
    make('full', policy.BestOf, sampling_temperature=0.0)
  with pytest.raises(ConfigError, match="rollout.logprobs='sampler'.*asks for no ratio"):
    make('full', policy.BestOf, rollout__logprobs='sampler')
  assert isinstance(make().loss, ppo.Config)
