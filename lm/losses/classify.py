"""Classification: the mean over rows of -log P(label | row), in nats. Shapes: B rows, C classes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm import nn, params
from lm.data.labelled import Labelled
from lm.losses import Term


def loss(p: params.Tree, batch: Labelled, key: nn.Key | None, *, logits: Callable[..., jax.Array],
         smoothing: float = 0.0) -> tuple[dict[str, Term], dict[str, Term]]:
  """Terms {'nll'}; metrics {'loss', 'accuracy'}. A row of label -1 does not count.

  Args:
    logits: (params, ids_BT, *, segments_BT, key) -> logits_BC, f32.
    smoothing: the target is 1 - smoothing of the label and smoothing of the uniform distribution.
  """
  logits_BC = logits(p, batch.ids_BT, segments_BT=batch.segments_BT, key=key)
  weights_B = (batch.labels_B >= 0).astype(jnp.float32)
  label_B1 = jnp.maximum(batch.labels_B, 0)[:, None]
  logprobs_BC = jax.nn.log_softmax(logits_BC)
  nll_B = -jnp.take_along_axis(logprobs_BC, label_B1, axis=1)[:, 0]
  right_B = logits_BC.argmax(1) == batch.labels_B
  nll = Term((weights_B * nll_B).sum(), weights_B.sum())
  smooth_B = nll_B if not smoothing else (1 - smoothing) * nll_B - smoothing * logprobs_BC.mean(1)
  return {'nll': Term((weights_B * smooth_B).sum(), nll.weight)}, {
      'loss': nll, 'accuracy': Term((weights_B * right_B).sum(), weights_B.sum())}
