"""Every config: exact published parameter counts, JSON round trip, and (shrunk) three real steps."""

import dataclasses
import json

import jax
from marks import few
import pytest

from experiments import chinchilla, gpt2, gpt3, llama, palm
from lm import config, look, params, pretrain, run
from lm.models import decoder

# Exact counts of the published shapes: unique parameters, tied matrices once.
COUNTS = {
    'gpt2_124m': 124_439_808, 'gpt2_355m': 354_823_168, 'gpt2_774m': 774_030_080, 'gpt2_1558m': 1_557_611_200,
    'nanogpt_124m': 124_337_664, 'shakespeare_char_cpu': 804_096, 'shakespeare_char_gpu': 10_745_088,
    'gpt3_small': 125_226_240, 'gpt3_medium': 355_871_744, 'gpt3_large': 760_300_032, 'gpt3_xl': 1_315_723_264,
    'gpt3_2_7b': 2_651_553_280, 'gpt3_6_7b': 6_658_404_352, 'gpt3_13b': 12_853_386_240, 'gpt3_175b': 174_604_259_328,
    'llama2_7b': 6_738_415_616, 'llama2_13b': 13_015_864_320, 'llama2_70b': 68_976_648_192, 'llama3_8b': 8_030_261_248,
    'smollm2_135m': 134_515_008, 'palm_8b': 8_632_012_800, 'palm_62b': 62_495_662_080, 'palm_540b': 540_356_474_880,
    'chinchilla_70b': 70_065_209_344,
}
ALL = {f.__name__: f for module in (gpt2, gpt3, llama, palm, chinchilla) for f in module.CONFIGS}
SHRINK = ('data.corpus=', 'data.tokenizer=byte', 'data.length=16', 'data.batch=8', 'data.split=tail',
          'data.validation_fraction=0.2', 'model.vocab=384', 'model.length=16', 'model.layers=2', 'model.embed=16',
          'model.heads=2', 'model.head_dim=8', 'model.mlp=32', 'optim.warmup=1', 'optim.decay_steps=0', 'optim.steps=3',
          'loop.log_every=1', 'checkpoint.every=3', 'optim.microbatches=1', 'mesh.data=1', 'mesh.fsdp=1',
          'mesh.tensor=1')


@pytest.mark.parametrize('name', COUNTS)
def test_parameter_counts_are_exact(name):
  c = ALL[name]()
  assert params.count(pretrain.task(c).specs) == COUNTS[name]
  assert f'{COUNTS[name]:,}' in look.describe(c, pretrain.task(c))


PLACED = {'gpt3_175b_v5p', 'gpt3_175b_h100', 'llama2_70b_v5p', 'palm_540b_v4'}  # other configs on a mesh


def test_every_published_shape_is_counted():
  assert set(ALL) - set(COUNTS) == {'quickstart', 'shakespeare_char_cpu_modern'} | PLACED


@pytest.mark.parametrize('name', ALL)
def test_round_trip_and_documentation(name):
  c = ALL[name]()
  assert config.from_json(type(c), json.loads(json.dumps(config.to_json(c)))) == c
  assert ALL[name].__doc__


def shrink(c, *more):
  """The config at toy size; fields are set in an order that keeps every step valid."""
  small = config.to_json(c)
  for item in (*SHRINK, f'model.kv_heads={min(c.model.kv_heads, 2)}', *more):
    path, _, text = item.partition('=')
    group, field = path.split('.')
    old = small[group][field]
    small[group][field] = type(old)(text) if isinstance(old, (int, float)) and not isinstance(old, bool) else text
  return config.from_json(type(c), small)


def kinds():
  """Of the configs that are the same model under the same optimizer at toy size, but for how it starts, the first."""
  found = {}
  for name, make in ALL.items():
    c = shrink(make())
    model = dataclasses.replace(c.model, logit_scale=1.0, init=decoder.Init(c.model.init.scheme))
    found.setdefault((model, c.optim.name, c.optim.schedule), name)
  return found.values()


@pytest.mark.parametrize('name', few(kinds(), 'quickstart', 'llama3_8b'))
def test_three_steps_of_each_kind(name, tmp_path):
  (tmp_path / 'text.txt').write_text('the quick brown fox 敏捷的棕色狐狸 ' * 60, encoding='utf-8')
  c = ALL[name]()
  c = shrink(c, f'data.corpus={tmp_path / "text.txt"}')
  summary = run.run(c, pretrain.task(c), tmp_path / 'run')
  assert summary['steps'] == 3
  assert 0 < summary['val_loss'] < 12
  rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  losses = [r['loss'] for r in rows if 'loss' in r]
  assert len(losses) == 3
  assert all(isinstance(x, float) for x in losses)


def test_describe_allocates_nothing():
  before = len(jax.live_arrays())
  c = palm.palm_540b()
  assert '540,356,474,880' in look.describe(c, pretrain.task(c))
  assert len(jax.live_arrays()) == before
