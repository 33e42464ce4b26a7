r"""ELECTRA (Clark et al. 2020, arXiv:2003.10555): find the tokens that a small generator replaced.

  python -m experiments.electra --config=electra_cpu --workdir=runs/electra --set data.tokenizer=corpora/encoder.model \
      --set "data.corpus=('corpora/web_bible.jsonl','corpora/sanguo.jsonl')"
  python -m experiments.electra --config=electra_small --describe

(Corpora and tokenizer: see experiments/bert.py.) Published: electra_small 14,196,219 parameters in training with the
generator; GLUE 79.9 after 1M steps (table 1). Recipe: google-research/electra. Loss 1 x masked words + 50 x detection;
of the masked tokens 15% stay as they are; embeddings are shared; the linear decay overlaps the warm-up. 'loss' in the
logs is the generator's, in nats a masked token; checkpoints are ranked by 'val_discriminator_loss'.
"""

import dataclasses

from experiments import cli
from lm import checkpoint, loop, optim, pretrain_encoder
from lm.data import loader
from lm.losses import rtd
from lm.models import electra, encoder


def pair(layers: int, embed: int, divisor: int, token_embed: int = 0) -> electra.Config:
  """A discriminator and a generator as deep and 1 / divisor as wide; heads of 64 in both (run_pretraining.py)."""
  network = lambda width: encoder.Config(
      layers=layers, embed=width, heads=max(1, width // 64), mlp=4 * width, token_embed=token_embed or embed,
      activation='gelu_erf')
  return electra.Config(generator=network(embed // divisor), discriminator=network(embed))


def recipe(model: electra.Config, lr: float, batch: int, length: int, steps: int, rate: float = 0.15
           ) -> pretrain_encoder.Replaced:
  return pretrain_encoder.Replaced(
      model=model, loss=rtd.Config(rate=rate),
      data=loader.Config(packing='electra_pairs', length=length, batch=batch),
      optim=optim.Config(name='adam_no_bias_correction', lr=lr, schedule='electra_linear', warmup=10_000, steps=steps,
                         b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01),
      loop=loop.Config(eval_every=5000), checkpoint=checkpoint.Config(every=5000, metric='val_discriminator_loss'))


def electra_small() -> pretrain_encoder.Replaced:
  """12 layers of 256, generator of 64; 128 rows of 128 tokens, lr 5e-4, 1M steps."""
  return recipe(pair(12, 256, 4, token_embed=128), lr=5e-4, batch=128, length=128, steps=1_000_000)


def electra_base() -> pretrain_encoder.Replaced:
  """12 layers of 768, generator of 256; 256 rows of 512 tokens, lr 2e-4, 766k steps."""
  return recipe(pair(12, 768, 3), lr=2e-4, batch=256, length=512, steps=766_000)


def electra_large() -> pretrain_encoder.Replaced:
  """24 layers of 1024, generator of 256; 2,048 rows of 512 tokens, a quarter of them masked, lr 2e-4, 400k steps."""
  return recipe(pair(24, 1024, 4), lr=2e-4, batch=2048, length=512, steps=400_000, rate=0.25)


def electra_cpu() -> pretrain_encoder.Replaced:
  """4 layers of 192, generator of 64, 2.9M parameters in all; English and Chinese, minutes on two CPU cores."""
  c = electra_small()
  network = lambda width, heads: encoder.Config(
      vocab=4096, length=128, layers=4, embed=width, heads=heads, head_dim=32, mlp=4 * width, token_embed=192,
      activation='gelu_erf', scan_layers=False)
  return dataclasses.replace(
      c, model=electra.Config(generator=network(64, 2), discriminator=network(192, 6)),
      data=loader.Config(packing='electra_pairs', length=128, batch=16),
      optim=dataclasses.replace(c.optim, lr=1e-3, warmup=100, steps=1500, b2=0.98),
      loop=loop.Config(eval_every=500), checkpoint=checkpoint.Config(every=500, metric='val_discriminator_loss'))


CONFIGS = (electra_small, electra_base, electra_large, electra_cpu)

if __name__ == '__main__':
  cli.main(__doc__, CONFIGS, pretrain_encoder.task)
