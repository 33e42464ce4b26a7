"""Classification: the mean over rows of -log P(label | row), in nats. Shapes: B rows, C classes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm import nn, params
from lm.data.labelled import Labelled
from lm.losses import Term


def loss(p: params.Tree, batch: Labelled, key: nn.Key | None, *, logits: Callable[..., jax.Array]
         ) -> tuple[dict[str, Term], dict[str, Term]]:
  """Terms {'nll'}; metrics {'loss', 'accuracy'}. A row of label -1 does not count.

  Args:
    logits: (params, ids_BT, *, segments_BT, key) -> logits_BC, f32.
  """
  logits_BC = logits(p, batch.ids_BT, segments_BT=batch.segments_BT, key=key)
  weights_B = (batch.labels_B >= 0).astype(jnp.float32)
  label_B1 = jnp.maximum(batch.labels_B, 0)[:, None]
  nll_B = -jnp.take_along_axis(jax.nn.log_softmax(logits_BC), label_B1, axis=1)[:, 0]
  right_B = logits_BC.argmax(1) == batch.labels_B
  nll = Term((weights_B * nll_B).sum(), weights_B.sum())
  return {'nll': nll}, {'loss': nll, 'accuracy': Term((weights_B * right_B).sum(), weights_B.sum())}
