"""Learning-rate schedules against published values, and each optimizer against optax's own, option by option."""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import config, optim, params, sharding
from lm.errors import ConfigError
from lm.params import Spec

SPECS = {
    'embed': Spec((11, 8), ('vocab', 'embed')),
    'blocks': params.stack(3, {
        'norm': {'scale': Spec((8,), ('embed',), params.ones)},
        'q': Spec((8, 2, 4), ('embed', 'heads', 'head_dim')),
        'q_bias': Spec((2, 4), ('heads', 'head_dim')),
        'o': Spec((2, 4, 8), ('heads', 'head_dim', 'embed')),
        'up': Spec((8, 12), ('embed', 'mlp')),
    }),
}


def random_tree(seed=0, scale=0.02):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: jnp.asarray(scale * rng.standard_normal(s.shape, np.float32)), SPECS)


def gradients(n):
  """n gradient trees of very different norms, so that some are clipped and some are not."""
  return [random_tree(i + 1, 0.02 * 10.0 ** (i % 4 - 1)) for i in range(n)]


def update_once(tx, tree, grads, **extra):
  return jax.jit(lambda g, p, extra: tx.update(g, tx.init(p), p, **extra))(grads, tree, extra)


def run(tx, tree, grads):
  update, state = jax.jit(tx.update), jax.jit(tx.init)(tree)
  for g in grads:
    updates, state = update(g, state, tree)
    tree = optax.apply_updates(tree, updates)
  return tree, state


def assert_close(a, b, rtol=1e-6, atol=1e-7):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


def decay_mask(pattern):
  return lambda tree: jax.tree.map(lambda m: not m, params.match(tree, pattern))


# --- schedules


