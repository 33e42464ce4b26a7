"""Sampling from a language model: prefill, then one token a step through a key/value cache.

Nothing here knows a model: `Model` is three functions. Prompts of unequal length are padded on the left; what a row
gives depends neither on the padding nor on the other rows. Shapes: B rows, T prompt length (padded) or new tokens,
S cache slots, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import math
import types
import typing
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from lm import nn, params
from lm.errors import ConfigError
from lm.kernels import attention, quantised

# How many of a kernel's dimensions a dot contracts, by the last part of its path; they come first.
_KERNELS = {'q': 1, 'k': 1, 'v': 1, 'o': 2, 'up': 1, 'gate': 1, 'down': 1, 'relative': 1}
_CHUNK = 256  # of the vocabulary
_BUCKET, _STEP = 16, 1024  # shortest padded prompt; longer ones: the next power of two, or multiple of _STEP, if less
_LONG = 512  # longer prompts attend by blocks: the whole [B, N, T, S] of scores would be much


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are chosen and when to stop.

  Attributes:
    max_new: most new tokens.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep the k most likely tokens, of equal ones those of lower id; 0 keeps all.
    top_p: then keep the fewest most likely tokens whose probability reaches top_p, and any as likely as the last of
      them (arXiv:1904.09751).
    stop: ids that end a row; the id is part of the row.
  """

  max_new: int = 128
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  stop: tuple[int, ...] = ()

  def __post_init__(self):
    if self.max_new < 1:
      raise ConfigError(f'max_new={self.max_new}; expected at least 1')
    if self.temperature and not 1e-6 <= self.temperature < math.inf:  # less, and logits overflow
      raise ConfigError(f'temperature={self.temperature}; expected 0 (the most likely token), or 1e-6 and more')
    if self.top_k < 0:
      raise ConfigError(f'top_k={self.top_k}; expected at least 0 (0: all tokens)')
    if not 0 < self.top_p <= 1:
      raise ConfigError(f'top_p={self.top_p}; expected 0 < top_p <= 1 (1: all tokens)')
    if any(i < 0 for i in self.stop):
      raise ConfigError(f'stop={self.stop}; expected token ids')


@dataclasses.dataclass(frozen=True)
class Model:
  """What decoding needs of a model. Make one and keep it: programs are compiled once for each.

  Attributes:
    apply: (params, ids_BT, *, segments_BT, cache) -> (x_BTD, cache), positions counting a row's own tokens; `attend`
      may be given as well.
    logits: (params, x_BTD) -> [B, T, V].
    init_cache: (B, S) -> cache of S slots.
    length: most positions that exist; None where any number does.
  """

  apply: Callable[..., tuple[jax.Array, Any]]
  logits: Callable[[params.Tree, jax.Array], jax.Array]
  init_cache: Callable[[int, int], Any]
  length: int | None = None


@struct.dataclass
class Sample:
  """Tokens drawn after each prompt.

  Attributes:
    tokens_BT: int32 [B, max_new]; 0 beyond a row's length.
    lengths_B: int32, tokens drawn, a stop token included.
    logprobs_BT: f32, log-probability of each token under the model itself (temperature 1, no filter); 0 beyond.
  """

  tokens_BT: jax.Array
  lengths_B: jax.Array
  logprobs_BT: jax.Array


@struct.dataclass
class _Step:
  """The newest token of each row (or of an ended row, anything), and the cache of all before it."""

  ids_B: jax.Array
  logprobs_B: jax.Array
  ended_B: jax.Array  # with this token or before it
  cache: Any


@functools.cache
def of(family: types.ModuleType, c: Any) -> Model:
  """The `Model` of a family (a module such as `lm.models.decoder`) and its config; the same one for equal arguments."""
  return Model(apply=lambda p, ids_BT, **kwargs: family.apply(p, c, ids_BT, **kwargs),
               logits=lambda p, x_BTD: family.logits(p, c, x_BTD),
               init_cache=lambda B, S: family.init_cache(c, B, S),
               length=c.length if c.positions == 'learned' else None)


def prepare(p: params.Tree, kind: quantised.Kind = 'float32') -> params.Tree:
  """Parameters laid out for decoding: one tree a layer, and kernels of the given kind; once, not at every call.

  The output matrix becomes a leaf of its own, 'unembed'; embedding, norms and biases stay as they are.
  """
  if kind not in typing.get_args(quantised.Kind):
    raise ConfigError(f"kind={kind!r}; expected 'float32', 'bfloat16' or 'int8'")

  def leaf(i, path, x):
    inputs, w = _KERNELS.get(path.split('/')[-1]), jnp.asarray(x[i])
    return w if inputs is None else quantised.pack(w, tuple(range(inputs)), kind)
  layers = range(len(jax.tree.leaves(p['blocks'])[0]))
  blocks = [params.map_with_path(functools.partial(leaf, i), p['blocks']) for i in layers]
  # A NumPy leaf would be copied to the device at every call.
  rest = jax.tree.map(jnp.asarray, {k: v for k, v in p.items() if k != 'blocks'})
  head_VD = rest.get('unembed', rest['embed']['tokens'])
  return rest | {'blocks': blocks, 'unembed': quantised.pack(head_VD, (1,), kind)}


