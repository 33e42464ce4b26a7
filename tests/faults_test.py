"""Bad inputs through the real command line: one clear line, the documented exit code, and no step compiled."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

from array_record.python import array_record_module
import numpy as np
import pytest
import tiny

from experiments import cli, gpt2
from lm import checkpoint, pretrain
from lm.data import corpora, records
from lm.text import tokenizer

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """text.txt, prepared/ (a dataset of it), trained/ (a workdir with sealed steps 2, 4 and 6)."""
  root = tmp_path_factory.mktemp('source')
  text = tiny.write_text(root / 'text.txt')
  with pytest.MonkeyPatch.context() as m:
    tiny.share_compiled(m)
    assert main(root, f'--workdir={root}/trained', '--set=checkpoint.keep=3') == 0
  records.write(corpora.find(str(text)), tokenizer.byte(), root / 'prepared', split=records.Split('tail', 0.1))
  return root


@pytest.fixture
def files(source, tmp_path):
  """A copy of it, whose trained/ still names the text it was trained on."""
  shutil.copytree(source, tmp_path / 'd')
  return tmp_path / 'd'


def main(root, *more):
  flags = tiny.argv(config='quickstart', workdir=root / 'run', data__corpus=root / 'text.txt')
  return cli.run_argv(['gpt2', *flags, *more], '', gpt2.CONFIGS, pretrain.task)


def launch(files, monkeypatch, argv=()):
  """`main` up to where it would compile the step, with {d} in flags for `files`."""
  tiny.stop_before_the_step(monkeypatch)
  return main(files, *(a.replace('{d}', str(files)) for a in argv))


def write(name, content):
  """A mutation: that file holds this."""
  def change(d):
    (d / name).parent.mkdir(parents=True, exist_ok=True)
    (d / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  return change


def flip(pattern, at=0.5):
  """A mutation: one bit of the largest of the files is the other way round."""
  def change(d):
    path = max((p for p in d.glob(pattern) if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)
  return change


def cut(pattern):
  def change(d):
    path, = d.glob(pattern)
    os.truncate(path, path.stat().st_size // 2)
  return change


def foreign_ids(d):
  """A shard with an id beyond the vocabulary and, as from a broken writer, all checksums right."""
  path = d / 'prepared' / 'train-00000.array_record'
  reader = array_record_module.ArrayRecordReader(str(path))
  pieces = [np.frombuffer(r, '<u2').copy() for r in reader.read_all()]
  for piece in pieces:
    piece[::2] = 999
  path.unlink()
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for piece in pieces:
    writer.write(piece.tobytes())
  writer.close()
  manifest = json.loads((d / 'prepared' / 'manifest.json').read_text())
  shard, = manifest['splits']['train']['shards']
  shard |= {'bytes': path.stat().st_size, 'sha256': corpora.sha256_file(path)}
  (d / 'prepared' / 'manifest.json').write_text(json.dumps(manifest))


def all_checkpoints(d):
  for step in (2, 4, 6):
    flip(f'trained/checkpoints/{step}/**/*')(d)


def strangers_config(d):
  shutil.copytree(d / 'trained', d / 'run')
  saved = json.loads((d / 'run' / 'config.json').read_text())
  saved['config']['optim']['lr'] = 0.5
  (d / 'run' / 'config.json').write_text(json.dumps(saved))


def again(d):
  shutil.copytree(d / 'trained', d / 'run')
  saved = json.loads((d / 'run' / 'config.json').read_text())
  saved['config']['data']['corpus'] = str(d / 'text.txt')
  saved['config']['checkpoint']['keep'] = 2
  (d / 'run' / 'config.json').write_text(json.dumps(saved))


def other_text(d):
  again(d)
  (d / 'text.txt').write_text((d / 'text.txt').read_text() + 'and more')


# (what is wrong, flags, what is done to the files first, exit code, what the line says)
FAULTS = [
    ('misspelt field', ['--set=optim.lrr=1'], None, 2, r"--set optim.lrr=1: .*no field 'lrr'; did you mean 'lr'"),
    ('misspelt group', ['--set=optimm.lr=1'], None, 2, r"no field 'optimm'; did you mean 'optim'"),
    ('wrong type', ['--set=optim.lr=fast'], None, 2, r"--set optim.lr=fast: 'fast' is str; expected float"),
    ('float for an int', ['--set=optim.steps=1.5'], None, 2, r'optim.steps=1.5: 1.5 is float; expected int'),
    ('no value', ['--set=optim.lr'], None, 2, r'--set optim.lr: no "="'),
    ('a group', ['--set=optim=1'], None, 2, r"'optim' is a group; set one of its fields: name, lr"),
    ('below a value', ['--set=optim.lr.x=1'], None, 2, r'optim.lr.x=1: .*has no fields'),
    ('not a choice', ['--set=model.activation=relu'], None, 2, r"model.activation=relu: 'relu' is not a choice"),
    ('unknown config', ['--config=gpt5'], None, 2, r'--config=gpt5: value should be one of <quickstart'),
    ('unknown flag', ['--wrkdir=x'], None, 2, r"Unknown command line flag 'wrkdir'. Did you mean: workdir"),
    ('stray word', ['train'], None, 2, r"'train': unexpected argument"),
    ('no workdir', ['--workdir='], None, 2, r'--workdir: not given; .*--workdir=runs/quickstart'),
    ('negative rate', ['--set=optim.lr=-1.0'], None, 2, r'optim.lr: -1.0; expected a finite number, at least 0'),
    ('infinite rate', ['--set=optim.lr=1e999'], None, 2, r'optim.lr: inf; expected a finite'),
    ('warmup beyond the run', ['--set=optim.warmup=7'], None, 2, r'optim.warmup: 7; expected 0 to optim.steps=6'),
    ('no steps', ['--set=optim.steps=0', '--set=optim.warmup=0'], None, 2, r'optim.steps: 0; expected at least 1'),
    ('freezes nothing', ['--set=optim.freeze=emBed'], None, 2, r"optim.freeze: 'emBed' matches no parameter"),
    ('negative seed', ['--set=seed=-1'], None, 2, r'seed=-1; expected 0 <='),
    ('no log', ['--set=loop.log_every=0'], None, 2, r'loop.log_every=0; expected .* at least 1'),
    ('no save', ['--set=checkpoint.every=0'], None, 2, r'checkpoint.every: 0; expected at least 1'),
    ('unknown metric', ['--set=checkpoint.metric=loss'], None, 2, r"checkpoint.metric='loss'; expected one of val_acc"),
    ('unknown mode', ['--set=checkpoint.mode=least'], None, 2, r"checkpoint.mode=least: 'least' is not a choice"),
    ('milestones between saves', ['--set=checkpoint.keep_every=3'], None, 2,
     r'checkpoint.keep_every: 3; expected a multiple of every=2'),
    ('no frequency', ['--set=model.rope_theta=0.0'], None, 2, r'model.rope_theta=0.0; expected a finite number above'),
    ('infinite frequency', ['--set=model.rope_theta=1e999'], None, 2, r'model.rope_theta=inf; expected a finite'),
    ('negative eps', ['--set=model.norm_eps=-1.0'], None, 2, r'model.norm_eps=-1.0; expected a finite number above 0'),
    ('no logits', ['--set=model.logit_scale=0.0'], None, 2, r'model.logit_scale=0.0; expected a finite number above 0'),
    ('negative deviation', ['--set=model.init.std=-1.0'], None, 2, r'model.init.std=-1.0; expected a finite number'),
    ('infinite z', ['--set=loss.z=1e999'], None, 2, r'loss.z=inf; expected a finite number, at least 0'),
    ('no classifier', ['--set=model.dropout.classifier=0.1'], None, 2,
     r'model.dropout.classifier=0.1, but this model has no classifier; set model.dropout.classifier=0.0'),
    ('rate that is not read', ['--set=optim.schedule=constant', '--set=optim.min_lr=1e-4'], None, 2,
     r"optim.min_lr: 0.0001, which 'constant' does not read; set optim.min_lr=0, or another optim.schedule"),
    ('heads over tensor', ['--set=mesh.tensor=4'], None, 2, r'mesh.tensor=4 does not divide model.heads=2'),
    ('vocabulary over tensor', ['--set=mesh.tensor=2', '--set=model.vocab=259'], None, 2,
     r'mesh.tensor=2 does not divide model.vocab=259'),
    ('embedding over fsdp', ['--set=mesh.fsdp=8', '--set=model.embed=12'], None, 2,
     r'mesh.fsdp=8 does not divide model.embed=12'),
    ('batch over data', ['--set=mesh.data=3'], None, 2, r'data.batch=8 is not divisible by .*mesh.data.* = 3'),
    ('evaluation over data', ['--set=mesh.data=2', '--set=loop.eval_batch=3'], None, 2,
     r'loop.eval_batch=3 is not divisible by .*mesh.data.* = 2; choose'),
    ('batch over microbatches', ['--set=optim.microbatches=3'], None, 2, r'data.batch=8 is not divisible'),
    ('too few devices', ['--set=mesh.data=4'], None, 2, r'mesh: data=4 .*needs 4 devices, 8 are here'),
    ('no axis', ['--set=mesh.data=0'], None, 2, r'mesh.data=0; expected at least 1'),
    ('too few layers', ['--set=mesh.pipe=2'], None, 2, r'mesh.pipe=2, mesh.rounds=1: model.layers=1, not divisible by'),
    ('longer than positions', ['--set=data.length=17'], None, 2, r'data.length=17 is more than model.length=16'),
    ('no corpus', ['--set=data.corpus='], None, 2, r'data.corpus is empty'),
    ('name that steers a terminal', ['--set=data.corpus={d}/a\x1b[2K\rerror: b\n红.txt'], None, 3,
     r'{d}/a\\x1b\[2K error: b 红.txt: no text'),
    ('workdir that does', ['--workdir={d}/a\x1b[2K'], None, 2, r"--workdir: '{d}/a\\x1b\[2K' has a character that"),
    ('text that does', ['--set=data.tokenizer={d}/char', '--set=model.vocab=3'],
     lambda d: (tokenizer.char('abc').save(d / 'char'), write('text.txt', 'a\x1b[2K\nstep 1: loss 0')(d)), 3,
     r'{d}/text.txt: character 1: U\+001B is not among the 3'),
    ('missing corpus', ['--set=data.corpus={d}/none.txt'], None, 3, r'{d}/none.txt: no text'),
    ('empty folder', ['--set=data.corpus={d}/empty'], lambda d: (d / 'empty').mkdir(), 3, r'{d}/empty: no text'),
    ('no tokenizer', ['--set=data.tokenizer='], None, 2, r'data.tokenizer is empty'),
    ('missing tokenizer', ['--set=data.tokenizer={d}/none.model'], None, 3, r'{d}/none.model: no such file'),
    ('damaged tokenizer', ['--set=data.tokenizer={d}/t.model'], write('t.model', b'\x00\x01'), 3, r'{d}/t.model: '),
    ('tokenizer of another corpus', ['--set=data.corpus={d}/prepared', '--set=data.tokenizer={d}/char'],
     lambda d: tokenizer.char('abc').save(d / 'char'), 2, r"data.tokenizer='{d}/char': not the tokenizer that {d}/p"),
    ('small vocabulary', ['--set=model.vocab=100'], None, 2, r'model.vocab=100: the tokenizer has 258 ids'),
    ('large vocabulary', ['--set=model.vocab=5000'], None, 2, r'model.vocab=5000: the tokenizer has 258 ids'),
    ('characters out of the vocabulary', ['--set=data.tokenizer={d}/char', '--set=model.vocab=3'],
     lambda d: tokenizer.char('abc').save(d / 'char'), 3, r'{d}/text.txt: character 0: U\+006C is not among the 3'),
    ('invalid UTF-8', [], write('text.txt', b'fine\nfine\nbro\xffken'), 3, r'{d}/text.txt:3: byte 13 .*not UTF-8'),
    ('damaged JSON line', ['--set=data.corpus={d}/a.jsonl'], write('a.jsonl', '{"text": "a"}\n{"text": "b"'), 3,
     r'{d}/a.jsonl:2: .*expected strict JSON'),
    ('JSON of another shape', ['--set=data.corpus={d}/a.jsonl'], write('a.jsonl', '{"txt": "a"}'), 3,
     r'{d}/a.jsonl:1: expected {{"text": string'),
    ('nothing but empty documents', ['--set=data.corpus={d}/a.jsonl', '--set=data.split=hash'],
     write('a.jsonl', '{"text": ""}\n{"text": "  "}\n'), 3, r'no text in .*a.jsonl.* \(2 empty documents\)'),
    ('empty file', [], write('text.txt', ''), 3, r'no text in .*text.txt'),
    ('less than a row', [], write('text.txt', 'too short'), 3, r'training tokens .*expected at least data.length=16'),
    ('less than a batch', [], write('text.txt', 'enough for two or three rows of the batch of eight'), 3,
     r'2 rows of 16 tokens, less than one batch of data.batch=8'),
    ('no validation', ['--set=data.validation_fraction=0.0'], None, 3, r"nothing to evaluate in 'validation'"),
    ('shard with a flipped bit', ['--set=data.corpus={d}/prepared'], flip('prepared/train-*'), 3,
     r'{d}/prepared/train-00000.array_record: damaged'),
    ('shard cut short', ['--set=data.corpus={d}/prepared'], cut('prepared/train-*'), 3,
     r'{d}/prepared/train-00000.array_record: \d+ bytes; expected \d+'),
    ('missing shard', ['--set=data.corpus={d}/prepared'], lambda d: next(d.glob('prepared/train-*')).unlink(), 3,
     r'{d}/prepared/train-00000.array_record: missing'),
    ('ids out of range', ['--set=data.corpus={d}/prepared', '--set=data.tokenizer='], foreign_ids, 3,
     r'{d}/prepared/train-00000.array_record:\d+:0: id 999; expected less than 258'),
    ('damaged manifest', ['--set=data.corpus={d}/prepared'], write('prepared/manifest.json', '{'), 3,
     r'{d}/prepared/manifest.json: .*strict JSON'),
    ('workdir is a file', ['--workdir={d}/text.txt'], None, 2, r'--workdir: {d}/text.txt is a file; expected a'),
    ('workdir cannot be made', ['--workdir=/proc/none/run'], None, 4, r'--workdir: cannot write into /proc/none/run'),
    ('damaged config.json', [], write('run/config.json', '{"config": '), 4, r'{d}/run/config.json: '),
    ('another config', ['--set=optim.lr=0.25'], again, 2,
     r'--workdir: {d}/run was trained with another config: optim.lr: 0.003 there, 0.25 now.*--resume_with_changes'),
    ('other text than the run began with', [], other_text, 3, r'data differs from the saved run \(datasets: '),
    ('another model', ['--set=model.mlp=16', '--resume_with_changes'], again, 2,
     r'{d}/run/checkpoints/6: .*mlp/down is float32\[1, 32, 16\] in the checkpoint, float32\[1, 16, 16\] in this'),
    ('another optimizer', ['--set=optim.name=muon', '--resume_with_changes'], again, 2,
     r'checkpoints/6: another optimizer: opt_state/adam/.*start anew from its weights: --set init_from={d}/run in'),
    ('never to be resumed', ['--resume=never'], again, 2,
     r'--resume=never: {d}/run holds a run \(sealed steps: 2, 4, 6\); expected none; choose another --workdir'),
    ('nothing to resume', ['--resume=must'], None, 4, r'--resume=must: {d}/run has no checkpoint; expected a run'),
    ('no such step', ['--restore_step=5'], again, 2, r'--restore_step=5: not in {d}/run \(sealed steps: 2, 4, 6\)'),
    ('step of nothing', ['--restore_step=5'], None, 2, r'--restore_step=5: not in {d}/run \(sealed steps: none\)'),
    ('damaged step', ['--restore_step=4'], lambda d: (flip('trained/checkpoints/4/**/*')(d), again(d)), 4,
     r'rejected step 4 \(.*sha256 does not'),
    ('no intact checkpoint', [], lambda d: (all_checkpoints(d), again(d)), 4,
     r'{d}/run/checkpoints: no intact checkpoint: rejected step 6 \(.*\); step 4 \(.*\); step 2 \(.*sha256 does not'),
    ('nothing to start from', ['--set=init_from={d}/none'], None, 2, r'init_from={d}/none: no such path'),
    ('no model to start from', ['--set=init_from={d}/prepared'], None, 2, r'init_from={d}/prepared: not a model'),
    ('start from another shape', ['--set=init_from={d}/trained', '--set=model.mlp=16'], None, 2,
     r'init_from={d}/trained: blocks/mlp/down is \(1, 32, 16\) there and \(1, 16, 16\) in this model'),
    ('start from a damaged checkpoint', ['--set=init_from={d}/trained'], all_checkpoints, 4,
     r'{d}/trained/checkpoints: no intact checkpoint: rejected step 6'),
    ('start from a damaged folder', ['--set=init_from={d}/hf'], write('hf/config.json', '{'), 4, r'{d}/hf/config.json'),
]


@pytest.mark.parametrize('argv, change, code, line', [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_is_refused_in_one_line(files, monkeypatch, capfd, argv, change, code, line):
  if change:
    change(files)
  capfd.readouterr()
  assert launch(files, monkeypatch, argv) == code
  out, err = capfd.readouterr()
  assert err.startswith('error: ')
  assert err.count('\n') == 1 and err[:-1].isprintable(), err
  assert re.search(line.replace('{d}', re.escape(str(files))).replace('{{', '{'), err), err
  assert 'step 1:' not in out


@pytest.mark.slow
def test_without_a_fault_the_step_is_reached(files, monkeypatch):
  """So that each case above fails for its own reason."""
  with pytest.raises(tiny.Reached):
    launch(files, monkeypatch)
  with pytest.raises(tiny.Reached):
    launch(files, monkeypatch, ['--set=data.corpus={d}/prepared', '--workdir={d}/b'])
  with pytest.raises(tiny.Reached):
    launch(files, monkeypatch, ['--set=init_from={d}/trained', '--workdir={d}/c'])


@pytest.mark.slow
def test_resume_says_what_may_be_there(files, monkeypatch, capsys):
  again(files)
  for argv in (['--resume=must'], ['--resume=auto'], ['--workdir={d}/new', '--resume=never']):
    if 'new' not in argv[0]:
      assert launch(files, monkeypatch, argv) == 0
      assert capsys.readouterr().out.startswith('already complete: step 6')
    else:
      with pytest.raises(tiny.Reached):
        launch(files, monkeypatch, argv)


def test_a_repaired_fault_needs_no_new_workdir(files, monkeypatch):
  """A first start that was refused leaves nothing behind that stands in the way of the second."""
  assert launch(files, monkeypatch, ['--set=data.corpus={d}/none.txt', '--set=optim.lr=0.5']) == 3
  with pytest.raises(tiny.Reached):
    launch(files, monkeypatch)


def test_second_writer(files, monkeypatch, capfd):
  with checkpoint.lock(files / 'run'):
    assert launch(files, monkeypatch) == 4
  assert re.fullmatch(rf'error: --workdir: {files}/run is in use by host \S+ pid {os.getpid()}; .*\n',
                      capfd.readouterr().err)


@pytest.fixture
def disk(tmp_path):
  """Mounts a small disk: disk(size)."""
  path = tmp_path / 'disk'
  path.mkdir()

  def mount(size, *options):
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', ','.join([f'size={size}', *options]), 'tmpfs', path],
                      capture_output=True).returncode:
      pytest.skip('mount needs root')
    return path
  yield mount
  subprocess.run(['umount', '-l', path], capture_output=True)


def test_disk_too_small_for_the_checkpoints(files, monkeypatch, capfd, disk):
  assert launch(files, monkeypatch, [f'--workdir={disk("256k")}/run']) == 4
  err = capfd.readouterr().err
  assert re.fullmatch(r'error: --workdir: 0 MiB free for .*/disk/run/checkpoints; expected .*\n', err), err


def test_read_only_disk(files, monkeypatch, capfd, disk):
  path = disk('1m', 'ro')
  assert launch(files, monkeypatch, [f'--workdir={path}/run']) == 4
  assert re.fullmatch(rf'error: --workdir: cannot write into {path}/run/checkpoints: .*Read-only.*\n',
                      capfd.readouterr().err)


def test_disk_that_fills_while_text_is_tokenised(files, monkeypatch, capfd, disk):
  """The cache of tokens lies in the workdir too."""
  (files / 'text.txt').write_bytes(np.random.default_rng(0).integers(32, 127, 3_000_000, np.uint8).tobytes())
  path = disk('2m')
  assert launch(files, monkeypatch, [f'--workdir={path}/run']) == 4
  err = capfd.readouterr().err
  assert err.count('\n') == 1
  assert re.match(rf'error: disk: .*No space left on device; writing {path}', err), err


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # Orbax's, of its own loop
def test_disk_that_fills_in_training(files, capfd, disk):
  """The newest sealed step survives, and once there is space the run goes on from it."""
  path = disk('1m')
  more = [f'--workdir={path}/run', '--set=checkpoint.every=1', '--set=checkpoint.keep=9']
  with pytest.MonkeyPatch.context() as m:
    tiny.share_compiled(m)
    m.setattr(checkpoint, 'preflight', lambda *a: None)  # as if another program had filled the disk later
    code = main(files, *more)
    out, err = capfd.readouterr()
    assert code == 4, err
    assert re.match(r'error: (--workdir|disk): .*No space left', err), err  # a save, or a row of the log
    assert err.count('\n') == 1, err
    sealed = checkpoint.steps(path / 'run' / 'checkpoints')
    assert 0 < sealed[-1] < 6
    subprocess.run(['mount', '-o', 'remount,size=9m', path], check=True)
    code = main(files, *more)
  out, err = capfd.readouterr()
  assert (code, err) == (0, '')
  assert f'resumed from step {sealed[-1]} ' in out


@pytest.mark.slow
@pytest.mark.parametrize('argv, code, line', [
    (['--set', 'optim.lrr=1'], 2, "did you mean 'lr'"), (['--workdirr=x'], 2, 'Did you mean: workdir'),
    (['--set', 'data.corpus=/nowhere.txt', '--workdir={d}/run'], 3, '/nowhere.txt: no text')])
def test_as_a_process(tmp_path, argv, code, line):
  """The same through python -m: nothing but the line on stderr, whatever libraries would like to say."""
  done = subprocess.run([sys.executable, '-m', 'experiments.gpt2', *(a.replace('{d}', str(tmp_path)) for a in argv)],
                        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
  assert done.returncode == code, done.stderr
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  assert line in done.stderr
  assert done.stdout == ''
