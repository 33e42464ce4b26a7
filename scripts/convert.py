r"""Converts a model: from a workdir, a Hugging Face folder or a GGUF file, to a Hugging Face folder or a workdir.

  python -m scripts.convert --from=runs/gpt2 --to=hf --out=export/gpt2              # for transformers, vLLM, ...
  python -m scripts.convert --from=SmolLM2-135M-Instruct.Q4_1.gguf --out=smollm2
  python -m scripts.convert --from=smollm2 --to=workdir --out=runs/smollm2          # one sealed checkpoint, step 0
  python -m scripts.convert --from=runs/lora --to=peft --out=adapter                # for PEFT, to load beside the base
  python -m scripts.convert --from=adapter --base=smollm2 --to=hf --out=merged      # PEFT's LoRA, added to its base

GPT2LMHeadModel and LlamaForCausalLM are what can be written and read; weights are f32, whatever they were. Of a run of
an encoder, BERT's, RoBERTa's, ELECTRA's (the discriminator) or DeBERTa's class is written; of a classifier BERT's with
pooling=pooler, RoBERTa's or DeBERTa's with pooling=first, and the names of its classes. Every tensor is accounted for,
and an option that the model here lacks (rope scaling, sliding windows, ...) is refused by name. The tokenizer goes
along, with a tokenizer.json of the same ids for AutoTokenizer. Training (init_from) and sampling read all three kinds
as they are: no need to convert first.

LoRA of a run is merged into its weights, unless --to=peft asks for adapter_config.json and adapter_model.safetensors
alone. These hold LoRA (a classifier's without its head), or the prefix or prompt of a run of a model that writes;
--base may be any model, also an encoder's folder. Prefixes, prompts and adapter layers cannot be merged.

Exit status: 0 done, 2 a flag or an option of the model, 3 the tokenizer, 4 damaged weights or nowhere to write.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

from absl import flags

from experiments import cli
from lm import (
  checkpoint,
  classification,
  classifier,
  config,
  disk,
  instruct,
  params,
  peft,
  peft_hf,
  preference,
  pretrain,
  pretrain_encoder,
  run,
  weights,
)
from lm.data import loader, memory
from lm.errors import CheckpointError, ConfigError
from lm.models import decoder, hf

_FROM = flags.DEFINE_string('from', '', 'A workdir, a folder of config.json and *.safetensors, a .gguf file; or, with '
                            "--base, PEFT's folder of an adapter.")
_BASE = flags.DEFINE_string('base', '', 'The model that the adapter was made for: what --from may be otherwise.')
_TO = flags.DEFINE_enum('to', 'hf', ['hf', 'workdir', 'peft'], 'The kind to write.')
_OUT = flags.DEFINE_string('out', '', 'The folder to write; new, or empty.')
_TOKENIZER = flags.DEFINE_string('tokenizer', '', 'A tokenizer to send along in place of the model\'s: file or folder.')
_NEWEST = flags.DEFINE_bool('newest', False, 'Of a workdir: the newest checkpoint, not the best.')

_TASKS = (  # the head: of transformers' class
    (pretrain.Config, pretrain.task, 'CausalLM'), (instruct.Config, instruct.task, 'CausalLM'),
    (preference.Config, preference.task, 'CausalLM'),
    (pretrain_encoder.Masked, pretrain_encoder.task, 'MaskedLM'),
    (pretrain_encoder.Disentangled, pretrain_encoder.task, 'MaskedLM'),
    (classification.Encoder, classification.task, 'SequenceClassification'),
    (classification.Disentangled, classification.task, 'SequenceClassification'),
    (classification.Decoder, classification.task, 'SequenceClassification'))


def main(_: list[str]) -> None:
  for flag in (_FROM, _OUT):
    if not flag.value:
      raise ConfigError(f'--{flag.name}: not given; expected --from=MODEL --out=FOLDER; see --help')
  out = pathlib.Path(os.path.abspath(_OUT.value))
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise CheckpointError(f'--out={out}: exists and is not empty; expected a new folder; choose another name')
  if _TO.value == 'peft':
    _adapter(out)
    return
  names = ()
  if weights.of_classifier(_FROM.value):
    found = classifier.load(_FROM.value, best=not _NEWEST.value)
    model, names = weights.Model(found.config.model, _plain(found.params), found.tokenizer), found.names
  else:
    model = _merged() if _BASE.value else _load(_FROM.value)
  encoder = not isinstance(model.config, decoder.Config)
  if encoder and _TO.value == 'workdir':
    raise ConfigError(f'--to=workdir: {_BASE.value or _FROM.value} is an encoder; expected a decoder; give --to=hf, '
                      'from which training starts as well')
  if _TOKENIZER.value:
    model = model._replace(tokenizer=memory.read_tokenizer(_TOKENIZER.value), ends=())
  if _TO.value == 'hf':
    hf.save(out, *model, classes=names)
  elif model.tokenizer is None:
    raise ConfigError(f'--tokenizer: not given, and {_FROM.value} holds none; a workdir needs one; name its file')
  elif model.tokenizer.vocab_size > model.config.vocab:
    raise ConfigError(f'--tokenizer={_TOKENIZER.value}: {model.tokenizer.vocab_size:,} ids; expected at most those of '
                      f"the model, {model.config.vocab:,}; name the model's own")
  else:
    with disk.new_folder(out) as folder:
      _workdir(folder, model)
  tok = model.tokenizer
  print(f'{out}: {params.count(model.params):,} parameters, '
        + (f'{tok.kind} tokenizer of {tok.vocab_size:,} ids' if tok else 'no tokenizer; --tokenizer=PATH sends one'))
  if tok and tok.kind == 'sentencepiece' and _TO.value == 'hf' and not (out / 'tokenizer.json').exists():
    print("its tokenizer.model has rules that no tokenizer.json has: AutoTokenizer would give other ids; encode with "
          'sentencepiece there')
  if names:
    print(f'next: in Python, transformers.AutoModelForSequenceClassification.from_pretrained({str(out)!r})')
  elif not encoder:
    print(f'next: python -m scripts.sample --model={out} --prompt="..."')


def _load(path: str) -> weights.Model:
  """The decoder, or the run of an encoder, at `path`; all of it weights."""
  given = pathlib.Path(path)
  if (given / 'adapter_config.json').exists() and not (given / 'config.json').exists():
    raise ConfigError(f"--base: not given, and {path} is PEFT's folder of an adapter; expected the model that it was "
                      'made for, a workdir, a folder or a .gguf file; name it')
  read = weights.load_encoder if weights.of_encoder(path) else weights.load
  model = read(path, best=not _NEWEST.value)
  return model._replace(params=_plain(model.params))


def _plain(p: params.Tree) -> params.Tree:
  """The weights with all that was learned, if they can hold it."""
  p = peft.plain(p)
  if params.flatten(peft.without(p)).keys() != params.flatten(p).keys():
    raise ConfigError(f'--to={_TO.value}: {_FROM.value} has a prefix, a prompt or adapter layers, which stand beside '
                      'its weights and cannot be merged; expected LoRA, or all weights trained; write a prefix or '
                      'prompt with --to=peft, or use the workdir as it is')
  return p


def _merged() -> weights.Model:
  """The base with PEFT's LoRA added to its weights."""
  base = _BASE.value
  if weights.of_encoder(base) or weights.kind_of(base) != 'hf':
    model = _load(base)
  else:  # of an encoder, too
    model = weights.Model(*hf.load(base), memory.read_tokenizer(_TOKENIZER.value or base), hf.ends(base))
  few, tree = peft_hf.load(_FROM.value, *model[:2])
  if few.method != 'lora':
    raise ConfigError(f'--from={_FROM.value}: a {few.method}, which stands beside the weights and cannot be merged; '
                      f'expected LoRA; let PEFT load it beside {base}, in transformers')
  return model._replace(params=peft.merge(tree))


