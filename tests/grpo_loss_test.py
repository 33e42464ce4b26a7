"""Group-relative policy optimisation: advantages, the three means, the clip and k3, against loops over tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import parallel, params, sharding, train
from lm.data.packing import Batch
from lm.errors import ConfigError
from lm.losses import grpo

B, T, D, V = 8, 9, 8, 32
LEFT = [3, 0, 1, 0, 2, 0, 0, 0]  # padding before the prompt
PROMPT = [2, 2, 4, 4, 1, 1, 3, 3]
ANSWER = [5, 1, 3, 5, 7, 2, 0, 0]  # the last two: an answer without tokens, a row that fills up
SPECS = {'table': params.Spec((V, D), ('vocab', 'embed'), params.Normal(1.0)),
         'out': params.Spec((V, D), ('vocab', 'embed'), params.Normal(1.0))}
DR = dict(mean='constant', length=T, std=False, beta=0.0)
DAPO = dict(mean='token', clip_high=0.28, beta=0.0)


def apply(p, ids_BT, *, positions_BT, segments_BT, key):
  """Each token sees those before it in its row, with their places."""
  del key
  x_BTD = (p['table'][ids_BT] + 0.1 * positions_BT[..., None]) * (segments_BT > 0)[..., None]
  return jnp.tanh(jnp.cumsum(x_BTD, 1))


def bound(c):
  return functools.partial(grpo.loss, c=c, apply=apply, head=lambda p: p['out'])


def rows():
  left, prompt, answer = (np.array(x)[:, None] for x in (LEFT, PROMPT, ANSWER))
  column = np.arange(T + 1)[None]
  used = (column >= left) & (column < left + prompt + answer) & (np.arange(B)[:, None] < B - 1)
  ids = np.where(used, np.random.default_rng(0).integers(1, V, (B, T + 1)), 0)
  as32 = lambda x: jnp.asarray(x, jnp.int32)
  return Batch(as32(ids), as32(used), as32((column - left) * used), jnp.asarray(used & (column >= left + prompt)))


@pytest.fixture(scope='module')
def p():
  return params.init(SPECS, jax.random.key(5))


@functools.cache
def _logits():
  """f64 [B, T, V]."""
  p, batch = params.init(SPECS, jax.random.key(5)), rows()
  x_BTD = apply(p, batch.ids_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT, key=None)[:, :-1]
  return np.asarray(x_BTD, np.float64) @ np.asarray(p['out'], np.float64).T


def log_softmax(temperature=1.0):
  z = _logits() / temperature
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def batch_of(reference=True, old=True, temperature=1.0):
  """Old and reference log-probabilities near the policy's own; nonsense where there is no target."""
  batch, rng = rows(), np.random.default_rng(4)
  own = np.take_along_axis(log_softmax(temperature), np.asarray(batch.ids_BT)[:, 1:, None], -1)[..., 0]
  near = lambda: jnp.where(batch.mask_BT[:, 1:], jnp.asarray(own + rng.normal(0, 0.4, own.shape), jnp.float32), jnp.inf)
  advantages = jnp.asarray(rng.normal(size=B), jnp.float32)
  return grpo.Batch(batch, advantages, near() if old else None, near() if reference else None)


def value(terms):
  return float(train.objective(terms, {k: t.weight for k, t in terms.items()}))


def test_advantages():
  rewards = jnp.array([[1.0, 0.0, 0.0, 1.0], [0.73, -1.9, 0.2, 0.2]])
  got = grpo.advantages(rewards, grpo.Config())
  r = np.asarray(rewards, np.float64)
  np.testing.assert_allclose(got, (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-4), rtol=1e-5)
  np.testing.assert_allclose(grpo.advantages(rewards, grpo.Config(**DR)), r - r.mean(1, keepdims=True), atol=1e-6)
  np.testing.assert_allclose(grpo.advantages(jnp.array([[1, 0], [0, 3]]), grpo.Config(std=False)),
                             [[0.5, -0.5], [-1.5, 1.5]])


@pytest.mark.parametrize('settings', [{}, DR])
def test_a_group_of_equal_rewards_learns_nothing(p, settings):
  c = grpo.Config(chunk=40, **settings)
  advantages = grpo.advantages(jnp.outer(jnp.array([0.1, 0.73, -1e6, 0.0]), jnp.ones(B)), c)
  np.testing.assert_array_equal(advantages, np.zeros((4, B)))
  batch = batch_of(reference=False).replace(advantages_B=advantages[1])
  grads, objective, metrics = jax.jit(train.accumulate(bound(c)))(p, batch, jax.random.key(0))
  assert objective == 0 and all(np.isfinite(m) for m in metrics.values())
  for g in jax.tree.leaves(grads):
    np.testing.assert_array_equal(g, np.zeros_like(g))


