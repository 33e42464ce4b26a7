"""Objectives: each is `loss(params, batch, key) -> (terms, metrics)` once its model and settings are bound.

`terms` maps a name to a `Term`; the quantity minimised is the sum over terms of scale * total / weight, where total and
weight are summed over the whole global batch first (all microbatches, all devices). Weights must not depend on
parameters. `metrics` maps a name to a `Term` too: reported as total / weight, never differentiated.
"""

from flax import struct
import jax


@struct.dataclass
class Term:
  """A weighted sum: `total` (f32 scalar) over `weight` (f32 scalar, >= 0), times `scale` in the objective."""

  total: jax.Array
  weight: jax.Array
  scale: float = struct.field(pytree_node=False, default=1.0)
