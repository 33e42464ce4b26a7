"""Token shards: exact content, exact splits, identical bytes after a kill, and no damage goes unseen."""

import hashlib
import json
import os
import signal
import subprocess
import sys

from array_record.python import array_record_module
import numpy as np
import pytest

from lm.data import corpora, records
from lm.data.corpora import Document
from lm.errors import ConfigError, DataError
from lm.text import tokenizer as tokenizers

BYTE = tokenizers.byte()
TEXTS = ['one', 'two ' * 3000, '', 'three\n你好', ' \n', 'four', 'x' * (2 * records.PIECE - 1)]
DOCS = [Document(str(i), t) for i, t in enumerate(TEXTS)]
KEPT = [t for t in TEXTS if t.strip()]


def write(folder, docs=DOCS, fraction=0.0, kind='hash', **kwargs):
  return records.write(docs, BYTE, folder, split=records.Split(kind, fraction), source='test', **kwargs)


def content(folder):
  """{relative path: bytes}, but for the empty lock."""
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file() and p.name != '.lock'}


def test_every_token_comes_back(tmp_path):
  data = write(tmp_path, shard_tokens=5000)
  assert len(data.manifest['splits']['train']['shards']) > 2
  for i, text in enumerate(KEPT):
    assert data.document('train', i).tolist() == BYTE.document(text).tolist()
  assert data.lengths['train'].tolist() == [len(BYTE.document(t)) for t in KEPT]
  assert data.tokens('train') == sum(len(BYTE.document(t)) for t in KEPT)
  assert data.utf8_bytes('train') == sum(len(t.encode()) for t in KEPT)
  assert data.manifest['skipped'] == {'empty': 2}
  assert data.tokenizer().sha256 == BYTE.sha256


def test_any_spans_against_slices_of_whole_documents(tmp_path):
  data = write(tmp_path, shard_tokens=5000)
  whole = [BYTE.document(t) for t in KEPT]
  rng = np.random.default_rng(0)
  for _ in range(50):
    spans = []
    for document in rng.integers(0, len(KEPT), 6).tolist():
      start, stop = np.sort(rng.choice(len(whole[document]) + 1, 2, replace=False))
      spans.append((document, start, stop))
    want = np.concatenate([whole[d][a:b] for d, a, b in spans])
    np.testing.assert_array_equal(data.read('train', spans), want)


def test_wide_vocabulary_takes_four_bytes(tmp_path):
  wide = tokenizers.Tokenizer('fake', 70000, {}, None, None, None, {'byte.json': b''},
                              lambda text: [ord(c) + 65000 for c in text], str)
  data = records.write([Document('0', 'abc')], wide, tmp_path)
  assert data.manifest['dtype'] == '<u4'
  split = next(s for s in records.SPLITS if data.tokens(s))
  assert data.document(split, 0).tolist() == [65097, 65098, 65099]


def test_hash_split_never_parts_equal_texts(tmp_path):
  docs = [Document(str(i), f'text {i % 100}') for i in range(300)]
  data = write(tmp_path, docs, 0.3)
  texts = {s: {bytes(data.document(s, i)[:-1].astype(np.uint8)) for i in range(len(data.lengths[s]))}
           for s in records.SPLITS}
  assert not texts['train'] & texts['validation']
  assert len(texts['train'] | texts['validation']) == 100 and 15 < len(texts['validation']) < 45
  held_out = (tmp_path / 'validation.txt').read_bytes()
  assert set(held_out.split(b'\n')) == texts['validation']
  grown = records.assign([*docs, Document('new', 'new text')], records.Split('hash', 0.3))
  assert [s for s, _ in grown][:300] == [s for s, _ in records.assign(docs, records.Split('hash', 0.3))]


def test_a_document_that_names_its_split_keeps_it(tmp_path):
  docs = [Document('a', 'same', 'validation'), Document('b', 'other', 'train')]
  for fraction in (0.0, 0.99):
    data = write(tmp_path / str(fraction), docs, fraction)
    assert data.utf8_bytes('validation') == 4 and data.utf8_bytes('train') == 5


def test_a_folder_holds_one_tokenizer_and_the_shards_of_one_run(tmp_path):
  """Of another, which was interrupted there, nothing is left."""
  def broken():
    yield Document('a', 'ab' * 40)
    raise KeyboardInterrupt
  with pytest.raises(KeyboardInterrupt):
    records.write(broken(), tokenizers.char('ab'), tmp_path / 'd', shard_tokens=8)
  assert list((tmp_path / 'd').glob('*.array_record*'))
  data = records.write([Document('a', 'ab' * 4)], tokenizers.byte(), tmp_path / 'd')
  assert data.tokenizer().kind == 'byte' and len(list((tmp_path / 'd').glob('*.array_record*'))) == 1


