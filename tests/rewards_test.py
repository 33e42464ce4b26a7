"""Rewards: published scores and tables of cases, and that what a reward function gets wrong is named."""

import builtins
import math

import jax.numpy as jnp
import numpy as np
import pytest

from lm import rewards
from lm.data.prompts import Record
from lm.errors import ConfigError, DataError


def records(*answers):
  return [Record(f'question {i}', answer=a, origin=f'in.jsonl:{i + 1}') for i, a in enumerate(answers)]


def test_sentiment_has_the_scores_that_vader_publishes():
  texts = {'VADER is smart, handsome, and funny.': 0.8316, 'VADER is smart, handsome, and funny!': 0.8439,
           'VADER is not smart, handsome, nor funny.': -0.7424, 'The book was good.': 0.4404, 'Today SUX!': -0.5461,
           'The book was good. VADER is not smart, handsome, nor funny.': (0.4404 - 0.7424) / 2,
           'The book was good.\n\n': 0.4404, '': 0.0, ' \n': 0.0, '这本书很好。': 0.0, '12': 0.0}
  found = rewards.sentiment(records(*texts), list(texts))
  assert found == pytest.approx([*texts.values()], abs=1e-9)
  assert rewards.checked(rewards.sentiment, records(*texts), list(texts)) == pytest.approx(found)


def test_without_vader_the_extra_is_named(monkeypatch):
  real = builtins.__import__

  def missing(name, *args, **kwargs):
    if name.startswith('vaderSentiment'):
      raise ModuleNotFoundError(f'No module named {name!r}')
    return real(name, *args, **kwargs)
  monkeypatch.setattr(builtins, '__import__', missing)
  rewards._vader.cache_clear()
  with pytest.raises(ConfigError, match=r"no vaderSentiment .*run pip install -e '.\[rl\]'"):
    rewards.checked(rewards.sentiment, records(None), ['good'])


@pytest.mark.parametrize('text, words', [
    ('one two three four', 4), ('', 0), ("don't stop, 17 well-known cats!", 5), ('这部电影很好。', 6),
    ('看 Star Wars 吧', 4), ('a_b ... --', 2), ('日本のアニメ', 6), ('\n\t', 0), ('naïve café', 2)])
def test_length_counts_words_and_chinese_characters(text, words):
  for target in (1, 4, 10):
    want = max(0.0, 1 - abs(words - target) / target)
    assert rewards.length(target)(records(None), [text]) == pytest.approx([want])


def test_length_is_one_at_its_target_and_never_below_zero():
  reward = rewards.length(4)
  assert rewards.checked(reward, records(*'abcd'), ['w ' * n for n in (4, 3, 6, 99)]).tolist() == [1, 0.75, 0.5, 0]
  with pytest.raises(ConfigError, match='target=0'):
    rewards.length(0)


@pytest.mark.parametrize('response, answer, right', [
    ('25', '25', 1), ('17 + 8 = 25.', '25', 1), ('答案是25。', '25', 1), ('答案是２５。', '25', 1), ('24', '25', 0),
    ('25 or 24', '25', 0), ('', '25', 0), ('twenty-five', '25', 0), ('二十五', '25', 0), ('-9', '-9', 1),
    ('3 - 12 = -9', '-9', 1), ('答案是-9', '-9', 1), ('得－９。', '-9', 1), ('−9', '-9', 1), ('9', '-9', 0),
    ('-9', '9', 0), ('12-9', '9', 1), ('12 -9', '9', 1), ('(4)-9', '9', 1), ('GPT-9', '9', 1), ('1,234', '1234', 1),
    ('1,234,567.', '1234567', 1), ('１２３４', '1234', 1), ('有17，250', '250', 1), ('1, 2, 3', '3', 1),
    ('1,2345', '2345', 1), ('025', '25', 1), ('-0', '0', 1), ('25.0', '25', 1), ('25.5', '25', 0), ('2.25', '25', 0),
    ('25.\nDone!', '25', 1), ('so 25.Then', '25', 1), ('25', 'so it is 5 * 5.\n#### 25', 1), ('#### 1,025', '1025', 1),
    ('9' * 5000, '9', 0), ('0' * 5000 + '9', '9', 1), ('$25', '25', 1), ('25%', '25', 1), ('x=25', '25', 1),
    ('.5', '5', 0), ('-.5', '5', 0), ('is .25', '25', 0), ('...5', '5', 1)])
def test_arithmetic_takes_the_last_number(response, answer, right):
  assert rewards.arithmetic(records(answer), [response]) == [right]


