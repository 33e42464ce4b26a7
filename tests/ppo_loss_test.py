"""PPO against published numbers, a numpy PPO, REINFORCE and exact divergences."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
from marks import slow
import numpy as np
import pytest

from lm import params, train
from lm.data.packing import Batch
from lm.errors import ConfigError
from lm.kernels.cross_entropy import token_logprobs
from lm.losses import ar, ppo
from lm.models import decoder

# Two responses of three tokens, and what the original formulas make of them.
LOGPROBS = np.array([[-1, -2, -.5], [-.7, -1.2, -3]], np.float32)
REFERENCE = np.array([[-1.1, -1.8, -.9], [-.6, -1.5, -2.5]], np.float32)
VALUES = np.array([[.1, .2, .3], [0, -.1, .4]], np.float32)
SCORES = np.array([1.5, -.5], np.float32)
ALL = np.ones((2, 3), bool)
REWARDS = [[-.015, .03, 1.44], [.015, -.045, -.425]]
GOLDEN = ppo.Config(kl=ppo.KL(coef=.15))


def batch_of(mask_BT):
  """A batch whose targets are the mask's; ids and the prompt of one token do not matter."""
  B, T = mask_BT.shape
  ids_BT = jnp.zeros((B, T + 1), jnp.int32)
  return Batch(ids_BT, ids_BT + 1, jnp.broadcast_to(jnp.arange(T + 1)[None], ids_BT.shape),
               jnp.pad(jnp.asarray(mask_BT), ((0, 0), (1, 0))))


def golden(c=GOLDEN):
  return ppo.experience(batch_of(ALL), *map(jnp.asarray, (LOGPROBS, REFERENCE, VALUES, SCORES)), jnp.ones(2, bool),
                        c.kl.coef, c)


def mean(term):
  return float(term.total / term.weight)


def test_published_rewards_advantages_and_returns():
  rewards = ppo.rewards(*map(jnp.asarray, (LOGPROBS, REFERENCE, SCORES, ALL)), .15)
  np.testing.assert_allclose(rewards, REWARDS, atol=1e-6)
  advantages, returns = ppo.gae(rewards, jnp.asarray(VALUES), jnp.asarray(ALL), 1.0, .95)
  np.testing.assert_allclose(advantages, [[1.23735, 1.213, 1.14], [-.397312, -.32875, -.825]], atol=1e-6)
  np.testing.assert_allclose(returns, [[1.33735, 1.413, 1.44], [-.397312, -.42875, -.425]], atol=1e-6)
  white = [[1.029982, 1.002036, .918258], [-.846042, -.767356, -1.336878]]
  np.testing.assert_allclose(ppo.whiten(advantages, ALL), white, atol=2e-6)
  np.testing.assert_allclose(ppo.whiten(rewards, ALL, shift=False), [[-.141071, -.064842, 2.323654],
                                                                     [-.090252, -.19189, -.835598]], atol=2e-6)
  e, stats = golden()
  np.testing.assert_allclose(e.advantages_BT, white, atol=2e-6)
  np.testing.assert_allclose(e.returns_BT, returns, atol=1e-6)
  np.testing.assert_allclose([stats['kl'], stats['score'], stats['reward'], stats['entropy'], stats['length']],
                             [(.1 - .2 + .4 - .1 + .3 - .5) / 2, .5, .5, 4.2, 3], atol=1e-6)


def test_published_losses():
  e, _ = golden()
  logprobs = LOGPROBS + np.array([[.1, -.3, .25], [0, .2, -.1]], np.float32)
  values = VALUES + np.array([[.5, -.1, 0], [.3, .05, -.4]], np.float32)
  terms, metrics = ppo.objective(*map(jnp.asarray, (logprobs, np.zeros_like(logprobs), values)), e, GOLDEN)
  np.testing.assert_allclose(mean(terms['policy']), .001735, atol=1e-6)
  np.testing.assert_allclose(mean(terms['value']), .426665, atol=1e-6)
  np.testing.assert_allclose(train.objective(terms, {k: t.weight for k, t in terms.items()}), .044401, atol=1e-6)
  ratio = np.exp(logprobs - LOGPROBS)
  np.testing.assert_allclose([mean(metrics['ratio']), mean(metrics['ratio_max'])], [ratio.mean(), ratio.max(1).mean()],
                             rtol=1e-5)
  np.testing.assert_allclose(mean(metrics['approx_kl']), .5 * np.mean([.01, .09, .0625, 0, .04, .01]), rtol=1e-5)
  assert mean(metrics['clip_fraction']) == pytest.approx(1 / 6)  # the third token of the first row
  assert mean(metrics['value_clip_fraction']) == pytest.approx(2 / 6)


