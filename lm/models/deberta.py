"""DeBERTa v1, v2 and v3: encoders whose attention sees contents and relative positions apart, and v3's pair.

arXiv:2006.03654 and 2111.09543; where the papers and microsoft/DeBERTa differ, the code counts.

Shapes: B batch, T length, D embed, E width of the token embedding, N heads, H head dim, F mlp, V vocab, L layers, X
distances, R rows of the relative table, C kernel of the convolution. Parameters are f32 and stacked over layers;
activations have `c.dtype`. Blocks are post-norm. Heads (`lm.models.heads`) are further keys of the same tree.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lm import nn, params
from lm.errors import ConfigError
from lm.models import blocks, disentangled
from lm.params import Spec
from lm.sharding import constrain

_PASSES = 2  # of the enhanced mask decoder


@dataclasses.dataclass(frozen=True)
class Config:
  """The shape of one encoder. Defaults are DeBERTa-base's (v1)."""

  vocab: int = 50265
  length: int = 512  # rows of the absolute position tables; without one, rows of text may be longer
  types: int = 0  # segment types; 0 = none
  layers: int = 12
  embed: int = 768
  heads: int = 12
  head_dim: int = 64
  mlp: int = 3072
  token_embed: int = 0  # width of the embeddings; 0 = embed; another width is projected
  positions: bool = False  # absolute positions are added to the input, too
  terms: tuple[Literal['c2p', 'p2c'], ...] = ('c2p', 'p2c')  # content to position, position to content
  relative: int = 512  # k: distances of k and more count as one
  buckets: int = 0  # logarithmic buckets of distances on each side (v2: 256); 0 = none
  shared: bool = False  # positions are projected by the contents' own matrices (v2)
  key_bias: bool = False  # v2
  relative_norm: bool = False  # of the relative table (v2)
  conv: int = 0  # width of the convolution beside the first block (v2: 3); 0 = none
  conv_activation: Literal['gelu_tanh', 'gelu_erf', 'tanh'] = 'tanh'
  activation: Literal['gelu_tanh', 'gelu_erf'] = 'gelu_erf'
  norm_eps: float = 1e-7
  dropout: nn.Dropout = nn.Dropout(0.1, 0.1, 0.1, 0.1)
  std: float = 0.02  # of the normal that every matrix starts from
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  scan_layers: bool = True  # compile one block, not L; off runs faster on a CPU
  remat: Literal['none', 'dots', 'full'] = 'none'  # what a block recomputes in the backward pass

  def __post_init__(self):
    for name in ('vocab', 'length', 'layers', 'embed', 'heads', 'head_dim', 'mlp', 'relative'):
      if getattr(self, name) < 1:
        raise ConfigError(f'model.{name}={getattr(self, name)}; expected at least 1')
    for name in ('types', 'token_embed', 'buckets', 'conv', 'std'):
      if not 0 <= getattr(self, name) < math.inf:
        raise ConfigError(f'model.{name}={getattr(self, name)}; expected a finite number, at least 0')
    if not 0 < self.norm_eps < math.inf:
      raise ConfigError(f'model.norm_eps={self.norm_eps}; expected a finite number above 0')
    if self.terms not in ((), ('c2p',), ('p2c',), ('c2p', 'p2c')):
      raise ConfigError(f"model.terms={self.terms!r}; expected ('c2p', 'p2c'), one of the two, or ()")
    if self.buckets == 1 or self.buckets // 2 >= max(self.relative - 1, 1):
      raise ConfigError(f'model.buckets={self.buckets}; expected 0, or 2 and more, half of them below '
                        f'model.relative - 1 = {self.relative - 1}')
    if self.conv and self.conv % 2 == 0:
      raise ConfigError(f'model.conv={self.conv}; expected an odd width, or 0')

  @property
  def width(self) -> int:
    """E."""
    return self.token_embed or self.embed


