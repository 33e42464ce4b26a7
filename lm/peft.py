"""Fine-tuning few parameters: surgery on the tree of parameters, of which no model knows.

A leaf such as 'blocks/attn/q' becomes a node of `lm.peft_nodes`, which holds the weight and what is learned beside it.
Everything is said by specs, so that initial values, sharding, optimizer state and checkpoints follow. `specs` puts the
nodes in, `graft` the weights of a trained model, `freeze` says what stays.

Shapes: D embed, P virtual positions, M width of the prefix's MLP, K key/value heads, H head dim, L layers.
"""

import dataclasses
import math
import re
from typing import Any, get_args, Literal

import jax
import jax.numpy as jnp

from lm import budget, mixout, params
from lm.errors import ConfigError
from lm.params import Spec
from lm.peft_nodes import Adapter, is_node, Lora, lora_weight, Mixed, Prompted

Method = Literal['full', 'top', 'lora', 'houlsby', 'pfeiffer', 'prefix', 'prompt']
_ADAPTED = {'houlsby': r'^blocks/(attn/o|mlp/down)$', 'pfeiffer': r'^blocks/mlp/down$'}
_TRAINED = {'lora': r'/lora_[ab]$', 'houlsby': r'/(reduce|expand)(_bias)?$|norm/', 'prefix': r'(^|/)prefix[/_]',
            'pfeiffer': r'/(reduce|expand)(_bias)?$', 'prompt': '/prompt$'}
_ADAPTER_STD = 1e-3  # adapter-bert's code; the paper's 1e-2 does as well (§3.6)


@dataclasses.dataclass(frozen=True)
class Config:
  """What trains.

  Attributes:
    method: 'full' all; 'top' the last `layers` blocks; 'lora' (arXiv:2106.09685); 'houlsby' (arXiv:1902.00751) and
      'pfeiffer' (arXiv:2005.00247) adapters; 'prefix' (arXiv:2101.00190); 'prompt' (arXiv:2104.08691).
    train: pattern of leaves that train besides those, such as a new head.
    layers: blocks, counted from the last.
    targets: pattern of the weights that get LoRA.
    rank, alpha: LoRA adds (alpha / rank) x a b.
    rank_stabilised: alpha / sqrt(rank) instead (arXiv:2312.03732).
    rate: dropout on LoRA's input.
    width: of an adapter's bottleneck.
    length: virtual positions of a prefix or prompt.
    hidden: width of the MLP that makes the prefix while it trains; 0 = keys and values are trained as they are.
    mixout: of 'full': share of the blocks' weights that are the pretrained ones in a step (arXiv:1909.11299: 0.7 to
      0.9); see `lm.mixout`.
  """

  method: Method = 'full'
  train: str = '^classify/'
  layers: int = 2
  targets: str = r'^blocks/attn/[qv]$'
  rank: int = 8
  alpha: float = 16.0
  rank_stabilised: bool = False
  rate: float = 0.0
  width: int = 64
  length: int = 10
  hidden: int = 512
  mixout: float = 0.0

  def __post_init__(self):
    if self.method not in get_args(Method):
      raise ConfigError(f'peft.method={self.method!r}; expected one of {", ".join(get_args(Method))}')
    for name, least in (('layers', 0), ('rank', 1), ('alpha', 0), ('width', 1), ('length', 1), ('hidden', 0)):
      if not least <= getattr(self, name) < math.inf:
        raise ConfigError(f'peft.{name}={getattr(self, name)}; expected at least {least}')
    if not 0 <= self.rate < 1:
      raise ConfigError(f'peft.rate={self.rate}; expected 0 <= rate < 1')
    if not 0 <= self.mixout < 1:
      raise ConfigError(f'peft.mixout={self.mixout}; expected 0 <= mixout < 1')
    if self.mixout and self.method != 'full':
      raise ConfigError(f'peft.mixout={self.mixout} with peft.method={self.method!r}; expected weights that train; set '
                        'peft.method=full or peft.mixout=0')
    for name in ('train', 'targets'):
      try:
        re.compile(getattr(self, name))
      except re.error as error:
        raise ConfigError(f'peft.{name}: {getattr(self, name)!r} is no regular expression ({error}); correct it'
                          ) from error

  @property
  def scale(self) -> float:
    return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

  @property
  def virtual(self) -> int:
    """Positions of the model that a prefix or prompt takes."""
    return self.length if self.method in ('prefix', 'prompt') else 0

  def check_length(self, length: int, positions: int, more: int = 0) -> None:
    """Raises ConfigError where data.length=`length` tokens, and `more`, are too many for a model of `positions`."""
    if length + more + self.virtual > positions:
      less = f' less peft.length={self.virtual}' if self.virtual else ''
      raise ConfigError(f'data.length={length}{" and one" * more} is more than model.length={positions} '
                        f'positions{less}; lower data.length or raise model.length')


