"""The decoder architectures of transformers as tables: GPT2LMHeadModel and LlamaForCausalLM, and their configs.

Layouts and shape letters: see `lm.models.tables`.
"""

from typing import Any

from lm import nn
from lm.models import decoder, tables
from lm.models.tables import Family, Fields, linear, norm, Row

_GPT2 = (
    Row('transformer.wte.weight', 'V,D->VD', 'embed/tokens'),
    Row('transformer.wpe.weight', 'T,D->TD', 'embed/positions'),
    *norm('transformer.h.{}.ln_1', 'blocks/attn_norm'),
    Row('transformer.h.{}.attn.c_attn.weight', 'D,cNH->DNH', *(f'blocks/attn/{name}' for name in 'qkv')),
    Row('transformer.h.{}.attn.c_attn.bias', 'cNH->NH', *(f'blocks/attn/{name}_bias' for name in 'qkv')),
    Row('transformer.h.{}.attn.c_proj.weight', 'NH,D->NHD', 'blocks/attn/o'),
    Row('transformer.h.{}.attn.c_proj.bias', 'D->D', 'blocks/attn/o_bias'),
    *norm('transformer.h.{}.ln_2', 'blocks/mlp_norm'),
    Row('transformer.h.{}.mlp.c_fc.weight', 'D,F->DF', 'blocks/mlp/up'),
    Row('transformer.h.{}.mlp.c_fc.bias', 'F->F', 'blocks/mlp/up_bias'),
    Row('transformer.h.{}.mlp.c_proj.weight', 'F,D->FD', 'blocks/mlp/down'),
    Row('transformer.h.{}.mlp.c_proj.bias', 'D->D', 'blocks/mlp/down_bias'),
    *norm('transformer.ln_f', 'final_norm'),
    Row('lm_head.weight', 'V,D->VD', 'unembed'),
)

_LLAMA = (
    Row('model.embed_tokens.weight', 'V,D->VD', 'embed/tokens'),
    *norm('model.layers.{}.input_layernorm', 'blocks/attn_norm'),
    *linear('model.layers.{}.self_attn.q_proj', 'NH,D->DNH', 'blocks/attn/q'),
    *linear('model.layers.{}.self_attn.k_proj', 'KH,D->DKH', 'blocks/attn/k'),
    *linear('model.layers.{}.self_attn.v_proj', 'KH,D->DKH', 'blocks/attn/v'),
    *linear('model.layers.{}.self_attn.o_proj', 'D,NH->NHD', 'blocks/attn/o'),
    *norm('model.layers.{}.post_attention_layernorm', 'blocks/mlp_norm'),
    *linear('model.layers.{}.mlp.gate_proj', 'F,D->DF', 'blocks/mlp/gate'),
    *linear('model.layers.{}.mlp.up_proj', 'F,D->DF', 'blocks/mlp/up'),
    *linear('model.layers.{}.mlp.down_proj', 'D,F->FD', 'blocks/mlp/down'),
    *norm('model.norm', 'final_norm'),
    Row('lm_head.weight', 'V,D->VD', 'unembed'),
)


_GELU = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu_erf'}


def _read_gpt2(f: Fields) -> decoder.Config:
  for name, value in (('scale_attn_weights', True), ('scale_attn_by_inverse_layer_idx', False),
                      ('reorder_and_upcast_attn', False), ('add_cross_attention', False)):
    f.fixed(name, value)
  f.drop('n_ctx|n_special|summary_.*|predict_special_tokens|gradient_checkpointing')
  D, N, L = f.take('n_embd', int), f.take('n_head', int), f.take('n_layer', int)
  if D % N:
    raise f.error('n_head', N, f'a divisor of n_embd={D}')
  activation = f.take('activation_function', str, 'gelu_new')
  if activation not in _GELU:
    raise f.error('activation_function', activation, ' or '.join(_GELU))
  std = f.take('initializer_range', float, 0.02)
  return decoder.Config(
      vocab=f.take('vocab_size', int), length=f.take('n_positions', int), layers=L, embed=D, heads=N, kv_heads=N,
      head_dim=D // N, mlp=f.take('n_inner', int, 4 * D), activation=_GELU[activation],
      norm_eps=f.take('layer_norm_epsilon', float, 1e-5), tied=f.take('tie_word_embeddings', bool, True),
      dropout=nn.Dropout(f.take('embd_pdrop', float, 0.1), f.take('attn_pdrop', float, 0.1),
                              f.take('resid_pdrop', float, 0.1)),
      init=decoder.Init(std=std, tokens=std, positions=std, residual=decoder.residual_std(L, std)))