def generate(model: Model, p: params.Tree, prompts: Sequence[Sequence[int]], s: Sampling,
             key: jax.Array | None = None) -> Sample:
  """Continues every prompt. Compiles once for a batch size, prompt bucket and `Sampling`.

  Args:
    p: as for `model.apply`; best from `prepare`.
    key: row i draws its t-th token from fold_in(fold_in(key, i), t); None is enough at temperature 0.

  Raises:
    ConfigError: an empty prompt, no key, or more tokens than the model has positions.
  """
  return _run(model, s, p, *_inputs(model, prompts, s, key))


def stream(model: Model, p: params.Tree, prompts: Sequence[Sequence[int]], s: Sampling,
           key: jax.Array | None = None) -> Iterator[np.ndarray]:
  """The tokens of `generate` as they come: int32 ids_B a step, -1 for rows that had ended before."""
  ids_BT, segments_BT, key = _inputs(model, prompts, s, key)
  step = _first_jit(model, s, p, ids_BT, segments_BT, key)
  ended_B = np.zeros(len(prompts), bool)
  for t in range(1, s.max_new + 1):
    yield np.where(ended_B, -1, step.ids_B)
    ended_B = np.asarray(step.ended_B)
    if ended_B.all() or t == s.max_new:
      return
    step = _next_jit(model, s, p, step, key, t)


def run(model: Model, s: Sampling, p: params.Tree, ids_BT: jax.Array, segments_BT: jax.Array,
        key: nn.Key | None) -> Sample:
  """`generate` on arrays (see `pad`), for a program of one's own, under a mesh or not; `nn.Keys` may number rows."""
  step = _first(model, s, p, ids_BT, segments_BT, key)
  blank = jnp.zeros((ids_BT.shape[0], s.max_new), jnp.int32)
  sample = Sample(blank, jnp.zeros_like(step.ids_B), blank.astype(jnp.float32))
  sample = _write(sample, 0, step, jnp.zeros_like(step.ended_B))

  def body(carry):
    t, old, sample = carry
    step = _next(model, s, p, old, key, t)
    return t + 1, step, _write(sample, t, step, old.ended_B)
  return jax.lax.while_loop(lambda carry: (carry[0] < s.max_new) & ~carry[1].ended_B.all(), body,
                            (jnp.int32(1), step, sample))[2]


