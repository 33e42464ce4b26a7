"""Decoder-only transformers: GPT-2, GPT-3, Llama-2/3, SmolLM2, PaLM and Chinchilla are values of one `Config`.

Shapes: B batch, T query length, S key length, D embed, N query heads, K key/value heads, H head dim, F mlp, V vocab,
L layers. Parameters are f32 and stacked over layers ('blocks/attn/q' is [L, D, N, H]); activations have `c.dtype`.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lm import nn, params
from lm.errors import ConfigError
from lm.models import blocks, kv_cache, transformer_xl
from lm.params import Spec
from lm.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Init:
  """Standard deviations at the start; `scheme` 'fan_in' replaces `std` for kernels (PaLM §5)."""

  scheme: Literal['normal', 'fan_in'] = 'normal'
  std: float = 0.02
  tokens: float = 0.02
  positions: float = 0.02
  residual: float = 0.02  # the two projections that write to the residual stream

  def __post_init__(self):
    for name in ('std', 'tokens', 'positions', 'residual'):
      if not 0 <= getattr(self, name) < math.inf:
        raise ConfigError(f'model.init.{name}={getattr(self, name)}; expected a finite number, at least 0')


@dataclasses.dataclass(frozen=True)
class Config:
  """The shape of one decoder. Defaults are GPT-2's choices at 124M."""

  vocab: int = 50257
  length: int = 1024  # most positions; a learned table has this many rows
  layers: int = 12
  embed: int = 768
  heads: int = 12
  kv_heads: int = 12  # fewer than heads: grouped-query; 1: multi-query attention
  head_dim: int = 64
  mlp: int = 3072
  positions: Literal['learned', 'rotary', 'relative'] = 'learned'  # relative: Transformer-XL's
  rope_theta: float = 10000.0
  norm: Literal['layer', 'rms'] = 'layer'
  norm_eps: float = 1e-5
  norm_bias: bool = True
  activation: Literal['gelu_tanh', 'gelu_erf', 'swiglu'] = 'gelu_tanh'
  bias: bool = True  # of the projections
  parallel: bool = False  # x + attention(norm(x)) + mlp(norm(x)) with one norm (PaLM §2)
  tied: bool = True  # the output matrix is the embedding
  logit_scale: float = 1.0
  dropout: nn.Dropout = nn.Dropout()
  init: Init = Init()
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  scan_layers: bool = True  # compile one block, not L; off runs faster on a CPU
  remat: Literal['none', 'dots', 'full'] = 'none'  # what a block recomputes in the backward pass

  def __post_init__(self):
    for name in ('vocab', 'length', 'layers', 'embed', 'heads', 'kv_heads', 'head_dim', 'mlp'):
      if getattr(self, name) < 1:
        raise ConfigError(f'model.{name}={getattr(self, name)}; expected at least 1')
    for name in ('rope_theta', 'norm_eps', 'logit_scale'):
      if not 0 < getattr(self, name) < math.inf:
        raise ConfigError(f'model.{name}={getattr(self, name)}; expected a finite number above 0')
    if self.heads % self.kv_heads:
      raise ConfigError(f'model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}')
    if self.positions == 'rotary' and self.head_dim % 2:
      raise ConfigError(f'model.head_dim={self.head_dim} is odd; rotary positions turn pairs of dimensions')


def specs(c: Config) -> params.Tree:
  """The parameter tree of one decoder."""
  D, N, K, H, F = c.embed, c.heads, c.kv_heads, c.head_dim, c.mlp
  kv = 'kv_heads' if K > 1 else None  # a single head cannot be divided: every device has it
  inner = params.Normal(c.init.std)
  outer_o = outer_down = params.Normal(c.init.residual)
  if c.init.scheme == 'fan_in':
    inner, outer_o, outer_down = params.FanIn(1), params.FanIn(2), params.FanIn(1)
  attn = {
      'q': Spec((D, N, H), ('embed', 'heads', 'head_dim'), inner),
      'k': Spec((D, K, H), ('embed', kv, 'head_dim'), inner),
      'v': Spec((D, K, H), ('embed', kv, 'head_dim'), inner),
      'o': Spec((N, H, D), ('heads', 'head_dim', 'embed'), outer_o),
  }
  mlp = {'up': Spec((D, F), ('embed', 'mlp'), inner), 'down': Spec((F, D), ('mlp', 'embed'), outer_down)}
  if c.activation == 'swiglu':
    mlp['gate'] = Spec((D, F), ('embed', 'mlp'), inner)
  if c.positions == 'relative':
    attn |= {
        'relative': Spec((D, N, H), ('embed', 'heads', 'head_dim'), inner),
        'content_bias': Spec((N, H), ('heads', 'head_dim'), params.zeros),
        'position_bias': Spec((N, H), ('heads', 'head_dim'), params.zeros),
    }
  if c.bias:
    attn |= {f'{n}_bias': Spec(attn[n].shape[1:], attn[n].axes[1:], params.zeros) for n in 'qkv'}
    attn['o_bias'] = Spec((D,), ('embed',), params.zeros)
    mlp |= {f'{n}_bias': Spec(mlp[n].shape[1:], mlp[n].axes[1:], params.zeros) for n in tuple(mlp)}
  norm = {'scale': Spec((D,), ('embed',), params.ones)}
  norm |= {'bias': Spec((D,), ('embed',), params.zeros)} if c.norm_bias else {}
  block = {'attn_norm': norm, 'attn': attn, 'mlp': mlp}
  if not c.parallel:
    block['mlp_norm'] = norm
  tree = {
      'embed': {'tokens': Spec((c.vocab, D), ('vocab', 'embed'), params.Normal(c.init.tokens))},
      'blocks': params.stack(c.layers, block),
      'final_norm': norm,
  }
  if c.positions == 'learned':
    tree['embed']['positions'] = Spec((c.length, D), (None, 'embed'), params.Normal(c.init.positions))
  if not c.tied:
    tree['unembed'] = Spec((c.vocab, D), ('vocab', 'embed'), params.Normal(c.init.std))
  return tree


