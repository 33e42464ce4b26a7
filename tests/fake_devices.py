"""Fake CPU devices that neither mix up nor wait for ever: one processor looks like several, to try a mesh.

usage: python tests/fake_devices.py COUNT MODULE [flags of MODULE]
e.g.   python tests/fake_devices.py 8 experiments.gpt2 --config=quickstart --set mesh.data=8 --workdir=runs/mesh
"""

import itertools
import os
import pathlib
import runpy
import sys

import jax
from jax._src import compiler  # no public module has what compiles, or
from jax._src.interpreters import mlir  # how collectives are numbered
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

# Compiling is most of the time of the tests: quick code matters less than code that is there quickly.
QUICK = ('--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true '
         '--xla_cpu_parallel_codegen_split_count=1')
if jax.__version_info__ < (0, 11):  # later versions have no other emitters, nor the flag
  QUICK += ' --xla_cpu_use_fusion_emitters=false'
_THREADS = 4  # a device: XLA runs at most so many independent parts of a program side by side


def _numbered(module):
  """Gives every collective of a program the next number."""
  numbers = itertools.count(1)

  def number(op):
    if 'channel_handle' in op.attributes:
      op.attributes['channel_handle'] = stablehlo.ChannelHandle.get(next(numbers), mlir.DEVICE_TO_DEVICE_TYPE)
    return ir.WalkResult.ADVANCE
  with module.context:
    module.operation.walk(number)
  return module


def use(count):
  """Makes this processor look like `count` devices; call it before anything asks for devices.

  On CPU, XLA runs parts of a program that do not depend on each other in any order, and a collective finds its partners
  by the number that JAX wrote: 1, always. So a loop and what follows it exchange each other's data, or all threads wait
  for partners that got none. Hence a number for every collective, and enough threads for all that can wait.
  """
  os.environ['NPROC'] = str(_THREADS * count)
  os.environ['XLA_FLAGS'] = (os.environ.get('XLA_FLAGS', '') + f' --xla_force_host_platform_device_count={count}'
                             ' --xla_cpu_enable_concurrency_optimized_scheduler=false').strip()
  jax.config.update('jax_platforms', 'cpu')
  compiled = compiler.compile_or_get_cached
  compiler.compile_or_get_cached = lambda backend, module, *rest, **named: compiled(
      backend, _numbered(module), *rest, **named)


if __name__ == '__main__':
  if len(sys.argv) < 3 or not sys.argv[1].isdecimal() or int(sys.argv[1]) < 1:
    sys.exit(__doc__)
  use(int(sys.argv[1]))
  sys.path[0] = str(pathlib.Path(__file__).parent.parent)
  sys.argv = sys.argv[2:]
  runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
