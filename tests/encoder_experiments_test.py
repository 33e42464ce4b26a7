"""Every encoder config: exact published parameter counts, JSON round trip, and (shrunk) three real steps."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
from marks import few
import numpy as np
import pytest
import tiny

from experiments import bert, deberta, electra, roberta
from lm import config, look, params, pretrain_encoder, run
from lm.data import inputs, masking
from lm.errors import ConfigError, Preempted
from lm.text import training

# With all heads of pretraining; DeBERTa's are published without.
COUNTS = {'bert_base': 110_106_428, 'bert_large': 336_226_108, 'roberta_base': 124_697_433,
          'roberta_large': 355_412_057, 'electra_small': 14_196_219, 'electra_base': 119_386_427,
          'electra_large': 354_655_291}
BODIES = {'deberta_base': 138_601_728, 'deberta_large': 405_163_008, 'deberta_xlarge': 757_804_032,
          'deberta_v2_xlarge': 884_593_152, 'deberta_v2_xxlarge': 1_564_549_632, 'deberta_v3_xsmall': 70_682_112,
          'deberta_v3_small': 141_304_320, 'deberta_v3_base': 183_831_552, 'deberta_v3_large': 434_012_160}
ALL = {f.__name__: f for module in (bert, roberta, electra, deberta) for f in module.CONFIGS}
CPU = ('bert_cpu', 'roberta_cpu', 'electra_cpu', 'deberta_cpu', 'deberta_v2_cpu', 'deberta_v3_cpu')
KINDS = ('bert_base', 'roberta_base', 'electra_small', 'deberta_base', 'deberta_v2_xlarge', 'deberta_v3_base', *CPU)
SMALL = {'vocab': 310, 'length': 32, 'layers': 2, 'embed': 16, 'heads': 2, 'head_dim': 8, 'mlp': 32}


@pytest.mark.parametrize('name', [*COUNTS, *BODIES])
def test_parameter_counts_are_exact(name):
  specs = pretrain_encoder.task(ALL[name]()).specs
  if name in COUNTS:
    assert params.count(specs) == COUNTS[name]
    return
  body = specs.get('discriminator', specs)
  assert sum(params.count({k: v}) for k, v in body.items() if k not in ('mlm', 'rtd', 'decoder')) == BODIES[name]


def test_every_published_shape_is_counted():
  assert set(ALL) - set(COUNTS) - set(BODIES) == set(CPU)


@pytest.mark.parametrize('name', ALL)
def test_round_trip_and_documentation(name):
  c = ALL[name]()
  assert config.from_json(type(c), json.loads(json.dumps(config.to_json(c)))) == c
  assert ALL[name].__doc__
  assert 'training FLOPs' in look.describe(c, pretrain_encoder.task(c))


def shrink(c, **changes):
  """The config at toy size."""
  def small(model):
    if hasattr(model, 'generator'):
      return dataclasses.replace(model, generator=small(model.generator), discriminator=small(model.discriminator))
    fields = SMALL | ({'token_embed': 16} if model.token_embed else {})
    fields |= {'relative': 16, 'buckets': 8 * bool(model.buckets)} if hasattr(model, 'relative') else {}
    return dataclasses.replace(model, **fields)
  c = dataclasses.replace(c, model=small(c.model), data=dataclasses.replace(c.data, length=32, batch=8, copies=2))
  return config.replace(c, optim__warmup=1, optim__steps=3, loop__log_every=1, checkpoint__every=3, **changes)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """A corpus in two languages and a tokenizer with special tokens."""
  folder = tmp_path_factory.mktemp('encoders')
  rng = np.random.default_rng(0)
  words = 'the quick brown fox jumps over lazy dogs 敏捷 的 棕色 狐狸 跳过 懒狗'.split()
  texts = ['\n'.join(' '.join(rng.choice(words, 9)) + '.' for _ in range(12)) for _ in range(40)]
  (folder / 'text.jsonl').write_text('\n'.join(json.dumps({'text': t}) for t in texts), encoding='utf-8')
  training.train_sentencepiece(texts, folder / 'some.model', vocab=310, control_symbols=('[CLS]', '[SEP]', '[MASK]'))
  return folder


@pytest.mark.parametrize('name', few(KINDS))
def test_three_steps_of_each_kind(name, prepared, tmp_path):
  """Of each kind one: at toy size the other sizes of a paper are the same model. Those that run here have dropout,
  which is half of what compiles."""
  c = shrink(ALL[name](), data__corpus=str(prepared / 'text.jsonl'), data__tokenizer=str(prepared / 'some.model'),
             data__validation_fraction=0.2)
  c = c if name in CPU else dataclasses.replace(c, model=tiny.quiet(c.model))
  summary = run.run(c, pretrain_encoder.task(c), tmp_path / 'run')
  assert summary['steps'] == 3
  assert 4 < summary['val_loss'] < 8  # about log(310)
  assert 'val_bits_per_byte' not in summary
  assert c.checkpoint.metric in summary
  assert summary['parameters'] == params.count(pretrain_encoder.task(c).specs)
  assert 'already complete' in _said(lambda: run.run(c, pretrain_encoder.task(c), tmp_path / 'run'))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['electra_cpu'])  # it draws both
def test_a_run_that_resumes_draws_the_masks_and_replacements_of_the_straight_run(name, prepared, tmp_path, monkeypatch):
  c = shrink(ALL[name](), data__corpus=str(prepared / 'text.jsonl'), data__tokenizer=str(prepared / 'some.model'),
             data__validation_fraction=0.2)
  c = config.replace(c, optim__steps=4, checkpoint__every=2)
  tiny.share_compiled(monkeypatch)
  task = pretrain_encoder.task(c)
  losses = lambda place: [row['loss'] for row in run.logs.read(tmp_path / place) if 'loss' in row]
  run.run(c, task, tmp_path / 'straight')
  with pytest.raises(Preempted), tiny.batches_through(monkeypatch, tiny.signal_at(2)):
    run.run(c, task, tmp_path / 'resumed')
  assert len(losses('resumed')) < 4
  run.run(c, task, tmp_path / 'resumed')
  assert losses('resumed') == losses('straight')
  assert len(set(losses('straight'))) == 4


def _said(program):
  lines = []
  original, run.logs.say = run.logs.say, lines.append
  try:
    program()
  finally:
    run.logs.say = original
  return '\n'.join(lines)


def batch(rows=4, length=32):
  rng = np.random.default_rng(1)
  ids_BT = rng.integers(10, 310, (rows, length)).astype(np.int32)
  special_BT = np.zeros(ids_BT.shape, bool)
  special_BT[:, [0, 15, -1]] = True
  types_BT = np.broadcast_to(np.arange(length) > 15, ids_BT.shape).astype(np.int32)
  positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), ids_BT.shape)
  return inputs.Inputs(ids_BT, np.ones_like(ids_BT), types_BT, positions_BT, special_BT, rng.random(rows) < 0.5,
                       np.arange(rows, dtype=np.uint32))


TOKENS = masking.Tokens(mask=4, vocab=310, special=(0, 1, 2, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize('sharing', ['gdes', 'tied', 'untied'])
def test_gradients_of_detection_stop_at_the_generator(sharing):
  """Gradient-disentangled sharing: the discriminator's loss leaves the generator's parameters as they are."""
  c = shrink(deberta.deberta_v3_cpu())
  c = dataclasses.replace(c, model=dataclasses.replace(c.model, sharing=sharing))
  task = pretrain_encoder.task(c, TOKENS)
  p = jax.jit(lambda k: params.init(task.specs, k))(jax.random.key(0))
  detection = lambda p: task.loss(p, batch(), jax.random.key(2))[0]['discriminator'].total
  grads = params.flatten(jax.jit(jax.grad(detection))(p))
  moved = {path for path, g in grads.items() if path.startswith('generator/') and np.abs(g).max() > 0}
  assert moved == ({'generator/embed/tokens'} if sharing == 'tied' else set())
  own = 'discriminator/embed/tokens'
  assert (own in grads) == (sharing != 'tied')
  if own in grads:
    assert np.abs(grads[own]).max() > 0
  if sharing == 'gdes':
    assert not np.any(p['discriminator']['embed']['tokens'])  # the difference starts at 0


@pytest.mark.slow
def test_next_sentences_and_words_are_both_learned():
  c = config.replace(shrink(bert.bert_cpu()), optim__lr=1e-2, optim__warmup=5, optim__schedule='linear',
                     optim__steps=100)
  task = pretrain_encoder.task(c, TOKENS)
  parts = run.build(c, task)
  with run.sharding.use(parts.mesh):
    state = jax.jit(lambda k: run.train.init(task.specs, parts.tx, parts.trainable, k))(jax.random.key(0))
    first, some = None, jax.tree.map(jnp.asarray, batch(8))
    for _ in range(100):
      state, metrics = parts.step(state, some, jax.random.key(1))
      first = first or {k: float(v) for k, v in metrics.items()}
  assert float(metrics['loss']) < 0.9 * first['loss']
  assert float(metrics['nsp_loss']) < 0.5 * first['nsp_loss']


@pytest.mark.parametrize(('change', 'message'), [
    (dict(data__packing='stream'), "data.packing='stream'; expected a packing with special tokens"),
    (dict(data__length=64), 'data.length=64 is more than model.length=32 positions'),
    (dict(data__packing='full_sentences'), "nsp=True with data.packing='full_sentences'"),
    (dict(mesh__tensor=3), 'mesh.tensor=3 does not divide model.heads=2'),
    (dict(mesh__pipe=2, mesh__microbatches=3), 'mesh.microbatches=3'),
])
def test_what_does_not_go_together_is_refused(change, message):
  with pytest.raises(ConfigError, match=message.replace('.', r'\.').replace('?', r'\?')):
    config.replace(shrink(bert.bert_cpu()), **change)


def test_an_unbound_task_says_what_to_do():
  task = pretrain_encoder.task(shrink(bert.bert_cpu()))
  with pytest.raises(ConfigError, match='call task.bind'):
    task.loss({}, batch(), None)


def test_a_vocabulary_without_a_mask_token_is_refused(prepared, tmp_path):
  c = shrink(bert.bert_cpu(), data__corpus=str(prepared / 'text.jsonl'), data__tokenizer='byte')
  with pytest.raises(ConfigError, match='vocabulary without a mask token'):
    run.run(c, pretrain_encoder.task(c), tmp_path / 'run')


@pytest.mark.slow
def test_encoders_are_compared_and_a_pretraining_is_not_done_again(prepared, tmp_path):
  rng, rows = np.random.default_rng(0), []
  for i in range(96):
    label = 'yn'[i % 2]
    rows.append({'text': f'{" ".join(rng.choice(["the", "fox", "棕色"], 3))} {"quick" if i % 2 else "lazy"} {i}',
                 'label': label, 'split': 'train' if i % 3 else 'validation'})
  (tmp_path / 'reviews.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  argv = [sys.executable, '-m', 'experiments.encoders', f'--workdir={tmp_path}/w', f'--corpus={prepared}/text.jsonl',
          f'--reviews={tmp_path}/reviews.jsonl', f'--tokenizer={prepared}/some.model', *(
              f'--set={field}' for field in ('vocab=310', 'layers=1', 'embed=12', 'heads=3', 'steps=2', 'epochs=15',
                                             'seeds=2', 'review=16', 'tuning_lr=1e-2'))]
  found = []
  for _ in range(2):
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=pathlib.Path(__file__).parent.parent,
                          env=os.environ | {'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache')})
    found.append((done.stdout, json.loads((tmp_path / 'w/results.json').read_text())))
  (_, results), (out, again) = found
  assert [(r['name'], r.get('equal')) for r in results] == [
      ('none', None), ('masked words', 'tokens'), ('replaced tokens', 'tokens'), ('DeBERTa', 'tokens'),
      ('replaced tokens', 'FLOPs'), ('DeBERTa', 'FLOPs')]
  assert all(len(r['accuracies']) == 2 and r['accuracy'] == np.mean(r['accuracies']) for r in results)
  assert results[0]['accuracy'] > 0.9  # one word decides
  assert [r['accuracies'] for r in results] == [r['accuracies'] for r in again]
  assert out.count('already complete') == 5 and (tmp_path / 'w/encoders.png').stat().st_size > 1000
  assert (tmp_path / 'w/table.md').read_text() in out
