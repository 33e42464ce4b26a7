"""Alarms: each fires on a history made for it and none on a good one; the picture has the panels that have data."""

import json
import os
import subprocess
import sys

import matplotlib.collections
import matplotlib.figure
from PIL import Image
import pytest

from lm import logs, monitor
from lm.errors import CheckpointError, ConfigError
from lm.monitor import Limits

GOOD = {'val_score': (0.1, 0.3, 0.5), 'val_score_se': (0.02, 0.02, 0.02), 'val_held_out': (1.0, 1.2, 1.3),
        'val_reference_nll': (3.0, 3.1, 3.3), 'val_kl': (0.0, 4.0, 6.5), 'val_ended': (0.9, 0.8, 0.9),
        'val_length': (40.0, 42.0, 50.0)}
LIMITS = Limits(kl_target=6.0)


def history(**changes):
  columns = GOOD | changes
  return [[10 * i, {name: values[i] for name, values in columns.items() if values is not None}] for i in range(3)]


def test_a_good_run_is_silent():
  assert monitor.alarms(history(), LIMITS) == []
  assert monitor.alarms([], LIMITS) == monitor.alarms([[0, {}]], LIMITS) == monitor.alarms(history()[:1], LIMITS) == []


@pytest.mark.parametrize('changes, words', [
    ({'val_held_out': (1.0, 0.9, 0.6)}, 'from step 0 to step 20, val_score rose from 0.1 to 0.5 while val_held_out '
                                        'fell from 1 to 0.6: the policy may be fooling its reward'),
    ({'val_held_out': (0.1, 1.0, 0.15), 'val_score': (0.0, 0.1, 0.6)},  # it rose first, and may end above its start
     'from step 10 to step 20, val_score rose from 0.1 to 0.6 while val_held_out fell from 1 to 0.15'),
    ({'val_ended': (0.02, 0.9, 0.0)}, 'from step 10 to step 20, val_ended fell from 0.9 to 0: hardly any response'),
    ({'val_reference_nll': (3.0, 3.5, 4.2)}, 'val_reference_nll rose from 3 to 4.2 nats a token, by more than 1'),
    ({'val_kl': (0.0, 4.0, 9.5)}, 'at step 20, val_kl is 9.5 nats a response, more than 1.5 times its target of 6'),
    ({'val_ended': (0.9, 0.4, 0.01)}, 'val_ended fell from 0.9 to 0.01: hardly any response ends'),
    ({'val_length': (40.0, 80.0, 130.0)}, 'val_length rose from 40 to 130 tokens, by a factor of more than 3: '
                                          'responses run on'),
    ({'val_length': (40.0, 20.0, 10.0)}, 'val_length fell from 40 to 10 tokens, by a factor of more than 3: '
                                         'responses shrink away')])
def test_each_alarm_fires_alone_with_steps_and_numbers(changes, words):
  found = monitor.alarms(history(**changes), LIMITS)
  assert len(found) == 1 and words in found[0] and 'step 20' in found[0]


@pytest.mark.parametrize('changes', [
    {'val_held_out': (1.0, 0.9, 0.96)},  # within the smallest change
    {'val_held_out': (1.0, 0.9, 0.6), 'val_score': (0.1, 0.4, 0.15)},  # a rise of 1.8 standard errors is chance
    {'val_held_out': (1.0, 0.9, 0.6), 'val_held_out_se': (0.2, 0.2, 0.2)},  # and so is a fall
    {'val_held_out': (1.0, 0.9, 0.6), 'val_score': (0.5, 0.3, 0.1)},  # both fell: bad, but nothing is fooled
    {'val_held_out': None}, {'val_held_out': (1.0, 0.9, 'nan')}, {'val_held_out': (1.0, 0.9, float('nan'))},
    {'val_kl': (0.0, 9.9, 8.9)}, {'val_kl': None},
    {'val_ended': (0.01, 0.02, 0.0)},  # responses of a fixed length never end
    {'val_length': (40.0, 500.0, 119.0)}, {'val_length': (0.0, 1.0, 2.0)}, {'val_reference_nll': (3.0, 3.0, 1.0)}])
def test_what_is_no_alarm(changes):
  assert monitor.alarms(history(**changes), LIMITS) == []


def test_without_standard_errors_a_score_counts_by_its_units():
  fooled = {'val_held_out': (1.0, 0.9, 0.6), 'val_score_se': None}
  assert len(monitor.alarms(history(**fooled))) == 1
  assert monitor.alarms(history(**fooled, val_score=(0.1, 0.1, 0.14))) == []
  assert len(monitor.alarms(history(**fooled, val_score=(0.1, 0.1, 0.14)), Limits(change=0.03))) == 1


def test_a_window_sees_what_the_run_as_a_whole_hides():
  late = history(val_reference_nll=(3.0, 1.0, 3.5))
  assert monitor.alarms(late) == monitor.alarms(late, Limits(window=2)) == monitor.alarms(late, Limits(window=99)) == []
  found, = monitor.alarms(late, Limits(window=1))
  assert 'from step 10 to step 20' in found and 'val_reference_nll rose from 1 to 3.5' in found


