"""Checkpoints: what is restored is what was saved, on any mesh, whatever was damaged or killed."""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest

from lm import checkpoint, params, seal
from lm.errors import CheckpointError, ConfigError

PATTERN = r'attn'  # the trainable half


@struct.dataclass
class State:
  step: jax.Array
  params: params.Tree
  frozen: params.Tree
  opt_state: params.Tree
  skipped: jax.Array


def mesh_of(*shape):
  return jax.make_mesh(shape, ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2,
                       devices=jax.devices()[:shape[0] * shape[1]])


def state_of(value):
  """A state with holes (None), tuples and named tuples; every leaf depends on `value`."""
  tree = {'blocks': {'attn': {'q': jnp.arange(128.0).reshape(16, 8) + value, 'b': jnp.full((8,), value, jnp.bfloat16)}},
          'embed': jnp.arange(64.0).reshape(8, 8) - value}
  trainable, frozen = params.split(tree, params.match(tree, PATTERN))
  opt_state = jax.tree.map(lambda x: x + jnp.asarray(value).astype(x.dtype), optax.adamw(1e-3).init(trainable))
  return State(jnp.int32(value), trainable, frozen, opt_state, jnp.int32(0))


def place(tree, mesh):
  """Matrices over both axes, the rest replicated."""
  return jax.tree.map(lambda x: NamedSharding(mesh, P('data', 'tensor') if x.ndim == 2 else P()), tree)


def abstract_of(mesh, tree=None):
  tree = jax.eval_shape(lambda: state_of(0)) if tree is None else tree
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, place(tree, mesh))


def assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for path, x in params.flatten(want).items():
    y = params.flatten(got)[path]
    assert y.dtype == x.dtype, path
    np.testing.assert_array_equal(np.asarray(y), np.asarray(x), err_msg=path)


def ignore(line):
  del line


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  """A directory with steps 1 and 2, saved from a 4 x 2 mesh; copy it before damaging it."""
  directory = tmp_path_factory.mktemp('two') / 'checkpoints'
  with checkpoint.Saver(directory, checkpoint.Config(), None, ignore) as saver:
    for s in (1, 2):
      saver.save(s, jax.device_put(state_of(s), place(state_of(s), mesh_of(4, 2))), {'tokens': s * 2**40},
                 {'val_loss': 1 / s})
  return directory


@pytest.fixture
def copy(two_steps, tmp_path):
  shutil.copytree(two_steps, tmp_path / 'checkpoints')
  return tmp_path / 'checkpoints'


