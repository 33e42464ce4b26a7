"""Reward models: what a score depends on, that they learn, and that what is loaded is what was trained."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli, reward as experiment
from lm import checkpoint, config, look, loop, nn, optim, params, peft, reward_model, run, sharding, start, train
from lm.data import packing, preferences, prompts
from lm.errors import CheckpointError, ConfigError, DataError
from lm.losses import reward
from lm.models import decoder, encoder
from lm.text import chat, training

SMALL = {'vocab': 300, 'length': 48, 'layers': 2, 'embed': 16, 'heads': 2, 'head_dim': 8, 'mlp': 24}
PLACE = sharding.batch_sharding(sharding.make_mesh(sharding.Config()))
KINDS = {'decoder': 'last', 'pooler': 'pooler', 'first': 'first', 'mean': 'mean'}
METHODS = ('full', 'top', 'lora', 'houlsby', 'pfeiffer', 'prefix', 'prompt')


def made(kind='decoder', root=None, **changes):
  data = preferences.Config(template='none', length=31, batch=4, answers=3, threads=0, **({} if root is None else {
      'corpus': str(root / 'graded.jsonl'), 'tokenizer': str(root / 'x.model')}))
  model = (decoder.Config(**SMALL, kv_heads=2, positions='rotary', scan_layers=False) if kind == 'decoder' else
           encoder.Config(**SMALL, dropout=nn.Dropout(), scan_layers=False))
  c = (reward_model.Decoder if kind == 'decoder' else reward_model.Encoder)(
      model=model, data=data, pooling=KINDS[kind], optim=optim.Config(lr=1e-2, steps=30, warmup=2, weight_decay=0.0),
      loop=loop.Config(log_every=5, eval_every=30), checkpoint=checkpoint.Config(every=30, metric='val_accuracy',
                                                                                 mode='max'))
  return config.replace(c, **changes)


def started(c, seed=0):
  return params.init(reward_model.task(c).specs, jax.random.key(seed))


def model_of(c, p):
  return reward_model.RewardModel(c, p, None, reward.Affine())


def some_rows(R=5, T=16, seed=0):
  rng = np.random.default_rng(seed)
  used = np.arange(T)[None] < rng.integers(3, T - 4, R)[:, None]
  return packing.Batch(rng.integers(1, 300, (R, T)).astype(np.int32) * used, used.astype(np.int32),
                       np.arange(T, dtype=np.int32)[None] * used, used & (np.arange(T)[None] > 2))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """Three answers a prompt, or two: the better, the more often 'good' stands there; the best is the shortest."""
  root = tmp_path_factory.mktemp('reward')
  training.train_sentencepiece(['good film 好电影 bad film 坏电影 the a of say'] * 20, root / 'x.model', vocab=286,
                                 control_symbols=('[CLS]', '[SEP]', '[MASK]', '<|im_start|>', '<|im_end|>'))
  texts = ['good 好电影', 'good film the bad', 'bad film the a 坏电影']
  rows = []
  for i in range(48):
    kept = [k for k in np.random.default_rng(i).permutation(3) if i % 3 or k != i % 2]
    rows.append({'prompt': '' if i % 2 else f'say {i}', 'answers': [texts[k] for k in kept],
                 'grades': [-int(k) for k in kept], 'split': 'train' if i % 4 else 'validation'})
  (root / 'graded.jsonl').write_text('\n'.join(json.dumps(r, ensure_ascii=False) for r in rows), encoding='utf-8')
  return root


@pytest.fixture(scope='module')
def trained(root, tmp_path_factory):
  """(config, workdir, summary) of a run to its end."""
  c, workdir = made('first', root), tmp_path_factory.mktemp('run') / 'run'
  with pytest.MonkeyPatch.context() as m:
    m.setattr('lm.budget.peak_flops', lambda device: 1e9)
    run.run(c, reward_model.task(c), workdir)
  return c, workdir, reward_model.finish(c, workdir)['reward']


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_a_score_knows_neither_padding_nor_neighbours(kind):
  c = made(kind)
  p, rows = jax.tree.map(lambda x: 4 * x, started(c)), some_rows()  # so large that all tokens tell
  score = jax.jit(lambda p, rows: model_of(c, p).score(p, rows))
  want = np.asarray(score(p, rows))
  assert want.shape == (5,) and want.dtype == np.float32 and len(np.unique(want)) == 5
  for more in (1, 9):
    padded = jax.tree.map(lambda x, n=more: np.pad(x, ((0, 0), (0, n))), rows)
    np.testing.assert_allclose(score(p, padded), want, rtol=1e-4, atol=1e-5)
  other = jax.tree.map(lambda a, b: np.concatenate([a[:2], b]), rows, some_rows(seed=1))
  np.testing.assert_allclose(score(p, other)[:2], want[:2], rtol=1e-4, atol=1e-5)
  noise = rows.replace(ids_BT=np.where(rows.segments_BT > 0, rows.ids_BT, 7))
  np.testing.assert_allclose(score(p, noise), want, rtol=1e-4, atol=1e-5)
  changed = rows.replace(ids_BT=rows.ids_BT.copy())
  changed.ids_BT[:, 1] += 1
  assert (np.abs(score(p, changed) - want) > 1e-3).all()


def test_a_decoder_scores_rows_padded_on_the_left():
  c = made()
  p, rows = jax.tree.map(lambda x: 4 * x, started(c)), some_rows()
  left = jax.tree.map(lambda x: np.pad(x, ((0, 0), (5, 0))), rows)
  score = jax.jit(model_of(c, p).score)
  np.testing.assert_allclose(score(p, left), score(p, rows), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_the_head_starts_as_published(kind):
  c = made(kind, model__embed=256)
  head = started(c)['classify']
  assert head['out'].shape == (256, 1) and head['out_bias'].tolist() == [0.0]
  np.testing.assert_allclose(head['out'].std(), 257**-0.5, rtol=0.15)
  assert head['out'].max() > 2.2 * 257**-0.5  # not cut off at two deviations


def test_an_output_matrix_is_left_behind():
  c = made(model__tied=False)
  found = reward_model.task(c)
  assert 'unembed' in found.base.specs and 'unembed' not in found.specs


@pytest.mark.slow
@pytest.mark.parametrize('kind, method', [
    *(('decoder', m) for m in METHODS), ('pooler', 'prompt'), ('first', 'lora')])
def test_every_method_trains_its_part_and_the_head(kind, method, root):
  c = made(kind, root, peft=peft.Config(method, train='^classify/', layers=1, rank=2, width=3, length=3, hidden=5))
  a_task = reward_model.task(c)
  parts = run.build(c, a_task)
  data = a_task.source.prepare(c.data, root, 0)
  batch = next(a_task.source.train_batches(data, PLACE))
  assert not np.asarray(batch.exists_NK).all()
  before = train.init(a_task.specs, parts.tx, parts.trainable, jax.random.key(0))
  kept = jax.tree.map(np.asarray, (before.params, before.frozen))  # the step takes the buffers
  after, metrics = parts.step(before, batch, jax.random.key(1))
  jax.tree.map(np.testing.assert_array_equal, after.frozen, kept[1])
  moved = {path: bool((np.asarray(x) != params.flatten(kept[0])[path]).any())
           for path, x in params.flatten(after.params).items()}
  assert moved['classify/out']
  learned = {'lora': 'lora_b', 'houlsby': '/expand', 'pfeiffer': '/expand', 'prefix': 'prefix', 'prompt': 'prompt',
             'top': 'blocks/1/', 'full': 'blocks/'}[method]
  assert any(moved[path] for path in moved if learned in path)
  assert metrics['skipped'] == 0 and np.isfinite(metrics['loss'])
  if method in ('lora', 'prompt', 'prefix', 'pfeiffer'):
    plain = set(params.flatten(a_task.base.specs)) - {'embed/tokens'}
    assert plain.isdisjoint(moved)


def test_the_loss_is_that_of_the_scores():
  """Ranks, margins, missing answers and both lengths by hand."""
  c = made(margin=0.5)
  p = started(c)
  flat = some_rows(6)
  batch = preferences.Ranked(jax.tree.map(lambda x: x.reshape(2, 3, -1), flat),
                             np.array([[2, 5, 1], [1, 0, 9]], np.float32), np.array([[True] * 3, [True, True, False]]))
  a_task = reward_model.task(c)
  loss = jax.jit(lambda p, batch: a_task.loss(p, batch, None))
  terms, metrics = loss(p, batch)
  s = np.asarray(jax.jit(model_of(c, p).score)(p, flat), np.float64).reshape(2, 3)
  one = lambda b, w, o: np.log1p(np.exp(-(s[b, w] - s[b, o] - 0.5 * (batch.grades_NK[b, w] - batch.grades_NK[b, o]))))
  want = np.mean([np.mean([one(0, 1, 0), one(0, 1, 2), one(0, 0, 2)]), one(1, 0, 1)])
  np.testing.assert_allclose(terms['preference'].total / terms['preference'].weight, want, rtol=1e-5)
  n = batch.answers.mask_BT.sum(-1)
  more = np.array([n[0, 1] - n[0, 0], n[0, 1] - n[0, 2], n[0, 0] - n[0, 2], n[1, 0] - n[1, 1]])
  assert metrics['length_accuracy'].total == (more > 0).sum() + (more == 0).sum() / 2
  assert metrics['length_accuracy'].weight == 4
  assert {'loss', 'accuracy', 'gap', 'brier'} < metrics.keys()
  other = batch.replace(answers=jax.tree.map(lambda x: x.copy(), batch.answers))
  other.answers.ids_BT[1, 2] += 1
  np.testing.assert_array_equal(loss(p, other)[0]['preference'].total, terms['preference'].total)


@pytest.mark.slow
def test_dropout_differs_between_answers_and_not_between_microbatches():
  c = made(model__dropout=nn.Dropout(hidden=0.3), model__layers=1)
  p, flat = started(c), some_rows(1)
  same = preferences.Ranked(jax.tree.map(lambda x: np.broadcast_to(x[None], (2, 3, x.shape[1])), flat),
                            np.array([[2, 1, 0]] * 2, np.float32), np.ones((2, 3), bool))
  loss = jax.jit(reward_model.task(c).loss)
  both = loss(p, same, nn.Keys(jax.random.key(0), jnp.arange(2)))[1]
  assert both['gap'].total != 0  # of equal answers: each has a mask of its own
  each = [loss(p, jax.tree.map(lambda x, i=i: x[i:i + 1], same), nn.Keys(jax.random.key(0), jnp.array([i])))[1]
          for i in (0, 1)]
  np.testing.assert_allclose(both['gap'].total, sum(m['gap'].total for m in each), rtol=1e-4)
  assert reward_model.task(c).eval_loss(p, same, nn.Keys(jax.random.key(0), jnp.arange(2)))[1]['gap'].total == 0


@pytest.mark.slow
def test_it_learns_what_can_be_told_apart(trained):
  _, workdir, found = trained
  summary = json.loads((workdir / 'summary.json').read_text())
  assert summary['val_accuracy'] == 1.0 and summary['val_loss'] < 0.3 < np.log(2)
  assert summary['val_length_accuracy'] == 0.0
  assert found['accuracy'] == 1.0 and found['pairs'] == sum(found['reliability']['count'])
  np.testing.assert_allclose(found['calibration_error'], 1 - sum(found['reliability']['predicted']) / found['pairs'],
                             rtol=1e-5)


def test_what_is_loaded_is_what_was_trained(trained):
  c, workdir, found = trained
  model = reward_model.load(workdir)
  assert dataclasses.replace(model.config, mesh=c.mesh) == c
  parts = run.build(c, reward_model.task(c))
  _, state, _ = checkpoint.restore(workdir / 'checkpoints', start.abstract(reward_model.task(c), parts))
  jax.tree.map(np.testing.assert_array_equal, model.params, train.averaged(state))
  data = preferences.prepare(c.data, workdir, encoder=True)
  ranked = data.splits['validation']
  rows = jax.tree.map(lambda x: x[ranked.exists_NK], ranked.answers)
  score = jax.jit(model.score)
  scores = np.asarray(score(model.params, rows))
  plain = np.asarray(jax.jit(model_of(c, None).score)(train.averaged(state), rows))
  np.testing.assert_array_equal(scores, np.asarray(model.normaliser(jnp.asarray(plain))))
  np.testing.assert_allclose([scores.mean(), scores.std()], [0, 1], atol=1e-5)
  assert found['scores'] == len(scores)


@pytest.mark.slow
def test_a_loaded_model_scores_texts(trained):
  model = reward_model.load(trained[1])
  ask = [chat.Message('user', 'say 1')]
  rows = model.rows((prompt, text) for prompt in ((), ask) for text in ('good 好电影', 'bad film the a 坏电影'))
  scores = np.asarray(model.score(model.params, rows))
  assert scores[0] > scores[1] and scores[2] > scores[3]
  with pytest.raises(CheckpointError, match='expected the workdir of a finished reward model'):
    reward_model.load(trained[1] / 'checkpoints')


@pytest.mark.slow
def test_a_policy_can_be_rewarded_by_it(trained):
  """Of a text that is continued, the whole is scored; no answer at all has a score too; more texts than a batch."""
  model, by = reward_model.load(trained[1]), reward_model.reward(trained[1], 'reward_from')
  ask = (chat.Message('user', 'say 1'),)
  asked = prompts.Record('say 1', ask)
  begun = prompts.Record('good', (chat.Message('user', 'good'),), text='good film')
  found = by([asked, begun, asked] * 5, ['good 好电影', ' 好电影', ''] * 5)
  rows = model.rows([(ask, 'good 好电影'), ((), 'good 好电影'), (ask, '')] * 5)
  assert len(found) == 15 > trained[0].data.batch * trained[0].data.answers
  np.testing.assert_allclose(found, model.score(model.params, rows), rtol=1e-4, atol=1e-5)
  reward_model.reward('', 'reward_from')  # nothing is read before it is asked
  with pytest.raises(ConfigError, match="reward_from='': expected the workdir"):
    reward_model.reward('', 'reward_from')([asked], ['a'])


@pytest.mark.slow
def test_scores_are_brought_to_the_mean_of_given_answers(trained, tmp_path):
  c, workdir, _ = trained
  talks = [{'prompt': 'x', 'messages': [{'role': 'user', 'content': f'say {i}'},
                                        {'role': 'assistant', 'content': 'good 好电影'}]} for i in range(17)]
  (tmp_path / 'demonstrations.jsonl').write_text('\n'.join(map(json.dumps, talks)))
  before = (workdir / reward_model.NORMALISER).read_bytes()
  try:
    found = reward_model.finish(config.replace(c, normalise='mean', reference=str(tmp_path / 'demonstrations.jsonl')),
                                workdir)['reward']
    model = reward_model.load(workdir)
  finally:
    (workdir / reward_model.NORMALISER).write_bytes(before)
  assert (found['scale'], found['scores']) == (1.0, 17)
  said = model.rows(([chat.Message('user', f'say {i}')], 'good 好电影') for i in range(17))
  np.testing.assert_allclose(np.asarray(model.score(model.params, said)).mean(), 0, atol=1e-5)


def test_a_reference_that_cannot_be_read_is_refused_before_training(root, tmp_path):
  c = made('decoder', root)
  (tmp_path / 'empty.jsonl').touch()
  (tmp_path / 'long.jsonl').write_text(json.dumps({'conversation': ['q', 'a', 'q again', 'a again']}) + '\n')
  for name, part in (('none.jsonl', 'none.jsonl'), ('empty.jsonl', 'empty.jsonl: no records'),
                     ('long.jsonl', 'example 0: a prompt of 3 turns')):
    other = config.replace(c, reference=str(tmp_path / name))
    with pytest.raises(DataError, match=part):
      run.run(other, reward_model.task(other), tmp_path / name.removesuffix('.jsonl'))
    assert not checkpoint.steps(tmp_path / name.removesuffix('.jsonl') / 'checkpoints')


@pytest.mark.slow
@pytest.mark.parametrize('make', [experiment.ziegler_124m, experiment.minilm, experiment.smollm2])
def test_the_command_line_from_start_to_end(make, root, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr('lm.budget.peak_flops', lambda device: 1e9)
  model = SMALL | {'scan_layers': False} | ({'kv_heads': 1} if make().__class__ is reward_model.Decoder else {})
  fields = {f'model.{k}': v for k, v in model.items()} | {
      'data.corpus': root / 'graded.jsonl', 'data.tokenizer': root / 'x.model', 'data.length': 31, 'data.batch': 4,
      'optim.steps': 3, 'optim.warmup': 1, 'loop.log_every': 1, 'loop.eval_every': 3, 'checkpoint.every': 3}
  argv = ['reward', f'--config={make.__name__}', f'--workdir={tmp_path / "run"}',
          *(f'--set={k}={v}' for k, v in fields.items())]
  for again in (False, True) if make is experiment.minilm else (False,):
    assert cli.run_argv(argv, 'Doc.', experiment.CONFIGS, reward_model.task, reward_model.finish) == 0
    out, err = capsys.readouterr()
    assert err == '' and ('already complete' in out) == again and 'scripts.sample' not in out
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert summary['steps'] == 3 and summary['reward']['pairs'] > 0 and 'val_length_accuracy' in summary
  loaded = reward_model.load(tmp_path / 'run')
  assert loaded.normaliser == reward.Affine(summary['reward']['scale'], summary['reward']['shift'])
  assert np.isfinite(loaded.score(loaded.params, loaded.rows([((), 'good')]))).all()


@pytest.mark.parametrize('make', experiment.CONFIGS)
def test_what_a_config_has_beside_the_body(make):
  """A score of the last hidden state, and BERT's pooler before it; an output matrix of its own is left out."""
  c = make()
  body = (decoder if make is not experiment.minilm else encoder).specs(c.model)
  body.pop('unembed', None)
  D = c.model.embed
  assert params.count(reward_model.task(dataclasses.replace(c, peft=peft.Config())).specs) == (
      params.count(body) + D + 1 + (D * D + D) * (make is experiment.minilm))
  assert 'training FLOPs' in look.describe(c, reward_model.task(c))


@pytest.mark.parametrize('changes, part', [
    ({'pooling': 'first'}, "pooling='first'; expected 'last' of a decoder"), ({'margin': -1.0}, 'margin=-1'),
    ({'margin': 1.0, 'loss': reward.Config(kind='best')}, "margin=1.0 with loss.kind='best'"),
    ({'data__length': 48}, 'data.length=48 and one is more'),
    ({'data__length': 45, 'peft': peft.Config('prefix', length=3)}, 'less peft.length=3'),
    ({'mesh__sequence': True}, 'mesh.sequence=True')])
def test_a_config_out_of_range(changes, part):
  with pytest.raises(ConfigError, match=part):
    made(**changes)
