"""Files that appear whole or not at all, and what is said where they cannot."""

from collections.abc import Iterator
import contextlib
import os
from typing import IO

from lm.errors import CheckpointError

WRITABLE = 'expected a writable directory; choose another --workdir'


def write(path: str | os.PathLike, content: bytes) -> None:
  """Writes the file in one move: whoever reads it meanwhile, or after a crash, finds the old content or the new."""
  with replacing(path, 'wb') as f:
    f.write(content)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = 'w') -> Iterator[IO]:
  """A file that takes the name `path` when the block ends well, and goes away otherwise; text is UTF-8, ends in \\n."""
  temporary = f'{os.fspath(path)}.tmp{os.getpid()}'
  text = {} if 'b' in mode else {'encoding': 'utf-8', 'newline': '\n'}
  try:
    with open(temporary, mode, **text) as f:
      yield f
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.remove(temporary)
    raise


@contextlib.contextmanager
def failing(where: str, action: str) -> Iterator[None]:
  """Turns any failure inside into a CheckpointError of one line: `where`, the failure, `action`."""
  try:
    yield
  except CheckpointError:
    raise
  except Exception as error:
    text = ' '.join(str(error).split())
    if len(text) > 400:  # what a library says first and, the cause, last
      text = f'{text[:200]} ... {text[-200:]}'
    raise CheckpointError(f'{where}: {type(error).__name__}: {text}; {action}') from error
