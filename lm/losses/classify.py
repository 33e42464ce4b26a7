"""Classification: the mean over examples of -log P(label | example), in nats. Shapes: B rows, C classes.

An example is a row; or, where several are packed in one, B here stands for B and M.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm import nn
from lm.losses import Term

_AGAIN = 1 << 16  # folded into the key of a second pass: models fold small numbers


def loss(logits: Callable[[nn.Key | None], jax.Array], labels_B: jax.Array, key: nn.Key | None, *,
         smoothing: float = 0.0, consistency: float = 0.0) -> tuple[dict[str, Term], dict[str, Term]]:
  """Terms {'nll'} and, of R-Drop, {'consistency'}; metrics {'loss', 'accuracy'}. A label of -1 does not count.

  Args:
    logits: key -> logits_BC, f32; the key turns dropout on.
    labels_B: int32.
    smoothing: the target is 1 - smoothing of the label and smoothing of the uniform distribution.
    consistency: R-Drop's alpha (arXiv:2106.14448 eq. 4): each row goes through twice with other dropout; nll is the
      mean of both, and alpha times the mean of both divergences between them is added, as in the README of the authors'
      code, which leaves sum or mean over the batch open (here the mean; their code for GLUE sums, and so has smaller
      alphas). Their eq. 3 adds both nll up: twice this objective, at an alpha twice this one. Without a key, one pass.
  """
  logits_BC = logits(key)
  weights_B = (labels_B >= 0).astype(jnp.float32)
  label_B1 = jnp.maximum(labels_B, 0)[..., None]
  logprobs_BC = jax.nn.log_softmax(logits_BC)
  nll_B, smooth_B = _nll(logprobs_BC, label_B1, smoothing)
  right_B = logits_BC.argmax(-1) == labels_B
  nll = Term((weights_B * nll_B).sum(), weights_B.sum())
  terms = {}
  if consistency and key is not None:
    other_BC = jax.nn.log_softmax(logits(nn.fold(key, _AGAIN)))
    smooth_B = (smooth_B + _nll(other_BC, label_B1, smoothing)[1]) / 2
    both_B = ((jnp.exp(logprobs_BC) - jnp.exp(other_BC)) * (logprobs_BC - other_BC)).sum(-1)  # KL both ways
    terms['consistency'] = Term((weights_B * both_B / 2).sum(), nll.weight, consistency)
  terms['nll'] = Term((weights_B * smooth_B).sum(), nll.weight)
  return terms, {'loss': nll, 'accuracy': Term((weights_B * right_B).sum(), weights_B.sum())}


def number(outputs_B1: jax.Array, labels_B: jax.Array) -> tuple[dict[str, Term], dict[str, Term]]:
  """Term {'squared'} and metric {'loss'}: the mean of (output - label)^2. A label that is NaN does not count."""
  told_B = jnp.isfinite(labels_B)
  squares_B = jnp.where(told_B, jnp.square(outputs_B1[..., 0] - jnp.where(told_B, labels_B, 0)), 0)
  squared = Term(squares_B.sum(), told_B.sum(dtype=jnp.float32))
  return {'squared': squared}, {'loss': squared}


def _nll(logprobs_BC, label_B1, smoothing):
  """(-log P(label), the same against the smoothed target), [B]."""
  nll_B = -jnp.take_along_axis(logprobs_BC, label_B1, axis=-1)[..., 0]
  return nll_B, nll_B if not smoothing else (1 - smoothing) * nll_B - smoothing * logprobs_BC.mean(-1)
