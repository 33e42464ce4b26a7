"""Which split a record goes to: no text, group or copy on two sides, the past before what validates."""

import dataclasses

import numpy as np
import pytest

from lm import config
from lm.data import assign, examples, labelled, splits
from lm.data.examples import Labelled
from lm.data.json_io import Fault
from lm.errors import ConfigError, DataError
from lm.text import scan


@pytest.mark.parametrize('c', [labelled.Config(), labelled.Config(split='stratified'), labelled.Config(folds=3)])
def test_a_pair_is_one_text_of_the_splits(c):
  """The same two texts, in whatever case and space, share a part; those that share the first alone need not."""
  found = [Labelled('The  Film', 'xy'[i % 2], text_pair=f'Number {i}') for i in range(60)]
  found += [Labelled('the film ', e.label, text_pair=e.text_pair.upper()) for e in found]
  parts = labelled.assigned(found, c)
  assert parts[:60] == parts[60:] and set(parts) == {'train', 'validation'}
  turned = [dataclasses.replace(e, text=e.text_pair, text_pair=e.text) for e in found]
  assert c.split != 'hash' or c.folds or labelled.assigned(turned, c) != parts
  key = scan.duplicate_key('\0'.join(('a b', 'c')))
  assert key != scan.duplicate_key('\0'.join(('a', 'b c')))


@pytest.mark.parametrize('left', [(), ('extra',)])
def test_a_file_of_which_nothing_is_left_out_is_not_reported_but_splits_that_were_not_read_are(left, capsys):
  found = [example(f'{i}', ('train', 'validation')[i % 2]) for i in range(4)]
  report = examples.Report(4, 4, 0, {}, {}, left)
  parts = assign.divided([('a.jsonl', found, report)], labelled.Config(), lambda e: e.text, lambda e: e.text)
  assert [part for _, part in parts] == ['train', 'validation'] * 2
  assert capsys.readouterr().out == ('' if not left else f'a.jsonl:\n{report.table()}\n')
  one = report.without([Fault('split', 'a.jsonl:1', 'x'), Fault('split', 'a.jsonl:2', 'y')])
  assert (one.seen, one.kept, one.faults, one.left) == (4, 2, {'split': 2}, left) and len(one.messages['split']) == 2


def example(text, split=None, label='x', at='', **metadata):
  return Labelled(text, label, metadata, split, at)


GROUPED, TIMED = (labelled.Config(split=split, by='at', validation_fraction=0.25) for split in ('grouped', 'time'))


EVERY_SPLIT = pytest.mark.parametrize('c', [labelled.Config(), labelled.Config(split='stratified'),
                                            labelled.Config(folds=2)], ids=['hash', 'stratified', 'folds'])


@EVERY_SPLIT
@pytest.mark.parametrize('text, again', [('same text', 'Same  text'), ('同一句话', '同一 句话')])
def test_a_text_whose_split_is_said_once_is_in_no_other(c, text, again):
  more = [example(f'{i}', label='xy'[i % 2]) for i in range(60)]
  for said in ('test', 'validation', 'train') if not c.folds else ('test',):
    found = [example(again), example(text, said), example(again + ' '), *more]
    parts = labelled.assigned(found, c)
    assert parts[:3] == [said] * 3 and {'train', 'validation'} <= set(parts[3:])


def numbered(n, groups):
  """Records of two classes, of random groups; every seventh text repeats an earlier one, in another spelling."""
  rng = np.random.default_rng(n)
  texts = [f'{("Film", "电 影")[i % 2]} {i}' for i in range(n)]
  texts[7::7] = [texts[i - rng.integers(1, 6)].upper().replace('电 影', '电影') for i in range(7, n, 7)]
  return [example(text, None, 'xy'[int(rng.random() < 0.4)], at=f'a.jsonl:{i + 1}') for i, text in enumerate(texts)], [
      int(group) for group in rng.integers(0, groups, n)]


def at(found, values):
  return [dataclasses.replace(e, metadata={'at': value}) for e, value in zip(found, values, strict=True)]


