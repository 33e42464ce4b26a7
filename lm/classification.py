"""Fine-tuning of any encoder or decoder to one label a text, all of it or few parameters, as a `Task`."""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import types
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from lm import (
  budget,
  checkpoint as checkpoint_lib,
  mixout,
  nn,
  parallel,
  params,
  peft as peft_lib,
  pretrain,
  run,
  sharding,
  train,
  weights,
)
from lm.data import labelled, memory
from lm.errors import ConfigError
from lm.kernels import attention
from lm.losses import classify
from lm.models import deberta, decoder, encoder, heads

Pooling = Literal['pooler', 'first', 'bare', 'mean', 'last']


@dataclasses.dataclass(frozen=True)
class _Config(run.Config):
  """What all kinds have in common.

  Attributes:
    classes: number of labels; 1 where they are numbers (`data.numbers`), whose square error is trained on.
    pooling: what is classified: 'pooler' (BERT's, pretrained with it), the 'first' token with a dense layer of its own
      (RoBERTa, DeBERTa), the 'bare' first token (ELECTRA), the 'mean' of the tokens, or a decoder's 'last' token.
    smoothing: share of a label that is spread over all classes (arXiv:1512.00567 §7).
    consistency: R-Drop's alpha, see `losses.classify`; 0 = one pass.
  """

  data: labelled.Config = labelled.Config()
  peft: peft_lib.Config = peft_lib.Config(train='^(classify|pooler)/')
  classes: int = 2
  pooling: Pooling = 'first'
  smoothing: float = 0.0
  consistency: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    if self.classes < 1 or (self.classes == 1) != self.data.numbers:
      raise ConfigError(f'classes={self.classes}, data.numbers={self.data.numbers}; expected 1 where labels are '
                        'numbers, and at least 2 otherwise')
    if self.data.numbers and (self.smoothing or self.consistency):
      raise ConfigError(f'smoothing={self.smoothing}, consistency={self.consistency}; expected 0 where labels are '
                        'numbers; set both so')
    if not 0 <= self.smoothing < 1:
      raise ConfigError(f'smoothing={self.smoothing}; expected 0 <= smoothing < 1')
    if not 0 <= self.consistency < math.inf:
      raise ConfigError(f'consistency={self.consistency}; expected a finite number, at least 0')
    self.peft.check_length(self.data.length, self.model.length)
    if (self.pooling == 'last') != isinstance(self.model, decoder.Config):
      raise ConfigError(f"pooling={self.pooling!r}; expected 'last' of a decoder, and of a decoder only")
    if self.pooling == 'pooler' and not isinstance(self.model, encoder.Config):
      raise ConfigError("pooling='pooler'; expected of BERT's family only; set pooling=first")
    if self.data.pack and self.peft.method == 'prompt':
      raise ConfigError('data.pack=True: a prompt stands in each example, not in each row; set data.pack=False')
    pretrain.check_mesh(self, self.model)
    pretrain.check_peft(self)


@dataclasses.dataclass(frozen=True)
class Encoder(_Config):
  """BERT, RoBERTa, MiniLM, ELECTRA."""

  model: encoder.Config = encoder.Config()


@dataclasses.dataclass(frozen=True)
class Disentangled(_Config):
  """DeBERTa."""

  model: deberta.Config = deberta.Config()


@dataclasses.dataclass(frozen=True)
class Decoder(_Config):
  """GPT-2, Llama."""

  model: decoder.Config = decoder.Config()
  pooling: Pooling = 'last'


Config = Encoder | Disentangled | Decoder
_FAMILIES = {encoder.Config: encoder, deberta.Config: deberta, decoder.Config: decoder}


def task(c: Config, attend: Callable[..., jax.Array] = attention.attend) -> run.Task:
  """The model with a new head; `attend`: another attention, but for DeBERTa."""
  family = _FAMILIES[type(c.model)]
  base, whole = _specs(c)
  specs, body = peft_lib.specs(c.peft, whole), family.specs(c.model)
  flops = budget.training_flops(body, c.model.heads * c.model.head_dim, c.model.layers, c.data.length, predicted=0.0)
  flops = peft_lib.step_flops(c.peft, flops, c.model.layers)
  quiet = dataclasses.replace(c.model, dropout=nn.Dropout())
  source = types.SimpleNamespace(prepare=functools.partial(labelled.prepare, encoder=family is not decoder),
                                 check=functools.partial(_check, c), train_batches=labelled.train_batches,
                                 eval_batches=labelled.eval_batches)
  evaluated = _loss(c, quiet, family, specs, attend)
  return run.Task(specs, _loss(c, c.model, family, specs, attend, c.smoothing, c.consistency),
                  lambda p, batch, key: evaluated(p, batch, None), c.model.vocab, flops, source=source,
                  base=run.Base(base, peft_lib.freeze(c.peft, c.model.layers)))


