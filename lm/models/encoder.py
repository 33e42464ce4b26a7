"""Encoders: BERT, RoBERTa and ELECTRA's two networks are values of one `Config`.

arXiv:1810.04805, 1907.11692, 2003.10555.

Shapes: B batch, T length, D embed, E width of the token embedding, N heads, H head dim, F mlp, V vocab, L layers.
Parameters are f32 and stacked over layers ('blocks/attn/q' is [L, D, N, H]); activations have `c.dtype`. Blocks are
post-norm: x = LN(x + f(x)). Heads (`lm.models.heads`) are further keys of the same tree.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from lm import nn, params
from lm.errors import ConfigError
from lm.models import blocks
from lm.params import Spec
from lm.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Config:
  """The shape of one encoder. Defaults are BERT-base's, uncased."""

  vocab: int = 30522
  length: int = 512  # most tokens of a row
  offset: int = 0  # row of the position table that the first token takes; RoBERTa: 2
  types: int = 2  # segment types; 0 = none
  layers: int = 12
  embed: int = 768
  heads: int = 12
  head_dim: int = 64
  mlp: int = 3072
  token_embed: int = 0  # width of the embeddings; 0 = embed; another width is projected (ELECTRA §3.2)
  activation: Literal['gelu_tanh', 'gelu_erf'] = 'gelu_tanh'
  norm_eps: float = 1e-12
  dropout: nn.Dropout = nn.Dropout(0.1, 0.1, 0.1, 0.1)
  std: float = 0.02  # of the normal, cut at two deviations, that every matrix starts from
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  scan_layers: bool = True  # compile one block, not L; off runs faster on a CPU
  remat: Literal['none', 'dots', 'full'] = 'none'  # what a block recomputes in the backward pass

  def __post_init__(self):
    for name in ('vocab', 'length', 'layers', 'embed', 'heads', 'head_dim', 'mlp'):
      if getattr(self, name) < 1:
        raise ConfigError(f'model.{name}={getattr(self, name)}; expected at least 1')
    for name in ('offset', 'types', 'token_embed', 'std'):
      if not 0 <= getattr(self, name) < math.inf:
        raise ConfigError(f'model.{name}={getattr(self, name)}; expected a finite number, at least 0')
    if not 0 < self.norm_eps < math.inf:
      raise ConfigError(f'model.norm_eps={self.norm_eps}; expected a finite number above 0')

  @property
  def width(self) -> int:
    """E."""
    return self.token_embed or self.embed


def specs(c: Config) -> params.Tree:
  """The parameter tree of one encoder, without heads."""
  D, E, N, H, F = c.embed, c.width, c.heads, c.head_dim, c.mlp
  normal = params.TruncatedNormal(c.std)
  attn = {name: Spec((D, N, H), ('embed', 'heads', 'head_dim'), normal) for name in 'qkv'}
  attn |= {f'{name}_bias': Spec((N, H), ('heads', 'head_dim'), params.zeros) for name in 'qkv'}
  attn |= {'o': Spec((N, H, D), ('heads', 'head_dim', 'embed'), normal), 'o_bias': Spec((D,), ('embed',), params.zeros)}
  mlp = {'up': Spec((D, F), ('embed', 'mlp'), normal), 'up_bias': Spec((F,), ('mlp',), params.zeros),
         'down': Spec((F, D), ('mlp', 'embed'), normal), 'down_bias': Spec((D,), ('embed',), params.zeros)}
  norm = lambda width: {'scale': Spec((width,), ('embed',), params.ones),
                        'bias': Spec((width,), ('embed',), params.zeros)}
  embed = {'tokens': Spec((c.vocab, E), ('vocab', 'embed'), normal),
           'positions': Spec((c.length + c.offset, E), (None, 'embed'), normal), 'norm': norm(E)}
  if c.types:
    embed['types'] = Spec((c.types, E), (None, 'embed'), normal)
  block = {'attn': attn, 'attn_norm': norm(D), 'mlp': mlp, 'mlp_norm': norm(D)}
  tree = {'embed': embed, 'blocks': params.stack(c.layers, block)}
  if E != D:
    tree['project'] = {'kernel': Spec((E, D), (None, 'embed'), normal), 'bias': Spec((D,), ('embed',), params.zeros)}
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
    attend: Callable[..., jax.Array] = nn.attend,
    stack: blocks.Stack = blocks.LOCAL,
) -> jax.Array:
  """Hidden states x_BTD of the last block, in `c.dtype`.

  Args:
    p: tree of `specs(c)`, heads beside them allowed; 'blocks' may also be a list of per-layer trees.
    ids_BT: int32 token ids.
    positions_BT: below `c.length`, counted from 0 whatever `c.offset`; default 0..T-1, padding included.
    segments_BT: tokens of equal id >= 1 see each other, 0 = padding; None = all one segment.
    types_BT: segment types (sentence A 0, B 1), default 0; without meaning where `c.types` < 2.
    key: turns dropout on.
    attend: any function with the contract of `nn.attend`.
    stack: how the blocks are run.

  Raises:
    ConfigError: rows are longer than `c.length`.
  """
  T, before = ids_BT.shape[1], blocks.virtual(p['blocks'])
  if T + before > c.length:
    raise ConfigError(f'model.length={c.length}; expected at least {T + before}, the tokens of a row; set '
                      'model.length, or cut the rows')
  positions_BT = before + (jnp.arange(T)[None] if positions_BT is None else positions_BT)
  x_BTD = _embed(p, c, ids_BT, positions_BT, types_BT, nn.fold(key, c.layers))
  step = functools.partial(_block, c=c, attend=attend)
  return stack.run(p['blocks'], step, x_BTD, segments_BT, key, scan_layers=c.scan_layers, remat=c.remat)