def specs(c: Config, base: params.Tree) -> params.Tree:
  """The specs of a model, `base`, with what `c` adds; of a pair of networks, in each of the two.

  Raises:
    ConfigError: nothing, or what is no weight of a product, matches `c.targets`; nothing matches `c.train`; more layers
      than there are.
  """
  if 'blocks' in base:
    tree = _specs(c, base)
  else:
    tree = {name: _specs(c, part) if 'blocks' in part else part for name, part in base.items()}
  if c.method != 'full' and c.train not in ('', Config.train) and not any(
      re.search(c.train, path) for path in params.flatten(tree)):
    raise ConfigError(f'peft.train: {c.train!r} matches no parameter; expected part of a path such as '
                      f'{next(p for p in params.flatten(base) if not p.startswith(("blocks/", "embed/")))!r}')
  return tree


def _specs(c, base):
  if c.method == 'top':
    layers = params.unstack_specs(base['blocks'])
    if c.layers > len(layers):
      raise ConfigError(f'peft.layers={c.layers}; expected at most the {len(layers)} blocks of the model')
    return base | {'blocks': layers}
  if c.method == 'lora':
    return _wrap(base, c.targets, 'peft.targets', lambda path, s: _lora_specs(c, path, s))
  if c.method in _ADAPTED:
    return _wrap(base, _ADAPTED[c.method], 'peft.method', lambda path, s: _adapter_specs(c, s))
  if c.method == 'prompt':
    prompt = lambda path, s: Prompted(s, Spec((c.length, s.shape[1]), (None, 'embed'), params.Normal(0.02)))
    return _wrap(base, '^embed/tokens$', 'peft.method', prompt)
  if c.method == 'full':
    return mixout.specs(c.mixout, base) if c.mixout else base
  return _prefix_specs(c, base)


def block_specs(c: Config, tree: params.Tree) -> params.Tree:
  """Of the blocks as a model reads them, in a tree of `specs`: with the prefix that `materialise` puts in."""
  return _with_prefix(c, tree['blocks']) if 'prefix' in tree else tree['blocks']


def freeze(c: Config, layers: int) -> str:
  """The pattern of the leaves that do not train in a model of `layers` blocks, for `optim.Config.freeze`; '' = none."""
  if c.method == 'full':
    return mixout.FROZEN if c.mixout else ''
  top = '|'.join(map(str, range(layers - c.layers, layers)))
  trained = f'^blocks/({top})/' if c.method == 'top' and top else _TRAINED.get(c.method, '')
  wanted = '|'.join(f'(?:{pattern})' for pattern in (trained, c.train) if pattern)
  return f'^(?!.*(?:{wanted}))' if wanted else '^'


def step_flops(c: Config, full: budget.Flops, layers: int) -> budget.Flops:
  """Of a training step in which not all trains, from those of one in which all does, a third of which is forward.

  Weights that do not train need no gradient, which is a third of the products; of 'top', blocks below need no backward
  pass at all. What LoRA, adapters and prefixes add themselves is not counted.
  """
  if c.method == 'full':
    return full
  back = c.layers / layers if c.method == 'top' else 1.0
  parts = 2 if c.method == 'top' else 1  # of the backward pass: by activations, by weights
  return budget.Flops(full.matmul * (1 + parts * back) / 3, full.attention * (1 + 2 * back) / 3)


