"""Autoregressive language modelling: the mean over targets of -log P(x_{t+1} | x_{<=t}), in nats a token.

Shapes: B batch, T targets a row (rows hold T + 1 ids), D embed, V vocabulary.
"""

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp

from lm import nn, params
from lm.data.packing import Batch
from lm.errors import ConfigError
from lm.kernels.cross_entropy import weighted_nll
from lm.losses import Term


@dataclasses.dataclass(frozen=True)
class Config:
  """z: coefficient of log^2 Z (PaLM §5: 1e-4). chunk: tokens whose logits exist at once. smoothing: of the targets."""

  z: float = 0.0
  chunk: int = 1024
  smoothing: float = 0.0

  def __post_init__(self):
    if not 0 <= self.z < math.inf:
      raise ConfigError(f'loss.z={self.z}; expected a finite number, at least 0')
    if self.chunk < 1:
      raise ConfigError(f'loss.chunk={self.chunk}; expected at least 1')
    if not 0 <= self.smoothing < 1:
      raise ConfigError(f'loss.smoothing={self.smoothing}; expected 0 <= smoothing < 1')


def loss(p: params.Tree, batch: Batch, key: nn.Key | None, *, apply: Callable[..., jax.Array],
         head: Callable[[params.Tree], jax.Array], c: Config) -> tuple[dict[str, Term], dict[str, Term]]:
  """Terms {'nll'}; metrics {'loss' (nll without z), 'accuracy'}.

  A position counts if its target's mask is set and input and target lie in the same segment.

  Args:
    apply: (params, ids_BT, *, positions_BT, segments_BT, key) -> x_BTD.
    head: params -> w_VD.
  """
  segments_BT, next_BT = batch.segments_BT[:, :-1], batch.segments_BT[:, 1:]
  x_BTD = apply(p, batch.ids_BT[:, :-1], positions_BT=batch.positions_BT[:, :-1], segments_BT=segments_BT, key=key)
  weights_BT = (batch.mask_BT[:, 1:] & (segments_BT == next_BT) & (next_BT > 0)).astype(jnp.float32)
  weight = weights_BT.sum()
  total, nll, correct = weighted_nll(x_BTD, head(p), batch.ids_BT[:, 1:], weights_BT, c.chunk, c.z,
                                     smoothing=c.smoothing)
  return {'nll': Term(total, weight)}, {'loss': Term(nll, weight), 'accuracy': Term(correct, weight)}
