"""What a compiled program does, read from the text of its optimised HLO: each collective with its mesh axes and bytes,
the FLOPs of its matmuls, its traffic to memory.

XLA's own cost analysis counts the body of a loop once; here everything is multiplied by the trip counts of the loops
around it. What CPUs, TPUs (matmuls are convolutions over dilated windows) and GPUs (cuBLAS calls, Triton fusions) call
things is read alike. Only text comes in: no device is needed. In suffixes, G groups of n devices.
"""

import dataclasses
import math
import re
from typing import Any

import numpy as np

from lm import hlo_module
from lm.hlo_module import Instruction, Module, parse

# Bytes that a device of a group of n sends for one byte of its operand, as rings do it.
RING = {'all-reduce': lambda n: 2 * (n - 1) / n, 'all-gather': lambda n: n - 1, 'reduce-scatter': lambda n: (n - 1) / n,
        'all-to-all': lambda n: (n - 1) / n, 'ragged-all-to-all': lambda n: (n - 1) / n,
        'collective-permute': lambda n: 1, 'collective-broadcast': lambda n: 1}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction.

  Attributes:
    kind: a key of `RING`, e.g. 'all-reduce'.
    axes: of the mesh, along which its groups extend, in the mesh's order; () without a mesh.
    size: devices a group; of a permutation, those that take part.
    bytes: that one device sends in one execution, by the ring's formula.
    count: executions in one run of the program.
    payload: bytes of the operands on one device.
    dtypes: of the operands.
    where: the JAX operation that it came from, e.g. 'jit(step)/.../psum'; '' where XLA kept none.
    groups_Gn: numbers of devices in the order of the mesh; of a permutation, pairs (from, to).
  """

  kind: str
  axes: tuple[str, ...]
  size: int
  bytes: float
  count: float
  payload: float
  dtypes: tuple[str, ...]
  where: str
  groups_Gn: np.ndarray = dataclasses.field(compare=False, repr=False)

  @property
  def total(self) -> float:
    """Bytes that one device sends in one run of the program."""
    return self.bytes * self.count


def collectives(text: str | Module, mesh: Any = None) -> list[Collective]:
  """Every collective of the program in order of execution; groups of one device, which move
  nothing, are left out.

  Args:
    text: `compiled.as_text()`, or what `parse` made of it.
    mesh: the `jax.sharding.Mesh` it was compiled for, or {axis: size} in the mesh's order.
  """
  module = text if isinstance(text, Module) else parse(text)
  shape = dict(getattr(mesh, 'shape', mesh) or {})
  found = []
  for i, computation, count, fused in _walk(module):
    kind = i.opcode.removesuffix('-start')
    if kind not in RING:
      continue
    if kind == 'all-reduce' and fused and computation.root.opcode == 'dynamic-slice' and (
        computation.root.operands[0] == i.name):
      kind = 'reduce-scatter'  # as a TPU spells it
    groups_Gn = _groups(i, math.prod(shape.values()))
    size = len({*groups_Gn.flat}) if kind == 'collective-permute' else groups_Gn.shape[1]
    if size < 2:
      continue
    inputs = computation.inputs(i)
    payload = sum(s.bytes for s in inputs)
    found.append(Collective(
        kind, _axes(groups_Gn, shape), size, payload * RING[kind](size), count, payload,
        tuple(dict.fromkeys(s.dtype for s in inputs)), _where(i), groups_Gn))
  return found


def flops(text: str | Module) -> dict[str, float]:
  """FLOPs of one run on one device by JAX operation (`Collective.where`): matmuls and convolutions, nothing else.

  A multiplication with padding, or with the holes of a dilated window, is not counted: no hardware does it.
  """
  module = text if isinstance(text, Module) else parse(text)
  totals = {}
  for i, computation, count, _ in _walk(module):
    n = _flops(i, computation)
    if n and count:
      totals[_where(i)] = totals.get(_where(i), 0.0) + n * count
  return totals


def traffic(text: str | Module) -> float:
  """Bytes that one run moves between a device's memory and its cores: operands and results of all that is not fused.

  Slices count as what they take, updates in place as what they put. Caches beyond a fusion are not modelled.
  """
  module = text if isinstance(text, Module) else parse(text)
  return sum(_traffic(module, i, computation) * count for i, computation, count, fused in _walk(module) if not fused)


def unknown_loops(text: str | Module) -> list[str]:
  """Loops whose trip count the text does not tell; they are counted as one trip."""
  module = text if isinstance(text, Module) else parse(text)
  return [i.name for i, computation, _, _ in _walk(module)
          if i.opcode == 'while' and hlo_module.trips(module, i, computation) is None]


def _groups(i: Instruction, devices: int) -> np.ndarray:
  """The groups of a collective [G, n] as device numbers in the mesh's order; of a permutation, pairs (from, to)."""
  numbers = lambda text: [int(n) for n in text.split(',')] if text else []
  tiles = lambda dims, order: np.arange(math.prod(dims)).reshape(dims).transpose(order or range(len(dims)))
  pairs = re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}', i.rest)
  if pairs:
    pairs_G2 = np.array([numbers(p) for p in re.findall(r'\{(\d+,\d+)\}', pairs[1])]).reshape(-1, 2)
    return pairs_G2[pairs_G2[:, 0] != pairs_G2[:, 1]]
  listed = re.search(r'replica_groups=\{((?:\{[\d,]*\},?)*)\}', i.rest)
  if listed:
    found = re.findall(r'\{([\d,]*)\}', listed[1])
    return np.array([numbers(g) for g in found]) if found else np.arange(devices)[None]
  tiled = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', i.rest)
  if tiled:
    return tiles(numbers(tiled[2]), numbers(tiled[3] or '')).reshape(numbers(tiled[1]))
  named = re.search(r'replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}',
                    i.rest)
  return _named_groups(dict(re.findall(r"'([^']+)'=(\d+)", named[1])), named[4], tiles(
      numbers(named[2]), numbers(named[3] or '')) if named[2] else None)


