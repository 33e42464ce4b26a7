"""Hugging Face model folders (config.json and safetensors), both ways.

`lm.models.hf_decoder`, `hf_encoder` and `hf_deberta` say which tensor is which parameter. Nothing here runs code of a
model: pickles are refused.
"""

from collections.abc import Sequence
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import struct
from typing import Any

import numpy as np
import safetensors
from safetensors import numpy as st

from lm import disk, params
from lm.errors import CheckpointError, ConfigError
from lm.models import decoder, encoder, hf_classifier, hf_deberta, hf_decoder, hf_encoder, tables
from lm.text import export, tokenizer, vocabulary

FAMILIES = hf_decoder.FAMILIES | hf_encoder.FAMILIES | hf_deberta.FAMILIES

_SUMS = 'SHA256SUMS'  # as `sha256sum` writes it; verified where a folder has one
_FLOATS = ('F32', 'F16', 'BF16')
_PICKLES = ('.bin', '.pt', '.pth', '.ckpt')
_NEUTRAL = (  # fields of every config that change nothing in the forward pass of these models
    '_name_or_path|transformers_version|(torch_)?dtype|use_cache|_?attn_implementation.*|(bos|eos|pad|sep)_token_id|'
    'decoder_start_token_id|tokenizer_class|prefix|task_specific_params|problem_type|finetuning_task|id2label|label2id|'
    'num_labels|return_dict|output_(attentions|hidden_states|past)|torchscript|use_bfloat16|do_sample|'
    '(max|min)_length|temperature|top_[kp]|typical_p|(repetition|length|diversity)_penalty|num_beams|num_beam_groups|'
    'num_return_sequences|(encoder_)?no_repeat_ngram_size|_num_labels|unsloth_.*|chunk_size_feed_forward|generator_size')


def load(folder: str | os.PathLike) -> tuple[Any, params.Tree]:
  """(config, parameters) of a folder: a `decoder.Config`, or an encoder's; parameters are f32 NumPy arrays.

  They are those of `specs(config)`, and beside them an encoder's heads: all that the architecture has or the weights
  hold, under 'mlm', 'pooler', 'nsp', 'rtd', 'classify' (`lm.models.heads`).

  Reads model.safetensors or the shards of model.safetensors.index.json, of f32, f16 or bf16. A vocabulary padded
  beyond config.json's vocab_size keeps its rows: the config then counts them.

  Raises:
    ConfigError: an architecture or an option of config.json that the model lacks.
    CheckpointError: damaged or missing files; a tensor that is missing, unknown, or of another shape.
  """
  folder = pathlib.Path(folder)
  where = folder / 'config.json'
  fields = tables.Fields(where, _json(where))
  kind = fields.take('model_type', str)
  family = FAMILIES.get(kind)
  if family is None:
    raise fields.error('model_type', kind, ' or '.join(map(repr, FAMILIES)))
  names, tensors = fields.take('architectures', list, []), None
  if names and names[0] not in family.architectures:  # a classifier, perhaps
    tensors = _modern(_tensors(folder), folder)
    family = hf_classifier.family(kind, family, hf_classifier.classes(kind, tensors))
  if names not in ([], *([name] for name in family.architectures)):
    raise fields.error('architectures', names, ' or '.join(map(repr, family.architectures)))
  c = family.read(fields)
  fields.drop(_NEUTRAL)
  fields.done()
  tensors = _modern(_tensors(folder), folder) if tensors is None else tensors
  if not any(name.startswith(family.prefix) for name in tensors):
    tensors = {name if name in family.copies else family.prefix + name: x for name, x in tensors.items()}
  heads = [head for head in family.heads if head in (family.architectures[names[0]] if names else ()) or any(
      row.name in tensors for row in family.rows if row.paths[0].startswith(f'{head}/'))]
  flat = params.flatten(family.tree(c, heads))
  own = {row.name for row in family.rows if row.paths[0] in flat}
  for copy, original in family.copies.items():
    if copy not in own and copy in tensors and original in tensors:
      if not np.array_equal(tensors[copy].read(), tensors[original].read()):
        raise CheckpointError(f'{folder}: tensor {copy} differs from {original}; expected a copy, as config.json ties '
                              'them; set tie_word_embeddings to false there')
      del tensors[copy]
  return tables.fill(c, lambda c: family.tree(c, heads), family.rows, tensors, folder, family.ignored)


def ends(folder: str | os.PathLike) -> tuple[int, ...]:
  """Ids that end a text: eos_token_id of generation_config.json, else of config.json; none where neither has it.

  Raises:
    CheckpointError: it is neither an id nor a list of them.
  """
  for path in (pathlib.Path(folder) / 'generation_config.json', pathlib.Path(folder) / 'config.json'):
    given = _json(path).get('eos_token_id') if path.is_file() else None
    found = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(i) is int for i in found):
      raise CheckpointError(f'{path}: eos_token_id={given!r}; expected a token id, or a list of them; mend it')
    if found:
      return tuple(i for i in found if i >= 0)
  return ()


