"""scripts.repeat: how many values its interval counts, and what its picture says; nothing is trained."""

import functools
import importlib
import statistics
import sys

from absl import flags
import numpy as np
import pytest

from lm import metrics
from lm.errors import ConfigError

ACCURACY = {(0, 0): 0.8, (0, 1): 0.9, (1, 0): 0.6, (1, 1): 0.8, (2, 0): 0.7, (2, 1): 0.8}  # by (fold, seed)


@pytest.fixture
def repeat(monkeypatch):
  """(the script, its flags), of a module of its own: other scripts have flags of the same names."""
  values = flags.FlagValues()
  with monkeypatch.context() as m:
    for name in ('DEFINE_enum', 'DEFINE_string', 'DEFINE_multi_string', 'DEFINE_integer', 'DEFINE_bool'):
      m.setattr(flags, name, functools.partial(getattr(flags, name), flag_values=values))
    yield importlib.import_module('scripts.repeat'), values
  del sys.modules['scripts.repeat']


@pytest.mark.parametrize('folds', [3, 0])
def test_seeds_of_a_fold_are_one_value(folds, repeat, tmp_path, monkeypatch):
  script, values = repeat
  values(['repeat', '--config=minilm', '--seeds=2', f'--folds={folds}', f'--workdir={tmp_path}'])
  drawn = {}

  def predictions(c, place):
    labels_N = np.arange(100) % 2
    classes_N = np.where(np.arange(100) < round(100 * ACCURACY[c.data.fold, c.seed]), labels_N, 1 - labels_N)
    return labels_N, classes_N, ('bad', 'good')
  monkeypatch.setattr(script.run, 'run', lambda c, task, place, changes: {'wall_s': 1.0, 'peak_bytes': 0})
  monkeypatch.setattr(script.classification, 'predictions', predictions)
  monkeypatch.setattr(script.pictures, 'confusion', lambda path, counts, names: drawn.update(names=names))
  monkeypatch.setattr(script.pictures, 'curves', lambda *args: None)
  script.main([])
  if folds:
    means = [statistics.fmean(ACCURACY[fold, seed] for seed in range(2)) for fold in range(folds)]
    want, count = metrics.corrected_interval(means, 1 / 2), '3 folds, 6 runs'
  else:
    want, count = metrics.interval([0.8, 0.9]), '2 runs'
  assert (f'accuracy: {want.value:.4f}, 95% interval {want.low:.4f} to {want.high:.4f} ({count})'
          in (tmp_path / 'table.md').read_text())
  assert drawn['names'] == ('bad', 'good')


@pytest.mark.parametrize('given, flag', [('seed=7', 'seeds'), ('data.folds=5', 'folds'), ('data.fold = 2', 'folds')])
def test_what_each_run_has_of_its_own_is_not_set(given, flag, repeat, tmp_path):
  script, values = repeat
  values(['repeat', '--config=minilm', f'--set={given}', f'--workdir={tmp_path}'])
  with pytest.raises(ConfigError, match=f'--set {given.split("=")[0].strip()}: .*give --{flag}'):
    script.main([])
