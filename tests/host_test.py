"""The process's memory: what is freed is kept, so that the next step does not fault it in again."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
import numpy as np
from lm import host
if sys.argv[1] == 'keep':
  host.keep_freed_memory()
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(3):
    np.empty(50_000_000, np.uint8).fill(1)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults(), hasattr(ctypes.CDLL(None), 'mallopt'))
"""


def faults(how):
  done = subprocess.run([sys.executable, '-c', PROGRAM, how], capture_output=True, text=True, check=True, timeout=60)
  count, glibc = done.stdout.split()
  if glibc == 'False':
    pytest.skip('no mallopt here: the C library is not glibc')
  return int(count)


def test_freed_memory_is_not_faulted_in_again():
  assert faults('keep') < 20


def test_that_the_allocator_would_give_it_back_otherwise():
  """Guards the test above: 150 MB are 75 pages even of 2 MiB."""
  assert faults('') > 50


def test_what_is_kept_can_be_given_back():
  program = """
import ctypes, pathlib
import numpy as np
from lm import host
host.keep_freed_memory()
held = lambda: int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * 4096
before = held()
arrays = [np.ones(1_000_000) for _ in range(40)]
last = np.ones(1000)  # behind them, so that they are not the end of the heap
del arrays
kept = held() - before
host.release_freed_memory()
print(kept, held() - before, hasattr(ctypes.CDLL(None), 'mallopt'))
"""
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True, timeout=60)
  kept, left, glibc = done.stdout.split()
  if glibc == 'False':
    pytest.skip('no mallopt here: the C library is not glibc')
  assert int(kept) > 250e6 and int(left) < 100e6
