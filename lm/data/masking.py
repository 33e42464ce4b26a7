"""Corrupting rows for masked language modelling: which tokens, how many, and what stands there instead.

Shapes: B rows, T tokens a row, P predictions a row (a static number), V vocabulary, K windows. All but `corrupt` work
on one row and are mapped over B: a row's masks depend on the key and its `draw_B`, never on its neighbours.
"""

import dataclasses
import functools
from typing import Literal

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from lm import nn
from lm.data.inputs import Inputs
from lm.errors import ConfigError
from lm.text import vocabulary
from lm.text.tokenizer import Tokenizer

LONGEST_GRAM = 3  # DeBERTa's n-grams, with probability in proportion to 1 / n
LONGEST_SPAN, STOP = 10, 0.2  # SpanBERT's spans, in words: geometric, cut off


@dataclasses.dataclass(frozen=True)
class Config:
  """The masks of BERT by default.

  Attributes:
    rate: share of a row's tokens, special ones counted, that are to be predicted.
    mask: share of those that become [MASK] (BERT .8, ELECTRA .85, DeBERTa-v3 1).
    random: share that becomes a random token (BERT .1, ELECTRA and DeBERTa-v3 0); the rest stays as it is.
    spans: what is chosen at a time: 'token', 'word' (whole-word), 'ngram' (DeBERTa: up to 3 words, one n-gram in each
      window of n * int(1 / rate) words), 'span' (SpanBERT: up to 10 words, all of a span replaced in one way).
    counts: 'bert': round(rate * length), at least 1; 'roberta': int(rate * length + U[0, 1)), and random tokens are
      never special ones; 'electra': as many draws as BERT's, with replacement, so that fewer positions come out.
    static: masks depend on `Inputs.draw_B` alone and so repeat in each epoch (BERT); otherwise on the key too.
    max_predictions: P; 0 = int((rate + .005) * T), or the most that 'roberta' can count.
  """

  rate: float = 0.15
  mask: float = 0.8
  random: float = 0.1
  spans: Literal['token', 'word', 'ngram', 'span'] = 'token'
  counts: Literal['bert', 'roberta', 'electra'] = 'bert'
  static: bool = False
  max_predictions: int = 0

  def __post_init__(self):
    if not 0 < self.rate <= 1:
      raise ConfigError(f'loss.rate={self.rate}; expected 0 < rate <= 1')
    if min(self.mask, self.random) < 0 or self.mask + self.random > 1 + 1e-9:
      raise ConfigError(f'loss.mask={self.mask}, loss.random={self.random}; expected shares that add up to at most 1')
    for name, known in (('spans', ('token', 'word', 'ngram', 'span')), ('counts', ('bert', 'roberta', 'electra'))):
      if getattr(self, name) not in known:
        raise ConfigError(f'loss.{name}={getattr(self, name)!r}; expected one of {", ".join(known)}')
    if self.counts == 'electra' and self.spans != 'token':
      raise ConfigError(f"loss.spans={self.spans!r}: draws with replacement are of tokens; set loss.counts='bert'")
    if self.max_predictions < 0:
      raise ConfigError(f'loss.max_predictions={self.max_predictions}; expected at least 0')

  def predictions(self, length: int) -> int:
    """P for rows of `length` tokens."""
    most = int(self.rate * length) + 1 if self.counts == 'roberta' else max(1, int((self.rate + 0.005) * length))
    return min(self.max_predictions or most, length)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
  """What masking knows of a vocabulary.

  Attributes:
    mask: id of [MASK].
    vocab: ids of the tokenizer; a model's table may have more.
    special: ids of control tokens.
    starts_V: bool[V], a word begins here; None = with every token.
  """

  mask: int
  vocab: int
  special: tuple[int, ...] = ()
  starts_V: np.ndarray | None = None


def tokens(tokenizer: Tokenizer) -> Tokens:
  """The `Tokens` of a tokenizer.

  Raises:
    ConfigError: it has no mask token.
  """
  return Tokens(vocabulary.special_ids(tokenizer).mask, tokenizer.vocab_size,
                tuple(sorted(set(tokenizer.control.values()))), vocabulary.word_starts(tokenizer))


