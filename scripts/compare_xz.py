"""Prints the model's bits per byte beside what `xz -9e` needs for the same validation text, and fails if xz wins.

A compressor that has seen nothing is the least a language model must beat: bits per byte = nats per token x tokens /
bytes / ln 2, every byte of the validation text counted.
"""

import json
import lzma
import pathlib

from absl import flags

from experiments import cli
from lm import checkpoint
from lm.data import corpora
from lm.errors import DataError, Error

_WORKDIR = flags.DEFINE_string('workdir', None, 'The workdir of a finished run.', required=True)


def main(argv: list[str]) -> None:
  del argv
  workdir = pathlib.Path(_WORKDIR.value)
  try:
    ours = json.loads((workdir / 'summary.json').read_text(encoding='utf-8'))['val_bits_per_byte']
    saved = checkpoint.steps(workdir / 'checkpoints')
    trained_on = checkpoint.read_meta(workdir / 'checkpoints', saved[-1])['data']['datasets']
  except (OSError, KeyError, ValueError, IndexError) as error:
    raise DataError(f'{workdir / "summary.json"}: {error}; expected a finished run; run it to its end') from error
  # Other folders are of an earlier text or tokenizer, or were never finished.
  folders = {corpora.sha256_file(path): path.parent for path in workdir.glob('data/*/manifest.json')}
  texts = sorted(folders[sha256] / 'validation.txt' for sha256 in trained_on if sha256 in folders)
  if len(texts) < len(trained_on):
    raise DataError(f'{workdir}/data: {len(texts)} of the {len(trained_on)} datasets of the run; expected a run on raw '
                    'text, and its cache; prepared datasets have a validation.txt of their own')
  raw = b'\n'.join(t.read_bytes() for t in texts)
  theirs = 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)
  print(f'bits per byte on {len(raw):,} bytes of validation text: model {ours:.3f}, xz -9e {theirs:.3f}')
  if ours >= theirs:
    raise Error('the model does not beat xz -9e yet; train longer: --set optim.steps=...')


if __name__ == '__main__':
  cli.guard(main, __doc__)