def test_a_text_that_the_tokenizer_refuses_is_named_by_its_file(tmp_path):
  for name, text in (('a.txt', 'abc'), ('b.txt', '好')):
    (tmp_path / name).write_text(text)
  for kind in ('hash', 'tail'):
    with pytest.raises(DataError, match='b.txt: character 0: U[+]597D'):
      records.write(corpora.find(str(tmp_path)), tokenizers.char('abc'), tmp_path / kind,
                    split=records.Split(kind, 0.3))


@pytest.mark.parametrize('cuts', [[], [3], [250, 251, 900], [899, 900]])
def test_tail_split_cuts_at_the_character_that_nanogpt_cuts_at(tmp_path, cuts):
  text = ''.join(chr(0x4E00 + i % 50) if i % 3 else 'a' for i in range(1001))
  docs = [Document(str(i), text[a:b]) for i, (a, b) in enumerate(zip([0, *cuts], [*cuts, 1001], strict=True))]
  data = records.write(docs, tokenizers.char(text), tmp_path, split=records.Split('tail', 0.1))
  assert (data.tokens('train'), data.tokens('validation')) == (int(0.9 * 1001), 1001 - int(0.9 * 1001))
  assert data.utf8_bytes('validation') == len(text[900:].encode())
  assert (tmp_path / 'validation.txt').read_text().replace('\n', '') == text[900:]


def test_tail_needs_documents_that_can_be_read_twice(tmp_path):
  with pytest.raises(TypeError, match='twice'):
    write(tmp_path, iter(DOCS), 0.1, 'tail')


def test_writing_twice_gives_the_same_bytes_and_reuses_what_is_finished(tmp_path):
  write(tmp_path / 'a', fraction=0.5)
  write(tmp_path / 'b', fraction=0.5)
  assert content(tmp_path / 'a') == content(tmp_path / 'b')
  write(tmp_path / 'a', iter(()), fraction=0.5)  # nothing is read: it is opened
  with pytest.raises(DataError, match=r'another dataset \(split differ\)'):
    write(tmp_path / 'a', fraction=0.4)


KILLED = '''
import os, signal, sys
from lm.data import records
from lm.data.corpora import Document
from lm.text import tokenizer
def documents():
  for i in range(40):
    if i == 25: os.kill(os.getpid(), signal.SIGKILL)
    yield Document(str(i), f'document {i} ' * 400)
split = records.Split('hash', 0.2)
records.write(documents(), tokenizer.byte(), sys.argv[1], split=split, source='test', shard_tokens=9000)
'''


def test_killed_writer_leaves_no_dataset_and_a_rerun_gives_the_same_bytes(tmp_path):
  done = subprocess.run([sys.executable, '-c', KILLED, tmp_path / 'killed'], check=False, capture_output=True,
                        env=os.environ | {'PYTHONPATH': '.'})
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert any('.tmp' in n for n in os.listdir(tmp_path / 'killed'))
  with pytest.raises(DataError, match='manifest.json: no such file'):
    records.Dataset(tmp_path / 'killed')
  docs = [Document(str(i), f'document {i} ' * 400) for i in range(40)]
  (tmp_path / 'killed' / 'train-00099.array_record.tmp').write_bytes(b'of a longer run')
  for folder in ('killed', 'straight'):
    write(tmp_path / folder, docs, 0.2, shard_tokens=9000)
  assert content(tmp_path / 'killed') == content(tmp_path / 'straight')


@pytest.mark.parametrize('docs', [[], [Document('0', ''), Document('1', ' \n\t')]])
def test_no_text_at_all_is_a_data_error(tmp_path, docs):
  with pytest.raises(DataError, match='no text'):
    write(tmp_path, docs)
  assert not (tmp_path / 'manifest.json').exists()


def test_text_that_cannot_be_encoded_names_the_document(tmp_path):
  with pytest.raises(DataError, match=r'document 2: character 1: lone surrogate'):
    write(tmp_path, [Document('0', 'fine'), Document('1', 'a\ud800')])