def _check(c, data, vocab):
  labelled.check(data, vocab)
  found = len(data.names)
  if found != c.classes:
    raise ConfigError(f'classes={c.classes}: the data has {found} labels, {", ".join(data.names[:8])}'
                      f'{", ..." if found > 8 else ""}; expected as many classes; set classes={found}')


def accuracies(c: Config, p: params.Tree, data: memory.Data, seeds: int) -> list[float]:
  """Accuracy on the validation split after `c.optim.steps` updates of the model `p`, for each of `seeds` runs.

  Each is the run of `lm.run` that has its seed (0, 1, ...: of the head, the order, dropout), in memory and without a
  workdir; all share one compilation. `p` stays as it is; what it has more than `c.model`, such as heads, is left out.
  `data` is what `labelled.prepare` made and `labelled.check` let pass.
  """
  made = task(c)
  parts = run.build(c, made)
  given = {name: p[name] for name in made.base.specs}
  begin = lambda p, key: train.state_of(peft_lib.graft(jax.tree.map(jnp.copy, p), made.specs, key), parts.tx,
                                        parts.trainable)
  start = params.jit_once(begin, out_shardings=parts.state)
  place, found = sharding.batch_sharding(parts.mesh), []
  with sharding.use(parts.mesh, c.mesh.sequence):
    for seed in range(seeds):
      first, key = (jax.random.fold_in(jax.random.key(seed), i) for i in range(2))
      state = start(given, first)
      with contextlib.closing(labelled.train_batches(dataclasses.replace(data, seed=seed), place)) as batches:
        for batch in tqdm.tqdm(itertools.islice(batches, c.optim.steps), total=c.optim.steps, disable=None,
                               desc=f'fine-tuning, seed {seed}'):
          state, _ = parts.step(state, batch, key)
      sums = jax.device_get([parts.evaluate(state, batch, None)['accuracy'] for batch in labelled.eval_batches(
          data, 'validation', c.eval_batch, place)])
      found.append(sum(float(s.total) for s in sums) / sum(float(s.weight) for s in sums))
  return found


def predictions(c: Config, workdir: str | os.PathLike, split: str = 'validation'
                ) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
  """(labels, most likely classes) of a split, [N] each, by the best checkpoint of a finished run; names of classes. Of
  numbers (labels, outputs, one name).

  Raises:
    ConfigError: the data has no such split. CheckpointError: no checkpoint, or its base is another model now.
  """
  data = labelled.prepare(c.data, workdir, c.seed, encoder=not isinstance(c, Decoder))
  if split not in data.splits or not data.rows(split):
    raise ConfigError(f'{c.data.corpus}: no {split} split; expected {", ".join(data.splits)}')
  p, score = restore(c, workdir)
  place = sharding.batch_sharding(sharding.make_mesh(sharding.Config()))
  said = (lambda logits: logits[..., 0]) if c.data.numbers else (lambda logits: logits.argmax(-1))
  found = [(batch.labels_B.reshape(-1), said(score(p, batch)).reshape(-1))
           for batch in labelled.eval_batches(data, split, c.eval_batch, place)]
  labels_N, said_N = (np.concatenate(jax.device_get(x)) for x in zip(*found, strict=True))
  told_N = np.isfinite(labels_N) if c.data.numbers else labels_N >= 0
  return labels_N[told_N], said_N[told_N], data.names


def scores(c: Config) -> dict[str, Callable[[np.ndarray, np.ndarray], float]]:
  """{name: (labels, what `predictions` gives) -> a score}."""
  from lm import metrics  # half a second of SciPy, which training does not need
  if c.data.numbers:
    return {'Pearson': metrics.pearson, 'Spearman': metrics.spearman}
  return {'accuracy': metrics.accuracy, 'macro F1': metrics.macro_f1, 'MCC': metrics.mcc}


