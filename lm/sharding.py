"""The device mesh, and where each logical axis lives on it. Model files name logical axes only.

Mesh axes: data (batch), fsdp (batch, and parameters sharded: ZeRO-3), tensor (heads, mlp, vocabulary), pipe (layers).
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import math
from typing import Any

from flax import linen
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm import params
from lm.errors import ConfigError

AXES = ('data', 'fsdp', 'tensor', 'pipe')

# An axis of the mesh is used once per array, by the first logical axis that asks for it.
RULES = (
    ('batch', ('data', 'fsdp')),
    ('length', None),
    ('heads', 'tensor'),
    ('kv_heads', 'tensor'),
    ('mlp', 'tensor'),
    ('vocab', 'tensor'),
    ('embed', 'fsdp'),
    ('head_dim', None),
    ('layers', None),
    ('stage', 'pipe'),
)


@dataclasses.dataclass(frozen=True)
class Config:
  """Devices along each mesh axis; their product is the number of devices used."""

  data: int = 1
  fsdp: int = 1
  tensor: int = 1
  pipe: int = 1

  def __post_init__(self):
    for axis in AXES:
      if getattr(self, axis) < 1:
        raise ConfigError(f'mesh.{axis}={getattr(self, axis)}; expected at least 1')

  @property
  def devices(self) -> int:
    return math.prod(getattr(self, axis) for axis in AXES)


def make_mesh(c: Config, devices: list[jax.Device] | None = None) -> Mesh:
  """The mesh over `devices` (default: all of them).

  Raises:
    ConfigError: the product of the axes is not the number of devices; a single-device mesh takes the first.
  """
  devices = jax.devices() if devices is None else devices
  if c.devices == 1:
    devices = devices[:1]
  if c.devices != len(devices):
    raise ConfigError(f'mesh: {" x ".join(f"{a}={getattr(c, a)}" for a in AXES)} needs {c.devices} devices, '
                      f'{len(devices)} are here; set mesh.data (or another axis) so that the product is {len(devices)}')
  return jax.make_mesh(tuple(getattr(c, a) for a in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES),
                       devices=devices)


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
  """Makes `mesh` and the logical rules current, so that `constrain` acts; enter it around init, step and decode."""
  with jax.set_mesh(mesh), linen.logical_axis_rules(RULES):
    yield


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """States where an activation lives, by logical axes; a no-op outside `use`."""
  return linen.with_logical_constraint(x, axes)


def spec_of(axes: tuple[str | None, ...]) -> PartitionSpec:
  return linen.logical_to_mesh_axes(axes, RULES)


def shardings(specs: params.Tree, mesh: Mesh) -> params.Tree:
  """`NamedSharding` of every `Spec`.

  Raises:
    ConfigError: a dimension is not divisible by the mesh axes it is sharded over.
  """
  return params.map_with_path(lambda path, s: _named(path, s, mesh), specs)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of arrays whose first dimension is the batch."""
  return NamedSharding(mesh, spec_of(('batch',)))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def like(tree: params.Tree, specs: params.Tree, mesh: Mesh) -> params.Tree:
  """Shardings for any tree that holds copies of the parameters (optimizer moments): matched by path suffix and shape.

  Leaves that match no parameter (counters, scalars) are replicated.
  """
  by_path = params.flatten(specs)

  def place(path: str, leaf: Any) -> NamedSharding:
    parts = path.split('/')
    for i in range(len(parts)):
      spec = by_path.get('/'.join(parts[i:]))
      if spec is not None and spec.shape == leaf.shape:
        return _named(path, spec, mesh)
    return replicated(mesh)
  return params.map_with_path(place, tree)


def _named(path: str, spec: params.Spec, mesh: Mesh) -> NamedSharding:
  partition = spec_of(spec.axes)
  for size, axis, names in zip(spec.shape, spec.axes, partition, strict=False):
    names = (names,) if isinstance(names, str) else names or ()
    ways = math.prod(mesh.shape[n] for n in names)
    if size % ways:
      raise ConfigError(f'mesh.{names[0]}: {path} has {size} along {axis!r}, not divisible by {ways}; '
                        f'choose mesh.{names[0]} as a divisor of {size}')
  return NamedSharding(mesh, partition)