def damage(path, how):
  raw = bytearray(path.read_bytes())
  if how == 'flip':
    raw[len(raw) // 2] ^= 1
  elif how == 'truncate':
    raw = raw[:-100]
  elif how == 'empty':
    raw = b''
  path.unlink()
  if how != 'remove':
    path.write_bytes(raw)


@pytest.mark.parametrize('how', ['flip', 'truncate', 'empty', 'remove'])
@pytest.mark.parametrize('name', ['train-00001.array_record', 'train.npy', 'validation-00000.array_record'])
def test_damage_is_found_on_opening_and_named(tmp_path, name, how):
  write(tmp_path, [Document(str(i), f'{i} ' * 5000) for i in range(9)], 0.3, shard_tokens=9000)
  damage(tmp_path / name, how)
  with pytest.raises(DataError, match=name):
    records.Dataset(tmp_path)
  if how != 'flip':  # sizes are always checked
    with pytest.raises(DataError, match=name):
      records.Dataset(tmp_path, verify=False)


@pytest.mark.parametrize('how', ['remove', 'empty', 'truncate'])
def test_damaged_manifest_is_a_data_error(tmp_path, how):
  write(tmp_path)
  damage(tmp_path / 'manifest.json', how)
  with pytest.raises(DataError, match='manifest.json'):
    records.Dataset(tmp_path)


@pytest.mark.parametrize('change', [{'format_version': 0}, {'splits': None}, {'tokenizer': {}},
                                    {'tokenizer': {'sha256': 'x'}}, {'splits': {'train': {'shards': []}}}])
def test_foreign_manifest_is_a_data_error(tmp_path, change):
  manifest = write(tmp_path).manifest
  (tmp_path / 'manifest.json').write_text(json.dumps({k: v for k, v in (manifest | change).items() if v is not None}))
  with pytest.raises(DataError, match='manifest.json'):
    records.Dataset(tmp_path)


def reseal(folder, split, name):
  """Makes the manifest agree with a shard that was written by hand."""
  manifest = json.loads((folder / 'manifest.json').read_text())
  shard = next(s for s in manifest['splits'][split]['shards'] if s['name'] == name)
  raw = (folder / name).read_bytes()
  shard |= {'bytes': len(raw), 'sha256': hashlib.sha256(raw).hexdigest()}
  (folder / 'manifest.json').write_text(json.dumps(manifest))


def test_id_beyond_the_vocabulary_is_named_by_shard_record_and_position(tmp_path):
  write(tmp_path, [Document(str(i), 'abcdefgh') for i in range(6)], shard_tokens=27)  # three documents a shard
  writer = array_record_module.ArrayRecordWriter(str(tmp_path / 'train-00001.array_record'), 'group_size:1')
  for i in range(3):
    ids = BYTE.document('abcdefgh').astype('<u2')
    ids[4] = 300 if i == 1 else ids[4]
    writer.write(ids.tobytes())
  writer.close()
  reseal(tmp_path, 'train', 'train-00001.array_record')
  data = records.Dataset(tmp_path)
  assert data.document('train', 3).tolist() == BYTE.document('abcdefgh').tolist()
  with pytest.raises(DataError, match=r'train-00001.array_record:1:4: id 300; expected less than 258'):
    data.read('train', [(3, 0, 9), (4, 5, 9)])


def test_flip_that_slips_past_opening_is_never_silent(tmp_path):
  data = write(tmp_path, [Document('0', 'some text ' * 9000)])
  want = data.document('train', 0)
  path = tmp_path / 'train-00000.array_record'
  good = path.read_bytes()
  found = 0
  for at in np.random.default_rng(0).integers(64, len(good), 20).tolist():
    path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1:])
    try:
      np.testing.assert_array_equal(records.Dataset(tmp_path, verify=False).document('train', 0), want)
    except DataError:
      found += 1
  assert records.Dataset(tmp_path, verify=False) and found < 20  # padding is harmless; a wrong token would have failed


@pytest.mark.parametrize(('kind', 'fraction'), [('random', 0.1), ('hash', 1.0), ('hash', -0.1), ('tail', float('nan'))])
def test_bad_split_is_a_config_error(kind, fraction):
  with pytest.raises(ConfigError, match='split|fraction'):
    records.Split(kind, fraction)


def test_files_are_tokenised_like_their_texts(tmp_path):
  corpora.write_jsonl(tmp_path / 'x.jsonl', [d for d in DOCS if d.text])
  write(tmp_path / 'a', corpora.find(str(tmp_path / 'x.jsonl')))
  write(tmp_path / 'b')
  shards = [{n: c for n, c in content(tmp_path / f).items() if n != 'manifest.json'} for f in 'ab']
  assert shards[0] == shards[1]
