"""Parameters are nested dicts of arrays, declared once by a tree of `Spec`.

`specs(c)` of a model is the single declaration: initial values, sharding, counts, decay masks, checkpoint layout and
import checks are all read from it. Shapes: any. Paths are keys joined by '/', e.g. 'blocks/attn/q'.
"""

from collections.abc import Callable
import dataclasses
import math
import os
import re
from typing import Any
import zlib

import jax
import jax.numpy as jnp

Tree = Any
Init = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # (key, shape) -> f32 array


@dataclasses.dataclass(frozen=True)
class Normal:
  """Gaussian of mean 0."""

  std: float

  def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return self.std * jax.random.normal(key, shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class TruncatedNormal:
  """Gaussian of mean 0, drawn again beyond two `std`: TensorFlow's rule, whose deviation is 0.88 `std`."""

  std: float

  def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return self.std * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class FanIn:
  """Gaussian of variance 1 / (product of the first `contracted` dimensions): LeCun's rule."""

  contracted: int = 1

  def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return Normal(math.prod(shape[:self.contracted]) ** -0.5)(key, shape)


@dataclasses.dataclass(frozen=True)
class Uniform:
  """Uniform between -bound and bound."""

  bound: float

  def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -self.bound, self.bound)


@dataclasses.dataclass(frozen=True)
class Stacked:
  """`init` for each slice of the first dimension, slice i from fold_in(key, i)."""

  init: Init

  def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda i: self.init(jax.random.fold_in(key, i), shape[1:]))(jnp.arange(shape[0]))


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  del key
  return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  del key
  return jnp.ones(shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Spec:
  """One parameter: shape, the logical axis of each dimension (None = never sharded), and how it starts."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: Init = Normal(0.02)

  def __post_init__(self):
    if len(self.shape) != len(self.axes):
      raise ValueError(f'{len(self.shape)} dimensions but {len(self.axes)} axes: {self.shape}, {self.axes}')


def path_of(key_path: tuple) -> str:
  """'blocks/attn/q' for a JAX key path."""
  return jax.tree_util.keystr(key_path, simple=True, separator='/')


def map_with_path(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
  """`jax.tree.map` whose function also gets the leaf's path: f(path, leaf, *leaves of rest)."""
  return jax.tree_util.tree_map_with_path(lambda kp, *leaves: f(path_of(kp), *leaves), tree, *rest)


def flatten(tree: Tree) -> dict[str, Any]:
  """{path: leaf} in tree order."""
  return {path_of(kp): leaf for kp, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def stack(n: int, specs: Tree) -> Tree:
  """The specs of `n` equal layers: one leading 'layers' axis; layer i draws from fold_in(key, i)."""
  return jax.tree.map(lambda s: Spec((n, *s.shape), ('layers', *s.axes), Stacked(s.init)), specs)


def unstack(tree: Tree) -> list[Tree]:
  """The `L` per-layer trees of a stacked tree; its transpose is one concatenation, not L padded sums."""
  leaves, treedef = jax.tree.flatten(tree)
  layers = [[x[0] for x in jax.lax.split(leaf, [1] * leaf.shape[0])] for leaf in leaves]
  return [treedef.unflatten(row) for row in zip(*layers, strict=True)]


def unstack_specs(specs: Tree) -> list[Tree]:
  """The specs of `unstack`'s trees: of layers that are to be told apart, as by `lm.peft` those that train."""
  layers = jax.tree.leaves(specs)[0].shape[0]
  one = lambda s: Spec(s.shape[1:], s.axes[1:], s.init.init if isinstance(s.init, Stacked) else s.init)
  return [jax.tree.map(one, specs) for _ in range(layers)]


def init(specs: Tree, key: jax.Array) -> Tree:
  """Initial values, f32. A leaf's key is fold_in(key, crc32(path)): adding a leaf never changes another."""
  return map_with_path(lambda path, s: s.init(jax.random.fold_in(key, zlib.crc32(path.encode())), s.shape), specs)


def jit_once(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
  """`jax.jit` for what runs once, such as drawing initial values: less of a CPU's compiler, the same bits.

  Its usual effort over random numbers takes three times as long, which one draw never gets back. Where XLA_FLAGS names
  an effort, that is taken.
  """
  name = 'xla_backend_optimization_level'
  usual = jax.default_backend() != 'cpu' or name in os.environ.get('XLA_FLAGS', '')
  return jax.jit(f, compiler_options=None if usual else {name: 1}, **options)


def abstract(specs: Tree, shardings: Tree | None = None, dtype=jnp.float32) -> Tree:
  """`jax.ShapeDtypeStruct` tree of the specs, for `eval_shape`, checkpoints and compilation."""
  if shardings is None:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), specs)
  return jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, dtype, sharding=h), specs, shardings)


def count(tree: Tree, pattern: str = '') -> int:
  """Number of scalars in the leaves (arrays or Specs) whose path matches the regular expression."""
  return sum(math.prod(x.shape) for path, x in flatten(tree).items() if re.search(pattern, path))


def match(tree: Tree, pattern: str) -> Tree:
  """Tree of bools: does the leaf's path match the regular expression (`re.search`)?"""
  return map_with_path(lambda path, _: re.search(pattern, path) is not None, tree)


def split(tree: Tree, mask: Tree) -> tuple[Tree, Tree]:
  """(leaves where `mask` is True, the others); same structure, None in the holes."""
  return (jax.tree.map(lambda m, x: x if m else None, mask, tree),
          jax.tree.map(lambda m, x: None if m else x, mask, tree))


def join(a: Tree, b: Tree) -> Tree:
  """Inverse of `split`: fills the holes (None) of `a` from `b`."""
  return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)
