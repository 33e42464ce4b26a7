"""Few parameters on any mesh are those of one device: loss and gradients of a step of every objective."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import parallel_test as parallel
import pytest
import tiny

from lm import (
  classification,
  instruct,
  nn,
  optim,
  params,
  peft,
  preference,
  pretrain,
  pretrain_encoder,
  run,
  samples,
  sharding,
  train,
)
from lm.data import conversations, framing, labelled, preferences
from lm.data.packing import Batch
from lm.errors import ConfigError
from lm.models import decoder, encoder

B, T, V = 8, 12, 64
SHAPE = dict(vocab=V, length=T + 4, layers=2, embed=16, heads=4, head_dim=4, mlp=32, scan_layers=True)
QUIET = decoder.Config(**SHAPE, kv_heads=2)  # grouped: a prefix has fewer heads than queries
MODEL = dataclasses.replace(QUIET, dropout=nn.Dropout(0.1, 0.1, 0.1))
# No bound on the norm: AdamW's first moment after a step is the gradient times 1 - b1.
OPTIM = optim.Config(lr=3e-3, schedule='constant', steps=9, clip=0.0)
DATA = dict(length=T, batch=B)
METHODS = {
    'lora': peft.Config('lora', train='', rank=3, rate=0.1, targets='^blocks/(attn/[qkvo]|mlp/(up|down))$'),
    'houlsby': peft.Config('houlsby', train='', width=5), 'pfeiffer': peft.Config('pfeiffer', train='', width=5),
    'prefix': peft.Config('prefix', train='', length=3, hidden=0),
    'prefix by an MLP': peft.Config('prefix', train='', length=3, hidden=6),
    'prompt': peft.Config('prompt', train='', length=3), 'top': peft.Config('top', train='', layers=1)}
MESHES = {'one': {}, 'fsdp 2 tensor 2': dict(fsdp=2, tensor=2), 'pipe 2 data 2': dict(pipe=2, data=2)}


def rows(seed, lead=(B,), segments=2):
  """Documents and padding; unequal numbers of targets, none in the first row."""
  rng = np.random.default_rng(seed)
  shape = (*lead, T + 1)
  segments_BT = np.sort(rng.integers(0, segments + 1, shape), axis=-1)[..., ::-1].astype(np.int32)
  segments_BT[..., 0] = np.maximum(segments_BT[..., 0], 1)
  positions_BT = np.broadcast_to(np.arange(T + 1, dtype=np.int32), shape)
  mask_BT = (rng.random(shape) < 0.6) & (segments_BT > 0)
  mask_BT[0] = mask_BT[..., 0] = False
  return Batch(rng.integers(0, V, shape).astype(np.int32), segments_BT, positions_BT.copy(), mask_BT)


def conversation(method, mesh, seed):
  few = METHODS[method]
  c = instruct.Config(model=MODEL, data=conversations.Config(**DATA, pack=method != 'prompt'), peft=few, optim=OPTIM,
                      mesh=sharding.Config(**mesh), samples=samples.Config(count=0))
  return c, instruct.task(c), rows(seed, segments=1 if method == 'prompt' else 2)


def classes(method, mesh, seed):
  model = encoder.Config(**SHAPE, dropout=nn.Dropout(0.1, 0.1, 0.1, 0.1))
  few = dataclasses.replace(METHODS[method], train='^classify/')
  c = classification.Encoder(model=model, data=labelled.Config(**DATA), peft=few, optim=OPTIM, classes=3,
                             mesh=sharding.Config(**mesh))
  row, labels_B = rows(seed, segments=1), np.random.default_rng(seed).integers(0, 3, B).astype(np.int32)
  labels_B[-1] = -1
  return c, classification.task(c), framing.Labelled(row.ids_BT, row.segments_BT, labels_B)


def preference_pairs(method, mesh, seed):
  few = dataclasses.replace(METHODS[method], rate=0.0)
  c = preference.Config(model=QUIET, data=preferences.Config(**DATA), peft=few, optim=OPTIM,
                        mesh=sharding.Config(**mesh), samples=samples.Config(count=0))
  rng = np.random.default_rng(seed)
  ranked = preferences.Ranked(rows(seed, (B, 2), segments=1), rng.random((B, 2)).astype(np.float32),
                              np.ones((B, 2), bool))
  reference_NK = ranked.answers.mask_BT.sum(-1) * rng.uniform(-5, -3, (B, 2))
  return c, preference.task(c), preference.Referred(ranked, reference_NK.astype(np.float32))


def pretraining(kind, method, mesh, seed):
  """Without the models' own dropout, which `parallel_test` has and which is half of what compiles."""
  few, c = METHODS.get(method, method), parallel.KINDS[kind]
  c = dataclasses.replace(c, model=tiny.quiet(c.model), peft=few, optim=OPTIM, mesh=sharding.Config(**mesh))
  task = pretrain.task(c) if isinstance(c, pretrain.Config) else pretrain_encoder.task(c, parallel.TOKENS)
  return c, task, parallel.make_batch(kind, seed)