def classes(folder: str | os.PathLike) -> tuple[str, ...]:
  """Names of a classifier's classes, in order: id2label of config.json, without which LABEL_0 and LABEL_1. One is the
  name of a number.

  Raises:
    CheckpointError: it does not number them. ConfigError: a text may have several of them.
  """
  path = pathlib.Path(folder) / 'config.json'
  fields = tables.Fields(path, _json(path))
  given = fields.raw('id2label') or {'0': 'LABEL_0', '1': 'LABEL_1'}
  fields.fixed('problem_type', 'regression' if len(given) == 1 else 'single_label_classification')
  names = [given.get(str(i)) for i in range(len(given))] if isinstance(given, dict) else [None]
  if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
    raise CheckpointError(f'{path}: id2label={str(given)[:80]}; expected names by the numbers from 0 on; mend it')
  return tuple(names)


def save(folder: str | os.PathLike, c: Any, p: params.Tree, text: tokenizer.Tokenizer | None = None,
         ends: Sequence[int] = (), classes: Sequence[str] = (), shard_bytes: int = 4 << 30) -> None:
  """Writes a folder that transformers loads, with f32 weights; it appears whole or not at all.

  Args:
    folder: new, or empty.
    p: arrays of `specs(c)`, an encoder's heads beside them; they choose the architecture.
    text: its files are written beside (see `lm.text.export`), and its begin, end and padding ids into config.json.
    ends: ids that end a text, where they are others than the tokenizer's end.
    classes: names of what a head under 'classify' tells apart, in order.
    shard_bytes: most bytes of a weight file, unless one tensor is larger.

  Raises:
    ConfigError: no architecture of theirs computes this config, or the tokenizer has more ids than the model.
    CheckpointError: the parameters do not fit the config, or the folder cannot be written.
  """
  kind, family = family_of(c, p)
  family = hf_classifier.of(kind, family, p) if 'classify' in p else family
  heads = [head for head in family.heads if head in p]
  specs = family.tree(c, heads)
  want, have = ({path: x.shape for path, x in params.flatten(tree).items()} for tree in (specs, p))
  for path in want | have:
    if want.get(path) != have.get(path):
      raise CheckpointError(f'{folder}: parameter {path} has shape {have.get(path)}; expected {want.get(path)}; merge '
                            'what was added to the model, or take the config that its parameters were made with')
  if text is not None and text.vocab_size > c.vocab:
    raise ConfigError(f'{folder}: the tokenizer has {text.vocab_size} ids; expected at most model.vocab={c.vocab}; '
                      'give the tokenizer that the model was trained with')
  if kind == 'roberta' and text is not None and c.offset - 1 in _in_rows(text):
    raise ConfigError(f'{folder}: id {c.offset - 1} of the tokenizer stands in texts, and transformers\' RoBERTa gives '
                      'it no position; train a tokenizer with the control symbols [CLS], [SEP] and [MASK]')
  architecture = next(name for name, needed in family.architectures.items() if set(needed) <= set(heads))
  fields = {'architectures': [architecture], 'model_type': kind, 'dtype': 'float32', 'vocab_size': c.vocab}
  fields |= {f'{role}_token_id': getattr(text, f'{role}_id', None) for role in ('bos', 'eos', 'pad')}
  if classes:
    fields |= {'id2label': dict(enumerate(classes)), 'label2id': {name: i for i, name in enumerate(classes)}}
    fields |= {'problem_type': 'regression'} if len(classes) == 1 else {}
  if ends:
    fields['eos_token_id'] = ends[0] if len(ends) == 1 else list(ends)
  with disk.new_folder(folder, (OSError, safetensors.SafetensorError)) as tmp:
    _write_json(tmp / 'config.json', fields | family.write(c))
    for name, content in (export.files(text, not isinstance(c, decoder.Config)) if text else {}).items():
      (tmp / name).write_bytes(content)
    flat = {path: np.asarray(x) for path, x in params.flatten(p).items()}
    _write_tensors(tmp, list(tables.instances(family.rows, specs)), flat, shard_bytes)


def _in_rows(text: tokenizer.Tokenizer) -> set[int]:
  """Ids of an encoder's rows: words, [CLS], [SEP] and [MASK]."""
  special = vocabulary.special_ids(text)
  return set(range(text.vocab_size)) - set(text.control.values()) | {special.cls, special.sep, special.mask}


def family_of(c: Any, p: params.Tree) -> tuple[str, tables.Family]:
  """(model_type, family) of a config and the heads among the keys of `p`."""
  if isinstance(c, decoder.Config):
    return hf_decoder.family(c)
  return (hf_encoder if isinstance(c, encoder.Config) else hf_deberta).family(c, p.keys())


