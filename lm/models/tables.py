"""Foreign weights as tables: each row says where one of their tensors lies in our parameter tree.

A row names their tensor ('{}' is the layer), its layout beside ours, and our parameters in it: 'NH,D->DNH' is a matrix
of (N, H) rows and D columns that we keep as [D, N, H]; 'c' on their side counts equal parameters of ours fused into one
tensor. Rows whose parameters the config lacks fall away. Layouts only move numbers: there and back is bitwise.

Shapes: D embed, N heads, K kv heads, H head dim, F mlp, V vocab, T positions.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import math
import os
import re
from typing import Any, NamedTuple

from flax import traverse_util
import numpy as np

from lm import params
from lm.errors import CheckpointError, ConfigError

Shape = tuple[int, ...]


class Row:
  """One of their tensors and where its numbers lie in ours."""

  def __init__(self, name: str, layout: str, *paths: str):
    self.name, self.layout, self.paths = name, layout, paths
    theirs, ours = layout.split('->')
    self._groups, self._order = theirs.split(','), theirs.replace(',', '')
    self._ours, self._axes = ours, ('c' if 'c' in theirs else '') + ours

  def shape(self, ours: Shape) -> Shape:
    """Their shape, from the shape of one of our parameters."""
    sizes = self._sizes(ours)
    return tuple(math.prod(sizes[axis] for axis in group) for group in self._groups)

  def split(self, theirs: np.ndarray, ours: Shape) -> np.ndarray:
    """[c, *ours]: our parameters, in the order of `paths`."""
    sizes = self._sizes(ours)
    x = theirs.reshape([sizes[axis] for axis in self._order])
    x = x.transpose([self._order.index(axis) for axis in self._axes])
    return x if 'c' in self._axes else x[None]

  def merge(self, ours: list[np.ndarray]) -> np.ndarray:
    """Their tensor; the inverse of `split`."""
    x = np.stack(ours) if 'c' in self._axes else ours[0]
    x = x.transpose([self._axes.index(axis) for axis in self._order])
    return np.ascontiguousarray(x.reshape(self.shape(ours[0].shape)))

  def _sizes(self, ours: Shape) -> dict[str, int]:
    return dict(zip(self._ours, ours, strict=True)) | {'c': len(self.paths)}


class Tensor(NamedTuple):
  """A stored tensor, read on demand as f32."""

  shape: Shape
  read: Callable[[], np.ndarray]


class Fields:
  """The fields of a foreign config, each to be taken once: what nobody took is refused, never ignored."""

  def __init__(self, where: str | os.PathLike, fields: Mapping[str, Any]):
    self._where, self._left = where, dict(fields)

  def take(self, name: str, kind: type, *default: Any) -> Any:
    """The value of a field, `default` where it is absent or null; whole numbers are at least 1, others finite."""
    value = self._left.pop(name, None)
    if value is None and default:
      return default[0]
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind or (kind is int and value < 1) or (kind is float and not math.isfinite(value)):
      kinds = {int: 'a whole number of at least 1', float: 'a finite number'}
      raise self.error(name, value, kinds.get(kind, kind.__name__))
    return value

  def raw(self, name: str) -> Any:
    """The value of a field as it stands, None where it is absent."""
    return self._left.pop(name, None)

  def group(self, name: str) -> 'Fields':
    """The fields of a nested object; empty where it is absent."""
    return Fields(f'{self._where}: {name}', self.take(name, dict, {}))

  def fixed(self, name: str, *allowed: Any) -> None:
    """Refuses a field that is neither absent, null nor one of `allowed`."""
    value = self._left.pop(name, None)
    if value is not None and value not in allowed:
      raise self.error(name, value, ' or '.join(map(repr, allowed)))

  def drop(self, pattern: str) -> None:
    """Forgets fields that do not change what the model computes."""
    self._left = {k: v for k, v in self._left.items() if not re.fullmatch(pattern, k)}

  def done(self) -> None:
    for name, value in self._left.items():
      if not (value is None or value is False or value in ({}, [])):  # what is off changes nothing
        raise self.error(name, value, 'a field that is known here')

  def error(self, name: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f'{self._where}: {name}={repr(value)[:80]}; expected {expected}; correct the field if it '
                       'is wrong, take it out if it changes nothing, else convert another model')


class Family(NamedTuple):
  """The architectures of one model_type of transformers; the first row is the token embedding."""

  architectures: Mapping[str, tuple[str, ...]]  # name -> the heads it has; the first that fits names an export
  prefix: str  # of the names below the head; a folder of the bare model lacks it
  rows: tuple[Row, ...]
  copies: Mapping[str, str]  # their tensors that repeat another one in tied models
  ignored: str  # pattern of their tensors that hold no parameter
  specs: Callable[[Any], params.Tree]  # of our config
  read: Callable[[Fields], Any]  # their config as ours
  write: Callable[[Any], dict[str, Any]]  # and back
  needs: Callable[[Any], dict[str, tuple]]  # field of ours -> the values that their model can have
  heads: Mapping[str, Callable[[Any], params.Tree]] = {}  # top-level key of our tree -> its specs; each may be absent

  def tree(self, c: Any, heads: Iterable[str]) -> params.Tree:
    """Specs of the body and the given heads."""
    return self.specs(c) | {head: self.heads[head](c) for head in heads}


def checked(family: Family, c: Any) -> Family:
  """The family, once its architectures can compute `c`.

  Raises:
    ConfigError: they cannot; names the field that stands in the way.
  """
  for name, allowed in family.needs(c).items():
    if getattr(c, name) not in allowed:
      raise ConfigError(f'model.{name}={getattr(c, name)!r}; expected {" or ".join(map(repr, allowed))}, all that '
                        f'{" and ".join(family.architectures)} can have; this config has no export')
  return family


def instances(rows: tuple[Row, ...], specs: params.Tree) -> Iterator[tuple[str, Row, tuple, Shape]]:
  """(their name, row, index into our stacked array, our shape) of every tensor that `specs` asks for."""
  flat = params.flatten(specs)
  for row in rows:
    if row.paths[0] not in flat:
      continue
    shape = flat[row.paths[0]].shape
    if '{}' in row.name:
      for layer in range(shape[0]):
        yield row.name.format(layer), row, (layer,), shape[1:]
    else:
      yield row.name, row, (), shape


def fill(c: Any, make_specs: Callable[[Any], params.Tree], rows: tuple[Row, ...], tensors: Mapping[str, Tensor],
         where: str | os.PathLike, ignored: str = '(?!)') -> tuple[Any, params.Tree]:
  """(config, f32 parameters), once every tensor is accounted for.

  An embedding with more rows than `c.vocab` is a padded vocabulary: the rows stay, and the config counts them.

  Raises:
    CheckpointError: a tensor is missing, unknown or of another shape.
  """
  stored = tensors.get(rows[0].name)
  if stored is not None and len(stored.shape) == 2 and stored.shape[0] > c.vocab:
    c = dataclasses.replace(c, vocab=stored.shape[0])
  specs = make_specs(c)
  known = set()
  for name, row, _, shape in instances(rows, specs):
    want = row.shape(shape)
    if name not in tensors:
      raise CheckpointError(f'{where}: tensor {name} is missing; expected one of shape {want}; copy the weights again')
    if tensors[name].shape != want:
      raise CheckpointError(f'{where}: tensor {name} has shape {tensors[name].shape}; expected {want}, as in the '
                            'config; copy config and weights again')
    known.add(name)
  for name in tensors:
    if name not in known and not re.fullmatch(ignored, name):
      raise CheckpointError(f'{where}: tensor {name[:100]!r} of shape {tensors[name].shape} has no place in this '
                            'model; expected none of that name; correct the config that describes the weights')
  out = {path: np.empty(spec.shape, np.float32) for path, spec in params.flatten(specs).items()}
  for name, row, index, shape in instances(rows, specs):
    for path, value in zip(row.paths, row.split(tensors[name].read(), shape), strict=True):
      out[path][index] = value
  return c, traverse_util.unflatten_dict(out, sep='/')


def linear(name: str, layout: str, path: str) -> tuple[Row, Row]:
  """The weight of a torch Linear, whose outputs are its rows, and its bias."""
  outputs = layout.split(',')[0]
  return Row(f'{name}.weight', layout, path), Row(f'{name}.bias', f'{outputs}->{outputs}', f'{path}_bias')


def norm(name: str, path: str) -> tuple[Row, Row]:
  return Row(f'{name}.weight', 'D->D', f'{path}/scale'), Row(f'{name}.bias', 'D->D', f'{path}/bias')
