"""One training step for every objective: exact under microbatches, data parallelism, padding and packing.

Shapes: B rows of the global batch, M microbatches. A batch is any tree of arrays whose first dimension is B. On a mesh
a `lm.parallel.Layout` says how rows are spread and sums taken.
"""

from collections.abc import Callable, Iterable
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from lm import ema, nn, parallel, params, sharding, spikes
from lm.losses import Term

Loss = Callable[[params.Tree, Any, nn.Key | None], tuple[dict[str, Term], dict[str, Term]]]
Metrics = dict[str, jax.Array]
Norm = Callable[[params.Tree, Any], jax.Array]  # of the gradients, given the optimizer's state


@struct.dataclass
class State:
  """All that training changes, and what it needs beside it.

  Attributes:
    step: int32, optimizer steps taken.
    params: the trainable leaves, f32; None where a leaf is frozen.
    frozen: the other leaves; None where trainable.
    opt_state: of the trainable leaves only.
    skipped: int32, steps whose loss or gradient was not finite, or a spike, or whose batch had no targets, and that so
      changed nothing but `step`.
    carry: what a task's steps hand on to each other besides, such as a coefficient that adapts; None = nothing.
  """

  step: jax.Array
  params: params.Tree
  frozen: params.Tree
  opt_state: Any
  skipped: jax.Array
  carry: Any = None


def init(specs: params.Tree, tx: optax.GradientTransformation, trainable: params.Tree, key: jax.Array,
         carry: Any = None) -> State:
  """Step 0; `trainable` is a tree of bools like `specs`."""
  return state_of(params.init(specs, key), tx, trainable, carry)


def state_of(p: params.Tree, tx: optax.GradientTransformation, trainable: params.Tree, carry: Any = None
             ) -> State:
  """Step 0 from given parameters."""
  train, frozen = params.split(p, trainable)
  return State(jnp.int32(0), train, frozen, tx.init(train), jnp.int32(0), jax.tree.map(jnp.float32, carry))


def averaged(state: State) -> params.Tree:
  """All leaves as evaluation and export read them: those that train averaged, where the optimizer keeps an average."""
  average = ema.of(state.opt_state)
  return params.join(state.params if average is None else average, state.frozen)


def whole(state: State) -> params.Tree:
  """All leaves as the last step left them."""
  return params.join(state.params, state.frozen)


def shardings(specs: params.Tree, tx: optax.GradientTransformation, trainable: params.Tree, mesh: Mesh, zero: int = 3,
              carry: Any = None) -> State:
  """A `State` of `NamedSharding`: optimizer moments live where their parameters do, but are divided over fsdp even
  where those are only from ZeRO's stage 3 on."""
  shape = jax.eval_shape(lambda: init(specs, tx, trainable, jax.random.key(0), carry))
  train, frozen = params.split(sharding.shardings(specs, mesh, fsdp=zero == 3), trainable)
  return sharding.like(shape, specs, mesh).replace(params=train, frozen=frozen)


def objective(terms: dict[str, Term], weights: dict[str, jax.Array]) -> jax.Array:
  """sum of scale * total / weight; a term of weight 0 (nothing to learn from in the batch) counts 0."""
  return sum(t.scale * _mean(t.total, weights[name]) for name, t in terms.items())


def make_step(loss: Loss, tx: optax.GradientTransformationExtraArgs, microbatches: int = 1,
              layout: parallel.Layout = parallel.ALONE, norm_of: Norm = lambda grads, _: optax.tree.norm(grads)
              ) -> Callable[[State, Any, jax.Array], tuple[State, Metrics]]:
  """step(state, batch, key) -> (state, metrics), to be jitted with the state donated.

  The key is folded with the step, and for each row with its number in the batch: a resumed run draws what the straight
  run drew, and neither microbatches nor the mesh change it. A step whose objective or gradient is not finite, or a
  spike where `tx` looks for them (`lm.spikes`), or whose batch has nothing to learn from leaves parameters and
  optimizer as they were; `tx` sees to that (`optim.make`): it is told the gradient's norm and whether the step
  counts. `norm_of` gives that norm, see `optim.gradient_norm`.

  Metrics, f32 scalars: the loss's own (mean over the global batch), 'targets' (the weights of its terms, added),
  'objective', 'grad_norm', 'skipped'.
  """
  gradient = accumulate(loss, microbatches, layout)

  def step(state: State, batch: Any, key: jax.Array) -> tuple[State, Metrics]:
    key = jax.random.fold_in(key, state.step)
    grads, value, metrics = gradient(state.params, batch, key, state.frozen)
    norm = norm_of(grads, state.opt_state)
    some = metrics['targets'] > 0
    ok = some & jnp.isfinite(value) & jnp.isfinite(norm) & spikes.usual(state.opt_state, value, norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, norm=norm, ok=ok)
    skipped = state.skipped + jnp.where(ok, 0, 1).astype(jnp.int32)
    state = state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates),
                          opt_state=spikes.note(opt_state, jnp.where(some, value, jnp.nan), norm), skipped=skipped)
    return state, metrics | {'objective': value, 'grad_norm': norm, 'skipped': skipped.astype(jnp.float32)}
  return step


