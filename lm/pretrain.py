"""Autoregressive pretraining of a decoder: the config that GPT, Llama, PaLM and Chinchilla runs share, as a `Task`."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax

from lm import budget, nn, parallel, pipeline, run
from lm.errors import ConfigError
from lm.kernels import attention
from lm.losses import ar
from lm.models import decoder


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
  model: decoder.Config = decoder.Config()
  loss: ar.Config = ar.Config()

  def __post_init__(self):
    super().__post_init__()
    if self.data.length > self.model.length:
      raise ConfigError(f'data.length={self.data.length} is more than model.length={self.model.length} positions; '
                        f'lower data.length or raise model.length')
    if self.model.dropout.classifier:
      raise ConfigError(f'model.dropout.classifier={self.model.dropout.classifier}, but this model has no classifier; '
                        'set model.dropout.classifier=0.0')
    check_mesh(self, self.model)


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


def task(c: Config, attend: Callable[..., jax.Array] = attention.attend) -> run.Task:
  """The decoder of `c.model` under the autoregressive loss; `attend` is where another attention goes in."""
  specs = decoder.specs(c.model)
  quiet = dataclasses.replace(c.model, dropout=nn.Dropout())
  flops = budget.training_flops(specs, c.model.heads * c.model.head_dim, c.model.layers, c.data.length)
  return run.Task(specs, _loss(c, c.model, attend), _loss(c, quiet, attend), c.model.vocab, flops)


def _loss(c, model, attend):
  return functools.partial(
      ar.loss, c=c.loss, head=lambda p: decoder.head(p, model),
      apply=functools.partial(_apply, model=model, attend=attend, isolate=c.data.isolate,
                              stack=parallel.stack(c.mesh, decoder.specs(model)['blocks'], model.dtype)))


def _apply(p, ids_BT, *, positions_BT, segments_BT, key, model, attend, isolate, stack):
  """Without isolation a row is one document for attention too: no mask but the causal one, padding comes last."""
  return decoder.apply(p, model, ids_BT, positions_BT=positions_BT, segments_BT=segments_BT if isolate else None,
                       key=key, attend=attend or nn.attend, stack=stack)
