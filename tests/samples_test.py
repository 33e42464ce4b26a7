"""Samples of a run: which prompts, what the model answers by the plain forward pass, and the file over restarts."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
from marks import slow
import numpy as np
import pytest
import tiny

from lm import checkpoint, config, decode, instruct, loop, optim, params, peft, run, samples, sharding, weights
from lm.data import conversations
from lm.data.packing import Batch
from lm.errors import ConfigError, Preempted
from lm.models import decoder, hf
from lm.text import chat, streaming, tokenizer as tokenizers

MODEL = decoder.Config(vocab=258, length=64, layers=2, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32)
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  tiny.share_compiled(monkeypatch)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('samples')
  talks = [{'messages': [{'role': 'user', 'content': f'say {word} {i}'}, {'role': 'assistant', 'content': word * 2}]}
           for i in range(30) for word in ('ja', '好')]
  (root / 'chat.jsonl').write_text('\n'.join(json.dumps(t, ensure_ascii=False) for t in talks))
  hf.save(root / 'base', MODEL, jax.device_get(params.init(decoder.specs(MODEL), jax.random.key(3))))
  return root


def make(root, **changes):
  c = instruct.Config(
      model=MODEL, init_from=str(root / 'base'), data=conversations.Config(
          corpus=str(root / 'chat.jsonl'), tokenizer='byte', template='plain', length=32, batch=8, pack=False,
          validation_fraction=0.2),
      peft=peft.Config(train=''), samples=samples.Config(count=3, new_tokens=6),
      optim=optim.Config(lr=0.02, steps=8, warmup=1, weight_decay=0.0), loop=loop.Config(log_every=1, eval_every=4),
      checkpoint=checkpoint.Config(every=8, keep_best=0))
  return config.replace(c, **changes)


def rows_of(*rows):
  """Rows of (id, segment, is a target)."""
  ids, segments, mask = (np.array([[token[i] for token in row] for row in rows]) for i in range(3))
  return Batch(ids.astype(np.int32), segments.astype(np.int32), np.zeros_like(ids, np.int32), mask.astype(bool))


def test_prompts_are_what_comes_before_the_first_reply():
  rows = rows_of(
      [(1, 1, 0), (2, 1, 0), (5, 1, 0), (3, 1, 1), (4, 1, 1), (5, 1, 0), (6, 1, 1), (7, 2, 0), (8, 2, 0), (9, 2, 1)],
      [(7, 1, 0), (8, 1, 0), (3, 1, 1), (9, 2, 0), (9, 2, 1), (5, 3, 0), (6, 3, 1), (7, 3, 0), (8, 3, 1), (0, 0, 0)])
  found = [(p.prompt.tolist(), p.reference.tolist()) for p in samples.held_out(rows, 9)]
  # Not 7, 8 again, nor what is all target; what begins within a reply has its next one.
  assert found == [([1, 2, 5], [3, 4]), ([7, 8], [9]), ([5, 6, 7], [8])]
  assert [p.prompt.tolist() for p in samples.held_out(rows, 1)] == [[1, 2, 5]]
  assert [p.prompt.tolist() for p in samples.held_out(rows, 9, most=2)] == [[7, 8]]


def greedy(c, p, prompt, n):
  """What the forward pass over the whole text, once a token, would say."""
  ids = [*peft.virtual_tokens(p), *prompt]
  forward = jax.jit(lambda p, ids_BT: decoder.logits(p, c, decoder.apply(p, c, ids_BT))[0])
  pad = lambda ids: jnp.array([ids + [0] * (60 - len(ids))])
  for _ in range(n):
    ids.append(int(np.argmax(forward(p, pad(ids))[len(ids) - 1])))
  return ids[-n:]


@pytest.mark.slow
@pytest.mark.parametrize('method', ['lora', *map(slow, ('prefix', 'prompt', 'full', 'houlsby', 'top'))])
def test_replies_are_those_of_the_weights_that_were_evaluated(method, root, tmp_path, monkeypatch):
  """With an average of the parameters, at every evaluation, compiled once."""
  traced = []
  original = decode.run
  monkeypatch.setattr(decode, 'run', lambda *args: traced.append(1) or original(*args))
  few = peft.Config(method, train='', length=3, hidden=8, width=4, layers=1)
  c = make(root, peft=few, optim__ema=0.5)
  run.run(c, instruct.task(c), tmp_path)
  rows = samples.read(tmp_path)
  assert [row['step'] for row in rows] == [4, 4, 4, 8, 8, 8] and len(traced) == 1
  assert [row['prompt'] for row in rows[:3]] == [row['prompt'] for row in rows[3:]]
  assert all(row['prompt'].startswith('say ') and row['reference'] in ('jaja', '好好') for row in rows)
  found = weights.load(tmp_path)
  stop = chat.stop_ids(c.data.written, found.tokenizer)
  for row in rows[3:]:
    want = greedy(found.config, found.params, found.tokenizer.encode(row['prompt']).tolist(), 6)
    ends = [i for i, token in enumerate(want) if token in stop]
    want = want[:ends[0]] if ends else want
    assert (row['reply'], row['ended']) == (found.tokenizer.decode(want), bool(ends))
  if method == 'prompt':
    done = subprocess.run([sys.executable, '-m', 'scripts.sample', f'--model={tmp_path}', '--chat=plain',
                           '--temperature=0', '--max_new=6', f'--prompt={rows[-1]["prompt"].strip()}'], cwd=ROOT,
                          capture_output=True, timeout=300, check=True)
    assert done.stdout.decode().rstrip('\n') == ''.join(streaming.pieces(found.tokenizer.decode, want)).rstrip('\n')


@pytest.mark.slow
def test_a_resumed_run_has_each_row_once(root, tmp_path):
  """A stop after one evaluation; a row that a kill left is written again. At a temperature, by the step's key."""
  c = make(root, samples__temperature=1.0)
  task = instruct.task(c)
  run.run(c, task, tmp_path / 'straight')
  original = conversations.train_batches

  def interrupted(data, place, start=0):
    for n, batch in enumerate(original(data, place, start), start + 1):
      if n == 5:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch
  with pytest.MonkeyPatch.context() as m, pytest.raises(Preempted):
    m.setattr(conversations, 'train_batches', interrupted)
    run.run(c, task, tmp_path / 'stopped')
  path = tmp_path / 'stopped/samples.jsonl'
  assert {row['step'] for row in samples.read(tmp_path / 'stopped')} == {4}
  with path.open('a') as file:
    file.write(json.dumps({'step': 8, 'prompt': 'left by a kill'}) + '\n')
  run.run(c, task, tmp_path / 'stopped')
  assert path.read_bytes() == (tmp_path / 'straight/samples.jsonl').read_bytes()
  assert len(path.read_text().splitlines()) == 6
  events = b''.join(p.read_bytes() for p in (tmp_path / 'stopped/tensorboard/samples').iterdir())
  assert events.count(b'sample_0/text_summary') == 2 and all(row['reply'].encode() in events
                                                              for row in samples.read(tmp_path / 'stopped'))


