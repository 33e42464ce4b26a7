"""Labels that are numbers: read, trained on, scored, used and exported."""

import json
import pathlib
import subprocess
import sys

from classify_script_test import MODELS, SHAPE, write_tokenizer
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import checkpoint, classification, classifier, config, loop, metrics, optim, run
from lm.data import examples, labelled
from lm.errors import ConfigError, DataError
from lm.losses import classify

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Pairs as STS-B has them: how many words of the second are those of the first."""
  root = tmp_path_factory.mktemp('numbers')
  write_tokenizer(root / 'x.model')
  rows = [{'sentence1': f'film {i}', 'sentence2': f'{"好" * n}{"坏" * (4 - n)} {i}', 'label': n + 0.5,
           'split': 'dev' if i % 5 == 0 else 'train'} for i in range(120) for n in [i % 7 % 5]]
  rows += [{'sentence1': 'a', 'sentence2': 'b', 'label': -1, 'split': 'test'}]
  (root / 'pairs.jsonl').write_text(''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows))
  return root


def untrained(folder):
  data = labelled.Config(corpus=f'{folder}/pairs.jsonl', tokenizer=f'{folder}/x.model', length=48, numbers=True,
                         rename=(('sentence1', 'text'), ('sentence2', 'text_pair')))
  return classification.Encoder(model=MODELS[classification.Encoder], data=data, classes=1)


def trained(folder, workdir, kind=classification.Encoder, **changes):
  c = config.replace(untrained(folder), data__batch=8)
  c = kind(model=MODELS[kind], data=c.data, classes=1,
           optim=optim.Config(lr=0.01, steps=150, warmup=10, weight_decay=0.0), loop=loop.Config(eval_every=75),
           checkpoint=checkpoint.Config(every=75))
  c = config.replace(c, **changes)
  return c, run.run(c, classification.task(c), workdir)


def test_numbers_are_read_from_any_format(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "x", "label": 2}\n{"text": "y", "label": 2.25}\n')
  (tmp_path / 'a.csv').write_text('text,label\nx,2\ny,2.25\n')
  for name in ('a.jsonl', 'a.csv'):
    found, report = examples.read(tmp_path / name, 'classification', numbers=True)
    assert [e.label for e in found] == [2.0, 2.25] and all(type(e.label) is float for e in found) and report.complete


@pytest.mark.parametrize('label, said', [
    ('true', 'true'), ('"much"', "'much'|a string"), ('null', 'null'), ('""', 'nothing but space'), ('[1]', 'a list'),
    ('1e31', 'number below 1e30'), ('"nan"', 'nan'), ('"inf"', 'number below 1e30')])
def test_what_is_no_number_is_named(tmp_path, label, said):
  (tmp_path / 'a.jsonl').write_text(f'{{"text": "x", "label": 1}}\n{{"text": "y", "label": {label}}}\n')
  with pytest.raises(DataError, match=f'a.jsonl:2: field label: .*({said})'):
    examples.read(tmp_path / 'a.jsonl', 'classification', numbers=True)
  found, report = examples.read(tmp_path / 'a.jsonl', 'classification', 'skip', numbers=True)
  assert len(found) == 1 and sum(report.faults.values()) == 1


def test_minus_one_is_no_number_of_a_test_split_that_has_no_other(tmp_path):
  line = '{{"text": "{}", "label": {}, "split": "{}"}}\n'
  (tmp_path / 'a.jsonl').write_text(line.format('x', 1, 'train') + line.format('y', -1.0, 'test'))
  assert [e.text for e in examples.read(tmp_path / 'a.jsonl', 'classification', numbers=True)[0]] == ['x']
  (tmp_path / 'a.jsonl').write_text(line.format('x', -1, 'train') + line.format('y', -1.0, 'test'))
  assert len(examples.read(tmp_path / 'a.jsonl', 'classification', numbers=True)[0]) == 2


def test_the_loss_is_the_mean_square_of_what_has_a_label():
  outputs_B1, labels_B = jnp.array([[1.0], [2.0], [5.0]]), jnp.array([0.5, jnp.nan, 3.0])
  terms, found = classify.number(outputs_B1, labels_B)
  assert float(terms['squared'].total) == 0.25 + 4 and float(terms['squared'].weight) == 2
  assert float(found['loss'].total) == 4.25
  slope = jax.grad(lambda x: classify.number(x, labels_B)[0]['squared'].total)(outputs_B1)
  np.testing.assert_array_equal(slope, [[1.0], [0.0], [4.0]])


@pytest.mark.slow
@pytest.mark.parametrize('kind, pack', [(classification.Encoder, False), (classification.Encoder, True),
                                        (classification.Decoder, False)])
def test_a_run_learns_them_and_says_how_well(kind, pack, folder, tmp_path):
  c, summary = trained(folder, tmp_path / 'run', kind, data__pack=pack)
  labels_N, said_N, names = classification.predictions(c, tmp_path / 'run')
  assert len(labels_N) == 24 and names == ('number',)
  assert summary['val_loss'] == pytest.approx(float(np.mean((labels_N - said_N) ** 2)), rel=1e-4)
  scores = {name: f(labels_N, said_N) for name, f in classification.scores(c).items()}
  assert scores['Pearson'] > 0.9 and scores['Spearman'] > 0.8
  (tmp_path / 'new.jsonl').write_text(json.dumps({'sentence1': 'film', 'sentence2': '好好好好', 'label': 4.5}) + '\n' +
                                      json.dumps({'sentence1': 'film', 'sentence2': '坏坏坏坏', 'label': 0.5}) + '\n')
  done = subprocess.run([sys.executable, '-m', 'scripts.classify', f'--model={tmp_path}/run',
                         f'--corpus={tmp_path}/new.jsonl'], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  high, low = (json.loads(line)['predicted'] for line in done.stdout.splitlines())
  assert high > low + 2 and 'Pearson 1.0000, Spearman 1.0000' in done.stderr and 'probabilities' not in done.stdout


def test_shares_and_folds_need_no_classes(folder, tmp_path):
  for changes in ({'data__split': 'stratified'}, {'data__folds': 3}):
    data = config.replace(untrained(folder), **changes).data
    made = labelled.prepare(data, tmp_path)
    assert made.rows('train') > 60 and made.splits['train'].labels_B.dtype == np.float32
    assert not np.isnan(made.splits['validation'].labels_B).any()


def test_what_belongs_to_classes_is_refused(folder):
  c = untrained(folder)
  for changes, said in (({'classes': 2}, 'classes=2, data.numbers=True'), ({'data__numbers': False}, 'classes=1, data'),
                        ({'smoothing': 0.1}, 'smoothing=0.1'), ({'data__classes': ('a', 'b')}, 'data.numbers=True')):
    with pytest.raises(ConfigError, match=said):
      config.replace(c, **changes)
  with pytest.raises(ConfigError, match='val_accuracy.*val_loss'):
    c = config.replace(c, checkpoint__metric='val_accuracy', checkpoint__mode='max')
    run.run(c, classification.task(c), folder / 'refused')


def test_the_command_line_takes_it():
  sets = ('classes=1', 'data.numbers=True', 'checkpoint.metric=val_loss', 'checkpoint.mode=min')
  c = config.override(classification.Encoder(checkpoint=checkpoint.Config(metric='val_accuracy', mode='max')), *sets)
  assert c.classes == 1 and c.data.numbers and c.checkpoint.mode == 'min'


@pytest.mark.slow
def test_it_is_exported_as_a_regression(folder, tmp_path):
  trained(folder, tmp_path / 'run', pooling='pooler', optim__steps=20, loop__eval_every=20)
  done = subprocess.run([sys.executable, '-m', 'scripts.convert', f'--from={tmp_path}/run', f'--out={tmp_path}/out',
                         '--to=hf'], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  fields = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert fields['problem_type'] == 'regression' and fields['id2label'] == {'0': 'number'}
  (want, got), texts = map(classifier.load, (tmp_path / 'run', tmp_path / 'out')), [['film', '好好'], ['film 7', '坏']]
  np.testing.assert_allclose(got.probabilities(texts)[0], want.probabilities(texts)[0], atol=1e-5)
  assert want.probabilities(texts)[0].shape == (2, 1)


@pytest.mark.slow
def test_repeat_tells_the_correlations(folder, tmp_path):
  assert metrics.GLUE['stsb'].keys() == {'pearson', 'spearman'}
  c = untrained(folder)
  sets = [f'--set=data.corpus={c.data.corpus}', f'--set=data.tokenizer={c.data.tokenizer}', '--set=classes=1',
          '--set=data.numbers=True', "--set=data.rename=(('sentence1', 'text'), ('sentence2', 'text_pair'))",
          '--set=checkpoint.metric=val_loss', '--set=checkpoint.mode=min', '--set=data.length=48',
          '--set=optim.steps=8', '--set=optim.warmup=1', '--set=loop.eval_every=4', '--set=data.longest=0',
          '--set=data.pack=False',
          *(f'--set=model.{k}={v}' for k, v in (SHAPE | {'token_embed': 16}).items())]
  done = subprocess.run([sys.executable, '-m', 'scripts.repeat', '--experiment=classify', '--config=encoder_cpu',
                         '--seeds=2', f'--workdir={tmp_path}/out', *sets], cwd=ROOT, capture_output=True, text=True,
                        check=False)
  assert done.returncode == 0, done.stderr
  assert 'Spearman: ' in done.stdout and not (tmp_path / 'out' / 'confusion.png').exists()