def specs(c: Config) -> params.Tree:
  """The parameter tree of one encoder, without heads."""
  D, E, N, H, F = c.embed, c.width, c.heads, c.head_dim, c.mlp
  normal = params.Normal(c.std)
  kernel = Spec((D, N, H), ('embed', 'heads', 'head_dim'), normal)
  bias = Spec((N, H), ('heads', 'head_dim'), params.zeros)
  attn = {'q': kernel, 'k': kernel, 'v': kernel, 'q_bias': bias, 'v_bias': bias,
          'o': Spec((N, H, D), ('heads', 'head_dim', 'embed'), normal), 'o_bias': Spec((D,), ('embed',), params.zeros)}
  if 'c2p' in c.terms and not c.shared:
    attn['position_k'] = kernel
  if 'p2c' in c.terms and not c.shared:
    attn |= {'position_q': kernel, 'position_q_bias': bias}
  if c.key_bias:
    attn |= {f'{name}_bias': bias for name in ('k', 'position_k') if name in attn}
  mlp = {'up': Spec((D, F), ('embed', 'mlp'), normal), 'up_bias': Spec((F,), ('mlp',), params.zeros),
         'down': Spec((F, D), ('mlp', 'embed'), normal), 'down_bias': Spec((D,), ('embed',), params.zeros)}
  norm = {'scale': Spec((D,), ('embed',), params.ones), 'bias': Spec((D,), ('embed',), params.zeros)}
  embed = {'tokens': Spec((c.vocab, E), ('vocab', 'embed'), normal), 'norm': norm}
  if c.positions:
    embed['positions'] = Spec((c.length, E), (None, 'embed'), normal)
  if c.types:
    embed['types'] = Spec((c.types, E), (None, 'embed'), normal)
  block = {'attn': attn, 'attn_norm': norm, 'mlp': mlp, 'mlp_norm': norm}
  tree = {'embed': embed, 'blocks': params.stack(c.layers, block)}
  if E != D:
    tree['project'] = {'kernel': Spec((E, D), (None, 'embed'), normal)}
  if c.terms:
    tree['relative'] = {'table': Spec((2 * (c.buckets or c.relative), D), (None, 'embed'), normal)}
    tree['relative'] |= {'norm': norm} if c.relative_norm else {}
  if c.conv:
    tree['conv'] = {'kernel': Spec((c.conv, D, D), (None, 'embed', None), normal), 'norm': norm,
                    'bias': Spec((D,), ('embed',), params.zeros)}
  return tree


def apply(
    p: params.Tree,
    c: Config,
    ids_BT: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    types_BT: jax.Array | None = None,
    key: nn.Key | None = None,
    attend: Callable[..., jax.Array] | None = None,
    stack: blocks.Stack = blocks.LOCAL,
) -> jax.Array:
  """Hidden states x_BTD of the last block, in `c.dtype`.

  Args:
    p: tree of `specs(c)`, heads beside them allowed; 'blocks' may also be a list of per-layer trees.
    ids_BT: int32 token ids.
    positions_BT: for the absolute table, default 0..T-1. Distances are between places in the row.
    segments_BT: tokens of equal id >= 1 see each other, 0 = padding; None = all one segment.
    types_BT: segment types (sentence A 0, B 1), default 0.
    key: turns dropout on.
    attend: any function with the contract of `nn.attend`; None = `disentangled.attention`, which is faster.
    stack: how the blocks are run.

  Raises:
    ConfigError: rows are longer than the absolute position table that is to be read.
  """
  return _encode(p, c, ids_BT, c.layers, positions_BT, segments_BT, types_BT, key, attend, stack)[0]


def decoder_specs(c: Config) -> params.Tree:
  """What `decode_masked` reads besides `specs(c)`, under 'decoder': absolute positions."""
  return {'positions': Spec((c.length, c.embed), (None, 'embed'), params.Normal(c.std))}