def accumulate(loss: Loss, microbatches: int = 1, layout: parallel.Layout = parallel.ALONE):
  """gradient(params, batch, key, frozen=None) -> (grads, objective, metrics) of the batch, a microbatch at a time.

  Weights are summed over the whole batch before any gradient is formed: a scan that returns only them, in which the
  compiler keeps no matmul because weights do not depend on parameters.
  """
  def terms_of(p, frozen, batch, key):
    return loss(layout.gather(p if frozen is None else params.join(p, frozen)), batch, key)

  def one(p, frozen, batch, key, weights):
    terms, metrics = terms_of(p, frozen, batch, key)
    weights = layout.total({k: t.weight for k, t in terms.items()}) if weights is None else weights
    targets = Term(sum(weights.values()), jnp.float32(1))  # of the whole batch, and so the mean of all parts
    return objective(terms, jax.lax.stop_gradient(weights)), metrics | {'targets': targets}
  value_and_grad = jax.value_and_grad(one, has_aux=True)

  def gradient(p, frozen, batch, key, rows_B):
    if microbatches == 1:
      sums, grads = value_and_grad(p, frozen, batch, nn.Keys(key, rows_B), None)
      grads = layout.each(grads)
    else:
      parts, rows_MB = jax.tree.map(lambda x: _microbatches(x, microbatches), (batch, rows_B))
      weigh = lambda part: {k: t.weight for k, t in terms_of(p, frozen, part[0], nn.Keys(key, part[1]))[0].items()}
      weights = layout.total(jax.tree.map(lambda w: w.sum(0), jax.lax.map(weigh, (parts, rows_MB))))

      def of(part):
        sums, grads = value_and_grad(p, frozen, part[0], nn.Keys(key, part[1]), weights)
        return sums, layout.each(grads)
      shapes = jax.eval_shape(of, jax.tree.map(lambda x: x[0], (parts, rows_MB)))
      zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
      (sums, grads), _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, of(part)), None), zero,
                                      (parts, rows_MB))
    value, metrics = layout.total(sums)
    return layout.last(grads), (value, _means(metrics))
  whole = layout.spread(gradient, gradient=True)

  def of_batch(p, batch, key, frozen=None):
    grads, (value, metrics) = whole(p, frozen, batch, key)
    return grads, value, metrics
  return of_batch


def make_eval(loss: Loss, layout: parallel.Layout = parallel.ALONE) -> Callable[..., dict[str, Term]]:
  """evaluate(params, batch, key) -> sums of the loss's metrics over the batch; those of several: `summed`."""
  def metrics(p, frozen, batch, key, rows_B):
    del frozen
    return layout.total(loss(layout.gather(p), batch, None if key is None else nn.Keys(key, rows_B))[1])
  spread = layout.spread(metrics, gradient=False)

  return lambda p, batch, key: spread(p, None, batch, key)


def summed(parts: Iterable[Any]) -> Any:
  """The sum of trees of arrays, kept on the device."""
  return functools.reduce(_added, parts)


@jax.jit
def _added(a, b):
  return jax.tree.map(jnp.add, a, b)


def _means(metrics: dict[str, Term]) -> Metrics:
  return {k: _mean(t.total, t.weight) for k, t in metrics.items()}


def _mean(total, weight):
  return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


def _microbatches(x, m):
  """[B, ...] -> [M, B / M, ...], dealing rows out in turn so that each device splits its own."""
  return jnp.moveaxis(x.reshape(x.shape[0] // m, m, *x.shape[1:]), 1, 0)
