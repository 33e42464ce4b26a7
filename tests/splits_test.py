"""Splits against their promises, on random data: nothing lost, nothing on two sides, shares, order, stability."""

import datetime
import hashlib
import sys

import numpy as np
import pytest

from lm.data import splits
from lm.errors import ConfigError
from lm.text import scan

SHARES = [(0.9, 0.1), (0.8, 0.1, 0.1), (0.6, 0.25, 0.15), (0.5, 0.5), (0.34, 0.33, 0.33)]
SEEDS = range(6)
WORDS = ['good', 'Bad', 'ＦＩＮＥ', '好评', '差评', '一般', 'Straße', 'café']


def data(seed, n, *, classes=3, groups=None, repeat=0.0, least=3):
  """(texts, labels, groups, times): every class at least `least` times; a share of the texts repeats earlier ones."""
  rng = np.random.default_rng(seed)
  texts = [f'{rng.choice(WORDS)} {i}' for i in range(n)]
  for i in range(1, n):
    if rng.random() < repeat:
      texts[i] = spelled(texts[int(rng.integers(i))], rng)
  labels = np.concatenate([np.repeat(np.arange(classes), least), rng.integers(0, classes, n - least * classes)])
  groups = [f'g{g}' for g in rng.integers(0, groups or n, n)]
  return texts, [f'class {c}' for c in rng.permutation(labels)], groups, rng.integers(0, n // 2, n).tolist()


def spelled(text, rng):
  """The same text as a person might write it a second time."""
  return str(rng.choice([text, text.upper(), text.replace(' ', '\u3000 '), f' {text}\n', text.replace('a', 'ａ')]))


def parts(split):
  return [split.train, split.validation, split.test, split.dropped]


def owners(split, n):
  """The part of each item; it fails unless each has exactly one."""
  found = np.concatenate(parts(split))
  assert sorted(found.tolist()) == list(range(n))
  assert all(p.dtype == np.int64 and (np.diff(p) > 0).all() for p in parts(split))
  owner = np.empty(n, int)
  for i, part in enumerate(parts(split)):
    owner[part] = i
  return owner


def together(owner, names):
  """No name has items in two parts, those that were dropped (3) aside."""
  sides = {}
  for side, name in zip(owner.tolist(), names, strict=True):
    if side != 3:
      assert sides.setdefault(name, side) == side, name


def whole(found, shares, total):
  """Within one item of each share; strictly, so that 2.0 can be only 2."""
  return all(abs(count - share * total) < 1 + 1e-9 for count, share in zip(found, shares, strict=False))


@pytest.mark.parametrize('text, same', [
    ('Hello  World', 'hello world\n'), ('ＡＢＣ１２３', 'abc123'), ('STRASSE', 'straße'), ('ﬁne', 'FINE'), ('', ' \t'),
    ('你好，世界！', '你好,世界!'), ('我 爱\u3000你', '我爱你'), ('用 AI 写作', '用AI写作'), ('他说。 好', '他说。好'),
    ('cafe\u0301', 'CAFÉ'), ('𝐀b', 'ab'), ('\ufeffa\u200bb', 'ab'),
    ('good ❤\ufe0f', 'good ❤'), ('fine\u200e', 'fine'), ('a\u202ab\u202c', 'ab'), ('e\u200d\u0301', 'é'),
    ('a\x7f', 'a'),
])
def test_duplicates_have_one_key(text, same):
  assert scan.duplicate_key(text) == scan.duplicate_key(same)


@pytest.mark.parametrize('text, other', [
    ('a b', 'ab'), ('good', 'good.'), ('好', '坏'), ('電影', '电影'), ('cafe', 'café'), ('1.5', '15'),
    ('a b 好', 'ab 好')])
def test_other_texts_have_other_keys(text, other):
  assert scan.duplicate_key(text) != scan.duplicate_key(other)


@pytest.mark.parametrize('shares', SHARES)
@pytest.mark.parametrize('n', [12, 17, 60])
def test_random_shares_are_within_one_item(shares, n):
  for seed in SEEDS:
    texts = data(seed, n)[0]
    owner = owners(splits.random(texts, shares, seed), n)
    assert whole(np.bincount(owner, minlength=4), shares, n)


@pytest.mark.parametrize('shares', SHARES)
@pytest.mark.parametrize('n, classes', [(12, 2), (15, 4), (40, 3), (90, 30), (101, 7)])
def test_class_shares_are_within_one_item(shares, n, classes):
  for seed in SEEDS:
    texts, labels, _, _ = data(seed, n, classes=classes)
    owner = owners(splits.stratified(texts, labels, shares, seed), n)
    assert whole(np.bincount(owner, minlength=4), shares, n)
    for label in set(labels):
      mine = [o for o, x in zip(owner, labels, strict=True) if x == label]
      assert whole(np.bincount(mine, minlength=4), shares, len(mine)), (label, np.bincount(mine, minlength=4))


@pytest.mark.parametrize('make', [
    lambda t, y, g, s, seed: splits.random(t, s, seed), lambda t, y, g, s, seed: splits.stratified(t, y, s, seed),
    lambda t, y, g, s, seed: splits.grouped(t, g, s, seed),
    lambda t, y, g, s, seed: splits.stratified_grouped(t, y, g, s, seed)],
    ids=['random', 'stratified', 'grouped', 'stratified_grouped'])
@pytest.mark.parametrize('shares', SHARES[1:4])
def test_shares_keep_duplicates_together_and_depend_on_the_seed_alone(make, shares):
  different = 0
  for seed in SEEDS:
    texts, labels, groups, _ = data(seed, 80, repeat=0.1, groups=200, least=10)
    first, again, other = (make(texts, labels, groups, shares, s) for s in (seed, seed, seed + 1))
    owner = owners(first, 80)
    together(owner, map(scan.duplicate_key, texts))
    assert not len(first.dropped) and len(first.train) and len(first.validation)
    assert all((a == b).all() for a, b in zip(parts(first), parts(again), strict=True))
    different += (owners(other, 80) != owner).any()
  assert different >= len(SEEDS) - 1


@pytest.mark.parametrize('shares', SHARES[:3])
def test_groups_stay_together_and_shares_count_items(shares):
  for seed in SEEDS:
    texts, labels, groups, _ = data(seed, 300, groups=60)
    for split in (splits.grouped(texts, groups, shares, seed),
                  splits.stratified_grouped(texts, labels, groups, shares, seed)):
      owner = owners(split, 300)
      together(owner, groups)
      largest = max(groups.count(g) for g in set(groups))
      assert np.abs(np.bincount(owner, minlength=3)[:len(shares)] - 300 * np.array(shares)).max() < largest
  one_large = ['a'] * 40 + [f'b{i}' for i in range(60)]  # shares of groups would miss by 39 items
  split = splits.grouped(texts[:100], one_large, (0.5, 0.5), 0)
  assert len(split.train) == len(split.validation) == 50


def test_classes_are_spread_over_groups():
  """Groups of 3, one class each, and repeats: as even as units of 3 allow."""
  for seed in SEEDS:
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(80), 3))
    labels = groups % 2
    texts = [f't{i}' for i in range(240)]
    split = splits.stratified_grouped(texts, labels, groups, (0.8, 0.1, 0.1), seed)
    together(owners(split, 240), groups.tolist())
    for part, share in zip(parts(split), (0.8, 0.1, 0.1), strict=False):
      assert np.abs(np.bincount(labels[part], minlength=2) - share * 120).max() <= 3