@pytest.mark.parametrize('shape', [(4, 2), (8, 1), (2, 4), (1, 1)])
def test_restores_exactly_onto_any_mesh(two_steps, shape):
  step, state, meta = checkpoint.restore(two_steps, abstract_of(mesh_of(*shape)))
  assert (step, meta) == (2, {'tokens': 2**41})
  assert_equal(state, state_of(2))
  q = state.params['blocks']['attn']['q']
  assert q.sharding.shard_shape(q.shape) == (16 // shape[0], 8 // shape[1])


def test_restores_without_sharding_and_an_older_step(two_steps):
  step, state, meta = checkpoint.restore(two_steps, jax.eval_shape(lambda: state_of(0)), step=1)
  assert (step, meta) == (1, checkpoint.read_meta(two_steps, 1))
  assert_equal(state, state_of(1))


def test_listing(two_steps, tmp_path):
  assert checkpoint.steps(two_steps) == [1, 2]
  assert checkpoint.best(two_steps, 'val_loss') == 2
  assert checkpoint.best(two_steps, 'val_loss', 'max') == 1
  assert checkpoint.best(two_steps, 'accuracy') is None
  assert checkpoint.steps(tmp_path / 'absent') == []
  assert checkpoint.restore(tmp_path / 'absent', abstract_of(mesh_of(1, 1))) is None
  with pytest.raises(CheckpointError, match=r'step 7 is not sealed; expected one of the steps 1, 2'):
    checkpoint.restore(two_steps, abstract_of(mesh_of(1, 1)), step=7)


def test_flip_in_every_file_of_the_newest_step_falls_back(copy):
  """Orbax itself restores most of these silently wrong."""
  files = [p for p in (copy / '2').rglob('*') if p.is_file()] + [copy / '2.sha256.json']
  kinds = {'_METADATA', '_sharding', 'manifest.ocdbt', '_CHECKPOINT_METADATA', 'process_0', '2.sha256.json'}
  assert kinds <= {p.name for p in files}
  rng, wanted = random.Random(0), abstract_of(mesh_of(1, 1))
  for path in files:
    whole = path.read_bytes()
    data = bytearray(whole)
    at = rng.randrange(len(data))
    data[at] ^= 4
    path.write_bytes(data)
    lines = []
    step, state, _ = checkpoint.restore(copy, wanted, log=lines.append)
    assert step == 1, path
    assert len(lines) == 1
    assert all(text in lines[0] for text in ('rejected step 2', str(path), 'using step 1'))
    path.write_bytes(whole)
  assert_equal(state, state_of(1))
  assert checkpoint.restore(copy, wanted, log=ignore)[0] == 2


def test_all_damaged_is_an_error_that_names_each(copy):
  for s in (1, 2):
    next((copy / str(s)).rglob('manifest.ocdbt')).unlink()
  with pytest.raises(CheckpointError, match=r'rejected step 2 .*manifest.ocdbt: missing.*step 1') as error:
    checkpoint.restore(copy, abstract_of(mesh_of(1, 1)), log=ignore)
  assert error.value.code == 4
  assert '\n' not in str(error.value)


def test_stray_and_unsealed_steps_are_ignored_then_saved_again(copy):
  (copy / '99').mkdir()
  (copy / 'notes').mkdir()
  seal.path_of(copy, 2).unlink()  # the kill fell between the save and its seal
  lines = []
  assert checkpoint.restore(copy, abstract_of(mesh_of(1, 1)), log=lines.append)[0] == 1
  assert [line.split()[1] for line in lines] == [f'{copy / n}:' for n in ('2', '99', 'notes')]
  with checkpoint.Saver(copy, checkpoint.Config(), 1, lines.append) as saver:
    assert any('2: saved but never sealed; removed' in line for line in lines)
    assert saver.save(2, state_of(5), {}, {})
    saver.wait()
    assert saver.save(99, state_of(6), {}, {})
  assert_equal(checkpoint.restore(copy, abstract_of(mesh_of(1, 1)), 2)[1], state_of(5))
  assert (copy / 'notes').is_dir()
  assert checkpoint.steps(copy) == [1, 2, 99]  # keep=2, and step 1 alone has a val_loss


def test_step_interrupted_while_pruned_is_no_checkpoint(copy):
  shutil.copytree(copy / '1', copy / '3')
  next((copy / '3').rglob('_METADATA')).unlink()
  assert checkpoint.restore(copy, abstract_of(mesh_of(1, 1)), log=ignore)[0] == 2
  with checkpoint.Saver(copy, checkpoint.Config(), 2, ignore) as saver:
    assert saver.save(3, state_of(3), {}, {})
  assert_equal(checkpoint.restore(copy, abstract_of(mesh_of(1, 1)))[1], state_of(3))


def test_continuing_from_an_older_step_moves_the_newer_ones_aside(copy):
  (copy / '2' / '_METADATA').write_text('{}')
  lines = []
  with checkpoint.Saver(copy, checkpoint.Config(), 1, lines.append) as saver:
    assert checkpoint.steps(copy) == [1]
    assert saver.save(2, state_of(7), {}, {})
  assert_equal(checkpoint.restore(copy, abstract_of(mesh_of(1, 1)))[1], state_of(7))
  assert (copy / 'abandoned' / '2' / '_METADATA').read_text() == '{}'
  assert any('abandoned' in line for line in lines)


@pytest.mark.parametrize(('mode', 'left'), [('min', [1, 4, 5]), ('max', [2, 4, 5])])
def test_keeps_the_newest_and_the_best(tmp_path, mode, left):
  with checkpoint.Saver(tmp_path, checkpoint.Config(keep=2, keep_best=1, mode=mode), None) as saver:
    for s, loss in enumerate([1.0, 5.0, 3.0, float('nan'), 4.0], 1):
      assert saver.save(s, {'w': jnp.full((4,), s)}, {}, {'val_loss': loss})
  assert checkpoint.steps(tmp_path) == left
  assert sorted(os.listdir(tmp_path)) == sorted(n for s in left for n in (str(s), f'{s}.sha256.json'))


def test_milestones_are_kept_for_good_and_counted_beforehand(tmp_path, monkeypatch):
  c = checkpoint.Config(every=1, keep=1, keep_best=1, keep_every=3)
  with checkpoint.Saver(tmp_path, c, None) as saver:
    for s in range(1, 9):
      assert saver.save(s, {'w': jnp.full((4,), s)}, {}, {'val_loss': abs(s - 2.0)})
  assert checkpoint.steps(tmp_path) == [2, 3, 6, 8]  # the best, two milestones, the newest
  asked = []
  monkeypatch.setattr(seal, 'require_room', lambda directory, nbytes, what: asked.append(what))
  checkpoint.preflight(tmp_path, 100, c, 8)
  checkpoint.preflight(tmp_path, 100, checkpoint.Config(), 8)
  assert asked == ['1.2 x 5 checkpoints', '1.2 x 4 checkpoints']


def test_what_is_not_saved(tmp_path):
  with checkpoint.Saver(tmp_path, checkpoint.Config(), None) as saver:
    assert not saver.save(1, state_of(1), {}, {}, finite=False)
    assert saver.save(2, state_of(2), {}, {})
    saver.wait()
    before = seal.read(tmp_path, 2)
    assert not saver.save(2, state_of(3), {'evaluated': 2}, {'val_loss': 0.5})  # what was found out since it was saved
    assert seal.read(tmp_path, 2) == before | {'meta': {'evaluated': 2}, 'metrics': {'val_loss': 0.5}}
    assert seal.check(tmp_path, 2) is None
    with pytest.raises(CheckpointError, match='step 1; expected one newer than 2'):
      saver.save(1, state_of(1), {}, {})
    with pytest.raises(TypeError):
      saver.save(3, state_of(3), {'function': ignore}, {})
  assert checkpoint.steps(tmp_path) == [2]
  assert_equal(checkpoint.restore(tmp_path, abstract_of(mesh_of(1, 1)))[1], state_of(2))


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
  mesh = mesh_of(4, 2)
  here = NamedSharding(mesh, P('data', 'tensor'))
  init = jax.jit(lambda: {'w': jnp.arange(2.0**21).reshape(2048, 1024), 'b': jnp.arange(64.0).reshape(8, 8)},
                 out_shardings=here)
  step = jax.jit(lambda s: jax.tree.map(lambda x: x * -2 + 1, s), donate_argnums=0, out_shardings=here)
  control = init()
  step(control)
  assert control['w'].is_deleted()  # the step does donate
  state = init()
  saved = {}
  with checkpoint.Saver(tmp_path, checkpoint.Config(), None) as saver:
    for s in (1, 2):
      saved[s] = jax.tree.map(np.array, jax.tree.map(jnp.copy, state))
      saver.save(s, state, {}, {})
      for _ in range(4):
        state = step(state)
  for s, values in saved.items():
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), values)
    assert_equal(checkpoint.restore(tmp_path, abstract, s)[1], values)


