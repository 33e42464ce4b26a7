"""Finds a trained model wherever it lies: a workdir of ours, an HF folder, or a GGUF file."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import checkpoint, config, logs, params, peft, seal, sharding
from lm.data import inputs
from lm.errors import CheckpointError, ConfigError
from lm.models import deberta, decoder, encoder, gguf, heads, hf, pretrained
from lm.text import tokenizer as tokenizers, tokenizer_files

_MIXERS = ((2654435761, 2246822519), (3266489917, 668265263))  # odd, without a pattern in their bits
_HEADS = ('mlm', 'nsp', 'pooler', 'rtd', 'classify')
_FREE = {'vocab', 'length', 'dropout', 'init', 'std', 'dtype', 'scan_layers', 'remat'}  # not what it computes


class Model(NamedTuple):
  """A model's config, f32 parameters on the default device, its tokenizer (None where it has none), and the ids that
  end its texts where its folder names any.
  """

  config: Any
  params: params.Tree
  tokenizer: tokenizers.Tokenizer | None
  ends: tuple[int, ...] = ()


def load(path: str | os.PathLike, best: bool = True) -> Model:
  """The decoder at `path`; of a workdir the best checkpoint by its own metric, or the newest with best=False.

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
    c, p, own, ends = gguf.load(path)
    return Model(c, p, own or _tokenizer(path.parent), ends)
  c, p = hf.load(path)
  if not isinstance(c, decoder.Config):
    raise ConfigError(f'{path}: the config is of an encoder; expected a decoder, which generates text; name another '
                      'model')
  return Model(c, p, _tokenizer(path), hf.ends(path))


def load_encoder(workdir: str | os.PathLike, best: bool = True) -> Model:
  """The encoder of a pretraining run with the heads that fine-tuning or transformers can use: of a pair, the
  discriminator. Which checkpoint: as `load`.

  Raises:
    CheckpointError: no config of an encoder's run, or no intact checkpoint.
  """
  c, p = _pretrained(pathlib.Path(workdir), best)
  return Model(*pretrained.network(c, p), tokenizers.load(pathlib.Path(workdir) / 'tokenizer'))


def _pretrained(workdir, best=True):
  """(config, parameters) of all that an encoder's pretraining trained, LoRA merged."""
  saved = logs.read_config(workdir)['config']
  try:
    (c, specs), kept = pretrained.from_json(saved), saved['checkpoint']
    ranked = checkpoint.best(workdir / 'checkpoints', kept['metric'], kept['mode']) if best else None
  except (KeyError, TypeError, ConfigError) as error:
    raise CheckpointError(f'{workdir / "config.json"}: {type(error).__name__}: {error}; expected the config of an '
                          "encoder's run; name another model") from error
  return c, peft.plain(restore(workdir, specs, ranked))


def of_encoder(workdir: str | os.PathLike) -> bool:
  """Is it the workdir of an encoder's pretraining?"""
  try:
    return logs.read_config(workdir)['config']['data']['packing'] in inputs.PACKINGS
  except (CheckpointError, KeyError, TypeError):
    return False


def of_classifier(workdir: str | os.PathLike) -> bool:
  """Is it the workdir of a classifier?"""
  try:
    return {'pooling', 'classes'} <= logs.read_config(workdir)['config'].keys()
  except (CheckpointError, KeyError, TypeError, AttributeError):
    return False