def test_what_a_model_says_may_look_like_an_end_of_line(tmp_path):
  rows = [{'step': 4, 'prompt': f'a{end}b', 'reply': f'{end}你好{end}', 'ended': True}
          for end in ('\u2028', '\u2029', '\x85', '\x0c', '\x1e', '\r\n')]
  with contextlib.closing(samples.Book(tmp_path, 0)) as book:
    book.write(rows)
  assert samples.read(tmp_path) == rows
  with contextlib.closing(samples.Book(tmp_path, 4)):
    assert samples.read(tmp_path) == rows


def test_an_evaluation_that_is_made_again_is_written_once(tmp_path):
  """A run killed between an evaluation made up for and its seal resumes at the same step and makes it up again."""
  rows = lambda step: [{'step': step, 'prompt': str(i), 'reply': 'r'} for i in range(2)]
  for _ in range(2):
    with contextlib.closing(samples.Book(tmp_path, 4)) as book:
      book.write(rows(2))
      book.write(rows(4))
  assert samples.read(tmp_path) == rows(2) + rows(4)


@pytest.mark.slow
def test_a_mesh_says_the_same(root, tmp_path):
  found = []
  for mesh in (dict(), dict(data=2, fsdp=2, tensor=2)):
    c = make(root, mesh=sharding.Config(**mesh), optim__steps=4)
    run.run(c, instruct.task(c), tmp_path / str(len(found)))
    found.append((tmp_path / str(len(found)) / 'samples.jsonl').read_text())
  assert found[0] == found[1] and len(found[0].splitlines()) == 3


@pytest.mark.slow
def test_none_are_asked_for_or_can_be_told(root, tmp_path, capsys):
  assert instruct.task(make(root, samples__count=0)).around.program is None
  c = make(root, data__loss='all', optim__steps=4)
  run.run(c, instruct.task(c), tmp_path)
  assert 'samples: no validation row tells a prompt from its reply' in capsys.readouterr().out
  assert not (tmp_path / 'samples.jsonl').exists()


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:optim.lr')
def test_at_a_temperature_each_evaluation_draws_anew(root, tmp_path):
  c = make(root, samples__temperature=1.0, optim__lr=0.0)
  run.run(c, instruct.task(c), tmp_path)
  rows = [(row['prompt'], row['reply']) for row in samples.read(tmp_path)]
  assert [prompt for prompt, _ in rows[:3]] == [prompt for prompt, _ in rows[3:]] and rows[:3] != rows[3:]


@pytest.mark.slow
def test_replies_end_where_positions_do(root, tmp_path):
  """Learned positions: as many new tokens as the longest prompt leaves."""
  c = make(root, samples__new_tokens=1000, optim__steps=4)
  run.run(c, instruct.task(c), tmp_path)
  assert samples.read(tmp_path)
  tokenizer = tokenizers.byte()
  assert all(len(tokenizer.encode(row['reply'])) <= 64 - len(row['prompt']) for row in samples.read(tmp_path)
             if '\ufffd' not in row['reply'])


@pytest.mark.parametrize('change', [dict(count=-1), dict(new_tokens=0), dict(temperature=float('nan'))], ids=str)
def test_mistakes_in_a_config(change):
  (name, value), = change.items()
  with pytest.raises(ConfigError, match=f'samples.{name}={value}; expected'):
    samples.Config(**change)
