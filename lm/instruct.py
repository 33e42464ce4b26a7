"""Supervised fine-tuning of a decoder on conversations, all of it or few parameters, as a `Task`."""

from collections.abc import Callable
import dataclasses

import jax

from lm import budget, decode, nn, peft as peft_lib, pretrain, run, samples as samples_lib
from lm.data import conversations
from lm.kernels import attention
from lm.losses import ar
from lm.models import decoder


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
  """`init_from` names the model; `model` must have its shape."""

  data: conversations.Config = conversations.Config()
  model: decoder.Config = decoder.Config()
  loss: ar.Config = ar.Config()
  peft: peft_lib.Config = peft_lib.Config(train='')
  samples: samples_lib.Config = samples_lib.Config()

  def __post_init__(self):
    super().__post_init__()
    self.peft.check_length(self.data.length, self.model.length)
    pretrain.check_mesh(self, self.model)
    pretrain.check_peft(self)


def task(c: Config, attend: Callable[..., jax.Array] = attention.attend) -> run.Task:
  """The decoder of `c.model`, with what `c.peft` adds, under the loss of the assistant's tokens."""
  base = decoder.specs(c.model)
  specs = peft_lib.specs(c.peft, base)
  flops = budget.training_flops(base, c.model.heads * c.model.head_dim, c.model.layers, c.data.length)
  flops = peft_lib.step_flops(c.peft, flops, c.model.layers)
  quiet = dataclasses.replace(c.model, dropout=nn.Dropout())
  program = samples_lib.around(c.samples, decode.of(decoder, quiet), c.data.written, specs, c.peft.virtual,
                               c.seed) if c.samples.count else None
  losses = pretrain.losses(c, specs, attend, isolate=True)
  return run.Task(specs, *losses, c.model.vocab, flops, source=conversations,
                  base=run.Base(base, peft_lib.freeze(c.peft, c.model.layers)), around=run.Around(program=program))
