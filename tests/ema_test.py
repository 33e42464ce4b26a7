"""The average of the parameters against its recurrence in numpy, and where it is used: evaluation, export, resuming."""

import dataclasses
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from lm import (
  checkpoint,
  config,
  ema,
  instruct,
  logs,
  look,
  optim,
  params,
  peft,
  plan,
  plan_tasks,
  pretrain,
  run,
  sharding,
  start,
  train,
  weights,
)
from lm.data import conversations, loader
from lm.errors import ConfigError, Preempted
from lm.models import decoder
from lm.params import Spec
from lm.text import tokenizer

SPECS = {'embed': Spec((11, 8), ('vocab', 'embed')),
         'blocks': params.stack(2, {'q': Spec((8, 2, 4), ('embed', 'heads', 'head_dim')),
                                    'norm': {'scale': Spec((8,), ('embed',), params.ones)}})}
TASK = tiny.task()
GPT = pretrain.Config(data=loader.Config(length=16, batch=8), model=decoder.Config(
    vocab=258, length=16, layers=2, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  tiny.share_compiled(monkeypatch)


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return tiny.write_text(tmp_path_factory.mktemp('corpus') / 'text.txt')


def random_tree(seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: jnp.asarray(0.1 * rng.standard_normal(s.shape, np.float32)), SPECS)


@pytest.mark.parametrize('name', ['adamw', 'adam_no_bias_correction', 'muon'])
def test_it_is_the_recurrence_and_the_optimizer_does_not_know(name):
  """Bad steps in between leave it alone, and parameters and moments are those of a run without it."""
  c = optim.Config(name=name, lr=0.1, warmup=2)
  tx, plain = optim.make(dataclasses.replace(c, ema=0.7), SPECS), optim.make(c, SPECS)

  @jax.jit
  def step(tree, state, grads, ok):
    updates, state = tx.update(grads, state, tree, ok=ok)
    return optax.apply_updates(tree, updates), state

  @jax.jit
  def without(tree, state, grads, ok):
    updates, state = plain.update(grads, state, tree, ok=ok)
    return optax.apply_updates(tree, updates), state
  tree, other = random_tree(0), random_tree(0)
  state, bare = tx.init(tree), plain.init(other)
  want = jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
  jax.tree.map(np.testing.assert_array_equal, ema.of(state), tree)
  for n in range(6):
    ok = n != 3
    grads = random_tree(n + 1) if ok else jax.tree.map(lambda x: x * jnp.nan, random_tree(n + 1))
    before = ema.of(state)
    tree, state = step(tree, state, grads, ok)
    other, bare = without(other, bare, grads, ok)
    want = jax.tree.map(lambda e, p, ok=ok: 0.7 * e + 0.3 * np.asarray(p, np.float64) if ok else e, want, tree)
    if not ok:
      jax.tree.map(np.testing.assert_array_equal, ema.of(state), before)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ema.of(state), want)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), (tree, state.inner), (other, bare))
  assert np.abs(np.asarray(tree['embed'] - ema.of(state)['embed'])).max() > 1e-3


def test_off_is_the_optimizer_as_it_was():
  state = optim.make(optim.Config(), SPECS).init(random_tree(0))
  assert isinstance(state, optax.ScaleByAdamState) and ema.of(state) is None


def test_the_update_stores_no_copy_of_the_tree():
  tree = {'big': jnp.zeros((4, 256, 256)), 'more': jnp.zeros((4, 256, 256))}
  tx = optim.make(optim.Config(ema=0.99), tree)

  def step(tree, state, grads):
    norm = optax.tree.norm(grads)
    updates, state = tx.update(grads, state, tree, norm=norm, ok=jnp.isfinite(norm))
    return optax.apply_updates(tree, updates), state, norm
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(tree, tx.init(tree), tree).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < tree['big'].nbytes / 2
  assert compiled.memory_analysis().alias_size_in_bytes >= 4 * 2 * tree['big'].nbytes  # p, m, v and e are donated


