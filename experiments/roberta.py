r"""RoBERTa (Liu et al. 2019, arXiv:1907.11692): BERT's model, trained longer on full rows, with new masks every time.

  python -m experiments.roberta --config=roberta_cpu --workdir=runs/roberta --set data.tokenizer=corpora/encoder.model \
      --set "data.corpus=('corpora/web_bible.jsonl','corpora/sanguo.jsonl')"
  python -m experiments.roberta --config=roberta_base --describe

(Corpora and tokenizer: see experiments/bert.py.) Published: roberta_base 124,697,433 parameters with the head; with
2,000 rows a batch, 125k steps, masked-word perplexity 3.68 (table 3). Recipe: fairseq. FULL-SENTENCES rows, no next
sentence, dynamic masks, Adam with bias correction, beta2 .98, no clipping, linear decay to 0 after the warm-up.
"""

import dataclasses

from experiments import cli
from lm import checkpoint, config, loop, optim, pretrain_encoder
from lm.data import loader
from lm.losses import mlm
from lm.models import encoder


def roberta_base() -> pretrain_encoder.Masked:
  """12 layers of 768; 8,192 rows of 512 tokens, lr 6e-4, 500k steps."""
  return pretrain_encoder.Masked(
      model=encoder.Config(vocab=50265, offset=2, types=1, activation='gelu_erf', norm_eps=1e-5),
      loss=mlm.Config(counts='roberta'),
      data=loader.Config(packing='full_sentences', length=512, batch=8192),
      optim=optim.Config(lr=6e-4, schedule='linear', warmup=24_000, steps=500_000, b1=0.9, b2=0.98, eps=1e-6,
                         weight_decay=0.01, clip=0.0),
      loop=loop.Config(eval_every=1000), checkpoint=checkpoint.Config(every=1000))


def roberta_large() -> pretrain_encoder.Masked:
  """24 layers of 1024, 355,412,057 parameters; lr 4e-4."""
  return config.replace(roberta_base(), model__layers=24, model__embed=1024, model__heads=16, model__mlp=4096,
                        optim__lr=4e-4, optim__warmup=30_000)


def roberta_cpu() -> pretrain_encoder.Masked:
  """4 layers of 192, 2.6M parameters, English and Chinese, minutes on two CPU cores."""
  c = roberta_base()
  return dataclasses.replace(
      c, model=dataclasses.replace(c.model, vocab=4096, length=128, layers=4, embed=192, heads=6, head_dim=32, mlp=768,
                                   scan_layers=False),
      data=loader.Config(packing='full_sentences', length=128, batch=16),
      optim=dataclasses.replace(c.optim, lr=1e-3, warmup=100, steps=1500),
      loop=loop.Config(eval_every=500), checkpoint=checkpoint.Config(every=500))


CONFIGS = (roberta_base, roberta_large, roberta_cpu)

if __name__ == '__main__':
  cli.main(__doc__, CONFIGS, pretrain_encoder.task)