documents, words, disentangled, pair = (functools.partial(pretraining, kind) for kind in (
    'decoder', 'bert', 'deberta', 'electra'))


@functools.cache
def curve(make, method, mesh):
  """Of two steps."""
  c, task, batch = make(method, MESHES[mesh], 0)
  parts = run.build(c, task, jax.devices()[:c.mesh.devices])
  place, key = sharding.batch_sharding(parts.mesh), jax.random.key(7)
  with sharding.use(parts.mesh):
    state, metrics = jax.device_get(parts.step(parallel.initial(task, parts), jax.device_put(batch, place), key))
    gradient = jax.tree.map(lambda m: m / (1 - c.optim.b1), optax.tree.get(state.opt_state, 'mu'))
    again = jax.device_put(make(method, MESHES[mesh], 1)[2], place)
    last, after = parts.step(jax.device_put(state, parts.state), again, key)
  losses = [float(m['objective']) for m in (metrics, after)]
  return parallel.Curve(losses, metrics, params.flatten(gradient), last)


def same(make, method, mesh):
  got, want = curve(make, method, mesh), curve(make, method, 'one')
  parallel.same(got, want)
  assert got.losses == pytest.approx(want.losses, rel=1e-5)
  assert all(np.abs(g).max() > 0 for g in want.gradient.values())


APART = ('top', 'prefix by an MLP')  # keep their layers together, which a pipeline divides
PAIRS = [(method, mesh) for mesh in ('fsdp 2 tensor 2', 'pipe 2 data 2') for method in METHODS
         if 'fsdp' in mesh or method not in APART]


@pytest.mark.slow
@pytest.mark.parametrize('method, mesh', PAIRS)
def test_a_conversation(method, mesh):
  same(conversation, method, mesh)


@pytest.mark.slow
@pytest.mark.parametrize('make, method, mesh', [
    (classes, 'lora', 'fsdp 2 tensor 2'), (preference_pairs, 'lora', 'fsdp 2 tensor 2'),
    (documents, 'lora', 'pipe 2 data 2'), (documents, 'top', 'fsdp 2 tensor 2'), (words, 'lora', 'fsdp 2 tensor 2'),
    (words, 'houlsby', 'pipe 2 data 2'), (disentangled, 'lora', 'fsdp 2 tensor 2'), (pair, 'lora', 'fsdp 2 tensor 2')])
def test_another_objective(make, method, mesh):
  same(make, method, mesh)


@pytest.mark.slow
@pytest.mark.parametrize('make', [words, pair])
def test_the_dropout_of_lora_is_no_part_of_an_evaluation(make):
  few, said = METHODS['lora'], {}
  for rate in (0.0, 0.5):
    c, task, batch = make(dataclasses.replace(few, rate=rate), {}, 0)
    p = train.whole(parallel.initial(task, run.build(c, task, jax.devices()[:1])))
    for name, loss in (('trained', task.loss), ('evaluated', task.eval_loss)):
      said[name, rate] = {k: float(term.total) for k, term in jax.jit(loss)(p, batch, jax.random.key(1))[0].items()}
  assert said['evaluated', 0.0] == said['evaluated', 0.5] and said['trained', 0.0] != said['trained', 0.5]


@pytest.mark.parametrize('method, advice', [('top', 'set mesh.pipe=1'), ('prefix by an MLP', 'or peft.hidden=0')])
def test_a_pipeline_cannot_hold_layers_that_are_kept_together(method, advice):
  with pytest.raises(ConfigError, match=f'mesh.pipe=2: .*keeps its layers together; .*{advice}'):
    conversation(method, MESHES['pipe 2 data 2'], 0)
