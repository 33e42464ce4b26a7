r"""BERT (Devlin et al. 2018, arXiv:1810.04805): masked words and next sentences.

  python -m scripts.prepare_corpus --corpus=web_bible,sanguo --out=corpora
  python -m scripts.train_tokenizer --vocab=4096 --out=corpora/encoder.model \
      --text=corpora/web_bible.jsonl,corpora/sanguo.jsonl --control_symbols='[CLS],[SEP],[MASK]'
  python -m experiments.bert --config=bert_cpu --workdir=runs/bert --set data.tokenizer=corpora/encoder.model \
      --set "data.corpus=('corpora/web_bible.jsonl','corpora/sanguo.jsonl')"
  python -m experiments.bert --config=bert_base --describe

Published: bert_base 110,106,428 parameters with both heads (uncased), masked-word perplexity 3.99 (paper, table 6).
Recipe: google-research/bert. Static masks in ten copies of the corpus, Adam without bias correction, a linear decay
that is counted from step 0 and so drops at the end of the warm-up, GELU by its tanh approximation.

Difference: every step has rows of 512 tokens, where BERT trained nine steps in ten on rows of 128 to save time.
"""

import dataclasses

from experiments import cli
from lm import checkpoint, config, loop, optim, pretrain_encoder
from lm.data import loader
from lm.losses import mlm
from lm.models import encoder


def bert_base() -> pretrain_encoder.Masked:
  """12 layers of 768; 256 rows of 512 tokens, lr 1e-4, 1M steps."""
  return pretrain_encoder.Masked(
      model=encoder.Config(), nsp=True,
      loss=mlm.Config(static=True, max_predictions=77),
      data=loader.Config(packing='bert_pairs', length=512, batch=256),
      optim=optim.Config(name='adam_no_bias_correction', lr=1e-4, schedule='bert_linear', warmup=10_000,
                         steps=1_000_000, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01),
      loop=loop.Config(eval_every=5000), checkpoint=checkpoint.Config(every=5000))


def bert_large() -> pretrain_encoder.Masked:
  """24 layers of 1024, 336,226,108 parameters; BERT-base's recipe."""
  return config.replace(bert_base(), model__layers=24, model__embed=1024, model__heads=16, model__mlp=4096)


def bert_cpu() -> pretrain_encoder.Masked:
  """4 layers of 192, 2.7M parameters, English and Chinese, minutes on two CPU cores; dynamic masks."""
  c = bert_base()
  return dataclasses.replace(
      c, model=encoder.Config(vocab=4096, length=128, layers=4, embed=192, heads=6, head_dim=32, mlp=768,
                              scan_layers=False),
      loss=mlm.Config(),
      data=loader.Config(packing='bert_pairs', length=128, batch=16, copies=2),
      optim=dataclasses.replace(c.optim, lr=1e-3, warmup=100, steps=1500, b2=0.98),
      loop=loop.Config(eval_every=500), checkpoint=checkpoint.Config(every=500))


CONFIGS = (bert_base, bert_large, bert_cpu)

if __name__ == '__main__':
  cli.main(__doc__, CONFIGS, pretrain_encoder.task)
