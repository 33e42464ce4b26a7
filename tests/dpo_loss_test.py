"""Preference optimisation: golden values, a loop over pairs, exact under microbatches, meshes and rows that fill up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import nn, parallel, params, sharding, train
from lm.data.packing import Batch
from lm.data.sft import Pair
from lm.errors import ConfigError
from lm.losses import dpo

B, T, D, V = 8, 9, 8, 32
PROMPT = [3, 2, 4, 1, 3, 5, 2, 0]  # tokens; the last pair fills up the batch
ANSWER = {'chosen': [4, 1, 6, 3, 2, 5, 7, 0], 'rejected': [2, 6, 3, 8, 2, 1, 4, 0]}


def side(name, seed=0):
  """Rows whose prompts are the same on both sides."""
  prompt, answer = np.array(PROMPT)[:, None], np.array(ANSWER[name])[:, None]
  column = np.arange(T + 1)[None]
  draw = lambda seed: np.random.default_rng(seed).integers(1, V, (B, T + 1))
  used = column < prompt + answer
  ids = np.where(used, np.where(column < prompt, draw(0), draw(seed + 1)), 0)
  return Batch(jnp.asarray(ids, jnp.int32), jnp.asarray(used, jnp.int32), jnp.asarray(column * used, jnp.int32),
               jnp.asarray(used & (column >= prompt)))


def batch_of(reference=True):
  chosen, rejected = side('chosen'), side('rejected', 1)
  last = lambda batch: jnp.maximum(batch.segments_BT.sum(1) - 1, 0)
  rng = np.random.default_rng(9)
  kept = (jnp.asarray(rng.normal(-8, 2, B), jnp.float32) for _ in range(2)) if reference else (None, None)
  return dpo.Batch(Pair(chosen, rejected, last(chosen), last(rejected)), *kept)


SPECS = {'table': params.Spec((V, D), ('vocab', 'embed'), params.Normal(1.0)),
         'out': params.Spec((V, D), ('vocab', 'embed'), params.Normal(1.0))}


def apply(p, ids_BT, *, positions_BT, segments_BT, key, rate=0.0):
  """Each token sees those before it in its row, with their places."""
  x_BTD = (p['table'][ids_BT] + 0.1 * positions_BT[..., None]) * (segments_BT > 0)[..., None]
  return nn.dropout(jnp.tanh(jnp.cumsum(x_BTD, 1)), rate, key)


MODEL = dict(apply=apply, head=lambda p: p['out'])


@pytest.fixture(scope='module')
def p():
  return params.init(SPECS, jax.random.key(5))


def bound(c=dpo.Config(chunk=40), **changes):  # noqa: B008
  return functools.partial(dpo.loss, c=c, **MODEL | changes)


def summed(p, batch):
  """Log-probability of each row's answer, by a loop, f64."""
  out = []
  x_BTD = np.asarray(apply(p, batch.ids_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT, key=None))
  for b in range(B):
    total = 0.0
    for t in np.flatnonzero(batch.mask_BT[b]):
      z = np.asarray(p['out'], np.float64) @ x_BTD[b, t - 1].astype(np.float64)
      total += z[batch.ids_BT[b, t]] - np.log(np.exp(z).sum())
    out.append(total)
  return np.array(out)


def value(terms):
  return float(train.objective(terms, {k: t.weight for k, t in terms.items()}))


def test_golden_values():
  h = jnp.array([0.7, -1.3])
  np.testing.assert_allclose(dpo.objective(h, dpo.Config()), [0.658760, 0.760258], atol=1e-6)
  assert float(dpo.objective(h, dpo.Config()).mean()) == pytest.approx(0.709509, abs=1e-6)
  np.testing.assert_allclose(dpo.objective(h, dpo.Config(kind='ipo')), [18.49, 39.69], rtol=1e-6)


def test_smoothing_is_the_mixture_of_both_labels():
  """And its least lies where the policy gives the chosen answer 1 - smoothing (arXiv:2305.18290's authors, cDPO)."""
  c = dpo.Config(beta=0.5, smoothing=0.1)
  h = jnp.array([-3.0, 0.2, 4.0])
  one = lambda h: dpo.objective(h, dpo.Config(beta=0.5))
  np.testing.assert_allclose(dpo.objective(h, c), 0.9 * one(h) + 0.1 * one(-h), rtol=1e-6)
  slope = jax.vmap(jax.grad(lambda h: dpo.objective(h[None], c)[0]))
  np.testing.assert_allclose(slope(jnp.array([np.log(9) / 0.5], jnp.float32)), [0], atol=1e-6)


@pytest.mark.parametrize('kind', ['dpo', 'ipo'])
def test_far_off_pairs_stay_finite(kind):
  h = jnp.array([-1e5, 1e5])
  out, slope = jax.vmap(jax.value_and_grad(lambda h: dpo.objective(h[None], dpo.Config(kind=kind))[0]))(h)
  assert np.isfinite(out).all() and np.isfinite(slope).all()


@pytest.mark.parametrize('settings', [{}, {'beta': 0.5, 'smoothing': 0.2}, {'kind': 'ipo'},
                                      {'kind': 'ipo', 'average': True}])