@pytest.mark.parametrize('value', [1.0, -0.1, float('nan')])
def test_a_decay_out_of_range_is_named(value):
  with pytest.raises(ConfigError, match=f'optim.ema: {value}; expected 0 <= value < 1'):
    optim.Config(ema=value)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [dict(fsdp=4, tensor=2), dict(data=2, fsdp=4, zero=1)], ids=str)
def test_it_lives_where_moments_do_and_is_evaluated_on_any_mesh(mesh):
  c = config.replace(GPT, optim__ema=0.5, mesh=sharding.Config(**mesh))
  task = pretrain.task(c)
  parts = run.build(c, task)
  batch = tiny_batch(parts.mesh)
  with sharding.use(parts.mesh):
    state = jax.jit(lambda key: train.init(task.specs, parts.tx, parts.trainable, key), out_shardings=parts.state)(
        jax.random.key(0))
    for _ in range(2):
      state, _ = parts.step(state, batch, jax.random.key(1))
    found = parts.evaluate(state, batch, jax.random.key(2))
    raw = parts.evaluate(state.replace(opt_state=state.opt_state._replace(average=state.params)), batch,
                         jax.random.key(2))
    e = jax.device_get(ema.of(state.opt_state))
  places = jax.tree.map(lambda x: x.sharding, ema.of(state.opt_state))
  assert places == jax.tree.map(lambda x: x.sharding, state.opt_state.inner.mu)
  one = pretrain.task(GPT).eval_loss(e, jax.device_get(batch), None)[1]['loss']
  assert float(found['loss'].total) == pytest.approx(float(one.total), rel=1e-5)
  assert abs(float(found['loss'].total - raw['loss'].total)) > 1e-4 * float(one.total)


def tiny_batch(mesh):
  struct = plan_tasks.batch_of(GPT, mesh)
  rng = np.random.default_rng(0)
  made = struct.replace(ids_BT=rng.integers(0, 258, struct.ids_BT.shape, np.int32),
                        segments_BT=np.ones(struct.ids_BT.shape, np.int32),
                        positions_BT=np.tile(np.arange(17, dtype=np.int32), (8, 1)), mask_BT=np.ones((8, 17), bool))
  return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), made, struct)


def state_at(c, task, workdir):
  parts = run.build(c, task)
  abstract = start.abstract(task, parts)
  return jax.device_get(checkpoint.restore(workdir / 'checkpoints', abstract.replace(
      frozen=jax.tree.map(lambda x: None, abstract.frozen)))[1])


@pytest.mark.slow
def test_a_stopped_run_resumes_as_if_it_had_not(corpus, tmp_path, monkeypatch):
  c = tiny.make_config(corpus, optim__ema=0.8)
  run.run(c, TASK, tmp_path / 'whole')
  with tiny.batches_through(monkeypatch, tiny.signal_at(6, signal.SIGTERM)), pytest.raises(Preempted):
    run.run(c, TASK, tmp_path / 'stopped')
  run.run(c, TASK, tmp_path / 'stopped')
  assert tiny.state_sha(c, TASK, tmp_path / 'stopped') == tiny.state_sha(c, TASK, tmp_path / 'whole')
  values = [[r['val_loss'] for r in logs.read(tmp_path / name) if 'val_loss' in r] for name in ('stopped', 'whole')]
  assert values[0] == values[1] and len(values[0]) == 3


@pytest.mark.slow
def test_evaluation_and_what_is_read_from_a_checkpoint_are_of_the_average(corpus, tmp_path):
  """Training is that of a run without it; the validation loss is the loss of the stored average."""
  c, plain = (tiny.make_config(corpus, optim__ema=decay) for decay in (0.9, 0.0))
  summary, other = run.run(c, TASK, tmp_path / 'a'), run.run(plain, TASK, tmp_path / 'b')
  with_, without = state_at(c, TASK, tmp_path / 'a'), state_at(plain, TASK, tmp_path / 'b')
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), with_.params, without.params)
  e = ema.of(with_.opt_state)
  assert np.abs(e['unembed'] - with_.params['unembed']).max() > 1e-2
  read = checkpoint.restore_params(tmp_path / 'a/checkpoints', params.abstract(TASK.specs), log=lambda line: None)
  jax.tree.map(np.testing.assert_array_equal, read, e)
  assert abs(summary['val_loss'] - other['val_loss']) > 1e-2
  parts = run.build(c, TASK)
  data = TASK.source.prepare(c.data, tmp_path / 'data', seed=0)
  sums = None
  for batch in TASK.source.eval_batches(data, 'validation', c.data.batch, sharding.batch_sharding(parts.mesh)):
    found = jax.jit(TASK.eval_loss)(e, batch, None)[1]['loss']
    sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
  assert summary['val_loss'] == pytest.approx(float(sums.total) / float(sums.weight), rel=1e-6)


