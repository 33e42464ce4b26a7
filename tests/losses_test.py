"""Cross-entropy in chunks and the autoregressive loss, against the formulas written out in numpy."""

import functools
import re

import jax
import jax.numpy as jnp
from marks import few
import numpy as np
import pytest

from lm import hlo, sharding
from lm.data.packing import Batch
from lm.errors import ConfigError
from lm.kernels.cross_entropy import weighted_nll
from lm.losses import ar

B, T, D, V = 3, 17, 8, 29


def arrays():
  keys = jax.random.split(jax.random.key(0), 4)
  return (jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (V, D)),
          jax.random.randint(keys[2], (B, T), 0, V), (jax.random.uniform(keys[3], (B, T)) > 0.3).astype(jnp.float32))


def reference(x, w, targets, weights, z):
  logits = np.einsum('btd,vd->btv', np.asarray(x, np.float64), np.asarray(w, np.float64))
  lse = np.log(np.exp(logits).sum(-1))
  picked = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
  return ((weights * (lse - picked)).sum(), (weights * lse**2).sum() * z,
          (weights * (logits.argmax(-1) == targets)).sum())


@pytest.mark.parametrize('chunk', few([1, 6, 15, 1000], 6, 1000))
@pytest.mark.parametrize('z', [0.0, 0.01])
def test_value_and_gradient_do_not_depend_on_the_chunk(chunk, z):
  x, w, targets, weights = arrays()
  total, nll, correct = jax.jit(functools.partial(weighted_nll, chunk=chunk, z=z))(x, w, targets, weights)
  want_nll, want_z, want_correct = reference(x, w, targets, weights, z)
  np.testing.assert_allclose([total, nll, correct], [want_nll + want_z, want_nll, want_correct], rtol=1e-5)

  def plain(x, w):
    logits = jnp.einsum('btd,vd->btv', x, w)
    lse = jax.nn.logsumexp(logits, -1)
    return (weights * (lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0] + z * lse**2)).sum()
  got = jax.grad(lambda x, w: 0.5 * weighted_nll(x, w, targets, weights, chunk, z)[0], (0, 1))(x, w)
  want = jax.grad(lambda x, w: 0.5 * plain(x, w), (0, 1))(x, w)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize('devices', [1, 8])
def test_a_target_without_weight_may_be_no_word(devices):
  """Such as the virtual tokens of a learned prompt."""
  x, w, targets, weights = arrays()
  none = weights == 0
  assert none.any() and not none.all()

  def both(targets):
    return jax.jit(jax.value_and_grad(lambda x, w: weighted_nll(x, w, targets, weights)[0], (0, 1)))(x, w)
  with sharding.use(sharding.make_mesh(sharding.Config(data=devices), jax.devices()[:devices])):
    jax.tree.map(np.testing.assert_array_equal, both(jnp.where(none, V + 2, targets)), both(targets))


@pytest.mark.slow
@pytest.mark.parametrize('chunk', [1, 6, 1000])
@pytest.mark.parametrize('z', [0.0, 0.01])
def test_bias_of_the_vocabulary(chunk, z):
  """As a column of w against a column of ones; its gradient is that column's."""
  x, w, targets, weights = arrays()
  bias = jnp.sin(jnp.arange(V, dtype=jnp.float32))

  def given(x, w, bias):
    return weighted_nll(x, w, targets, weights, chunk, z, bias_V=bias)

  def folded(x, w, bias):
    ones = jnp.ones((B, T, 1))
    return weighted_nll(jnp.concatenate([x, ones], -1), jnp.concatenate([w, bias[:, None]], -1), targets, weights, 1, z)
  np.testing.assert_allclose(given(x, w, bias), folded(x, w, bias), rtol=1e-6)
  got, want = (jax.grad(lambda *a, f=f: 0.5 * f(*a)[0], (0, 1, 2))(x, w, bias) for f in (given, folded))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
  assert abs(got[2]).max() > 0.1
  np.testing.assert_allclose(given(x, w, 0 * bias), weighted_nll(x, w, targets, weights, chunk, z), rtol=1e-6)


@pytest.mark.parametrize('field, value', [('z', -1.0), ('z', float('inf')), ('z', float('nan')), ('chunk', 0),
                                          ('smoothing', 1.0)])
def test_a_coefficient_out_of_range_is_named(field, value):
  with pytest.raises(ConfigError, match=f'^loss.{field}={value}; expected '):
    ar.Config(**{field: value})


def test_large_logits_stay_finite():
  x, w, targets, weights = arrays()
  value, grads = jax.value_and_grad(lambda x: weighted_nll(1e4 * x, w, targets, weights)[0])(x)
  assert np.isfinite(value)
  assert np.isfinite(grads).all()