def _adapter(out: pathlib.Path) -> None:
  """Writes what a run learned beside the weights for PEFT; and says what it cannot take."""
  workdir = _FROM.value
  if weights.kind_of(workdir) != 'workdir':
    raise ConfigError(f'--to=peft: {workdir} is no workdir; expected that of a run of experiments.lora or prefix')
  c, task, head = _run_in(pathlib.Path(workdir))
  specs, few = peft.without(task.specs), c.peft
  best = checkpoint.best(pathlib.Path(workdir) / 'checkpoints', c.checkpoint.metric, c.checkpoint.mode)
  p = weights.restore(workdir, specs, None if _NEWEST.value else best, task.base.specs)
  named = c.init_from and weights.kind_of(c.init_from) == 'hf'
  peft_hf.save(out, c.model, p, few, c.init_from if named else '', 'CAUSAL_LM' if head == 'CausalLM' else None)
  count = params.count(peft.materialise(p)) - params.count(peft.without(p))
  print(f'{out}: {few.method} of {count:,} parameters')
  if few.train and (left := params.count(p, few.train)):
    print(f'left out: {left:,} parameters of {few.train}, which trained as well: PEFT would not know them')
  other = f' (python -m scripts.convert --from={c.init_from} --out=FOLDER)' if c.init_from and not named else ''
  print(f'next: in Python, peft.PeftModel.from_pretrained(BASE, {str(out)!r}), BASE being '
        f'{c.init_from or "the model that it began with"} in transformers, of a class with a head, as '
        f'AutoModelFor{head}{other}')