def sides(parts, names):
  """The splits of each name; None, which is left out, is none."""
  found = {}
  for part, name in zip(parts, names, strict=True):
    found.setdefault(name, set()).update({part} - {None})
  return found


@pytest.mark.parametrize('authors', [150, 400])
def test_no_group_and_no_text_is_on_two_sides(authors):
  found, groups = numbered(300, authors)
  found = at(found, [f'作者 {group}' for group in groups])
  for c in (GROUPED, *(config.replace(GROUPED, folds=4, fold=fold) for fold in range(4))):
    parts = labelled.assigned(found, c)
    for names in (groups, [scan.duplicate_key(e.text) for e in found]):
      assert max(map(len, sides(parts, names).values())) == 1
    share = [sum(e.label == label for e, part in zip(found, parts, strict=True) if part == 'validation') / sum(
        e.label == label for e in found) for label in 'xy']
    assert set(parts) == {'train', 'validation'} and all(abs(x - 0.25) < 0.06 for x in share), share
  folds = [labelled.assigned(found, config.replace(GROUPED, folds=4, fold=fold)) for fold in range(4)]
  assert all(some.count('validation') == 1 for some in zip(*folds, strict=True))
  assert labelled.assigned(found, labelled.Config(validation_fraction=0.25)) != labelled.assigned(found, GROUPED)


def test_groups_that_share_a_text_are_one():
  more = at([example(f'{i}', label='xy'[i % 2]) for i in range(40)], range(40))
  texts = (('a', 'one'), ('Same  text', 'one'), ('same text', 'two'), ('b', 'two'))
  joined = [example(text, at=author) for text, author in texts]
  for said in ('train', 'validation', 'test'):
    found = at([dataclasses.replace(joined[0], split=said), *joined[1:]], [author for _, author in texts])
    assert labelled.assigned([*found, *more], GROUPED)[:4] == [said] * 4
  found[-1] = dataclasses.replace(found[-1], split='train', origin='a.jsonl:4')
  with pytest.raises(DataError, match="a.jsonl:4: split 'train', but the same text or at, or a chain of them, at one "
                                      "has split 'test'; expected one split for each at"):
    labelled.assigned([*found, *more], GROUPED)


def test_folds_of_groups_keep_test_alone():
  """Its authors are in no fold; what the records say of training and validation counts no more."""
  found, groups = numbered(120, 90)
  said = [('train', 'validation')[i % 2] if group > 5 else 'test' for i, group in enumerate(groups)]
  found = at([dataclasses.replace(e, split=part, text=f'{i}') for i, (e, part) in enumerate(
      zip(found, said, strict=True))], groups)
  fold = config.replace(GROUPED, folds=3)
  parts = labelled.assigned(found, fold)
  assert max(map(len, sides(parts, groups).values())) == 1
  assert [part == 'test' for part in parts] == [part == 'test' for part in said] and 'test' in said
  found.append(dataclasses.replace(found[0], text='more', split='train', metadata={'at': 3}))
  with pytest.raises(DataError, match="split 'train'.*split 'test'; expected one split for each at"):
    labelled.assigned(found, fold)


@pytest.mark.parametrize('as_time', [int, str, lambda day: str(2000 + day), lambda day: str(day / 7),
                                     lambda day: f'2024-{1 + day // 28:02d}-{1 + day % 28:02d}',
                                     lambda day: f'2024-{1 + day // 28:02d}-{1 + day % 28:02d}T08:00:00+08:00'])
