"""The pipeline on fake devices: equal to one device, with the bubble, bytes and memory that it promises."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from marks import slow
import numpy as np
import pytest

from lm import nn, pipeline, sharding
from lm.errors import ConfigError
from lm.models import blocks

L, B, T, D, F = 8, 16, 3, 8, 16
MANUAL = ('data', 'fsdp', 'pipe')
BATCH = P(MANUAL)


def meshes(**axes):
  c = sharding.Config(**axes)
  return sharding.make_mesh(c, jax.devices()[:c.devices])


def inputs(width=F, length=T, dtype=jnp.float32):
  """(stacked blocks, x_BTD, an array that steps close over, rows with ints, floats and a hole, weights of the loss)."""
  k = iter(jax.random.split(jax.random.key(0), 7))
  tree = {'up': jax.random.normal(next(k), (L, D, width)) / D**0.5,
          'down': jax.random.normal(next(k), (L, width, D)) / width**0.5,
          'scale': 1 + 0.1 * jax.random.normal(next(k), (L, D))}
  x_BTD = jax.random.normal(next(k), (B, length, D)).astype(dtype)
  ids_BT, float_B1D = jax.random.randint(next(k), (B, length), 0, 5), jax.random.normal(next(k), (B, 1, D))
  rows = {'ids': ids_BT, 'none': None, 'float': float_B1D}
  return tree, x_BTD, jnp.linspace(-1, 1, 5 * D).reshape(5, D), rows, jax.random.normal(next(k), (B, length, D))


def step_of(table, rate=0.3):
  """A residual MLP that reads all that a block can: weights, per-row inputs, dropout by row, a closed-over array."""
  def step(layer, x_BTD, rows, key):
    y_BTD = nn.rms_norm(x_BTD, layer['scale']) + (table[rows['ids']] * rows['float']).astype(x_BTD.dtype)
    h_BTF = jax.nn.gelu(nn.dot(layer['up'], y_BTD, 'BTD,DF->BTF'))
    if jax.sharding.get_abstract_mesh().axis_names:
      h_BTF = jax.lax.with_sharding_constraint(h_BTF, P(None, None, 'tensor'))
    return x_BTD + nn.dropout(nn.dot(layer['down'], h_BTF, 'BTF,FD->BTD'), rate, nn.fold(key, 7))
  return step


def loss_of(y_BTD, weight_BTD):
  """Not linear in y: the backward pass of a linear loss does not wait for the forward pass, and XLA's runtime for CPUs
  mixes up the permutations of a loop and others that are free to start beside it."""
  return (jnp.sin(y_BTD.astype(jnp.float32)) * weight_BTD).sum()


def plain(tree, x_BTD, table, rows, weight_BTD, *, make_step=step_of, key=True, **kw):
  """(output, gradients) on one device."""
  keys = nn.Keys(jax.random.key(5), jnp.arange(B)) if key else None

  def loss(tree, x_BTD, table, rows):
    y_BTD = blocks.run(tree, make_step(table), x_BTD, rows, keys, scan_layers=True, remat='none', **kw)
    return loss_of(y_BTD, weight_BTD), y_BTD
  grad = jax.value_and_grad(lambda *a: loss(*a[:3], rows | {'float': a[3]}), argnums=(0, 1, 2, 3), has_aux=True)
  (_, y_BTD), grads = jax.jit(grad)(tree, x_BTD, table, rows['float'])
  return y_BTD, grads


def program(mesh, *, make_step=step_of, key=True, **kw):
  """The jitted function of the same arguments and results, on a mesh: derivatives are taken inside of `shard_map`."""
  def inside(tree, x_BTD, table, rows, weight_BTD, numbers_B):
    keys = nn.Keys(jax.random.key(5), numbers_B) if key else None

    def loss(tree, x_BTD, table, floats):
      y_BTD = pipeline.run(tree, make_step(table), x_BTD, rows | {'float': floats}, keys, **kw)
      return loss_of(y_BTD, weight_BTD), y_BTD
    (_, y_BTD), g = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(tree, x_BTD, table, rows['float'])
    return y_BTD, (jax.lax.psum(g[0], ('data', 'fsdp')), g[1], jax.lax.psum(g[2], MANUAL), g[3])
  mapped = jax.shard_map(inside, mesh=mesh, in_specs=(P('pipe'), BATCH, P(), BATCH, BATCH, BATCH),
                         out_specs=(BATCH, (P('pipe'), BATCH, P(), BATCH)), axis_names=set(MANUAL), check_vma=False)
  return jax.jit(lambda *a: mapped(*a, jnp.arange(B)))


def pipelined(mesh, tree, *rest, **kw):
  spec = {'up': P('pipe', None, 'tensor'), 'down': P('pipe', 'tensor'), 'scale': P('pipe')}
  tree = {n: jax.device_put(w, NamedSharding(mesh, spec[n])) for n, w in tree.items()}
  with jax.set_mesh(mesh):
    return program(mesh, **kw)(tree, *rest)


def assert_equal(got, want, output=1e-5, gradient=1e-4):
  np.testing.assert_allclose(np.float32(got[0]), np.float32(want[0]), rtol=output, atol=output)
  assert jax.tree.structure(got[1]) == jax.tree.structure(want[1])
  for g, w in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
    assert g.dtype == w.dtype
    np.testing.assert_allclose(np.float32(g), np.float32(w), rtol=gradient, atol=gradient * np.abs(np.float32(w)).max())


USUAL = {'microbatches': 4, 'rounds': 1, 'scan_layers': True, 'remat': 'full'}
CASES = [
    slow({'pipe': 4}, {}), slow({'pipe': 4}, {'microbatches': 1, 'remat': 'none'}),
    slow({'pipe': 4}, {'microbatches': 8, 'remat': 'dots', 'scan_layers': False}),
    ({'pipe': 4}, {'microbatches': 8, 'rounds': 2, 'remat': 'dots'}),
    slow({'pipe': 2, 'tensor': 2}, {'remat': 'dots'}), ({'pipe': 2, 'tensor': 2}, {'rounds': 2, 'scan_layers': False}),
    slow({'pipe': 2, 'data': 2}, {'microbatches': 8}), ({'pipe': 2, 'data': 2}, {'rounds': 2, 'remat': 'none'}),
    slow({'pipe': 1, 'data': 2}, {'rounds': 2}),
    slow({'pipe': 4}, {'first': 1, 'last': 6}), ({'pipe': 2, 'tensor': 2}, {'rounds': 2, 'first': 3, 'last': -1}),
]
COUNTS = [(1, 1), (2, 1), (4, 1), (8, 1), (4, 2), (8, 2)]  # M, v
EVERY = [({'pipe': 4}, remat, scan_layers, M, v) for remat in ('none', 'dots', 'full') for scan_layers in (True, False)
         for M, v in COUNTS]
EVERY += [(axes, remat, True, M, v) for axes in ({'pipe': 2, 'tensor': 2}, {'pipe': 2, 'data': 2})
          for remat, (M, v) in zip(('none', 'dots', 'full') * 2, COUNTS, strict=True)]
EVERY += [({'pipe': 2, 'tensor': 2}, 'none', True, 2, 4)]


@functools.cache
def answer(first=0, last=None):
  return plain(*inputs(), first=first, last=last)


@pytest.mark.slow
@pytest.mark.parametrize('axes, kw', CASES)
def test_equal_to_one_device(axes, kw):
  want = answer(**{k: v for k, v in kw.items() if k in ('first', 'last')})
  assert_equal(pipelined(meshes(**axes), *inputs(), **USUAL | kw), want)


@pytest.mark.slow
@pytest.mark.parametrize('axes, remat, scan_layers, microbatches, rounds', EVERY)
def test_every_way_is_equal_to_one_device(axes, remat, scan_layers, microbatches, rounds):
  assert_equal(pipelined(meshes(**axes), *inputs(), scan_layers=scan_layers, remat=remat, microbatches=microbatches,
                         rounds=rounds), answer())


@pytest.mark.slow
def test_bf16_activations_with_f32_gradients():
  """Equal to one device in bf16; where 'tensor' divides sums, as near to f32 as one device is."""
  tree, x_BTD, *rest = inputs(dtype=jnp.bfloat16)
  want, exact = plain(tree, x_BTD, *rest), plain(tree, x_BTD.astype(jnp.float32), *rest)
  got = pipelined(meshes(pipe=4), tree, x_BTD, *rest, **USUAL)
  assert got[0].dtype == got[1][1].dtype == jnp.bfloat16 and got[1][0]['up'].dtype == jnp.float32
  assert_equal(got, want)
  divided = pipelined(meshes(pipe=2, tensor=2), tree, x_BTD, *rest, **USUAL | {'rounds': 2})
  for d, w, e in zip(*map(jax.tree.leaves, (divided, want, exact)), strict=True):
    far = lambda x, e=e: np.linalg.norm(np.float32(x) - e)
    assert d.dtype == w.dtype and far(d) < 1.5 * far(w) < 0.1 * np.linalg.norm(e)


def test_a_plain_key_counts_the_rows_of_a_device():
  mesh, (tree, x_BTD, table, rows, _) = meshes(pipe=4), inputs()

  def run(key):
    inside = lambda tree, x, rows: pipeline.run(tree, step_of(table), x, rows, key, **USUAL)
    mapped = jax.shard_map(inside, mesh=mesh, in_specs=(P('pipe'), BATCH, BATCH), out_specs=BATCH,
                           axis_names=set(MANUAL), check_vma=False)
    with jax.set_mesh(mesh):
      return jax.jit(mapped)(tree, x_BTD, rows)
  key = jax.random.key(5)
  want = jax.jit(lambda keys: blocks.run(tree, step_of(table), x_BTD, rows, keys, scan_layers=True, remat='none'))
  np.testing.assert_allclose(run(key), want(nn.Keys(key, jnp.arange(B) % (B // 4))), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(run(None), want(None), rtol=1e-5, atol=1e-5)


def test_layers_are_gathered_over_fsdp_when_they_are_used():
  """`prepare` gathers inside of the loops and again where they recompute; its transpose leaves each device its part."""
  mesh, (tree, x_BTD, table, rows, weight_BTD) = meshes(pipe=2, fsdp=2), inputs()
  spec = {'up': P('pipe', 'fsdp'), 'down': P('pipe', None, 'fsdp'), 'scale': P('pipe', 'fsdp')}
  gather = {'up': 0, 'down': 1, 'scale': 0}
  prepare = lambda layer: {n: jax.lax.all_gather(w, 'fsdp', axis=gather[n], tiled=True) for n, w in layer.items()}

  def inside(tree, x_BTD, rows, weight_BTD, numbers_B):
    def loss(tree):
      y_BTD = pipeline.run(tree, step_of(table), x_BTD, rows, nn.Keys(jax.random.key(5), numbers_B), prepare=prepare,
                           **USUAL | {'rounds': 2})
      return loss_of(y_BTD, weight_BTD) + (pipeline.layer(tree, 5, prepare)['up'] * weight_BTD[0, 0, 0]).sum(), y_BTD
    (_, y_BTD), g = jax.value_and_grad(loss, has_aux=True)(tree)
    return y_BTD, g
  mapped = jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=(spec, *[BATCH] * 4), out_specs=(BATCH, spec),
                                 axis_names=set(MANUAL), check_vma=False))
  args = tree, x_BTD, rows, weight_BTD, jnp.arange(B)
  with jax.set_mesh(mesh):
    y_BTD, got = mapped(*args)
    text = mapped.lower(*args).compile().as_text()
  want_BTD, (want, *_) = answer()
  want = want | {'up': want['up'].at[5].add(weight_BTD[::B // 4, 0, 0].sum())}
  assert_equal((y_BTD, got), (want_BTD, want))
  gathers = sum(c.times for c in collectives(text) if c.kind == 'all-gather' and c.shape[-2:] == (D, F) and c.times > 1)
  ticks, k = 4 * 2 + 2 - 1, L // 4
  assert gathers == 3 * ticks * k  # forward, again for the inputs of the chunk's layers, again in each layer


@pytest.mark.parametrize('i', [0, 3, 6, -1])
def test_any_layer_on_every_stage(i):
  mesh, (tree, *_) = meshes(pipe=4), inputs()
  weights_4 = jnp.arange(1.0, 5.0)

  def inside(tree, weight_1):
    f = lambda tree: (weight_1[0] * pipeline.layer(tree, i)['up'].sum(), pipeline.layer(tree, i))
    (_, got), g = jax.value_and_grad(f, has_aux=True)(tree)
    return jax.tree.map(lambda x: x[None], got), g
  mapped = jax.shard_map(inside, mesh=mesh, in_specs=(P('pipe'), P('pipe')), out_specs=(P('pipe'), P('pipe')),
                         axis_names=set(MANUAL), check_vma=False)
  got, g = jax.jit(mapped)(tree, weights_4)
  for name, w in tree.items():
    np.testing.assert_array_equal(got[name], np.stack([w[i]] * 4))
    want = jnp.zeros_like(w).at[i].set(weights_4.sum() if name == 'up' else 0)
    np.testing.assert_array_equal(g[name], want)


@pytest.mark.parametrize('rounds', [1, 2])
def test_nothing_of_an_idle_tick_reaches_values_or_gradients(rounds):
  """A step that is NaN at zeros, with NaN for its derivatives."""
  def make_step(table):
    def step(layer, x_BTD, rows, key):
      y_BTD = x_BTD / jnp.abs(x_BTD).max(-1, keepdims=True) * layer['scale'][None, None] + table[rows['ids']]
      return x_BTD + y_BTD * rows['float'] * layer['up'][:, 0][None, None]
    return step
  assert np.isnan(plain(inputs()[0], jnp.zeros((B, T, D)), *inputs()[2:], make_step=make_step)[0]).any()
  want = plain(*inputs(), make_step=make_step)
  got = pipelined(meshes(pipe=4), *inputs(), make_step=make_step, **USUAL | {'rounds': rounds})
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(want))
  assert_equal(got, want)


Collective = collections.namedtuple('Collective', 'kind bytes times shape')


def collectives(text):
  """What a compiled program's collectives bring each device, and how often: loops by their known trip counts."""
  bodies = {m[1]: m[2] for m in re.finditer(r'^(?:ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}', text, re.M | re.S)}
  loops = {m[1]: (name, int(m[2])) for name, body in bodies.items()
           for m in re.finditer(r' while\(.*body=%?([\w.-]+),.*known_trip_count":\{"n":"(\d+)"', body)}
  times = lambda name: loops[name][1] * times(loops[name][0]) if name in loops else 1
  assert not re.search(r'-start\(', text)
  for name, body in bodies.items():
    for m in re.finditer(r'= f32\[([\d,]*)\]\S* (collective-permute|all-gather|reduce-scatter)\(', body):
      shape = tuple(int(n) for n in m[1].split(',') if n)
      yield Collective(m[2], 4 * math.prod(shape), times(name), shape)


