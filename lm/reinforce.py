"""Policy training around the optimizer's step: draw responses, have them judged, learn from them, evaluate.

The program of `lm.run` becomes one whose step is an iteration: responses to a batch of prompts (one jitted
program), their scores (a plain function of texts, on the host), experience (another program), and then several
optimizer steps on it. Everything in an iteration follows from the state, the prompts and the seed, so a run that is
killed in the middle of one and resumed draws the same again. Shapes: B prompts or rows.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import (
  budget,
  decode,
  experience,
  hosts,
  logs,
  loop,
  monitor,
  peft,
  policy,
  reward_model,
  rewards,
  rollout,
  run,
  samples,
  sharding,
  train,
)
from lm.data import loader, prompts
from lm.errors import ConfigError
from lm.kernels import attention
from lm.models import decoder
from lm.text import chat, tokenizer as tokenizers, vocabulary

METRICS = tuple(f'val_{name}' for name in ('score', 'score_std', 'score_se', 'kl', 'entropy', 'reference_nll', 'length',
                                           'ended'))
_DRAWN = 2**31  # folded into the step's key, where updates fold in their number
_EVALUATION = 4  # folded into the run's key, beside those that other parts of a run fold in


class Drawn(NamedTuple):
  """What the host sees of a rollout: the responses as texts, whether they ended, their lengths, their prompts."""

  texts: list[str]
  ended_B: np.ndarray
  lengths_B: np.ndarray
  index_B: np.ndarray


def task(c: policy.Config, reward: Callable[..., Any], held_out: Callable[..., Any] | None = None,
         attend: Callable[..., jax.Array] = attention.attend) -> run.Task:
  """The policy of `c.model` under `c.loss`.

  Args:
    reward: (records, responses) -> a number each, see `lm.rewards`. If it has a `load`, that is called first.
    held_out: another such function, which is only looked at: does it rise as well?
  """
  tree = policy.specs(c)
  flops = budget.training_flops(policy.base_specs(c), c.model.heads * c.model.head_dim, c.model.layers,
                                c.data.length + c.rollout.new_tokens)
  forward, learnt = c.passes
  times, update = learnt * c.rollout.epochs * c.kept / c.rows, peft.step_flops(c.peft, flops, c.model.layers)
  if isinstance(c, policy.PPO) and c.text.corpus:
    times += c.updates * c.text.batch * c.text.length / (c.rows * (c.data.length + c.rollout.new_tokens))
  total = lambda name: getattr(flops, name) * forward / 3 + getattr(update, name) * times  # forward: a third of a step
  flops = budget.Flops(total('matmul'), total('attention'))
  critic = functools.partial(policy.critic, c) if _critic_from(c) else None
  base = run.Base(policy.base_specs(c), policy.freeze(c), policy.graft, critic, policy.policy)
  around = run.Around(
      program=_around(c, experience.learn(c, attend), experience.judge(c, attend), reward, held_out), updates=c.updates,
      tokens=c.rows * (c.data.length + c.rollout.new_tokens),
      metrics=METRICS + (('val_held_out', 'val_held_out_se') if held_out else ()),
      carry={'kl_coef': c.loss.kl.coef} if isinstance(c, policy.PPO) else None)
  source = types.SimpleNamespace(prepare=functools.partial(_prepare, c, reward, held_out), check=prompts.check,
                                 train_batches=prompts.train_batches, eval_batches=prompts.eval_batches)
  return run.Task(tree, experience.loss(c, tree, attend), None, c.model.vocab, flops, source=source, base=base,
                  around=around)


def _prepare(c, reward, held_out, _, folder, seed=0):
  """The prompts; that they are those of an earlier start takes the same text beside them, and the same judges."""
  data = prompts.prepare(c.data, folder, seed)

  def beside():
    said = {name: judge.fingerprint() for name, judge in (('reward', reward), ('held_out', held_out))
            if hasattr(judge, 'fingerprint')}
    if text := _text(c, pathlib.Path(folder).parent, data.tokenizer):
      said['text'] = hashlib.sha256(json.dumps(text.fingerprint, sort_keys=True).encode()).hexdigest()
    return said
  return dataclasses.replace(data, beside=beside)


def _critic_from(c):
  return getattr(c, 'critic_from', '')


def check_judge(c: policy.Config) -> None:
  """Raises ConfigError for a reward model that nobody asks."""
  if c.reward_from and c.reward != 'model':
    raise ConfigError(f"reward_from={c.reward_from} with reward={c.reward!r}; expected reward='model'; set it, or "
                      'held_out_from to look on only')


def judged(c: policy.Config, rules: Mapping[str, rewards.Reward]) -> run.Task:
  """The task whose reward is the rule that `c.reward` names, or a model."""
  reward = reward_model.reward(c.reward_from, 'reward_from') if c.reward == 'model' else rules[c.reward]
  held_out = reward_model.reward(c.held_out_from, 'held_out_from') if c.held_out_from else None
  return task(c, reward, held_out)


def _around(c, learn, judge, reward, held_out):
  """`lm.run.Around.program`."""
  @contextlib.contextmanager
  def wrapped(program: loop.Program, parts: Any, data: prompts.Data, workdir: str | os.PathLike, start: int
              ) -> Iterator[loop.Program]:
    for function in (reward, held_out):
      getattr(function, 'load', lambda: None)()  # before anything is drawn
    _same_ids(c, data.tokenizer)
    draw = _draw(c, parts.mesh, data)
    with contextlib.ExitStack() as stack:
      texts = _texts(c, parts, data.tokenizer, workdir, stack)
      book = stack.enter_context(contextlib.closing(samples.Book(workdir, start)))
      step = _iteration(c, parts, data, draw, learn, reward, texts, program.learning_rate)
      evaluate, shown = _evaluation(c, parts, data, draw, judge, reward, held_out)
      watch = _watch(c, workdir, book, shown)
      yield dataclasses.replace(program, step=step, evaluate=evaluate, watch=watch)
  return wrapped


def _same_ids(c, tokenizer):
  """ConfigError unless the critic read the same ids as the policy does."""
  folder = os.path.join(_critic_from(c), 'tokenizer')
  if _critic_from(c) and vocabulary.pieces(tokenizers.load(folder)) != vocabulary.pieces(tokenizer):
    raise ConfigError(f'critic_from={c.critic_from}: its tokenizer gives other ids than data.tokenizer='
                      f'{c.data.tokenizer}; expected the same; train the reward model with that one')


def _draw(c, mesh, data):
  """(params, prompts, key, group) -> (the rollout, divided over the mesh; `Drawn`, on the host)."""
  stop = chat.stop_ids(c.data.written, data.tokenizer) if c.rollout.end else ()
  model, s, cut = decode.of(decoder, c.model), policy.sampling(c, stop), c.rollout.cut
  # Behind other text: some tokenizers put a space before what begins a text.
  cuts = data.tokenizer.encode(f'0{cut}').tolist()[len(data.tokenizer.encode('0')):] if cut else []
  if cut and len(cuts) != 1:
    raise ConfigError(f'rollout.cut={cut!r} is {len(cuts)} tokens; expected the text of one; choose another')
  rows, same = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  @functools.partial(jax.jit, static_argnums=3, out_shardings=(rows, same))
  def draw(p, prompts, key, group):
    ids_BP, segments_BP = rollout.groups(prompts.ids_NP, prompts.segments_NP, group)
    q = decode.prepare(rollout.gathered(peft.plain(policy.policy(p)), policy.base_specs(c)))
    r = rollout.generate(model, q, ids_BP, segments_BP, s, key)
    r = rollout.truncate(r, cuts, c.rollout.cut_after) if cut else r
    return r, (r.responses_BN, r.ended_B, r.lengths_B, jnp.repeat(prompts.index_N, group))

  def drawn(p, prompts, key, group=1):
    r, seen = draw(p, prompts, key, group)
    ids_BN, ended_B, lengths_B, index_B = jax.device_get(seen)
    said = [chat.parse(c.data.written, ids[:n], data.tokenizer)[0] if stop else chat.continued(ids[:n], data.tokenizer)
            for ids, n in zip(ids_BN, lengths_B, strict=True)]
    return r, Drawn(said, ended_B, lengths_B, index_B)
  return drawn


def _iteration(c, parts, data, draw, learn, reward, texts, rate):
  """(state, prompts, key) -> (state, metrics): of the rollout, and means over the updates; the first one's rate."""
  rows, same = sharding.batch_sharding(parts.mesh), sharding.replicated(parts.mesh)
  learn = jax.jit(learn, out_shardings=(rows, same, same))
  take = jax.jit(lambda made, chosen: jax.tree.map(lambda x: x[chosen], made), out_shardings=rows)

  def iteration(state, prompts, key):
    n, skipped, p = int(state.step), int(state.skipped), train.whole(state)
    mixed = texts(n)
    r, seen = draw(p, prompts, jax.random.fold_in(jax.random.fold_in(key, _DRAWN), n), c.rollout.group)
    scores_B = _asked(reward, [data.records[i] for i in seen.index_B], seen.texts)
    made, stats, carry = learn(p, r, scores_B, state.carry)
    state, updates = state.replace(carry=carry), []
    for epoch in range(c.rollout.epochs):
      order = np.random.default_rng((c.seed, n, epoch)).permutation(c.kept)
      for chosen in np.split(order, c.rollout.minibatches):
        some = take(made, chosen)
        state, metrics = parts.step(state, (some, next(mixed)) if mixed else some, key)
        updates.append(metrics)
      if c.rollout.stop_kl and float(updates[-1]['approx_kl']) > c.rollout.stop_kl:
        break
    means = {k: sum(m[k] for m in updates) / len(updates) for k in updates[0]}
    return state, means | stats | {'score_std': _penalised(c, scores_B, seen.ended_B).std(), 'updates': len(updates),
                                   'learning_rate': rate(n - skipped), 'skipped': updates[-1]['skipped']}
  return iteration


