"""Fine-tuning data of every format and spelling, and everything that can be wrong with a record of it."""

import csv
import dataclasses
import json
import random
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

from lm.data import examples
from lm.data.examples import Chat, Instruction, Labelled, Preference
from lm.data.json_io import Limits
from lm.data.turns import Message
from lm.errors import ConfigError, DataError

SECRET = 'my address is 5 Elm Street and my doctor says '  # stands in every bad text, must stand in no message


def chat(*turns, system=None):
  first = () if system is None else (Message('system', system),)
  return Chat((*first, *(Message(('user', 'assistant')[i % 2], turn) for i, turn in enumerate(turns))))


CHAT = chat('今天天气怎么样？', '我查不到。', '那推荐一个应用吧', 'Try any weather app.')
DOMAIN = {'domain': 'movie_review', 'source': 'douban'}
LABELLED = [{'text': '这部电影真的很棒', 'label': 'positive', 'metadata': DOMAIN},
            {'text': 'dull, "slow"\nand long', 'label': 'negative', 'metadata': {}, 'split': 'validation'}]
INSTRUCTIONS = [{'instruction': '请回答以下问题', 'input': '什么是机器学习？', 'output': '人工智能',
                 'task_type': 'qa'},
                {'instruction': 'Name a river', 'input': '', 'output': 'The Po', 'task_type': ''}]
RECORDS = {
    'classification': (LABELLED, [Labelled('这部电影真的很棒', 'positive', DOMAIN),
                                  Labelled('dull, "slow"\nand long', 'negative', {}, 'validation')]),
    'instruction': (INSTRUCTIONS, [Instruction('请回答以下问题', '什么是机器学习？', '人工智能', 'qa'),
                                   Instruction('Name a river', '', 'The Po')]),
    'chat': ([{'messages': [dataclasses.asdict(m) for m in CHAT.messages]}], [CHAT]),
    'preference': ([{'prompt': '一加一？', 'chosen': '二', 'rejected': '三'}],
                   [Preference((Message('user', '一加一？'),), '二', '三')]),
}
JSON_CELLS = ('messages', 'metadata')


def write(path, records):
  """The records in the format of the path's ending."""
  dump = lambda value: json.dumps(value, ensure_ascii=False)
  if path.suffix == '.jsonl':
    path.write_text('\n'.join(map(dump, records)), encoding='utf-8')
  elif path.suffix == '.json':
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding='utf-8')
  elif path.suffix == '.parquet':
    names = dict.fromkeys(name for record in records for name in record)
    pa.parquet.write_table(pa.table({name: [record.get(name) for record in records] for name in names}), path)
  else:
    names = list(dict.fromkeys(name for record in records for name in record))
    with open(path, 'w', encoding='utf-8', newline='') as f:
      writer = csv.writer(f, delimiter=',' if path.suffix == '.csv' else '\t')
      writer.writerow(names)
      for record in records:
        writer.writerow([dump(v) if n in JSON_CELLS else v for n, v in ((n, record.get(n, '')) for n in names)])
  return path


@pytest.mark.parametrize('kind', RECORDS)
@pytest.mark.parametrize('suffix', ['.jsonl', '.json', '.csv', '.tsv', '.parquet'])
def test_every_kind_in_every_format(tmp_path, kind, suffix):
  records, expected = RECORDS[kind]
  path = write(tmp_path / f'数据{suffix}', records)
  found, report = examples.read(path, kind)
  if suffix == '.parquet' and kind == 'classification':  # Arrow has one schema: missing keys of a struct are null
    found = [dataclasses.replace(e, metadata={k: v for k, v in e.metadata.items() if v is not None}) for e in found]
  assert found == expected
  assert (report.seen, report.kept, report.cut, report.faults) == (len(records), len(records), 0, {})
  assert all(e.origin.startswith(f'{path}') for e in found)


def test_origins_are_lines_and_rows(tmp_path):
  records = RECORDS['classification'][0]
  origins = {suffix: [e.origin.removeprefix(str(tmp_path)) for e in examples.read(
      write(tmp_path / f'a{suffix}', [*records, records[0]]), 'classification')[0]]
             for suffix in ('.jsonl', '.json', '.csv', '.parquet')}
  assert origins == {
      '.jsonl': ['/a.jsonl:1', '/a.jsonl:2', '/a.jsonl:3'], '.json': ['/a.json:2', '/a.json:10', '/a.json:16'],
      '.csv': ['/a.csv:2', '/a.csv:3', '/a.csv:5'],  # the second record takes two lines
      '.parquet': ['/a.parquet, row 1', '/a.parquet, row 2', '/a.parquet, row 3']}


SPELLINGS = [
    ('classification', {'text': '一只猫', 'text_pair': 'a cat', 'label': 'same', 'idx': 3},
     Labelled('一只猫', 'same', {'idx': 3}, text_pair='a cat')),
    ('chat', {'conversation': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]},
     chat('q', 'a')),
    ('chat', {'conversations': [{'from': 'system', 'value': 's'}, {'from': 'human', 'value': 'q'},
                                {'from': 'gpt', 'value': 'a'}], 'id': 3}, chat('q', 'a', system='s')),
    ('chat', {'conversations': [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}], 'system': 's'},
     chat('q', 'a', system='s')),
    ('chat', {'messages': [{'role': 'user', 'content': 'q', 'from': None, 'value': None},
                           {'role': None, 'content': None, 'from': 'gpt', 'value': 'a'}]}, chat('q', 'a')),
    ('chat', {'messages': ['q', 'a', '问', '答'], 'conversation': None}, chat('q', 'a', '问', '答')),
    ('chat', {'instruction': '翻译', 'input': '你好', 'output': 'hello'}, chat('翻译\n你好', 'hello')),
    ('chat', {'instruction': 'and?', 'output': 'c', 'history': [['a', 'b']], 'system': 's'},
     chat('a', 'b', 'and?', 'c', system='s')),
    ('instruction', {'instruction': 'x', 'output': 'y', 'input': None, 'history': [], 'system': ''},
     Instruction('x', '', 'y')),
    ('preference', {'prompt': [{'role': 'user', 'content': 'q'}], 'chosen': [{'role': 'assistant', 'content': 'a'}],
                    'rejected': [{'role': 'assistant', 'content': 'b'}]},
     Preference((Message('user', 'q'),), 'a', 'b')),
    ('preference', {'conversations': [{'from': 'system', 'value': 's'}, {'from': 'human', 'value': 'q'}],
                    'chosen': {'from': 'gpt', 'value': 'a'}, 'rejected': {'from': 'gpt', 'value': 'b'}},
     Preference((Message('system', 's'), Message('user', 'q')), 'a', 'b')),
    ('preference', {'instruction': 'q', 'input': 'i', 'chosen': 'a', 'rejected': 'b'},
     Preference((Message('user', 'q\ni'),), 'a', 'b')),
    ('preference', {'chosen': ['q', 'a'], 'rejected': ['q', 'b']}, Preference((Message('user', 'q'),), 'a', 'b')),
    ('preference', {'prompt': 'q', 'system': 's', 'chosen': 'a', 'rejected': 'b'},
     Preference((Message('system', 's'), Message('user', 'q')), 'a', 'b')),
    ('preference', {'prompt': 'q', 'chosen': ['q', 'a'], 'rejected': ['q', 'b']},
     Preference((Message('user', 'q'),), 'a', 'b')),
    ('classification', {'text': 't', 'label': 'nan ', 'metadata': {'a': 1}, 'id': 7, 'split': None},
     Labelled('t', 'nan ', {'a': 1, 'id': 7})),
]


