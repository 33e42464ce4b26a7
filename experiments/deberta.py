r"""DeBERTa v1, v2 (He et al. 2020, arXiv:2006.03654) and v3 (2021, arXiv:2111.09543): contents and positions apart.

  python -m experiments.deberta --config=deberta_cpu --workdir=runs/deberta --set data.tokenizer=corpora/encoder.model \
      --set "data.corpus=('corpora/web_bible.jsonl','corpora/sanguo.jsonl')"
  python -m experiments.deberta --config=deberta_v3_base --describe

(Corpora and tokenizer: see experiments/bert.py.) Published, parameters without heads: base 138,601,728, large
405,163,008, xlarge 757,804,032; v2 xlarge 884,593,152, xxlarge 1,564,549,632; v3 discriminators xsmall 70,682,112,
small 141,304,320, base 183,831,552, large 434,012,160. With BERT's data and batch, base reaches MNLI 86.3 / 86.2 (table
2).

Recipe: microsoft/DeBERTa. v1: masks of n-grams; the enhanced mask decoder (absolute positions enter just before the
words are predicted, in pretraining only). v2: 128,100 tokens, logarithmic buckets, positions projected by the contents'
matrices, a convolution beside layer 1. v3: ELECTRA's objective with a generator as wide and half as deep, all chosen
tokens masked, detection x 10 (the code; the paper says 50), embeddings shared without their gradients (model.sharing:
'gdes', 'tied' or 'untied'), each network's gradient clipped by its own norm.

Differences: v3's networks step at once, where the code steps the generator first, so that the discriminator sees
embeddings one step older; the scripts give no learning rate for v3 small, it has base's.
"""

import dataclasses

from experiments import cli
from lm import checkpoint, config, loop, optim, pretrain_encoder
from lm.data import loader
from lm.models import deberta, deberta_pair

V3 = {'vocab': 128100, 'buckets': 256, 'shared': True, 'key_bias': True, 'relative_norm': True}
V2 = V3 | {'conv': 3, 'conv_activation': 'gelu_erf'}
CPU = {'vocab': 4096, 'length': 128, 'relative': 128, 'scan_layers': False}
ADAM = optim.Config(name='adam_no_bias_correction', schedule='bert_linear', warmup=10_000, steps=1_000_000, b1=0.9,
                    b2=0.999, eps=1e-6, weight_decay=0.01)


def model(layers: int, embed: int, heads: int, **changes) -> deberta.Config:
  return deberta.Config(**{'layers': layers, 'embed': embed, 'heads': heads, 'head_dim': embed // heads,
                           'mlp': 4 * embed} | changes)


def recipe(shape: deberta.Config, lr: float) -> pretrain_encoder.Disentangled:
  return pretrain_encoder.Disentangled(
      model=shape, data=loader.Config(packing='full_sentences', length=shape.length, batch=2048),
      optim=dataclasses.replace(ADAM, lr=lr),
      loop=loop.Config(eval_every=5000), checkpoint=checkpoint.Config(every=5000))


def recipe_v3(layers: int, embed: int, heads: int, lr: float = 1e-4, batch: int = 256, **changes
              ) -> pretrain_encoder.DisentangledReplaced:
  pair = deberta_pair.Config(generator=model(layers // 2, embed, heads, **V3 | changes),
                             discriminator=model(layers, embed, heads, **V3 | changes))
  return pretrain_encoder.DisentangledReplaced(
      model=pair, data=loader.Config(packing='full_sentences', length=pair.generator.length, batch=batch),
      optim=dataclasses.replace(ADAM, lr=lr, networks=('^generator/', '^discriminator/')),
      loop=loop.Config(eval_every=5000), checkpoint=checkpoint.Config(every=5000, metric='val_discriminator_loss'))


def deberta_base() -> pretrain_encoder.Disentangled:
  """12 layers of 768; 2,048 rows of 512 tokens, lr 2e-4, 1M steps."""
  return recipe(model(12, 768, 12), lr=2e-4)


def deberta_large() -> pretrain_encoder.Disentangled:
  """24 layers of 1024; lr 2e-4."""
  return recipe(model(24, 1024, 16), lr=2e-4)


def deberta_xlarge() -> pretrain_encoder.Disentangled:
  """48 layers of 1024; lr 1.5e-4."""
  return recipe(model(48, 1024, 16), lr=1.5e-4)


def deberta_v2_xlarge() -> pretrain_encoder.Disentangled:
  """v2: 24 layers of 1536."""
  return recipe(model(24, 1536, 24, **V2), lr=1.5e-4)


def deberta_v2_xxlarge() -> pretrain_encoder.Disentangled:
  """v2: 48 layers of 1536, the paper's 1.5B."""
  return recipe(model(48, 1536, 24, **V2), lr=1.5e-4)


def deberta_v3_xsmall() -> pretrain_encoder.DisentangledReplaced:
  """v3: 12 layers of 384; 64 rows of 512 tokens, lr 3e-4."""
  return recipe_v3(12, 384, 6, lr=3e-4, batch=64)


def deberta_v3_small() -> pretrain_encoder.DisentangledReplaced:
  """v3: 6 layers of 768; 256 rows, lr 1e-4."""
  return recipe_v3(6, 768, 12)


def deberta_v3_base() -> pretrain_encoder.DisentangledReplaced:
  """v3: 12 layers of 768; 256 rows, lr 1e-4."""
  return recipe_v3(12, 768, 12)


def deberta_v3_large() -> pretrain_encoder.DisentangledReplaced:
  """v3: 24 layers of 1024; 256 rows, lr 1e-4."""
  return recipe_v3(24, 1024, 16)


def deberta_cpu() -> pretrain_encoder.Disentangled:
  """v1 at 4 layers of 192, 3.0M parameters; English and Chinese, minutes on two CPU cores."""
  return _small(recipe(model(4, 192, 6, **CPU), lr=1e-3))


def deberta_v2_cpu() -> pretrain_encoder.Disentangled:
  """v2 at the size of deberta_cpu."""
  return _small(recipe(model(4, 192, 6, **V2 | CPU | {'buckets': 32}), lr=1e-3))


def deberta_v3_cpu() -> pretrain_encoder.DisentangledReplaced:
  """v3 at the size of deberta_cpu, with a generator of 2 layers."""
  return _small(recipe_v3(4, 192, 6, lr=1e-3, **CPU, buckets=32))


def _small(c):
  return config.replace(c, data__batch=16, optim__warmup=100, optim__steps=1500, optim__b2=0.98,
                        loop__eval_every=500, checkpoint__every=500)


CONFIGS = (deberta_base, deberta_large, deberta_xlarge, deberta_v2_xlarge, deberta_v2_xxlarge, deberta_v3_xsmall,
           deberta_v3_small, deberta_v3_base, deberta_v3_large, deberta_cpu, deberta_v2_cpu, deberta_v3_cpu)

if __name__ == '__main__':
  cli.main(__doc__, CONFIGS, pretrain_encoder.task)
