"""What a process keeps: memory that it freed, so that the next step does not fault it in again; compiled programs."""

import ctypes
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm import host

ROOT = pathlib.Path(__file__).parent.parent
THP = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')

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


def test_how_much_arrays_can_take(monkeypatch):
  accelerator = types.SimpleNamespace(memory_stats=lambda: {'bytes_limit': 5})
  assert host.memory(accelerator) == 5
  machine = int(re.search(r'MemTotal: *(\d+) kB', pathlib.Path('/proc/meminfo').read_text())[1]) * 1024
  for confined, expected in (('', machine), ('max\n', machine), ('1000\n', 1000), (f'{1 << 60}\n', machine)):
    monkeypatch.setattr(host, '_read', lambda path, text=confined: text)
    assert host.memory(jax.devices()[0]) == expected


@pytest.mark.slow
def test_a_programs_temporaries_are_not_faulted_in_again():
  """They lie in the main thread's arena: another's gives pieces of 64 MiB back. A few of the first calls may fault."""
  program = """
import ctypes, resource, sys
from lm import host
if sys.argv[1] == 'keep':
  host.keep_freed_memory()
import jax, jax.numpy as jnp
f = jax.jit(lambda x: jax.lax.optimization_barrier(jnp.sin(x)).sum())
x = jnp.ones((4096, 4096))
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  jax.block_until_ready(f(x))
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sorted([faults() for _ in range(40)][10:])[15], hasattr(ctypes.CDLL(None), 'mallopt'))
"""
  counts = {}
  for how in ('keep', 'leave'):
    done = subprocess.run([sys.executable, '-c', program, how], capture_output=True, text=True, check=True, timeout=60,
                          env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''})  # one device
    counts[how], glibc = done.stdout.split()
    if glibc == 'False':
      pytest.skip('no mallopt here: the C library is not glibc')
  assert int(counts['keep']) < 60 < int(counts['leave']), counts


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


HUGE = """
import os, pathlib, re, resource, sys
import numpy as np
from lm import host
if sys.argv[1:]:
  resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
host.keep_freed_memory()
huge = lambda: int(re.search(r'AnonHugePages: *([0-9]+)', pathlib.Path('/proc/self/smaps_rollup').read_text())[1]) << 10
for _ in range(2):
  before = huge()
  arrays = [np.ones(100_000) for _ in range(125)]  # small enough for numpy not to ask for huge pages itself
  print(huge() - before)
  del arrays
  host.release_freed_memory()
"""


@pytest.mark.slow
@pytest.mark.skipif(not THP.exists() or '[never]' in THP.read_text(), reason='this kernel gives no huge pages')
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'mallopt'), reason='the C library is not glibc')
def test_the_heap_lies_in_huge_pages_also_after_freed_memory_was_released():
  run = lambda *limit: [int(x) for x in subprocess.run(
      [sys.executable, '-c', HUGE, *limit], capture_output=True, text=True, check=True, timeout=60).stdout.split()]
  assert min(run()) > 50e6  # of 100; a kernel may lack some
  if '[always]' not in THP.read_text():
    assert max(run('limited')) == 0  # addresses are few there


def cache(**environment):
  """Where programs are kept."""
  program = ('import jax; from lm import host; host.keep_compiled_programs(); '
             'print(jax.config.jax_compilation_cache_dir)')
  env = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'XDG_'))} | environment
  return subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True, timeout=60,
                        env=env).stdout.strip()


@pytest.mark.slow
def test_where_compiled_programs_are_kept(tmp_path):
  folder, name = os.path.split(cache(XDG_CACHE_HOME=str(tmp_path)))
  assert folder == str(tmp_path / 'lm') and name.startswith('jax-')
  assert cache(HOME=str(tmp_path)) == str(tmp_path / '.cache' / 'lm' / name)
  assert cache(JAX_COMPILATION_CACHE_DIR='/elsewhere', HOME=str(tmp_path)) == '/elsewhere'
  assert cache(HOME='nowhere') == 'None'  # no home: nothing is kept, and nothing fails


@pytest.mark.slow
def test_another_seed_compiles_nothing_and_a_torn_program_is_made_anew(tmp_path):
  corpus = tiny.write_text(tmp_path / 'text.txt')
  env = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'XLA_'))} | {
      'JAX_PLATFORMS': 'cpu', 'XDG_CACHE_HOME': str(tmp_path / 'cache')}

  def train(seed):
    flags = [f'--set=seed={seed}', *tiny.argv(workdir=tmp_path / str(seed), data__corpus=corpus, model__layers=3)]
    done = subprocess.run([sys.executable, '-m', 'experiments.gpt2', *flags], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return {path: path.stat().st_mtime_ns for path in (tmp_path / 'cache').rglob('*-cache')}
  kept = train(0)
  assert kept
  assert train(1) == kept
  for path in kept:
    path.write_bytes(path.read_bytes()[:1000])
  train(2)


INTEL = ['vendor_id\t: GenuineIntel']


@pytest.mark.parametrize(('platform', 'parameters', 'cpu', 'flags', 'eigen'), [
    ('cpu', 10_000_000, INTEL, '', True),
    ('cpu', 1_000_000, INTEL, '', False),
    ('cpu', 10_000_000, ['vendor_id\t: AuthenticAMD'], '', False),
    ('gpu', 10_000_000, INTEL, '', False),
    ('cpu', 10_000_000, INTEL, '--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT', False)])
def test_whose_products_a_large_model_takes(platform, parameters, cpu, flags, eigen, monkeypatch):
  monkeypatch.setattr(host, '_cpuinfo', lambda: cpu)
  monkeypatch.setattr(host, '_understood', lambda option: dict([option]))
  monkeypatch.setenv('XLA_FLAGS', flags)
  host._is_intel.cache_clear()
  try:
    assert bool(host.compiler_options(platform, parameters)) == eigen
  finally:
    host._is_intel.cache_clear()


def test_which_processors_read_weights_by_output(monkeypatch):
  for platform, flags, wanted in (('cpu', 'fma avx512f amx_tile', 16), ('cpu', 'fma avx512f', 0),
                                  ('cpu', 'fma avx avx2', 128), ('gpu', 'fma amx_tile', 0), ('cpu', '', 0)):
    told = [f'flags\t\t: {flags}'] if flags else ['Features\t: fp asimd']
    monkeypatch.setattr(host, '_cpuinfo', lambda told=told: ['vendor_id\t: GenuineIntel', *told])
    assert host.rows_as_columns(platform) == wanted


def test_an_option_that_this_xla_does_not_know_is_left_out():
  assert host._understood(('xla_cpu_no_such_option', 'true')) == {}
  assert host._understood(('xla_backend_optimization_level', '1'))


def test_products_of_both_libraries_agree_and_a_traced_program_takes_the_option():
  """A step and an evaluation are also traced for their shapes."""
  options = host._understood((host._YNNPACK, 'LIBRARY_FUSION_TYPE_REDUCE'))
  if not options:
    pytest.skip('this XLA has no YNNPACK')
  a, b = jax.random.normal(jax.random.key(0), (2, 64, 64))
  theirs, ours = jax.jit(jnp.matmul), jax.jit(jnp.matmul, compiler_options=options)
  assert jax.eval_shape(ours, a, b).shape == (64, 64)
  assert 'ynn' not in ours.lower(a, b).compile().as_text()
  np.testing.assert_allclose(ours(a, b), theirs(a, b), rtol=1e-4, atol=1e-4)