def _embed(p, c, ids_BT, positions_BT, types_BT, key):
  table = p['embed']
  x_BTE = table['tokens'][ids_BT].astype(c.dtype)
  x_BTE = x_BTE + jnp.broadcast_to(table['positions'][positions_BT + c.offset].astype(c.dtype), x_BTE.shape)
  if c.types:
    types_BT = jnp.zeros((1, 1), jnp.int32) if types_BT is None or c.types == 1 else types_BT
    x_BTE = x_BTE + jnp.broadcast_to(table['types'][types_BT].astype(c.dtype), x_BTE.shape)
  x_BTE = nn.dropout(_norm(x_BTE, table['norm'], c), c.dropout.embedding, key)
  if 'project' in p:
    x_BTE = blocks.bias(nn.dot(p['project']['kernel'], x_BTE, 'BTE,ED->BTD'), p['project']['bias'])
  return constrain(x_BTE, 'batch', 'sequence', 'embed')


def _block(p, x_BTD, segments_BT, key, *, c, attend):
  keys = [nn.fold(key, i) for i in range(3)]
  mask = nn.Mask(causal=False, q_segments_BT=segments_BT, k_segments_BS=segments_BT)
  a_BTNH = _attention(p['attn'], x_BTD, keys[0], c, mask, attend)
  x_BTD = nn.residual(p['attn']['o'], x_BTD, a_BTNH, 'BTNH,NHD->BTD', p['attn']['o_bias'], rate=c.dropout.hidden,
                      key=keys[1], norm=lambda x_BTD: _norm(x_BTD, p['attn_norm'], c))
  up_BTF = blocks.up(p['mlp'], x_BTD, nn.fold(keys[2], 2), c.activation)
  x_BTD = nn.residual(p['mlp']['down'], x_BTD, up_BTF, 'BTF,FD->BTD', p['mlp']['down_bias'], rate=c.dropout.hidden,
                      key=keys[2], norm=lambda x_BTD: _norm(x_BTD, p['mlp_norm'], c))
  return constrain(x_BTD, 'batch', 'sequence', 'embed')


def _attention(p, x_BTD, key, c, mask, attend):
  projected = nn.dots([p[name] for name in 'qkv'], x_BTD, ['BTD,DNH->BTNH'] * 3, nn.fold(key, 1))
  q_BTNH, k_BTNH, v_BTNH = (
      constrain(blocks.bias(x_BTNH, p[f'{name}_bias']), 'batch', 'length', 'heads', 'head_dim')
      for x_BTNH, name in zip(projected, 'qkv', strict=True))
  k_BSNH, v_BSNH, mask = nn.prefixed(p, k_BTNH, v_BTNH, mask)
  return attend(q_BTNH, k_BSNH, v_BSNH, mask, rate=c.dropout.attention, key=key)


def _norm(x_BTD, p, c):
  return nn.layer_norm(x_BTD, p['scale'], p['bias'], c.norm_eps)
