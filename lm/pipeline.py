"""Pipeline parallelism: layers over the mesh axis 'pipe', each microbatch of rows passing from stage to stage.

What is here runs inside a `jax.shard_map` in which 'pipe' is manual and `check_vma` is off; automatic axes stay so, and
arrays keep their sharding over them. GPipe (arXiv:1811.06965) gives a stage one chunk of layers; with more `rounds` it
has several and takes them in turn (interleaved: arXiv:2104.04473 §2.2): shorter ticks, and so a smaller bubble.

Shapes: p stages (s is this one), L layers, v rounds, k = L / (p v) layers in a chunk; b rows of each device, p b of the
group of p devices, M microbatches of m rows; T length, D embed. Blocks are stored contiguously, L / p layers a stage,
whatever v is.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp

from lm import nn, params
from lm.errors import ConfigError
from lm.models import blocks as local

AXIS = 'pipe'

Prepare = Callable[[params.Tree], params.Tree]


def bubble(pipe: int, microbatches: int, rounds: int = 1) -> float:
  """The share of a step's ticks in which a stage has nothing to do: (p - 1) / (M v + p - 1)."""
  return (pipe - 1) / _ticks(pipe, microbatches, rounds)


def check(layers: int, pipe: int, microbatches: int, rounds: int, rows: int) -> None:
  """Whether L layers and the `rows` = p b of a group of stages can be cut as asked.

  M < p is allowed for one round, though at least half of the ticks are then bubble: (p - 1) / (M + p - 1).

  Raises:
    ConfigError: L is no multiple of p v, `rows` none of M, or M < p with more than one round: a microbatch would be due
      at the first stage before the last is done with it.
  """
  for name, value in (('pipe', pipe), ('microbatches', microbatches), ('rounds', rounds)):
    if value < 1:
      raise ConfigError(f'mesh.{name}={value}; expected at least 1')
  if layers % (pipe * rounds):
    raise ConfigError(f'mesh.pipe={pipe}, mesh.rounds={rounds}: model.layers={layers}, not divisible by '
                      f'{pipe} x {rounds} = {pipe * rounds}; choose model.layers as a multiple of it, or other stages')
  if rows < microbatches:
    raise ConfigError(f'mesh.microbatches={microbatches}: {rows} rows for each replica, less than one a microbatch; '
                      f'choose at most mesh.microbatches={rows}, or a larger batch')
  if rows % microbatches:
    raise ConfigError(f'mesh.microbatches={microbatches}: {rows} rows for each replica, not divisible by '
                      f'{microbatches}; choose mesh.microbatches as a divisor of {rows}')
  if rounds > 1 and microbatches < pipe:
    raise ConfigError(f'mesh.rounds={rounds}: mesh.microbatches={microbatches}; expected at least mesh.pipe={pipe} for '
                      'more than one round; set mesh.microbatches higher, or mesh.rounds=1')


