"""Rollouts: rows that do not depend on padding, mates or mesh, and whose scores are those of the sampler."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lm import decode, hlo, logprobs, nn, params, peft, rollout, sharding
from lm.data.packing import Batch
from lm.errors import ConfigError
from lm.models import decoder
from lm.sampler import Sampling

C = decoder.Config(vocab=96, length=96, layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=64, bias=False,
                   positions='rotary', norm='rms', norm_bias=False, activation='swiglu')
SPECS = decoder.specs(C)
MODEL = decode.of(decoder, C)
PROMPTS = ([3, 1, 4], [15, 9, 26, 5, 35, 8, 9], [79, 3, 23, 84], [2, 7, 1, 8, 2], [6], [28, 3, 18, 5], [30, 2], [4, 6])
STOP = (5, 11, 40, 41, 42)
APPLY = lambda p, ids_BT, **kwargs: decoder.apply(p, C, ids_BT, **kwargs)
HEAD = lambda p: decoder.head(p, C)
Scores = collections.namedtuple('Scores', 'logprobs_BT reference_BT values_BT')


def key(seed=7):
  return jax.random.key(seed)


@functools.cache
def weights(seed=0):
  """Larger than at the start of training, so that tokens are neither all alike nor all the same."""
  return jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params.init(SPECS, jax.random.key(seed)))


def draws(s, p, ids_BP, segments_BP, key):
  q = decode.prepare(rollout.gathered(peft.plain(p), SPECS))
  return rollout.generate(MODEL, q, ids_BP, segments_BP, s, key)


def make(s):
  """A program, compiled for each `make`: (params, the reference's, ids, segments, key) -> Responses and Scores."""
  def both(p, reference, ids_BP, segments_BP, key):
    r = draws(s, p, ids_BP, segments_BP, key)
    values = lambda positions_BT, segments_BT, key: positions_BT + 100 * (segments_BT == 0)
    said = functools.partial(rollout.score, r=r, s=s, head=HEAD, chunk=32)
    logprobs_BT, values_BT = said(p, apply=lambda p, ids_BT, **rows: (APPLY(p, ids_BT, **rows), values(**rows)))
    return r, Scores(logprobs_BT, said(reference, apply=APPLY)[0], values_BT)
  return jax.jit(both)


def responses(r):
  """Of each row the tokens of its response."""
  return [ids[:n].tolist() for ids, n in zip(np.asarray(r.responses_BN), np.asarray(r.lengths_B), strict=True)]


def check_layout(r, prompts):
  """Every array of the batch, by a loop over its rows."""
  P, N = r.width, r.responses_BN.shape[1]
  for i, (prompt, n) in enumerate(zip(prompts, np.asarray(r.lengths_B), strict=True)):
    left, right = P - len(prompt), N - n
    ids, segments, positions, mask = (np.asarray(x)[i] for x in (
        r.batch.ids_BT, r.batch.segments_BT, r.batch.positions_BT, r.batch.mask_BT))
    assert 1 <= n <= N
    np.testing.assert_array_equal(ids, [0] * left + list(prompt) + responses(r)[i] + [0] * right)
    np.testing.assert_array_equal(segments, [0] * left + [1] * (len(prompt) + n) + [0] * right)
    np.testing.assert_array_equal(positions, [0] * left + list(range(len(prompt) + n)) + [0] * right)
    np.testing.assert_array_equal(mask, [False] * P + [True] * n + [False] * right)


@pytest.mark.slow
def test_padding_and_mates_change_nothing():
  """Tokens, masks, ends exactly, log-probabilities to 1e-5; a row keeps its number, and with it its draws."""
  s = Sampling(max_new=10, temperature=0.8, stop=STOP)
  program = make(s)
  want, scored = program(weights(), weights(1), *decode.pad(PROMPTS, 7), key())
  assert len(set(np.asarray(want.lengths_B).tolist())) > 2 and not np.asarray(want.ended_B).all()
  check_layout(want, PROMPTS)
  same_rows = [(jnp.arange(8), pad) for pad in (3, 17)] + [(jnp.array([5, 1, 0, 6]), 3), (jnp.array([1]), 0)]
  for rows, pad in same_rows:
    prompts = [PROMPTS[i] for i in rows]
    ids_BP, segments_BP = decode.pad(prompts, 7 + pad)
    got, scores = program(weights(), weights(1), np.where(segments_BP, ids_BP, 9), segments_BP, nn.Keys(key(), rows))
    check_layout(got, prompts)
    assert responses(got) == [responses(want)[i] for i in rows]
    np.testing.assert_array_equal(got.ended_B, want.ended_B[rows])
    for a, b in ((scores.logprobs_BT, scored.logprobs_BT), (scores.reference_BT, scored.reference_BT),
                 (scores.values_BT, scored.values_BT)):
      np.testing.assert_allclose(a[:, pad:], b[rows], atol=1e-5)
      assert not np.asarray(a[:, :pad]).any()
    np.testing.assert_allclose(got.drawn_BT, scores.logprobs_BT, atol=1e-5)
    assert not np.asarray(got.drawn_BT)[~np.asarray(got.batch.mask_BT)[:, 1:]].any()


@pytest.mark.slow
@pytest.mark.parametrize('temperature', [1.0, 0.6])
def test_scores_are_those_of_the_sequence_alone(temperature):
  """Of the policy, the reference and the values, from logits over prompt and response without any padding."""
  s = Sampling(max_new=6, temperature=temperature, stop=STOP)
  r, scores = make(s)(weights(), weights(1), *decode.pad(PROMPTS[:2], 9), key())

  @jax.jit
  def alone(p, ids_1T, response_1T):
    place_1T = jnp.arange(ids_1T.shape[1])[None]
    said = logprobs.score(p, Batch(ids_1T, jnp.ones_like(ids_1T), place_1T, response_1T), None, apply=APPLY, head=HEAD,
                          temperature=temperature)
    return said.logprobs_BT[0], jax.nn.log_softmax(decoder.logits(p, C, APPLY(p, ids_1T))[0] / temperature)
  for i, (prompt, response) in enumerate(zip(PROMPTS, responses(r), strict=False)):
    P, n = len(prompt), len(response)
    ids = np.array([[*prompt, *response]])
    for p, got in ((weights(), scores.logprobs_BT), (weights(1), scores.reference_BT)):
      said, table = alone(p, ids, np.arange(P + n)[None] >= P)
      np.testing.assert_allclose(got[i, 8:8 + n], said[P - 1:], atol=1e-5)
      np.testing.assert_allclose(got[i, 8:8 + n], table[np.arange(P - 1, P + n - 1), response], atol=1e-5)
      assert not np.delete(got[i], np.s_[8:8 + n]).any()
    np.testing.assert_array_equal(scores.values_BT[i, 8:8 + n], np.arange(n) + P - 1)


def test_the_sampler_is_the_policy():
  """Chi-square of 4,000 tokens against softmax(logits / T)."""
  s = Sampling(max_new=1, temperature=1.7)
  program = jax.jit(lambda p, ids, segments, key: rollout.generate(
      MODEL, p, *rollout.groups(ids, segments, 4000), s, key))
  ids = program(weights(), jnp.array([PROMPTS[1]]), jnp.ones((1, 7), jnp.int32), key()).responses_BN[:, 0]
  z = decoder.logits(weights(), C, decoder.apply(weights(), C, jnp.array([PROMPTS[1]])))[0, -1]
  want = 4000 * np.asarray(jax.nn.softmax(z / 1.7), np.float64)
  assert want.min() > 5
  assert stats.chisquare(np.bincount(ids, minlength=C.vocab), want * 4000 / want.sum()).pvalue > 1e-3


def chain(*pairs, vocab=12):
  """A model and its params: after token a comes b, always, and after any other the one above it."""
  table_VV = np.full((vocab, vocab), -1e9, np.float32)
  table_VV[np.arange(vocab), (np.arange(vocab) + 1) % vocab] = 0
  for a, b in pairs:
    table_VV[a], table_VV[a, b] = -1e9, 0
  model = decode.Model(
      apply=lambda p, ids_BT, *, segments_BT, cache: (jax.nn.one_hot(ids_BT, vocab), cache),
      logits=lambda p, x_BTV: x_BTV @ p, init_cache=lambda B, S: (), length=64)
  return model, jnp.asarray(table_VV)


def draw(prompts, s, *pairs):
  model, p = chain(*pairs)
  run = jax.jit(lambda p, ids, segments, key: rollout.generate(model, p, ids, segments, s, key))
  return run(p, *decode.pad(prompts, 4), key())


def test_ends_where_padding_and_the_end_are_one_id():
  """Responses of one token, of some, of all; and prompts that hold the id: only the response's counts."""
  prompts = [[5, 11], [3, 9], [2], [4, 0, 6, 1]]
  r = draw(prompts, Sampling(max_new=5, stop=(0,)))
  assert responses(r) == [[0], [10, 11, 0], [3, 4, 5, 6, 7], [2, 3, 4, 5, 6]]
  assert r.ended_B.tolist() == [True, True, False, False]
  check_layout(r, prompts)
  r = draw([[11], [11, 11]], Sampling(max_new=5, stop=(0,)))
  assert responses(r) == [[0], [0]] and r.ended_B.all()
  check_layout(r, [[11], [11, 11]])


def test_nothing_stops_without_a_stop_id():
  r = draw([[5, 11], [10]], Sampling(max_new=5))
  assert responses(r) == [[0, 1, 2, 3, 4], [11, 0, 1, 2, 3]] and not r.ended_B.any()


def test_the_loop_ends_with_the_last_row():
  steps = []
  model, p = chain()
  def apply(p, ids_BT, **kwargs):
    jax.debug.callback(lambda: steps.append(1))
    return model.apply(p, ids_BT, **kwargs)
  run = jax.jit(lambda p, ids, segments, key: rollout.generate(
      dataclasses.replace(model, apply=apply), p, ids, segments, Sampling(max_new=50, stop=(0,)), key))
  r = run(p, *decode.pad([[9], [11], [10]], 4), key())
  jax.effects_barrier()
  assert responses(r) == [[10, 11, 0], [0], [11, 0]] and len(steps) == 3


@pytest.mark.parametrize('ids, least', [((3,), 0), ((3,), 3), ((3, 0), 4), ((7,), 0), ((3,), 99), ((), 0)])
def test_truncate_against_a_loop(ids, least):
  prompts = [[1], [5, 3], [3, 3, 3, 3], [9], [11]]
  before = draw(prompts, Sampling(max_new=12, stop=(2,)), (4, 3), (8, 3))
  r = jax.jit(functools.partial(rollout.truncate, ids=ids, least=least))(before)
  want, ended = [], []
  for response, end in zip(responses(before), before.ended_B.tolist(), strict=True):
    at = [i for i, token in enumerate(response) if token in ids and i >= least]
    want.append(response[:at[0] + 1] if at else response)
    ended.append(end or bool(at))
  assert responses(r) == want and r.ended_B.tolist() == ended
  assert (want != responses(before)) == (3 in ids and least < 12)
  check_layout(r, prompts)
  np.testing.assert_array_equal(r.drawn_BT, np.where(r.batch.mask_BT[:, 1:], before.drawn_BT, 0))


def test_groups_and_the_best_of_each():
  ids, segments = decode.pad([[1], [5, 3]], 4)
  more = rollout.groups(ids, segments, 3)
  np.testing.assert_array_equal(more[0], [ids[0]] * 3 + [ids[1]] * 3)
  np.testing.assert_array_equal(more[1], [segments[0]] * 3 + [segments[1]] * 3)
  r = draw([[1], [2], [3], [9], [10], [11]], Sampling(max_new=4, stop=(0,)))
  scores = [(0.5, 2.0, 2.0, -3.0, float('nan'), -1.0), [0, 0, 0, -float('inf'), float('nan'), float('nan')]]
  for row, best in zip(scores, ([1, 5], [0, 3]), strict=True):
    got = jax.jit(rollout.best_of, static_argnums=2)(r, jnp.array(row), 3)
    jax.tree.map(lambda a, b, best=best: np.testing.assert_array_equal(a, b[jnp.array(best)]), got, r)
  with pytest.raises(ConfigError, match='group=4 does not divide 6 rows'):
    rollout.best_of(r, jnp.zeros(6), 4)


def test_rows_of_a_group_differ():
  program = jax.jit(lambda p, ids, segments, key: rollout.generate(
      MODEL, p, *rollout.groups(ids, segments, 4), Sampling(max_new=8), key))
  assert len(set(map(tuple, responses(program(weights(), *decode.pad(PROMPTS[:2], 8), key()))))) == 8


@pytest.mark.parametrize('filters', [dict(top_k=5), dict(top_p=0.9), dict(temperature=0)])
def test_scores_are_refused_where_the_policy_is_not_what_drew(filters):
  r = draw([[5]], Sampling(max_new=2))
  with pytest.raises(ConfigError, match=f'{next(iter(filters))}={next(iter(filters.values()))}.*expected all tokens'):
    rollout.score({}, r, Sampling(**filters), apply=None, head=None)


def test_more_columns_than_positions_are_refused():
  with pytest.raises(ConfigError, match='max_new=61 after prompts of width 4; expected at most 64'):
    draw([[5]], Sampling(max_new=61))


def test_no_array_of_length_times_vocabulary():
  b, t, v = 4, 48, 2048
  c = dataclasses.replace(C, vocab=v)
  row = jax.ShapeDtypeStruct((b, t + 1), jnp.int32)
  vector = lambda dtype: jax.ShapeDtypeStruct((b,), dtype)
  batch = Batch(row, row, row, jax.ShapeDtypeStruct(row.shape, bool))
  r = rollout.Responses(batch, vector(bool), vector(jnp.int32), jax.ShapeDtypeStruct((b, t - 16), jnp.float32), 17)
  score = functools.partial(rollout.score, s=Sampling(), chunk=32, head=lambda p: decoder.head(p, c),
                            apply=lambda p, ids_BT, **kwargs: decoder.apply(p, c, ids_BT, **kwargs))
  p = params.abstract(decoder.specs(c))
  text = jax.jit(score).lower(p, r).compile().as_text()
  sizes = [np.prod([int(n) for n in shape.split(',')]) for shape in re.findall(r'\w\d+\[([0-9,]+)\]', text)]
  assert 32 * v <= max(sizes) < b * t * v / 2


@pytest.mark.slow
def test_a_mesh_draws_and_says_the_same():
  """Rows over data and fsdp, weights over fsdp and tensor."""
  mesh, s = sharding.make_mesh(sharding.Config(data=2, fsdp=2, tensor=2)), Sampling(max_new=10, stop=STOP)
  ids, segments = decode.pad(PROMPTS, 8)
  want, scored = make(s)(weights(), weights(1), ids, segments, key())
  with sharding.use(mesh):
    given = jax.device_put((weights(), weights(1)), (sharding.shardings(SPECS, mesh),) * 2)
    rows = jax.device_put((ids, segments), sharding.batch_sharding(mesh))
    r, scores = make(s)(*given, *rows, jax.device_put(key(), sharding.replicated(mesh)))
  # A sum over a divided vocabulary is rounded elsewhere; what was drawn is the same.
  jax.tree.map(np.testing.assert_array_equal, r.replace(logprobs_BN=None), want.replace(logprobs_BN=None))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
               (r.logprobs_BN, scores), (want.logprobs_BN, scored))
  assert r.batch.ids_BT.sharding.shard_shape((8, 18)) == (2, 18)


