"""From rows on a host to global batches on a mesh. Shapes: B rows of the global batch."""

from collections.abc import Callable, Iterator
import functools
from typing import Any

import grain
import jax
import numpy as np

from lm import hosts
from lm.errors import ConfigError

ENDLESS = 2**40  # steps; grain wants a length


def batches(arrays: Callable[[np.ndarray, int], Any], steps: int, batch: int, threads: int,
            sharding: jax.sharding.Sharding, start: int = 0) -> Iterator[Any]:
  """Batches `start` to `steps` - 1, each host building only the rows that its devices hold.

  Args:
    arrays: (numbers of rows of the global batch, step) -> those rows, a tree of numpy arrays.
    threads: batches are built ahead by so many; 0 = none.

  Raises:
    ConfigError: the devices cannot divide `batch` rows.
  """
  try:
    places = sharding.addressable_devices_indices_map((batch,))
  except ValueError as error:
    raise ConfigError(f'batch={batch}: cannot be divided over the devices ({error}); choose a multiple of mesh.data * '
                      'mesh.fsdp') from error
  rows = np.unique(np.concatenate([np.arange(batch)[index[0]] for index in places.values()]))

  def put(local):
    def part(index):
      start, stop, _ = index[0].indices(batch)
      return local[slice(*np.searchsorted(rows, (start, stop))), *index[1:]]
    return jax.make_array_from_callback((batch, *local.shape[1:]), sharding, part)

  def run():
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterator = iter(grain.MapDataset.range(steps).map(functools.partial(arrays, rows)).to_iter_dataset(ahead))
    iterator.set_state({'next_index': start})
    try:
      for local in iterator:
        hosts.meet('a batch')
        yield jax.tree.map(put, local)
    finally:
      iterator.close()
  return run()
