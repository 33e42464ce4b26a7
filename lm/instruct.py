"""Supervised fine-tuning of a decoder on conversations, all of it or few parameters, as a `Task`."""

from collections.abc import Callable
import dataclasses
import functools

import jax

from lm import (
  budget,
  decode,
  mixout,
  nn,
  parallel,
  params,
  peft as peft_lib,
  pretrain,
  run,
  samples as samples_lib,
  train,
)
from lm.data import conversations
from lm.errors import ConfigError
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
    check(self)


def check(c: Config) -> None:
  """Raises ConfigError for few parameters on a mesh that cannot hold them."""
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


def task(c: Config, attend: Callable[..., jax.Array] = attention.attend) -> run.Task:
  """The decoder of `c.model`, with what `c.peft` adds, under the loss of the assistant's tokens."""
  base = decoder.specs(c.model)
  specs = peft_lib.specs(c.peft, base)
  flops = budget.training_flops(base, c.model.heads * c.model.head_dim, c.model.layers, c.data.length)
  flops = peft_lib.step_flops(c.peft, flops, c.model.layers)
  quiet = dataclasses.replace(c.model, dropout=nn.Dropout())
  evaluated = loss(c, quiet, specs, attend)
  program = samples_lib.around(c.samples, decode.of(decoder, quiet), c.data.written, specs, c.peft.virtual,
                               c.seed) if c.samples.count else None
  return run.Task(specs, loss(c, c.model, specs, attend), lambda p, batch, key: evaluated(p, batch, None),
                  c.model.vocab, flops, source=conversations,
                  base=run.Base(base, peft_lib.freeze(c.peft, c.model.layers)), around=run.Around(program=program))


def loss(c: Config, model: decoder.Config, specs: params.Tree, attend: Callable[..., jax.Array]) -> train.Loss:
  """Documents of a row do not see each other; all see the prefix or prompt."""
  stack = mixout.stack(parallel.stack(c.mesh, peft_lib.block_specs(c.peft, specs), model.dtype))

  def apply(p, ids_BT, *, positions_BT, segments_BT, key):
    return decoder.apply(p, model, ids_BT, positions_BT=positions_BT, segments_BT=segments_BT, key=key, attend=attend,
                         stack=stack)
  bound = functools.partial(ar.loss, apply=apply, head=lambda p: decoder.head(p, model), c=c.loss)
  before = functools.partial(peft_lib.prompted, vocab=c.model.vocab, length=c.peft.length)
  rows = before if c.peft.method == 'prompt' else lambda batch: batch
  return lambda p, batch, key: bound(peft_lib.materialise(p), rows(batch), key)
