r"""Training speed of GPT-2 shapes in bf16 on one GPU: this package's whole step, PyTorch's, and what was planned.

  python -m scripts.bench_gpu                                         # 12 x 768, 16 rows of 1,024
  python -m scripts.bench_gpu --shape=24x1024 --batch=8 --peer=torch  # PyTorch with a GPU; turns of each side
  python -m scripts.compile_for --experiment=gpt2 --config=nanogpt_124m --set data.batch=16 --set model.vocab=50304 \
      --target=h100:1x1 --json > plan.json && python -m scripts.bench_gpu --plan=plan.json     # measured beside planned

Both sides run whole steps on random ids: forward and backward in bf16 with f32 parameters, clip to norm 1, AdamW with
decoupled decay; nanoGPT's model without dropout, 50,304 ids. PyTorch runs autocast, torch.compile, its fused attention
and fused AdamW. Prints the medians over the rounds: ms a step, tokens/s, MFU against the data sheet's peak (6 N +
attention FLOPs a token, PaLM App. B), peak memory of each side's own allocator, the ratio.

On one device layers as a loop cost a fifth: use --set model.scan_layers=False --set model.remat=none --set
loss.chunk=8192 where memory lasts.
"""

import json
import statistics
import time

from absl import flags
import jax

from experiments import cli, gpt2
from lm import bench, budget, config, optim, pretrain
from lm.errors import ConfigError

SHAPES = {'12x768': (12, 768, 12), '24x1024': (24, 1024, 16), '36x1280': (36, 1280, 20)}
V = 50_304  # GPT-2's 50,257 and enough for whole tiles
_SHAPE = flags.DEFINE_enum('shape', '12x768', sorted(SHAPES), 'Layers x width.')
_BATCH = flags.DEFINE_integer('batch', 16, 'Rows.', lower_bound=1)
_PEER = flags.DEFINE_enum('peer', 'none', ['none', 'torch'], 'Whom to compare with.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Turns of each side.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 10, 'Steps a turn.', lower_bound=1)
_PLAN = flags.DEFINE_string('plan', '', 'What scripts.compile_for --json printed for the same shape and batch.')
_SET = flags.DEFINE_multi_string('set', [], 'Changes to this package\'s config, e.g. --set loss.chunk=8192.')


def main(argv: list[str]) -> None:
  del argv
  device = jax.devices()[0]
  if device.platform != 'gpu':
    raise ConfigError(f'no GPU: JAX found {device.device_kind}; install the extra `cuda`, or see scripts.bench_train')
  shape = SHAPES[_SHAPE.value]
  sides = {'lm': _lm(*shape, _BATCH.value)}
  if _PEER.value == 'torch':
    sides['torch'] = _torch(*shape, _BATCH.value)
  flops, T = sides['lm'][2], 1024
  seconds = {name: [] for name in sides}
  for run, *_ in sides.values():
    run(3)  # compile and warm up
  for _ in range(_ROUNDS.value):
    for name, (run, *_) in sides.items():
      began = time.perf_counter()
      run(_STEPS.value)
      seconds[name].append((time.perf_counter() - began) / _STEPS.value)
  found = {}
  print(f'{device.device_kind}, {_SHAPE.value}, {_BATCH.value} rows of {T}')
  print(f'{"side":6} {"ms/step":>8} {"min":>8} {"max":>8} {"tokens/s":>9} {"MFU":>6} {"peak GiB":>8}')
  for name, (_, memory, _) in sides.items():
    s = statistics.median(seconds[name])
    found[name] = {'seconds': s, 'tokens_per_s': _BATCH.value * T / s, 'peak_bytes': memory(),
                   'mfu': _BATCH.value * T * flops / s / budget.peak_flops(device)}
    print(f'{name:6} {s * 1e3:8.1f} {min(seconds[name]) * 1e3:8.1f} {max(seconds[name]) * 1e3:8.1f} '
          f'{found[name]["tokens_per_s"]:9.0f} {found[name]["mfu"]:6.1%} {memory() / 2**30:8.2f}')
  if 'torch' in found:
    print(f'lm / torch: {found["torch"]["seconds"] / found["lm"]["seconds"]:.3f}')
  if _PLAN.value:
    with open(_PLAN.value) as f:
      plan = json.load(f)
    print(f'planned: {plan["roofline_s"] * 1e3:.1f} ms at the least, peak {plan["memory"]["peak"] / 2**30:.2f}'
          f' GiB; measured: {found["lm"]["seconds"] * 1e3:.1f} ms, {found["lm"]["peak_bytes"] / 2**30:.2f} GiB')
  print(json.dumps(found))


def _lm(layers, embed, heads, batch):
  """(run(steps), bytes at the peak, FLOPs of a token)."""
  c = config.replace(gpt2.nanogpt_124m(), model__layers=layers, model__embed=embed, model__heads=heads,
                     model__kv_heads=heads, model__mlp=4 * embed, model__vocab=V, data__batch=batch)
  c = config.override(config.replace(c, optim=optim.Config(lr=1e-4, schedule='constant')), *_SET.value)
  task = pretrain.task(c)
  run = bench.steps(c, task, bench.rows(batch, c.data.length, c.model.vocab))
  return run, lambda: jax.devices()[0].memory_stats()['peak_bytes_in_use'], task.flops.total


def _torch(layers, embed, heads, batch, T=1024):
  """As `_lm`."""
  import torch
  from torch import nn
  from torch.nn import functional as F

  torch.set_float32_matmul_precision('high')
  with torch.device('cuda'):
    model, groups = bench.torch_gpt(layers, embed, heads, T, V, gelu='none')
  tx = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
  ids = torch.randint(V, (batch, T + 1), device='cuda')
  compiled = torch.compile(lambda ids, targets: F.cross_entropy(model(ids).view(-1, V), targets.reshape(-1)))

  def run(steps):
    for _ in range(steps):
      with torch.autocast('cuda', dtype=torch.bfloat16):
        loss = compiled(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
      loss.backward()
      nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      tx.step()
      tx.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
  return run, torch.cuda.max_memory_allocated, None


if __name__ == '__main__':
  cli.guard(main, __doc__)
