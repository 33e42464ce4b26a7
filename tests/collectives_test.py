"""What a training step sends over each axis of the mesh, counted in the compiled program, against the formulas."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import hlo, params, pretrain, run, sharding, start
from lm.data import loader
from lm.data.packing import Batch
from lm.losses import ar
from lm.models import decoder

B, T, D, V, L = 16, 32, 64, 256, 4
MODEL = decoder.Config(vocab=V, length=T, layers=L, embed=D, heads=8, kv_heads=4, head_dim=16, mlp=192,
                       positions='rotary', norm='rms', norm_bias=False, activation='swiglu', bias=False, tied=False)


def compiled(mesh, microbatches=1, **model):
  """(HLO of the step, bytes of the parameters, f32)."""
  c = pretrain.Config(model=dataclasses.replace(MODEL, **model), data=loader.Config(length=T, batch=B),
                      mesh=sharding.Config(**mesh), loss=ar.Config(chunk=T * B // 32))
  c = dataclasses.replace(c, optim=dataclasses.replace(c.optim, microbatches=microbatches))
  task = pretrain.task(c)
  parts = run.build(c, task)
  with sharding.use(parts.mesh, c.mesh.sequence):
    state = start.abstract(task, parts)
    row = jax.ShapeDtypeStruct((B, T + 1), jnp.int32, sharding=sharding.batch_sharding(parts.mesh))
    batch = Batch(row, row, row, jax.ShapeDtypeStruct(row.shape, bool, sharding=row.sharding))
    text = parts.step.lower(state, batch, jax.random.key(0)).compile().as_text()
  return text, parts.mesh, 4 * params.count(task.specs)


def sent(mesh, **options):
  """{axes: {kind: bytes sent by a device in a step}}, and the parameters' bytes."""
  text, placed, nbytes = compiled(mesh, **options)
  assert not hlo.unknown_loops(text)
  found = collections.defaultdict(collections.Counter)
  for c in hlo.collectives(text, placed):
    found[c.axes][c.kind] += c.total
  return {axes: dict(kinds) for axes, kinds in found.items()}, nbytes


def of_axis(found, axis):
  return sum(sum(kinds.values()) for axes, kinds in found.items() if axis in axes)


def ring(n):
  return (n - 1) / n


@pytest.mark.slow
def test_data():
  """One all-reduce of the gradient."""
  for microbatches in (1, 2):
    found, nbytes = sent({'data': 8}, microbatches=microbatches)
    assert nbytes <= of_axis(found, 'data') / (2 * ring(8)) <= 1.15 * nbytes
    assert set(found) == {('data',)}


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_zero_3(remat):
  """Parameters are gathered for the forward pass and the backward pass, gradients are scattered: 3 times the bytes."""
  found, nbytes = sent({'fsdp': 8}, remat=remat)
  assert 2.5 * nbytes <= of_axis(found, 'fsdp') / ring(8) <= 3 * 1.15 * nbytes
  assert found['fsdp',]['reduce-scatter'] == pytest.approx(ring(8) * nbytes, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize('zero', [1, 2])
def test_zero_1_and_2(zero):
  """Gradients are scattered, new parameters gathered: what an all-reduce sends."""
  found, nbytes = sent({'fsdp': 8, 'zero': zero})
  assert 2 * nbytes <= of_axis(found, 'fsdp') / ring(8) <= 2 * 1.15 * nbytes


@pytest.mark.slow
def test_zero_2_scatters_every_microbatch_and_zero_1_once():
  once, nbytes = sent({'fsdp': 8, 'zero': 1}, microbatches=2)
  every, _ = sent({'fsdp': 8, 'zero': 2}, microbatches=2)
  assert once['fsdp',]['reduce-scatter'] == pytest.approx(ring(8) * nbytes, rel=0.05)
  assert every['fsdp',]['reduce-scatter'] == pytest.approx(2 * ring(8) * nbytes, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['none', 'full'])
@pytest.mark.parametrize('kv_heads', [8, 4])
def test_tensor(remat, kv_heads):
  """Two all-reduces of the activations a block each way, one for the embedding, one for the head's derivative."""
  found, _ = sent({'tensor': 4, 'data': 2}, remat=remat, kv_heads=kv_heads)
  each = 2 * ring(4) * 4 * B // 2 * T * D
  # Recomputing a block takes up to two more: the sum of its MLP may be left out, as its value is not read again.
  least, most = {'none': (4, 4), 'full': (5, 6)}[remat]
  assert least * L * each <= of_axis(found, 'tensor') <= 1.15 * (most * L + 2) * each


@pytest.mark.slow
def test_pipeline():
  """A microbatch is passed on each tick, forward and backward; rows come from their devices, and go back."""
  p, M = 4, 4
  found, nbytes = sent({'pipe': p, 'data': 2, 'microbatches': M})
  rows = 4 * B // 2 * T * D
  passed = 2 * (M + p - 1) * rows / M + 2 * 2 * ring(p) * rows
  assert found['pipe',]['collective-permute'] <= 1.15 * passed


def test_all_together():
  """Every axis sends what it does alone: parts over tensor stay parts when weights and gradients go over others."""
  found, nbytes = sent({'fsdp': 2, 'tensor': 2, 'data': 2})
  part = nbytes / 2  # over tensor
  assert of_axis(found, 'fsdp') <= 1.15 * 3 * ring(2) * part
  assert of_axis(found, 'data') <= 1.15 * 2 * ring(2) * part / 2
  each = 2 * ring(2) * 4 * B // 4 * T * D
  assert 4 * L * each <= of_axis(found, 'tensor') <= 1.15 * (4 * L + 2) * each


@pytest.mark.slow
def test_pipeline_with_others():
  """A stage's weights are gathered once a step, their gradients scattered once."""
  found, nbytes = sent({'fsdp': 2, 'tensor': 2, 'pipe': 2})
  sizes = params.flatten(pretrain.task(pretrain.Config(model=MODEL, data=loader.Config(length=T))).specs)
  blocks = sum(4 * np.prod(s.shape) for path, s in sizes.items() if path.startswith('blocks')) / 4  # tensor, pipe
  others = nbytes / 2 - 2 * blocks
  assert of_axis(found, 'fsdp') <= 1.15 * 2 * ring(2) * (blocks + others)