@pytest.mark.parametrize('kind, record, expected', SPELLINGS)
def test_the_spellings_that_users_have(tmp_path, kind, record, expected):
  assert examples.read(write(tmp_path / 'a.jsonl', [record]), kind)[0] == [expected]
  if 'history' not in record:
    assert examples.read(write(tmp_path / 'a.parquet', [record]), kind)[0][0] == expected


def test_a_turn_knows_its_input_and_where_it_stands(tmp_path):
  talk = [{'role': 'user', 'content': '译\n好', 'input': '好'}, {'role': 'assistant', 'content': 'good', 'input': 'x'}]
  records = [{'instruction': '译', 'input': '好', 'output': 'good', 'history': [['q', 'a']], 'system': 's'},
             {'messages': talk}, {'messages': [talk[0] | {'input': 'else'}, talk[1]]}]
  (one, two, three), _ = examples.read(write(tmp_path / 'a.jsonl', records), 'chat')
  assert [(m.content, m.input, m.where) for m in one.messages] == [
      ('s', '', 'system'), ('q', '', 'history[0][0]'), ('a', '', 'history[0][1]'),
      ('译\n好', '好', 'instruction or input'), ('good', '', 'output')]
  assert [(m.content, m.input, m.where) for m in two.messages] == [
      ('译\n好', '好', 'messages[0].content'), ('good', '', 'messages[1].content')]
  assert two == three and not any(m.input for m in three.messages)
  (found,), _ = examples.read(write(tmp_path / 'b.jsonl', [{'instruction': 'q', 'input': 'i', 'chosen': 'a',
                                                            'rejected': 'b'}]), 'preference')
  assert found.prompt[0].input == 'i'


def test_rename_classes_and_split(tmp_path):
  path = tmp_path / 'a.tsv'
  path.write_text('sentence\tlabel\tsplit\tmovie\nfine\t1\ttrain\t7\n差\t0\t\t8\n', encoding='utf-8')
  found, _ = examples.read(path, 'classification', rename={'sentence': 'text'}, classes=('0', '1'))
  assert found == [Labelled('fine', '1', {'movie': '7'}, 'train'), Labelled('差', '0', {'movie': '8'})]
  with pytest.raises(DataError, match="a.tsv:2: field label: found '1'; expected one of 0, 2"):
    examples.read(path, 'classification', rename={'sentence': 'text'}, classes=('0', '2'))


def test_nan_is_a_label_where_the_classes_say_so(tmp_path):
  path = write(tmp_path / 'a.csv', [{'text': '他', 'label': 'nan'}])  # pinyin of 男
  assert examples.read(path, 'classification', classes=('nan', 'nv'))[0] == [Labelled('他', 'nan')]


# Field by field, then line by line: kind of data, record or line, kind of fault, what the message says of it.
MALFORMED = [
    ('classification', {'label': 'pos'}, 'missing', 'no field text (fields: label); expected a string'),
    ('classification', {'text': SECRET}, 'missing', 'no field label'),
    ('classification', {'text': None, 'label': 'pos'}, 'missing', 'field text: null; expected a string'),
    ('classification', {'text': 17, 'label': 'pos'}, 'type', 'field text: found the number 17; expected a string'),
    ('classification', {'text': [SECRET], 'label': 'pos'}, 'type', 'field text: found a list; expected a string'),
    ('classification', {'text': SECRET, 'label': 1}, 'label', "field label: found '1'; expected one of pos, neg"),
    ('classification', {'text': SECRET, 'label': 0.5}, 'type', 'field label: found the number 0.5; expected a string'),
    ('classification', {'text': SECRET, 'label': 1.0}, 'type', 'found the number 1.0; expected a string or an integer'),
    ('classification', {'text': SECRET, 'label': True}, 'type', 'field label: found true; expected a string or an int'),
    ('classification', {'text': SECRET, 'label': ['pos']}, 'type', 'field label: found a list; expected a string or'),
    ('classification', {'text': SECRET, 'label': None}, 'missing', 'field label: null; expected a string'),
    ('classification', {'text': SECRET, 'label': -1, 'split': 'dev'}, 'label', "field label: found '-1'; expected one"),
    ('classification', {'text': SECRET, 'label': 'neutral'}, 'label', "found 'neutral'; expected one of pos, neg"),
    ('classification', {'text': SECRET, 'label': 'NaN'}, 'nan', "field label: found 'NaN'"),
    ('classification', {'text': ' \u3000\n', 'label': 'pos'}, 'empty', 'field text: nothing but space; expected text'),
    ('classification', {'text': SECRET, 'label': 'pos', 'metadata': SECRET}, 'type', 'field metadata: found a string'),
    ('classification', {'text': SECRET, 'label': 'pos', 'split': 'trian'}, 'split', 'expected one of train, valid'),
    ('classification', {'text': SECRET, 'label': 'pos', 'split': 'test_mismatched'}, 'split', 'expected one of train,'),
    ('classification', {'text': SECRET, 'label': 'pos', 'split': 1}, 'split', 'field split: found the number 1'),
    ('classification', {'text': SECRET + '\0', 'label': 'pos'}, 'nul', 'field text: NUL at character 46'),
    ('classification', {'text': SECRET + '\ud800', 'label': 'pos'}, 'encoding', 'lone surrogate; expected Unicode'),
    ('classification', {'text': SECRET, 'label': 'pos', 'metadata': {'a': [[[[[[1]]]]]]}}, 'depth',
     'field metadata.a[0][0][0][0]: nested deeper than 6 levels'),
    ('classification', {'text': SECRET * 30, 'label': 'pos'}, 'too long', 'line of more than 1000 bytes'),
    ('classification', {'text': SECRET, 'text_pair': 7, 'label': 'pos'}, 'type', 'field text_pair: found the number 7'),
    ('classification', {'text': SECRET, 'text_pair': '', 'label': 'pos'}, 'empty', 'field text_pair: nothing'),
    ('classification', {'text': SECRET, 'text_pair': '\u200b\u2800', 'label': 'pos'}, 'empty',
     'field text_pair: nothing but space'),
    ('classification', {'text': SECRET, 'label': 'pos', '\ud800k': 'v'}, 'encoding', 'a name in it: character 0'),
    ('instruction', {'instruction': SECRET, 'input': ''}, 'missing', 'no field output (fields: instruction, input)'),
    ('instruction', {'instruction': SECRET, 'output': ' '}, 'empty', 'field output: nothing but space'),
    ('instruction', {'instruction': SECRET, 'output': 'x', 'input': 3}, 'type', 'field input: found the number 3'),
    ('instruction', {'instruction': SECRET, 'output': 'x', 'history': [['a', 'b']]}, 'field', "the file as 'chat'"),
    ('chat', {'text': SECRET}, 'missing', 'no field messages or conversation or conversations (fields: text)'),
    ('chat', {'messages': SECRET}, 'type', 'field messages: found a string; expected a list of turns'),
    ('chat', {'messages': []}, 'empty', 'field messages: no turns'),
    ('chat', {'messages': [SECRET, {'role': 'assistant', 'content': 'a'}]}, 'type', 'messages[1]: found an object'),
    ('chat', {'messages': [SECRET, None]}, 'type', 'messages[1]: found null'),
    ('chat', {'messages': [{'role': 'user', 'content': SECRET}, 'a']}, 'type', 'messages[1]: found a string'),
    ('chat', {'messages': [SECRET, 'a'], 'conversation': [SECRET, 'a']}, 'field', 'fields messages and conversation;'),
    ('chat', {'messages': [{'role': 'user', 'content': SECRET}, {'role': 'tool', 'content': 'a'}]}, 'role',
     "field messages[1].role: found 'tool'; expected one of system, user, human, assistant, gpt"),
    ('chat', {'messages': [{'role': 'assistant', 'content': SECRET}, {'role': 'user', 'content': 'a'}]}, 'order',
     'field messages[0]: found assistant; expected user'),
    ('chat', {'conversation': [{'role': 'user', 'content': SECRET}] * 2}, 'order',
     'field conversation[1]: found user; expected assistant'),
    ('chat', {'conversations': [{'from': 'human', 'value': SECRET}]}, 'order',
     "field conversations: ends with user; expected assistant; answer it, or cut it with unanswered='cut'"),
    ('chat', {'messages': [{'role': 'system', 'content': SECRET}]}, 'order', 'ends with system; expected assistant'),
    ('chat', {'messages': [{'role': 'system', 'content': SECRET}] * 2}, 'system', 'field messages[1]: a system turn;'),
    ('chat', {'messages': [*({'role': r, 'content': SECRET} for r in ('user', 'system', 'assistant'))]}, 'system',
     'field messages[1]: a system turn; expected one at most, before all others'),
    ('chat', {'system': SECRET, 'messages': [{'role': 'system', 'content': SECRET}]}, 'system', 'messages[1]'),
    ('chat', {'messages': [{'role': 'user', 'content': SECRET}, {'role': 'assistant', 'content': ''}]}, 'empty',
     'field messages[1].content: nothing but space'),
    ('chat', {'messages': [{'role': 'user', 'content': SECRET}, {'role': 'assistant'}]}, 'missing',
     'no field messages[1].content (fields: role)'),
    ('chat', {'messages': [{'content': SECRET}, {'role': 'assistant', 'content': 'a'}]}, 'missing',
     'no field messages[0].role'),
    ('chat', {'instruction': 'a', 'output': 'b', 'history': [SECRET]}, 'type', 'field history: found something else'),
    ('preference', {'prompt': 'q', 'chosen': SECRET, 'rejected': SECRET + ' '}, 'same', 'chosen and rejected are the'),
    ('preference', {'prompt': 'q', 'chosen': SECRET}, 'missing', 'no field rejected (fields: prompt, chosen)'),
    ('preference', {'chosen': SECRET, 'rejected': 'a'}, 'missing', 'no field prompt (fields: chosen, rejected)'),
    ('preference', {'prompt': 'q', 'chosen': '', 'rejected': SECRET}, 'empty', 'field chosen: nothing but space'),
    ('preference', {'prompt': ['q', 'a'], 'chosen': 'a', 'rejected': SECRET}, 'order', 'prompt: ends with assistant'),
    ('preference', {'prompt': 'q', 'chosen': {'from': 'human', 'value': 'a'}, 'rejected': SECRET}, 'order',
     'field chosen: ends with user; expected assistant'),
    ('preference', {'chosen': ['q', 'a'], 'rejected': [SECRET, 'b']}, 'order', 'field rejected: begins with other'),
    ('chat', b'["' + SECRET.encode() + b'"]', 'type', 'found a list; expected an object with fields'),
    ('chat', b'{"messages": ["' + SECRET.encode() + b'", "a"]', 'json', "broken JSON (Expecting ',' delimiter)"),
    ('chat', b"{'messages': 1}", 'json', 'broken JSON (Expecting property name'),
    ('chat', b'{"messages": ["q", "a"]} {"messages": ["q", "a"]}', 'json', 'text after the record, from character 24'),
    ('chat', b'{"messages": ["q", "a"], "messages": ["q"]}', 'duplicate key', "key 'messages' twice in one object"),
    ('chat', b'{"messages": ["q", "a"], "n": NaN}', 'nan', 'NaN, which JSON does not have'),
    ('chat', '{"messages": ["问", "答"]}'.encode('gb18030'), 'encoding', 'byte 15 of the line is not utf-8'),
    ('chat', b'{"messages": ["q\0", "a"]}', 'nul', 'NUL at character 16 of the line'),
]


@pytest.mark.parametrize('kind, bad, fault, part', MALFORMED)
def test_a_malformed_record_stops_or_is_counted(tmp_path, kind, bad, fault, part):
  good = {'classification': {'text': '好', 'label': 'pos'}, 'instruction': {'instruction': '问', 'output': '答'},
          'chat': {'messages': ['问', '答']}, 'preference': {'prompt': '问', 'chosen': '好', 'rejected': '坏'}}[kind]
  lines = [json.dumps(good, ensure_ascii=False).encode(), bad if isinstance(bad, bytes) else json.dumps(bad).encode()]
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'\n'.join([lines[0], lines[1], lines[0]]) + b'\n')
  read = lambda on_error: examples.read(path, kind, on_error, classes=('pos', 'neg'), limits=Limits(1000, 6))
  with pytest.raises(DataError) as error:
    read('stop')
  assert str(error.value).startswith(f'{path}:2: ') and part in str(error.value)
  found, report = read('skip')
  assert [e.origin for e in found] == [f'{path}:1', f'{path}:3']
  assert (report.seen, report.kept, report.faults) == (3, 2, {fault: 1})
  assert report.messages == {fault: (str(error.value),)}
  for message in (str(error.value), report.table()):
    assert SECRET[:20] not in message and len(str(error.value).split('\n')) == 1