def restore(c: Config, workdir: str | os.PathLike, best: bool = True) -> tuple[params.Tree, Callable[..., jax.Array]]:
  """(parameters of a run's best or newest checkpoint; (params, framing.Labelled) -> their logits, jitted).

  Raises:
    CheckpointError: there is none, or its base is another model now.
  """
  base, whole = _specs(c)
  folder = pathlib.Path(workdir) / 'checkpoints'
  first = checkpoint_lib.best(folder, c.checkpoint.metric, c.checkpoint.mode) if best else None
  return weights.restore(workdir, whole, first, base), scorer(c)


def scorer(c: Config) -> Callable[..., jax.Array]:
  """(params, framing.Labelled) -> logits, without dropout; jitted."""
  family, model = _FAMILIES[type(c.model)], dataclasses.replace(c.model, dropout=nn.Dropout())
  score = _bound(c, model, family, peft_lib.specs(c.peft, _specs(c)[1]), attention.attend)
  return jax.jit(lambda p, batch: score(p, batch, None))


def _specs(c):
  """(of the model that training starts from, with the new head)."""
  return heads.for_classes(_FAMILIES[type(c.model)].specs(c.model), c.pooling, c.model.embed, c.classes)


def pooled(x_BTD: jax.Array, segments_BT: jax.Array, pooling: str, examples: int) -> jax.Array:
  """One vector an example, before any layer of a head: [B, D], or [B, M, D] of rows that hold M `examples`, 0 = one.

  pooling: as in the config; 'pooler' and 'bare' take the first token.
  """
  own_BMT = segments_BT[:, None] == jnp.arange(1, (examples or 1) + 1, dtype=segments_BT.dtype)[None, :, None]
  if pooling == 'mean':
    share_BMT = own_BMT / jnp.maximum(own_BMT.sum(-1, keepdims=True), 1).astype(jnp.float32)
    x_BMD = jnp.einsum('BMT,BTD->BMD', share_BMT, x_BTD.astype(jnp.float32))
  else:
    last = own_BMT.shape[-1] - 1
    at_BM = last - own_BMT[..., ::-1].argmax(-1) if pooling == 'last' else own_BMT.argmax(-1)
    x_BMD = jnp.take_along_axis(x_BTD, at_BM[..., None], axis=1)
  return x_BMD if examples else x_BMD[:, 0]


def head(p: params.Tree, x_BTD: jax.Array, segments_BT: jax.Array, key: nn.Key | None, *, model: Any, pooling: str,
         examples: int) -> jax.Array:
  """Logits [B, C], or [B, M, C] of packed examples, of hidden states; arguments as for `pooled`."""
  x_BD = pooled(x_BTD, segments_BT, pooling, examples)
  if pooling == 'pooler':
    x_BD = heads.pooler(p['pooler'], x_BD)
  rate, pool = model.dropout.classifier, isinstance(model, deberta.Config)  # its ContextPooler
  return heads.classify(p['classify'], x_BD, 'gelu_erf' if pool else 'tanh', rate, key, 0.0 if pool else rate)


def _bound(c, model, family, specs, attend):
  """(p, batch, key) -> logits_BC, or logits_BMC of packed examples."""
  options = {} if family is deberta else {'attend': attend}
  stack = mixout.stack(parallel.stack(c.mesh, peft_lib.block_specs(c.peft, specs), model.dtype))

  first = int(family is not decoder)  # [CLS] stays first
  before = functools.partial(peft_lib.prompted, vocab=model.vocab, length=c.peft.length, first=first)
  rows = before if c.peft.method == 'prompt' else lambda batch: batch

  def score(p, batch, key):
    p, batch = peft_lib.materialise(p), rows(batch)
    arrays = {} if family is decoder else {'types_BT': batch.types_BT}
    x_BTD = family.apply(p, model, batch.ids_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT,
                         key=nn.fold(key, 0), stack=stack, **options, **arrays)
    return head(p, x_BTD, batch.segments_BT, nn.fold(key, 1), model=model, pooling=c.pooling,
                examples=batch.labels_B.shape[1] if batch.labels_B.ndim > 1 else 0)
  return score


def _loss(c, model, family, specs, attend, smoothing=0.0, consistency=0.0) -> train.Loss:
  score = _bound(c, model, family, specs, attend)

  def loss(p, batch, key):
    if c.data.numbers:
      return classify.number(score(p, batch, key), batch.labels_B)
    return classify.loss(lambda key: score(p, batch, key), batch.labels_B, key, smoothing=smoothing,
                         consistency=consistency)
  return loss
