"""scripts/quality_check: what it prints, writes and keeps of every kind of record, in English and Chinese."""

import datetime
import json
import os
import pathlib
import subprocess
import sys

import matplotlib.figure
import pytest

from lm import pictures
from lm.data import examples
from lm.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
GOOD = [('A warm, funny film about two brothers who lose a shop and find each other again.', 'pos'),
        ('这部电影真的很棒，演员表演出色，剧情引人入胜，值得再看一遍。', 'pos'),
        ('The plot never starts, and the jokes that it has were old in my school days.', 'neg'),
        ('房间很小，隔音也差，早餐只有白粥，下次不会再来了。', 'neg')]
ANSWER = 'The Po is the longest river of Italy.'
RECORDS = {
    'classification': [{'text': text, 'label': label, 'stars': i, 'split': 'train'}
                       for i, (text, label) in enumerate(GOOD)],
    'instruction': [{'instruction': 'Translate it', 'input': '今天天气怎么样？', 'output': 'How is the weather?',
                     'task_type': 'translation'},
                    {'instruction': '写一句关于春天的话', 'input': '', 'output': '春风又绿江南岸。'}],
    'chat': [{'messages': [{'role': 'system', 'content': 'Be short.'}, {'role': 'user', 'content': 'Name a river.'},
                           {'role': 'assistant', 'content': ANSWER}]},
             {'messages': [{'role': 'user', 'content': '什么是机器学习？'},
                           {'role': 'assistant', 'content': '从数据中学习规律的方法。'}], 'split': 'test'}],
    'preference': [{'prompt': [{'role': 'user', 'content': '什么是机器学习？'}], 'chosen': '从数据中学习规律的方法。',
                    'rejected': '不知道。'}],
}


# One process for all: starting one takes longer than the rest, and flags are global to a process.
DRIVER = """
import contextlib, io, json, sys
from absl import flags
from lm.errors import Error
from scripts import quality_check
for line in sys.stdin:
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()
  flags.FLAGS(['quality_check', *json.loads(line)])
  printed, code, error = io.StringIO(), 0, ''
  try:
    with contextlib.redirect_stdout(printed):
      quality_check.main([])
  except Error as e:
    code, error = e.code, str(e)
  print(json.dumps([code, printed.getvalue(), error]), flush=True)
"""


@pytest.fixture(scope='module')
def process():
  with subprocess.Popen([sys.executable, '-c', DRIVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                        text=True) as found:
    yield found
    found.stdin.close()


@pytest.fixture
def fails(process):
  """fails(flags...) -> (exit status, what is printed, the error)."""
  def run(**given):
    process.stdin.write(json.dumps([f'--{k.removesuffix("_")}={v}' for k, v in given.items()]) + '\n')
    process.stdin.flush()
    return json.loads(process.stdout.readline())
  return run


@pytest.fixture
def check(fails):
  """check(flags...) -> what is printed, with exit status 0."""
  def run(**given):
    code, printed, error = fails(**given)
    assert (code, error) == (0, '')
    return printed
  return run


def jsonl(path, records):
  path.write_text(''.join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + '\n' for r in records),
                  encoding='utf-8')
  return path


@pytest.mark.slow
@pytest.mark.parametrize('kind', RECORDS)
def test_good_records_of_each_kind_pass_and_come_back(kind, check, tmp_path):
  path = jsonl(tmp_path / 'in.jsonl', RECORDS[kind])
  printed = check(in_=path, clean=tmp_path / 'clean.jsonl', out=tmp_path / 'r.json', strict=True)
  report = json.loads((tmp_path / 'r.json').read_text(encoding='utf-8'))
  n = len(RECORDS[kind])
  assert f'in.jsonl: {kind}' in printed and f'{n} of {n} records; rejected: none' in printed
  assert report['kind'] == kind and report['findings'] == {} and report['clean'] == {'kept': n, 'rejected': {}}
  assert [json.loads(line) for line in (tmp_path / 'clean.jsonl').read_text(encoding='utf-8').splitlines()] == (
      RECORDS[kind])
  assert examples.read(tmp_path / 'clean.jsonl', kind)[0] == examples.read(path, kind)[0]


