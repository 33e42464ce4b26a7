"""Replaced token detection against a numpy loop; what is drawn, what counts as replaced, where no gradient flows."""

import functools
import re

import jax
import jax.numpy as jnp
from marks import slow
import numpy as np
import pytest

from lm import config, sharding, train
from lm.data import masking
from lm.data.inputs import Inputs
from lm.errors import ConfigError
from lm.kernels import cross_entropy
from lm.losses import rtd

V, D, T = 24, 8, 32
TOKENS = masking.Tokens(3, V, (0, 1, 2, 3))
LENGTHS = [32, 20, 0, 3, 32, 5, 32, 11]


def inputs_of(lengths=LENGTHS):
  rng = np.random.default_rng(0)
  lengths, columns = np.asarray(lengths)[:, None], np.arange(T)[None]
  used = columns < lengths
  special = used & ((columns == 0) | (columns == lengths - 1))
  ids = np.where(used, np.where(special, 1, rng.integers(4, V, used.shape)), 0)
  as32 = lambda x: jnp.asarray(x, jnp.int32)
  return Inputs(as32(ids), as32(used), as32(used & (columns > 9)), as32(np.where(used, columns, 0)),
                jnp.asarray(special), jnp.zeros(len(lengths), bool), jnp.arange(len(lengths), dtype=jnp.uint32))


def body(p, ids_BT, *, positions_BT, segments_BT, types_BT, key):
  x = p['tokens'][ids_BT] + p['positions'][positions_BT] + types_BT[..., None]
  used = (segments_BT > 0)[..., None]
  return jnp.tanh(x + (x * used).sum(1, keepdims=True) / jnp.maximum(used.sum(1, keepdims=True), 1))


def discriminate(p, ids_BT, **kwargs):
  x_BTD = body(p['d'] if 'd' in p else p['g'], ids_BT, **kwargs)
  return x_BTD @ p['out']


FUNCTIONS = dict(apply=lambda p, ids_BT, **kwargs: body(p['g'], ids_BT, **kwargs),
                 head=lambda p, x: (x, p['g']['tokens'], p['bias']), discriminate=discriminate, tokens=TOKENS)


def parameters(untied=True):
  keys = iter(jax.random.split(jax.random.key(3), 6))
  draw = lambda *shape: jax.random.normal(next(keys), shape)
  net = lambda: {'tokens': draw(V, D), 'positions': draw(T, D)}
  return {'g': net(), 'bias': draw(V), 'out': draw(D)} | ({'d': net()} if untied else {})


def loss(p, inputs, key, c=rtd.Config(chunk=16)):  # noqa: B008
  return rtd.loss(p, inputs, key, c=c, **FUNCTIONS)


@pytest.mark.slow
@pytest.mark.parametrize('kwargs', [{}, {'mask': 1.0, 'counts': 'bert', 'weight': 10.0}])
def test_every_number_against_a_loop(kwargs):
  inputs, p, key = inputs_of(), parameters(), jax.random.key(7)
  c = rtd.Config(chunk=16, rate=0.3, **kwargs)
  terms, metrics = loss(p, inputs, key, c)
  m = masking.corrupt(inputs, jax.random.fold_in(key, 0), c, TOKENS)
  shared = dict(positions_BT=inputs.positions_BT, segments_BT=inputs.segments_BT, types_BT=inputs.types_BT, key=None)
  x = body(p['g'], m.ids_BT, **shared)
  drawn = cross_entropy.sample(masking.draw_keys(jax.random.fold_in(key, 1), inputs), masking.gather(x, m.positions_BP),
                               p['g']['tokens'], p['bias'])
  ids = np.array(inputs.ids_BT)
  want = dict.fromkeys(('nll', 'right', 'masked', 'bce', 'used', 'told', 'said', 'replaced', 'hits'), 0.0)
  for b in range(len(LENGTHS)):
    for i in range(m.positions_BP.shape[1]):
      if m.weights_BP[b, i]:
        at = int(m.positions_BP[b, i])
        logits = np.asarray(x[b, at] @ p['g']['tokens'].T + p['bias'], np.float64)
        want['nll'] += np.log(np.exp(logits).sum()) - logits[int(inputs.ids_BT[b, at])]
        want['right'] += logits.argmax() == int(inputs.ids_BT[b, at])
        want['masked'] += 1
        ids[b, at] = drawn[b, i]
  logits = np.asarray(discriminate(p, jnp.asarray(ids), **shared), np.float64)
  for b, n in enumerate(LENGTHS):
    for t in range(n):
      replaced, probability = ids[b, t] != inputs.ids_BT[b, t], 1 / (1 + np.exp(-logits[b, t]))
      want['bce'] -= np.log(probability if replaced else 1 - probability)
      said = probability > 0.5
      want['used'] += 1
      want['told'] += said == replaced
      want['said'], want['replaced'] = want['said'] + said, want['replaced'] + replaced
      want['hits'] += said and replaced
  assert 0 < want['hits'] < want['replaced'] <= want['masked'] < want['used'] == sum(LENGTHS)
  pairs = {'generator_loss': ('nll', 'masked'), 'generator_accuracy': ('right', 'masked'),
           'discriminator_loss': ('bce', 'used'), 'discriminator_accuracy': ('told', 'used'),
           'precision': ('hits', 'said'), 'recall': ('hits', 'replaced'), 'replaced': ('replaced', 'used')}
  assert set(metrics) == set(pairs)
  for name, (total, weight) in pairs.items():
    assert float(metrics[name].total) == pytest.approx(float(want[total]), rel=1e-5), name
    assert float(metrics[name].weight) == pytest.approx(float(want[weight])), name
  objective = train.objective(terms, {k: t.weight for k, t in terms.items()})
  assert float(objective) == pytest.approx(
      float(want['nll'] / want['masked'] + c.weight * want['bce'] / want['used']), rel=1e-5)


