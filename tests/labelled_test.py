"""Labelled texts and pairs as rows, other wordings of them, the classification loss, and learning from them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
from marks import few, slow
import numpy as np
import pytest

from lm import classification, config, nn, optim, params, peft, run, sharding
from lm.data import labelled, memory, quality
from lm.data.examples import Labelled
from lm.errors import ConfigError, DataError
from lm.losses import classify
from lm.models import deberta, decoder, encoder, hf
from lm.text import augment, noise, tokenizer as tokenizers, training, vocabulary

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
  training.train_sentencepiece(texts, root / 'x.model', vocab=282, control_symbols=('[CLS]', '[SEP]', '[MASK]'))
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
  assert capsys.readouterr().out.splitlines() == [
      'train: 2 examples in 2 rows, 1 cut to data.length=15 tokens; an epoch is 0 steps',
      'validation: 1 examples in 1 rows']
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


@pytest.mark.parametrize('pooling, of', [
    ('pooler', lambda x_TD: x_TD[0]), ('first', lambda x_TD: x_TD[0]), ('bare', lambda x_TD: x_TD[0]),
    ('mean', lambda x_TD: x_TD.mean(0)), ('last', lambda x_TD: x_TD[-1])
], ids=['pooler', 'first', 'bare', 'mean', 'last'])
@pytest.mark.parametrize('examples, segments_BT', [
    (0, [[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
    (2, [[1, 1, 2, 2, 2, 0], [0, 1, 1, 1, 2, 2], [0, 0, 1, 2, 0, 0]])], ids=['alone', 'packed'])
def test_an_example_is_pooled_over_its_own_tokens(examples, segments_BT, pooling, of):
  segments_BT = np.array(segments_BT)
  x_BTD = np.random.default_rng(0).normal(size=(3, 6, 2)).astype(np.float32)
  want_BMD = np.array([[of(x_TD[row_T == m]) for m in range(1, max(examples, 1) + 1)]
                       for x_TD, row_T in zip(x_BTD, segments_BT, strict=True)])
  found = classification.pooled(jnp.asarray(x_BTD), jnp.asarray(segments_BT), pooling, examples)
  np.testing.assert_allclose(found, want_BMD if examples else want_BMD[:, 0], rtol=1e-5)


def task_config(kind, data, steps=60):
  return kind(model=KINDS[kind], data=data.config, optim=optim.Config(lr=3e-3, schedule='linear', steps=steps, warmup=6,
                                                                      b2=0.98, weight_decay=0.01))


def parameters(c):
  return jax.jit(lambda key: params.init(classification.task(c).base.specs, key))(jax.random.key(1))


@pytest.mark.parametrize('kind', [classification.Encoder, slow(classification.Disentangled)])
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


@pytest.mark.slow
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


@pytest.mark.slow
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
  data = prepared(root, [*rows, ('a', 'b', 'x', 'validation')], tokenizer='vocab.txt', length=13)
  found, cut = data.splits['train'], 0
  for i, (a, b, *_) in enumerate(rows):
    a, b = ([WORDS.index(word) for word in text.split()] for text in (a, b))
    cut += len(a) + len(b) > 10
    bert(a, b, 10)
    pad = [0] * (10 - len(a) - len(b))
    assert found.ids_BT[i].tolist() == [2, *a, 3, *b, 3, *pad]
    assert found.types_BT[i].tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1) + pad
    assert found.segments_BT[i].tolist() == [1] * (len(a) + len(b) + 3) + pad
  assert f'train: 300 examples in 300 rows, {cut} cut' in capsys.readouterr().out and 50 < cut < 250


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
    ([('a', 'b', 'x', 'train'), ('a', None, 'y', 'train')], {}, 'rows.jsonl:2: no field text_pair, which most have;'),
    ([('a', 'x', 'train'), ('a', 'x', 'train'), ('b', 'b', 'y', 'train')], {},
     'rows.jsonl:3: a field text_pair, which most have not'),
    ([('a', ' ', 'x', 'train')], {}, 'rows.jsonl:1: field text_pair: nothing but space'),
    ([('a', 3, 'x', 'train')], {}, 'rows.jsonl:1: field text_pair: found the number 3; expected a string'),
    ([('a', 'b', 'x', 'train'), ('a', 'b', 'y', 'train')], {'length': 4}, 'data.length=4; expected at least 5')])
def test_pairs_that_are_wrong(root, rows, fields, message):
  with pytest.raises((ConfigError, DataError), match=message):
    prepared(root, rows, **fields)


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
  c = labelled.Config(str(root / 'times.jsonl'), tokenizer='byte', split='time', by='at', folds=3, fold=1, batch=4)
  data = labelled.prepare(c, '', encoder=False)
  assert [data.rows(part) for part in ('train', 'validation')] == [6, 3]
  assert 'times.jsonl: 3 records left out; this fold ends before them' in capsys.readouterr().out


def test_fields_by_other_names_in_another_encoding(root):
  rows = [f'{"好" if i % 2 else "坏"}电影 {i},{i % 2},{"dev" if i % 5 == 0 else "train"}' for i in range(20)]
  (root / 'gb.csv').write_bytes('\n'.join(['sentence,label,part', *rows]).encode('gb18030'))
  c = labelled.Config(str(root / 'gb.csv'), tokenizer='byte', length=24, encoding='gb18030',
                      rename=(('sentence', 'text'), ('part', 'split')))
  assert config.from_json(labelled.Config, json.loads(json.dumps(config.to_json(c)))) == c
  assert config.override(c, "rename=(('sentence', 'text'), ('part', 'split'))") == c
  data = labelled.prepare(c, '', encoder=False)
  assert texts_of(data, data.splits['validation']) == [row.split(',')[0] for row in rows[::5]]
  assert data.names == ('0', '1') and data.splits['validation'].labels_B.tolist() == [0, 1, 0, 1]
  with pytest.raises(DataError, match='gb.csv:2: field sentence: character 0 is not of the encoding'):
    labelled.prepare(dataclasses.replace(c, encoding='utf-8'), '', encoder=False)
  with pytest.raises(DataError, match=r'gb.csv:2: no field text \(fields: sentence, label'):
    labelled.prepare(dataclasses.replace(c, rename=(('part', 'split'),)), '', encoder=False)


def test_classes_that_are_integers_are_in_the_order_of_their_values(root):
  path = root / 'counted.jsonl'
  path.write_text(''.join(json.dumps({'text': f'film {i}', 'label': label}) + '\n'
                          for i, label in enumerate([10, 2, 'x', -1, 0, '02', 'b'] * 9)))
  made = labelled.prepare(labelled.Config(corpus=str(path), tokenizer=str(root / 'x.model'), length=16), root)
  assert made.names == ('-1', '0', '02', '2', '10', 'b', 'x')


@pytest.mark.parametrize('pairs', [False, True])
def test_a_text_that_the_tokenizer_refuses_ends_the_run_or_is_counted(root, capsys, pairs):
  row = lambda text, *rest: ('ab', text, *rest) if pairs else (text, *rest)
  rows = [row('ab', 'x', 'train'), row('ba', 'y', 'train'), row('abc', 'z', 'train'), row('b a', 'x', 'validation'),
          row('b', 'x', 'validation')]
  tokenizers.char('ab\n').save(root / 'ab')
  said = f'rows.jsonl:3: field {"text_pair" if pairs else "text"}: character 2: U\\+0063 is not among the 3 characters'
  with pytest.raises(DataError, match=said):
    prepared(root, rows, tokenizer='ab', encoder=False)
  capsys.readouterr()
  data = prepared(root, rows, tokenizer='ab', encoder=False, on_error='skip')
  assert (data.rows('train'), data.rows('validation'), data.names) == (2, 1, ('x', 'y'))
  printed = capsys.readouterr().out
  assert 'words                   2   40.00%' in printed and 'rows.jsonl:4: field text' in printed
  with pytest.raises(DataError, match='none of 1 records can be used; the first left out: .*rows.jsonl:1: field text'):
    prepared(root, [row('c', 'x', 'train')], tokenizer='ab', encoder=False, on_error='skip', classes=('x', 'y'))


def test_a_test_split_without_labels_is_left_out_and_splits_not_read_are_named(root, capsys, tmp_path):
  rows = [*films(8), *films(4, 'dev'), ('a test', None, 'test'), ('another', None, 'test')]
  data = prepared(root, rows)
  assert sorted(data.splits) == ['train', 'validation'] and data.rows('validation') == 4
  assert 'unlabelled              2   14.29%' in capsys.readouterr().out
  for name in ('train', 'dev_mismatched', 'dev_matched'):
    (tmp_path / f'{name}.jsonl').write_text(''.join(
        json.dumps({'text': f'{name} {i}', 'label': i % 2}) + '\n' for i in range(4)))
  labelled.prepare(labelled.Config(str(tmp_path), tokenizer='byte'), '', encoder=False)
  assert 'not read        dev_mismatched; to read one' in capsys.readouterr().out


@pytest.mark.oracle
def test_glue_as_the_datasets_library_saves_it_is_learned_from(tmp_path, capsys):
  datasets = pytest.importorskip('datasets')
  features = datasets.Features({'premise': datasets.Value('string'), 'hypothesis': datasets.Value('string'),
                                'label': datasets.ClassLabel(names=['entailment', 'neutral', 'contradiction'])})
  made = {split: datasets.Dataset.from_dict({'premise': [f'{split} {i}' for i in range(6)], 'hypothesis': ['so'] * 6,
                                             'label': [-1] * 6 if 'test' in split else [i % 3 for i in range(6)]},
                                            features)
          for split in ('train', 'validation_matched', 'validation_mismatched', 'test_matched', 'test_mismatched')}
  datasets.DatasetDict(made).save_to_disk(tmp_path / 'mnli')
  c = labelled.Config(str(tmp_path / 'mnli'), tokenizer='byte', length=40, batch=2,
                      rename=(('premise', 'text'), ('hypothesis', 'text_pair')))
  data = labelled.prepare(c, '', encoder=False)
  assert data.names == ('contradiction', 'entailment', 'neutral') and sorted(data.splits) == ['train', 'validation']
  assert texts_of(data, data.splits['validation']) == [f'validation_matched {i}\nso' for i in range(6)]
  printed = capsys.readouterr().out
  assert 'unlabelled              6 ' in printed and 'not read        validation_mismatched, test_mismatched' in printed


def test_the_seed_of_a_run_moves_no_text(root):
  rows = [(f'{"good" if i % 2 else "bad"} film {i}', 'xy'[i % 2], None) for i in range(40)]
  for split in ('hash', 'stratified'):
    one, other = (prepared(root, rows, seed=seed, split=split, length=40).splits for seed in (0, 7))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_share_that_leaves_nothing_to_evaluate_is_named(root):
  with pytest.raises(ConfigError, match='data.validation_fraction=0.0001: of 4 records none is left for validation'):
    prepared(root, [(text, label, None) for text, label in zip('abcd', 'xyxy', strict=True)],
             validation_fraction=0.0001)


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


@pytest.mark.parametrize('kind', few(KINDS, classification.Encoder))
def test_the_second_text_decides(root, kind):
  rows = [(f'{"good" if i & 2 else "bad"} film', f'{"good" if i & 1 else "bad"} film' + marks[i // 4 % len(marks)],
           'xy'[i & 1], split) for split, n, marks in (('train', 64, ('', '!!', '!!!')), ('validation', 16, '!'))
          for i in range(n)]
  data = prepared(root, rows, length=32, batch=16, encoder=kind is not classification.Decoder)
  c = config.replace(task_config(kind, data), optim__lr=1e-2)
  assert classification.accuracies(c, parameters(c), data, 1) == [1.0]


@pytest.mark.slow
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
    (dict(rename=('sentence', 'text')), r"data.rename=\('sentence', 'text'\); expected pairs of what the file calls"),
    (dict(rename={'sentence': 'text'}), "data.rename={'sentence': 'text'}; expected pairs"),
    (dict(rename=(('sentence', ''),)), 'expected pairs'), (dict(rename=(('a', 'b', 'c'),)), 'expected pairs'),
    (dict(rename=(('a', 'text'), ('b', 'text'))), "data.rename=.*: 'text' twice; expected each field once"),
    (dict(rename=(('a', 'text'), ('a', 'label'))), "data.rename=.*: 'a' twice"),
    (dict(encoding='utf-9'), "data.encoding='utf-9': unknown encoding"),
    (dict(encoding='utf-16'), "data.encoding='utf-16': not every ASCII character"),
    (dict(threads=-1), 'data.threads=-1; expected at least 0')], ids=str)
def test_mistakes_in_a_config(change, message):
  with pytest.raises(ConfigError, match=message):
    labelled.Config(**change)
