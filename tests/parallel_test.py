"""Any mesh is one device: loss, gradients and curves of every family with dropout on, and where ZeRO's parts live."""

import dataclasses
import functools
from typing import NamedTuple

import jax
from marks import slow
import numpy as np
import optax
import pytest

from lm import nn, params, pretrain, pretrain_encoder, run, sharding, train
from lm.data import loader, masking
from lm.data.inputs import Inputs
from lm.data.packing import Batch
from lm.errors import ConfigError
from lm.models import deberta, deberta_pair, decoder, electra, encoder

B, T, V = 16, 16, 64
STEPS = 12
DROPOUT = nn.Dropout(0.1, 0.1, 0.1)
SHAPE = dict(vocab=V, length=T, layers=4, embed=32, heads=4, head_dim=8, mlp=64, dropout=DROPOUT, scan_layers=True)
TOKENS = masking.Tokens(mask=3, vocab=V, special=(0, 1, 2, 3), starts_V=np.arange(V) % 3 != 0)
ENCODER = encoder.Config(**SHAPE)
DEBERTA = deberta.Config(**SHAPE, relative=8)
DATA = dict(data=loader.Config(packing='full_sentences', length=T, batch=B))
KINDS = {
    'decoder': pretrain.Config(model=decoder.Config(**SHAPE, kv_heads=4),
                               data=loader.Config(length=T, batch=B, isolate=True)),
    'palm': pretrain.Config(model=decoder.Config(**SHAPE, kv_heads=1, parallel=True, positions='rotary', bias=False,
                                                 norm_bias=False, activation='swiglu'),
                            data=loader.Config(length=T, batch=B, isolate=True)),
    'bert': pretrain_encoder.Masked(model=ENCODER, nsp=True,
                                    data=loader.Config(packing='bert_pairs', length=T, batch=B)),
    'electra': pretrain_encoder.Replaced(model=electra.Config(
        dataclasses.replace(ENCODER, embed=16, heads=4, head_dim=4, mlp=32, token_embed=32), ENCODER), **DATA),
    'deberta': pretrain_encoder.Disentangled(model=DEBERTA, **DATA),
    'deberta-v2': pretrain_encoder.Disentangled(
        model=dataclasses.replace(DEBERTA, buckets=8, shared=True, relative_norm=True, conv=3), decoder=False, **DATA),
    'deberta-v3': pretrain_encoder.DisentangledReplaced(model=deberta_pair.Config(DEBERTA, DEBERTA), **DATA),
}
MESHES = {
    'data 8': dict(data=8), 'fsdp 8': dict(fsdp=8), 'fsdp 8, zero 1': dict(fsdp=8, zero=1),
    'fsdp 4 data 2, zero 2': dict(fsdp=4, data=2, zero=2), 'tensor 4 data 2': dict(tensor=4, data=2),
    'tensor 4 data 2, sequence': dict(tensor=4, data=2, sequence=True), 'pipe 4 data 2': dict(pipe=4, data=2),
    'tensor 4': dict(tensor=4),
    'pipe 2 data 4, 2 rounds': dict(pipe=2, data=4, rounds=2, microbatches=2),
    'data 2 tensor 2 pipe 2': dict(data=2, tensor=2, pipe=2), 'fsdp 2 tensor 2 pipe 2': dict(fsdp=2, tensor=2, pipe=2),
    'fsdp 2 tensor 2 data 2': dict(fsdp=2, tensor=2, data=2),
}


def make_batch(kind, seed=0):
  """Rows with unequal numbers of targets: several segments, padding, masked targets."""
  rng = np.random.default_rng(seed)
  causal = isinstance(KINDS[kind], pretrain.Config)
  T_ = T + causal
  segments_BT = np.sort(rng.integers(0, 3, (B, T_)))[:, ::-1].copy().astype(np.int32)
  ids_BT = rng.integers(4, V, (B, T_)).astype(np.int32)
  positions_BT = np.tile(np.arange(T_, dtype=np.int32), (B, 1))
  if causal:
    return Batch(ids_BT, segments_BT, positions_BT, rng.random((B, T_)) < 0.7)
  segments_BT = (segments_BT > 0).astype(np.int32)
  types_BT = np.where(segments_BT > 0, np.arange(T_) > 7, 0).astype(np.int32)
  return Inputs(ids_BT=ids_BT, segments_BT=segments_BT, positions_BT=positions_BT, types_BT=types_BT,
                special_BT=np.arange(T_)[None] == np.zeros((B, 1)), random_B=rng.random(B) < 0.5,
                draw_B=np.arange(B, dtype=np.uint32) + 100 * seed)


