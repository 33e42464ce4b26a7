"""TensorBoard's files: a folder holds one, of scalars or of texts, which each start of a run makes anew.

Wall times are seconds since the epoch.
"""

from collections.abc import Mapping
import functools
import os
import pathlib
import sys
from typing import Any

Writer = Any  # tensorboardX's EventsWriter


def fresh(folder: pathlib.Path) -> Writer:
  """The folder's only file, empty."""
  folder.mkdir(parents=True, exist_ok=True)
  for old in folder.glob('events.out.tfevents.*'):
    old.unlink()
  return _library().event_file_writer.EventsWriter(str(folder / 'events'), f'.{os.getpid()}')


def scalars(writer: Writer, step: int, wall_time: float, values: Mapping[str, Any]) -> None:
  """A point of each curve; what is no number is left out."""
  summary = _library().proto.summary_pb2.Summary
  points = [summary.Value(tag=k, simple_value=v) for k, v in values.items() if isinstance(v, int | float)]
  _write(writer, step, wall_time, summary(value=points))


def text(writer: Writer, step: int, wall_time: float, name: str, markdown: str) -> None:
  """A text of that step."""
  _write(writer, step, wall_time, _library().summary.text(name, markdown))


def _write(writer, step, wall_time, summary):
  writer.write_event(_library().proto.event_pb2.Event(step=step, wall_time=wall_time, summary=summary))


@functools.cache
def _library():
  """tensorboardX; kept from importing PyTorch where that is installed: over a second of a start, and nothing for us."""
  unseen = 'torch' not in sys.modules
  if unseen:
    sys.modules['torch'] = None  # makes its import fail, which is provided for
  try:
    import tensorboardX.event_file_writer
    import tensorboardX.proto.event_pb2
    import tensorboardX.proto.summary_pb2
    import tensorboardX.summary
  finally:
    if unseen:
      del sys.modules['torch']
  return tensorboardX