def apply(
    p: params.Tree,
    c: Config,
    ids_BT: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    cache: kv_cache.Cache | None = None,
    key: nn.Key | None = None,
    attend: Callable[..., jax.Array] = nn.attend,
    stack: blocks.Stack = blocks.LOCAL,
) -> Any:
  """Hidden states after the final norm, [B, T, D] in `c.dtype`; with a cache the pair (x_BTD, cache).

  Args:
    p: tree of `specs(c)`; 'blocks' may also be a list of per-layer trees (`params.unstack`), which decoding prefers.
    ids_BT: int32 token ids.
    positions_BT: default 0..T-1, or behind the cache's tokens of the same row; a learned prefix comes before all.
    segments_BT: ids >= 1 of packed documents, 0 = padding; None = one document a row.
    cache: from `init_cache`; the new tokens take its next T slots and see all earlier ones of their segment.
    key: turns dropout on.
    attend: any function with the contract of `nn.attend`.
    stack: how the blocks are run; not with a cache.
  """
  if positions_BT is None:
    positions_BT = (jnp.broadcast_to(jnp.arange(ids_BT.shape[1])[None], ids_BT.shape) if cache is None
                    else kv_cache.next_positions(cache, segments_BT, ids_BT))
  positions_BT = positions_BT + blocks.virtual(p['blocks'])
  x_BTD = _embed(p['embed'], c, ids_BT, positions_BT, nn.fold(key, c.layers))
  block = functools.partial(_block, c=c, attend=attend)
  if cache is None:
    def step(layer, x_BTD, rows, key):
      mask = nn.Mask(q_segments_BT=rows[1], k_segments_BS=rows[1])
      return block(layer, x_BTD, key, positions_BT=rows[0], mask=mask)[0]
    x_BTD = stack.run(p['blocks'], step, x_BTD, (positions_BT, segments_BT), key, scan_layers=c.scan_layers,
                      remat=c.remat)
    return _norm(x_BTD, p['final_norm'], c)
  T = ids_BT.shape[1]
  segments_BT = jnp.ones_like(ids_BT) if segments_BT is None else segments_BT
  seen_BS = jax.lax.dynamic_update_slice_in_dim(cache.segments_BS, segments_BT, cache.length, axis=1)
  mask = nn.Mask(start=cache.length, q_segments_BT=segments_BT, k_segments_BS=seen_BS)
  keys, values = [], []
  for i, layer in enumerate(p['blocks'] if isinstance(p['blocks'], (list, tuple)) else params.unstack(p['blocks'])):
    x_BTD, (k, v) = block(layer, x_BTD, nn.fold(key, i), (cache.keys[i], cache.values[i], cache.length),
                          positions_BT=positions_BT, mask=mask)
    keys.append(k)
    values.append(v)
  cache = kv_cache.Cache(tuple(keys), tuple(values), seen_BS, jnp.int32(cache.length + T))
  return _norm(x_BTD, p['final_norm'], c), cache


def head(p: params.Tree, c: Config) -> jax.Array:
  """The output matrix w_VD in `c.dtype`, logit scale included: logits_BTV = x_BTD @ w_VD.T, to be taken in f32."""
  w_VD = p['embed']['tokens'] if c.tied else p['unembed']
  return (w_VD if c.logit_scale == 1.0 else w_VD * c.logit_scale).astype(c.dtype)


def logits(p: params.Tree, c: Config, x_BTD: jax.Array) -> jax.Array:
  """[..., V] f32; for sampling and tests: losses take `head` and work in chunks. A leaf 'unembed' wins over tying."""
  w_VD = p['unembed'] if 'unembed' in p else p['embed']['tokens']
  return nn.dot(w_VD, x_BTD.astype(jnp.float32), '...D,VD->...V') * c.logit_scale


