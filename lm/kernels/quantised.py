"""Kernels packed for decoding, where time goes into reading weights: f32, bfloat16, or int8 with a scale per output.

A `Packed` leaf stands where an array stood; `nn.dot` dispatches on it, so no model knows of it. Weights are multiplied
as they are stored. Beside bfloat16 weights activations are rounded to bfloat16 too; beside int8 weights an activation
is split into two int8 limbs (16 bits in all), which go through one matmul as rows of their own. Sums are f32 or int32.

Shapes: M rows of activations, I inputs, O outputs of a kernel seen as a matrix.
"""

from collections.abc import Sequence
import itertools
import math
from typing import Literal

from flax import struct
import jax
import jax.numpy as jnp

from lm import nn

Kind = Literal['float32', 'bfloat16', 'int8']
_LIMB = 256  # int8: x = step * (256 * high + low)
_MOST = 127 * _LIMB + 127  # the largest such integer
_THIN = 64  # rows that a kernel by output takes as columns at least, where it has no more outputs than inputs


@struct.dataclass
class Packed:
  """A kernel of any shape as the matrix that a dot reads in order.

  Attributes:
    values: f32, bfloat16 or int8: [I, O], or [O, I] where `columns`.
    scale_O: f32, for int8; None: values are the weights.
    shape: of the kernel.
    inputs: the dimensions of the kernel that a dot contracts.
    columns: so many rows of activations, or fewer, are columns beside weights that lie side by side for each output; 0:
      the weights do not.
  """

  values: jax.Array
  scale_O: jax.Array | None
  shape: tuple[int, ...] = struct.field(pytree_node=False)
  inputs: tuple[int, ...] = struct.field(pytree_node=False)
  columns: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Joined:
  """Kernels of the same inputs as one, in place of the first of them: few rows take one product and not several.

  Attributes:
    whole: the matrix, outputs side by side; its shape is of no use.
    parts: each kernel without values.
  """

  whole: Packed
  parts: tuple[Packed, ...] = struct.field(pytree_node=False)


def pack(w: jax.Array, inputs: tuple[int, ...], kind: Kind, columns: int = 0) -> Packed:
  """The leaf for kernel `w`, whose dimensions `inputs` are contracted; int8 rounds to 1/127 of an output's largest."""
  outputs = _outputs(w.shape, inputs)
  w_IO = w.astype(jnp.float32).transpose(inputs + outputs).reshape(math.prod(w.shape[i] for i in inputs), -1)
  scale_O = None
  if kind == 'int8':
    most_O = jnp.abs(w_IO).max(0)
    scale_O = jnp.where(most_O > 0, most_O, 1) / 127
    w_IO = jnp.round(w_IO / scale_O[None])
  return Packed((w_IO.T if columns else w_IO).astype(kind), scale_O, w.shape, inputs, columns)


def unpack(w: Packed) -> jax.Array:
  """The f32 kernel that `w` stands for."""
  order = w.inputs + _outputs(w.shape, w.inputs)
  w_IO = (w.values.T if w.columns else w.values).astype(jnp.float32) * (1 if w.scale_O is None else w.scale_O[None])
  return w_IO.reshape([w.shape[i] for i in order]).transpose([order.index(i) for i in range(len(order))])


def join(ws: Sequence[Packed]) -> Joined:
  """For `nn.dots`, as the first of its weights; the others are not looked at. All are of one kind and layout."""
  first = ws[0]
  values = jnp.concatenate([w.values for w in ws], axis=0 if first.columns else 1)
  scale_O = None if first.scale_O is None else jnp.concatenate([w.scale_O for w in ws])
  parts = tuple(w.replace(values=None, scale_O=None) for w in ws)
  return Joined(Packed(values, scale_O, values.shape, first.inputs, first.columns), parts)


def _outputs(shape, inputs):
  return tuple(i for i in range(len(shape)) if i not in inputs)


