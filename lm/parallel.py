"""Training on a mesh: who computes which rows, and everything that is sent over the axes data, fsdp and pipe.

The loss and gradient of a step run inside one `shard_map` that takes these three axes in hand, so that their traffic
is what is written here: weights gathered over fsdp layer by layer (ZeRO-3, arXiv:1910.02054), gradients summed once
after the last microbatch, activations passed on between stages (`lm.pipeline`). The axis tensor is left to the
compiler, which divides matrices as the logical axes say. Outside the blocks pipe is one more axis of the batch.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lm import params, pipeline, sharding
from lm.models import blocks


class Layout(NamedTuple):
  """How a gradient is taken where its rows are spread over devices; `ALONE` is where they are not.

  Attributes:
    gather: parameters as stored -> what a loss takes; whole, but for the blocks, which `stack` gathers.
    total: sums over all rows of the batch from sums over those at hand.
    each, last: gradients of a microbatch, of all of them -> as they are kept, as they leave.
    spread: f(params, frozen, batch, key, rows_B) -> the same without rows_B for whole arrays; `gradient` says that f
      returns (gradients, sums) and not just sums.
  """

  gather: Callable[[params.Tree], params.Tree]
  total: Callable[[Any], Any]
  each: Callable[[params.Tree], params.Tree]
  last: Callable[[params.Tree], params.Tree]
  spread: Callable[..., Callable[..., Any]]


def _alone(f, gradient):
  del gradient
  return lambda p, frozen, batch, key: f(p, frozen, batch, key, jnp.arange(jax.tree.leaves(batch)[0].shape[0]))


ALONE = Layout(lambda p: p, lambda x: x, lambda g: g, lambda g: g, _alone)


def layout(mesh: Mesh, c: sharding.Config, specs: params.Tree, trainable: params.Tree) -> Layout:
  """The layout of `c` on its mesh for parameters of `specs`, of which `trainable` (a tree of bools) have gradients."""
  if mesh.size == mesh.shape['tensor']:
    return ALONE
  stored = jax.tree.map(lambda s: manual(s, c.zero == 3), specs)
  divided = jax.tree.map(lambda s: manual(s, True), specs)

  def gather(p):
    whole = lambda w, s: w if s.axes[:1] == ('layers',) else _gather(w, s.axes, w.dtype)
    return jax.tree.map(whole, p, specs) if c.zero == 3 else p

  def scatter(stage):
    """Sums over fsdp, of which a device keeps its part, at ZeRO's `stage`; in stage 3 the blocks have done so."""
    one = lambda s, g: None if g is None else _scatter(g, s.axes)
    return lambda grads: jax.tree.map(one, specs, grads) if c.zero == stage else grads

  def last(grads):
    leaves, treedef = jax.tree.flatten(scatter(1)(grads))
    places = jax.tree.leaves(params.split(divided, trainable)[0])
    axes = [tuple(a for a in sharding.ROWS if a not in jax.tree.leaves(tuple(at))) for at in places]
    for group in set(axes):  # one sum of many arrays
      mine = [i for i, a in enumerate(axes) if a == group]
      for i, g in zip(mine, jax.lax.psum([leaves[i] for i in mine], group), strict=True):
        leaves[i] = g
    return treedef.unflatten(leaves)

  def spread(f, gradient):
    rows, same = PartitionSpec(sharding.ROWS), PartitionSpec()
    outs = (params.split(divided, trainable)[0], same) if gradient else same
    halves = params.split(stored, trainable)

    def whole(p, frozen, batch, key):
      ins = (*halves, rows, same, rows) if frozen is not None else (stored, None, rows, same, rows)
      inside = jax.shard_map(_ruled(f, c), mesh=mesh, axis_names=set(sharding.ROWS), in_specs=ins, out_specs=outs,
                             check_vma=False)
      return inside(p, frozen, batch, key, jnp.arange(jax.tree.leaves(batch)[0].shape[0]))
    return whole
  return Layout(gather, lambda x: jax.lax.psum(x, sharding.ROWS), scatter(2), last, spread)


