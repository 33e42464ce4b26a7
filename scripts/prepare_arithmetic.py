r"""Makes sums for reinforcement learning: JSONL records {"prompt", "answer", "split"} for lm.data.prompts.

  python -m scripts.prepare_arithmetic --out=corpora/sums.jsonl
  python -m scripts.prepare_arithmetic --out=corpora/shown.jsonl --operators=add --shots=2
  python -m scripts.prepare_arithmetic --out=corpora/sums_zh.jsonl --language=zh --digits=1 --operators=add,subtract

Distinct problems, drawn so that numbers of one digit are as likely as those of two, as long as there are any left. One
pair of numbers in ten validates, by sha1; its order and the operator do not matter, so 8 + 17 and 17 - 8 are where
17 + 8 is. With --shots a problem is no question but an equation to complete, below others of the training split that
are solved, one a line: for models that continue texts. `lm.rewards.arithmetic` grades what a model answers. The same
flags give the same file, which must not exist before.

Exit status: 0 done, 2 a flag is wrong.
"""

import hashlib
import itertools
import json
import pathlib
import random

from absl import flags

from experiments import cli
from lm import disk
from lm.errors import ConfigError

OPERATORS = {'add': ('+', '+', int.__add__), 'subtract': ('-', '-', int.__sub__), 'multiply': ('*', '×', int.__mul__)}
PROMPTS = {'en': 'What is {} {} {}?', 'zh': '{} {} {} 等于多少？'}

_OUT = flags.DEFINE_string('out', '', 'JSONL file to write; must not exist.')
_LANGUAGE = flags.DEFINE_enum('language', 'en', list(PROMPTS), 'Of the questions.')
_DIGITS = flags.DEFINE_integer('digits', 2, 'Most digits of a number.', lower_bound=1, upper_bound=3)
_OPERATORS = flags.DEFINE_list('operators', list(OPERATORS), f'Some of {", ".join(OPERATORS)}.')
_SHOTS = flags.DEFINE_integer('shots', 0, 'Solved equations above each; 0 = questions.', lower_bound=0, upper_bound=16)
_COUNT = flags.DEFINE_integer('count', 5000, 'Problems, or all that there are.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the draw.', lower_bound=0)


def main(_: list[str]) -> None:
  if not _OUT.value:
    raise ConfigError('--out: not given; expected a JSONL file to write; see --help')
  out = pathlib.Path(_OUT.value)
  if out.exists():
    raise ConfigError(f'--out={out}: exists already; it is not overwritten; choose another name or delete it')
  found = records(_LANGUAGE.value, _DIGITS.value, _OPERATORS.value, _COUNT.value, _SEED.value,
                  _SHOTS.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  disk.write(out, ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in found).encode())
  held_out = sum(r['split'] == 'validation' for r in found)
  print(f'{out}: {len(found) - held_out:,} training and {held_out:,} validation problems')


def records(language: str, digits: int, operators: list[str], count: int, seed: int, shots: int = 0
            ) -> list[dict[str, str]]:
  """At most `count` distinct problems in random order.

  Raises:
    ConfigError: an unknown operator, none, or one twice; so few problems that none validates.
  """
  if not operators or len(set(operators)) < len(operators) or not set(operators) <= OPERATORS.keys():
    raise ConfigError(f'--operators={",".join(operators)}; expected some of {", ".join(OPERATORS)}, each once')
  rng, numbers = random.Random(seed), range(10**digits)
  # Weighted sampling without replacement: each arrives after a time of rate 1 / (numbers with as many digits).
  size = lambda n: 10 if n < 10 else 9 * 10**(len(str(n)) - 1)
  keys = {(name, a, b): rng.expovariate(1) * size(a) * size(b)
          for name, a, b in itertools.product(operators, numbers, numbers)}
  drawn = sorted(keys, key=keys.get)[:count]
  solved = [_equation(language, *p) for p in drawn if split(*p[1:]) == 'train']
  out = []
  for name, a, b in drawn:
    sign, compute = OPERATORS[name][language == 'zh'], OPERATORS[name][2]
    prompt, answer = PROMPTS[language].format(a, sign, b), str(compute(a, b))
    if shots:
      mine = _equation(language, name, a, b)
      others = [line for line in rng.sample(solved, min(len(solved), shots + 1)) if line != mine]
      prompt = '\n'.join([*others[:shots], mine.removesuffix(f' {answer}')])
    out.append({'prompt': prompt, 'answer': answer, 'split': split(a, b)})
  if len({r['split'] for r in out}) < 2:
    raise ConfigError(f'--count={count}: all {len(out)} problems are {out[0]["split"]} problems; expected some of each '
                      'split; raise it, or --digits')
  return out


def _equation(language, name, a, b):
  return f'{a} {OPERATORS[name][language == "zh"]} {b} = {OPERATORS[name][2](a, b)}'


def split(a: int, b: int) -> str:
  """'validation' for one unordered pair in ten."""
  digest = hashlib.sha1(f'{min(a, b)},{max(a, b)}'.encode()).hexdigest()
  return 'validation' if int(digest, 16) % 10 == 0 else 'train'


if __name__ == '__main__':
  cli.guard(main, __doc__)