def test_what_validates_is_later_than_what_trains(as_time):
  found, days = numbered(280, 100)
  found = at(found, map(as_time, days))
  keys = [scan.duplicate_key(e.text) for e in found]
  seen = 0
  for c in (TIMED, *(config.replace(TIMED, folds=4, fold=fold) for fold in range(4))):
    parts = labelled.assigned(found, c)
    train, held = ([day for day, part in zip(days, parts, strict=True) if part == name]
                   for name in ('train', 'validation'))
    assert max(train) < min(held) and max(map(len, sides(parts, keys).values())) == 1
    if not c.folds:
      assert abs(len(held) / 280 - 0.25) < 0.1 and 0 < parts.count(None) < 30
      assert all(key in {k for k, p in zip(keys, parts, strict=True) if p} for key in keys)  # a text is somewhere
    else:
      assert len(train) > seen and abs(len(train) - 56 * (c.fold + 1)) < 12
      assert all(part is None for day, part in zip(days, parts, strict=True) if day > max(held))
      seen = len(train)


def test_records_that_say_a_split_keep_it_in_time():
  found = at([example(f'{i}', label='xy'[i % 2], at=f'a.jsonl:{i}') for i in range(20)], range(20))
  late = at([example('t', 'test', at='t'), example('3 ', at='again'), example('T', at='early')], [30, 31, 2])
  for c in (TIMED, config.replace(TIMED, folds=2, fold=1)):
    assert labelled.assigned([*found, *late], c)[20:] == ['test', None, None]  # texts of training, and of test
  held = at([example('v', 'validation', at='v.jsonl:1')], [5])
  with pytest.raises(DataError, match="a.jsonl:14: split 'train', at 14, is later than v.jsonl:1, split 'validation', "
                                      'at 5; expected what trains to come first'):
    labelled.assigned([*found, *held], TIMED)
  said = [dataclasses.replace(e, split='train' if i < 15 else 'validation') for i, e in enumerate(found)]
  assert labelled.assigned(said, TIMED) == ['train'] * 15 + ['validation'] * 5


@pytest.mark.parametrize('c, metadata, message', [
    (GROUPED, {}, 'field at of data.by: no such field; expected a string or a number'),
    (GROUPED, {'at': ''}, "field at of data.by: found ''; expected a string"),
    (GROUPED, {'at': None}, 'field at of data.by: found null'),
    (GROUPED, {'at': ['a']}, 'field at of data.by: found a list'),
    (GROUPED, {'at': float('nan')}, 'field at of data.by: found the number nan'),
    (TIMED, {'at': '昨天'}, "field at of data.by: found '昨天'; expected a number, or a date as ISO 8601"),
    (TIMED, {}, 'field at of data.by: no such field; expected a number, or a date')])
def test_a_record_without_its_group_or_time_is_named(c, metadata, message):
  days = ['2024-01-01', '2024-01-02', '2024-01-03', '2024-01-04'] * 5
  found = at([example(f'{i}', label='xy'[i % 2]) for i in range(20)], days)
  for some in (c, config.replace(c, folds=2)):
    with pytest.raises(DataError, match=f'a.jsonl:21: {message}') as e:
      labelled.assigned([*found, Labelled('x', 'x', metadata, origin='a.jsonl:21')], some)
    assert '\n' not in str(e.value)


def test_a_string_that_is_no_number_among_numbers_is_named():
  found = at([example(f'{i}', label='xy'[i % 2], at=f'a.csv:{i}') for i in range(20)], map(str, range(2000, 2020)))
  with pytest.raises(DataError, match="a.csv:9: field at of data.by: found 'x'; expected a number"):
    labelled.assigned([*found[:9], dataclasses.replace(found[9], metadata={'at': 'x'}), *found[10:]], TIMED)


def test_ids_that_only_look_like_copies_are_records_of_their_own():
  found = [example(f'a film {i}', None, 'xy'[i % 2], id=f'web#{i}', origin='web') for i in range(60)]
  parts = labelled.assigned(found, labelled.Config(folds=3))
  assert (parts.count('train'), parts.count('validation')) == (40, 20)


def test_times_of_several_kinds_are_named():
  with pytest.raises(ConfigError, match='times: .*expected one kind'):
    labelled.assigned(at([example('a'), example('b')], [3, '2024-01-01']), TIMED)