@struct.dataclass
class Masked:
  """Corrupted ids_BT int32, and of each prediction its place in the row, the original id, and weight f32 (0 = none)."""

  ids_BT: jax.Array
  positions_BP: jax.Array
  targets_BP: jax.Array
  weights_BP: jax.Array


def corrupt(inputs: Inputs, key: nn.Key | None, c: Config, t: Tokens) -> Masked:
  """Masks drawn from the key and each row's `draw_B`; without a key, or when static, from `draw_B` alone.

  Special tokens and padding are never chosen; of a row that has nothing else, nothing is.
  """
  key = jax.random.key(0) if key is None or c.static else key
  used_BT = inputs.segments_BT > 0
  row = functools.partial(_row, c=c, t=t)
  return Masked(*jax.vmap(row)(draw_keys(key, inputs), inputs.ids_BT, used_BT & ~inputs.special_BT, used_BT.sum(1)))


def draw_keys(key: nn.Key, inputs: Inputs) -> jax.Array:
  """A plain key for each row, from its `draw_B`: [B]."""
  return jax.vmap(jax.random.fold_in, (None, 0))(nn.shared(key), inputs.draw_B)


def gather(x_BTD: jax.Array, positions_BP: jax.Array) -> jax.Array:
  """The vectors at the positions, [B, P, D]."""
  return jnp.take_along_axis(x_BTD, positions_BP[..., None], axis=1)


def _row(key, ids_T, free_T, length, c, t):
  T, P = len(ids_T), c.predictions(len(ids_T))
  choose, size, action, other = jax.random.split(key, 4)
  if c.counts == 'roberta':
    count = jnp.floor(c.rate * length + jax.random.uniform(size)).astype(jnp.int32)
  else:  # from a table: Python's round of a double is what the original does
    count = jnp.asarray(np.maximum(np.round(c.rate * np.arange(T + 1)), 1).astype(np.int32))[length]
  count = jnp.minimum(count, P)
  chosen_T, group_T = _choose(choose, ids_T, free_T, count, P, c, t)
  chosen_T &= jnp.cumsum(chosen_T) <= P
  u_T = jax.random.uniform(action, (T,))[group_T]
  plain = np.setdiff1d(np.arange(t.vocab), t.special) if c.counts == 'roberta' else np.arange(t.vocab)
  random_T = jnp.asarray(plain, jnp.int32)[jax.random.randint(other, (T,), 0, len(plain))]
  new_T = jnp.where(u_T < c.mask, t.mask, jnp.where(u_T < c.mask + c.random, random_T, ids_T))
  positions_P = jnp.nonzero(chosen_T, size=P, fill_value=0)[0].astype(jnp.int32)
  weights_P = (jnp.arange(P) < chosen_T.sum()).astype(jnp.float32)
  return jnp.where(chosen_T, new_T, ids_T), positions_P, ids_T[positions_P], weights_P


def _choose(key, ids_T, free_T, count, P, c, t):
  """(chosen_T, group_T: the position whose draw decides what replaces a token)."""
  own_T = jnp.arange(len(ids_T))
  if c.counts == 'electra':
    return _with_replacement(key, free_T, count, P), own_T
  if c.spans == 'token':
    place_T = _ranked(key, free_T)
    return jnp.zeros_like(free_T).at[place_T].set(own_T < count) & free_T, own_T
  starts_T = jnp.ones_like(free_T) if t.starts_V is None else jnp.asarray(t.starts_V)[ids_T]
  begins_T = free_T & (starts_T | ~jnp.roll(free_T, 1).at[0].set(False))
  word_T = jnp.where(free_T, jnp.cumsum(begins_T) - 1, len(ids_T))
  if c.spans == 'word':
    return _whole_words(key, free_T, word_T, count), own_T
  if c.spans == 'span':
    return _spans(key, free_T, word_T, count)
  return _ngrams(key, free_T, begins_T, word_T, count, int(1 / c.rate)), own_T


