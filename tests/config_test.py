"""`--set` is typed and checked; a config survives JSON."""

import dataclasses
import json
import random
import re
from typing import Literal

import pytest

from lm import config, nn, optim, sharding
from lm.errors import ConfigError
from lm.models import decoder


@dataclasses.dataclass(frozen=True)
class Inner:
  steps: int = 100
  warmup: int = 10

  def __post_init__(self):
    if self.warmup > self.steps:
      raise ConfigError(f'inner.warmup: {self.warmup}; expected at most {self.steps}')


@dataclasses.dataclass(frozen=True)
class Outer:
  inner: Inner = Inner()
  maybe: Inner | None = None
  name: str = 'x'
  path: str | None = None
  rate: float = 1.0
  top_k: int | None = None
  flag: bool = False
  kind: Literal['a', 'b'] = 'a'
  level: Literal[1, 2] | None = None
  sizes: tuple[int, ...] = ()
  pair: tuple[str, float] = ('p', 0.5)
  table: tuple[tuple[str, float | tuple[float, ...]], ...] = ()


@pytest.mark.parametrize('text, path, want', [
    ('rate=1e-3', 'rate', 1e-3), ('rate=2', 'rate', 2.0), ('rate=-0', 'rate', 0.0), ('flag=True', 'flag', True),
    ('flag=true', 'flag', True), ('flag=false', 'flag', False),
    ('name=hello', 'name', 'hello'), ("name='hello'", 'name', 'hello'), ('name=12', 'name', '12'),
    ('name=', 'name', ''), ('name=a=b', 'name', 'a=b'), ('name=None', 'name', 'None'), ('path=None', 'path', None),
    ('path=/a/b', 'path', '/a/b'), ('top_k=5', 'top_k', 5), ('top_k=None', 'top_k', None), ('kind=b', 'kind', 'b'),
    ('level=2', 'level', 2), ('level=None', 'level', None), ('sizes=(1, 2)', 'sizes', (1, 2)),
    ('sizes=1,2', 'sizes', (1, 2)), ('sizes=()', 'sizes', ()), ("pair=('q', 1)", 'pair', ('q', 1.0)),
    ("table=(('a', 1), ('b', (1, 2)))", 'table', (('a', 1.0), ('b', (1.0, 2.0)))),
    ('inner.steps=50', 'inner.steps', 50), (' inner.steps = 50 ', 'inner.steps', 50),
])
def test_set_changes_one_field_and_keeps_its_type(text, path, want):
  new = config.override(Outer(), text)
  got = config.flatten(new)[path]
  assert got == want and type(got) is type(want)
  assert set(config.diff(Outer(), new)) <= {path}


@pytest.mark.parametrize('text, parts', [
    ('nmae=1', ["Outer has no field 'nmae'", "did you mean 'name'"]),
    ('inner.step=1', ["Inner has no field 'step'", "did you mean 'steps'"]),
    ('zzzz=1', ['no field', 'fields: inner, maybe, name']),
    ('rate', ['no "="', 'path.to.field=value']),
    ('=1', ["no field ''"]),
    ('inner=1', ["'inner' is a group", 'steps, warmup']),
    ('name.x=1', ["'x' lies below a value that has no fields"]),
    ('maybe.steps=1', ["'steps' lies below a value"]),
    ('inner.steps.x=1', ["'x' lies below"]),
    ('rate=fast', ["'fast' is str", 'expected float']),
    ('rate=True', ['True is bool', 'expected float']),
    ('rate=nan', ["'nan' is str", 'expected float']),
    ('inner.steps=1.5', ['1.5 is float', 'expected int']),
    ('inner.steps=True', ['True is bool', 'expected int']),
    ('top_k=1.5', ['1.5 is float', 'expected int or None']),
    ('flag=1', ['1 is int', 'expected bool']),
    ('flag=yes', ["'yes' is str", 'expected bool']),
    ('kind=c', ["'c' is not a choice"]),
    ('level=3', ['3 is int', 'expected 1 or 2 or None']),
    ('sizes=[1]', ['list', 'expected tuple']),
    ('sizes=(1, 2.5)', ['2.5 is float', 'expected int']),
    ("pair=('a',)", ['1 values; expected 2']),
    ("pair=(1, 2)", ['1 is int', 'expected str']),
    ('top_k=__import__("os")', ['is str', 'expected int or None']),
    ('top_k={[1]: 2}', ["'{[1]: 2}' is str", 'expected int or None']),
    ('top_k=' + '(' * 5000, ['is str', 'expected int or None']),
    ('inner.warmup=101', ['inner.warmup: 101; expected at most 100']),
])
def test_a_wrong_assignment_is_one_clear_line(text, parts):
  with pytest.raises(ConfigError) as caught:
    config.override(Outer(), text)
  message = str(caught.value)
  assert message.startswith(f'--set {text}: ') and '\n' not in message
  for part in parts:
    assert part in message


