"""The mesh and where each logical axis lives on it, on 8 fake devices."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from lm import params, sharding
from lm.errors import ConfigError
from lm.params import Spec

SPECS = {'embed': Spec((16, 8), ('vocab', 'embed')),
         'blocks': params.stack(3, {'q': Spec((8, 4, 6), ('embed', 'heads', 'head_dim')),
                                    'scale': Spec((8,), ('embed',), params.ones)})}


def mesh(**axes):
  return sharding.make_mesh(sharding.Config(**axes))


@pytest.mark.parametrize('axes, want', [
    (('embed', 'mlp'), P('fsdp', 'tensor')), (('vocab', 'embed'), P('tensor', 'fsdp')),
    (('layers', 'heads', 'head_dim', 'embed'), P('pipe', 'tensor', None, 'fsdp')),
    ((None, 'embed'), P(None, 'fsdp')), (('layers', 'embed'), P('pipe', 'fsdp')),
    (('batch', 'length', 'embed'), P(('data', 'fsdp', 'pipe'), None, None)),  # fsdp is taken by the batch
    (('batch', 'length', 'vocab'), P(('data', 'fsdp', 'pipe'), None, 'tensor')), ((), P()),
])
def test_rules(axes, want):
  assert sharding.partition(axes) == want


def test_mesh_has_all_axes_in_order():
  m = mesh(data=2, fsdp=2, tensor=2)
  assert m.axis_names == sharding.AXES and dict(m.shape) == {'data': 2, 'fsdp': 2, 'tensor': 2, 'pipe': 1}
  assert mesh().devices.size == 1 and mesh().devices.flat[0] == jax.devices()[0]
  some = sharding.make_mesh(sharding.Config(tensor=4), jax.devices()[4:])
  assert list(some.devices.flat) == jax.devices()[4:]


@pytest.mark.parametrize('axes', [{'data': 3}, {'data': 4}, {'data': 8, 'tensor': 2}])
def test_a_mesh_that_is_not_the_devices_is_refused(axes):
  with pytest.raises(ConfigError, match=r'mesh: data=.* needs \d+ devices, 8 are here; set mesh.data'):
    mesh(**axes)


def test_a_job_of_several_processes_must_name_its_mesh(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(ConfigError, match='mesh: data=1 x .* needs 1 devices, 8 are here; set mesh.data'):
    mesh()


@pytest.mark.parametrize('axis', sharding.AXES)
def test_an_empty_axis_is_refused(axis):
  with pytest.raises(ConfigError, match=f'mesh.{axis}=0'):
    sharding.Config(**{axis: 0})


def test_shardings_of_specs():
  got = sharding.shardings(SPECS, mesh(data=2, fsdp=2, tensor=2))
  assert {p: s.spec for p, s in params.flatten(got).items()} == {
      'embed': P('tensor', 'fsdp'), 'blocks/q': P('pipe', 'fsdp', 'tensor', None),
      'blocks/scale': P('pipe', 'fsdp')}
  m = mesh(fsdp=4, tensor=2)
  init = lambda key: params.init(SPECS, key)
  placed = jax.jit(init, out_shardings=sharding.shardings(SPECS, m))(jax.random.key(0))
  assert placed['blocks']['q'].addressable_shards[0].data.shape == (3, 2, 2, 6)
  jax.tree.map(np.testing.assert_array_equal, placed, jax.jit(init)(jax.random.key(0)))


def test_a_dimension_that_does_not_divide_is_named():
  sharding.shardings(SPECS, mesh(fsdp=8))
  with pytest.raises(ConfigError, match="mesh.tensor: blocks/q has 4 along 'heads', not divisible by 8; "
                                        'choose mesh.tensor as a divisor of 4'):
    sharding.shardings(SPECS, mesh(tensor=8))


def test_like_places_moments_with_their_parameters_and_replicates_the_rest():
  m = mesh(data=2, fsdp=2, tensor=2)
  wanted = params.flatten(sharding.shardings(SPECS, m))
  state = jax.eval_shape(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init, params.abstract(SPECS))
  placed = params.flatten(sharding.like((state, {'step': jnp.int32(0)}), SPECS, m))
  moments = {path: s for path, s in placed.items() if any(path.endswith(p) for p in wanted)}
  assert len(moments) == 2 * len(wanted)
  for path, s in moments.items():
    assert s == next(w for p, w in wanted.items() if path.endswith(p)), path
  rest = {s for path, s in placed.items() if path not in moments}
  assert rest == {sharding.replicated(m)}


def test_like_needs_the_shape_too_and_skips_holes():
  m = mesh(fsdp=8)
  placed = sharding.like({'mu': {'embed': jnp.zeros((16, 1)), 'blocks': {'q': None}}}, SPECS, m)
  assert placed == {'mu': {'embed': sharding.replicated(m), 'blocks': {'q': None}}}


def test_constrain_acts_inside_use_only():
  x = jnp.zeros((8, 4, 8))
  f = lambda x: sharding.constrain(x, 'batch', 'length', 'embed') + 1
  np.testing.assert_array_equal(f(x), x + 1)
  assert 'sharding_constraint' not in jax.jit(f).lower(x).as_text()
  m = mesh(data=2, fsdp=2, tensor=2)
  with sharding.use(m):
    assert 'sharding_constraint' in jax.jit(lambda x: f(x)).lower(x).as_text()
    inside = jax.jit(lambda x: f(x))(x)
  assert inside.sharding.spec == P(('data', 'fsdp')), inside.sharding
  np.testing.assert_array_equal(inside, x + 1)
  assert jax.jit(lambda x: f(x) * 1)(x).sharding.device_set == {jax.devices()[0]}


def test_batches_are_split_over_data_and_fsdp():
  m = mesh(data=2, fsdp=2, tensor=2)
  x = jax.device_put(np.zeros((8, 3)), sharding.batch_sharding(m))
  assert {s.data.shape for s in x.addressable_shards} == {(2, 3)}


def test_fake_devices_number_every_collective():
  """Also equal ones, which JAX writes once and copies: two that wait at once by one number exchange their data."""
  twice = jax.shard_map(lambda x: jax.lax.psum(jax.lax.psum(x, 'data') * x, 'data'), mesh=mesh(data=8),
                        in_specs=P('data'), out_specs=P(), check_vma=False)
  text = jax.jit(twice).lower(jax.ShapeDtypeStruct((8,), jnp.float32)).compile().as_text()
  assert sorted(re.findall(r'channel_id=(\d+)', text)) == ['1', '2']
