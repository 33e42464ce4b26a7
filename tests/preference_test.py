"""Preference optimisation as a run: where it starts, what the reference says, how long it is kept, what is learned."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import tiny

from experiments import cli, dpo as experiment
from lm import checkpoint, config, loop, nn, optim, params, peft, preference, run, samples, sharding, weights
from lm.data import preferences
from lm.errors import CheckpointError, ConfigError, Preempted
from lm.models import decoder, hf

MODEL = decoder.Config(vocab=258, length=64, layers=2, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32)
FULL = peft.Config(train='')
LORA = peft.Config('lora', train='', rank=2, targets='^blocks/(attn/[qkvo]|mlp/(up|down))$')


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  tiny.share_compiled(monkeypatch)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """Answers of which one sort of letters is the better, and a model to start from."""
  root = tmp_path_factory.mktemp('preference')
  rows = [{'prompt': f'say {i}', 'answers': [good, bad][::1 if i % 3 else -1], 'grades': [2, 1][::1 if i % 3 else -1],
           'split': 'train' if i % 4 else 'validation'}
          for i in range(40) for good, bad in (('aa' + 'a' * (i % 3), '好b' + 'b' * (i % 5)),)]
  (root / 'pairs.jsonl').write_text('\n'.join(json.dumps(r, ensure_ascii=False) for r in rows))
  hf.save(root / 'base', MODEL, jax.device_get(params.init(decoder.specs(MODEL), jax.random.key(3))))
  return root


def make(root, **changes):
  c = preference.Config(
      model=MODEL, init_from=str(root / 'base'), samples=samples.Config(count=0),
      data=preferences.Config(corpus=str(root / 'pairs.jsonl'), tokenizer='byte', template='plain', length=24, batch=8),
      optim=optim.Config(lr=0.01, steps=8, warmup=1, weight_decay=0.0), loop=loop.Config(log_every=1, eval_every=4),
      checkpoint=checkpoint.Config(every=4, keep_best=0))
  return config.replace(c, **changes)


def logged(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def kept(workdir):
  return safetensors.numpy.load((workdir / preference.REFERENCE).read_bytes())


def direct(p, rows):
  """Log-probability of each answer [N, K] by the model's logits, one after another."""
  out = np.zeros(rows.grades_NK.shape)
  logits = jax.jit(lambda p, ids_BT: decoder.logits(p, MODEL, decoder.apply(p, MODEL, ids_BT)))
  for n, k in np.ndindex(out.shape):
    ids, mask = rows.answers.ids_BT[n, k], rows.answers.mask_BT[n, k]
    table = np.asarray(jax.nn.log_softmax(logits(p, ids[None])[0]), np.float64)
    out[n, k] = sum(table[t - 1, ids[t]] for t in np.flatnonzero(mask))
  return out


@pytest.mark.slow
@pytest.mark.parametrize('few', [FULL, LORA, peft.Config('prompt', train='', length=3)],
                         ids=lambda c: c.method)
def test_it_starts_at_its_reference(few, root, tmp_path):
  """log 2, no margin and no favourite; the reference is what the model's logits say, where no prompt comes first."""
  c = make(root, peft=few, optim__lr=0.0, optim__steps=1, loop__eval_every=1)
  with pytest.warns(UserWarning, match='no parameter will change'):
    run.run(c, preference.task(c), tmp_path)
  row, = logged(tmp_path)
  assert row['val_loss'] == pytest.approx(np.log(2), rel=1e-7) and row['val_accuracy'] == 0.5
  assert row['val_margin'] == row['val_chosen_reward'] == row['val_rejected_reward'] == 0.0
  # The training step is another program, which may round the last bit of a sum otherwise.
  assert row['loss'] == pytest.approx(np.log(2), rel=1e-6) and row['margin'] == pytest.approx(0, abs=1e-6)
  assert row['accuracy'] == 0.5
  for split, rows in preferences.prepare(c.data, '').splits.items():
    same = np.allclose(kept(tmp_path)[split], direct(hf.load(root / 'base')[1], rows), rtol=1e-5)
    assert same == (few.method != 'prompt')