def test_other_names_are_looked_at_and_no_target_means_no_rule():
  renamed = [[step, {'x': values['val_score'], 'y': -values['val_score']}] for step, values in history()]
  assert 'x rose from 0.1 to 0.5 while y fell' in monitor.alarms(renamed, score='x', held_out='y')[0]
  assert monitor.alarms(history(val_kl=(0.0, 99.0, 99.0))) == []


@pytest.mark.parametrize('field, value', [('window', -1), ('errors', float('nan')), ('kl', 0.5), ('length', 0.9),
                                          ('kl_target', -1.0), ('nll', float('inf'))])
def test_a_wrong_limit_is_named(field, value):
  with pytest.raises(ConfigError, match=f'limits.{field}='):
    Limits(**{field: value})


ROWS = ([{'step': n, 'score': 0.1 * n, 'kl': 0.5 * n, 'entropy': 9.0, 'clip_fraction': 0.1, 'explained_variance': 'nan',
          'length': 16.0, 'ended': 0.0} for n in range(1, 7)] +
        [{'step': n, 'val_score': 0.1 * n, 'val_score_se': 0.05, 'val_held_out': 1.0} for n in (0, 3, 6)])


@pytest.fixture
def drawn(monkeypatch):
  figures, save = [], matplotlib.figure.Figure.savefig
  monkeypatch.setattr(matplotlib.figure.Figure, 'savefig',
                      lambda figure, *args, **kwargs: (figures.append(figure), save(figure, *args, **kwargs))[1])
  return figures


def test_the_picture_has_the_panels_that_have_data(tmp_path, drawn):
  path = monitor.plot(ROWS, tmp_path / 'rl.png', kl_target=6.0)
  with Image.open(path) as image:
    assert image.format == 'PNG'
  axes = {a.get_title(): a for a in drawn[0].axes}
  assert set(axes) == set(monitor.PANELS) - {'explained variance', "reference's nats a token"}
  lines = {line.get_label(): line for a in axes.values() for line in a.lines}
  assert lines['val_score'].get_xdata() == pytest.approx([0, 3, 6])
  assert lines['score'].get_ydata() == pytest.approx([0.1 * n for n in range(1, 7)])
  target, = [line for line in axes['KL, nats a response'].lines if line.get_label() == 'target 6']
  assert target.get_ydata() == pytest.approx([6, 6])
  band, = axes['score'].findobj(matplotlib.collections.FillBetweenPolyCollection)
  corners = band.get_paths()[0].vertices
  assert sorted(set(corners[corners[:, 0] == 3][:, 1].round(9))) == pytest.approx([0.2, 0.4])
  assert not axes['held-out reward'].findobj(matplotlib.collections.FillBetweenPolyCollection)


def test_every_panel_can_be_drawn_and_one_alone(tmp_path, drawn):
  rows = [{'step': n} | {name: 1.0 for names in monitor.PANELS.values() for name in names} for n in (1, 2)]
  monitor.plot(rows, tmp_path / 'all.png')
  monitor.plot([{'step': 1, 'score': 1.0}], tmp_path / 'one.png')
  assert [len(figure.axes) for figure in drawn] == [len(monitor.PANELS), 1]
  with pytest.raises(ConfigError, match='nothing to draw'):
    monitor.plot([{'step': 1, 'loss': 1.0, 'score': 'inf'}], tmp_path / 'none.png')


def test_the_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  (tmp_path / 'rl.png').write_bytes(b'old')

  def full(source, target):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(os, 'replace', full)
  with pytest.raises(CheckpointError, match=r'rl.png: cannot write the picture.*No space left'):
    monitor.plot(ROWS, tmp_path / 'rl.png')
  assert (tmp_path / 'rl.png').read_bytes() == b'old'


@pytest.mark.slow
@pytest.mark.parametrize('loss, alarms', [({'kl': {'target': 6.0}}, 1), ({'kl': {'target': 0.0}}, 0),
                                          ({'beta': 0.04}, 0)])
def test_the_report_of_a_run(loss, alarms, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps({'config': {'loss': loss}}))
  rows = [*ROWS, {'step': 9, 'val_score': 1.0, 'val_kl': 10.0}]
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  assert len(logs.read(tmp_path)) == len(rows)
  found = monitor.report(tmp_path)
  assert len(found['alarms']) == alarms and (tmp_path / 'rl.png').stat().st_size > 0
  assert all('at step 9, val_kl is 10' in text for text in found['alarms'])


def test_pyplot_stays_out(tmp_path):
  code = ("import sys; from lm import monitor; assert 'matplotlib' not in sys.modules; "
          "monitor.plot([{'step': 1, 'score': 1.0}], sys.argv[1]); assert 'matplotlib.pyplot' not in sys.modules")
  subprocess.run([sys.executable, '-c', code, tmp_path / 'x.png'], check=True)
