"""Bradley-Terry against a loop over pairs, scores at the last token, calibration and normalisation."""

import itertools

import jax
import jax.numpy as jnp
from marks import few
import numpy as np
import pytest

from lm.errors import ConfigError
from lm.losses import reward

B, K = 5, 4
PLAIN = reward.Config()


def arrays(seed=0):
  """Ties, missing answers, a prompt with one answer and one whose answers are all alike."""
  rng = np.random.default_rng(seed)
  mask = rng.random((B, K)) > 0.2
  ranks = rng.integers(0, 3, (B, K)).astype(np.int32)
  mask[1], mask[2], ranks[2] = [False, True, False, False], True, 1
  mask[0], ranks[0] = True, [2, 0, 3, 1]
  return rng.normal(size=(B, K)).astype(np.float32), ranks, mask


def by_hand(scores, ranks, mask, margins=None):
  """(sum over prompts of the mean over pairs, prompts, sum of squared sums, pairs, right, gaps)."""
  total = prompts = centre = pairs = right = gaps = 0
  for b in range(len(scores)):
    found = [(w, o) for w, o in itertools.permutations(range(scores.shape[1]), 2)
             if mask[b, w] and mask[b, o] and ranks[b, w] < ranks[b, o]]
    for w, o in found:
      gap = float(scores[b, w]) - float(scores[b, o])
      over = gap - (0 if margins is None else margins[b, w, o])
      total += np.log1p(np.exp(-over)) / len(found)
      centre += (scores[b, w] + scores[b, o])**2 / len(found)
      right, gaps = right + (gap > 0), gaps + gap
    prompts, pairs = prompts + bool(found), pairs + len(found)
  return total, prompts, centre, pairs, right, gaps


def mean(term):
  return float(term.total / term.weight)


def test_four_ranked_answers():
  terms, _ = reward.loss(jnp.array([[2, 1, .5, -1]]), jnp.arange(4)[None], jnp.ones((1, 4), bool), c=PLAIN)
  np.testing.assert_allclose(mean(terms['preference']), .227613, atol=1e-6)


@pytest.mark.parametrize('with_margins', [False, True])
def test_a_loop_over_pairs_agrees(with_margins):
  scores, ranks, mask = arrays()
  margins = np.random.default_rng(1).random((B, K, K)).astype(np.float32) if with_margins else None
  terms, metrics = jax.jit(lambda s: reward.loss(s, ranks, mask, c=reward.Config(centre=0.01), margins_BKK=None if
                                                 margins is None else jnp.asarray(margins)))(scores)
  total, prompts, centre, pairs, right, gaps = by_hand(scores, ranks, mask, margins)
  assert 0 < prompts < B
  np.testing.assert_allclose([terms['preference'].total, terms['preference'].weight], [total, prompts], rtol=1e-5)
  np.testing.assert_allclose([terms['centre'].total, terms['centre'].weight], [centre, prompts], rtol=1e-5)
  assert terms['centre'].scale == 0.01
  np.testing.assert_allclose([metrics['accuracy'].total, metrics['gap'].total], [right, gaps], rtol=1e-5)
  assert metrics['accuracy'].weight == metrics['gap'].weight == metrics['brier'].weight == pairs


def test_every_prompt_weighs_the_same_however_many_answers_it_has():
  """1 / C(K, 2): six pairs of one prompt count as much as the one pair of another."""
  scores = jnp.array([[3., 2, 1, 0], [0, 1, 0, 0]])
  ranks, mask = jnp.array([[0, 1, 2, 3], [0, 1, 0, 0]]), jnp.array([[True] * 4, [True, True, False, False]])
  both = reward.loss(scores, ranks, mask, c=PLAIN)[0]['preference']
  each = [mean(reward.loss(scores[i:i + 1], ranks[i:i + 1], mask[i:i + 1], c=PLAIN)[0]['preference']) for i in (0, 1)]
  np.testing.assert_allclose(mean(both), np.mean(each), rtol=1e-6)


