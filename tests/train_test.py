"""One step is exact: under microbatches, meshes, padding, non-finite gradients and frozen leaves; and compiles once."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from lm import config, params, pretrain, run, sharding, train
from lm.data.packing import Batch
from lm.losses import Term
from lm.models import decoder

MODEL = decoder.Config(vocab=64, length=16, layers=2, embed=32, heads=4, kv_heads=4, head_dim=8, mlp=64)
CONFIG = config.replace(pretrain.Config(), model=MODEL, data__length=16, data__batch=16, data__isolate=True,
                        optim__lr=1e-2, optim__schedule='constant', optim__steps=100)


def make_batch(B=16, seed=0, vocab=64, T=16):
  """Rows with unequal numbers of targets: several segments, padding, masked targets."""
  rng = np.random.default_rng(seed)
  segments_BT = np.sort(rng.integers(0, 3, (B, T + 1)))[:, ::-1].copy()
  return Batch(jnp.asarray(rng.integers(0, vocab, (B, T + 1)), jnp.int32), jnp.asarray(segments_BT, jnp.int32),
               jnp.broadcast_to(jnp.arange(T + 1)[None], (B, T + 1)), jnp.asarray(rng.random((B, T + 1)) > 0.4))


def start(c, task=None):
  task = task or pretrain.task(c)
  parts = run.build(c, task)
  with sharding.use(parts.mesh):
    state = jax.jit(lambda k: train.init(task.specs, parts.tx, parts.trainable, k), out_shardings=parts.state)(
        jax.random.key(0))
  return parts, state


def steps(c, n, batch=None):
  parts, state = start(c)
  batch = jax.device_put(batch or make_batch(), sharding.batch_sharding(parts.mesh))
  losses, norms = [], []
  with sharding.use(parts.mesh):
    for _ in range(n):
      state, metrics = parts.step(state, batch, jax.random.key(7))
      losses.append(float(metrics['loss']))
      norms.append(float(metrics['grad_norm']))
  return state, losses, norms, parts


def test_accumulated_gradient_is_the_gradient_of_the_whole_batch():
  task = pretrain.task(CONFIG)
  p = params.init(task.specs, jax.random.key(0))
  whole = jax.jit(train.accumulate(task.loss, 1))(p, make_batch(), jax.random.key(1))
  for k in (2, 4, 16):
    parts = jax.jit(train.accumulate(task.loss, k))(p, make_batch(), jax.random.key(1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), parts[0], whole[0])
    assert float(parts[1]) == pytest.approx(float(whole[1]), rel=1e-6)
    assert float(parts[2]['loss']) == pytest.approx(float(whole[2]['loss']), rel=1e-6)


@pytest.mark.slow
def test_a_mean_of_microbatch_means_would_be_wrong():
  """Guards the test above: its microbatches really have unequal weights."""
  task = pretrain.task(CONFIG)
  weights = [float(task.loss(params.init(task.specs, jax.random.key(0)),
                             jax.tree.map(lambda x, i=i: x[i::4], make_batch()), None)[0]['nll'].weight)
             for i in range(4)]
  assert max(weights) > min(weights)


def test_the_pass_for_weights_holds_no_matmul():
  """The compiled program multiplies matrices only once a microbatch: its dots are those of one gradient."""
  task = pretrain.task(CONFIG)
  p = params.init(task.specs, jax.random.key(0))

  def weights_only(p, batch):
    return {k: t.weight for k, t in task.loss(p, batch, jax.random.key(0))[0].items()}
  assert ' dot(' not in jax.jit(weights_only).lower(p, make_batch()).compile().as_text()


def test_no_recompilation_after_the_first_step():
  _, _, _, parts = steps(CONFIG, 3)
  assert parts.step._cache_size() == 1


def test_each_step_draws_with_the_key_of_its_number():
  task, tx = tiny.task(drop=0.2), optax.with_extra_args_support(optax.set_to_zero())
  p = jax.tree.map(lambda x: 50 * x, params.init(task.specs, jax.random.key(0)))
  state, found = train.state_of(p, tx, jax.tree.map(lambda _: True, p)), []
  step, gradient = jax.jit(train.make_step(task.loss, tx)), jax.jit(train.accumulate(task.loss))
  for _ in range(3):
    state, metrics = step(state, make_batch(), jax.random.key(7))
    found.append(float(metrics['objective']))
  want = [float(gradient(p, make_batch(), jax.random.fold_in(jax.random.key(7), n))[1]) for n in range(3)]
  assert found == pytest.approx(want, rel=1e-6)
  assert np.diff(np.sort(want)).min() > 1e-3


@pytest.mark.slow
def test_compile_time_is_flat_in_depth():
  def seconds(layers):
    c = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, layers=layers))
    parts, state = start(c)
    with sharding.use(parts.mesh):
      lowered = parts.step.lower(state, make_batch(), jax.random.key(0))
    before = time.process_time()
    lowered.compile()
    return time.process_time() - before
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    assert min(seconds(48) for _ in range(2)) <= 1.5 * min(seconds(12) for _ in range(2)) + 0.1
  finally:
    jax.config.update('jax_enable_compilation_cache', True)


def poisoned(loss):
  """The loss, but NaN where the batch's first id is 0."""
  def f(p, batch, key):
    terms, metrics = loss(p, batch, key)
    bad = jnp.where(batch.ids_BT[0, 0] == 0, jnp.nan, 1.0)
    return {k: dataclasses.replace(t, total=t.total * bad) for k, t in terms.items()}, metrics
  return f