@pytest.mark.parametrize('c, golden', [
    # nanoGPT's get_lr, it 0..; BERT's and ELECTRA's create_optimizer, by global step.
    (dict(lr=6e-4, schedule='cosine', steps=600_000, warmup=2000, min_lr=6e-5),
     {0: 2.9985e-7, 1000: 3.00150e-4, 1999: 5.99700e-4, 2000: 6e-4, 301_000: 3.3e-4, 600_000: 6e-5, 700_000: 6e-5}),
    (dict(lr=1e-4, schedule='bert_linear', steps=1_000_000, warmup=10_000),
     {0: 0, 1: 1e-8, 5000: 5e-5, 9999: 9.999e-5, 10_000: 9.9e-5, 500_000: 5e-5, 1_000_000: 0, 1_100_000: 0}),
    (dict(lr=5e-4, schedule='electra_linear', steps=1_000_000, warmup=10_000),
     {0: 0, 5000: 2.4875e-4, 10_000: 4.95e-4, 100_000: 4.5e-4, 500_000: 2.5e-4, 1_000_001: 0}),
    # PaLM: 1e-2 for 10k steps, then 1 / sqrt(step).
    (dict(lr=1e-2, schedule='inverse_sqrt', steps=255_000, decay_steps=245_000),
     {0: 1e-2, 9999: 1e-2, 10_000: 1e-2, 40_000: 5e-3, 250_000: 2e-3}),
    (dict(lr=1e-2, schedule='inverse_sqrt', steps=255_000, decay_steps=245_000, min_lr=4e-3),
     {10_000: 1e-2, 40_000: 5e-3, 90_000: 4e-3, 255_000: 4e-3}),
    # The same name with a warm-up, as fairseq has it.
    (dict(lr=1e-3, schedule='inverse_sqrt', steps=10_000, warmup=400), {199: 1e-3 * 200 / 401, 400: 1e-3, 1600: 5e-4}),
    # GPT-3 in steps of 0.5M tokens: warm-up 375M, 10% at 260B, flat to 300B.
    (dict(lr=6e-4, schedule='cosine', steps=600_000, warmup=750, decay_steps=519_250, min_lr=6e-5),
     {750: 6e-4, 260_375: 3.3e-4, 520_000: 6e-5, 560_000: 6e-5, 600_000: 6e-5}),
    # SmolLM2: flat to 1.6M, then linear to 0.
    (dict(lr=3e-3, schedule='wsd', steps=2_000_000, warmup=2000, decay_steps=400_000),
     {2000: 3e-3, 1_600_000: 3e-3, 1_800_000: 1.5e-3, 2_000_000: 0, 2_000_001: 0}),
    (dict(lr=3e-3, schedule='wsd', steps=2_000_000, warmup=2000, decay_steps=400_000, min_lr=3e-4),
     {1_600_000: 3e-3, 1_800_000: 1.65e-3, 2_000_000: 3e-4, 2_000_001: 3e-4}),
    (dict(lr=1e-4, schedule='bert_linear', steps=1_000_000, warmup=10_000, min_lr=1e-5),
     {5000: 5e-5, 10_000: 9.91e-5, 500_000: 5.5e-5, 1_000_000: 1e-5}),
    (dict(lr=5e-4, schedule='electra_linear', steps=1_000_000, warmup=10_000, min_lr=1e-4),
     {0: 0, 5000: 2.49e-4, 500_000: 3e-4, 1_000_001: 1e-4}),
    (dict(lr=1e-3, schedule='linear', steps=110, warmup=10, min_lr=1e-4),
     {9: 1e-3 * 10 / 11, 10: 1e-3, 60: 5.5e-4, 111: 1e-4}),
    (dict(lr=1e-3, schedule='constant', steps=10, warmup=1), {0: 5e-4, 1: 1e-3, 99: 1e-3}),
    (dict(lr=1e-3, schedule='linear', steps=10, warmup=10), {0: 1e-3 / 11, 10: 1e-3, 99: 1e-3}),  # erratum: 0 / 0
])
def test_published_learning_rates(c, golden):
  rate = optim.schedule(optim.Config(**c))
  for step, want in golden.items():
    np.testing.assert_allclose(rate(step), want, rtol=1e-6, atol=1e-11, err_msg=str(step))
    np.testing.assert_allclose(jax.jit(rate)(jnp.int32(step)), want, rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize('name', typing.get_args(typing.get_type_hints(optim.Config)['schedule']))
@pytest.mark.parametrize('warmup, decay', [(0, 0), (7, 0), (7, 20), (50, 0)])
def test_a_schedule_stays_in_its_range_and_is_flat_outside_the_run(name, warmup, decay):
  if decay and name in ('constant', 'bert_linear', 'electra_linear'):
    pytest.skip('has no decay_steps')
  c = optim.Config(lr=1e-3, schedule=name, steps=50, warmup=warmup, decay_steps=decay, min_lr=0.0)
  rates = np.asarray(optim.schedule(c)(np.arange(-3, 60)))
  assert (rates >= 0).all() and (rates <= np.float32(c.lr)).all()
  assert (rates[:3] == rates[3]).all() and (rates[53:] == rates[53]).all()
  after = rates[3 + warmup:]
  assert (np.diff(after) <= 1e-9).all(), 'rises again'


def test_optax_agrees_on_cosine_and_linear():
  c = optim.Config(lr=6e-4, schedule='cosine', steps=600, warmup=0, min_lr=6e-5)
  theirs = optax.cosine_decay_schedule(6e-4, 600, 0.1), optax.linear_schedule(6e-4, 6e-5, 600)
  for ours, other in zip((c, dataclasses.replace(c, schedule='linear')), theirs, strict=True):
    for step in (0, 1, 17, 300, 599, 600, 900):
      np.testing.assert_allclose(optim.schedule(ours)(step), other(step), rtol=1e-5)


# --- AdamW


@pytest.mark.parametrize('change', [
    {}, {'clip': 0.0}, {'clip': 1e-3}, {'clip': 1e9}, {'weight_decay': 0.0}, {'no_decay': ''},
    {'no_decay': 'embed|q$'}, {'b1': 0.0}, {'b2': 0.0, 'clip': 0.0}, {'b2': 0.999}, {'eps': 1e-3},
    {'schedule': 'constant'}, {'schedule': 'wsd', 'decay_steps': 3},
], ids=str)
def test_adamw_is_optax_adamw(change):
  c = optim.Config(lr=1e-2, steps=8, warmup=2, **change)
  tree = random_tree()
  mask = decay_mask(c.no_decay or '^$')
  theirs = optax.adamw(optim.schedule(c), c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=mask)
  if c.clip:
    theirs = optax.chain(optax.clip_by_global_norm(c.clip), theirs)
  want, _ = run(theirs, tree, gradients(8))
  got, state = run(optim.make(c, SPECS), tree, gradients(8))
  assert_close(got, want)
  assert state.count == 8


def test_adam_without_bias_correction_is_berts():
  """google-research/bert optimization.py: m / (sqrt(v) + eps) + decay * p, all times the rate."""
  c = optim.Config(name='adam_no_bias_correction', schedule='constant', lr=1e-2, b2=0.999, eps=1e-6, weight_decay=0.01)
  tree = {'kernel': jnp.array([1.0, -2.0]), 'norm': {'bias': jnp.array([0.5])}}
  p, m, v = {'kernel': np.array([1.0, -2.0]), 'bias': np.array([0.5])}, 0, 0
  got, _ = run(optim.make(c, tree), tree, [{'kernel': jnp.array([0.3, 0.4]), 'norm': {'bias': jnp.array([-0.1])}}] * 3)
  for name, g, decay in (('kernel', np.array([0.3, 0.4]), 0.01), ('bias', np.array([-0.1]), 0)):
    m = v = 0
    for _ in range(3):
      m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
      p[name] = p[name] - 1e-2 * (m / (np.sqrt(v) + 1e-6) + decay * p[name])
  np.testing.assert_allclose(got['kernel'], p['kernel'], rtol=1e-5)
  np.testing.assert_allclose(got['norm']['bias'], p['bias'], rtol=1e-5)


def test_adam_of_tensorflow_adds_eps_before_the_correction():
  """lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps): with a large eps, first updates smaller than AdamW's."""
  c = optim.Config('adam_tf', schedule='constant', lr=1e-2, b2=0.999, eps=1e-2, weight_decay=0.0, clip=0.0)
  tree, p, m, v = {'kernel': jnp.array([1.0, -2.0])}, np.array([1.0, -2.0]), 0, 0
  for t, g in enumerate(np.array([[0.3, 0.4], [-0.1, 0.2], [0.05, 0.0]]), 1):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    p = p - 1e-2 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-2)
  grads = [{'kernel': jnp.array(g)} for g in ([0.3, 0.4], [-0.1, 0.2], [0.05, 0.0])]
  np.testing.assert_allclose(run(optim.make(c, tree), tree, grads)[0]['kernel'], p, rtol=1e-5)
  moved = [abs(run(optim.make(dataclasses.replace(c, name=name), tree), tree, grads[:1])[0]['kernel'] - tree['kernel'])
           for name in ('adam_tf', 'adamw')]
  assert (moved[0] < 0.6 * moved[1]).all()


