"""Pretraining of encoders as `Task`s: masked language modelling (BERT, RoBERTa, DeBERTa) and replaced-token detection
(ELECTRA, DeBERTa-v3).

A task's losses know the tokenizer's ids (mask token, begins of words), which are there only once the data is: `task`
without `tokens` is good for all but training, and `run` binds it.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax

from lm import budget, nn, parallel, peft as peft_lib, pretrain, run, train
from lm.data import masking
from lm.errors import ConfigError
from lm.kernels import attention
from lm.losses import mlm, rtd
from lm.models import deberta, deberta_pair, electra, encoder, heads, pretrained


@dataclasses.dataclass(frozen=True)
class _Encoder(run.Config):
  """What every pretraining of encoders is checked for; the parts of `model` that are networks are its own `Config`s.
  peft: all of them train, or few parameters."""

  peft: peft_lib.Config = peft_lib.Config(train='')

  def __post_init__(self):
    super().__post_init__()
    if not self.data.encoder:
      raise ConfigError(f'data.packing={self.data.packing!r}; expected a packing with special tokens: bert_pairs, '
                        'electra_pairs, full_sentences or doc_sentences')
    for where, model in networks(self.model).items():
      if self.data.length > model.length:
        raise ConfigError(f'data.length={self.data.length} is more than {where}.length={model.length} positions; lower '
                          f'data.length or raise {where}.length')
      pretrain.check_mesh(self, model, where)
    pretrain.check_peft(self)


@dataclasses.dataclass(frozen=True)
class _Words(_Encoder):
  """Masked language modelling of one network."""

  def __post_init__(self):
    if self.peft.method == 'prompt' or self.peft.mixout:
      raise ConfigError(f'peft.method={self.peft.method!r}, peft.mixout={self.peft.mixout}; expected no prompt, whose '
                        'tokens could not be masked, and no mixout; set another method and peft.mixout=0')
    super().__post_init__()
    self.peft.check_length(self.data.length, self.model.length)


@dataclasses.dataclass(frozen=True)
class Masked(_Words):
  """BERT and RoBERTa. nsp: BERT's second term, next-sentence prediction from the pooled first token."""

  model: encoder.Config = encoder.Config()
  loss: mlm.Config = mlm.Config()
  nsp: bool = False

  def __post_init__(self):
    super().__post_init__()
    if self.nsp and self.data.packing != 'bert_pairs':
      raise ConfigError(f"nsp=True with data.packing={self.data.packing!r}; expected 'bert_pairs', whose second span "
                        'may be a random one; set nsp=False or data.packing=bert_pairs')


@dataclasses.dataclass(frozen=True)
class Disentangled(_Words):
  """DeBERTa v1 and v2. decoder: the enhanced mask decoder, which adds absolute positions in pretraining."""

  model: deberta.Config = deberta.Config()
  loss: mlm.Config = mlm.Config(spans='ngram')
  decoder: bool = True


@dataclasses.dataclass(frozen=True)
class _Pair(_Encoder):
  """Replaced-token detection by two networks."""

  def __post_init__(self):
    if self.peft.method not in ('full', 'lora') or self.peft.mixout:
      raise ConfigError(f'peft.method={self.peft.method!r}, peft.mixout={self.peft.mixout}; expected full or lora, '
                        'which both networks get alike, and no mixout; set peft.method=lora and peft.mixout=0')
    super().__post_init__()


@dataclasses.dataclass(frozen=True)
class Replaced(_Pair):
  """ELECTRA."""

  model: electra.Config = electra.Config()
  loss: rtd.Config = rtd.Config()


@dataclasses.dataclass(frozen=True)
class DisentangledReplaced(_Pair):
  """DeBERTa v3."""

  model: deberta_pair.Config = deberta_pair.Config()
  loss: rtd.Config = rtd.Config(mask=1.0, counts='bert', weight=10.0)


Config = Masked | Disentangled | Replaced | DisentangledReplaced


def networks(model: Any) -> dict[str, Any]:
  """{field: config} of the networks in a model's config."""
  parts = {f'model.{name}': getattr(model, name, None) for name in ('generator', 'discriminator')}
  return parts if all(parts.values()) else {'model': model}


def task(c: Config, tokens: masking.Tokens | None = None, attend: Callable[..., jax.Array] = attention.attend
         ) -> run.Task:
  """The networks of `c.model` under `c.loss`. `attend`: another attention for BERT, RoBERTa and ELECTRA."""
  make = _masked if isinstance(c, _Words) else _replaced
  specs, base, flops, loss = make(c, attend)
  vocab = next(iter(networks(c.model).values())).vocab
  if tokens is None:
    return run.Task(specs, _unbound, _unbound, vocab, flops, base=base,
                    bind=lambda tokenizer: task(c, masking.tokens(tokenizer), attend))
  return run.Task(specs, loss(c.model, tokens), loss(_quiet(c.model), tokens, quiet=True), vocab, flops, base=base)


def _unbound(*unused: Any) -> train.Loss:
  raise ConfigError('the task has no tokens yet; expected those of the tokenizer; call task.bind(tokenizer)')