def run(blocks: params.Tree, step: local.Step, x_BTD: jax.Array, rows: Any, key: nn.Key | None, *, scan_layers: bool,
        remat: str, first: int = 0, last: int | None = None, prepare: Prepare = lambda layer: layer,
        microbatches: int, rounds: int = 1) -> jax.Array:
  """`lm.models.blocks.run` over the stages, in M v + p - 1 ticks of k layers: x_BTD of this device's b rows, each value
  as without a pipeline.

  A tick keeps its input [m, T, D] for the backward pass, and all else of it is computed again, so that what `remat`
  keeps of k layers exists for one microbatch at a time; layers that recompute do so once more. Layers outside
  first..last - 1 take their time and change nothing. Rows travel to the first stage and back, (p - 1) / p of the
  group's x_BTD each time; with v > 1, each layer travels to the stage that computes it. A gradient of what `step`
  closes over is of this stage's layers only: sum it over 'pipe'.

  Args:
    blocks: this stage's slice of the stacked tree, [L / p, ...].
    rows: leaves [b, ...] are cut by rows like x_BTD; others are what all rows share.
    key: a plain key counts this device's rows from 0.
    prepare: gives one layer's weights as `step` reads them (gathered over 'fsdp'), right before use and in each
      recomputation.

  Raises:
    ConfigError: see `check`.
  """
  p, stage, b = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS), x_BTD.shape[0]
  M, L = microbatches, jax.tree.leaves(blocks)[0].shape[0] * p
  check(L, p, M, rounds, p * b)
  k = L // (p * rounds)
  key = nn.Keys(key, jnp.arange(b)) if key is not None and not isinstance(key, nn.Keys) else key
  microbatch = _cut((rows, key), b, M)
  chunks = _deal(jax.tree.map(lambda w: w.reshape(rounds, k, *w.shape[1:]), blocks), p, rounds)
  wanted = range(L)[first:last]

  def chunk(x_mTD, u):
    """The layers that are due in this stage's u-th busy tick."""
    some, key = microbatch(u % M)
    mine = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, u // M, keepdims=False), chunks)
    numbers = (u // M * p + stage) * k + jnp.arange(k)
    keys = None if key is None else jax.vmap(lambda i: nn.fold(key, i).shared)(numbers)

    def numbered(layer, x_mTD, some, _):
      i, layer_key = layer['number'], None if key is None else key.replace(shared=layer['key'])
      y_mTD = step(prepare(layer['weights']), x_mTD, some, layer_key)
      return y_mTD if len(wanted) == L else jnp.where((i >= wanted.start) & (i < wanted.stop), y_mTD, x_mTD)
    return local.run({'weights': mine, 'number': numbers, 'key': keys}, numbered, x_mTD, some, None,
                     scan_layers=scan_layers, remat=remat if k > 1 else 'none')  # a chunk is recomputed as it is

  x_MmTD = _to_first(x_BTD, p).reshape(M, p * b // M, *x_BTD.shape[1:])
  return _to_all(_ring(chunk, x_MmTD, p, rounds).reshape(p, *x_BTD.shape), p)


def layer(blocks: params.Tree, i: int, prepare: Prepare = lambda layer: layer) -> params.Tree:
  """The parameters of layer i of the whole model, on every stage; its owner gets the sum of the gradients."""
  here = jax.tree.leaves(blocks)[0].shape[0]
  i = i % (here * jax.lax.axis_size(AXIS))
  owned = jax.lax.axis_index(AXIS) == i // here
  share = lambda w: jax.lax.psum(_wide(jnp.where(owned, w[i % here], jnp.zeros_like(w[0]))), AXIS).astype(w.dtype)
  return prepare(jax.tree.map(share, blocks))


def _ticks(pipe, microbatches, rounds):
  return microbatches * rounds + pipe - 1


def _ring(chunk, x_MmTD, p, rounds):
  """All ticks. x_MmTD is read on the first stage, and the result is there.

  The first stage holds all microbatches between rounds: its tick t takes number t mod M out, which comes back p ticks
  later. The buffer has one more place, through which the other stages take what their neighbour sent. A stage that has
  nothing to do computes on zeros: neither its values nor its gradients, should they be NaN, reach anything.
  """
  M, stage = x_MmTD.shape[0], jax.lax.axis_index(AXIS)
  place = lambda mine, u: jnp.where((stage == 0) & mine, u % M, M)
  following = [(i, (i + 1) % p) for i in range(p)]
  chunk, closed_over = jax.closure_convert(chunk, x_MmTD[0], jnp.int32(0))

  @jax.checkpoint
  def compute(x_mTD, u, busy, *closed_over):
    # The same values either way; but the gradient of an idle tick is dropped, for 0 * inf in it would be NaN.
    used = [jnp.where(busy, a, jax.lax.stop_gradient(a)) for a in closed_over]
    return chunk(x_mTD, jnp.where(busy, u, 0), *used)

  def tick(buffer, t):
    u = t - stage
    busy = (u >= 0) & (u < M * rounds)
    x_mTD, buffer = _take(buffer, place(busy, u))
    y_mTD = compute(jnp.where(busy, x_mTD, jnp.zeros_like(x_mTD)), u, busy, *closed_over)
    done = t - (p - 1)  # the last stage's u, whose result the first is to have
    sent = jax.lax.ppermute(y_mTD, AXIS, following)
    return jax.lax.dynamic_update_index_in_dim(buffer, sent, place(done >= 0, done), 0), None

  buffer = jnp.concatenate([x_MmTD, jnp.zeros_like(x_MmTD[:1])])
  return jax.lax.scan(tick, buffer, jnp.arange(_ticks(p, M, rounds)))[0][:M]


@jax.custom_vjp
def _take(buffer, i):
  """buffer[i], and the buffer; in the derivative, the gradient is added in place and not to a copy of zeros."""
  return jax.lax.dynamic_index_in_dim(buffer, i, keepdims=False), buffer


def _take_backward(i, g):
  g_x, g_buffer = g
  g_x = g_x + jax.lax.dynamic_index_in_dim(g_buffer, i, keepdims=False)
  return jax.lax.dynamic_update_index_in_dim(g_buffer, g_x, i, 0), None


_take.defvjp(lambda buffer, i: (_take(buffer, i), i), _take_backward)


def _cut(tree, b, microbatches):
  """pick(j): the tree with only the rows of the j-th microbatch of the group; every stage needs all of them in turn."""
  leaves, treedef = jax.tree.flatten(tree)
  by_rows = [jnp.ndim(x) >= 1 and x.shape[0] == b for x in leaves]

  def gather(x):
    whole = jax.lax.all_gather(_wide(x), AXIS, tiled=True).astype(x.dtype)
    return whole.reshape(microbatches, whole.shape[0] // microbatches, *x.shape[1:])
  leaves = [gather(x) if cut else x for x, cut in zip(leaves, by_rows, strict=True)]
  return lambda j: treedef.unflatten([jax.lax.dynamic_index_in_dim(x, j, keepdims=False) if cut else x
                                      for x, cut in zip(leaves, by_rows, strict=True)])


def _deal(groups, p, rounds):
  """Groups of layers [v, k, ...] as they are stored, to the stages that compute them: of p v groups, stage s stores
  number s v + j in place j and computes number c p + s in round c.

  One permutation of the stages sends each stage's place (r + s g // p) mod v, g = gcd(p, v), for r = 0..v - 1. Its
  receivers differ: of the g runs of p / g stages, each sends to another residue mod g; within a run s v mod p differs.
  """
  if rounds == 1:
    return groups
  place = [[(r + s * math.gcd(p, rounds) // p) % rounds for r in range(rounds)] for s in range(p)]
  number = [[s * rounds + j for j in row] for s, row in enumerate(place)]  # [s][r]: the group that s sends in turn r
  turn = {n: r for row in number for r, n in enumerate(row)}
  stage = jax.lax.axis_index(AXIS)
  sent = jnp.array(place)[stage]
  kept = jnp.array([[turn[c * p + s] for c in range(rounds)] for s in range(p)])[stage]

  def exchange(w):
    w = w[sent]
    turns = [jax.lax.ppermute(w[r], AXIS, [(s, number[s][r] % p) for s in range(p)]) for r in range(rounds)]
    return jnp.stack(turns)[kept]
  return jax.tree.map(exchange, groups)


# Rows go to and from the first stage by permutations of one sender: they keep an array's sharding over automatic axes,
# where gathering and scattering would replicate it, and they and their transposes add nothing in 16 bits.

def _to_first(x_BTD, p):
  """[p b, T, D] of all stages in order on the first; no other stage may read it."""
  return jnp.concatenate([x_BTD] + [jax.lax.ppermute(x_BTD, AXIS, [(s, 0)]) for s in range(1, p)])


def _to_all(x_pBTD, p):
  """To each stage its [b, T, D] of what the first has."""
  own = jnp.where(jax.lax.axis_index(AXIS) == 0, x_pBTD[0], jnp.zeros_like(x_pBTD[0]))
  return sum((jax.lax.ppermute(x_pBTD[s], AXIS, [(0, s)]) for s in range(1, p)), own)


def _wide(x):
  """f32 for 16-bit floats, whose gradients a collective would otherwise sum in 16 bits."""
  return x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x