def test_a_small_part_gets_its_group():
  split = splits.grouped([f't{i}' for i in range(12)], np.repeat(np.arange(4), 3), (0.85, 0.15), 0)
  assert len(split.validation) == 3


def test_rare_classes_and_large_groups_are_shared_fairly():
  """Groups of 2 to 16 items in which one class of four is rare: its share, and that of the items, still hold."""
  for seed in range(40):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(60), rng.integers(2, 17, 60))
    labels = rng.choice(4, len(groups), p=[0.06, 0.2, 0.3, 0.44])
    split = splits.stratified_grouped([f't{i}' for i in range(len(groups))], labels, groups, (0.5, 0.3, 0.2), seed)
    for part, share in zip(parts(split), (0.5, 0.3, 0.2), strict=False):
      assert abs((labels[part] == 0).sum() - share * (labels == 0).sum()) <= 2
      assert abs(len(part) - share * len(groups)) <= 4


def test_groups_of_every_size_reach_every_part():
  groups = np.repeat(np.arange(60), np.repeat([10, 5, 2], 20))
  split = splits.grouped([f't{i}' for i in range(len(groups))], groups, (0.7, 0.3), 0)
  sizes = np.bincount(groups)
  assert set(sizes[np.unique(groups[split.validation])]) == set(sizes[np.unique(groups[split.train])]) == {10, 5, 2}