def test_many_faults_of_one_file_in_one_report(tmp_path):
  lines = [json.dumps(m[1]).encode() if isinstance(m[1], dict) else m[1] for m in MALFORMED if m[0] == 'chat']
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'\n'.join([*lines, b'{"messages": ["q", "a"]}', b'', b'{"messages": ["q", "a']))
  found, report = examples.read(path, 'chat', 'skip', limits=Limits(1000, 6))
  assert (len(found), report.kept, report.seen) == (1, 1, len(lines) + 2)
  assert sum(report.faults.values()) == len(lines) + 1 and report.faults['truncated'] == 1
  assert report.messages['truncated'][0].startswith(f'{path}:{len(lines) + 3}: broken JSON (Unterminated string')
  assert all(len(shown) == min(report.faults[kind], examples.SHOWN) for kind, shown in report.messages.items())
  table = report.table().split('\n')
  assert table[0].split() == ['records', str(len(lines) + 2), '100.00%'] and table[1].split()[:2] == ['kept', '1']
  assert sum(row.startswith('order ') for row in table) == 1


def test_nesting_without_end(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'{"messages": ["q", "a"]}\n{"messages": ' + b'[' * 100_000 + b']' * 100_000 + b'}\n')
  found, report = examples.read(path, 'chat', 'skip')
  assert len(found) == 1 and report.faults == {'depth': 1}


@pytest.mark.parametrize('ending', [b'', b'{"messages": ["q", "a"', b'{"messages": ["q", "\xe4\xbd', b'{'])
def test_a_truncated_last_line(tmp_path, ending):
  path = tmp_path / 'a.jsonl'
  path.write_bytes('{"messages": ["你", "好"]}'.encode() + b'\n' + ending)
  found, report = examples.read(path, 'chat', 'skip')
  assert found == [chat('你', '好')] and report.faults == ({'truncated': 1} if ending else {})
  if ending:
    with pytest.raises(DataError, match='a.jsonl:2: '):
      examples.read(path, 'chat')


def test_a_line_is_a_megabyte_at_most_unless_told_otherwise(tmp_path):
  long = {'text': '长' * 400_000, 'label': 'x'}
  path = write(tmp_path / 'a.jsonl', [{'text': 'a', 'label': 'x'}, long, {'text': 'b', 'label': 'x'}])
  found, report = examples.read(path, 'classification', 'skip')
  assert [e.text for e in found] == ['a', 'b'] and report.faults == {'too long': 1}
  assert len(examples.read(path, 'classification', limits=Limits(2_000_000))[0]) == 3
  for suffix in ('.csv', '.json', '.parquet'):
    path = write(tmp_path / f'a{suffix}', [long, {'text': 'b', 'label': 'x'}])
    found, report = examples.read(path, 'classification', 'skip', limits=Limits(300_000))
    assert [e.text for e in found] == ['b'] and report.faults == {'too long': 1}, suffix
    assert len(examples.read(path, 'classification', limits=Limits(2_000_000))[0]) == 2
  assert csv.field_size_limit() == 131072  # one for the whole process


def test_byte_order_marks_carriage_returns_and_other_encodings(tmp_path):
  line = '{"messages": ["你\u2028好", "答"]}\r\n'
  (tmp_path / 'a.jsonl').write_bytes(b'\xef\xbb\xbf' + line.encode())
  (tmp_path / 'b.jsonl').write_bytes(line.replace('\u2028', '').encode('gb18030'))
  (tmp_path / 'c.csv').write_bytes('text,label\r\n"好,\r\n看",正\r\n'.encode('gb18030'))
  (tmp_path / 'd.csv').write_bytes(b'\xef\xbb\xbf' + '"text",label\r\n好,正\r\n'.encode())
  (tmp_path / 'e.json').write_bytes(b'\xef\xbb\xbf [] ')
  assert examples.read(tmp_path / 'a.jsonl', 'chat', encoding='utf-8-sig')[0] == [chat('你\u2028好', '答')]
  assert examples.read(tmp_path / 'a.jsonl', 'chat')[0] == [chat('你\u2028好', '答')]
  assert examples.read(tmp_path / 'b.jsonl', 'chat', encoding='gb18030')[0] == [chat('你好', '答')]
  assert examples.read(tmp_path / 'c.csv', 'classification', encoding='gbk')[0] == [Labelled('好,\r\n看', '正')]
  assert examples.read(tmp_path / 'd.csv', 'classification')[0] == [Labelled('好', '正')]
  with pytest.raises(DataError, match='e.json: no records'):
    examples.read(tmp_path / 'e.json', 'chat')


@pytest.mark.parametrize('row, fault', [
    (b'only one cell', 'cells'), (b'a,b,c', 'cells'), (b'"quoted" and more,x', 'csv'), (b'\xff\xfe,x', 'encoding'),
    (b'a\0b,x', 'nul'), (b' ,x', 'empty'), (b'a,', 'empty'), (b'a,nan', 'nan'), (b'a,y', 'label')])
def test_a_malformed_row_of_csv(tmp_path, row, fault):
  path = tmp_path / 'a.csv'
  path.write_bytes(b'text,label\n"two\nlines",x\n' + row + b'\ngood,x\n')
  with pytest.raises(DataError, match='a.csv:4: '):
    examples.read(path, 'classification', classes=('x', 'nan') if fault == 'label' else ('x',))
  found, report = examples.read(path, 'classification', 'skip', classes=('x',))
  assert [e.text for e in found] == ['two\nlines', 'good'] and report.faults == {fault: 1}


def test_an_open_quote_costs_no_more_than_a_record_may_be_long(tmp_path):
  path = tmp_path / 'a.csv'
  path.write_bytes(b'text,label\n"open,x\n' + b'good,x\n' * 100)
  found, report = examples.read(path, 'classification', 'skip', limits=Limits(70))
  assert report.faults == {'too long': 1} and 85 < len(found) < 100
  path.write_bytes(b'text,label\ngood,x\n"open,x\n')
  assert examples.read(path, 'classification', 'skip')[1].faults == {'truncated': 1}


def test_json_in_cells_is_read_strictly(tmp_path):
  path = write(tmp_path / 'a.csv', [{'messages': ['q', 'a']}] * 2)
  path.write_text(path.read_text() + '"[""q"", NaN]"\n"[""q"""\n')
  found, report = examples.read(path, 'chat', 'skip')
  assert found == [chat('q', 'a')] * 2 and report.faults == {'nan': 1, 'truncated': 1}
  assert report.messages['nan'][0].startswith(f'{path}:4: field messages: NaN')


@pytest.mark.parametrize('text, part', [
    ('', 'no records'), ('\n\n', 'no records'), ('[]', 'no records'), ('[{"text": "a"', 'a.json:1: the list breaks'),
    ('[{"text": "a"}\n {"text": "b"}]', "a.json:1: the list breaks after"), ('[{"text": "a"},]', 'a.json:1: the list'),
    ('[{"text": "a", "label": "b"}] x', 'text after the list'), ('[\n\n{"text": 1', 'a.json:3: the list breaks in'),
    ('[{"text": 1}, 2]', 'none of 2 records can be used; the first: '), ('"text"', 'none of 1 rec'),
    ('[' * 100_000, 'a.json:1: ')])