def test_published_adaptive_coefficient():
  kl, coef, seen = ppo.KL(coef=.15, target=6, horizon=10000), jnp.float32(.15), []
  for measured in (10, 6, 3, 6.6):
    coef = ppo.adapt(coef, measured, 512, kl)
    seen.append(float(coef))
  np.testing.assert_allclose(seen, [.151536, .151536, .14998427, .15075219], atol=1e-8)
  assert ppo.adapt(.15, 100.0, 512, ppo.KL()) == jnp.float32(.15)


def test_published_divergences():
  """Given as log(reference / policy)."""
  found = [ppo.divergence(jnp.zeros(2), jnp.array([.2, -.5]), k) for k in ('k1', 'k2', 'k3')]
  np.testing.assert_allclose(found, [[-.2, .5], [.02, .125], [.021403, .106531]], atol=1e-6)


def test_divergences_are_unbiased_where_they_should_be():
  """From 40,000 draws, within four standard errors; k2, which is biased, is not."""
  logits = jax.random.normal(jax.random.key(0), (2, 8))
  log_p, log_q = jax.nn.log_softmax(logits)
  exact = float((jnp.exp(log_p) * (log_p - log_q)).sum())
  drawn = jax.random.categorical(jax.random.key(1), log_p, shape=(40_000,))
  deviation, noise = {}, {}
  for k in ('k1', 'k2', 'k3'):
    each = np.asarray(ppo.divergence(log_p[drawn], log_q[drawn], k), np.float64)
    noise[k] = each.std() / np.sqrt(len(each))
    deviation[k] = abs(each.mean() - exact) / noise[k]
    assert k == 'k1' or each.min() >= 0
  assert deviation['k1'] < 4
  assert deviation['k3'] < 4 < deviation['k2']
  assert noise['k3'] < noise['k1']


def numpy_ppo(new, old, ref, values, old_values, scores, ended, mask, c):
  """One row and one token at a time, in doubles: (policy loss, value loss, advantages, returns)."""
  rewards, advantages, returns = (np.zeros(mask.shape) for _ in range(3))
  for b, row in enumerate(mask):
    places = np.flatnonzero(row)
    for t in places:
      d = float(old[b, t]) - float(ref[b, t])
      rewards[b, t] = -c.kl.coef * {'k1': d, 'k2': d * d / 2, 'k3': np.exp(-d) - 1 + d}[c.kl.estimator]
    if len(places):
      penalised = -c.missing_eos if c.missing_eos_mode == 'replace' else scores[b] - c.missing_eos
      rewards[b, places[-1]] += scores[b] if ended[b] else penalised
  if c.whiten_rewards:
    x = rewards[mask]
    rewards[mask] = (x - x.mean()) / np.sqrt(x.var() + 1e-8) + x.mean()
  for b, row in enumerate(mask):
    after = after_value = 0.0
    for t in np.flatnonzero(row)[::-1]:
      delta = rewards[b, t] + c.gamma * after_value - old_values[b, t]
      after, after_value = delta + c.gamma * c.lam * after, old_values[b, t]
      advantages[b, t], returns[b, t] = after, after + old_values[b, t]
  if c.whiten:
    x = advantages[mask]
    advantages[mask] = (x - x.mean()) / np.sqrt(x.var() + 1e-8)
  policy = value = 0.0
  for b, t in np.argwhere(mask):
    ratio, a = np.exp(float(new[b, t]) - float(old[b, t])), advantages[b, t]
    policy += -min(ratio * a, np.clip(ratio, 1 - c.clip, 1 + c.clip) * a)
    near = np.clip(values[b, t], old_values[b, t] - c.value_clip, old_values[b, t] + c.value_clip)
    near = near if c.value_clip else values[b, t]
    value += .5 * max((values[b, t] - returns[b, t])**2, (near - returns[b, t])**2)
  return policy / mask.sum(), value / mask.sum(), advantages, returns


