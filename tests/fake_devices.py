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
from jax._src.interpreters import mlir  # COLLECTIVE_CHANNEL_ID is in no public module

_THREADS = 4  # a device: XLA runs at most so many independent parts of a program side by side


class _Fresh(int):
  """A number that is another one each time it is written into a program."""
  _next = itertools.count(1)

  def __index__(self):
    return next(self._next)


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
  mlir.COLLECTIVE_CHANNEL_ID = _Fresh(1)


if __name__ == '__main__':
  if len(sys.argv) < 3 or not sys.argv[1].isdecimal() or int(sys.argv[1]) < 1:
    sys.exit(__doc__)
  use(int(sys.argv[1]))
  sys.path[0] = str(pathlib.Path(__file__).parent.parent)
  sys.argv = sys.argv[2:]
  runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