def test_groups_of_one_are_refused():
  with pytest.raises(ConfigError, match='group=1; expected at least 2'):
    grpo.advantages(jnp.ones((4, 1)), grpo.Config())


@pytest.mark.parametrize('settings', [{}, DR, DAPO, {'beta': 0.5, 'mean': 'token', 'temperature': 0.7}])
def test_every_number_against_a_loop(p, settings):
  c = grpo.Config(chunk=40, **settings)
  batch = batch_of(temperature=c.temperature)
  terms, metrics = jax.jit(bound(c))(p, batch, None)
  logp = log_softmax(c.temperature)
  policy, kl, every = [], [], dict.fromkeys(('token_kl', 'entropy', 'clip_fraction', 'n'), 0.0)
  for b in range(B):
    losses, kls = [], []
    for t in np.flatnonzero(batch.rows.mask_BT[b]) - 1:
      own, a = logp[b, t, batch.rows.ids_BT[b, t + 1]], float(batch.advantages_B[b])
      ratio = np.exp(own - float(batch.old_BT[b, t]))
      losses.append(-min(ratio * a, np.clip(ratio, 1 - c.clip, 1 + c.clip_high) * a))
      gap = float(batch.reference_BT[b, t]) - own
      kls.append(np.exp(gap) - gap - 1)
      every['entropy'] -= (np.exp(logp[b, t]) * logp[b, t]).sum()
      every['clip_fraction'] += (a > 0 and ratio > 1 + c.clip_high) or (a < 0 and ratio < 1 - c.clip)
    every['token_kl'] += sum(kls)
    every['n'] += len(kls)
    if losses:
      policy.append(losses)
      kl.append(kls)

  def mean(rows):
    if c.mean == 'token':
      return np.mean(sum(rows, []))
    return np.mean([np.mean(row) if c.mean == 'sequence' else np.sum(row) / T for row in rows])
  assert value(terms) == pytest.approx(mean(policy) + c.beta * mean(kl), rel=1e-4)
  assert float(metrics['policy'].total / metrics['policy'].weight) == pytest.approx(mean(policy), rel=1e-4)
  assert set(metrics) == {'policy', 'token_kl', 'entropy', 'clip_fraction'}
  for name in ('token_kl', 'entropy', 'clip_fraction'):
    assert metrics[name].weight == every['n'] == sum(ANSWER)
    assert float(metrics[name].total) == pytest.approx(every[name], rel=1e-4), name
  assert every['clip_fraction'] > 0


@pytest.mark.parametrize('settings', [{}, DR, DAPO])
def test_a_first_update_is_the_policy_gradient(p, settings):
  """The ratio is 1: the gradient is that of -advantage * log-probability, and nothing is clipped."""
  c = grpo.Config(chunk=40, **settings)
  batch = batch_of(reference=False, old=False)
  terms, metrics = jax.jit(bound(c))(p, batch, None)
  assert metrics['clip_fraction'].total == 0
  counted = np.asarray(batch.rows.mask_BT[:, 1:], np.float32)
  n, rows = counted.sum(1, keepdims=True), (counted.any(1)).sum()
  shares = {'sequence': counted / np.maximum(n, 1) / rows, 'token': counted / n.sum(), 'constant': counted / T / rows}
  assert value(terms) == pytest.approx(-(shares[c.mean] * np.asarray(batch.advantages_B)[:, None]).sum(), rel=1e-5)

  def surrogate(p):
    r = batch.rows
    x_BTD = apply(p, r.ids_BT, positions_BT=r.positions_BT, segments_BT=r.segments_BT, key=None)[:, :-1]
    logp = jax.nn.log_softmax(x_BTD @ p['out'].T)
    own = jnp.take_along_axis(logp, r.ids_BT[:, 1:, None], -1)[..., 0]
    return -(shares[c.mean] * batch.advantages_B[:, None] * own).sum()
  want = jax.jit(jax.grad(surrogate))(p)
  got = jax.jit(train.accumulate(bound(c)))(p, batch, jax.random.key(0))[0]
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert abs(b).max() > 0.01