def ragged(seed, B=6, T=9):
  """Responses of 0 to T tokens, one with a gap, between a prompt and padding; what lies outside is NaN."""
  rng = np.random.default_rng(seed)
  start, length = rng.integers(0, 4, B), rng.integers(1, T, B)
  length[0], start[1], length[1] = 0, 0, T
  t = np.arange(T)[None]
  mask = (t >= start[:, None]) & (t < (start + length)[:, None])
  mask[1, 3:5] = False
  noise = lambda scale: rng.normal(size=(B, T)) * scale
  old, values = -np.abs(noise(2)), noise(1)
  arrays = old + noise(.3), old, old + noise(.5), values + noise(.3), values
  arrays = [np.where(mask, x, np.nan).astype(np.float32) for x in arrays]
  scores = np.where(mask.any(1), rng.normal(size=B), np.nan).astype(np.float32)
  return *arrays, scores, rng.random(B) > .5, mask


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('changes', [
    {}, {'whiten_rewards': True, 'value_clip': 0.0}, {'gamma': .9, 'lam': .5, 'missing_eos': 1.0},
    {'whiten': False, 'missing_eos': 1.0, 'missing_eos_mode': 'replace', 'kl': ppo.KL(.1, estimator='k3')},
    {'clip': .1, 'kl': ppo.KL(.3, estimator='k2')}])
def test_a_numpy_ppo_agrees_on_ragged_responses(changes, seed):
  c = ppo.Config(**changes)
  new, old, ref, values, old_values, scores, ended, mask = data = ragged(seed)

  @jax.jit
  def ours(new, old, ref, values, old_values, scores, ended, mask):
    e, stats = ppo.experience(batch_of(mask), old, ref, old_values, scores, ended, c.kl.coef, c)
    return e, stats, *ppo.objective(new, jnp.zeros_like(new), values, e, c)
  e, stats, terms, metrics = ours(*map(jnp.asarray, data))
  policy, value, advantages, returns = numpy_ppo(*data, c)
  np.testing.assert_allclose(e.advantages_BT, advantages, atol=1e-5)
  np.testing.assert_allclose(e.returns_BT, returns, atol=1e-5)
  np.testing.assert_allclose([mean(terms['policy']), mean(terms['value'])], [policy, value], atol=1e-5)
  variance = 1 - (returns - old_values)[mask].var() / returns[mask].var()
  np.testing.assert_allclose(stats['explained_variance'], variance, rtol=1e-5, atol=1e-5)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((e, stats, terms, metrics)))
  assert 0 < mean(metrics['clip_fraction']) < 1


def test_the_score_stays_a_float_at_the_last_token_of_the_response():
  """0.73 is not truncated, and lies neither in the prompt nor in the padding; a count of right answers is a float."""
  mask = jnp.array([[False, True, True, False], [True, True, True, True], [False] * 4])
  zero = jnp.zeros(mask.shape, jnp.bfloat16)
  rewards = ppo.rewards(zero, zero, jnp.array([.73, -1.9, 5.0]), mask, .1)
  assert rewards.dtype == jnp.float32
  np.testing.assert_array_equal(rewards, np.array([[0, 0, .73, 0], [0, 0, 0, -1.9], [0] * 4], np.float32))
  counts = ppo.rewards(zero, zero, jnp.array([1, 0, 1]), mask, .1)
  np.testing.assert_array_equal(counts, [[0, 0, 1, 0], [0] * 4, [0] * 4])
  assert counts.dtype == jnp.float32
  for wrong in (lambda i: ppo.rewards(i, zero, SCORES, mask, .1), lambda i: ppo.gae(i, zero, mask, 1, 1),
                lambda i: ppo.gae(zero, i, mask, 1, 1), lambda i: ppo.whiten(i, mask)):
    with pytest.raises(ConfigError, match='int32; expected floats'):
      wrong(jnp.zeros(mask.shape, jnp.int32))


def test_everything_is_f32_whatever_comes_in():
  new, old, ref, values, old_values, scores, ended, mask = ragged(0)
  half = lambda x: jnp.asarray(x, jnp.bfloat16)
  c = ppo.Config()
  e, stats = ppo.experience(batch_of(mask), *map(half, (old, ref, old_values, scores)), ended, .05, c)
  terms, metrics = ppo.objective(*map(half, (new, old, values)), e, c)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(
      (e.replace(batch=None), stats, terms, metrics, ppo.adapt(half(.1), half(3.0), 8, ppo.KL(target=6.0)))))
  low = lambda x: np.asarray(half(x), np.float32)  # rounded once, on the way in, and nowhere else
  policy, value, advantages, _ = numpy_ppo(*map(low, (new, old, ref, values, old_values, scores)), ended, mask, c)
  np.testing.assert_allclose(e.advantages_BT, advantages, atol=1e-5)
  np.testing.assert_allclose([mean(terms['policy']), mean(terms['value'])], [policy, value], atol=1e-5)