@functools.cache
def compiled(pipe, microbatches, rounds, width=F, length=T, remat='full'):
  mesh = meshes(pipe=pipe)
  with jax.set_mesh(mesh):
    kw = {'microbatches': microbatches, 'rounds': rounds, 'scan_layers': True, 'remat': remat}
    return program(mesh, key=False, **kw).lower(*inputs(width, length)).compile()


@pytest.mark.parametrize('p, M, v', [(4, 4, 1), slow(4, 8, 1), (4, 8, 2), slow(2, 4, 4)])
def test_bytes_between_stages(p, M, v):
  found = [c for c in collectives(compiled(p, M, v).as_text()) if c.kind == 'collective-permute']
  ticks, b, row = M * v + p - 1, B // p, T * D * 4
  ring = [c for c in found if c.times > 1]
  assert [c.times for c in ring] == [ticks] * 2 and {c.bytes for c in ring} == {B // M * row}
  ends = 4 * (p - 1) * b * row  # to the first stage and back, and their transposes
  layers = 2 * (L // p) * (2 * D * F + D) * 4 if v > 1 else 0  # each parameter there, and its gradient back
  assert sum(c.bytes * c.times for c in found) == 2 * ticks * (B // M) * row + ends + layers


def test_rows_stay_sharded_over_an_automatic_axis():
  """Stages that cut length over 'tensor' send and hold their part of it only."""
  mesh, (tree, x_BTD, *_) = meshes(pipe=2, tensor=2), inputs()
  x_BTD = jnp.concatenate([x_BTD, x_BTD[:, :1]], 1)
  cut = lambda x_BTD: jax.lax.with_sharding_constraint(x_BTD, P(None, 'tensor'))

  def inside(tree, x_BTD):
    y_BTD = pipeline.run(tree, lambda layer, x_BTD, *_: cut(x_BTD * layer['scale'][None, None]), cut(x_BTD), None, None,
                         **USUAL)
    return cut(y_BTD)
  mapped = jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=(P('pipe'), BATCH), out_specs=BATCH,
                                 axis_names=set(MANUAL), check_vma=False))
  with jax.set_mesh(mesh):
    x_BTD = jax.device_put(x_BTD, NamedSharding(mesh, P(MANUAL, 'tensor')))
    found = list(collectives(mapped.lower(tree, x_BTD).compile().as_text()))
  assert found and {(c.kind, c.shape[1]) for c in found} == {('collective-permute', 2)}


@pytest.mark.parametrize('p, M, v', [(4, 1, 1), (4, 4, 1), (4, 8, 1), (4, 8, 2), (2, 4, 4)])
def test_the_bubble_is_the_formula(p, M, v):
  """Counts the layers that run: all stages tick together, and what is not a layer of a microbatch is bubble."""
  assert layers_run(p, M, v) == p * (M * v + p - 1) * L / (p * v)
  measured = 1 - M * L / layers_run(p, M, v)
  assert measured == pytest.approx((p - 1) / (M * v + p - 1)) == pytest.approx(pipeline.bubble(p, M, v))


def test_rounds_shorten_a_step():
  assert layers_run(4, 8, 2) == 76 < layers_run(4, 8, 1) == 88
  assert pipeline.bubble(4, 8, 2) == 3 / 19 < pipeline.bubble(4, 8) == 3 / 11


@functools.cache
def layers_run(p, M, v):
  mesh, (tree, x_BTD, *_), runs = meshes(pipe=p), inputs(), []

  def step(layer, x_BTD, rows, key):
    jax.debug.callback(lambda w: runs.append(1), layer['scale'][0])
    return x_BTD * layer['scale'][None, None]
  inside = lambda tree, x: pipeline.run(tree, step, x, None, None, **USUAL | {'microbatches': M, 'rounds': v})
  mapped = jax.shard_map(inside, mesh=mesh, in_specs=(P('pipe'), BATCH), out_specs=BATCH, axis_names=set(MANUAL),
                         check_vma=False)
  jax.block_until_ready(jax.jit(mapped)(tree, x_BTD))
  jax.effects_barrier()
  return len(runs)


def memory(M, v, width, remat):
  return compiled(4, M, v, width, 64, remat).memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_memory_falls_with_more_microbatches(remat):
  assert memory(16, 1, 512, remat) < memory(4, 1, 512, remat)


@pytest.mark.slow
@pytest.mark.parametrize('M, v, remat, arrays', [
    (4, 1, 'none', 8), (16, 1, 'none', 8), (4, 1, 'full', 3), (16, 1, 'full', 3), (4, 2, 'none', 5)])
def test_inner_activations_of_one_microbatch_at_a_time(M, v, remat, arrays):
  """What grows with the width of the layers is less than so many arrays [m, T, F] for each of a chunk's k layers.

  Where layers recompute nothing, these are what this step's derivative reads. Kept for all ticks they would be 7 times
  as many at M = 4, and 19 times at M = 16.
  """
  one = (B // M) * 64 * (1024 - 512) * 4 * (L // 4 // v)
  assert memory(M, v, 1024, remat) - memory(M, v, 512, remat) < arrays * one


@pytest.mark.parametrize('kw, message', [
    ({'layers': 9}, 'mesh.pipe=4, mesh.rounds=1: model.layers=9, not divisible by 4 x 1 = 4; choose'),
    ({'rounds': 3}, 'mesh.pipe=4, mesh.rounds=3: model.layers=8, not divisible by 4 x 3 = 12; choose'),
    ({'rows': 18}, 'mesh.microbatches=4: 18 rows for each replica, not divisible by 4; choose mesh.microbatches'),
    ({'rows': 3}, 'mesh.microbatches=4: 3 rows for each replica, less than one a microbatch; choose at most'),
    ({'microbatches': 2, 'rounds': 2}, 'mesh.rounds=2: mesh.microbatches=2; expected at least mesh.pipe=4 for'),
    ({'microbatches': 0}, 'mesh.microbatches=0; expected at least 1'), ({'rounds': 0}, 'mesh.rounds=0; expected'),
    ({'pipe': 0}, 'mesh.pipe=0; expected'),
])
def test_what_cannot_be_cut_is_refused(kw, message):
  usual = {'layers': 8, 'pipe': 4, 'microbatches': 4, 'rounds': 1, 'rows': 16}
  pipeline.check(**usual)
  pipeline.check(**usual | {'microbatches': 1})  # allowed, though nearly all of it is bubble
  with pytest.raises(ConfigError, match='^' + re.escape(message)) as e:
    pipeline.check(**usual | kw)
  assert '\n' not in str(e.value)


def test_run_refuses_too():
  with pytest.raises(ConfigError, match='mesh.pipe=4, mesh.rounds=3: model.layers=8'):
    pipelined(meshes(pipe=4), *inputs(), **USUAL | {'rounds': 3})


@pytest.mark.parametrize('p, v', [(p, v) for p in range(1, 9) for v in range(2, 9)])
def test_a_stage_sends_one_group_of_layers_in_each_turn(p, v):
  """The formula that `_deal` takes its permutations from."""
  g = math.gcd(p, v)
  for r in range(v):
    assert {(s * v + (r + s * g // p) % v) % p for s in range(p)} == set(range(p))
