"""Autoregressive pretraining of a decoder, all of it or few parameters, as a `Task`: what GPT, Llama, PaLM and
Chinchilla runs share. Also what tasks that build on it are checked for.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax

from lm import budget, mixout, nn, parallel, params, peft as peft_lib, pipeline, run, train
from lm.errors import ConfigError
from lm.kernels import attention
from lm.losses import ar
from lm.models import deberta, decoder


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
  model: decoder.Config = decoder.Config()
  loss: ar.Config = ar.Config()
  peft: peft_lib.Config = peft_lib.Config(train='')

  def __post_init__(self):
    super().__post_init__()
    self.peft.check_length(self.data.length, self.model.length)
    if self.model.dropout.classifier:
      raise ConfigError(f'model.dropout.classifier={self.model.dropout.classifier}, but this model has no classifier; '
                        'set model.dropout.classifier=0.0')
    if self.peft.method == 'prompt' and self.data.isolate:
      raise ConfigError('data.isolate=True: a prompt stands before a row, not before each of its documents; set '
                        'data.isolate=False, or choose another peft.method')
    check_mesh(self, self.model)
    check_peft(self)


def check_mesh(c: run.Config, model: Any, where: str = 'model') -> None:
  """Raises ConfigError where a dimension of `model`, the config at `where`, cannot be divided as `c.mesh` says."""
  mesh = c.mesh
  for name, axes in (('tensor', ('heads', 'kv_heads', 'mlp', 'vocab')), ('fsdp', ('embed', 'width'))):
    for axis in axes:
      size, ways = getattr(model, axis, 0), getattr(mesh, name)
      if size % ways and not (axis == 'kv_heads' and size == 1):  # a single key head is on every device
        axis = 'token_embed' if axis == 'width' else axis
        raise ConfigError(f'mesh.{name}={ways} does not divide {where}.{axis}={size}; choose a divisor')
  if mesh.sequence and c.data.length % mesh.tensor:
    raise ConfigError(f'mesh.tensor={mesh.tensor} does not divide data.length={c.data.length}, as mesh.sequence=True '
                      'asks; choose a divisor')
  if mesh.pipe > 1:
    for name, batch in (('', c.data.batch // c.optim.microbatches), ('loop.eval_batch: ', c.eval_batch)):
      try:
        pipeline.check(model.layers, mesh.pipe, mesh.stage_microbatches, mesh.rounds, batch // (mesh.data * mesh.fsdp))
      except ConfigError as error:
        raise ConfigError(f'{name}{error}') from error


def check_peft(c: Any) -> None:
  """Raises ConfigError for few parameters that the mesh, the model or the data cannot take."""
  if c.mesh.pipe > 1 and (c.peft.method == 'top' or c.peft.method == 'prefix' and c.peft.hidden):
    raise ConfigError(f'mesh.pipe={c.mesh.pipe}: peft.method={c.peft.method!r} keeps its layers together; set '
                      'mesh.pipe=1' + (' or peft.hidden=0' if c.peft.method == 'prefix' else ''))
  if c.optim.freeze and c.peft.method != 'full':
    raise ConfigError(f'optim.freeze={c.optim.freeze!r} with peft.method={c.peft.method!r}, which says itself what '
                      "trains; expected one of them; set optim.freeze=''")
  if c.peft.mixout and (not c.init_from or c.optim.freeze):
    raise ConfigError(f'peft.mixout={c.peft.mixout} with init_from={c.init_from!r}, optim.freeze={c.optim.freeze!r}; '
                      "expected a pretrained model, all of which trains; set init_from and optim.freeze=''")
  if c.peft.method == 'prompt' and getattr(c.data, 'pack', False):
    raise ConfigError('data.pack=True: a prompt stands before one conversation; set data.pack=False')
  if c.peft.method == 'prefix' and c.mesh.sequence:
    raise ConfigError('mesh.sequence=True: a prefix makes keys longer than rows; set mesh.sequence=False')
  if c.peft.method == 'prefix' and isinstance(c.model, deberta.Config):
    raise ConfigError('peft.method=prefix: DeBERTa scores distances, which a prefix has not; choose another')


def task(c: Config, attend: Callable[..., jax.Array] = attention.attend) -> run.Task:
  """The decoder of `c.model`, with what `c.peft` adds, under the autoregressive loss; `attend` is where another
  attention goes in."""
  base = decoder.specs(c.model)
  specs = peft_lib.specs(c.peft, base)
  flops = budget.training_flops(base, c.model.heads * c.model.head_dim, c.model.layers, c.data.length)
  return run.Task(specs, *losses(c, specs, attend, c.data.isolate), c.model.vocab,
                  peft_lib.step_flops(c.peft, flops, c.model.layers),
                  base=run.Base(base, peft_lib.freeze(c.peft, c.model.layers)))


def losses(c: Any, specs: params.Tree, attend: Callable[..., jax.Array], isolate: bool
           ) -> tuple[train.Loss, train.Loss]:
  """(for training, for evaluation). Without `isolate` a row is one document for attention too: no mask but the causal
  one, padding comes last. All of a row sees the prefix or prompt."""
  stack = mixout.stack(parallel.stack(c.mesh, peft_lib.block_specs(c.peft, specs), c.model.dtype))
  before = functools.partial(peft_lib.prompted, vocab=c.model.vocab, length=c.peft.length)
  rows = before if c.peft.method == 'prompt' else lambda batch: batch

  def bound(model):
    def apply(p, ids_BT, *, positions_BT, segments_BT, key):
      return decoder.apply(p, model, ids_BT, positions_BT=positions_BT, segments_BT=segments_BT if isolate else None,
                           key=key, attend=attend or nn.attend, stack=stack)
    loss = functools.partial(ar.loss, apply=apply, head=lambda p: decoder.head(p, model), c=c.loss)
    return lambda p, batch, key: loss(peft_lib.materialise(p), rows(batch), key)
  evaluated = bound(dataclasses.replace(c.model, dropout=nn.Dropout()))
  return bound(c.model), lambda p, batch, key: evaluated(p, batch, None)
