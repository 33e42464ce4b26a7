"""The process itself: how it holds memory, what it keeps for the next, and whose kernels its processor runs fastest."""

import ctypes
import functools
import hashlib
import mmap
import os
import pathlib
import platform
import resource

import jax

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_YNNPACK = 'xla_cpu_experimental_ynn_fusion_type'


def keep_freed_memory() -> None:
  """Lets the C allocator keep what it frees; call once, before JAX starts its threads. Does nothing without glibc.

  XLA on a CPU allocates a step's temporaries anew at every step: gigabytes that glibc would take from the kernel, page
  by page and zeroed, and give back. That was a seventh of the time of a GPT step. The price is fragmentation: the
  largest resident size was up to twice as large.

  And the heap lies in huge pages, where the kernel gives them on advice, up to half of the machine's memory. With small
  ones, whose places the processor looks up all the time, steps were 1.1 to 1.5 times as long (docs/speed.md).

  Only the main thread's arena keeps all: that of another thread gives whole pieces of 64 MiB back, and cannot hold more
  in one. So programs run in the thread that calls them, whose arena then holds the temporaries, while each thread of
  XLA's pool takes its scratch space from its own. Shared, the one arena was locked so often that a process in which
  compiling had left its free lists long trained 8% slower than one that had found its programs compiled.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:
    for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
      mallopt(parameter, value)
    _advise_huge_pages()
    jax.config.update('jax_cpu_enable_async_dispatch', False)


def release_freed_memory() -> None:
  """Gives the kernel what is free now, though it was to be kept: after work that is not done again at every step.

  Otherwise what loading, evaluation, samples and checkpoints freed lies in pieces between what a step takes, and both
  are held at once.
  """
  trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if trim is not None:
    trim(0)
    _advise_huge_pages()  # of what the heap ended with nothing is left


def _advise_huge_pages():
  """Takes half of the memory, unwritten, says that it is to lie in huge pages, and frees it for the heap to grow into.

  Only addresses are taken. Where these count, by a limit or without overcommitment, nothing is done, and where the heap
  does not keep what is freed it has no effect.
  """
  limited = any(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY
                for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
  if limited or _read('/proc/sys/vm/overcommit_memory').strip() == '2' or not hasattr(mmap, 'MADV_HUGEPAGE'):
    return
  c, size = ctypes.CDLL(None), os.sysconf('SC_PHYS_PAGES') * mmap.PAGESIZE // 2
  c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
  c.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  start = c.malloc(size)
  if start is not None:
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    c.madvise(first, start + size - first, mmap.MADV_HUGEPAGE)
    c.free(start)


def keep_compiled_programs() -> None:
  """Lets JAX keep all programs that it compiles, so that a run that goes on or has another seed starts at once.

  They lie in ~/.cache/lm (or $XDG_CACHE_HOME/lm), which may be deleted at any time, in a folder for this kind of
  processor, as machine code may not run on another. JAX_COMPILATION_CACHE_DIR names another place, and
  JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. What cannot be read or written costs a warning and a compilation.
  """
  base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  if jax.config.jax_compilation_cache_dir is None and os.path.isabs(base):  # a user without a home keeps nothing
    jax.config.update('jax_compilation_cache_dir', os.path.join(base, 'lm', f'jax-{_processor()}'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def compiler_options(platform: str, parameters: int) -> dict[str, str]:
  """Compiler options for a program that trains so many parameters on a platform: whose products of matrices it uses.

  XLA on a CPU leaves products and reductions to YNNPACK. On Intel's processors Eigen's products make a step of a large
  model a tenth shorter; of a small one they make it no shorter, and YNNPACK's reductions are better at any size. It is
  not timed: a run that resumes must have the same bits. A choice in XLA_FLAGS stands.
  """
  large = parameters >= 1 << 23
  if platform != 'cpu' or not large or not _is_intel() or _YNNPACK in os.environ.get('XLA_FLAGS', ''):
    return {}
  return _understood((_YNNPACK, 'LIBRARY_FUSION_TYPE_REDUCE'))


def rows_as_columns(platform: str) -> int:
  """Rows of activations, up to which f32 weights that lie side by side for each output make a product faster; 0: none.

  By YNNPACK that takes a third less time on an Intel processor with AMX, and half the time on an AMD one without
  AVX-512, where it never was slower; what has AVX-512 and no AMX was not tried.
  """
  flags = next((line.split() for line in _cpuinfo() if line.startswith('flags')), ())
  if platform != 'cpu' or not flags:
    return 0
  return 16 if 'amx_tile' in flags else 0 if 'avx512f' in flags else 128


def memory(device: jax.Device) -> int:
  """Bytes that arrays of a device can take at most: of a CPU those of the machine, or of what it is confined to."""
  told = (device.memory_stats() or {}).get('bytes_limit')
  if told:
    return told
  confined = _read('/sys/fs/cgroup/memory.max').strip()
  return min([os.sysconf('SC_PHYS_PAGES') * mmap.PAGESIZE, *(int(text) for text in [confined] if text.isdecimal())])


@functools.cache
def _understood(option: tuple[str, str]) -> dict[str, str]:
  """The compiler option, if this version of XLA knows it."""
  try:
    jax.jit(lambda: 0).lower().compile(dict([option]))
  except (jax.errors.JaxRuntimeError, ValueError):
    return {}
  return dict([option])


@functools.cache
def _is_intel() -> bool:
  return any('GenuineIntel' in line for line in _cpuinfo())


def _cpuinfo() -> list[str]:
  """What Linux says of the first core, a line each."""
  return _read('/proc/cpuinfo').split('\n\n')[0].split('\n')


def _read(path: str) -> str:
  """A text of the kernel's; '' where it has none."""
  try:
    return pathlib.Path(path).read_text(encoding='utf-8')
  except OSError:
    return ''


def _processor() -> str:
  """A name for processors that have the same instructions."""
  told = [line for line in _cpuinfo() if line.startswith(('model name', 'flags', 'Features', 'CPU part'))]
  return f'{platform.machine()}-{hashlib.sha256(repr(told or platform.processor()).encode()).hexdigest()[:8]}'
