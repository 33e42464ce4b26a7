r"""Chinchilla (Hoffmann et al. 2022, arXiv:2203.15556): 70B parameters, 1.4T tokens, twenty for each parameter.

  python -m experiments.chinchilla --config=chinchilla_70b --describe

Gopher's block: RMSNorm before each half, Transformer-XL relative positions, biases. 70,065,209,344 parameters is
nanoGPT's formula (the output matrix counted once, norms with a bias; without it they would be 1,318,912 fewer). The
paper gives no norm bias, warm-up or decay; the last two here are Gopher's. Difference: the batch is 1.5M tokens
throughout (the paper doubles it midway).
"""

from experiments import cli
from lm import checkpoint, loop, optim, pretrain
from lm.data import loader
from lm.models import decoder


def chinchilla_70b() -> pretrain.Config:
  """70,065,209,344 parameters; 1.4T tokens, 1.5M a step, lr 1e-4, cosine to a tenth."""
  return pretrain.Config(
      model=decoder.Config(vocab=32000, length=2048, layers=80, embed=8192, heads=64, kv_heads=64, head_dim=128,
                           mlp=32768, positions='relative', norm='rms', dtype='bfloat16', remat='full',
                           init=decoder.Init(residual=decoder.residual_std(80))),
      data=loader.Config(length=2048, batch=768),
      optim=optim.Config(lr=1e-4, min_lr=1e-5, schedule='cosine', warmup=1500, steps=890_096, weight_decay=0.1),
      loop=loop.Config(eval_every=1000), checkpoint=checkpoint.Config(every=1000))


CONFIGS = (chinchilla_70b,)

if __name__ == '__main__':
  cli.main(__doc__, CONFIGS, pretrain.task)
