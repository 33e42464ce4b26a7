"""Heads: what maps an encoder's x_BTD to words, classes or scores. A head is one key of the parameter tree's top level.

Shapes: B batch, T length, P predicted positions, D embed, E width of the token embedding, V vocabulary, C classes.
`X_specs` declares the parameters of `X`. Logits and scores are f32.
"""

import jax
import jax.numpy as jnp

from lm import nn, params
from lm.models import blocks
from lm.params import Spec


def mlm_specs(vocab: int, width: int, embed: int, std: float = 0.02) -> params.Tree:
  """Head of masked language modelling over `vocab` words whose embeddings are `width` wide."""
  return {
      'dense': Spec((embed, width), ('embed', None), params.TruncatedNormal(std)),
      'dense_bias': Spec((width,), (None,), params.zeros),
      'norm': _norm_specs(width, None),
      'bias': Spec((vocab,), ('vocab',), params.zeros),
  }


def mlm(p: params.Tree, x_BPD: jax.Array, activation: str, eps: float) -> jax.Array:
  """y_BPE = LN(activation(dense(x))), so that logits_BPV = y_BPE @ tokens_VE.T + p['bias'] (BERT §3.1, app. A.1).

  The logits are left to the loss, which takes them in chunks (`lm.kernels.cross_entropy`).
  """
  y_BPE = blocks.activate(_dense(p, x_BPD, 'BPD,DE->BPE'), activation)
  return nn.layer_norm(y_BPE, p['norm']['scale'], p['norm']['bias'], eps)


def pooler_specs(embed: int, std: float = 0.02) -> params.Tree:
  return {'kernel': Spec((embed, embed), ('embed', None), params.TruncatedNormal(std)),
          'bias': Spec((embed,), (None,), params.zeros)}


def pooler(p: params.Tree, x_BD: jax.Array) -> jax.Array:
  """tanh of a dense layer on first tokens, [B, D] or [B, M, D] (BERT §3)."""
  rows = 'BM'[:x_BD.ndim - 1]
  return jnp.tanh(blocks.bias(nn.dot(p['kernel'], x_BD, f'{rows}D,DE->{rows}E'), p['bias']))


def nsp_specs(embed: int, std: float = 0.02) -> params.Tree:
  return {'kernel': Spec((embed, 2), ('embed', None), params.TruncatedNormal(std)),
          'bias': Spec((2,), (None,), params.zeros)}


def nsp(p: params.Tree, pooled_BD: jax.Array) -> jax.Array:
  """Logits [B, 2] of next-sentence prediction: class 1 is 'B does not follow A' (BERT §3.1)."""
  return blocks.bias(nn.dot(p['kernel'], pooled_BD.astype(jnp.float32), 'BD,DC->BC'), p['bias'])


def rtd_specs(embed: int, std: float = 0.02, norm: bool = False) -> params.Tree:
  """Head of replaced-token detection; `norm` makes it DeBERTa-v3's."""
  tree = {
      'dense': Spec((embed, embed), ('embed', None), params.TruncatedNormal(std)),
      'dense_bias': Spec((embed,), (None,), params.zeros),
      'out': Spec((embed,), ('embed',), params.TruncatedNormal(std)),
      'out_bias': Spec((), (), params.zeros),
  }
  return tree | {'norm': _norm_specs(embed)} if norm else tree


def rtd(p: params.Tree, x_BTD: jax.Array, activation: str, eps: float) -> jax.Array:
  """Logits [B, T] of 'this token was replaced' (ELECTRA §2); with a norm, of LN(x + x of the first token)."""
  if 'norm' in p:
    x_BTD = nn.layer_norm(x_BTD + x_BTD[:, :1], p['norm']['scale'], p['norm']['bias'], eps)
  y_BTD = blocks.activate(_dense(p, x_BTD, 'BTD,DE->BTE'), activation)
  return blocks.bias(nn.dot(p['out'], y_BTD.astype(jnp.float32), 'BTD,D->BT'), p['out_bias'])


def classify_specs(embed: int, classes: int, std: float = 0.02, dense: bool = False) -> params.Tree:
  """Head of one label (or one number) a row; `dense` for RoBERTa, DeBERTa and HF's ELECTRA, which have no pooler."""
  tree = {'out': Spec((embed, classes), ('embed', None), params.TruncatedNormal(std)),
          'out_bias': Spec((classes,), (None,), params.zeros)}
  if dense:
    tree |= {'dense': Spec((embed, embed), ('embed', None), params.TruncatedNormal(std)),
             'dense_bias': Spec((embed,), (None,), params.zeros)}
  return tree


def for_classes(body: params.Tree, pooling: str, embed: int, classes: int) -> tuple[params.Tree, params.Tree]:
  """Specs (of the model that a classifier begins from, with BERT's pooler if that is pooled; with the head too)."""
  base = body | ({'pooler': pooler_specs(embed)} if pooling == 'pooler' else {})
  return base, base | {'classify': classify_specs(embed, classes, dense=pooling == 'first')}


def classify(p: params.Tree, x_BD: jax.Array, activation: str = 'tanh', rate: float = 0.0,
             key: nn.Key | None = None, dense_rate: float | None = None) -> jax.Array:
  """Logits [B, C] of one vector a row, or [B, M, C] of M: BERT's pooled vector, the first token of ELECTRA
  (google-research), or with 'dense' that of RoBERTa (tanh), HF's ELECTRA and DeBERTa (gelu_erf). Dropout at `rate`
  before the last layer, at `dense_rate` before 'dense': None = the same; DeBERTa has 0 (its pooling.py)."""
  rows = 'BM'[:x_BD.ndim - 1]
  if 'dense' in p:
    x_BD = nn.dropout(x_BD, rate if dense_rate is None else dense_rate, nn.fold(key, 1))
    x_BD = blocks.activate(_dense(p, x_BD, f'{rows}D,DE->{rows}E'), activation)
  x_BD = nn.dropout(x_BD.astype(jnp.float32), rate, nn.fold(key, 0))
  return blocks.bias(nn.dot(p['out'], x_BD, f'{rows}D,DC->{rows}C'), p['out_bias'])


def tokens_specs(embed: int, classes: int, std: float = 0.02) -> params.Tree:
  """Head of one label a token (tagging; with two classes the start and end of a span)."""
  return classify_specs(embed, classes, std)


def tokens(p: params.Tree, x_BTD: jax.Array, rate: float = 0.0, key: nn.Key | None = None) -> jax.Array:
  """Logits [B, T, C], after dropout at `rate`."""
  x_BTD = nn.dropout(x_BTD.astype(jnp.float32), rate, key)
  return blocks.bias(nn.dot(p['out'], x_BTD, 'BTD,DC->BTC'), p['out_bias'])


def mean_pool(x_BTD: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
  """[B, D] f32: the mean over real tokens (segment >= 1), Sentence-BERT's vector of a text (arXiv:1908.10084 §3)."""
  x_BTD = x_BTD.astype(jnp.float32)
  if segments_BT is None:
    return x_BTD.mean(1)
  real_BT1 = (segments_BT > 0).astype(jnp.float32)[..., None]
  return (x_BTD * real_BT1).sum(1) / jnp.maximum(real_BT1.sum(1), 1.0)


def _norm_specs(width, axis='embed'):
  return {'scale': Spec((width,), (axis,), params.ones), 'bias': Spec((width,), (axis,), params.zeros)}


def _dense(p, x, equation):
  return blocks.bias(nn.dot(p['dense'], x, equation), p['dense_bias'])
