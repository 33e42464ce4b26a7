"""Rows of encoders: golden ones made by hand, every sentence used once, pure functions of the row number."""

import itertools
import types

import jax
import numpy as np
import pytest

from lm import sharding
from lm.data import corpora, inputs, loader, records, sentences
from lm.errors import ConfigError, DataError
from lm.text import tokenizer as tokenizers, vocabulary

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'.!?。！？；”', *'abcdefghijklmnopqrstuvw',
         *'天地玄黄宇宙洪荒日月盈昃辰宿列张']
ENGLISH = ['a b. c d e! f', 'g h i j k l m n o p q r.', 's t. u? v w.']
CHINESE = ['天地玄黄。宇宙。洪荒”', '日月盈昃辰宿列张天地玄黄！', '天。”地！？月']
SPECIAL = vocabulary.Special(2, 3, 4, 0)


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp('wordpiece') / 'vocab.txt'
  path.write_text('\n'.join(WORDS) + '\n')
  return tokenizers.load(path)


def dataset_of(documents, tokenizer):
  """What the planners use of a `records.Dataset`."""
  ids = [tokenizer.document(d) if isinstance(d, str) else d for d in documents]
  read = lambda split, spans: np.concatenate([ids[d][a:b] for d, a, b in np.asarray(spans).tolist()])
  return types.SimpleNamespace(lengths={'train': np.array([len(i) for i in ids], np.int64)}, read=read)


def spell(cut, dataset, pairs=False, length=16):
  """Rows as text: 'word word / word' with / for [SEP], checked against `inputs.layout`."""
  rows = []
  for r in range(len(cut.random)):
    spans = cut.spans[cut.first[r]:cut.first[r + 1]]
    arrays, text_BT = inputs.layout([inputs.Row(spans)], length, SPECIAL, pairs)
    ids, text = arrays['ids_BT'][0].copy(), text_BT[0]
    ids[text] = dataset.read('train', spans)
    assert ids[0] == 2 and (ids[arrays['segments_BT'][0] == 0] == 0).all() and ids[arrays['segments_BT'][0] > 0].all()
    rows.append(' '.join(WORDS[i] for i in ids[1:] if i).replace('[SEP]', '/'))
  return rows


class Script:
  """A random generator that answers what it is told to, in turn; a wrong kind of question fails."""

  def __init__(self, *answers):
    self.answers = list(answers)

  def _next(self, kind, low, high):
    name, value = self.answers.pop(0)
    assert name == kind and low <= value < high, (name, value, kind, low, high)
    return value

  def random(self):
    return self._next('random', 0, 1)

  def integers(self, low, high=None):
    return self._next('integers', *((0, low) if high is None else (low, high)))

  def binomial(self, n, p):
    assert p == 0.5
    return self._next('binomial', 0, n + 1)


def find(documents, tokenizer, longest=100):
  return sentences.find(dataset_of(documents, tokenizer), 'train', tokenizer, longest)


@pytest.mark.parametrize(('documents', 'want'), [
    (ENGLISH, [(0, 1, 4), (0, 4, 8), (0, 8, 9), (1, 1, 14), (2, 1, 4), (2, 4, 6), (2, 6, 9)]),
    (CHINESE, [(0, 1, 6), (0, 6, 9), (0, 9, 12), (1, 1, 14), (2, 1, 4), (2, 4, 7), (2, 7, 8)])])
def test_sentences(tokenizer, documents, want):
  s = find(documents, tokenizer)
  assert list(zip(s.document.tolist(), s.start.tolist(), s.stop.tolist(), strict=True)) == want
  assert s.bounds().tolist() == [0, 3, 4, 7]


def test_a_sentence_longer_than_a_row_is_cut_at_the_length(tokenizer):
  s = find(ENGLISH[1:2], tokenizer, longest=5)
  assert list(zip(s.start.tolist(), s.stop.tolist(), strict=True)) == [(1, 6), (6, 11), (11, 14)]


def test_empty_documents_have_no_sentence(tokenizer):
  s = find(['', 'a.', ''], tokenizer)
  assert s.document.tolist() == [1] and s.bounds().tolist() == [0, 1]
  empty = find(['', ''], tokenizer)
  assert len(empty) == 0 and empty.bounds().tolist() == [0]
  for cut in (sentences.packed(empty, 16, True), sentences.packed(empty, 16, False),
              sentences.bert_pairs(empty, 16, Script()), sentences.electra_pairs(empty, 16, Script())):
    assert len(cut.random) == len(cut.spans) == 0 and inputs.Plan([cut]).rows == 0