def test_groups_that_share_a_text_are_one():
  texts = ['one', 'x', 'X ', 'two', 'TWO', 'three', 'y', 'z', 'v', 'w']
  groups = [0, 0, 1, 1, 2, 2, 3, 4, 5, 6]
  for seed in SEEDS:
    split = splits.grouped(texts, groups, (0.6, 0.4), seed)
    assert len({owners(split, 10)[i] for i in range(6)}) == 1


@pytest.mark.parametrize('shares', SHARES[:3])
def test_time_goes_forward(shares):
  for seed in SEEDS:
    texts, _, groups, times = data(seed, 90, repeat=0.15, groups=80)
    split = splits.by_time(texts, times, shares)
    owner = owners(split, 90)
    together(owner, map(scan.duplicate_key, texts))
    together(owners(splits.by_time(texts, times, shares, groups=groups), 90), groups)
    times = np.array(times)
    for earlier, later in zip(parts(split)[:len(shares)], parts(split)[1:len(shares)], strict=False):
      assert times[earlier].max() < times[later].min()  # ties too stay on one side
    keys = np.array(list(map(scan.duplicate_key, texts)))
    for item in split.dropped:  # each for a reason
      assert times[keys == keys[item]].min() < times[item]


def test_time_by_hand():
  split = splits.by_time(['a', 'b', 'c', 'd', 'A', 'e', 'f', 'B', 'g', 'h'], [1, 2, 3, 4, 5, 5, 5, 6, 7, 8],
                         (0.5, 0.3, 0.2))
  assert [p.tolist() for p in parts(split)] == [[0, 1, 2, 3], [5, 6], [8, 9], [4, 7]]


@pytest.mark.parametrize('as_time', [
    float, lambda i: datetime.date(2024, 1, 1 + i), lambda i: f'2024-01-{1 + i:02}',
    lambda i: f'2024-01-01T{23 - i:02}:30:00-{12 - i % 12:02}:00', lambda i: np.datetime64('2024-01-01') + i,
    lambda i: datetime.datetime(2024, 1, 1, i, tzinfo=datetime.UTC)])
def test_kinds_of_time(as_time):
  order = [3, 0, 9, 5, 1, 2, 8, 4, 7, 6]
  times = [as_time(i) for i in order]
  moments = [datetime.datetime.fromisoformat(t) for t in times] if isinstance(times[0], str) else times
  split = splits.by_time([f't{i}' for i in order], times, (0.7, 0.3))
  assert set(split.validation) == set(np.argsort(moments)[-3:])


@pytest.mark.parametrize('shares', [(0.9, 0.1), (0.8, 0.1, 0.1), (0.85, 0.1, 0.05), (0.985, 0.015)])
@pytest.mark.parametrize('seed', [0, 7])
def test_hash_does_not_move_when_data_is_added(shares, seed):
  texts = data(1, 400, repeat=0.3)[0]
  before = owners(splits.by_hash(texts, shares, seed), 400)
  together(before, map(scan.duplicate_key, texts))
  more = data(2, 300)[0]
  order = np.random.default_rng(0).permutation(700)
  after = owners(splits.by_hash([(texts + more)[i] for i in order], shares, seed), 700)
  assert (after[np.argsort(order)][:400] == before).all()
  for share, count in zip(shares, np.bincount(owners(splits.by_hash([f'{i}' for i in range(4000)], shares, seed), 4000),
                                              minlength=4), strict=False):
    assert abs(count - 4000 * share) < 5 * np.sqrt(4000 * share * (1 - share))