def _ranked(key, free_T):
  """The positions in random order, the free ones first."""
  return jnp.argsort(jnp.where(free_T, jax.random.uniform(key, free_T.shape), jnp.inf))


def _with_replacement(key, free_T, count, P):
  """ELECTRA pretrain_helpers.py:mask, but that a position drawn twice counts once."""
  place_T = jnp.nonzero(free_T, size=len(free_T), fill_value=0)[0]
  draw_P = jax.random.randint(key, (P,), 0, jnp.maximum(free_T.sum(), 1))
  return jnp.zeros_like(free_T).at[place_T[draw_P]].max(jnp.arange(P) < count) & free_T


def _whole_words(key, free_T, word_T, count):
  """BERT create_pretraining_data.py:create_masked_lm_predictions: words in random order, each that still fits."""
  size_T = jnp.zeros_like(word_T).at[word_T].add(1, mode='drop')
  order_T = _ranked(key, size_T > 0)

  def step(state):
    k, used, taken_T = state
    word = order_T[k]
    fits = used + size_T[word] <= count
    return k + 1, used + jnp.where(fits, size_T[word], 0), taken_T.at[word].set(fits)
  more = lambda state: (state[1] < count) & (state[0] < (size_T > 0).sum())
  taken_T = jax.lax.while_loop(more, step, (0, jnp.zeros_like(count), jnp.zeros_like(free_T)))[2]
  return taken_T.at[word_T].get(mode='fill', fill_value=False)


def _spans(key, free_T, word_T, count):
  """SpanBERT (arXiv:1907.10529 §3.1): from the word of a random token that is still free, until `count` are taken.

  To walk a random order and to skip what is taken draws as the original does, again and again from all tokens.
  """
  order_key, length_key = jax.random.split(key)
  order_T = _ranked(order_key, free_T)
  logits = np.log(1 - STOP) * np.arange(LONGEST_SPAN)
  length_T = 1 + jax.random.categorical(length_key, jnp.asarray(logits, jnp.float32), shape=free_T.shape)

  def step(state):
    k, chosen_T, group_T = state
    anchor = order_T[k]
    new_T = (word_T >= word_T[anchor]) & (word_T < word_T[anchor] + length_T[k]) & free_T & ~chosen_T
    new_T &= (jnp.cumsum(new_T) + chosen_T.sum() <= count) & ~chosen_T[anchor]
    return k + 1, chosen_T | new_T, jnp.where(new_T, anchor, group_T)
  more = lambda state: (state[1].sum() < count) & (state[0] < free_T.sum())
  return jax.lax.while_loop(more, step, (0, jnp.zeros_like(free_T), jnp.arange(len(free_T))))[1:]


def _ngrams(key, free_T, begins_T, word_T, count, window):
  """DeBERTa's NGramMaskGenerator: n words at a random place in each window of n * `window`, up to `count` tokens."""
  n_key, place_key = jax.random.split(key)
  K = -(-len(free_T) // window)
  n_K = 1 + jax.random.categorical(n_key, -jnp.log(jnp.arange(1.0, LONGEST_GRAM + 1)), shape=(K,))
  stop_K = jnp.cumsum(n_K * window)
  start_K, stop_K = stop_K - n_K * window, jnp.minimum(stop_K, begins_T.sum())
  at_K = start_K + jnp.floor(jax.random.uniform(place_key, (K,)) * jnp.maximum(stop_K - start_K, 0)).astype(jnp.int32)
  k_T = jnp.minimum(jnp.searchsorted(stop_K, word_T, side='right'), K - 1)
  hit_T = free_T & (word_T >= at_K[k_T]) & (word_T < jnp.minimum(at_K + n_K, stop_K)[k_T])
  begin_T = jnp.nonzero(begins_T, size=len(free_T), fill_value=0)[0]
  before_T = (jnp.cumsum(hit_T) - hit_T)[begin_T[jnp.minimum(word_T, len(free_T) - 1)]]  # hits before the word
  return hit_T & (before_T < count)