def test_the_best_of_several_is_a_softmax():
  """-log softmax at the best answer that is there, their mean over those tied; a prompt whose are alike: none."""
  scores, ranks, mask = arrays()
  ranks[0] = [0, 0, 3, 1]
  terms, metrics = jax.jit(lambda s: reward.loss(s, ranks, mask, c=reward.Config(kind='best', centre=0.01)))(scores)
  total = prompts = 0
  for s, r, m in zip(scores.astype(np.float64), ranks, mask, strict=True):
    s, r = s[m], r[m]
    if len(set(r)) > 1:
      total += (np.log(np.exp(s).sum()) - s[r == r.min()]).mean()
      prompts += 1
  assert 2 < prompts < B
  np.testing.assert_allclose([terms['preference'].total, terms['preference'].weight], [total, prompts], rtol=1e-5)
  pairs = reward.loss(jnp.asarray(scores), ranks, mask, c=reward.Config(centre=0.01))
  for name in ('accuracy', 'gap', 'brier'):
    np.testing.assert_array_equal(metrics[name].total, pairs[1][name].total)
  assert metrics['loss'].total == terms['preference'].total
  np.testing.assert_array_equal(terms['centre'].total, pairs[0]['centre'].total)


def test_of_two_answers_both_kinds_are_one_loss():
  scores, ranks, mask = (x[:, :2] for x in arrays(3))
  both = [reward.loss(jnp.asarray(scores), ranks, mask, c=reward.Config(kind=kind))[0]['preference']
          for kind in ('pairs', 'best')]
  assert both[0].weight > 0
  np.testing.assert_allclose(both[0].total, both[1].total, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['pairs', 'best'])
def test_what_is_missing_touches_nothing(kind):
  """Not a value, not a gradient, even where it is NaN; and a batch without any pair is 0 over 0."""
  scores, ranks, mask = arrays()
  value = lambda s, m: reward.loss(s, ranks, m, c=reward.Config(kind, centre=0.1))[0]['preference'].total
  holes = np.where(mask, scores, np.nan)
  np.testing.assert_array_equal(value(holes, mask), value(scores, mask))
  grads = jax.grad(value)(jnp.asarray(holes), mask)
  assert np.isfinite(grads).all()
  assert (np.asarray(grads)[~mask] == 0).all()
  terms, metrics = reward.loss(jnp.asarray(holes), ranks, jnp.zeros_like(mask), c=reward.Config(kind, centre=0.1))
  assert all(t.total == t.weight == 0 for t in (*terms.values(), *metrics.values()))


def test_equal_scores_are_half_right():
  metrics = reward.loss(jnp.zeros((3, 2)), jnp.array([[0, 1]] * 3), jnp.ones((3, 2), bool), c=PLAIN)[1]
  assert mean(metrics['accuracy']) == 0.5
  assert mean(metrics['brier']) == 0.25
  assert mean(metrics['loss']) == pytest.approx(np.log(2))


def test_halves_come_out_as_f32():
  scores, ranks, mask = arrays()
  low = jnp.asarray(scores, jnp.bfloat16)
  terms, metrics = reward.loss(low, ranks, mask, c=reward.Config(centre=0.1))
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((terms, metrics)))
  want = by_hand(np.asarray(low, np.float32), ranks, mask)
  np.testing.assert_allclose(terms['preference'].total, want[0], rtol=1e-5)


PAD = 2  # also the eos


@pytest.mark.parametrize('left', few([0, 3, 17], 3))
@pytest.mark.parametrize('right', [0, 4])
def test_the_score_is_read_at_the_last_real_token(left, right):
  """Also where padding has the id of eos, which is said within the row and at its end; also from a bool mask."""
  ids = [[5, PAD, 6, PAD], [7, 8, 9, 6]]
  tokens, values = np.full((2, left + 4 + right), PAD), np.full((2, left + 4 + right), 99.0, np.float32)
  tokens[:, left:left + 4], values[:, left:left + 4] = ids, [[1, 2, 3, .73], [4, 5, -.31, 6]]
  segments = np.zeros_like(tokens)
  segments[0, left:left + 4], segments[1, left:left + 3] = 1, 1
  for real in (segments, segments > 0):
    np.testing.assert_array_equal(reward.score_at_last(jnp.asarray(values), jnp.asarray(real)),
                                  np.array([.73, -.31], np.float32))
  grads = jax.grad(lambda v: reward.score_at_last(v, segments).sum())(jnp.asarray(values))
  assert np.argwhere(grads).tolist() == [[0, left + 3], [1, left + 2]]