def test_pairs_come_back_with_both_texts_and_are_measured_with_both(check, tmp_path):
  rows = [{'text': text, 'text_pair': other, 'label': label} for (text, label), (other, _) in zip(
      GOOD, GOOD[1:] + GOOD[:1], strict=True)]
  path = jsonl(tmp_path / 'in.jsonl', rows)
  check(in_=path, clean=tmp_path / 'clean.jsonl', out=tmp_path / 'r.json', tokenizer='byte')
  assert [json.loads(line) for line in (tmp_path / 'clean.jsonl').read_text(encoding='utf-8').splitlines()] == rows
  sizes = [len((row['text'] + row['text_pair']).encode()) + 2 for row in rows]  # a newline, the end of text
  tokens = json.loads((tmp_path / 'r.json').read_text())['tokens']
  assert (tokens['0'], tokens['100']) == (min(sizes), max(sizes))
  jsonl(path, [{'text': GOOD[0][0], 'label': 'pos', 'metadata': {'text_pair': 'not the second text'}}])
  check(in_=path, clean=tmp_path / 'c.jsonl')
  assert examples.read(tmp_path / 'c.jsonl', 'classification')[0] == examples.read(path, 'classification')[0]


@pytest.mark.parametrize('fields, kind', [
    ({'conversations': [{'from': 'human', 'value': 'Name a river.'}, {'from': 'gpt', 'value': ANSWER}]}, 'chat'),
    ({'instruction': 'And in France?', 'output': 'The Loire.', 'history': [['In Italy?', ANSWER]]}, 'chat'),
    ({'conversations': [{'from': 'human', 'value': 'Name a river.'}], 'chosen': ANSWER, 'rejected': 'No.'},
     'preference')])
def test_other_spellings_are_told_by_the_first_record_and_written_in_one(fields, kind, check, tmp_path):
  path = jsonl(tmp_path / 'in.jsonl', ['{broken', fields])
  assert f': {kind}\n' in check(in_=path, clean=tmp_path / 'c.jsonl', drop='label')
  assert examples.read(tmp_path / 'c.jsonl', kind)[0] == examples.read(path, kind, 'skip')[0]
  assert json.loads((tmp_path / 'c.jsonl').read_text(encoding='utf-8')).keys() <= {'messages', 'prompt', 'chosen',
                                                                                  'rejected'}


def test_what_the_tokenizer_refuses_is_malformed(check, fails, tmp_path):
  path = jsonl(tmp_path / 'in.jsonl', [{'instruction': 'Name a river.', 'output': ANSWER, 'history': []}, {
      'instruction': 'Name a river.', 'output': '### Response: the Po', 'history': []}])
  (tmp_path / 'vocab.txt').write_text('\n'.join('[PAD] [UNK] [CLS] [SEP] # response :'.split()) + '\n')
  given = {'in_': path, 'tokenizer': tmp_path / 'vocab.txt', 'template': 'alpaca'}
  printed = check(**given, clean=tmp_path / 'c.jsonl')
  said = 'in.jsonl:2: field output: the tokenizer cannot tell its words from'
  assert 'words                   1   50.00%' in printed and said in printed
  assert '1 of 2 records; rejected: malformed: words 1' in printed
  code, _, error = fails(**given, on_error='stop')
  assert code == 3 and said in error


def test_the_input_of_an_instruction_stays_one(check, tmp_path):
  path = jsonl(tmp_path / 'in.jsonl', [{'instruction': 'And in this one?', 'input': 'France', 'output': 'The Loire.',
                                        'history': [['Name a river in Italy.', ANSWER]]}])
  check(in_=path, clean=tmp_path / 'c.jsonl')
  (talk,), _ = examples.read(tmp_path / 'c.jsonl', 'chat')
  assert [m.input for m in talk.messages] == ['', '', 'France', '']