def test_defaults_decay_no_norm_and_no_bias():
  c = optim.Config(lr=0.1, schedule='constant', weight_decay=0.5)
  tree = jax.tree.map(jnp.ones_like, random_tree())
  got, _ = run(optim.make(c, SPECS), tree, [jax.tree.map(jnp.zeros_like, tree)])
  moved = {path for path, x in params.flatten(got).items() if (x != 1).all()}
  assert moved == {'embed', 'blocks/q', 'blocks/o', 'blocks/up'}


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_multipliers_scale_the_first_match_and_layers_one_by_one(name):
  c = optim.Config(name, lr=1e-2, schedule='constant', multipliers=(('blocks/q$', (0.25, 0.5, 1.0)), ('blocks/q', 3.0),
                                                              ('embed', 0.0)))
  tree = random_tree()
  g = gradients(1)[0]
  step = lambda c: params.flatten(update_once(optim.make(c, SPECS), tree, g)[0])
  base, got = step(dataclasses.replace(c, multipliers=())), step(c)
  for path, u in base.items():
    factor = {'blocks/q': np.array([0.25, 0.5, 1.0]).reshape(3, 1, 1, 1), 'blocks/q_bias': 3.0, 'embed': 0.0}
    np.testing.assert_allclose(got[path], u * factor.get(path, 1.0), rtol=1e-6, err_msg=path)


def test_a_given_norm_is_used():
  c = optim.Config(clip=1.0)
  tree, g = random_tree(), gradients(1)[0]
  tx = optim.make(c, SPECS)
  _, state = update_once(tx, tree, g, norm=4.0)
  assert_close(state.mu, jax.tree.map(lambda g: 0.1 * g / 4, g))
  assert_close(update_once(tx, tree, g, norm=optax.tree.norm(g)), update_once(tx, tree, g))


