"""What a run costs on a machine that is not there: its real training step, compiled for it and read (`lm.hlo`).

Bytes, FLOPs and seconds are of one device and one step unless said otherwise.
"""

from collections.abc import Callable
import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from lm import hlo, params, plan_tasks, pretrain_encoder, run, sharding, start, summary, targets
from lm.errors import ConfigError

# Share of the roofline that a run is taken to reach: PaLM 540B's hardware FLOPs utilisation on 6,144 TPU v4
# (arXiv:2204.02311 §4.1), recomputation counted as work.
UTILISATION = 0.578


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes by kind. `activations` is what the compiler needs beyond the other three, all its temporaries included."""

  parameters: float
  gradients: float
  optimizer: float
  activations: float
  limit: float

  @property
  def peak(self) -> float:
    return self.parameters + self.gradients + self.optimizer + self.activations

  @property
  def fits(self) -> bool:
    return self.peak <= self.limit


@dataclasses.dataclass(frozen=True)
class Link:
  """Collectives of one kind, along the same axes, that come from the same place: their bytes and time are summed."""

  kind: str
  axes: tuple[str, ...]
  size: int
  count: float
  bytes: float
  seconds: float
  resource: str


@dataclasses.dataclass(frozen=True)
class Plan:
  """A step that was compiled; where it does not fit a TPU its compiler gives up, and only `memory` is known.

  Attributes:
    flops: of the compiled program. model_flops: 6 N + attention a token (`budget.Flops`).
    seconds: by resource, each as if the others were free: 'compute', 'memory', and the links by name.
    loops: whose trip count is not known, so that too little of them is counted.
  """

  target: targets.Target
  mesh: sharding.Config
  memory: Memory
  flops: float
  model_flops: float
  seconds: dict[str, float]
  links: tuple[Link, ...]
  tokens: int
  steps: int
  compile_s: float
  loops: tuple[str, ...] = ()

  @property
  def bound(self) -> float:
    """The roofline: seconds of a step in which everything overlaps with what takes longest."""
    return max(self.seconds.values(), default=math.nan)

  @property
  def binding(self) -> str:
    return max(self.seconds, key=self.seconds.get, default='')

  def step_s(self, utilisation: float = UTILISATION) -> float:
    """Seconds of a step at a share of the roofline."""
    return self.bound / utilisation

  def mfu(self, utilisation: float = 1.0) -> float:
    """Model FLOPs a second over the peak: at most, or at a share of the roofline."""
    return self.model_flops / self.step_s(utilisation) / self.target.device.peak

  def days(self, utilisation: float = UTILISATION) -> float:
    return self.steps * self.step_s(utilisation) / 86400

  def usd(self, utilisation: float = UTILISATION, usd_hour: float | None = None) -> float:
    price = self.target.device.usd_hour if usd_hour is None else usd_hour
    return self.days(utilisation) * 24 * self.target.size * price


def compiled(c: run.Config, task: run.Task, parts: run.Parts) -> jax.stages.Compiled:
  """The training step of `run.run`, compiled for the devices of `parts.mesh`."""
  state = start.abstract(task, parts)
  key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=sharding.replicated(parts.mesh))
  with sharding.use(parts.mesh, c.mesh.sequence):
    return parts.step.lower(state, plan_tasks.batch_of(c, parts.mesh), key).compile()


def make(c: run.Config, target: targets.Target, keep: Callable[[str], None] = lambda text: None) -> Plan:
  """Compiles the step of `c` for `target` and reads what it takes.

  Args:
    keep: is given the optimised HLO.

  Raises:
    ConfigError: the mesh does not suit the target, or its compiler is not installed.
  """
  devices = targets.devices(target)
  if c.mesh.devices != target.size:
    raise ConfigError(f'mesh: {c.mesh.devices} devices, --target={target} has {target.size}; set mesh.data, mesh.fsdp, '
                      f'mesh.tensor, mesh.pipe so that their product is {target.size}, or try --search')
  task = plan_tasks.task_of(c)
  try:
    parts = run.build(c, task, devices)
  except NotImplementedError as error:
    raise ConfigError(f'mesh: its axes cannot be laid over {target}; choose sizes that are products of its '
                      'dimensions') from error
  tokens = summary.tokens_per_step(c, task) // task.around.updates
  known = {'target': target, 'mesh': c.mesh, 'model_flops': task.flops.total * tokens / target.size, 'tokens': tokens,
           'steps': c.optim.steps}
  began = time.perf_counter()
  try:
    program = compiled(c, task, parts)
  except jax.errors.JaxRuntimeError as error:
    peak = needed(str(error))
    if peak is None:
      raise
    memory = _memory(c, task, parts, target, peak)
    return Plan(memory=memory, flops=math.nan, seconds={}, links=(), compile_s=time.perf_counter() - began, **known)
  seconds = time.perf_counter() - began
  text = program.as_text()
  keep(text)
  return _read(text, parts, target, _memory(c, task, parts, target, _peak(program)), seconds, known)


def _read(text, parts, target, memory, compile_s, known):
  module = hlo.parse(text)
  flops = sum(hlo.flops(module).values())
  links = _links(hlo.collectives(module, parts.mesh), parts.mesh, target)
  seconds = {'compute': flops / target.device.peak, 'memory': hlo.traffic(module) / target.device.bandwidth}
  for link in links:
    seconds[link.resource] = seconds.get(link.resource, 0.0) + link.seconds
  return Plan(memory=memory, flops=flops, seconds=seconds, links=links, compile_s=compile_s,
              loops=tuple(hlo.unknown_loops(module)), **known)


def _links(collectives, mesh, target):
  found = {}
  devices = mesh.devices.reshape(-1)
  for c in collectives:
    members = [devices[row] for row in (c.groups_Gn if c.kind == 'collective-permute' else c.groups_Gn[[0, -1]])]
    speeds = [targets.rate(target, group) for group in members]
    seconds = c.total / min(speeds)
    old = found.get((c.kind, c.axes))
    resource = targets.resource(target, members)
    found[c.kind, c.axes] = Link(
        c.kind, c.axes, c.size, c.count + (old.count if old else 0), c.total + (old.bytes if old else 0),
        seconds + (old.seconds if old else 0), resource)
  return tuple(sorted(found.values(), key=lambda x: -x.seconds))


def bytes_of(tree: Any, shardings: Any) -> float:
  """Of the arrays (or Specs, as f32) on one device."""
  size = lambda x, s: math.prod(s.shard_shape(x.shape)) * getattr(x, 'dtype', jnp.dtype('float32')).itemsize
  return float(sum(jax.tree.leaves(jax.tree.map(size, tree, shardings))))


def _memory(c, task, parts, target, peak):
  shapes = start.abstract(task, parts)
  parameters = bytes_of((shapes.params, shapes.frozen), (parts.state.params, parts.state.frozen))
  optimizer = bytes_of(shapes.opt_state, parts.state.opt_state)
  places = params.split(sharding.shardings(task.specs, parts.mesh, c.mesh.zero > 1), parts.trainable)[0]
  gradients = min(bytes_of(shapes.params, places), max(0.0, peak - parameters - optimizer))
  rest = max(0.0, peak - parameters - optimizer - gradients)
  return Memory(parameters, gradients, optimizer, rest, target.device.memory)


def _peak(program):
  m = program.memory_analysis()
  return float(m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
               + m.generated_code_size_in_bytes)


def needed(message: str) -> float | None:
  """Bytes that a TPU's compiler says it would have taken; None where it failed for another reason."""
  found = re.search(r'Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm|\(([\d.]+)([KMGT])\) exceeds available', message)
  if 'RESOURCE_EXHAUSTED' not in message or not found:
    return None
  number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
  return float(number) * 1024 ** ('KMGT'.index(unit) + 1)