@pytest.mark.parametrize('perfect', [False, True])
def test_nothing_is_learned_from_identical_rewards(perfect):
  """Each token's advantage is the score, or 0 where the value knew it; whitened, both are 0 to the last bit."""
  mask = jnp.asarray(ragged(0)[-1])
  zero = jnp.zeros(mask.shape)
  c = ppo.Config(lam=1.0)
  values = jnp.full(mask.shape, .73) if perfect else zero
  scores, ended = jnp.full(len(mask), .73), jnp.ones(len(mask), bool)
  e, stats = ppo.experience(batch_of(mask), zero, zero, values, scores, ended, .05, c)
  np.testing.assert_array_equal(e.advantages_BT, zero)
  np.testing.assert_allclose(np.asarray(e.returns_BT)[mask], .73, rtol=1e-6)
  assert stats['explained_variance'] == 0


def test_whitening():
  """Mean 0 and spread 1 over the mask, across rows; nothing outside it; one token, or none, is no division by 0."""
  x, mask = jax.random.normal(jax.random.key(0), (4, 50)) * 3 + 100, jax.random.uniform(jax.random.key(1), (4, 50)) > .4
  white = np.asarray(ppo.whiten(x, mask))
  np.testing.assert_allclose([white[mask].mean(), white[mask].std()], [0, 1], atol=1e-5)
  assert (white[~np.asarray(mask)] == 0).all()
  kept = np.asarray(ppo.whiten(x, mask, shift=False))[mask]
  np.testing.assert_allclose([kept.mean(), kept.std()], [np.asarray(x)[mask].mean(), 1], rtol=1e-5)
  one = jnp.zeros_like(mask).at[2, 3].set(True)
  np.testing.assert_array_equal(ppo.whiten(x, one), np.zeros_like(x))
  np.testing.assert_array_equal(ppo.whiten(x, jnp.zeros_like(mask)), np.zeros_like(x))


def test_at_ratio_one_the_gradient_is_reinforce():
  """That of -mean(A log P), whatever the advantages' signs; and nothing is clipped yet."""
  key = jax.random.split(jax.random.key(0), 3)
  logits, ids = jax.random.normal(key[0], (6, 9, 5)), jax.random.randint(key[1], (6, 9), 0, 5)
  _, _, ref, values, old_values, scores, ended, mask = ragged(1)
  logprobs = lambda logits: jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], 2)[..., 0]
  c = ppo.Config()
  e, _ = ppo.experience(batch_of(mask), logprobs(logits), ref, old_values, scores, ended, .05, c)

  def ours(logits):
    terms, metrics = ppo.objective(logprobs(logits), logprobs(logits), values, e, c)
    return terms['policy'].total / terms['policy'].weight, metrics
  got, metrics = jax.grad(ours, has_aux=True)(logits)
  want = jax.grad(lambda logits: -(e.advantages_BT * logprobs(logits)).sum() / mask.sum())(logits)
  assert abs(want).max() > .01
  np.testing.assert_allclose(got, want, atol=1e-7)
  assert [mean(metrics[k]) for k in ('ratio', 'ratio_max', 'approx_kl', 'clip_fraction')] == [1, 1, 0, 0]


@pytest.mark.parametrize('advantage, change, learns', [(1, .3, False), (1, -.3, True), (-1, .3, True), (-1, -.3, False),
                                                       (1, .1, True), (-1, -.1, True)])
def test_only_what_went_too_far_in_the_wanted_direction_is_clipped(advantage, change, learns):
  one = jnp.ones((1, 1))
  e = ppo.Experience(batch_of(one > 0), 0 * one, 0 * one, advantage * one, one)
  policy = lambda d: ppo.objective(d, d, 0 * one, e, ppo.Config())[0]['policy'].total
  slope = float(jax.grad(policy)(change * one)[0, 0])
  assert slope == pytest.approx(-advantage * np.exp(change) if learns else 0)


def test_no_response_anywhere():
  """Neither values nor gradients are NaN, and terms weigh nothing."""
  mask = jnp.zeros((2, 3), bool)
  hole = jnp.full((2, 3), jnp.nan)
  c = ppo.Config(whiten_rewards=True, entropy_weight=.1)
  e, stats = ppo.experience(batch_of(mask), hole, hole, hole, jnp.array([jnp.nan, 2.0]), jnp.zeros(2, bool), .05, c)
  total = lambda x, v: sum(t.total for t in ppo.objective(x, x, v, e, c)[0].values())
  value, grads = jax.value_and_grad(total, (0, 1))(hole, hole)
  assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves((e.replace(batch=None), stats, value, grads)))
  terms, metrics = ppo.objective(hole, hole, hole, e, c)
  assert all(t.weight == 0 for t in (*terms.values(), *metrics.values()))


