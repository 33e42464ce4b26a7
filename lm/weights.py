"""Finds a trained decoder wherever it lies: a workdir of ours, an HF folder, or a GGUF file."""

import json
import os
import pathlib
import sys
from typing import Any, NamedTuple

import jax

from lm import checkpoint, config, params, seal
from lm.errors import CheckpointError, ConfigError
from lm.models import decoder, gguf, hf
from lm.text import tokenizer as tokenizers

_TOKENIZERS = ('*.model', 'tokenizer.json', 'vocab.*', 'encoder.json', 'char.json', 'byte.json')


class Model(NamedTuple):
  """A model's config, f32 parameters on the default device, and its tokenizer (None where it has none)."""

  config: Any
  params: params.Tree
  tokenizer: tokenizers.Tokenizer | None


def load(path: str | os.PathLike, best: bool = True) -> Model:
  """The model at `path`; of a workdir the best checkpoint by its own metric, or the newest with best=False.

  A damaged checkpoint is passed over for the newest intact one; a warning on stderr names both.

  Raises:
    ConfigError: `path` is none of the three kinds. CheckpointError: damaged, or without a checkpoint.
    DataError: a damaged tokenizer.
  """
  path = pathlib.Path(path)
  kind = kind_of(path)
  if kind == 'workdir':
    return _workdir(path, best)
  if kind == 'gguf':
    return Model(*gguf.load(path))
  c, p = hf.load(path)
  if not isinstance(c, decoder.Config):
    raise ConfigError(f'{path}: the config is of an encoder; expected a decoder, which generates text; name another '
                      'model')
  return Model(c, p, _tokenizer(path))


def params_from(path: str | os.PathLike, abstract: params.Tree) -> params.Tree:
  """Parameters to start training from.

  Raises:
    ConfigError: a leaf is missing, is one too many or has another shape; the message names it.
  """
  have, want = hf.load(path)[1] if kind_of(path) == 'hf' else load(path).params, params.flatten(abstract)
  got = params.flatten(have)
  for name in sorted(want.keys() | got.keys()):
    a, b = want.get(name), got.get(name)
    if a is None or b is None or a.shape != b.shape:
      raise ConfigError(f'init_from={path}: {name} is {"absent" if b is None else b.shape} there and '
                        f'{"absent" if a is None else a.shape} in this model; set model.* to the shape of that model')
  return have


def kind_of(path: str | os.PathLike) -> str:
  """'workdir', 'hf' or 'gguf', by what lies there; reads nothing.

  Raises:
    ConfigError: none of them.
  """
  path = pathlib.Path(path)
  if path.is_dir() and (path / 'checkpoints').is_dir():
    return 'workdir'
  if path.is_dir() and (path / 'config.json').exists():
    return 'hf'
  if path.is_file() and path.suffix == '.gguf':
    return 'gguf'
  raise ConfigError(f'{path}: {"no such path" if not path.exists() else "not a model"}; expected a workdir '
                    '(config.json and checkpoints/), an HF folder (config.json and *.safetensors) or a .gguf file')


def _workdir(path, best):
  try:
    saved = json.loads((path / 'config.json').read_bytes())['config']
    c, kept = config.from_json(decoder.Config, saved['model']), saved['checkpoint']
    ranked = checkpoint.best(path / 'checkpoints', kept['metric'], kept['mode']) if best else None
  except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
    raise CheckpointError(f'{path / "config.json"}: {type(error).__name__}: {error}; expected the config of a decoder '
                          'run; name another model') from error
  return Model(c, restore(path, decoder.specs(c), ranked), _tokenizer(path / 'tokenizer'))


def restore(workdir: str | os.PathLike, specs: params.Tree, first: int | None = None) -> params.Tree:
  """A workdir's parameters for `specs` on the default device: of step `first`, else of the newest that is whole."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = params.abstract(specs, jax.tree.map(lambda _: here, specs))
  return _intact(pathlib.Path(workdir) / 'checkpoints', abstract, first)


def _intact(folder, abstract, first):
  """The parameters of step `first`, else of the newest step that is whole; a warning names what was passed over."""
  newest = sorted(checkpoint.steps(folder), key=lambda s: (s == first, s), reverse=True)
  rejected = []
  for step in newest:
    try:
      p = checkpoint.restore_params(folder, abstract, step=step, log=lambda line: None)
    except CheckpointError as error:
      rejected.append(f'step {step} ({seal.check(folder, step) or error})')
      continue
    if rejected:
      print(f'warning: rejected {"; ".join(rejected)}; using step {step} of {folder}', file=sys.stderr, flush=True)
    return p
  raise CheckpointError(f'{folder}: no intact checkpoint{": rejected " * bool(rejected)}{"; ".join(rejected)}; '
                        'expected a sealed and undamaged step; copy one back, or name another model')


def _tokenizer(path):
  """The tokenizer in the folder, None where it holds none of its files."""
  return tokenizers.load(path) if any(any(path.glob(name)) for name in _TOKENIZERS) else None
