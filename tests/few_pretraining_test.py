"""Few parameters under the losses of pretraining: a model goes on with texts of a domain, and the rest of it stays."""

import functools
import json
import pathlib
import re
import subprocess
import sys

import init_from_test
import jax
from marks import slow
import numpy as np
import pytest
import tiny

from experiments import bert, deberta, electra
from lm import (
  checkpoint,
  classification,
  config,
  loop,
  optim,
  params,
  peft,
  peft_hf,
  pretrain,
  pretrain_encoder,
  run,
  start,
  weights,
)
from lm.data import loader
from lm.errors import ConfigError, Preempted
from lm.models import decoder, hf
from lm.text import tokenizer, training

ROOT = pathlib.Path(__file__).parent.parent
V = 258
SHAPE = dict(length=40, layers=2, embed=16, heads=4, head_dim=4, mlp=24)
METHODS = {
    'lora': dict(rank=2, rate=0.3, targets='^blocks/(attn/[qkvo]|mlp/(up|down))$'), 'houlsby': dict(width=3),
    'pfeiffer': dict(width=3), 'top': dict(layers=1), 'prefix': dict(length=3, hidden=5), 'prompt': dict(length=3)}
CHANGED = {  # of the model's own weights, LoRA merged
    'top': '^blocks/', 'lora': METHODS['lora']['targets'], 'houlsby': 'norm/'}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  tiny.share_compiled(monkeypatch)
  monkeypatch.setattr('lm.budget.peak_flops', lambda device: 1e9)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """Texts, a decoder and an encoder that are there to go on, and the encoder's tokenizer."""
  root = tmp_path_factory.mktemp('few')
  texts = ['good film 好电影 bad film 坏电影 the a of'] * 20
  training.train_sentencepiece(texts, root / 'x.model', vocab=282, control_symbols=('[CLS]', '[SEP]', '[MASK]'))
  (root / 'text.jsonl').write_text('\n'.join(json.dumps({'text': '\n'.join(f'{t} {i} {j}.' for j in range(12))})
                                             for i, t in enumerate(texts * 2)))
  c = decoder.Config(vocab=V, kv_heads=4, **SHAPE)
  p = jax.device_get(jax.jit(lambda key: params.init(decoder.specs(c), key))(jax.random.key(3)))
  hf.save(root / 'gpt', c, p, tokenizer.byte())
  return root


def written(root, method, **changes):
  """A run of the decoder on the texts."""
  c = pretrain.Config(
      model=decoder.Config(vocab=V, kv_heads=4, **SHAPE), init_from=str(root / 'gpt'),
      data=loader.Config(corpus=str(root / 'text.jsonl'), tokenizer='byte', length=24, batch=8, validation_fraction=0.2,
                         threads=0),
      peft=peft.Config(method, train='', **METHODS.get(method, {})), loop=loop.Config(log_every=1, eval_every=2),
      optim=optim.Config(lr=0.2 if method == 'prompt' else 0.02, steps=4, warmup=1, weight_decay=0.0),
      checkpoint=checkpoint.Config(every=2))
  return config.replace(c, **changes)


def script(name, *argv):
  return subprocess.run([sys.executable, '-m', f'scripts.{name}', *argv], capture_output=True, text=True, cwd=ROOT,
                        timeout=300, check=False)


@pytest.fixture(scope='module')
def before(root, tmp_path_factory):
  """The loss of held-out text before anything is learned."""
  c = written(root, 'full', optim__lr=1e-12)
  return run.run(c, pretrain.task(c), tmp_path_factory.mktemp('before'))['val_loss']


def whole(root, method, folder):
  """(the run's config, its task, its summary)."""
  c = written(root, method)
  task = pretrain.task(c)
  return c, task, run.run(c, task, folder / 'whole')


