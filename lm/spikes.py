"""Steps that are left out because their loss or gradient is far above what it was: a record beside any optimizer.

A bad batch at a bad moment can raise the loss for many steps; PaLM's run had about 20 such spikes (arXiv:2204.02311
§5.1). Leaving the step out is cheap and needs nobody to look; that paper's own remedy, to go back and leave batches
out, is `run.Config.skip_batches`. W is the record's length.
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax


@struct.dataclass
class State:
  """What is kept beside the optimizer's state.

  Attributes:
    recent_2W: f32, losses and gradient norms of the last steps, the oldest overwritten.
    seen: int32, finite steps so far.
    inner: the optimizer's state.
    sigma: the bound; not part of checkpoints.
  """

  recent_2W: jax.Array
  seen: jax.Array
  inner: Any
  sigma: float = struct.field(pytree_node=False)


def wrap(tx: optax.GradientTransformationExtraArgs, sigma: float, window: int
         ) -> optax.GradientTransformationExtraArgs:
  """`tx` with a record of `window` steps in its state, which `usual` reads and `note` writes."""
  def init(tree):
    return State(jnp.zeros((2, window), jnp.float32), jnp.int32(0), tx.init(tree), sigma)

  def update(grads, state, tree, *, norm=None, ok=None):
    updates, inner = tx.update(grads, state.inner, tree, norm=norm, ok=ok)
    return updates, state.replace(inner=inner)
  return optax.GradientTransformationExtraArgs(init, update)


def usual(opt_state: Any, loss: jax.Array, norm: jax.Array) -> jax.Array:
  """Bool scalar: is neither scalar above mean + sigma * std of the record?

  True until half of the record is filled, and where the optimizer keeps none.
  """
  state = _find(opt_state)
  if state is None:
    return jnp.bool_(True)
  window = state.recent_2W.shape[1]
  count = jnp.minimum(state.seen, window)
  there_W = jnp.arange(window) < count
  mean_2 = jnp.sum(state.recent_2W, 1, where=there_W[None]) / jnp.maximum(count, 1)
  square_2 = jnp.sum((state.recent_2W - mean_2[:, None])**2, 1, where=there_W[None])
  limit_2 = mean_2 + state.sigma * jnp.sqrt(square_2 / jnp.maximum(count - 1, 1))
  return (2 * state.seen < window) | jnp.all(jnp.stack([loss, norm]) <= limit_2)


def note(opt_state: Any, loss: jax.Array, norm: jax.Array) -> Any:
  """The optimizer's state with this step in its record, if it keeps one and both are finite.

  A step that was left out counts too: what has risen for good is usual after a few steps (three or four of the default
  128 and 6 sigma).
  """
  if isinstance(opt_state, State):
    seen, window = opt_state.seen, opt_state.recent_2W.shape[1]
    new_2 = jnp.stack([loss, norm])
    finite = jnp.isfinite(new_2).all()
    recent_2W = jnp.where(finite & (jnp.arange(window) == seen % window)[None], new_2[:, None], opt_state.recent_2W)
    return opt_state.replace(recent_2W=recent_2W, seen=seen + finite.astype(jnp.int32))
  return opt_state._replace(inner=note(opt_state.inner, loss, norm)) if hasattr(opt_state, 'inner') else opt_state


def _find(opt_state):
  while opt_state is not None and not isinstance(opt_state, State):
    opt_state = getattr(opt_state, 'inner', None)
  return opt_state
