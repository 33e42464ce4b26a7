"""Direct preference optimisation of a decoder on pairs of answers, all of it or few parameters, as a `Task`.

The reference is the model that training starts from. What it says of every answer is computed once, before training,
and stays with the rows: a step has one model in memory and no second forward pass. Shapes: N rows of a split, B of a
batch, K = 2 answers a row, T + 1 tokens an answer.
"""

from collections.abc import Callable
import dataclasses
import functools
import json
import os
import pathlib
from typing import Any, Literal

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import tqdm

from lm import (
  budget,
  config,
  decode,
  disk,
  hosts,
  logprobs,
  logs,
  nn,
  parallel,
  params,
  peft as peft_lib,
  pretrain,
  run,
  samples as samples_lib,
  seal,
  sharding,
  train,
  weights,
)
from lm.data import memory, preferences, sft
from lm.errors import CheckpointError, ConfigError
from lm.kernels import attention
from lm.losses import dpo
from lm.models import decoder

REFERENCE = 'reference.safetensors'  # in the workdir


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
  """`init_from` names the model; `model` must have its shape. Nothing is dropped out, as in the paper's code.

  Attributes:
    reference: what the policy is held near: 'start', the model at step 0, or 'none', as if all answers were equally
      likely to it.
  """

  data: preferences.Config = preferences.Config()
  model: decoder.Config = decoder.Config()
  loss: dpo.Config = dpo.Config()
  peft: peft_lib.Config = peft_lib.Config(train='')
  samples: samples_lib.Config = samples_lib.Config()
  reference: Literal['start', 'none'] = 'start'

  def __post_init__(self):
    super().__post_init__()
    if self.reference not in ('start', 'none'):
      raise ConfigError(f"reference={self.reference!r}; expected 'start' or 'none'")
    if self.data.answers != 2:
      raise ConfigError(f'data.answers={self.data.answers}; expected 2, a better and a worse one; set data.answers=2')
    self.peft.check_length(self.data.length, self.model.length)
    for name, rate, none in (('model.dropout', self.model.dropout, nn.Dropout()), ('peft.rate', self.peft.rate, 0),
                             ('peft.mixout', self.peft.mixout, 0)):
      if rate != none:
        raise ConfigError(f'{name}={rate}; expected {none}: the log-ratio to the reference has no noise; set it so')
    pretrain.check_mesh(self, self.model)
    pretrain.check_peft(self)


@struct.dataclass
class Referred:
  """Rows of a set [N, ...] or of a batch [B, ...], and what the reference says of them.

  Attributes:
    ranked: the answers.
    reference_NK: f32, log-probability of the whole answer in nats; 0 where there is none.
  """

  ranked: preferences.Ranked
  reference_NK: jax.Array


def task(c: Config, attend: Callable[..., jax.Array] = attention.attend) -> run.Task:
  """The decoder of `c.model`, with what `c.peft` adds, under the loss of `c.loss`."""
  base = decoder.specs(c.model)
  specs = peft_lib.specs(c.peft, base)
  flops = budget.training_flops(base, c.model.heads * c.model.head_dim, c.model.layers, c.data.length)
  flops = peft_lib.step_flops(c.peft, flops, c.model.layers)
  model = _model(c, specs, attend)
  prompted = functools.partial(peft_lib.prompted, vocab=c.model.vocab, length=c.peft.length)
  rows = prompted if c.peft.method == 'prompt' else lambda batch: batch

  def loss(p, batch, key):
    del key
    found = pairs(batch)
    both = found.pair.replace(chosen=rows(found.pair.chosen), rejected=rows(found.pair.rejected))
    return dpo.loss(peft_lib.materialise(p), found.replace(pair=both), None, **model, c=c.loss)

  def said(p, ranked):
    answers = jax.tree.map(lambda x_BKT: x_BKT.reshape(-1, x_BKT.shape[-1]), ranked.answers)
    scores = logprobs.score(peft_lib.materialise(p), rows(answers), None, **model, chunk=c.loss.chunk)
    return scores.row_B.reshape(ranked.grades_NK.shape)
  around = run.Around(data=functools.partial(_extend, c, specs, said) if c.reference == 'start' else None,
                      program=functools.partial(_around, c, specs) if c.samples.count else None,
                      tokens=2 * c.data.batch * c.data.length)
  return run.Task(specs, loss, loss, c.model.vocab, flops, source=preferences,
                  base=run.Base(base, peft_lib.freeze(c.peft, c.model.layers)), around=around)


def pairs(rows: preferences.Ranked | Referred) -> dpo.Batch:
  """The better and the worse answer of each row; without targets where neither is better or one is not there."""
  ranked, reference_BK = (rows.ranked, rows.reference_NK) if isinstance(rows, Referred) else (rows, None)
  counts_B = ranked.exists_NK.all(1) & (ranked.grades_NK[:, 0] != ranked.grades_NK[:, 1])
  best_B = ranked.grades_NK.argmax(1)

  def side(at_B):
    take = lambda x: jnp.take_along_axis(x, at_B.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)[:, 0]
    batch = jax.tree.map(take, ranked.answers)
    batch = batch.replace(mask_BT=batch.mask_BT & counts_B[:, None])
    last_B = jnp.maximum((batch.segments_BT > 0).sum(1) - 1, 0)
    return batch, last_B, None if reference_BK is None else take(reference_BK)
  (chosen, chosen_last_B, chosen_B), (rejected, rejected_last_B, rejected_B) = side(best_B), side(1 - best_B)
  return dpo.Batch(sft.Pair(chosen, rejected, chosen_last_B, rejected_last_B), chosen_B, rejected_B)