BAD = [RECORDS['classification'][0], '{"text": "cut', {'text': GOOD[0][0].upper(), 'label': 'pos'},
       {'text': 'mail zhangwei@163.com for the film, it is a good one', 'label': 'pos'},
       {'text': GOOD[1][0], 'label': 'neg'}, RECORDS['classification'][1], {'text': 'no label here'},
       RECORDS['classification'][3]]


def test_what_is_wrong_is_named_counted_and_left_out(check, tmp_path):
  path = jsonl(tmp_path / 'in.jsonl', BAD)
  printed = check(in_=path, clean=tmp_path / 'clean.jsonl', out=tmp_path / 'r.json')
  report = json.loads((tmp_path / 'r.json').read_text(encoding='utf-8'))
  assert report['records'] | {'first malformed': 0} == {
      'seen': 8, 'read': 6, 'last turn cut': 0, 'not read': [], 'malformed': {'json': 1, 'missing': 1},
      'first malformed': 0}
  assert 'in.jsonl:2: broken JSON' in printed and 'in.jsonl:7: no field label' in printed
  assert report['labels'] == {'pos': 4, 'neg': 2} and report['imbalance'] == 2 and 'largest/smallest 2.00' in printed
  assert report['findings'] == {'label contradictory': 2, 'duplicate': 2, 'personal data': 1}
  assert [(p['at'].rpartition(':')[2], p['kind']) for p in report['places']] == [
      ('3', 'duplicate'), ('4', 'personal data'), ('5', 'label contradictory'), ('6', 'label contradictory'),
      ('6', 'duplicate')]
  rejected = {'malformed: json': 1, 'malformed: missing': 1, 'label contradictory': 2, 'duplicate': 1,
              'personal data': 1}
  assert report['clean'] == {'kept': 2, 'rejected': rejected} and sum(rejected.values()) + 2 == 8
  assert examples.read(tmp_path / 'clean.jsonl', 'classification')[0] == [
      examples.read(path, 'classification', 'skip')[0][i] for i in (0, 5)]
  for words in ('brothers', 'zhangwei', '电影', '白粥'):
    assert words not in printed and words not in (tmp_path / 'r.json').read_text(encoding='utf-8')


def test_only_the_named_findings_keep_a_record_out(check, tmp_path):
  path = jsonl(tmp_path / 'in.jsonl', BAD)
  check(in_=path, clean=tmp_path / 'clean.jsonl', drop='personal data,label')
  assert [e.text for e in examples.read(tmp_path / 'clean.jsonl', 'classification')[0]] == [
      GOOD[0][0], GOOD[0][0].upper(), GOOD[3][0]]


@pytest.mark.parametrize('flag', ['out', 'picture'])
def test_the_input_is_not_overwritten(fails, tmp_path, flag):
  path = tmp_path / 'in.jsonl'
  path.write_text('{"text": "a fine film", "label": "pos"}\n')
  code, _, error = fails(in_=path, **{flag: f'{tmp_path}/./in.jsonl'})
  assert code == ConfigError.code and f'--{flag}={path}: the same as --in' in error
  assert path.read_text() == '{"text": "a fine film", "label": "pos"}\n'


def test_what_is_clean_can_be_split(check, tmp_path):
  """A duplicate is here what it is to the splits of training; of a pair, the texts are compared, not their join."""
  rows = [{'text': text, 'label': 'pos', 'split': split} for text, split in [
      ('go\u200bod film', 'train'), ('good film', 'validation'), ('我很 喜欢', 'train'), ('我很喜欢', 'validation'),
      ('another one', 'train')]] + [{'text': a, 'text_pair': b, 'label': label} for a, b, label in [
          ('what is it', 'that one\nor this', 'pos'), ('what is it\nthat one', 'or this', 'neg')]]
  path = jsonl(tmp_path / 'in.jsonl', rows)
  check(in_=path, clean=tmp_path / 'clean.jsonl', set='near=None')
  kept = [json.loads(line) for line in (tmp_path / 'clean.jsonl').read_text(encoding='utf-8').splitlines()]
  assert [row['text'] for row in kept] == [rows[i]['text'] for i in (0, 2, 4, 5, 6)]