@EVERY_SPLIT
def test_a_text_that_is_said_to_be_in_two_splits_is_named(c):
  found = [example('Same  text', 'train', at='a.jsonl:3'), example('b', 'train'),
           example('same text', 'test', at='b.jsonl:7')]
  with pytest.raises(DataError, match="b.jsonl:7: split 'test', but the same text at a.jsonl:3 has split 'train'") as e:
    labelled.assigned(found, c)
  assert '\n' not in str(e.value)


def test_splits_are_what_they_were_where_no_text_repeats():
  found = [example(f'text {i}', (None, 'train', 'validation', 'test')[i % 4], 'xy'[i % 3 == 0]) for i in range(400)]
  texts, open_ = [e.text for e in found], range(0, 400, 4)
  for c, drawn in ((labelled.Config(), lambda texts, labels: splits.by_hash(texts, (0.9, 0.1))),
                   (labelled.Config(split='stratified'), lambda texts, labels: splits.stratified(
                       texts, labels, (0.9, 0.1)))):
    parts = labelled.assigned(found, c)
    held = drawn([texts[i] for i in open_], [found[i].label for i in open_]).validation
    assert [i for i in open_ if parts[i] == 'validation'] == [4 * i for i in held]
    assert all(part == e.split for e, part in zip(found, parts, strict=True) if e.split)


def test_copies_train_where_their_originals_do_and_validate_nowhere():
  texts = [('a good film', '好看的电影')[i % 2] + f' {i}' for i in range(40)]
  originals = [example(text, 'train', 'xy'[i % 4 < 2], id=str(i)) for i, text in enumerate(texts)]
  originals.append(example('held', 'test', id='t'))
  copies = [example(f'{e.text} {n}!', 'train', e.label, id=f'{e.metadata["id"]}#{n}', origin=e.metadata['id'])
            for e in originals for n in range(3)]
  copies += [example('a copy of a copy', 'train', copies[0].label, id='0#0#0', origin='0#0'),
             example('of none', 'train', id='77#0', origin='77'),
             example(originals[1].text.upper(), 'train', originals[0].label, id='0#5', origin='0')]
  validated = 0
  for fold in range(4):
    c = labelled.Config(folds=4, fold=fold)
    alone, parts = labelled.assigned(originals, c), labelled.assigned([*originals, *copies], c)
    part_of = {e.metadata['id']: part for e, part in zip([*originals, *copies], parts, strict=True)}
    assert parts[:41] == alone and set(parts[41:]) == {'train', None} and part_of['77#0'] is None
    for e in copies[:-3]:
      assert part_of[e.metadata['id']] == ('train' if part_of[e.metadata['origin']] == 'train' else None)
    assert part_of['0#0#0'] == part_of['0#0'] and part_of['t#0'] is None
    assert part_of['0#5'] == ('train' if part_of['0'] == part_of['1'] == 'train' else None)
    validated += parts.count('validation')
  assert validated == 40
  country = [example(f'{i}', None, 'xy'[i % 2], id=i, origin='中国') for i in range(20)]  # a field of that name only
  assert set(labelled.assigned(country, labelled.Config(folds=4))) == {'train', 'validation'}


@EVERY_SPLIT
def test_what_is_only_for_training_or_testing_is_held_out_from_training(c):
  found = [example(f'a film {i}', ('train', 'test')[i % 3 == 0], 'xy'[i % 2], at=i) for i in range(120)]
  parts = labelled.assigned(found, c)
  assert [part == 'test' for part in parts] == [i % 3 == 0 for i in range(120)]
  assert 0 < parts.count('validation') < 60 and parts.count('train') > 20
  if not c.folds:
    copies = [example(f'a movie {i}', 'train', 'xy'[i % 2], id=f'{i}#0', origin=str(i), at=i) for i in range(1, 120, 3)]
    found = [dataclasses.replace(e, metadata=e.metadata | {'id': str(i)}) for i, e in enumerate(found)]
    assert 'validation' not in assign.assigned([*found, *copies], [e.text for e in [*found, *copies]], 0.25)
