"""LoRA, prefixes and prompts in the layout of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors.

Names come from the tables of `lm.models.hf`: a LoRA node's two matrices stand where its weight stands there. Where that
is one tensor of several of ours (GPT-2's c_attn), their one pair of matrices is ours side by side, of so much higher
rank; and read, theirs is shared by ours. A prefix is stored as keys and values, whatever made it.
"""

import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from lm import disk, params, peft
from lm.errors import CheckpointError, ConfigError
from lm.models import hf
from lm.peft_nodes import Lora, Prompted

_BASE = 'base_model.model.'
_TENSORS, _CONFIG = 'adapter_model.safetensors', 'adapter_config.json'
_CHANGE_BASE = ('pissa', 'olora', 'corda', 'loftq', 'lora_ga')


def save(folder: str | os.PathLike, c: Any, p: params.Tree, few: peft.Config, base: str = '',
         task: str | None = 'CAUSAL_LM') -> None:
  """Writes the learned part of `p`, a tree of `peft.specs(few, specs(c))`, for PEFT to load beside the base model.

  Args:
    c: the config of the model. base: name of the base model, which PEFT may look up.
    task: PEFT's task_type; None for an encoder.

  Raises:
    ConfigError: PEFT has no such method, or transformers no such model.
  """
  if few.method == 'lora':
    tensors, fields = _lora(p, few, _rows(c, p))
  elif few.method in ('prefix', 'prompt'):
    tensors, fields = _virtual(c, p, few)
  else:
    raise ConfigError(f"peft.method={few.method!r}; expected lora, prefix or prompt, all that PEFT's layout has")
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  disk.write(folder / _TENSORS, safetensors.numpy.save(tensors))
  fields |= {'base_model_name_or_path': base, 'task_type': task, 'inference_mode': True}
  disk.write(folder / _CONFIG, (json.dumps(fields, indent=2) + '\n').encode())


def load(folder: str | os.PathLike, c: Any, p: params.Tree) -> tuple[peft.Config, params.Tree]:
  """(what trains, the tree) of PEFT's folder for the model (c, p).

  Raises:
    ConfigError: another method, or an option that is not here. CheckpointError: damaged, or of another model.
  """
  folder = pathlib.Path(folder)
  try:
    fields = json.loads((folder / _CONFIG).read_bytes())
    with safetensors.safe_open(folder / _TENSORS, 'np') as file:
      tensors = {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}
    kind = fields['peft_type']
    if bad := [name for name, x in tensors.items() if not np.isfinite(x).all()]:
      raise ValueError(f'{bad[0]} is not finite')
  except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
    raise CheckpointError(f'{folder}: {type(error).__name__}: {str(error)[:200]}; expected {_CONFIG} and {_TENSORS} as '
                          'PEFT saves them') from error
  if kind == 'LORA':
    return _read_lora(folder, fields, tensors, c, p)
  if kind not in ('PREFIX_TUNING', 'PROMPT_TUNING'):
    raise ConfigError(f'{folder}: peft_type={kind!r}; expected LORA, PREFIX_TUNING or PROMPT_TUNING')
  found = tensors.get('prompt_embeddings')
  if found is None or found.ndim != 2:
    raise CheckpointError(f'{folder}: no matrix prompt_embeddings; expected one of a row a virtual token')
  if others := sorted(tensors.keys() - {'prompt_embeddings'}):
    raise CheckpointError(f'{folder}: {others[0]} has no place in this model; expected prompt_embeddings alone')
  if kind == 'PROMPT_TUNING':
    _same(folder, 'prompt_embeddings', found.shape[1], p['embed']['tokens'].shape[1])
    table = Prompted(p['embed']['tokens'], found)
    return peft.Config('prompt', train='', length=len(found)), p | {'embed': p['embed'] | {'tokens': table}}
  L, _, K, H = p['blocks']['attn']['k'].shape
  sizes = ('num_layers', 'num_attention_heads', 'token_dim')
  _same(folder, ', '.join(sizes), tuple(fields.get(name) for name in sizes), (L, K, K * H))
  _same(folder, 'prompt_embeddings', found.shape[1], 2 * L * K * H)
  keys, values = found.reshape(-1, L, 2, K, H).transpose(2, 1, 0, 3, 4)
  attn = p['blocks']['attn'] | {'prefix_k': keys, 'prefix_v': values}
  return peft.Config('prefix', train='', length=len(found), hidden=0), p | {'blocks': p['blocks'] | {'attn': attn}}


def _rows(c, p):
  """Rows of the blocks' matrices."""
  kind, family = hf.family_of(c, p)
  if kind == 'deberta':
    raise ConfigError('a DeBERTa v1 keeps q, k and v in one tensor, head by head, for which LoRA is not cut; expected '
                      'v2, v3 or another model')
  return [row for row in family.rows if row.paths[0].startswith('blocks/') and ',' in row.layout]