def pad(prompts: Sequence[Sequence[int]], width: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """(ids_BT, segments_BT), padded on the left (segment 0) to `width` or a bucket; ConfigError: a prompt is longer."""
  longest = max(map(len, prompts))
  T = width or max(_BUCKET, min(1 << (longest - 1).bit_length(), -(-longest // _STEP) * _STEP))
  if longest > T:
    raise ConfigError(f'width={T}: a prompt has {longest} tokens; expected at most {T}; cut it or raise width')
  ids_BT, segments_BT = np.zeros((2, len(prompts), T), np.int32)
  for row, prompt in enumerate(prompts):
    ids_BT[row, T - len(prompt):] = prompt
    segments_BT[row, T - len(prompt):] = 1
  return ids_BT, segments_BT


def sample_token(logits_BV: jax.Array, keys_B: jax.Array | None, s: Sampling) -> jax.Array:
  """int32 ids_B drawn from `candidates`, each row by its own key; at temperature 0 the first of the largest logits."""
  if s.temperature == 0:
    # Two plain reductions: XLA's argmax on a CPU takes four times as long.
    least_BV = jnp.where(logits_BV < logits_BV.max(-1, keepdims=True), logits_BV.shape[-1], _ids(logits_BV))
    return least_BV.min(-1)
  logits_BC, ids_BC = candidates(logits_BV, s)
  return jnp.take_along_axis(ids_BC, jax.vmap(_categorical)(keys_B, logits_BC)[:, None], 1)[:, 0]


def candidates(logits_BV: jax.Array, s: Sampling) -> tuple[jax.Array, jax.Array]:
  """(logits_BC, ids_BC): softmax of the former, f32, is the distribution over the latter that `s` asks for.

  C is top_k where it is set, else V; -inf marks tokens outside top_p.
  """
  logits_BC, ids_BC = logits_BV.astype(jnp.float32) / s.temperature, _ids(logits_BV)
  if 0 < s.top_k < logits_BV.shape[-1]:
    logits_BC, ids_BC = jax.lax.top_k(logits_BC, s.top_k)
  if s.top_p < 1:
    logits_BC = _nucleus(logits_BC, s.top_p)
  return logits_BC, ids_BC


def _ids(logits_BV):
  return jnp.broadcast_to(jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)[None], logits_BV.shape)


def _nucleus(logits_BV, top_p):
  """-inf for all but the fewest most likely tokens whose probability is at least top_p, ties included.

  The threshold is found bit by bit in 32 passes over the row: exact, and 20 times as fast as sorting a vocabulary.
  """
  p_BV = jax.nn.softmax(logits_BV)
  bits = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
  order_BV = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # floats in the order of unsigned integers

  def lower(i, threshold_B1):
    higher_B1 = threshold_B1 | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    enough_B1 = jnp.where(order_BV >= higher_B1, p_BV, 0).sum(-1, keepdims=True) >= top_p
    return jnp.where(enough_B1, higher_B1, threshold_B1)
  threshold_B1 = jax.lax.fori_loop(0, 32, lower, jnp.zeros_like(order_BV[:, :1]))
  return jnp.where(order_BV >= threshold_B1, logits_BV, -jnp.inf)


def _categorical(key, logits_C):
  """Draws a chunk of 256, then one of its members: a random number for each of V took a third of a step."""
  chunks = jnp.pad(logits_C, (0, -len(logits_C) % _CHUNK), constant_values=-jnp.inf).reshape(-1, _CHUNK)
  outer, inner = jax.random.split(key)
  chunk = jax.random.categorical(outer, jax.nn.logsumexp(chunks, -1))
  return chunk * _CHUNK + jax.random.categorical(inner, chunks[chunk])


def _first(model, s, p, ids_BT, segments_BT, key):
  """Prefill and the first token."""
  B, T = ids_BT.shape
  cache, options = model.init_cache(B, T + s.max_new), {}
  if T > _LONG:
    cache, options = cache.replace(length=0), {'attend': attention.attend}  # its blocks must be known when it compiles
  x_BTD, cache = model.apply(p, ids_BT, segments_BT=segments_BT, cache=cache, **options)
  return _choose(model, s, p, x_BTD[:, -1:], key, 0, jnp.zeros(B, bool), cache)


def _next(model, s, p, step, key, t):
  """The t-th new token, from 0."""
  x_B1D, cache = model.apply(p, step.ids_B[:, None], segments_BT=None, cache=step.cache)
  return _choose(model, s, p, x_B1D, key, t, step.ended_B, cache)


def _choose(model, s, p, x_B1D, key, t, ended_B, cache):
  logits_BV = model.logits(p, x_B1D)[:, 0].astype(jnp.float32)
  keys_B = None if s.temperature == 0 else jax.vmap(jax.random.fold_in, (0, None))(nn.row_keys(key, len(ended_B)), t)
  ids_B = sample_token(logits_BV, keys_B, s)
  logprobs_B = jnp.take_along_axis(logits_BV, ids_B[:, None], 1)[:, 0] - jax.nn.logsumexp(logits_BV, -1)
  stop_B = (ids_B[:, None] == jnp.array(s.stop, jnp.int32)[None]).any(1)
  return _Step(ids_B, logprobs_B, ended_B | stop_B, cache)


def _write(sample, t, step, ended_B):
  """Column t of the sample, for the rows that had not ended before."""
  put = lambda rows_BT, x_B: rows_BT.at[:, t].set(jnp.where(ended_B, 0, x_B))
  return Sample(put(sample.tokens_BT, step.ids_B), sample.lengths_B + ~ended_B,
                put(sample.logprobs_BT, step.logprobs_B))


def check(model: Model, prompts: Sequence[Sequence[int]], s: Sampling) -> None:
  """Raises ConfigError for an empty prompt, or more tokens than the model has positions."""
  if not prompts or not all(map(len, prompts)):
    raise ConfigError('prompts: an empty one; expected at least one token in each; begin it with the bos token')
  longest = max(map(len, prompts))
  if model.length is not None and longest + s.max_new > model.length:
    raise ConfigError(f'max_new={s.max_new} after a prompt of {longest} tokens; expected at most {model.length} in '
                      'all, the positions that the model has; shorten the prompt or lower max_new')


def _inputs(model, prompts, s, key):
  """The padded arrays of `run`, once everything is in order."""
  check(model, prompts, s)
  if key is None and s.temperature > 0:
    raise ConfigError('key: none; expected one at temperature > 0; pass jax.random.key(seed)')
  return *pad(prompts), key


_run = jax.jit(run, static_argnums=(0, 1))
_first_jit = jax.jit(_first, static_argnums=(0, 1))
_next_jit = jax.jit(_next, static_argnums=(0, 1), donate_argnums=3)
