"""Strict JAX for every test: 8 fake CPU devices, no silent broadcasting of ranks, no key used twice."""

import gc
import os
import pathlib

import fake_devices
import jax
import pytest

_CACHE = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'lm-tests' / 'jax'

os.environ['XLA_FLAGS'] = fake_devices.QUICK
fake_devices.use(8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_debug_key_reuse', True)
jax.config.update('jax_compilation_cache_dir', str(_CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
  """Runs do not draw curves.png, which is a third of the time of a small one."""
  if request.node.get_closest_marker('draws') is None:
    monkeypatch.setattr('lm.logs.curves', lambda workdir: pathlib.Path(workdir) / 'curves.png')


def pytest_collection_finish():
  """Tracing makes many objects: what collecting the tests made need not be walked through each time."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 100)
