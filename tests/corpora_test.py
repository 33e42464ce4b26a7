"""Text files, strictly read."""

import json
import os

import pytest

from lm.data import corpora
from lm.data.corpora import Document
from lm.errors import DataError


def read(path):
  return list(corpora.find(str(path)))


def test_txt_is_one_document_byte_for_byte(tmp_path):
  text = '\ufeffone\r\ntwo\u2028three\n\n\0 你好 😀'
  (tmp_path / 'a.txt').write_bytes(text.encode())
  assert read(tmp_path / 'a.txt') == [Document('a.txt', text)]


def test_jsonl_lines_end_at_newline_bytes_only(tmp_path):
  rows = [{'text': 'a\u2028b\u0085c', 'id': 'x'}, {'text': '', 'split': 'validation'},
          {'text': '😀', 'id': 7, 'other': 1}]
  (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps(r, ensure_ascii=False) for r in rows) + '\n\n')
  assert read(tmp_path / 'a.jsonl') == [Document('x', 'a\u2028b\u0085c'), Document('2', '', 'validation'),
                                        Document('7', '😀')]


def test_write_jsonl_is_the_inverse(tmp_path):
  docs = [Document('1', 'a\u2028\n"\\'), Document('2', '', 'train')]
  assert corpora.write_jsonl(tmp_path / 'x.jsonl', docs) == 2
  assert read(tmp_path / 'x.jsonl') == docs
  assert [p.name for p in tmp_path.iterdir()] == ['x.jsonl']


def test_directories_and_globs_are_sorted_and_read_again(tmp_path):
  (tmp_path / 'deep [1]').mkdir()
  for name in ('b.txt', 'deep [1]/a.txt', 'c.md'):
    (tmp_path / name).write_text(name)
  files = corpora.find(str(tmp_path))
  assert [d.text for d in files] == [d.text for d in files] == ['b.txt', 'deep [1]/a.txt']
  assert [d.text for d in read(tmp_path / '*.txt')] == ['b.txt']
  assert [d.text for d in read(tmp_path / 'deep [1]')] == ['deep [1]/a.txt']
  assert files.source()[0]['name'] == 'b.txt' and len(files.source()[0]['sha256']) == 64


def test_a_manifest_of_others_hides_no_text(tmp_path):
  (tmp_path / 'sub').mkdir()
  for name in ('a.txt', 'sub/b.txt'):
    (tmp_path / name).write_text('x')
  (tmp_path / 'sub' / 'manifest.json').write_text('{"files": []}')
  assert [os.path.basename(p) for p in corpora.find(str(tmp_path)).paths] == ['a.txt', 'b.txt']
  assert not corpora.is_prepared(tmp_path / 'sub')


@pytest.mark.parametrize('pattern', ['.', './', '**', '*/**/*.txt', 'essays'])
def test_what_a_run_wrote_is_no_text(tmp_path, monkeypatch, pattern):
  monkeypatch.chdir(tmp_path)
  for name in ('essays/a.txt', 'runs/x/metrics.jsonl', 'runs/x/config.json', 'runs/x/tokenizer/merges.txt'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('x')
  assert [os.path.basename(p) for p in corpora.find(pattern).paths] == ['a.txt']


def test_a_folder_of_many_files_is_listed_once(tmp_path, monkeypatch):
  for i in range(50):
    (tmp_path / f'{i}.txt').write_text('x')
  listed, real = [], os.listdir
  monkeypatch.setattr(os, 'listdir', lambda path: listed.append(path) or real(path))
  assert len(corpora.find(str(tmp_path)).paths) == 50 and len(listed) <= 2


def test_file_names_that_are_not_utf8_can_be_written_down(tmp_path):
  path = os.path.join(os.fsencode(tmp_path), b'\xd6\xd0.txt')
  with open(path, 'wb') as f:
    f.write('中'.encode())
  files = corpora.find(str(tmp_path))
  assert [d.text for d in files] == ['中']
  assert json.loads(json.dumps(files.source()).encode())[0]['name'] == '\\xd6\\xd0.txt'


@pytest.mark.parametrize('name', ['', 'nothing.txt', '*.txt', 'sub'])
def test_no_text_is_a_data_error(tmp_path, name):
  (tmp_path / 'sub').mkdir()
  with pytest.raises(DataError, match='no text'):
    corpora.find(str(tmp_path / name))


@pytest.mark.parametrize('name', ['a.json', 'a.csv', 'a.txt.gz', 'manifest', '红楼梦.TXT'])
def test_a_file_of_another_kind_is_no_text(tmp_path, name):
  (tmp_path / name).write_text('{"text": "a"}')
  with pytest.raises(DataError, match=f'{name}: neither .txt .* nor .jsonl .*; expected'):
    corpora.find(str(tmp_path / name))


def test_invalid_utf8_is_located(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'fine\nfine\nbad \xff')
  with pytest.raises(DataError, match=r'a.txt:3: byte 14 of the file'):
    read(tmp_path / 'a.txt')
  (tmp_path / 'a.jsonl').write_bytes(b'{"text": "ok"}\n{"text": "\xc3"}\n')
  with pytest.raises(DataError, match=r'a.jsonl:2: byte 10 '):
    read(tmp_path / 'a.jsonl')


@pytest.mark.parametrize('line', [
    '{"text": "a"', '{"text": "a", "text": "b"}', '{"text": NaN}', '{"text": "a", "n": -Infinity}', '{"text": 1}', '[]',
    '"text"', '{"body": "a"}', '{"text": "a", "split": "test"}', '{"text": "\\ud800"}', '\ufeff{"text": "a"}',
    '{"text": "a", "n": ["\\udc00"]}',
    '{"text": "a", "n": ' + '9' * 5000 + '}', '{"text": ' + '[' * 100000 + ']' * 100000 + '}', "{'text': 'a'}"])
def test_anything_but_strict_json_names_file_and_line(tmp_path, line):
  (tmp_path / 'a.jsonl').write_text('{"text": "fine"}\n' + line + '\n')
  with pytest.raises(DataError, match=r'a\.jsonl:2: '):
    read(tmp_path / 'a.jsonl')
