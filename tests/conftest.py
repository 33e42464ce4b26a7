"""Strict JAX for every test: 8 fake CPU devices, no silent broadcasting of ranks, no key used twice."""

import os
import pathlib

# Without the second flag a fake device may start its collectives in another order than its peers, and all wait forever.
os.environ['XLA_FLAGS'] = (os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
                           ' --xla_cpu_enable_concurrency_optimized_scheduler=false')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax  # noqa: E402

_CACHE = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'lm-tests' / 'jax'

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_debug_key_reuse', True)
jax.config.update('jax_compilation_cache_dir', str(_CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