def graft(p: params.Tree, into: params.Tree, key: jax.Array) -> params.Tree:
  """A model's parameters in the tree of `into` (specs); leaves that the model has not start as they are declared."""
  if isinstance(into.get('blocks'), list) and not isinstance(p['blocks'], list):
    p = p | {'blocks': params.unstack(p['blocks'])}
  have = params.flatten(p)
  fresh = params.init(into, key)
  return params.map_with_path(lambda path, x: have.get(re.sub('/(w|base)$', '', path), x), fresh)


def merge(p: params.Tree) -> params.Tree:
  """Parameters of the plain model: LoRA's products are added to the weights, layers stacked again, prompts left out.

  Raises:
    ConfigError: adapters, which are no change of a weight.
  """
  def plain(node):
    if isinstance(node, Adapter):
      raise ConfigError('peft.method: an adapter cannot be merged into weights; keep the tree as it is')
    if isinstance(node, Prompted | Mixed):
      return node.w
    return lora_weight(node) if isinstance(node, Lora) else node
  p = jax.tree.map(plain, p, is_leaf=is_node)
  if isinstance(p.get('blocks'), list):
    p = p | {'blocks': jax.tree.map(lambda *layers: jnp.stack(layers), *p['blocks'])}
  return p


def unmerge(p: params.Tree, like: params.Tree) -> params.Tree:
  """Inverse of `merge` for LoRA: the tree `like` (whose a and b are kept) with its weights taken from merged `p`."""
  def back(node, w):
    if not isinstance(node, Lora):
      return w
    return node.replace(w=w - (lora_weight(node) - node.w))
  return jax.tree.map(back, like, p, is_leaf=is_node)


def plain(p: params.Tree) -> params.Tree:
  """What reads like the model wherever it can: with LoRA merged and a prefix materialised."""
  p = materialise(p)
  kept = any(isinstance(x, Adapter | Prompted) for x in jax.tree.leaves(p, is_leaf=is_node))
  return p if kept else merge(p)


def without(p: params.Tree) -> params.Tree:
  """The weights that `specs` put nodes around, as they are in them: of a model whose own do not train, those it began
  with. Works on specs and on trees of bools, too."""
  p = jax.tree.map(lambda node: node.w if is_node(node) else node, {k: v for k, v in p.items() if k != 'prefix'},
                   is_leaf=is_node)
  if isinstance(p.get('blocks'), dict) and 'prefix_k' in p['blocks']['attn']:
    attn = {k: v for k, v in p['blocks']['attn'].items() if not k.startswith('prefix_')}
    p = p | {'blocks': p['blocks'] | {'attn': attn}}
  return p


def virtual_tokens(p: params.Tree) -> list[int]:
  """The ids of a learned prompt in a tree of arrays or specs: they stand before every row. [] where it has none."""
  table = p['embed']['tokens']
  return [table.shape[0] + i for i in range(table.prompt.shape[0])] if isinstance(table, Prompted) else []


def prompted(batch: Any, vocab: int, length: int, first: int = 0) -> Any:
  """The batch with the ids of a learned prompt, vocab, vocab + 1, ..., before each row; they are no targets.

  Args:
    batch: a dataclass with ids_BT and segments_BT, and perhaps positions_BT, types_BT and mask_BT.
    first: tokens of a row that stay before them, as [CLS] does.
  """
  def put(x_BT, new):
    new_BP = jnp.broadcast_to(jnp.asarray(new, x_BT.dtype), (x_BT.shape[0], length))
    return jnp.concatenate([x_BT[:, :first], new_BP, x_BT[:, first:]], axis=1)
  at_P, given = jnp.arange(length), {name: x for name, x in vars(batch).items() if x is not None}
  new = {'ids_BT': vocab + at_P, 'segments_BT': jnp.minimum(batch.segments_BT.max(1, keepdims=True), 1),
         'positions_BT': first + at_P, 'types_BT': 0, 'mask_BT': False}
  if 'positions_BT' in given:
    given['positions_BT'] = given['positions_BT'].at[:, first:].add(length)
  return batch.replace(**{name: put(given[name], value) for name, value in new.items() if name in given})


