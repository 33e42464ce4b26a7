"""Sides of a benchmark, each a process of its own with all cores, that take turns on the same machine.

scripts/bench_* are made of it: one process asks, a round at a time, so that drift of the machine's speed hits all
sides; the others serve. They speak JSON, a line each way.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import itertools
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from lm import params, run as run_lib, sharding, train
from lm.data.packing import Batch
from lm.errors import Error

_PLATFORMS = {'cpu': 'cpu', 'gpu': 'cuda'}  # by the name that JAX has for it


class Side:
  """A process that does so much as it is asked to; `facts` are what `serve` was given.

  Args:
    command: of a program that calls `serve`.
    packages: a folder that this process alone looks into for packages.
    device: 'cpu', or 'gpu' for an NVIDIA GPU, whose memory the sides share.
  """

  def __init__(self, command: Sequence[str], packages: str | os.PathLike | None = None, device: str = 'cpu'):
    own = {'JAX_PLATFORMS': _PLATFORMS[device], 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
    path = os.pathsep.join(str(x) for x in (packages, os.environ.get('PYTHONPATH')) if x)
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                     env=os.environ | own | {'PYTHONPATH': path})
    self.facts = self._said()

  def ask(self, n: int) -> dict[str, Any]:
    """{'seconds', 'peak' (bytes), ...} of `n` times the work; 0: nothing is done."""
    return self._said(f'{n}\n')

  def _said(self, question=''):
    try:
      self._process.stdin.write(question)
      self._process.stdin.flush()
      return json.loads(self._process.stdout.readline())
    except (OSError, ValueError) as error:
      with contextlib.suppress(OSError):
        self._process.stdin.close()  # one that lives ends at that
      killed = self._process.wait() == -signal.SIGKILL
      raise Error(f'{" ".join(self._process.args)}: the worker ' + (
          'was killed, as the kernel does when memory runs out; choose smaller sizes' if killed else
          'died; its error is above; the torch side needs pip install -e .[oracle]')) from error

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


def start(sides: Mapping[str, Callable[[], Side]], last_first: bool) -> dict[str, Side]:
  """Starts all; which memory a process gets depends on what was started before it, and may change its speed."""
  started = {name: sides[name]() for name in (reversed(sides) if last_first else sides)}
  return {name: started[name] for name in sides}


def peer(command: Sequence[str], tuned: bool) -> list[str]:
  """A peer's command: as its own users run it, unless it is to have this package's settings of memory (`lm.host`)."""
  return [*command, f'--{"" if tuned else "no"}keep_memory']


def serve(run: Callable[[int], dict[str, Any] | None], **facts: Any) -> None:
  """Does `run(n)` for each number n on stdin, and answers how long it took, with what it returns.

  The peak is of the process, on a GPU of what its framework allocated there.
  """
  print(json.dumps(facts), flush=True)
  for line in sys.stdin:
    start = time.perf_counter()
    more = (run(int(line)) if int(line) else None) or {}
    if on_gpu() and _with_torch():
      sys.modules['torch'].cuda.synchronize()
    print(json.dumps({'seconds': time.perf_counter() - start, 'peak': _peak()} | more), flush=True)


def _peak():
  if not on_gpu():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  if _with_torch():
    return sys.modules['torch'].cuda.max_memory_allocated()
  return jax.devices()[0].memory_stats()['peak_bytes_in_use']


def _with_torch():
  """Is it PyTorch that this process works with? Packages that JAX's side imports import it, too, where it is there."""
  return 'torch' in sys.modules and sys.modules['torch'].cuda.is_initialized()


def on_gpu() -> bool:
  """Is this the process of a side that works on a GPU?"""
  return os.environ.get('JAX_PLATFORMS') == _PLATFORMS['gpu']


def start_torch() -> str:
  """To call before PyTorch's side makes anything: its device. On a GPU f32 products may take TF32, as XLA's do."""
  import torch

  torch.manual_seed(0)
  torch.set_float32_matmul_precision('high' if on_gpu() else 'highest')
  return 'cuda' if on_gpu() else 'cpu'


