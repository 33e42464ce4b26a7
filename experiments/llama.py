r"""Llama-2 (Touvron et al. 2023, arXiv:2307.09288), Llama-3 (arXiv:2407.21783) and SmolLM2 (arXiv:2502.02737).

  python -m experiments.llama --config=smollm2_135m --set data.corpus=CORPUS --set data.tokenizer=DIR \
      --workdir=runs/smol
  python -m experiments.llama --config=smollm2_135m --set init_from=$MODEL --set data.tokenizer=$MODEL ...  # go on from
      # MODEL=SmolLM2-135M-Instruct.Q4_1.gguf, or from a Hugging Face folder
  python -m experiments.llama --config=llama2_70b --describe

Llama-3 masks attention across documents, so data.isolate is on there. Its warm-up and batch at 8B were never published:
the config takes those of 405B's first stage. SmolLM2 is pretrained with rope_theta 1e4 at 2,048 tokens, which is this
config; the released weights went through a long-context phase (theta 1e5), which `init_from` needs set by hand:
--set model.rope_theta=100000.0.
"""

from experiments import cli
from lm import checkpoint, config, loop, optim, pretrain, sharding
from lm.data import loader
from lm.models import decoder


def model(layers: int, embed: int, heads: int, kv_heads: int, mlp: int, vocab: int, length: int,
          **changes) -> decoder.Config:
  """Rotary positions, RMSNorm 1e-5, SwiGLU, no biases, untied; heads of embed / heads dimensions."""
  return decoder.Config(**{
      'layers': layers, 'embed': embed, 'heads': heads, 'kv_heads': kv_heads, 'head_dim': embed // heads, 'mlp': mlp,
      'vocab': vocab, 'length': length, 'positions': 'rotary', 'norm': 'rms', 'norm_bias': False,
      'activation': 'swiglu', 'bias': False, 'tied': False, 'dtype': 'bfloat16', 'remat': 'full'} | changes)


def llama(shape: decoder.Config, lr: float, rows: int, steps: int, warmup: int = 2000, final: float = 0.1,
          isolate: bool = False) -> pretrain.Config:
  """AdamW (.9, .95), eps 1e-5, decay 0.1, clip 1, cosine to `final` of the peak."""
  return pretrain.Config(
      model=shape, data=loader.Config(length=shape.length, batch=rows, isolate=isolate),
      optim=optim.Config(lr=lr, min_lr=final * lr, schedule='cosine', warmup=warmup, steps=steps, eps=1e-5,
                         weight_decay=0.1),
      loop=loop.Config(eval_every=1000), checkpoint=checkpoint.Config(every=1000))


def llama2_7b() -> pretrain.Config:
  """6,738,415,616 parameters; 2T tokens, 4M a step, lr 3e-4."""
  return llama(model(32, 4096, 32, 32, 11008, 32000, 4096), lr=3e-4, rows=1024, steps=476_837)


def llama2_13b() -> pretrain.Config:
  """13,015,864,320 parameters; 2T tokens, 4M a step, lr 3e-4."""
  return llama(model(40, 5120, 40, 40, 13824, 32000, 4096), lr=3e-4, rows=1024, steps=476_837)


def llama2_70b() -> pretrain.Config:
  """68,976,648,192 parameters, 8 key/value heads; 2T tokens, 4M a step, lr 1.5e-4."""
  return llama(model(80, 8192, 64, 8, 28672, 32000, 4096), lr=1.5e-4, rows=1024, steps=476_837)


def llama2_70b_v5p() -> pretrain.Config:
  """llama2_70b on 64 TPU v5p, --target=v5p:4x4x4: fsdp 16 x tensor 4."""
  return config.replace(llama2_70b(), mesh=sharding.Config(fsdp=16, tensor=4), optim__microbatches=32)


def llama3_8b() -> pretrain.Config:
  """8,030,261,248 parameters, rope_theta 5e5; 15T tokens, documents isolated, lr 3e-4."""
  return llama(model(32, 4096, 32, 8, 14336, 128256, 8192, rope_theta=5e5), lr=3e-4, rows=512, steps=3_576_278,
               warmup=8000, final=0.01, isolate=True)


def smollm2_135m() -> pretrain.Config:
  """134,515,008 parameters, tied; 2M steps of 1M tokens, lr 3e-3 flat for 1.6M steps, then linear to 0."""
  std = 576**-0.5
  shape = model(30, 576, 9, 3, 1536, 49152, 2048, tied=True,
                init=decoder.Init(std=std, tokens=std, positions=std, residual=std))
  return pretrain.Config(
      model=shape, data=loader.Config(length=2048, batch=512),
      optim=optim.Config(lr=3e-3, schedule='wsd', warmup=2000, steps=2_000_000, decay_steps=400_000, weight_decay=0.01),
      loop=loop.Config(eval_every=1000), checkpoint=checkpoint.Config(every=2000))


CONFIGS = (llama2_7b, llama2_13b, llama2_70b, llama2_70b_v5p, llama3_8b, smollm2_135m)

if __name__ == '__main__':
  cli.main(__doc__, CONFIGS, pretrain.task)
