"""Nodes of a parameter tree in place of a weight: the weight, and what is learned beside it.

`nn.dot`, `nn.residual` and a table's look-up dispatch on the type, so that no model knows of them. `lm.peft` puts them
in. Shapes: D embed, R rank or width of a bottleneck, P virtual positions, V vocabulary, E width of the embedding.
"""

import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from lm import nn, products, sharding


@struct.dataclass
class Lora:
  """A weight w and the product of two thin matrices that is learned beside it: w + scale * a b (LoRA §4.1).

  Attributes:
    w: array or another node, inputs first: [*in, *out].
    lora_a: [*in, R]. lora_b: [R, *out].
  """

  w: Any
  lora_a: Any
  lora_b: Any
  scale: float = struct.field(pytree_node=False)
  rate: float = struct.field(pytree_node=False, default=0.0)


@struct.dataclass
class Adapter:
  """A weight that writes to the residual stream, and a bottleneck behind it.

  Attributes:
    reduce: [D, R]. expand: [R, D].
    kind: 'houlsby': h + f(h) of the branch's output h, before the sum with the stream x; gelu. 'pfeiffer': h +
      f(norm(x + h)); relu.
  """

  w: Any
  reduce: Any
  reduce_bias: Any
  expand: Any
  expand_bias: Any
  kind: str = struct.field(pytree_node=False)


@struct.dataclass
class Prompted:
  """A table of token embeddings w [V, E] with learned rows behind it, prompt [P, E]: ids V to V + P - 1.

  As an output matrix it is w alone: virtual tokens are not predicted.
  """

  w: Any
  prompt: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.w.shape

  def __getitem__(self, ids: jax.Array) -> jax.Array:
    V, P = self.w.shape[0], self.prompt.shape[0]
    virtual = self.prompt[jnp.clip(ids - V, 0, P - 1)].astype(self.w.dtype)
    return jnp.where((ids >= V)[..., None], virtual, self.w[jnp.minimum(ids, V - 1)])

  def __mul__(self, factor: float) -> jax.Array:
    return self.w * factor

  def astype(self, dtype: Any) -> jax.Array:
    return self.w.astype(dtype)


@struct.dataclass
class Mixed:
  """A weight w that trains and the pretrained one, base, which does not; see `lm.mixout`, that makes arrays of them.

  base is None where nothing trains any more. inputs: how many dimensions, the first of a layer's, a product contracts.
  """

  w: Any
  base: Any
  rate: float = struct.field(pytree_node=False)
  inputs: int = struct.field(pytree_node=False, default=1)


@nn.dot.register
def _dot_lora(w: Lora, x: jax.Array, equation: str, key: nn.Key | None = None) -> jax.Array:
  apart = lambda w, x: _apart(equation, w, x, key)
  if not _mergeable(w, x, key):
    return apart(w, x)
  return jax.lax.platform_dependent(w, x, cpu=functools.partial(_merged, equation), default=apart)


def _apart(equation, w, x, key):
  terms, out = equation.split('->')
  x_dims, w_dims = terms.split(',')
  inner, outer = (''.join(d for d in w_dims if (d in out) == side) for side in (False, True))
  thin = ''.join(d for d in x_dims if d not in inner) + 'r'
  h = nn.dot(w.lora_a, nn.dropout(x, w.rate, key), f'{x_dims},{inner}r->{thin}')
  return nn.dot(w.w, x, equation) + nn.dot(w.lora_b, h * w.scale, f'{thin},r{outer}->{out}')


def _mergeable(w, x, key):
  """Is w + scale * a b, formed once a step, exact, and less work than products of every row with thin matrices?

  Only in f32, where a CPU rounds no operand: a sum in bfloat16 would lose what is learned.
  """
  if not (isinstance(w.w, jax.Array) and x.dtype == w.w.dtype == jnp.float32 and sharding.local()):
    return False
  inputs, outputs = w.lora_a.size // w.lora_a.shape[-1], w.lora_b.size // w.lora_b.shape[0]
  return (key is None or not w.rate) and x.size // inputs >= min(inputs, outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _merged(equation, w, x):
  return products.product(equation, x, lora_weight(w))


def _merged_backward(equation, residuals, g):
  w, x = residuals
  dx, dw = products.backward(equation, (x, lora_weight(w)), g)
  R = w.lora_b.shape[0]
  a_DR, b_RF = w.lora_a.reshape(-1, R), w.lora_b.reshape(R, -1)
  x_XD, g_XF = x.reshape(-1, a_DR.shape[0]), g.reshape(-1, b_RF.shape[1])
  da_DR = products.over_rows(x_XD, w.scale * (g_XF @ b_RF.T))
  db_RF = products.over_rows(w.scale * (x_XD @ a_DR), g_XF)
  return w.replace(w=dw, lora_a=da_DR.reshape(w.lora_a.shape), lora_b=db_RF.reshape(w.lora_b.shape)), dx


_merged.defvjp(lambda equation, w, x: (_merged(equation, w, x), (w, x)), _merged_backward)


@nn.dot.register
def _dot_prompted(w: Prompted, x: jax.Array, equation: str, key: nn.Key | None = None) -> jax.Array:
  return nn.dot(w.w, x, equation, key)


@nn.residual.register
def _residual_adapter(w: Adapter, x: jax.Array, y: jax.Array, equation: str, bias: jax.Array | None, *,
                      rate: float = 0.0, key: nn.Key | None = None, norm: Any = lambda x: x) -> jax.Array:
  h = nn.branch(w.w, y, equation, bias, rate, key)
  if w.kind == 'houlsby':
    return norm(x + h + _bottleneck(w, h, jax.nn.gelu))
  return norm(x + h + _bottleneck(w, norm(x + h), jax.nn.relu))


def _bottleneck(w, h, activation):
  wide = lambda b: jnp.expand_dims(b.astype(h.dtype), range(h.ndim - 1))
  thin = activation(nn.dot(w.reduce, h, 'BTD,DR->BTR') + wide(w.reduce_bias))
  return nn.dot(w.expand, thin, 'BTR,RD->BTD') + wide(w.expand_bias)


def lora_weight(node: Lora) -> jax.Array:
  """w + scale * a b, whatever leading 'layers' dimension all three have."""
  lead = node.lora_b.ndim + node.lora_a.ndim - 2 - node.w.ndim  # 1 where stacked, else 0
  a, b = node.lora_a, node.lora_b
  layers = a.shape[:lead]
  product = a.reshape(*layers, -1, a.shape[-1]) @ b.reshape(*layers, b.shape[lead], -1)
  return node.w + node.scale * product.reshape(node.w.shape)


def is_node(x: Any) -> bool:
  """Is x one of this module's nodes?"""
  return isinstance(x, (Lora, Adapter, Prompted, Mixed))