def test_a_file_that_is_damaged_as_a_whole_is_an_error_in_both_modes(tmp_path, text, part):
  path = tmp_path / 'a.json'
  path.write_text(text)
  with pytest.raises(DataError) as error:
    examples.read(path, 'classification', 'skip')
  assert part in str(error.value)
  with pytest.raises(DataError):
    examples.read(path, 'classification')


def test_a_list_goes_on_behind_a_bad_record_and_a_json_file_may_hold_lines(tmp_path):
  path = tmp_path / 'a.json'
  path.write_bytes(b'[{"text": "a", "label": "x"}, {"text": "\xff", "label": "x"},\n'
                   b'7, {"text": "a", "text": "b"}, {"text": "c", "label": "x"}]')
  found, report = examples.read(path, 'classification', 'skip')
  assert [e.origin for e in found] == [f'{path}:1', f'{path}:2']
  assert report.faults == {'encoding': 1, 'type': 1, 'duplicate key': 1}
  path.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}')
  assert [e.origin for e in examples.read(path, 'classification')[0]] == [f'{path}:1', f'{path}:2']


def test_parquet_has_rows_and_its_own_ways_to_be_wrong(tmp_path):
  path = tmp_path / 'a.parquet'
  texts = pa.StringArray.from_buffers(3, pa.py_buffer(b'\0\0\0\0\1\0\0\0\2\0\0\0\5\0\0\0'),
                                      pa.py_buffer(b'a\xff' + '好'.encode()))
  pa.parquet.write_table(pa.table({'text': texts, 'label': ['x', 'x', 'x']}), path)
  found, report = examples.read(path, 'classification', 'skip')
  assert [(e.text, e.origin) for e in found] == [('a', f'{path}, row 1'), ('好', f'{path}, row 3')]
  assert report.faults == {'encoding': 1} and report.messages['encoding'][0].startswith(f'{path}, row 2: ')
  columns = {'text': ['a', None, 'c'], 'label': [0.5, 1.0, float('nan')]}
  pa.parquet.write_table(pa.table(columns), path)
  with pytest.raises(DataError, match='none of 3 records can be used; the first: .*row 1: field label: .* number 0.5'):
    examples.read(path, 'classification', 'skip')
  pa.parquet.write_table(pa.table({'text': [b'a', b'b'], 'label': ['x', 'x']}), path)
  with pytest.raises(DataError, match='row 1: field text: found bytes; expected a string'):
    examples.read(path, 'classification')
  for damage in (b'', b'PAR1', path.read_bytes()[:-9], b'x' * 100):
    path.write_bytes(damage)
    with pytest.raises(DataError, match='a.parquet: .*; expected a whole Parquet file'):
      examples.read(path, 'classification', 'skip')


CLASSES = {'info': {'features': {'label': {'_type': 'ClassLabel', 'names': ['坏', 'good']},
                                 'text': {'_type': 'Value', 'dtype': 'string'}}}}


def save_to_disk(folder, shards):
  """What `datasets` writes."""
  folder.mkdir(parents=True)
  names = [f'data-{i:05d}-of-{len(shards):05d}.arrow' for i in range(len(shards))]
  for name, columns in zip(names, shards, strict=True):
    table = pa.table(columns).replace_schema_metadata({'huggingface': json.dumps(CLASSES)})
    with pa.OSFile(str(folder / name), 'wb') as sink, pa.ipc.new_stream(sink, table.schema) as writer:
      writer.write_table(table)
  (folder / 'state.json').write_text(json.dumps({'_data_files': [{'filename': n} for n in names], '_split': 'train'}))
  (folder / 'dataset_info.json').write_text('{}')


def test_a_saved_dataset_and_a_dictionary_of_them(tmp_path):
  shards = [{'text': ['a', '乙'], 'label': [1, 0]}, {'text': ['c'], 'label': [1]}]
  save_to_disk(tmp_path / 'one', shards)
  found, _ = examples.read(tmp_path / 'one', 'classification')
  assert found == [Labelled('a', 'good'), Labelled('乙', '坏'), Labelled('c', 'good')]
  assert found[2].origin == f'{tmp_path}/one/data-00001-of-00002.arrow, row 1'
  (tmp_path / 'all').mkdir()
  (tmp_path / 'all' / 'dataset_dict.json').write_text('{"splits": ["train", "dev", "test_sft"]}')
  for split in ('train', 'dev', 'test_sft'):
    save_to_disk(tmp_path / 'all' / split, shards[1:])
  assert [e.split for e in examples.read(tmp_path / 'all', 'classification')[0]] == ['train', 'validation', 'test']


@pytest.mark.parametrize('suffix', ['.jsonl', '.json', '.csv', '.tsv', '.parquet'])
def test_integers_are_labels_by_their_digits(tmp_path, suffix):
  labels = [0, 1, -1, 12, 1]
  path = write(tmp_path / f'a{suffix}', [{'text': 't', 'label': label} for label in labels])
  assert [e.label for e in examples.read(path, 'classification')[0]] == list(map(str, labels))
  assert examples.read(path, 'classification', classes=('0', '1', '12', '-1'))[1].complete


@pytest.mark.parametrize('said, split', [
    ('dev', 'validation'), ('val', 'validation'), ('valid', 'validation'), ('Test', 'test'), ('train_sft', 'train'),
    ('validation_matched', 'validation'), ('test_matched', 'test'), ('', None)])
def test_a_record_says_its_split_by_any_name_that_a_file_has(tmp_path, said, split):
  records = [{'text': 't', 'label': 'x', 'split': said}, {'text': 't', 'label': 'x', 'where': said}]
  for i, rename in enumerate(({}, {'where': 'split'})):
    path = write(tmp_path / 'a.jsonl', records[i:i + 1])
    assert [e.split for e in examples.read(path, 'classification', rename=rename)[0]] == [split]
  write(tmp_path / 'train.jsonl', records[:1])
  assert [e.split for e in examples.read(tmp_path / 'train.jsonl', 'classification')[0]] == [split or 'train']


def test_what_a_test_split_leaves_unlabelled_is_left_out_and_counted(tmp_path):
  train = [{'text': f'{label}', 'label': label, 'split': 'train'} for label in (0, 1)]
  none = [{'text': 'a', 'split': 'test'}, *({'text': 'b', 'label': x, 'split': 'test'} for x in (None, '', -1, '-1'))]
  path = write(tmp_path / 'a.jsonl', [*train, *none, {'text': 'c', 'label': 1, 'split': 'test'}])
  for classes in ((), ('0', '1')):
    found, report = examples.read(path, 'classification', classes=classes)
    assert [(e.text, e.label) for e in found] == [('0', '0'), ('1', '1'), ('c', '1')]
    assert (report.seen, report.kept, report.faults, len(report.messages['unlabelled'])) == (8, 3, {'unlabelled': 5}, 3)
    assert f'{path}:3: field label: none, of the test split' in report.table()
  path = write(tmp_path / 'a.csv', [{'text': 'a', 'label': 1, 'split': 'train'}, {'text': 'b', 'split': 'test'}])
  assert examples.read(path, 'classification')[1].faults == {'unlabelled': 1}
  for part in ('train', 'validation', None):
    path = write(tmp_path / 'b.jsonl', [*train, {'text': 'a', 'split': part}])
    with pytest.raises(DataError, match='b.jsonl:3: no field label'):
      examples.read(path, 'classification')


