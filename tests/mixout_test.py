"""Mixout against the paper's equation and its expectation; and as a run: what it draws, freezes and saves."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm import (
  checkpoint,
  classification,
  config,
  instruct,
  loop,
  mixout,
  nn,
  optim,
  params,
  peft,
  run,
  seal,
  sharding,
  start,
  train,
  weights,
)
from lm.data import conversations, labelled
from lm.errors import CheckpointError, ConfigError
from lm.models import blocks, deberta, decoder, encoder, hf
from lm.peft_nodes import Mixed
from lm.text import training

MODEL = decoder.Config(vocab=258, length=64, layers=2, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32)
MIXED = {'blocks/attn/q', 'blocks/attn/k', 'blocks/attn/v', 'blocks/attn/o', 'blocks/mlp/up', 'blocks/mlp/down'}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  tiny.share_compiled(monkeypatch)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('mixout')
  talks = [{'messages': [{'role': 'user', 'content': f'say {word} {i}'}, {'role': 'assistant', 'content': word * 2}]}
           for i in range(30) for word in ('ja', '好')]
  (root / 'chat.jsonl').write_text('\n'.join(json.dumps(t, ensure_ascii=False) for t in talks))
  for name, seed in (('base', 3), ('other', 4)):
    hf.save(root / name, MODEL, jax.device_get(params.init(decoder.specs(MODEL), jax.random.key(seed))))
  return root


def chat(root, **changes):
  c = instruct.Config(
      model=MODEL, data=conversations.Config(corpus=str(root / 'chat.jsonl'), tokenizer='byte', template='plain',
                                             length=32, batch=8, validation_fraction=0.2),
      init_from=str(root / 'base'), peft=peft.Config(train='', mixout=0.6),
      optim=optim.Config(lr=0.02, steps=8, warmup=1, weight_decay=0.0), loop=loop.Config(log_every=1, eval_every=4),
      checkpoint=checkpoint.Config(every=4))
  return config.replace(c, **changes)


def node(rate, shape=(400, 12), seed=0):
  rng = np.random.default_rng(seed)
  return Mixed(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2)), rate)


@pytest.mark.parametrize('rate', [0.3, 0.9])
def test_each_row_is_one_of_the_two_that_the_paper_writes(rate):
  """All that leads out of an input: the authors' code draws one number a column of torch's [out, in]."""
  n = node(rate)
  found = np.asarray(mixout.mix({'w': n}, jax.random.key(1))['w'])
  w, base = np.asarray(n.w), np.asarray(n.base)
  kept, fallen = (w - rate * base) / (1 - rate), base
  is_kept, is_fallen = np.isclose(found, kept, atol=1e-5), np.isclose(found, fallen, atol=1e-5)
  assert (is_kept.all(1) ^ is_fallen.all(1)).all()
  assert is_fallen.all(1).mean() == pytest.approx(rate, abs=0.08)


def test_its_expectation_is_the_weight():
  n = node(0.6, (8, 6))
  keys = jax.random.split(jax.random.key(0), 4000)
  mean = jax.vmap(lambda key: mixout.mix({'w': n}, key)['w'])(keys).mean(0)
  error = np.abs(n.w - n.base).max() * np.sqrt(0.6 / 0.4 / 4000)  # of a Bernoulli's mean
  np.testing.assert_allclose(mean, n.w, atol=5 * error)


def test_the_gradient_is_of_what_was_kept():
  """dL/dw is g / (1 - p) where the weight is w, and 0 where it is the pretrained one."""
  n = node(0.5)
  g = jax.grad(lambda w: mixout.mix({'w': n.replace(w=w)}, jax.random.key(1))['w'].sum())(n.w)
  fallen = np.isclose(mixout.mix({'w': n}, jax.random.key(1))['w'], n.base, atol=1e-6)
  np.testing.assert_allclose(g, np.where(fallen, 0.0, 2.0), atol=1e-6)


def test_keys_decide_and_none_is_the_weight_itself():
  layer = {'a': node(0.5), 'b': node(0.5), 'scale': jnp.ones(3)}
  one, again, other = (mixout.mix(layer, jax.random.key(k)) for k in (1, 1, 2))
  np.testing.assert_array_equal(one['a'], again['a'])
  assert not np.array_equal(one['a'], other['a'])
  same = np.isclose(one['a'], layer['a'].base, atol=1e-6), np.isclose(one['b'], layer['b'].base, atol=1e-6)
  assert 0.4 < (same[0].all(1) == same[1].all(1)).mean() < 0.6  # masks of two weights are independent
  rows = mixout.mix(layer, nn.Keys(jax.random.key(1), jnp.arange(4)))
  np.testing.assert_array_equal(rows['a'], one['a'])
  quiet = mixout.mix(layer, None)
  assert quiet['a'] is layer['a'].w and quiet['scale'] is layer['scale']


def test_layers_draw_their_own_masks_scanned_or_not():
  stacked = {'w': node(0.5, (3, 8, 8))}
  seen = lambda scan: mixout.stack(blocks.LOCAL).run(
      stacked, lambda layer, x, rows, key: x + layer['w'], jnp.zeros((8, 8)), None, jax.random.key(0),
      scan_layers=scan, remat='none')
  want = sum(mixout.mix({'w': stacked['w'].replace(w=stacked['w'].w[i], base=stacked['w'].base[i])},
                        jax.random.fold_in(jax.random.key(0), i))['w'] for i in range(3))
  np.testing.assert_allclose(seen(True), want, atol=1e-5)
  np.testing.assert_allclose(seen(False), want, atol=1e-5)


@pytest.mark.slow
def test_the_block_beside_a_convolution_is_mixed_too():
  c = deberta.Config(vocab=20, length=8, layers=1, embed=8, heads=2, head_dim=4, mlp=16, relative=4, conv=3,
                     dropout=nn.Dropout())
  specs = mixout.specs(0.5, deberta.specs(c))
  p = params.init(specs, jax.random.key(0))
  run_once = lambda key: deberta.apply(p, c, jnp.arange(8)[None], key=key, stack=mixout.stack(blocks.LOCAL))
  quiet, one, other = run_once(None), run_once(jax.random.key(1)), run_once(jax.random.key(2))
  assert not np.allclose(one, other, atol=1e-4) and not np.allclose(one, quiet, atol=1e-4)


def test_the_disk_is_asked_for_what_checkpoints_hold(root, tmp_path, monkeypatch):
  c, asked = chat(root, init_from=str(root / 'base')), []

  def preflight(folder, nbytes, *rest):
    asked.append(nbytes)
    raise CheckpointError('enough')
  monkeypatch.setattr(run.checkpoint_lib, 'preflight', preflight)
  with pytest.raises(CheckpointError, match='enough'):
    run.run(c, instruct.task(c), tmp_path)
  trained = params.count(decoder.specs(c.model))
  assert 0 <= asked[0] - 12 * trained < 100  # f32 and two moments; not what it falls back to


def test_only_matrices_of_the_blocks_are_mixed(root):
  task = instruct.task(chat(root))
  nodes = {path.removesuffix('/base') for path in params.flatten(task.specs) if path.endswith('/base')}
  assert nodes == MIXED
  inputs = {path: task.specs['blocks'][path.split('/')[1]][path.split('/')[2]].inputs for path in nodes}
  assert inputs == dict.fromkeys(MIXED, 1) | {'blocks/attn/o': 2}
  trainable = optim.trainable_mask(optim.Config(freeze=task.base.freeze), task.specs)
  assert {path for path, yes in params.flatten(trainable).items() if not yes} == {f'{path}/base' for path in MIXED}


@pytest.mark.parametrize('changes, message', [
    (dict(init_from=''), "peft.mixout=0.6 with init_from=''"), (dict(optim__freeze='^embed/'), 'optim.freeze'),
    (dict(optim__freeze='^embed/', peft=peft.Config('lora')), "optim.freeze='^embed/' with peft.method='lora'"),
    (dict(peft__method='lora'), 'peft.method'), (dict(peft__mixout=1.0), 'peft.mixout=1.0; expected 0 <= mixout < 1')])
def test_mistakes_in_a_config(changes, message, root):
  with pytest.raises(ConfigError) as raised:
    chat(root, **changes)
  assert message in str(raised.value)


@pytest.mark.slow
def test_a_run_saves_what_trains_and_knows_its_base(root, tmp_path):
  """It resumes bit for bit, refuses another base, and is sampled without any."""
  shutil.copytree(root / 'base', tmp_path / 'base')
  c = chat(root, init_from=str(tmp_path / 'base'), optim__schedule='constant')
  task = instruct.task(c)
  run.run(c, task, tmp_path / 'straight')
  stored = seal.read(tmp_path / 'straight/checkpoints', 8)['leaves']
  assert not any(path.endswith('/base') for path in stored) and 'params/blocks/attn/q/w' in stored
  run.run(config.replace(c, optim__steps=4), task, tmp_path / 'stopped')
  run.run(c, task, tmp_path / 'stopped', resume_with_changes=True)
  found = weights.load(tmp_path / 'stopped').params, weights.load(tmp_path / 'straight').params
  jax.tree.map(np.testing.assert_array_equal, *found)
  shutil.rmtree(tmp_path / 'base')
  jax.tree.map(np.testing.assert_array_equal, weights.load(tmp_path / 'straight').params, found[1])
  assert jax.tree.structure(found[1]) == jax.tree.structure(hf.load(root / 'base')[1])
  shutil.copytree(root / 'other', tmp_path / 'base')
  with pytest.raises(CheckpointError, match='other weights than this run began with'):
    run.run(config.replace(c, optim__steps=10), task, tmp_path / 'stopped', resume_with_changes=True)


@pytest.mark.slow
def test_microbatches_and_meshes_draw_the_same(root):
  """After three steps at a high rate, so that there is something to mix."""
  losses = []
  for changes in ({}, dict(optim__microbatches=2), dict(mesh=sharding.Config(data=2, fsdp=2, tensor=2)),
                  dict(mesh=sharding.Config(pipe=2, data=2, fsdp=2))):
    c = chat(root, optim__lr=0.05, optim__warmup=0, **changes)
    task = instruct.task(c)
    parts = run.build(c, task)
    data = task.source.prepare(c.data, '', seed=0)
    batches = task.source.train_batches(data, sharding.batch_sharding(parts.mesh), 0)
    with sharding.use(parts.mesh):
      state = start.first(c, task, parts)
      for _ in range(4):
        state, metrics = parts.step(state, next(batches), jax.random.key(1))
    batches.close()
    losses.append(float(metrics['objective']))
  assert losses[1] == pytest.approx(losses[0], rel=1e-5)
  assert losses[2:] == [pytest.approx(losses[0], rel=1e-4)] * 2


@pytest.mark.slow
def test_evaluation_draws_nothing(root):
  """Neither masks of Mixout nor LoRA's dropout, although an evaluation has a key."""
  for few in (peft.Config(train='', mixout=0.6), peft.Config('lora', train='', rank=2, rate=0.5)):
    c = chat(root, peft=few)
    task = instruct.task(c)
    given = peft.graft(hf.load(root / 'base')[1], task.specs, jax.random.key(0))
    p = params.map_with_path(lambda path, x: x if path.endswith('/base') else x + 0.1, given)
    data = task.source.prepare(c.data, '', seed=0)
    batches = task.source.eval_batches(data, 'validation', 8, sharding.batch_sharding(sharding.make_mesh(c.mesh)))
    batch = next(batches)
    batches.close()
    evaluate, loss = jax.jit(train.make_eval(task.eval_loss)), jax.jit(train.make_eval(task.loss))
    totals = [float(evaluate(p, batch, key)['loss'].total) for key in (None, jax.random.key(1), jax.random.key(2))]
    assert totals[0] == totals[1] == totals[2] != float(loss(p, batch, jax.random.key(1))['loss'].total)
    same = [float(f(given, batch, jax.random.key(1))['loss'].total) for f in (evaluate, loss)]
    assert same[0] == pytest.approx(same[1], rel=1e-5)  # until a weight has moved there is nothing to mix