def _named_groups(shape, over, devices):
  """Groups along named axes of a mesh of XLA's; `'a':(2)4` is the part of axis a of size 4 inside blocks of size 2."""
  parts = {name: (int(before or 1), int(size or shape[name]))
           for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over)}
  dims, along = [], []
  for name, size in shape.items():
    before, size = parts.get(name, (int(size), 1))
    dims += [before, size, int(shape[name]) // before // size]
    along.append(3 * len(along) + 1)
  devices = np.arange(math.prod(dims)) if devices is None else devices
  devices = np.moveaxis(devices.reshape(dims), along, range(-len(along), 0))
  return devices.reshape(-1, math.prod(dims[a] for a in along))


def _axes(groups_Gn, shape):
  """The axes of the mesh along which any group extends."""
  if not shape:
    return ()
  at = np.unravel_index(groups_Gn, tuple(shape.values()))
  return tuple(name for name, x_Gn in zip(shape, at, strict=True) if (x_Gn != x_Gn[:, :1]).any())


def _walk(module):
  return hlo_module.walk(module, _flops)


def _where(i):
  return (re.search(r'op_name="([^"]*)"', i.rest) or ['', ''])[1]


def _flops(i, computation):
  """Twice the multiplications of a dot, a convolution or a GPU library's matmul; of a kernel, what it declares."""
  if i.opcode == 'convolution':
    return _convolution_flops(i, computation)
  if i.opcode == 'custom-call':
    declared = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', i.rest) or re.search(r'_flops(\d+)', _where(i))
    if declared:
      return float(declared[1])
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.rest)
  else:
    contracted = re.search(r'lhs_contracting_dims=\{([^}]*)\}', i.rest) if i.opcode == 'dot' else None
  if not contracted:
    return 0.0
  lhs = computation[i.operands[0]].shapes[0].dims
  return 2.0 * math.prod(i.shapes[0].dims) * math.prod(lhs[int(d)] for d in re.findall(r'\d+', contracted[1]))


