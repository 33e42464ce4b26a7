"""lm/plan.py, lm/plan_search.py and scripts/compile_for: a step compiled for machines that are not here."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from experiments import bert, deberta, dpo, electra, gpt3, grpo, llama, palm, ppo, reward
from lm import config, params, plan, plan_search, plan_tasks, pretrain, run, sharding, targets, train
from lm.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
SMALL = ('model.layers=3', 'model.embed=64', 'model.heads=4', 'model.kv_heads=4', 'model.head_dim=16', 'model.mlp=128',
         'model.vocab=512', 'model.length=256', 'data.length=256', 'data.batch=16', 'optim.warmup=0',
         'optim.decay_steps=0', 'optim.steps=100')
MESH = ('mesh.data=2', 'mesh.fsdp=2', 'mesh.tensor=2')


def small(*changes):
  return config.override(gpt3.gpt3_small(), *SMALL, *changes)


@pytest.fixture
def here(monkeypatch):
  """Plans for 'v5p:2x2x2' whose devices are the 8 fake ones here, and so are compiled by XLA's CPU backend."""
  monkeypatch.setattr(targets, 'devices', lambda target: jax.devices()[:target.size])
  monkeypatch.setattr(targets, 'rate', lambda target, members: 100e9)
  return targets.parse('v5p:2x2x2')


@pytest.mark.slow
def test_a_plan_counts_the_program(here):
  c = small('optim.microbatches=2', 'model.remat=none', *MESH)
  p = plan.make(c, here)
  n = params.count(pretrain.task(c).specs)
  assert p.model_flops == pretrain.task(c).flops.total * 16 * 256 / 8
  assert 0.8 < p.flops / p.model_flops < 1.05 and p.loops == ()
  assert 4 * n / 8 <= p.memory.parameters < 4 * n / 2  # the positions are not divided over tensor
  assert p.memory.optimizer == pytest.approx(2 * p.memory.parameters, rel=0.01)
  assert p.memory.gradients == p.memory.parameters and p.memory.activations > 0 and p.memory.fits
  assert {axis for link in p.links for axis in link.axes} == {'data', 'fsdp', 'tensor'}
  assert p.seconds.keys() == {'compute', 'memory', 'ICI'} and p.bound == max(p.seconds.values())
  assert p.step_s(0.5) == 2 * p.bound and p.mfu(0.5) == pytest.approx(p.mfu() / 2)
  assert p.days(1.0) == pytest.approx(100 * p.bound / 86400)
  assert p.usd(1.0, 2.0) == pytest.approx(p.days(1.0) * 24 * 8 * 2.0)


@pytest.mark.slow
def test_remat_costs_a_third_more_flops(here):
  ratio = {remat: (lambda p: p.flops / p.model_flops)(plan.make(small(f'model.remat={remat}', *MESH), here))
           for remat in ('none', 'full')}
  assert ratio['full'] < 1.35 and 1.2 < ratio['full'] / ratio['none'] < 1.4


