"""A decoder as a policy: what trains by PPO, GRPO or best-of-n, the reference it is held to, its value function.

The tree of parameters is the decoder's, as `lm.peft` makes it, and beside it
  value      a head on the policy's own trunk (PPO, value='shared');
  critic     a trunk of its own with that head (value='separate'), trained as the policy is;
  reference  the weights that training began with. Where only leaves train that `lm.peft` added, the reference is the
             same tree without them: one copy of the weights serves both.

What is learnt from a rollout is in `lm.experience`, the run in `lm.reinforce`. Shapes: B rows, T targets,
D embed.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lm import config, nn, params, peft as peft_lib, pretrain, reward_model, run, sampler
from lm.data import loader, prompts
from lm.errors import ConfigError
from lm.losses import ar, grpo, ppo
from lm.models import blocks, decoder
from lm.params import Spec

_FREE = dict(scan_layers=True, remat='none', dtype='float32', dropout=nn.Dropout())  # what no shape depends on
_BESIDE = ('value', 'critic', 'reference')


@dataclasses.dataclass(frozen=True)
class Rollout:
  """How responses are drawn, and what is learnt from those of one iteration.

  Attributes:
    new_tokens: most tokens of a response.
    end: a response ends with the end of its turn or text; False: all have `new_tokens`.
    cut, cut_after: where not '': drawn without an end, and then cut behind the first token that is this text and has at
      least `cut_after` before it, as lm-human-preferences does ('.', 16); one that has none has not ended.
    group: responses to a prompt.
    epochs: passes over the responses. minibatches: updates in a pass, each of as many rows.
    logprobs: what ratios and penalties start from: what the policy says when asked once more ('model'), or said as it
      drew ('sampler'), a forward pass less. The two differ by rounding; before any update a ratio is 1 only by 'model'.
    stop_kl: no further pass once approx_kl (nats a token) is above it, 0 = all; what is left out shortens the schedule.
    samples: held-out prompts whose responses are written to samples.jsonl at each evaluation.
  """

  new_tokens: int = 32
  end: bool = True
  cut: str = ''
  cut_after: int = 0
  group: int = 1
  epochs: int = 4
  minibatches: int = 1
  logprobs: Literal['model', 'sampler'] = 'model'
  stop_kl: float = 0.0
  samples: int = 8

  def __post_init__(self):
    for name, least in (('new_tokens', 1), ('group', 1), ('epochs', 1), ('minibatches', 1), ('stop_kl', 0),
                        ('samples', 0), ('cut_after', 0)):
      if not least <= getattr(self, name) < math.inf:
        raise ConfigError(f'rollout.{name}={getattr(self, name)}; expected at least {least}')
    if self.cut and self.end:
      raise ConfigError(f'rollout.cut={self.cut!r} with rollout.end=True; expected one of them; set rollout.end=False')


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
  """`init_from` names the model, whose shape `model` must have; data.batch is the prompts of one iteration.

  An iteration is a step of the run and rollout.epochs x rollout.minibatches of `optim.steps`.
  """

  data: prompts.Config = prompts.Config()
  model: decoder.Config = decoder.Config()
  peft: peft_lib.Config = peft_lib.Config(train='')
  rollout: Rollout = Rollout()

  def __post_init__(self):
    super().__post_init__()
    r = self.rollout
    if self.data.length + r.new_tokens + self.peft.virtual > self.model.length:
      raise ConfigError(f'rollout.new_tokens={r.new_tokens} after prompts of data.length={self.data.length}; expected '
                        f'at most model.length={self.model.length} positions in all; lower one of them')
    if self.optim.steps % self.updates:
      raise ConfigError(f'optim.steps={self.optim.steps}; expected a multiple of rollout.epochs x rollout.minibatches '
                        f'= {self.updates} updates an iteration')
    if r.stop_kl and not isinstance(self, PPO):
      raise ConfigError(f'rollout.stop_kl={r.stop_kl}; expected 0: PPO alone tells how far it has moved; set it so')
    for name, value, none in (('model.dropout', self.model.dropout, nn.Dropout()), ('peft.rate', self.peft.rate, 0),
                              ('optim.freeze', self.optim.freeze, '')):
      if value != none:
        raise ConfigError(f'{name}={value}; expected {none!r}: a ratio bears no noise, and peft says what trains')
    if self.peft.method == 'prompt' or self.peft.mixout or self.mesh.pipe > 1:
      raise ConfigError(f'peft.method={self.peft.method!r}, peft.mixout={self.peft.mixout}, mesh.pipe={self.mesh.pipe}:'
                        " a policy has no learned prompt, mixout or stages; choose another method, set 0 and 1")
    pretrain.check_mesh(self, self.model)
    pretrain.check_peft(self)

  def check_batch(self) -> None:
    ways = self.rollout.minibatches * self.optim.microbatches * self.mesh.rows
    if self.kept % ways or self.data.batch % self.mesh.rows:
      raise ConfigError(f'data.batch={self.data.batch}: {self.kept} rows to learn from are not divisible by rollout.'
                        f'minibatches x optim.microbatches x mesh.data x mesh.fsdp = {ways}, or prompts by the mesh')

  @property
  def rows(self) -> int:
    """Responses of an iteration."""
    return self.data.batch * self.rollout.group

  @property
  def kept(self) -> int:
    """Rows of an iteration that are learnt from."""
    return self.rows

  @property
  def updates(self) -> int:
    return self.rollout.epochs * self.rollout.minibatches

  @property
  def passes(self) -> tuple[int, int]:
    """(forward passes over an iteration's rows, drawing them among these; models that learn from those kept)."""
    return 1, 1


@dataclasses.dataclass(frozen=True)
class PPO(Config):
  """Attributes:
    value: a head on the policy's trunk, or a trunk of its own that starts from the same weights.
    critic_from: a workdir of a decoder that scores text (`lm.reward_model`), where a separate trunk and its head start
      from instead, as in InstructGPT.
    text, text_weight: PPO-ptx (arXiv:2203.02155 eq. 2): rows of text in each update, and the weight of their loss; no
      corpus = none. text.batch is its rows an update.
  """

  loss: ppo.Config = ppo.Config()
  value: Literal['shared', 'separate'] = 'shared'
  critic_from: str = ''
  text: loader.Config = loader.Config()
  text_weight: float = 27.8

  def __post_init__(self):
    super().__post_init__()
    if self.loss.missing_eos and not (self.rollout.end or self.rollout.cut):
      raise ConfigError(f'loss.missing_eos={self.loss.missing_eos}: no response ends; set rollout.end, .cut or 0')
    if self.critic_from and self.value == 'shared':
      raise ConfigError(f"critic_from={self.critic_from}: value='shared' has no trunk for it; set value='separate'")
    if self.value == 'separate' and self.peft.method == 'top':
      raise ConfigError("value='separate': the critic's trunk would not train as peft.method='top'; set value='shared'")
    if self.text.corpus and self.text.batch % (ways := self.optim.microbatches * self.mesh.rows):
      raise ConfigError(f'text.batch={self.text.batch}; expected a multiple of optim.microbatches x mesh.data x '
                        f'mesh.fsdp = {ways}')
    if self.text.corpus and self.text.length + (self.peft.method == 'prefix') * self.peft.length > self.model.length:
      raise ConfigError(f'text.length={self.text.length} is more than the model has positions; lower it')
    if self.loss.kl.target and self.rows >= 5 * (horizon := self.loss.kl.horizon):  # or beta may change its sign
      raise ConfigError(f'loss.kl.horizon={horizon}; expected more than a fifth of the {self.rows} responses')
    if not 0 <= self.text_weight < math.inf:
      raise ConfigError(f'text_weight={self.text_weight}; expected a finite number, at least 0')

  @property
  def passes(self) -> tuple[int, int]:
    return (3, 1) if self.value == 'shared' else (3 + (self.rollout.logprobs == 'model'), 2)


@dataclasses.dataclass(frozen=True)
class GRPO(Config):
  """A policy judged within groups; rollout.group >= 2."""

  loss: grpo.Config = grpo.Config()

  def __post_init__(self):
    super().__post_init__()
    if self.rollout.group < 2:
      raise ConfigError(f'rollout.group={self.rollout.group}; expected at least 2 responses to a prompt')
    if self.loss.mean == 'constant' and self.loss.length < self.rollout.new_tokens:
      raise ConfigError(f'loss.length={self.loss.length}; expected at least rollout.new_tokens='
                        f'{self.rollout.new_tokens}')

  @property
  def passes(self) -> tuple[int, int]:
    return 1 + (self.updates > 1 and self.rollout.logprobs == 'model') + (self.loss.beta > 0), 1


@dataclasses.dataclass(frozen=True)
class BestOf(Config):
  """Rejection sampling (arXiv:2307.09288 §3.2.3): the best of rollout.group responses is learnt as text."""

  loss: ar.Config = ar.Config()
  sampling_temperature: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    if self.rollout.group < 2:
      raise ConfigError(f'rollout.group={self.rollout.group}; expected at least 2 responses to choose from')
    if not 0 < self.sampling_temperature < math.inf:
      raise ConfigError(f'sampling_temperature={self.sampling_temperature}; expected a finite number above 0')
    if self.rollout.logprobs != 'model':
      raise ConfigError("rollout.logprobs='sampler': learning the best as text asks for no ratio; set it to 'model'")

  @property
  def kept(self) -> int:
    return self.data.batch


def base_specs(c: Config) -> params.Tree:
  """The decoder alone."""
  return decoder.specs(c.model)


def specs(c: Config) -> params.Tree:
  """The whole tree, see the head of this module."""
  base = base_specs(c)
  tree = peft_lib.specs(c.peft, base)
  head = {'kernel': Spec((c.model.embed,), ('embed',), params.zeros), 'bias': Spec((), (), params.zeros)}
  beside = {} if shares_base(c) else {'reference': base}
  if isinstance(c, PPO):
    trunk = {k: v for k, v in tree.items() if k != 'unembed'}
    beside |= {'value': head} if c.value == 'shared' else {'critic': trunk | {'value': head}}
  return tree | beside


def freeze(c: Config) -> str:
  """The pattern of leaves that do not train, for `run.Base`."""
  wanted = dataclasses.replace(c.peft, train='|'.join(f'(?:{t})' for t in (c.peft.train, '(^|/)value/') if t))
  return '|'.join(p for p in (peft_lib.freeze(wanted, c.model.layers), '^reference/') if p)


def shares_base(c: Config) -> bool:
  """Whether no weight of the decoder itself trains, so that it is its own reference."""
  tree, frozen = peft_lib.specs(c.peft, base_specs(c)), peft_lib.freeze(c.peft, c.model.layers)
  if not frozen:
    return False
  own = peft_lib.without(params.match(tree, frozen))
  return all(jax.tree.leaves(own))


def graft(given: params.Tree, into: params.Tree, key: jax.Array, scored: params.Tree | None = None) -> params.Tree:
  """A decoder's parameters as policy, critic and reference alike.

  Args:
    into: of `specs`.
    scored: what the critic starts from instead, see `critic`.
  """
  own = peft_lib.graft(given, {k: v for k, v in into.items() if k not in _BESIDE}, key)
  made = own | ({'reference': given} if 'reference' in into else {})
  fresh = lambda tree: params.init(tree['value'], key) if scored is None else scored['value']
  if 'critic' in into:
    trunk = {k: v for k, v in into['critic'].items() if k != 'value'}
    made['critic'] = peft_lib.graft(scored or given, trunk, key) | {'value': fresh(into['critic'])}
  return made | ({'value': fresh(into)} if 'value' in into else {})


def critic(c: PPO) -> params.Tree:
  """The trunk of the reward model at `c.critic_from`, and a head that gives its normalised score.
  ConfigError: another model than the policy's."""
  found = reward_model.load(c.critic_from)
  other = config.replace(found.config.model, **_FREE) != config.replace(c.model, **_FREE)
  if other or found.config.peft.method not in ('full', 'top', 'lora'):
    what = f'{type(found.config.model).__module__} of another shape' if other else 'model with parts beside its weights'
    raise ConfigError(f'critic_from={c.critic_from}: a {what}; expected a reward model that began as the policy does, '
                      "trained in full, in its top or by LoRA; train one, or set critic_from=''")
  tree, affine = peft_lib.plain(found.params), found.normaliser
  head = tree.pop('classify')
  return tree | {'value': {'kernel': head['out'][:, 0] * affine.scale,
                           'bias': head['out_bias'][0] * affine.scale + affine.shift}}


def policy(p: params.Tree) -> params.Tree:
  """The decoder's part of the tree."""
  return {k: v for k, v in p.items() if k not in _BESIDE}


def reference(p: params.Tree) -> params.Tree:
  """The decoder that training began with."""
  return p['reference'] if 'reference' in p else peft_lib.without(policy(p))


def sampling(c: Config, stop: tuple[int, ...] = ()) -> sampler.Sampling:
  """How the policy draws: by softmax(logits / temperature), of all tokens."""
  temperature = c.sampling_temperature if isinstance(c, BestOf) else c.loss.temperature
  return sampler.Sampling(c.rollout.new_tokens, temperature, stop=stop)


def bind(c: Config, attend: Callable[..., jax.Array], stack: Any = blocks.LOCAL
         ) -> tuple[Callable[..., jax.Array], Callable[..., tuple[jax.Array, jax.Array]], Callable[..., jax.Array]]:
  """(apply, valued, head): hidden states x_BTD of the policy; the pair of them and values_BT; w_VD."""
  def apply(p, ids_BT, *, positions_BT, segments_BT, key=None):
    del key
    return decoder.apply(peft_lib.materialise(policy(p)), c.model, ids_BT, positions_BT=positions_BT,
                         segments_BT=segments_BT, attend=attend, stack=stack)

  def valued(p, ids_BT, **rows):
    x_BTD = apply(p, ids_BT, **rows)
    w, y_BTD = (p['critic']['value'], apply(p['critic'], ids_BT, **rows)) if 'critic' in p else (p['value'], x_BTD)
    return x_BTD, y_BTD.astype(jnp.float32) @ w['kernel'] + w['bias']
  return apply, valued, lambda p: decoder.head(p, c.model)
