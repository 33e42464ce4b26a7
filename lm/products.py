"""Products of activations with plain weights, by equations 'batch in, in out -> batch out', and their derivatives.

What `lm.nn.dot` and `lm.nn.dots` do with arrays. On a CPU some forms of the same product are much faster than others;
on a mesh some send much less.
"""

from collections.abc import Sequence
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding

# On a CPU weights are joined in the derivative if none of the products has more multiplications. At 768 x 128 and
# 128 x 128 that makes a GPT's step 6% shorter; at 4096 x 384 and 384 x 384 copies cost more than it gains.
_SMALL = 2**25
_THIN = 32  # rows to a column of a weight; its derivative's transpose then takes a CPU a quarter of the time
_MANY = 4  # rows to each of a weight's own, so that copies of weights cost nothing


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
  """einsum(equation, x, w) in x's dtype, for equations such as 'BTD,DNH->BTNH'."""
  return _contracted(equation, x, w.astype(x.dtype))


def _contracted(equation, a, b):
  """The product over the dimensions that both have, a's last and b's first or last: a's other dimensions, then b's.

  On one device as a product with a matrix. Einsum contracts over dimensions in the order of their names, for
  'BTNH,NHD->BTD' H, N; XLA on a CPU copies both operands transposed for that, and b where it has more than two.
  """
  names = equation.split('->')[0].split(',')
  shared = [axis for axis in names[1] if axis in names[0]]
  n, start = len(shared), names[1].index(shared[0]) if shared else 0
  if not names[0].endswith(''.join(shared)) or start not in (0, b.ndim - n):
    raise ValueError(f'{equation}: expected "batch in, in out -> batch out"')
  if not sharding.local():
    dims = range(a.ndim - n, a.ndim), range(start, start + n)
    return jax.lax.dot_general(a, b, (dims, ((), ())))
  rows, columns = a.shape[:a.ndim - n], (*b.shape[:start], *b.shape[start + n:])
  inner = math.prod(a.shape[a.ndim - n:])
  b = b.reshape((-1, inner) if start else (inner, -1))
  y = jax.lax.dot_general(a.reshape(*rows, inner), b, (((len(rows),), (1 if start else 0,)), ((), ())))
  return y.reshape(*rows, *columns)


def backward(equation: str, residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`product`'s derivative (dx, dw) at residuals (x, w) where the result's is g; dw as one product of matrices.

  Einsum's own derivative contracts over batch and length as two dimensions. On a CPU XLA copies an operand transposed
  for that, and forms what it holds a second time on the way: a sixth of a training step.
  """
  x, w = residuals
  (x_axes, w_axes), out = equation.split('->')[0].split(','), equation.split('->')[1]
  g = jax.lax.optimization_barrier(g)
  dx = _contracted(f'{out},{w_axes}', g, w.astype(x.dtype))
  inner = sum(axis in x_axes for axis in w_axes)
  rows = lambda a, columns: a.reshape(-1, math.prod(columns))
  dw = over_rows(rows(x, w.shape[:inner]), rows(g, w.shape[inner:]))
  return dx, dw.reshape(w.shape).astype(w.dtype)


def over_rows(x_XD: jax.Array, g_XF: jax.Array) -> jax.Array:
  """x^T g in f32, [D, F]: the derivative of a weight."""
  product = lambda a, b: jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
  if _THIN * g_XF.shape[1] > x_XD.shape[1]:
    return product(x_XD, g_XF)
  transposed = lambda x_XD, g_XF: jax.lax.optimization_barrier(product(g_XF, x_XD)).T  # without, XLA turns it back
  return jax.lax.platform_dependent(x_XD, g_XF, cpu=transposed, default=product)


product.defvjp(lambda equation, x, w: (product(equation, x, w), (x, w)), backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def products(equations: Sequence[str], x: jax.Array, ws: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
  """`product` of one x with several weights, each of which adds dimensions to D, x's last.

  In the derivative the weights stand side by side. On one CPU that makes one product of several small ones and their
  sum. Where weights are divided over devices, each device has a part of the derivative by x from each weight; these are
  summed before devices add theirs up: one array is sent and not one a weight.
  """
  return tuple(_contracted(equation, x, w.astype(x.dtype)) for w, equation in zip(ws, equations, strict=True))


def _small(x, ws):
  D = x.shape[-1]
  return sharding.local() and _MANY * D**2 <= x.size and x.size * max(w.size for w in ws) <= _SMALL * D


def _several_backward(equations, residuals, gs):
  x, ws = residuals
  apart = functools.partial(_apart if sharding.local() else _divided, equations)
  return jax.lax.platform_dependent(x, ws, gs, cpu=_joined, default=apart) if _small(x, ws) else apart(x, ws, gs)


products.defvjp(lambda equations, x, ws: (products(equations, x, ws), (x, ws)), _several_backward)


def _joined(x, ws, gs):
  D, columns = x.shape[-1], [math.prod(w.shape[1:]) for w in ws]
  side_by_side = lambda arrays: jnp.concatenate(
      [a.reshape(-1, n) for a, n in zip(arrays, columns, strict=True)], axis=1)
  dx, dw = backward('rd,de->re', (x.reshape(-1, D), side_by_side(ws)), side_by_side(gs))
  dws = jnp.split(dw, np.cumsum(columns[:-1]), axis=1)
  return dx.reshape(x.shape), tuple(dw.reshape(w.shape).astype(w.dtype) for dw, w in zip(dws, ws, strict=True))


def _apart(equations, x, ws, gs):
  pairs = [backward(equation, (x, w), g) for equation, w, g in zip(equations, ws, gs, strict=True)]
  return functools.reduce(jnp.add, [dx for dx, _ in pairs]), tuple(dw for _, dw in pairs)


def _divided(equations, x, ws, gs):
  pairs = [backward(equation, (x, w), g) for equation, w, g in zip(equations, ws, gs, strict=True)]
  # The first dimension that a weight adds (heads, mlp) is what devices divide; a single key head is on all of them.
  first = x.ndim - 1
  divided = [i for i, g in enumerate(gs) if g.shape[first] > 1]
  if not divided:
    return _apart(equations, x, ws, gs)
  heads = min(gs[i].shape[first] for i in divided)
  g = jnp.concatenate([gs[i].reshape(*x.shape[:-1], heads, -1) for i in divided], axis=-1)
  w = jnp.concatenate([ws[i].reshape(x.shape[-1], heads, -1).astype(x.dtype) for i in divided], axis=-1)
  dx = jnp.einsum('...KX,DKX->...D', g, w)
  return sum((pairs[i][0] for i in range(len(gs)) if i not in divided), dx), tuple(dw for _, dw in pairs)
