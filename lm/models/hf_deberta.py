"""The DeBERTa architectures of transformers as tables: v1, and v2 with v3, with their masked language modelling head.

Layouts and shape letters: see `lm.models.tables`; E width of the token embedding, X rows of a small table, C width of
the convolution.
"""

from collections.abc import Collection
import dataclasses
from typing import Any

from lm import nn
from lm.models import deberta, heads, tables
from lm.models.tables import Family, Fields, linear, norm, Row

_LAYER = 'deberta.encoder.layer.{}'
_SELF = f'{_LAYER}.attention.self'
_EMBED = (
    Row('deberta.embeddings.word_embeddings.weight', 'V,E->VE', 'embed/tokens'),
    Row('deberta.embeddings.position_embeddings.weight', 'X,E->XE', 'embed/positions'),
    Row('deberta.embeddings.token_type_embeddings.weight', 'X,E->XE', 'embed/types'),
    Row('deberta.embeddings.embed_proj.weight', 'D,E->ED', 'project/kernel'),
    *norm('deberta.embeddings.LayerNorm', 'embed/norm'),
    Row('deberta.encoder.rel_embeddings.weight', 'X,D->XD', 'relative/table'),
)
_REST = (
    *linear(f'{_LAYER}.attention.output.dense', 'D,NH->NHD', 'blocks/attn/o'),
    *norm(f'{_LAYER}.attention.output.LayerNorm', 'blocks/attn_norm'),
    *linear(f'{_LAYER}.intermediate.dense', 'F,D->DF', 'blocks/mlp/up'),
    *linear(f'{_LAYER}.output.dense', 'D,F->FD', 'blocks/mlp/down'),
    *norm(f'{_LAYER}.output.LayerNorm', 'blocks/mlp_norm'),
    *linear('cls.predictions.transform.dense', 'E,D->DE', 'mlm/dense'),
    *norm('cls.predictions.transform.LayerNorm', 'mlm/norm'),
    Row('cls.predictions.bias', 'V->V', 'mlm/bias'),
)
_V1 = (
    *_EMBED,
    Row(f'{_SELF}.in_proj.weight', 'NcH,D->DNH', *(f'blocks/attn/{name}' for name in 'qkv')),
    Row(f'{_SELF}.q_bias', 'NH->NH', 'blocks/attn/q_bias'),
    Row(f'{_SELF}.v_bias', 'NH->NH', 'blocks/attn/v_bias'),
    Row(f'{_SELF}.pos_proj.weight', 'NH,D->DNH', 'blocks/attn/position_k'),
    *linear(f'{_SELF}.pos_q_proj', 'NH,D->DNH', 'blocks/attn/position_q'),
    *_REST,
)
_V2 = (
    *_EMBED,
    *norm('deberta.encoder.LayerNorm', 'relative/norm'),
    *linear(f'{_SELF}.query_proj', 'NH,D->DNH', 'blocks/attn/q'),
    *linear(f'{_SELF}.key_proj', 'NH,D->DNH', 'blocks/attn/k'),
    *linear(f'{_SELF}.value_proj', 'NH,D->DNH', 'blocks/attn/v'),
    *linear(f'{_SELF}.pos_key_proj', 'NH,D->DNH', 'blocks/attn/position_k'),
    *linear(f'{_SELF}.pos_query_proj', 'NH,D->DNH', 'blocks/attn/position_q'),
    Row('deberta.encoder.conv.conv.weight', 'E,D,C->CDE', 'conv/kernel'),
    Row('deberta.encoder.conv.conv.bias', 'D->D', 'conv/bias'),
    *norm('deberta.encoder.conv.LayerNorm', 'conv/norm'),
    *_REST,
)

