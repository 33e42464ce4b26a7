r"""Training speed of the same GPT-2 shapes in this package and in PyTorch, in turn on the same machine.

  python -m scripts.bench_train                       # this package alone
  python -m scripts.bench_train --peer=torch          # needs the oracle extras; interleaved, prints the ratio
  python -m scripts.bench_train --peer=torch --shapes=6x384 --rounds=10
  python -m scripts.bench_train --peer=torch --model=deberta      # or bert, electra: base width, B 4, T 256
  python -m scripts.bench_train --peer=torch --model=minilm       # fine-tuning to a label, B 32, T 64
  python -m scripts.bench_train --peer=peft --peft=lora           # SmolLM2-135M, B 4, T 256; --full: and in full

Both sides run whole steps in f32: forward, backward, clip to norm 1, AdamW with decoupled decay, no dropout, random
ids. Each side lives in a process of its own with all cores; they take turns, a round at a time, so drift of the
machine's speed hits both. The peer runs as installed; with --tuned_peer its process has this package's settings of
memory, too. Prints the medians over the rounds: tokens/s, the ratio, peak memory, and the share of the machine's own
f32 matmul rate (measured between the rounds) that the model's FLOPs amount to.

Encoders (--model) take the pretraining step of experiments/{bert,electra,deberta}.py (masking, dropout .1, heads) at
12 x 768, against the same models of transformers with 15% of the labels set; ELECTRA's is generator, draw and
discriminator on both sides. BERT is without next sentences, DeBERTa is v1 without its mask decoder, as transformers'.
MiniLM is `minilm` of experiments/classify.py, trained in full on rows without padding, against
BertForSequenceClassification.

--peft=lora takes the LoRA step of experiments/lora.py's `smollm2` on random weights (scripts/bench_peft.py) against
PEFT on the same shape, rank and targets, which --set changes for both. With --full both sides also train in full, and
the share of that step's time that LoRA's takes is printed for each. With --set data.corpus=... --set data.tokenizer=...
both train on its conversations, packed here and padded there; of PEFT with --grouped in batches of like lengths. With
--compile PEFT's model is compiled.
"""

import functools
import statistics
import sys

from absl import flags

from experiments import cli
from lm import bench
from lm.errors import ConfigError