def _asked(reward, records, responses):
  """Their scores, f32; of several processes the first one's, as a reward may draw numbers, or time out."""
  scores_B = rewards.checked(reward, records, responses)
  return np.float32(json.loads(hosts.share(json.dumps(scores_B.tolist()))[0]))


def _penalised(c, scores_B, ended_B):
  """As training counts them."""
  return np.asarray(c.loss.penalised(scores_B, ended_B)) if isinstance(c, policy.PPO) else scores_B


def _evaluation(c, parts, data, draw, judge, reward, held_out):
  """(state -> metrics over all held-out prompts, one response to each; a list that then holds rows for samples)."""
  judge = jax.jit(judge, out_shardings=sharding.replicated(parts.mesh))
  key, shown = jax.random.fold_in(jax.random.key(c.seed), _EVALUATION), []

  def evaluate(state):
    p, found = train.averaged(state), []
    shown.clear()
    batches = prompts.eval_batches(data, 'validation', c.eval_batch, sharding.batch_sharding(parts.mesh))
    for i, batch in enumerate(batches):
      r, seen = draw(p, batch, jax.random.fold_in(key, i))
      policy_B, reference_B = jax.device_get(judge(p, r))
      real = [j for j, index in enumerate(seen.index_B) if index >= 0]
      records, said = [data.records[seen.index_B[j]] for j in real], [seen.texts[j] for j in real]
      row = {'score': _penalised(c, _asked(reward, records, said), seen.ended_B[real]), 'length': seen.lengths_B[real],
             'ended': seen.ended_B[real], 'policy': policy_B[real], 'reference': reference_B[real]}
      if held_out:
        row['held_out'] = _asked(held_out, records, said)
      found.append(row)
      some = list(zip(records, said, row['score'], row['ended'], strict=True))[:c.rollout.samples - len(shown)]
      shown.extend({'prompt': record.prompt, 'reply': text, 'score': float(score), 'ended': bool(ended)}
                   for record, text, score, ended in some)
    return _summary({k: np.concatenate([row[k] for row in found]).astype(np.float64) for k in found[0]})
  return evaluate, shown


