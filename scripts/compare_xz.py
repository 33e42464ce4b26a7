"""Prints the model's bits per byte beside what `xz -9e` needs for the same validation text, and fails if xz wins.

A compressor that has seen nothing is the least a language model must beat: bits per byte = nats per token x tokens /
bytes / ln 2, every byte of the validation text counted.
"""

import json
import lzma
import pathlib

from absl import flags

from experiments import cli
from lm.errors import DataError, Error

_WORKDIR = flags.DEFINE_string('workdir', None, 'The workdir of a finished run.', required=True)


def main(argv: list[str]) -> None:
  del argv
  workdir = pathlib.Path(_WORKDIR.value)
  texts = sorted(workdir.glob('data/*/validation.txt'))
  try:
    ours = json.loads((workdir / 'summary.json').read_text(encoding='utf-8'))['val_bits_per_byte']
  except (OSError, KeyError, ValueError) as error:
    raise DataError(f'{workdir / "summary.json"}: {error}; expected a finished run; run it to its end') from error
  if not texts:
    raise DataError(f'{workdir}/data: no validation.txt; expected a run on raw text')
  raw = b'\n'.join(t.read_bytes() for t in texts)
  theirs = 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)
  print(f'bits per byte on {len(raw):,} bytes of validation text: model {ours:.3f}, xz -9e {theirs:.3f}')
  if ours >= theirs:
    raise Error('the model does not beat xz -9e yet; train longer: --set optim.steps=...')


if __name__ == '__main__':
  cli.guard(main, __doc__)
