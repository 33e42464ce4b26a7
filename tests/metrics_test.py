"""Metrics against loops, values worked out by hand and, for intervals, how often they hold."""

import collections
import math
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lm import metrics
from lm.errors import ConfigError

nan = float('nan')
SEEDS = range(5)


@pytest.fixture(autouse=True)
def no_warnings():
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    yield


def classes(seed, n=60, c=4):
  """Targets, and predictions that are right about half of the time."""
  rng = np.random.default_rng(seed)
  targets = rng.integers(0, c, n)
  return targets, np.where(rng.random(n) < 0.5, targets, rng.integers(0, c, n))


def counts(targets, predictions, c):
  table = np.zeros((c, c), int)
  for t, p in zip(targets, predictions, strict=True):
    table[t, p] += 1
  return table


def f1_of(table, c):
  tp, fp, fn = table[c, c], table[:, c].sum() - table[c, c], table[c].sum() - table[c, c]
  return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('c', [2, 4])
def test_classes_against_loops(seed, c):
  targets, predictions = classes(seed, c=c)
  table = counts(targets, predictions, c)
  assert (metrics.confusion(targets, predictions, c) == table).all()
  assert metrics.confusion(targets, predictions, c).dtype == np.int64
  assert metrics.accuracy(targets, predictions) == pytest.approx(np.trace(table) / len(targets))
  assert metrics.f1(targets, predictions) == pytest.approx(f1_of(table, 1))
  assert metrics.macro_f1(targets, predictions) == pytest.approx(np.mean([f1_of(table, i) for i in range(c)]))
  n, t, p = table.sum(), table.sum(1), table.sum(0)  # Gorodkin's R_K
  covariance = np.trace(table) * n - t @ p
  assert metrics.mcc(targets, predictions) == pytest.approx(covariance / math.sqrt((n**2 - p @ p) * (n**2 - t @ t)))
  rows = metrics.per_class(targets, predictions, [f'c{i}' for i in range(c)])
  for i, row in enumerate(rows.values()):
    assert row == pytest.approx({'precision': table[i, i] / p[i], 'recall': table[i, i] / t[i],
                                 'f1': f1_of(table, i), 'support': t[i], 'predicted': p[i]})


@pytest.mark.parametrize('seed', SEEDS)
def test_mcc_of_two_classes_is_pearson(seed):
  targets, predictions = classes(seed, c=2)
  assert metrics.mcc(targets, predictions) == pytest.approx(metrics.pearson(targets, predictions))


def test_glue_examples_by_hand():
  targets, predictions = np.array([1, 1, 1, 0, 0, 1]), np.array([1, 0, 1, 1, 0, 1])
  scores = {task: {name: f(targets, predictions) for name, f in of.items()} for task, of in metrics.GLUE.items()}
  assert scores['mrpc'] == scores['qqp'] == pytest.approx({'accuracy': 4 / 6, 'f1': 0.75})
  assert scores['cola'] == pytest.approx({'mcc': (3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2)})
  for task in ('sst2', 'mnli', 'qnli', 'rte', 'wnli'):
    assert scores[task] == pytest.approx({'accuracy': 4 / 6})
  assert set(metrics.GLUE['stsb']) == {'pearson', 'spearman'}
  assert len(metrics.GLUE) == 9


def ranks(x):
  return np.array([np.mean([i for i, y in enumerate(sorted(x)) if y == v]) for v in x])


@pytest.mark.parametrize('seed', SEEDS)
def test_correlations_against_their_definitions(seed):
  rng = np.random.default_rng(seed)
  a = rng.integers(0, 9, 40).astype(np.float32)  # with ties
  b = a + rng.normal(0, 3, 40).round()

  def pearson(x, y):
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
  assert metrics.pearson(a, b) == pytest.approx(pearson(a, b), abs=1e-6)
  assert metrics.spearman(a, b) == pytest.approx(pearson(ranks(a), ranks(b)), abs=1e-6)
  assert metrics.spearman(a, np.exp(a)) == pytest.approx(1) and metrics.pearson(a, 3 - a) == pytest.approx(-1)