def test_hash_is_that_of_the_prepared_sets():
  texts = ['Hello', 'hello', '你好', *(f'review {i}' for i in range(200))]
  one_in_ten = [i for i, t in enumerate(texts) if int(hashlib.sha1(t.encode()).hexdigest(), 16) % 10 == 0]
  assert splits.by_hash(texts, (0.9, 0.1), key=str).validation.tolist() == one_in_ten
  three = splits.by_hash(texts, (0.8, 0.1, 0.1), key=str)
  assert three.test.tolist() == one_in_ten
  assert all(int(hashlib.sha1(texts[i].encode()).hexdigest(), 16) % 10 == 1 for i in three.validation)
  third = splits.by_hash(texts, (0.7, 0.2, 0.1), key=str).validation  # 0.1 + 0.2 is a little more than 0.3
  assert {int(hashlib.sha1(texts[i].encode()).hexdigest(), 16) % 10 for i in third} == {1, 2}
  assert splits.by_hash(texts, (0.9, 0.1), seed=1).validation.tolist() != one_in_ten


FIELDS = {'random': {}, 'stratified': {'labels': 1}, 'grouped': {'groups': 2},
          'stratified_grouped': {'labels': 1, 'groups': 2}}


@pytest.mark.parametrize('kind', FIELDS)
@pytest.mark.parametrize('k', [2, 3, 5])
@pytest.mark.parametrize('repeat', [0, 0.1])
def test_folds_are_disjoint_and_exhaustive(kind, k, repeat):
  for seed in SEEDS:
    made = data(seed, 70, repeat=repeat, groups=200, least=12)
    fields = {name: made[i] for name, i in FIELDS[kind].items()}
    folds = splits.folds(made[0], k, kind, repeats=2, seed=seed, **fields)
    assert len(folds) == 2 * k
    for round_ in (folds[:k], folds[k:]):
      assert sorted(np.concatenate([f.validation for f in round_]).tolist()) == list(range(70))
    for fold in folds:
      owner = owners(fold, 70)
      assert not len(fold.test) and not len(fold.dropped)
      together(owner, map(scan.duplicate_key, made[0]))
      if 'groups' in fields:
        together(owner, made[2])
    again = splits.folds(made[0], k, kind, repeats=2, seed=seed, **fields)
    other = splits.folds(made[0], k, kind, seed=seed + 1, **fields)
    same = lambda a, b: all((x.validation == y.validation).all() if len(x.validation) == len(y.validation) else False
                            for x, y in zip(a, b, strict=True))
    assert same(folds, again) and not same(folds[:k], other) and not same(folds[:k], folds[k:])


@pytest.mark.parametrize('k', [2, 3, 5, 7])
def test_folds_of_single_items_are_within_one_item(k):
  for seed in SEEDS:
    texts, labels, _, _ = data(seed, 53, classes=4, least=7)
    for kind, fields in (('random', {}), ('grouped', {'groups': list(range(53))}), ('stratified', {'labels': labels}),
                         ('stratified_grouped', {'labels': labels, 'groups': list(range(53))})):
      for fold in splits.folds(texts, k, kind, seed=seed, **fields):
        assert abs(len(fold.validation) - 53 / k) < (1 if 'labels' not in fields else 4)
        for label in set(labels) if 'labels' in fields else ():
          count = sum(labels[i] == label for i in fold.validation)
          assert abs(count - labels.count(label) / k) < 1, (kind, label)