_GELU = {'gelu': 'gelu_erf', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh'}
_NAMES = {'gelu_erf': 'gelu', 'gelu_tanh': 'gelu_new', 'tanh': 'tanh'}


def _read(f: Fields, **changes: Any) -> deberta.Config:
  for name, value in (('tie_word_embeddings', True), ('legacy', True), ('talking_head', False), ('conv_groups', 1)):
    f.fixed(name, value)
  f.drop('gradient_checkpointing|pooler_.*|padding_idx')
  D, N = f.take('hidden_size', int), f.take('num_attention_heads', int)
  if D % N:
    raise f.error('num_attention_heads', N, f'a divisor of hidden_size={D}')
  f.fixed('attention_head_size', D // N)
  length = f.take('max_position_embeddings', int, 512)
  dropout, width = f.take('hidden_dropout_prob', float, 0.1), f.take('embedding_size', int, D)
  return deberta.Config(
      vocab=f.take('vocab_size', int), length=length, types=_count(f, 'type_vocab_size'),
      layers=f.take('num_hidden_layers', int), embed=D, heads=N, head_dim=D // N, mlp=f.take('intermediate_size', int),
      token_embed=0 if width == D else width, positions=f.take('position_biased_input', bool, True), terms=_terms(f),
      relative=_count(f, 'max_relative_positions') or length, activation=_activation(f, 'hidden_act', 'gelu', _GELU),
      norm_eps=f.take('layer_norm_eps', float, 1e-7), std=f.take('initializer_range', float, 0.02),
      dropout=nn.Dropout(dropout, f.take('attention_probs_dropout_prob', float, 0.1), dropout,
                         f.take('cls_dropout', float, dropout)), **changes)


def _read_v2(f: Fields) -> deberta.Config:
  kind = f.take('norm_rel_ebd', str, 'none')
  if kind not in ('none', 'layer_norm'):
    raise f.error('norm_rel_ebd', kind, "'layer_norm' or 'none'")
  return _read(f, buckets=_count(f, 'position_buckets'), shared=f.take('share_att_key', bool, False), key_bias=True,
               relative_norm=kind == 'layer_norm', conv=_count(f, 'conv_kernel_size'),
               conv_activation=_activation(f, 'conv_act', 'tanh', _GELU | {'tanh': 'tanh'}))


def _count(f: Fields, name: str) -> int:
  """A number whose absence is written null, 0 or -1."""
  value = f.raw(name)
  if value is not None and type(value) is not int:
    raise f.error(name, value, 'a whole number')
  return max(value or 0, 0)


def _activation(f: Fields, name: str, default: str, known: dict[str, str]) -> str:
  value = f.take(name, str, default)
  if value not in known:
    raise f.error(name, value, ' or '.join(known))
  return known[value]


def _terms(f: Fields) -> tuple[str, ...]:
  """From a list or 'c2p|p2c'. Without relative_attention there is none: their scale would still count them."""
  value = f.raw('pos_att_type') or []
  names = [name.strip() for name in value.lower().split('|')] if isinstance(value, str) else value
  terms = tuple(term for term in ('c2p', 'p2c') if isinstance(names, list) and term in names)
  if not isinstance(names, list) or len(names) != len(terms):
    raise f.error('pos_att_type', value, "a list of 'c2p', 'p2c' or both")
  relative = f.take('relative_attention', bool, False)
  if relative != bool(terms):
    raise f.error('relative_attention', relative, f'{bool(terms)}, as pos_att_type={value!r}')
  return terms


def _write(c: deberta.Config) -> dict[str, Any]:
  return {'tie_word_embeddings': True, 'legacy': True, 'initializer_range': c.std, 'max_position_embeddings': c.length,
          'type_vocab_size': c.types, 'num_hidden_layers': c.layers, 'hidden_size': c.embed,
          'num_attention_heads': c.heads, 'intermediate_size': c.mlp, 'embedding_size': c.width,
          'position_biased_input': c.positions, 'relative_attention': bool(c.terms), 'pos_att_type': list(c.terms),
          'max_relative_positions': c.relative, 'hidden_act': _NAMES[c.activation], 'layer_norm_eps': c.norm_eps,
          'hidden_dropout_prob': c.dropout.hidden, 'attention_probs_dropout_prob': c.dropout.attention,
          'cls_dropout': c.dropout.classifier}


def _write_v2(c: deberta.Config) -> dict[str, Any]:
  return _write(c) | {'position_buckets': c.buckets or -1, 'share_att_key': c.shared, 'conv_kernel_size': c.conv,
                      'norm_rel_ebd': 'layer_norm' if c.relative_norm else 'none',
                      'conv_act': _NAMES[c.conv_activation]}


def _family(name: str, rows: tuple[Row, ...], read, write, needs: dict[str, tuple]) -> Family:
  """Their position table beside a model that does not read it, and the heads of microsoft's own code, are left out."""
  return Family(
      {f'{name}ForMaskedLM': ('mlm',), f'{name}Model': ()}, 'deberta.', rows,
      {'cls.predictions.decoder.weight': 'deberta.embeddings.word_embeddings.weight',
       'cls.predictions.decoder.bias': 'cls.predictions.bias'},
      r'deberta\.embeddings\.position_(ids|embeddings\.weight)|(lm|mask)_predictions\..*', deberta.specs, read, write,
      lambda c: {'head_dim': (c.embed / c.heads,),
                 'dropout': (dataclasses.replace(c.dropout, embedding=c.dropout.hidden),), **needs},
      {'mlm': lambda c: heads.mlm_specs(c.vocab, c.width, c.embed, c.std)})


FAMILIES = {
    'deberta': _family('Deberta', _V1, _read, _write, {
        'shared': (False,), 'key_bias': (False,), 'buckets': (0,), 'relative_norm': (False,), 'conv': (0,)}),
    'deberta-v2': _family('DebertaV2', _V2, _read_v2, _write_v2, {'key_bias': (True,)}),
}


def family(c: deberta.Config, found: Collection[str]) -> tuple[str, Family]:
  """(model_type, family) of the architecture that computes `c`; `found` names the heads.

  Raises:
    ConfigError: there is none; names a field that stands in the way.
  """
  del found
  kind = 'deberta-v2' if c.key_bias else 'deberta'
  return kind, tables.checked(FAMILIES[kind], c)