def test_what_is_drawn_has_the_generators_distribution_and_not_the_chunks():
  x, w, bias = (jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(0), 3),
                                                        [(1, 1, D), (V, D), (V,)], strict=True))
  draw = jax.jit(lambda keys, x, chunk: cross_entropy.sample(keys, x, w, bias, chunk), static_argnums=2)
  n, columns = 500, 200
  x_BTD = jnp.broadcast_to(x, (n, columns, D))
  keys = lambda rows: jax.random.split(jax.random.key(1), n)[:rows]
  ids = np.asarray(draw(keys(n), x_BTD, 10**9))
  want = n * columns * np.asarray(jax.nn.softmax(x[0, 0] @ w.T + bias))
  seen = np.bincount(ids.ravel(), minlength=V)
  likely = want > 5
  assert likely.sum() > 5
  assert ((seen - want)**2 / want)[likely].sum() < likely.sum() + 5 * np.sqrt(2 * likely.sum())
  assert (ids[0] != ids[1]).any() and (ids[:, 0] != ids[:, 1]).any()
  for chunk in (1, 7 * 8, 150 * 8):
    np.testing.assert_array_equal(draw(keys(8), x_BTD[:8], chunk), ids[:8])


def test_fill_puts_what_was_drawn_in_place_and_nothing_elsewhere():
  ids = jnp.arange(12).reshape(2, 6)
  m = masking.Masked(ids * 0, jnp.array([[2, 4, 0], [0, 0, 0]]), ids[:, :3], jnp.array([[1.0, 1, 0], [0, 0, 0]]))
  got = rtd.fill(ids, m, jnp.array([[20, 4, 22], [23, 24, 25]]))
  assert got.tolist() == [[0, 1, 20, 3, 4, 5], [6, 7, 8, 9, 10, 11]]  # 4 was drawn as it was: not replaced


@pytest.mark.slow
def test_a_generator_that_always_draws_the_original_replaces_nothing():
  inputs = inputs_of()
  key = jax.random.key(0)
  m = masking.corrupt(inputs, jax.random.fold_in(key, 0), rtd.Config(), TOKENS)
  head = lambda p, x: (200.0 * jax.nn.one_hot(m.targets_BP, V), jnp.eye(V), None)
  functions = FUNCTIONS | dict(head=head)
  _, metrics = rtd.loss(parameters(), inputs, key, c=rtd.Config(), **functions)
  assert float(metrics['replaced'].total) == float(metrics['recall'].weight) == 0
  assert float(metrics['generator_accuracy'].total) == float(metrics['generator_accuracy'].weight) > 0


