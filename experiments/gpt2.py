r"""GPT-2 (Radford et al. 2019) and its reproductions: nanoGPT (Karpathy) and llm.c.

  python -m scripts.prepare_corpus --corpus=web_bible,sanguo --out=corpora
  python -m scripts.train_tokenizer --vocab=4096 --validation_fraction=0.05 --out=corpora/my.model \
      --text=corpora/web_bible.jsonl,corpora/sanguo.jsonl
  python -m experiments.gpt2 --config=quickstart --workdir=runs/quickstart \
      --set "data.corpus=('corpora/web_bible.jsonl','corpora/sanguo.jsonl')" --set data.tokenizer=corpora/my.model
  python -m experiments.gpt2 --config=shakespeare_char_cpu --set data.corpus=tinyshakespeare.txt \
      --workdir=runs/shakespeare
  python -m experiments.gpt2 --config=gpt2_124m --describe

Published: shakespeare_char_cpu, validation loss 1.88 after 2,000 steps (nanoGPT's README, a 20-batch estimate; its
model gives 1.91 on the whole split); shakespeare_char_gpu 1.4697; gpt2_124m on FineWeb 10B 3.29 (llm.c); nanogpt_124m
on OpenWebText 2.85. What we measured, and on which machine, is in experiments/README.md.

GPT-2's own learning rate and number of steps were never published: the gpt2_* configs follow llm.c.
"""

import dataclasses

from experiments import cli
from lm import checkpoint, config, loop, nn, optim, pretrain
from lm.data import loader
from lm.models import decoder


def model(layers: int, embed: int, heads: int, **changes) -> decoder.Config:
  """GPT-2's shape rules: heads of embed / heads dimensions, MLP 4 times as wide, residual projections start small."""
  init = decoder.Init(positions=0.01, residual=decoder.residual_std(layers))
  return decoder.Config(**{'layers': layers, 'embed': embed, 'heads': heads, 'kv_heads': heads,
                           'head_dim': embed // heads, 'mlp': 4 * embed, 'init': init} | changes)


def llm_c(shape: decoder.Config, lr: float, steps: int, batch: int, final: float = 0.0) -> pretrain.Config:
  """llm.c's recipe: cosine after 700 warm-up steps, AdamW (.9, .95), decay .1 on matrices, clip 1, bf16, no dropout."""
  return pretrain.Config(
      model=dataclasses.replace(shape, dtype='bfloat16', remat='dots'),
      data=loader.Config(length=1024, batch=batch),
      optim=optim.Config(lr=lr, min_lr=final * lr, schedule='cosine', warmup=700, steps=steps, weight_decay=0.1),
      loop=loop.Config(eval_every=250), checkpoint=checkpoint.Config(every=1000))


def quickstart() -> pretrain.Config:
  """A 2.6M-parameter GPT on English and Chinese text, minutes on two CPU cores."""
  return pretrain.Config(
      model=model(4, 192, 6, vocab=4096, length=128, bias=False, norm_bias=False, scan_layers=False),
      data=loader.Config(length=128, batch=32, isolate=True),
      optim=optim.Config(lr=3e-3, min_lr=3e-4, schedule='cosine', warmup=40, steps=400, b2=0.98),
      loop=loop.Config(eval_every=200), checkpoint=checkpoint.Config(every=100))


def shakespeare_char_cpu() -> pretrain.Config:
  """nanoGPT's CPU run: 0.80M parameters, 2,000 steps of 12 x 64 characters."""
  return pretrain.Config(
      model=model(4, 128, 4, vocab=65, length=64, activation='gelu_erf', bias=False, norm_bias=False, scan_layers=False,
                  init=decoder.Init(residual=decoder.residual_std(4))),
      data=loader.Config(tokenizer='char', split='tail', validation_fraction=0.1, length=64, batch=12),
      optim=optim.Config(lr=1e-3, min_lr=1e-4, schedule='cosine', warmup=100, steps=2000, b2=0.99, weight_decay=0.1),
      loop=loop.Config(eval_every=250, eval_batch=48), checkpoint=checkpoint.Config(every=500), published=1.88)


def shakespeare_char_cpu_modern() -> pretrain.Config:
  """An ablation of the CPU run: Muon at a higher rate, rotary positions, RMSNorm, SwiGLU; 1% fewer parameters."""
  c = shakespeare_char_cpu()
  shape = dataclasses.replace(c.model, positions='rotary', norm='rms', activation='swiglu', mlp=341)
  return config.replace(c, model=shape, optim__name='muon', optim__lr=1e-2, published=None)


def shakespeare_char_gpu() -> pretrain.Config:
  """nanoGPT's GPU run: 10.7M parameters, 5,000 steps of 64 x 256 characters; overfits, so the best step is kept."""
  c = shakespeare_char_cpu()
  return config.replace(
      c, model=model(6, 384, 6, vocab=65, length=256, activation='gelu_erf', bias=False, norm_bias=False,
                     dtype='bfloat16', dropout=nn.Dropout(0.2, 0.2, 0.2),
                     init=decoder.Init(residual=decoder.residual_std(6))),
      data__length=256, data__batch=64, loop__eval_batch=0, optim__steps=5000, published=1.4697)


def gpt2_124m() -> pretrain.Config:
  """GPT-2 small, 124,439,808 parameters; llm.c's 10B-token recipe."""
  return llm_c(model(12, 768, 12), lr=6e-4, steps=18_865, batch=512)


def gpt2_355m() -> pretrain.Config:
  """GPT-2 medium, 354,823,168 parameters; llm.c's recipe."""
  return llm_c(model(24, 1024, 16), lr=3e-4, steps=60_000, batch=512)


def gpt2_774m() -> pretrain.Config:
  """GPT-2 large, 774,030,080 parameters; llm.c's recipe."""
  return llm_c(model(36, 1280, 20), lr=2.5e-4, steps=286_102, batch=512)


def gpt2_1558m() -> pretrain.Config:
  """GPT-2 XL, 1,557,611,200 parameters; llm.c's recipe: a million tokens a step, cosine to a tenth."""
  return llm_c(model(48, 1600, 25), lr=6e-4, steps=32_000, batch=1024, final=0.1)


def nanogpt_124m() -> pretrain.Config:
  """nanoGPT's GPT-2 124M: no biases, 491,520 tokens a step for 600,000 steps, cosine to a tenth."""
  c = llm_c(model(12, 768, 12, bias=False, norm_bias=False, activation='gelu_erf',
                  init=decoder.Init(residual=decoder.residual_std(12))), lr=6e-4, steps=600_000, batch=480)
  return config.replace(c, optim__warmup=2000, optim__min_lr=6e-5, published=2.85)


CONFIGS = (quickstart, shakespeare_char_cpu, shakespeare_char_cpu_modern, shakespeare_char_gpu, gpt2_124m, gpt2_355m,
           gpt2_774m, gpt2_1558m, nanogpt_124m)

if __name__ == '__main__':
  cli.main(__doc__, CONFIGS, pretrain.task)
