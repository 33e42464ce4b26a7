"""What a run will cost, from its specs alone: parameters, FLOPs, and the peak rate of the device it runs on.

N counts the parameters that take part in matmuls; a training token costs 6 N + attention FLOPs (PaLM App. B): 2 for the
forward pass, 4 for the backward.
"""

from collections.abc import Callable
import dataclasses
import re
import time

import jax
import jax.numpy as jnp

from lm import params

# Dense peak FLOP/s of one device in the dtype it trains in (bf16), from the vendors' data sheets.
PEAK = {
    'NVIDIA A100': 312e12,
    'NVIDIA H100': 989e12,
    'NVIDIA H200': 989e12,
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5p': 459e12,
    'TPU v5': 459e12,
    'TPU v6 lite': 918e12,
}

_BLOCKS = r'^((generator|discriminator)/)?(blocks|final_norm|project|relative|conv)/'


@dataclasses.dataclass(frozen=True)
class Flops:
  """FLOPs of one training token, forward and backward."""

  matmul: float
  attention: float

  @property
  def total(self) -> float:
    return self.matmul + self.attention


def training_flops(specs: params.Tree, heads_times_dim: int, layers: int, length: int, predicted: float = 1.0) -> Flops:
  """6 x (matmul parameters, the output matrix counted once) + 12 L (N H) T a token (PaLM App. B).

  Tables that are only looked up (tokens when untied, positions) do no matmul. `predicted` is the share of the tokens
  for which the output is formed, as in masked language modelling.
  """
  tree = params.flatten(specs)
  matmul = sum(params.count({k: s}) for k, s in tree.items()
               if re.match('blocks/|conv/', k) and len(s.shape) >= 3 and not re.search('_bias$|/position_', k))
  if predicted:
    matmul += predicted * params.count({'w': tree['unembed' if 'unembed' in tree else 'embed/tokens']})
  return Flops(6.0 * matmul, 12.0 * layers * heads_times_dim * length)


def peak_flops(device: jax.Device) -> float:
  """Peak FLOP/s of one device: by its name, or measured with one large f32 matmul on a CPU; 0 = unknown.

  The fake devices of one CPU share its cores, so each gets its part.
  """
  if device.platform == 'cpu':
    return _measured(device) / jax.local_device_count()
  names = sorted((name for name in PEAK if device.device_kind.startswith(name)), key=len)
  return PEAK[names[-1]] if names else 0.0


def _measured(device, n=1024, tries=6):
  with jax.set_mesh(jax.make_mesh((1,), ('one',), devices=[device])):  # not the mesh that the caller may be in
    x = jax.device_put(jnp.ones((n, n), jnp.float32), device)
    f = jax.jit(lambda a: a @ a)
    f(x).block_until_ready()
    best = float('inf')
    for _ in range(tries):
      start = time.perf_counter()
      f(x).block_until_ready()
      best = min(best, time.perf_counter() - start)
  return 2 * n**3 / best


def table(specs: params.Tree) -> str:
  """One line a parameter: path, shape, logical axes, initialiser."""
  rows = [('path', 'shape', 'axes', 'init')]
  rows += [(path, ' x '.join(map(str, s.shape)), ' '.join(a or '-' for a in s.axes), _init_name(s.init))
           for path, s in params.flatten(specs).items()]
  return columns(rows)


def counts(specs: params.Tree) -> dict[str, int]:
  """Exact numbers of parameters by group; 'total' counts tied matrices once."""
  groups = {
      'embeddings': params.count(specs, r'^(\w+/)?embed/'),
      'blocks': params.count(specs, _BLOCKS),
      'heads': params.count(specs, rf'^(?!(\w+/)?embed/)(?!{_BLOCKS[1:]})'),
  }
  total = sum(groups.values())
  return groups | {'total': total, 'without embeddings': total - groups['embeddings'],
                   'without heads': total - groups['heads']}


def columns(rows: list[tuple[str, ...]]) -> str:
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join('  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def human(n: float, unit: str = '') -> str:
  """1.31e12 -> '1.31 T'."""
  for size, prefix in ((1e18, 'E'), (1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(n) >= size:
      return f'{n / size:.3g} {prefix}{unit}'
  return f'{n:.3g} {unit}'.rstrip()


def _init_name(init: Callable) -> str:
  init = init.init if isinstance(init, params.Stacked) else init
  return getattr(init, '__name__', None) or repr(init)