def materialise(p: params.Tree) -> params.Tree:
  """The tree as a model reads it: a prefix that an MLP makes becomes keys and values of the blocks (Prefix §4.3)."""
  if 'prefix' not in p:
    return p
  rest, prefix = {k: v for k, v in p.items() if k != 'prefix'}, p['prefix']
  hidden = jnp.tanh(prefix['table'] @ prefix['dense'] + prefix['dense_bias'][None])
  out_PL2KH = jnp.einsum('PM,MLSKH->PLSKH', hidden, prefix['out']) + prefix['out_bias'][None]
  keys, values = (jnp.moveaxis(out_PL2KH[:, :, i], 1, 0) for i in range(2))
  return rest | {'blocks': rest['blocks'] | {'attn': rest['blocks']['attn'] | {'prefix_k': keys, 'prefix_v': values}}}


def _wrap(base, pattern, field, node):
  wrapped = params.map_with_path(lambda path, s: node(path, s) if re.search(pattern, path) else s, base)
  if wrapped == base:
    raise ConfigError(f'{field}: {pattern!r} matches no parameter; expected part of a path such as '
                      f'{next(p for p in params.flatten(base) if p.startswith("blocks/"))!r}')
  return wrapped


def _lora_specs(c, path, s):
  lead = s.axes[:1] == ('layers',)
  shape, axes = s.shape[lead:], s.axes[lead:]
  if len(shape) < 2 or re.search('^(embed/|relative/|conv/|unembed$)|/relative$|bias$', path):
    raise ConfigError(f'peft.targets: {path} of shape {shape} is no matrix of a product; name weights such as '
                      "'^blocks/attn/[qv]$'")
  inputs = 1 if len(shape) == 2 or axes[0] == 'embed' else len(shape) - 1
  a = Spec((*shape[:inputs], c.rank), (*axes[:inputs], None), params.Uniform(math.prod(shape[:inputs]) ** -0.5))
  b = Spec((c.rank, *shape[inputs:]), (None, *axes[inputs:]), params.zeros)
  return Lora(s, *(params.stack(s.shape[0], x) if lead else x for x in (a, b)), c.scale, c.rate)


def _adapter_specs(c, s):
  width, D, init = c.width, s.shape[-1], params.TruncatedNormal(_ADAPTER_STD)
  new = (Spec((D, width), ('embed', None), init), Spec((width,), (None,), params.zeros),
         Spec((width, D), (None, 'embed'), init), Spec((D,), ('embed',), params.zeros))
  return Adapter(s, *(params.stack(s.shape[0], x) for x in new), c.method)


def _prefix_specs(c, base):
  if not c.hidden:
    return base | {'blocks': _with_prefix(c, base['blocks'])}
  L, D, K, H = base['blocks']['attn']['k'].shape
  flat = lambda *shape, init=params.zeros: Spec(shape, (None,) * len(shape), init)
  bound = lambda inputs: params.Uniform(inputs**-0.5)  # torch's Linear, as in the paper's code
  return base | {'prefix': {
      'table': flat(c.length, D, init=params.Normal(1.0)), 'dense': flat(D, c.hidden, init=bound(D)),
      'dense_bias': flat(c.hidden, init=bound(D)), 'out': flat(c.hidden, L, 2, K, H, init=bound(c.hidden)),
      'out_bias': flat(L, 2, K, H, init=bound(c.hidden))}}


def _with_prefix(c, blocks):
  L, _, K, H = blocks['attn']['k'].shape
  new = Spec((L, c.length, K, H), ('layers', None, *blocks['attn']['k'].axes[2:]), params.Normal(0.02))
  return blocks | {'attn': blocks['attn'] | {'prefix_k': new, 'prefix_v': new}}
