"""Fine-tuning as a run: records to rows to a trained, resumable workdir, in full and by few parameters."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
from marks import slow
import numpy as np
import pytest
import tiny

from lm import (
  checkpoint,
  classification,
  config,
  decode,
  instruct,
  loop,
  nn,
  optim,
  params,
  peft,
  run,
  sampler,
  seal,
  sharding,
  weights,
)
from lm.data import conversations, labelled, memory
from lm.errors import CheckpointError, ConfigError, DataError, Preempted
from lm.losses import classify
from lm.models import deberta, decoder, encoder, hf
from lm.text import training

SHAPE = dict(length=64, layers=2, embed=16, heads=2, head_dim=8, mlp=32)
CHAT = decoder.Config(vocab=384, kv_heads=2, **SHAPE)
EVERY = dict(loop=loop.Config(log_every=1, eval_every=4), checkpoint=checkpoint.Config(every=4))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('tuning')
  texts = ['good film 好电影 bad film 坏电影 the a of'] * 20
  training.train_sentencepiece(texts, root / 'x.model', vocab=282, control_symbols=('[CLS]', '[SEP]', '[MASK]'))
  rows = [{'text': f'{"good" if i % 2 else "bad"} film {i}', 'label': 'positive' if i % 2 else 'negative',
           'split': 'train' if i % 5 else 'validation'} for i in range(80)]
  (root / 'films.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  talks = [{'messages': [{'role': 'user', 'content': f'say {word} {i}'}, {'role': 'assistant', 'content': word * 2}]}
           for i in range(30) for word in ('ja', '好')]
  (root / 'chat.jsonl').write_text('\n'.join(json.dumps(t, ensure_ascii=False) for t in talks))
  return root


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
  tiny.share_compiled(monkeypatch)
  monkeypatch.setattr('lm.budget.peak_flops', lambda device: 1e9)


@pytest.fixture(scope='module')
def base(root):
  """A decoder that is there to be tuned, as transformers would save it."""
  c = dataclasses.replace(CHAT, vocab=258)
  hf.save(root / 'base', c, jax.device_get(jax.jit(lambda key: params.init(decoder.specs(c), key))(jax.random.key(3))))
  return root / 'base'


def chat_config(root, **changes):
  c = instruct.Config(
      model=dataclasses.replace(CHAT, vocab=258), data=conversations.Config(
          corpus=str(root / 'chat.jsonl'), tokenizer='byte', template='plain', length=32, batch=4,
          validation_fraction=0.2),
      optim=optim.Config(lr=0.02, steps=8, warmup=1, weight_decay=0.0), **EVERY)
  return config.replace(c, **changes)


def films(root, kind=classification.Encoder, **changes):
  model = {classification.Encoder: encoder.Config(vocab=300, scan_layers=False, **SHAPE),
           classification.Disentangled: deberta.Config(vocab=300, relative=8, **SHAPE),
           classification.Decoder: decoder.Config(vocab=300, kv_heads=2, **SHAPE)}[kind]
  c = kind(model=model, data=labelled.Config(corpus=str(root / 'films.jsonl'), tokenizer=str(root / 'x.model'),
                                             length=16, batch=8),
           optim=optim.Config(lr=0.02, steps=24, warmup=1, weight_decay=0.0), loop=loop.Config(eval_every=12),
           checkpoint=checkpoint.Config(every=12, metric='val_accuracy', mode='max'))
  return config.replace(c, **changes)


@pytest.mark.slow
@pytest.mark.parametrize('kind', [classification.Decoder, *map(slow, (
    classification.Encoder, classification.Disentangled))])
def test_a_word_that_decides_is_learned(kind, root, tmp_path):
  c = films(root, kind)
  task = classification.task(c)
  summary = run.run(c, task, tmp_path)
  assert summary['val_accuracy'] == 1.0 and summary['best']['val_accuracy'] == 1.0
  assert run.run(c, task, tmp_path)['val_accuracy'] == 1.0  # complete: the data is recognised
  labels_N, classes_N, _ = classification.predictions(config.replace(c, loop__eval_batch=12), tmp_path)
  assert sorted(labels_N) == [0] * 8 + [1] * 8 and labels_N.tolist() == classes_N.tolist()


@pytest.mark.slow
@pytest.mark.parametrize('pooling, method', [('pooler', 'lora'), ('mean', 'houlsby'), ('first', 'top'),
                                             ('mean', 'pfeiffer')])
def test_few_parameters_learn_it_too(pooling, method, root, tmp_path):
  few = peft.Config(method, train='^(classify|pooler)/', rank=4, width=8, length=4, hidden=16, layers=1,
                    targets='^blocks/(attn/[qkvo]|mlp/(up|down))$')
  c = films(root, peft=few, pooling=pooling, optim__lr=0.03, optim__steps=60, loop__eval_every=60)
  summary = run.run(c, classification.task(c), tmp_path)
  assert summary['val_accuracy'] > 0.9
  labels_N, classes_N, names = classification.predictions(c, tmp_path)
  assert names == ('negative', 'positive') and len(labels_N) == 16
  assert (labels_N == classes_N).mean() == pytest.approx(summary['best']['val_accuracy'])
  assert len(checkpoint.read_meta(tmp_path / 'checkpoints', 60)['base']) == 16


@pytest.mark.slow
@pytest.mark.parametrize('method', ['prefix', 'prompt'])
def test_virtual_positions_learn(method, root, tmp_path):
  """Before weights that know nothing they cannot do much: the loss of the rows trained on falls."""
  c = films(root, peft=peft.Config(method, length=4, hidden=16), optim__lr=0.03, loop__log_every=1)
  run.run(c, classification.task(c), tmp_path)
  losses = [json.loads(line)['loss'] for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert np.mean(losses[-8:]) < np.mean(losses[:8])


@pytest.mark.slow
def test_a_checkpoint_holds_what_trains_and_the_base_is_known(root, base, tmp_path):
  lora = peft.Config('lora', train='', rank=2, targets='attn/[qv]$')
  base = pathlib.Path(shutil.copytree(base, tmp_path / 'base'))
  c = chat_config(root, init_from=str(base), peft=lora)
  summary = run.run(c, instruct.task(c), tmp_path / 'a')
  stored = seal.read(tmp_path / 'a/checkpoints', 8)['leaves']
  assert all('lora_' in path or path.split('/')[0] in ('step', 'skipped', 'opt_state') for path in stored)
  assert summary['val_loss'] < json.loads((tmp_path / 'a/metrics.jsonl').read_text().splitlines()[3])['val_loss']
  found = weights.load(tmp_path / 'a')
  assert jax.tree.structure(found.params) == jax.tree.structure(hf.load(base)[1])  # merged
  given = hf.load(base)[1]
  np.testing.assert_array_equal(found.params['blocks']['mlp']['up'], given['blocks']['mlp']['up'])
  assert np.abs(np.asarray(found.params['blocks']['attn']['q'] - given['blocks']['attn']['q'])).max() > 1e-3
  other = jax.tree.map(lambda w: w + 1e-3, given)
  hf.save(root / 'other', c.model, other)
  moved = config.replace(c, init_from=str(root / 'other'))
  with pytest.raises(CheckpointError, match='other weights than this run began with'):
    run.run(config.replace(moved, optim__steps=10), instruct.task(moved), tmp_path / 'a', resume_with_changes=True)
  shutil.rmtree(base)
  hf.save(base, c.model, other)
  with pytest.raises(CheckpointError, match='its frozen weights, .*base.*, are not those it was trained with'):
    weights.load(tmp_path / 'a')


@pytest.mark.slow
def test_a_stopped_run_resumes_as_if_it_had_not(root, base, tmp_path):
  c = chat_config(root, init_from=str(base), peft=peft.Config('lora', train='', rate=0.3, rank=2),
                  model__dropout=nn.Dropout(0.1, 0.1, 0.1))
  whole = run.run(c, instruct.task(c), tmp_path / 'whole')
  stopped = tmp_path / 'stopped'
  original = conversations.train_batches

  def interrupted(data, sharding, start=0):
    for n, batch in enumerate(original(data, sharding, start), start + 1):
      if n == 5:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch
  with pytest.MonkeyPatch.context() as m, pytest.raises(Preempted, match='step 5 is saved'):
    m.setattr(conversations, 'train_batches', interrupted)
    run.run(c, instruct.task(c), stopped)
  again = run.run(c, instruct.task(c), stopped)
  assert again['val_loss'] == whole['val_loss']


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_wordings(root, tmp_path, monkeypatch):
  c = films(root, data__augment=('typos:0.5', 'case'), data__augment_share=0.9, optim__steps=12, loop__log_every=1)
  losses = lambda place: [json.loads(line)['loss'] for line in (tmp_path / place / 'metrics.jsonl').open()]
  run.run(c, classification.task(c), tmp_path / 'straight')
  original = labelled.train_batches

  def interrupted(data, sharding, start=0):
    for n, batch in enumerate(original(data, sharding, start), start + 1):
      if n == 10:  # in the second epoch
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch
  with monkeypatch.context() as m, pytest.raises(Preempted, match='step 10 is saved'):
    m.setattr(labelled, 'train_batches', interrupted)
    run.run(c, classification.task(c), tmp_path / 'stopped')
  with pytest.raises(ConfigError, match='data.augment'):
    run.run(config.replace(c, data__augment=()), classification.task(c), tmp_path / 'stopped')
  run.run(c, classification.task(c), tmp_path / 'stopped')
  assert losses('stopped') == losses('straight')
  c = config.replace(c, data__augment=())
  run.run(c, classification.task(c), tmp_path / 'plain')
  assert losses('plain') != losses('straight')


@pytest.mark.slow
def test_on_a_mesh_it_is_the_same_run(root, base, tmp_path):
  losses = []
  for mesh in ({}, dict(data=2, fsdp=2, tensor=2)):
    c = chat_config(root, init_from=str(base), peft=peft.Config('lora', train='', rank=2, rate=0.2),
                    mesh=sharding.Config(**mesh))
    losses.append(run.run(c, instruct.task(c), tmp_path / str(len(losses)))['val_loss'])
  assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['prefix', 'full', 'houlsby', 'top', 'prompt'])
def test_a_tuned_decoder_decodes_as_it_was_trained(method, root, base, tmp_path):
  """The loaded model's logits with a cache are those of the forward pass that training used."""
  few = peft.Config(method, train='', length=3, hidden=8, width=4, layers=1)
  c = chat_config(root, init_from=str(base), peft=few, data__pack=False)
  run.run(c, instruct.task(c), tmp_path)
  found = weights.load(tmp_path)
  ids_BT = jnp.array([[5, 6, 7, 8, 9]]) if method != 'prompt' else jnp.array([[258, 259, 260, 5, 6, 7, 8, 9]])

  def cached(p):
    cache = decoder.init_cache(found.config, 1, ids_BT.shape[1])
    return decoder.apply(p, found.config, ids_BT, cache=cache)[0]
  whole = jax.jit(lambda p: decoder.apply(p, found.config, ids_BT))(found.params)
  np.testing.assert_allclose(jax.jit(cached)(found.params), whole, atol=1e-5)
  if method != 'prompt':
    model = decode.of(decoder, found.config)
    p = decode.prepare(found.params)
    sample = decode.generate(model, p, [[5, 6, 7]], sampler.Sampling(4, 0.0), jax.random.key(0))
    assert sample.tokens_BT.shape == (1, 4)


