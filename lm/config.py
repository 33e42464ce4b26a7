"""A config is a tree of frozen dataclasses; `override`, `to_json` and `from_json` are pure functions on it."""

import ast
import contextlib
import dataclasses
import difflib
import types
import typing
from typing import Any

from lm.errors import ConfigError


def override(config: Any, *assignments: str) -> Any:
  """Applies each 'dotted.path=literal' and returns the new config.

  A literal is Python's (`1e-3`, `True`, `('a', 'b')`, `None`); text that is not one is a string where the field takes
  one. An int is accepted for a float field, nothing else is converted. `__post_init__` sees all assignments at once, so
  their order does not matter; of two to one field the last counts.

  Raises:
    ConfigError: unknown field (naming the nearest), wrong type (naming both), or a value that `__post_init__` refuses.
  """
  edits = []
  for item in assignments:
    path, equals, text = item.partition('=')
    if not equals:
      raise ConfigError(f'--set {item}: no "="; expected path.to.field=value')
    edits.append((path.strip().split('.'), text.strip(), item))
  return _put(config, edits)


def replace(config: Any, **changes: Any) -> Any:
  """`dataclasses.replace` whose keywords may be dotted with double underscores: `replace(c, optim__lr=1e-4)`."""
  values, groups = {}, {}
  for name, value in changes.items():
    head, _, rest = name.partition('__')
    if head not in {f.name for f in dataclasses.fields(config)}:
      raise ConfigError(f'{type(config).__name__} has no field {head!r}')
    if rest:
      groups.setdefault(head, {})[rest] = value
    else:
      values[head] = value
  values |= {head: replace(values.get(head, getattr(config, head)), **inner) for head, inner in groups.items()}
  return dataclasses.replace(config, **values)


def flatten(config: Any, prefix: str = '') -> dict[str, Any]:
  """{'optim.lr': 0.001, ...}: every leaf field by its dotted path."""
  out = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      out |= flatten(value, f'{prefix}{field.name}.')
    else:
      out[prefix + field.name] = value
  return out


def check(config: Any, prefix: str = '') -> None:
  """Whether each field holds what it declares, in a config that was written in Python, where nothing asks.

  Raises:
    ConfigError: a value of the wrong type or none of the choices, naming the field.
  """
  hints = typing.get_type_hints(type(config))
  for field in dataclasses.fields(config):
    value, name = getattr(config, field.name), prefix + field.name
    _check(value, hints[field.name], name)
    if dataclasses.is_dataclass(value):
      check(value, f'{name}.')


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
  """{'optim.lr': (old, new)} of every leaf that differs between two configs (a missing side is None)."""
  a, b = flatten(old), flatten(new)
  return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def to_json(config: Any) -> dict[str, Any]:
  """Nested dicts and lists that `json.dumps` takes, of equal configs the same (an int in a field of floats is a float);
  `from_json` is its inverse.
  """
  def plain(value):
    if dataclasses.is_dataclass(value):
      return to_json(value)
    return [plain(v) for v in value] if isinstance(value, tuple) else value
  hints, out = typing.get_type_hints(type(config)), {}
  for name in (f.name for f in dataclasses.fields(config)):
    value = getattr(config, name)
    with contextlib.suppress(ConfigError):  # `check` is for those
      value = _check(value, hints[name], name)
    out[name] = plain(value)
  return out


def from_json(cls: type, data: dict[str, Any]) -> Any:
  """The config of type `cls` that `to_json` wrote.

  Raises:
    ConfigError: unknown or missing field, or a value of the wrong type.
  """
  hints = typing.get_type_hints(cls)
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for name in data:
    if name not in fields:
      raise ConfigError(f'{cls.__name__} has no field {name!r}{_nearest(name, fields)}')
  values = {}
  for name, value in data.items():
    values[name] = _check(_tuples(value), hints[name], f'{cls.__name__}.{name}')
  try:
    return cls(**values)
  except TypeError as error:
    raise ConfigError(f'{cls.__name__}: {error}') from error