def stack(c: sharding.Config, specs: params.Tree, dtype: str) -> blocks.Stack:
  """How a model whose blocks have `specs` (stacked) runs them inside a layout's `spread`; f32 weights go as `dtype`.

  A list of layers has been gathered as a whole by `Layout.gather`.
  """
  gathers = c.fsdp > 1 and c.zero == 3 and not isinstance(specs, list)
  if not gathers and c.pipe == 1:
    return blocks.LOCAL

  def whole(layer):  # without its dimension 'layers'
    return jax.tree.map(lambda w, s: _gather(w, s.axes[1:], dtype if w.ndim > 1 else w.dtype), layer,
                        specs) if gathers else layer

  def run(stacked, step, x_BTD, rows, key, *, remat, **options):
    def gathered(layer, *rest):
      return step(whole(layer), *rest)
    if remat == 'none':  # keep everything but weights, which would otherwise all be here before the backward pass
      gathered = jax.checkpoint(gathered, policy=_all_but_gathered)
    return blocks.run(stacked, gathered, x_BTD, rows, key, remat=remat, **options)

  if c.pipe == 1:
    return blocks.Stack(run, lambda stacked, i, key=None: whole(blocks.layer(stacked, i)))

  def pipelined(stacked, *args, **options):
    # Once a step and not at every tick; as f32, in which the ring sums gradients.
    stacked = jax.tree.map(lambda w, s: _gather(w, s.axes, w.dtype), stacked, specs) if gathers else stacked
    return pipeline.run(stacked, *args, **options, microbatches=c.stage_microbatches, rounds=c.rounds)
  return blocks.Stack(pipelined, lambda stacked, i, key=None: whole(pipeline.layer(stacked, i)))


def manual(spec: params.Spec, fsdp: bool) -> PartitionSpec:
  """Where a parameter's dimensions lie on the axes that are taken in hand."""
  found = sharding.partition(spec.axes, fsdp)
  return PartitionSpec(*(a if a in sharding.ROWS else None for a in found))


def _gather(w, axes, dtype):
  return _gathered(w, axes, dtype) if 'fsdp' in sharding.partition(axes) else w


def _all_but_gathered(primitive, *unused, **options):
  """A policy of `jax.checkpoint`, which asks about `_gathered` as a whole."""
  del primitive, unused
  inner = options.get('call_jaxpr')
  return inner is None or all(equation.primitive.name != 'shard_map' for equation in inner.jaxpr.eqns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(w, axes, dtype):
  dimension = sharding.partition(axes).index('fsdp')
  return _by_part(lambda w: jax.lax.all_gather(w.astype(dtype), 'fsdp', axis=dimension, tiled=True), axes)(w)


def _gathered_backward(axes, dtype, residual, g):
  """Gradients are summed as f32 whatever the weights went as."""
  del dtype, residual
  return (_scatter(g.astype(jnp.float32), axes),)


_gathered.defvjp(lambda w, axes, dtype: (_gathered(w, axes, dtype), None), _gathered_backward)


def _scatter(g, axes):
  """The sum over fsdp, of which a device keeps its part."""
  if 'fsdp' not in sharding.partition(axes):
    return g
  dimension = sharding.partition(axes).index('fsdp')
  return _by_part(lambda g: jax.lax.psum_scatter(g, 'fsdp', scatter_dimension=dimension, tiled=True), axes)(g)


def _by_part(f, axes):
  """f on each device's part over tensor; left to the compiler, parts would be gathered first, and sent whole."""
  place = PartitionSpec(*(axis if axis == 'tensor' else None for axis in sharding.partition(axes)))
  return jax.shard_map(f, mesh=jax.sharding.get_abstract_mesh(), axis_names={'tensor'}, in_specs=place,
                       out_specs=place, check_vma=False)


def _ruled(f, c):
  """f with the logical rules that are left inside."""
  def inside(*args):
    with sharding.rules(c.sequence, inside=True):
      return f(*args)
  return inside