@pytest.mark.parametrize('answer', [None, '', 'many', '2.5'])
def test_arithmetic_needs_a_number_to_compare_with(answer):
  with pytest.raises(DataError, match=r'in.jsonl:2: answer .*expected one with a whole number'):
    rewards.arithmetic(records('3', answer), ['3', '3'])


@pytest.mark.parametrize('response, good', [
    ('17 + 8 is 25.\n#### 25', 1), ('#### 25', 1), ('#### -1,025 \n', 1), ('答案\n####２５', 1), ('25', 0),
    ('#### 25\nI think', 0), ('#### 24\n#### 25', 0), ('it is #### 25', 0), ('####', 0), ('#### many', 0)])
def test_formatted_wants_one_marked_answer_at_the_end(response, good):
  assert rewards.formatted(records('1'), [response]) == [good]


def test_combine_is_the_weighted_sum_of_checked_rewards():
  reward = rewards.combine({rewards.arithmetic: 1.0, rewards.formatted: 0.1, rewards.length(2): -0.5})
  found = rewards.checked(reward, records('25', '25'), ['#### 25', 'it is 7'])
  assert found == pytest.approx([1 + 0.1 - 0.5 * 0.5, -0.5 * 0.5])
  assert reward.__name__ == 'combine(arithmetic, formatted, length(2))'

  def short(some, responses):
    return [0.0]
  with pytest.raises(DataError, match='reward short: gave 1 numbers for 2 responses'):
    rewards.checked(rewards.combine({rewards.formatted: 1.0, short: 1.0}), records('1', '2'), ['', ''])
  for weights in ({}, {rewards.formatted: math.nan}):
    with pytest.raises(ConfigError, match='combine: weights'):
      rewards.combine(weights)


@pytest.mark.parametrize('given, want', [
    ([0.73, -1.9], [0.73, -1.9]), ((True, False), [1, 0]), ([1, 2], [1, 2]), (np.array([0.73, 2]), [0.73, 2]),
    (np.array([1, 0]), [1, 0]), ([np.float32(0.5), np.int64(3)], [0.5, 3]), ([np.bool_(True), np.array(0.73)],
                                                                            [1, 0.73]),
    (jnp.array([0.73, 1]), [0.73, 1]), ([jnp.float32(0.73), 1], [0.73, 1])])
def test_checked_keeps_fractions_and_takes_ints_and_bools(given, want):
  found = rewards.checked(lambda some, responses: given, records('a', 'b'), ['', ''])
  assert found.dtype == np.float32 and found.tolist() == np.array(want, np.float32).tolist()


@pytest.mark.parametrize('given, part', [
    ([1.0], 'gave 1 numbers for 2 responses'), ([1.0, 2.0, 3.0], 'gave 3 numbers'), ([], 'gave 0 numbers'),
    (0.5, 'gave 0.5; expected a list of 2'), (None, 'gave None'), ('ab', "gave 'ab'"), ({'a': 1, 'b': 2}, 'gave {'),
    ([1.0, math.nan], 'row 1 (in.jsonl:2): gave nan; expected a finite'), ([-math.inf, 1], 'row 0 (in.jsonl:1): gave'),
    ([1.0, 1e39], 'at most 1e18'), ([10**5000, 1], 'a very large int; expected a finite'),
    ([3e38, 1], 'at most 1e18'), (np.array([1, np.nan]), 'row 1 (in.jsonl:2): gave nan'),
    ([1.0, '0.5'], "row 1 (in.jsonl:2): gave '0.5'; expected a number"), ([None, 1], 'row 0 (in.jsonl:1): gave None'),
    ([1.0, 1j], 'gave 1j'), (np.ones((2, 1)), 'row 0 (in.jsonl:1): gave [1.0]; expected a number')])
def test_checked_names_the_reward_the_row_and_what_it_gave(given, part):
  def mine(some, responses):
    return given
  with pytest.raises(DataError) as caught:
    rewards.checked(mine, records('a', 'b'), ['', ''])
  assert str(caught.value).startswith('reward mine: ') and part in str(caught.value)


def test_checked_chains_what_a_reward_raises():
  def mine(some, responses):
    raise ValueError('no such word\nsecond line')
  with pytest.raises(DataError, match=r'^reward mine: ValueError: no such word; expected a number for each of 1') as e:
    rewards.checked(mine, records('a'), ['b'])
  assert isinstance(e.value.__cause__, ValueError) and 'second line' not in str(e.value)
  with pytest.raises(DataError, match=r'^in.jsonl:1: answer None'):  # already for people
    rewards.checked(rewards.arithmetic, records(None), ['b'])
  assert rewards.checked(rewards.formatted, [], []).shape == (0,)