def init_cache(c: Config, B: int, S: int) -> kv_cache.Cache:
  """An empty cache of S slots; a learned position table bounds how many are of use."""
  return kv_cache.empty(B, c.kv_heads, S, c.head_dim, c.layers, c.dtype)


def _embed(p, c, ids_BT, positions_BT, key):
  x_BTD = p['tokens'][ids_BT].astype(c.dtype)
  if c.positions == 'learned':
    x_BTD = x_BTD + jnp.broadcast_to(p['positions'][positions_BT].astype(c.dtype), x_BTD.shape)
  return constrain(nn.dropout(x_BTD, c.dropout.embedding, key), 'batch', 'sequence', 'embed')


def _block(p, x_BTD, key, cache=None, *, c, positions_BT, mask, attend):
  """One block: (x_BTD, (k_BKSH, v_BKSH) or None without a cache)."""
  keys = [nn.fold(key, i) for i in range(3)]
  add = functools.partial(_add, rate=c.dropout.hidden)
  y_BTD = _norm(x_BTD, p['attn_norm'], c)
  a_BTNH, cache = _attention(p['attn'], y_BTD, keys[0], cache, c, positions_BT, mask, attend)
  x_BTD = add(p['attn'], 'o', x_BTD, a_BTNH, 'BTNH,NHD->BTD', keys[1])
  if not c.parallel:
    y_BTD = _norm(x_BTD, p['mlp_norm'], c)
  x_BTD = add(p['mlp'], 'down', x_BTD, _mlp(p['mlp'], y_BTD, nn.fold(keys[2], 2), c), 'BTF,FD->BTD', keys[2])
  return constrain(x_BTD, 'batch', 'sequence', 'embed'), cache


def _attention(p, y_BTD, key, cache, c, positions_BT, mask, attend):
  projected = nn.dots([p[name] for name in 'qkv'], y_BTD, ['BTD,DNH->BTNH', 'BTD,DKH->BTKH', 'BTD,DKH->BTKH'],
                      nn.fold(key, 1))
  q_BTNH, k_BSKH, v_BSKH = (_bias(x, p, f'{name}_bias') for x, name in zip(projected, 'qkv', strict=True))
  if c.positions == 'rotary':
    q_BTNH, k_BSKH = (nn.rotary(x, positions_BT, c.rope_theta) for x in (q_BTNH, k_BSKH))
  if cache is not None:
    old_k, old_v, length = cache
    cache = kv_cache.append(old_k, k_BSKH, length), kv_cache.append(old_v, v_BSKH, length)
    B, _, K, H = k_BSKH.shape
    k_BSKH, v_BSKH = (x.reshape(B, K, -1, H).swapaxes(1, 2) for x in cache)
  k_BSKH, v_BSKH, mask = nn.prefixed(p, k_BSKH, v_BSKH, mask)
  q_BTNH = constrain(q_BTNH, 'batch', 'length', 'heads', 'head_dim')
  bias_BNTS = None
  if c.positions == 'relative':
    q_BTNH, bias_BNTS = transformer_xl.relative_scores(p['relative'], p['content_bias'], p['position_bias'], q_BTNH,
                                           k_BSKH.shape[1], mask.start)
  return attend(q_BTNH, k_BSKH, v_BSKH, mask, bias_BNTS=bias_BNTS, rate=c.dropout.attention, key=key), cache


def _add(p, name, x_BTD, y, equation, key, rate):
  return nn.residual(p[name], x_BTD, y, equation, p.get(f'{name}_bias'), rate=rate, key=key)


def _mlp(p, y_BTD, key, c):
  """The input of 'down'."""
  if c.activation == 'swiglu':
    up_BTF, gate_BTF = nn.dots((p['up'], p['gate']), y_BTD, ['BTD,DF->BTF'] * 2, key)
    up_BTF = _bias(up_BTF, p, 'up_bias') * jax.nn.silu(_bias(gate_BTF, p, 'gate_bias'))
  else:
    up_BTF = _bias(nn.dot(p['up'], y_BTD, 'BTD,DF->BTF', key), p, 'up_bias')
    up_BTF = blocks.activate(up_BTF, c.activation)
  return constrain(up_BTF, 'batch', 'length', 'mlp')


def _bias(x, p, name):
  """x + p[name] where the tree has it; one place that spells the broadcast."""
  if name not in p:
    return x
  return x + jnp.expand_dims(p[name].astype(x.dtype), (0, 1))


def _norm(x_BTD, p, c):
  return (nn.layer_norm if c.norm == 'layer' else nn.rms_norm)(x_BTD, p['scale'], p.get('bias'), c.norm_eps)


def residual_std(layers: int, std: float = 0.02) -> float:
  """GPT-2 §2.3: projections into the residual stream start smaller, by 1/sqrt of the 2L residual additions."""
  return std / math.sqrt(2 * layers)