def test_minus_one_is_a_class_where_other_records_or_the_classes_have_it(tmp_path):
  tests = [{'text': str(i), 'label': i, 'split': 'test'} for i in (-1, 0, 1)]
  path = write(tmp_path / 'a.jsonl', [*tests, {'text': 'a', 'label': -1, 'split': 'train'}])
  assert examples.read(path, 'classification')[1].complete
  path = write(tmp_path / 'a.jsonl', [*tests, {'text': 'a', 'label': 1, 'split': 'train'}])
  assert examples.read(path, 'classification')[1].faults == {'unlabelled': 1}
  assert examples.read(path, 'classification', classes=('-1', '0', '1'))[1].complete
  assert examples.read(write(tmp_path / 'b.jsonl', tests), 'classification')[1].complete  # nothing tells


def test_splits_of_other_names_are_not_read_but_named(tmp_path):
  names = ['train', 'validation_matched', 'validation_mismatched', 'test_matched', 'unsupervised']
  (tmp_path / 'all').mkdir()
  (tmp_path / 'all' / 'dataset_dict.json').write_text(json.dumps({'splits': names}))
  for name in names:
    save_to_disk(tmp_path / 'all' / name, [{'text': [name], 'label': [1]}])
  (tmp_path / 'all' / 'unsupervised' / 'data-00000-of-00001.arrow').write_bytes(b'not read, so not damaged either')
  found, report = examples.read(tmp_path / 'all', 'classification')
  assert [(e.text, e.split) for e in found] == [
      ('train', 'train'), ('validation_matched', 'validation'), ('test_matched', 'test')]
  assert report.left == ('validation_mismatched', 'unsupervised') and report.seen == 3 and not report.complete
  assert report.table().endswith('\nnot read        validation_mismatched, unsupervised; to read one, name its own '
                                 'folder or file')
  (found,), report = examples.read(tmp_path / 'all' / 'validation_mismatched', 'classification')
  assert (found.text, found.split, report.complete) == ('validation_mismatched', None, True)
  (tmp_path / 'all' / 'dataset_dict.json').write_text(json.dumps({'splits': names[4:]}))
  with pytest.raises(DataError, match='all: unsupervised; expected a split called train, validation or test; name one'):
    examples.read(tmp_path / 'all', 'classification')


def test_mismatched_files_of_a_folder_are_not_read_but_named(tmp_path):
  record = {'text': 't', 'label': 'x'}
  for name in ('train-00000-of-00001', 'dev_matched', 'dev_mismatched', 'validation_mismatched-00000-of-00002',
               'validation_mismatched-00001-of-00002', 'mismatched'):
    write(tmp_path / f'{name}.jsonl', [record | {'text': name}])
  (tmp_path / 'test_mismatched').mkdir()
  write(tmp_path / 'test_mismatched' / 'a.jsonl', [record])
  found, report = examples.read(tmp_path, 'classification')
  assert {e.text: e.split for e in found} == {
      'train-00000-of-00001': 'train', 'dev_matched': 'validation', 'mismatched': None}
  assert report.left == ('dev_mismatched', 'test_mismatched', 'validation_mismatched')
  (found,), _ = examples.read(tmp_path / 'dev_mismatched.jsonl', 'classification')
  assert found.split is None


def test_a_number_that_is_no_class_is_no_label(tmp_path):
  save_to_disk(tmp_path / 'one', [{'text': ['a', 'b', 'c', 'd'], 'label': [1, -1, 2, None]}])
  found, report = examples.read(tmp_path / 'one', 'classification', 'skip')
  assert found == [Labelled('a', 'good')] and report.faults == {'missing': 2, 'label': 1}
  assert 'row 3: field label: found the number 2; expected one of its 2 classes' in report.messages['label'][0]


@pytest.mark.parametrize('damage, part', [
    (lambda d: (d / 'state.json').write_text('{'), 'state.json: '),
    (lambda d: (d / 'state.json').write_text('{"_data_files": 3}'), 'no list _data_files'),
    (lambda d: (d / 'state.json').write_text('{"_data_files": [{"filename": "../secret.arrow"}]}'), 'names of its own'),
    (lambda d: (d / 'state.json').write_text('{"_data_files": [], "_indices_files": [1]}'), 'call flatten_indices'),
    (lambda d: (d / 'state.json').write_text('{"_data_files": []}'), 'no records'),
    (lambda d: (d / 'data-00000-of-00001.arrow').unlink(), 'data-00000-of-00001.arrow: '),
    (lambda d: (d / 'data-00000-of-00001.arrow').write_bytes(b'x' * 64), 'expected a stream of Arrow batches')])
def test_a_damaged_saved_dataset(tmp_path, damage, part):
  save_to_disk(tmp_path / 'one', [{'text': ['a'], 'label': [1]}])
  damage(tmp_path / 'one')
  with pytest.raises(DataError) as error:
    examples.read(tmp_path / 'one', 'classification', 'skip')
  assert part in str(error.value)


