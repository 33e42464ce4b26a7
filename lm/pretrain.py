"""Autoregressive pretraining of a decoder: the config that GPT, Llama, PaLM and Chinchilla runs share, as a `Task`."""

from collections.abc import Callable
import dataclasses
import functools

import jax

from lm import budget, nn, run
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
    for axis in ('heads', 'kv_heads', 'mlp', 'vocab'):
      if getattr(self.model, axis) % self.mesh.tensor and not (axis == 'kv_heads' and self.model.kv_heads == 1):
        raise ConfigError(f'mesh.tensor={self.mesh.tensor} does not divide model.{axis}={getattr(self.model, axis)}; '
                          f'choose a divisor')
    if self.model.embed % self.mesh.fsdp:
      raise ConfigError(f'mesh.fsdp={self.mesh.fsdp} does not divide model.embed={self.model.embed}; choose a divisor')
    if self.mesh.pipe > 1:
      raise ConfigError(f'mesh.pipe={self.mesh.pipe}: decoders run without a pipeline; set mesh.pipe=1')


def task(c: Config, attend: Callable[..., jax.Array] = attention.attend) -> run.Task:
  """The decoder of `c.model` under the autoregressive loss; `attend` is where another attention goes in."""
  specs = decoder.specs(c.model)
  quiet = dataclasses.replace(c.model, dropout=nn.Dropout())
  flops = budget.training_flops(specs, c.model.heads * c.model.head_dim, c.model.layers, c.data.length)
  return run.Task(specs, _loss(c, c.model, attend), _loss(c, quiet, attend), c.model.vocab, flops)


def _loss(c, model, attend):
  return functools.partial(
      ar.loss, c=c.loss, head=lambda p: decoder.head(p, model),
      apply=functools.partial(_apply, model=model, attend=attend, isolate=c.data.isolate))


def _apply(p, ids_BT, *, positions_BT, segments_BT, key, model, attend, isolate):
  """Without isolation a row is one document for attention too: no mask but the causal one, padding comes last."""
  return decoder.apply(p, model, ids_BT, positions_BT=positions_BT, segments_BT=segments_BT if isolate else None,
                       key=key, attend=attend or nn.attend)