@pytest.mark.parametrize('metric, targets, predictions, value', [
    (metrics.accuracy, [], [], nan), (metrics.f1, [], [], nan), (metrics.macro_f1, [], [], nan),
    (metrics.mcc, [], [], nan), (metrics.pearson, [], [], nan), (metrics.spearman, [], [], nan),
    (metrics.accuracy, [1, 1], [1, 1], 1), (metrics.macro_f1, [1, 1], [1, 1], 1), (metrics.f1, [0, 0], [0, 0], 0),
    (metrics.f1, [1, 0], [0, 0], 0), (metrics.mcc, [1, 1], [1, 1], 0), (metrics.mcc, [0, 1, 1], [1, 1, 1], 0),
    (metrics.mcc, [1, 1, 1], [0, 1, 1], 0), (metrics.macro_f1, [0, 1, 1], [1, 1, 1], 0.4),
    (metrics.macro_f1, [0, 5], [0, 5], 1), (metrics.pearson, [1.0, 2.0], [3.0, 3.0], 0),
    (metrics.spearman, [1.0, 1.0], [3.0, 4.0], 0), (metrics.pearson, [1.0], [2.0], 0),
    (metrics.pearson, [1.0, 2.0], [nan, 3.0], nan), (metrics.spearman, [1.0, 2.0], [float('inf'), 3.0], nan),
    (metrics.accuracy, [True, False], [True, True], 0.5),
])
def test_edges_have_values(metric, targets, predictions, value):
  assert metric(np.array(targets), np.array(predictions)) == pytest.approx(value, nan_ok=True)
  if targets:
    found = metric(jnp.asarray(targets), jnp.asarray(predictions))
    assert found == pytest.approx(value, nan_ok=True) and type(found) is float


def test_tables_of_nothing_and_of_absent_classes():
  assert (metrics.confusion([], [], 2) == np.zeros((2, 2))).all()
  rows = metrics.per_class(np.zeros(0, int), np.zeros(0, int), ['a', 'b'])
  assert rows['a'] == pytest.approx({'precision': nan, 'recall': nan, 'f1': nan, 'support': 0, 'predicted': 0},
                                    nan_ok=True)
  rows = metrics.per_class([0, 0], [0, 1], ['好|评', 'b', 'c'])
  assert rows['b'] == {'precision': 0, 'recall': 0, 'f1': 0, 'support': 0, 'predicted': 1}
  assert rows['c'] == {'precision': 0, 'recall': 0, 'f1': 0, 'support': 0, 'predicted': 0}
  assert metrics.table(rows).splitlines()[:3] == [
      '|  | precision | recall | f1 | support | predicted |', '| --- | ---: | ---: | ---: | ---: | ---: |',
      r'| 好\|评 | 1.0000 | 0.5000 | 0.6667 | 2 | 1 |']