def _lora(p, few, rows):
  nodes = {path: node for path, node in _nodes(p) if isinstance(node, Lora)}
  tensors, modules, alphas = {}, [], {}
  for row in rows:
    mine = [nodes.get(path) for path in row.paths]
    if not any(mine):
      continue
    modules.append(row.name.removesuffix('.weight'))
    scale = max(n.scale for n in mine if n is not None)  # one for a tensor: of several of ours, b takes the rest
    for layer in range(next(n for n in mine if n is not None).w.shape[0]):
      a, b = _side_by_side([None if n is None else _matrices(jax.tree.map(lambda x, i=layer: x[i], n), scale)
                            for n in mine])
      module = row.name.format(layer).removesuffix('.weight')
      tensors |= {f'{_BASE}{module}.lora_A.weight': a, f'{_BASE}{module}.lora_B.weight': b}
      alphas[module] = len(a), scale * (len(a)**0.5 if few.rank_stabilised else len(a))
  left = nodes.keys() - {path for row in rows for path in row.paths}
  if left:
    raise ConfigError(f'peft.targets: {sorted(left)[0]} has no weight of its own in transformers; name others')
  fused = any(len(row.paths) > 1 for row in rows)
  rank, keep = min(alphas.values())
  patterns = {re.escape(module): found for module, found in alphas.items()}
  return tensors, {
      'peft_type': 'LORA', 'r': rank, 'lora_alpha': keep, 'lora_dropout': few.rate, 'bias': 'none',
      'target_modules': _targets(modules), 'fan_in_fan_out': fused, 'use_rslora': few.rank_stabilised,
      'rank_pattern': {name: r for name, (r, _) in patterns.items() if r != rank},
      'alpha_pattern': {name: alpha for name, (_, alpha) in patterns.items() if alpha != keep}}


def _targets(modules):
  """A pattern that PEFT matches with whole names: a last name, such as dense, others may have that have no LoRA."""
  stem = modules[0].partition('{}')[0]  # of all: they are of the blocks
  kinds = '|'.join(re.escape(module.removeprefix(f'{stem}{{}}.')) for module in modules)
  return rf'{re.escape(stem)}\d+\.({kinds})'


def _nodes(p):
  flat = jax.tree_util.tree_flatten_with_path(p, is_leaf=peft.is_node)[0]
  return [(params.path_of(path), node) for path, node in flat]


def _matrices(node, scale):
  """(A [R, inputs], B [outputs, R]) of one layer, as torch has them, for a tensor with that `scale`."""
  rank = node.lora_a.shape[-1]
  b = np.asarray(node.lora_b) * (1 if node.scale == scale else np.float32(node.scale / scale))
  return (np.ascontiguousarray(np.asarray(node.lora_a).reshape(-1, rank).T),
          np.ascontiguousarray(b.reshape(rank, -1).T))


def _side_by_side(pairs):
  """One pair for weights that are one tensor there; a weight without LoRA has outputs of 0."""
  if len(pairs) == 1:
    return pairs[0]
  a = np.concatenate([x[0] for x in pairs if x is not None])
  outputs = next(x[1].shape[0] for x in pairs if x is not None)  # of each: q, k and v of GPT-2 are alike
  b, at = np.zeros((outputs * len(pairs), len(a)), np.float32), 0
  for i, pair in enumerate(pairs):
    if pair is not None:
      rank = len(pair[0])
      b[i * outputs:(i + 1) * outputs, at:at + rank] = pair[1]
      at += rank
  return a, b


def _virtual(c, p, few):
  L, heads = c.layers, getattr(c, 'kv_heads', c.heads)
  fields = {'num_virtual_tokens': few.length, 'num_transformer_submodules': 1, 'num_layers': L}
  if few.method == 'prompt':
    return {'prompt_embeddings': np.asarray(p['embed']['tokens'].prompt)}, fields | {
        'peft_type': 'PROMPT_TUNING', 'token_dim': c.embed, 'num_attention_heads': c.heads,
        'prompt_tuning_init': 'RANDOM'}
  attn = peft.materialise(p)['blocks']['attn']
  both = np.stack([np.asarray(attn['prefix_k']), np.asarray(attn['prefix_v'])])  # [2, L, P, K, H]
  flat = np.ascontiguousarray(both.transpose(2, 1, 0, 3, 4).reshape(few.length, -1))
  return {'prompt_embeddings': flat}, fields | {
      'peft_type': 'PREFIX_TUNING', 'token_dim': heads * c.head_dim, 'num_attention_heads': heads,
      'prefix_projection': False, 'encoder_hidden_size': heads * c.head_dim}


