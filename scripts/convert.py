r"""Converts a model: from a workdir, a Hugging Face folder or a GGUF file, to a Hugging Face folder or a workdir.

  python -m scripts.convert --from=runs/gpt2 --to=hf --out=export/gpt2              # for transformers, vLLM, ...
  python -m scripts.convert --from=SmolLM2-135M-Instruct.Q4_1.gguf --out=smollm2
  python -m scripts.convert --from=smollm2 --to=workdir --out=runs/smollm2          # one sealed checkpoint, step 0

GPT2LMHeadModel and LlamaForCausalLM are what can be written and read; weights are f32, whatever they were. Of a run of
an encoder, BERT's, RoBERTa's, ELECTRA's (the discriminator) or DeBERTa's class is written. Every tensor is accounted
for, and an option that the model here lacks (rope scaling, sliding windows, ...) is refused by name. The tokenizer goes
along. Training (init_from) and sampling read all three kinds as they are: no need to convert first.

Exit status: 0 done, 2 a flag or an option of the model, 3 the tokenizer, 4 damaged weights or nowhere to write.
"""

import dataclasses
import json
import os
import pathlib

from absl import flags

from experiments import cli
from lm import checkpoint, config, params, pretrain, pretrain_encoder, weights
from lm.data import loader
from lm.errors import CheckpointError, ConfigError
from lm.models import hf
from lm.text import tokenizer

_FROM = flags.DEFINE_string('from', '', 'A workdir, a folder of config.json and *.safetensors, or a .gguf file.')
_TO = flags.DEFINE_enum('to', 'hf', ['hf', 'workdir'], 'The kind to write.')
_OUT = flags.DEFINE_string('out', '', 'The folder to write; new, or empty.')
_TOKENIZER = flags.DEFINE_string('tokenizer', '', 'A tokenizer to send along in place of the model\'s: file or folder.')
_NEWEST = flags.DEFINE_bool('newest', False, 'Of a workdir: the newest checkpoint, not the best.')


def main(_: list[str]) -> None:
  for flag in (_FROM, _OUT):
    if not flag.value:
      raise ConfigError(f'--{flag.name}: not given; expected --from=MODEL --out=FOLDER; see --help')
  out = pathlib.Path(os.path.abspath(_OUT.value))
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise CheckpointError(f'--out={out}: exists and is not empty; expected a new folder; choose another name')
  encoder = pretrain_encoder.trained_in(_FROM.value)
  if encoder and _TO.value == 'workdir':
    raise ConfigError(f'--to=workdir: {_FROM.value} is one already; expected --to=hf')
  model = (pretrain_encoder if encoder else weights).load(_FROM.value, best=not _NEWEST.value)
  if _TOKENIZER.value:
    model = model._replace(tokenizer=tokenizer.load(_TOKENIZER.value))
  if _TO.value == 'hf':
    hf.save(out, *model)
  elif model.tokenizer is None:
    raise ConfigError(f'--tokenizer: not given, and {_FROM.value} holds none; a workdir needs one; name its file')
  else:
    _workdir(out, model)
  tok = model.tokenizer
  print(f'{out}: {params.count(model.params):,} parameters, '
        + (f'{tok.kind} tokenizer of {tok.vocab_size:,} ids' if tok else 'no tokenizer; --tokenizer=PATH sends one'))
  if not encoder:
    print(f'next: python -m scripts.sample --model={out} --prompt="..."')


def _workdir(out: pathlib.Path, model: weights.Model) -> None:
  """One sealed checkpoint of the parameters alone; training continues from it with init_from in another workdir."""
  length = min(loader.Config().length, model.config.length)
  c = pretrain.Config(model=model.config, data=dataclasses.replace(loader.Config(), length=length))
  with checkpoint.Saver(out / 'checkpoints', c.checkpoint, start=None) as saver:
    saver.save(0, {'params': model.params}, meta={}, metrics={})
  model.tokenizer.save(out / 'tokenizer')
  tokenizer.write_atomically(str(out / 'config.json'), json.dumps({'config': config.to_json(c)}, indent=1).encode())


if __name__ == '__main__':
  cli.guard(main, __doc__)
