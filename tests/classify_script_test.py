"""scripts.classify: what a run measured of its own split, and any texts one by one, in their order."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors import numpy as st

from lm import checkpoint, classification, classifier, config, logs, loop, optim, peft, run
from lm.data import labelled
from lm.errors import CheckpointError, ConfigError, DataError
from lm.models import decoder, encoder
from lm.text import training

ROOT = pathlib.Path(__file__).parent.parent
SHAPE = dict(vocab=300, length=64, layers=1, embed=16, heads=2, head_dim=8, mlp=32)
MODELS = {classification.Encoder: encoder.Config(scan_layers=False, **SHAPE),
          classification.Decoder: decoder.Config(kv_heads=2, **SHAPE)}


def write_tokenizer(path):
  training.train_sentencepiece(['good film 好电影 bad film 坏电影'] * 20, path, vocab=280,
                               control_symbols=('[CLS]', '[SEP]', '[MASK]'))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp('classify')
  write_tokenizer(root / 'x.model')
  rows = [{'text': f'{"good" if i % 2 else "bad"} film {"好" * (i % 3)} {i}', 'label': 'liked' if i % 2 else 'not, 不',
           'split': 'train' if i % 5 else 'validation'} for i in range(80)]
  pairs = [row | {'text_pair': f'a film {i}'} for i, row in enumerate(rows)]
  for name, records in (('films', rows), ('pairs', pairs)):
    (root / f'{name}.jsonl').write_text(''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in records))
  return root


def trained(folder, workdir, kind=classification.Encoder, corpus='films', **changes):
  c = kind(model=MODELS[kind], data=labelled.Config(corpus=f'{folder}/{corpus}.jsonl', tokenizer=f'{folder}/x.model',
                                                    length=48, batch=8),
           optim=optim.Config(lr=0.02, steps=24, warmup=1, weight_decay=0.0), loop=loop.Config(eval_every=24),
           checkpoint=checkpoint.Config(every=24, metric='val_accuracy', mode='max'))
  c = config.replace(c, **changes)
  return c, run.run(c, classification.task(c), workdir)


def records(folder, corpus, split='validation'):
  rows = [json.loads(line) for line in (folder / f'{corpus}.jsonl').read_text().splitlines()]
  return [row for row in rows if row['split'] == split]


def script(*flags, **kwargs):
  return subprocess.run([sys.executable, '-m', 'scripts.classify', *map(str, flags)], cwd=ROOT, capture_output=True,
                        text=True, timeout=300, check=False, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize('kind, corpus, pack', [
    (classification.Encoder, 'films', True), (classification.Encoder, 'pairs', False),
    (classification.Decoder, 'pairs', True)])
def test_texts_one_by_one_get_the_classes_that_the_run_gave_them(kind, corpus, pack, folder, tmp_path):
  c, summary = trained(folder, tmp_path, kind, corpus, data__pack=pack, data__longest=40)
  labels_N, classes_N, names = classification.predictions(c, tmp_path)
  found = classifier.load(tmp_path)
  assert found.names == names == ('liked', 'not, 不') and type(found.config) is kind
  given = records(folder, corpus)
  texts = [[row['text'], row['text_pair']] if corpus == 'pairs' else [row['text']] for row in given]
  p_NC, cut = found.probabilities(texts)
  assert p_NC.shape == (len(given), 2) and cut == 0
  np.testing.assert_allclose(p_NC.sum(-1), 1, atol=1e-6)
  own = np.array([names.index(row['label']) for row in given])
  assert sorted(zip(own, p_NC.argmax(-1), strict=True)) == sorted(zip(labels_N, classes_N, strict=True))
  assert (own == p_NC.argmax(-1)).mean() == pytest.approx(summary['val_accuracy'])
  # Neither order nor company matters: of 3 texts the last batch has 5 rows that fill it up.
  np.testing.assert_allclose(found.probabilities(texts[::-1][:3])[0], p_NC[::-1][:3], atol=1e-6)
  assert found.probabilities([[text * 30 for text in texts[0]]])[1] == 1


@pytest.fixture(scope='module')
def workdir(folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  trained(folder, workdir)
  return workdir


@pytest.mark.slow
def test_a_line_of_json_for_each_text(folder, workdir, tmp_path):
  done = script(f'--model={workdir}', f'--corpus={folder}/films.jsonl', f'--out={tmp_path}/out.jsonl')
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  given = [json.loads(line) for line in (folder / 'films.jsonl').read_text().splitlines()]
  assert [(row['text'], row['label']) for row in rows] == [(row['text'], row['label']) for row in given]
  assert all(row['predicted'] == max(row['probabilities'], key=row['probabilities'].get) for row in rows)
  share = np.mean([row['predicted'] == row['label'] for row in rows])
  assert done.stdout == '' and f'80 texts: accuracy {share:.4f}' in done.stderr and '| not, 不 |' in done.stderr
  lines = script(f'--model={workdir}', input='\n'.join(row['text'] for row in given[:3])).stdout.splitlines()
  assert [json.loads(line) for line in lines] == [{k: v for k, v in row.items() if k != 'label'} for row in rows[:3]]


@pytest.mark.slow
def test_texts_are_read_as_the_run_read_its_own(folder, workdir, tmp_path):
  shutil.copytree(workdir, tmp_path / 'run')
  record = logs.read_config(workdir)
  data = record['config']['data'] | {'rename': [['sentence', 'text'], ['kind', 'label']], 'encoding': 'gb18030'}
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(record | {
      'config': record['config'] | {'data': data}, 'classes': ['0', '1']}))
  texts = ['good film', '坏 film 2']
  for name in ('train', 'dev_mismatched'):
    (tmp_path / 'new').mkdir(exist_ok=True)
    (tmp_path / 'new' / f'{name}.jsonl').write_bytes(''.join(json.dumps(
        {'sentence': text, 'kind': i}, ensure_ascii=False) + '\n' for i, text in enumerate(texts)).encode('gb18030'))
  done = script(f'--model={tmp_path}/run', f'--corpus={tmp_path}/new')
  assert done.returncode == 0 and '2 texts: accuracy' in done.stderr, done.stderr
  assert 'new: not read: dev_mismatched' in done.stderr
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  assert [(row['text'], row['label']) for row in rows] == list(zip(texts, '01', strict=True))


@pytest.mark.slow
def test_the_split_of_the_run(workdir, folder):
  c = trained(folder, workdir)[0]  # complete: nothing is trained
  labels_N, classes_N, _ = classification.predictions(c, workdir)
  done = script(f'--model={workdir}', '--split=validation')
  assert done.returncode == 0 and f'16 texts: accuracy {(labels_N == classes_N).mean():.4f}' in done.stderr
  with pytest.raises(ConfigError, match='no test split; expected train, validation'):
    classification.predictions(c, workdir, 'test')


@pytest.mark.slow
@pytest.mark.parametrize('flags, lines, code, said', [
    ((), None, 2, '--model'),
    (('--model={w}', '--text=a', '--split=validation'), None, 2, 'two of them'),
    (('--model={w}', '--split=validation', '--out=x'), None, 2, '--out'),
    (('--model={w}', '--split=test'), None, 2, 'no test split'),
    (('--model={w}', '--text=a', '--text= '), None, 3, '--text:2'),
    (('--model={w}', '--corpus={c}'), ['{"text": "a"}', '{"texts": "b"}'], 3, 'c.jsonl:2'),
    (('--model={w}', '--corpus={c}'), ['{"text": "a"}', '["b"]'], 3, 'c.jsonl:2'),
    (('--model={w}', '--corpus={c}'), ['{"text": "a"}', '{"text": "b", "text_pair": "c"}'], 3, 'texts and pairs'),
    (('--model={w}', '--corpus={c}'), ['{"text": "a", "label": "other"}'], 3, "'other'"),
    (('--model={c}.none', '--text=a'), None, 2, 'no such path'),
    (('--model={f}', '--split=validation'), None, 2, '--split')])
def test_what_is_wrong_is_said(flags, lines, code, said, workdir, tmp_path):
  foreign = tmp_path / 'hf'
  foreign.mkdir()
  (foreign / 'config.json').write_text('{}')
  corpus = tmp_path / 'c.jsonl'
  if lines:
    corpus.write_text('\n'.join(lines))
  done = script(*(flag.format(w=workdir, c=corpus, f=foreign) for flag in flags), input='')
  assert done.returncode == code and said in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.slow
def test_a_run_without_names_of_classes(workdir, tmp_path):
  record = logs.read_config(workdir)
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / 'config.json').write_text(json.dumps(record | {'classes': ['one']}))
  with pytest.raises(CheckpointError, match='its 2 classes'):
    classifier.load(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps({'config': record['config'] | {'pooling': 'all'}}))
  with pytest.raises(CheckpointError, match='pooling.*of a classifier'):
    classifier.load(tmp_path)


def convert(workdir, out):
  return subprocess.run([sys.executable, '-m', 'scripts.convert', f'--from={workdir}', f'--out={out}'], cwd=ROOT,
                        capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize('few', [peft.Config(), peft.Config('lora', train='^(classify|pooler)/', rank=2,
                                                            targets='^blocks/attn/[qv]$')])
def test_export_for_transformers(few, folder, tmp_path):
  trained(folder, tmp_path / 'run', pooling='pooler', peft=few)
  done = convert(tmp_path / 'run', tmp_path / 'out')
  assert done.returncode == 0 and 'AutoModelForSequenceClassification' in done.stdout, done.stderr
  fields = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert fields['architectures'] == ['BertForSequenceClassification']
  assert fields['id2label'] == {'0': 'liked', '1': 'not, 不'} and fields['label2id'] == {'liked': 0, 'not, 不': 1}
  found = classifier.load(tmp_path / 'run')
  tensors, p = st.load_file(tmp_path / 'out' / 'model.safetensors'), peft.plain(found.params)
  np.testing.assert_array_equal(tensors['classifier.weight'], p['classify']['out'].T)
  np.testing.assert_array_equal(tensors['bert.pooler.dense.bias'], p['pooler']['bias'])
  width = p['embed']['tokens'].shape[1]
  np.testing.assert_array_equal(tensors['bert.encoder.layer.0.attention.self.query.weight'],
                                np.asarray(p['blocks']['attn']['q'][0]).reshape(width, -1).T)


@pytest.mark.slow
def test_what_was_exported_classifies_as_the_run_did(folder, tmp_path):
  trained(folder, tmp_path / 'run', pooling='pooler')
  assert convert(tmp_path / 'run', tmp_path / 'out').returncode == 0
  (want, got), texts = map(classifier.load, (tmp_path / 'run', tmp_path / 'out')), [['good film'], ['坏 film 7']]
  assert got.names == want.names
  np.testing.assert_allclose(got.probabilities(texts)[0], want.probabilities(texts)[0], atol=1e-6)
  c, _ = trained(folder, tmp_path / 'again', pooling='pooler', init_from=str(tmp_path / 'out'), optim__steps=1,
                 loop__eval_every=1)  # its body and pooler, with a new head
  body = jax.tree.map(lambda a, b: float(abs(a - b).max()), got.params, classifier.load(tmp_path / 'again').params)
  assert max(jax.tree.leaves(body['blocks'] | body['pooler'])) < 0.05 < max(jax.tree.leaves(body['classify']))
  fields = json.loads((tmp_path / 'out' / 'config.json').read_text())
  for changed, said in (({'id2label': {'0': 'a', '2': 'b'}}, 'id2label'), ({'id2label': {'0': 'a'}}, '1 names'),
                        ({'problem_type': 'multi_label_classification'}, 'problem_type'),
                        ({'architectures': ['BertForTokenClassification']}, 'architectures')):
    (tmp_path / 'out' / 'config.json').write_text(json.dumps(fields | changed))
    with pytest.raises((CheckpointError, ConfigError), match=said):
      classifier.load(tmp_path / 'out')


@pytest.mark.slow
@pytest.mark.parametrize('few, kind, pooling', [
    (peft.Config('lora', train='^(classify|pooler)/', rank=2, targets='^blocks/attn/[qv]$'), classification.Encoder,
     'pooler'), (peft.Config(), classification.Decoder, 'last')])
def test_another_task_begins_from_a_classifier(few, kind, pooling, folder, tmp_path):
  trained(folder, tmp_path / 'first', kind, pooling=pooling, peft=few)
  want = peft.plain(classifier.load(tmp_path / 'first').params)
  trained(folder, tmp_path / 'next', kind, pooling=pooling, init_from=str(tmp_path / 'first'), optim__lr=0.0,
          optim__steps=1, loop__eval_every=1)
  got = classifier.load(tmp_path / 'next').params
  assert abs(want['classify']['out'] - got['classify']['out']).max() > 0.01  # a new head
  rest = [{name: leaf for name, leaf in p.items() if name != 'classify'} for p in (want, got)]
  jax.tree.map(np.testing.assert_array_equal, *rest)


@pytest.mark.slow
def test_parts_beside_the_weights_are_no_beginning(folder, tmp_path):
  trained(folder, tmp_path / 'first', peft=peft.Config('houlsby', width=2), optim__steps=1, loop__eval_every=1)
  with pytest.raises(ConfigError, match='houlsby.*in full'):
    trained(folder, tmp_path / 'next', init_from=str(tmp_path / 'first'))


@pytest.mark.slow
def test_a_head_that_transformers_has_not_is_not_exported(workdir, tmp_path):
  done = convert(workdir, tmp_path / 'out')  # BERT's with RoBERTa's head
  assert done.returncode == 2 and 'pooling=pooler of BERT' in done.stderr and not (tmp_path / 'out').exists()


def test_a_text_that_the_tokenizer_refuses_is_counted(workdir, monkeypatch):
  found = classifier.load(workdir)
  with pytest.raises(DataError, match='text 2'):
    found.probabilities([['a'], ['\ud800']])