def _read_lora(folder, fields, tensors, c, p):
  for name, allowed in (('bias', ('none', None)), ('use_dora', (False, None)), ('modules_to_save', (None, [])),
                        ('alora_invocation_tokens', (None, [])), ('layers_to_transform', (None,))):
    if fields.get(name) not in allowed:
      raise ConfigError(f'{folder}: {name}={fields[name]!r}; expected {allowed[0]!r}; merge it there first')
  if str(fields.get('init_lora_weights')).lower().startswith(_CHANGE_BASE):  # once more whenever PEFT loads it
    raise ConfigError(f'{folder}: init_lora_weights={fields["init_lora_weights"]!r} changes the base; expected a start '
                      'that leaves it as it is; merge it there first')
  _check_fields(folder, fields)
  known, out, paths = set(), dict(params.flatten(p)), []
  stabilised = bool(fields.get('use_rslora'))
  for row in _rows(c, p):
    L = out[row.paths[0]].shape[0] if row.paths[0] in out else 0  # DeBERTa v2 may share position_k with k
    modules = [row.name.format(i).removesuffix('.weight') for i in range(L)]
    if f'{_BASE}{_without_body(row.name)}'.format(0).removesuffix('.weight') + '.lora_A.weight' in tensors:
      modules = list(map(_without_body, modules))  # of a model without a head
    names = [f'{_BASE}{module}.lora_{{}}.weight' for module in modules]
    if not names or names[0].format('A') not in tensors:
      continue
    try:
      a, b = (np.stack([tensors[name.format(which)] for name in names]) for which in 'AB')
    except (KeyError, ValueError) as error:
      raise CheckpointError(f'{folder}: {row.name}: {error}; expected both matrices of every layer, of one rank'
                            ) from error
    known |= {name.format(which) for name in names for which in 'AB'}
    rank = a.shape[1]
    _same(folder, f'{row.name}, rank of lora_B', b.shape[2], rank)
    alpha, *others = {_alpha(fields, module) for module in modules}
    if others:
      raise ConfigError(f'{folder}: alpha_pattern: {sorted([alpha, *others])} for {row.name}; expected one number for '
                        'all layers; merge it there first')
    scale = alpha / (rank**0.5 if stabilised else rank)
    parts = np.split(b, len(row.paths), axis=1)
    for path, part in zip(row.paths, parts, strict=True):
      w = out[path]
      inputs = 1 if w.ndim == 3 or w.shape[1] == a.shape[2] else 2
      _same(folder, row.name, (a.shape[2], part.shape[1]), (int(np.prod(w.shape[1:1 + inputs])),
                                                            int(np.prod(w.shape[1 + inputs:]))))
      out[path] = Lora(w, a.transpose(0, 2, 1).reshape(L, *w.shape[1:1 + inputs], rank),
                       part.transpose(0, 2, 1).reshape(L, rank, *w.shape[1 + inputs:]), scale)
      paths.append(path)
  if unknown := sorted(tensors.keys() - known):
    raise CheckpointError(f'{folder}: {unknown[0]} has no place in this model; expected LoRA of weights it has')
  if not paths:
    raise CheckpointError(f'{folder}: no LoRA matrices; expected some of a weight of this model')
  few = peft.Config('lora', train='', targets=f'^({"|".join(paths)})$', rank=fields.get('r', rank),
                    alpha=float(fields['lora_alpha']), rank_stabilised=stabilised,
                    rate=float(fields.get('lora_dropout') or 0.0))
  leaves = [dataclasses.replace(out[path], rate=few.rate) if isinstance(out[path], Lora) else out[path]
            for path in params.flatten(p)]
  return few, jax.tree.unflatten(jax.tree.structure(p), leaves)


def _check_fields(folder, fields):
  number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
  pattern = lambda x: x is None or isinstance(x, dict) and all(
      number(value) and isinstance(name, str) and _compiles(name) for name, value in x.items())
  for name, fits, want in (
      ('lora_alpha', number, 'a number'), ('r', lambda x: isinstance(x, int) and x > 0, 'a whole number above 0'),
      ('lora_dropout', lambda x: x is None or number(x) and 0 <= x < 1, 'a share'),
      ('alpha_pattern', pattern, 'numbers by pattern')):
    if not fits(fields.get(name)):
      raise CheckpointError(f'{folder}: {_CONFIG}: {name}={fields.get(name)!r}; expected {want}')


def _compiles(pattern):
  try:
    return bool(re.compile(pattern))
  except re.error:
    return False


def _without_body(name):
  """The name of a weight in a model that has no head, and is not itself a part of one."""
  return re.sub(r'^(bert|roberta|electra|deberta|model|transformer)\.', '', name)


def _alpha(fields, module):
  return next((alpha for pattern, alpha in (fields.get('alpha_pattern') or {}).items()
               if re.fullmatch(rf'(.*\.)?({pattern})', module)), fields['lora_alpha'])


def _same(folder, name, found, expected):
  if found != expected:
    raise CheckpointError(f'{folder}: {name}: {found}; expected {expected}; it was made for another model')