@pytest.fixture(scope='module')
def straight(root, tmp_path_factory):
  """peft -> (config, task, workdir) of a finished run of 8 steps, from a copy of the model that is its own."""
  @functools.cache
  def finished(few):
    c = make(root, peft=few, init_from=str(root / few.method))
    shutil.copytree(root / 'base', c.init_from)
    task, workdir = preference.task(c), tmp_path_factory.mktemp(few.method)
    run.run(c, task, workdir)
    return c, task, workdir
  return finished


def stop(step):
  """SIGTERM while that step is made."""
  original = preferences.train_batches

  def batches(data, place, start=0):
    for n, batch in enumerate(original(data, place, start), start + 1):
      yield tiny.signal_at(step)(n, batch)
  return batches


def stopped(c, task, workdir, step=5):
  with pytest.MonkeyPatch.context() as m, pytest.raises(Preempted):
    m.setattr(preferences, 'train_batches', stop(step))
    run.run(c, task, workdir)


@pytest.mark.slow
@pytest.mark.parametrize('few', [FULL, LORA], ids=lambda c: c.method)
def test_a_stopped_run_goes_on_as_if_it_had_not(few, straight, tmp_path):
  """In full even where the model it started from is another one by then: its reference is not."""
  c, task, whole = straight(few)
  stopped(c, task, tmp_path)
  before = (tmp_path / preference.REFERENCE).read_bytes()
  if few is FULL:
    other = jax.tree.map(lambda w: 1.5 * w, hf.load(c.init_from)[1])
    shutil.rmtree(c.init_from)
    hf.save(c.init_from, MODEL, other)
  run.run(c, task, tmp_path)
  assert (tmp_path / preference.REFERENCE).read_bytes() == before
  same = lambda row: {k: v for k, v in row.items() if 'loss' in k or 'margin' in k or 'logprob' in k}
  assert [*map(same, logged(tmp_path))] == [*map(same, logged(whole))] and len(logged(whole)) == 8
  if few is FULL:
    assert tiny.state_sha(c, task, tmp_path) == tiny.state_sha(c, task, whole)


@pytest.mark.slow
def test_a_run_that_goes_on_needs_its_reference(straight, tmp_path):
  c, task, _ = straight(FULL)
  path = tmp_path / preference.REFERENCE
  stopped(c, task, tmp_path)
  content = path.read_bytes()
  for bad, message in ((None, 'missing'), (content[:-1] + bytes([content[-1] ^ 1]), 'sha256 does not match'),
                       (content[:50], 'damaged')):
    path.unlink(missing_ok=True)
    if bad is not None:
      path.write_bytes(bad)
    with pytest.raises(CheckpointError, match=f'{preference.REFERENCE}: .*{message}.*; put it back'):
      run.run(c, task, tmp_path)
  path.write_bytes(content)
  assert run.run(c, task, tmp_path)['steps'] == 8
  shorter = config.replace(c, data__length=20, optim__steps=9)
  with pytest.raises(CheckpointError, match='of other rows'):
    run.run(shorter, preference.task(shorter), tmp_path, resume_with_changes=True)


@pytest.mark.slow
def test_before_training_the_reference_is_asked_again_only_where_it_is_another(root, tmp_path, monkeypatch, capsys):
  tiny.stop_before_the_step(monkeypatch)

  def start(**changes):
    c = make(root, **changes)
    with pytest.raises(tiny.Reached):
      run.run(c, preference.task(c), tmp_path)
    return 'asking the model' in capsys.readouterr().out, kept(tmp_path)['train']
  asked, first = start()
  assert asked and np.all(first < 0)
  assert start()[0] is False
  hf.save(root / 'other', MODEL, jax.tree.map(lambda w: 1.5 * w, hf.load(root / 'base')[1]))
  asked, other = start(init_from=str(root / 'other'))
  assert asked and not np.allclose(first, other)
  assert start(init_from=str(root / 'other'), model__dtype='bfloat16')[0]