@pytest.mark.parametrize('call, part', [
    (lambda: metrics.accuracy([0, 1], [0]), r'targets, predictions: shapes \[\(2,\), \(1,\)\]'),
    (lambda: metrics.accuracy([0, -1], [0, 1]), 'targets: -1 at item 1.*fill up'),
    (lambda: metrics.accuracy([0, 1], [0.2, 0.9]), 'predictions: float64.*argmax'),
    (lambda: metrics.mcc([0, 1], np.zeros((2, 3))), 'one length'),
    (lambda: metrics.accuracy(np.zeros((2, 1), int), np.zeros((2, 1), int)), 'one length'),
    (lambda: metrics.f1(['a'], ['b']), 'targets: <U1'),
    (lambda: metrics.confusion([0, 3], [0, 1], 3), 'targets: 3 at item 1; expected a class from 0 to 2'),
    (lambda: metrics.per_class([0], [2], ['a', 'b']), 'predictions: 2 at item 0'),
    (lambda: metrics.pearson(np.zeros((2, 1)), np.zeros((2, 1))), 'one length'),
    (lambda: metrics.rouge(['a'], []), 'targets: 1 for 0'),
    (lambda: metrics.bleu([[]], ['a']), 'targets: item 0 has no text'),
    (lambda: metrics.rouge(['a'], ['a'], 'fr'), "language='fr'"),
    (lambda: metrics.bleu(['a'], ['a'], 'fr'), "language='fr'"),
    (lambda: metrics.exact_match(['a'], ['a'], 'fr'), "language='fr'"),
    (lambda: metrics.interval([1, 2], level=95), 'level=95'),
    (lambda: metrics.interval([[1, 2]]), 'one length'),
    (lambda: metrics.bootstrap(metrics.accuracy, [1], [1, 2]), 'sample 1, sample 2'),
    (lambda: metrics.bootstrap(metrics.accuracy, [1], [1], level=0), 'level=0'),
    (lambda: metrics.paired([1, 0], [1, 1]), 'paired: int64'),
    (lambda: metrics.paired([True], [True, False]), 'one length'),
])
def test_bad_input_is_named(call, part):
  with pytest.raises(ConfigError, match=part) as error:
    call()
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('module, call', [
    ('sklearn.metrics', lambda: metrics.accuracy([1], [1])), ('sacrebleu', lambda: metrics.bleu(['a'], ['a'])),
    ('rouge_score', lambda: metrics.rouge(['a'], ['a']))])
def test_a_missing_library_says_what_to_install(module, call, monkeypatch):
  monkeypatch.setitem(sys.modules, module, None)
  monkeypatch.delitem(sys.modules, 'rouge_score.rouge_scorer', raising=False)
  with pytest.raises(ConfigError, match=r"pip install -e '.\[finetune\]'"):
    call()


def rouge_n(target, prediction, n):
  """F of n-grams, of lists of tokens."""
  a, b = (collections.Counter(tuple(x[i:i + n]) for i in range(len(x) - n + 1)) for x in (target, prediction))
  hits = sum((a & b).values())
  return 2 * hits / (sum(a.values()) + sum(b.values())) if hits else 0.0


def rouge_l(target, prediction):
  table = np.zeros((len(target) + 1, len(prediction) + 1), int)
  for i, a in enumerate(target):
    for j, b in enumerate(prediction):
      table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
  return 2 * table[-1, -1] / (len(target) + len(prediction)) if table[-1, -1] else 0.0


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('language, words, space', [('en', 'the cat sat on a mat today'.split(), ' '),
                                                    ('zh', list('我们今天去公园玩'), '')])
def test_rouge_against_loops(seed, language, words, space):
  rng = np.random.default_rng(seed)
  pairs = [[rng.choice(words, rng.integers(1, 12)).tolist() for _ in range(2)] for _ in range(8)]
  found = metrics.rouge([space.join(t) for t, _ in pairs], [space.join(p) for _, p in pairs], language)
  assert found == pytest.approx({'rouge1': np.mean([rouge_n(t, p, 1) for t, p in pairs]),
                                 'rouge2': np.mean([rouge_n(t, p, 2) for t, p in pairs]),
                                 'rougeL': np.mean([rouge_l(t, p) for t, p in pairs])})


@pytest.mark.parametrize('target, prediction, language, stem, values', [
    ('police killed the gunman', 'police kill the gunman', 'en', False, (0.75, 1 / 3, 0.75)),
    ('police killed the gunman', 'police kill the gunman', 'en', True, (1, 1, 1)),
    ('police killed the gunman', 'the gunman police killed', 'en', False, (1, 2 / 3, 0.5)),
    ('Hello, WORLD!', 'hello world', 'en', False, (1, 1, 1)),
    ('我爱北京。', '我爱 上海', 'zh', False, (0.5, 1 / 3, 0.5)),
    ('ＡＢＣ公司2024年', 'abc 公司 2024 年', 'zh', False, (1, 1, 1)),
    ('使用 GPU 训练', '使用gpu推理', 'zh', False, (0.6, 0.5, 0.6)),
    ('a b', '', 'en', False, (0, 0, 0)), ('', 'a', 'zh', False, (0, 0, 0)), ('。', '！', 'zh', False, (0, 0, 0)),
])
def test_rouge_by_hand(target, prediction, language, stem, values):
  assert tuple(metrics.rouge([target], [prediction], language, stem).values()) == pytest.approx(values)


