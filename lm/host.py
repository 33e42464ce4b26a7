"""The process itself: how it holds memory."""

import ctypes

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
  """Lets the C allocator keep what it frees; call once, before the first thread starts. Nothing where it is not glibc.

  XLA on a CPU allocates a step's temporaries anew at every step: gigabytes that glibc would take from the kernel, page
  by page and zeroed, and give back. That was a seventh of the time of a GPT step. The price is fragmentation: the
  largest resident size was up to twice as large.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:
    for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
      mallopt(parameter, value)


def release_freed_memory() -> None:
  """Gives the kernel what is free now, though it was to be kept: after work that is not done again at every step.

  Otherwise what loading, evaluation, samples and checkpoints freed lies in pieces between what a step takes, and both
  are held at once.
  """
  trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if trim is not None:
    trim(0)