def _write_gpt2(c: decoder.Config) -> dict[str, Any]:
  return {'tie_word_embeddings': c.tied, 'initializer_range': c.init.std, 'n_positions': c.length, 'n_embd': c.embed,
          'n_layer': c.layers, 'n_head': c.heads, 'n_inner': c.mlp,
          'activation_function': 'gelu' if c.activation == 'gelu_erf' else 'gelu_new', 'layer_norm_epsilon': c.norm_eps,
          'embd_pdrop': c.dropout.embedding, 'attn_pdrop': c.dropout.attention, 'resid_pdrop': c.dropout.hidden}


def _read_llama(f: Fields) -> decoder.Config:
  f.fixed('hidden_act', 'silu')
  f.fixed('rope_interleaved', False)
  f.fixed('partial_rotary_factor', 1.0)
  f.drop('pretraining_tp|max_sequence_length|is_llama_config|transformers\\.js_config')
  D, N = f.take('hidden_size', int), f.take('num_attention_heads', int)
  bias = f.take('attention_bias', bool, False)
  if f.take('mlp_bias', bool, False) != bias:
    raise f.error('mlp_bias', not bias, f'{bias} like attention_bias: all projections have a bias here, or none')
  std, eps = f.take('initializer_range', float, 0.02), f.take('rms_norm_eps', float)
  dropout = nn.Dropout(attention=f.take('attention_dropout', float, 0.0))
  return decoder.Config(
      vocab=f.take('vocab_size', int), length=f.take('max_position_embeddings', int),
      layers=f.take('num_hidden_layers', int), embed=D, heads=N, kv_heads=f.take('num_key_value_heads', int, N),
      head_dim=f.take('head_dim', int, max(D // N, 1)), mlp=f.take('intermediate_size', int), positions='rotary',
      rope_theta=_rope_theta(f), norm='rms', norm_eps=eps, norm_bias=False, activation='swiglu',
      bias=bias, tied=f.take('tie_word_embeddings', bool, False), dropout=dropout,
      init=decoder.Init(std=std, tokens=std, positions=std, residual=std))


def _rope_theta(f: Fields) -> float:
  """From `rope_theta` (transformers 4) or `rope_parameters` (5); any scaling of the frequencies is refused."""
  theta, inner = f.take('rope_theta', float, None), f.group('rope_parameters')
  f.fixed('rope_scaling', {'rope_type': 'default'}, {'type': 'default'})
  inner.fixed('rope_type', 'default')
  inner.fixed('type', 'default')
  inner.fixed('partial_rotary_factor', 1.0)
  inner_theta = inner.take('rope_theta', float, theta or 10000.0)
  inner.done()
  if theta not in (None, inner_theta) or inner_theta <= 0:
    raise f.error('rope_theta', theta, f'a positive number, equal to rope_parameters.rope_theta={inner_theta}')
  return inner_theta


def _write_llama(c: decoder.Config) -> dict[str, Any]:
  return {'tie_word_embeddings': c.tied, 'initializer_range': c.init.std, 'max_position_embeddings': c.length,
          'hidden_size': c.embed, 'num_hidden_layers': c.layers,
          'num_attention_heads': c.heads, 'num_key_value_heads': c.kv_heads, 'head_dim': c.head_dim,
          'intermediate_size': c.mlp, 'hidden_act': 'silu', 'rms_norm_eps': c.norm_eps, 'attention_bias': c.bias,
          'mlp_bias': c.bias, 'attention_dropout': c.dropout.attention, 'rope_theta': c.rope_theta,
          'rope_parameters': {'rope_theta': c.rope_theta, 'rope_type': 'default'}}


FAMILIES = {
    'gpt2': Family(
        {'GPT2LMHeadModel': ()}, 'transformer.', _GPT2, {'lm_head.weight': 'transformer.wte.weight'},
        r'transformer\.h\.\d+\.attn\.(masked_)?bias', decoder.specs, _read_gpt2, _write_gpt2,
        lambda c: {'positions': ('learned',), 'norm': ('layer',), 'norm_bias': (True,), 'bias': (True,),
                   'activation': ('gelu_tanh', 'gelu_erf'), 'parallel': (False,), 'logit_scale': (1.0,),
                   'kv_heads': (c.heads,), 'head_dim': (c.embed / c.heads,)}),
    'llama': Family(
        {'LlamaForCausalLM': ()}, 'model.', _LLAMA, {'lm_head.weight': 'model.embed_tokens.weight'},
        r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq', decoder.specs, _read_llama, _write_llama,
        lambda c: {'positions': ('rotary',), 'norm': ('rms',), 'norm_bias': (False,), 'activation': ('swiglu',),
                   'parallel': (False,), 'logit_scale': (1.0,), 'embed': (c.embed - c.embed % c.heads,)}),
}


def family(c: decoder.Config) -> tuple[str, Family]:
  """(model_type, family) of the architecture that computes `c`.

  Raises:
    ConfigError: there is none; names a field that stands in the way.
  """
  kind = 'llama' if c.positions == 'rotary' else 'gpt2'
  return kind, tables.checked(FAMILIES[kind], c)
