"""Muon (K. Jordan et al., 2024) for the matrices of stacked blocks, beside another optimizer for all else.

Update sizes match AdamW's (arXiv:2502.16982 §2.2), so that both take the same rate. Orthogonalisation is optax's.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm import params
from lm.errors import ConfigError


def matrices(specs: dict[str, Any]) -> dict[str, optax.contrib.MuonDimensionNumbers]:
  """Of {path: Spec}, those for Muon: matrices of stacked layers that read from or write to the residual stream
  ('embed').

  Heads and head_dim count as one axis; layers are orthogonalised one by one.

  Raises:
    ConfigError: there is none.
  """
  found = {}
  for path, spec in specs.items():
    axes = [i for i, axis in enumerate(getattr(spec, 'axes', ())) if axis != 'layers']
    if len(axes) < 2 or len(axes) == len(spec.axes):
      continue
    if spec.axes[axes[0]] == 'embed':
      found[path] = optax.contrib.MuonDimensionNumbers(tuple(axes[:1]), tuple(axes[1:]))
    elif spec.axes[axes[-1]] == 'embed':
      found[path] = optax.contrib.MuonDimensionNumbers(tuple(axes[:-1]), tuple(axes[-1:]))
  if not found:
    raise ConfigError("optim.name: 'muon', but no leaf is a matrix of stacked layers with an 'embed' axis; "
                      'give `make` the Specs, or choose adamw')
  return found


def make(rate: Callable[[jax.Array], jax.Array], weight_decay: float, decays: Callable[[str], bool],
         factor: Callable[[str], Any], mine: dict[str, optax.contrib.MuonDimensionNumbers],
         others: optax.GradientTransformationExtraArgs, clip: Callable[[params.Tree, jax.Array], Callable[[str], Any]]
         ) -> optax.GradientTransformationExtraArgs:
  """Muon for the leaves of `mine`, see `matrices`, `others` for all else; both see the gradient clipped as a whole.

  Args:
    rate: updates made before -> learning rate.
    decays: whether a path has `weight_decay`. factor: of its rate.
    others: takes `norm` and `ok` as this does, see `optim.make`.
    clip: (gradients, their global norm) -> (path -> what to multiply its gradient by).
  """
  muon = optax.contrib.muon(
      rate, weight_decay=weight_decay, consistent_rms=0.2,
      weight_decay_mask=lambda tree: params.map_with_path(lambda path, _: decays(path), tree),
      muon_weight_dimension_numbers=lambda tree: params.map_with_path(lambda path, _: mine[path], tree))
  halves = lambda tree: params.split(tree, params.map_with_path(lambda path, _: path in mine, tree))

  def init(tree):
    my_tree, rest = halves(tree)
    return {'muon': muon.init(my_tree), 'adam': others.init(rest)}

  def update(grads, state, tree, *, norm=None, ok=None):
    norm = optax.tree.norm(grads) if norm is None else norm
    scale = clip(grads, norm)
    (my_grads, rest_grads), (my_tree, rest) = halves(grads), halves(tree)
    updates, new = muon.update(params.map_with_path(lambda path, g: scale(path) * g, my_grads), state['muon'], my_tree)
    updates = params.map_with_path(lambda path, u: factor(path) * u, updates)
    if ok is not None:
      updates = jax.tree.map(lambda u: jnp.where(ok, u, jnp.zeros_like(u)), updates)
      new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, state['muon'])
    rest_updates, others_state = others.update(rest_grads, state['adam'], rest, norm=norm, ok=ok)
    return params.join(updates, rest_updates), {'muon': new, 'adam': others_state}
  return optax.GradientTransformationExtraArgs(init, update)
