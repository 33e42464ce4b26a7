"""Preference and policy losses against TRL's, whose trainers' loss functions get the same logits from a stand-in."""

import collections
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import train
from lm.data.packing import Batch
from lm.data.sft import Pair
from lm.losses import dpo, grpo, reward

torch = pytest.importorskip('torch')
pytest.importorskip('trl')
from trl.trainer import dpo_trainer, grpo_trainer, reward_trainer  # noqa: E402

pytestmark = pytest.mark.oracle

B, T, V = 6, 11, 17
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (2 * B, T, V)).astype(np.float32)  # of all rows, targets only
PROMPT, ANSWER = RNG.integers(1, 4, (B, 1)), RNG.integers(1, 8, (2 * B, 1))
TENSOR = lambda x: torch.from_numpy(np.array(x))


def rows(prompt, answer):
  """Rows of ids that draw nothing from a model: the state of column t of row b is (b, t), see `apply`."""
  column = np.arange(T + 1)[None]
  used = column < prompt + answer
  ids = RNG.integers(1, V, used.shape)
  return Batch(*(jnp.asarray(x, jnp.int32) for x in (ids * used, used, column * used)),
               jnp.asarray(used & (column >= prompt)))


def apply(p, ids_BT, **kwargs):
  """The logits themselves as states: the head is the identity."""
  return p


MODEL = dict(apply=apply, head=lambda p: jnp.eye(V))


def scored(logits, ids, mask):
  """What TRL's fused head returns; log-probabilities only of targets."""
  logp = torch.log_softmax(logits, -1)
  own = logp.gather(-1, ids[..., None])[..., 0] * mask
  nothing = torch.zeros_like(own)
  return types.SimpleNamespace(log_probs=own, entropy=-(logp.exp() * logp).sum(-1), mean_logits=nothing,
                               is_top1=nothing.bool())


class Trainer(types.SimpleNamespace):
  """What their loss functions read of a trainer."""

  def __init__(self, **fields):
    same = lambda x: x
    accelerator = types.SimpleNamespace(device='cpu', gather=same, gather_for_metrics=same, num_processes=1,
                                        reduce=lambda x, reduction: x)
    super().__init__(model=types.SimpleNamespace(training=False), accelerator=accelerator, aux_loss_enabled=False,
                     _metrics={'eval': collections.defaultdict(list)}, _total_train_tokens=0, _tp_size=1, **fields)


def value(terms):
  return float(train.objective(terms, {k: t.weight for k, t in terms.items()}))


def of(term):
  return float(term.total / term.weight)


def gradient(loss, batch):
  """Of the loss by the logits."""
  return jax.jit(train.accumulate(loss))(jnp.asarray(LOGITS), batch, jax.random.key(0))[0]


@pytest.mark.parametrize('kind, settings', [
    ('sigmoid', {}), ('sigmoid', {'beta': 0.5}), ('ipo', {'kind': 'ipo', 'average': True}),
    ('sigmoid_norm', {'beta': 2.0, 'average': True})])
def test_dpo(kind, settings):
  c = dpo.Config(chunk=24, **settings)
  chosen, rejected = rows(PROMPT, ANSWER[:B]), rows(PROMPT, ANSWER[B:])
  references = RNG.normal(-15, 3, (2, B)).astype(np.float32)
  last = jnp.zeros(B, jnp.int32)
  ours = functools.partial(dpo.loss, c=c, **MODEL)
  batch = dpo.Batch(Pair(chosen, rejected, last, last), *jnp.asarray(references))
  terms, metrics = jax.jit(ours)(jnp.asarray(LOGITS), batch, None)

  both = jax.tree.map(lambda a, b: np.concatenate([a, b]), chosen, rejected)
  ids, mask, logits = TENSOR(both.ids_BT).long(), TENSOR(both.mask_BT).int(), TENSOR(LOGITS).requires_grad_()
  theirs = Trainer(ld_alpha=None, precompute_ref_logps=True, f_divergence_type='reverse_kl', loss_types=[kind],
                   loss_weights=[1.0], beta=c.beta, label_smoothing=0.0, use_weighting=False)
  want = dpo_trainer.DPOTrainer._compute_loss(theirs, lambda **kwargs: scored(logits, ids[:, 1:], mask[:, 1:]), {
      'input_ids': ids, 'completion_mask': mask, 'attention_mask': mask, 'ref_chosen_logps': TENSOR(references[0]),
      'ref_rejected_logps': TENSOR(references[1])}, False)
  want.backward()
  assert value(terms) == pytest.approx(float(want.detach()), rel=1e-5)
  np.testing.assert_allclose(gradient(ours, batch), logits.grad.numpy(), atol=1e-5)
  for mine, their in (('accuracy', 'rewards/accuracies'), ('margin', 'rewards/margins'),
                      ('chosen_reward', 'rewards/chosen'), ('rejected_reward', 'rewards/rejected'),
                      ('chosen_logprob', 'logps/chosen'), ('rejected_logprob', 'logps/rejected')):
    assert of(metrics[mine]) == pytest.approx(theirs._metrics['eval'][their][0], rel=1e-4), mine