# --- holes, bad steps, sharding: for every optimizer

ALL = pytest.mark.parametrize('name', ['adamw', 'adam_no_bias_correction', 'adam_tf', 'muon'])


@ALL
def test_frozen_leaves_have_no_state_and_change_nothing_else(name):
  c = optim.Config(name=name, freeze='embed|norm', clip=0.0)
  tree = random_tree()
  mask = optim.trainable_mask(c, SPECS)
  assert params.flatten(mask) == {p: not ('embed' in p or 'norm' in p) for p in params.flatten(SPECS)}
  train, _ = params.split(tree, mask)
  got, state = run(optim.make(c, SPECS), train, (params.split(g, mask)[0] for g in gradients(3)))
  want, _ = run(optim.make(c, SPECS), tree, gradients(3))
  assert_close(got, params.split(want, mask)[0])
  assert not any('embed' in path or 'norm' in path for path in params.flatten(state))


@pytest.mark.slow
@ALL
def test_a_refused_step_changes_nothing(name):
  tx = optim.make(optim.Config(name=name), SPECS)
  tree = random_tree()
  good = gradients(3)
  bad = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), good[0])
  update = jax.jit(lambda g, s, p, ok: tx.update(g, s, p, norm=optax.tree.norm(g), ok=ok))
  _, state = update(good[0], tx.init(tree), tree, True)
  updates, after = update(bad, state, tree, False)
  assert all((u == 0).all() for u in jax.tree.leaves(updates))
  jax.tree.map(np.testing.assert_array_equal, after, state)
  assert_close(update(good[1], state, tree, True), jax.jit(tx.update)(good[1], state, tree))


@ALL
def test_moments_live_where_their_parameters_do(name):
  mesh = sharding.make_mesh(sharding.Config(data=1, fsdp=4, tensor=2))
  tx = optim.make(optim.Config(name=name), SPECS)
  specs = {'blocks': SPECS['blocks']}
  state = jax.eval_shape(tx.init, params.abstract(specs))
  placed = params.flatten(sharding.like(state, specs, mesh))
  moments = [s.spec for path, s in placed.items() if path.endswith('blocks/up')]
  assert len(moments) == (1 if name == 'muon' else 2)
  assert set(moments) == {sharding.partition(('layers', 'embed', 'mlp'))}


@pytest.mark.slow
@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_mesh_gives_the_same_update(name):
  mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2, tensor=2))
  tx, specs = optim.make(optim.Config(name=name, clip=0.01), SPECS), {'blocks': SPECS['blocks']}
  tree, grads = ({'blocks': t['blocks']} for t in (random_tree(), random_tree(1)))
  with sharding.use(mesh):
    placed = jax.device_put((grads, tree), (sharding.shardings(specs, mesh),) * 2)
    got, state = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(*placed)
  want = update_once(tx, tree, grads)
  assert_close(got, want[0], rtol=1e-4)
  assert_close(state, want[1], rtol=1e-4)


@pytest.mark.parametrize('thaw', [(), (('big', (3, 2, 1, 0)), ('more', 2))])
def test_the_update_stores_no_copy_of_the_tree(thaw):
  """Clipping, masks, the learning rate and a refused step all fold into the loops that write p, m and v."""
  c = optim.Config(multipliers=(('big', 0.5),), thaw=thaw)
  tree = {'big': jnp.zeros((4, 256, 256)), 'more': jnp.zeros((4, 256, 256))}
  tx, norm_of = optim.make(c, tree), optim.gradient_norm(c, tree)

  def step(tree, state, grads):
    norm = norm_of(grads, state)
    updates, state = tx.update(grads, state, tree, norm=norm, ok=jnp.isfinite(norm))
    return optax.apply_updates(tree, updates), state, norm
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(tree, tx.init(tree), tree).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < tree['big'].nbytes / 2


# --- Muon


