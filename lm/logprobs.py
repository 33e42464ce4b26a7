"""What a model says of given tokens, for preference and policy losses, their references and rollouts.

Shapes: B rows, T targets a row (rows hold T + 1 ids), D embed, V vocabulary. Column t scores token t + 1.
"""

from collections.abc import Callable

from flax import struct
import jax
import jax.numpy as jnp

from lm import nn, params
from lm.data.packing import Batch
from lm.kernels.cross_entropy import token_logprobs


@struct.dataclass
class Scores:
  """Of the targets of a batch; f32.

  Attributes:
    logprobs_BT: nats; 0 where weights are.
    weights_BT: 1 at a target, else 0; no function of parameters.
    entropies_BT: nats, of the distribution that the target is scored by, 0 where weights are; None if not asked for.
  """

  logprobs_BT: jax.Array
  weights_BT: jax.Array
  entropies_BT: jax.Array | None = None

  @property
  def row_B(self) -> jax.Array:
    """Log-probability of each row's targets together, f32: a sum, 0 where there are none."""
    return self.logprobs_BT.sum(1)

  @property
  def count_B(self) -> jax.Array:
    """Targets of each row, f32."""
    return self.weights_BT.sum(1)


def score(p: params.Tree, batch: Batch, key: nn.Key | None, *, apply: Callable[..., jax.Array],
          head: Callable[[params.Tree], jax.Array], chunk: int = 1024, temperature: float = 1.0, entropy: bool = False,
          start: int = 0) -> Scores:
  """The targets, as `lm.losses.ar.loss` counts them: the mask is set, and input and target lie in the same segment.

  Args:
    apply: (params, ids_BT, *, positions_BT, segments_BT, key) -> x_BTD.
    head: params -> w_VD.
    chunk: tokens whose logits exist at once.
    temperature: > 0, divides the logits: that of the sampler where its samples are scored.
    entropy: also return entropies.
    start: no target lies before this column, as where prompts are that wide.
  """
  segments_BT, next_BT = batch.segments_BT[:, :-1], batch.segments_BT[:, 1:]
  x_BTD = apply(p, batch.ids_BT[:, :-1], positions_BT=batch.positions_BT[:, :-1], segments_BT=segments_BT, key=key)
  counts_BT = batch.mask_BT[:, 1:] & (segments_BT == next_BT) & (next_BT > 0)
  logprobs_BT, entropies_BT = token_logprobs(x_BTD, head(p), batch.ids_BT[:, 1:], chunk, None, temperature, entropy,
                                             start)
  counted = lambda x_BT: None if x_BT is None else jnp.where(counts_BT, x_BT, 0.0)
  return Scores(counted(logprobs_BT), counts_BT.astype(jnp.float32), counted(entropies_BT))
