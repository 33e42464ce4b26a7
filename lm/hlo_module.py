"""The text of an optimised HLO module as data: its computations, which of them run, and how often.

`jax.stages.Compiled.as_text` prints it; see https://openxla.org/xla/operation_semantics. No device is needed, no JAX.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import math
import re
from typing import NamedTuple


class Shape(NamedTuple):
  dtype: str
  dims: tuple[int, ...]
  layout: str

  @property
  def bytes(self) -> float:
    bits = 8 if self.dtype == 'pred' else int((re.search(r'\d+', self.dtype) or ['0'])[0])
    return math.prod(self.dims) * bits / 8

  @property
  def hbm_bytes(self) -> float:
    """The same; 0 where a TPU holds it in another memory than the large one."""
    return 0.0 if re.search(r'S\([1-9]', self.layout) else self.bytes


class Instruction(NamedTuple):
  name: str
  opcode: str
  shapes: tuple[Shape, ...]  # of the result, tuples flat
  operands: tuple[str, ...]  # names
  rest: str  # attributes
  root: bool


class Computation(dict):
  """{name: Instruction} in order of execution."""

  @functools.cached_property
  def root(self) -> Instruction:
    return next((i for i in self.values() if i.root), None) or list(self.values())[-1]

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    out = {}
    for i in self.values():
      for name in dict.fromkeys(i.operands):
        out.setdefault(name, []).append(i)
    return out

  def inputs(self, i: Instruction) -> tuple[Shape, ...]:
    return tuple(s for name in i.operands if name in self for s in self[name].shapes)


@dataclasses.dataclass(frozen=True)
class Module:
  computations: dict[str, Computation]
  entry: str


class Site(NamedTuple):
  """An instruction in its place. count: executions; fused: inside a fusion, where results stay out of memory."""

  instruction: Instruction
  computation: Computation
  count: float
  fused: bool


def parse(text: str) -> Module:
  """The computations of the module."""
  computations, entry, current = {}, '', None
  for line in text.splitlines():
    if current is None:
      header = re.match(r'(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$', line)
      if header and not line.startswith('HloModule'):
        current = computations[header[2]] = Computation()
        entry = header[2] if header[1] else entry
    elif line.startswith('}'):
      current = None
    else:
      instruction = _instruction(line)
      if instruction:
        current[instruction.name] = instruction
  return Module(computations, entry or next(reversed(computations), ''))


def walk(module: Module, weight: Callable[[Instruction, Computation], float]) -> Iterator[Site]:
  """Every instruction that runs, with its count. Of a conditional's branches, the heaviest by `weight` counts."""
  def visit(name, count, fused):
    computation = module.computations[name]
    for i in computation.values():
      if i.opcode == 'while':
        n = trips(module, i, computation)
        yield from visit(called(i, 'body')[0], count * (1 if n is None else n), fused)
      elif i.opcode == 'conditional':
        branches = called(i, 'branch_computations') or called(i, 'true_computation') + called(
            i, 'false_computation')
        yield from visit(max(branches, key=total), count, fused)
      elif i.opcode in ('fusion', 'call', 'async-start', 'custom-call'):
        for inner in called(i, 'calls') or (called(i, 'to_apply') if i.opcode == 'call' else ()):
          yield from visit(inner, count, fused or i.opcode == 'fusion')
      yield Site(i, computation, count, fused)

  @functools.cache
  def total(name):
    return sum(weight(s.instruction, s.computation) * s.count for s in visit(name, 1.0, False))
  yield from visit(module.entry, 1.0, False)