def test_reading_in_parts_changes_nothing(tokenizer, monkeypatch):
  whole = find(ENGLISH + CHINESE, tokenizer)
  monkeypatch.setattr(sentences, 'READ', 3)
  parts = find(ENGLISH + CHINESE, tokenizer)
  for field in ('document', 'start', 'stop'):
    np.testing.assert_array_equal(getattr(whole, field), getattr(parts, field))


@pytest.mark.parametrize(('documents', 'full', 'doc'), [
    (ENGLISH, ['a b . c d e ! f /', 'g h i j k l m n o p q r . /', 's t . u ? v w . /'],
     ['a b . c d e ! f /', 'g h i j k l m n o p q r . /', 's t . u ? v w . /']),
    (ENGLISH[::2], ['a b . c d e ! f / s t . u ? /', 'v w . /'], ['a b . c d e ! f /', 's t . u ? v w . /']),
    (['天地玄黄。宇宙。洪荒', CHINESE[2]], ['天 地 玄 黄 。 宇 宙 。 洪 荒 / 天 。 ” /', '地 ！ ？ 月 /'],
     ['天 地 玄 黄 。 宇 宙 。 洪 荒 /', '天 。 ” 地 ！ ？ 月 /'])])
def test_golden_rows_of_roberta(tokenizer, documents, full, doc):
  dataset, s = dataset_of(documents, tokenizer), find(documents, tokenizer, 14)
  assert spell(sentences.packed(s, 16, True), dataset) == full
  assert spell(sentences.packed(s, 16, False), dataset) == doc


def test_golden_rows_of_bert_in_english(tokenizer):
  documents = ['a b. c. d e f. g.', 'h i. j k l.']
  dataset, s = dataset_of(documents, tokenizer), find(documents, tokenizer, 13)
  rng = Script(
      ('random', 0.5),  # not short: 13 tokens. Document 0 holds 11: one chunk of 4 sentences
      ('integers', 2), ('random', 0.2),  # A = 2 sentences (of index < 4), B random
      ('integers', 0), ('integers', 5), ('binomial', 0), ('binomial', 0),  # the one other document, its 2nd sentence
      ('integers', 3), ('random', 0.7), ('binomial', 0), ('binomial', 0),  # sentences 2 | 3: B follows
      ('random', 0.01), ('integers', 2),  # document 1, short: 2 tokens; one sentence is enough: B is random
      ('integers', 0), ('integers', 3), ('binomial', 0), ('binomial', 0),  # ... 'g .'
      ('integers', 0), ('integers', 1), ('binomial', 0), ('binomial', 0))
  cut = sentences.bert_pairs(s, 16, rng)
  assert not rng.answers
  assert spell(cut, dataset, True) == ['a b . c . / j k l . /', 'd e f . / g . /', 'h i . / g . /', 'j k l . / c . /']
  assert cut.random.tolist() == [True, False, True, True]


def test_golden_rows_of_bert_in_chinese(tokenizer):
  """The last chunk goes beyond a row: A of 5 and B of 11 tokens lose 3, all of them B's, two in front."""
  documents = ['天地玄黄。宇宙洪荒日月盈昃辰宿。']
  dataset, s = dataset_of(documents, tokenizer), find(documents, tokenizer, 13)
  rng = Script(('random', 0.5), ('integers', 1), ('random', 0.9), ('binomial', 0), ('binomial', 2))
  assert spell(sentences.bert_pairs(s, 16, rng), dataset, True) == ['天 地 玄 黄 。 / 洪 荒 日 月 盈 昃 辰 宿 /']


@pytest.mark.parametrize(('a', 'b'), [(3, 20), (20, 3), (12, 12), (7, 7), (13, 12), (1, 30), (6, 7)])
def test_truncation_removes_what_the_loop_removes(a, b):
  want = [a, b]
  while sum(want) > 13:
    want[0 if want[0] > want[1] else 1] -= 1
  (da, a0, a1), (db, b0, b1) = sentences._truncate((4, 10, 10 + a), (5, 50, 50 + b), 13, np.random.default_rng(0))
  assert (da, db, [a1 - a0, b1 - b0]) == (4, 5, want) and 10 <= a0 <= a1 <= 10 + a and 50 <= b0 <= b1 <= 50 + b


