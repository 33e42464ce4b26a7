"""What a run writes: rows cut back on resume, strict JSON, events that equal the rows, curves, a bar or plain lines."""

import fcntl
import io
import json
import math
import os
import pty
import re
import struct
import subprocess
import termios

import jax
import pytest
from tensorboardX.proto import event_pb2

from lm import logs
from lm.errors import CheckpointError


def write(workdir, rows, start=0, steps=100):
  log = logs.Logs(workdir, steps, start)
  for row in rows:
    log.row(row['step'], {k: v for k, v in row.items() if k != 'step'})
  log.close()


def rows(*steps):
  return [{'step': n, 'loss': 1.0 / n, 'elapsed_s': float(n)} for n in steps]


def events(workdir):
  """[(step, wall time, {tag: value})] of the event files, in order; they are TFRecords."""
  found = []
  for path in sorted((workdir / 'tensorboard').iterdir()):
    data = path.read_bytes()
    at = 0
    while at < len(data):
      size, = struct.unpack_from('<Q', data, at)
      event = event_pb2.Event.FromString(data[at + 12:at + 12 + size])
      if event.summary.value:
        found.append((event.step, event.wall_time, {v.tag: v.simple_value for v in event.summary.value}))
      at += 16 + size
  return found


def test_rows_are_the_floats_that_were_logged(tmp_path):
  third, tiny = float(jax.numpy.float32(1 / 3)), 5e-324
  write(tmp_path, [{'step': 1, 'loss': third, 'x': tiny}])
  assert logs.read(tmp_path) == [{'step': 1, 'loss': third, 'x': tiny}]
  assert float.hex(logs.read(tmp_path)[0]['loss']) == float.hex(third)


def test_resuming_cuts_later_rows(tmp_path):
  write(tmp_path, rows(1, 2, 3, 4, 5))
  write(tmp_path, rows(4, 5, 6), start=3)
  assert [r['step'] for r in logs.read(tmp_path)] == [1, 2, 3, 4, 5, 6]
  write(tmp_path, [], start=0)
  assert logs.read(tmp_path) == []


@pytest.mark.parametrize('torn', ['{"step": 4, "lo', '{"step": 4', '{', '17', 'null', '[1]', '"step"', '{"loss": 1.0}',
                                  '{"step": "4"}', '\x00\x00\x00', 'NaN', '\udcff'])
def test_what_a_kill_leaves_is_no_row(tmp_path, torn):
  write(tmp_path, rows(1, 2, 3))
  with open(tmp_path / 'metrics.jsonl', 'ab') as f:
    f.write(torn.encode(errors='surrogateescape'))
  assert [r['step'] for r in logs.read(tmp_path)] == [1, 2, 3]
  write(tmp_path, rows(4), start=3)
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [1, 2, 3, 4]


def test_a_row_without_its_newline_is_whole(tmp_path):
  write(tmp_path, rows(1, 2))
  text = (tmp_path / 'metrics.jsonl').read_text()
  (tmp_path / 'metrics.jsonl').write_text(text[:-1])
  write(tmp_path, rows(3), start=2)
  assert [r['step'] for r in logs.read(tmp_path)] == [1, 2, 3]


def test_nothing_to_read(tmp_path):
  assert logs.read(tmp_path) == []


def test_infinities_and_nan_are_strings(tmp_path):
  def refuse(name):
    raise AssertionError(f'{name} is not JSON')
  write(tmp_path, [{'step': 1, 'loss': math.inf, 'a': -math.inf, 'b': math.nan, 'c': 1.5}])
  line = (tmp_path / 'metrics.jsonl').read_text()
  assert json.loads(line, parse_constant=refuse) == {'step': 1, 'loss': 'inf', 'a': '-inf', 'b': 'nan', 'c': 1.5}
  logs.write_summary(tmp_path, {'val_loss': math.nan, 'steps': 1})
  assert json.loads((tmp_path / 'summary.json').read_text(), parse_constant=refuse) == {'val_loss': 'nan', 'steps': 1}


def test_events_are_the_rows_across_restarts(tmp_path):
  write(tmp_path, rows(1, 2, 3, 4, 5))
  first = {step: wall for step, wall, _ in events(tmp_path)}
  assert first[5] - first[1] == pytest.approx(4)
  write(tmp_path, [*rows(4), {'step': 5, 'loss': math.nan, 'val_loss': 2.0, 'elapsed_s': 9.0}], start=3)
  found = events(tmp_path)
  assert [step for step, *_ in found] == [1, 2, 3, 4, 5]
  assert found[3][2] == pytest.approx({'loss': 0.25, 'elapsed_s': 4.0})
  assert found[4][2] == pytest.approx({'val_loss': 2.0, 'elapsed_s': 9.0})
  assert found[4][1] - found[0][1] == pytest.approx(8)


