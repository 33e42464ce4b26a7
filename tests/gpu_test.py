"""A step on a GPU is the step on a CPU: loss, metrics, gradients and ten losses of every family, dropout on, in f32.

The other tests hold the process to fake CPU devices, so this one runs in a process of its own; skipped without a GPU.
"""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PLUGINS = ('jax_plugins.xla_cuda12', 'jax_plugins.xla_cuda13', 'jax_cuda12_plugin', 'jax_cuda13_plugin')
KINDS = 'decoder', 'palm', 'bert', 'electra', 'deberta', 'deberta-v2', 'deberta-v3'


def has_gpu():
  found = shutil.which('nvidia-smi') and subprocess.run(['nvidia-smi', '-L'], capture_output=True).stdout.strip()
  plugins = importlib.util.find_spec('jax_plugins')
  return bool(found and plugins and any(importlib.util.find_spec(name) for name in PLUGINS))


@pytest.mark.skipif(not has_gpu(), reason='no NVIDIA GPU, or no JAX for one')
@pytest.mark.parametrize('kind', KINDS)
def test_a_gpu_is_a_cpu(kind):
  env = os.environ | {'JAX_PLATFORMS': 'cuda,cpu', 'XLA_FLAGS': '', 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
                      'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}:{os.environ.get("PYTHONPATH", "")}'}
  done = subprocess.run([sys.executable, __file__, kind], env=env, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


def main(kind):
  import jax
  import parallel_test as parallel

  jax.config.update('jax_default_matmul_precision', 'highest')
  gpu, cpu = jax.devices('cuda')[0], jax.devices('cpu')[0]
  want, got = (parallel.curve(kind, {}, steps=10, devices=[device]) for device in (cpu, gpu))
  parallel.same(got, want)
  print(kind, 'first loss', want.losses[0], got.losses[0], 'last', want.losses[-1], got.losses[-1])


if __name__ == '__main__':
  main(sys.argv[1])