def test_muon_orthogonalises_each_layer_and_leaves_the_rest_to_adamw():
  c = optim.Config(name='muon', lr=1e-2, schedule='constant', weight_decay=0.0, clip=1e-3)
  tree, g = random_tree(), gradients(1)[0]
  got, state = update_once(optim.make(c, SPECS), tree, g)
  want, adamw = update_once(optim.make(dataclasses.replace(c, name='adamw'), SPECS), tree, g)
  for path in ('embed', 'blocks/norm/scale', 'blocks/q_bias'):
    np.testing.assert_allclose(params.flatten(got)[path], params.flatten(want)[path], rtol=1e-6)
    np.testing.assert_allclose(params.flatten(state['adam'].mu)[path], params.flatten(adamw.mu)[path], rtol=1e-6)
  for name, rows, columns in (('q', 8, 8), ('o', 8, 8), ('up', 8, 12)):
    size = 0.2 * math.sqrt(max(rows, columns))  # of each singular value: AdamW's root mean square is about 0.2
    for layer, gradient in zip(got['blocks'][name], g['blocks'][name], strict=True):
      values = np.linalg.svd(np.asarray(layer).reshape(rows, columns), compute_uv=False) / (1e-2 * size)
      assert (0.3 < values).all() and (values < 1.4).all(), (name, values)
      u, _, v = np.linalg.svd(np.asarray(gradient).reshape(rows, columns), full_matrices=False)
      assert np.trace(u.T @ -np.asarray(layer).reshape(rows, columns) @ v.T) > 0.5 * 1e-2 * size * rows


@pytest.mark.slow
@pytest.mark.parametrize('clip', [0.0, 0.1])
def test_muon_on_a_stack_is_optax_muon_on_each_matrix(clip):
  """The gradient is clipped by the norm of all leaves."""
  c = optim.Config(name='muon', lr=1e-2, steps=5, weight_decay=0.3, clip=clip)
  tree, clipped = random_tree(), gradients(5)
  if clip:
    clipped = [optax.clip_by_global_norm(clip).update(g, optax.EmptyState())[0] for g in clipped]
  got, _ = run(optim.make(c, SPECS), tree, gradients(5))
  flat = {'q': (8, 8), 'o': (8, 8), 'up': (8, 12)}
  theirs = optax.contrib.muon(optim.schedule(c), weight_decay=c.weight_decay, consistent_rms=0.2)
  for layer in range(3):
    pick = lambda t, layer=layer: {n: t['blocks'][n][layer].reshape(s) for n, s in flat.items()}
    want, _ = run(theirs, pick(tree), map(pick, clipped))
    assert_close(pick(got), want, rtol=1e-4, atol=1e-6)


# --- refusals


@pytest.mark.parametrize('change, where', [
    (dict(lr=-1e-3), 'optim.lr: -0.001'), (dict(lr=math.nan), 'optim.lr: nan'), (dict(lr=math.inf), 'optim.lr: inf'),
    (dict(warmup=-5), 'optim.warmup: -5'), (dict(warmup=11, steps=10), 'optim.warmup: 11'),
    (dict(steps=0), 'optim.steps'), (dict(b1=1.0), 'optim.b1'), (dict(b2=-0.1), 'optim.b2'),
    (dict(b2=math.nan), 'optim.b2'), (dict(eps=-1.0), 'optim.eps'), (dict(weight_decay=-0.1), 'optim.weight_decay'),
    (dict(clip=-1.0), 'optim.clip'), (dict(clip=math.nan), 'optim.clip'),
    (dict(decay_steps=11, steps=10), 'optim.decay_steps'), (dict(decay_steps=-1), 'optim.decay_steps'),
    (dict(lr=1e-4, min_lr=1e-3), 'optim.min_lr'), (dict(microbatches=0), 'optim.microbatches'),
    (dict(schedule='constant', min_lr=1e-4), "optim.min_lr: 0.0001, which 'constant' does not read; set optim.min_lr"),
    (dict(schedule='constant', decay_steps=3), "optim.decay_steps: 3, which 'constant' does not read"),
    (dict(schedule='bert_linear', decay_steps=3), "optim.decay_steps: 3, which 'bert_linear'"),
    (dict(schedule='electra_linear', decay_steps=3), "optim.decay_steps: 3, which 'electra_linear'"),
    (dict(freeze='('), 'optim.freeze'), (dict(no_decay='*'), 'optim.no_decay'),
    (dict(multipliers=(('[', 1.0),)), 'optim.multipliers'), (dict(multipliers=(('a', -1.0),)), 'optim.multipliers'),
    (dict(multipliers=(('a', (1.0, math.nan)),)), 'optim.multipliers'),
], ids=str)
def test_a_value_out_of_range_is_named(change, where):
  with pytest.raises(ConfigError, match=where):
    optim.Config(**change)


