r"""Attention on an NVIDIA GPU: this package's kernels, its blocks, and jax.nn's, forward and backward.

  python -m scripts.bench_attention                         # checks the kernels, then times them all
  python -m scripts.bench_attention --peer=torch            # and PyTorch's scaled_dot_product_attention
  python -m scripts.bench_attention --variants= --shapes=gpt --blocks=128x64,64x64x4x3    # which tiles are best

Without an NVIDIA GPU it ends with status 2. First the kernels are compared with the reference in f32 at small shapes;
where they are off the script ends with status 1. A line is one variant: milliseconds, TFLOP/s, their share of --peak.
Products of visible pairs alone are counted, 4 H a pair and head forward, 14 H with backward, whatever a variant does
more. A variant that fails says so and the rest goes on; what is not reached within --limit_s is left out.

--blocks=QxK[xWARPSxSTAGES],... times each kernel alone with tiles of Q queries and K keys; without warps and stages all
of 4, 8 and 2, 3 are tried. The sizes that training uses stand in lm.kernels.flash.tiles.
"""

import concurrent.futures
import functools
import json
import os
import re
import statistics
import time
from typing import NamedTuple

from absl import flags
import jax
import jax.numpy as jnp

from experiments import cli
from lm import nn
from lm.errors import ConfigError, Error
from lm.kernels import attention, flash

VARIANTS = ('kernel', 'blocks', 'cudnn', 'xla')
_SHAPES = flags.DEFINE_list('shapes', ['gpt', 'llama', 'bert'], 'Which of gpt (B 16, N 12, T 1024, H 64, causal), '
                            'llama (B 4, N 32, K 8, T 4096, H 128, causal), bert (B 32, N 12, T 512, H 64, padded).')
_VARIANTS = flags.DEFINE_list('variants', list(VARIANTS), 'Which to time.')
_PEER = flags.DEFINE_enum('peer', 'none', ['none', 'torch'], 'Whom else to time.')
_BLOCKS = flags.DEFINE_list('blocks', [], 'Tiles to try, QxK or QxKxWARPSxSTAGES.')
_PEAK = flags.DEFINE_float('peak', 989e12, "The device's bf16 FLOP/s; default: H100 SXM, dense.", lower_bound=1.0)
_LIMIT = flags.DEFINE_float('limit_s', 80.0, 'Seconds after which nothing more is begun.', lower_bound=1.0)
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object and no table.')


class Shape(NamedTuple):
  B: int
  N: int
  K: int
  T: int
  H: int
  causal: bool


SHAPES = {'gpt': Shape(16, 12, 12, 1024, 64, True), 'llama': Shape(4, 32, 8, 4096, 128, True),
          'bert': Shape(32, 12, 12, 512, 64, False)}
ERROR = {'bfloat16': 0.02}  # of the largest value
CHECKS = (('causal', Shape(2, 4, 2, 200, 64, True), 'bfloat16'), ('padded', Shape(2, 2, 2, 256, 64, False), 'bfloat16'),
          ('wide', Shape(1, 4, 1, 333, 128, True), 'bfloat16'))


class Work(NamedTuple):
  """One thing to time: f(*arrays), whose visible products are `flops`."""

  shape: str
  variant: str
  part: str
  f: object
  arrays: tuple
  flops: float


def main(argv: list[str]) -> None:
  del argv
  start = time.perf_counter()
  tiles = [tile for text in _BLOCKS.value for tile in _tiles(text)]
  for flag, values, known in ((_SHAPES, _SHAPES.value, SHAPES), (_VARIANTS, _VARIANTS.value, VARIANTS)):
    if unknown := [x for x in values if x and x not in known]:
      raise ConfigError(f'--{flag.name}={unknown[0]}: unknown; expected some of {", ".join(known)}')
  os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '.6')  # some is left for the peer
  if jax.default_backend() != 'gpu':
    raise ConfigError(f'no NVIDIA GPU: JAX found {jax.default_backend()}; expected to run on one, with the extra cuda')
  errors = _check()
  if not _JSON.value:
    print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}; largest errors {errors}')
    print(f'{"shape":6} {"variant":22} {"part":8} {"ms":>8} {"TFLOP/s":>8} {"of peak":>8}', flush=True)
  work = [w for name in _SHAPES.value for w in _work(name, tiles)]
  rows = []
  for w, ready in _compiled(work):
    rows.append(_row(w, functools.partial(_measured, w, ready), start))
  if _PEER.value == 'torch':
    for name in _SHAPES.value:
      rows += [_row(w, functools.partial(_torch, w), start) for w in _peer_work(name)]
  if _JSON.value:
    print(json.dumps({'device': jax.devices()[0].device_kind, 'jax': jax.__version__, 'errors': errors, 'rows': rows,
                      'peak': _PEAK.value, 'seconds': round(time.perf_counter() - start, 1)}, indent=1))