@pytest.mark.parametrize('repeat', [0.01, 0.1, 0.3])
def test_repeats_do_not_spoil_class_shares(repeat):
  for seed in SEEDS:
    texts, labels, _, _ = data(seed, 200, repeat=repeat, least=20)
    folds = [f.validation for f in splits.folds(texts, 5, 'stratified', labels=labels, seed=seed)]
    shares = parts(splits.stratified(texts, labels, (0.8, 0.1, 0.1), seed))
    for label in set(labels):
      mine = np.array(labels) == label
      assert whole([mine[p].sum() for p in folds], [0.2] * 5, mine.sum())
      assert whole([mine[p].sum() for p in shares], (0.8, 0.1, 0.1), mine.sum())


def test_folds_of_groups_balance_items():
  groups = np.repeat(np.arange(24), np.tile([1, 2, 3, 10], 6))
  folds = splits.folds([f't{i}' for i in range(96)], 4, 'grouped', groups=groups, seed=3)
  assert max(len(f.validation) for f in folds) - min(len(f.validation) for f in folds) <= 10


@pytest.mark.parametrize('k', [2, 4])
def test_time_folds_expand(k):
  for seed in SEEDS:
    texts, _, groups, times = data(seed, 80, repeat=0.1, groups=75)
    folds = splits.folds(texts, k, 'time', times=times, groups=groups)
    times = np.array(times)
    seen = 0
    for i, fold in enumerate(folds):
      everything = np.concatenate(parts(fold))
      assert len(set(everything)) == len(everything)
      assert times[fold.train].max() < times[fold.validation].min()
      assert abs(len(fold.train) - 80 * (i + 1) / (k + 1)) < 8 and len(fold.train) > seen
      owner = [{**dict.fromkeys(fold.train, 0), **dict.fromkeys(fold.validation, 1)}.get(j, 3) for j in range(80)]
      together(np.array(owner), map(scan.duplicate_key, texts))
      together(np.array(owner), groups)
      if i:
        last = folds[i - 1]
        assert set(fold.train) == set(last.train) | set(last.validation) | set(last.dropped)
      seen = len(fold.train)
    assert len(everything) == 80


TEN = [f't{i}' for i in range(10)]


