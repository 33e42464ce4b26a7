"""lm.bench: sides answer a line for a line, and how one ended is told; no timing."""

import sys
import types

import jax
import pytest

from lm import bench
from lm.errors import Error

SERVE = """
from lm import bench
bench.serve(lambda n: {'squared': n * n}, tokens=8)
"""
ENDS = [  # (what a side does when asked, part of the error)
    ('import os, signal; os.kill(os.getpid(), signal.SIGKILL)', 'was killed, as the kernel does when memory runs out'),
    ('raise SystemExit(1)', 'died; its error is above'),
    ('print("no JSON"); input()', 'died; its error is above'),
]


def side(code):
  return bench.Side([sys.executable, '-c', code])


def test_a_side_answers_with_what_its_work_returns():
  worker = side(SERVE)
  assert worker.facts == {'tokens': 8}
  assert worker.ask(3)['squared'] == 9 and worker.ask(4)['squared'] == 16
  nothing = worker.ask(0)
  assert set(nothing) == {'seconds', 'peak'} and nothing['peak'] > 2**20
  worker.close()


@pytest.mark.parametrize('end', range(len(ENDS)))
def test_how_a_side_ended_is_told(end):
  code, expected = ENDS[end]
  worker = side(f'print("{{}}", flush=True); input(); {code}')
  with pytest.raises(Error, match=expected):
    worker.ask(1)


@pytest.mark.parametrize('works', [False, True])
def test_the_peak_on_a_gpu_is_that_of_the_framework_that_works_there(works, monkeypatch):
  """Where PyTorch is installed, packages that JAX's side needs import it, too."""
  cuda = types.SimpleNamespace(is_initialized=lambda: works, max_memory_allocated=lambda: 7)
  monkeypatch.setitem(sys.modules, 'torch', types.SimpleNamespace(cuda=cuda))
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  device = types.SimpleNamespace(memory_stats=lambda: {'peak_bytes_in_use': 5})
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  assert bench._peak() == (7 if works else 5)