@pytest.mark.parametrize('use, where', [
    (lambda c: optim.trainable_mask(c(freeze='nothing'), SPECS), "optim.freeze: 'nothing' matches no parameter"),
    (lambda c: optim.trainable_mask(c(freeze='.'), SPECS), 'matches every parameter'),
    (lambda c: optim.make(c(multipliers=(('nothing', 1.0),)), SPECS), 'optim.multipliers'),
    (lambda c: optim.make(c(multipliers=(('blocks', (1.0, 2.0)),)), SPECS), '2 values for blocks/norm/scale'),
    (lambda c: optim.make(c(name='muon'), {'embed': SPECS['embed']}), 'optim.name'),
    (lambda c: optim.make(c(name='muon'), {'blocks': {'q': jnp.zeros((3, 8, 8))}}), 'optim.name'),
])
def test_a_pattern_that_does_not_fit_the_tree_is_refused(use, where):
  with pytest.raises(ConfigError, match=where):
    use(optim.Config)


def test_a_rate_of_zero_is_allowed_with_a_warning():
  with pytest.warns(UserWarning, match='optim.lr: 0'):
    optim.make(optim.Config(lr=0.0), SPECS)


def test_set_takes_the_nested_tuples():
  c = config.override(optim.Config(), "multipliers=(('embed', 0.1), ('blocks', (1, 0.5)))")
  assert c.multipliers == (('embed', 0.1), ('blocks', (1.0, 0.5)))
  assert config.from_json(optim.Config, config.to_json(c)) == c


def test_layer_decay_is_the_electra_codes():
  (embeddings, low), (blocks, factors) = optim.layer_decay(12, 0.8)
  np.testing.assert_allclose([low, factors[0], factors[-1]], [0.0439805, 0.0549756, 0.64], rtol=1e-5)
  assert optim.layer_decay(12, 0.8, as_in_paper=True)[1][1][-1] == pytest.approx(0.8)
  tree = {'embed': {'tokens': params.Spec((4, 2), ('vocab', 'embed'))}, 'classify': params.Spec((2,), (None,)),
          'blocks': {'mlp': {'up': params.Spec((12, 2, 2), ('layers', 'embed', 'mlp'))}}}
  c = optim.Config(lr=1.0, schedule='constant', weight_decay=0.0, clip=0.0, multipliers=optim.layer_decay(12, 0.8))
  p = jax.tree.map(lambda s: jnp.ones(s.shape), tree)
  tx = optim.make(c, tree)
  updates, _ = jax.jit(tx.update)(p, tx.init(p), p)
  assert -float(updates['classify'][0]) == pytest.approx(1, rel=1e-4)
  assert -float(updates['embed']['tokens'][0, 0]) == pytest.approx(0.8**14, rel=1e-4)
  np.testing.assert_allclose(-updates['blocks']['mlp']['up'][:, 0, 0], 0.8 ** np.arange(13, 1, -1), rtol=1e-4)
  assert embeddings.startswith('^(embed') and blocks == '^blocks/'


def test_networks_are_clipped_each_by_its_own_norm():
  """Two networks under one optimizer move as each would under its own."""
  p = {'generator': {'w': jnp.ones((3, 2))}, 'discriminator': {'w': jnp.ones((3, 2)), 'v': jnp.ones(2)}}
  g = jax.tree.map(lambda x: 5.0 * x, p) | {'generator': {'w': jnp.full((3, 2), 0.01)}}
  c = optim.Config(lr=0.1, schedule='constant', eps=1e-2, clip=1.0)
  both = optim.make(dataclasses.replace(c, networks=('^generator/', '^discriminator/')), p)
  updates, _ = jax.jit(both.update)(g, both.init(p), p)
  for name, half in p.items():
    tx = optim.make(c, half)
    want, _ = jax.jit(tx.update)(g[name], tx.init(half), half)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates[name], want)
  one = optim.make(c, p)
  other, _ = jax.jit(one.update)(g, one.init(p), p)
  assert not np.allclose(other['generator']['w'], updates['generator']['w'])
  with pytest.raises(ConfigError, match='optim.networks'):
    optim.Config(name='muon', networks=('a',))
  with pytest.raises(ConfigError, match=r"optim.networks: 'x/' matches no parameter"):
    optim.make(dataclasses.replace(c, networks=('x/',)), p)