@pytest.mark.slow
@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_non_finite_step_changes_nothing_but_the_counters(name):
  c = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, name=name))
  task = pretrain.task(c)
  parts, state = start(c, dataclasses.replace(task, loss=poisoned(task.loss)))
  good = make_batch()
  good = dataclasses.replace(good, ids_BT=good.ids_BT.at[0, 0].set(1))
  bad = dataclasses.replace(good, ids_BT=good.ids_BT.at[0, 0].set(0))
  with sharding.use(parts.mesh):
    state, _ = parts.step(state, good, jax.random.key(0))
    before = jax.device_get(state)
    state, metrics = parts.step(state, bad, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))
    assert int(state.skipped) == 1
    assert int(state.step) == 2
    assert not np.isfinite(metrics['objective'])
    state, metrics = parts.step(state, good, jax.random.key(0))
  assert not np.array_equal(state.params['blocks']['attn']['q'], before.params['blocks']['attn']['q'])
  assert int(state.skipped) == 1


def test_frozen_leaves_have_no_state_and_do_not_move():
  c = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, freeze=r'embed|attn'))
  parts, state = start(c)
  assert state.params['embed']['tokens'] is None
  assert params.count(state.opt_state.mu) == params.count(state.params)
  before = jax.device_get(state.frozen)
  with sharding.use(parts.mesh):
    state, _ = parts.step(state, make_batch(), jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, state.frozen, before)


@pytest.mark.slow
@pytest.mark.parametrize('microbatches', [1, 4])
def test_a_batch_without_targets_changes_nothing_but_the_counters(microbatches):
  c = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, microbatches=microbatches))
  parts, state = start(c)
  good, place = make_batch(), sharding.batch_sharding(parts.mesh)
  of = lambda mask_BT: jax.device_put(dataclasses.replace(good, mask_BT=mask_BT), place)
  none, few, good = of(jnp.zeros((16, 17), bool)), of(jnp.zeros((16, 17), bool).at[3].set(True)), of(good.mask_BT)
  with sharding.use(parts.mesh):
    weight = lambda batch: sum(t.weight for t in pretrain.task(c).loss(train.whole(state), batch, None)[0].values())
    counts = float(weight(good)), float(weight(few))
    state, metrics = parts.step(state, good, jax.random.key(0))
    assert metrics['targets'] == counts[0] > counts[1] > 0
    before = jax.device_get(state)
    state, metrics = parts.step(state, none, jax.random.key(0))
    assert [float(metrics[k]) for k in ('loss', 'objective', 'grad_norm', 'targets', 'skipped')] == [0, 0, 0, 0, 1]
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))
    state, metrics = parts.step(state, few, jax.random.key(0))
  assert [float(metrics[k]) for k in ('targets', 'skipped')] == [counts[1], 1]
  assert not np.array_equal(state.params['blocks']['attn']['q'], before.params['blocks']['attn']['q'])


def test_terms_are_scaled_and_weighted():
  terms = {'a': Term(jnp.float32(6), jnp.float32(3)), 'b': Term(jnp.float32(8), jnp.float32(2), scale=0.5),
           'none': Term(jnp.float32(5), jnp.float32(0))}
  assert float(train.objective(terms, {k: t.weight for k, t in terms.items()})) == 2 + 2


def test_evaluation_sums_over_batches():
  task = pretrain.task(CONFIG)
  p = params.init(task.specs, jax.random.key(0))
  evaluate = jax.jit(train.make_eval(task.eval_loss))
  sums = train.summed(evaluate(p, make_batch(seed=seed), None) for seed in (1, 2))
  both = jax.tree.map(lambda *xs: jnp.concatenate(xs), make_batch(seed=1), make_batch(seed=2))
  whole = evaluate(p, both, None)
  assert float(sums['loss'].weight) == float(whole['loss'].weight)
  assert float(sums['loss'].total) == pytest.approx(float(whole['loss'].total), rel=1e-6)


@pytest.mark.slow
def test_until_it_thaws_a_leaf_is_as_if_frozen():
  """What moves, its clip and the norm that is reported, with the embedding, whose gradient is the largest, asleep."""
  small = config.replace(CONFIG, optim__clip=0.01)
  thawing, frozen = config.replace(small, optim__thaw=(('embed', 3),)), config.replace(small, optim__freeze='embed')
  (_, _, norms, _), (_, _, want, _) = steps(thawing, 4), steps(frozen, 4)
  assert norms[:3] == pytest.approx(want[:3], rel=1e-6) and norms[3] > 1.1 * want[3]
  got, want = (params.flatten(steps(c, 3)[0].params) for c in (thawing, frozen))
  for path, x in want.items():
    np.testing.assert_allclose(got[path], x, rtol=1e-5, atol=1e-6, err_msg=path)
