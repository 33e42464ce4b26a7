r"""Whole runs of nanoGPT's CPU config, here and on PyTorch, in turn on the same machine: what they reach, and how soon.

  python -m scripts.bench_run --corpus=tinyshakespeare.txt --seeds=3
  python -m scripts.bench_run --corpus=tinyshakespeare.txt --seeds=3 --peer=torch      # needs the oracle extras

Here it is `shakespeare_char_cpu` of experiments/gpt2.py as anybody runs it, with logs, checkpoints and pictures.
PyTorch's side is a bare loop of the same model, batches, schedule and AdamW (`lm.bench.torch_gpt`), with random numbers
of its own; it runs as installed (--tuned_peer: with this package's settings of memory). Both train 2,000 steps of 12 x
64 characters in f32 and look at the whole validation split every 250. Columns: the loss there at the end, seconds of
training, and seconds of it all (here of the process, there from `import torch` on); then for each time PyTorch's over
ours, the median over the seeds.
"""

import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from absl import flags

from experiments import cli, gpt2
from lm import bench, config, logs, optim
from lm.errors import ConfigError, Error

_CORPUS = flags.DEFINE_string('corpus', '', 'A text; nanoGPT takes tinyshakespeare.txt.')
_SEEDS = flags.DEFINE_integer('seeds', 1, 'Runs with seeds 0, 1, ...', lower_bound=1)
_PEER = flags.DEFINE_enum('peer', 'none', ['none', 'torch'], 'Whom to compare with.')
_TUNED = flags.DEFINE_bool('tuned_peer', False, 'The peer\'s process has this package\'s settings of memory, too.')
FIELDS = ('loop.eval_every', *(f'optim.{name}' for name in (
    'lr', 'min_lr', 'schedule', 'steps', 'warmup', 'decay_steps', 'b1', 'b2', 'eps', 'clip')))  # what both sides know
_SET = flags.DEFINE_multi_string('set', [], f'Changes for both sides, of {", ".join(FIELDS)}.')
_WORKER = flags.DEFINE_integer('worker', None, 'Internal: this process is the run of PyTorch with this seed.')


def main(_: list[str]) -> None:
  if not pathlib.Path(_CORPUS.value).is_file():
    raise ConfigError(f'--corpus={_CORPUS.value!r}: no such file; expected a text, such as tinyshakespeare.txt')
  c = make_config()
  if _WORKER.value is not None:
    rate = optim.schedule(c.optim)
    print(json.dumps(_torch(c, _WORKER.value, [float(rate(n)) for n in range(c.optim.steps)])))
    return
  sides = {'lm': _lm} | ({'torch': _process} if _PEER.value == 'torch' else {})
  found = {side: [] for side in sides}
  print(f'{"side":6} {"seed":>4} {"val loss":>9} {"training s":>11} {"whole s":>8}', flush=True)
  for seed in range(_SEEDS.value):
    for side, run in sides.items():
      loss, training, whole = run(seed)
      found[side].append((loss, training, whole))
      print(f'{side:6} {seed:4} {loss:9.4f} {training:11.1f} {whole:8.1f}', flush=True)
  for side, own in found.items():
    print(f'{side:6} mean {statistics.mean(loss for loss, *_ in own):9.4f}')
  if 'torch' in found:
    for i, name in ((1, 'training'), (2, 'whole')):
      print(f'torch / lm, {name}: {bench.ratio([x[i] for x in found["torch"]], [x[i] for x in found["lm"]])}')


def make_config():
  """What both sides train."""
  for item in _SET.value:
    if item.split('=')[0] not in FIELDS:
      raise ConfigError(f'--set {item}: PyTorch\'s side does not know it; expected one of {", ".join(FIELDS)}')
  return config.override(gpt2.shakespeare_char_cpu(), f'data.corpus={_CORPUS.value}', *_SET.value)


def _lm(seed):
  """(loss, seconds of training, of it all)."""
  began = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    _done('experiments.gpt2', '--config=shakespeare_char_cpu', f'--workdir={folder}/run',
          *(f'--set={item}' for item in (f'data.corpus={_CORPUS.value}', f'seed={seed}', *_SET.value)))
    whole = time.perf_counter() - began
    rows = [row for row in logs.read(f'{folder}/run') if 'tokens_per_s' in row]
  tokens = [b - a for a, b in itertools.pairwise([0, *(row['tokens'] for row in rows)])]
  return rows[-1]['val_loss'], sum(n / row['tokens_per_s'] for n, row in zip(tokens, rows, strict=True)), whole


def _process(seed):
  command = ['scripts.bench_run', f'--worker={seed}', f'--corpus={_CORPUS.value}', *(f'--set={x}' for x in _SET.value)]
  out = _done(*bench.peer(command, _TUNED.value))
  return json.loads(out.splitlines()[-1])


def _done(*arguments):
  """What the module wrote to stdout."""
  done = subprocess.run([sys.executable, '-m', *arguments], stdout=subprocess.PIPE, text=True, check=False)
  if done.returncode:
    raise Error(f'{" ".join(arguments)}: failed; its error is above; the torch side needs pip install -e .[oracle]')
  return done.stdout


def _torch(c, seed, rates):
  """As `_lm`; rates: of learning, for each step."""
  started = time.perf_counter()
  import torch
  from torch.nn import functional as F

  torch.set_default_device(bench.start_torch())
  torch.manual_seed(seed)
  m, B, T = c.model, c.data.batch, c.data.length
  text = pathlib.Path(_CORPUS.value).read_text(encoding='utf-8')
  letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
  ids = torch.tensor([letters[letter] for letter in text])
  cut = int(len(ids) * (1 - c.data.validation_fraction))
  train, held = ids[:cut], ids[cut:]
  rows = (len(held) - 1) // T
  held_x, held_y = held[:rows * T].view(rows, T), held[1:rows * T + 1].view(rows, T)

  model, groups = bench.torch_gpt(m.layers, m.embed, m.heads, T, m.vocab, gelu='none')
  tx = torch.optim.AdamW(groups, lr=c.optim.lr, betas=(c.optim.b1, c.optim.b2), eps=c.optim.eps)
  loss_of = lambda x, y, how='mean': F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction=how)

  @torch.no_grad()
  def validation():
    pairs = zip(held_x.split(c.eval_batch), held_y.split(c.eval_batch), strict=True)
    return sum(loss_of(x, y, 'sum').item() for x, y in pairs) / (rows * T)

  training, began = 0.0, time.perf_counter()
  for n in range(c.optim.steps):
    for group in tx.param_groups:
      group['lr'] = rates[n]
    at = torch.randint(cut - T, (B,)).tolist()
    x, y = (torch.stack([train[i + j:i + j + T] for i in at]) for j in (0, 1))
    loss = loss_of(x, y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), c.optim.clip)
    tx.step()
    tx.zero_grad(set_to_none=True)
    if n + 1 == c.optim.steps or (n + 1) % (c.loop.eval_every or c.optim.steps) == 0:
      training += time.perf_counter() - began
      loss_held = validation()
      began = time.perf_counter()
  return loss_held, training, time.perf_counter() - started


if __name__ == '__main__':
  cli.guard(main, __doc__)