MODEL = decoder.Config(vocab=29, length=64, layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32,
                       positions='rotary')


@functools.cache
def model():
  return {'policy': params.init(decoder.specs(MODEL), jax.random.key(0)),
          'value': jax.random.normal(jax.random.key(1), (MODEL.embed,))}


def apply(p, ids_BT, *, positions_BT, segments_BT, key):
  x_BTD = decoder.apply(p['policy'], MODEL, ids_BT, positions_BT=positions_BT, segments_BT=segments_BT, key=key)
  return x_BTD, jnp.einsum('BTD,D->BT', x_BTD, p['value'])


def head(p):
  return decoder.head(p['policy'], MODEL)


def rollout(left, right=0):
  """Prompts and responses of unequal length with padding before and behind: (batch, arrays of `experience`)."""
  rng = np.random.default_rng(0)
  rows = [(rng.integers(1, 29, n), n - m) for n, m in ((7, 3), (10, 6), (5, 1), (4, 0))]
  T = left + 10 + right
  ids, segments, positions, mask = np.zeros((4, 4, T), np.int32)
  targets = np.zeros((3, 4, T), np.float32)
  for b, (tokens, prompt) in enumerate(rows):
    n = len(tokens)
    at = slice(left + 10 - n, left + 10)  # the prompt ends where it ends: rows differ on the left
    ids[b, at], segments[b, at], positions[b, at] = tokens, 1, np.arange(n)
    mask[b, at] = np.arange(n) >= prompt
    targets[:, b, at] = rng.normal(size=(3, n))
  batch = Batch(*map(jnp.asarray, (ids, segments, positions, mask > 0)))
  return batch, tuple(jnp.asarray(x)[:, 1:] for x in targets)


def inputs(batch):
  """Arguments of `apply` but the parameters."""
  return {'ids_BT': batch.ids_BT[:, :-1], 'positions_BT': batch.positions_BT[:, :-1],
          'segments_BT': batch.segments_BT[:, :-1], 'key': None}


@functools.cache
def prepared(left, right=0):
  """Experience of a policy near the model's, and its numbers."""
  batch, noise = rollout(left, right)

  @jax.jit
  def of(p, batch, change, ref_change, values):
    logprobs = token_logprobs(apply(p, **inputs(batch))[0], head(p), batch.ids_BT[:, 1:])[0]
    return ppo.experience(batch, logprobs + .2 * change, logprobs + .3 * ref_change, values,
                          jnp.array([.73, -1., 2., 0.]), jnp.array([True, False, True, True]), .05, ppo.Config())
  return of(model(), batch, *noise)


def of_model(e, c=ppo.Config(), microbatches=1):
  """(gradients, objective, metrics)."""
  return gradient(functools.partial(ppo.loss, apply=apply, head=head, c=c), e, microbatches)


def gradient(loss, batch, microbatches=1):
  return jax.jit(train.accumulate(loss, microbatches))(model(), batch, jax.random.key(2))


@pytest.mark.parametrize('left, right', [slow(3, 0), slow(17, 0), (3, 5)])
def test_padding_changes_nothing(left, right):
  (want_e, want_stats), (e, stats) = prepared(0), prepared(left, right)
  (want_grads, want, want_metrics), (grads, got, metrics) = of_model(want_e), of_model(e)
  for name in want_stats:
    np.testing.assert_allclose(stats[name], want_stats[name], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for name in want_metrics:
    np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5, atol=1e-6)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  assert max(abs(x).max() for x in jax.tree.leaves(want_grads)) > .01


@pytest.mark.slow
def test_microbatches_change_nothing():
  c = ppo.Config(entropy_weight=.01)
  e, _ = prepared(0)
  grads, value, metrics = of_model(e, c)
  more_grads, more_value, more_metrics = of_model(e, c, microbatches=2)
  np.testing.assert_allclose(more_value, value, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), (more_grads, more_metrics),
               (grads, metrics))


