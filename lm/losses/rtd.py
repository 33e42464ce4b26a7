"""Replaced token detection (ELECTRA, arXiv:2003.10555; DeBERTa-v3, arXiv:2111.09543): a small generator learns masked
language modelling and fills the masks with what it draws; the discriminator tells which tokens it replaced.

The generator is trained by likelihood, not against the discriminator: nothing flows back through the drawn tokens.
Shapes: B batch, T tokens a row, P predictions a row, D generator, E embedding, V vocabulary.
"""

from collections.abc import Callable
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from lm import nn, params
from lm.data import masking
from lm.data.inputs import Inputs
from lm.errors import ConfigError
from lm.kernels import cross_entropy
from lm.losses import Term

Terms = dict[str, Term]


@dataclasses.dataclass(frozen=True)
class Config(masking.Config):
  """ELECTRA's masks; DeBERTa-v3 has mask=1, counts='bert', weight=10 (its code; 50 in the paper).

  Attributes:
    weight: of the discriminator's loss; the generator's has 1.
    chunk: tokens whose logits exist at once.
  """

  mask: float = 0.85
  random: float = 0.0
  counts: Literal['bert', 'roberta', 'electra'] = 'electra'
  weight: float = 50.0
  chunk: int = 1024

  def __post_init__(self):
    super().__post_init__()
    if self.weight < 0:
      raise ConfigError(f'loss.weight={self.weight}; expected at least 0')
    if self.chunk < 1:
      raise ConfigError(f'loss.chunk={self.chunk}; expected at least 1')


def loss(p: params.Tree, inputs: Inputs, key: nn.Key | None, *, apply: Callable[..., jax.Array],
         head: Callable[..., tuple[jax.Array, jax.Array, jax.Array | None]], discriminate: Callable[..., jax.Array],
         c: Config, tokens: masking.Tokens) -> tuple[Terms, Terms]:
  """Terms {'generator', 'discriminator'}; the second is the mean over all tokens but padding.

  Metrics: generator_loss, generator_accuracy (of masked tokens); discriminator_loss, discriminator_accuracy, replaced
  (share, of all tokens); precision, recall (of replaced tokens, at logit 0). A token drawn equal to the original counts
  as original.

  Args:
    apply, head: the generator, as for `lm.losses.mlm.loss`.
    discriminate: (params, ids_BT, *, positions_BT, segments_BT, types_BT, key) -> logits_BT of 'was replaced'.
  """
  sample_key = jax.random.key(1) if key is None else nn.fold(key, 1)
  shared = dict(positions_BT=inputs.positions_BT, segments_BT=inputs.segments_BT, types_BT=inputs.types_BT)
  masked = masking.corrupt(inputs, nn.fold(key, 0), c, tokens)
  x_BPD = masking.gather(apply(p, masked.ids_BT, **shared, key=nn.fold(key, 2)), masked.positions_BP)
  y_BPE, w_VE, bias_V = head(p, x_BPD)
  total, nll, correct = cross_entropy.weighted_nll(y_BPE, w_VE, masked.targets_BP, masked.weights_BP, c.chunk,
                                                   bias_V=bias_V)
  weight = masked.weights_BP.sum()
  drawn_BP = cross_entropy.sample(masking.draw_keys(sample_key, inputs), y_BPE, w_VE, bias_V, c.chunk)
  ids_BT = fill(inputs.ids_BT, masked, drawn_BP)
  logits_BT = discriminate(p, ids_BT, **shared, key=nn.fold(key, 3)).astype(jnp.float32)
  detection, metrics = _detection(logits_BT, ids_BT != inputs.ids_BT, inputs.segments_BT > 0, c.weight)
  return ({'generator': Term(total, weight), 'discriminator': detection},
          metrics | {'generator_loss': Term(nll, weight), 'generator_accuracy': Term(correct, weight)})


def fill(ids_BT: jax.Array, masked: masking.Masked, drawn_BP: jax.Array) -> jax.Array:
  """The original rows with what was drawn at the masked positions, kept and randomly replaced ones included."""
  nowhere = ids_BT.shape[1]
  positions_BP = jnp.where(masked.weights_BP > 0, masked.positions_BP, nowhere)
  put = lambda ids_T, positions_P, drawn_P: ids_T.at[positions_P].set(drawn_P.astype(ids_T.dtype), mode='drop')
  return jax.vmap(put)(ids_BT, positions_BP, drawn_BP)


def _detection(logits_BT, replaced_BT, used_BT, scale):
  """(Term, metrics) of binary cross-entropy, f32."""
  count = lambda x_BT: (x_BT & used_BT).sum().astype(jnp.float32)
  nll_BT = jax.nn.softplus(logits_BT) - logits_BT * replaced_BT
  said_BT = logits_BT > 0
  total, weight, hits = jnp.where(used_BT, nll_BT, 0.0).sum(), count(used_BT), count(said_BT & replaced_BT)
  return Term(total, weight, scale), {
      'discriminator_loss': Term(total, weight), 'discriminator_accuracy': Term(count(said_BT == replaced_BT), weight),
      'precision': Term(hits, count(said_BT)), 'recall': Term(hits, count(replaced_BT)),
      'replaced': Term(count(replaced_BT), weight)}