@pytest.mark.slow
def test_no_gradient_reaches_the_generator_through_the_discriminator():
  inputs, key = inputs_of(), jax.random.key(0)
  term = lambda p, name: loss(p, inputs, key)[0][name].total
  grads = jax.grad(term)(parameters(), 'discriminator')
  assert not any(np.asarray(g).any() for g in jax.tree.leaves((grads['g'], grads['bias'])))
  assert all(np.asarray(g).any() for g in jax.tree.leaves((grads['d'], grads['out'])))
  grads = jax.grad(term)(parameters(), 'generator')
  assert not any(np.asarray(g).any() for g in jax.tree.leaves((grads['d'], grads['out'])))
  assert all(np.asarray(g).any() for g in jax.tree.leaves((grads['g'], grads['bias'])))
  assert np.asarray(jax.grad(term)(parameters(untied=False), 'discriminator')['g']['tokens']).any()


@pytest.mark.parametrize('microbatches', [slow(2), slow(4)])
def test_accumulation_weighs_both_terms_by_what_was_drawn(microbatches):
  p, inputs, key = parameters(), inputs_of(), jax.random.key(2)
  grads, value, _ = jax.jit(train.accumulate(loss, microbatches))(p, inputs, key)

  def by_hand(p):
    parts = [loss(p, jax.tree.map(lambda x, i=i: x[i::microbatches], inputs), key)[0]
             for i in range(microbatches)]
    mean = lambda name: sum(t[name].total for t in parts) / sum(t[name].weight for t in parts)
    return mean('generator') + 50 * mean('discriminator')
  want, want_grads = jax.value_and_grad(jax.jit(by_hand))(p)
  assert float(value) == pytest.approx(float(want), rel=1e-6)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
def test_nothing_to_learn_from_gives_zero():
  grads, value, metrics = jax.jit(train.accumulate(loss, 1))(parameters(), inputs_of([0, 0]), jax.random.key(0))
  assert float(value) == 0 and all(float(m) == 0 for m in metrics.values())
  assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads))
  assert np.isfinite(float(loss(parameters(), inputs_of(), None)[0]['discriminator'].total))


@pytest.mark.slow
def test_any_mesh_gives_the_same():
  p, inputs, key = parameters(), inputs_of(), jax.random.key(2)
  gradient = train.accumulate(loss, 1)
  want = jax.jit(gradient)(p, inputs, key)
  mesh = sharding.make_mesh(sharding.Config(data=4, tensor=2))
  with sharding.use(mesh):
    got = jax.jit(gradient)(p, jax.device_put(inputs, sharding.batch_sharding(mesh)), key)
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
def test_no_array_of_predictions_times_vocabulary():
  B, vocab, d = 64, 1024, 8
  inputs = inputs_of([T] * B)
  p = {'tokens': jnp.ones((vocab, d)), 'bias': jnp.zeros(vocab), 'out': jnp.ones(d)}
  x = lambda p, ids, **_: p['tokens'][ids]
  f = functools.partial(rtd.loss, inputs=inputs, key=jax.random.key(0), apply=x, c=rtd.Config(chunk=64, rate=0.5),
                        head=lambda p, x: (x, p['tokens'], p['bias']), tokens=TOKENS,
                        discriminate=lambda p, ids, **_: x(p, ids) @ p['out'])
  whole = lambda p: sum(t.total for t in f(p)[0].values())
  for program in (whole, jax.grad(whole)):
    text = jax.jit(program).lower(p).compile().as_text()
    sizes = [np.prod([int(n) for n in shape.split(',')]) for shape in re.findall(r'[a-z]+\d*\[([0-9,]+)\]', text)]
    assert 64 * vocab <= max(sizes) <= 2 * 64 * vocab < B * 16 * vocab / 4


@pytest.mark.parametrize(('kwargs', 'match'), [({'weight': -1.0}, 'weight'), ({'chunk': 0}, 'chunk'),
                                               ({'rate': 0.0}, 'rate')])
def test_bad_config(kwargs, match):
  with pytest.raises(ConfigError, match=match):
    rtd.Config(**kwargs)


def test_config_is_electras():
  c = rtd.Config()
  assert (c.rate, c.mask, c.random, c.counts, c.weight, c.predictions(128)) == (0.15, 0.85, 0.0, 'electra', 50.0, 19)
  assert config.override(c, 'weight=10', 'mask=1', 'counts=bert') == rtd.Config(weight=10.0, mask=1.0, counts='bert')