def params_from(path: str | os.PathLike, abstract: params.Tree, partial: bool = False, model: Any = None
                ) -> params.Tree:
  """Parameters to start training from; `partial`: heads that the model there has more are left out.

  Of the workdir of an encoder's pretraining, the network that is kept: of a pair, the discriminator; or all, if that is
  what is to go on. Of a classifier's, the model below its head, as fine-tuned (RoBERTa §5.1 starts RTE, STS and MRPC
  from the one of MNLI). `model`: the config they are for: what that of the model there has otherwise is told.

  Raises:
    ConfigError: a leaf is missing, is one too many or has another shape; the message names it.
  """
  (found, have), want = _given(path, abstract.keys()), params.flatten(abstract)
  got = params.flatten(have)
  spare = {name for name in got if partial and name.split('/')[0] in _HEADS}
  for name in sorted(want.keys() | got.keys() - spare):
    a, b = want.get(name), got.get(name)
    if a is None or b is None or a.shape != b.shape:
      raise ConfigError(f'init_from={path}: {name} is {"absent" if b is None else b.shape} there and '
                        f'{"absent" if a is None else a.shape} in this model; set model.* to the shape of that model'
                        f'{", or name a model that has it" if b is None else ""}')
  if type(found) is type(model):
    for name, (here, there) in logs.differences(config.to_json(model), config.to_json(found)).items():
      if not _FREE.intersection(name.split('.')):
        logs.say(f'init_from={path}: model.{name} is {there!r} there, {here!r} here; set it so, unless the model is to '
                 'compute otherwise')
  return params.map_with_path(lambda name, _: got[name], abstract) if partial else have


def _given(path, wanted):
  """(config, all parameters) of the model at `path`; of a pretraining also what only it has, if that is `wanted`."""
  if kind_of(path) == 'hf':
    return hf.load(path)
  if of_classifier(path):
    return _classified(pathlib.Path(path))
  if not of_encoder(path):
    return load(path)[:2]
  c, p = _pretrained(pathlib.Path(path))
  return (c, p) if wanted & {'generator', 'decoder'} else pretrained.network(c, p)


def _classified(workdir):
  """(config, parameters) of a classifier without its head, merged; of the best checkpoint."""
  saved = logs.read_config(workdir)['config']
  try:
    family = next(kind for kind in (encoder, deberta, decoder)
                  if {field.name for field in dataclasses.fields(kind.Config)} >= set(saved['model']))
    model, method = config.from_json(family.Config, saved['model']), saved['peft']['method']
    ranked = checkpoint.best(workdir / 'checkpoints', saved['checkpoint']['metric'], saved['checkpoint']['mode'])
  except (KeyError, TypeError, StopIteration, ConfigError) as error:
    what = f'{type(error).__name__}: {error}' if str(error) else 'a model of no known kind'
    raise CheckpointError(f'{workdir / "config.json"}: {what}; expected the config of a classifier; name another '
                          'model') from error
  if method not in ('full', 'top', 'lora'):
    raise ConfigError(f"{workdir}: peft.method={method!r} put parts beside the model's weights; expected a classifier "
                      'trained in full, in its top or by LoRA; name another model')
  base, whole = heads.for_classes(family.specs(model), saved['pooling'], model.embed, saved['classes'])
  p = peft.plain(restore(workdir, whole, ranked, base))
  return model, {name: leaf for name, leaf in p.items() if name != 'classify'}


def fingerprint(tree: params.Tree) -> str:
  """64 bits, in hexadecimal, of all leaves' names, shapes and bits; the same on every mesh."""
  def mixed(x):
    bits = jax.lax.bitcast_convert_type(x, {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[x.dtype.itemsize])
    bits = bits.astype(jnp.uint32)
    place = jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape)
    both = [(bits ^ (place * jnp.uint32(a))) * jnp.uint32(b) for a, b in _MIXERS]
    return jnp.stack([(x ^ (x >> 15)).sum(dtype=jnp.uint32) for x in both])
  found = jax.device_get(jax.jit(lambda leaves: [mixed(x) for x in leaves])(jax.tree.leaves(tree)))
  names = [(path, x.shape, str(x.dtype)) for path, x in params.flatten(tree).items()]
  text = repr([(*name, sums.tolist()) for name, sums in zip(names, found, strict=True)])
  return hashlib.sha256(text.encode()).hexdigest()[:16]


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
  hub = '; nothing is downloaded' * bool(re.fullmatch(r'[\w.-]+(/[\w.-]+)?', str(path)))
  raise ConfigError(f'{path}: {"no such path" if not path.exists() else "not a model"}; expected a workdir '
                    f'(config.json and checkpoints/), an HF folder (config.json and *.safetensors) or .gguf file{hub}')