def test_a_mesh_sends_weights_once():
  """And in the loop over tokens what tensor must; each device keeps the cache of its rows and heads."""
  mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2, tensor=2))
  program = jax.jit(functools.partial(draws, Sampling(max_new=10, stop=STOP)))
  with sharding.use(mesh):
    p = params.abstract(SPECS, sharding.shardings(SPECS, mesh))
    row = jax.ShapeDtypeStruct((16, 8), jnp.int32, sharding=sharding.batch_sharding(mesh))
    text = program.lower(p, row, row, key()).compile().as_text()
  sent = hlo.collectives(text, mesh)
  assert {c.axes for c in sent if 'while/body' in c.where} == {('tensor',)}
  held = sum(4 * np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(p))
  assert sum(c.total for c in sent if c.axes != ('tensor',)) == held
  sizes = set(re.findall(r'f32\[(\d+),(\d+),18,8\]', text))
  assert sizes == {('4', '1')}


@pytest.mark.parametrize('method', ['lora', 'houlsby', 'prefix'])
def test_few_parameters_leave_weights_divided_over_tensor(method):
  mesh, specs = sharding.make_mesh(sharding.Config(fsdp=4, tensor=2)), peft.specs(peft.Config(method, width=8), SPECS)
  with sharding.use(mesh):
    p = params.abstract(specs, sharding.shardings(specs, mesh))
    out = jax.jit(lambda p: rollout.gathered(peft.plain(p), SPECS)).lower(p).compile().output_shardings
  parts = {path: tuple(s.spec) for path, s in params.flatten(out).items()}
  o = parts['blocks/attn/o/w' if method == 'houlsby' else 'blocks/attn/o']
  assert o[1] == 'tensor' and parts['blocks/mlp/up'][2] == parts['embed/tokens'][0] == 'tensor'
  assert {axis for spec in parts.values() for axis in spec} == {'tensor', None}
