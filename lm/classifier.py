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

from lm import classification, config, logs, params, weights
from lm.data import framing, labelled, memory
from lm.errors import CheckpointError, ConfigError
from lm.models import encoder, hf
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

    Of a model of numbers (`data.numbers`) the numbers, [N, 1].

    Raises:
      DataError: text that the tokenizer refuses.
    """
    c, N = self.config, len(texts_N)
    frame = framing.frame_of(self.tokenizer, not isinstance(c, classification.Decoder), len(texts_N[0]) > 1)
    ids_N = [memory.encoded(texts, self.tokenizer, f'text {i}') for i, texts in enumerate(texts_N, 1)]
    found_N, cut = framing.framed(ids_N, frame, c.data.room)
    width = min(c.data.room, 1 << (max(len(tokens) for tokens, _ in found_N) - 1).bit_length())
    out = []
    for start in tqdm.trange(0, N, c.eval_batch, desc='classifying', unit=' batches', disable=None):
      some = found_N[start:start + c.eval_batch]
      some += some[:1] * (c.eval_batch - len(some))  # one program for all batches
      logits_BC = self.score(self.params, framing.rows(some, np.zeros(len(some), np.int32), frame, width))
      logits_BC = logits_BC.astype(jnp.float32)
      out.append(logits_BC if c.data.numbers else jax.nn.softmax(logits_BC))
    return np.concatenate(jax.device_get(out))[:N], cut


def load(path: str | os.PathLike, best: bool = True) -> Classifier:
  """Of a workdir the best checkpoint, or the newest; or a Hugging Face folder of `...ForSequenceClassification`.

  Raises:
    ConfigError: `path` is neither. CheckpointError: damaged; no classifier; a run's base is another model now.
  """
  return _workdir(path, best) if weights.kind_of(path) == 'workdir' else _foreign(path)


def _foreign(path):
  if weights.kind_of(path) != 'hf':
    raise ConfigError(f'{path}: no classifier; expected the workdir of one, or a Hugging Face folder; name another')
  model, p = hf.load(path)
  if 'classify' not in p:
    raise ConfigError(f'{path}: a model without a head for classes; expected ...ForSequenceClassification; train one '
                      'with experiments.classify')
  names, head = hf.classes(path), p['classify']
  kind = classification.Encoder if isinstance(model, encoder.Config) else classification.Disentangled
  c = kind(model=model, classes=head['out'].shape[1], pooling='first' if 'dense' in head else 'pooler',
           data=labelled.Config(length=model.length, numbers=head['out'].shape[1] == 1))
  if len(names) != c.classes:
    raise CheckpointError(f'{path}/config.json: id2label has {len(names)} names; expected {c.classes}, as its head '
                          'has; mend it')
  return Classifier(c, jax.tree.map(jnp.asarray, p), tokenizers.load(path), names, classification.scorer(c))


def _workdir(workdir, best):
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
