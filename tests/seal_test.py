"""Seals: what they detect, what they keep, and that a kill between any two system calls loses nothing sealed."""

import json
import os
import pathlib
import shutil

import pytest

from lm import seal
from lm.errors import CheckpointError


class Killed(BaseException):
  """Stands for SIGKILL: no handler in the code under test may catch it."""


def make(directory, step, metrics=None, name=None, sealed=True):
  folder = directory / (name or str(step))
  (folder / 'd').mkdir(parents=True)
  (folder / '_METADATA').write_text(f'step {step}')
  (folder / 'd' / 'array').write_bytes(bytes(range(256)) * step)
  if sealed:
    seal.write(directory, step, {'metrics': metrics or {}})


def ignore(line):
  del line


def test_intact_step_passes_and_keeps_its_record(tmp_path):
  make(tmp_path, 3, {'val_loss': 1.5})
  assert seal.check(tmp_path, 3) is None
  record = seal.read(tmp_path, 3)
  assert record['metrics'] == {'val_loss': 1.5}
  assert {k: size for k, (size, _) in record['files'].items()} == {'_METADATA': 6, 'd/array': 768}
  assert seal.size(tmp_path) == 774


@pytest.mark.parametrize('name', ['2/_METADATA', '2/d/array', '2.sha256.json'])
@pytest.mark.parametrize('damage', ['flip', 'truncate', 'empty', 'remove', 'link'])
def test_damage_is_named_and_the_step_before_used(tmp_path, name, damage):
  make(tmp_path, 1)
  make(tmp_path, 2)
  path = tmp_path / name
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  if damage == 'link':
    path.rename(tmp_path.parent / 'elsewhere')
    path.symlink_to('nowhere')
  elif damage == 'remove':
    path.unlink()
  else:
    path.write_bytes({'flip': data, 'truncate': data[:-1], 'empty': b''}[damage])
  lines = []
  assert seal.newest_intact(tmp_path, None, lines.append) == 1
  if name == '2.sha256.json' and damage == 'remove':  # then it never counted as a checkpoint
    assert lines == [f'warning: {tmp_path / "2"}: not a sealed checkpoint; ignored']
  else:
    assert len(lines) == 1
    assert str(path) in lines[0]
    assert 'rejected step 2' in lines[0]
    assert 'using step 1' in lines[0]
  with pytest.raises(CheckpointError, match='2'):
    seal.newest_intact(tmp_path, 2, ignore)