def test_mismatches_name_the_leaf_and_both_sides_before_orbax_is_asked(two_steps, monkeypatch):
  monkeypatch.setattr(checkpoint, '_load', lambda *a: pytest.fail('reached orbax'))
  good = jax.eval_shape(lambda: state_of(0))
  attn = good.params['blocks']['attn']

  def refuses(text, **attn_leaves):
    bad = good.replace(params={'blocks': {'attn': attn | attn_leaves}, 'embed': None})
    with pytest.raises(ConfigError, match=text):
      checkpoint.restore(two_steps, bad)

  refuses(r'params/blocks/attn/q is float32\[16, 8\] in the checkpoint, float32\[32, 8\] in this config',
          q=jax.ShapeDtypeStruct((32, 8), jnp.float32))
  refuses(r'params/blocks/attn/q is float32\[16, 8\] in the checkpoint, bfloat16\[16, 8\] in this config',
          q=jax.ShapeDtypeStruct((16, 8), jnp.bfloat16))
  refuses(r'params/blocks/attn/new float32\[3\] is not in the checkpoint', new=jax.ShapeDtypeStruct((3,), jnp.float32))
  refuses(r'params/blocks/attn/q float32\[16, 8\] is in the checkpoint only', q=None)
  with pytest.raises(ConfigError, match=rf'checkpoints/2: another optimizer: opt_state.* and \d+ more; .*set the '
                     rf'config as it was, or start anew from its weights: --set init_from={two_steps.parent}'):
    checkpoint.restore(two_steps, good.replace(opt_state=optax.sgd(0.1, momentum=0.9).init(good.params)))


