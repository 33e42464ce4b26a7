"""scripts/bench_rlhf and scripts/bench_ppo: what an iteration of PPO does, its line, what is refused; no timing."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TOY = ['--prompt_length=4', '--max_new=3', '--epochs=2', '--minibatches=2']
# An iteration whose texts, and the rows of whose updates, are looked at.
DRIVER = """
import contextlib, dataclasses, json, sys
from absl import flags
from lm import run
from scripts import bench_ppo

flags.FLAGS(['bench_ppo', *sys.argv[2:], f'--model={sys.argv[1]}/model'])
bench_ppo._random()
texts, updates, build, scorer = [], [], run.build, bench_ppo._scorer

def building(*args):
  parts = build(*args)
  def step(state, batch, key):
    updates.append(batch.batch.ids_BT.tolist())
    return parts.step(state, batch, key)
  return dataclasses.replace(parts, step=step)

def scoring(*args):
  score = scorer(*args)
  return lambda some: texts.append(some) or score(some)

run.build, bench_ppo._scorer = building, scoring
with contextlib.ExitStack() as stack:
  iterate, facts = bench_ppo._ours(sys.argv[1], stack)
  seconds = [iterate() for _ in range(2)]
words = bench_ppo.Numbers()
print(json.dumps([bench_ppo._ids(64).tolist(), [[words.encode(text) for text in some] for some in texts], updates,
                  min(seconds), facts['flops']]))
"""


def bench(*arguments):
  return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
                        check=False)


@pytest.mark.slow
def test_an_iteration_scores_what_was_drawn_and_learns_from_it_in_every_pass(tmp_path):
  done = bench('-c', DRIVER, str(tmp_path), '--shape=1x16x64', '--batch=4', *TOY)
  assert done.returncode == 0, done.stderr
  prompts, scored, updates, seconds, flops = json.loads(done.stdout.splitlines()[-1])
  assert len(scored) == 2 and scored[0] != scored[1] and seconds > 0
  assert [row[:4] for rows in scored for row in rows] == prompts * 2
  assert all(len(row) == 7 for rows in scored for row in rows)
  trunk = 6 * (4 * 16 * 16 + 3 * 16 * 42) + 12 * 16 * 7  # of a token, forward and backward
  words = trunk + 6 * 16 * 64 * 3 / 7
  assert flops['trl'] == flops['lm'] == pytest.approx(4 * 7 * (2 * (words + trunk) / 3 + 2 * (words + trunk)))
  passes = [sorted(a + b) for a, b in zip(updates[::2], updates[1::2], strict=True)]
  assert passes == [sorted(rows) for rows in scored for _ in range(2)]


@pytest.mark.slow
def test_ppo_is_a_line_of_numbers():
  done = bench('-m', 'scripts.bench_rlhf', '--part=ppo', '--shape=1x16x64', '--ppo_batch=4', '--rounds=1', *TOY)
  assert done.returncode == 0, done.stderr
  names, numbers = done.stdout.splitlines()
  row = dict(zip(names.replace('peak MiB', 'peak').replace('of matmul', 'share').split(), numbers.split(), strict=True))
  assert [row['part'], row['batch'], row['side']] == ['ppo', '4', 'lm']
  assert float(row['tokens/s']) == pytest.approx(3 * float(row['episodes/s']), rel=0.02)
  assert 0 <= float(row['share']) < 1
  assert float(row['peak']) > 100 and 0 <= float(row['drawing'].rstrip('%')) <= 100


@pytest.mark.slow
@pytest.mark.parametrize(('arguments', 'part'), [
    ([], '--model: not given'), (['--part=ppo', '--ppo_batch=3'], '--ppo_batch=3: expected a multiple'),
    (['--part=ppo', '--peer=torch', '--peer_packages=tests'],
     '--peer_packages=tests: no trl/experimental/ppo/ppo_trainer.py; expected a folder with TRL 1.10; make it: pip ')])
def test_what_cannot_be_compared_is_one_line(arguments, part):
  done = bench('-m', 'scripts.bench_rlhf', *arguments)
  assert done.returncode == 2 and part in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout
