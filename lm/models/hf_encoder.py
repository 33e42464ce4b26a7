"""The encoder architectures of transformers as tables: BERT, RoBERTa and ELECTRA, with their pre-training heads.

Layouts and shape letters: see `lm.models.tables`; E width of the token embedding, X rows of a small table.
"""

from collections.abc import Collection
from typing import Any

from lm import nn
from lm.models import encoder, heads, tables
from lm.models.tables import Family, Fields, linear, norm, Row

_GELU = {'gelu': 'gelu_erf', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh'}


def _body(name: str) -> tuple[Row, ...]:
  layer = f'{name}.encoder.layer.{{}}'
  return (
      Row(f'{name}.embeddings.word_embeddings.weight', 'V,E->VE', 'embed/tokens'),
      Row(f'{name}.embeddings.position_embeddings.weight', 'X,E->XE', 'embed/positions'),
      Row(f'{name}.embeddings.token_type_embeddings.weight', 'X,E->XE', 'embed/types'),
      *norm(f'{name}.embeddings.LayerNorm', 'embed/norm'),
      *linear(f'{layer}.attention.self.query', 'NH,D->DNH', 'blocks/attn/q'),
      *linear(f'{layer}.attention.self.key', 'NH,D->DNH', 'blocks/attn/k'),
      *linear(f'{layer}.attention.self.value', 'NH,D->DNH', 'blocks/attn/v'),
      *linear(f'{layer}.attention.output.dense', 'D,NH->NHD', 'blocks/attn/o'),
      *norm(f'{layer}.attention.output.LayerNorm', 'blocks/attn_norm'),
      *linear(f'{layer}.intermediate.dense', 'F,D->DF', 'blocks/mlp/up'),
      *linear(f'{layer}.output.dense', 'D,F->FD', 'blocks/mlp/down'),
      *norm(f'{layer}.output.LayerNorm', 'blocks/mlp_norm'),
  )


def _mlm(transform: str, layer_norm: str, bias: str) -> tuple[Row, ...]:
  return (*linear(f'{transform}.dense', 'E,D->DE', 'mlm/dense'), *norm(f'{transform}.{layer_norm}', 'mlm/norm'),
          Row(bias, 'V->V', 'mlm/bias'))


def _kernel(name: str, layout: str, path: str) -> tuple[Row, Row]:
  outputs = layout.split(',')[0]
  return (Row(f'{name}.weight', layout, f'{path}/kernel'), Row(f'{name}.bias', f'{outputs}->{outputs}', f'{path}/bias'))


_BERT = (
    *_body('bert'),
    *_mlm('cls.predictions.transform', 'LayerNorm', 'cls.predictions.bias'),
    *_kernel('bert.pooler.dense', 'X,D->DX', 'pooler'),
    *_kernel('cls.seq_relationship', 'X,D->DX', 'nsp'),
)
_ROBERTA = (
    *_body('roberta'),
    *_mlm('lm_head', 'layer_norm', 'lm_head.bias'),
    *_kernel('roberta.pooler.dense', 'X,D->DX', 'pooler'),
)
_ELECTRA = (
    *_body('electra'),
    *_kernel('electra.embeddings_project', 'D,E->ED', 'project'),
    *_mlm('generator_predictions', 'LayerNorm', 'generator_lm_head.bias'),
    *linear('discriminator_predictions.dense', 'X,D->DX', 'rtd/dense'),
    Row('discriminator_predictions.dense_prediction.weight', 'c,D->D', 'rtd/out'),
    Row('discriminator_predictions.dense_prediction.bias', 'c->', 'rtd/out_bias'),
)


def _read(f: Fields, activations: Collection[str], offset: int = 0, token_embed: int = 0) -> encoder.Config:
  for name, value in (('is_decoder', False), ('add_cross_attention', False), ('tie_word_embeddings', True),
                      ('position_embedding_type', 'absolute')):
    f.fixed(name, value)
  f.drop('gradient_checkpointing|chunk_size_feed_forward|directionality|pooler_.*|summary_.*')
  D, N = f.take('hidden_size', int), f.take('num_attention_heads', int)
  positions = f.take('max_position_embeddings', int)
  if D % N:
    raise f.error('num_attention_heads', N, f'a divisor of hidden_size={D}')
  if positions <= offset:
    raise f.error('max_position_embeddings', positions, f'more than {offset}, as positions begin behind pad_token_id')
  activation = f.take('hidden_act', str, 'gelu')
  if activation not in activations:
    raise f.error('hidden_act', activation, ' or '.join(activations))
  dropout = f.take('hidden_dropout_prob', float, 0.1)
  return encoder.Config(
      vocab=f.take('vocab_size', int), length=positions - offset, offset=offset,
      types=f.take('type_vocab_size', int, 2), layers=f.take('num_hidden_layers', int), embed=D, heads=N,
      head_dim=D // N, mlp=f.take('intermediate_size', int), token_embed=0 if token_embed == D else token_embed,
      activation=_GELU[activation], norm_eps=f.take('layer_norm_eps', float, 1e-12),
      dropout=nn.Dropout(dropout, f.take('attention_probs_dropout_prob', float, 0.1), dropout,
                         f.take('classifier_dropout', float, dropout)),
      std=f.take('initializer_range', float, 0.02))


def _write(c: encoder.Config) -> dict[str, Any]:
  return {'tie_word_embeddings': True, 'initializer_range': c.std, 'max_position_embeddings': c.length + c.offset,
          'type_vocab_size': c.types, 'num_hidden_layers': c.layers, 'hidden_size': c.embed,
          'num_attention_heads': c.heads, 'intermediate_size': c.mlp, 'layer_norm_eps': c.norm_eps,
          'hidden_act': 'gelu' if c.activation == 'gelu_erf' else 'gelu_new', 'hidden_dropout_prob': c.dropout.hidden,
          'attention_probs_dropout_prob': c.dropout.attention, 'classifier_dropout': c.dropout.classifier}


def _needs(c: encoder.Config) -> dict[str, tuple]:
  return {'types': (max(c.types, 1),), 'head_dim': (c.embed / c.heads,)}


_MLM = {'mlm': lambda c: heads.mlm_specs(c.vocab, c.width, c.embed, c.std)}
_POOLER = {'pooler': lambda c: heads.pooler_specs(c.embed, c.std)}

# RoBERTa and ELECTRA have the erf form in their language modelling heads, whatever hidden_act says.
FAMILIES = {
    'bert': Family(
        {'BertForPreTraining': ('mlm', 'pooler', 'nsp'), 'BertForMaskedLM': ('mlm',), 'BertModel': ()}, 'bert.', _BERT,
        {'cls.predictions.decoder.weight': 'bert.embeddings.word_embeddings.weight',
         'cls.predictions.decoder.bias': 'cls.predictions.bias'},
        r'bert\.embeddings\.position_ids', encoder.specs, lambda f: _read(f, _GELU), _write,
        lambda c: _needs(c) | {'offset': (0,), 'token_embed': (0, c.embed)},
        _MLM | _POOLER | {'nsp': lambda c: heads.nsp_specs(c.embed, c.std)}),
    'roberta': Family(
        {'RobertaForMaskedLM': ('mlm',), 'RobertaModel': ()}, 'roberta.', _ROBERTA,
        {'lm_head.decoder.weight': 'roberta.embeddings.word_embeddings.weight', 'lm_head.decoder.bias': 'lm_head.bias'},
        r'roberta\.embeddings\.position_ids', encoder.specs,
        lambda f: _read(f, ['gelu'], f.take('pad_token_id', int, 1) + 1),
        lambda c: _write(c) | {'pad_token_id': c.offset - 1},
        lambda c: _needs(c) | {'offset': (max(c.offset, 2),), 'token_embed': (0, c.embed), 'activation': ('gelu_erf',)},
        _MLM | _POOLER),
    'electra': Family(
        {'ElectraForPreTraining': ('rtd',), 'ElectraForMaskedLM': ('mlm',), 'ElectraModel': ()}, 'electra.', _ELECTRA,
        {'generator_lm_head.weight': 'electra.embeddings.word_embeddings.weight'},
        r'electra\.embeddings\.position_ids', encoder.specs,
        lambda f: _read(f, ['gelu'], token_embed=f.take('embedding_size', int, 128)),
        lambda c: _write(c) | {'embedding_size': c.width},
        lambda c: _needs(c) | {'offset': (0,), 'activation': ('gelu_erf',)},
        _MLM | {'rtd': lambda c: heads.rtd_specs(c.embed, c.std)}),
}


def family(c: encoder.Config, found: Collection[str]) -> tuple[str, Family]:
  """(model_type, family) of the architecture that computes `c` with the heads `found`; BERT where several do.

  Raises:
    ConfigError: there is none; names a field that stands in the way.
  """
  kind = 'roberta' if c.offset else 'electra' if c.width != c.embed or 'rtd' in found else 'bert'
  return kind, tables.checked(FAMILIES[kind], c)
