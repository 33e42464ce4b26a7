"""Finds a trained decoder wherever it lies: a workdir of ours, an HF folder, or a GGUF file."""

import json
import os
import pathlib
from typing import NamedTuple

import jax

from lm import checkpoint, config, params
from lm.errors import CheckpointError, ConfigError
from lm.models import decoder, gguf, hf
from lm.text import tokenizer as tokenizers


class Model(NamedTuple):
  """A decoder's config, f32 parameters on the default device, and its tokenizer (None where it has none)."""

  config: decoder.Config
  params: params.Tree
  tokenizer: tokenizers.Tokenizer | None


def load(path: str | os.PathLike, best: bool = True) -> Model:
  """The model at `path`; of a workdir the best checkpoint by its own metric, or the newest with best=False.

  Raises:
    ConfigError: `path` is none of the three kinds. CheckpointError: damaged, or without a checkpoint.
  """
  path = pathlib.Path(path)
  kind = kind_of(path)
  if kind == 'workdir':
    return _workdir(path, best)
  if kind == 'gguf':
    return Model(*gguf.load(path))
  c, p = hf.load(path)
  return Model(c, p, _tokenizer(path))


def params_from(path: str | os.PathLike, abstract: params.Tree) -> params.Tree:
  """Parameters to start training from.

  Raises:
    ConfigError: a leaf is missing, is one too many or has another shape; the message names it.
  """
  have, want = load(path).params, params.flatten(abstract)
  got = params.flatten(have)
  for name in sorted(want.keys() | got.keys()):
    a, b = want.get(name), got.get(name)
    if a is None or b is None or a.shape != b.shape:
      raise ConfigError(f'init_from={path}: {name} is {"absent" if b is None else b.shape} there and '
                        f'{"absent" if a is None else a.shape} in this model; set model.* to the shape of that model')
  return have


def kind_of(path: pathlib.Path) -> str:
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
    saved = json.loads((path / 'config.json').read_text(encoding='utf-8'))['config']
    c, kept = config.from_json(decoder.Config, saved['model']), saved['checkpoint']
  except (OSError, ValueError, KeyError) as error:
    raise CheckpointError(f'{path / "config.json"}: {error}; expected the config of a decoder run') from error
  folder = path / 'checkpoints'
  step = checkpoint.best(folder, kept['metric'], kept['mode']) if best else None
  specs = decoder.specs(c)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  p = checkpoint.restore_params(folder, params.abstract(specs, jax.tree.map(lambda _: here, specs)), step=step)
  return Model(c, p, _tokenizer(path / 'tokenizer'))


def _tokenizer(path):
  try:
    return tokenizers.load(path)
  except (ConfigError, CheckpointError):
    raise
  except Exception as error:
    if path.is_dir() and not any(path.glob('*token*')) and not any(path.glob('vocab*')):
      return None
    raise CheckpointError(f'{path}: {error}') from error