def test_strict_fails_and_stop_stops(fails, tmp_path):
  path = jsonl(tmp_path / 'in.jsonl', BAD)
  code, printed, error = fails(in_=path, strict=True)
  assert code == 1 and 'examples     6' in printed
  assert 'malformed 2, label contradictory 2, duplicate 2, personal data 1; --strict' in error
  code, printed, error = fails(in_=path, on_error='stop')
  assert (code, printed) == (3, '') and 'in.jsonl:2: broken JSON' in error


def test_lengths_in_tokens_are_those_of_training(check, fails, tmp_path):
  chats = jsonl(tmp_path / 'chat.jsonl', RECORDS['chat'])
  labelled = jsonl(tmp_path / 'labelled.jsonl', [{'text': 'x' * n, 'label': 'a'} for n in (9, 10, 11)])
  given = {'tokenizer': 'byte', 'template': 'plain', 'out': tmp_path / 'r.json'}
  words = [sum(len(m['content'].encode()) + 1 for m in r['messages']) for r in RECORDS['chat']]  # and a newline or end
  check(in_=chats, length=min(words) - 2, **given)
  report = json.loads((tmp_path / 'r.json').read_text())
  begin = report['tokens']['0'] - min(words)
  assert begin in (0, 1) and report['tokens']['100'] == max(words) + begin and report['longer']['examples'] == 2
  check(in_=chats, length=report['tokens']['100'] - 1, **given)  # rows hold length + 1 tokens
  assert json.loads((tmp_path / 'r.json').read_text())['longer']['examples'] == 0
  printed = check(in_=labelled, length=11, **given)
  assert 'tokens       0%: 10  ' in printed and 'longer than --length=11: 1 (33.3%)' in printed  # the end of text
  code, _, error = fails(in_=labelled, length=11, set='near=None', strict=True, **given)
  assert code == 1 and 'longer 1; --strict' in error


def test_chinese_csv_of_another_encoding_and_splits_by_folder(check, tmp_path):
  (tmp_path / 'set').mkdir()
  rows = 'text,label\n' + '\n'.join(f'{text},{label}' for text, label in GOOD if '，' in text) + '\n'
  (tmp_path / 'set' / 'train.csv').write_bytes(rows.encode('gb18030'))
  printed = check(in_=tmp_path / 'set', encoding='gb18030', clean=tmp_path / 'c.jsonl')
  assert 'zh 2 (100.0%)' in printed
  assert [(e.text, e.label, e.split) for e in examples.read(tmp_path / 'c.jsonl', 'classification')[0]] == [
      (GOOD[1][0], 'pos', 'train'), (GOOD[3][0], 'neg', 'train')]


def test_fields_by_other_names(check, fails, tmp_path):
  path = jsonl(tmp_path / 'in.jsonl', [{'premise': text, 'hypothesis': '是的', 'label': i % 2}
                                       for i, (text, _) in enumerate(GOOD)])
  names = 'premise=text,hypothesis=text_pair'
  printed = check(in_=path, rename=names, clean=tmp_path / 'c.jsonl', drop='label')
  assert 'classification' in printed
  found = examples.read(tmp_path / 'c.jsonl', 'classification')[0]
  assert [(e.texts, e.label) for e in found] == [((text, '是的'), '01'[i % 2]) for i, (text, _) in enumerate(GOOD)]
  for wrong, part in (('premise', 'expected pairs of what the file calls'), ('a=text,b=text', "'text' twice")):
    code, _, error = fails(in_=path, rename=wrong)
    assert code == 2 and error.startswith('--rename=') and part in error