def bleu_of(references, predictions):
  """Papineni et al. 2002, equation by equation, of lists of tokens; every n has a match."""
  logs = []
  for n in range(1, 5):
    hits = total = 0
    for some, p in zip(references, predictions, strict=True):
      grams = [collections.Counter(tuple(x[i:i + n]) for i in range(len(x) - n + 1)) for x in (p, *some)]
      best = collections.Counter()
      for reference in grams[1:]:
        best |= reference
      hits, total = hits + sum((grams[0] & best).values()), total + sum(grams[0].values())
    logs.append(math.log(hits / total))
  length = sum(map(len, predictions))
  closest = sum(min((abs(len(r) - len(p)), len(r)) for r in some)[1]
                for some, p in zip(references, predictions, strict=True))
  return 100 * math.exp(np.mean(logs)) * (math.exp(1 - closest / length) if length < closest else 1)


def test_bleu_against_its_definition():
  en = [['the cat is on the mat now', 'there is a cat on the mat'], ['we all live here today']]
  said = ['the cat is on the mat', 'we all live here']
  assert metrics.bleu(en, said) == pytest.approx(bleu_of([[r.split() for r in some] for some in en],
                                                         [p.split() for p in said]))
  zh = [['今天天气很好', '今天的天气很好啊'], ['我们去公园玩吧']]
  assert metrics.bleu(zh, ['今天天气好得很好', '我们去公园玩'], 'zh') == pytest.approx(
      bleu_of([list(map(list, some)) for some in zh], [list('今天天气好得很好'), list('我们去公园玩')]))
  assert metrics.bleu(['今天天气很好啊'], ['今天天气很好'], 'zh') > 80
  assert metrics.bleu(['今天天气很好啊'], ['今天天气很好'], 'en') < 1  # one token, and it differs


def chrf_of(reference, prediction):
  """Popović 2015 for one pair: F2 of each order of character n-grams that both texts have, white space aside."""
  r, p = (''.join(x.split()) for x in (reference, prediction))
  scores = []
  for n in range(1, 7):
    a, b = (collections.Counter(x[i:i + n] for i in range(len(x) - n + 1)) for x in (r, p))
    if not a or not b:
      continue
    hits = sum((a & b).values())
    precision, recall = hits / sum(b.values()), hits / sum(a.values())
    scores.append((precision, recall))
  precision, recall = np.mean(scores, axis=0)
  return 100 * 5 * precision * recall / (4 * precision + recall) if hits or precision else 0.0


@pytest.mark.parametrize('reference, prediction', [
    ('the cat sat', 'the cat sits'), ('今天天气很好', '今天的天气不错'), ('abc', 'abd'), ('同样的句子', '同样的句子')])
def test_chrf_against_its_definition(reference, prediction):
  assert metrics.chrf([reference], [prediction]) == pytest.approx(chrf_of(reference, prediction))


def test_chrf_plus_plus_sees_the_order_of_words():
  """F2 of the words and their pairs joins that of the characters."""
  one, two = (metrics.chrf(['a b c d'], ['b a d c'], word_order=n) for n in (0, 2))
  orders = [1, 0, 0, 0]  # of 4 characters: only single ones match
  assert one == pytest.approx(100 * np.mean(orders))
  assert two == pytest.approx(100 * np.mean([*orders, 1, 0]))


def test_several_references_take_the_best():
  assert metrics.rouge([['a b', 'c d e']], ['c d e'])['rouge2'] == 1
  assert metrics.chrf([['xyz', 'same words']], ['same words']) == pytest.approx(100)
  assert metrics.chrf([['xyz', 'same words'], 'other'], ['same words', 'other'], word_order=2) == pytest.approx(100)
  assert metrics.exact_match([['no', 'The Answer.'], ['x']], ['answer', 'y']) == 0.5


