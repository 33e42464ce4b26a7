"""A trained classifier as it is used: texts in, probabilities of its classes out."""

from collections.abc import Callable, Sequence
import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from lm import classification, config, logs, params
from lm.data import framing, memory
from lm.errors import CheckpointError, ConfigError
from lm.text import tokenizer as tokenizers


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
  """A trained model as it is used.

  Attributes:
    names: of the classes, in the order of the logits.
    score: (params, framing.Labelled) -> logits, [B, C] of a row an example.
  """

  config: classification.Config
  params: params.Tree
  tokenizer: tokenizers.Tokenizer
  names: tuple[str, ...]
  score: Callable[[params.Tree, framing.Labelled], jax.Array]

  def probabilities(self, texts_N: Sequence[Sequence[str]]) -> tuple[np.ndarray, int]:
    """(f32 [N, C], how many were cut to `data.longest` tokens) of texts, or of pairs of them; order is kept.

    Raises:
      DataError: text that the tokenizer refuses.
    """
    c, N = self.config, len(texts_N)
    frame = framing.frame_of(self.tokenizer, not isinstance(c, classification.Decoder), len(texts_N[0]) > 1)
    ids_N = [memory.encoded(texts, self.tokenizer, f'text {i}') for i, texts in enumerate(texts_N, 1)]
    found_N, cut = framing.framed(ids_N, frame, c.data.room)
    out = []
    for start in tqdm.trange(0, N, c.eval_batch, desc='classifying', unit=' batches', disable=None):
      some = found_N[start:start + c.eval_batch]
      some += some[:1] * (c.eval_batch - len(some))  # one program for all batches
      logits_BC = self.score(self.params, framing.rows(some, np.zeros(len(some), np.int32), frame, c.data.room))
      out.append(jax.nn.softmax(logits_BC.astype(jnp.float32)))
    return np.concatenate(jax.device_get(out))[:N], cut


def of_run(path: str | os.PathLike) -> bool:
  """Is it the workdir of a classifier?"""
  try:
    return {'pooling', 'classes'} <= logs.read_config(path)['config'].keys()
  except (CheckpointError, KeyError, TypeError, AttributeError):
    return False


def load(workdir: str | os.PathLike, best: bool = True) -> Classifier:
  """The best checkpoint of a run, or the newest.

  Raises:
    CheckpointError: no classifier's run, without a checkpoint that is whole, or its base is another model now.
  """
  saved = logs.read_config(workdir)
  c = _config(saved['config'], workdir)
  names = tuple(saved.get('classes', c.data.classes))
  if len(names) != c.classes:
    raise CheckpointError(f'{workdir}/config.json: classes {list(names)}; expected the names of its {c.classes} '
                          'classes, in order; write them there')
  p, score = classification.restore(c, workdir, best)
  return Classifier(c, p, tokenizers.load(pathlib.Path(workdir) / 'tokenizer'), names, score)


def _config(saved: dict[str, Any], workdir):
  errors = {}
  for kind in (classification.Encoder, classification.Disentangled, classification.Decoder):
    try:
      return config.from_json(kind, saved)
    except ConfigError as error:
      errors[kind] = str(error)
  told = errors[classification.Decoder if saved.get('pooling') == 'last' else classification.Encoder]
  raise CheckpointError(f'{workdir}/config.json: {told}; expected the config of a classifier, of '
                        'experiments.classify; name another model')