def make(kind, mesh, microbatches=1):
  c = dataclasses.replace(KINDS[kind], mesh=sharding.Config(**mesh))
  # Without a bound on the norm, AdamW's first moment after a step is the gradient times 1 - b1.
  optim = dataclasses.replace(c.optim, lr=3e-3, schedule='constant', steps=100, clip=0.0, microbatches=microbatches)
  c = dataclasses.replace(c, optim=optim)
  return c, pretrain.task(c) if isinstance(c, pretrain.Config) else pretrain_encoder.task(c, TOKENS)


def initial(task, parts):
  """Drawn by NumPy: nothing to compile; and biases of 0 or norms of 1 could hide a wrong sum of gradients."""
  rng = np.random.default_rng(0)
  p = params.map_with_path(lambda path, s: np.float32(path.endswith('scale') + 0.05 * rng.standard_normal(s.shape)),
                           task.specs)
  return jax.jit(lambda p: train.state_of(p, parts.tx, parts.trainable), out_shardings=parts.state)(p)


def placed_batch(kind, parts, seed=0):
  return jax.device_put(make_batch(kind, seed), sharding.batch_sharding(parts.mesh))


class Curve(NamedTuple):
  losses: list  # of each step
  metrics: dict  # of the first step
  gradient: dict  # of the first step: path -> array
  state: train.State  # after the last


def curve(kind, mesh, steps, microbatches=1, devices=None):
  c, task = make(kind, mesh, microbatches)
  parts = run.build(c, task, devices)
  every = []
  with sharding.use(parts.mesh, c.mesh.sequence):
    state = initial(task, parts)
    for n in range(steps):
      state, metrics = parts.step(state, placed_batch(kind, parts, n % 4), jax.random.key(7))
      every.append(jax.device_get(metrics))
      if n == 0:
        moments = jax.device_get(optax.tree.get(state.opt_state, 'mu'))
        gradient = {path: m / (1 - c.optim.b1) for path, m in params.flatten(moments).items()}
    assert parts.step._cache_size() == 1
  return Curve([float(m['objective']) for m in every], every[0], gradient, state)


@functools.cache
def one_device(kind):
  return curve(kind, {}, steps=STEPS)


def same(got, want):
  assert got.losses[0] == pytest.approx(want.losses[0], rel=1e-5)
  for name, value in want.metrics.items():
    assert float(got.metrics[name]) == pytest.approx(float(value), rel=1e-4), name
  assert got.gradient.keys() == want.gradient.keys()
  for path, g in want.gradient.items():
    np.testing.assert_allclose(got.gradient[path], g, rtol=1e-4, atol=1e-4 * np.abs(g).max() + 1e-8, err_msg=path)
  np.testing.assert_allclose(got.losses, want.losses[:len(got.losses)], rtol=1e-3)


# The default suite has the mesh that uses every axis's code; the others are heavy. A decoder is tried on all, other
# families where their own code meets an axis, and ELECTRA, which is two of BERT, also where one might be forgotten.
ALL = 'fsdp 2 tensor 2 pipe 2'
QUICK = {('decoder', ALL)}
TRIED = {'decoder': MESHES, 'palm': ('tensor 4 data 2, sequence', ALL),
         'bert': ('data 8', 'fsdp 4 data 2, zero 2', 'pipe 4 data 2', ALL), 'electra': ('pipe 4 data 2', ALL),
         'deberta': ('fsdp 4 data 2, zero 2', 'tensor 4 data 2, sequence', 'pipe 2 data 4, 2 rounds', ALL),
         'deberta-v2': (ALL,), 'deberta-v3': (ALL,)}
PAIRS = [(kind, mesh) if (kind, mesh) in QUICK else slow(kind, mesh) for kind in KINDS for mesh in TRIED[kind]]