def decode_masked(p: params.Tree, c: Config, ids_BT: jax.Array, *, positions_BT: jax.Array | None = None,
                  segments_BT: jax.Array | None = None, types_BT: jax.Array | None = None,
                  key: nn.Key | None = None, attend: Callable[..., jax.Array] | None = None,
                  stack: blocks.Stack = blocks.LOCAL) -> jax.Array:
  """x_BTD for predicting masked words: `apply` with the enhanced mask decoder in place of the last block (§3.2).

  The last block's weights run twice. Keys and values are the hidden states before that block, queries at first those
  plus absolute positions, then the first run's outputs. For pre-training only; `p` has 'decoder' (`decoder_specs`).
  """
  x_BTD, block = _encode(p, c, ids_BT, c.layers - 1, positions_BT, segments_BT, types_BT, key, attend, stack)
  q_BTD = x_BTD + _look_up(p['decoder']['positions'], positions_BT, x_BTD)
  passes = [stack.layer(p['blocks'], c.layers - 1)] * _PASSES
  return blocks.run(passes, lambda layer, q_BTD, rows, key: block(layer, x_BTD, rows, key, q_BTD), q_BTD, segments_BT,
                    nn.fold(key, c.layers + 3), scan_layers=False, remat=c.remat)


def _encode(p, c, ids_BT, layers, positions_BT, segments_BT, types_BT, key, attend, stack):
  """(x_BTD after the first `layers` blocks, the block function)."""
  x_BTD = _embed(p, c, ids_BT, positions_BT, segments_BT, types_BT, nn.fold(key, c.layers))
  block = functools.partial(_block, c=c, relative=_relative(p, c, ids_BT.shape[1]), attend=attend)
  first = 1 if c.conv and layers else 0
  if first:
    own = nn.fold(key, c.layers + 1)
    y_BTD = blocks.run([stack.layer(p['blocks'], 0, nn.fold(own, 0))], block, x_BTD, segments_BT, own,
                       scan_layers=False, remat=c.remat)
    x_BTD = _convolve(p['conv'], x_BTD, y_BTD, segments_BT, nn.fold(key, c.layers + 2), c)
  x_BTD = stack.run(p['blocks'], block, x_BTD, segments_BT, key, scan_layers=c.scan_layers, remat=c.remat, first=first,
                    last=layers)
  return x_BTD, block


def _embed(p, c, ids_BT, positions_BT, segments_BT, types_BT, key):
  table = p['embed']
  x_BTE = table['tokens'][ids_BT].astype(c.dtype)
  if c.positions:
    x_BTE = x_BTE + _look_up(table['positions'], positions_BT, x_BTE)
  if c.types:
    types_BT = jnp.zeros_like(ids_BT) if types_BT is None else types_BT
    x_BTE = x_BTE + table['types'][types_BT].astype(c.dtype)
  x_BTD = nn.dot(p['project']['kernel'], x_BTE, 'BTE,ED->BTD') if 'project' in p else x_BTE
  x_BTD = _without_padding(_norm(x_BTD, table['norm'], c), segments_BT)
  return constrain(nn.dropout(x_BTD, c.dropout.embedding, key), 'batch', 'sequence', 'embed')


def _look_up(table, positions_BT, x_BTD):
  """Rows of an absolute position table, as large as x."""
  T = x_BTD.shape[1]
  if T > table.shape[0]:
    raise ConfigError(f'model.length={table.shape[0]}; expected at least {T}, the tokens of a row; set model.length, '
                      'or cut the rows')
  positions_BT = jnp.arange(T)[None] if positions_BT is None else positions_BT
  return jnp.broadcast_to(table[positions_BT].astype(x_BTD.dtype), x_BTD.shape)


def _without_padding(x_BTD, segments_BT):
  return x_BTD if segments_BT is None else jnp.where((segments_BT > 0)[..., None], x_BTD, jnp.zeros_like(x_BTD))


def _relative(p, c, T):
  """(the rows of the relative table that T tokens can use, {term: which of them each distance takes})."""
  index = {term: row for term, row in disentangled.rows(T, c.buckets, c.relative).items() if term in c.terms}
  if not index:
    return None, index
  low, high = min(map(np.min, index.values())), max(map(np.max, index.values()))
  table_RD = p['relative']['table'][low:high + 1]
  if 'norm' in p['relative']:
    table_RD = _norm(table_RD, p['relative']['norm'], c)
  return table_RD.astype(c.dtype), {term: row - low for term, row in index.items()}