@pytest.mark.slow
@pytest.mark.parametrize('method', ['lora', *map(slow, ('houlsby', 'pfeiffer', 'top', 'prefix', 'prompt'))])
def test_a_decoder_goes_on_with_few_parameters(method, root, before, tmp_path, monkeypatch):
  """They alone are kept and change; what was stopped and resumed is the same."""
  c, task, summary = whole(root, method, tmp_path)
  assert summary['val_loss'] < before
  frozen = peft.freeze(c.peft, c.model.layers)
  own = checkpoint.restore_params(tmp_path / 'whole/checkpoints', params.abstract(task.specs), f'^(?!.*(?:{frozen}))')
  kept = sum(x.size for x in jax.tree.leaves(own))
  assert 0 < kept == params.count(task.specs) - params.count(task.specs, frozen) < 0.6 * params.count(task.specs)
  found = params.flatten(peft.without(weights.load(tmp_path / 'whole').params))
  for path, w in params.flatten(hf.load(root / 'gpt')[1]).items():
    moved = re.search(CHANGED.get(method, '^$'), path)
    assert np.array_equal(found[path], w) != bool(moved), path
  with tiny.batches_through(monkeypatch, tiny.signal_at(2)), pytest.raises(Preempted):
    run.run(c, task, tmp_path / 'cut')
  run.run(c, task, tmp_path / 'cut')
  lines = [[(line['step'], line['objective']) for line in map(json.loads, (
      tmp_path / name / 'metrics.jsonl').read_text().splitlines()) if 'objective' in line] for name in ('whole', 'cut')]
  assert len(lines[0]) == c.optim.steps and lines[0] == lines[1]


@functools.cache
def measured(root, model):
  """The loss of the held-out text by the command."""
  done = script('evaluate', f'--model={model}', f'--corpus={root}/text.jsonl', '--part=validation', '--newest',
                '--validation_fraction=0.2', f'--length={written(root, "full").data.length}')
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)['validation']['loss']


@pytest.mark.slow
@pytest.mark.parametrize('method', ['lora', 'houlsby', 'prefix', 'prompt'])
def test_its_held_out_text_is_measured_with_what_it_learned(method, root, before, tmp_path):
  """And the base without it; LoRA's dropout is no part of an evaluation."""
  _, _, summary = whole(root, method, tmp_path)
  losses = [measured(root, model) for model in (tmp_path / 'whole', root / 'gpt')]
  assert losses == pytest.approx([summary['val_loss'], before], rel=1e-5) and losses[0] < losses[1]


@pytest.mark.slow
def test_lora_begins_as_the_base_and_a_run_begins_with_what_it_learned(root, before, tmp_path):
  _, _, summary = whole(root, 'lora', tmp_path)
  base, merged = (run.run(written(root, 'full', init_from=str(model), optim__lr=1e-12), pretrain.task(written(
      root, 'full')), tmp_path / name) for name, model in (('base', root / 'gpt'), ('more', tmp_path / 'whole')))
  assert merged['val_loss'] == pytest.approx(summary['val_loss'], rel=1e-5) and base['val_loss'] == before
  first = [json.loads((tmp_path / name / 'metrics.jsonl').read_text().splitlines()[0])['loss']
           for name in ('whole', 'base')]
  assert first[0] == first[1]


MASKED = {'bert': (bert.bert_cpu, dict(nsp=True)), 'deberta': (deberta.deberta_cpu, {}),
          'electra': (electra.electra_cpu, {}), 'deberta_v3': (deberta.deberta_v3_cpu, {})}


def masked(root, kind, folder, **changes):
  """A run of masked words, shrunk."""
  make, fields = MASKED[kind]
  c = init_from_test.shrink(
      make(), **dict(
          data__corpus=str(root / 'text.jsonl'), data__tokenizer=str(root / 'x.model'), data__validation_fraction=0.2,
          data__threads=0, optim__lr=0.01, optim__steps=4, optim__warmup=1, loop__log_every=1, loop__eval_every=2,
          checkpoint__every=2) | fields | changes)
  task = pretrain_encoder.task(c)
  return c, task, run.run(c, task, folder)


@pytest.mark.slow
@pytest.mark.parametrize('kind, method', [
    ('bert', 'lora'), ('bert', 'prefix'), ('bert', 'houlsby'), ('bert', 'top'), ('deberta', 'lora'),
    ('deberta', 'top'), ('electra', 'lora'), ('deberta_v3', 'lora')])
