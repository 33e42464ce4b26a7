"""Labelled texts and pairs as rows, other wordings of them, the classification loss, and learning from them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import classification, config, nn, optim, params, peft, run, sharding
from lm.data import labelled, memory, quality, splits
from lm.data.examples import Labelled
from lm.errors import ConfigError, DataError
from lm.losses import classify
from lm.models import deberta, decoder, encoder, hf
from lm.text import augment, noise, tokenizer as tokenizers, vocabulary

SHAPE = dict(vocab=300, length=32, layers=1, embed=16, heads=2, head_dim=8, mlp=32, scan_layers=False)
MODEL = encoder.Config(**SHAPE, dropout=nn.Dropout())
KINDS = {classification.Encoder: MODEL,
         classification.Disentangled: deberta.Config(relative=16, **SHAPE, dropout=nn.Dropout()),
         classification.Decoder: decoder.Config(kv_heads=2, **SHAPE)}
WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdefgh天地玄黄']
ROBERTA = {'<s>': 0, '<pad>': 1, '</s>': 2, '<unk>': 3, '<mask>': 4}
ENGLISH = 'The camera works very well, and the battery lasts for 3 days. Shipping was slow.'
CHINESE = '这部电影真的很好看，演员的表演也很自然。我不会退货，已经看了 3 遍。'


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('t')
  texts = ['good film 好电影 bad film 坏电影 the a of'] * 20
  tokenizers.train_sentencepiece(texts, root / 'x.model', vocab=282, control_symbols=('[CLS]', '[SEP]', '[MASK]'))
  (root / 'vocab.txt').write_text('\n'.join(WORDS) + '\n')
  return root


def prepared(root, rows, encoder=True, seed=0, tokenizer='x.model', **fields):
  """`labelled.prepare` of records, each (text, label, split) or (text, second text, label, split)."""
  names = ('text', 'text_pair', 'label', 'split')
  records = [dict(zip(names if len(row) == 4 else (names[0], *names[2:]), row, strict=True)) for row in rows]
  records = [{k: v for k, v in record.items() if v is not None} for record in records]
  (root / 'rows.jsonl').write_text('\n'.join(json.dumps(r, ensure_ascii=False) for r in records), encoding='utf-8')
  fields = {'length': 12, 'batch': 4, 'threads': 0} | fields
  where = tokenizer if tokenizer == 'byte' else str(root / tokenizer)
  return labelled.prepare(labelled.Config(str(root / 'rows.jsonl'), tokenizer=where, **fields), '', seed, encoder)


def films(n=64, split='train'):
  for i in range(n):
    good = i % 2 == 0
    marks = '好坏'[not good] * (i % 3 + 3 * (split != 'train'))  # no text is in two splits
    yield ('good film ' if good else 'bad film ') + marks, 'py'[good], split


def place():
  return sharding.batch_sharding(sharding.make_mesh(sharding.Config()))


def some(batches, n):
  return [jax.device_get(batch) for _, batch in zip(range(n), batches, strict=False)]


def test_rows_have_their_special_tokens_and_are_cut_at_the_end(root, capsys):
  data = prepared(root, [('good film', 'yes', 'train'), ('bad ' * 40, 'no', 'train'), ('好电影', 'yes', 'validation')],
                  length=15)
  special, rows = vocabulary.special_ids(data.tokenizer), data.splits['train']
  assert capsys.readouterr().out == 'train: 1 of 2 examples cut to data.length=15 tokens\n'
  assert rows.labels_B.tolist() == [1, 0] and rows.types_BT is None
  ids = data.tokenizer.encode('good film').tolist()
  n = len(ids) + 2
  assert rows.ids_BT[0].tolist() == [special.cls, *ids, special.sep] + [special.pad] * (15 - n)
  assert rows.segments_BT[0].tolist() == [1] * n + [0] * (15 - n)
  assert rows.ids_BT[1, -1] == special.sep and rows.segments_BT[1].all()


def test_epochs_are_permutations_and_evaluation_is_complete(root):
  data = prepared(root, [*films(22), *films(5, 'validation')])
  assert memory.steps_per_epoch(data) == 5
  batches = some(labelled.train_batches(data, place()), 5)
  for at, batch in enumerate(batches):
    chosen = memory.order(data, 0)[4 * at:4 * at + 4]
    np.testing.assert_array_equal(batch.ids_BT, data.splits['train'].ids_BT[chosen])
  batches = some(labelled.eval_batches(data, 'validation', 4, place()), 9)
  assert [b.labels_B.tolist() for b in batches] == [[1, 0, 1, 0], [1, -1, -1, -1]]


@pytest.mark.parametrize(('bad', 'message'), [
    (('good', None, 'train'), 'no field label'), (('', 'y', 'train'), 'field text: nothing but space'),
    (('good', 'maybe', 'validation'), "label 'maybe' is not among those of the training split")])
def test_what_cannot_be_learned_from_is_named(root, bad, message):
  with pytest.raises(DataError, match=f'rows.jsonl:5: .*{message}'):
    prepared(root, [*films(4), bad])


def test_one_class_is_refused(root):
  with pytest.raises(DataError, match='expected at least two'):
    prepared(root, [('good', 'yes', 'train')])


def test_the_loss_is_the_mean_over_real_rows():
  logits_BC = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
  terms, metrics = classify.loss(lambda key: logits_BC, jnp.array([2, 0, -1, 1]), None)
  p_BC = np.exp(logits_BC) / np.exp(logits_BC).sum(1, keepdims=True)
  want = -np.log([p_BC[0, 2], p_BC[1, 0], p_BC[3, 1]])
  assert float(terms['nll'].total) == pytest.approx(want.sum(), rel=1e-5)
  assert float(terms['nll'].weight) == 3
  right = [int(np.argmax(logits_BC[i])) == label for i, label in ((0, 2), (1, 0), (3, 1))]
  assert float(metrics['accuracy'].total) == sum(right)


def task_config(kind, data, steps=60):
  return kind(model=KINDS[kind], data=data.config, optim=optim.Config(lr=3e-3, schedule='linear', steps=steps, warmup=6,
                                                                      b2=0.98, weight_decay=0.01))


def parameters(c):
  return jax.jit(lambda key: params.init(classification.task(c).base.specs, key))(jax.random.key(1))


@pytest.mark.parametrize('kind', [classification.Encoder, classification.Disentangled])
def test_a_word_that_decides_is_learned_in_memory(root, kind, monkeypatch):
  data = prepared(root, [*films(64), *films(20, 'validation')], length=16, batch=16)
  c = task_config(kind, data)
  p = parameters(c)
  kept, traced, loss = jax.tree.map(np.asarray, p), [], classify.loss
  monkeypatch.setattr(classify, 'loss', lambda *args, **named: traced.append(1) or loss(*args, **named))
  assert classification.accuracies(c, p | {'mlm': jnp.zeros(3)}, data, 1) == [1.0]
  jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(np.asarray, p))  # the given parameters are not used up
  once = len(traced)
  assert len(classification.accuracies(config.replace(c, optim__steps=2, optim__warmup=1), p, data, 3)) == 3
  assert len(traced) == 2 * once  # three seeds, compiled once


def test_in_memory_it_is_the_run_of_a_seed(root, tmp_path):
  rng = np.random.default_rng(0)  # some labels are wrong, so that seeds differ
  rows = [(text, 'py'[(label == 'y') ^ (rng.random() < 0.3)], split)
          for text, label, split in (*films(64), *films(40, 'validation'))]
  data = prepared(root, rows, length=16, batch=16)
  c = config.replace(task_config(classification.Encoder, data, 12), optim__lr=1e-2, checkpoint__metric='val_accuracy',
                     checkpoint__mode='max', model__dropout=nn.Dropout(0.1, 0.1, 0.1, 0.1), model__scan_layers=True)
  p = parameters(c)
  hf.save(tmp_path / 'base', c.model, jax.device_get(p))
  found = classification.accuracies(c, p, data, 2)
  c = config.replace(c, init_from=str(tmp_path / 'base'), seed=1)
  assert found[1] == pytest.approx(run.run(c, classification.task(c), tmp_path / 'run')['val_accuracy'])
  assert 0.2 < found[1] < 0.9


@pytest.mark.parametrize('kind, pooling, method', [
    (classification.Encoder, 'pooler', 'full'), (classification.Encoder, 'mean', 'prefix'),
    (classification.Disentangled, 'first', 'full'), (classification.Decoder, 'last', 'lora')])
def test_packed_examples_do_not_see_each_other(root, kind, pooling, method):
  """The logits of each, and the loss and accuracy of all, are those of a row an example."""
  rows = [*films(30), *films(9, 'validation')]
  texts = kind is not classification.Decoder
  alone, packed = (prepared(root, rows, texts, **fields) for fields in (
      dict(length=8), dict(length=20, pack=True, longest=8)))
  found = packed.splits['train']
  assert len(found.ids_BT) < 20 and packed.splits['validation'].labels_B.shape[1] > 1
  assert (found.segments_BT.max(1) == (found.labels_B >= 0).sum(1)).all() and (found.labels_B >= 0).sum() == 30
  c = config.replace(task_config(kind, packed), pooling=pooling, peft=peft.Config(method, train='^(classify|pooler)/'))
  specs = classification.task(c).specs
  other = lambda w: w + 0.1 * jnp.sin(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape)  # no position is like another
  p = jax.tree.map(other, jax.jit(lambda key: params.init(specs, key))(jax.random.key(1)))
  def found_by(c, data):
    loss = classification.task(c).eval_loss

    def total(p):
      terms, metrics = loss(p, data.splits['train'], None)
      return terms['nll'].total, metrics
    return jax.jit(jax.value_and_grad(total, has_aux=True))(p)
  (_, want), want_grads = found_by(config.replace(c, data=alone.config), alone)
  (_, got), got_grads = found_by(c, packed)
  for name in want:
    assert float(got[name].total) == pytest.approx(float(want[name].total), rel=1e-5), name
    assert float(got[name].weight) == 30
  for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_packed_pairs_keep_their_types(root):
  rows = [('a b', 'c', 'x', 'train'), ('d', '天 地 e', 'y', 'train'), ('f', 'g', 'x', 'validation')]
  data = prepared(root, rows, tokenizer='vocab.txt', length=16, pack=True, batch=1)
  found, validation = data.splits['train'], data.splits['validation']
  order = [[2, 5, 6, 3, 7, 3], [2, 8, 3, 13, 14, 9, 3]]
  order = order if found.ids_BT[0, 1] == 5 else order[::-1]
  assert found.ids_BT[0].tolist() == [*order[0], *order[1], 0, 0, 0]
  assert found.segments_BT[0].tolist() == [1] * len(order[0]) + [2] * len(order[1]) + [0] * 3
  assert found.positions_BT[0].tolist() == [*range(len(order[0])), *range(len(order[1])), 0, 0, 0]
  types = {6: [0] * 4 + [1] * 2, 7: [0] * 3 + [1] * 4}
  assert found.types_BT[0].tolist() == [*types[len(order[0])], *types[len(order[1])], 0, 0, 0]
  assert found.labels_B[0].tolist() == ([0, 1] if order[0][1] == 5 else [1, 0])
  assert validation.labels_B.tolist() == [[0]]
  batches = some(labelled.eval_batches(data, 'validation', 2, place()), 3)
  assert len(batches) == 1 and batches[0].labels_B.tolist() == [[0], [-1]]


def bert(tokens_a, tokens_b, room):
  """google-research/bert, run_classifier.py: _truncate_seq_pair."""
  while len(tokens_a) + len(tokens_b) > room:
    (tokens_a if len(tokens_a) > len(tokens_b) else tokens_b).pop()


def test_the_longer_text_of_a_pair_gives_way(root, capsys):
  rng, rows = np.random.default_rng(0), []
  for _ in range(300):
    rows.append((*(' '.join(rng.choice(list('abcdefgh天地玄黄'), rng.integers(1, 14))) for _ in range(2)),
                 'xy'[len(rows) % 2], 'train'))
  data = prepared(root, rows, tokenizer='vocab.txt', length=13)
  found, cut = data.splits['train'], 0
  for i, (a, b, *_) in enumerate(rows):
    a, b = ([WORDS.index(word) for word in text.split()] for text in (a, b))
    cut += len(a) + len(b) > 10
    bert(a, b, 10)
    pad = [0] * (10 - len(a) - len(b))
    assert found.ids_BT[i].tolist() == [2, *a, 3, *b, 3, *pad]
    assert found.types_BT[i].tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1) + pad
    assert found.segments_BT[i].tolist() == [1] * (len(a) + len(b) + 3) + pad
  assert f'train: {cut} of 300 examples cut' in capsys.readouterr().out and 50 < cut < 250


def test_pairs_of_roberta_and_of_decoders(root, monkeypatch):
  rows = [('good film', '坏电影', 'xy'[i % 2], 'train') for i in range(4)]
  monkeypatch.setattr(labelled.memory, 'read_tokenizer', lambda path: dataclasses.replace(
      tokenizers.load(root / 'x.model'), control=ROBERTA))
  data = prepared(root, rows, length=40)
  a, b = (data.tokenizer.encode(text).tolist() for text in rows[0][:2])
  want = [0, *a, 2, 2, *b, 2]
  assert data.splits['train'].ids_BT[0].tolist() == want + [1] * (40 - len(want))
  assert data.splits['train'].types_BT is None
  monkeypatch.undo()
  found = prepared(root, rows, encoder=False, tokenizer='byte', length=40)
  ids = found.splits['train'].ids_BT[0][found.splits['train'].segments_BT[0] > 0]
  assert found.tokenizer.decode(ids[:-1]) == 'good film\n坏电影' and ids[-1] == found.tokenizer.eos_id
  found = prepared(root, rows, encoder=False, length=40).splits['train']
  assert found.ids_BT[0][found.segments_BT[0] > 0].tolist() == [*a, *data.tokenizer.encode('a\n')[-1:], *b, 1]


@pytest.mark.parametrize('rows, fields, message', [
    ([('a', 'b', 'x', 'train'), ('a', None, 'y', 'train')], {}, 'rows.jsonl:2: no field text_pair, which other'),
    ([('a', ' ', 'x', 'train')], {}, 'rows.jsonl:1: field text_pair: nothing but space'),
    ([('a', 3, 'x', 'train')], {}, 'rows.jsonl:1: field text_pair: found the number 3; expected a string'),
    ([('a', 'b', 'x', 'train'), ('a', 'b', 'y', 'train')], {'length': 4}, 'data.length=4; expected at least 5')])
def test_pairs_that_are_wrong(root, rows, fields, message):
  with pytest.raises((ConfigError, DataError), match=message):
    prepared(root, rows, **fields)


@pytest.mark.parametrize('c', [labelled.Config(), labelled.Config(split='stratified'), labelled.Config(folds=3)])
def test_a_pair_is_one_text_of_the_splits(c):
  """The same two texts, in whatever case and space, share a part; those that share the first alone need not."""
  found = [Labelled('The  Film', 'xy'[i % 2], text_pair=f'Number {i}') for i in range(60)]
  found += [Labelled('the film ', e.label, text_pair=e.text_pair.upper()) for e in found]
  parts = labelled.assigned(found, c)
  assert parts[:60] == parts[60:] and set(parts) == {'train', 'validation'}
  turned = [dataclasses.replace(e, text=e.text_pair, text_pair=e.text) for e in found]
  assert c.split != 'hash' or c.folds or labelled.assigned(turned, c) != parts
  key = splits.duplicate_key('\0'.join(('a b', 'c')))
  assert key != splits.duplicate_key('\0'.join(('a', 'b c')))


def example(text, split=None, label='x', at='', **metadata):
  return Labelled(text, label, metadata, split, at)


GROUPED, TIMED = (labelled.Config(split=split, by='at', validation_fraction=0.25) for split in ('grouped', 'time'))
EVERY_SPLIT = pytest.mark.parametrize('c', [labelled.Config(), labelled.Config(split='stratified'),
                                            labelled.Config(folds=2)], ids=['hash', 'stratified', 'folds'])


@EVERY_SPLIT
@pytest.mark.parametrize('text, again', [('same text', 'Same  text'), ('同一句话', '同一 句话')])
def test_a_text_whose_split_is_said_once_is_in_no_other(c, text, again):
  more = [example(f'{i}', label='xy'[i % 2]) for i in range(60)]
  for said in ('test', 'validation', 'train') if not c.folds else ('test',):
    found = [example(again), example(text, said), example(again + ' '), *more]
    parts = labelled.assigned(found, c)
    assert parts[:3] == [said] * 3 and {'train', 'validation'} <= set(parts[3:])


def numbered(n, groups):
  """Records of two classes, of random groups; every seventh text repeats an earlier one, in another spelling."""
  rng = np.random.default_rng(n)
  texts = [f'{("Film", "电 影")[i % 2]} {i}' for i in range(n)]
  texts[7::7] = [texts[i - rng.integers(1, 6)].upper().replace('电 影', '电影') for i in range(7, n, 7)]
  return [example(text, None, 'xy'[int(rng.random() < 0.4)], at=f'a.jsonl:{i + 1}') for i, text in enumerate(texts)], [
      int(group) for group in rng.integers(0, groups, n)]


def at(found, values):
  return [dataclasses.replace(e, metadata={'at': value}) for e, value in zip(found, values, strict=True)]


def sides(parts, names):
  """The splits of each name; None, which is left out, is none."""
  found = {}
  for part, name in zip(parts, names, strict=True):
    found.setdefault(name, set()).update({part} - {None})
  return found


@pytest.mark.parametrize('authors', [150, 400])
def test_no_group_and_no_text_is_on_two_sides(authors):
  found, groups = numbered(300, authors)
  found = at(found, [f'作者 {group}' for group in groups])
  for c in (GROUPED, *(config.replace(GROUPED, folds=4, fold=fold) for fold in range(4))):
    parts = labelled.assigned(found, c)
    for names in (groups, [splits.duplicate_key(e.text) for e in found]):
      assert max(map(len, sides(parts, names).values())) == 1
    share = [sum(e.label == label for e, part in zip(found, parts, strict=True) if part == 'validation') / sum(
        e.label == label for e in found) for label in 'xy']
    assert set(parts) == {'train', 'validation'} and all(abs(x - 0.25) < 0.06 for x in share), share
  folds = [labelled.assigned(found, config.replace(GROUPED, folds=4, fold=fold)) for fold in range(4)]
  assert all(some.count('validation') == 1 for some in zip(*folds, strict=True))
  assert labelled.assigned(found, labelled.Config(validation_fraction=0.25)) != labelled.assigned(found, GROUPED)


def test_groups_that_share_a_text_are_one():
  more = at([example(f'{i}', label='xy'[i % 2]) for i in range(40)], range(40))
  texts = (('a', 'one'), ('Same  text', 'one'), ('same text', 'two'), ('b', 'two'))
  joined = [example(text, at=author) for text, author in texts]
  for said in ('train', 'validation', 'test'):
    found = at([dataclasses.replace(joined[0], split=said), *joined[1:]], [author for _, author in texts])
    assert labelled.assigned([*found, *more], GROUPED)[:4] == [said] * 4
  found[-1] = dataclasses.replace(found[-1], split='train', origin='a.jsonl:4')
  with pytest.raises(DataError, match="a.jsonl:4: split 'train', but the same text or at, or a chain of them, at one "
                                      "has split 'test'; expected one split for each at"):
    labelled.assigned([*found, *more], GROUPED)


def test_folds_of_groups_keep_test_alone():
  """Its authors are in no fold; what the records say of training and validation counts no more."""
  found, groups = numbered(120, 90)
  said = [('train', 'validation')[i % 2] if group > 5 else 'test' for i, group in enumerate(groups)]
  found = at([dataclasses.replace(e, split=part, text=f'{i}') for i, (e, part) in enumerate(
      zip(found, said, strict=True))], groups)
  fold = config.replace(GROUPED, folds=3)
  parts = labelled.assigned(found, fold)
  assert max(map(len, sides(parts, groups).values())) == 1
  assert [part == 'test' for part in parts] == [part == 'test' for part in said] and 'test' in said
  found.append(dataclasses.replace(found[0], text='more', split='train', metadata={'at': 3}))
  with pytest.raises(DataError, match="split 'train'.*split 'test'; expected one split for each at"):
    labelled.assigned(found, fold)


@pytest.mark.parametrize('as_time', [int, lambda day: f'2024-{1 + day // 28:02d}-{1 + day % 28:02d}',
                                     lambda day: f'2024-{1 + day // 28:02d}-{1 + day % 28:02d}T08:00:00+08:00'])
def test_what_validates_is_later_than_what_trains(as_time):
  found, days = numbered(280, 100)
  found = at(found, map(as_time, days))
  keys = [splits.duplicate_key(e.text) for e in found]
  seen = 0
  for c in (TIMED, *(config.replace(TIMED, folds=4, fold=fold) for fold in range(4))):
    parts = labelled.assigned(found, c)
    train, held = ([day for day, part in zip(days, parts, strict=True) if part == name]
                   for name in ('train', 'validation'))
    assert max(train) < min(held) and max(map(len, sides(parts, keys).values())) == 1
    if not c.folds:
      assert abs(len(held) / 280 - 0.25) < 0.1 and 0 < parts.count(None) < 30
      assert all(key in {k for k, p in zip(keys, parts, strict=True) if p} for key in keys)  # a text is somewhere
    else:
      assert len(train) > seen and abs(len(train) - 56 * (c.fold + 1)) < 12
      assert all(part is None for day, part in zip(days, parts, strict=True) if day > max(held))
      seen = len(train)


def test_records_that_say_a_split_keep_it_in_time():
  found = at([example(f'{i}', label='xy'[i % 2], at=f'a.jsonl:{i}') for i in range(20)], range(20))
  late = at([example('t', 'test', at='t'), example('3 ', at='again'), example('T', at='early')], [30, 31, 2])
  for c in (TIMED, config.replace(TIMED, folds=2, fold=1)):
    assert labelled.assigned([*found, *late], c)[20:] == ['test', None, None]  # texts of training, and of test
  held = at([example('v', 'validation', at='v.jsonl:1')], [5])
  with pytest.raises(DataError, match="a.jsonl:14: split 'train', at 14, is later than v.jsonl:1, split 'validation', "
                                      'at 5; expected what trains to come first'):
    labelled.assigned([*found, *held], TIMED)
  said = [dataclasses.replace(e, split='train' if i < 15 else 'validation') for i, e in enumerate(found)]
  assert labelled.assigned(said, TIMED) == ['train'] * 15 + ['validation'] * 5


@pytest.mark.parametrize('c, metadata, message', [
    (GROUPED, {}, 'field at of data.by: no such field; expected a string or a number'),
    (GROUPED, {'at': ''}, "field at of data.by: found ''; expected a string"),
    (GROUPED, {'at': None}, 'field at of data.by: found null'),
    (GROUPED, {'at': ['a']}, 'field at of data.by: found a list'),
    (GROUPED, {'at': float('nan')}, 'field at of data.by: found the number nan'),
    (TIMED, {'at': '昨天'}, "field at of data.by: found '昨天'; expected a number, or a date as ISO 8601"),
    (TIMED, {}, 'field at of data.by: no such field; expected a number, or a date')])
def test_a_record_without_its_group_or_time_is_named(c, metadata, message):
  days = ['2024-01-01', '2024-01-02', '2024-01-03', '2024-01-04'] * 5
  found = at([example(f'{i}', label='xy'[i % 2]) for i in range(20)], days)
  for some in (c, config.replace(c, folds=2)):
    with pytest.raises(DataError, match=f'a.jsonl:21: {message}') as e:
      labelled.assigned([*found, Labelled('x', 'x', metadata, origin='a.jsonl:21')], some)
    assert '\n' not in str(e.value)


def test_times_of_several_kinds_are_named():
  with pytest.raises(ConfigError, match='times: .*expected one kind'):
    labelled.assigned(at([example('a'), example('b')], [3, '2024-01-01']), TIMED)


def test_skip_keeps_what_is_held_out(root, capsys):
  """Of a text with two splits, and a group; and records without a group are left out too."""
  rows = [('one', 'x', 'train', 1), ('One', 'x', 'test', 2), ('二 三', 'y', 'train', 3), ('two', 'x', 'validation', 4),
          ('二三', 'y', 'validation', 5), ('ONE', 'x', 'validation', 6), ('one ', 'x', None, 7),
          ('four', 'y', 'train', 8), ('five', 'x', 'train', 9), ('six', 'x', 'train', 2), ('seven', 'y', 'train', None)]
  records = [dict(zip(('text', 'label', 'split', 'by'), row, strict=True)) for row in rows]
  (root / 'skip.jsonl').write_text('\n'.join(json.dumps({k: v for k, v in r.items() if v}) for r in records))

  def texts(**fields):
    c = labelled.Config(str(root / 'skip.jsonl'), tokenizer='byte', length=20, **fields)
    data = labelled.prepare(c, '', encoder=False)
    return {name: [data.tokenizer.decode(ids[:n - 1]) for ids, n in zip(x.ids_BT, x.segments_BT.sum(1), strict=True)]
            for name, x in data.splits.items()}
  with pytest.raises(DataError, match=r"skip.jsonl:2: split 'test', but the same text at .*skip.jsonl:1 has split 'tr"):
    texts()
  capsys.readouterr()
  held = {'validation': ['two', '二三'], 'test': ['One', 'one ']}
  assert texts(on_error='skip') == held | {'train': ['four', 'five', 'six', 'seven']}
  out = capsys.readouterr().out
  assert 'split                   3   27.27%' in out and 'kept                    8   72.73%' in out
  for a, b in ((1, 2), (3, 5), (6, 2)):
    part = 'train' if a < 6 else 'validation'
    assert f"{root}/skip.jsonl:{a}: split '{part}', but the same text at {root}/skip.jsonl:{b} has split " in out
  assert texts(on_error='skip', split='grouped', by='by') == held | {'train': ['four', 'five']}
  out = capsys.readouterr().out
  assert 'split                   4 ' in out and 'missing                 1 ' in out
  assert texts(on_error='skip', folds=2)['test'] == held['test']


def test_what_time_leaves_out_is_told(root, capsys):
  rows = [{'text': f'{"good" if i % 2 else "bad"} film {i}', 'label': 'xy'[i % 2], 'at': i} for i in range(12)]
  (root / 'times.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  c = config.replace(TIMED, corpus=str(root / 'times.jsonl'), tokenizer='byte', folds=3, fold=1, batch=4)
  data = labelled.prepare(c, '', encoder=False)
  assert [data.rows(part) for part in ('train', 'validation')] == [6, 3]
  assert 'times.jsonl: 3 records left out; this fold ends before them' in capsys.readouterr().out


@EVERY_SPLIT
def test_a_text_that_is_said_to_be_in_two_splits_is_named(c):
  found = [example('Same  text', 'train', at='a.jsonl:3'), example('b', 'train'),
           example('same text', 'test', at='b.jsonl:7')]
  with pytest.raises(DataError, match="b.jsonl:7: split 'test', but the same text at a.jsonl:3 has split 'train'") as e:
    labelled.assigned(found, c)
  assert '\n' not in str(e.value)


def test_splits_are_what_they_were_where_no_text_repeats():
  found = [example(f'text {i}', (None, 'train', 'validation', 'test')[i % 4], 'xy'[i % 3 == 0]) for i in range(400)]
  texts, open_ = [e.text for e in found], range(0, 400, 4)
  for c, drawn in ((labelled.Config(), lambda texts, labels: splits.by_hash(texts, (0.9, 0.1))),
                   (labelled.Config(split='stratified'), lambda texts, labels: splits.stratified(
                       texts, labels, (0.9, 0.1)))):
    parts = labelled.assigned(found, c)
    held = drawn([texts[i] for i in open_], [found[i].label for i in open_]).validation
    assert [i for i in open_ if parts[i] == 'validation'] == [4 * i for i in held]
    assert all(part == e.split for e, part in zip(found, parts, strict=True) if e.split)


def test_the_seed_of_a_run_moves_no_text(root):
  rows = [(f'{"good" if i % 2 else "bad"} film {i}', 'xy'[i % 2], None) for i in range(40)]
  for split in ('hash', 'stratified'):
    one, other = (prepared(root, rows, seed=seed, split=split, length=40).splits for seed in (0, 7))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_share_that_leaves_nothing_to_evaluate_is_named(root):
  with pytest.raises(ConfigError, match='data.validation_fraction=0.0001: of 4 records none is left for validation'):
    prepared(root, [(text, label, None) for text, label in zip('abcd', 'xyxy', strict=True)],
             validation_fraction=0.0001)


def test_copies_train_where_their_originals_do_and_validate_nowhere():
  texts = [(ENGLISH, CHINESE)[i % 2] + f' {i}' for i in range(40)]
  originals = [example(text, 'train', 'xy'[i % 4 < 2], id=str(i)) for i, text in enumerate(texts)]
  originals.append(example('held', 'test', id='t'))
  copies = [example(f'{e.text} {n}!', 'train', e.label, id=f'{e.metadata["id"]}#{n}', origin=e.metadata['id'])
            for e in originals for n in range(3)]
  copies += [example('a copy of a copy', 'train', copies[0].label, id='0#0#0', origin='0#0'),
             example('of none', 'train', id='77#0', origin='77'),
             example(originals[1].text.upper(), 'train', originals[0].label, id='0#5', origin='0')]
  validated = 0
  for fold in range(4):
    c = labelled.Config(folds=4, fold=fold)
    alone, parts = labelled.assigned(originals, c), labelled.assigned([*originals, *copies], c)
    part_of = {e.metadata['id']: part for e, part in zip([*originals, *copies], parts, strict=True)}
    assert parts[:41] == alone and set(parts[41:]) == {'train', None} and part_of['77#0'] is None
    for e in copies[:-3]:
      assert part_of[e.metadata['id']] == ('train' if part_of[e.metadata['origin']] == 'train' else None)
    assert part_of['0#0#0'] == part_of['0#0'] and part_of['t#0'] is None
    assert part_of['0#5'] == ('train' if part_of['0'] == part_of['1'] == 'train' else None)
    validated += parts.count('validation')
  assert validated == 40
  country = [example(f'{i}', None, 'xy'[i % 2], id=i, origin='中国') for i in range(20)]  # a field of that name only
  assert set(labelled.assigned(country, labelled.Config(folds=4))) == {'train', 'validation'}


def test_copies_that_a_fold_leaves_out_are_told(root, capsys):
  rows = [{'text': f'{"good" if i % 2 else "bad"} film {i}', 'label': 'xy'[i % 2], 'id': i} for i in range(8)]
  rows += [row | {'text': row['text'] + '!', 'id': f'{row["id"]}#0', 'origin': str(row['id'])} for row in rows]
  (root / 'copies.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  c = labelled.Config(str(root / 'copies.jsonl'), tokenizer='byte', folds=4, fold=1, batch=4)
  data = labelled.prepare(c, '', encoder=False)
  assert (data.rows('train'), data.rows('validation')) == (12, 2)
  assert 'copies.jsonl: 2 copies left out' in capsys.readouterr().out


@pytest.mark.parametrize('classes', [(), ('x', 'y')])
@pytest.mark.parametrize('pairs', [False, True])
def test_wrong_records_end_the_run_or_are_left_out_and_counted(root, capsys, classes, pairs):
  row = lambda text, *rest: (text, '好电影', *rest) if pairs else (text, *rest)
  rows = [row('good', 'x', 'train'), row('bad', 'y', 'train'), row('坏', 'maybe', 'validation'),
          row('film', 'x', 'validation'), row('', 'x', 'validation')]
  rows += [('of one text', None, 'z', 'train')] if pairs else []
  data = prepared(root, rows, tokenizer='byte', encoder=False, on_error='skip', classes=classes)
  assert (data.rows('train'), data.rows('validation')) == (2, 1)
  printed = capsys.readouterr().out
  assert f'kept                    3  {3 / len(rows):7.2%}' in printed and 'rows.jsonl:3: ' in printed
  assert f'label                   {1 + (pairs and bool(classes))}' in printed
  assert 'empty                   1' in printed
  assert ('no field text_pair, which' in printed) == (pairs and not classes)
  for bad in rows[2], rows[-1]:
    with pytest.raises(DataError, match='rows.jsonl:3: '):
      prepared(root, [*rows[:2], bad], classes=classes, tokenizer='byte', encoder=False)


def test_a_pair_is_one_text_of_the_quality_check():
  texts = [('The weather is nice.', 'It rains a lot here.', 'yes'), ('The weather is nice.', 'The sun shines.', 'no'),
           ('the weather is  nice.', 'It rains a lot here.', 'no'), ('The sun shines.', 'The weather is nice.', 'yes')]
  found = quality.check([Labelled(a, label, text_pair=b) for a, b, label in texts], quality.Rules(near=None)).findings
  kinds = {i: {f.kind for f in found if f.number == i} for i in range(4)}
  assert kinds == {0: {'label contradictory'}, 1: set(), 2: {'label contradictory', 'duplicate'}, 3: set()}


@pytest.mark.parametrize('kind', KINDS)
def test_the_second_text_decides(root, kind):
  rows = [(f'{"good" if i & 2 else "bad"} film', f'{"good" if i & 1 else "bad"} film' + marks[i // 4 % len(marks)],
           'xy'[i & 1], split) for split, n, marks in (('train', 64, ('', '!!', '!!!')), ('validation', 16, '!'))
          for i in range(n)]
  data = prepared(root, rows, length=32, batch=16, encoder=kind is not classification.Decoder)
  c = config.replace(task_config(kind, data), optim__lr=1e-2)
  assert classification.accuracies(c, parameters(c), data, 1) == [1.0]


def test_token_types_reach_the_model(root):
  data = prepared(root, [('good', 'bad', 'xy'[i == 3], 'train') for i in range(4)])
  c = config.replace(task_config(classification.Encoder, data), model__std=0.5)
  task = classification.task(c)
  p, batch = (jax.jit(lambda key: params.init(task.specs, key))(jax.random.key(0)), data.splits['train'])
  loss = lambda batch: float(task.eval_loss(p, batch, None)[1]['loss'].total)
  untyped = loss(batch.replace(types_BT=None))
  assert abs(loss(batch) - untyped) > 1e-3
  assert loss(batch.replace(types_BT=np.zeros_like(batch.types_BT))) == pytest.approx(untyped)


REWORDED = [(f'{text} {i}', 'xy'[i % 2], 'train') for text in (ENGLISH, CHINESE) for i in range(20)]
METHODS = ('typos:0.2+homophones:0.3', 'punctuation:0.9+case:0.5')


def reworded(root, rows=REWORDED, seed=0, **fields):
  held_out = [(row[0] + ' too', *row[1:-1], 'validation') for row in rows[:7]]
  return prepared(root, [*rows, *held_out], seed=seed, tokenizer='byte', encoder=False,
                  **{'length': 200, 'augment': METHODS, 'augment_share': 0.5} | fields)


def texts_of(data, batch):
  return [data.tokenizer.decode(ids[:n - 1]) for ids, n in zip(batch.ids_BT, batch.segments_BT.sum(1), strict=True)]


def test_an_epoch_has_other_wordings_of_its_share_of_training_rows(root):
  data, plain = reworded(root), reworded(root, augment=())
  every = np.arange(40)
  epochs = [texts_of(data, data.again(every, epoch, 0)) for epoch in range(8)]
  changed = np.array([[new != old for new, old, *_ in zip(texts, (r[0] for r in REWORDED), strict=True)]
                      for texts in epochs])
  assert 0.3 < changed[:, :20].mean() <= 0.6 and 0.3 < changed[:, 20:].mean() <= 0.6  # English, Chinese
  assert changed.any(0).all() and not changed.all(1).any() and len({tuple(texts) for texts in epochs}) == 8
  assert all(augment.keeps(new, old) for texts in epochs for new, (old, *_) in zip(texts, REWORDED, strict=True))
  np.testing.assert_array_equal(data.again(every, 3, 0).labels_B, plain.splits['train'].labels_B)
  for part in ('train', 'validation'):  # what is evaluated has its own words
    jax.tree.map(np.testing.assert_array_equal, data.splits[part], plain.splits[part])


def test_a_wording_is_a_function_of_seed_epoch_and_row(root):
  data = reworded(root)
  rows = data.again(np.arange(40), 1, 0)
  few = data.again(np.array([7, 31]), 1, 0)
  np.testing.assert_array_equal(few.ids_BT, rows.ids_BT[[7, 31]])
  assert not np.array_equal(rows.ids_BT, data.again(np.arange(40), 1, 5).ids_BT)
  one = reworded(root, augment=('typos:0.5',), augment_share=1.0)
  rng = np.random.default_rng((0, 2, 3))
  rng.random()
  assert texts_of(one, one.again(np.array([3]), 2, 0)) == [noise.typos(0.5)(REWORDED[3][0], rng)]
  straight = some(labelled.train_batches(data, place()), 25)
  resumed = some(labelled.train_batches(reworded(root), place(), 13), 12)
  jax.tree.map(np.testing.assert_array_equal, straight[13:], resumed)
  assert not np.array_equal(straight[0].ids_BT, some(labelled.train_batches(dataclasses.replace(data, seed=1), place()),
                                                     1)[0].ids_BT)


def test_both_texts_of_a_pair_are_reworded(root):
  data = reworded(root, [(a, b, 'xy'[i % 2], 'train') for i, (a, b) in enumerate([(ENGLISH, CHINESE)] * 8)],
                  length=300, augment_share=1.0, augment=('typos:0.5+homophones:0.5',))
  for text in texts_of(data, data.again(np.arange(8), 0, 0)):
    a, b = text.split('\n')
    assert a != ENGLISH and b != CHINESE and augment.keeps(ENGLISH, a) and augment.keeps(CHINESE, b)


def test_the_fingerprint_knows_the_wordings(root):
  found = [reworded(root), reworded(root, augment=METHODS[:1]), reworded(root, augment_share=0.6),
           reworded(root, augment=()), reworded(root, [(t + '!', *rest) for t, *rest in REWORDED], length=20),
           reworded(root, length=20)]
  prints = [json.dumps(data.fingerprint, sort_keys=True) for data in found]
  assert len(set(prints)) == len(prints) and json.dumps(reworded(root).fingerprint, sort_keys=True) == prints[0]
  assert 'again' not in found[3].fingerprint
  assert json.loads(prints[0]) == found[0].fingerprint  # as a checkpoint gives it back


@pytest.mark.parametrize('change, message', [
    (dict(augment=('typo',)), 'data.augment=typo: unknown; did you mean typos'),
    (dict(augment=('typos+xyz',)), 'data.augment=xyz: unknown; see python -m scripts.augment --list'),
    (dict(augment=('typos:2',)), 'data.augment=typos:2: rate 2.0; expected 0 to 1'),
    (dict(augment=('typos:x',)), "data.augment=typos:x: 'x' is no number"),
    (dict(augment_share=0.0), 'data.augment_share=0.0; expected a share above 0'),
    (dict(validation_fraction=1.0), 'data.validation_fraction=1.0; expected a share'),
    (dict(split='grouped'), "data.by='', data.split='grouped'; expected the name of a field with 'grouped' or"),
    (dict(split='time'), "data.by='', data.split='time'; expected the name of a field"),
    (dict(by='author'), "data.by='author', data.split='hash'; expected"),
    (dict(by='author', split='stratified'), "data.by='author', data.split='stratified'; expected"),
    (dict(threads=-1), 'data.threads=-1; expected at least 0')], ids=str)
def test_mistakes_in_a_config(change, message):
  with pytest.raises(ConfigError, match=message):
    labelled.Config(**change)