def test_parquet_values_that_json_has_not(check, tmp_path):
  pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
  table = pyarrow.table({'text': [text for text, _ in GOOD], 'label': ['a', 'b'] * 2,
                         'score': [1.5, float('nan'), 2.0, 3.0], 'day': [datetime.date(2026, 1, 2)] * 4})
  parquet.write_table(table, tmp_path / 'a.parquet')
  check(in_=tmp_path / 'a.parquet', clean=tmp_path / 'c.jsonl')
  found = examples.read(tmp_path / 'c.jsonl', 'classification')[0]
  assert [e.metadata['score'] for e in found] == [1.5, None, 2.0, 3.0] and found[0].metadata['day'] == '2026-01-02'


@pytest.mark.parametrize('given, code, part', [
    ({}, 2, '--in: not given'), ({'length': 5}, 2, '--length=5: no tokenizer'),
    ({'clean': ROOT / 'README.md'}, 2, 'README.md: exists already'),
    ({'out': 'nowhere/r.json'}, 2, '--out=nowhere/r.json: no such folder'),
    ({'drop': 'dupes'}, 2, "drop='dupes'; expected language"), ({'set': 'nears=1'}, 2, "did you mean 'near'?"),
    ({'encoding': 'klingon'}, 2, "encoding='klingon'"), ({'in_': 'nowhere.jsonl'}, 3, 'nowhere.jsonl'),
])
def test_a_wrong_flag_is_told_first(given, code, part, fails, tmp_path):
  path = jsonl(tmp_path / 'x.jsonl', RECORDS['classification'])
  found, printed, error = fails(**({'in_': path} | given if given else {}))
  assert (found, printed) == (code, '') and part in error
  assert os.listdir(tmp_path) == ['x.jsonl']


@pytest.mark.slow
def test_the_command_exits_with_the_status(tmp_path):
  path = jsonl(tmp_path / 'in.jsonl', BAD)
  done = subprocess.run([sys.executable, '-m', 'scripts.quality_check', f'--in={path}', '--strict'], cwd=ROOT,
                        check=False, capture_output=True, text=True, timeout=300)
  assert done.returncode == 1 and done.stderr.startswith('error: ') and 'duplicate 2' in done.stderr, done.stderr


@pytest.mark.parametrize('kind', ['classification', 'preference'])
def test_the_picture_is_written(kind, check, tmp_path):
  path = jsonl(tmp_path / '评论.jsonl', RECORDS[kind])
  printed = check(in_=path, picture=tmp_path / 'r.png', tokenizer='byte', length=64)
  assert f'{tmp_path}/r.png: lengths and labels' in printed
  assert (tmp_path / 'r.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_histograms_are_shares_and_many_labels_share_the_last(tmp_path, monkeypatch):
  figures, save = [], matplotlib.figure.Figure.savefig
  monkeypatch.setattr(matplotlib.figure.Figure, 'savefig',
                      lambda figure, *args, **kwargs: (figures.append(figure), save(figure, *args, **kwargs))[1])
  sizes = {f'标签 {i}': [i + 1] * (100 - i) for i in range(70)}
  pictures.lengths(tmp_path / 'l.png', sizes, 'tokens', 64)
  left, right = figures[0].axes
  widths = [p.get_width() for p in right.patches]
  assert widths[:59] == [100 - i for i in range(59)] and widths[59] == sum(100 - i for i in range(59, 70))
  shown = [t.get_text() for t in left.get_legend().get_texts()]
  assert [label.rpartition(' ')[2] for label in shown] == [*'0123456', 'others', '64'] and left.get_xlabel() == 'tokens'
  assert [max(p.get_xy()[:, 1]) for p in left.patches][:7] == pytest.approx([1.0] * 7)
  for wrong in ({}, {'a': []}):
    with pytest.raises(ConfigError, match='^sizes: expected'):
      pictures.lengths(tmp_path / 'x.png', wrong)
