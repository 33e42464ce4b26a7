"""How every model runs its blocks, and what the blocks of encoders share: biases, activations.

Shapes: B batch, T length, D embed; parameters of the L blocks are stacked.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import nn, params
from lm.sharding import constrain

Step = Callable[[params.Tree, jax.Array, Any, nn.Key | None], jax.Array]  # (layer, x_BTD, rows, key) -> x_BTD


def run(blocks: params.Tree, step: Step, x_BTD: jax.Array, rows: Any, key: nn.Key | None, *, scan_layers: bool,
        remat: str, first: int = 0, last: int | None = None) -> jax.Array:
  """Blocks first..last - 1 in order: x = step(layer, x, rows, key of that layer), scanned or unrolled.

  Args:
    blocks: a stacked tree, or a list of per-layer trees (`params.unstack`), which is never scanned.
    rows: what a block reads of each row besides x: a tree of arrays [B, ...].
    remat: what a block recomputes in the backward pass, 'none', 'dots' or 'full'.
    last: default L.
  """
  layers = blocks if isinstance(blocks, (list, tuple)) else None
  if scan_layers and layers is None:
    chosen = jax.tree.map(lambda x: x[first:last], blocks)
    numbers = jnp.arange(jax.tree.leaves(blocks)[0].shape[0])[first:last]
    return scan(chosen, numbers, step, x_BTD, rows, key, remat=remat)
  each = recomputed(step, remat)
  for i, layer in list(enumerate(params.unstack(blocks) if layers is None else layers))[first:last]:
    x_BTD = each(layer, x_BTD, rows, nn.fold(key, i))
  return x_BTD


def layer(blocks: params.Tree, i: int, key: nn.Key | None = None) -> params.Tree:
  """The parameters of one block; key: of what a stack may draw in them, see `lm.mixout`."""
  del key
  return blocks[i] if isinstance(blocks, (list, tuple)) else jax.tree.map(lambda x: x[i], blocks)


class Stack(NamedTuple):
  """Where the blocks are: `LOCAL` has all at hand; on a mesh, `lm.parallel` gathers weights or passes rows on.

  Attributes:
    run, layer: functions of the signatures above.
  """

  run: Callable[..., jax.Array]
  layer: Callable[..., params.Tree]


LOCAL = Stack(run, layer)


def scan(stacked: params.Tree, numbers: jax.Array, step: Step, x_BTD: jax.Array, rows: Any, key: nn.Key | None, *,
         remat: str) -> jax.Array:
  """`run` of all layers of a stacked tree, `numbers` being their places in the model."""
  each = recomputed(step, remat)
  body = lambda x, some: (each(some[0], x, rows, nn.fold(key, some[1])), None)
  return jax.lax.scan(body, x_BTD, (stacked, numbers))[0]


def recomputed(step: Callable[..., Any], remat: str) -> Callable[..., Any]:
  """`step`, of whose values the backward pass keeps all ('none'), products of matrices ('dots') or none ('full')."""
  if remat == 'none':
    return step
  return jax.checkpoint(step, policy=_products if remat == 'dots' else None)


def _products(primitive, *arrays, **options):
  """A policy of `jax.checkpoint`: keep products of activations and weights. It asks about `nn.dot`, which has its own
  derivative, as a whole."""
  inner = options.get('call_jaxpr')
  if inner is None:
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *arrays, **options)
  return any(equation.primitive.name == 'dot_general' and not any(equation.params['dimension_numbers'][1])
             for equation in _equations(inner.jaxpr))


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    inner = equation.params.get('jaxpr')
    yield from [equation] if inner is None else _equations(inner.jaxpr)


def bias(x: jax.Array, b: jax.Array) -> jax.Array:
  """x + b in x's dtype, b being x's last dimensions."""
  return x + jnp.expand_dims(b.astype(x.dtype), range(x.ndim - b.ndim))


def up(p: params.Tree, x_BTD: jax.Array, key: nn.Key | None, activation: str) -> jax.Array:
  """The first half of an MLP, [B, T, F]: activation(x up + up_bias)."""
  up_BTF = activate(bias(nn.dot(p['up'], x_BTD, 'BTD,DF->BTF', key), p['up_bias']), activation)
  return constrain(up_BTF, 'batch', 'length', 'mlp')


def virtual(blocks: params.Tree) -> int:
  """Positions that learned keys and values (`nn.prefixed`) take before a row's first token."""
  first = (blocks[0] if isinstance(blocks, (list, tuple)) else blocks)['attn']
  return first['prefix_k'].shape[-3] if 'prefix_k' in first else 0


def activate(x: jax.Array, activation: str) -> jax.Array:
  """'gelu_tanh' (google-research/bert), 'gelu_erf' (ELECTRA, DeBERTa, Hugging Face) or 'tanh' (poolers)."""
  if activation == 'tanh':
    return jnp.tanh(x)
  if activation == 'gelu_erf' and x.dtype == jnp.float32:  # jax.nn's is of erfc: three times the time on a CPU; in
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))  # bfloat16, where this sum would cancel, it is right
  return jax.nn.gelu(x, approximate=activation == 'gelu_tanh')
