"""Whole iterations of PPO, here or by TRL's PPOTrainer on PyTorch: the worker of
`python -m scripts.bench_rlhf --part=ppo`, which is what to run.

Both sides hold a policy and a value model of its own that train in full, and a frozen reference and reward model; all
four are the decoder of --model, a value and a score are one linear head on it (random, or 0); with --set value=shared
this package's value is a head on the policy, which leaves out one of the two trained trunks. An iteration draws
--max_new tokens to each of --batch prompts at temperature 1 without stopping, scores the rows, takes log-probabilities,
reference and values, and makes --epochs x --minibatches updates. f32, no dropout, AdamW without decay or clipping, the
losses' constants as TRL has them (its defaults and ours are the same).

This package's is the step of a run of `lm.reinforce`: texts go through the host, where a reward function takes them.
The words of this benchmark's texts are the numbers of ids, so that what is scored are the tokens that were drawn.
TRL's is one call of `train` for so many episodes; it takes the policy's log-probabilities from the logits of
`generate`, which it keeps, and this package its sampler's likewise (--set rollout.logprobs=model asks the policy once
more). TRL also collects Python's garbage twice in an iteration, some half a second in all; this package looks at the
gradient's norm, and whether it is finite.

Reads how many iterations to take from stdin, a line each time, and answers with a line of JSON: {'seconds', 'drawn'
(those of them until all responses were there), 'peak' (bytes)}; first a line when it is ready. --side=random writes a
decoder of --shape to --model.
"""

import contextlib
import dataclasses
import io
import os
import tempfile
import time
import warnings

from absl import flags
import numpy as np

from experiments import cli
from lm import bench
from lm.errors import ConfigError

_SIDE = flags.DEFINE_enum('side', 'lm', ['lm', 'trl', 'random'], 'Whose iterations.')
_MODEL = flags.DEFINE_string('model', '', 'The decoder; of --side=trl a Hugging Face folder.')
_SHAPE = flags.DEFINE_string('shape', '12x512x16384', 'Layers, width and vocabulary of --side=random.')
_BATCH = flags.DEFINE_integer('batch', 16, 'Prompts of an iteration.', lower_bound=1)
_PROMPT = flags.DEFINE_integer('prompt_length', 32, 'Tokens of each prompt.', lower_bound=1)
_MAX_NEW = flags.DEFINE_integer('max_new', 32, 'New tokens of each prompt.', lower_bound=2)
_EPOCHS = flags.DEFINE_integer('epochs', 2, 'Passes over the responses.', lower_bound=1)
_MINIBATCHES = flags.DEFINE_integer('minibatches', 2, 'Updates in a pass.', lower_bound=1)
_SET = flags.DEFINE_multi_string('set', [], 'Changes to the config of --side=lm.')
_LR = 1e-6


def main(_: list[str]) -> None:
  if _SIDE.value == 'random':
    _random()
    return
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    iterate, facts = {'lm': _ours, 'trl': _theirs}[_SIDE.value](folder, stack)
    bench.serve(lambda n: {'drawn': sum(iterate() for _ in range(n))}, **facts)


class Numbers:
  """A tokenizer whose text of ids is the numbers themselves."""

  kind = 'numbers'

  def decode(self, ids) -> str:
    return ' '.join(map(str, ids))

  def encode(self, text: str) -> list[int]:
    return [int(word) for word in text.split()]


def make_config(model):
  """What this package trains."""
  from lm import config, optim, peft, policy
  from lm.data import prompts
  from lm.losses import ppo

  updates = _EPOCHS.value * _MINIBATCHES.value
  c = policy.PPO(
      model=config.replace(model, scan_layers=False), value='separate', peft=peft.Config('full', train=''),
      loss=ppo.Config(chunk=512), data=prompts.Config(template='none', length=_PROMPT.value, batch=_BATCH.value),
      rollout=policy.Rollout(_MAX_NEW.value, end=False, epochs=_EPOCHS.value, minibatches=_MINIBATCHES.value,
                             logprobs='sampler'),
      optim=optim.Config(lr=_LR, schedule='constant', steps=updates, b2=0.999, weight_decay=0.0, clip=0.0))
  return config.override(c, *_SET.value)


def flops(c):
  """What an iteration of `c` takes: rows are drawn, asked of reference, value and reward model, and learnt from."""
  from lm import budget, policy

  length, specs = _PROMPT.value + _MAX_NEW.value, policy.base_specs(c)
  words, trunk = (budget.training_flops(specs, c.model.heads * c.model.head_dim, c.model.layers, length, share).total
                  for share in (_MAX_NEW.value / length, 0))  # of a token, forward and backward; forward is a third
  learnt = words + (trunk if c.value == 'separate' else 0)
  return _BATCH.value * length * ((2 * words + 2 * trunk) / 3 + _EPOCHS.value * learnt)


