"""Batches as a pure function of (config, seed, step): nothing to save but the step, whatever the number of hosts.

Shapes: B rows of the global batch, T + 1 tokens a row (T for encoders).
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
from typing import Any, ClassVar, get_args, Literal

import grain
import jax
import numpy as np

from lm.data import corpora, inputs, memory, packing, placing, records
from lm.errors import ConfigError, DataError
from lm.text import tokenizer as tokenizers, vocabulary

Arrays = dict[str, np.ndarray]  # the fields of `packing.Batch` or `inputs.Inputs`
Batch = packing.Batch | inputs.Inputs
Packing = Literal['stream', 'fit', 'bert_pairs', 'electra_pairs', 'full_sentences', 'doc_sentences']
Pick = tuple[int, np.ndarray | inputs.Row]  # (number of the dataset, one planned row)


@dataclasses.dataclass(frozen=True)
class Config:
  """What is read, and how it is cut into rows.

  Attributes:
    corpus: one or several of: a prepared dataset (directory with manifest.json), a .txt or .jsonl file, a directory or
      glob of them. Raw text is tokenised into the cache directory on first use.
    weights: share of the rows that each corpus gives; () = by its training tokens.
    tokenizer: a path (see `memory.read_tokenizer`), 'byte', 'char' (built from the raw text), or '' = the one kept with
      the prepared corpus.
    length: T, targets a row; rows hold T + 1 tokens, those of encoders T with the special ones.
    batch: rows of the global batch.
    isolate: documents packed into one row do not see each other, and their first tokens are no targets.
    packing: 'stream' (windows over the joined documents), 'fit' (whole documents), or encoders' `inputs.PACKINGS`.
    copies: cuts of the corpus that make an epoch of 'bert_pairs' (BERT's dupe_factor).
    split: how raw text is split, see `records.Split`; a prepared dataset has its own.
    validation_fraction: of the raw text.
    threads: batches built ahead, 0 = none; the result does not depend on it.
  """

  corpus: str | tuple[str, ...] = ''
  weights: tuple[float, ...] = ()
  tokenizer: str = ''
  length: int = 1024
  batch: int = 8
  isolate: bool = False
  packing: Packing = 'stream'
  copies: int = 10
  split: Literal['hash', 'tail'] = 'hash'
  validation_fraction: float = 0.05
  threads: int = 2

  def __post_init__(self):
    if self.packing not in get_args(Packing):
      raise ConfigError(f'data.packing={self.packing!r}; expected one of {", ".join(get_args(Packing))}')
    for name, low in (('length', inputs.SHORTEST if self.encoder else 1), ('batch', 1), ('threads', 0), ('copies', 1)):
      if getattr(self, name) < low:
        raise ConfigError(f'data.{name}={getattr(self, name)}; expected at least {low} (packing {self.packing!r})')
    if self.isolate and self.encoder:
      raise ConfigError(f'data.isolate=True: rows of {self.packing!r} are one segment; set data.isolate=False')
    if self.weights and (len(self.weights) != len(self.corpora) or not all(0 < w < math.inf for w in self.weights)):
      raise ConfigError(f'data.weights={self.weights}; expected one positive number for each of the '
                        f'{len(self.corpora)} corpora')
    records.Split(self.split, self.validation_fraction)

  @property
  def corpora(self) -> tuple[str, ...]:
    return (self.corpus,) if isinstance(self.corpus, str) else self.corpus

  @property
  def encoder(self) -> bool:
    return self.packing in inputs.PACKINGS


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
  """Opened datasets and the plan of their training rows; made by `prepare`."""

  config: Config
  seed: int
  tokenizer: tokenizers.Tokenizer
  datasets: tuple[records.Dataset, ...]
  plans: tuple[packing.Stream | packing.Fit | inputs.Plan, ...]
  names: ClassVar[tuple[str, ...]] = ()  # of classes: text has none

  def tokens(self, split: str = 'train') -> int:
    return sum(d.tokens(split) for d in self.datasets)

  def utf8_bytes(self, split: str = 'validation') -> int:
    """Bytes of the text: bits per byte = nats per token * `said` tokens / bytes / ln 2."""
    return sum(d.utf8_bytes(split) for d in self.datasets)

  def said(self, split: str = 'validation') -> int:
    """Tokens that spell the text and end it: all but what begins documents."""
    documents = sum(len(d.lengths[split]) for d in self.datasets)
    return self.tokens(split) - documents * len(self.tokenizer.begin)

  @property
  def rows_per_epoch(self) -> int:
    return sum(plan.rows for plan in self.plans)

  @property
  def weights(self) -> tuple[float, ...]:
    raw = self.config.weights or tuple(d.tokens('train') for d in self.datasets)
    return tuple(w / sum(raw) for w in raw)

  @property
  def fingerprint(self) -> dict[str, Any]:
    """All that decides the batches, json-able; neither hosts nor threads do."""
    c = self.config
    return {'datasets': [d.sha256 for d in self.datasets], 'tokenizer': self.tokenizer.sha256, 'seed': self.seed,
            'weights': list(self.weights), 'length': c.length, 'batch': c.batch, 'packing': c.packing,
            'isolate': c.isolate} | ({'copies': c.copies} if c.packing == 'bert_pairs' else {})

  @functools.cached_property
  def pick(self) -> Callable[[int], tuple[int, int]]:
    """Row of the run -> (dataset, row of that dataset), mixed in proportion to `weights`: rows are equal in tokens."""
    if len(self.plans) == 1:
      return lambda row: (0, row)
    rows = grain.MapDataset.range(placing.ENDLESS)
    return grain.MapDataset.mix([rows.map(lambda row, i=i: (i, row)) for i in range(len(self.plans))],
                                self.weights).__getitem__

  @functools.cached_property
  def evaluation(self) -> Callable[[str], tuple[packing.Stream | packing.Fit | inputs.Plan, ...]]:
    """Plans of a split to be read once and in order."""
    return functools.cache(lambda split: _plans(self.config, self.tokenizer, self.datasets, split, shuffle=False))


def prepare(c: Config, cache_dir: str | os.PathLike, *, seed: int = 0) -> Data:
  """Opens the corpora, tokenising raw text into `cache_dir` first where that was not done before.

  Raises:
    ConfigError: a tokenizer that does not belong to a prepared corpus.
    DataError: nothing to read, or something damaged.
  """
  if seed < 0:
    raise ConfigError(f'seed={seed}; expected at least 0')
  if not c.corpora or not all(c.corpora):
    raise ConfigError('data.corpus is empty; expected a prepared dataset or text; set data.corpus=PATH')
  sources = [records.Dataset(p) if corpora.is_prepared(p) else corpora.find(p) for p in c.corpora]
  tokenizer = _tokenizer(c, sources)
  datasets = tuple(s if isinstance(s, records.Dataset) else _tokenised(s, tokenizer, c, pathlib.Path(cache_dir))
                   for s in sources)
  for d in datasets:
    if d.manifest['tokenizer']['sha256'] != tokenizer.sha256:
      remedy = ("set data.tokenizer='' to use that one, or prepare" if c.tokenizer else
                'all corpora are read by that of the first prepared one; prepare')
      raise ConfigError(f'data.tokenizer={c.tokenizer!r}: not the tokenizer that {d.path} was prepared with (sha256 '
                        f'differs); {remedy} the corpus again')
  return Data(c, seed, tokenizer, datasets, _plans(c, tokenizer, datasets, 'train', seed))


def _plans(c, tokenizer, datasets, split, seed=0, shuffle=True):
  if c.encoder:
    return inputs.plans(c.packing, datasets, split, tokenizer, c.length, c.copies, seed, shuffle)
  return tuple(packing.plan(c.packing, d.lengths[split], c.length, seed, shuffle) for d in datasets)


def _tokenizer(c, sources):
  if c.tokenizer not in ('', 'char'):
    return memory.read_tokenizer(c.tokenizer)
  for s in sources:
    if isinstance(s, records.Dataset):
      found = s.tokenizer()
      if c.tokenizer and found.kind != c.tokenizer:
        raise ConfigError(f"data.tokenizer='char': {s.path} was prepared with another kind, {found.kind}; expected its "
                          "own; set data.tokenizer=''")
      return found
  if not c.tokenizer:
    raise ConfigError("data.tokenizer is empty; raw text needs one; set data.tokenizer to a path, 'byte' or 'char'")
  return tokenizers.char(d.text for s in sources for d in s)


def _tokenised(files: corpora.Files, tokenizer, c: Config, cache_dir: pathlib.Path) -> records.Dataset:
  split = records.Split(c.split, c.validation_fraction)
  source = files.source()
  head = records.provenance(tokenizer, split, source)
  out = cache_dir / hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()[:16]
  if not (out / 'manifest.json').exists():
    logging.getLogger(__name__).info('tokenising %s into %s', ', '.join(s['name'] for s in source[:3]), out)
  return records.write(files, tokenizer, out, split=split, source=source)


def check(data: Data, vocab: int) -> None:
  """Does the data fit a model of `vocab` ids? Call it before anything is compiled.

  Raises:
    ConfigError: `vocab` is smaller than the tokenizer's, or larger than that rounded up to a multiple of 128.
    DataError: a corpus without a training row, or fewer rows than one batch.
  """
  size, c = data.tokenizer.vocab_size, data.config
  most = -(-size // 128) * 128
  if not size <= vocab <= most:
    raise ConfigError(f'model.vocab={vocab}: the tokenizer has {size} ids; expected {size}'
                      f'{f" to {most}" if most > size else ""}; set model.vocab={size}')
  for d, plan in zip(data.datasets, data.plans, strict=True):
    if not plan.rows:
      raise DataError(f'{d.path}: {d.tokens("train")} training tokens in {len(d.lengths["train"])} documents; expected '
                      f'at least data.length={c.length}; shorten data.length, give more text{_tail(d)}')
  if data.rows_per_epoch < c.batch:
    raise DataError(f'corpus: {data.rows_per_epoch} rows of {c.length} tokens, less than one batch of '
                    f'data.batch={c.batch}; lower data.batch or data.length, or give more text')


def _tail(d):
  """What helps where few documents were split by hash."""
  if d.manifest['split']['kind'] == 'tail':
    return ''
  return ", or (few documents) set data.split='tail'; a prepared dataset: prepare it again with --split=tail"


def differences(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
  """{name: (saved, now)} of what differs between two fingerprints."""
  return {k: (saved.get(k), now.get(k)) for k in sorted(saved.keys() | now.keys()) if saved.get(k) != now.get(k)}


def check_fingerprint(saved: dict[str, Any], now: dict[str, Any]) -> None:
  """Raises a DataError, or where settings alone differ a ConfigError, that lists how a saved run's data differ."""
  if found := differences(saved, now):
    differing = '; '.join(f'{k}: {a!r} -> {b!r}' for k, (a, b) in found.items())
    kind = DataError if found.keys() & {'datasets', 'tokenizer', 'rows'} else ConfigError
    raise kind(f'data differs from the saved run ({differing}); expected the same; restore the settings or data, or '
               'choose another --workdir')


def host_batch(data: Data, step: int) -> Arrays:
  """The whole global batch of one step as numpy arrays: what `train_batches` must equal."""
  return _train_arrays(data, np.arange(data.config.batch), step)


def train_batches(data: Data, sharding: jax.sharding.Sharding, start_step: int = 0) -> Iterator[Batch]:
  """Endless global batches from `start_step` on; each host builds only the rows that its devices hold."""
  arrays = lambda rows, step: _kind(data)(**_train_arrays(data, rows, step))
  return placing.batches(arrays, placing.ENDLESS, data.config.batch, data.config.threads, sharding, start_step)


def eval_steps(data: Data, split: str, batch: int) -> int:
  """Number of batches that `eval_batches` gives."""
  return -(-sum(p.rows for p in data.evaluation(split)) // batch)


def eval_batches(data: Data, split: str, batch: int, sharding: jax.sharding.Sharding) -> Iterator[Batch]:
  """The split once, in order, in batches of `batch` rows; the last is filled up with empty rows (segment 0).

  Raises:
    DataError: the split has no target.
  """
  plans = data.evaluation(split)
  ends = np.cumsum([p.rows for p in plans])
  if not ends[-1]:
    hint = max((_tail(d) for d in data.datasets), key=len)
    raise DataError(f'{", ".join(str(d.path) for d in data.datasets)}: nothing to evaluate in {split!r}; expected at '
                    f'least 2 tokens; raise data.validation_fraction{hint}')
  nothing = (inputs.Row if data.config.encoder else np.asarray)(np.zeros((0, 3), np.int64))

  def arrays(rows, step):
    picks = []
    for row in (step * batch + rows).tolist():
      d = int(np.searchsorted(ends, row, 'right'))
      picks.append((d, plans[d].row(row - int(ends[d]) + plans[d].rows)) if d < len(plans) else (0, nothing))
    return _kind(data)(**_fill(data, split, picks))
  return placing.batches(arrays, eval_steps(data, split, batch), batch, data.config.threads, sharding)


def _kind(data):
  return inputs.Inputs if data.config.encoder else packing.Batch


def _train_arrays(data: Data, rows: np.ndarray, step: int) -> Arrays:
  picks = (data.pick(step * data.config.batch + row) for row in rows.tolist())
  return _fill(data, 'train', [(d, data.plans[d].row(row)) for d, row in picks])


def _fill(data: Data, split: str, picks: list[Pick]) -> Arrays:
  """Reads the tokens of the planned rows, all rows of a dataset in one go."""
  c, rows = data.config, [row for _, row in picks]
  if c.encoder:
    special = vocabulary.special_ids(data.tokenizer)
    arrays, text_BT = inputs.layout(rows, c.length, special, c.packing in inputs.PAIRS)
    rows = [row.spans for row in rows]
  else:
    arrays, text_BT = packing.blank(rows, c.length + 1, c.isolate)
  for i, dataset in enumerate(data.datasets):
    mine_B = np.array([d == i for d, _ in picks])
    if mine_B.any():
      spans = np.concatenate([spans for spans, mine in zip(rows, mine_B, strict=True) if mine])
      arrays['ids_BT'][mine_B[:, None] & text_BT] = dataset.read(split, spans)
  return arrays
