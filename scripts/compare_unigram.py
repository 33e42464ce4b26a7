"""Prints an encoder's loss and accuracy on masked words beside those of word frequencies, and fails if they win.

  python -m scripts.compare_unigram --workdir=runs/bert

The baseline predicts every token of the validation split by its share of the training tokens (one is added to each
count), whatever stands around it: what a masked language model must beat to have learned any context. Of an ELECTRA run
it is the generator that is compared; its discriminator has to beat always saying 'original'.
"""

import json
import pathlib

from absl import flags
import numpy as np

from experiments import cli
from lm import config
from lm.data import loader
from lm.errors import DataError, Error

_WORKDIR = flags.DEFINE_string('workdir', None, 'The workdir of a finished run of an encoder.', required=True)


def main(_: list[str]) -> None:
  workdir = pathlib.Path(_WORKDIR.value)
  try:
    saved = json.loads((workdir / 'config.json').read_bytes())['config']
    c = config.from_json(loader.Config, saved['data'])
    summary = json.loads((workdir / 'summary.json').read_bytes())
    loss, accuracy = (summary.get(f'val_{k}', summary.get(f'val_generator_{k}')) for k in ('loss', 'accuracy'))
    data = loader.prepare(c, workdir / 'data', seed=saved['seed'])
  except (OSError, KeyError, ValueError) as error:
    raise DataError(f'{workdir}: {error}; expected a finished run; run it to its end') from error
  if not c.encoder:
    raise DataError(f'{workdir}: a decoder; expected a run of experiments.bert, roberta, electra or deberta')
  p_V, held_V = _counts(data, 'train') + 1, _counts(data, 'validation')
  nll = -(held_V * np.log(p_V / p_V.sum())).sum() / held_V.sum()
  most = held_V[p_V.argmax()] / held_V.sum()
  print(f'masked tokens of the validation split: model {loss:.3f} nats (perplexity {np.exp(loss):.0f}), accuracy '
        f'{accuracy:.3f}; word frequencies {nll:.3f} nats (perplexity {np.exp(nll):.0f}), accuracy {most:.3f}')
  if 'val_replaced' in summary:
    print(f'replaced tokens: discriminator accuracy {summary["val_discriminator_accuracy"]:.3f}; always "original" '
          f'{1 - summary["val_replaced"]:.3f}')
  if loss >= nll:
    raise Error('the model does not beat word frequencies yet; train longer: --set optim.steps=...')


def _counts(data: loader.Data, split: str) -> np.ndarray:
  """float64 [V]: how often each id stands in the text of the split; control ids do not count."""
  counts_V = np.zeros(data.tokenizer.vocab_size)
  for dataset in data.datasets:
    lengths = np.asarray(dataset.lengths[split])
    for part in np.array_split(np.arange(len(lengths)), max(1, lengths.sum() // 2**22)):
      spans = np.stack([part, np.zeros_like(part), lengths[part]], axis=1)
      counts_V += np.bincount(dataset.read(split, spans), minlength=len(counts_V))
  counts_V[list(data.tokenizer.control.values())] = 0
  return counts_V


if __name__ == '__main__':
  cli.guard(main, __doc__)