SHAPES = {  # layers, embed, heads, T, B, V
    '4x128': (4, 128, 4, 64, 12, 65),
    '6x384': (6, 384, 6, 256, 16, 65),
    '12x768': (12, 768, 12, 512, 4, 50257),
}
_PEER = flags.DEFINE_enum('peer', 'none', ['none', 'torch', 'peft'], 'Whom to compare with; peft is for --peft.')
_SHAPES = flags.DEFINE_list('shapes', ['6x384', '12x768'], f'Which of {", ".join(SHAPES)}.')
_MODEL = flags.DEFINE_enum('model', 'gpt', ['gpt', 'bert', 'electra', 'deberta', 'minilm'], 'What is trained.')
_PEFT = flags.DEFINE_enum('peft', 'none', ['none', 'lora'], 'Fine-tune a decoder with few parameters.')
_FULL = flags.DEFINE_bool('full', False, 'With --peft: also in full, on both sides.')
_GROUPED = flags.DEFINE_bool('grouped', False, 'With --peer=peft and data.corpus: its batches are of like lengths.')
_COMPILE = flags.DEFINE_bool('compile', False, 'With --peer=peft: its model by torch.compile.')
_PEER_FIRST = flags.DEFINE_bool('peer_first', False, 'Start the peer first; which memory it gets may change its speed.')
_TUNED = flags.DEFINE_bool('tuned_peer', False, 'The peer\'s process has this package\'s settings of memory, too.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Turns of each side.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 0, 'Steps a turn; 0 = about ten seconds.', lower_bound=0)
_SET = flags.DEFINE_multi_string('set', [], 'Changes to this package\'s config, e.g. --set model.scan_layers=True; '
                                 'with --peft, to what both sides train.')
_DEVICE = flags.DEFINE_enum('device', 'cpu', ['cpu', 'gpu'], 'Where all sides work; on a GPU f32 products take TF32.')
_WORKER = flags.DEFINE_string('worker', '', 'Internal: which side this process is.')


def main(argv: list[str]) -> None:
  del argv
  check_flags()
  if _WORKER.value:
    if _WORKER.value == 'matmul':
      _serve_matmul()
    else:
      bench.serve({'lm': _lm, 'torch': _torch}[_WORKER.value](*SHAPES[_SHAPES.value[0]]))
    return
  print(f'{"shape":8} {"side":9} {"tokens/s":>9} {"min":>7} {"max":>7} {"peak MiB":>9} {"of matmul":>9}')
  if _PEFT.value != 'none' or _MODEL.value != 'gpt':
    _compare(_PEFT.value if _PEFT.value != 'none' else _MODEL.value)
    return
  for shape in _SHAPES.value:
    layers, embed, _, T, B, V = SHAPES[shape]
    _compare(shape, B * T, 6 * (12 * layers * embed**2 + V * embed) + 12 * layers * embed * T)  # PaLM App. B


def check_flags() -> None:
  for shape in _SHAPES.value:
    if shape not in SHAPES:
      raise ConfigError(f'--shapes={shape}: unknown; expected some of {", ".join(SHAPES)}')
  few = _PEFT.value != 'none'
  if few and (_MODEL.value != 'gpt' or _PEER.value == 'torch'):
    raise ConfigError(f'--peft={_PEFT.value}: trains SmolLM2 and compares with PEFT; expected no --model, and '
                      '--peer=peft or none; drop the other flag')
  for flag, given in (('peer=peft', _PEER.value == 'peft'), ('full', _FULL.value), ('grouped', _GROUPED.value)):
    if given and not few:
      raise ConfigError(f'--{flag}: expected with --peft only; add --peft=lora')
  if _COMPILE.value and _PEER.value != 'peft':
    raise ConfigError('--compile: expected with --peer=peft; add it')
  if _GROUPED.value and not (_PEER.value == 'peft' and any(item.startswith('data.corpus=') for item in _SET.value)):
    raise ConfigError('--grouped: expected with --peer=peft and conversations; add --set data.corpus=...')


def _compare(shape, tokens=None, flops=None):
  """tokens: of a step. flops: of a training token. None = as the workers count them."""
  sides = ['lm'] + ([_PEER.value] if _PEER.value != 'none' else [])
  sides += [f'{side} full' for side in sides] if _FULL.value else []
  workers = bench.start({side: functools.partial(bench.Side, command(side, shape), device=_DEVICE.value)
                         for side in [*sides, 'matmul']}, _PEER_FIRST.value)
  for worker in workers.values():
    worker.ask(2)  # compiles
  steps = _STEPS.value or max(1, round(10 / max(w.ask(1)['seconds'] for s, w in workers.items() if s in sides)))
  said = {side: {'tokens': tokens, 'flops': flops} | workers[side].facts for side in sides}
  rates = {side: [] for side in workers}
  for _ in range(_ROUNDS.value):
    for side in sides:
      answer = workers[side].ask(steps)
      rates[side].append(answer.get('tokens', steps * said[side]['tokens']) / answer['seconds'])
    rates['matmul'].append(3 / workers['matmul'].ask(3)['seconds'])
  width = workers['matmul'].facts['width']
  peak = 2 * width**3 * statistics.median(rates['matmul'])
  for side in sides:
    median = statistics.median(rates[side])
    memory = workers[side].ask(0)['peak'] / 2**20
    print(f'{shape:8} {side:9} {median:9.0f} {min(rates[side]):7.0f} {max(rates[side]):7.0f} {memory:9.0f} '
          f'{median * said[side]["flops"] / peak:9.2f}', flush=True)
  if _PEER.value != 'none':
    for a, b in zip(sides[::2], sides[1::2], strict=True):
      print(f'{shape:8} {a} / {b}: {bench.ratio(rates[a], rates[b])}; {steps} steps a turn; matmul {width}^3 f32 '
            f'{peak / 1e9:.0f} GF/s', flush=True)
  for side in sides if _FULL.value else ():
    if f'{side} full' in rates:
      print(f'{shape:8} {side}: step time / in full {bench.ratio(rates[f"{side} full"], rates[side])}', flush=True)
  for worker in workers.values():
    worker.close()


def command(side: str, shape: str) -> list[str]:
  """What the process of a side runs; a side is 'matmul', 'lm', a peer, or with ' full' behind it."""
  who, *full = side.split()
  ours, changes = who in ('lm', 'matmul'), [f'--set={item}' for item in _SET.value]
  of_lm = changes if who == 'lm' else []
  if who != 'matmul' and _PEFT.value != 'none':
    theirs = [f'--{flag.name}' for flag in (_GROUPED, _COMPILE) if flag.value and not ours]
    program = ['bench_peft', f'--side={who}', *(f'--{word}' for word in full), *theirs, *changes]
  elif who != 'matmul' and _MODEL.value != 'gpt':
    program = ['bench_encoder', f'--side={who}', f'--model={_MODEL.value}', *of_lm]
  else:
    shapes = [f'--shapes={shape}'] if shape in SHAPES else []
    program = ['bench_train', f'--worker={who}', *shapes, *of_lm]
  found = [sys.executable, '-m', f'scripts.{program[0]}', *program[1:]]
  return found if ours else bench.peer(found, _TUNED.value)


def _serve_matmul():
  import jax
  import jax.numpy as jnp

  width = 16384 if bench.on_gpu() else 2048
  x = jnp.ones((width, width), jnp.float32)
  f = jax.jit(lambda a: a @ a)

  def run(n):
    for _ in range(n):
      f(x).block_until_ready()
  bench.serve(run, width=width)


def _lm(layers, embed, heads, T, B, V):
  from lm import config, optim, pretrain
  from lm.data import loader
  from lm.models import decoder

  model = decoder.Config(vocab=V, length=T, layers=layers, embed=embed, heads=heads, kv_heads=heads,
                         head_dim=embed // heads, mlp=4 * embed, bias=False, norm_bias=False, scan_layers=False)
  c = pretrain.Config(model=model, data=loader.Config(length=T, batch=B),
                      optim=optim.Config(lr=1e-4, schedule='constant'))
  c = config.override(c, *_SET.value)
  return bench.steps(c, pretrain.task(c), bench.rows(B, T, V))


def _torch(layers, embed, heads, T, B, V):
  import torch
  from torch import nn
  from torch.nn import functional as F

  torch.set_default_device(bench.start_torch())
  model, groups = bench.torch_gpt(layers, embed, heads, T, V)
  tx = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))
  ids = torch.randint(V, (B, T + 1))

  def run(n):
    for _ in range(n):
      loss = F.cross_entropy(model(ids[:, :-1]).view(-1, V), ids[:, 1:].reshape(-1))
      loss.backward()
      nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      tx.step()
      tx.zero_grad(set_to_none=True)
  return run


if __name__ == '__main__':
  cli.guard(main, __doc__)