def trips(module: Module, loop: Instruction, computation: Computation) -> int | None:
  """How often a while loop runs: as XLA annotates it, or by its counter's start, step and bound; None = not told."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
  if known:
    return int(known[1])
  condition, body = (module.computations[called(loop, name)[0]] for name in ('condition', 'body'))
  inner = [condition, *(module.computations[c] for i in condition.values() for c in called(i, 'calls'))]
  tests = [i for c in inner for i in c.values() if i.opcode == 'compare']
  carried = [_index(i) for i in condition.values() if i.opcode == 'get-tuple-element']
  first = _plain(computation, computation.get(loop.operands[0]))
  if len(tests) != 1 or not carried or first is None or first.opcode != 'tuple':
    return None
  start = lambda k: _constant(_plain(computation, computation.get(first.operands[k])))
  bounds = [_constant(i) for i in condition.values() if i.opcode == 'constant'] + [start(k) for k in carried[1:]]
  direction = re.search(r'direction=(\w+)', tests[0].rest)[1]
  values = (start(carried[0]), _step(module, body, carried[0]), *bounds)
  if len(values) != 3 or None in values or direction not in ('LT', 'LE') or values[1] < 1:
    return None
  return max(0, -(-(values[2] + (direction == 'LE') - values[0]) // values[1]))


def _index(i):
  return int(re.search(r'index=(\d+)', i.rest)[1])


def _plain(computation, i):
  """What `i` is a copy of."""
  while i is not None and i.opcode in ('copy', 'bitcast', 'convert'):
    i = computation.get(i.operands[0])
  return i


def _constant(i):
  """The value of a scalar integer constant, or None."""
  whole = i is not None and i.opcode == 'constant' and i.shapes[0].dims == () and i.shapes[0].dtype[0] in 'su'
  return int(re.match(r'-?\d+', i.rest)[0]) if whole else None


def _step(module, body, counter):
  """What a trip adds to element `counter` of the state; None where it is no sum of constants."""
  def added(computation, name, outer=None):  # outer: (fusion, its computation), inside one
    i = _plain(computation, computation.get(name))
    if i is None:
      return None
    if i.opcode == 'parameter' and outer:
      return added(outer[1], outer[0].operands[int(re.match(r'\d+', i.rest)[0])])
    source, part = i, None
    if i.opcode == 'get-tuple-element':
      source, part = computation[i.operands[0]], _index(i)
    if source.opcode == 'parameter':
      return 0 if part == counter else None
    if source.opcode == 'fusion':
      inner = module.computations[called(source, 'calls')[0]]
      return added(inner, inner.root.name if part is None else inner.root.operands[part], (source, computation))
    if i.opcode != 'add':
      return _constant(i)
    parts = [added(computation, operand, outer) for operand in i.operands]
    return None if None in parts else sum(parts)
  return added(body, body.root.operands[counter]) if body.root.opcode == 'tuple' else None


def _instruction(line):
  """One line of a computation; None where it is none."""
  head = re.match(r'\s+(ROOT )?%?([\w.\-]+) = ', line)
  if not head:
    return None
  end = _closing(line, head.end()) if line[head.end()] == '(' else line.index(' ', head.end())
  shapes = tuple(Shape(dtype, tuple(int(n.lstrip('<=')) for n in dims.split(',') if n), layout or '')
                 for dtype, dims, layout in re.findall(r'\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?', line[head.end():end]))
  call = re.match(r' ?([\w\-]+)(?=\()', line[end:])
  if not call:
    return None
  start = end + call.end()
  stop = _closing(line, start)
  operands = tuple(re.findall(r'%([\w.\-]+)', line[start:stop]))
  rest = line[start + 1:] if call[1] in ('constant', 'parameter') else line[stop:]
  return Instruction(head[2], call[1], shapes, operands, rest, bool(head[1]))


def _closing(line, start):
  """The place behind the parenthesis that closes the one at `start`."""
  depth = 0
  for at in re.finditer(r'[()]', line[start:]):
    depth += 1 if at[0] == '(' else -1
    if depth == 0:
      return start + at.end()
  return len(line)


def called(i: Instruction, attribute: str) -> list[str]:
  """Names of the computations in an attribute: 'calls', 'body', 'branch_computations', ..."""
  found = re.search(rf'\b{attribute}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))', i.rest)
  return re.findall(r'[\w.\-]+', found[1] or found[2]) if found else []
