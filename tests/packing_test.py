"""Packing against its own promises: every token a target once, pure functions of the row number."""

import collections

import numpy as np
import pytest

from lm.data import packing
from lm.errors import ConfigError

LENGTHS = [np.array(x) for x in ([1000], [7, 1, 30, 2, 2, 64, 3, 9], [5] * 40, [8, 500, 1, 1, 77])]


def expand(row):
  """(document, position in it) of every token of the row, read off the spans one by one."""
  return [(d, p) for d, a, b in row.tolist() for p in range(a, b)]


def targets(row, isolate):
  tokens = expand(row)
  _, _, mask_BT = packing.layout([row], len(tokens), isolate)
  return [t for t, m in zip(tokens, mask_BT[0], strict=True) if m]


@pytest.mark.parametrize('lengths', LENGTHS)
@pytest.mark.parametrize('T', [1, 4, 16, 33])
def test_stream_epoch_has_every_token_as_target_once(lengths, T):
  stream = packing.Stream(lengths, T, seed=3)
  for epoch in range(3):
    rows = [stream.row(epoch * stream.rows + k) for k in range(stream.rows)]
    assert all(len(expand(r)) == T + 1 for r in rows)
    counts = collections.Counter(t for r in rows for t in targets(r, isolate=False))
    assert max(counts.values(), default=1) == 1
    assert lengths.sum() - len(counts) < max(T, 1) + (stream.rows == 0)


@pytest.mark.parametrize('lengths', LENGTHS)
def test_stream_rows_follow_one_another_in_the_documents(lengths):
  stream = packing.Stream(lengths, 8, seed=1)
  for number in range(2 * stream.rows):
    tokens = expand(stream.row(number))
    for (d, p), (e, q) in zip(tokens, tokens[1:], strict=False):
      assert (e, q) == (d, p + 1) if p + 1 < lengths[d] else q == 0


def test_stream_permutes_documents_and_rows():
  stream = packing.Stream(LENGTHS[2], 5, seed=0)
  documents = [stream.row(k)[0, 0] for k in range(stream.rows)]
  assert documents != sorted(documents) and len(set(documents)) == len(LENGTHS[2])
  one = packing.Stream(LENGTHS[0], 10, seed=0)
  assert len({(one.row(k)[0, 1] - one.row(k + 1)[0, 1]) % 1000 for k in range(20)}) > 10


def test_stream_is_pure_and_epochs_differ():
  a, b = (packing.Stream(LENGTHS[0], 16, seed=5) for _ in range(2))
  numbers = [7, 200, 0, 61, 500]
  assert [a.row(n).tolist() for n in numbers] == [b.row(n).tolist() for n in numbers]
  epochs = [sorted(str(a.row(e * a.rows + k).tolist()) for k in range(a.rows)) for e in range(3)]
  assert epochs[0] != epochs[1] != epochs[2]  # one document only: the windows themselves move
  assert a.row(0).tolist() != packing.Stream(LENGTHS[0], 16, seed=6).row(0).tolist()


@pytest.mark.parametrize('lengths', LENGTHS)
@pytest.mark.parametrize('T', [1, 4, 33, 2000])
def test_evaluation_covers_everything_once_in_order(lengths, T):
  stream = packing.Stream(lengths, T, shuffle=False)
  rows = [stream.row(k) for k in range(stream.rows)]
  everything = [(d, p) for d, n in enumerate(lengths) for p in range(n)]
  assert [t for r in rows for t in targets(r, isolate=False)] == everything[1:]
  assert [t for r in rows for t in targets(r, isolate=True)] == [t for t in everything if t[1] > 0]


@pytest.mark.parametrize('isolate', [False, True])
def test_layout_against_a_loop(isolate):
  stream = packing.Stream(LENGTHS[1], 16, seed=2)
  rows = [stream.row(number) for number in range(3 * stream.rows)]
  rows[3:3] = [np.zeros((0, 3), np.int64), np.array([[0, 0, 3], [1, 0, 2]])]
  segments, positions, mask = packing.layout(rows, 17, isolate)
  assert segments.dtype == positions.dtype == np.int32 and mask.dtype == bool
  for b, row in enumerate(rows):
    t = 0
    for s, (_, start, stop) in enumerate(row.tolist(), 1):
      for i in range(stop - start):
        assert segments[b, t] == (s if isolate else 1)
        assert positions[b, t] == (i if isolate else t)
        assert mask[b, t] == (i > 0 if isolate else t > 0)
        t += 1
    assert not segments[b, t:].any() and not positions[b, t:].any() and not mask[b, t:].any()


def test_layout_of_empty_rows_only():
  assert not any(x.any() for x in packing.layout([np.zeros((0, 3), np.int64)] * 2, 5, True))


@pytest.mark.parametrize('lengths', LENGTHS)
@pytest.mark.parametrize('T', [1, 4, 16, 99])
@pytest.mark.parametrize('shuffle', [False, True])
def test_fit_keeps_documents_whole_and_every_target_once(lengths, T, shuffle):
  fit = packing.Fit(lengths, T, seed=4, shuffle=shuffle)
  rows = [fit.row(k) for k in range(fit.rows)]
  assert all(0 < len(expand(r)) <= T + 1 for r in rows)
  whole = collections.Counter(d for r in rows for d, a, b in r.tolist() if (a, b) == (0, lengths[d]))
  assert whole == {d: 1 for d, n in enumerate(lengths) if n <= T + 1}
  counts = collections.Counter(t for r in rows for t in targets(r, isolate=True))
  assert counts == {(d, p): 1 for d, n in enumerate(lengths) for p in range(1, n)}
  seen = collections.Counter(t for r in rows for t in targets(r, isolate=False))
  assert max(seen.values(), default=1) == 1 and counts.keys() <= seen.keys()
  assert {t for r in rows for t in expand(r)} == {(d, p) for d, n in enumerate(lengths) for p in range(n)}


def test_fit_fills_rows():
  lengths = np.random.default_rng(0).integers(5, 60, 2000)
  fit = packing.Fit(lengths, 127, seed=0)
  assert lengths.sum() / (fit.rows * 128) > 0.95


def test_fit_epochs_differ_in_order_only():
  fit = packing.Fit(LENGTHS[2], 16, seed=0)
  first, second = ([str(fit.row(e * fit.rows + k).tolist()) for k in range(fit.rows)] for e in range(2))
  assert first != second and sorted(first) == sorted(second)


def test_too_short_for_a_row_has_no_rows():
  assert packing.Stream(np.array([5]), 6).rows == 0
  assert packing.Stream(np.array([1]), 6, shuffle=False).rows == 0
  assert packing.Stream(np.array([], np.int64), 6).rows == 0
  assert packing.Fit(np.array([], np.int64), 6).rows == 0


def test_unknown_packing_is_a_config_error():
  with pytest.raises(ConfigError, match='packing'):
    packing.plan('bestfit', LENGTHS[0], 4)
