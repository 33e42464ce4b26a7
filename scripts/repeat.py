r"""Fine-tunes again and again, over seeds and folds, and says how sure the mean is.

  python -m scripts.repeat --experiment=lora --config=minilm --seeds=3 --workdir=runs/lora3 \
      --set data.corpus=corpora/movie_reviews.jsonl --set init_from=MINILM --set data.tokenizer=MINILM
  python -m scripts.repeat --experiment=classify --config=minilm --folds=5 ...    # cross-validation
  python -m scripts.repeat --folds=5 --set data.split=grouped --set data.by=author ...    # no author on both sides

MINILM is its folder, see experiments/classify.py. Each run is a workdir of its own below --workdir and resumes there.
Writes table.md (accuracy, macro F1 and MCC of every run, mean and 95% interval), results.json, confusion.png (all runs
together) and curves.png. With folds the interval is Nadeau and Bengio's (2003), as training sets overlap; seeds of a
fold train on one set, so their mean is one value. Chosen are the checkpoints that were best in validation, so the
numbers are of a set that took part in a choice.
"""

import json
import pathlib
import statistics
from typing import Any

from absl import flags
import numpy as np

from experiments import adapters, classify, cli, lora, prefix
from lm import classification, config, instruct, logs, metrics, pictures, run
from lm.errors import ConfigError

EXPERIMENTS = {'adapters': adapters, 'classify': classify, 'lora': lora, 'prefix': prefix}
_EXPERIMENT = flags.DEFINE_enum('experiment', 'classify', list(EXPERIMENTS), 'Whose configs.')
_CONFIG = flags.DEFINE_string('config', '', 'One of its configs.')
_SET = flags.DEFINE_multi_string('set', [], 'path.to.field=value, as for the experiment.')
_SEEDS = flags.DEFINE_integer('seeds', 1, 'Runs with seeds 0, 1, ...', lower_bound=1)
_FOLDS = flags.DEFINE_integer('folds', 0, 'Cross-validation over so many folds; 0 = the split of the data.')
_CHANGES = flags.DEFINE_bool('resume_with_changes', False, 'Go on although config or data differ from those of a run.')
_WORKDIR = flags.DEFINE_string('workdir', '', 'Where the runs and the tables are written; again: goes on.')


def main(_: list[str]) -> None:
  by_name = {f.__name__: f for f in EXPERIMENTS[_EXPERIMENT.value].CONFIGS}
  if _CONFIG.value not in by_name:
    raise ConfigError(f'--config={_CONFIG.value!r}; expected one of {", ".join(by_name)}')
  if not _WORKDIR.value:
    raise ConfigError('--workdir: not given; expected a directory to write to')
  for field, flag in (('seed', 'seeds'), ('data.folds', 'folds'), ('data.fold', 'folds')):
    if any(text.split('=')[0].strip() == field for text in _SET.value):
      raise ConfigError(f'--set {field}: this program sets it for each run; give --{flag}')
  base = config.override(by_name[_CONFIG.value](), *_SET.value)
  if isinstance(base, instruct.Config):
    raise ConfigError(f'--config={_CONFIG.value}: of conversations; expected one that classifies')
  workdir, results, counts = pathlib.Path(_WORKDIR.value), [], 0
  for fold in range(max(_FOLDS.value, 1)):
    for seed in range(_SEEDS.value):
      c = config.replace(base, seed=seed, data__folds=_FOLDS.value, data__fold=fold)
      place = workdir / f'fold{fold}_seed{seed}'
      summary = run.run(c, classification.task(c), place, _CHANGES.value)
      labels_N, classes_N, names = classification.predictions(c, place)
      if not c.data.numbers:
        counts = counts + metrics.confusion(labels_N, classes_N, c.classes)
      results.append({'fold': fold, 'seed': seed, 'wall_s': summary['wall_s'], 'peak_bytes': summary['peak_bytes']}
                     | {name: float(f(labels_N, classes_N)) for name, f in classification.scores(c).items()})
  _report(base, workdir, results, counts, names)


def estimate(results: list[dict[str, Any]], name: str, folds: int, by_time: bool = False) -> metrics.Interval:
  """Mean and interval of the score `name`, over the runs, or over `folds`, each the mean of its seeds.

  By time, fold i trains on i + 1 times what it validates on, and the mean share counts.
  """
  if not folds:
    return metrics.interval([r[name] for r in results])
  means = [statistics.fmean(r[name] for r in results if r['fold'] == fold) for fold in range(folds)]
  shares = [1 / (fold + 1 if by_time else folds - 1) for fold in range(folds)]
  return metrics.corrected_interval(means, statistics.fmean(shares))


def _report(c, workdir, results, counts, names):
  (workdir / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
  rows = {f'fold {r["fold"]}, seed {r["seed"]}': {name: r[name] for name in classification.scores(c)} for r in results}
  lines = [metrics.table(rows), '']
  for name in classification.scores(c):
    if len(results) > 1:
      found = estimate(results, name, _FOLDS.value, c.data.split == 'time')
      count = f'{found.count} folds, {len(results)} runs' if _FOLDS.value else f'{found.count} runs'
      lines.append(f'{name}: {found.value:.4f}, 95% interval {found.low:.4f} to {found.high:.4f} ({count})')
  lines.append(f'{statistics.median(r["wall_s"] for r in results):.0f} s a run')
  (workdir / 'table.md').write_text('\n'.join(lines) + '\n')
  drawn = [workdir / 'curves.png']
  if not c.data.numbers:
    drawn.append(workdir / 'confusion.png')
    pictures.confusion(drawn[-1], np.asarray(counts), names)
  metric, curves = c.checkpoint.metric, []
  for r in results:
    rows = logs.read(workdir / f'fold{r["fold"]}_seed{r["seed"]}')
    curves.append(tuple(zip(*((row['step'], row[metric]) for row in rows if metric in row), strict=True)))
  pictures.curves(workdir / 'curves.png', {_CONFIG.value: curves}, 'step', metric)
  print('\n'.join(lines) + f'\n\n{", ".join(map(str, [workdir / "table.md", *drawn]))}')


if __name__ == '__main__':
  cli.guard(main, __doc__)
