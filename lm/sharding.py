"""The device mesh, and where each logical axis lives on it. Model files name logical axes only.

Mesh axes: data (batch), fsdp (batch, and what ZeRO divides), tensor (heads, mlp, vocabulary), pipe (layers; outside the
blocks, batch).
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import math
from typing import Any

from flax import linen
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from lm import params
from lm.errors import ConfigError

AXES = ('data', 'fsdp', 'pipe', 'tensor')  # neighbours along the last are closest: they talk most
ROWS = ('data', 'fsdp', 'pipe')  # the axes that the rows of a batch are divided over

# An axis of the mesh is used once per array, by the first logical axis that asks for it.
RULES = (
    ('batch', ROWS),
    ('length', None),
    ('sequence', None),  # the length where every token is on its own: between a block's halves
    ('heads', 'tensor'),
    ('kv_heads', 'tensor'),
    ('mlp', 'tensor'),
    ('vocab', 'tensor'),
    ('embed', 'fsdp'),
    ('head_dim', None),
    ('layers', 'pipe'),
)


@dataclasses.dataclass(frozen=True)
class Config:
  """Devices along each mesh axis; their product is the number of devices used.

  Attributes:
    zero: what is divided over fsdp (ZeRO's stages, arXiv:1910.02054 §5): 1 optimizer state, 2 and gradients, 3 and
      parameters.
    sequence: divide activations between attention and MLP over tensor, by their length (arXiv:2205.05198 §4.2.2).
    microbatches: of a pipeline, into which it cuts its rows; 0 = as many as stages.
    rounds: parts of the layers that each stage of a pipeline holds: with more than 1 it is interleaved
      (arXiv:2104.04473 §2.2).
  """

  data: int = 1
  fsdp: int = 1
  tensor: int = 1
  pipe: int = 1
  zero: int = 3
  sequence: bool = False
  microbatches: int = 0
  rounds: int = 1

  def __post_init__(self):
    for name, least in (*((axis, 1) for axis in AXES), ('zero', 1), ('microbatches', 0), ('rounds', 1)):
      if getattr(self, name) < least:
        raise ConfigError(f'mesh.{name}={getattr(self, name)}; expected at least {least}')
    if self.zero > 3:
      raise ConfigError(f'mesh.zero={self.zero}; expected 1, 2 or 3')
    for name, default in (('microbatches', 0), ('rounds', 1)):
      if self.pipe == 1 and getattr(self, name) != default:
        raise ConfigError(f'mesh.{name}={getattr(self, name)} with mesh.pipe=1; expected stages to pipeline; raise '
                          f'mesh.pipe or leave mesh.{name}={default}')

  @property
  def devices(self) -> int:
    return math.prod(getattr(self, axis) for axis in AXES)

  @property
  def rows(self) -> int:
    """Devices that the rows of a batch are divided over."""
    return math.prod(getattr(self, axis) for axis in ROWS)

  @property
  def stage_microbatches(self) -> int:
    return self.microbatches or self.pipe


def make_mesh(c: Config, devices: list[jax.Device] | None = None) -> Mesh:
  """The mesh over `devices` (default: all of them).

  Raises:
    ConfigError: the product of the axes is not the number of devices. A single-device mesh takes the first, unless that
      leaves processes of the job without any.
  """
  devices = jax.devices() if devices is None else devices
  if c.devices == 1 and jax.process_count() == 1:
    devices = devices[:1]
  if c.devices != len(devices):
    raise ConfigError(f'mesh: {" x ".join(f"{a}={getattr(c, a)}" for a in AXES)} needs {c.devices} devices, '
                      f'{len(devices)} are here; set mesh.data (or another axis) so that the product is {len(devices)}')
  # An axis need not be a whole side of a TPU's torus.
  placed = mesh_utils.create_device_mesh(tuple(getattr(c, a) for a in AXES), devices, allow_split_physical_axes=True)
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def alone() -> Mesh:
  """This process's first device, for what lies there whole while a program is on another mesh."""
  device = np.array(jax.local_devices()[:1]).reshape((1,) * len(AXES))
  return Mesh(device, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def use(mesh: Mesh, sequence: bool = False) -> Iterator[None]:
  """Makes `mesh` and the logical rules current, so that `constrain` acts; enter it around init, step and decode."""
  with jax.set_mesh(mesh), rules(sequence):
    yield


def rules(sequence: bool = False, inside: bool = False):
  """A context in which `constrain` knows the logical rules; `inside` a `shard_map` over `ROWS`, those of tensor."""
  found = [(name, 'tensor' if sequence and name == 'sequence' else axis) for name, axis in RULES]
  return linen.logical_axis_rules([(name, axis if axis == 'tensor' or not inside else None) for name, axis in found])


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """States where an activation lives, by logical axes; a no-op outside `use`."""
  return linen.with_logical_constraint(x, axes)


def local() -> bool:
  """Whether arrays in sight are whole on this device: one device, or only axes that `shard_map` has taken in hand."""
  mesh = jax.sharding.get_abstract_mesh()
  return all(mesh.shape[a] == 1 for a in mesh.axis_names if a not in mesh.manual_axes)


def partition(axes: tuple[str | None, ...], fsdp: bool = True) -> PartitionSpec:
  """Where the dimensions of an array with these logical axes lie; without `fsdp`, none is divided over that axis."""
  return linen.logical_to_mesh_axes(axes, [(name, axis) for name, axis in RULES if fsdp or axis != 'fsdp'])


def shardings(specs: params.Tree, mesh: Mesh, fsdp: bool = True) -> params.Tree:
  """`NamedSharding` of every `Spec`; without `fsdp`, none is divided over that axis.

  Raises:
    ConfigError: a dimension is not divisible by the mesh axes it is sharded over.
  """
  return params.map_with_path(lambda path, s: _named(path, s, mesh, fsdp), specs)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of arrays whose first dimension is the batch."""
  return NamedSharding(mesh, partition(('batch',)))


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


def _named(path: str, spec: params.Spec, mesh: Mesh, fsdp: bool = True) -> NamedSharding:
  place = partition(spec.axes, fsdp)
  for size, axis, names in zip(spec.shape, spec.axes, place, strict=False):
    names = (names,) if isinstance(names, str) else names or ()
    ways = math.prod(mesh.shape[n] for n in names)
    if size % ways:
      raise ConfigError(f'mesh.{names[0]}: {path} has {size} along {axis!r}, not divisible by {ways}; '
                        f'choose mesh.{names[0]} as a divisor of {size}')
  return NamedSharding(mesh, place)