def test_golden_rows_of_electra(tokenizer):
  documents = ['a b. c. d e f. g.', 'h. i. j.', '天地。玄。', '黄。宇宙。']
  dataset, s = dataset_of(documents, tokenizer), find(documents, tokenizer, 14)
  rng = Script(
      ('random', 0.5), ('random', 0.4), ('random', 0.9),  # two segments; 3 + 2 < 6, with the third it is 9: in, by luck
      ('random', 0.05), ('random', 0.01), ('integers', 9),  # one segment; the next target is 9: (9 - 3) // 2 = 3
      ('random', 0.5), ('random', 0.9),  # 3 tokens reach the half: no coin for the second sentence
      ('random', 0.5), ('random', 0.9))  # all within half a row: one segment
  cut = sentences.electra_pairs(s, 16, rng)
  assert not rng.answers
  assert spell(cut, dataset, True) == [
      'a b . c . d e f . / g . /', 'h . i . j . /', '天 地 。 / 玄 。 /', '黄 。 宇 宙 。 /']


def test_electra_trims_the_second_segment_first(tokenizer):
  documents = ['a b c d e f g. h i j k l m n o p.']
  dataset, s = dataset_of(documents, tokenizer), find(documents, tokenizer, 14)
  cut = sentences.electra_pairs(s, 16, Script(('random', 0.5), ('random', 0.9)))
  assert spell(cut, dataset, True) == ['a b c d e f g . / h i j k l /']
  cut = sentences.electra_pairs(s, 16, Script(('random', 0.01), ('random', 0.9)))
  assert spell(cut, dataset, True) == ['a b c d e f g . h i j k l m /']


def random_corpus(number, tokenizer):
  """Documents of 1 to 30 sentences of 1 to 60 tokens; among them one-sentence ones and ones without an end."""
  rng = np.random.default_rng(number)
  ends = range(5, 12)
  documents = []
  for _ in range(rng.integers(1, 12)):
    parts = [np.append(rng.integers(13, len(WORDS), rng.integers(1, 60)), rng.choice(ends))
             for _ in range(rng.choice([1, 2, 30]))]
    body = np.concatenate(parts)[:None if rng.random() < 0.5 else -1]
    documents.append(np.concatenate([[tokenizer.bos_id], body, [tokenizer.eos_id]]))
  return documents


CORPORA, LENGTHS = range(24), (8, 13, 32, 128)


def spans_of(cut):
  return [cut.spans[a:b].tolist() for a, b in itertools.pairwise(cut.first.tolist())]


@pytest.mark.parametrize('number', CORPORA)
def test_sentences_tile_the_documents(tokenizer, number):
  documents = random_corpus(number, tokenizer)
  for longest in LENGTHS:
    s = find(documents, tokenizer, longest)
    assert (s.stop > s.start).all() and (s.stop - s.start).max() <= longest
    want = [(d, p) for d, ids in enumerate(documents) for p in range(1, len(ids) - 1)]
    assert [(d, p) for d, a, b in zip(s.document, s.start, s.stop, strict=True) for p in range(a, b)] == want
    for d, stop in zip(s.document, s.stop, strict=True):
      ids = documents[d]
      assert 5 <= ids[stop - 1] < 12 or stop == len(ids) - 1 or longest in (s.stop - s.start)[s.document == d]


@pytest.mark.parametrize('number', CORPORA)
@pytest.mark.parametrize('crossing', [True, False])
def test_packed_rows_use_every_sentence_once_and_are_full(tokenizer, number, crossing):
  documents = random_corpus(number, tokenizer)
  for length in LENGTHS:
    s = find(documents, tokenizer, length - 2)
    rows = spans_of(sentences.packed(s, length, crossing))
    assert [(d, p) for row in rows for d, a, b in row for p in range(a, b)] == [
        (d, p) for d, a, b in zip(s.document, s.start, s.stop, strict=True) for p in range(a, b)]
    starts = {(d, a): b - a for d, a, b in zip(s.document, s.start, s.stop, strict=True)}
    for row, following in itertools.pairwise([*rows, None]):
      size = 1 + sum(b - a + 1 for _, a, b in row)
      assert size <= length and (crossing or len(row) == 1) and len({d for d, *_ in row}) == len(row)
      assert all((d, a) in starts for d, a, _ in row)
      if following and (crossing or following[0][0] == row[-1][0]):  # the next sentence would not have gone in
        d, a, _ = following[0]
        assert size + starts[d, a] + (d != row[-1][0]) > length


