"""One training step for every objective: exact under microbatches, data parallelism, padding and packing.

Shapes: B rows of the global batch, M microbatches. A batch is any tree of arrays whose first dimension is B.
"""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from lm import params, sharding
from lm.losses import Term

Loss = Callable[[params.Tree, Any, jax.Array | None], tuple[dict[str, Term], dict[str, Term]]]
Metrics = dict[str, jax.Array]


@struct.dataclass
class State:
  """All that training changes, and what it needs beside it.

  Attributes:
    step: int32, optimizer steps taken.
    params: the trainable leaves, f32; None where a leaf is frozen.
    frozen: the other leaves; None where trainable.
    opt_state: of the trainable leaves only.
    skipped: int32, steps whose loss or gradient was not finite and so changed nothing but `step`.
  """

  step: jax.Array
  params: params.Tree
  frozen: params.Tree
  opt_state: Any
  skipped: jax.Array


def init(specs: params.Tree, tx: optax.GradientTransformation, trainable: params.Tree, key: jax.Array) -> State:
  """Step 0; `trainable` is a tree of bools like `specs`."""
  return state_of(params.init(specs, key), tx, trainable)


def state_of(p: params.Tree, tx: optax.GradientTransformation, trainable: params.Tree) -> State:
  """Step 0 from given parameters."""
  train, frozen = params.split(p, trainable)
  return State(jnp.int32(0), train, frozen, tx.init(train), jnp.int32(0))


def shardings(specs: params.Tree, tx: optax.GradientTransformation, trainable: params.Tree, mesh: Mesh) -> State:
  """A `State` of `NamedSharding`: optimizer moments live where their parameters do."""
  shape = jax.eval_shape(lambda: init(specs, tx, trainable, jax.random.key(0)))
  return sharding.like(shape, specs, mesh)


def objective(terms: dict[str, Term], weights: dict[str, jax.Array]) -> jax.Array:
  """sum of scale * total / weight; a term of weight 0 (nothing to learn from in the batch) counts 0."""
  return sum(t.scale * _mean(t.total, weights[name]) for name, t in terms.items())


def make_step(loss: Loss, tx: optax.GradientTransformationExtraArgs, microbatches: int = 1
              ) -> Callable[[State, Any, jax.Array], tuple[State, Metrics]]:
  """step(state, batch, key) -> (state, metrics), to be jitted with the state donated.

  The key is folded with the step and the microbatch, so a resumed run draws what the straight run drew. A step whose
  objective or gradient is not finite leaves parameters and optimizer as they were; `tx` sees to that (`optim.make`): it
  is told the gradient's norm and whether all is finite.

  Metrics, f32 scalars: the loss's own (mean over the global batch), 'objective', 'grad_norm', 'skipped'.
  """
  def step(state: State, batch: Any, key: jax.Array) -> tuple[State, Metrics]:
    key = jax.random.fold_in(key, state.step)
    gradient = accumulate(lambda p, b, k: loss(params.join(p, state.frozen), b, k), microbatches)
    grads, value, metrics = gradient(state.params, batch, key)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, norm=norm, ok=finite)
    skipped = state.skipped + jnp.where(finite, 0, 1).astype(jnp.int32)
    state = State(state.step + 1, optax.apply_updates(state.params, updates), state.frozen, opt_state, skipped)
    return state, metrics | {'objective': value, 'grad_norm': norm, 'skipped': skipped.astype(jnp.float32)}
  return step


def accumulate(loss: Loss, microbatches: int):
  """gradient(params, batch, key) -> (grads, objective, metrics) of the whole batch, a microbatch in memory at a time.

  Weights are summed over the whole batch before any gradient is formed: a scan that returns only them, in which the
  compiler keeps no matmul because weights do not depend on parameters.
  """
  def one(p, batch, key, weights):
    terms, metrics = loss(p, batch, key)
    weights = {k: t.weight for k, t in terms.items()} if weights is None else weights
    return objective(terms, jax.lax.stop_gradient(weights)), metrics

  def gradient(p, batch, key):
    if microbatches == 1:
      (value, metrics), grads = jax.value_and_grad(one, has_aux=True)(p, batch, jax.random.fold_in(key, 0), None)
      return grads, value, _means(metrics)
    parts = jax.tree.map(lambda x: _microbatches(x, microbatches), batch)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(microbatches))
    per_part = jax.lax.map(lambda bk: {k: t.weight for k, t in loss(p, *bk)[0].items()}, (parts, keys))
    weights = jax.tree.map(lambda w: w.sum(0), per_part)

    def part(batch_key):
      (value, metrics), grads = jax.value_and_grad(one, has_aux=True)(p, *batch_key, weights)
      return grads, value, metrics
    shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], (parts, keys)))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (grads, value, metrics), _ = jax.lax.scan(lambda sum_, x: (jax.tree.map(jnp.add, sum_, part(x)), None), zero,
                                              (parts, keys))
    return grads, value, _means(metrics)
  return gradient


def make_eval(loss: Loss) -> Callable[..., dict[str, Term]]:
  """evaluate(params, batch, key, sums or None) -> sums of the loss's metrics so far, kept on the device."""
  def evaluate(p, batch, key, sums=None):
    metrics = loss(p, batch, key)[1]
    return metrics if sums is None else jax.tree.map(jnp.add, sums, metrics)
  return evaluate


def _means(metrics: dict[str, Term]) -> Metrics:
  return {k: _mean(t.total, t.weight) for k, t in metrics.items()}


def _mean(total, weight):
  return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


def _microbatches(x, m):
  """[B, ...] -> [M, B / M, ...], dealing rows out in turn so that each device splits its own."""
  return jnp.moveaxis(x.reshape(x.shape[0] // m, m, *x.shape[1:]), 1, 0)
