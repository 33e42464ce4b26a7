r"""PaLM (Chowdhery et al. 2022, arXiv:2204.02311), table 1: parallel blocks, multi-query attention, SwiGLU.

  python -m experiments.palm --config=palm_540b --describe
  python -m experiments.palm --config=palm_8b --set data.corpus=CORPUS --set data.tokenizer=DIR --workdir=runs/palm

As in §5: learning rate 1e-2 for 10,000 steps, then 1/sqrt(step); clip 1; z-loss 1e-4; no dropout; embeddings N(0, 1),
kernels by fan-in, logits scaled by 1/sqrt(embed). Differences from the paper: it trains with Adafactor without
factoring, which scales each update by its parameter's size and lets beta2 grow as 1 - step^-0.8, and decays by lr^2;
here AdamW stands in, so the learning rate is the paper's times the typical size of a kernel, embed^-1/2. The batch is
the middle stage's 2M tokens (the paper goes 1M, 2M, 4M).
"""

from experiments import cli
from lm import checkpoint, config, loop, optim, pretrain, sharding
from lm.data import loader
from lm.losses import ar
from lm.models import decoder

LENGTH = 2048


def size(layers: int, embed: int, heads: int, steps: int) -> pretrain.Config:
  """One row of table 1; every size has heads of 256 and a vocabulary of 256,000."""
  lr = 1e-2 * embed**-0.5
  return pretrain.Config(
      model=decoder.Config(layers=layers, embed=embed, heads=heads, kv_heads=1, head_dim=256, mlp=4 * embed,
                           vocab=256_000, length=LENGTH, positions='rotary', norm_bias=False, activation='swiglu',
                           bias=False, parallel=True, logit_scale=embed**-0.5, dtype='bfloat16', remat='full',
                           init=decoder.Init(scheme='fan_in', tokens=1.0)),
      data=loader.Config(length=LENGTH, batch=1024), loss=ar.Config(z=1e-4),
      optim=optim.Config(lr=lr, schedule='inverse_sqrt', steps=steps, decay_steps=steps - 10_000, b2=0.99,
                         weight_decay=0.0),
      loop=loop.Config(eval_every=1000), checkpoint=checkpoint.Config(every=1000))


def palm_8b() -> pretrain.Config:
  """8,632,012,800 parameters; 780B tokens."""
  return size(32, 4096, 16, 371_933)


def palm_62b() -> pretrain.Config:
  """62,495,662,080 parameters; 780B tokens."""
  return size(64, 8192, 32, 371_933)


def palm_540b() -> pretrain.Config:
  """540,356,474,880 parameters; 780B tokens."""
  return size(118, 18432, 48, 371_933)


def palm_540b_v4() -> pretrain.Config:
  """palm_540b on one pod of 4,096 TPU v4 (the paper: 6,144 in two), --target=v4:16x16x16: fsdp 256 x tensor 16."""
  return config.replace(palm_540b(), mesh=sharding.Config(fsdp=256, tensor=16), optim__microbatches=2)


CONFIGS = (palm_8b, palm_62b, palm_540b, palm_540b_v4)

if __name__ == '__main__':
  cli.main(__doc__, CONFIGS, pretrain.task)