def test_an_encoder_goes_on_with_few_parameters(kind, method, root, tmp_path):
  """And what it learned by LoRA begins a classifier, and goes to transformers and to PEFT; of a pair, both learn."""
  room = dict(data__length=28)  # for a prefix
  _, _, began = masked(root, kind, tmp_path / 'base', **room)
  few = peft.Config(method, train='', **METHODS[method])
  # A prefix begins as noise, and attention this small has small gradients.
  faster = dict(optim__lr=0.3, optim__steps=20, checkpoint__every=10, loop__eval_every=10) if method == 'prefix' else {}
  c, task, after = masked(root, kind, tmp_path / 'more', init_from=str(tmp_path / 'base'), peft=few, **room | faster)
  assert after['val_loss'] < began['val_loss']
  mine, base = (weights.load_encoder(tmp_path / name).params for name in ('more', 'base'))
  found, given = params.flatten(peft.without(mine)), params.flatten(base)
  assert found.keys() == given.keys()
  for path, w in given.items():
    moved = re.search(CHANGED.get(method, '^$'), path)
    assert np.array_equal(found[path], w) != bool(moved), path
  if method != 'lora':
    return
  pair = [params.flatten(weights.params_from(tmp_path / name, params.abstract(task.base.specs), True))
          for name in ('base', 'more')]
  moved = {path for path, w in pair[0].items() if not np.array_equal(w, pair[1][path])}
  assert {re.sub('blocks/.*', '', path) for path in moved} == (
      {'generator/', 'discriminator/'} if len(pretrain_encoder.networks(c.model)) > 1 else {''})
  tuned = init_from_test.films(root, getattr(c.model, 'discriminator', c.model), tmp_path / 'more',
                               data__tokenizer=str(root / 'x.model'))
  begun = start.first(tuned, classification.task(tuned), run.build(tuned, classification.task(tuned))).params
  assert np.array_equal(begun['blocks']['attn']['q'], mine['blocks']['attn']['q'])
  for to in ('hf', *['peft'] * (kind == 'bert')):
    done = script('convert', f'--from={tmp_path}/more', f'--to={to}', f'--out={tmp_path}/{to}')
    assert done.returncode == 0, done.stderr
  got = params.flatten(hf.load(tmp_path / 'hf')[1])
  assert all(np.array_equal(got[path], w) for path, w in found.items() if path in got)
  if kind == 'bert':
    _, tree = peft_hf.load(tmp_path / 'peft', c.model, base)
    np.testing.assert_allclose(peft.merge(tree)['blocks']['attn']['q'], mine['blocks']['attn']['q'], atol=1e-6)


@pytest.mark.parametrize('change, message', [
    (dict(peft__method='prompt', data__isolate=True), 'data.isolate=True: a prompt stands before a row'),
    (dict(peft__method='lora', optim__freeze='embed'), "optim.freeze='embed' with peft.method='lora'"),
    (dict(peft__method='prefix', data__length=39), 'data.length=39 is more than model.length=40 positions less'),
    (dict(peft__mixout=0.5, peft__method='full', init_from=''), 'peft.mixout=0.5 with init_from')])
def test_what_a_decoder_cannot_take_is_refused(change, message, root):
  with pytest.raises(ConfigError, match=re.escape(message)):
    written(root, 'full', **change)


@pytest.mark.parametrize('make, change, message', [
    (bert.bert_cpu, dict(peft__method='prompt'), "peft.method='prompt', peft.mixout=0.0; expected no prompt"),
    (bert.bert_cpu, dict(peft__mixout=0.5), 'and no mixout'),
    (deberta.deberta_cpu, dict(peft__method='prefix', data__length=96), 'DeBERTa scores distances'),
    (electra.electra_cpu, dict(peft__method='houlsby'), "peft.method='houlsby', peft.mixout=0.0; expected full"),
    (electra.electra_cpu, dict(peft__mixout=0.5), 'and no mixout')])
def test_what_an_encoder_cannot_take_is_refused(make, change, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    config.replace(make(), **change)