def _tensors(folder: pathlib.Path) -> dict[str, tables.Tensor]:
  """Every tensor of the folder's safetensors, opened but not read."""
  index, files = None, ['model.safetensors']
  if not (folder / files[0]).is_file():
    if not (folder / 'model.safetensors.index.json').is_file():
      pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES)
      found = f'{pickles[0]} is a pickle, which can run code' if pickles else 'no weights'
      raise CheckpointError(f'{folder}: {found}; expected model.safetensors; save the model again with transformers')
    index = _json(folder / 'model.safetensors.index.json').get('weight_map')
    files = sorted(set(index.values())) if isinstance(index, dict) and all(
        isinstance(file, str) for file in index.values()) else ['']
    for file in files:
      if not re.fullmatch(r'[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors', file):
        raise CheckpointError(f'{folder}/model.safetensors.index.json: file name {file[:80]!r}; expected a safetensors '
                              'file of the same folder; copy the index again')
  tensors, home = {}, {}
  for file in files:
    for name, tensor in _open(folder / file).items():
      if name in tensors:
        raise CheckpointError(f'{folder}: tensor {name[:100]!r} is in {home[name]} and in {file}; expected it once; '
                              'copy again')
      tensors[name], home[name] = tensor, file
  if index is not None and index != home:
    name = next(n for n in index | home if index.get(n) != home.get(n))
    raise CheckpointError(f'{folder}/model.safetensors.index.json: tensor {name[:100]!r} in {index.get(name)}; '
                          f'expected {home.get(name)}, where it lies; copy the folder again')
  return tensors


def _modern(tensors: dict[str, tables.Tensor], folder: pathlib.Path) -> dict[str, tables.Tensor]:
  """Names of before 2019, which the published BERT still has: LayerNorm.gamma and beta."""
  new = {name: name.replace('LayerNorm.gamma', 'LayerNorm.weight').replace('LayerNorm.beta', 'LayerNorm.bias')
         for name in tensors}
  for name, modern in new.items():
    if name != modern and modern in tensors:
      raise CheckpointError(f'{folder}: tensors {name[:100]} and {modern[:100]} are one; expected it once; copy again')
  return {new[name]: x for name, x in tensors.items()}


def _open(path: pathlib.Path) -> dict[str, tables.Tensor]:
  try:
    _verify(path)
    file = safetensors.safe_open(path, framework='np')
    with path.open('rb') as f:
      header = f.read(struct.unpack('<Q', f.read(8))[0])
    json.loads(header, object_pairs_hook=_unique)  # the library keeps the last of two equal names
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise CheckpointError(f'{path}: {_line(error)}; expected a whole safetensors file; copy it again') from error
  return {name: tables.Tensor(tuple(file.get_slice(name).get_shape()), functools.partial(_read, file, name, path))
          for name in file.keys()}


def _read(file, name, path):
  kind = file.get_slice(name).get_dtype()
  if kind not in _FLOATS:
    raise CheckpointError(f'{path}: tensor {name} is {kind}; expected {", ".join(_FLOATS)}; save the model unquantised')
  return np.asarray(file.get_tensor(name), np.float32)


def _unique(pairs):
  if len(out := dict(pairs)) != len(pairs):
    raise ValueError('a name stands twice in the header')
  return out


def _verify(path: pathlib.Path) -> None:
  """Compares a weight file with the folder's SHA256SUMS, where there is one that lists it."""
  sums = path.with_name(_SUMS)
  lines = sums.read_text(errors='replace').splitlines() if sums.is_file() else []
  want = {name: digest for digest, _, name in (line.partition('  ') for line in lines)}.get(path.name)
  if want is not None and want != _sha256(path):
    raise CheckpointError(f'{path}: sha256 is not that of {_SUMS}; expected {want[:16]}...; copy the file again')


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    data = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    raise CheckpointError(f'{path}: {_line(error)}; expected a JSON object; copy the folder again') from error
  if not isinstance(data, dict):
    raise CheckpointError(f'{path}: {type(data).__name__}; expected a JSON object; copy the folder again')
  return data


def _line(error: Exception) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'


def _write_json(path: pathlib.Path, data: dict[str, Any]) -> None:
  path.write_text(json.dumps(data, indent=2, sort_keys=True) + '\n')


def _write_tensors(folder, instances, flat, shard_bytes) -> None:
  shards, size = [[]], 0
  for item in instances:
    nbytes = 4 * math.prod(item[1].shape(item[3]))
    if shards[-1] and size + nbytes > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(item)
    size += nbytes
  names = [f'model-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
  if len(shards) == 1:
    names = ['model.safetensors']
  else:
    home = {item[0]: name for name, shard in zip(names, shards, strict=True) for item in shard}
    total = 4 * sum(x.size for x in flat.values())
    _write_json(folder / 'model.safetensors.index.json', {'metadata': {'total_size': total}, 'weight_map': home})
  for name, shard in zip(names, shards, strict=True):
    tensors = {theirs: row.merge([np.asarray(flat[path][index], np.float32) for path in row.paths])
               for theirs, row, index, _ in shard}
    st.save_file(tensors, folder / name, metadata={'format': 'pt'})
    (folder / name).chmod((folder / 'config.json').stat().st_mode)  # the library's 0600 would shut others out
  (folder / _SUMS).write_text(''.join(f'{_sha256(folder / name)}  {name}\n' for name in names))