def torch_gpt(layers: int, embed: int, heads: int, length: int, vocab: int, gelu: str = 'tanh'
              ) -> tuple[Any, list[dict[str, Any]]]:
  """nanoGPT on PyTorch, without biases and dropout: (module, [B, T] ids -> [B, T, V] logits; AdamW's groups).

  gelu: 'tanh' or 'none', PyTorch's names of the approximations. Matrices decay by .1, norms do not. Initial values are
  GPT-2's: with those of torch.nn.Embedding logits are so large that gradients are denormal, and products of such slow.
  """
  import torch
  from torch import nn
  from torch.nn import functional as F

  class Block(nn.Module):
    def __init__(self):
      super().__init__()
      self.norm1, self.norm2 = nn.LayerNorm(embed, bias=False), nn.LayerNorm(embed, bias=False)
      self.qkv, self.out = nn.Linear(embed, 3 * embed, bias=False), nn.Linear(embed, embed, bias=False)
      self.up, self.down = nn.Linear(embed, 4 * embed, bias=False), nn.Linear(4 * embed, embed, bias=False)

    def forward(self, x):
      heads_first = lambda a: a.unflatten(-1, (heads, embed // heads)).transpose(1, 2)
      a = F.scaled_dot_product_attention(*map(heads_first, self.qkv(self.norm1(x)).chunk(3, -1)), is_causal=True)
      x = x + self.out(a.transpose(1, 2).flatten(2))
      return x + self.down(F.gelu(self.up(self.norm2(x)), approximate=gelu))

  class GPT(nn.Module):
    def __init__(self):
      super().__init__()
      self.tokens, self.positions = nn.Embedding(vocab, embed), nn.Embedding(length, embed)
      self.blocks, self.norm = nn.ModuleList(Block() for _ in range(layers)), nn.LayerNorm(embed, bias=False)

    def forward(self, ids):
      x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
      for block in self.blocks:
        x = block(x)
      return self.norm(x) @ self.tokens.weight.T

  model = GPT()
  for name, p in model.named_parameters():
    if p.dim() > 1:
      residual = name.endswith(('out.weight', 'down.weight'))
      nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
  return model, [{'params': [p for p in model.parameters() if (p.dim() > 1) == matrix], 'weight_decay': decay}
                 for matrix, decay in ((True, 0.1), (False, 0.0))]


def ratio(rates: Sequence[float], others: Sequence[float]) -> str:
  """The median over the rounds, and their range."""
  ratios = [a / b for a, b in zip(rates, others, strict=True)]
  return f'{statistics.median(ratios):.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f})'


def alone(*arguments: str) -> None:
  """Runs a script that writes a model in a process of its own, whose memory is gone afterwards."""
  command = [sys.executable, '-m', *arguments]
  if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
    raise Error(f'{" ".join(command)}: failed; its error is above')


def steps(c: run_lib.Config, task: run_lib.Task, batches: Iterator[Any]) -> Callable[[int], None]:
  """run(n): n steps of a training run, a batch each, from random weights."""
  parts, key = run_lib.build(c, task), jax.random.key(1)
  make = lambda key: train.init(task.specs, parts.tx, parts.trainable, key)
  with sharding.use(parts.mesh):
    state = params.jit_once(make, out_shardings=parts.state)(jax.random.key(0))

  def run(n):
    nonlocal state
    with sharding.use(parts.mesh):
      for _ in range(n):
        state, _ = parts.step(state, next(batches), key)
      jax.block_until_ready(state)
  return run


def rows(B: int, T: int, V: int) -> Iterator[Batch]:
  """Always the same random ids without padding, all of them targets: [B, T + 1]."""
  ids_BT = jax.random.randint(jax.random.key(0), (B, T + 1), 0, V)
  positions_BT = jnp.broadcast_to(jnp.arange(T + 1)[None], ids_BT.shape)
  return itertools.repeat(Batch(ids_BT, jnp.ones_like(ids_BT), positions_BT, jnp.ones(ids_BT.shape, bool)))
