"""Sampling from a language model: prefill, then one token a step through a key/value cache.

Nothing here knows a model: `Model` is three functions. Prompts of unequal length are padded on the left; what a row
gives depends neither on the padding nor on the other rows. Shapes: B rows, T prompt length (padded) or new tokens,
S cache slots, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import types
import typing
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from lm import host, nn, params, sampler, sharding
from lm.errors import ConfigError
from lm.kernels import attention, quantised

# How many of a kernel's dimensions a dot contracts, by the last part of its path; they come first.
_KERNELS = {'q': 1, 'k': 1, 'v': 1, 'o': 2, 'up': 1, 'gate': 1, 'down': 1, 'relative': 1}
_TOGETHER = {'attn': ('q', 'k', 'v'), 'mlp': ('up', 'gate')}  # as `nn.dots` is given them
_BUCKET, _STEP = 16, 1024  # shortest padded prompt; longer ones: the next power of two, or multiple of _STEP, if less
_LONG = 512  # longer prompts attend by blocks: the whole [B, N, T, S] of scores would be much


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
    logprobs_BT: f32, log-probability of each token under softmax(logits / temperature), whatever top_k and top_p left
      out; at temperature 0 under softmax(logits). 0 beyond.
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
  columns = host.rows_as_columns(jax.default_backend()) if kind == 'float32' else 0

  def leaf(i, path, x):
    inputs, w = _KERNELS.get(path.split('/')[-1]), jnp.asarray(x[i])
    return w if inputs is None else quantised.pack(w, tuple(range(inputs)), kind, columns)
  layers = range(len(jax.tree.leaves(p['blocks'])[0]))
  blocks = [_joined(params.map_with_path(functools.partial(leaf, i), p['blocks'])) for i in layers]
  # A NumPy leaf would be copied to the device at every call.
  rest = jax.tree.map(jnp.asarray, {k: v for k, v in p.items() if k != 'blocks'})
  head_VD = rest.get('unembed', rest['embed']['tokens'])
  return rest | {'blocks': blocks, 'unembed': quantised.pack(head_VD, (1,), kind, columns)}


def _joined(block):
  """Kernels of the same inputs side by side, unless a mesh divides their outputs."""
  if not sharding.local():
    return block
  for name, kernels in _TOGETHER.items():
    if all(kernel in block[name] for kernel in kernels):
      joined = quantised.join([block[name][kernel] for kernel in kernels])
      block = block | {name: block[name] | dict.fromkeys(kernels) | {kernels[0]: joined}}
  return block


def generate(model: Model, p: params.Tree, prompts: Sequence[Sequence[int]], s: sampler.Sampling,
             key: jax.Array | None = None) -> Sample:
  """Continues every prompt. Compiles once for a batch size, prompt bucket and `Sampling`.

  Args:
    p: as for `model.apply`; best from `prepare`.
    key: row i draws its t-th token from fold_in(fold_in(key, i), t); None is enough at temperature 0.

  Raises:
    ConfigError: an empty prompt, no key, or more tokens than the model has positions.
  """
  return _run(model, s, p, *_inputs(model, prompts, s, key))


def stream(model: Model, p: params.Tree, prompts: Sequence[Sequence[int]], s: sampler.Sampling,
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


def run(model: Model, s: sampler.Sampling, p: params.Tree, ids_BT: jax.Array, segments_BT: jax.Array,
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


def prefill(model: Model, max_new: int, p: params.Tree, ids_BT: jax.Array, segments_BT: jax.Array
            ) -> tuple[jax.Array, Any]:
  """(x_B1D after the last token, the cache with room for `max_new` more)."""
  B, T = ids_BT.shape
  cache, options = model.init_cache(B, T + max_new), {}
  if T > _LONG:
    cache, options = cache.replace(length=0), {'attend': attention.attend}  # its blocks must be known when it compiles
  x_BTD, cache = model.apply(p, ids_BT, segments_BT=segments_BT, cache=cache, **options)
  return x_BTD[:, -1:], cache


def _first(model, s, p, ids_BT, segments_BT, key):
  """Prefill and the first token."""
  x_B1D, cache = prefill(model, s.max_new, p, ids_BT, segments_BT)
  return _choose(model, s, p, x_B1D, key, 0, jnp.zeros(len(ids_BT), bool), cache)


def _next(model, s, p, step, key, t):
  """The t-th new token, from 0."""
  x_B1D, cache = model.apply(p, step.ids_B[:, None], segments_BT=None, cache=step.cache)
  return _choose(model, s, p, x_B1D, key, t, step.ended_B, cache)


def _choose(model, s, p, x_B1D, key, t, ended_B, cache):
  logits_BV = model.logits(p, x_B1D)[:, 0].astype(jnp.float32)
  keys_B = None if s.temperature == 0 else jax.vmap(jax.random.fold_in, (0, None))(nn.row_keys(key, len(ended_B)), t)
  ids_B = sampler.sample_token(logits_BV, keys_B, s)
  scaled_BV = logits_BV / (s.temperature or 1.0)
  logprobs_B = jnp.take_along_axis(scaled_BV, ids_B[:, None], 1)[:, 0] - jax.nn.logsumexp(scaled_BV, -1)
  stop_B = (ids_B[:, None] == jnp.array(s.stop, jnp.int32)[None]).any(1)
  return _Step(ids_B, logprobs_B, ended_B | stop_B, cache)


def _write(sample, t, step, ended_B):
  """Column t of the sample, for the rows that had not ended before."""
  put = lambda rows_BT, x_B: rows_BT.at[:, t].set(jnp.where(ended_B, 0, x_B))
  return Sample(put(sample.tokens_BT, step.ids_B), sample.lengths_B + ~ended_B,
                put(sample.logprobs_BT, step.logprobs_B))


def check(model: Model, prompts: Sequence[Sequence[int]], s: Any) -> None:
  """Raises ConfigError for an empty prompt, or, with `s.max_new` more, more tokens than the model has positions."""
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
