"""Mixout (arXiv:1909.11299): fine-tuning in which weights fall back to the pretrained ones at random.

Each step, all that leads out of an input of a matrix in the pretrained blocks is the pretrained one with probability p;
the whole is then moved so that its expectation is the current weight:

  ((1 - m) w + m w0 - p w0) / (1 - p),    m ~ Bernoulli(p) for each input

With w0 = 0 it is dropout; here w0 is where training began, towards which it regularises. The gradient is that of the
formula, (1 - m) / (1 - p); the authors' code leaves out 1 / (1 - p), which Adam hardly sees. A weight becomes a node
`Mixed` that holds w and w0, and w0 is a frozen leaf: in memory, but not in checkpoints. Masks are drawn once a step,
layer and weight for the whole batch: they know neither microbatches nor meshes, and all uses of a weight agree.
"""

import zlib

import jax
import jax.numpy as jnp

from lm import nn, params
from lm.models import blocks
from lm.peft_nodes import Mixed

FROZEN = r'^blocks/.*/base$'  # paths of the pretrained weights


def specs(rate: float, base: params.Tree) -> params.Tree:
  """The specs of a model, `base`, whose blocks' matrices (stacked; biases and norms are none) are `Mixed`."""
  def node(path, s):
    if len(s.shape) < 3 or path.endswith('bias'):
      return s
    return Mixed(s, s, rate, 1 if len(s.shape) == 3 or s.axes[1] == 'embed' else len(s.shape) - 2)
  return base | {'blocks': params.map_with_path(node, base['blocks'])}


def stack(inner: blocks.Stack) -> blocks.Stack:
  """`inner`, whose blocks see arrays where the tree has `Mixed`: mixed with a layer's key, w without one."""
  def run(stacked, step, *args, **options):
    return inner.run(stacked, lambda layer, x_BTD, rows, key: step(mix(layer, key), x_BTD, rows, key), *args, **options)
  return blocks.Stack(run, lambda stacked, i, key=None: mix(inner.layer(stacked, i), key))


def mix(layer: params.Tree, key: nn.Key | None) -> params.Tree:
  """The parameters of one layer for one step, f32 where they are mixed."""
  def one(key_path, node):
    if not isinstance(node, Mixed):
      return node
    if key is None:
      return node.w
    own = jax.random.fold_in(nn.shared(key), zlib.crc32(params.path_of(key_path).encode()))
    w, base = node.w.astype(jnp.float32), node.base.astype(jnp.float32)
    rows = (*w.shape[:node.inputs], *(1,) * (w.ndim - node.inputs))
    fallen = jnp.broadcast_to(jax.random.bernoulli(own, node.rate, rows), w.shape)
    return (jnp.where(fallen, base, w) - node.rate * base) / (1 - node.rate)
  return jax.tree_util.tree_map_with_path(one, layer, is_leaf=lambda x: isinstance(x, Mixed))