def _tiles(text):
  if not re.fullmatch(r'[1-9]\d*x[1-9]\d*(x[1-9]\d*x[1-9]\d*)?', text):
    raise ConfigError(f'--blocks={text}: expected QxK or QxKxWARPSxSTAGES, e.g. 128x64x8x2')
  numbers = [int(n) for n in text.split('x')]
  if min(numbers[:2]) < flash.SMALLEST or any(n & (n - 1) for n in numbers[:3]):
    raise ConfigError(f'--blocks={text}: expected powers of two, at least {flash.SMALLEST} queries and keys')
  more = [tuple(numbers[2:])] if len(numbers) == 4 else [(w, s) for w in (4, 8) for s in (2, 3)]
  return [flash.Tile(*numbers[:2], *rest) for rest in more]


def _inputs(shape, dtype, seed=0):
  """(q, k, v, g, segments, lengths); without padding lengths are all T."""
  keys = jax.random.split(jax.random.key(seed), 4)
  q, k, v, g = (jax.random.normal(key, (shape.B, shape.T, n, shape.H), dtype)
                for key, n in zip(keys, (shape.N, shape.K, shape.K, shape.N), strict=True))
  lengths_B = jnp.full(shape.B, shape.T) if shape.causal else jnp.linspace(shape.T // 2, shape.T, shape.B).astype(int)
  segments_BT = (jnp.arange(shape.T)[None] < lengths_B[:, None]).astype(jnp.int32)
  return q, k, v, g * segments_BT[..., None, None].astype(dtype), segments_BT, lengths_B.astype(jnp.int32)


def _mask(shape, segments_BT):
  return nn.Mask() if shape.causal else nn.Mask(causal=False, q_segments_BT=segments_BT, k_segments_BS=segments_BT)


def _both(attend):
  """attend(q, k, v, segments, lengths) -> a function of `_inputs`: (out, gradients)."""
  def f(q, k, v, g, segments_BT, lengths_B):
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments_BT, lengths_B), q, k, v)
    return out, *pull(g)
  return f


def _check():
  """{case: largest error relative to the largest value}, of output and gradients.

  Raises:
    Error: one is too large.
  """
  def errors(shape, dtype):
    arrays = _inputs(shape, dtype)
    real = arrays[4][..., None, None]
    run = lambda f, arrays: jax.jit(_both(lambda q, k, v, s, _: f(q, k, v, _mask(shape, s))))(*arrays)
    with jax.default_matmul_precision('highest'):
      out, *grads = run(nn.attend, [x.astype('float32') if x.ndim == 4 else x for x in arrays])
    got, *got_grads = run(flash.attend, arrays)
    pairs = zip((got * real.astype(dtype), *got_grads), (out * real, *grads), strict=True)
    found = [float(jnp.abs(a.astype('float32') - b).max() / jnp.abs(b).max()) for a, b in pairs]
    return max(found, key=lambda x: x if x == x else float('inf'))
  with concurrent.futures.ThreadPoolExecutor(len(CHECKS)) as pool:
    found = {name: pool.submit(errors, shape, dtype) for name, shape, dtype in CHECKS}
  found = {name: future.result() for name, future in found.items()}
  for name, _, dtype in CHECKS:
    if not found[name] <= ERROR[dtype]:
      raise Error(f'kernel is wrong: {name} ({dtype}) is off by {found[name]:.2g} of the largest value; expected at '
                  f'most {ERROR[dtype]}; do not train with it: attention.attend(kernels=False)')
  return {name: float(f'{error:.2g}') for name, error in found.items()}


def _pairs(shape, lengths_B):
  """Visible pairs of query and key, of all heads."""
  square = float((lengths_B.astype(float) ** 2).sum())
  return shape.N * (shape.B * shape.T * (shape.T + 1) / 2 if shape.causal else square)


def _work(name, tiles):
  shape = SHAPES[name]
  arrays = _inputs(shape, 'bfloat16')
  product = 2 * shape.H * _pairs(shape, arrays[5])  # FLOPs of one product of visible pairs
  ours = lambda f: lambda q, k, v, s, _: f(q, k, v, _mask(shape, s))
  theirs = lambda implementation: lambda q, k, v, _, lengths_B: jax.nn.dot_product_attention(
      q, k, v, is_causal=shape.causal, implementation=implementation,
      **({} if shape.causal else {'query_seq_lengths': lengths_B, 'key_value_seq_lengths': lengths_B}))
  attends = {'kernel': ours(flash.attend), 'blocks': ours(functools.partial(attention.attend, kernels=False)),
             'cudnn': theirs('cudnn'), 'xla': theirs('xla')}
  for variant in filter(None, _VARIANTS.value):
    f = attends[variant]
    yield Work(name, variant, 'forward', lambda q, k, v, _, *rest, f=f: f(q, k, v, *rest), arrays, 2 * product)
    yield Work(name, variant, 'both', _both(f), arrays, 7 * product)
  yield from _tile_work(name, shape, arrays, tiles, product)


