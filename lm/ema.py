"""An exponential moving average of the parameters, kept beside any optimizer.

Averaged iterates have less of the noise that the last one has (Polyak & Juditsky, SIAM J. Control Optim. 30(4), 1992);
here, as in arXiv:1703.01780, the average forgets, and so needs no step to begin at. (The mean of the last checkpoints,
arXiv:1706.03762 §6.1, is another thing.) It is part of the optimizer's state, so that sharding, checkpoints, resuming
and the counting of bytes follow.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm import params

PATH = 'opt_state/average'  # of the average in a checkpoint's tree


class State(NamedTuple):
  """average: like the parameters that train, f32. inner: of the optimizer."""

  average: params.Tree
  inner: Any


def wrap(tx: optax.GradientTransformationExtraArgs, decay: float) -> optax.GradientTransformationExtraArgs:
  """`tx`, and after each of its updates e <- decay * e + (1 - decay) * p of every parameter p.

  e starts as the parameters do, and nothing corrects for that: after n updates decay**n of the start is left in it.
  Where the bool scalar `ok` is False, e stays. A step goes through memory for e alone, and where the compiler does not
  write both in one loop (XLA's on a CPU) for p once more.
  """
  def init(tree):
    return State(jax.tree.map(jnp.copy, tree), tx.init(tree))  # copies: a step donates both

  def update(grads, state, tree, *, norm=None, ok=None):
    updates, inner = tx.update(grads, state.inner, tree, norm=norm, ok=ok)

    def average(e, p, u):
      new = decay * e + (1 - decay) * (p + u)
      return new if ok is None else jnp.where(ok, new, e)
    return updates, State(jax.tree.map(average, state.average, tree, updates), inner)
  return optax.GradientTransformationExtraArgs(init, update)


def of(opt_state: Any) -> params.Tree | None:
  """The average in an optimizer's state; None where it keeps none."""
  return opt_state.average if isinstance(opt_state, State) else None
