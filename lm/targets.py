"""The machines that a run can be planned for: TPU slices and clusters of H100s, described without having one.

Rates are per device and second, one way: what a device sends while it receives as much. A TPU's device is a chip.
Sources: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} and arXiv:2304.01433 table 4 (v4's links); NVIDIA's H100 SXM5
data sheet, with one 400 Gb/s port a GPU between hosts, as in DGX H100 and AWS p5.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies
import numpy as np

from lm import budget
from lm.errors import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
  """One kind of accelerator.

  Attributes:
    kind: its name in `budget.PEAK`.
    memory: bytes that a program may fill. For TPUs what libtpu's compiler allots; for the H100 95% of what CUDA
      reports, that is XLA_PYTHON_CLIENT_MEM_FRACTION=.95.
    bandwidth: of the memory.
    link: of one ICI link of a TPU; of all NVLinks of a GPU.
    network: between hosts, per device; 0 = a slice needs none.
    dims: of a TPU slice's torus; 0 for GPUs.
    wraps: a TPU's dimension closes to a ring where its size is a multiple of this.
    usd_hour: on demand.
    plugin: (module, extra of setup.cfg) that its compiler comes with.
  """

  name: str
  kind: str
  memory: float
  bandwidth: float
  link: float
  network: float
  dims: int
  wraps: int
  usd_hour: float
  plugin: tuple[str, str]

  @property
  def peak(self) -> float:
    """FLOP/s in bfloat16."""
    return budget.PEAK[self.kind]


_TPU, _CUDA = ('libtpu', 'tpu-aot'), ('jax_plugins.xla_cuda12', 'cuda-aot')

# USD an hour: TPUs as https://cloud.google.com/tpu/pricing listed them for the US in 2025; H100: an eighth of AWS's
# p5.48xlarge in us-east-1 on 9 November 2026. Both as quoted by others, and they change: see --usd_hour.
DEVICES = {d.name: d for d in (
    Device('v4', 'TPU v4', 30.75 * GIB, 1.2e12, 50e9, 0, 3, 4, 3.22, _TPU),
    Device('v5e', 'TPU v5 lite', 15.75 * GIB, 819e9, 50e9, 0, 2, 16, 1.20, _TPU),
    Device('v5p', 'TPU v5p', 95.74 * GIB, 2.765e12, 100e9, 0, 3, 4, 4.20, _TPU),
    Device('v6e', 'TPU v6 lite', 31.25 * GIB, 1.638e12, 100e9, 0, 2, 16, 2.70, _TPU),
    Device('h100', 'NVIDIA H100', 0.95 * 84942979072, 3.352e12, 450e9, 50e9, 0, 0, 6.88, _CUDA),
)}

# What XLA's GPU compiler asks of a device, as an H100 SXM5 of 80 GB answers.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: 233472  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 84942979072  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Target:
  """A number of devices in their shape: the chips of a TPU slice along its torus, or (hosts, GPUs a host)."""

  device: Device
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  def __str__(self) -> str:
    return f'{self.device.name}:{"x".join(map(str, self.shape))}'


def parse(text: str) -> Target:
  """'v5p:8x8x16', 'v5e:4x4', 'h100:HOSTSxGPUS' -> Target.

  Raises:
    ConfigError: no such device, or a shape that it does not come in.
  """
  name, _, shape = text.partition(':')
  device = DEVICES.get(name)
  if device is None:
    raise ConfigError(f'--target={text}: no device {name!r}; expected one of {", ".join(DEVICES)}, e.g. v5p:4x4x4 or '
                      'h100:16x8')
  count = device.dims or 2
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape) or shape.count('x') != count - 1:
    form = 'HOSTSxGPUS' if not device.dims else 'x'.join('XYZ'[:count])
    raise ConfigError(f'--target={text}: shape {shape!r}; expected {name}:{form}, {count} numbers of at least 1')
  target = Target(device, tuple(map(int, shape.split('x'))))
  if not device.dims and target.shape[1] > 8:
    raise ConfigError(f'--target={text}: {target.shape[1]} GPUs a host; expected at most 8, which share NVLink')
  if device.dims and target.size > 1 and any(n % 2 for n in target.shape[:2]):
    raise ConfigError(f'--target={text}: odd first two dimensions; expected even ones, as a host holds 2x2 chips')
  return target


def devices(target: Target) -> list[jax.Device]:
  """Devices that programs can be compiled for and not run on.

  Raises:
    ConfigError: the compiler is not installed, or does not know the shape.
  """
  module, extra = target.device.plugin
  try:
    found = importlib.util.find_spec(module)
  except ModuleNotFoundError:
    found = None
  if found is None:
    raise ConfigError(f"--target={target}: no compiler for it: {module} is not installed; pip install -e '.[{extra}]'")
  try:
    return list(_topology(target).devices)
  except (RuntimeError, ValueError, NotImplementedError) as error:
    raise ConfigError(f'--target={target}: {str(error)[:300]}; expected a shape that its compiler knows, e.g. '
                      'v5p:4x4x4') from error


def _topology(target):
  if not target.device.dims:
    return topologies.get_topology_desc('h100', platform='cuda', target_config=_H100,
                                        topology=f'1x{target.shape[0]}x{target.shape[1]}')
  # libtpu would ask a metadata server where it runs, which only answers on a TPU's host.
  for name, value in (('TPU_SKIP_MDS_QUERY', '1'), ('TPU_ACCELERATOR_TYPE', 'v5p-8'),
                      ('TPU_WORKER_HOSTNAMES', 'localhost')):
    os.environ.setdefault(name, value)
  options = {'chips_per_host_bounds': (1, 1, 1)} if target.size == 1 else {}
  if target.device.name == 'v4':
    options['chip_config_name'] = 'megacore'  # both cores of a chip are one device, as JAX has it on a v4
  return topologies.get_topology_desc(str(target), platform='tpu', **options)


def rate(target: Target, members: np.ndarray) -> float:
  """Bytes a second that a device can send while the devices of `members` run a collective.

  Args:
    members: the group's devices as a subset of `devices(target)`, an object array of `jax.Device`.

  A TPU sends along each dimension of the torus that the group extends in: both ways where it goes round a closed ring,
  else one. GPUs of one host have NVLink; a group over hosts has the network ports of its members on each host in turn.
  """
  device = target.device
  members = list(np.ravel(members))
  if not device.dims:
    hosts = {}
    for d in members:
      hosts[d.process_index] = hosts.get(d.process_index, 0) + 1
    return device.link if len(hosts) == 1 else min(device.link, device.network * min(hosts.values()))
  at = np.array([d.coords for d in members])
  ways = 0
  for axis, size in enumerate(target.shape):
    extent = len(set(at[:, axis]))
    closed = extent == size and size % device.wraps == 0
    ways += 0 if extent == 1 else 2 if closed else 1
  return device.link * ways


def resource(target: Target, groups: list[np.ndarray]) -> str:
  """What the groups send over: 'ICI', 'NVLink', or the 'network' between hosts if any of them reaches over hosts."""
  if target.device.dims:
    return 'ICI'
  apart = any(len({d.process_index for d in np.ravel(group)}) > 1 for group in groups)
  return 'network' if apart else 'NVLink'