def _tile_work(name, shape, arrays, tiles, product):
  """The three kernels alone with each tile; what a kernel's program does not return, XLA leaves out."""
  q, k, v, g, segments_BT, _ = arrays
  segments = (None, None) if shape.causal else (segments_BT, segments_BT)
  rows = jnp.ones(q.shape[:3], jnp.float32)  # in place of sums and delta: time does not depend on them
  static = nn.Mask(causal=shape.causal)
  for tile in tiles:
    options = static, shape.H**-0.5, 0.0, flash.Tiles(tile, tile, tile)
    label = 'x'.join(map(str, tile))
    yield Work(name, label, 'forward', lambda *x, o=options: flash.forward(x[:3], segments, None, *o), (q, k, v),
               2 * product)
    for part, count, pick in (('keys', 4, slice(1, 3)), ('queries', 3, slice(0, 1))):
      yield Work(name, label, part, lambda *x, o=options, pick=pick: flash.backward(x, segments, None, *o)[pick],
                 (q, k, v, g, rows, rows), count * product)


def _compiled(work):
  """(work, a future of its program), in order; compiled side by side, before anything is timed."""
  pool = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))
  compile_ = lambda w: jax.jit(w.f).lower(*w.arrays).compile()
  try:
    pairs = [(w, pool.submit(compile_, w)) for w in work]
    concurrent.futures.wait([ready for _, ready in pairs], timeout=0.6 * _LIMIT.value)
    yield from pairs
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def _row(w, measure, start):
  """Times and prints one line; a failure is one, too."""
  row = {'shape': w.shape, 'variant': w.variant, 'part': w.part}
  try:
    left = _LIMIT.value - (time.perf_counter() - start)
    if left <= 0:
      raise TimeoutError('not reached within --limit_s')
    seconds = measure(left)
    row |= {'ms': seconds * 1e3, 'tflops': w.flops / seconds / 1e12, 'share': w.flops / seconds / _PEAK.value}
    text = f'{row["ms"]:8.3f} {row["tflops"]:8.1f} {row["share"]:8.1%}'
  except Exception as error:  # whatever a library raises: the other variants go on
    row['error'] = ' '.join(f'{type(error).__name__}: {error}'.split())[:160]
    text = row['error']
  if not _JSON.value:
    print(f'{w.shape:6} {w.variant:22} {w.part:8} {text}', flush=True)
  return row


def _measured(w, ready, left):
  f = ready.result(timeout=left)
  return _seconds(lambda: f(*w.arrays), jax.block_until_ready)


def _seconds(run, wait):
  """Of one run: the median of five turns of about 20 ms, in which runs are queued."""
  wait(run())
  begin = time.perf_counter()
  wait(run())
  times = max(1, min(100, int(0.02 / (time.perf_counter() - begin))))
  turns = []
  for _ in range(5):
    begin = time.perf_counter()
    wait([run() for _ in range(times)][-1])
    turns.append((time.perf_counter() - begin) / times)
  return statistics.median(turns)


def _peer_work(name):
  shape = SHAPES[name]
  product = 2 * shape.H * _pairs(shape, _inputs(shape, 'bfloat16')[5])
  for part, count in (('forward', 2), ('both', 7)):
    yield Work(name, 'torch', part, None, (shape,), count * product)


def _torch(w, left):
  del left
  import torch  # imported late: it is large, and a peer alone
  if not torch.cuda.is_available():
    raise ConfigError('torch sees no GPU')
  shape, = w.arrays
  make = lambda n: torch.randn(shape.B, n, shape.T, shape.H, device='cuda', dtype=torch.bfloat16, requires_grad=True)
  q, k, v = make(shape.N), make(shape.K), make(shape.K)
  mask = None
  if not shape.causal:
    lengths_B = torch.linspace(shape.T // 2, shape.T, shape.B, device='cuda').long()
    mask = (torch.arange(shape.T, device='cuda')[None] < lengths_B[:, None])[:, None, None]
  g = torch.randn_like(q)
  forward = lambda: torch.nn.functional.scaled_dot_product_attention(
      q, k, v, attn_mask=mask, is_causal=shape.causal, enable_gqa=shape.N != shape.K)
  run = forward if w.part == 'forward' else lambda: torch.autograd.grad(forward(), (q, k, v), g)
  return _seconds(run, lambda _: torch.cuda.synchronize())


if __name__ == '__main__':
  cli.guard(main, __doc__)