@pytest.mark.parametrize('call, part', [
    (lambda: splits.random(TEN, (0.8, 0.1)), 'add up to 1, not to 0.9'),
    (lambda: splits.random(TEN, (1.0,)), 'two or three'),
    (lambda: splits.random(TEN, (1.0, 0.0)), 'above 0'),
    (lambda: splits.random(TEN, (1.2, -0.2)), 'above 0'),
    (lambda: splits.random(TEN, (0.4, 0.2, 0.2, 0.2)), 'two or three'),
    (lambda: splits.random(TEN, (float('nan'), 0.5)), 'add up to 1'),
    (lambda: splits.random(TEN, (0.98, 0.02)), 'validation would be empty, of 10 items'),
    (lambda: splits.random([], (0.9, 0.1)), 'texts: 0'),
    (lambda: splits.by_hash([], (0.9, 0.1)), 'train would be empty'),
    (lambda: splits.random(['same', 'SAME', ' same'], (0.5, 0.5)), 'would be empty'),
    (lambda: splits.grouped(TEN, ['g'] * 10, (0.5, 0.5)), 'would be empty'),
    (lambda: splits.stratified(TEN, [0] * 9, (0.5, 0.5)), 'labels: 9 for 10 texts'),
    (lambda: splits.stratified(TEN, [0] * 9 + [None], (0.5, 0.5)), 'labels: item 9 has none'),
    (lambda: splits.stratified(TEN, [0] * 9 + [1], (0.5, 0.5)), "class '1' has 1 distinct"),
    (lambda: splits.stratified(TEN, ['x' * 99] * 9 + ['y' * 99], (0.5, 0.5)), f"class '{'y' * 60}' has"),
    (lambda: splits.grouped(TEN, [0] * 11, (0.5, 0.5)), 'groups: 11 for 10'),
    (lambda: splits.grouped(TEN, [0] * 5 + [float('nan')] * 5, (0.5, 0.5)), 'groups: item 5 has none'),
    (lambda: splits.by_time(TEN, range(9), (0.5, 0.5)), 'times: 9 for 10'),
    (lambda: splits.by_time(TEN, [1] * 9 + [None], (0.5, 0.5)), 'times: item 9 has none'),
    (lambda: splits.by_time(TEN, [np.datetime64('NaT')] * 10, (0.5, 0.5)), 'times: item 0 has none'),
    (lambda: splits.by_time(TEN, ['2024-01-01'] * 9 + ['soon'], (0.5, 0.5)), 'soon'),
    (lambda: splits.by_time(TEN, ['2024-01-01'] * 9 + [3], (0.5, 0.5)), 'expected one kind'),
    (lambda: splits.by_time(TEN, ['2024-01-01'] * 9 + ['2024-01-01T00:00Z'], (0.5, 0.5)), 'without a zone'),
    (lambda: splits.by_time(TEN, [1] * 10, (0.5, 0.5)), '1 distinct ones do not give 2 parts'),
    (lambda: splits.by_time(TEN, [1] * 9 + [2], (0.6, 0.2, 0.2)), '2 distinct ones do not give 3 parts'),
    (lambda: splits.by_time(['a', 'b', 'A', 'B'], [1, 2, 3, 4], (0.5, 0.5)), r'would be empty, .*\(2 dropped'),
    (lambda: splits.by_hash(TEN, (2 / 3, 1 / 3)), 'multiples of 1/10000'),
    (lambda: splits.by_hash(['a', 'b'], (0.99, 0.01)), 'would be empty'),
    (lambda: splits.folds(TEN, 1), 'k >= 2'),
    (lambda: splits.folds(TEN, 5, repeats=0), 'repeats >= 1'),
    (lambda: splits.folds(TEN, 11), 'k=11: more than the 10'),
    (lambda: splits.folds(['a', 'A', 'b'], 3), 'k=3: more than the 2'),
    (lambda: splits.folds(TEN, 3, 'grouped', groups=[0] * 5 + [1] * 5), 'k=3: more than the 2 groups'),
    (lambda: splits.folds(TEN, 3, 'stratified', labels=[0] * 8 + [1] * 2), "class '1' has 2 distinct"),
    (lambda: splits.folds(TEN[:8] + ['x', 'X'], 2, 'stratified', labels=[0] * 8 + [1] * 2), "class '1' has 1 distinct"),
    (lambda: splits.folds(TEN, 3, 'stratified_grouped', labels=[0, 1] * 5, groups=[0, 1, 2, 1, 3, 1, 4, 1, 5, 1]),
     "class '1' has 1 distinct"),
    (lambda: splits.folds(TEN, 3, 'stratified'), 'labels: not given'),
    (lambda: splits.folds(TEN, 3, 'time'), 'times: not given'),
    (lambda: splits.folds(TEN, 3, groups=[0] * 10), 'groups: given, but not used'),
    (lambda: splits.folds(TEN, 3, 'time', times=range(10), labels=[0] * 10), 'labels: given, but not used'),
    (lambda: splits.folds(TEN, 3, 'leave_one_out'), "kind='leave_one_out'; expected one of random"),
    (lambda: splits.folds(TEN, 3, 'time', times=range(10), repeats=2), 'nothing is random'),
    (lambda: splits.folds(TEN, 10, 'time', times=range(10)), 'k=10: not below the 10 items'),
    (lambda: splits.folds(TEN, 3, 'time', times=[1] * 5 + [2] * 5), '2 distinct ones do not give 4 parts'),
])
def test_what_cannot_be_split_says_why(call, part):
  with pytest.raises(ConfigError, match=part) as error:
    call()
  assert '\n' not in str(error.value)


def test_without_scikit_learn_folds_say_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'sklearn', None)
  with pytest.raises(ConfigError, match=r"pip install -e '.\[finetune\]'"):
    splits.folds(TEN, 2)