def test_a_seal_guards_itself(tmp_path):
  make(tmp_path, 1, {'val_loss': 1.25})
  path = seal.path_of(tmp_path, 1)
  whole = path.read_bytes()
  record = seal.read(tmp_path, 1)
  for i in range(0, len(whole) * 8, 5):
    data = bytearray(whole)
    data[i // 8] ^= 1 << (i % 8)
    path.write_bytes(data)
    try:
      assert seal.read(tmp_path, 1) == record  # e.g. other white space
    except CheckpointError:
      pass


def test_nothing_intact_is_an_error_and_nothing_sealed_is_not(tmp_path):
  assert seal.newest_intact(tmp_path / 'absent', None, ignore) is None
  assert seal.newest_intact(tmp_path, None, ignore) is None
  make(tmp_path, 1)
  make(tmp_path, 2)
  for s in (1, 2):
    (tmp_path / str(s) / '_METADATA').unlink()
  with pytest.raises(CheckpointError, match=r'step 2 .*_METADATA: missing.*step 1'):
    seal.newest_intact(tmp_path, None, ignore)


def test_strays_are_warned_about_and_survive_cleaning(tmp_path):
  make(tmp_path, 1)
  (tmp_path / 'notes').mkdir()
  (tmp_path / '99').mkdir()
  (tmp_path / '98').mkdir()
  (tmp_path / '98' / 'thesis.tex').write_text('mine')
  make(tmp_path, 7, name='007', sealed=False)
  (tmp_path / 'README').write_text('mine')
  lines = []
  assert seal.newest_intact(tmp_path, None, lines.append) == 1
  assert sorted(pathlib.Path(line.split(': ')[1]).name for line in lines) == ['007', '98', '99', 'README', 'notes']
  seal.clean(tmp_path, ignore)
  assert sorted(os.listdir(tmp_path)) == ['007', '1', '1.sha256.json', '98', 'README', 'notes']


def test_clean_removes_what_a_kill_leaves(tmp_path):
  make(tmp_path, 1)
  make(tmp_path, 2, sealed=False)
  make(tmp_path, 3, sealed=False)
  (tmp_path / '3' / '_METADATA').unlink()  # half deleted
  make(tmp_path, 4, name='4.orbax-checkpoint-tmp', sealed=False)
  (tmp_path / '6.sha256.json.tmp').write_text('{')
  lines = []
  seal.clean(tmp_path, lines.append)
  assert sorted(os.listdir(tmp_path)) == ['1', '1.sha256.json']
  assert len(lines) == 4
  make(tmp_path, 2)  # the same step can be written again
  assert seal.newest_intact(tmp_path, None, ignore) == 2


@pytest.mark.parametrize(('mode', 'keep', 'keep_best', 'left'), [
    ('min', 2, 0, [5, 6]), ('min', 1, 2, [2, 4, 6]), ('max', 1, 1, [3, 6]), ('max', 2, 2, [1, 3, 5, 6]),
    ('min', 9, 9, [1, 2, 3, 4, 5, 6])])
def test_prune_keeps_newest_and_best(tmp_path, mode, keep, keep_best, left):
  for step, value in {1: 3.0, 2: 1.0, 3: 4.0, 4: 1.0, 5: float('nan'), 6: None}.items():
    make(tmp_path, step, {} if value is None else {'val_loss': value})
  seal.prune(tmp_path, seal.metrics(tmp_path, 'val_loss'), keep, keep_best, mode)
  assert seal.steps(tmp_path) == left
  assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [str(s) for s in left]


def test_ties_go_to_the_older_step_and_a_damaged_seal_has_no_metric(tmp_path):
  for step in (1, 2, 3):
    make(tmp_path, step, {'val_loss': 1.0})
  seal.path_of(tmp_path, 3).write_text('{}')
  values = seal.metrics(tmp_path, 'val_loss')
  assert values == {1: 1.0, 2: 1.0, 3: None}
  assert seal.ranked(values, 'min') == seal.ranked(values, 'max') == [1, 2]
  nan, inf = float('nan'), float('inf')
  for mode, best in (('min', [3, 2]), ('max', [2, 3])):
    assert seal.ranked({1: nan, 2: 2.0, 3: 1.0, 4: inf, 5: -inf, 6: nan}, mode) == best


def test_abandoned_steps_are_moved_never_overwritten(tmp_path):
  for _ in range(3):
    make(tmp_path, 1)
    make(tmp_path, 2)
    seal.abandon(tmp_path, 1, ignore)
    assert seal.steps(tmp_path) == [1]
    shutil.rmtree(tmp_path / '1')
  attic = tmp_path / seal.ABANDONED
  assert sorted(p.name for p in attic.iterdir() if p.is_dir()) == ['2', '2.1', '2.2']
  assert seal.check(attic, 2) is None
  assert len(list(attic.iterdir())) == 6


def test_everything_is_on_disk_before_the_seal_appears(tmp_path, monkeypatch):
  make(tmp_path, 1, sealed=False)
  order, fsync, replace = [], os.fsync, pathlib.Path.replace
  monkeypatch.setattr(os, 'fsync', lambda fd: (order.append(os.readlink(f'/proc/self/fd/{fd}')), fsync(fd)))
  monkeypatch.setattr(pathlib.Path, 'replace', lambda a, b: (order.append('replace'), replace(a, b)))
  seal.write(tmp_path, 1, {'metrics': {}})
  before, after = order[:order.index('replace')], order[order.index('replace') + 1:]
  assert set(before) == {str(tmp_path / p) for p in ('1', '1/d', '1/_METADATA', '1/d/array', '1.sha256.json.tmp')}
  assert after == [str(tmp_path)]


def test_kill_between_any_two_system_calls(tmp_path, monkeypatch):
  """Steps 1 and 2 are sealed; 3 is being sealed and 1 pruned; the kill falls before the n-th system call."""
  calls = {'left': 0}
  def deadly(f):
    def call(*args, **kwargs):
      if calls['left'] == 0:
        raise Killed
      calls['left'] -= 1
      return f(*args, **kwargs)
    return call
  outcomes = []
  for n in range(1000):
    root = tmp_path / str(n)
    for step in (1, 2):
      make(root, step)
    make(root, 3, sealed=False)
    with monkeypatch.context() as m:
      calls['left'] = n
      for owner, name in ((os, 'fsync'), (os, 'unlink'), (os, 'rmdir'), (os, 'replace'), (os, 'rename'),
                          (pathlib.Path, 'open'), (json, 'dump')):
        m.setattr(owner, name, deadly(getattr(owner, name)))
      try:
        seal.write(root, 3, {'metrics': {}})
        seal.prune(root, seal.metrics(root, 'val_loss'), 2, 0, 'min')
        done = True
      except Killed:
        done = False
    for step in seal.steps(root):
      assert seal.check(root, step) is None
    outcomes.append(seal.steps(root))
    seal.clean(root, ignore)
    assert sorted(p.name for p in root.iterdir() if p.is_dir()) == [str(s) for s in seal.steps(root)]
    if done:
      break
  assert outcomes[0] == [1, 2]
  assert [1, 2, 3] in outcomes
  assert outcomes[-1] == [2, 3]
  assert outcomes == sorted(outcomes, key=lambda x: [[1, 2], [1, 2, 3], [2, 3]].index(x))
  assert len(outcomes) > 12
