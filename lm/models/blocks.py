"""What the blocks of every encoder share: running all of them, adding biases, activations.

Shapes: B batch, T length, D embed; parameters of the L blocks are stacked.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm import params


def run(blocks: params.Tree, step: Callable[[params.Tree, jax.Array, jax.Array | None], jax.Array], x_BTD: jax.Array,
        key: jax.Array | None, *, scan_layers: bool, remat: str) -> jax.Array:
  """All L blocks in order: x = step(layer, x, key of that layer), scanned or unrolled.

  Args:
    blocks: a stacked tree, or a list of per-layer trees (`params.unstack`), which is never scanned.
    remat: what a block recomputes in the backward pass, 'none', 'dots' or 'full'.
  """
  layer_step = lambda layer, x, i: step(layer, x, fold(key, i))
  if remat != 'none':
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == 'dots' else None
    layer_step = jax.checkpoint(layer_step, policy=policy)
  layers = blocks if isinstance(blocks, (list, tuple)) else None
  if scan_layers and layers is None:
    count = jax.tree.leaves(blocks)[0].shape[0]
    return jax.lax.scan(lambda x, li: (layer_step(li[0], x, li[1]), None), x_BTD, (blocks, jnp.arange(count)))[0]
  for i, layer in enumerate(params.unstack(blocks) if layers is None else layers):
    x_BTD = layer_step(layer, x_BTD, jnp.int32(i))
  return x_BTD


def fold(key: jax.Array | None, i: int | jax.Array) -> jax.Array | None:
  return None if key is None else jax.random.fold_in(key, i)


def bias(x: jax.Array, b: jax.Array) -> jax.Array:
  """x + b in x's dtype, b being x's last dimensions."""
  return x + jnp.expand_dims(b.astype(x.dtype), range(x.ndim - b.ndim))


def activate(x: jax.Array, activation: str) -> jax.Array:
  """'gelu_tanh' (google-research/bert), 'gelu_erf' (ELECTRA, DeBERTa, Hugging Face) or 'tanh' (poolers)."""
  return jnp.tanh(x) if activation == 'tanh' else jax.nn.gelu(x, approximate=activation == 'gelu_tanh')