def test_no_array_of_length_times_vocabulary():
  """Neither the value's nor the gradient's program has any [B, T, V] array, of whatever shape."""
  b, t, d, v = 4, 64, 16, 2048
  x, w = jnp.ones((b, t, d)), jnp.ones((v, d))
  targets, weights = jnp.zeros((b, t), jnp.int32), jnp.ones((b, t))
  f = lambda x, w: weighted_nll(x, w, targets, weights, chunk=32)[0]
  for program in (f, jax.grad(f, (0, 1))):
    text = jax.jit(program).lower(x, w).compile().as_text()
    sizes = [np.prod([int(n) for n in shape.split(',')]) for shape in _shapes(text)]
    assert max(sizes) < b * t * v / 2
    assert max(sizes) >= v * d  # the weights themselves: the text was read


@pytest.mark.parametrize('chunk, positions', [(1000, 64), (4 * 21, 64), (4 * 25, 66)])
def test_chunks_are_of_equal_length(chunk, positions):
  """21 positions at a time would make 84 of 64."""
  b, t, d, v = 4, 64, 16, 48
  program = jax.jit(lambda x, w: weighted_nll(x, w, jnp.zeros((b, t), jnp.int32), jnp.ones((b, t)), chunk)[0])
  text = program.lower(jnp.ones((b, t, d)), jnp.ones((v, d))).compile().as_text()
  assert sum(hlo.flops(text).values()) == 2 * b * positions * d * v


@pytest.mark.parametrize('chunk', [1000, 128])
def test_nothing_of_the_size_of_logits_is_copied(chunk):
  """XLA on a CPU makes operands of other forms of these three products anew, transposed."""
  b, t, d, v = 4, 64, 16, 48
  loss = lambda x, w: weighted_nll(x, w, jnp.zeros((b, t), jnp.int32), jnp.ones((b, t)), chunk)[0]
  text = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones((b, t, d)), jnp.ones((v, d))).compile().as_text()
  rows = min(chunk, b * t)
  assert f'f32[{v},{rows}]' in text and f'f32[{rows},{v}]' not in text
  assert not re.findall(rf'f32\[(?:{v},{d}|{d},{v})\]\S* (?:copy|transpose)\(', text)


def _shapes(text):
  return re.findall(r'f32\[([0-9,]+)\]', text)


def batch_of(ids, segments, mask):
  ids = jnp.asarray(ids, jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
  return Batch(ids, jnp.asarray(segments, jnp.int32), positions, jnp.asarray(mask))


def test_shift_mask_and_segments():
  """A uniform model: each counted target costs log V, and exactly the right ones count."""
  ids = [[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 1, 2]]
  segments = [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]
  mask = [[True] * 6, [True, False, True, True, False, True]]
  apply = lambda p, ids, **_: jnp.zeros((*ids.shape, D))
  terms, metrics = ar.loss({}, batch_of(ids, segments, mask), None, apply=apply, head=lambda p: jnp.ones((V, D)),
                           c=ar.Config())
  assert float(terms['nll'].weight) == 3 + 3  # row 0: 1->2, 2->3, 4->5; row 1: the three masked-in targets
  assert float(terms['nll'].total) == pytest.approx(6 * np.log(V), rel=1e-6)
  assert set(metrics) == {'loss', 'accuracy'}


def test_the_model_gets_inputs_only():
  seen = {}

  def apply(p, ids, *, positions_BT, segments_BT, key):
    seen.update(ids=ids, positions=positions_BT, segments=segments_BT)
    return jnp.zeros((*ids.shape, D))
  ids = np.arange(12).reshape(2, 6)
  ar.loss({}, batch_of(ids, np.ones((2, 6)), np.ones((2, 6), bool)), None, apply=apply, head=lambda p: jnp.ones((V, D)),
          c=ar.Config())
  np.testing.assert_array_equal(seen['ids'], ids[:, :-1])
  assert seen['positions'].shape == seen['segments'].shape == (2, 5)


@pytest.mark.parametrize('chunk', [5, 1000])
@pytest.mark.parametrize('z', [0.0, 0.01])
def test_label_smoothing_is_cross_entropy_with_a_mixture(chunk, z):
  x, w, targets, weights = arrays()
  ours = jax.jit(functools.partial(weighted_nll, chunk=chunk, z=z, smoothing=0.1))
  mixture = 0.9 * jax.nn.one_hot(targets, V) + 0.1 / V

  def plain(x, w):
    logits = jnp.einsum('btd,vd->btv', x, w)
    lse = jax.nn.logsumexp(logits, -1)
    return (weights * (z * lse**2 - (mixture * jax.nn.log_softmax(logits)).sum(-1))).sum()
  total, nll, _ = ours(x, w, targets, weights)
  np.testing.assert_allclose(total, plain(x, w), rtol=1e-5)
  np.testing.assert_allclose(nll, reference(x, w, targets, weights, z)[0], rtol=1e-5)
  got = jax.grad(lambda x, w: ours(x, w, targets, weights)[0], (0, 1))(x, w)
  for a, b in zip(got, jax.grad(plain, (0, 1))(x, w), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
