"""Log-probabilities and entropies token by token, against the formulas over all logits; what a row's targets sum to."""

import functools
import re

import jax
import jax.numpy as jnp
from marks import few
import numpy as np
import pytest

from lm import logprobs, sharding
from lm.data.packing import Batch
from lm.kernels.cross_entropy import token_logprobs

B, T, D, V = 4, 13, 8, 30


def arrays(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 5)
  return (jax.random.normal(keys[0], (B, T, D), dtype), jax.random.normal(keys[1], (V, D), dtype),
          jax.random.normal(keys[2], (V,)), jax.random.randint(keys[3], (B, T), 0, V),
          jax.random.normal(keys[4], (2, B, T)))


def plain(x, w, bias, targets, temperature):
  """The formulas, with all logits there."""
  logits = jnp.einsum('btd,vd->btv', x, w, preferred_element_type=jnp.float32)
  logits = logits if bias is None else logits + bias[None, None]
  logp = jax.nn.log_softmax(logits / temperature)
  return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0], -(jnp.exp(logp) * logp).sum(-1)


def weighed(f, cotangents):
  """A scalar in which every token's value counts something else."""
  return lambda *args: sum((c * out).sum() for c, out in zip(cotangents, f(*args), strict=True) if out is not None)


@pytest.mark.parametrize('chunk', few([1, 20, 1000], 20))
@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize('biased', [False, True])
def test_values_and_gradients_are_those_of_the_whole(chunk, temperature, biased):
  x, w, bias, targets, cotangents = arrays()
  bias = bias if biased else None
  ours = lambda x, w, bias: token_logprobs(x, w, targets, chunk, bias, temperature, entropy=True)
  whole = lambda x, w, bias: plain(x, w, bias, targets, temperature)
  for got, want in zip(jax.jit(ours)(x, w, bias), whole(x, w, bias), strict=True):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
  over = (0, 1, 2) if biased else (0, 1)
  got, want = (jax.jit(jax.grad(weighed(f, cotangents), over))(x, w, bias) for f in (ours, whole))
  for a, b in zip(got, want, strict=True):
    assert abs(b).max() > 0.1
    np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.slow
def test_without_entropy():
  x, w, bias, targets, cotangents = arrays()
  ours = lambda x, w: token_logprobs(x, w, targets, 20, bias)
  assert ours(x, w)[1] is None
  both = token_logprobs(x, w, targets, 20, bias, entropy=True)
  np.testing.assert_array_equal(ours(x, w)[0], both[0])
  got = jax.grad(weighed(ours, cotangents), (0, 1))(x, w)
  want = jax.grad(lambda x, w: (cotangents[0] * plain(x, w, bias, targets, 1.0)[0]).sum(), (0, 1))(x, w)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.slow
def test_before_the_start_nothing_is_scored():
  """The rest and its gradient stay as they are, 0 stands before it, and no logits are formed there."""
  x, w, _, targets, cotangents = arrays()
  part = lambda x, w: token_logprobs(x, w, targets, entropy=True, start=9)
  whole = lambda x, w: tuple(jnp.where(jnp.arange(T)[None] >= 9, y, 0) for y in plain(x, w, None, targets, 1.0))
  for got, want in zip(part(x, w), whole(x, w), strict=True):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    assert not got[:, :9].any() and got[:, 9:].all()
  for got, want in zip(*(jax.grad(weighed(f, cotangents), (0, 1))(x, w) for f in (part, whole)), strict=True):
    np.testing.assert_allclose(got, want, atol=3e-5)
  text = jax.jit(jax.grad(weighed(part, cotangents), (0, 1))).lower(x, w).compile().as_text()
  assert f'f32[{V},{B * 4}]' in text and f'f32[{V},{B * T}]' not in text


def test_known_distributions():
  """Equal logits: log V both; one far above the rest: 0 and 0, and its rivals' gap, all finite with their gradients."""
  x, targets = jnp.ones((1, 3, 1)), jnp.array([[0, 1, 1]])
  logp, entropy = token_logprobs(x, jnp.ones((V, 1)), targets, entropy=True)
  np.testing.assert_allclose(logp, -np.log(V) * np.ones((1, 3)), rtol=1e-6)
  np.testing.assert_allclose(entropy, np.log(V) * np.ones((1, 3)), rtol=1e-6)
  w = jnp.zeros((V, 1)).at[0, 0].set(1e4)
  ours = lambda x, w: token_logprobs(x, w, targets, entropy=True)
  logp, entropy = ours(x, w)
  np.testing.assert_array_equal(logp, [[0, -1e4, -1e4]])
  np.testing.assert_array_equal(entropy, np.zeros((1, 3)))
  for g in jax.grad(weighed(ours, np.ones((2, 1, 3))), (0, 1))(x, w):
    assert np.isfinite(g).all()