def _quiet(model):
  """Without dropout."""
  if hasattr(model, 'dropout'):
    return dataclasses.replace(model, dropout=nn.Dropout())
  return dataclasses.replace(model, generator=_quiet(model.generator), discriminator=_quiet(model.discriminator))


def _masked(c, attend):
  """(specs, `run.Base`, FLOPs, (model, tokens, quiet) -> loss) of masked language modelling."""
  disentangled = isinstance(c, Disentangled)
  base = pretrained.specs(c.model, nsp=not disentangled and c.nsp, decoder=disentangled and c.decoder)
  specs = peft_lib.specs(c.peft, base)

  def loss(model, tokens, quiet=False):
    stack = parallel.stack(c.mesh, peft_lib.block_specs(c.peft, specs), model.dtype)
    if disentangled:
      apply, nsp = (deberta.decode_masked if c.decoder else deberta.apply), None
    else:
      apply = functools.partial(encoder.apply, attend=attend)
      nsp = (lambda p, x_BTD: heads.nsp(p['nsp'], heads.pooler(p['pooler'], x_BTD[:, 0]))) if c.nsp else None

    def forward(p, ids_BT, *, key, **arrays):
      return apply(p, model, ids_BT, stack=stack, key=None if quiet else key, **arrays)
    bound = functools.partial(mlm.loss, apply=forward, head=_words(model), c=c.loss, tokens=tokens, nsp=nsp)
    return lambda p, batch, key: bound(peft_lib.materialise(p), batch, key)
  # The enhanced mask decoder goes through the last block twice.
  deep = dataclasses.replace(c.model, layers=c.model.layers + (disentangled and c.decoder))
  flops = _flops(c, deep, (deberta if disentangled else encoder).specs(deep), _share(c))
  return (specs, run.Base(base, peft_lib.freeze(c.peft, c.model.layers)),
          peft_lib.step_flops(c.peft, flops, c.model.layers), loss)


def _replaced(c, attend):
  """As `_masked`, of replaced-token detection."""
  disentangled = isinstance(c, DisentangledReplaced)
  base = pretrained.specs(c.model)
  specs = peft_lib.specs(c.peft, base)

  def loss(model, tokens, quiet=False):
    G, D = model.generator, model.discriminator
    ours, theirs = (parallel.stack(c.mesh, peft_lib.block_specs(c.peft, specs[name]), network.dtype)
                    for name, network in (('generator', G), ('discriminator', D)))
    if disentangled:
      generator, discriminator = deberta_pair.generator, lambda p: deberta_pair.discriminator(p, model)
      generate, detect = deberta.decode_masked, deberta.apply
    else:
      generator, discriminator = electra.generator, electra.discriminator
      generate = detect = functools.partial(encoder.apply, attend=attend)

    def discriminate(p, ids_BT, *, key, **arrays):
      tree = discriminator(p)
      x_BTD = detect(tree, D, ids_BT, stack=theirs, key=None if quiet else key, **arrays)
      return heads.rtd(tree['rtd'], x_BTD, D.activation, D.norm_eps)

    def fill(p, ids_BT, *, key, **arrays):
      return generate(generator(p), G, ids_BT, stack=ours, key=None if quiet else key, **arrays)
    words = _words(G)
    return functools.partial(_with_loss, functools.partial(
        rtd.loss, apply=fill, head=lambda p, x_BPD: words(generator(p), x_BPD), discriminate=discriminate, c=c.loss,
        tokens=tokens))
  network = deberta if disentangled else encoder
  deep = dataclasses.replace(c.model.generator, layers=c.model.generator.layers + disentangled)  # as in `_masked`
  flops = [_flops(c, deep, network.specs(deep), _share(c)),
           _flops(c, c.model.discriminator, network.specs(c.model.discriminator), 0.0)]
  flops = budget.Flops(sum(f.matmul for f in flops), sum(f.attention for f in flops))
  return specs, run.Base(base, peft_lib.freeze(c.peft, 0)), peft_lib.step_flops(c.peft, flops, 1), loss


def _with_loss(loss, p, batch, key):
  """Metric 'loss' is the generator's, in nats a masked token, as in masked language modelling."""
  terms, metrics = loss(p, batch, key)
  return terms, metrics | {'loss': metrics['generator_loss']}


def _words(model):
  """(tree, x_BPD) -> (y_BPE, w_VE, bias_V): the head of masked language modelling, tied to the token embedding."""
  def head(p, x_BPD):
    y_BPE = heads.mlm(p['mlm'], x_BPD, model.activation, model.norm_eps)
    return y_BPE, p['embed']['tokens'].astype(model.dtype), p['mlm']['bias']
  return head


def _share(c):
  """Of the tokens, those that are predicted."""
  return c.loss.predictions(c.data.length) / c.data.length


def _flops(c, model, specs, predicted):
  flops = budget.training_flops(specs, model.heads * model.head_dim, model.layers, c.data.length, predicted)
  terms = len(getattr(model, 'terms', ()))  # each scores every pair of tokens once more, half of what attention costs
  return dataclasses.replace(flops, attention=flops.attention * (1 + terms / 2))