def _convolve(p, x_BTD, y_BTD, segments_BT, key, c):
  """LN(y + activation(conv(x))), x being the first block's input and y its output; words see neighbours of their own
  segment. Padding is zeroed (DeBERTa-v2; microsoft/DeBERTa deberta.py ConvLayer)."""
  T, side = x_BTD.shape[1], c.conv // 2
  segments_BT = jnp.ones(x_BTD.shape[:2], jnp.int32) if segments_BT is None else segments_BT
  wide_BTD, ids_BT = jnp.pad(x_BTD, ((0, 0), (side, side), (0, 0))), jnp.pad(segments_BT, ((0, 0), (side, side)))
  out_BTD = jnp.zeros_like(x_BTD)
  for i in range(c.conv):
    same_BT = ids_BT[:, i:i + T] == segments_BT
    near_BTD = jnp.where(same_BT[..., None], wide_BTD[:, i:i + T], jnp.zeros_like(x_BTD))
    out_BTD = out_BTD + nn.dot(p['kernel'][i], near_BTD, 'BTD,DE->BTE')
  out_BTD = _without_padding(blocks.bias(out_BTD, p['bias']), segments_BT)
  out_BTD = blocks.activate(nn.dropout(out_BTD, c.dropout.hidden, key), c.conv_activation)
  return _without_padding(_norm(y_BTD + out_BTD, p['norm'], c), segments_BT)


def _block(p, x_BTD, segments_BT, key, q_BTD=None, *, c, relative, attend):
  """One block on x; with q, of queries q to keys and values x."""
  keys = [nn.fold(key, i) for i in range(4)]
  mask = nn.Mask(causal=False, q_segments_BT=segments_BT, k_segments_BS=segments_BT)
  q_BTD = x_BTD if q_BTD is None else q_BTD
  a_BTNH = _attention(p['attn'], q_BTD, x_BTD, keys[:2], c, mask, relative, attend)
  y_BTD = nn.residual(p['attn']['o'], q_BTD, a_BTNH, 'BTNH,NHD->BTD', p['attn']['o_bias'], rate=c.dropout.hidden,
                      key=keys[2], norm=lambda x_BTD: _norm(x_BTD, p['attn_norm'], c))
  up_BTF = blocks.up(p['mlp'], y_BTD, nn.fold(keys[3], 2), c.activation)
  y_BTD = nn.residual(p['mlp']['down'], y_BTD, up_BTF, 'BTF,FD->BTD', p['mlp']['down_bias'], rate=c.dropout.hidden,
                      key=keys[3], norm=lambda x_BTD: _norm(x_BTD, p['mlp_norm'], c))
  return constrain(y_BTD, 'batch', 'sequence', 'embed')


def _attention(p, q_BTD, x_BTD, keys, c, mask, relative, attend):
  one, other = nn.fold(keys[0], 1), nn.fold(keys[0], 2)
  projected = (_project(p, 'qkv', x_BTD, one) if q_BTD is x_BTD else
               _project(p, 'q', q_BTD, one) + _project(p, 'kv', x_BTD, other))
  q_BTNH, k_BTNH, v_BTNH = (constrain(y_BTNH, 'batch', 'length', 'heads', 'head_dim') for y_BTNH in projected)
  table_RD, index = relative
  tables = {}
  if index:
    r_1RD = nn.dropout(table_RD, c.dropout.hidden, nn.shared(keys[0]))[None]
    kind = '' if c.shared else 'position_'
    names = {term: kind + {'c2p': 'k', 'p2c': 'q'}[term] for term in index}
    tables = {term: _project(p, [name], r_1RD)[0][0][index[term]] for term, name in names.items()}
  return disentangled.attention(q_BTNH, k_BTNH, v_BTNH, tables, mask, scale=(c.head_dim * (1 + len(tables))) ** -0.5,
                                rate=c.dropout.attention, key=keys[1], attend=attend)


def _project(p, names, x_BTD, key=None):
  projected = nn.dots([p[name] for name in names], x_BTD, ['BTD,DNH->BTNH'] * len(names), key)
  return tuple(blocks.bias(y_BTNH, p[f'{name}_bias']) if f'{name}_bias' in p else y_BTNH
               for y_BTNH, name in zip(projected, names, strict=True))


def _norm(x, p, c):
  return nn.layer_norm(x, p['scale'], p['bias'], c.norm_eps)