def test_conservative_dpo():
  """TRL has label smoothing in 'aot', which is DPO where a batch is one pair."""
  h = np.array([0.7, -1.3, 4.0], np.float32)
  got = dpo.objective(jnp.asarray(h), dpo.Config(beta=0.5, smoothing=0.2))
  for i in range(3):
    theirs = Trainer(ld_alpha=None, precompute_ref_logps=True, f_divergence_type='reverse_kl', loss_types=['aot'],
                     loss_weights=[1.0], beta=0.5, label_smoothing=0.2, use_weighting=False)
    answers = types.SimpleNamespace(log_probs=TENSOR([[h[i]], [0.0]]), entropy=torch.zeros(2, 1),
                                    mean_logits=torch.zeros(2, 1), is_top1=torch.zeros(2, 1, dtype=torch.bool))
    ones = torch.ones(2, 2, dtype=torch.int)
    want = dpo_trainer.DPOTrainer._compute_loss(theirs, lambda answers=answers, **kwargs: answers, {
        'input_ids': ones, 'completion_mask': ones, 'attention_mask': ones, 'ref_chosen_logps': torch.zeros(1),
        'ref_rejected_logps': torch.zeros(1)}, False)
    assert float(got[i]) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize('centre', [0.0, 0.01])
@pytest.mark.parametrize('margin', [False, True])
def test_reward(centre, margin):
  scores, margins = RNG.normal(0, 2, (B, 2)).astype(np.float32), RNG.uniform(0, 1, B).astype(np.float32)
  table = jnp.zeros((B, 2, 2)).at[:, 0, 1].set(margins) if margin else None
  terms, metrics = reward.loss(jnp.asarray(scores), jnp.tile(jnp.arange(2)[None], (B, 1)), jnp.ones((B, 2), bool),
                               c=reward.Config(centre=centre), margins_BKK=table)
  theirs = Trainer(args=types.SimpleNamespace(center_rewards_coefficient=centre or None))
  model = lambda **kwargs: types.SimpleNamespace(logits=TENSOR(scores.T.reshape(-1, 1)))
  inputs = {'input_ids': None, 'attention_mask': torch.ones(1)} | ({'margin': TENSOR(margins)} if margin else {})
  want = reward_trainer.RewardTrainer.compute_loss(theirs, model, inputs)
  assert value(terms) == pytest.approx(float(want), rel=1e-5)
  for mine, their in (('accuracy', 'accuracy'), ('gap', 'margin')):
    assert of(metrics[mine]) == pytest.approx(theirs._metrics['eval'][their][0], rel=1e-5), mine


@pytest.mark.parametrize('kind, settings', [
    ('grpo', {}), ('dr_grpo', {'mean': 'constant', 'length': T, 'beta': 0.0}),
    ('dapo', {'mean': 'token', 'clip_high': 0.28, 'beta': 0.0}), ('dapo', {'mean': 'token', 'beta': 0.3})])
def test_grpo(kind, settings):
  c = grpo.Config(chunk=24, **settings)
  answers = rows(np.tile(PROMPT, (2, 1)), ANSWER)
  ids, mask, logits = TENSOR(answers.ids_BT).long(), TENSOR(answers.mask_BT).int(), TENSOR(LOGITS).requires_grad_()
  exact = scored(logits, ids[:, 1:], 1)
  near = lambda: exact.log_probs.detach().numpy() + RNG.normal(0, 0.4, (2 * B, T)).astype(np.float32)
  old, reference, advantages = near(), near(), RNG.normal(size=2 * B).astype(np.float32)
  ours = functools.partial(grpo.loss, c=c, **MODEL)
  batch = grpo.Batch(answers, *map(jnp.asarray, (advantages, old, reference)))
  terms, metrics = jax.jit(ours)(jnp.asarray(LOGITS), batch, None)

  theirs = Trainer(
      beta=c.beta, epsilon_low=c.clip, epsilon_high=c.clip_high, loss_type=kind, top_entropy_quantile=1.0,
      off_policy_mask_threshold=None, importance_sampling_level='token', use_vllm=False, _entropy_bonus_enabled=False,
      max_completion_length=T, args=types.SimpleNamespace(delta=None, use_bias_correction_kl=False),
      _get_per_token_logps_and_entropies=lambda *args, **kwargs: (exact.log_probs, exact.entropy, None))
  want = grpo_trainer.GRPOTrainer._compute_loss(theirs, None, {
      'prompt_ids': ids[:, :1], 'prompt_mask': mask[:, :1], 'completion_ids': ids[:, 1:],
      'completion_mask': mask[:, 1:], 'advantages': TENSOR(advantages), 'old_per_token_logps': TENSOR(old),
      'ref_per_token_logps': TENSOR(reference), 'num_items_in_batch': mask[:, 1:].sum()})
  want.backward()
  assert value(terms) == pytest.approx(float(want.detach()), rel=1e-4)
  np.testing.assert_allclose(gradient(ours, batch), logits.grad.numpy(), atol=1e-5)
  assert of(metrics['entropy']) == pytest.approx(theirs._metrics['eval']['entropy'][0], rel=1e-4)
  assert of(metrics['clip_fraction']) == pytest.approx(theirs._metrics['eval']['clip_ratio/region_mean'][0], rel=1e-4)
  if c.beta:
    assert of(metrics['token_kl']) == pytest.approx(theirs._metrics['eval']['kl'][0], rel=1e-4)