def test_a_folder_of_files(tmp_path):
  records = RECORDS['classification'][0][:1]
  for name in ('data/train-00000-of-00001.parquet', 'test.parquet', 'dev/a.parquet', 'training.parquet'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write(tmp_path / name, records)
  (tmp_path / 'infos.json').write_text('{}')
  found, _ = examples.read(tmp_path, 'classification')
  assert [e.split for e in found] == ['train', 'validation', 'test', None]
  for name in ('lines', 'mixed', 'none'):
    (tmp_path / name).mkdir()
  write(tmp_path / 'lines' / 'a.jsonl', records)
  write(tmp_path / 'lines' / 'b.jsonl', records)
  assert len(examples.read(tmp_path / 'lines', 'classification')[0]) == 2
  write(tmp_path / 'mixed' / 'a.jsonl', records)
  write(tmp_path / 'mixed' / 'a.csv', records)
  for name, part in (('mixed', '.csv, .jsonl; expected files of one format'), ('none', 'no file that can be read')):
    with pytest.raises(DataError, match=part):
      examples.read(tmp_path / name, 'classification')


DIALOGUES = """
categories:
- 闲聊
conversations:
- - Do you like it?
  - No
  - "42"
  - 42
- - 你好
  - "你好: 在吗"
  - 再见
- this is no list
- - what
  - is: this
"""


def test_chatterbot_dialogues(tmp_path):
  path = tmp_path / 'a.yml'
  path.write_text(DIALOGUES, encoding='utf-8-sig')
  found, report = examples.read(path, 'chat', 'skip', unanswered='cut')
  assert found == [chat('Do you like it?', 'No', '42', '42'), chat('你好', '你好: 在吗')]
  assert [e.origin for e in found] == [f'{path}:5', f'{path}:9']
  assert (report.seen, report.kept, report.cut, report.faults) == (4, 2, 1, {'type': 2})
  assert 'last turn cut' in report.table()
  assert examples.read(path, 'chat', 'skip')[1].faults == {'type': 2, 'order': 1}
  for text in ('conversations: 3', 'a: 1', '- b', '', 'conversations: []\nconversations: []', '"', 'a: [', '\0', '? {'):
    path.write_text(text)
    with pytest.raises(DataError, match='a.yml'):
      examples.read(path, 'chat', 'skip')


def test_the_textbooks_conversation_ends_with_a_question_and_is_cut(tmp_path):
  path = write(tmp_path / 'a.json', [{'conversation': [dataclasses.asdict(m) for m in CHAT.messages[:3]]}])
  with pytest.raises(DataError, match='conversation: ends with user; expected assistant'):
    examples.read(path, 'chat')
  found, report = examples.read(path, 'chat', unanswered='cut')
  assert found == [chat('今天天气怎么样？', '我查不到。')] and report.cut == 1


def test_instructions_and_preferences_become_chats():
  assert Instruction('译', '好', 'good', origin='a:1').as_chat() == chat('译\n好', 'good')
  assert Instruction('译', '好', 'good', origin='a:1', split='test').as_chat().split == 'test'
  assert Instruction('hi', '', 'yo', origin='a:1').as_chat().origin == 'a:1'
  assert Preference((Message('user', 'q'),), 'a', 'b').as_chats() == (chat('q', 'a'), chat('q', 'b'))


@pytest.mark.parametrize('make', [
    lambda: Chat(()), lambda: Chat((Message('user', 'q'),)), lambda: Chat((Message('assistant', 'a'),)),
    lambda: Preference((), 'a', 'b'), lambda: Preference((Message('user', 'q'),), 'a', 'a')])
def test_values_that_make_no_sense_cannot_be_made(make):
  with pytest.raises(DataError, match='^example: '):
    make()


def test_values_are_frozen_hashable_and_equal_wherever_they_were_read():
  one, two = Labelled('a', 'b', {'c': 1}, origin='x:1'), Labelled('a', 'b', {'c': 1}, origin='y:2')
  assert one == two and hash(one) == hash(two) and hash(CHAT) and one != Labelled('a', 'b', {'c': 2})
  with pytest.raises(dataclasses.FrozenInstanceError):
    one.text = 'c'


@pytest.mark.parametrize('options, part', [
    ({'kind': 'classify'}, 'expected one of classification, instruction, chat, preference'),
    ({'on_error': 'raise'}, 'expected one of stop, skip'), ({'unanswered': 'drop'}, 'expected one of fault, cut'),
    ({'encoding': 'utf-9'}, 'unknown encoding'), ({'encoding': 'utf-16'}, 'convert the file to utf-8'),
    ({'encoding': 'rot13'}, 'not a text encoding')])
def test_arguments_that_are_none_of_these(tmp_path, options, part):
  path = write(tmp_path / 'a.jsonl', RECORDS['chat'][0])
  with pytest.raises(ConfigError, match=part):
    examples.read(path, **{'kind': 'chat', **options})


@pytest.mark.parametrize('name, part', [
    ('no.jsonl', 'No such file'), ('no.parquet', 'No such file'), ('no.yml', 'No such file'), ('a.txt', "ending '.tx")])
def test_a_file_that_is_not_there(tmp_path, name, part):
  with pytest.raises(DataError, match=part):
    examples.read(tmp_path / name, 'chat')


@pytest.mark.parametrize('module, name', [('pyarrow', 'a.parquet'), ('pyarrow', 'one'), ('yaml', 'a.yml')])
def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch, module, name):
  (tmp_path / 'a.parquet').write_bytes(b'')
  (tmp_path / 'a.yml').write_text(DIALOGUES)
  save_to_disk(tmp_path / 'one', [{'text': ['a'], 'label': [1]}])
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ConfigError, match=f"{module} is not installed; .*pip install -e '..finetune.'"):
    examples.read(tmp_path / name, 'chat')


@pytest.mark.parametrize('suffix', ['.jsonl', '.json', '.csv', '.yml'])
def test_bytes_that_go_wrong_are_faults_and_never_other_exceptions(tmp_path, suffix):
  rng, path, failed = random.Random(0), tmp_path / f'a{suffix}', 0
  if suffix == '.yml':
    path.write_text(DIALOGUES, encoding='utf-8')
  else:
    write(path, RECORDS['chat'][0] * 4)
  sound = path.read_bytes()
  for _ in range(150):
    data = bytearray(sound)
    for _ in range(rng.randint(1, 4)):
      at = rng.randrange(len(data))
      data[at:at + rng.randint(0, 2)] = rng.choices(b'"\\[]{},:\n\r \0\xff\xe4-a0', k=rng.randint(0, 2))
    path.write_bytes(data)
    try:
      _, report = examples.read(path, 'chat', 'skip')
      failed += bool(report.faults)
    except DataError as error:
      assert str(error).startswith(str(path)) and '\n' not in str(error)
      failed += 1
  assert failed > 30


@pytest.mark.oracle
def test_what_the_datasets_library_saves(tmp_path):
  datasets = pytest.importorskip('datasets')
  features = datasets.Features({'text': datasets.Value('string'), 'label': datasets.ClassLabel(names=['坏', 'good'])})
  whole = datasets.Dataset.from_dict({'text': ['a', '乙', 'c', 'd'], 'label': [1, 0, 1, 0]}, features=features)
  datasets.DatasetDict({'train': whole.select([2, 0]), 'test': whole}).save_to_disk(tmp_path / 'all')
  whole.save_to_disk(tmp_path / 'one', num_shards=2)
  whole.to_parquet(tmp_path / 'a.parquet')
  expected = [Labelled(t, n) for t, n in (('a', 'good'), ('乙', '坏'), ('c', 'good'), ('d', '坏'))]
  assert examples.read(tmp_path / 'one', 'classification')[0] == expected
  assert examples.read(tmp_path / 'a.parquet', 'classification')[0] == expected
  found, _ = examples.read(tmp_path / 'all', 'classification')
  assert [(e.text, e.split) for e in found[:3]] == [('c', 'train'), ('a', 'train'), ('a', 'test')]