def test_texts_of_nothing():
  assert all(math.isnan(f([], [])) for f in (metrics.bleu, metrics.chrf, metrics.exact_match))
  assert metrics.rouge([], []) == pytest.approx(dict.fromkeys(('rouge1', 'rouge2', 'rougeL'), nan), nan_ok=True)
  assert metrics.bleu(['a b c d'], ['']) == metrics.chrf(['a b c d'], ['']) == 0
  assert metrics.exact_match([''], ['']) == 1


@pytest.mark.parametrize('language, target, prediction, same', [
    ('en', 'The Eiffel Tower', 'eiffel  tower.', True), ('en', 'an apple', 'apple', True), ('en', 'U.S.', 'US', True),
    ('en', 'another', 'other', False), ('en', 'theatre', 'atre', False), ('en', 'cafe', 'café', False),
    ('zh', '北京。', '北京', True), ('zh', '《红楼梦》', '“红楼梦”', True), ('zh', '１２３，４５６', '123456', True),
    ('zh', '3.5亿', '35亿', False), ('zh', '3.5亿', '３．５ 亿', True), ('zh', '人工智能AI', '人工智能 ai！', True),
    ('zh', 'deep learning', 'deeplearning', False), ('zh', '北京', '南京', False), ('zh', '好……', '好', True),
    ('zh', '-5', '5', False), ('zh', '1/2', '12', False), ('zh', '2:30', '230', False), ('zh', '5%', '5', False),
    ('zh', '2：30', '2:30。', True), ('zh', '−5', '-5', True), ('zh', '答案：5', '答案 5', True),
    ('zh', 'a-b', 'ab', True),
])
def test_exact_match_normalises(language, target, prediction, same):
  assert metrics.exact_match([target], [prediction], language) == same


def test_perplexity():
  assert metrics.perplexity(10 * math.log(7), 10) == pytest.approx(7)
  assert metrics.perplexity([math.log(2), 5 * math.log(2)], [1, 5]) == pytest.approx(2)
  assert metrics.perplexity([1.0, 3.0], [1, 1]) == pytest.approx(math.exp(2))
  assert metrics.perplexity([2.0, 12.0], [1, 5]) == pytest.approx(math.exp(14 / 6))
  assert math.isnan(metrics.perplexity(0, 0)) and math.isnan(metrics.perplexity([], []))
  assert metrics.perplexity(1e6, 1) == math.inf


def test_interval_by_hand():
  found = metrics.interval([0.85, 0.86, 0.90])
  assert found.value == pytest.approx(0.87) and found.count == 3 and found.level == 0.95
  half = 4.302652729911275 * 0.02645751311064591 / math.sqrt(3)  # t of 2 degrees of freedom; s
  assert (found.low, found.high) == pytest.approx((0.87 - half, 0.87 + half))
  assert str(found) == '0.87 [0.8043, 0.9357]'
  corrected = metrics.corrected_interval([0.85, 0.86, 0.90], 1 / 2)
  assert corrected.high - corrected.value == pytest.approx(half * math.sqrt((1 / 3 + 1 / 2) * 3))
  assert metrics.interval([0.85, 0.86, 0.90], level=0.5).high < found.high


@pytest.mark.parametrize('values, mean, low', [([], nan, nan), ([0.5], 0.5, nan), ([0.5, 0.5], 0.5, 0.5),
                                               ([0.5, nan], nan, nan)])
def test_interval_of_little(values, mean, low):
  found = metrics.interval(values)
  assert (found.value, found.low, found.count) == pytest.approx((mean, low, len(values)), nan_ok=True)


