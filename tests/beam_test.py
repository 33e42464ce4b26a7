"""Beam search against every continuation there is, and against a plain search in NumPy."""

import dataclasses
import functools
import itertools

import decode_test as shared
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import beam, decode, params
from lm.errors import ConfigError
from lm.models import decoder

TINY = dataclasses.replace(shared.GPT2, vocab=5, length=8)
STOP = 2


@functools.cache
def tiny():
  p = params.init(decoder.specs(TINY), jax.random.key(3))
  return jax.tree.map(lambda x: 12 * x if x.ndim > 1 else x, p)


@functools.cache
def scorer(c):
  return jax.jit(lambda p, ids_BT: jax.nn.log_softmax(decoder.logits(p, c, decoder.apply(p, c, ids_BT))))


def logprobs(c, p, rows, width):
  """[rows, V] of the token after each row; one program for all lengths."""
  ids_BT = np.zeros((len(rows), width), np.int32)
  for i, row in enumerate(rows):
    ids_BT[i, :len(row)] = row
  return np.asarray(scorer(c)(p, ids_BT))[np.arange(len(rows)), [len(row) - 1 for row in rows]]


def found(answers, i):
  """[(tokens, score)] of prompt i."""
  arrays = [np.asarray(x)[i] for x in (answers.tokens_BKT, answers.lengths_BK, answers.scores_BK)]
  return [(tuple(t[:n].tolist()), s) for t, n, s in zip(*arrays, strict=True) if n]


@pytest.mark.slow
@pytest.mark.parametrize('penalty', [0.0, 0.8, 2.0])
def test_with_beams_enough_the_best_of_all_answers_are_found(penalty):
  prompt, most = [1, 3, 0], 3
  every = [a for n in range(1, most + 1) for a in itertools.product(range(5), repeat=n)
           if STOP not in a[:-1] and (n == most or a[-1] == STOP)]
  begins = sorted({a[:n] for a in every for n in range(len(a))})
  at = dict(zip(begins, logprobs(TINY, tiny(), [[*prompt, *row] for row in begins], 6), strict=True))
  score = {a: sum(at[a[:n]][a[n]] for n in range(len(a))) / len(a)**penalty for a in every}
  c = beam.Config(beams=len(every) + 1, max_new=most, penalty=penalty, stop=(STOP,))
  got = found(beam.generate(decode.of(decoder, TINY), decode.prepare(tiny()), [prompt], c), 0)
  want = sorted(score.items(), key=lambda item: -item[1])
  assert len(got) == len(every) and {a for a, _ in got} == set(every)
  np.testing.assert_allclose([s for _, s in got], [s for _, s in want], rtol=1e-4)
  assert got[0][0] == want[0][0]


def search(c, p, prompt, b):
  """The answers, the best first."""
  beams, done, K = [((), 0.0)], [], b.beams
  for t in range(1, b.max_new + 1):
    scores = logprobs(c, p, [[*prompt, *row] for row, _ in beams] + [prompt] * (K - len(beams)), 40)[:len(beams)]
    told = []
    for (row, total), x in zip(beams, scores, strict=True):
      grams = {row[i:i + b.distinct] for i in range(len(row) - b.distinct + 1)} if b.distinct else ()
      told += [((*row, i), total + x[i]) for i in range(len(x))
               if not b.distinct or (*row, i)[-b.distinct:] not in grams]
    told = sorted(told, key=lambda item: -item[1])[:(1 + max(1, len(b.stop))) * K]
    ends = lambda row, t=t: row[-1] in b.stop
    done += [(row, total / t**b.penalty) for row, total in told[:K] if ends(row) or t == b.max_new]
    done = sorted(done, key=lambda item: -item[1])[:K]
    beams = [item for item in told if not ends(item[0])][:K]
    if len(done) == K and beams[0][1] / t**b.penalty <= done[-1][1]:
      break
  return done


@pytest.mark.slow
@pytest.mark.parametrize('name', shared.CONFIGS)
@pytest.mark.parametrize('changes', [
    dict(beams=3), dict(beams=4, penalty=0.0, stop=(3, 41)), dict(beams=5, penalty=2.0, stop=(17,), distinct=2)])
def test_it_is_a_plain_search_whatever_the_other_prompts(name, changes):
  c, p = shared.CONFIGS[name], shared.weights(name)
  b = beam.Config(**{'max_new': 12} | changes)
  answers = beam.generate(shared.model(name), decode.prepare(p), shared.PROMPTS, b)
  for i, prompt in enumerate(shared.PROMPTS):
    got, want = found(answers, i), search(c, p, prompt, b)
    assert [row for row, _ in got] == [row for row, _ in want]
    np.testing.assert_allclose([s for _, s in got], [s for _, s in want], rtol=1e-3)
    if b.distinct:
      assert all(len(set(zip(row, row[1:], strict=False))) == len(row) - 1 for row, _ in got)


@pytest.mark.slow
def test_an_answer_that_repeats_itself_is_kept_from_it():
  """The model's favourite goes round in circles."""
  c = dataclasses.replace(TINY, length=64)
  p = jax.tree.map(jnp.zeros_like, params.init(decoder.specs(c), jax.random.key(0)))
  p['embed']['tokens'] = jnp.eye(5, 32).at[:, 31].set(jnp.arange(5.0))
  for distinct, want in ((0, (4,) * 6), (1, None), (3, None)):
    b = beam.Config(beams=2, max_new=5 if distinct == 1 else 6, distinct=distinct)
    p_ = p | {'final_norm': p['final_norm'] | {'bias': jnp.zeros(32).at[31].set(1.0)}}
    (row, _), *_ = found(beam.generate(decode.of(decoder, c), p_, [[0]], b), 0)
    assert want is None or row == want
    n = distinct or 1
    grams = [row[i:i + n] for i in range(len(row) - n + 1)]
    assert not distinct or len(set(grams)) == len(grams)


@pytest.mark.parametrize('fields, part', [
    (dict(beams=1), 'beams=1; expected at least 2'), (dict(max_new=0), 'max_new=0'), (dict(distinct=-1), 'distinct=-1'),
    (dict(penalty=float('nan')), 'penalty=nan'), (dict(stop=(-1,)), 'stop=')])
def test_a_wrong_field_is_named(fields, part):
  with pytest.raises(ConfigError, match=part):
    beam.Config(**fields)


def test_more_than_the_model_has_positions_is_refused():
  with pytest.raises(ConfigError, match='max_new=9 after a prompt of 2 tokens; expected at most 8'):
    beam.generate(decode.of(decoder, TINY), tiny(), [[1, 2]], beam.Config(max_new=9))
