"""scripts.score as a program: the table is lm.metrics of the replies it writes, and a failure is one line."""

import json
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from lm import beam, checkpoint, config, decode, instruct, metrics, params, sampler, weights
from lm.data import assign, conversations
from lm.models import decoder, hf
from lm.text import chat, tokenizer

ROOT = pathlib.Path(__file__).parent.parent
TALKS = [
    {'messages': [{'role': 'user', 'content': 'say ja'}, {'role': 'assistant', 'content': 'ja ja'}]},
    {'instruction': '说好', 'input': '', 'output': '好好好'},
    {'messages': [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'ho'},
                  {'role': 'user', 'content': 'say no'}, {'role': 'assistant', 'content': 'no, no; the no'}]},
    {'messages': [{'role': 'user', 'content': 'long ' * 20}, {'role': 'assistant', 'content': 'left out'}]},
]


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A model whose replies are noise, and its data."""
  root = tmp_path_factory.mktemp('score')
  c = decoder.Config(vocab=258, length=48, layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32)
  hf.save(root / 'hf', c, params.init(decoder.specs(c), jax.random.key(0)), tokenizer.byte())
  write(root / 'talks.jsonl', TALKS)
  return root


def write(path, talks):
  path.write_text(''.join(json.dumps(talk, ensure_ascii=False) + '\n' for talk in talks), encoding='utf-8')


def run(*flags):
  return subprocess.run([sys.executable, '-m', 'scripts.score', *map(str, flags)], cwd=ROOT, capture_output=True,
                        text=True, timeout=300, check=False)


@pytest.mark.slow
def test_the_table_is_that_of_the_replies(root, tmp_path):
  done = run(f'--model={root}/hf', f'--data={root}/talks.jsonl', '--chat=plain', '--split=all', '--max_new=12',
             '--batch=2', f'--out={tmp_path}/new/replies.jsonl')
  assert done.returncode == 0, done.stderr
  assert '1 left out' in done.stdout and '4 of --split=all' in done.stdout
  rows = [json.loads(line) for line in (tmp_path / 'new/replies.jsonl').read_bytes().split(b'\n') if line]
  assert [(r['prompt'], r['reference'], r['language']) for r in rows] == [
      ('say ja', 'ja ja', 'en'), ('说好', '好好好', 'zh'), ('say no', 'no, no; the no', 'en')]
  found = weights.load(root / 'hf')
  for row, talk in zip(rows, [TALKS[0], None, TALKS[2]], strict=True):
    said = talk['messages'][:-1] if talk else [{'role': 'user', 'content': '说好'}]
    ids = chat.prompt(chat.plain, [chat.Message(**m) for m in said], found.tokenizer).tolist()
    s = sampler.Sampling(12, temperature=0, stop=chat.stop_ids(chat.plain, found.tokenizer))
    want = decode.generate(decode.of(decoder, found.config), found.params, [ids], s)
    reply = chat.parse(chat.plain, np.asarray(want.tokens_BT[0])[:int(want.lengths_B[0])], found.tokenizer)
    assert (row['reply'], row['ended']) == reply
  cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in done.stdout.splitlines() if line[:1] == '|']
  table = {name: (float(score), float(low), float(high), int(n)) for name, score, low, high, n in cells[2:]
           if name.endswith('en')} | {name: (float(score), int(n)) for name, score, *_, n in cells[2:] if 'zh' in name}
  for language in ('en', 'zh'):
    pair = [[r[key] for r in rows if r['language'] == language] for key in ('reference', 'reply')]
    wanted = {'exact_match': metrics.exact_match(*pair, language), 'rouge_l': metrics.rouge(*pair, language)['rougeL'],
              'bleu': metrics.bleu(*pair, language), 'chrf': metrics.chrf(*pair)}
    for name, value in wanted.items():
      score, *interval, count = table[f'{name}, {language}']
      assert score == pytest.approx(value, abs=5e-5) and count == len(pair[0])
      assert not interval or interval[0] <= score <= interval[1]
  assert len(table) == 8


@pytest.mark.slow
def test_it_answers_by_beam_search_if_asked(root, tmp_path):
  done = run(f'--model={root}/hf', f'--data={root}/talks.jsonl', '--chat=plain', '--split=all', '--max_new=12',
             '--batch=2', '--beams=3', '--length_penalty=0.5', '--distinct=2', f'--out={tmp_path}/replies.jsonl')
  assert done.returncode == 0, done.stderr
  found = weights.load(root / 'hf')
  c = beam.Config(3, 12, 0.5, 2, chat.stop_ids(chat.plain, found.tokenizer))
  ids = chat.prompt(chat.plain, [chat.Message('user', 'say ja')], found.tokenizer).tolist()
  want = beam.generate(decode.of(decoder, found.config), found.params, [ids], c)
  best = np.asarray(want.tokens_BKT)[0, 0, :int(want.lengths_BK[0, 0])]
  first = json.loads((tmp_path / 'replies.jsonl').read_bytes().split(b'\n')[0])
  assert (first['reply'], first['ended']) == chat.parse(chat.plain, best, found.tokenizer)
  done = run(f'--model={root}/hf', f'--data={root}/talks.jsonl', '--distinct=2', f'--out={tmp_path}/more.jsonl')
  assert (done.returncode, done.stderr.count('\n')) == (2, 1) and '--beams=1: ' in done.stderr


@pytest.mark.slow
def test_a_run_says_how_it_wrote_and_what_it_held_out(root, tmp_path):
  """A workdir of a run on conversations needs no --chat; of its data the held-out records are answered."""
  talks = [{'instruction': f'say {i}', 'output': str(i)} for i in range(12)]
  write(tmp_path / 'talks.jsonl', talks)
  data = conversations.Config(str(tmp_path / 'talks.jsonl'), 'plain', tokenizer='byte', length=24,
                              validation_fraction=0.3)
  found = weights.load(root / 'hf')
  c = instruct.Config(model=found.config, data=data)
  with checkpoint.Saver(tmp_path / 'run/checkpoints', c.checkpoint, start=None) as saver:
    saver.save(0, {'params': found.params}, meta={}, metrics={})
  found.tokenizer.save(tmp_path / 'run/tokenizer')
  (tmp_path / 'run/config.json').write_text(json.dumps({'config': config.to_json(c)}))
  done = run(f'--model={tmp_path}/run', f'--data={tmp_path}/talks.jsonl', '--max_new=3', '--metrics=exact_match',
             f'--out={tmp_path}/replies.jsonl', '--limit=2')
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in (tmp_path / 'replies.jsonl').read_text().splitlines()]
  asked = [talk['instruction'] for talk in talks]
  parts = assign.assigned([types.SimpleNamespace(split=None, origin='') for _ in talks], asked, 0.3)
  held = [text for text, part in zip(asked, parts, strict=True) if part == 'validation']
  assert len(held) > 2 and len(rows) == 2 and {r['prompt'] for r in rows} < set(held)
  done = run(f'--model={tmp_path}/run', f'--data={tmp_path}/talks.jsonl', f'--out={tmp_path}/replies.jsonl')
  assert (done.returncode, done.stderr.count('\n')) == (2, 1) and 'exists already' in done.stderr


@pytest.mark.slow
def test_what_the_tokenizer_refuses_ends_it_or_is_left_out(tmp_path):
  (tmp_path / 'vocab.txt').write_text('\n'.join('[PAD] [UNK] [CLS] [SEP] [MASK] say a # response :'.split()) + '\n')
  tok = tokenizer.load(tmp_path / 'vocab.txt')
  c = decoder.Config(vocab=tok.vocab_size, length=64, layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32)
  hf.save(tmp_path / 'hf', c, params.init(decoder.specs(c), jax.random.key(0)), tok)
  write(tmp_path / 'talks.jsonl', [{'instruction': text, 'output': 'a'} for text in ('### Response:', 'say')])
  given = (f'--model={tmp_path}/hf', f'--data={tmp_path}/talks.jsonl', '--chat=alpaca', '--split=all', '--max_new=2',
           '--metrics=exact_match', f'--out={tmp_path}/replies.jsonl')
  said = f'{tmp_path}/talks.jsonl:1: field instruction: the tokenizer cannot tell its words from'
  done = run(*given)
  assert (done.returncode, done.stderr.count('\n')) == (3, 1) and said in done.stderr
  done = run(*given, '--on_error=skip')
  assert done.returncode == 0 and f'1 left out; the first: {said}' in done.stdout, done.stderr
  assert [json.loads(line)['prompt'] for line in (tmp_path / 'replies.jsonl').read_text().splitlines()] == ['say']


@pytest.mark.slow
@pytest.mark.parametrize('flags, code, part', [
    (('--model={}/hf', '--data={}/none.jsonl', '--chat=plain'), 3, 'none.jsonl'),
    (('--model={}/hf', '--data={}/talks.jsonl', '--chat=plain', '--metrics=blue'), 2, '--metrics=blue: unknown'),
    (('--model={}/hf', '--data={}/talks.jsonl'), 2, '--chat: not given'),
    (('--model={}/hf', '--data={}/talks.jsonl', '--chat=plain', '--split=test'), 2, '--split=all'),
    (('--model={}/hf', '--data={}/open.jsonl', '--chat=plain'), 3, 'open.jsonl:2: field messages: ends with user'),
    (('--model={}/hf', '--data={}/bare.jsonl', '--chat=plain'), 3, 'bare.jsonl:1: no field output')])
def test_a_failure_is_one_line(root, flags, code, part, tmp_path):
  write(root / 'open.jsonl', [TALKS[0], {'messages': [{'role': 'user', 'content': 'who answers?'}]}])
  write(root / 'bare.jsonl', [{'instruction': 'who answers?'}])
  done = run(*(flag.replace('{}', str(root)) for flag in flags), f'--out={tmp_path}/replies.jsonl')
  assert (done.returncode, done.stderr.count('\n')) == (code, 1) and part in done.stderr, done.stderr
  assert not (tmp_path / 'replies.jsonl').exists()


@pytest.mark.slow
def test_the_language_of_a_reply_is_that_of_its_reference():
  pairs = [('How do you say "thank you very much" in Chinese?', '非常感谢你'), ('用英语怎么说谢谢你们', 'Thank you'),
           ('多少？', '42'), ('How many?', '42')]
  code = 'import json, sys; from scripts import score; print([score._language(*p) for p in json.loads(sys.argv[1])])'
  done = subprocess.run([sys.executable, '-c', code, json.dumps(pairs)], cwd=ROOT, capture_output=True, text=True,
                        check=True)
  assert done.stdout.strip() == "['zh', 'en', 'zh', 'en']"