def _put(config, edits):
  """`config` after [(path of keys, text, the whole assignment)]."""
  by_field = {}
  for keys, text, item in edits:
    by_field.setdefault(keys[0], []).append((keys[1:], text, item))
  hints = typing.get_type_hints(type(config))
  names = [f.name for f in dataclasses.fields(config)]
  new = {}
  for name, inner in by_field.items():
    if name not in names:
      raise ConfigError(f'--set {inner[0][2]}: {type(config).__name__} has no field {name!r}{_nearest(name, names)}')
    old = getattr(config, name)
    for keys, _, item in inner:
      if keys and not dataclasses.is_dataclass(old):
        raise ConfigError(f'--set {item}: {keys[0]!r} lies below a value that has no fields')
      if not keys and dataclasses.is_dataclass(old):
        raise ConfigError(f'--set {item}: {name!r} is a group; set one of its fields: '
                          + ', '.join(f.name for f in dataclasses.fields(old)))
    _, text, item = inner[-1]
    new[name] = _put(old, inner) if dataclasses.is_dataclass(old) else _parse(text, hints[name], f'--set {item}')
  try:
    return dataclasses.replace(config, **new)  # reruns __post_init__
  except ConfigError as error:
    raise ConfigError(f'--set {" --set ".join(item for _, _, item in edits)}: {error}') from error


def _nearest(name, names, kind='fields'):
  near = difflib.get_close_matches(name, list(names), n=1)
  return f'; did you mean {near[0]!r}?' if near else f'; {kind}: ' + ', '.join(names)


def _parse(text, hint, where):
  try:
    value = ast.literal_eval(text)
  except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
    value = text
  if str in _kinds(hint) and type(value) not in _kinds(hint):
    value = text
  if bool in _kinds(hint) and text in ('true', 'false'):
    value = text == 'true'
  if int in _kinds(hint) and float not in _kinds(hint) and isinstance(value, float) and value.is_integer():
    value = int(value)  # 1e4
  return _check(value, hint, where)


def _tuples(value):
  return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _kinds(hint) -> tuple[type, ...]:
  """The plain types that a hint admits: `float | None` -> (float, NoneType)."""
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return sum((_kinds(h) for h in typing.get_args(hint)), ())
  if typing.get_origin(hint) is typing.Literal:
    return tuple({type(v) for v in typing.get_args(hint)})
  return (typing.get_origin(hint) or hint,)


def _check(value, hint, where):
  """`value` as `hint` wants it (ints become floats, also inside tuples), or ConfigError naming both types."""
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    for option in typing.get_args(hint):
      try:
        return _check(value, option, where)
      except ConfigError:
        continue
    raise ConfigError(f'{where}: {value!r} is {type(value).__name__}; expected {_name(hint)}')
  if typing.get_origin(hint) is typing.Literal:
    if value not in typing.get_args(hint):
      known = list(map(str, typing.get_args(hint)))
      raise ConfigError(f'{where}: {value!r} is not a choice{_nearest(str(value), known, "choices")}')
    return value
  kind = _kinds(hint)[0]
  if kind is float and type(value) is int:
    return float(value)
  if dataclasses.is_dataclass(kind) and isinstance(value, dict):
    return from_json(kind, value)
  if kind is tuple and isinstance(value, tuple):
    args = typing.get_args(hint)
    if args and args[-1] is Ellipsis:
      return tuple(_check(v, args[0], where) for v in value)
    if args and len(args) != len(value):
      raise ConfigError(f'{where}: {len(value)} values; expected {len(args)}')
    return tuple(_check(v, a, where) for v, a in zip(value, args, strict=True)) if args else value
  if type(value) is not kind:
    raise ConfigError(f'{where}: {value!r} is {type(value).__name__}; expected {_name(hint)}')
  return value


def _name(hint):
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return ' or '.join(map(_name, typing.get_args(hint)))
  if typing.get_origin(hint) is typing.Literal:
    return ' or '.join(map(repr, typing.get_args(hint)))
  return 'None' if hint is type(None) else _kinds(hint)[0].__name__