def test_a_row_without_tokens_scores_zero():
  values, segments = jnp.full((2, 3), jnp.nan, jnp.bfloat16).at[0].set(0.5), jnp.array([[1, 1, 0], [0, 0, 0]])
  found = reward.score_at_last(values, segments)
  np.testing.assert_array_equal(found, [0.5, 0.0])
  assert found.dtype == jnp.float32
  assert np.isfinite(jax.grad(lambda v: reward.score_at_last(v, segments).sum())(values)).all()


def simulated(sharpness, n=20_000):
  """Pairs whose outcome is drawn from sigmoid(difference of scores), and scores that exaggerate it."""
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(n, 2))
  first = rng.random(n) < 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))
  ranks = np.where(first[:, None], [0, 1], [1, 0]).astype(np.int32)
  return jnp.asarray(sharpness * scores, jnp.float32), jnp.asarray(ranks), jnp.ones((n, 2), bool)


def test_a_table_of_calibration_tells_the_true_model_from_one_that_exaggerates():
  true, sure = (reward.reliability(*simulated(s)) for s in (1.0, 3.0))
  assert float(true.count_N.sum()) == float(sure.count_N.sum()) == 20_000
  np.testing.assert_allclose(true.observed_N.sum(), sure.observed_N.sum())  # the same favourites
  assert float(reward.calibration_error(true)) < 0.015 < 0.1 < float(reward.calibration_error(sure))
  deviation = (true.observed_N - true.predicted_N) / np.sqrt(np.maximum(true.count_N, 1) * 0.25)
  assert np.abs(deviation).max() < 4


@pytest.mark.slow
def test_tables_add_up():
  data = simulated(2.0, 1000)
  whole = reward.reliability(*data, bins=7)
  parts = [reward.reliability(*(x[i::2] for x in data), bins=7) for i in (0, 1)]
  total = jax.tree.map(jnp.add, *parts)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(total), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)
  edge = reward.reliability(jnp.array([[100., -100.], [0., 0.]]), jnp.array([[0, 1]] * 2), jnp.ones((2, 2), bool), 7)
  assert edge.count_N.tolist() == [1, 0, 0, 0, 0, 0, 1]
  assert edge.observed_N.tolist() == [.5, 0, 0, 0, 0, 0, 1]


def test_normalised_scores_have_the_moments_asked_for():
  scores = np.random.default_rng(0).normal(3.0, 0.2, 500)
  for std in (1.0, 0.5):
    out = reward.normalise(scores, std)(jnp.asarray(scores, jnp.float32))
    np.testing.assert_allclose([out.mean(), out.std()], [0, std], atol=1e-5)
  out = reward.normalise(scores, None)(jnp.asarray(scores, jnp.bfloat16))
  assert out.dtype == jnp.float32
  np.testing.assert_allclose([out.mean(), out.std()], [0, scores.std()], atol=1e-2)
  assert reward.normalise(np.full(3, 2.0), None) == reward.Affine(1.0, -2.0)


@pytest.mark.parametrize('scores, part', [
    ([], '0, 0 of them'), ([1.0, np.nan], '2, 1 of them'), ([0.1, 0.1, 0.1], 'all 3 are 0.1')])
def test_scores_that_nothing_can_be_normalised_by(scores, part):
  with pytest.raises(ConfigError, match=part):
    reward.normalise(np.array(scores))


def test_a_config_out_of_range():
  with pytest.raises(ConfigError, match='loss.centre=-1'):
    reward.Config(centre=-1)
  with pytest.raises(ConfigError, match="loss.kind='worst'"):
    reward.Config(kind='worst')
