"""Shapes of published models that several experiments start from."""

from lm.models import deberta, decoder, encoder


def smollm2_135m(**changes) -> decoder.Config:
  """SmolLM2-135M as released: 134,515,008 parameters, 8,192 positions (arXiv:2502.02737)."""
  return decoder.Config(**{
      'vocab': 49152, 'length': 8192, 'layers': 30, 'embed': 576, 'heads': 9, 'kv_heads': 3, 'head_dim': 64,
      'mlp': 1536, 'positions': 'rotary', 'rope_theta': 1e5, 'norm': 'rms', 'norm_bias': False, 'bias': False,
      'activation': 'swiglu'} | changes)


def gpt2(layers: int, embed: int, **changes) -> decoder.Config:
  """GPT-2: heads of 64 (124M: 12, 768; 355M: 24, 1024; 774M: 36, 1280)."""
  return decoder.Config(**{'layers': layers, 'embed': embed, 'heads': embed // 64, 'kv_heads': embed // 64,
                           'mlp': 4 * embed} | changes)


def bert(layers: int = 12, embed: int = 768, **changes) -> encoder.Config:
  """BERT: heads of 64, gelu by its tanh approximation."""
  return encoder.Config(**{'layers': layers, 'embed': embed, 'heads': embed // 64, 'mlp': 4 * embed} | changes)


def minilm(**changes) -> encoder.Config:
  """all-MiniLM-L6-v2: 22.7M parameters, BERT's vocabulary, heads of 32."""
  return encoder.Config(**{'layers': 6, 'embed': 384, 'heads': 12, 'head_dim': 32, 'mlp': 1536,
                           'activation': 'gelu_erf'} | changes)


def roberta(layers: int = 12, embed: int = 768, **changes) -> encoder.Config:
  """RoBERTa: positions from 2 on, one segment type."""
  return bert(layers, embed, **{'vocab': 50265, 'offset': 2, 'types': 1, 'activation': 'gelu_erf',
                                'norm_eps': 1e-5} | changes)


def electra(layers: int = 12, embed: int = 768, **changes) -> encoder.Config:
  """ELECTRA's discriminator; small: embed 256, heads 4, token_embed 128."""
  return bert(layers, embed, **{'activation': 'gelu_erf'} | changes)


def deberta_v1(layers: int = 12, embed: int = 768, **changes) -> deberta.Config:
  """DeBERTa v1: heads of 64, both terms with projections of their own."""
  return deberta.Config(**{'layers': layers, 'embed': embed, 'heads': embed // 64, 'head_dim': 64,
                           'mlp': 4 * embed} | changes)
