"""Models found where they lie: the best checkpoint, past damage, with the tokenizer that came along or none."""

import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny

from experiments import cli, gpt2
from lm import checkpoint, params, pretrain, run, weights
from lm.errors import CheckpointError, ConfigError, DataError
from lm.models import decoder, hf
from lm.text import tokenizer

GOLDEN = pathlib.Path(__file__).parent / 'golden'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A workdir with sealed steps 2 (made the best), 4 and 6. Not to be changed."""
  root = tmp_path_factory.mktemp('trained')
  text = tiny.write_text(root / 'text.txt')
  tokenizer.byte().save(root / 'byte')
  evaluation = run.evaluate.make

  def scripted(*args):
    evaluate, values = evaluation(*args), iter([1.0, 3.0, 2.0])
    return lambda state: evaluate(state) | {'val_loss': next(values)}
  with pytest.MonkeyPatch.context() as m:
    m.setattr(run.evaluate, 'make', scripted)
    tiny.share_compiled(m)
    assert gpt(root / 'run', data__corpus=text, data__tokenizer=root / 'byte') == 0
  text.unlink()  # nothing here may need them again
  shutil.rmtree(root / 'byte')
  assert checkpoint.steps(root / 'run' / 'checkpoints') == [2, 4, 6]
  return root / 'run'


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  tiny.share_compiled(monkeypatch)


def gpt(workdir, *more, **flags):
  argv = tiny.argv(config='quickstart', workdir=workdir, **flags)
  return cli.run_argv(['gpt2', *argv, *more], '', gpt2.CONFIGS, pretrain.task)


@pytest.fixture
def copy(trained, tmp_path):
  return pathlib.Path(shutil.copytree(trained, tmp_path / 'run'))


def at(workdir, step):
  specs = decoder.specs(weights.load(workdir).config)
  return checkpoint.restore_params(workdir / 'checkpoints', params.abstract(specs), step=step, log=lambda line: None)


def equal(a, b):
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


def damage(workdir, step):
  path = max((workdir / 'checkpoints' / str(step)).rglob('*'), key=lambda p: p.stat().st_size * p.is_file())
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_a_workdir_stands_on_its_own(trained, capfd):
  model = weights.load(trained)
  assert isinstance(model.config, decoder.Config) and model.config.embed == 16
  assert model.tokenizer.sha256 == tokenizer.byte().sha256
  assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {'float32'}
  assert {len(x.sharding.device_set) for x in jax.tree.leaves(model.params)} == {1}
  assert capfd.readouterr() == ('', '')


def test_the_best_checkpoint_or_the_newest(trained):
  assert not equal(at(trained, 2), at(trained, 6))
  assert equal(weights.load(trained).params, at(trained, 2))
  assert equal(weights.load(str(trained), best=False).params, at(trained, 6))


def test_damaged_checkpoints_are_passed_over_by_name(copy, capsys):
  two, four, six = (at(copy, step) for step in (2, 4, 6))
  damage(copy, 6)
  assert equal(weights.load(copy).params, two)  # the best is whole
  assert capsys.readouterr().err == ''
  assert equal(weights.load(copy, best=False).params, four)
  out, err = capsys.readouterr()
  assert out == ''
  assert err.startswith('warning: rejected step 6 (') and 'sha256 does not match' in err
  assert err.endswith(f'; using step 4 of {copy}/checkpoints\n') and err.count('\n') == 1
  damage(copy, 2)
  assert equal(weights.load(copy).params, four)
  err = capsys.readouterr().err
  assert err.startswith('warning: rejected step 2 (') and '; step 6 (' in err and 'using step 4' in err
  damage(copy, 4)
  with pytest.raises(CheckpointError, match=r'no intact checkpoint: rejected step 2 \(.*; step 6 \(.*; step 4 \('):
    weights.load(copy)
  assert not equal(four, six)


def test_no_checkpoint(copy):
  shutil.rmtree(copy / 'checkpoints')
  (copy / 'checkpoints').mkdir()
  with pytest.raises(CheckpointError, match='checkpoints: no intact checkpoint; expected a sealed'):
    weights.load(copy)


def test_without_a_tokenizer(copy):
  shutil.rmtree(copy / 'tokenizer')
  assert weights.load(copy).tokenizer is None
  (copy / 'tokenizer').mkdir()
  assert weights.load(copy).tokenizer is None


def test_damaged_tokenizer(copy):
  (copy / 'tokenizer' / 'byte.json').unlink()
  (copy / 'tokenizer' / 'tokenizer.model').write_bytes(b'\x00')
  with pytest.raises(DataError, match='tokenizer'):
    weights.load(copy)


@pytest.mark.parametrize('content', ['', '{', '[]', '{}', '{"config": 5}', '{"config": {"model": 5}}', '\xff',
                                     '{"config": {"model": {"embedd": 3}, "checkpoint": {}}}',
                                     '{"config": {"model": {"heads": 0}, "checkpoint": {}}}',
                                     '{"config": {"model": {}, "checkpoint": {}}}'])
def test_damaged_config(copy, content):
  (copy / 'config.json').write_text(content, encoding='latin-1')
  expected = "expected (the config of a decoder run|a run's config)"
  with pytest.raises(CheckpointError, match=f'{copy}/config.json: .*; {expected}'):
    weights.load(copy)


def test_what_is_no_model(tmp_path):
  (tmp_path / 'a.txt').write_text('')
  for name, found in (('.', 'not a model'), ('none', 'no such path'), ('a.txt', 'not a model')):
    with pytest.raises(ConfigError, match=f'{tmp_path / name}: {found}; expected a workdir .*HF folder .*gguf'):
      weights.load(tmp_path / name)


@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_hugging_face_folder(name, tmp_path):
  model = weights.load(GOLDEN / name)
  c, p = hf.load(GOLDEN / name)
  assert model.config == c
  assert equal(model.params, p)
  assert model.tokenizer is None
  hf.save(tmp_path / 'hf', c, p, tokenizer.char('abc'))
  assert weights.load(tmp_path / 'hf').tokenizer.kind == 'char'


def test_parameters_that_do_not_fit_are_named(trained):
  fits = params.abstract(decoder.specs(weights.load(trained).config))
  assert equal(weights.params_from(trained, fits), at(trained, 2))
  where = f'init_from={trained}: '
  for change, found in (({'final_norm': {}}, r'final_norm/scale is \(16,\) there and absent in this model'),
                        ({'unembed': jax.ShapeDtypeStruct((3, 4), 'float32')}, r'unembed is absent there and \(3, 4\)'),
                        ({'final_norm': {'scale': jax.ShapeDtypeStruct((8,), 'float32')}},
                         r'final_norm/scale is \(16,\) there and \(8,\) in this model; set model.\*')):
    with pytest.raises(ConfigError, match=where + found):
      weights.params_from(trained, fits | change)


def test_training_starts_from_a_workdir(trained, tmp_path, monkeypatch):
  """Parameters alone are taken over: the optimizer and the step begin anew."""
  text = tiny.write_text(tmp_path / 'text.txt')
  tiny.stop_before_the_step(monkeypatch)
  with pytest.raises(tiny.Reached) as reached:
    gpt(tmp_path / 'run', f'--set=init_from={trained}', '--set=mesh.fsdp=8', data__corpus=text)
  state = reached.value.state
  assert equal(state.params, at(trained, 2))
  assert {len(x.sharding.device_set) for x in jax.tree.leaves(state.params)} == {8}
  assert int(state.step) == int(state.skipped) == int(state.opt_state.count) == 0
  assert not any(x.any() for x in jax.tree.leaves(state.opt_state.mu))


def test_what_it_started_from_may_be_gone_when_it_resumes(copy, tmp_path, monkeypatch):
  text = tiny.write_text(tmp_path / 'text.txt')
  tiny.stop_before_the_step(monkeypatch)
  with pytest.raises(tiny.Reached) as reached:
    gpt(copy, '--set=init_from=/gone', '--resume_with_changes', data__corpus=text, optim__steps=8)
  assert int(reached.value.state.step) == 6


def test_training_starts_from_a_hugging_face_folder(tmp_path, monkeypatch, capsys):
  """And says what the model there computes otherwise, which no shape tells."""
  c, p = hf.load(GOLDEN / 'gpt2')
  tokenizer.char(''.join(chr(97 + i) for i in range(c.vocab))).save(tmp_path / 'char')
  (tmp_path / 'text.txt').write_text('abcdefghij' * 200)
  names = 'vocab length layers embed heads kv_heads head_dim mlp bias norm_bias activation'.split()
  tiny.stop_before_the_step(monkeypatch)
  same = {f'model__{name}': getattr(c, name) for name in names}
  for name, model in (('same', same), ('other', same | {'model__activation': 'gelu_erf', 'model__remat': 'full'})):
    with pytest.raises(tiny.Reached) as reached:
      gpt(tmp_path / name, f'--set=init_from={GOLDEN}/gpt2', data__corpus=tmp_path / 'text.txt',
          data__tokenizer=tmp_path / 'char', **model)
    assert equal(reached.value.state.params, p)
    told = [line for line in capsys.readouterr().out.splitlines() if 'init_from=' in line]
    assert told == ([] if name == 'same' else [
        f"init_from={GOLDEN}/gpt2: model.activation is 'gelu_tanh' there, 'gelu_erf' here; set it so, unless the model "
        'is to compute otherwise'])
