"""A reward model: any encoder or decoder with one score a text, learned from graded answers, as a `Task`.

`task` trains it, `finish` normalises it once it is trained, and `load` gives other programs what scores texts. The head
starts from N(0, 1 / (D + 1)) and bias 0 (openai/lm-human-preferences). Shapes: B prompts of a batch, K answers a
prompt, R rows, N scores or bins, T tokens a row, D embed.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
import json
import math
import os
import pathlib
import types
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lm import (
  budget,
  checkpoint as checkpoint_lib,
  classification,
  config,
  disk,
  logs,
  mixout,
  nn,
  parallel,
  params,
  peft as peft_lib,
  pretrain,
  run,
  sharding,
  weights,
)
from lm.data import examples, packing, preferences
from lm.errors import CheckpointError, ConfigError
from lm.kernels import attention
from lm.losses import reward as losses
from lm.models import decoder, encoder, heads
from lm.text import chat, tokenizer as tokenizers

NORMALISER = 'normaliser.json'  # in the workdir


@dataclasses.dataclass(frozen=True)
class _Config(run.Config):
  """What both kinds have in common.

  Attributes:
    pooling: what is scored: a decoder's 'last' token; an encoder's 'pooler', 'first' token (with a dense layer of its
      own) or 'mean', see `lm.classification`.
    margin: what the better answer's score has to exceed the other's by, for each unit of difference of their grades
      (Llama 2, arXiv:2307.09288 §3.2.2).
    normalise: what the scores of `reference` are brought to: 'mean' 0, as InstructGPT does, 'mean_std' 0 and 1, as
      lm-human-preferences does; 'none' leaves them.
    reference: file or folder of instructions or conversations whose last answers these are; '' = all answers of the
      validation split.
  """

  data: preferences.Config = preferences.Config()
  loss: losses.Config = losses.Config()
  peft: peft_lib.Config = peft_lib.Config(train='^(classify|pooler)/')
  pooling: Literal['pooler', 'first', 'mean', 'last'] = 'first'
  margin: float = 0.0
  normalise: Literal['none', 'mean', 'mean_std'] = 'mean_std'
  reference: str = ''

  def __post_init__(self):
    super().__post_init__()
    self.peft.check_length(self.data.length, self.model.length, more=1)
    if (self.pooling == 'last') != isinstance(self.model, decoder.Config):
      raise ConfigError(f"pooling={self.pooling!r}; expected 'last' of a decoder, and of a decoder only")
    if not 0 <= self.margin < math.inf or self.margin and self.loss.kind == 'best':
      raise ConfigError(f'margin={self.margin} with loss.kind={self.loss.kind!r}; expected a finite number, 0 where '
                        "the best answer alone counts; set margin=0 or loss.kind='pairs'")
    if self.mesh.sequence:
      raise ConfigError('mesh.sequence=True: rows have data.length + 1 tokens, to the last of which all come; set '
                        'mesh.sequence=False')
    pretrain.check_mesh(self, self.model)
    pretrain.check_peft(self)


@dataclasses.dataclass(frozen=True)
class Decoder(_Config):
  """GPT-2, GPT-3, Llama."""

  model: decoder.Config = decoder.Config()
  pooling: Literal['pooler', 'first', 'mean', 'last'] = 'last'


@dataclasses.dataclass(frozen=True)
class Encoder(_Config):
  """BERT, RoBERTa, MiniLM."""

  model: encoder.Config = encoder.Config()


Config = Decoder | Encoder


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModel:
  """A trained reward model; `params` is as it trained, see `lm.peft`."""

  config: Config
  params: params.Tree
  tokenizer: tokenizers.Tokenizer
  normaliser: losses.Affine

  def score(self, p: params.Tree, rows: packing.Batch) -> jax.Array:
    """Normalised scores, f32 [R], of rows with padding on either side; pure, `p` stands for `params` under jit."""
    return self.normaliser(_scorer(self.config, _quiet(self.config))(p, rows, None))

  def rows(self, found: Iterable[tuple[Sequence[chat.Message], str]]) -> packing.Batch:
    """Prompts (() = none) with an answer each, as `score` takes them. Raises what `preferences.rows` does."""
    return preferences.rows(found, self.config.data, self.tokenizer, isinstance(self.config, Encoder))

  def scores(self, found: Iterable[tuple[Sequence[chat.Message], str]]) -> np.ndarray:
    """`score` of `rows`, f32 [N], so many at a time as a step of its training had: compiled once."""
    rows, R = self.rows(found), self.config.data.batch * self.config.data.answers
    N = len(rows.ids_BT)
    chosen = [np.minimum(np.arange(i, i + R), N - 1) for i in range(0, N, R)]
    with sharding.use(sharding.alone()):  # where its weights are, whatever mesh a policy trains on
      parts = [self._compiled(self.params, jax.tree.map(lambda x, at=at: x[at], rows)) for at in chosen]
    return np.concatenate(jax.device_get(parts))[:N]

  def fingerprint(self) -> str:
    """Of its weights, and of what brings its scores to their scale."""
    with sharding.use(sharding.alone()):
      return f'{weights.fingerprint(self.params)} * {self.normaliser.scale} + {self.normaliser.shift}'

  @functools.cached_property
  def _compiled(self):
    return jax.jit(self.score)


def task(c: Config, attend: Callable[..., jax.Array] = attention.attend) -> run.Task:
  """The model with a new head under `c.loss`. FLOPs are those of K answers a token; `attend`: another attention."""
  base, whole = _specs(c)
  one = budget.training_flops(_family(c).specs(c.model), c.model.heads * c.model.head_dim, c.model.layers,
                              c.data.length + 1, predicted=0.0)
  source = types.SimpleNamespace(prepare=functools.partial(_prepare, c), check=preferences.check,
                                 train_batches=preferences.train_batches, eval_batches=preferences.eval_batches)
  trained, evaluated = (functools.partial(_loss, c, _scorer(c, model, attend)) for model in (c.model, _quiet(c)))
  one = peft_lib.step_flops(c.peft, one, c.model.layers)
  flops = budget.Flops(*(c.data.answers * x for x in dataclasses.astuple(one)))
  return run.Task(peft_lib.specs(c.peft, whole), trained, lambda p, batch, key: evaluated(p, batch, None),
                  c.model.vocab, flops, source=source, base=run.Base(base, peft_lib.freeze(c.peft, c.model.layers)))


def finish(c: Config, workdir: str | os.PathLike) -> dict[str, Any]:
  """Normalises the best model of the finished run in `workdir`, for `load`; writes normaliser.json there.

  Returns:
    For summary.json, of that model on the validation split: accuracy, pairs, calibration_error (before normalising),
    reliability (count, predicted, observed of each bin), and the normaliser's scale and shift. {} in a job of several
    processes, where nothing is written: call it in one.
  """
  if jax.process_count() > 1:
    logs.say('scores are not normalised by a job of several processes; call lm.reward_model.finish in one')
    return {}
  workdir = pathlib.Path(workdir)
  step = checkpoint_lib.best(workdir / 'checkpoints', c.checkpoint.metric, c.checkpoint.mode)
  base, whole = _specs(c)
  alone = dataclasses.replace(c, mesh=sharding.Config())  # whatever the mesh was
  found = RewardModel(alone, weights.restore(workdir, whole, step, base), tokenizers.load(workdir / 'tokenizer'),
                      losses.Affine())
  score, place = jax.jit(found.score), sharding.batch_sharding(sharding.make_mesh(sharding.Config()))
  data = _prepare(c, c.data, workdir, c.seed)
  scored = [(score(found.params, _flat(batch.answers)).reshape(batch.exists_NK.shape), batch.grades_NK, batch.exists_NK)
            for batch in preferences.eval_batches(data, 'validation', c.eval_batch, place)]
  scores_NK, grades_NK, exists_NK = (np.concatenate(jax.device_get(x)) for x in zip(*scored, strict=True))
  metrics = losses.loss(scores_NK, -grades_NK, exists_NK, c=losses.Config())[1]
  table = losses.reliability(scores_NK, -grades_NK, exists_NK)
  scores = scores_NK[exists_NK]
  if talks := _reference(c):
    scores = found.scores(talks)
  affine = losses.Affine() if c.normalise == 'none' else losses.normalise(
      scores, 1.0 if c.normalise == 'mean_std' else None)
  kept = {'step': step, 'scale': affine.scale, 'shift': affine.shift, 'scores': len(scores)}
  disk.write(workdir / NORMALISER, (json.dumps(kept, indent=1) + '\n').encode())
  accuracy = metrics['accuracy']
  return {'reward': {
      'accuracy': float(accuracy.total / accuracy.weight), 'pairs': int(accuracy.weight),
      'calibration_error': float(losses.calibration_error(table)),
      'reliability': {name.removesuffix('_N'): x.tolist() for name, x in vars(table).items()}, **kept}}


def load(workdir: str | os.PathLike) -> RewardModel:
  """The best model of a run that `finish` normalised.

  Raises:
    CheckpointError: no config of a reward model, no normaliser.json, or no intact checkpoint.
  """
  workdir = pathlib.Path(workdir)
  try:
    saved = json.loads((workdir / 'config.json').read_bytes())['config']
    c = config.from_json(Decoder if saved['pooling'] == 'last' else Encoder, saved)
    kept = json.loads((workdir / NORMALISER).read_bytes())
    step, affine = kept['step'], losses.Affine(float(kept['scale']), float(kept['shift']))
  except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
    raise CheckpointError(f'{workdir}: {type(error).__name__}: {error}; expected the workdir of a finished reward '
                          f'model (config.json, {NORMALISER}); start its run again to finish it') from error
  base, whole = _specs(c)
  return RewardModel(dataclasses.replace(c, mesh=sharding.Config()), weights.restore(workdir, whole, step, base),
                     tokenizers.load(workdir / 'tokenizer'), affine)


def reward(workdir: str | os.PathLike, field: str) -> Callable[[Sequence[Any], Sequence[str]], np.ndarray]:
  """The reward function, see `lm.rewards`, that the model in `workdir` is; it is loaded by its `load`, or when asked,
  also for its `fingerprint`.

  Of records (`lm.data.prompts.Record`) that begin a text, or ask nothing, it scores the text, without a prompt. `field`
  of the config names `workdir`, for errors: those of loading are a ConfigError.
  """
  @functools.cache
  def loaded():
    if not workdir:
      raise ConfigError(f"{field}='': expected the workdir of a finished run of experiments.reward; set it")
    try:
      return load(workdir)
    except CheckpointError as error:
      raise ConfigError(f'{field}={error}') from error

  def scores(records, responses):
    return loaded().scores(((), r.prompt + said) if r.text is not None or not r.prompt else (r.messages, said)
                           for r, said in zip(records, responses, strict=True))
  scores.load, scores.fingerprint = loaded, lambda: loaded().fingerprint()
  return scores


def _prepare(c, *args, **kwargs):
  """The data; what `finish` could not score of `c.reference` is refused before training."""
  talks, data = _reference(c), preferences.prepare(*args, encoder=isinstance(c, Encoder), **kwargs)
  if talks:
    preferences.rows(talks, c.data, data.tokenizer, isinstance(c, Encoder))
  return data


def _reference(c):
  """(prompt, answer) of each conversation in `c.reference`."""
  talks = examples.read(c.reference, 'chat', c.data.on_error, unanswered='cut')[0] if c.reference else ()
  return [(talk.messages[:-1], talk.messages[-1].content) for talk in talks]


def _family(c):
  return decoder if isinstance(c.model, decoder.Config) else encoder


def _quiet(c):
  return dataclasses.replace(c.model, dropout=nn.Dropout())


def _specs(c):
  """(of the model that training starts from, with the new head in place of the output matrix)."""
  base, whole = heads.for_classes(_family(c).specs(c.model), c.pooling, c.model.embed, classes=1)
  out = dataclasses.replace(whole['classify']['out'], init=params.Normal((c.model.embed + 1)**-0.5))
  return base, {k: v for k, v in whole.items() if k != 'unembed'} | {'classify': whole['classify'] | {'out': out}}


def _scorer(c, model, attend=attention.attend):
  """(p, rows, key) -> scores_R as they are learned."""
  family, first = _family(c), int(isinstance(c, Encoder))
  blocks = peft_lib.block_specs(c.peft, peft_lib.specs(c.peft, _specs(c)[1]))
  stack = mixout.stack(parallel.stack(c.mesh, blocks, model.dtype))

  def score(p, rows, key):
    p = peft_lib.materialise(p)
    rows = peft_lib.prompted(rows, model.vocab, c.peft.length, first) if c.peft.method == 'prompt' else rows
    x_RTD = family.apply(p, model, rows.ids_BT, positions_BT=rows.positions_BT, segments_BT=rows.segments_BT,
                         key=nn.fold(key, 0), attend=attend, stack=stack)
    return classification.head(p, x_RTD, rows.segments_BT, nn.fold(key, 1), model=model, pooling=c.pooling,
                               examples=0)[:, 0].astype(jnp.float32)
  return score


def _loss(c, score, p, batch, key):
  """All answers of all prompts in one pass. 'length_accuracy': were the longer answer always the better one."""
  B, K = batch.exists_NK.shape
  if isinstance(key, nn.Keys):
    key = key.replace(rows_B=(key.rows_B[:, None] * K + jnp.arange(K)[None]).reshape(-1))
  scores_BK = score(p, _flat(batch.answers), key).reshape(B, K)
  grades_BK, exists_BK = batch.grades_NK, batch.exists_NK
  margins_BKK = c.margin * (grades_BK[:, :, None] - grades_BK[:, None]) if c.margin else None
  terms, metrics = losses.loss(scores_BK, -grades_BK, exists_BK, c=c.loss, margins_BKK=margins_BKK)
  lengths_BK = batch.answers.mask_BT.sum(-1)
  longer = losses.loss(lengths_BK, -grades_BK, exists_BK, c=losses.Config())[1]['accuracy']
  return terms, metrics | {'length_accuracy': longer}


def _flat(answers):
  """[B, K, T] -> [B K, T]."""
  return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), answers)