def test_intervals_hold_as_often_as_they_say():
  rng = np.random.default_rng(0)
  hits = [i.low <= 3 <= i.high for i in (metrics.interval(x, 0.9) for x in rng.normal(3, 2, (2000, 4)))]
  assert np.mean(hits) == pytest.approx(0.9, abs=0.025)
  hits = [i.low <= 0.7 <= i.high for i in (metrics.bootstrap(np.mean, x, level=0.9, resamples=200, method='percentile',
                                                             seed=k)
                                           for k, x in enumerate((rng.random((150, 80)) < 0.7).astype(float)))]
  assert np.mean(hits) == pytest.approx(0.9, abs=0.08)


def test_folds_need_the_correction():
  """Ten times 2-fold cross-validation of a mean that predicts: the plain interval is far too sure of the error."""
  rng = np.random.default_rng(0)
  plain = corrected = 0
  for _ in range(300):
    x = rng.normal(size=20)
    errors = []
    for _ in range(10):
      halves = np.split(rng.permutation(x), 2)
      errors += [np.mean((halves[1] - halves[0].mean()) ** 2), np.mean((halves[0] - halves[1].mean()) ** 2)]
    plain += (i := metrics.interval(errors)).low <= 1.1 <= i.high
    corrected += (i := metrics.corrected_interval(errors, 1)).low <= 1.1 <= i.high
  assert plain / 300 < 0.75 < 0.9 < corrected / 300


@pytest.mark.slow
def test_bootstrap_against_loops():
  targets, predictions = classes(0, 50)
  found = metrics.bootstrap(metrics.accuracy, targets, predictions, method='percentile', resamples=500, seed=3)
  rng, again = np.random.default_rng(8), []
  for _ in range(3000):
    items = rng.integers(0, 50, 50)  # pairs stay pairs
    again.append(np.mean(targets[items] == predictions[items]))
  assert found.value == metrics.accuracy(targets, predictions) and found.count == 50
  assert (found.low, found.high) == pytest.approx(np.quantile(again, [0.025, 0.975]), abs=0.025)
  same = metrics.bootstrap(metrics.accuracy, targets, predictions, method='percentile', resamples=500, seed=3)
  assert found == same
  bca = metrics.bootstrap(metrics.accuracy, targets, predictions, resamples=500)
  assert bca.low < bca.value < bca.high


def test_bootstrap_of_texts_and_of_little():
  found = metrics.bootstrap(metrics.bleu, ['a b c d', 'e f g h', 'i j k l m'], ['a b c d', 'e f g', 'i j x l m'],
                            resamples=40)
  assert 0 <= found.low < found.value < found.high <= 100.001
  many = metrics.bootstrap(metrics.exact_match, [['a', 'b'], 'c', ['d']], ['b', 'c', 'x'], resamples=40)
  assert many.value == pytest.approx(2 / 3)
  assert metrics.bootstrap(metrics.accuracy, np.ones(9, int), np.ones(9, int), resamples=20).low == 1
  one, none = (metrics.bootstrap(np.mean, x) for x in ([3.0], []))
  assert one.value == 3 and math.isnan(one.low) and math.isnan(none.value) and none.count == 0


@pytest.mark.parametrize('wins, losses', [(0, 0), (5, 0), (1, 9), (6, 6), (30, 14)])
def test_paired_is_the_exact_binomial(wins, losses):
  first = np.array([True] * wins + [False] * losses + [True, False])
  second = np.array([False] * wins + [True] * losses + [True, False])
  n = wins + losses
  tail = sum(math.comb(n, i) for i in range(min(wins, losses) + 1)) / 2**n
  assert metrics.paired(first, second) == (wins, losses, pytest.approx(min(1, 2 * tail)))
  assert metrics.paired([], []) == (0, 0, 1)


def test_paired_sees_what_two_intervals_do_not():
  rng = np.random.default_rng(1)
  first = rng.random(400) < 0.8
  second = first.copy()
  second[np.flatnonzero(first)[:12]] = False
  assert metrics.paired(first, second)[2] < 0.01
  assert stats.chi2_contingency([[first.sum(), 400 - first.sum()], [second.sum(), 400 - second.sum()]]).pvalue > 0.05
