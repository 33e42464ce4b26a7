"""Sets that fit in memory, as batches that are a pure function of (seed, step): what fine-tuning reads.

A module that fine-tuning reads from (`lm.data.labelled`, `lm.data.conversations`) has the names of `lm.data.loader`:
`prepare`, `check`, `train_batches`, `eval_batches`. It makes a `Data` and takes all but the first from here.
Shapes: N rows of a split, B rows of a batch.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import hashlib
import os
from typing import Any

import jax
import numpy as np

from lm.data import placing, tables_io
from lm.data.json_io import Fault
from lm.errors import ConfigError, DataError
from lm.models import gguf
from lm.text import tokenizer as tokenizers
from lm.text.tokenizer import Tokenizer

Rows = Any  # a tree of numpy arrays [rows, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
  """Tokenised splits.

  Attributes:
    config: has `batch` and `threads`.
    splits: 'train' and 'validation', perhaps 'test': rows.
    blank: one row that counts nowhere, which fills up an evaluation's last batch.
    again: (numbers of training rows, epoch, seed) -> those rows, where an epoch's differ from `splits` (augmentation).
    again_by: json-able, what `again` does and with what; '' = there is none.
    names: of the classes, in the order of their numbers; () = there are none.
  """

  config: Any
  seed: int
  tokenizer: Tokenizer
  splits: dict[str, Rows]
  blank: Rows
  again: Callable[[np.ndarray, int, int], Rows] | None = None
  again_by: Any = ''
  names: tuple[str, ...] = ()

  def rows(self, split: str) -> int:
    return len(jax.tree.leaves(self.splits[split])[0])

  def utf8_bytes(self, split: str = 'validation') -> int:
    """0: the rows are no running text, of which bits per byte would tell something."""
    del split
    return 0

  @functools.cached_property
  def fingerprint(self) -> dict[str, Any]:
    """All that decides the batches, json-able."""
    found = {name: sha256(rows) for name, rows in self.splits.items()}
    known = {'rows': found, 'tokenizer': self.tokenizer.sha256, 'seed': self.seed, 'batch': self.config.batch}
    return known | ({'again': self.again_by} if self.again_by else {})


def check_config(c: Any, shortest: int) -> None:
  """ConfigError unless the fields that all sets in memory have are in range; `shortest`: the least `length`."""
  for name, low in (('length', shortest), ('batch', 1), ('threads', 0)):
    if getattr(c, name) < low:
      raise ConfigError(f'data.{name}={getattr(c, name)}; expected at least {low}')
  if not 0 < c.validation_fraction < 1:
    raise ConfigError(f'data.validation_fraction={c.validation_fraction}; expected a share between 0 and 1')
  check_rename(c.rename, 'data.rename')
  tables_io.check_encoding(c.encoding, 'data.encoding')


def check_rename(pairs: Sequence[tuple[str, str]], name: str) -> None:
  """ConfigError unless they are pairs of names, and no name stands twice on one side; `name`: of the field or flag."""
  if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 and all(
      isinstance(word, str) and word for word in pair) for pair in pairs):
    raise ConfigError(f"{name}={pairs!r}; expected pairs of what the file calls a field and what it is called here, "
                      "such as (('sentence', 'text'),)")
  for words in zip(*pairs, strict=True):
    if twice := [word for word in words if words.count(word) > 1]:
      raise ConfigError(f'{name}={pairs!r}: {twice[0]!r} twice; expected each field once')


def check_paths(c: Any) -> None:
  """ConfigError unless the fields `corpus` and `tokenizer` are set."""
  for name in ('corpus', 'tokenizer'):
    if not getattr(c, name) or '' in getattr(c, name) and not isinstance(getattr(c, name), str):
      raise ConfigError(f'data.{name} is empty; expected a path; e.g. --set data.{name}=...')


def read_tokenizer(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer at `path`, see `lm.text.tokenizer.load`, or that in a model's GGUF file."""
  if not str(path).endswith('.gguf'):
    return tokenizers.load(path)
  found = gguf.read_tokenizer(path)
  if found is None:
    raise ConfigError(f'data.tokenizer={path}: no tokenizer of a kind that is read here; expected byte-level BPE; name '
                      'another tokenizer')
  return found