def test_takes_over_parameters_alone(two_steps):
  tree = jax.eval_shape(lambda: params.join(state_of(0).params, state_of(0).frozen))
  mesh = mesh_of(2, 4)
  want = params.join(state_of(2).params, state_of(2).frozen)
  assert_equal(checkpoint.restore_params(two_steps, abstract_of(mesh, tree)), want)
  more = tree | {'head': jax.ShapeDtypeStruct((5, 8), jnp.float32)}
  some = checkpoint.restore_params(two_steps, more, r'embed|/q$', step=2)
  assert some['head'] is None
  assert some['blocks']['attn']['b'] is None
  np.testing.assert_array_equal(some['blocks']['attn']['q'], want['blocks']['attn']['q'])
  np.testing.assert_array_equal(some['embed'], want['embed'])


def test_parameters_that_cannot_be_taken_over(two_steps, tmp_path):
  tree = {'embed': jax.ShapeDtypeStruct((9, 8), jnp.float32)}
  with pytest.raises(ConfigError, match=r'frozen/embed is float32\[8, 8\] in the checkpoint, float32\[9, 8\]'):
    checkpoint.restore_params(two_steps, tree)
  with pytest.raises(ConfigError, match=r"no parameter matches 'emBed'.*embed"):
    checkpoint.restore_params(two_steps, tree, 'emBed')
  with pytest.raises(ConfigError, match=r'params/head float32\[2\] is not in the checkpoint'):
    checkpoint.restore_params(two_steps, {'head': jax.ShapeDtypeStruct((2,), jnp.float32)})
  with pytest.raises(CheckpointError, match='no checkpoint'):
    checkpoint.restore_params(tmp_path, tree)


def test_partial_restore_reads_no_other_array(copy, monkeypatch):
  """Without the optimizer's arrays on disk the parameters still come back (verification aside)."""
  monkeypatch.setattr(seal, 'check', lambda directory, step: None)
  asked = []
  load = checkpoint._load
  monkeypatch.setattr(checkpoint, '_load', lambda path, leaves: asked.extend(leaves) or load(path, leaves))
  checkpoint.restore_params(copy, {'embed': jax.ShapeDtypeStruct((8, 8), jnp.float32)})
  assert asked == ['frozen/embed']


def test_other_format_is_refused(copy):
  record = seal.read(copy, 2) | {'format_version': 99}
  seal.path_of(copy, 2).write_text(json.dumps({'sha256': seal._digest(record), 'record': record}))
  with pytest.raises(CheckpointError, match='format 99; expected 1'):
    checkpoint.restore(copy, abstract_of(mesh_of(1, 1)))


@pytest.mark.parametrize('where', ['write', 'prune'])
@pytest.mark.parametrize('how', ['poll', 'save', 'wait', 'close'])
def test_failure_in_the_background_surfaces_at_the_next_call(tmp_path, monkeypatch, how, where):
  def full(*args):
    raise OSError(28, 'No space left on device', str(tmp_path / '2'))
  saver = checkpoint.Saver(tmp_path, checkpoint.Config(), None)
  saver.save(1, state_of(1), {}, {})
  saver.wait()
  monkeypatch.setattr(seal, where, full)
  saver.save(2, state_of(2), {}, {})
  with pytest.raises(CheckpointError, match=rf'--workdir: saving {tmp_path}/2 failed.*No space left') as error:
    if how == 'poll':
      for _ in range(1000):
        saver.poll()
        time.sleep(0.01)
    elif how == 'save':
      saver.save(3, state_of(3), {}, {})
    else:
      getattr(saver, how)()
  assert error.value.code == 4
  saver.close()  # raised once
  assert checkpoint.restore(tmp_path, abstract_of(mesh_of(1, 1)), log=ignore)[0] == (1 if where == 'write' else 2)


