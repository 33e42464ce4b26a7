r"""Measures a language model on text, without training: loss, perplexity, accuracy of the next token, bits per byte.

  python -m scripts.evaluate --model=runs/first --corpus=essays.txt
  python -m scripts.evaluate --model=SmolLM2.gguf --corpus=corpora/web_bible.jsonl,corpora/sanguo.jsonl --length=512
  python -m scripts.evaluate --model=HF_FOLDER --corpus=corpora/web_bible.jsonl --part=validation  # as a run holds out

--model is a workdir (its best checkpoint), a Hugging Face folder or a GGUF file, --corpus text or prepared datasets, in
the model's own tokens. Rows are windows of --length tokens over the joined documents, in order: every token but the
first is predicted once, from those before it in its row, so a longer row gives a lower loss. With --isolate documents
do not see each other. Bits per byte compare models of different tokenizers. Prints JSON.

Exit status: 0 done, 2 a flag is wrong, 3 the text or the tokenizer, 4 the weights.
"""

import json
import math
import tempfile

from absl import flags
import jax
import tqdm

from experiments import cli
from lm import evaluate, host, peft, pretrain, sharding, train, weights
from lm.data import loader
from lm.errors import ConfigError, DataError
from lm.models import blocks

_MODEL = flags.DEFINE_string('model', '', 'A workdir, a Hugging Face folder, or a .gguf file.')
_CORPUS = flags.DEFINE_list('corpus', [], '.txt and .jsonl files, directories, globs, prepared datasets; by commas.')
_PART = flags.DEFINE_enum('part', 'all', ['all', 'train', 'validation'], 'Of raw text, as --split divides it; of a '
                          'prepared dataset, as it was divided.')
_SPLIT = flags.DEFINE_enum('split', 'hash', ['hash', 'tail'], 'As data.split of a run.')
_FRACTION = flags.DEFINE_float('validation_fraction', 0.05, 'As data.validation_fraction of a run.')
_LENGTH = flags.DEFINE_integer('length', 0, 'Tokens a row; 0 = 1024, or as many as the model has positions.',
                               lower_bound=0)
_BATCH = flags.DEFINE_integer('batch', 8, 'Rows at a time.', lower_bound=1)
_ISOLATE = flags.DEFINE_bool('isolate', False, 'Documents of a row do not see each other.')
_NEWEST = flags.DEFINE_bool('newest', False, 'Of a workdir, the newest checkpoint instead of the best.')


def main(_: list[str]) -> None:
  for flag in (_MODEL, _CORPUS):
    if not flag.value:
      raise ConfigError(f'--{flag.name}: not given; expected --model=MODEL --corpus=PATHS; see --help')
  host.keep_compiled_programs()
  found = weights.load(_MODEL.value, best=not _NEWEST.value)
  if found.tokenizer is None:
    raise DataError(f'{_MODEL.value}: no tokenizer beside the weights; expected its files; copy them there')
  if found.tokenizer.vocab_size > found.config.vocab:
    raise ConfigError(f'{_MODEL.value}: its tokenizer has {found.tokenizer.vocab_size} ids, the model '
                      f'{found.config.vocab}; expected the tokenizer that it was trained with; put that one there')
  with tempfile.TemporaryDirectory() as folder:
    found.tokenizer.save(f'{folder}/tokenizer')
    c = _config(found, f'{folder}/tokenizer')
    data = loader.prepare(c.data, folder)
    print(json.dumps({part: _measured(c, found.params, data, part) for part in _parts(data)}, indent=1))


def _config(found, tokenizer):
  """Of a run that would read this text: behind the prefix or prompt that the model learned, if any."""
  prompt, prefix = len(peft.virtual_tokens(found.params)), blocks.virtual(found.params['blocks'])
  few = peft.Config('prompt' if prompt else 'prefix', length=prompt or prefix, hidden=0) if prompt or prefix else (
      peft.Config())
  data = loader.Config(
      corpus=tuple(_CORPUS.value), tokenizer=tokenizer, batch=_BATCH.value, isolate=_ISOLATE.value,
      length=_LENGTH.value or min(1024, found.config.length - few.virtual), split=_SPLIT.value,
      validation_fraction=0.0 if _PART.value == 'all' else _FRACTION.value)
  return pretrain.Config(model=found.config, data=data, peft=few)


def _parts(data):
  """Those that were asked for and hold text."""
  asked = ('train', 'validation') if _PART.value == 'all' else (_PART.value,)
  if found := [part for part in asked if data.tokens(part)]:
    return found
  raise DataError(f'--part={_PART.value}: no text of {",".join(_CORPUS.value)} is in it; see --split, '
                  '--validation_fraction')


def _measured(c, p, data, part):
  """{metric: value} over a part of the text."""
  step = jax.jit(train.make_eval(pretrain.task(c).eval_loss))
  place = sharding.batch_sharding(sharding.make_mesh(sharding.Config()))
  batches = loader.eval_batches(data, part, data.config.batch, place)
  total = loader.eval_steps(data, part, data.config.batch)
  batches = tqdm.tqdm(batches, desc=part, total=total, unit=' batches', disable=None)
  sums = jax.device_get(train.summed(step(p, batch, None) for batch in batches))
  values = evaluate.means(sums, data, part)
  return values | {'perplexity': math.exp(values['loss']), 'targets': int(sums['loss'].weight),
                   'bytes': data.utf8_bytes(part)}


if __name__ == '__main__':
  cli.guard(main, __doc__)
