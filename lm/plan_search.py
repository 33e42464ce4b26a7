"""Which mesh, rematerialisation and microbatches suit a run on a target: all of them by formula, so that only the best
few need be compiled (`lm.plan`).

The formulas rank; they do not promise. Bytes are of one device, D embed, t tokens of a microbatch on a device.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import itertools
import math

import jax
import numpy as np

from lm import config, params, pipeline, plan_tasks, pretrain_encoder, run, sharding, targets
from lm.errors import ConfigError
from lm.models import decoder

REMAT = ('none', 'dots', 'full')
MOST_TENSOR, MOST_PIPE, MOST_MICROBATCHES = 16, 16, 64
UNSEEN = 0.2  # of the shorter of computing and sending, what does not hide behind the longer
ROOM = 0.9  # of the memory: what formulas do not see needs the rest


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A config, and what the formulas say of it: bytes and seconds of a step on one device."""

  config: run.Config
  memory: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class _Shape:
  """The parts of a network that memory and time depend on, summed over the networks of a model."""

  layers: int
  embed: int
  heads: int
  attention: int  # heads x their dimension
  keys: int  # the same of keys and values together
  mlp: int  # all matrices that widen
  vocab: int
  width: int  # bytes of an activation


def candidates(c: run.Config, target: targets.Target) -> list[Candidate]:
  """Every choice that fits by the formulas, the fastest first, one for each mesh.

  Raises:
    ConfigError: nothing fits.
  """
  devices = targets.devices(target)
  task = plan_tasks.task_of(c)
  total = params.count(task.specs)
  best, least = {}, None
  for mesh in _meshes(target):
    speeds = _speeds(mesh, target, devices)
    if speeds is None:
      continue
    for made in _configs(c, mesh):
      found = _judge(made, target, task.flops, total, speeds)
      least = found if least is None or found.memory < least.memory else least
      old = best.get(mesh)
      if found.memory <= ROOM * target.device.memory and (old is None or found.seconds < old.seconds):
        best[mesh] = found
  if not best:
    where = f'; least is {least.memory / targets.GIB:.1f} GiB a device at {changes(c, least.config)}' if least else ''
    raise ConfigError(f'--search: no mesh of {target} fits {target.device.memory / targets.GIB:.1f} GiB{where}; take a '
                      'larger --target, or a data.batch that divides further')
  return sorted(best.values(), key=lambda x: (x.seconds, x.memory))


def changes(old: run.Config, new: run.Config) -> str:
  """The --set flags that make `new` of `old`."""
  return ' '.join(f'--set {path}={value}' for path, (_, value) in config.diff(old, new).items()) or 'no change'


