"""Foreign weights as tables: each row says where one of their tensors lies in our parameter tree.

A row names their tensor ('{}' is the layer), its layout beside ours, and our parameters in it: 'NH,D->DNH' is a matrix
of (N, H) rows and D columns that we keep as [D, N, H]; 'c' on their side counts equal parameters of ours fused into one
tensor. Rows whose parameters the config lacks fall away. Layouts only move numbers: there and back is bitwise.

Shapes: D embed, N heads, K kv heads, H head dim, F mlp, V vocab, T positions.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import math
import os
import re
from typing import Any, NamedTuple

from flax import traverse_util
import numpy as np

from lm import params
from lm.errors import CheckpointError, ConfigError
from lm.models import decoder

Shape = tuple[int, ...]


class Row:
  """One of their tensors and where its numbers lie in ours."""

  def __init__(self, name: str, layout: str, *paths: str):
    self.name, self.paths = name, paths
    theirs, ours = layout.split('->')
    self._groups, self._order = theirs.split(','), theirs.replace(',', '')
    self._ours, self._axes = ours, ('c' if 'c' in theirs else '') + ours

  def shape(self, ours: Shape) -> Shape:
    """Their shape, from the shape of one of our parameters."""
    sizes = self._sizes(ours)
    return tuple(math.prod(sizes[axis] for axis in group) for group in self._groups)

  def split(self, theirs: np.ndarray, ours: Shape) -> np.ndarray:
    """[c, *ours]: our parameters, in the order of `paths`."""
    sizes = self._sizes(ours)
    x = theirs.reshape([sizes[axis] for axis in self._order])
    x = x.transpose([self._order.index(axis) for axis in self._axes])
    return x if 'c' in self._axes else x[None]

  def merge(self, ours: list[np.ndarray]) -> np.ndarray:
    """Their tensor; the inverse of `split`."""
    x = np.stack(ours) if 'c' in self._axes else ours[0]
    x = x.transpose([self._axes.index(axis) for axis in self._order])
    return np.ascontiguousarray(x.reshape(self.shape(ours[0].shape)))

  def _sizes(self, ours: Shape) -> dict[str, int]:
    return dict(zip(self._ours, ours, strict=True)) | {'c': len(self.paths)}


class Tensor(NamedTuple):
  """A stored tensor, read on demand as f32."""

  shape: Shape
  read: Callable[[], np.ndarray]


class Fields:
  """The fields of a foreign config, each to be taken once: what nobody took is refused, never ignored."""

  def __init__(self, where: str | os.PathLike, fields: Mapping[str, Any]):
    self._where, self._left = where, dict(fields)

  def take(self, name: str, kind: type, *default: Any) -> Any:
    """The value of a field, `default` where it is absent or null; whole numbers are at least 1, others finite."""
    value = self._left.pop(name, None)
    if value is None and default:
      return default[0]
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind or (kind is int and value < 1) or (kind is float and not math.isfinite(value)):
      kinds = {int: 'a whole number of at least 1', float: 'a finite number'}
      raise self.error(name, value, kinds.get(kind, kind.__name__))
    return value

  def group(self, name: str) -> 'Fields':
    """The fields of a nested object; empty where it is absent."""
    return Fields(f'{self._where}: {name}', self.take(name, dict, {}))

  def fixed(self, name: str, *allowed: Any) -> None:
    """Refuses a field that is neither absent, null nor one of `allowed`."""
    value = self._left.pop(name, None)
    if value is not None and value not in allowed:
      raise self.error(name, value, ' or '.join(map(repr, allowed)))

  def drop(self, pattern: str) -> None:
    """Forgets fields that do not change what the model computes."""
    self._left = {k: v for k, v in self._left.items() if not re.fullmatch(pattern, k)}

  def done(self) -> None:
    for name, value in self._left.items():
      raise self.error(name, value, 'a field that is known here')

  def error(self, name: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f'{self._where}: {name}={repr(value)[:80]}; expected {expected}; correct the field if it '
                       'is wrong, else convert another model')


class Family(NamedTuple):
  """One architecture of transformers; its first row is the token embedding."""

  architecture: str
  prefix: str  # of the names below the head; a folder of the bare model lacks it
  rows: tuple[Row, ...]
  copies: Mapping[str, str]  # their tensors that repeat another one in tied models
  ignored: str  # pattern of their tensors that hold no parameter
  read: Callable[[Fields], decoder.Config]
  write: Callable[[decoder.Config], dict[str, Any]]
  needs: Callable[[decoder.Config], dict[str, tuple]]  # field of ours -> the values that their model can have


def instances(rows: tuple[Row, ...], specs: params.Tree) -> Iterator[tuple[str, Row, tuple, Shape]]:
  """(their name, row, index into our stacked array, our shape) of every tensor that `specs` asks for."""
  flat = params.flatten(specs)
  for row in rows:
    if row.paths[0] not in flat:
      continue
    shape = flat[row.paths[0]].shape
    if '{}' in row.name:
      for layer in range(shape[0]):
        yield row.name.format(layer), row, (layer,), shape[1:]
    else:
      yield row.name, row, (), shape


def fill(c: decoder.Config, rows: tuple[Row, ...], tensors: Mapping[str, Tensor], where: str | os.PathLike,
         ignored: str) -> tuple[decoder.Config, params.Tree]:
  """(config, f32 parameters), once every tensor is accounted for.

  An embedding with more rows than `c.vocab` is a padded vocabulary: the rows stay, and the config counts them.

  Raises:
    CheckpointError: a tensor is missing, unknown or of another shape.
  """
  stored = tensors.get(rows[0].name)
  if stored is not None and len(stored.shape) == 2 and stored.shape[0] > c.vocab:
    c = dataclasses.replace(c, vocab=stored.shape[0])
  specs = decoder.specs(c)
  known = set()
  for name, row, _, shape in instances(rows, specs):
    want = row.shape(shape)
    if name not in tensors:
      raise CheckpointError(f'{where}: tensor {name} is missing; expected one of shape {want}; copy the weights again')
    if tensors[name].shape != want:
      raise CheckpointError(f'{where}: tensor {name} has shape {tensors[name].shape}; expected {want}, as in the '
                            'config; copy config and weights again')
    known.add(name)
  for name in tensors:
    if name not in known and not re.fullmatch(ignored, name):
      raise CheckpointError(f'{where}: tensor {name} of shape {tensors[name].shape} has no place in this model; '
                            'expected none of that name; correct the config that describes the weights')
  out = {path: np.empty(spec.shape, np.float32) for path, spec in params.flatten(specs).items()}
  for name, row, index, shape in instances(rows, specs):
    for path, value in zip(row.paths, row.split(tensors[name].read(), shape), strict=True):
      out[path][index] = value
  return c, traverse_util.unflatten_dict(out, sep='/')


def family(c: decoder.Config) -> tuple[str, Family]:
  """(model_type, family) of the architecture that computes `c`.

  Raises:
    ConfigError: there is none; names a field that stands in the way.
  """
  kind = 'llama' if c.positions == 'rotary' else 'gpt2'
  found = FAMILIES[kind]
  for name, allowed in found.needs(c).items():
    if getattr(c, name) not in allowed:
      raise ConfigError(f'model.{name}={getattr(c, name)!r}; expected {" or ".join(map(repr, allowed))}, all that '
                        f'{found.architecture} can have; this config has no export')
  return kind, found


_GELU = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu_erf'}


def _read_gpt2(f: Fields) -> decoder.Config:
  for name, value in (('scale_attn_weights', True), ('scale_attn_by_inverse_layer_idx', False),
                      ('reorder_and_upcast_attn', False), ('add_cross_attention', False)):
    f.fixed(name, value)
  f.drop('n_ctx|summary_.*|predict_special_tokens|gradient_checkpointing')
  D, N, L = f.take('n_embd', int), f.take('n_head', int), f.take('n_layer', int)
  if D % N:
    raise f.error('n_head', N, f'a divisor of n_embd={D}')
  activation = f.take('activation_function', str, 'gelu_new')
  if activation not in _GELU:
    raise f.error('activation_function', activation, ' or '.join(_GELU))
  std = f.take('initializer_range', float, 0.02)
  return decoder.Config(
      vocab=f.take('vocab_size', int), length=f.take('n_positions', int), layers=L, embed=D, heads=N, kv_heads=N,
      head_dim=D // N, mlp=f.take('n_inner', int, 4 * D), activation=_GELU[activation],
      norm_eps=f.take('layer_norm_epsilon', float, 1e-5), tied=f.take('tie_word_embeddings', bool, True),
      dropout=decoder.Dropout(f.take('embd_pdrop', float, 0.1), f.take('attn_pdrop', float, 0.1),
                              f.take('resid_pdrop', float, 0.1)),
      init=decoder.Init(std=std, tokens=std, positions=std, residual=decoder.residual_std(L, std)))


def _write_gpt2(c: decoder.Config) -> dict[str, Any]:
  return {'n_positions': c.length, 'n_embd': c.embed, 'n_layer': c.layers, 'n_head': c.heads, 'n_inner': c.mlp,
          'activation_function': 'gelu' if c.activation == 'gelu_erf' else 'gelu_new', 'layer_norm_epsilon': c.norm_eps,
          'embd_pdrop': c.dropout.embedding, 'attn_pdrop': c.dropout.attention, 'resid_pdrop': c.dropout.hidden}


def _read_llama(f: Fields) -> decoder.Config:
  f.fixed('hidden_act', 'silu')
  f.fixed('rope_interleaved', False)
  f.drop('pretraining_tp|is_llama_config|transformers\\.js_config')
  D, N = f.take('hidden_size', int), f.take('num_attention_heads', int)
  bias = f.take('attention_bias', bool, False)
  if f.take('mlp_bias', bool, False) != bias:
    raise f.error('mlp_bias', not bias, f'{bias} like attention_bias: all projections have a bias here, or none')
  std, eps = f.take('initializer_range', float, 0.02), f.take('rms_norm_eps', float)
  dropout = decoder.Dropout(attention=f.take('attention_dropout', float, 0.0))
  return decoder.Config(
      vocab=f.take('vocab_size', int), length=f.take('max_position_embeddings', int),
      layers=f.take('num_hidden_layers', int), embed=D, heads=N, kv_heads=f.take('num_key_value_heads', int, N),
      head_dim=f.take('head_dim', int, max(D // N, 1)), mlp=f.take('intermediate_size', int), positions='rotary',
      rope_theta=_rope_theta(f), norm='rms', norm_eps=eps, norm_bias=False, activation='swiglu',
      bias=bias, tied=f.take('tie_word_embeddings', bool, False), dropout=dropout,
      init=decoder.Init(std=std, tokens=std, positions=std, residual=std))


def _rope_theta(f: Fields) -> float:
  """From `rope_theta` (transformers 4) or `rope_parameters` (5); any scaling of the frequencies is refused."""
  theta, inner = f.take('rope_theta', float, None), f.group('rope_parameters')
  f.fixed('rope_scaling', {'rope_type': 'default'}, {'type': 'default'})
  inner.fixed('rope_type', 'default')
  inner.fixed('type', 'default')
  inner.fixed('partial_rotary_factor', 1.0)
  inner_theta = inner.take('rope_theta', float, theta or 10000.0)
  inner.done()
  if theta not in (None, inner_theta) or inner_theta <= 0:
    raise f.error('rope_theta', theta, f'a positive number, equal to rope_parameters.rope_theta={inner_theta}')
  return inner_theta


def _write_llama(c: decoder.Config) -> dict[str, Any]:
  return {'max_position_embeddings': c.length, 'hidden_size': c.embed, 'num_hidden_layers': c.layers,
          'num_attention_heads': c.heads, 'num_key_value_heads': c.kv_heads, 'head_dim': c.head_dim,
          'intermediate_size': c.mlp, 'hidden_act': 'silu', 'rms_norm_eps': c.norm_eps, 'attention_bias': c.bias,
          'mlp_bias': c.bias, 'attention_dropout': c.dropout.attention, 'rope_theta': c.rope_theta,
          'rope_parameters': {'rope_theta': c.rope_theta, 'rope_type': 'default'}}


def linear(name: str, layout: str, path: str) -> tuple[Row, Row]:
  """The weight of a torch Linear, whose outputs are its rows, and its bias."""
  outputs = layout.split(',')[0]
  return Row(f'{name}.weight', layout, path), Row(f'{name}.bias', f'{outputs}->{outputs}', f'{path}_bias')


def norm(name: str, path: str) -> tuple[Row, Row]:
  return Row(f'{name}.weight', 'D->D', f'{path}/scale'), Row(f'{name}.bias', 'D->D', f'{path}/bias')


_GPT2_ROWS = (
    Row('transformer.wte.weight', 'V,D->VD', 'embed/tokens'),
    Row('transformer.wpe.weight', 'T,D->TD', 'embed/positions'),
    *norm('transformer.h.{}.ln_1', 'blocks/attn_norm'),
    Row('transformer.h.{}.attn.c_attn.weight', 'D,cNH->DNH', *(f'blocks/attn/{name}' for name in 'qkv')),
    Row('transformer.h.{}.attn.c_attn.bias', 'cNH->NH', *(f'blocks/attn/{name}_bias' for name in 'qkv')),
    Row('transformer.h.{}.attn.c_proj.weight', 'NH,D->NHD', 'blocks/attn/o'),
    Row('transformer.h.{}.attn.c_proj.bias', 'D->D', 'blocks/attn/o_bias'),
    *norm('transformer.h.{}.ln_2', 'blocks/mlp_norm'),
    Row('transformer.h.{}.mlp.c_fc.weight', 'D,F->DF', 'blocks/mlp/up'),
    Row('transformer.h.{}.mlp.c_fc.bias', 'F->F', 'blocks/mlp/up_bias'),
    Row('transformer.h.{}.mlp.c_proj.weight', 'F,D->FD', 'blocks/mlp/down'),
    Row('transformer.h.{}.mlp.c_proj.bias', 'D->D', 'blocks/mlp/down_bias'),
    *norm('transformer.ln_f', 'final_norm'),
    Row('lm_head.weight', 'V,D->VD', 'unembed'),
)

_LLAMA_ROWS = (
    Row('model.embed_tokens.weight', 'V,D->VD', 'embed/tokens'),
    *norm('model.layers.{}.input_layernorm', 'blocks/attn_norm'),
    *linear('model.layers.{}.self_attn.q_proj', 'NH,D->DNH', 'blocks/attn/q'),
    *linear('model.layers.{}.self_attn.k_proj', 'KH,D->DKH', 'blocks/attn/k'),
    *linear('model.layers.{}.self_attn.v_proj', 'KH,D->DKH', 'blocks/attn/v'),
    *linear('model.layers.{}.self_attn.o_proj', 'D,NH->NHD', 'blocks/attn/o'),
    *norm('model.layers.{}.post_attention_layernorm', 'blocks/mlp_norm'),
    *linear('model.layers.{}.mlp.gate_proj', 'F,D->DF', 'blocks/mlp/gate'),
    *linear('model.layers.{}.mlp.up_proj', 'F,D->DF', 'blocks/mlp/up'),
    *linear('model.layers.{}.mlp.down_proj', 'D,F->FD', 'blocks/mlp/down'),
    *norm('model.norm', 'final_norm'),
    Row('lm_head.weight', 'V,D->VD', 'unembed'),
)

FAMILIES = {
    'gpt2': Family(
        'GPT2LMHeadModel', 'transformer.', _GPT2_ROWS, {'lm_head.weight': 'transformer.wte.weight'},
        r'transformer\.h\.\d+\.attn\.(masked_)?bias', _read_gpt2, _write_gpt2,
        lambda c: {'positions': ('learned',), 'norm': ('layer',), 'norm_bias': (True,), 'bias': (True,),
                   'activation': ('gelu_tanh', 'gelu_erf'), 'parallel': (False,), 'logit_scale': (1.0,),
                   'kv_heads': (c.heads,), 'head_dim': (c.embed / c.heads,)}),
    'llama': Family(
        'LlamaForCausalLM', 'model.', _LLAMA_ROWS, {'lm_head.weight': 'model.embed_tokens.weight'},
        r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq', _read_llama, _write_llama,
        lambda c: {'positions': ('rotary',), 'norm': ('rms',), 'norm_bias': (False,), 'activation': ('swiglu',),
                   'parallel': (False,), 'logit_scale': (1.0,), 'embed': (c.embed - c.embed % c.heads,)}),
}