@pytest.mark.parametrize('number', CORPORA)
def test_bert_pairs_use_every_sentence_once_besides_random_ones(tokenizer, number, monkeypatch):
  documents = random_corpus(number, tokenizer)
  for length in LENGTHS:
    s = find(documents, tokenizer, length - 3)
    cut = sentences.bert_pairs(s, length, np.random.default_rng(number))
    for row, random in zip(spans_of(cut), cut.random, strict=True):
      assert len(row) == 2 and all(b > a for _, a, b in row) and 3 + sum(b - a for _, a, b in row) <= length
      assert (row[0][0] != row[1][0]) == random or len(documents) == 1
    with monkeypatch.context() as m:
      m.setattr(sentences, '_truncate', lambda a, b, room, rng: [a, b])
      cut = sentences.bert_pairs(s, length, np.random.default_rng(number))
    own = [span for row, random in zip(spans_of(cut), cut.random, strict=True) for span in (row[:1] if random else row)]
    assert [(d, p) for d, a, b in own for p in range(a, b)] == [
        (d, p) for d, ids in enumerate(documents) for p in range(1, len(ids) - 1)]


@pytest.mark.parametrize('number', CORPORA)
def test_electra_pairs_use_every_token_once_but_what_full_rows_drop(tokenizer, number):
  documents = random_corpus(number, tokenizer)
  for length in LENGTHS:
    s = find(documents, tokenizer, length - 2)
    rows = spans_of(sentences.electra_pairs(s, length, np.random.default_rng(number)))
    starts = set(zip(s.document.tolist(), s.start.tolist(), strict=True))
    at, full = (0, 1), False
    for row in rows:
      assert {d for d, *_ in row} == {row[0][0]} and len(row) <= 2 and (len(row) == 1 or row[0][2] == row[1][1])
      assert 1 + sum(b - a + 1 for _, a, b in row) <= length and (row[0][0], row[0][1]) in starts
      if row[0][:2] != list(at) and not (row[0][0] == at[0] + 1 and at[1] == len(documents[at[0]]) - 1):
        assert full, 'tokens were dropped behind a row that had room'
      full = 1 + sum(b - a + 1 for _, a, b in row) >= length - 1
      at = row[-1][0], row[-1][2]
    assert {d for row in rows for d, *_ in row} == set(range(len(documents)))


def test_pairs_have_the_shares_of_the_papers(tokenizer):
  rng = np.random.default_rng(0)
  documents = [np.concatenate([[2], *([*rng.integers(13, 30, 7), 5] for _ in range(60)), [3]]) for _ in range(300)]
  s = find(documents, tokenizer, 61)
  cut = sentences.bert_pairs(s, 64, rng)
  assert 0.48 < cut.random.mean() < 0.58  # half by the coin, and every chunk of one sentence
  rows = spans_of(cut)
  size = np.array([sum(b - a for _, a, b in row) for row in rows])
  document = np.array([row[0][0] for row in rows])
  short = [size[document == d].max() < 58 for d in range(300)]
  assert 0.04 < np.mean(short) < 0.16  # drawn for a tenth of the documents; targets 58-61 hide a few of these
  rows = spans_of(sentences.electra_pairs(s, 64, rng))
  assert 0.07 < np.mean([len(row) == 1 for row in rows]) < 0.16
  size = np.array([1 + sum(b - a + 1 for _, a, b in row) for row in rows])
  assert 0.02 < (size < 56).mean() < 0.15


