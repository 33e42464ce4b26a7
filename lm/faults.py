"""What a person can mend behind what was raised."""

import errno
import os

import jax

from lm import hosts
from lm.errors import CheckpointError, ConfigError, DataError, Error, Interrupted

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def expected(error: BaseException) -> Error | None:
  """The failure that a person can mend; None where it is a fault of the program."""
  text = str(error)[:400]
  if gone := hosts.lost(error):
    return gone
  if isinstance(error, Error):
    return error
  if isinstance(error, KeyboardInterrupt):
    return Interrupted('interrupted: nothing was under way; start again')
  if any(os.strerror(n) in text for n in _FULL):  # an OSError, or a library's RuntimeError
    return CheckpointError(f'disk: {text}; free space, or choose another place')
  if isinstance(error, OSError) and error.filename:
    return DataError(f'{error.filename}: {error.strerror}; expected to read or write it; see its owner and mode')
  if isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in text:
    return ConfigError(f'device memory: {text}; lower data.batch or --max_new, raise optim.microbatches, or set '
                       'model.remat=full')
  return None