def advice(c: run.Config, plan: Plan) -> str:
  """'fits', with what is left; or what to change, worked out from the kind that takes most."""
  m, gib = plan.memory, targets.GIB
  if m.fits:
    return f'fits: {m.peak / gib:.1f} of {m.limit / gib:.1f} GiB a device ({m.peak / m.limit:.0%})'
  state = m.parameters + m.gradients + m.optimizer
  head = f'does not fit: {m.peak / gib:.1f} of {m.limit / gib:.1f} GiB a device'
  if state > m.limit or state > m.activations:
    share = math.ceil(state / max(m.limit - min(m.activations, m.limit / 2), 1))
    return (f'{head}; parameters, gradients and optimizer take {state / gib:.1f} GiB: shard them {share}x further, by '
            f'mesh.fsdp={c.mesh.fsdp * share}, mesh.tensor or mesh.pipe in place of mesh.data={c.mesh.data}, or take '
            f'a larger --target')
  return f'{head}; activations take {m.activations / gib:.1f} GiB: {_less_activation(c, m, state)}'


def _less_activation(c, m, state):
  model = next(iter(pretrain_encoder.networks(c.model).values()))
  if model.remat != 'full':
    return '--set model.remat=full'
  rows = c.data.batch // (c.mesh.data * c.mesh.fsdp * c.optim.microbatches)
  factor = m.activations / max(m.limit - state, 1)
  choices = [n for n in range(2, rows + 1) if rows % n == 0]
  enough = next((n for n in choices if n >= factor), choices[-1] if choices else 0)
  if enough:
    return f'--set optim.microbatches={c.optim.microbatches * enough}'
  return f'a microbatch is one row a device already; raise mesh.tensor={c.mesh.tensor}, which divides it further'