def test_label_smoothing_is_a_mixture_with_the_uniform_distribution():
  logits_BC = jnp.array([[1.0, -2.0, 0.5], [0.0, 0.3, 2.0]])
  found, _ = classify.loss(lambda key: logits_BC, jnp.array([2, 0]), None, smoothing=0.1)
  target = 0.9 * np.eye(3)[[2, 0]] + 0.1 / 3
  want = -(target * np.asarray(jax.nn.log_softmax(logits_BC))).sum()
  assert float(found['nll'].total) == pytest.approx(want, rel=1e-6)


def test_order_of_rows_is_a_function_of_seed_and_epoch(root):
  c = films(root).data
  data, again, other = (labelled.prepare(c, '', seed) for seed in (0, 0, 1))
  np.testing.assert_array_equal(memory.order(data, 3), memory.order(again, 3))
  assert not np.array_equal(memory.order(data, 0), memory.order(data, 1))
  assert not np.array_equal(memory.order(data, 0), memory.order(other, 0))
  assert data.fingerprint == again.fingerprint != other.fingerprint
  assert sorted(memory.order(data, 0)) == list(range(data.rows('train')))


@pytest.mark.parametrize('change, error, message', [
    (dict(data__corpus=''), ConfigError, 'data.corpus is empty'),
    (dict(data__tokenizer=''), ConfigError, 'data.tokenizer is empty'),
    (dict(model__vocab=100), ConfigError, 'model.vocab=100: the tokenizer has'),
    (dict(data__batch=512), DataError, 'less than one batch of data.batch=512'),
    (dict(data__classes=('good', 'bad')), DataError, 'label'),
    (dict(classes=3), ConfigError, 'classes=3: the data has 2 labels, negative, positive; expected as many'),
    (dict(data__classes=('negative', 'none', 'positive')), ConfigError, 'classes=2: the data has 3 labels'),
    (dict(data__pack=True, classes=5), ConfigError, 'classes=5: the data has 2')], ids=str)
