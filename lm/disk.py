"""Files and folders that appear whole or not at all, and what is said where they cannot."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
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
def new_folder(path: str | os.PathLike, errors: tuple[type[Exception], ...] = (OSError,)) -> Iterator[pathlib.Path]:
  """A temporary folder that takes the name `path` when the block ends well, and goes away otherwise.

  Raises:
    CheckpointError: the name is taken, or one of `errors` came from the block.
  """
  folder = pathlib.Path(os.path.abspath(path))
  temporary = folder.with_name(f'{folder.name}.tmp{os.getpid()}')
  try:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
      raise CheckpointError(f'{folder}: exists and is not empty; expected a new folder; choose another name')
    temporary.mkdir(parents=True)
    yield temporary
    for written in (*temporary.iterdir(), temporary):
      _sync(written)
    temporary.rename(folder)
    _sync(folder.parent)
  except errors as error:
    text = ' '.join(str(error).split())[:200]
    raise CheckpointError(f'{folder}: {type(error).__name__}: {text}; expected a folder that can be written; mend it '
                          'or choose another') from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _sync(path):
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


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