def _summary(of):
  """Arrays over prompts -> {'val_...': float}: means, the KL of responses, entropy and nll of tokens."""
  mean = {k: float(x.mean()) for k, x in of.items()}
  std = float(of['score'].std())
  values = {'score': mean['score'], 'score_std': std, 'score_se': std / math.sqrt(len(of['score'])),
            'kl': mean['policy'] - mean['reference'], 'entropy': -float(of['policy'].sum() / of['length'].sum()),
            'reference_nll': -float(of['reference'].sum() / of['length'].sum()), 'length': mean['length'],
            'ended': mean['ended']}
  if 'held_out' in of:
    values |= {'held_out': mean['held_out'], 'held_out_se': float(of['held_out'].std()) / math.sqrt(len(of['score']))}
  return {f'val_{k}': v for k, v in values.items()}


def _watch(c, workdir, book, shown):
  """(step, state) -> None: writes the samples, and says what looks like a policy that fools its reward."""
  told, kl = set(), getattr(c.loss, 'kl', None)
  limits = monitor.Limits(kl_target=kl.target if kl else 0.0)

  def watch(step, state):
    del state
    book.write([{'step': step} | row for row in shown])
    seen = [[row['step'], row] for row in logs.read(workdir) if 'val_score' in row]
    for alarm in monitor.alarms(seen, limits):
      kind = re.sub(r'[\d.]+', '', alarm)  # each is told once, whatever its numbers
      if kind not in told:
        logs.say(f'alarm: {alarm}')
      told.add(kind)
  return watch


def _text(c, workdir, tokenizer):
  """The text of PPO-ptx; None without."""
  text = getattr(c, 'text', None)
  if not (text and text.corpus):
    return None
  data = loader.prepare(text, pathlib.Path(workdir) / 'text', seed=c.seed)
  if data.tokenizer.sha256 != tokenizer.sha256:
    raise ConfigError(f'text.tokenizer={text.tokenizer!r} is not data.tokenizer={c.data.tokenizer!r}; expected the '
                      "policy's, whose ids it knows; set it so")
  loader.check(data, c.model.vocab)
  return data


def _texts(c, parts, tokenizer, workdir, stack):
  """n -> the batches of text for PPO-ptx from update n on, made once; None without."""
  data = _text(c, workdir, tokenizer)
  if data is None:
    return lambda n: None
  rows, made = sharding.batch_sharding(parts.mesh), []

  def batches(n):
    if not made:
      made.append(stack.enter_context(contextlib.closing(loader.train_batches(data, rows, n))))
    return made[0]
  return batches
