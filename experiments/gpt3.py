r"""GPT-3 (Brown et al. 2020, arXiv:2005.14165), table 2.1: eight sizes, 300B tokens each.

  python -m experiments.gpt3 --config=gpt3_small --set data.corpus=CORPUS --set data.tokenizer=GPT2 \
      --workdir=runs/gpt3
  python -m experiments.gpt3 --config=gpt3_175b --describe
  python -m scripts.compile_for --experiment=gpt3 --config=gpt3_175b_v5p --target=v5p:8x8x16    # without a TPU

GPT2 stands for a folder with GPT-2's byte-level BPE: vocab.json and merges.txt, as in the model's own folder in Hugging
Face layout. OpenAI's names for them, encoder.json and vocab.bpe, are read too, as data.tokenizer=GPT2/vocab.bpe.

Two rows of the table cannot be what was trained, and follow table D.1's parameter counts here: XL has 16 heads (not 24)
of 128, 13B is 5120 wide (not 5140). Differences from the paper: every layer attends densely (the paper alternates with
a banded pattern whose width it never gives), and the batch has its final size from the start (the paper ramps it up
from 32k tokens over the first 4 to 12 billion).
"""

from experiments import cli
from lm import checkpoint, config, loop, optim, pretrain, sharding
from lm.data import loader
from lm.models import decoder

TOKENS = 300_000_000_000
LENGTH = 2048


def size(layers: int, embed: int, heads: int, head_dim: int, lr: float, rows: int) -> pretrain.Config:
  """One row of table 2.1: Adam (.9, .95), clip 1, decay 0.1, 375M warm-up tokens, cosine to a tenth at 260B tokens."""
  tokens_a_step = rows * LENGTH
  warmup = 375_000_000 // tokens_a_step
  return pretrain.Config(
      model=decoder.Config(layers=layers, embed=embed, heads=heads, kv_heads=heads, head_dim=head_dim, mlp=4 * embed,
                           length=LENGTH, dtype='bfloat16', remat='full',
                           init=decoder.Init(positions=0.01, residual=decoder.residual_std(layers))),
      data=loader.Config(length=LENGTH, batch=rows),
      optim=optim.Config(lr=lr, min_lr=lr / 10, schedule='cosine', warmup=warmup, steps=TOKENS // tokens_a_step,
                         decay_steps=260_000_000_000 // tokens_a_step - warmup, weight_decay=0.1),
      loop=loop.Config(eval_every=1000), checkpoint=checkpoint.Config(every=1000))


def gpt3_small() -> pretrain.Config:
  """125,226,240 parameters; lr 6e-4, 0.5M tokens a step."""
  return size(12, 768, 12, 64, 6.0e-4, 256)


def gpt3_medium() -> pretrain.Config:
  """355,871,744 parameters; lr 3e-4, 0.5M tokens a step."""
  return size(24, 1024, 16, 64, 3.0e-4, 256)


def gpt3_large() -> pretrain.Config:
  """760,300,032 parameters; lr 2.5e-4, 0.5M tokens a step."""
  return size(24, 1536, 16, 96, 2.5e-4, 256)


def gpt3_xl() -> pretrain.Config:
  """1,315,723,264 parameters; lr 2e-4, 1M tokens a step."""
  return size(24, 2048, 16, 128, 2.0e-4, 512)


def gpt3_2_7b() -> pretrain.Config:
  """2,651,553,280 parameters; lr 1.6e-4, 1M tokens a step."""
  return size(32, 2560, 32, 80, 1.6e-4, 512)


def gpt3_6_7b() -> pretrain.Config:
  """6,658,404,352 parameters; lr 1.2e-4, 2M tokens a step."""
  return size(32, 4096, 32, 128, 1.2e-4, 1024)


def gpt3_13b() -> pretrain.Config:
  """12,853,386,240 parameters; lr 1e-4, 2M tokens a step."""
  return size(40, 5120, 40, 128, 1.0e-4, 1024)


def gpt3_175b() -> pretrain.Config:
  """174,604,259,328 parameters; lr 0.6e-4, 3.2M tokens a step."""
  return size(96, 12288, 96, 128, 0.6e-4, 1536)


def gpt3_175b_v5p() -> pretrain.Config:
  """gpt3_175b on 1,024 TPU v5p, --target=v5p:8x8x16: fsdp 128 x tensor 8; the vocabulary padded, to divide."""
  return _placed(sharding.Config(fsdp=128, tensor=8), microbatches=4)


def gpt3_175b_h100() -> pretrain.Config:
  """gpt3_175b on 1,024 H100s, --target=h100:128x8: data 2 x fsdp 64 x tensor 8; the vocabulary padded, to divide."""
  return _placed(sharding.Config(data=2, fsdp=64, tensor=8, sequence=True), microbatches=1)


def _placed(mesh: sharding.Config, microbatches: int) -> pretrain.Config:
  """gpt3_175b with 47 rows of the vocabulary that no token has, up to a multiple of 128 (arXiv:1909.08053 §5.1)."""
  return config.replace(gpt3_175b(), mesh=mesh, model__vocab=50304, optim__microbatches=microbatches)


CONFIGS = (gpt3_small, gpt3_medium, gpt3_large, gpt3_xl, gpt3_2_7b, gpt3_6_7b, gpt3_13b, gpt3_175b,
           gpt3_175b_v5p, gpt3_175b_h100)

if __name__ == '__main__':
  cli.main(__doc__, CONFIGS, pretrain.task)