def _convolution_flops(i, computation):
  lhs, rhs = (computation[name].shapes[0].dims for name in i.operands[:2])
  left, right, out = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', i.rest).groups()
  window = dict(re.findall(r'(\w+)=([\dx_\-]+)', (re.search(r'window=\{([^}]*)\}', i.rest) or ['', ''])[1]))
  count = lhs[left.index('b')] * rhs[right.index('i')] * rhs[right.index('o')]
  for n, d in enumerate(sorted(filter(str.isdigit, left))):
    part = lambda key, default, n=n: window[key].split('x')[n] if key in window else default  # noqa: B023
    low = int(part('pad', '0_0').split('_')[0])
    count *= _meetings(lhs[left.index(d)], rhs[right.index(d)], i.shapes[0].dims[out.index(d)], low, *(
        int(part(key, '1')) for key in ('stride', 'lhs_dilate', 'rhs_dilate')))
  return 2.0 * count / int((re.search(r'batch_group_count=(\d+)', i.rest) or [0, 1])[1])


def _meetings(inputs, window, outputs, low, stride, dilate, spread):
  """Pairs (place of the output, place of the window) that fall on an element of the input: in one dimension."""
  at = np.arange(outputs)[:, None] * stride + np.arange(window)[None] * spread - low
  return int(((at >= 0) & (at % dilate == 0) & (at // dilate < inputs)).sum())


_FREE = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'call', 'conditional', 'after-all',
         'partition-id', 'replica-id', 'opt-barrier', 'domain')


def _traffic(module, i, computation):
  size = lambda shapes: sum(s.hbm_bytes for s in shapes)
  kind = i.opcode.removesuffix('-start')
  if i.opcode in _FREE or (kind != i.opcode and kind not in RING) or i.opcode.removesuffix('-done') in RING:
    return 0.0
  if kind in RING:
    return 2 * size(computation.inputs(i))
  if i.opcode == 'fusion':
    return _fusion_traffic(module.computations[hlo_module.called(i, 'calls')[0]], i, computation)
  if i.opcode.endswith('-done'):  # of a copy or slice that was started
    return size(i.shapes)
  return _reads(i, computation.inputs(i)) + _writes(i, computation)


def _reads(i, inputs):
  if i.opcode in ('dynamic-slice', 'slice', 'gather'):
    return sum(s.hbm_bytes for s in i.shapes)
  return sum(s.hbm_bytes for s in inputs[1 if i.opcode == 'dynamic-update-slice' else 0:])


def _writes(i, computation):
  if i.opcode == 'dynamic-update-slice' and i.operands[1] in computation:
    return min(sum(s.hbm_bytes for s in i.shapes), computation[i.operands[1]].shapes[0].bytes)
  return sum(s.hbm_bytes for s in i.shapes)


def _fusion_traffic(inner, fusion, computation):
  total = 0.0
  parameters = [i for i in inner.values() if i.opcode == 'parameter']
  for p in parameters:
    outer = computation.get(fusion.operands[int(re.match(r'\d+', p.rest)[0])])
    whole = sum(s.hbm_bytes for s in outer.shapes) if outer else 0.0
    users = list(_readers(inner, p.name))
    if all(u.opcode in ('dynamic-slice', 'slice', 'gather') for u, _ in users):
      whole = min(whole, sum(u.shapes[0].bytes for u, _ in users))
    elif all(u.opcode == 'dynamic-update-slice' and u.operands[0] == name for u, name in users):
      whole = 0.0
    total += whole
  roots = inner.root.operands if inner.root.opcode == 'tuple' else (inner.root.name,)
  for shape, name in zip(fusion.shapes, roots, strict=False):
    root = inner[name]
    while root.opcode in ('bitcast', 'copy') and root.operands[0] in inner:
      root = inner[root.operands[0]]
    total += min(shape.hbm_bytes, _writes(root, inner)) if root.opcode == 'dynamic-update-slice' else shape.hbm_bytes
  return total


def _readers(inner, name):
  """(instruction, the name it uses) of all that reads `name`, looking through bitcasts."""
  for user in inner.users.get(name, ()):
    if user.opcode == 'bitcast':
      yield from _readers(inner, user.name)
    else:
      yield user, name
