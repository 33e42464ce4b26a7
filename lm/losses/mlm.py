"""Masked language modelling: the mean over chosen tokens of -log P(original | corrupted row), in nats a token.

The row is corrupted, not emptied: some of the chosen tokens stay, and are predicted all the same (arXiv:1810.04805).
Shapes: B batch, T tokens a row, P predictions a row, D encoder, E embedding, V vocabulary.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

from lm import nn, params
from lm.data import masking
from lm.data.inputs import Inputs
from lm.errors import ConfigError
from lm.kernels.cross_entropy import weighted_nll
from lm.losses import Term

Terms = dict[str, Term]


@dataclasses.dataclass(frozen=True)
class Config(masking.Config):
  """chunk: tokens whose logits exist at once."""

  chunk: int = 1024

  def __post_init__(self):
    super().__post_init__()
    if self.chunk < 1:
      raise ConfigError(f'loss.chunk={self.chunk}; expected at least 1')


def loss(p: params.Tree, inputs: Inputs, key: nn.Key | None, *, apply: Callable[..., jax.Array],
         head: Callable[..., tuple[jax.Array, jax.Array, jax.Array | None]], c: Config, tokens: masking.Tokens,
         nsp: Callable[[params.Tree, jax.Array], jax.Array] | None = None) -> tuple[Terms, Terms]:
  """Terms {'nll'}; metrics {'loss', 'accuracy'}; with `nsp` also 'nsp' and {'nsp_loss', 'nsp_accuracy'}.

  Args:
    apply: (params, ids_BT, *, positions_BT, segments_BT, types_BT, key) -> x_BTD.
    head: (params, x_BPD) -> (y_BPE, w_VE, bias_V or None); logits are y w^T + bias, formed in chunks.
    nsp: (params, x_BTD) -> logits_B2 of 'B follows A' and 'B is random'; rows of one segment do not count.
  """
  mask_key, key = nn.fold(key, 0), nn.fold(key, 1)
  masked = masking.corrupt(inputs, mask_key, c, tokens)
  x_BTD = apply(p, masked.ids_BT, positions_BT=inputs.positions_BT, segments_BT=inputs.segments_BT,
                types_BT=inputs.types_BT, key=key)
  y_BPE, w_VE, bias_V = head(p, masking.gather(x_BTD, masked.positions_BP))
  total, nll, correct = weighted_nll(y_BPE, w_VE, masked.targets_BP, masked.weights_BP, c.chunk, bias_V=bias_V)
  weight = masked.weights_BP.sum()
  terms, metrics = {'nll': Term(total, weight)}, {'loss': Term(nll, weight), 'accuracy': Term(correct, weight)}
  if nsp is not None:
    terms['nsp'], metrics['nsp_accuracy'] = _next_sentence(nsp(p, x_BTD).astype(jnp.float32), inputs)
    metrics['nsp_loss'] = terms['nsp']
  return terms, metrics


def _next_sentence(logits_B2, inputs):
  weights_B = (inputs.types_BT > 0).any(1).astype(jnp.float32)
  label_B = inputs.random_B.astype(jnp.int32)
  nll_B = -jnp.take_along_axis(jax.nn.log_softmax(logits_B2), label_B[:, None], axis=1)[:, 0]
  right_B = logits_B2.argmax(1) == label_B
  return Term((weights_B * nll_B).sum(), weights_B.sum()), Term((weights_B * right_B).sum(), weights_B.sum())