@pytest.mark.slow
def test_a_scanned_program_counts_as_an_unrolled_one(here):
  scanned, unrolled = (plan.make(small(f'model.scan_layers={on}', *MESH), here) for on in (True, False))
  assert scanned.flops == pytest.approx(unrolled.flops, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize('c', [
    config.override(bert.bert_base(), 'model.layers=2', 'data.batch=16', *MESH),
    config.override(electra.electra_small(), 'data.batch=16', 'mesh.data=4', 'mesh.fsdp=2'),
    config.override(deberta.deberta_base(), 'model.layers=2', 'data.batch=16', 'mesh.data=4', 'mesh.fsdp=2')],
    ids=['bert', 'electra', 'deberta'])
def test_encoders_need_no_tokenizer(here, c):
  c = config.replace(c, data=dataclasses.replace(c.data, length=128))
  p = plan.make(c, here)
  assert p.flops > 0 and p.memory.fits


@pytest.mark.slow
@pytest.mark.parametrize('make', [ppo.tldr_1b, grpo.deepseekmath_7b, dpo.zephyr_7b, reward.instructgpt_6b],
                         ids=['ppo', 'grpo', 'dpo', 'reward'])
def test_alignment_needs_neither_prompts_nor_rewards(make, here):
  c = make()
  shape = {'layers': 2, 'embed': 64, 'heads': 4, 'kv_heads': 4, 'head_dim': 16, 'mlp': 128, 'vocab': 512, 'length': 256}
  group = {'rollout__new_tokens': 32, 'rollout__group': min(2, c.rollout.group)} if hasattr(c, 'rollout') else {}
  c = config.replace(c, model=dataclasses.replace(c.model, **shape), data__length=32, data__batch=16,
                     mesh=sharding.Config(data=2, fsdp=2, tensor=2), **group)
  p = plan.make(c, here)
  assert p.memory.fits and 0 < p.model_flops < 4 * p.flops


def test_the_mesh_must_have_as_many_devices(here):
  with pytest.raises(ConfigError, match='mesh: 4 devices, --target=v5p:2x2x2 has 8'):
    plan.make(small('mesh.data=4'), here)


def a_plan(c, **memory):
  kinds = {'parameters': 1.0, 'gradients': 1.0, 'optimizer': 2.0, 'activations': 4.0, 'limit': 100.0} | memory
  memory = plan.Memory(**{k: v * 2**30 for k, v in kinds.items()})
  return plan.Plan(targets.parse('v5p:2x2x2'), c.mesh, memory, 1.0, 1.0, {'compute': 1.0}, (), 1, 1, 0.0)


@pytest.mark.parametrize('changes, memory, part', [
    ((), {}, 'fits: 8.0 of 100.0 GiB a device (8%)'),
    (('mesh.data=8',), {'optimizer': 200.0}, 'shard them 3x further, by mesh.fsdp=3'),
    (('model.remat=none',), {'activations': 300.0}, 'activations take 300.0 GiB: --set model.remat=full'),
    ((), {'activations': 300.0}, '--set optim.microbatches=4'),
    (('optim.microbatches=16',), {'activations': 300.0}, 'one row a device already; raise mesh.tensor=1')])
def test_advice_is_worked_out(changes, memory, part):
  c = small(*changes)
  assert part in plan.advice(c, a_plan(c, **memory))


def test_what_a_tpu_compiler_says_that_it_needs():
  assert plan.needed('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 120.50G of 95.74G hbm.') == (
      120.5 * 2**30)
  assert plan.needed('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
                     '(616.00G) exceeds available HBM (95.74G).') == 616 * 2**30
  assert plan.needed('INTERNAL: no') is None


def test_a_step_that_its_compiler_gives_up_is_a_plan_that_does_not_fit(here, monkeypatch):
  def fails(*args):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Used 120.00G of 95.74G hbm.')
  monkeypatch.setattr(plan, 'compiled', fails)
  p = plan.make(small('mesh.data=8'), here)
  assert not p.memory.fits and p.memory.peak == pytest.approx(120 * 2**30) and math.isnan(p.flops)
  assert 'activations take' in plan.advice(small('mesh.data=8'), p)


def test_a_search_puts_what_fits_first(here):
  found = plan_search.candidates(small(), here)
  assert [x.seconds for x in found] == sorted(x.seconds for x in found)
  assert all(x.config.mesh.devices == 8 for x in found)
  assert len({x.config.mesh for x in found}) == len(found) > 5
  text = plan_search.changes(small(), found[0].config)
  assert config.override(small(), *[x.strip() for x in text.split('--set') if x.strip()]) == found[0].config


def test_a_search_in_which_nothing_fits_says_the_least(here, monkeypatch):
  device = dataclasses.replace(here.device, memory=1e3)
  with pytest.raises(ConfigError, match='no mesh of v5p:2x2x2 fits .* least is'):
    plan_search.candidates(small(), dataclasses.replace(here, device=device))


def test_a_search_knows_that_more_memory_allows_less_work(here):
  """With room for everything nothing is recomputed; with little of it, much is."""
  c = small('model.layers=24', 'model.embed=1024', 'data.batch=64')
  least = lambda gib: plan_search.candidates(c, dataclasses.replace(
      here, device=dataclasses.replace(here.device, memory=gib * 2**30)))[0]
  assert least(90).config.model.remat == 'none'
  assert least(90).seconds <= least(2).seconds and least(2).memory < 2 * 2**30


@pytest.mark.parametrize('module, name, target', [
    (gpt3, 'gpt3_175b_v5p', 'v5p:8x8x16'), (gpt3, 'gpt3_175b_h100', 'h100:128x8'),
    (llama, 'llama2_70b_v5p', 'v5p:4x4x4'), (palm, 'palm_540b_v4', 'v4:16x16x16')])
def test_placed_configs_differ_from_the_papers_in_place_only(module, name, target):
  placed, paper = getattr(module, name)(), getattr(module, name.rpartition('_')[0])()
  assert placed.mesh.devices == targets.parse(target).size and placed in [f() for f in module.CONFIGS]
  changed = set(config.diff(paper, placed))
  assert all(path.startswith('mesh.') or path in ('optim.microbatches', 'model.remat', 'model.vocab')
             for path in changed), changed


def script(*arguments):
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | {'JAX_PLATFORMS': 'cpu'}
  return subprocess.run([sys.executable, '-m', 'scripts.compile_for', *arguments], cwd=ROOT, env=environment,
                        capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
@pytest.mark.parametrize('arguments, part', [
    (('--experiment=gpt9',), 'expected one of adapters, bert, chinchilla'),
    (('--experiment=gpt3', '--config=no'), 'expected one of gpt3_small'),
    (('--experiment=gpt3', '--config=gpt3_small', '--target=v9'), "no device 'v9'"),
    (('--experiment=gpt3', '--config=gpt3_small', '--target=h100:1x8', '--set', 'no.thing=1'), 'no')])
def test_mistakes_end_in_one_line(arguments, part):
  done = script(*arguments)
  errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  assert done.returncode == 2 and len(errors) == 1 and part in errors[0] and 'Traceback' not in done.stderr


def flags_of(*changes):
  return [f'--set={x}' for x in (*SMALL, *changes)]


@pytest.mark.slow
def test_for_a_tpu():
  pytest.importorskip('libtpu')
  done = script('--experiment=gpt3', '--config=gpt3_small', '--target=v5e:2x4', '--json', *flags_of(*MESH))
  assert done.returncode == 0, done.stderr
  report = json.loads(done.stdout)
  assert report['fits'] and report['devices'] == 8 and 0.8 < report['flops']['ratio'] < 1.35
  assert {axis for x in report['collectives'] for axis in x['axes']} == {'data', 'fsdp', 'tensor'}
  assert report['binding'] in report['seconds'] and report['unknown_loops'] == [] and report['usd'] > 0


@pytest.mark.slow
def test_for_a_tpu_that_is_too_small():
  pytest.importorskip('libtpu')
  done = script('--experiment=gpt3', '--config=gpt3_small', '--target=v5e:1x1', *flags_of(
      'model.embed=4096', 'model.mlp=65536', 'model.layers=8'))
  assert done.returncode == 2 and 'does not fit' in done.stderr.splitlines()[-1], done.stderr
  assert 'parameters' in done.stdout


@pytest.mark.slow
def test_for_gpus():
  pytest.importorskip('jax_plugins.xla_cuda12')
  done = script('--experiment=gpt3', '--config=gpt3_small', '--target=h100:2x4', *flags_of(*MESH))
  assert done.returncode == 0, done.stderr
  assert 'fits: ' in done.stdout.splitlines()[-1] and 'NVLink' in done.stdout and 'network' in done.stdout


def test_the_state_of_a_plan_is_that_of_a_run(here):
  """Bytes of the state on one device, from the shardings that a run has."""
  c = small(*MESH)
  parts = run.build(c, pretrain.task(c), jax.devices())
  memory = plan.make(c, here).memory
  with sharding.use(parts.mesh):
    make = lambda key: train.init(pretrain.task(c).specs, parts.tx, parts.trainable, key)
    state = jax.jit(make, out_shardings=parts.state)(jax.random.key(0))
  one = jax.devices()[0]
  held = lambda tree: sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == one)
  assert memory.parameters == held(state.params) and memory.optimizer == held(state.opt_state)


def test_the_stand_in_of_a_batch_is_spread_over_the_mesh():
  c = small(*MESH)
  batch = plan_tasks.batch_of(c, sharding.make_mesh(c.mesh, jax.devices()))
  assert {x.shape for x in jax.tree.leaves(batch)} == {(16, 257)}
  assert batch.ids_BT.sharding.shard_shape((16, 257)) == (4, 257)