def _model(c, specs, attend):
  """`apply` and `head` of the losses."""
  stack = parallel.stack(c.mesh, peft_lib.block_specs(c.peft, specs), c.model.dtype)

  def apply(p, ids_BT, *, positions_BT, segments_BT, key):
    return decoder.apply(p, c.model, ids_BT, positions_BT=positions_BT, segments_BT=segments_BT, key=key,
                         attend=attend, stack=stack)
  return dict(apply=apply, head=lambda p: decoder.head(p, c.model))


def _around(c: Config, specs: params.Tree, program: Any, parts: run.Parts, data: memory.Data, workdir: pathlib.Path,
            start: int):
  """Samples for prompts of the validation rows, beside the better answers."""
  rows = data.splits['validation']
  ranked = rows.ranked if isinstance(rows, Referred) else rows
  at_N = ranked.grades_NK.argmax(1)
  better = jax.tree.map(lambda x: x[np.arange(len(at_N)), at_N], ranked.answers)
  shown = samples_lib.around(c.samples, decode.of(decoder, c.model), c.data.written, specs, c.peft.virtual, c.seed)
  return shown(program, parts, dataclasses.replace(data, splits={'validation': better}), workdir, start)


def _extend(c: Config, specs: params.Tree, said: Callable[..., jax.Array], parts: run.Parts,
            first: Callable[[], train.State], data: memory.Data, workdir: pathlib.Path) -> memory.Data:
  """The training and validation rows as `Referred`; the numbers are kept in the workdir's `REFERENCE`.

  A run that goes on reads them there: the same bits, whatever became of the model that it started from.

  Raises:
    CheckpointError: it goes on, and the file is missing, damaged, or of other rows.
  """
  path, rows = pathlib.Path(workdir) / REFERENCE, {split: data.splits[split] for split in ('train', 'validation')}
  known, p = {'rows': memory.sha256(rows)}, None
  trained = bool(seal.steps(path.parent / 'checkpoints'))
  if not trained:
    p = _parameters(first)
    known |= {'weights': weights.fingerprint(p), 'model': json.dumps(config.to_json(c.model), sort_keys=True)}
  kept, fault = _read(path, known)
  fault = next(filter(None, hosts.share(fault)), '')  # all do the same, whatever one of them sees
  if fault and trained:
    raise CheckpointError(f'{path}: {fault}; expected what the reference says of the rows that this run is trained on; '
                          'put it back, or choose another --workdir')
  if fault:
    logs.say(f'reference: {path.name}: {fault}; asking the model at step 0')
    kept = _asked(c, specs, said, parts, p, data, rows)
    if jax.process_index() == 0:
      _write(path, kept, known)
  return dataclasses.replace(data, blank=Referred(data.blank, np.float32(0)),
                             splits={split: Referred(rows[split], kept[split]) for split in rows})


def _parameters(first):
  state = first()
  return params.join(state.params, state.frozen)  # and not the optimizer's state


def _asked(c, specs, said, parts, p, data, splits) -> dict[str, np.ndarray]:
  """f32 [N, K] of each split: what `said` finds, by the layout of training and in its batches."""
  B, K = c.data.batch, c.data.answers

  def each(p, ranked, key):  # what devices sum is 0 but for the rows that one has
    return {}, {'said': jnp.zeros((B, K)).at[key.rows_B].set(said(p, ranked))}
  layout = parallel.layout(parts.mesh, c.mesh, specs, parts.trainable)
  evaluate = jax.jit(train.make_eval(each, layout), out_shardings=sharding.replicated(parts.mesh))
  key, place, kept = jax.random.key(0), sharding.batch_sharding(parts.mesh), {}
  quiet = None if jax.process_index() == 0 else True  # None: where nobody watches
  for split in splits:
    batches = tqdm.tqdm(preferences.eval_batches(data, split, B, place), total=memory.eval_steps(data, split, B),
                        desc=f'reference, {split}', disable=quiet)
    found = [jax.device_get(evaluate(p, batch, key)['said']) for batch in batches]
    kept[split] = np.concatenate(found)[:data.rows(split)]
  return kept


def _read(path: pathlib.Path, known: dict[str, str]) -> tuple[dict[str, np.ndarray], str]:
  """(what `_write` has put there, ''), or ({}, why that cannot be used)."""
  try:
    with safetensors.safe_open(path, 'np') as file:
      kept, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
  except FileNotFoundError:
    return {}, 'missing'
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    return {}, f'damaged ({" ".join(str(error).split())})'
  if facts.get('sha256') != memory.sha256(kept):
    return {}, 'damaged (its sha256 does not match)'
  other = [name for name, value in known.items() if facts.get(name) != value]
  return ({}, f'of other {" and ".join(other)}') if other else (kept, '')


def _write(path: str | os.PathLike, kept: dict[str, np.ndarray], known: dict[str, str]) -> None:
  with disk.failing(f'--workdir: cannot write {path}', disk.WRITABLE):
    disk.write(path, safetensors.numpy.save(kept, known | {'sha256': memory.sha256(kept)}))