@pytest.mark.slow
def test_few_parameters_are_averaged_and_loaded(tmp_path):
  """LoRA: what trains has an average, what is frozen has none, and the loaded model is the base with the average."""
  (tmp_path / 'chat.jsonl').write_text('\n'.join(
      f'{{"messages": [{{"role": "user", "content": "say {i}"}}, {{"role": "assistant", "content": "ja {i}"}}]}}'
      for i in range(40)))
  c = instruct.Config(model=dataclasses.replace(GPT.model, length=64), data=conversations.Config(
      corpus=str(tmp_path / 'chat.jsonl'), tokenizer='byte', template='plain', length=32, batch=4,
      validation_fraction=0.2), peft=peft.Config('lora', train='', rank=2),
      optim=optim.Config(lr=0.05, steps=4, warmup=1, ema=0.5), checkpoint=checkpoint.Config(every=4))
  task = instruct.task(c)
  run.run(c, task, tmp_path / 'run')
  state = state_at(c, task, tmp_path / 'run')
  e = params.flatten(ema.of(state.opt_state))
  assert e.keys() == params.flatten(state.params).keys() and all('lora_' in path for path in e)
  specs = decoder.specs(c.model)
  found = params.flatten(weights.restore(tmp_path / 'run', specs))
  for path, x in e.items():
    np.testing.assert_array_equal(found[path], x)
  assert 'blocks/attn/k' in found
  assert weights.load(tmp_path / 'run').params['blocks']['attn']['q'].shape == specs['blocks']['attn']['q'].shape


@pytest.mark.slow
def test_training_goes_on_from_the_average(corpus, tmp_path, monkeypatch):
  """`init_from` takes what evaluation saw; a run that began without an average is not resumed with one."""
  c = config.replace(GPT, data=tiny.make_config(corpus).data, optim__steps=4, optim__lr=0.1,
                     optim__ema=0.5, loop__log_every=1, checkpoint__every=4)
  run.run(c, pretrain.task(c), tmp_path / 'run')
  e = ema.of(state_at(c, pretrain.task(c), tmp_path / 'run').opt_state)
  tokenizer.byte().save(tmp_path / 'run/tokenizer')
  tiny.stop_before_the_step(monkeypatch)
  following = config.replace(c, init_from=str(tmp_path / 'run'), optim__ema=0.0)
  with pytest.raises(tiny.Reached) as reached:
    run.run(following, pretrain.task(following), tmp_path / 'next')
  jax.tree.map(np.testing.assert_array_equal, reached.value.state.params, e)
  shutil.rmtree(tmp_path / 'next')
  with pytest.raises(ConfigError, match='opt_state/mu/.* is not in the checkpoint'):
    run.run(config.replace(c, optim__ema=0.0, optim__steps=6), pretrain.task(c), tmp_path / 'run',
            resume_with_changes=True)


def test_its_bytes_are_counted():
  c = config.replace(GPT, optim__ema=0.9)
  task = pretrain.task(c)
  size = [plan.bytes_of(start.abstract(task, parts).opt_state, parts.state.opt_state)
          for parts in (run.build(GPT, pretrain.task(GPT)), run.build(c, task))]
  assert size[1] - size[0] == 4 * params.count(task.specs)
  assert 'bytes, f32 with AdamW and an average' in look.describe(c, task)
