"""What a model answers while it is tuned: held-out prompts, its replies, the references, after each evaluation.

`samples.jsonl` is the record, one row a step and prompt, cut back when a run resumes; TensorBoard's texts are made from
it. Prompts are the ids that validation rows hold, written as in training. Shapes: B prompts, T their length.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import decode, disk, events, logs, loop, params, peft, sampler, sharding, train
from lm.data import memory, packing
from lm.errors import ConfigError
from lm.text import chat

_KEY = 3  # folded into the run's key, beside those of initial values, training and evaluation


@dataclasses.dataclass(frozen=True)
class Config:
  """What to show of a model after each evaluation.

  Attributes:
    count: prompts; 0 = none. They are the same in the whole run.
    new_tokens: most tokens of a reply; fewer where a prompt leaves the model no more positions.
    temperature: 0 takes the most likely token.
  """

  count: int = 4
  new_tokens: int = 128
  temperature: float = 0.0

  def __post_init__(self):
    for name, least in (('count', 0), ('new_tokens', 1), ('temperature', 0)):
      if not least <= getattr(self, name) < math.inf:
        raise ConfigError(f'samples.{name}={getattr(self, name)}; expected a finite number, at least {least}')


class Pair(NamedTuple):
  """int32 ids: all before a reply, and the reply."""

  prompt: np.ndarray
  reference: np.ndarray


def held_out(rows: packing.Batch, count: int, most: float = math.inf) -> list[Pair]:
  """The first reply that is a target in each of the first conversations; prompts differ and have at most `most` ids."""
  found = {}
  for ids_T, segments_T, mask_T in zip(rows.ids_BT, rows.segments_BT, rows.mask_BT, strict=True):
    for segment in range(1, segments_T.max() + 1):
      at = np.flatnonzero(segments_T == segment)
      change = np.diff(mask_T[at[1:]].astype(np.int8), append=0)  # the first token is no target, whoever wrote it
      if 1 not in change:
        continue
      begin = int(np.argmax(change == 1)) + 2
      end = begin + int(np.argmax(change[begin - 1:] == -1)) + 1
      if begin <= most:
        found.setdefault(ids_T[at[:begin]].tobytes(), Pair(ids_T[at[:begin]], ids_T[at[begin:end]]))
      if len(found) == count:
        return list(found.values())
  return list(found.values())


def around(c: Config, model: decode.Model, template: chat.Template, specs: params.Tree, virtual: int, seed: int
           ) -> Callable[..., contextlib.AbstractContextManager[loop.Program]]:
  """`lm.run.Around.program` that writes what the model answers after each evaluation; it compiles once for the run.

  While it answers, a second copy of the parameters is in memory, laid out for decoding and divided over the mesh as XLA
  sees fit. Every process calls it; process 0 writes. Rows after the first step, which a killed run left, are cut off.

  Args:
    specs: of the parameters, nodes of `lm.peft` included; a learned prompt stands before every other.
    virtual: positions that a prefix or prompt takes.
  """
  room = math.inf if model.length is None else model.length - virtual

  @contextlib.contextmanager
  def watched(program: loop.Program, parts: Any, data: memory.Data, workdir: str | os.PathLike, start: int
              ) -> Iterator[loop.Program]:
    rows = data.splits['validation']
    pairs = held_out(rows, c.count, room - c.new_tokens) or held_out(rows, c.count, room - 1)
    if not pairs:
      logs.say("samples: no validation row tells a prompt from its reply (data.loss='all' does not); none are written")
      yield program
      return
    s = sampler.Sampling(int(min(c.new_tokens, room - max(len(pair.prompt) for pair in pairs))), c.temperature,
                         stop=chat.stop_ids(template, data.tokenizer))
    answer = _answers(model, s, parts.mesh, [[*peft.virtual_tokens(specs), *pair.prompt.tolist()] for pair in pairs])
    base = jax.random.fold_in(jax.random.key(seed), _KEY)
    with contextlib.closing(Book(workdir, start)) as book:
      def show(step, state):
        found = answer(state, jax.random.fold_in(base, step) if c.temperature else None)
        book.write([_row(step, pair, ids[:n], template, data.tokenizer)
                    for pair, ids, n in zip(pairs, found.tokens_BT, found.lengths_B, strict=False)])
      yield dataclasses.replace(program, watch=show)
  return watched


def _answers(model, s, mesh, prompts):
  """(state, key) -> the `decode.Sample` of the prompts, on the host; devices share the rows."""
  prompts = prompts + prompts[:1] * (-len(prompts) % math.prod(mesh.shape[axis] for axis in sharding.ROWS))
  ids_BT, segments_BT = (jax.device_put(x, sharding.replicated(mesh)) for x in decode.pad(prompts))

  def answer(state, ids_BT, segments_BT, key):
    p = decode.prepare(peft.plain(train.averaged(state)))
    return decode.run(model, s, p, ids_BT, segments_BT, key)
  answer = jax.jit(answer, out_shardings=sharding.replicated(mesh))
  return lambda state, key: jax.device_get(answer(state, ids_BT, segments_BT, key))


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of samples.jsonl: step, prompt, reply, reference, and whether the reply had ended."""
  path = pathlib.Path(workdir) / 'samples.jsonl'
  # Text holds more that Python takes for an end of line than the byte that ends a row.
  return [json.loads(line) for line in path.read_bytes().split(b'\n') if line] if path.exists() else []


def _row(step, pair, ids, template, tokenizer):
  reply, ended = chat.parse(template, ids, tokenizer)
  return {'step': step, 'prompt': tokenizer.decode(pair.prompt), 'reply': reply,
          'reference': chat.parse(template, pair.reference, tokenizer)[0], 'ended': ended}


class Book:
  """samples.jsonl, always whole, of rows with 'step', 'prompt', 'reply' and what else is to be seen; and TensorBoard's
  file, in a folder of its own: it reads on in one file a folder."""

  def __init__(self, workdir, start):
    self._dir = pathlib.Path(workdir)
    if jax.process_index() != 0:
      return
    with self._failing():
      self._rows = [row for row in read(self._dir) if row['step'] <= start]
      self._events = events.fresh(self._dir / 'tensorboard' / 'samples')
    rows, self._rows = self._rows, []
    self.write(rows)

  def write(self, rows):
    """All rows of their steps; they replace those that a killed run wrote and did not come to save."""
    if jax.process_index() != 0:
      return
    steps = {row['step'] for row in rows}
    self._rows = [row for row in self._rows if row['step'] not in steps] + rows
    with self._failing():
      lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in self._rows]
      disk.write(self._dir / 'samples.jsonl', ''.join(lines).encode())
      seen = {}
      for row in rows:
        seen[row['step']] = i = seen.get(row['step'], -1) + 1
        shown = '\n\n'.join(f'**{name}**\n\n{value}' for name, value in row.items() if name != 'step')
        events.text(self._events, row['step'], time.time(), f'sample_{i}', shown)
      self._events.flush()

  def close(self):
    if jax.process_index() == 0:
      with contextlib.suppress(OSError):
        self._events.close()

  def _failing(self):
    return disk.failing(f'--workdir: cannot write samples into {self._dir}', 'sealed checkpoints are intact; mend the '
                        'disk and start again')
