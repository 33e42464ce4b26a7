"""Experience: responses that a policy draws to prompts, as rows that a loss takes, and what models say of them.

Pure functions of arrays, to be traced inside one program, under a mesh or not. What is real is decided by lengths and
segments, never by ids: padding may have the id of a stop token. Shapes: B rows, P prompt width, N most new tokens,
G responses to a prompt; T = P + N - 1 targets a row (rows hold P + N ids; column t of [B, T] belongs to token t + 1).
"""

from collections.abc import Callable, Sequence
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm import decode, nn, params, sampler, sharding
from lm.data.packing import Batch
from lm.errors import ConfigError
from lm.kernels.cross_entropy import token_logprobs


@struct.dataclass
class Responses:
  """Prompts up to column P, their responses from there on.

  Attributes:
    batch: [B, P + N]. Left of a prompt and behind a response ids, segments and positions are 0; segments are 1 where a
      token is, positions count a row's tokens from 0, the mask is true at the response's, its last included.
    ended_B: bool, the response has one of the ids that end it.
    lengths_B: int32, tokens of the response, 1 to N.
    logprobs_BN: f32, log-probabilities of the response's tokens as they were drawn, nats at the sampler's temperature;
      0 behind the last.
    width: P.
  """

  batch: Batch
  ended_B: jax.Array
  lengths_B: jax.Array
  logprobs_BN: jax.Array
  width: int = struct.field(pytree_node=False)

  @property
  def responses_BN(self) -> jax.Array:
    """Their ids, 0 behind the last."""
    return self.batch.ids_BT[:, self.width:]

  @property
  def drawn_BT(self) -> jax.Array:
    """What the sampler says of the targets: as `score` of the policy that drew them, to rounding."""
    return jnp.pad(self.logprobs_BN, ((0, 0), (self.width - 1, 0)))


def gathered(p: params.Tree, specs: params.Tree) -> params.Tree:
  """Weights whole over the axes that rows are divided over, and as they are over tensor; nothing to do on one device.

  For a program that decodes: sent once, where XLA would otherwise gather each weight for every token, or twice if it
  sees that all tokens need the same. On each device they take the memory of all weights over mesh.tensor.

  Args:
    p: of a model, as `peft.plain` leaves it.
    specs: of the model itself; what few parameters add to it is copied to every device.
  """
  if sharding.local():
    return p
  axes = {path: s.axes for path, s in params.flatten(specs).items()}

  def place(path, x):
    found = sharding.partition(axes.get(path.removesuffix('/w'), ()))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(a if a == 'tensor' else None for a in found)))
  return params.map_with_path(place, p)


def generate(model: decode.Model, p: params.Tree, ids_BP: jax.Array, segments_BP: jax.Array, s: sampler.Sampling,
             key: nn.Key | None) -> Responses:
  """Draws a response of 1 to s.max_new tokens to each prompt.

  What a row draws depends on the key, its number (`decode.run`) and its prompt only: not on the mesh, the other rows,
  or the padding.

  Args:
    p: as for `model.apply`; best `decode.prepare(gathered(peft.plain(params), specs))`.
    ids_BP, segments_BP: prompts against the right edge, each with at least one token; segment 0 is padding.

  Raises:
    ConfigError: more columns than the model has positions.
  """
  P, N = ids_BP.shape[1], s.max_new
  if model.length is not None and P + N > model.length:
    raise ConfigError(f'max_new={N} after prompts of width {P}; expected at most {model.length} in all, the positions '
                      'that the model has; cut the prompts or lower max_new')
  sample = decode.run(model, s, p, ids_BP, segments_BP, key)
  real_BP, response_BN = segments_BP > 0, _before(sample.lengths_B, N)
  real_BT = jnp.concatenate([real_BP, response_BN], axis=1)
  batch = Batch(
      ids_BT=jnp.where(real_BT, jnp.concatenate([ids_BP, sample.tokens_BT], axis=1), 0),
      segments_BT=real_BT.astype(jnp.int32),
      positions_BT=jnp.where(real_BT, jnp.cumsum(real_BT, axis=1) - 1, 0),
      mask_BT=jnp.concatenate([jnp.zeros_like(real_BP), response_BN], axis=1))
  ended_B = _any_of(sample.tokens_BT, s.stop).any(1)  # padding cannot be meant: a row that has not ended is full
  return Responses(batch, ended_B, sample.lengths_B, sample.logprobs_BT, P)