@pytest.mark.parametrize('reference', [True, False])
def test_every_number_against_a_loop(p, settings, reference):
  c = dpo.Config(chunk=40, **settings)
  batch = batch_of(reference)
  terms, metrics = jax.jit(bound(c))(p, batch, None)
  chosen, rejected = summed(p, batch.pair.chosen), summed(p, batch.pair.rejected)
  ratio = lambda x, reference_B: x - (0 if reference_B is None else np.asarray(reference_B, np.float64))
  win, lose = ratio(chosen, batch.chosen_reference_B), ratio(rejected, batch.rejected_reference_B)
  real = slice(0, B - 1)
  counts = [np.maximum(ANSWER[name], 1) for name in ('chosen', 'rejected')] if c.average else [1, 1]
  h = (win / counts[0] - lose / counts[1])[real]
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  each = (h - 1 / (2 * c.beta))**2 if c.kind == 'ipo' else (
      -(1 - c.smoothing) * np.log(sigmoid(c.beta * h)) - c.smoothing * np.log(sigmoid(-c.beta * h)))
  want = {'loss': each.mean(), 'accuracy': (win > lose)[real].mean(), 'chosen_reward': c.beta * win[real].mean(),
          'rejected_reward': c.beta * lose[real].mean(), 'margin': c.beta * (win - lose)[real].mean(),
          'chosen_logprob': chosen[real].mean(), 'rejected_logprob': rejected[real].mean()}
  assert value(terms) == pytest.approx(want['loss'], rel=1e-5)
  assert terms['preference'].weight == B - 1
  assert set(metrics) == set(want)
  for name, number in want.items():
    assert float(metrics[name].total / metrics[name].weight) == pytest.approx(number, rel=1e-5), name
  assert 0 < want['accuracy'] < 1


def of_itself(p, batch):
  """The batch whose reference is the policy."""
  chosen, rejected = jax.jit(lambda p: dpo.score(p, batch.pair, None, chunk=40, **MODEL))(p)
  return batch.replace(chosen_reference_B=chosen.row_B, rejected_reference_B=rejected.row_B)


def test_where_the_policy_is_its_reference(p):
  """log 2, no margin, and half of beta times the gradient of likelihood, up for chosen and down for rejected."""
  batch = of_itself(p, batch_of())
  terms, metrics = jax.jit(bound())(p, batch, None)
  assert value(terms) == pytest.approx(np.log(2), rel=1e-5)
  assert float(metrics['margin'].total) == pytest.approx(0, abs=1e-4)
  assert float(metrics['accuracy'].total) == (B - 1) / 2  # no favourite: half of each
  near = batch.replace(chosen_reference_B=batch.chosen_reference_B * (1 + 2e-7))
  assert float(jax.jit(bound())(p, near, None)[1]['accuracy'].total) == (B - 1) / 2  # nor by its last bits
  far = batch.replace(chosen_reference_B=batch.chosen_reference_B * (1 + 1e-4))
  assert float(jax.jit(bound())(p, far, None)[1]['accuracy'].total) == B - 1
  got = jax.jit(train.accumulate(bound()))(p, batch, jax.random.key(0))[0]

  def likelihood(p):
    chosen, rejected = dpo.score(p, batch.pair, None, **MODEL)
    return (chosen.row_B - rejected.row_B).sum() / (B - 1)
  for path, g in params.flatten(jax.jit(jax.grad(likelihood))(p)).items():
    np.testing.assert_allclose(params.flatten(got)[path], -0.05 * g, atol=1e-5, err_msg=path)
    assert abs(g).max() > 0.1


def test_reference_free_is_a_reference_to_which_all_are_alike(p):
  free = batch_of(reference=False)
  alike = free.replace(chosen_reference_B=jnp.full(B, -7.0), rejected_reference_B=jnp.full(B, -7.0))
  got, want = (value(jax.jit(bound())(p, batch, None)[0]) for batch in (free, alike))
  assert got == pytest.approx(want, rel=1e-5)
  assert got != pytest.approx(value(jax.jit(bound())(p, batch_of(), None)[0]), rel=1e-2)


def test_rows_that_fill_up_and_one_sided_pairs_do_not_count(p):
  """Whatever their reference holds; nor does a pair of which one answer is empty."""
  batch = batch_of()
  without = lambda rows, i: rows.replace(mask_BT=rows.mask_BT.at[i].set(False))
  pair = batch.pair.replace(chosen=without(batch.pair.chosen, 0), rejected=without(batch.pair.rejected, 1))
  batch = batch.replace(pair=pair)
  spoilt = batch.replace(chosen_reference_B=batch.chosen_reference_B.at[jnp.array([0, 1, B - 1])].set(jnp.nan))
  gradient = jax.jit(train.accumulate(bound()))
  got, want = (gradient(p, b, jax.random.key(0)) for b in (spoilt, batch))
  assert jax.jit(bound())(p, spoilt, None)[0]['preference'].weight == B - 3
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.isfinite(b).all()
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('how', ['microbatches', 'mesh'])
def test_parts_are_the_whole_with_dropout(p, how):
  """Each answer's dropout depends on its pair's number alone, and is not that of the other answer."""
  batch, key = batch_of(), jax.random.key(2)
  loss = bound(apply=functools.partial(apply, rate=0.3))
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
  assert float(want[1]) != pytest.approx(float(jax.jit(train.accumulate(bound()))(p, batch, key)[1]), rel=1e-3)
  twins = batch.replace(pair=batch.pair.replace(rejected=batch.pair.chosen), chosen_reference_B=jnp.zeros(B),
                        rejected_reference_B=jnp.zeros(B))
  assert abs(float(jax.jit(loss)(p, twins, key)[1]['margin'].total)) > 0.01


@pytest.mark.parametrize('settings, part', [
    ({'kind': 'slic'}, "loss.kind='slic'"), ({'beta': 0.0}, 'loss.beta=0.0'), ({'beta': float('nan')}, 'loss.beta=nan'),
    ({'smoothing': 0.5}, 'loss.smoothing=0.5'), ({'kind': 'ipo', 'smoothing': 0.1}, "with loss.kind='ipo'"),
    ({'chunk': 0}, 'loss.chunk=0')])
def test_settings_that_make_no_sense(settings, part):
  with pytest.raises(ConfigError, match=part):
    dpo.Config(**settings)