def test_the_clip_stops_what_has_gone_far_enough():
  """DAPO's higher upper end lets unlikely tokens grow on; what went the wrong way is always pulled back."""
  ratio = jnp.array([[1.25, 1.25, 0.75, 0.75], [1.3, 1.3, 0.5, 1.0]])
  advantage = jnp.array([[1.0, -1.0, 1.0, -1.0], [1.0, -1.0, -2.0, 3.0]])
  slope = lambda c: jax.grad(lambda x: grpo.clipped(x, advantage, c)[0].sum())(jnp.log(ratio))
  plain, dapo = grpo.Config(), grpo.Config(**DAPO)
  np.testing.assert_allclose(slope(plain), [[0, 1.25, -0.75, 0], [0, 1.3, 0, -3]], rtol=1e-6)
  np.testing.assert_allclose(slope(dapo), [[-1.25, 1.25, -0.75, 0], [0, 1.3, 0, -3]], rtol=1e-6)
  value, stopped = grpo.clipped(jnp.log(ratio), advantage, plain)
  np.testing.assert_allclose(value, [[-1.2, 1.25, -0.75, 0.8], [-1.2, 1.3, 1.6, -3]], rtol=1e-6)
  np.testing.assert_array_equal(stopped, [[True, False, False, True], [True, False, True, False]])


def test_k3():
  """Golden values; its mean over what the policy draws is the divergence itself, whatever the two are."""
  np.testing.assert_allclose(grpo.k3(jnp.array([0.2, -0.5])), [0.021403, 0.106531], atol=1e-6)
  logits = jax.random.normal(jax.random.key(0), (2, 50))
  policy, reference = jax.nn.log_softmax(2 * logits)
  kl = (jnp.exp(policy) * (policy - reference)).sum()
  assert float((jnp.exp(policy) * grpo.k3(reference - policy)).sum()) == pytest.approx(float(kl), rel=1e-5)
  assert (grpo.k3(jnp.linspace(-3, 3, 101)) >= 0).all()


def test_the_penalty_pulls_towards_the_reference(p):
  """A tenfold beta counts tenfold, and at the reference itself nothing pulls."""
  still = batch_of().replace(advantages_B=jnp.zeros(B))
  gradient = lambda beta, batch: jax.jit(train.accumulate(bound(grpo.Config(beta=beta))))(p, batch, jax.random.key(0))
  one, ten = gradient(0.04, still), gradient(0.4, still)
  for a, b in zip(jax.tree.leaves(one[:2]), jax.tree.leaves(ten[:2]), strict=True):
    assert abs(a).max() > 1e-4
    np.testing.assert_allclose(10 * a, b, rtol=1e-4, atol=1e-7)
  own = np.take_along_axis(log_softmax(), np.asarray(still.rows.ids_BT)[:, 1:, None], -1)[..., 0]
  for g in jax.tree.leaves(gradient(0.4, still.replace(reference_BT=jnp.asarray(own, jnp.float32)))[0]):
    np.testing.assert_allclose(g, np.zeros_like(g), atol=1e-5)


@pytest.mark.parametrize('settings, how', [({}, 'microbatches'), (DR | {'beta': 0.1}, 'mesh'), (DAPO, 'microbatches')])
def test_parts_are_the_whole(p, settings, how):
  batch, key, loss = batch_of(), jax.random.key(2), bound(grpo.Config(chunk=40, **settings))
  want = jax.jit(train.accumulate(loss))(p, batch, key)
  if how == 'microbatches':
    got = jax.jit(train.accumulate(loss, 4))(p, batch, key)
  else:
    c = sharding.Config(data=2, fsdp=2, tensor=2)
    mesh = sharding.make_mesh(c)
    layout = parallel.layout(mesh, c, SPECS, jax.tree.map(lambda s: True, SPECS))
    with sharding.use(mesh):
      placed = jax.device_put(p, sharding.shardings(SPECS, mesh)), jax.device_put(batch, sharding.batch_sharding(mesh))
      got = jax.jit(train.accumulate(loss, layout=layout))(*placed, key)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('settings, part', [
    ({'clip': 0.0}, 'loss.clip=0.0'), ({'clip_high': -0.1}, 'loss.clip_high=-0.1'), ({'beta': -1.0}, 'loss.beta=-1.0'),
    ({'mean': 'group'}, "loss.mean='group'"), ({'mean': 'constant'}, 'loss.length=0'), ({'length': 9}, 'loss.length=9'),
    ({'temperature': 0.0}, 'loss.temperature=0.0'), ({'chunk': 0}, 'loss.chunk=0')])
def test_settings_that_make_no_sense(settings, part):
  with pytest.raises(ConfigError, match=part):
    grpo.Config(**settings)