def test_what_does_not_fit_is_refused_before_anything_is_compiled(change, error, message, root, tmp_path):
  c = films(root, **change)
  with pytest.raises(error) as raised:
    run.run(c, classification.task(c), tmp_path)
  assert message in str(raised.value)


@pytest.mark.parametrize('change, message', [
    (dict(pooling='last'), "pooling='last'"), (dict(classes=1), 'classes=1'), (dict(smoothing=1.0), 'smoothing=1.0'),
    (dict(data__longest=2), 'data.longest=2'), (dict(data__longest=-9), 'data.longest=-9'),
    (dict(data__pack=True, data__augment=('typos',)), 'data.augment=()'),
    (dict(data__pack=True, peft=peft.Config('prompt')), 'data.pack=False'),
    (dict(data__length=65), 'data.length=65 is more than'), (dict(data__length=2), 'data.length=2'),
    (dict(data__length=60, peft=peft.Config('prefix', length=10)), 'less peft.length=10')], ids=str)
def test_mistakes_in_a_config(change, message, root):
  with pytest.raises(ConfigError) as raised:
    films(root, **change)
  assert message in str(raised.value)


def test_a_prompt_needs_a_row_of_its_own(root):
  with pytest.raises(ConfigError, match='data.pack=False'):
    chat_config(root, peft=peft.Config('prompt'))