def test_the_better_answers_are_learned(root, tmp_path):
  c = make(root, optim__steps=24, loop__eval_every=24, checkpoint__every=24)
  run.run(c, preference.task(c), tmp_path)
  rows = logged(tmp_path)
  assert rows[0]['accuracy'] == 0.5 and rows[-1]['accuracy'] == rows[-1]['val_accuracy'] == 1.0
  assert rows[-1]['val_margin'] > 0.5 and rows[-1]['val_loss'] < 0.5


@pytest.mark.slow
def test_without_a_reference_all_answers_are_alike_to_it(root, tmp_path):
  c = make(root, reference='none', optim__lr=1e-9, optim__steps=1, loop__eval_every=1)
  task = preference.task(c)
  assert task.around.data is None
  run.run(c, task, tmp_path)
  assert not (tmp_path / preference.REFERENCE).exists()
  rows = preferences.prepare(c.data, '').splits['validation']
  said = direct(hf.load(root / 'base')[1], rows)
  h = np.where(rows.grades_NK.argmax(1) == 0, 1, -1) * (said[:, 0] - said[:, 1])
  assert logged(tmp_path)[0]['val_loss'] == pytest.approx(np.log1p(np.exp(-c.loss.beta * h)).mean(), rel=1e-5)


def test_rows_without_a_better_answer_have_no_weight(root):
  c = make(root)
  data = preferences.prepare(c.data, '')
  rows = jax.tree.map(lambda x: x[:6], data.splits['train'])
  grades, exists = rows.grades_NK.copy(), rows.exists_NK.copy()
  grades[1], exists[3, 1] = 0.5, False
  reference = np.random.default_rng(0).normal(-20, 2, (6, 2)).astype(np.float32)
  batch = preference.Referred(rows.replace(grades_NK=grades, exists_NK=exists), reference)
  rest = preference.Referred(*jax.tree.map(lambda x: x[[0, 2, 4, 5]], (rows, reference)))
  loss = jax.jit(lambda p, batch: preference.task(c).loss(p, batch, None))
  (got, _), (want, _) = (loss(hf.load(root / 'base')[1], b) for b in (batch, rest))
  assert float(got['preference'].weight) == 4
  assert float(got['preference'].total) == pytest.approx(float(want['preference'].total), rel=1e-6)
  found = preference.pairs(batch)
  np.testing.assert_array_equal(found.chosen_reference_B[0], reference[0, rows.grades_NK[0].argmax()])
  b = int(rows.grades_NK[0].argmax())
  np.testing.assert_array_equal(found.pair.chosen.ids_BT[0], rows.answers.ids_BT[0, b])
  np.testing.assert_array_equal(found.pair.rejected.ids_BT[0], rows.answers.ids_BT[0, 1 - b])


@pytest.mark.slow
def test_on_a_mesh_it_is_the_same_run(straight, tmp_path):
  c, _, alone = straight(LORA)
  c = config.replace(c, mesh=sharding.Config(data=2, fsdp=2, tensor=2))
  run.run(c, preference.task(c), tmp_path)
  for one, eight in zip(logged(alone), logged(tmp_path), strict=True):
    for name in ('loss', 'margin', 'chosen_logprob', 'rejected_reward', *(['val_loss'] if 'val_loss' in one else [])):
      assert eight[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), (one['step'], name)
  for split, reference in kept(alone).items():
    np.testing.assert_allclose(kept(tmp_path)[split], reference, rtol=1e-5)