def _run_in(workdir: pathlib.Path) -> tuple[Any, run.Task, str]:
  """(config, task, head) of a run that learned something which PEFT's layout has."""
  where = workdir / 'config.json'
  try:
    saved = json.loads(where.read_bytes())['config']
    method = saved.get('peft', {}).get('method', 'full')
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise CheckpointError(f"{where}: {type(error).__name__}: {error}; expected a run's config; copy it again"
                          ) from error
  if method not in ('lora', 'prefix', 'prompt'):
    raise ConfigError(f'--to=peft: {workdir} was trained with peft.method={method!r} and has no adapter that PEFT '
                      'knows; expected lora, prefix or prompt'
                      + ('; give --to=hf, which writes all weights' if method in ('full', 'top') else ''))
  for kind, task, head in _TASKS:
    try:
      c = config.from_json(kind, saved)
    except ConfigError:
      continue
    if method != 'lora' and head != 'CausalLM':
      raise ConfigError(f'--to=peft: {workdir} is of {"an encoder" if head == "MaskedLM" else "a classifier"} with a '
                        f'{method}, whose head PEFT would not have; expected LoRA, or a run of a model that writes')
    return c, task(c), head
  raise ConfigError(f'--to=peft: {workdir} is a run of another kind; expected one of a model that writes, of '
                    'masked words, or of a classifier')


def _workdir(out: pathlib.Path, model: weights.Model) -> None:
  """One sealed checkpoint of the parameters alone; training continues from it with init_from in another workdir."""
  length = min(loader.Config().length, model.config.length)
  c = pretrain.Config(model=model.config, data=dataclasses.replace(loader.Config(), length=length))
  with checkpoint.Saver(out / 'checkpoints', c.checkpoint, start=None) as saver:
    saver.save(0, {'params': model.params}, meta={}, metrics={})
  model.tokenizer.save(out / 'tokenizer')
  disk.write(out / 'config.json', json.dumps({'config': config.to_json(c)} | (
      {'ends': model.ends} if model.ends else {}), indent=1).encode())


if __name__ == '__main__':
  cli.guard(main, __doc__)