def test_r_drop_is_two_passes_and_their_divergence():
  labels_B = jnp.array([2, 0])
  tables = jnp.array([[[1.0, -2.0, 0.5], [0.0, 0.3, 2.0]], [[0.2, 0.1, 0.9], [1.0, 0.0, -1.0]]])
  passes = []

  def logits(key):
    passes.append(key)
    return tables[len(passes) - 1]
  terms, _ = classify.loss(logits, labels_B, jax.random.key(0), consistency=4.0)
  assert len(passes) == 2 and not np.array_equal(*map(jax.random.key_data, passes))
  p, q = np.asarray(jax.nn.softmax(tables))
  want = 0.5 * ((p * np.log(p / q)).sum() + (q * np.log(q / p)).sum())
  assert float(terms['consistency'].total) == pytest.approx(want, rel=1e-5) and terms['consistency'].scale == 4.0
  nll = -np.log([p[0, 2] * q[0, 2], p[1, 0] * q[1, 0]]).sum() / 2
  assert float(terms['nll'].total) == pytest.approx(nll, rel=1e-5)
  passes.clear()
  assert 'consistency' not in classify.loss(logits, labels_B, None, consistency=4.0)[0] and len(passes) == 1


def test_folds_are_runs_of_their_own(root):
  c = films(root).data
  rows = [{labelled.prepare(dataclasses.replace(c, folds=4, fold=i), '').splits['validation'].ids_BT.tobytes()}
          for i in range(4)]
  assert len(set().union(*rows)) == 4
  sizes = [labelled.prepare(dataclasses.replace(c, folds=4, fold=i), '').rows('validation') for i in range(4)]
  assert sum(sizes) == 80
  with pytest.raises(ConfigError, match='data.folds=4, data.fold=4'):
    dataclasses.replace(c, folds=4, fold=4)


@pytest.mark.slow
def test_repeat_says_how_sure_the_mean_is(root, tmp_path):
  sets = {'data.corpus': root / 'films.jsonl', 'data.tokenizer': root / 'x.model', 'data.length': 16, 'data.batch': 8,
          'model.vocab': 300, 'model.length': 32, 'model.layers': 2, 'model.embed': 16, 'model.heads': 2,
          'model.head_dim': 8, 'model.mlp': 32, 'optim.steps': 20, 'optim.warmup': 2, 'optim.lr': 0.02,
          'loop.eval_every': 10}
  argv = [sys.executable, '-m', 'scripts.repeat', '--experiment=adapters', '--config=minilm', '--folds=2', '--seeds=1',
          f'--workdir={tmp_path / "r"}', *(f'--set={k}={v}' for k, v in sets.items())]
  done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=pathlib.Path(__file__).parent.parent)
  assert len(json.loads((tmp_path / 'r/results.json').read_text())) == 2
  assert 'accuracy: ' in done.stdout and '95% interval' in done.stdout and '(2 folds, 2 runs)' in done.stdout
  assert (tmp_path / 'r/confusion.png').stat().st_size > 1000 and (tmp_path / 'r/curves.png').stat().st_size > 1000