def test_bfloat16_states_give_f32_sums():
  x, w, _, targets, cotangents = arrays(jnp.bfloat16)
  ours = lambda x, w: token_logprobs(x, w, targets, 20, entropy=True)
  out = ours(x, w)
  assert all(o.dtype == jnp.float32 for o in out)
  for got, want in zip(out, plain(x, w, None, targets, 1.0), strict=True):  # as exact as with f32
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
  grads = jax.grad(weighed(ours, cotangents), (0, 1))(x, w)
  exact = jax.grad(weighed(lambda x, w: plain(x, w, None, targets, 1.0), cotangents), (0, 1))(
      x.astype(jnp.float32), w.astype(jnp.float32))
  for g, e in zip(grads, exact, strict=True):
    assert g.dtype == jnp.bfloat16
    np.testing.assert_allclose(g.astype(jnp.float32), e, atol=0.02 * abs(e).max())
  mixed = jax.grad(weighed(ours, cotangents), (0, 1))(x, w.astype(jnp.float32))
  assert [g.dtype for g in mixed] == [jnp.bfloat16, jnp.float32]


def test_a_divided_vocabulary_changes_nothing():
  """And is not gathered: no device ever holds a chunk's logits of all V."""
  x, w, _, targets, cotangents = arrays()
  w = jnp.concatenate([w, -w[:2]])
  ours = lambda x, w: token_logprobs(x, w, targets, 20, entropy=True)
  both = jax.value_and_grad(weighed(ours, cotangents), (0, 1))
  want = both(x, w)
  with sharding.use(sharding.make_mesh(sharding.Config(data=2, tensor=4))):
    program = jax.jit(both).lower(x, w).compile()
    got = program(*(jax.device_put(a, s) for a, s in zip((x, w), program.input_shardings[0], strict=True)))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-5)
  shapes = set(re.findall(r'f32\[([0-9,]+)\]', program.as_text()))
  columns = 20 // B
  assert f'{B // 2},{columns},{len(w) // 4}' in shapes
  assert not any(s.endswith(f'{columns},{len(w)}') for s in shapes)


def test_no_array_of_length_times_vocabulary():
  """Neither the value's nor the gradient's program has any [B, T, V] array, of whatever shape."""
  b, t, d, v = 4, 64, 16, 2048
  x, w, targets = jnp.ones((b, t, d)), jnp.ones((v, d)), jnp.zeros((b, t), jnp.int32)
  f = lambda x, w: sum(out.sum() for out in token_logprobs(x, w, targets, chunk=32, entropy=True))
  for program in (f, jax.grad(f, (0, 1))):
    text = jax.jit(program).lower(x, w).compile().as_text()
    sizes = [np.prod([int(n) for n in shape.split(',')]) for shape in re.findall(r'\w\d+\[([0-9,]+)\]', text)]
    assert 32 * v <= max(sizes) < b * t * v / 2


def score(batch, **kwargs):
  """(Scores, table, w) of a model whose state at a token is the token's row of the table."""
  w = arrays()[1]
  table = jax.random.normal(jax.random.key(1), (V, D))
  apply = lambda p, ids, **_: p[ids]
  scores = jax.jit(functools.partial(logprobs.score, apply=apply, head=lambda p: w, **kwargs))(table, batch, None)
  return scores, table, w


def batch_of(ids, segments, mask):
  positions = jnp.broadcast_to(jnp.arange(np.shape(ids)[1])[None], np.shape(ids))
  return Batch(jnp.asarray(ids, jnp.int32), jnp.asarray(segments, jnp.int32), positions, jnp.asarray(mask))


def test_rows_against_a_loop():
  """Prompt, padding and the border of two documents do not count; padding on the left moves, and changes nothing."""
  ids = np.array([[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 1, 2], [0, 0, 1, 2, 3, 4], [0] * 6])
  segments = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1], [0] * 6])
  mask = np.array([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0] * 6], bool)
  scores, table, w = score(batch_of(ids, segments, mask), temperature=0.5, entropy=True, chunk=8)
  want, entropies, count = np.zeros(4), np.zeros((4, 5)), np.zeros(4)
  for b in range(4):
    for t in range(5):
      if mask[b, t + 1] and segments[b, t] == segments[b, t + 1] > 0:
        z = np.asarray(w, np.float64) @ np.asarray(table[ids[b, t]], np.float64) / 0.5
        logp = z - np.log(np.exp(z).sum())
        want[b] += logp[ids[b, t + 1]]
        entropies[b, t] = -(np.exp(logp) * logp).sum()
        count[b] += 1
  np.testing.assert_allclose(scores.row_B, want, rtol=1e-5)
  np.testing.assert_allclose(scores.entropies_BT, entropies, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(scores.count_B, count)
  assert count.tolist() == [3, 3, 2, 0]


@pytest.mark.parametrize('pad', [0, 3, 17])
def test_padding_changes_no_row(pad):
  ids, mask = np.array([[1, 2, 3, 4]]), np.array([[False, False, True, True]])
  before = lambda a: np.concatenate([np.zeros((1, pad), a.dtype), a], 1)
  after = lambda a: np.concatenate([a, np.zeros((1, pad), a.dtype)], 1)
  rows = [score(batch_of(f(ids), f(np.ones_like(ids)), f(mask)))[0].row_B for f in (before, after, lambda a: a)]
  np.testing.assert_allclose(rows[0], rows[2], rtol=1e-6)
  np.testing.assert_allclose(rows[1], rows[2], rtol=1e-6)