@pytest.mark.parametrize('kind, mesh', PAIRS)
def test_a_mesh_is_one_device(kind, mesh):
  """Loss, metrics and gradients of the first step, and the losses of those after it."""
  devices = jax.devices()[:sharding.Config(**MESHES[mesh]).devices]
  same(curve(kind, MESHES[mesh], steps=STEPS, devices=devices), one_device(kind))


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [{}, {'data': 4, 'fsdp': 2}, {'pipe': 2, 'fsdp': 2, 'data': 2}], ids=str)
def test_microbatches(mesh):
  """Neither sums nor dropout depend on the number of microbatches."""
  same(curve('decoder', mesh, steps=2, microbatches=2), one_device('decoder'))


def bytes_on_a_device(tree):
  return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize('mesh', ['data 8', 'fsdp 8, zero 1', 'fsdp 4 data 2, zero 2',
                                  'fsdp 2 tensor 2 pipe 2'])
def test_bytes_of_zero(mesh):
  """Each leaf takes its size over the axes that divide it: parameters from ZeRO's stage 3 on, moments from 1 on, over
  fsdp; both over tensor and pipe."""
  axes = dict(zero=3, data=1, fsdp=1, tensor=1, pipe=1) | MESHES[mesh]
  ways = {'embed': axes['fsdp'], 'layers': axes['pipe']} | dict.fromkeys(('heads', 'kv_heads', 'mlp', 'vocab'),
                                                                        axes['tensor'])

  def expected(specs, ways):
    return sum(4 * np.prod(s.shape) // np.prod([ways.get(a, 1) for a in s.axes]) for s in jax.tree.leaves(specs))
  state = curve('decoder', MESHES[mesh], steps=1).state
  specs = make('decoder', {})[1].specs
  assert bytes_on_a_device(state.params) == expected(specs, ways | ({} if axes['zero'] == 3 else {'embed': 1}))
  assert bytes_on_a_device((state.opt_state.mu, state.opt_state.nu)) == 2 * expected(specs, ways)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['decoder', 'electra'])
def test_evaluation(kind):
  """The validation loss of a mesh is that of one device."""
  found = []
  for mesh in ({}, MESHES['fsdp 2 tensor 2 pipe 2']):
    c, task = make(kind, mesh)
    parts = run.build(c, task)
    with sharding.use(parts.mesh):
      sums = jax.device_get(parts.evaluate(initial(task, parts), placed_batch(kind, parts), jax.random.key(2)))
    found.append({name: t.total / t.weight for name, t in sums.items() if t.weight})
  assert found[0].keys() == found[1].keys()
  for name, value in found[0].items():
    assert found[1][name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.slow
def test_frozen_leaves():
  c, _ = make('decoder', MESHES['fsdp 2 tensor 2 pipe 2'])
  c = dataclasses.replace(c, optim=dataclasses.replace(c.optim, freeze='attn|tokens'))
  alone = dataclasses.replace(c, mesh=sharding.Config())
  found = []
  for some in (c, alone):
    task = pretrain.task(some)
    parts = run.build(some, task)
    with sharding.use(parts.mesh):
      found.append(parts.step(initial(task, parts), placed_batch('decoder', parts), jax.random.key(7))[1])
  assert float(found[0]['grad_norm']) == pytest.approx(float(found[1]['grad_norm']), rel=1e-4)


@pytest.mark.parametrize('mesh, message', [
    (dict(tensor=3), 'mesh.tensor=3 does not divide model.heads=4; choose a divisor'),
    (dict(fsdp=5), 'data.batch=16 is not divisible by'),
    (dict(fsdp=64), 'data.batch=16 is not divisible by'),
    (dict(pipe=8), 'model.layers=4'), (dict(pipe=4, rounds=2), 'mesh.rounds=2'),
    (dict(pipe=2, microbatches=3), 'mesh.microbatches=3'), (dict(pipe=2, rounds=2, microbatches=1), 'mesh.rounds=2'),
    (dict(microbatches=2), 'mesh.microbatches=2 with mesh.pipe=1'), (dict(rounds=2), 'mesh.rounds=2 with mesh.pipe=1'),
    (dict(zero=4), 'mesh.zero=4; expected 1, 2 or 3'), (dict(zero=0), 'mesh.zero=0; expected at least 1'),
    (dict(data=0), 'mesh.data=0; expected at least 1')], ids=str)
def test_impossible_meshes(mesh, message):
  """One line that names the field, before anything is compiled."""
  with pytest.raises(ConfigError) as error:
    dataclasses.replace(KINDS['decoder'], mesh=sharding.Config(**mesh))
  assert message in str(error.value) and '\n' not in str(error.value)