def test_a_row_is_amended_in_one_piece(tmp_path, monkeypatch, capsys):
  write(tmp_path, [{'step': 1, 'loss': math.nan, 'elapsed_s': 2.0}])
  log = logs.Logs(tmp_path, 100, 1)
  before = (tmp_path / 'metrics.jsonl').read_bytes()
  with monkeypatch.context() as m:  # as a kill in it
    m.setattr(os, 'replace', lambda *args: 1 / 0)
    with pytest.raises(CheckpointError, match='cannot log into'):
      log.amend(1, {'val_loss': 0.5})
  assert (tmp_path / 'metrics.jsonl').read_bytes() == before
  log.amend(1, {'val_loss': 0.5})
  log.row(2, {'loss': 0.25})
  log.amend(3, {'val_loss': 0.75})
  log.close()
  first = {'step': 1, 'loss': 'nan', 'elapsed_s': 2.0, 'val_loss': 0.5}
  assert logs.read(tmp_path) == [first, {'step': 2, 'loss': 0.25}, {'step': 3, 'val_loss': 0.75}]
  assert [tags for *_, tags in events(tmp_path)][1:] == [
      {'elapsed_s': 2.0, 'val_loss': 0.5}, {'loss': 0.25}, {'val_loss': 0.75}]
  assert 'step 1: val_loss 0.5\n' in capsys.readouterr().out


def test_events_of_a_living_run_reach_the_disk(tmp_path, monkeypatch):
  monkeypatch.setattr(logs, '_FLUSH_S', 0.0)
  log = logs.Logs(tmp_path, 10, 0)
  log.row(1, {'loss': 1.0})
  assert [step for step, *_ in events(tmp_path)] == [1]
  log.close()


@pytest.mark.draws
@pytest.mark.parametrize('content', [
    [], rows(1), rows(*range(1, 50)), [{'step': 1, 'loss': math.nan}],
    [{'step': n, 'loss': 2.0 / n, 'learning_rate': 1e-3, **({'val_loss': 3.0 / n} if n % 5 == 0 else {})}
     for n in range(1, 30)]])
def test_curves_are_drawn(tmp_path, content):
  write(tmp_path, content)
  path = logs.curves(tmp_path)
  assert path == tmp_path / 'curves.png'
  assert path.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
  assert path.stat().st_size > 5000


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
  write(tmp_path, [{'step': 3, 'loss': 1.23456, 'tokens_per_s': 12345.6, 'grad_norm': 7.0, 'elapsed_s': 1.0},
                   {'step': 4, 'loss': 1.2, 'val_loss': 1234567.0}])
  log = logs.Logs(tmp_path, 10, 4)
  log.say('a line')
  log.close()
  out, err = capsys.readouterr()
  assert out == ('step 3: loss 1.235, tokens_per_s 12,346\nstep 4: loss 1.2, val_loss 1,234,567\na line\n')
  assert err == ''


def _drain(master):
  """All that was written to a terminal whose other end is closed; a read gives what there is, not all."""
  parts = []
  while True:
    try:
      parts.append(os.read(master, 100_000))
    except OSError:  # Linux says EIO at the end
      break
    if not parts[-1]:
      break
  os.close(master)
  return b''.join(parts).decode()


def test_progress_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
  master, slave = pty.openpty()
  fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 120, 0, 0))
  with open(slave, 'w') as terminal:
    monkeypatch.setattr('sys.stderr', terminal)
    log = logs.Logs(tmp_path, 20, 10)
    log.row(15, {'loss': 1.5, 'tokens_per_s': 2048.0, 'elapsed_s': 1.0})
    log.say('a line')
    log.row(20, {'loss': 1.25, 'val_loss': 2.5})
    log.close()
  shown = _drain(master)
  last = shown.replace('\n', '\r').strip('\r').split('\r')[-1]
  assert '10/20' in shown and '20/20' in last
  assert 'loss=1.25' in last and 'val_loss=2.5' in last
  assert 'tokens_per_s=2,048' in shown
  assert re.search(r'\d\d:\d\d<\d\d:\d\d', shown)  # time taken and time left
  assert 'a line' in shown
  assert capsys.readouterr().out == ''
  assert [r['step'] for r in logs.read(tmp_path)] == [15, 20]