def test_rmsprop_is_the_paper_codes():
  """torch's: a running mean of squares at 0.99 from 0, epsilon outside the root, no correction of bias."""
  p = {'w': jnp.array([1.0, -2.0, 0.5])}
  ours = optim.make(experiment.rmsprop(lr=0.1, schedule='constant', steps=9, clip=0.0),
                    {'w': params.Spec((3,), (None,))})
  theirs = optax.rmsprop(0.1, decay=0.99, eps=1e-8, eps_in_sqrt=False)
  (a, mine), (b, their) = ((p, tx.init(p)) for tx in (ours, theirs))
  for seed in range(5):
    g = {'w': jnp.asarray(np.random.default_rng(seed).normal(size=3), jnp.float32)}
    updates, mine = jax.jit(ours.update)(g, mine, a)
    a = optax.apply_updates(a, updates)
    updates, their = theirs.update(g, their, b)
    b = optax.apply_updates(b, updates)
  np.testing.assert_allclose(a['w'], b['w'], rtol=1e-6)


def toy(make):
  """Flags that make a config of experiments/dpo.py small."""
  c = make()
  few = {'peft.rank': 2} if c.peft.method == 'lora' else {}
  return few | {'data.length': 48, 'data.batch': 4, 'data.tokenizer': 'byte', 'optim.steps': 3, 'optim.warmup': 1,
                'model.vocab': 258, 'model.length': 64, 'model.layers': 2, 'model.embed': 16, 'model.heads': 2,
                'model.kv_heads': 2, 'model.head_dim': 8, 'model.mlp': 24, 'samples.count': 2, 'samples.new_tokens': 3,
                'model.dtype': 'float32', 'model.remat': 'none', 'loop.log_every': 1, 'loop.eval_every': 3}


@pytest.mark.slow
@pytest.mark.parametrize('make', [f for f in experiment.CONFIGS if f.__name__ != 'smollm2_reviews'])
def test_three_steps_of_a_config(make, root, tmp_path):
  c = config.override(make(), f'data.corpus={root / "pairs.jsonl"}', *(f'{k}={v}' for k, v in toy(make).items()))
  assert run.run(c, preference.task(c), tmp_path)['steps'] == 3


@pytest.mark.slow
def test_the_command_line(root, tmp_path, capsys):
  flags = {'data.corpus': root / 'pairs.jsonl', **toy(experiment.smollm2_reviews), 'data.template': 'none'}
  argv = ['dpo', '--config=smollm2_reviews', f'--workdir={tmp_path}', *(f'--set={k}={v}' for k, v in flags.items())]
  assert cli.run_argv(argv, experiment.__doc__, experiment.CONFIGS, preference.task) == 0
  assert 'sample with: python -m scripts.sample' in capsys.readouterr().out
  assert {len(logged(tmp_path)), len(samples.read(tmp_path))} == {3, 2}
  assert all(row['prompt'].endswith(('0', '4', '8', '2', '6')) and set(row['reference']) == {'a'}
             for row in samples.read(tmp_path))
  found = weights.load(tmp_path)  # as scripts.sample reads it
  assert found.config.vocab == 258 and jax.tree.structure(found.params) == jax.tree.structure(
      decoder.specs(found.config))


@pytest.mark.parametrize('change, message', [
    (dict(reference='end'), "reference='end'"), (dict(data__answers=4), 'data.answers=4; expected 2'),
    (dict(data__length=65), 'data.length=65 is more than model.length=64'),
    (dict(data__length=62, peft=peft.Config('prefix', length=3)), 'less peft.length=3'),
    (dict(peft=dataclasses.replace(LORA, rate=0.1)), 'peft.rate=0.1; expected 0'),
    (dict(model__dropout=nn.Dropout(hidden=0.1)), 'model.dropout='), (dict(peft__mixout=0.5), 'peft.mixout=0.5')],
                         ids=str)
def test_mistakes_in_a_config(change, message, root):
  with pytest.raises(ConfigError) as raised:
    make(root, **change)
  assert message in str(raised.value)