def test_orbax_failure_surfaces_and_does_not_hold_up_the_exit(tmp_path):
  threads = set(threading.enumerate())
  saver = checkpoint.Saver(tmp_path / 'c', checkpoint.Config(), None)
  (tmp_path / 'c').rmdir()
  (tmp_path / 'c').write_text('a file in the place of the directory')
  with pytest.raises(CheckpointError, match='saving .*c/1 failed'):  # either call may be the one
    saver.save(1, state_of(1), {}, {})
    saver.wait()
  saver.close()
  for thread in set(threading.enumerate()) - threads:
    if not thread.daemon:
      thread.join(5)
      assert not thread.is_alive(), thread


def test_the_error_that_ends_the_run_is_not_hidden_by_a_failing_save(tmp_path, monkeypatch):
  monkeypatch.setattr(seal, 'write', lambda *a: (_ for _ in ()).throw(OSError('disk on fire')))
  lines = []
  with pytest.raises(ZeroDivisionError), checkpoint.Saver(tmp_path, checkpoint.Config(), None, lines.append) as saver:
    saver.save(1, state_of(1), {}, {})
    1 / 0  # noqa: B018
  assert 'disk on fire' in lines[-1]


def test_preflight_accepts_and_leaves_nothing(tmp_path):
  checkpoint.preflight(tmp_path / 'a' / 'b', 1000, checkpoint.Config())
  assert os.listdir(tmp_path / 'a' / 'b') == []