def test_other_processes_write_nothing(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  write(tmp_path, rows(1, 2))
  logs.say('nothing')
  assert list(tmp_path.iterdir()) == []
  assert capsys.readouterr() == ('', '')


def test_a_log_that_cannot_be_written_names_the_workdir(tmp_path):
  class Full(io.StringIO):
    def write(self, text):
      raise OSError(28, 'No space left on device')

    def close(self):
      raise OSError(28, 'No space left on device')
  log = logs.Logs(tmp_path, 10, 0)
  log._file.close()
  log._file = Full()
  with pytest.raises(CheckpointError, match=f'--workdir: cannot log into {tmp_path}.*No space left'):
    log.row(1, {'loss': 1.0})
  log.close()
  (tmp_path / 'file').write_text('')
  with pytest.raises(CheckpointError, match='cannot log into'):
    logs.Logs(tmp_path / 'file', 10, 0)


def test_full_disk(tmp_path):
  disk = tmp_path / 'disk'
  disk.mkdir()
  if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', disk], capture_output=True).returncode:
    pytest.skip('mount needs root')
  try:
    log = logs.Logs(disk, 10, 0)
    with pytest.raises(CheckpointError, match='No space left'):
      for n in range(1, 5000):
        log.row(n, {'loss': 1.0})
    log.close()
    assert logs.read(disk)[-1]['step'] > 100
  finally:
    subprocess.run(['umount', '-l', disk], check=True)  # lazy: the events, which cannot be written, stay open


CONFIG = {'data': {'corpus': 'a.txt', 'weights': []}, 'seed': 0, 'published': None}


def test_config_is_remembered_with_what_it_ran_on(tmp_path):
  assert logs.check_config(tmp_path, CONFIG) == ({}, None)
  logs.write_config(tmp_path, CONFIG)
  record = json.loads((tmp_path / 'config.json').read_text())
  assert record['config'] == CONFIG
  assert record['packages']['jax'] == jax.__version__
  assert len(record['devices']) == jax.device_count()
  assert 'git' in record
  assert logs.check_config(tmp_path, CONFIG) == ({}, None)
  changed = CONFIG | {'data': {'corpus': 'b.txt', 'weights': []}, 'seed': 1, 'new': 3}
  differing = logs.check_config(tmp_path, changed)[0]
  assert differing == {'data.corpus': ('a.txt', 'b.txt'), 'new': (None, 3), 'seed': (0, 1)}
  assert logs.beside(differing) == (
      "data.corpus: 'a.txt' there, 'b.txt' now; new: None there, 3 now; seed: 0 there, 1 now")


def test_other_packages_are_noted(tmp_path, monkeypatch):
  logs.write_config(tmp_path, CONFIG)
  monkeypatch.setattr(logs, '_packages', lambda: {'jax': '9.9'})
  differing, note = logs.check_config(tmp_path, CONFIG)
  assert differing == {}
  assert f"jax: '{jax.__version__}' there, '9.9' now" in note


def test_changes_are_said_and_kept_line_by_line(tmp_path, capsys):
  logs.write_changes(tmp_path, 4, {'optim.lr': (0.1, 0.2), 'data.corpus': ('a.txt', '红楼梦.txt')})
  logs.write_changes(tmp_path, 9, {'optim.lr': (0.2, 0.3)})
  assert capsys.readouterr().out.splitlines() == [
      'changed from step 4 on: optim.lr: 0.1 -> 0.2', "changed from step 4 on: data.corpus: 'a.txt' -> '红楼梦.txt'",
      'changed from step 9 on: optim.lr: 0.2 -> 0.3']
  assert [json.loads(line) for line in (tmp_path / 'changes.jsonl').read_bytes().splitlines()] == [
      {'step': 4, 'changes': {'optim.lr': [0.1, 0.2], 'data.corpus': ['a.txt', '红楼梦.txt']}},
      {'step': 9, 'changes': {'optim.lr': [0.2, 0.3]}}]


def test_a_name_forges_no_line(tmp_path, capsys):
  forged = 'a\nstep 9: loss 0\x1b[2K'
  logs.write_changes(tmp_path, 4, {'data.corpus': ('a.txt', forged)})
  out = capsys.readouterr().out
  assert out.count('\n') == 1 and out[:-1].isprintable()
  assert r"-> 'a\nstep 9: loss 0\x1b[2K'" in out
  line = (tmp_path / 'changes.jsonl').read_text()
  assert line.count('\n') == 1 and line[:-1].isprintable()
  write(tmp_path, [{'step': 1, forged: 1.0}])
  line = (tmp_path / 'metrics.jsonl').read_text()
  assert line.count('\n') == 1 and line[:-1].isprintable() and logs.read(tmp_path) == [{'step': 1, forged: 1.0}]
  logs.write_config(tmp_path, CONFIG | {'data': {'corpus': forged}})
  assert '\x1b' not in (tmp_path / 'config.json').read_text()
  assert logs.beside(logs.check_config(tmp_path, CONFIG)[0]).isprintable()


@pytest.mark.parametrize('content', ['', '{', '[]', '5', 'null', '{"config": 5}', '{"config": {}, "packages": 5}', '{}',
                                     '{"config": null}', '\x00'])
def test_damaged_config_is_named(tmp_path, content):
  (tmp_path / 'config.json').write_text(content)
  with pytest.raises(CheckpointError, match='config.json: .*move the file away') as error:
    logs.check_config(tmp_path, CONFIG)
  assert error.value.code == 4