@pytest.mark.oracle
def test_glue_as_the_datasets_library_saves_it(tmp_path):
  datasets = pytest.importorskip('datasets')

  def saved(name, classes, splits):
    features = datasets.Features({'label': datasets.ClassLabel(names=classes), 'idx': datasets.Value('int32')} | {
        field: datasets.Value('string') for field in next(iter(splits.values())) if field != 'label'})
    datasets.DatasetDict({split: datasets.Dataset.from_dict(columns | {'idx': list(range(len(columns['label'])))},
                                                            features) for split, columns in splits.items()}
                         ).save_to_disk(tmp_path / name)
    return tmp_path / name

  pair = lambda split, *labels: {'premise': [f'{split} {i}' for i in range(len(labels))],
                                 'hypothesis': ['和'] * len(labels), 'label': list(labels)}
  mnli = saved('mnli', ['entailment', 'neutral', 'contradiction'], {
      'train': pair('train', 2, 0, 1), 'validation_matched': pair('near', 1), 'validation_mismatched': pair('far', 0),
      'test_matched': pair('test', -1, -1), 'test_mismatched': pair('other', -1)})
  found, report = examples.read(mnli, 'classification', rename={'premise': 'text', 'hypothesis': 'text_pair'})
  assert found[-1] == Labelled('near 0', 'neutral', {'idx': 0}, 'validation', text_pair='和')
  assert [(e.label, e.split) for e in found[:3]] == [
      (label, 'train') for label in ('contradiction', 'entailment', 'neutral')] and len(found) == 4
  assert report.faults == {'unlabelled': 2} and report.left == ('validation_mismatched', 'test_mismatched')
  assert 'mnli/test_matched/data-00000-of-00001.arrow, row 1: ' in report.messages['unlabelled'][0]

  texts = lambda split, *labels: {'sentence': [f'{split} {i}' for i in range(len(labels))], 'label': list(labels)}
  sst2 = saved('sst2', ['negative', 'positive'], {'train': texts('train', 0, 1), 'validation': texts('held', 1),
                                                  'test': texts('test', -1, -1, -1)})
  found, report = examples.read(sst2, 'classification', rename={'sentence': 'text'}, classes=('negative', 'positive'))
  assert [(e.text, e.label, e.split) for e in found] == [
      ('train 0', 'negative', 'train'), ('train 1', 'positive', 'train'), ('held 0', 'positive', 'validation')]
  assert report.faults == {'unlabelled': 3} and report.left == ()


@pytest.mark.parametrize('place, split', [
    ('dev_matched.jsonl', 'validation'), ('validation_mismatched.jsonl', None), ('test.jsonl', 'test'),
    ('Dev.jsonl', 'validation'), ('test_sft-00000-of-00001.jsonl', 'test'),
    ('tests.jsonl', None), ('test_drive.jsonl', None), ('test/a.jsonl', None)])
def test_a_file_that_is_named_is_of_the_split_that_its_name_says(tmp_path, place, split):
  (tmp_path / place).parent.mkdir(exist_ok=True)
  (found,), _ = examples.read(write(tmp_path / place, [{'text': 'a', 'label': 'x'}]), 'classification')
  assert found.split == split


def test_of_a_folder_the_nearest_name_counts(tmp_path):
  places = {'test/en/a.jsonl': 'test', 'test/train/a.jsonl': 'train', 'all/validation.jsonl': 'validation',
            'b.jsonl': 'train'}
  for place in places:
    (tmp_path / 'train' / place).parent.mkdir(parents=True, exist_ok=True)
    write(tmp_path / 'train' / place, [{'text': place, 'label': 'x'}])
  found, _ = examples.read(tmp_path / 'train', 'classification')
  assert {e.text: e.split for e in found} == places


def test_turns_in_cells_are_turns_and_other_json_is_text(tmp_path):
  ask, say = ([{'role': role, 'content': text}] for role, text in (('user', 'hi'), ('assistant', 'ho')))
  rows = [{'prompt': json.dumps(ask), 'chosen': json.dumps(say), 'rejected': '{"name": "x"}'},
          {'prompt': repr(ask), 'chosen': 'a', 'rejected': 'b'}]
  path = tmp_path / 'a.csv'
  with open(path, 'w', newline='') as f:
    writer = csv.DictWriter(f, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
  (found,), report = examples.read(path, 'preference', 'skip')
  assert found == Preference((Message('user', 'hi'),), 'ho', '{"name": "x"}') and report.faults == {'json': 1}
  path.write_text('instruction,output,history\nq,a,"[[""x"", ""y""]]"\nr,b,[]\n')
  assert [len(e.messages) for e in examples.read(path, 'chat')[0]] == [4, 2]


def test_tsv_without_quoting_and_with(tmp_path):
  path = tmp_path / 'a.tsv'
  path.write_text('text\tlabel\n"Hello there\tpos\nbad one\tneg\nworld"\tneg\n"Great" film\tpos\n'
                  '"he said ""no"""\tneg\n"two\nlines\tand a tab"\tpos\n')
  found, _ = examples.read(path, 'classification')
  assert [e.text for e in found] == ['"Hello there', 'bad one', 'world"', '"Great" film', 'he said "no"',
                                     'two\nlines\tand a tab']
  assert [e.origin.rpartition(':')[2] for e in found] == ['2', '3', '4', '5', '6', '7']


def test_what_pandas_writes_with_its_index(tmp_path):
  (tmp_path / 'a.csv').write_text(',text,label\n0,good,pos\n')
  assert examples.read(tmp_path / 'a.csv', 'classification')[0] == [Labelled('good', 'pos', {'index': '0'})]


def test_columns_that_python_cannot_hold_and_columns_twice(tmp_path):
  table = pa.table({'text': ['a', 'b'], 'label': ['x', 'x'], 'text_pair': pa.nulls(2, pa.string()),
                    'time': pa.array([1_600_000_000_000, 1_600_000_000], pa.timestamp('s'))})
  pa.parquet.write_table(table, tmp_path / 'a.parquet')
  (found,), report = examples.read(tmp_path / 'a.parquet', 'classification', 'skip')
  assert (found.text, found.text_pair) == ('b', None) and report.faults == {'type': 1}
  assert report.messages['type'][0].startswith(f'{tmp_path}/a.parquet, row 1: a value that cannot be read')
  pa.parquet.write_table(pa.table([['a'], ['b']], names=['text', 'text']), tmp_path / 'b.parquet')
  with pytest.raises(DataError, match='b.parquet: a column name twice'):
    examples.read(tmp_path / 'b.parquet', 'classification')


@pytest.mark.parametrize('encoding', ['hz', 'utf-7', 'iso2022_jp', 'utf-16'])
def test_encodings_in_which_ascii_is_not_itself(tmp_path, encoding):
  with pytest.raises(ConfigError, match=f'encoding={encoding!r}: not every ASCII character'):
    examples.read(write(tmp_path / 'a.jsonl', [{'text': 'a', 'label': 'x'}]), 'classification', encoding=encoding)


def test_a_key_given_twice_among_many_is_found_at_once(tmp_path):
  keys = ', '.join(f'"k{i}": 1' for i in range(60_000))
  (tmp_path / 'a.jsonl').write_text(f'{{{keys}, "k59999": 2}}\n{{"text": "a", "label": "x"}}\n')
  _, report = examples.read(tmp_path / 'a.jsonl', 'classification', 'skip')
  assert report.faults == {'duplicate key': 1}
