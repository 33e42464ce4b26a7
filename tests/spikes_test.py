"""Steps left out because they are spikes: the record against NumPy's, and what a run does about one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from lm import checkpoint, config, ema, logs, optim, run, sharding, spikes, train
from lm.errors import ConfigError, Preempted
from lm.losses import Term

WINDOW, SIGMA = 8, 3.0


def optimizer(average=0.0, sigma=SIGMA):
  c = optim.Config(lr=0.1, schedule='constant', steps=200, spike_sigma=sigma, spike_window=WINDOW, ema=average)
  return optim.make(c, {'w': jax.ShapeDtypeStruct((4,), jnp.float32)})


@pytest.mark.parametrize('average', [0.0, 0.9])
def test_the_judgement_is_that_of_the_steps_before(average):
  rng = np.random.default_rng(0)
  pairs = rng.lognormal(size=(60, 2)).astype(np.float32) + [3, 1]
  pairs[20, 0], pairs[33, 1] = np.nan, np.inf
  state, kept, found = optimizer(average).init({'w': jnp.zeros(4)}), [], []
  usual, note = jax.jit(spikes.usual), jax.jit(spikes.note)
  for pair in pairs:
    recent = np.array(kept[-WINDOW:], np.float64).reshape(-1, 2)
    want = len(recent) < WINDOW / 2 or bool((pair <= recent.mean(0) + SIGMA * recent.std(0, ddof=1)).all())
    assert bool(usual(state, *pair)) == want
    found.append(want)
    state = note(state, *pair)
    kept += [pair] * bool(np.isfinite(pair).all())
  assert 3 < found.count(False) < 20 and found.count(True) > 20


def test_an_optimizer_without_a_record_finds_all_usual():
  state = optimizer(0.9, sigma=0.0).init({'w': jnp.zeros(4)})
  assert bool(spikes.usual(state, jnp.float32(1e9), jnp.float32(1e9)))
  noted = spikes.note(state, jnp.float32(1), jnp.float32(1))
  assert jax.tree.structure(noted) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, noted, state)


def noisy(p, batch, key):
  """A gradient of `batch`'s size and a loss 10 times that; 0 has no targets."""
  size = batch[0]
  return {'loss': Term(10 * size + size * (p['w'].sum() - jax.lax.stop_gradient(p['w'].sum())), jnp.sign(size))}, {}


def run_steps(tx, sizes):
  """[is the step left out?], [w before each step and after the last], the last state."""
  state = train.state_of({'w': jnp.ones(4)}, tx, {'w': True})
  step, skipped, values = jax.jit(train.make_step(noisy, tx)), [0], [np.ones(4)]
  for size in sizes:
    state, _ = step(state, jnp.full((1,), size), jax.random.key(0))
    skipped.append(int(state.skipped))
    values.append(np.asarray(state.params['w']))
  return np.diff(skipped).tolist(), values, state


@pytest.mark.parametrize('average', [0.0, 0.9])
def test_a_spike_changes_nothing_and_what_rose_for_good_is_followed(average):
  calm = [1 + 0.1 * (i % 3) for i in range(20)]
  skipped, values, state = run_steps(optimizer(average), [*calm, 100.0, *calm])
  assert skipped == [0] * 20 + [1] + [0] * 20
  np.testing.assert_array_equal(values[20], values[21])
  assert not np.array_equal(values[21], values[22])
  counts = [x for path, x in jax.tree.leaves_with_path(state.opt_state) if 'count' in jax.tree_util.keystr(path)]
  assert [int(x) for x in counts] == [40]  # Adam's, which stood still once
  none, plain, _ = run_steps(optimizer(average, sigma=0.0), [*calm, 100.0, *calm])
  assert sum(none) == 0 and not np.array_equal(plain[20], plain[21])
  risen, *_ = run_steps(optimizer(average), [*calm, *(100 + x for x in calm)])
  assert risen[20] == 1 and sum(risen) < 4 and risen[-10:] == [0] * 10


@pytest.mark.parametrize('average', [0.0, 0.9])
def test_a_batch_without_targets_enters_no_record(average):
  *_, before = run_steps(optimizer(average), [1.0, 1.2])
  skipped, _, after = run_steps(optimizer(average), [1.0, 1.2, 0.0])
  assert skipped == [0, 0, 1]
  jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)


def test_the_average_stands_still_too():
  _, _, before = run_steps(optimizer(0.9), [1.0, 1.1] * 10)
  _, _, after = run_steps(optimizer(0.9), [1.0, 1.1] * 10 + [100.0])
  np.testing.assert_array_equal(ema.of(before.opt_state)['w'], ema.of(after.opt_state)['w'])
  assert not np.array_equal(ema.of(before.opt_state)['w'], before.params['w'])


def test_updates_are_those_of_the_optimizer_inside():
  tree, grads = {'w': jnp.arange(4.0)}, {'w': jnp.array([1.0, -2.0, 0.5, 0.0])}
  plain, ours = (tx.update(grads, tx.init(tree), tree, norm=optax.tree.norm(grads), ok=jnp.bool_(True))[0]
                 for tx in (optimizer(sigma=0.0), optimizer()))
  np.testing.assert_array_equal(plain['w'], ours['w'])


@pytest.mark.slow
def test_a_run_goes_on_with_its_record_and_takes_the_new_bound(tmp_path):
  corpus = tiny.write_text(tmp_path / 'text.txt')
  c = tiny.make_config(corpus, optim__spike_sigma=4.0, optim__spike_window=8)
  task = tiny.task()
  run.run(c, task, tmp_path / 'straight')
  with pytest.MonkeyPatch.context() as m, tiny.batches_through(m, tiny.signal_at(6)), pytest.raises(Preempted):
    run.run(c, task, tmp_path / 'run')
  run.run(c, task, tmp_path / 'run')
  losses = lambda name: [(row['step'], row['loss'], row['skipped']) for row in logs.read(tmp_path / name)]
  assert losses('run') == losses('straight')
  record = checkpoint.seal.read(tmp_path / 'run' / 'checkpoints', 12)['leaves']
  assert record['opt_state/recent_2W'] == 'float32[2, 8]' and not any('sigma' in path for path in record)
  # Another bound is another config, but not another checkpoint.
  run.run(config.replace(c, optim__spike_sigma=1e-6, optim__steps=16), task, tmp_path / 'run', resume_with_changes=True)
  assert logs.read(tmp_path / 'run')[-1]['skipped'] > logs.read(tmp_path / 'straight')[-1]['skipped']


@pytest.mark.parametrize('change, where', [
    (dict(spike_sigma=-1.0), 'optim.spike_sigma: -1.0'), (dict(spike_sigma=float('nan')), 'optim.spike_sigma: nan'),
    (dict(spike_window=3), 'optim.spike_window: 3; expected at least 4')])
def test_refusals(change, where):
  with pytest.raises(ConfigError, match=where):
    optim.Config(**change)


@pytest.mark.slow
def test_a_mesh_leaves_out_the_same_steps(tmp_path):
  """The record is on every device, the loss and the norm are of the whole batch."""
  corpus, found = tiny.write_text(tmp_path / 'text.txt'), []
  for i, mesh in enumerate((dict(), dict(data=4, fsdp=2))):
    c = tiny.make_config(corpus, mesh=sharding.Config(**mesh), optim__spike_sigma=0.5, optim__spike_window=4)
    run.run(c, tiny.task(), tmp_path / str(i))
    found.append([row['skipped'] for row in logs.read(tmp_path / str(i))])
  assert found[0] == found[1] and 0 < found[0][-1] < 10