def _ids(vocab):
  return np.random.default_rng(0).integers(vocab // 100, vocab, (_BATCH.value, _PROMPT.value))


def _random():
  import jax

  from lm import params
  from lm.models import decoder, hf, published

  sizes = _SHAPE.value.split('x')
  if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
    raise ConfigError(f'--shape={_SHAPE.value}; expected layers x width x vocabulary, such as 12x512x16384')
  layers, D, V = map(int, sizes)
  heads = max(1, D // 64)
  c = published.smollm2_135m(vocab=V, layers=layers, embed=D, heads=heads, kv_heads=heads, head_dim=D // heads,
                             mlp=8 * D // 3)
  hf.save(_MODEL.value, c, jax.device_get(params.init(decoder.specs(c), jax.random.key(0))))


def _ours(folder, stack):
  """(() -> seconds until all was drawn, of an iteration of this package; what both sides' iterations take)."""
  import jax

  from lm import loop, reinforce, run, sharding, train, weights
  from lm.data import prompts

  model, p, *_ = weights.load(_MODEL.value)
  c, called = make_config(model), []
  score = _scorer(c, p)

  def reward(records, responses):
    called.append(time.perf_counter())
    return score([f'{record.prompt} {said}' for record, said in zip(records, responses, strict=True)])

  task = reinforce.task(c, reward)
  parts, words, ids_BP = run.build(c, task), Numbers(), _ids(c.model.vocab).astype(np.int32)
  rows = prompts.Prompts(ids_BP, np.ones_like(ids_BP), np.arange(_BATCH.value, dtype=np.int32))
  data = prompts.Data(c.data, 0, words, {'train': rows}, None,
                      records=tuple(prompts.Record(words.decode(row)) for row in ids_BP.tolist()))
  stack.enter_context(sharding.use(parts.mesh))
  rows = jax.device_put(rows, sharding.batch_sharding(parts.mesh))
  grown = lambda p, key: task.base.graft(p, task.specs, key)
  begin = lambda p, key: train.state_of(grown(p, key), parts.tx, parts.trainable, task.around.carry)
  state = jax.jit(begin, out_shardings=parts.state)(p, jax.random.key(0))
  bare = loop.Program(*(None for _ in dataclasses.fields(loop.Program)))  # a policy's run has a step of its own
  bare = dataclasses.replace(bare, learning_rate=lambda updates: _LR)
  step, key = stack.enter_context(task.around.program(bare, parts, data, folder, 0)).step, jax.random.key(1)

  def iterate():
    nonlocal state
    start = time.perf_counter()
    state, metrics = step(state, rows, key)
    jax.block_until_ready((state, metrics))
    return called[-1] - start
  return iterate, {'flops': {'lm': flops(c), 'trl': flops(dataclasses.replace(c, value='separate'))}}


def _scorer(c, p):
  """Texts of all rows -> their scores, f32 [B], by the decoder `p` with a random head."""
  import jax

  from lm import peft, reward_model
  from lm.data import packing, preferences
  from lm.losses import reward

  length = _PROMPT.value + _MAX_NEW.value
  c = reward_model.Decoder(model=c.model, peft=c.peft, data=preferences.Config(length=length, batch=_BATCH.value))
  p = jax.jit(lambda p, key: peft.graft(p, reward_model.task(c).specs, key))(p, jax.random.key(2))
  words = Numbers()
  score = jax.jit(reward_model.RewardModel(c, p, words, reward.Affine()).score)

  def scores(texts):
    ids_BT = np.array([words.encode(text) for text in texts], np.int32)
    ones_BT = np.ones_like(ids_BT)
    positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), ids_BT.shape)
    return jax.device_get(score(p, packing.Batch(ids_BT, ones_BT, positions_BT, ones_BT > 0)))
  return scores


def _theirs(folder, stack):
  """(() -> seconds until all was drawn, of an iteration of TRL; nothing)."""
  del stack
  os.environ['TRL_EXPERIMENTAL_SILENCE'] = '1'
  import torch
  import transformers as hf
  from trl.experimental import ppo
  from trl.experimental.ppo import ppo_trainer

  warnings.simplefilter('ignore')
  hf.logging.set_verbosity_error()
  hf.logging.disable_progress_bar()
  bench.start_torch()
  load = lambda kind, **sizes: kind.from_pretrained(_MODEL.value, dtype=torch.float32, **sizes)
  policy, reference = (load(hf.AutoModelForCausalLM) for _ in range(2))
  value, scorer = (load(hf.AutoModelForSequenceClassification, num_labels=1) for _ in range(2))
  vocab, drawn = policy.config.vocab_size, []
  generate = ppo_trainer.batch_generation

  def timed(*args):
    found = generate(*args)
    drawn.append(time.perf_counter())
    assert found[0].shape == (_BATCH.value, _PROMPT.value + _MAX_NEW.value)
    return found

  ppo_trainer.batch_generation = timed
  batch = _BATCH.value  # in one piece: with gradient_accumulation_steps TRL would update once for all minibatches
  args = ppo.PPOConfig(
      output_dir=folder, per_device_train_batch_size=batch, gradient_accumulation_steps=1, total_episodes=batch,
      local_rollout_forward_batch_size=batch, num_ppo_epochs=_EPOCHS.value, num_mini_batches=_MINIBATCHES.value,
      response_length=_MAX_NEW.value, temperature=1.0, num_sample_generations=0, learning_rate=_LR, weight_decay=0.0,
      lr_scheduler_type='constant', gradient_checkpointing=False, bf16=False, use_cpu=not bench.on_gpu(),
      report_to='none', save_strategy='no', disable_tqdm=True)
  nothing = type('Nothing', (), {'pad_token_id': vocab, 'eos_token_id': vocab})()  # ids that are never drawn
  trainer = ppo.PPOTrainer(
      args, nothing, policy, reference, scorer, [{'input_ids': row} for row in _ids(vocab).tolist()], value,
      data_collator=lambda rows: {'input_ids': torch.tensor([row['input_ids'] for row in rows])})

  def iterate():
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # its log; the answers have stdout
      trainer.train()
    return drawn[-1] - start
  return iterate, {}


if __name__ == '__main__':
  cli.guard(main, __doc__)