def encoded(texts: Sequence[str], tokenizer: Tokenizer, origin: str) -> list[np.ndarray]:
  """The ids of a text, or of both of a pair; the Fault of what the tokenizer refuses names `origin` and field."""
  ids = []
  for name, text in zip(('text', 'text_pair'), texts, strict=False):
    try:
      ids.append(tokenizer.encode(text))
    except DataError as error:
      raise Fault('words', origin, f'field {name}: {error}') from error
  return ids


def sha256(rows: Rows) -> str:
  """Of the arrays' names, types, shapes and bytes."""
  digest = hashlib.sha256()
  for path, x in jax.tree_util.tree_flatten_with_path(rows)[0]:
    digest.update(f'{jax.tree_util.keystr(path)} {x.dtype} {x.shape}'.encode() + np.ascontiguousarray(x).tobytes())
  return digest.hexdigest()


def check(data: Data, vocab: int) -> None:
  """Does the data fit a model of `vocab` ids? Call it before anything is compiled.

  Raises:
    ConfigError: the tokenizer has more ids than the model. DataError: fewer rows than a batch, nothing to evaluate.
  """
  if data.tokenizer.vocab_size > vocab:
    raise ConfigError(f'model.vocab={vocab}: the tokenizer has {data.tokenizer.vocab_size} ids; expected at most that '
                      'many; use the tokenizer that the model was trained with')
  if data.rows('train') < data.config.batch:
    raise DataError(f'corpus: {data.rows("train")} training rows, less than one batch of data.batch='
                    f'{data.config.batch}; lower data.batch, or give more')
  if not data.rows('validation'):
    raise DataError('corpus: nothing to evaluate; expected rows in the validation split; mark '
                    'some with split=validation, raise data.validation_fraction, or take out the field split')


def order(data: Data, epoch: int) -> np.ndarray:
  """The training rows in the order of one epoch."""
  return np.random.default_rng((data.seed, epoch)).permutation(data.rows('train'))


def steps_per_epoch(data: Data) -> int:
  """Whole batches in an epoch; what is left over waits for the next one's order."""
  return data.rows('train') // data.config.batch


def train_batches(data: Data, sharding: jax.sharding.Sharding, start_step: int = 0) -> Iterator[Rows]:
  """Endless global batches from `start_step` on, epoch after epoch, each in an order of its own."""
  epoch_order = functools.lru_cache(2)(functools.partial(order, data))
  per_epoch, B = steps_per_epoch(data), data.config.batch

  def arrays(rows, step):
    epoch, at = divmod(int(step), per_epoch)
    chosen = epoch_order(epoch)[at * B + rows]
    if data.again is not None:
      return data.again(chosen, epoch, data.seed)
    return jax.tree.map(lambda x: x[chosen], data.splits['train'])
  return placing.batches(arrays, placing.ENDLESS, B, data.config.threads, sharding, start_step)


def eval_steps(data: Data, split: str, batch: int) -> int:
  """Number of batches that `eval_batches` gives."""
  return -(-data.rows(split) // batch)


def eval_batches(data: Data, split: str, batch: int, sharding: jax.sharding.Sharding) -> Iterator[Rows]:
  """The split once, in order; the last batch is filled up with blank rows."""
  def arrays(rows, step):
    chosen = step * batch + rows
    inside = chosen < data.rows(split)
    some = np.minimum(chosen, data.rows(split) - 1)

    def take(x, blank):
      return np.where(inside.reshape(-1, *(1,) * (x.ndim - 1)), x[some], np.asarray(blank, x.dtype)[None])
    return jax.tree.map(take, data.splits[split], data.blank)
  return placing.batches(arrays, eval_steps(data, split, batch), batch, data.config.threads, sharding)