def _meshes(target) -> Iterator[sharding.Config]:
  tensor_most = min(MOST_TENSOR, target.shape[1]) if not target.device.dims else MOST_TENSOR
  for tensor in _divisors(target.size, tensor_most):
    for pipe in _divisors(target.size // tensor, MOST_PIPE):
      for fsdp in _divisors(target.size // tensor // pipe):
        yield sharding.Config(data=target.size // tensor // pipe // fsdp, fsdp=fsdp, tensor=tensor, pipe=pipe)


def _divisors(n, most=None):
  return [d for d in range(1, min(n, most or n) + 1) if n % d == 0]


def _configs(c, mesh) -> Iterator[run.Config]:
  """`c` on the mesh with each microbatching and rematerialisation that its checks let pass."""
  rows = c.data.batch // mesh.rows if c.data.batch % mesh.rows == 0 else 0
  for n in _divisors(rows) if rows else ():
    stages = max(d for d in _divisors(rows // n * mesh.pipe, MOST_MICROBATCHES)) if mesh.pipe > 1 else 0
    for remat, sequence in itertools.product(REMAT, (False, True)[:1 + (mesh.tensor > 1)]):
      placed = dataclasses.replace(c.mesh, data=mesh.data, fsdp=mesh.fsdp, tensor=mesh.tensor, pipe=mesh.pipe,
                                   microbatches=stages, rounds=1, sequence=sequence)
      with contextlib.suppress(ConfigError):  # it does not divide
        yield config.replace(c, mesh=placed, model=_with_remat(c.model, remat), optim__microbatches=n)


def _with_remat(model, remat):
  if hasattr(model, 'remat'):
    return dataclasses.replace(model, remat=remat)
  return dataclasses.replace(model, **{name: dataclasses.replace(getattr(model, name), remat=remat)
                                       for name in ('generator', 'discriminator')})


def _speeds(mesh, target, devices):
  """{axis: bytes a second} of its groups as JAX places them; None where it cannot."""
  try:
    placed = sharding.make_mesh(mesh, devices).devices
  except (NotImplementedError, ConfigError):
    return None
  if placed.ndim == 0 or placed.size == 1:
    return {axis: math.inf for axis in sharding.AXES}
  rows = {axis: np.moveaxis(placed, i, 0).reshape(placed.shape[i], -1)[:, 0] for i, axis in enumerate(sharding.AXES)}
  return {axis: targets.rate(target, group) if len(group) > 1 else math.inf for axis, group in rows.items()}


def _judge(c, target, flops, total, speeds):
  m, shape = c.mesh, _shape(c)
  remat = next(iter(pretrain_encoder.networks(c.model).values())).remat
  rows = c.data.batch / m.rows / c.optim.microbatches
  tokens = rows * c.data.length
  return Candidate(c, _bytes(c, shape, total, rows, tokens, remat), _seconds(c, target, shape, total, flops, tokens,
                                                                             remat, speeds))


def _shape(c):
  networks = list(pretrain_encoder.networks(c.model).values())
  gates = lambda n: 2 if getattr(n, 'activation', '') == 'swiglu' else 1
  head = lambda n: getattr(n, 'head_dim', n.embed // n.heads)
  keys = lambda n: 2 * getattr(n, 'kv_heads', n.heads) * head(n)
  sizes = [_Shape(n.layers, n.embed, n.heads, n.heads * head(n), keys(n), gates(n) * n.mlp, n.vocab,
                  jax.numpy.dtype(n.dtype).itemsize) for n in networks]
  return max(sizes, key=lambda s: s.layers * s.embed)


def _bytes(c, s, total, rows, tokens, remat):
  """State, gradients, activations that are kept, one block at work, the loss, weights that are gathered."""
  m, T = c.mesh, c.data.length
  parts = m.tensor * m.pipe
  state = total / parts * ((12 if c.optim.ema else 8) / m.fsdp + 4 / (m.fsdp if m.zero == 3 else 1))
  state += total / parts / m.fsdp * s.width  # the compiler may cast a device's share at once
  gradients = total / parts * 4 / (m.fsdp if m.zero > 1 else 1) * (1 + (c.optim.microbatches > 1))
  x = tokens * s.embed * s.width / (m.tensor if m.sequence else 1)
  dots = tokens * s.width * (s.attention + s.keys + s.mlp) / m.tensor + 2 * x
  everything = dots + tokens * s.width * (s.attention + 2 * s.mlp) / m.tensor + 3 * x
  scores = 12 * rows * s.heads / m.tensor * math.ceil(T / 8) * T
  kept = {'none': everything, 'dots': x + dots, 'full': x}[remat]
  if m.pipe > 1:  # the ring keeps a tick's input, and the inside of one microbatch
    part = m.pipe / m.stage_microbatches
    ticks = m.stage_microbatches + m.pipe - 1
    activations = ticks * part * x + part * (kept * s.layers / m.pipe + 2 * everything + scores) + 3 * x * m.pipe
    gathered = (8 + 2 * s.width) * total / parts
  else:
    activations = kept * s.layers + 2 * everything + scores
    gathered = 2 * (s.width + 4) * total / s.layers / m.tensor
  chunk = max(rows, min(getattr(c.loss, 'chunk', 1024), tokens))
  loss = (12 * chunk + 2 * 4 * s.embed) * s.vocab / m.tensor
  return state + gradients + activations + gathered + loss


def _seconds(c, target, s, total, flops, tokens, remat, speeds):
  """The matmuls and all that is sent, mostly at the same time, and the bubble of the pipeline."""
  m, M = c.mesh, c.optim.microbatches
  again = {'none': 0, 'dots': 0, 'full': 1}[remat] + (m.pipe > 1)  # forward passes beyond the first
  seen = 9 / 16 if isinstance(c.model, decoder.Config) else 1.0  # of the scores: causal attention in eight blocks
  products = flops.matmul * (3 + again) / 3 + flops.attention * seen * (7 + 2 * again + 2 * (remat == 'dots')) / 6
  compute = products * c.data.batch * c.data.length / target.size / target.device.peak
  ring = lambda n: (n - 1) / n
  layers = s.layers / m.pipe
  through = tokens * m.pipe  # each stage sees the rows of its whole group
  reduces = 6 if remat == 'full' else 4
  tensor = M * layers * reduces * 2 * ring(m.tensor) * through * s.embed * s.width / speeds['tensor']
  weights = total / (m.tensor * m.pipe)
  gathers = (2 * s.width if m.pipe == 1 else 4) + 4 if m.zero == 3 else (4 if m.zero == 2 else 0)
  fsdp = M * gathers * weights * ring(m.fsdp) / speeds['fsdp']
  data = 8 * ring(m.data) * weights / m.fsdp / speeds['data']
  passed = 2 * M * through * s.embed * s.width * (1 if m.pipe > 1 else 0) / speeds['pipe']
  bubble = 1 - pipeline.bubble(m.pipe, m.stage_microbatches, m.rounds) if m.pipe > 1 else 1
  sent = [tensor, fsdp + data, passed]
  network = sum(sent) if target.device.dims else max(sent)
  return (max(compute, network) + UNSEEN * min(compute, network)) / bubble