def _workdir(path, best):
  whole = logs.read_config(path)
  saved = whole['config']
  if 'pooling' in saved:
    raise ConfigError(f'{path}: a classifier or reward model, which writes no text; expected a run of a language '
                      'model; see scripts.classify, and lm.reward_model.load')
  try:
    c, kept = config.from_json(decoder.Config, saved['model']), saved['checkpoint']
    ranked = checkpoint.best(path / 'checkpoints', kept['metric'], kept['mode']) if best else None
  except (KeyError, TypeError, AttributeError, ConfigError) as error:
    raise CheckpointError(f'{path / "config.json"}: {type(error).__name__}: {error}; expected the config of a decoder '
                          'run; name another model') from error
  p = peft.plain(restore(path, decoder.specs(c), ranked))
  return Model(c, p, _tokenizer(path / 'tokenizer'), tuple(whole.get('ends', ())))


def restore(workdir: str | os.PathLike, specs: params.Tree, first: int | None = None,
            base: params.Tree | None = None) -> params.Tree:
  """A workdir's parameters for `specs` on the default device: of step `first`, else of the newest that is whole.

  What its run froze is not in its checkpoints and is taken from where the run began; with what `peft` added in place.
  `base`: the part of `specs` that its `init_from` has, where that is not all.
  """
  with sharding.use(sharding.alone()):  # whatever mesh the caller is in
    return _restored(pathlib.Path(workdir), specs, first, base)


def _restored(workdir, specs, first, base):
  saved = logs.read_config(workdir)['config']
  few = config.from_json(peft.Config, saved['peft']) if 'peft' in saved else peft.Config()
  whole = peft.specs(few, specs)
  layers = jax.tree.leaves(specs['blocks'])[0].shape[0] if 'blocks' in specs else 0
  frozen = peft.freeze(few, layers) or saved['optim']['freeze']
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = params.abstract(whole, jax.tree.map(lambda _: here, whole))
  if not frozen:
    return _intact(workdir / 'checkpoints', abstract, first)[0]
  learned, meta = _intact(workdir / 'checkpoints', abstract, first, f'^(?!.*(?:{frozen}))')
  if few.mixout:
    return learned  # where it began served training alone
  key = jax.random.fold_in(jax.random.key(saved['seed']), 0)
  if saved['init_from']:
    given = params_from(saved['init_from'], params.abstract(specs if base is None else base), partial=True)
    given = peft.graft(given, whole, key)
  else:
    given = params.jit_once(functools.partial(params.init, whole))(key)  # as the run began: eager, the last bit differs
  rest = params.split(given, jax.tree.map(lambda x: x is None, learned, is_leaf=lambda x: x is None))[0]
  if fingerprint(rest) != meta['base']:
    raise CheckpointError(f'{workdir}: its frozen weights, from init_from={saved["init_from"]!r}, are not those it was '
                          'trained with; expected the same model there; put it back')
  return params.join(learned, rest)


def _intact(folder, abstract, first, pattern=''):
  """(parameters, meta) of step `first`, else of the newest step that is whole; a warning names what was passed over."""
  newest = sorted(checkpoint.steps(folder), key=lambda s: (s == first, s), reverse=True)
  rejected = []
  for step in newest:
    try:
      p = checkpoint.restore_params(folder, abstract, pattern, step=step, log=lambda line: None)
    except CheckpointError as error:
      rejected.append(f'step {step} ({seal.check(folder, step) or error})')
      continue
    if rejected:
      print(f'warning: rejected {"; ".join(rejected)}; using step {step} of {folder}', file=sys.stderr, flush=True)
    return p, checkpoint.read_meta(folder, step)
  raise CheckpointError(f'{folder}: no intact checkpoint{": rejected " * bool(rejected)}{"; ".join(rejected)}; '
                        'expected a sealed and undamaged step; copy one back, or name another model')


def _tokenizer(path):
  """The tokenizer in the folder, None where it holds none of its files."""
  return tokenizers.load(path) if tokenizer_files.names_in(path) else None