@pytest.mark.slow
def test_temperature_chunk_and_entropy():
  """Against the whole softmax: log-probabilities and entropies of logits / temperature, a few tokens at a time."""
  c = ppo.Config(temperature=.7, chunk=5, entropy_weight=.02)
  e, _ = prepared(3)
  b, mask = e.batch, e.batch.mask_BT[:, 1:]

  def plain(p):
    x_BTD, values_BT = apply(p, **inputs(b))
    log_p = jax.nn.log_softmax(jnp.einsum('BTD,VD->BTV', x_BTD, head(p)) / .7)
    picked, entropy = jnp.take_along_axis(log_p, b.ids_BT[:, 1:, None], 2)[..., 0], -(jnp.exp(log_p) * log_p).sum(-1)
    terms, metrics = ppo.objective(picked, entropy, values_BT, e, dataclasses.replace(c, entropy_weight=0.0))
    bonus = (entropy * mask).sum() / mask.sum()
    return train.objective(terms, {k: t.weight for k, t in terms.items()}) - .02 * bonus, bonus
  (want, bonus), want_grads = jax.jit(jax.value_and_grad(plain, has_aux=True))(model())
  grads, got, metrics = of_model(e, c)
  np.testing.assert_allclose([got, metrics['entropy']], [want, bonus], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, want_grads)


def test_no_array_of_length_times_vocabulary():
  """Neither value nor gradient holds logits of all tokens, though the entropy of each is there."""
  B, T, D, V = 4, 64, 16, 2048
  mask = jnp.ones((B, T), bool)
  zero = jnp.zeros((B, T))
  e, _ = ppo.experience(batch_of(mask), zero, zero, zero, zero[:, 0], mask[:, 0], .05, ppo.Config())
  loss = functools.partial(ppo.loss, apply=lambda p, ids, **_: (p['x'], p['x'].sum(-1)), head=lambda p: p['w'],
                           c=ppo.Config(chunk=32, entropy_weight=.1))
  p = {'x': jnp.ones((B, T, D)), 'w': jnp.ones((V, D))}
  text = jax.jit(train.accumulate(loss)).lower(p, e, jax.random.key(0)).compile().as_text()
  sizes = [np.prod([int(n) for n in shape.split(',')]) for shape in re.findall(r'f32\[([0-9,]+)\]', text)]
  assert V * D <= max(sizes) < B * T * V / 2


@pytest.mark.slow
def test_pretraining_is_mixed_in_as_one_more_mean():
  """27.8 times the mean over its own targets (eq. 2), beside PPO's mean over response tokens."""
  e, _ = prepared(0)
  rl = functools.partial(ppo.loss, apply=apply, head=head, c=ppo.Config())
  text = functools.partial(ar.loss, apply=lambda *a, **k: apply(*a, **k)[0], head=head, c=ar.Config())
  both = ppo.with_pretraining(rl, text, 27.8)
  grads = [gradient(f, x)[:2] for f, x in ((both, (e, e.batch)), (rl, e), (text, e.batch))]
  (mixed, value), (of_rl, a), (of_text, b) = grads
  np.testing.assert_allclose(value, a + 27.8 * b, rtol=1e-5)
  jax.tree.map(lambda m, x, y: np.testing.assert_allclose(m, x + 27.8 * y, rtol=1e-4, atol=1e-4), mixed, of_rl, of_text)


@pytest.mark.parametrize('make, part', [
    (lambda: ppo.Config(gamma=1.1), 'loss.gamma=1.1'), (lambda: ppo.Config(lam=-.1), 'loss.lam=-0.1'),
    (lambda: ppo.Config(clip=0), 'loss.clip=0'), (lambda: ppo.Config(temperature=0), 'loss.temperature=0'),
    (lambda: ppo.Config(missing_eos_mode='replace'), "loss.missing_eos_mode='replace' with loss.missing_eos=0.0"),
    (lambda: ppo.KL(coef=0.0, target=6.0), 'loss.kl.target=6.0 with loss.kl.coef=0'),
    (lambda: ppo.Config(missing_eos=-1), 'loss.missing_eos=-1'), (lambda: ppo.Config(chunk=0), 'loss.chunk=0'),
    (lambda: ppo.Config(missing_eos_mode='add'), "loss.missing_eos_mode='add'"),
    (lambda: ppo.KL(coef=-1), 'loss.kl.coef=-1'), (lambda: ppo.KL(horizon=0), 'loss.kl.horizon=0'),
    (lambda: ppo.KL(estimator='k4'), "loss.kl.estimator='k4'")])
def test_fields_are_checked(make, part):
  with pytest.raises(ConfigError, match=part):
    make()
