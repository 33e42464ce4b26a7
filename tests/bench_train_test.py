"""scripts/bench_train and scripts/bench_peft: which processes the flags ask for, and what is refused; no timing."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CASES = [  # (flags, part of the error, or for each side the words of its process)
    (['--peer=peft'], '--peer=peft: expected with --peft only'), (['--full'], '--full: expected with --peft only'),
    (['--peft=lora', '--peer=torch'], '--peft=lora: trains SmolLM2 and compares with PEFT'),
    (['--peft=lora', '--model=minilm'], '--peft=lora: trains SmolLM2'), (['--shapes=9x9'], '--shapes=9x9: unknown'),
    (['--peft=lora', '--peer=peft', '--full', '--set=peft.rank=4'], {
        'lm': 'scripts.bench_peft --side=lm --set=peft.rank=4',
        'peft': 'scripts.bench_peft --side=peft --set=peft.rank=4 --nokeep_memory',
        'lm full': 'scripts.bench_peft --side=lm --full --set=peft.rank=4',
        'peft full': 'scripts.bench_peft --side=peft --full --set=peft.rank=4 --nokeep_memory',
        'matmul': 'scripts.bench_train --worker=matmul'}),
    (['--grouped'], '--grouped: expected with --peft only'),
    (['--peft=lora', '--peer=peft', '--grouped'], '--grouped: expected with --peer=peft and conversations'),
    (['--peft=lora', '--compile'], '--compile: expected with --peer=peft'),
    (['--peft=lora', '--peer=peft', '--grouped', '--compile', '--set=data.corpus=chat'], {
        'lm': 'scripts.bench_peft --side=lm --set=data.corpus=chat',
        'peft': 'scripts.bench_peft --side=peft --grouped --compile --set=data.corpus=chat --nokeep_memory',
        'matmul': 'scripts.bench_train --worker=matmul'}),
    (['--peft=lora'], {'lm': 'scripts.bench_peft --side=lm', 'matmul': 'scripts.bench_train --worker=matmul'}),
    (['--model=minilm', '--peer=torch', '--set=data.batch=2'], {
        'lm': 'scripts.bench_encoder --side=lm --model=minilm --set=data.batch=2',
        'torch': 'scripts.bench_encoder --side=torch --model=minilm --nokeep_memory',
        'matmul': 'scripts.bench_train --worker=matmul'}),
    (['--shapes=4x128', '--peer=torch', '--set=model.scan_layers=True'], {
        'lm': 'scripts.bench_train --worker=lm --shapes=4x128 --set=model.scan_layers=True',
        'torch': 'scripts.bench_train --worker=torch --shapes=4x128 --nokeep_memory',
        'matmul': 'scripts.bench_train --worker=matmul --shapes=4x128'}),
    (['--shapes=4x128', '--peer=torch', '--tuned_peer', '--peer_first'], {  # in the order in which they start
        'matmul': 'scripts.bench_train --worker=matmul --shapes=4x128',
        'torch': 'scripts.bench_train --worker=torch --shapes=4x128 --keep_memory',
        'lm': 'scripts.bench_train --worker=lm --shapes=4x128'}),
]
# Workers that take no time: the sides of a comparison are those that it starts.
DRIVER = """
import json, sys
from absl import flags
from lm.errors import Error
from scripts import bench_train

class Instant:
  facts = {'tokens': 8, 'flops': 1.0, 'width': 2048}
  def __init__(self, command, device):
    started.append(' '.join(command[2:]))
  def ask(self, steps):
    return {'seconds': 1.0, 'peak': 2**20}
  def close(self):
    pass

bench_train.bench.Side = Instant
for arguments in json.load(sys.stdin):
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()
  flags.FLAGS(['bench_train', *arguments])
  started = []
  try:
    bench_train.main([])
    print('found', json.dumps(started))
  except Error as error:
    print('found', json.dumps(str(error)))
"""
PEFT = """
import json
from absl import flags
from lm.errors import Error
from scripts import bench_peft
flags.FLAGS(['bench_peft'])
found = {targets: bench_peft.modules(targets) for targets in (
    '^blocks/attn/[qv]$', bench_peft.make_config((), False).peft.targets)}
c, full = (bench_peft.make_config(('peft.rank=4', 'data.batch=2'), full) for full in (False, True))
errors = []
for refused in (lambda: bench_peft.modules('^embed/'), lambda: bench_peft.make_config(('peft.method=full',), False)):
  try:
    refused()
  except Error as error:
    errors.append(str(error))
print(json.dumps([list(found.values()), [c.peft.rank, c.data.batch, c.data.length, c.model.layers], full.peft.method,
                  errors]))
"""


def printed(code, given=''):
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, input=given, capture_output=True, text=True,
                        timeout=300, check=False)
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


@pytest.fixture(scope='module')
def lines():
  return printed(DRIVER, json.dumps([arguments for arguments, _ in CASES]))


@pytest.mark.parametrize('number', range(len(CASES)))
def test_the_flags_name_the_processes(number, lines):
  found = [json.loads(line.removeprefix('found ')) for line in lines if line.startswith('found ')][number]
  expected = CASES[number][1]
  assert expected in found if isinstance(expected, str) else found == [*expected.values()]


def test_each_pair_of_sides_is_compared(lines):
  assert [line.split(':')[0].split(None, 1) for line in lines if ' / ' in line] == [
      ['lora', 'lm / peft'], ['lora', 'lm full / peft full'], ['lora', 'lm'], ['lora', 'peft'],
      ['lora', 'lm / peft'],
      ['minilm', 'lm / torch'], ['4x128', 'lm / torch'], ['4x128', 'lm / torch']]


@pytest.mark.slow
def test_both_sides_of_lora_train_the_same():
  (qv, every), sizes, full, errors = json.loads(printed(PEFT)[-1])
  assert qv == ['q_proj', 'v_proj'] and sizes == [4, 2, 256, 30] and full == 'full'
  assert every == ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'gate_proj', 'down_proj']
  assert 'peft.targets=^embed/: matches none of blocks/attn/q' in errors[0] and 'expected lora' in errors[1]