def test_layout():
  rows = [inputs.Row(np.array([[0, 0, 2], [0, 2, 5]]), 7, True), inputs.Row(np.zeros((0, 3), np.int64)),
          inputs.Row(np.array([[3, 1, 5]]), 2**32 - 1)]
  arrays, text_BT = inputs.layout(rows, 8, SPECIAL, pairs=True)
  assert arrays['ids_BT'].tolist() == [[2, 0, 0, 3, 0, 0, 0, 3], [0] * 8, [2, 0, 0, 0, 0, 3, 0, 0]]
  assert text_BT.astype(int).tolist() == [[0, 1, 1, 0, 1, 1, 1, 0], [0] * 8, [0, 1, 1, 1, 1, 0, 0, 0]]
  assert arrays['segments_BT'].tolist() == [[1] * 8, [0] * 8, [1] * 6 + [0] * 2]
  assert arrays['types_BT'].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0] * 8, [0] * 8]
  assert arrays['positions_BT'].tolist() == [[*range(8)], [0] * 8, [0, 1, 2, 3, 4, 5, 0, 0]]
  assert arrays['special_BT'].astype(int).tolist() == [[1, 0, 0, 1, 0, 0, 0, 1], [0] * 8, [1, 0, 0, 0, 0, 1, 0, 0]]
  assert arrays['random_B'].tolist() == [True, False, False] and arrays['draw_B'].tolist() == [7, 0, 2**32 - 1]
  assert not inputs.layout(rows, 8, SPECIAL, pairs=False)[0]['types_BT'].any()
  assert {k: v.dtype for k, v in arrays.items()} == {
      'ids_BT': np.int32, 'segments_BT': np.int32, 'types_BT': np.int32, 'positions_BT': np.int32,
      'special_BT': bool, 'random_B': bool, 'draw_B': np.uint32}


@pytest.fixture(scope='module')
def prepare(tokenizer, tmp_path_factory):
  root = tmp_path_factory.mktemp('texts')
  rng = np.random.default_rng(1)
  for name, letters, n in (('big', 'abcdefgh', 60), ('small', '天地玄黄', 20)):
    texts = [' '.join(''.join(rng.choice(list(letters)) + ' ' for _ in range(rng.integers(1, 12))) + '.'
                      for _ in range(rng.integers(1, 20))) for _ in range(n)]
    corpora.write_jsonl(root / f'{name}.jsonl', [corpora.Document(str(i), t) for i, t in enumerate(texts)])
  tokenizer.save(root / 'tokenizer')

  def prepare(*names, seed=3, **kwargs):
    kwargs = {'tokenizer': str(root / 'tokenizer'), 'length': 24, 'batch': 8, 'validation_fraction': 0.2,
              'packing': 'bert_pairs', 'copies': 3} | kwargs
    paths = tuple(str(root / n) for n in names or ('big.jsonl',))
    return loader.prepare(loader.Config(corpus=paths, **kwargs), root / 'cache', seed=seed)
  return prepare


def mesh_sharding(**axes):
  return sharding.batch_sharding(sharding.make_mesh(sharding.Config(**axes)))


def equal(batch, arrays):
  assert isinstance(batch, inputs.Inputs) and set(arrays) == set(batch.__dataclass_fields__)
  for name, want in arrays.items():
    np.testing.assert_array_equal(np.asarray(getattr(batch, name)), want, err_msg=name)


@pytest.mark.parametrize('packing', inputs.PACKINGS)
@pytest.mark.parametrize('axes', [{}, {'data': 4, 'fsdp': 2}, {'data': 2, 'tensor': 4}])
def test_device_batches_equal_the_plain_ones_from_any_start(prepare, packing, axes):
  data = prepare('big.jsonl', 'small.jsonl', packing=packing)
  loader.check(data, data.tokenizer.vocab_size)
  for start in (0, 7, 1000):
    batches = itertools.islice(loader.train_batches(data, mesh_sharding(**axes), start), 2)
    for step, batch in enumerate(batches, start):
      equal(batch, loader.host_batch(data, step))
      assert batch.ids_BT.shape == (8, 24) and batch.draw_B.shape == (8,)
      assert batch.draw_B.sharding.is_equivalent_to(mesh_sharding(**axes), 1)


@pytest.mark.parametrize('threads', [0, 3])
def test_threads_change_nothing(prepare, threads):
  want = [loader.host_batch(prepare(), s) for s in range(4)]
  for batch, arrays in zip(loader.train_batches(prepare(threads=threads), mesh_sharding()), want, strict=False):
    equal(batch, arrays)


@pytest.mark.parametrize('packing', inputs.PACKINGS)
def test_an_epoch_holds_each_example_once_and_the_next_repeats_them(prepare, packing):
  data = prepare(packing=packing, batch=1)
  n = data.rows_per_epoch
  epochs = [[loader.host_batch(data, e * n + s) for s in range(n)] for e in range(2)]
  draws = [[int(b['draw_B'][0]) for b in epoch] for epoch in epochs]
  assert sorted(draws[0]) == sorted(draws[1]) == list(range(n)) and draws[0] != draws[1]
  by_draw = [{int(b['draw_B'][0]): b for b in epoch} for epoch in epochs]
  for d in range(n):
    for name, x in by_draw[0][d].items():
      np.testing.assert_array_equal(x, by_draw[1][d][name])


def test_copies_cut_the_documents_anew(prepare):
  data = prepare()
  spans = [spans_of(cut) for cut in data.plans[0].cuts]
  assert len(spans) == 3 and spans[0] != spans[1] != spans[2]
  assert loader.host_batch(prepare(), 0)['ids_BT'].tolist() != loader.host_batch(prepare(seed=4), 0)['ids_BT'].tolist()


def test_two_corpora_share_no_draw_number(prepare):
  data = prepare('big.jsonl', 'small.jsonl', batch=16)
  steps = [loader.host_batch(data, s) for s in range(40)]
  chinese = np.concatenate([(b['ids_BT'] >= WORDS.index('天')).any(1) for b in steps])
  draws = np.concatenate([b['draw_B'] for b in steps])
  assert chinese.any() and not chinese.all()
  assert draws[~chinese].max() < data.plans[0].rows <= draws[chinese].min()


@pytest.mark.parametrize('packing', inputs.PACKINGS)
def test_evaluation_is_in_order_and_always_the_same(prepare, packing):
  data = prepare('big.jsonl', 'small.jsonl', packing=packing)
  first, again = (list(loader.eval_batches(d, 'validation', 16, mesh_sharding(data=8)))
                  for d in (data, prepare('big.jsonl', 'small.jsonl', packing=packing, seed=5, copies=1)))
  assert len(first) == loader.eval_steps(data, 'validation', 16)
  for a, b in zip(first, again, strict=True):
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), a, b))
  rows = sum(p.rows for p in data.evaluation('validation'))
  draws = np.concatenate([b.draw_B for b in first])
  used = np.concatenate([np.asarray(b.segments_BT).any(1) for b in first])
  assert draws[:rows].tolist() == list(range(rows)) and used[:rows].all() and not used[rows:].any()
  if packing.endswith('sentences'):
    seen = np.concatenate([np.asarray(b.ids_BT)[np.asarray((b.segments_BT > 0) & ~b.special_BT)] for b in first])
    want = [d.document('validation', i)[1:-1] for d in data.datasets for i in range(len(d.lengths['validation']))]
    assert seen.tolist() == np.concatenate(want).tolist()


def test_fingerprint(prepare):
  base = prepare().fingerprint
  loader.check_fingerprint(base, prepare(threads=0).fingerprint)
  for changed in (prepare(copies=2), prepare(packing='full_sentences'), prepare(length=25)):
    with pytest.raises(ConfigError, match='copies|packing|length'):
      loader.check_fingerprint(base, changed.fingerprint)
  assert 'copies' not in prepare(packing='stream').fingerprint


@pytest.mark.parametrize(('kwargs', 'match'), [
    ({'length': 7}, 'data.length=7'), ({'copies': 0}, 'data.copies'), ({'isolate': True}, 'data.isolate'),
    ({'packing': 'pairs'}, 'full_sentences')])
def test_bad_config(kwargs, match):
  with pytest.raises(ConfigError, match=match):
    loader.Config(**({'packing': 'bert_pairs'} | kwargs))


def test_a_tokenizer_without_a_mask_token_is_a_config_error(prepare):
  with pytest.raises(ConfigError, match='without a mask token.*--control_symbols'):
    prepare(tokenizer='byte')


def test_nothing_to_evaluate_is_a_data_error(prepare):
  with pytest.raises(DataError, match='nothing to evaluate'):
    loader.eval_batches(prepare(validation_fraction=0.0), 'validation', 8, mesh_sharding())


def test_sentences_of_a_dataset_on_disk(tokenizer, tmp_path):
  documents = [corpora.Document('0', ENGLISH[0], 'train'), corpora.Document('1', 'a b c. ' * 2000, 'train')]
  dataset = records.write(documents, tokenizer, tmp_path / 'd')
  s = sentences.find(dataset, 'train', tokenizer, 100)
  assert len(s) == 3 + 2000 and (s.stop[3:] - s.start[3:] == 4).all()