def test_assignments_are_checked_together():
  """The steps of a config that warms up for 10 can go to 5 if the warm-up goes too, in either order."""
  for order in ('inner.steps=5', 'inner.warmup=2'), ('inner.warmup=2', 'inner.steps=5'):
    assert config.override(Outer(), *order).inner == Inner(5, 2)
  assert config.override(Outer(), 'rate=1', 'rate=2', 'inner.steps=11').rate == 2
  assert config.replace(Outer(), inner__steps=5, rate=3.0, inner__warmup=2) == Outer(Inner(5, 2), rate=3.0)
  assert config.replace(Outer(), inner=Inner(5, 5), inner__warmup=2).inner == Inner(5, 2)
  with pytest.raises(ConfigError, match='--set inner.steps=5: inner.warmup: 10'):
    config.override(Outer(), 'rate=3', 'inner.steps=5')
  with pytest.raises(ConfigError, match="no field 'iner'"):
    config.replace(Outer(), iner__steps=5)


def test_override_leaves_its_argument_alone():
  old = Outer()
  config.override(old, 'inner.steps=50', 'name=y')
  assert old == Outer()
  assert config.override(old) is not None and config.override(old) == old


@pytest.mark.parametrize('c', [
    Outer(), Outer(maybe=Inner(5, 2)),
    Outer(path='p', top_k=3, level=2, sizes=(1, 2), table=(('a', 1.0), ('b', (0.5,)))),
    optim.Config(), optim.Config(multipliers=(('embed', 0.1), ('blocks', (1.0, 0.5)))), sharding.Config(data=4),
    decoder.Config(), decoder.Config(dropout=nn.Dropout(attention=0.1), activation='swiglu'),
], ids=lambda c: type(c).__module__)
def test_json_round_trip(c):
  assert config.from_json(type(c), json.loads(json.dumps(config.to_json(c)))) == c


def test_json_round_trip_of_random_values():
  rng = random.Random(0)
  number = lambda: rng.choice([0.0, -1.5, 1e-30, 3e38, 0.1])
  for _ in range(200):
    steps = rng.randrange(1, 1 << 62)
    c = Outer(
        inner=Inner(steps, rng.randrange(steps)), maybe=rng.choice([None, Inner(7, 7)]),
        name=rng.choice(['', 'None', '1', '[1]', 'π "\\\n']), path=rng.choice([None, 'p']), rate=number(),
        top_k=rng.choice([None, 0, -3]), flag=rng.random() < 0.5, kind=rng.choice(['a', 'b']),
        level=rng.choice([None, 1, 2]), sizes=tuple(range(rng.randrange(4))), pair=('', number()),
        table=tuple((str(i), rng.choice([number(), (), (number(), number())])) for i in range(rng.randrange(3))))
    again = config.from_json(Outer, json.loads(json.dumps(config.to_json(c))))
    assert again == c and not config.diff(again, c)


@pytest.mark.parametrize('data, part', [
    ({'nmae': 'x'}, "did you mean 'name'"), ({'rate': '1'}, "Outer.rate: '1' is str; expected float"),
    ({'inner': {'stesp': 1}}, "Inner has no field 'stesp'"), ({'inner': 3}, '3 is int; expected Inner'),
    ({'pair': ['a']}, '1 values; expected 2'), ({'name': None}, 'None is NoneType; expected str'),
    ({'inner': {'steps': 1, 'warmup': 2}}, 'inner.warmup: 2'),
])
def test_json_that_does_not_fit_is_refused(data, part):
  with pytest.raises(ConfigError, match=part):
    config.from_json(Outer, data)


def test_diff_names_what_differs():
  new = config.override(Outer(), 'inner.steps=50', 'sizes=(1,)')
  assert config.diff(Outer(), new) == {'inner.steps': (100, 50), 'sizes': ((), (1,))}
  assert config.diff(Outer(), dataclasses.replace(Outer(), maybe=Inner()))['maybe.steps'] == (None, 100)


def test_every_field_of_the_library_can_be_set_from_its_own_text():
  for c in optim.Config(), sharding.Config(), decoder.Config():
    for path, value in config.flatten(c).items():
      assert config.override(c, f'{path}={value}') == c, path


def test_a_config_written_in_python_is_checked():
  config.check(Outer())
  for c, part in ((optim.Config(name='adma'), "name: 'adma' is not a choice; did you mean 'adamw'?"),
                  (Outer(inner=Inner(steps=10.5)), 'inner.steps: 10.5 is float; expected int'),
                  (Outer(inner=optim.Config()), 'is Config; expected Inner')):
    with pytest.raises(ConfigError, match=re.escape(part)):
      config.check(c)


def test_equal_configs_are_equal_as_json():
  """A config function may write an int where a float is meant; --set and a saved config.json do not."""
  for make in (lambda: Outer(rate=2), lambda: config.override(Outer(), 'rate=2'),
               lambda: config.from_json(Outer, json.loads(json.dumps(config.to_json(Outer(rate=2)))))):
    assert json.dumps(config.to_json(make())['rate']) == '2.0'