def groups(ids_BP: jax.Array, segments_BP: jax.Array, G: int) -> tuple[jax.Array, jax.Array]:
  """Each prompt G times, side by side: [B * G, P]. As rows of their own, they draw responses of their own."""
  return jnp.repeat(ids_BP, G, axis=0), jnp.repeat(segments_BP, G, axis=0)


def truncate(r: Responses, ids: Sequence[int], least: int = 0) -> Responses:
  """Ends each response after the first of the `ids` at its place `least` or later, places counted from 0.

  For recipes that draw a fixed number of tokens and then cut (arXiv:1909.08593: the first full stop from place 16 on;
  arXiv:2009.01325: the end token). A response without one stays as it is.
  """
  ids_BN = r.responses_BN
  N = ids_BN.shape[1]
  hit_BN = _any_of(ids_BN, ids) & r.batch.mask_BT[:, r.width:] & (jnp.arange(N) >= least)[None]
  found_B = hit_BN.any(1)
  lengths_B = jnp.where(found_B, jnp.argmax(hit_BN, axis=1) + 1, r.lengths_B)
  kept_BT = _before(r.width + lengths_B, r.width + N)
  batch = jax.tree.map(lambda x_BT: jnp.where(kept_BT, x_BT, jnp.zeros_like(x_BT)), r.batch)
  return r.replace(batch=batch, ended_B=r.ended_B | found_B, lengths_B=lengths_B,
                   logprobs_BN=jnp.where(_before(lengths_B, N), r.logprobs_BN, 0.0))


def score(p: params.Tree, r: Responses, s: sampler.Sampling, *, apply: Callable[..., Any],
          head: Callable[[params.Tree], jax.Array], chunk: int = 1024) -> tuple[jax.Array, jax.Array | None]:
  """What a model says of the responses: f32 [B, T], 0 outside them.

  Args:
    p: parameters of the policy that drew with `s`, of its reference, or of any other.
    apply: (params, ids_BT, *, positions_BT, segments_BT, key) -> x_BTD, or the pair of it and values_BT.
    head: params -> w_VD.
    chunk: tokens whose logits exist at once.

  Returns:
    (log-probabilities at the temperature of `s`, nats; values of the states that predict the tokens, None without).

  Raises:
    ConfigError: top_k, top_p or temperature 0: then the tokens were not drawn from softmax(logits / temperature).
  """
  if s.top_k or s.top_p < 1 or not s.temperature:
    raise ConfigError(f'top_k={s.top_k}, top_p={s.top_p}, temperature={s.temperature}; expected all tokens at a '
                      'temperature above 0, so that the policy is what drew; set top_k=0, top_p=1')
  b, mask_BT = r.batch, r.batch.mask_BT[:, 1:]
  found = apply(p, b.ids_BT[:, :-1], positions_BT=b.positions_BT[:, :-1], segments_BT=b.segments_BT[:, :-1], key=None)
  x_BTD, values_BT = found if isinstance(found, tuple) else (found, None)
  logprobs_BT = token_logprobs(x_BTD, head(p), b.ids_BT[:, 1:], chunk, temperature=s.temperature, start=r.width - 1)[0]
  inside = lambda x_BT: None if x_BT is None else jnp.where(mask_BT, x_BT.astype(jnp.float32), 0.0)
  return inside(logprobs_BT), inside(values_BT)


def best_of(r: Responses, scores_B: jax.Array, G: int) -> Responses:
  """The response with the largest score in each group of `groups`, the first of equals: [B / G, ...].

  A score that is no number loses to all others.

  Raises:
    ConfigError: G does not divide the rows.
  """
  B = scores_B.shape[0]
  if B % G:
    raise ConfigError(f'group={G} does not divide {B} rows; expected as many responses to each prompt')
  scores_PG = jnp.where(jnp.isnan(scores_B), -jnp.inf, scores_B).reshape(-1, G)
  best_P1 = jnp.argmax(scores_PG, axis=1)[:, None]

  def pick(x_B):
    x_PG = x_B.reshape(-1, G, *x_B.shape[1:])
    return jnp.take_along_axis(x_PG, best_P1.reshape(-1, *(1,) * (x_PG.ndim - 1)), axis=1)[:, 0]
  return jax.tree.map(pick, r)


def _before(lengths_B, N):
  return jnp.arange(N)[None] < lengths_B[:, None]


def _any_of(ids, wanted):
  return jnp.isin(ids, jnp.array(tuple(wanted), jnp.int32))