@nn.dot.register
def _dot(w: Packed, x: jax.Array, equation: str, key: nn.Key | None = None) -> jax.Array:
  """einsum(equation, x, w) in x's dtype, accumulated in f32 or int32.

  Raises:
    ValueError: the equation contracts other dimensions than `w.inputs`, or not the last ones of `x` in that order.
  """
  del key
  return _products(w, (w,), x, [equation])[0]


@nn.several.register
def _several(joined: Joined, ws: Sequence[Packed], x: jax.Array, equations: Sequence[str], key: nn.Key | None
             ) -> tuple[jax.Array, ...]:
  """`_dot` with each of the parts, in one product."""
  del ws, key
  return _products(joined.whole, joined.parts, x, equations)


def _products(whole, parts, x, equations):
  shapes = [_result(w, x.shape, equation) for w, equation in zip(parts, equations, strict=True)]
  y_MO = _matmul(x.reshape(-1, whole.values.shape[whole.columns > 0]), whole)
  ends = list(itertools.accumulate(math.prod(shape) // len(y_MO) for shape in shapes))
  return tuple(y_MO[:, start:end].reshape(shape).astype(x.dtype)
               for start, end, shape in zip([0, *ends], ends, shapes, strict=False))


def _result(w, x_shape, equation):
  """The shape that the equation gives."""
  terms, out = equation.split('->')
  x_dims, w_dims = terms.split(',')
  contracted = ''.join(w_dims[i] for i in w.inputs)
  rest = ''.join(w_dims[i] for i in _outputs(w.shape, w.inputs))
  if not x_dims.endswith(contracted) or out != x_dims.removesuffix(contracted) + rest:
    raise ValueError(f'{equation}: a packed kernel contracts its dimensions {w.inputs} with the last ones of x')
  return *x_shape[:len(x_shape) - len(contracted)], *(w.shape[w_dims.index(d)] for d in rest)


def _matmul(x_MI, w):
  limbs, weights = {'float32': _whole, 'bfloat16': _half, 'int8': _bytes}[str(w.values.dtype)](x_MI)
  rows = jnp.concatenate(limbs).astype(w.values.dtype)
  parts = jnp.split(_product(rows, w), len(limbs))
  y_MO = sum(part.astype(jnp.float32) * weight for part, weight in zip(parts, weights, strict=True))
  return y_MO if w.scale_O is None else y_MO * w.scale_O[None]


def _product(x_MI, w):
  """[M, O], f32 or int32."""
  kind = jnp.int32 if x_MI.dtype == jnp.int8 else jnp.float32
  if not w.columns:
    return jnp.einsum('MI,IO->MO', x_MI, w.values, preferred_element_type=kind)
  outputs, inputs = w.values.shape
  if not 1 < len(x_MI) <= (w.columns if inputs < outputs else max(w.columns, _THIN)):
    return jnp.einsum('MI,OI->MO', x_MI, w.values, preferred_element_type=kind)
  # A quarter to a half faster on a CPU, if the compiler does not move the transpose into the product.
  y_OM = jnp.einsum('OI,MI->OM', w.values, x_MI, preferred_element_type=kind)
  return jax.lax.optimization_barrier(y_OM).T


def _whole(x_MI):
  return [x_MI], [1]


def _half(x_MI):
  """bfloat16, as the weights. A single row gets one of zeros beside it: XLA on a CPU has no fast kernel for one row."""
  return ([x_MI], [1]) if x_MI.shape[0] > 1 else ([x_MI, jnp.zeros_like(x_MI)], [1, 0])


def _bytes(x_MI):
  """int8 limbs of each row rounded to 1/32639 of its largest element."""
  x_MI = x_MI.astype(jnp.float32)
  most_M1 = jnp.abs(x_MI).max(1, keepdims=True)
  step_M1 = jnp.where(most_M1 > 0, most_M1, 1) / _MOST
  q_MI = jnp.round(x_MI / step_M1)
  high = jnp.floor((q_MI + _LIMB // 2) / _LIMB)
  return [high, q_MI - _LIMB * high], [_LIMB * step_M1, step_M1]