def test_leaves_thaw_one_after_the_other():
  """Before its step neither a leaf nor its moments move; decay waits too. Layers of a stack have steps of their own."""
  specs = {'a': params.Spec((3,), (None,)), 'blocks': {'w': params.Spec((2, 3), ('layers', None))}}
  c = optim.Config(lr=0.1, schedule='constant', steps=10, clip=0.0, thaw=(('^a$', 2), ('^blocks/', (3, 1))))
  tx, tree = optim.make(c, specs), {'a': jnp.ones(3), 'blocks': {'w': jnp.ones((2, 3))}}
  state, moved = tx.init(tree), []
  update = jax.jit(tx.update)
  for _ in range(5):
    updates, state = update(jax.tree.map(jnp.ones_like, tree), state, tree)
    moved.append([bool((u != 0).any()) for u in (updates['a'], *updates['blocks']['w'])])
    step = -0.1 * (1 + c.weight_decay)  # Adam's of a constant gradient: bias is corrected from each leaf's own start
    np.testing.assert_allclose([u[0] / step for u in (updates['a'], *updates['blocks']['w'])], moved[-1], rtol=1e-5)
    if not moved[-1][0]:
      assert not state.mu['a'].any() and not state.nu['a'].any()
  assert moved == [[False, False, False], [False, False, True], [True, False, True], [True, True, True],
                   [True, True, True]]
  for thaw, message in (((('nothing', 1),), 'matches no parameter'), ((('^blocks/', (1,)),), '1 values for blocks/w'),
                        ((('^a$', 10),), 'optim.thaw'), ((('^blocks/', (0, -1)),), 'optim.thaw')):
    with pytest.raises(ConfigError, match=message):
      optim.make(dataclasses.replace(c, thaw=thaw), specs)


def test_what_sleeps_is_in_no_norm():
  """The norm and the clipped update are those under `freeze`, bit for bit; of a stack the layers that sleep are out."""
  specs = {'a': params.Spec((2,), (None,)), 'b': params.Spec((4,), (None,)),
           'blocks': params.Spec((2, 2), ('layers', None))}
  c = optim.Config(lr=0.1, schedule='constant', eps=0.1, clip=1.0, thaw=(('^b$', 5), ('^blocks', (5, 3))), ema=0.5)
  tree = {'a': jnp.ones(2), 'b': jnp.ones(4), 'blocks': jnp.ones((2, 2))}
  grads = {'a': jnp.array([0.3, 0.4]), 'b': jnp.full(4, 50.0), 'blocks': jnp.array([[jnp.nan, jnp.inf], [0.0, 1.2]])}
  tx, norm = optim.make(c, specs), optim.gradient_norm(c, specs)

  def step(grads, state, tree):
    found = norm(grads, state)
    return found, tx.update(grads, state, tree, norm=found, ok=jnp.isfinite(found))
  frozen = dataclasses.replace(c, thaw=(), freeze='^b')
  kept, _ = params.split(tree, optim.trainable_mask(frozen, specs))
  kept_grads, _ = params.split(grads, optim.trainable_mask(frozen, specs))
  under = optim.make(frozen, specs)
  state, other, found = tx.init(tree), under.init(kept), []
  for _ in range(4):
    without, _ = jax.jit(tx.update)(grads, state, tree)
    size, (updates, state) = jax.jit(step)(grads, state, tree)
    want, other = jax.jit(under.update)(kept_grads, other, kept)
    jax.tree.map(np.testing.assert_array_equal, without, updates)
    found.append((float(size), bool((updates['a'] == want['a']).all())))
    assert not updates['b'].any() and not updates['blocks'][0].any()
  assert found == [(0.5, True), (0.5, True), (0.5, True), (pytest.approx(1.3), False)]
  assert optim.gradient_norm(frozen, specs)(kept_grads, other) == 0.5
  own = optim.make(dataclasses.replace(c, networks=('^(a|b)$', '^blocks')), specs)
  updates, _ = jax.jit(own.update)(grads, own.init(tree), tree)
  want, _ = jax.jit(under.update)(kept_grads, under.init(kept), kept)
  np.testing.assert_array_equal(updates['a'], want['a'])