def test_preflight_refuses(tmp_path):
  (tmp_path / 'file').write_text('')
  for bad in ('file', 'file/checkpoints'):
    with pytest.raises(CheckpointError, match=f'--workdir: .*{bad}'):
      checkpoint.preflight(tmp_path / bad, 1, checkpoint.Config())
  free = shutil.disk_usage(tmp_path).free
  with pytest.raises(CheckpointError, match='--workdir: .*MiB free'):
    checkpoint.preflight(tmp_path, free // 4, checkpoint.Config(keep=3, keep_best=0))


def test_preflight_counts_the_steps_it_holds_as_free(two_steps, monkeypatch):
  held = seal.size(two_steps)
  assert held > 5000
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(0, 0, 0))
  checkpoint.preflight(two_steps, held // 4, checkpoint.Config(keep=1, keep_best=1))
  with pytest.raises(CheckpointError):
    checkpoint.preflight(two_steps, held // 3, checkpoint.Config(keep=1, keep_best=1))


@pytest.fixture
def small_disk(tmp_path):
  path = tmp_path / 'disk'
  path.mkdir()
  if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=900k', 'tmpfs', path], capture_output=True).returncode:
    pytest.skip('mount needs root')
  yield path
  subprocess.run(['umount', path], check=True)


def test_full_disk(small_disk):
  state = {'w': jnp.asarray(np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32))}  # 256 KiB
  with pytest.raises(CheckpointError, match='MiB free'):
    checkpoint.preflight(small_disk, 2**18, checkpoint.Config())
  saver = checkpoint.Saver(small_disk / 'c', checkpoint.Config(keep=9), None)
  with pytest.raises(CheckpointError, match=r'saving .* failed.*No space left'):
    for s in range(1, 9):
      saver.save(s, state, {}, {})
    saver.wait()
  saver.close()
  kept = checkpoint.steps(small_disk / 'c')
  assert kept
  abstract = {'w': jax.ShapeDtypeStruct((256, 256), jnp.float32)}
  step, restored, _ = checkpoint.restore(small_disk / 'c', abstract, log=ignore)
  assert step == kept[-1]
  np.testing.assert_array_equal(restored['w'], state['w'])
  with checkpoint.Saver(small_disk / 'c', checkpoint.Config(keep=1, keep_best=0), step, ignore) as saver:
    seal.delete(small_disk / 'c', kept[0])  # space is freed, the run goes on
    assert saver.save(step + 1, state, {}, {})


def test_read_only_disk(small_disk):
  subprocess.run(['mount', '-o', 'remount,ro', small_disk], check=True)
  for use in (lambda: checkpoint.preflight(small_disk / 'c', 1, checkpoint.Config()),
              lambda: checkpoint.Saver(small_disk / 'c', checkpoint.Config(), None),
              lambda: checkpoint.lock(small_disk).__enter__()):
    with pytest.raises(CheckpointError, match='--workdir: .*Read-only'):
      use()


def test_lock_has_one_holder(tmp_path):
  with checkpoint.lock(tmp_path / 'run'):
    holder = rf'in use by host {socket.gethostname()} pid {os.getpid()};'
    with pytest.raises(CheckpointError, match=holder), checkpoint.lock(tmp_path / 'run'):
      pytest.fail('two holders')
  with checkpoint.lock(tmp_path / 'run'):  # free again
    pass


def test_lock_of_a_killed_process_is_free(tmp_path):
  code = (f'import fcntl, time; f = open({str(tmp_path / "lock")!r}, "w"); fcntl.flock(f, fcntl.LOCK_EX);'
          'f.write("host far pid 7"); f.flush(); print("held", flush=True); time.sleep(60)')
  process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
  process.stdout.readline()
  with pytest.raises(CheckpointError, match='host far pid 7'), checkpoint.lock(tmp_path):
    pytest.fail('two holders')
  process.kill()
  process.communicate()
  with checkpoint.lock(tmp_path):
    assert (tmp_path / 'lock').read_text() == f'host {socket.gethostname()} pid {os.getpid()}\n'


@pytest.mark.parametrize('field', [{'every': 0}, {'keep': 0}, {'keep_best': -1}, {'keep_every': -1000},
                                   {'keep_every': 1500}])
def test_config_is_checked(field):
  with pytest.raises(ConfigError, match=f'checkpoint.{next(iter(field))}'):
    checkpoint.Config(**field)


WORKER = '''
import sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', {devices})
if {processes} > 1:
  jax.distributed.initialize('127.0.0.1:' + sys.argv[2], {processes}, int(sys.argv[3]), initialization_timeout=60)
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from lm import checkpoint
mesh = jax.make_mesh((jax.device_count(),), ('data',), axis_types=(AxisType.Auto,))
here = NamedSharding(mesh, P('data'))
make = jax.jit(lambda s: {{f'w{{i}}': jnp.arange(4096.0) * s + i for i in range(8)}}, out_shardings=here)
abstract = {{k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=here) for k, v in jax.eval_shape(make, 0.0).items()}}
found = checkpoint.restore(sys.argv[1], abstract)
start = found[0] if found else None
with checkpoint.Saver(sys.argv[1], checkpoint.Config(keep=2, keep_best=1), start) as saver:
  for s in range((start or 0) + 1, {last} + 1):
    saver.save(s, make(float(s)), {{'step': s}}, {{'val_loss': abs(s - 3.0)}})
    saver.poll()
    print('saved', s, flush=True)
'''


def spawn(*args, **fields):
  return subprocess.Popen([sys.executable, '-c', WORKER.format(**fields), *map(str, args)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, cwd=pathlib.Path(__file__).parents[1],
                          env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'})


def restore_worker(directory):
  abstract = {f'w{i}': jax.ShapeDtypeStruct((4096,), jnp.float32) for i in range(8)}
  step, state, meta = checkpoint.restore(directory, abstract, log=ignore)
  for i in range(8):
    np.testing.assert_array_equal(state[f'w{i}'], np.arange(4096.0) * step + i)
  assert meta == {'step': step}
  return step


@pytest.mark.slow
def test_sigkill_at_random_moments_loses_no_sealed_step(tmp_path):
  rng, reached = random.Random(0), 0
  for _ in range(4):
    process = spawn(tmp_path, devices=2, processes=1, last=10**6)
    for line in process.stdout:
      if line.startswith('saved') and int(line.split()[1]) >= reached + 3:
        break
    time.sleep(rng.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    sealed = checkpoint.steps(tmp_path)
    assert [seal.check(tmp_path, s) for s in sealed] == [None] * len(sealed)
    step = restore_worker(tmp_path)
    assert step >= reached + 2  # the last save but one was sealed before the last began
    assert 3 in sealed or step < 3  # the best survives every kill
    reached = step


@pytest.mark.slow
def test_two_processes_save_and_one_restores(tmp_path):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  both = [spawn(tmp_path, port, i, devices=4, processes=2, last=5) for i in range(2)]
  out = [p.communicate(timeout=80)[0] for p in both]
  assert [p.returncode for p in both] == [0, 0], out
  assert checkpoint.steps(tmp_path) == [3, 4, 5]
  assert restore_worker(tmp_path) == 5