@pytest.mark.slow
def test_an_encoder_is_classified_with_it(root, tmp_path):
  training.train_sentencepiece(['good film 好电影 bad film 坏电影 the a of'] * 20, root / 'x.model', vocab=282,
                                 control_symbols=('[CLS]', '[SEP]', '[MASK]'))
  rows = [{'text': f'{"good" if i % 2 else "bad"} film {i}', 'label': str(i % 2), 'split': 'train' if i % 5 else
           'validation'} for i in range(80)]
  (root / 'films.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  model = encoder.Config(vocab=282, length=32, layers=2, embed=16, heads=2, head_dim=8, mlp=32)
  hf.save(root / 'encoder', model, jax.device_get(params.init(encoder.specs(model), jax.random.key(0))))
  c = classification.Encoder(
      model=model, init_from=str(root / 'encoder'), peft=peft.Config(train='^classify/', mixout=0.5),
      data=labelled.Config(corpus=str(root / 'films.jsonl'), tokenizer=str(root / 'x.model'), length=16, batch=8),
      optim=optim.Config(lr=0.02, steps=24, warmup=1, weight_decay=0.0), loop=loop.Config(eval_every=12),
      checkpoint=checkpoint.Config(every=12, metric='val_accuracy', mode='max'))
  summary = run.run(c, classification.task(c), tmp_path / 'run')
  assert summary['val_accuracy'] == 1.0
  labels_N, classes_N, _ = classification.predictions(c, tmp_path / 'run')
  np.testing.assert_array_equal(labels_N, classes_N)
