"""Batches are a pure function of (config, seed, step): not of threads, hosts, devices or where one starts."""

import collections
import dataclasses
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys

from array_record.python import array_record_module
import gguf
import jax
import numpy as np
import pytest
import tokenizers as hf_tokenizers

from lm import config, sharding
from lm.data import corpora, loader, records
from lm.errors import ConfigError, DataError
from lm.text import tokenizer as tokenizers

FIELDS = ('ids_BT', 'segments_BT', 'positions_BT', 'mask_BT')


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  """'big.jsonl' (60 documents), 'small.jsonl' (20 of another alphabet), 'one.txt'."""
  root = tmp_path_factory.mktemp('texts')
  rng = np.random.default_rng(0)
  for name, letters, n in (('big', 'abcdefgh', 60), ('small', 'XYZ', 20)):
    documents = [''.join(rng.choice(list(letters), rng.integers(1, 200))) for _ in range(n)]
    corpora.write_jsonl(root / f'{name}.jsonl', [corpora.Document(str(i), d) for i, d in enumerate(documents)])
  (root / 'one.txt').write_text(''.join(rng.choice(list('abc \n'), 3000)))
  return root


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture
def prepare(texts, cache):
  def prepare(*names, seed=3, **kwargs):
    kwargs = {'tokenizer': 'byte', 'length': 16, 'batch': 8, 'validation_fraction': 0.2} | kwargs
    paths = tuple(str(texts / n) for n in names or ('big.jsonl',))
    return loader.prepare(loader.Config(corpus=paths, **kwargs), cache, seed=seed)
  return prepare


def equal(batch, arrays, rows=slice(None)):
  for name in FIELDS:
    got = getattr(batch, name) if hasattr(batch, name) else batch[name]
    np.testing.assert_array_equal(np.asarray(got), arrays[name][rows], err_msg=name)


def mesh_sharding(**axes):
  return sharding.batch_sharding(sharding.make_mesh(sharding.Config(**axes)))


@pytest.mark.parametrize('packing', ['stream', 'fit'])
@pytest.mark.parametrize('isolate', [False, True])
@pytest.mark.parametrize('axes', [{}, {'data': 4, 'fsdp': 2}, {'data': 2, 'tensor': 4}])
def test_device_batches_equal_the_plain_ones_from_any_start(prepare, packing, isolate, axes):
  data = prepare('big.jsonl', 'small.jsonl', packing=packing, isolate=isolate)
  for start in (0, 7, 1000):
    batches = list(itertools.islice(loader.train_batches(data, mesh_sharding(**axes), start), 3))
    for step, batch in enumerate(batches, start):
      equal(batch, loader.host_batch(data, step))
      assert batch.ids_BT.shape == (8, 17) and batch.ids_BT.sharding.is_equivalent_to(mesh_sharding(**axes), 2)
      assert (batch.ids_BT.dtype, batch.mask_BT.dtype) == (np.int32, np.bool_)


@pytest.mark.parametrize('threads', [0, 1, 3])
def test_threads_change_nothing(prepare, threads):
  want = [loader.host_batch(prepare(), s) for s in range(6)]
  for batch, arrays in zip(loader.train_batches(prepare(threads=threads), mesh_sharding()), want, strict=False):
    equal(batch, arrays)


def test_any_part_of_the_rows_equals_that_part_of_the_batch(prepare):
  data = prepare('big.jsonl', 'small.jsonl')
  for rows in ([0, 1], [5], [2, 3, 6, 7]):
    equal(loader._train_arrays(data, np.array(rows), 5), loader.host_batch(data, 5), rows)


def test_seed_decides(prepare):
  a, b, c = (loader.host_batch(prepare(seed=s), 0)['ids_BT'] for s in (3, 3, 4))
  assert (a == b).all() and (a != c).any()


@pytest.mark.parametrize('isolate', [False, True])
def test_an_epoch_of_training_holds_the_corpus(prepare, isolate):
  data = prepare(isolate=isolate, batch=1)
  epoch = [loader.host_batch(data, s) for s in range(data.rows_per_epoch)]
  seen = collections.Counter(np.concatenate([b['ids_BT'][0, 1:] for b in epoch]).tolist())
  whole = collections.Counter(np.concatenate([data.datasets[0].document('train', i) for i in range(
      len(data.datasets[0].lengths['train']))]).tolist())
  assert (whole - seen).total() < 16 and not seen - whole


def test_rows_are_real_text_with_boundaries_at_eos(prepare):
  data = prepare(isolate=True)
  eos = data.tokenizer.eos_id
  train = {data.tokenizer.decode(data.datasets[0].document('train', i)) for i in range(
      len(data.datasets[0].lengths['train']))}
  for step in range(5):
    batch = loader.host_batch(data, step)
    for ids, segments, positions in zip(*(batch[k] for k in FIELDS[:3]), strict=True):
      for s in range(1, segments.max() + 1):
        piece = ids[segments == s]
        assert any(data.tokenizer.decode(piece) in text for text in train)
        assert (positions[segments == s] == np.arange(len(piece))).all()
      ends = segments[1:] != segments[:-1]
      assert (ids[:-1][ends] == eos).all() and ((ids == eos)[:-1] == ends).all()


@pytest.mark.parametrize(('weights', 'share'), [((3.0, 1.0), 0.75), ((1.0, 9.0), 0.1), ((), None)])
def test_mixture_is_exact_in_tokens(prepare, weights, share):
  data = prepare('big.jsonl', 'small.jsonl', weights=weights, batch=10)
  if share is None:
    share = data.datasets[0].tokens('train') / data.tokens('train')
  ids = np.concatenate([loader.host_batch(data, s)['ids_BT'] for s in range(40)])
  from_big = (ids >= ord('a')) & (ids < 256)
  from_small = (ids >= ord('A')) & (ids <= ord('Z'))
  assert not (from_big.any(1) & from_small.any(1)).any()
  assert abs(from_big.any(1).mean() - share) < 0.011


@pytest.mark.parametrize('packing', ['stream', 'fit'])
@pytest.mark.parametrize('isolate', [False, True])
@pytest.mark.parametrize('batch', [8, 24])
def test_evaluation_counts_every_validation_token_once(prepare, packing, isolate, batch):
  data = prepare('big.jsonl', 'small.jsonl', packing=packing, isolate=isolate)
  batches = list(loader.eval_batches(data, 'validation', batch, mesh_sharding(data=8)))
  assert len(batches) == loader.eval_steps(data, 'validation', batch)
  seen = np.concatenate([np.asarray(b.ids_BT)[np.asarray(b.mask_BT)] for b in batches]).tolist()
  documents = [[d.document('validation', i) for i in range(len(d.lengths['validation']))] for d in data.datasets]
  if isolate:
    want = np.concatenate([x[1:] for d in documents for x in d]).tolist()
  else:
    want = np.concatenate([np.concatenate(d)[1:] for d in documents]).tolist()
  if packing == 'stream':
    assert seen == want  # in order, too
  elif isolate:
    assert sorted(seen) == sorted(want)
  else:
    assert not collections.Counter(seen) - collections.Counter(want)  # a row's first token is no target
  for b in batches:
    assert not np.asarray(b.mask_BT)[np.asarray(b.segments_BT) == 0].any()


def test_evaluation_of_nothing_is_a_data_error(prepare):
  with pytest.raises(DataError, match='nothing to evaluate'):
    loader.eval_batches(prepare('one.txt', split='tail', validation_fraction=0.0), 'validation', 8, mesh_sharding())
  with pytest.raises(DataError, match="set data.split='tail'"):  # of one document, no share is held out
    loader.eval_batches(prepare('one.txt', validation_fraction=1e-9), 'validation', 8, mesh_sharding())


def test_tiny_shakespeare_split_of_nanogpt(tmp_path):
  (tmp_path / 'x.txt').write_text(('To be, or not to be.\n' * 60000)[:1115394])
  c = loader.Config(str(tmp_path / 'x.txt'), tokenizer='char', split='tail', validation_fraction=0.1)
  data = loader.prepare(c, tmp_path / 'cache')
  assert (data.tokens('train'), data.tokens('validation')) == (1003854, 111540)
  assert data.utf8_bytes() == 111540
  loader.check(data, data.tokenizer.vocab_size)


def test_raw_text_is_tokenised_once_per_content_tokenizer_and_split(texts, tmp_path):
  def folders(**kwargs):
    loader.prepare(loader.Config(str(texts / 'one.txt'), **({'tokenizer': 'byte', 'split': 'tail'} | kwargs)), tmp_path)
    return {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
  first = folders()
  assert folders(length=5, batch=3) == first
  assert len(folders(tokenizer='char')) == 2
  assert len(folders(validation_fraction=0.3)) == 3
  assert first.items() <= folders().items()


def test_prepared_dataset_needs_no_tokenizer_and_refuses_another(prepare, texts, cache, tmp_path):
  raw = prepare()
  path = str(raw.datasets[0].path)
  c = loader.Config(path, length=16, batch=8)
  again = loader.prepare(c, tmp_path, seed=3)
  assert again.fingerprint == raw.fingerprint and not list(tmp_path.iterdir())
  equal(loader.host_batch(again, 2), loader.host_batch(raw, 2))
  tokenizers.char('abc').save(tmp_path / 'other')
  with pytest.raises(ConfigError, match='not the tokenizer'):
    loader.prepare(dataclasses.replace(c, tokenizer=str(tmp_path / 'other')), tmp_path)
  char = loader.prepare(loader.Config(str(texts / 'one.txt'), tokenizer='char', split='tail'), cache)
  with pytest.raises(ConfigError, match='not the tokenizer.*all corpora are read by that of the first'):
    loader.prepare(loader.Config((path, str(char.datasets[0].path))), tmp_path)
  shutil.copytree(char.datasets[0].path, tmp_path / 'copy')
  tokenizers.char('abc').save(tmp_path / 'copy' / 'tokenizer')
  with pytest.raises(DataError, match='copy/tokenizer: changed since the corpus was prepared'):
    loader.prepare(loader.Config(str(tmp_path / 'copy')), tmp_path)


def test_unfinished_dataset_is_named_as_such(prepare, tmp_path):
  path = prepare().datasets[0].path
  (tmp_path / 'train-00000.array_record').write_bytes((path / 'train-00000.array_record').read_bytes())
  (tmp_path / 'validation.txt').write_text('held out')
  with pytest.raises(DataError, match='manifest.json: no such file'):
    loader.prepare(loader.Config(str(tmp_path)), tmp_path / 'cache')


def test_what_a_prepared_dataset_holds_out_is_no_text_of_the_folder_around_it(prepare, tmp_path):
  path = prepare().datasets[0].path
  (tmp_path / 'set').mkdir()
  for name in ('manifest.json', 'validation.txt'):
    (tmp_path / 'set' / name).write_bytes((path / name).read_bytes())
  (tmp_path / 'book.txt').write_text('a book')
  for where in (tmp_path, tmp_path / '**'):
    assert corpora.find(str(where)).paths == (str(tmp_path / 'book.txt'),)


def test_model_vocabulary_must_fit_the_tokenizer(prepare):
  data = prepare()
  for vocab in (258, 300, 384):
    loader.check(data, vocab)
  for vocab in (257, 385, 512):
    with pytest.raises(ConfigError, match=f'model.vocab={vocab}.*258'):
      loader.check(data, vocab)


def test_corpus_smaller_than_a_batch_is_found_before_training(prepare):
  rows = prepare().rows_per_epoch
  loader.check(prepare(batch=rows), 258)
  with pytest.raises(DataError, match='less than one batch'):
    loader.check(prepare(batch=rows + 1), 258)
  with pytest.raises(DataError, match='training tokens in'):
    loader.check(prepare(length=100000, batch=1), 258)
  with pytest.raises(DataError, match='tail'):  # the only document went to one side
    loader.check(prepare('one.txt', validation_fraction=0.9999), 258)


def test_damaged_cache_is_found_at_the_next_start(texts, tmp_path):
  c = loader.Config(str(texts / 'big.jsonl'), tokenizer='byte', length=16)
  path = loader.prepare(c, tmp_path).datasets[0].path / 'train-00000.array_record'
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 3] ^= 1
  path.write_bytes(raw)
  with pytest.raises(DataError, match='train-00000.array_record: damaged'):
    loader.prepare(c, tmp_path)


def test_bad_id_stops_the_iterator_with_its_place(prepare, tmp_path):
  source = prepare()
  documents = [corpora.Document(str(i), 'abcdefgh', 'train') for i in range(8)]
  records.write(documents, source.tokenizer, tmp_path / 'd')
  shard = tmp_path / 'd' / 'train-00000.array_record'
  writer = array_record_module.ArrayRecordWriter(str(shard), 'group_size:1')
  for i in range(8):
    ids = source.tokenizer.document('abcdefgh').astype('<u2')
    ids[2] = 999 if i == 5 else ids[2]
    writer.write(ids.tobytes())
  writer.close()
  manifest = json.loads((tmp_path / 'd' / 'manifest.json').read_text())
  manifest['splits']['train']['shards'][0] |= {'bytes': shard.stat().st_size, 'sha256': corpora.sha256_file(shard)}
  (tmp_path / 'd' / 'manifest.json').write_text(json.dumps(manifest))
  for threads in (0, 2):
    data = loader.prepare(loader.Config(str(tmp_path / 'd'), length=8, batch=8, threads=threads), tmp_path)
    with pytest.raises(DataError, match=r'train-00000.array_record:5:2: id 999'):
      next(loader.train_batches(data, mesh_sharding()))


def test_batch_must_divide_over_the_devices(prepare):
  with pytest.raises(ConfigError, match='batch=12'):
    loader.train_batches(prepare(batch=12), mesh_sharding(data=8))


def test_fingerprint_tells_every_change_and_no_other(prepare):
  base = prepare().fingerprint
  assert json.loads(json.dumps(base)) == base
  loader.check_fingerprint(json.loads(json.dumps(base)), prepare(threads=0).fingerprint)
  for field, changed in {
      'seed': prepare(seed=4), 'batch': prepare(batch=16), 'length': prepare(length=8),
      'isolate': prepare(isolate=True), 'packing': prepare(packing='fit'), 'datasets': prepare('small.jsonl'),
      'weights': prepare('big.jsonl', 'small.jsonl'),
      'tokenizer': prepare('one.txt', tokenizer='char', split='tail')}.items():
    with pytest.raises(DataError if field in ('datasets', 'tokenizer', 'weights') else ConfigError, match=field):
      loader.check_fingerprint(base, changed.fingerprint)


@pytest.mark.parametrize('kwargs', [
    {'length': 0}, {'batch': 0}, {'threads': -1}, {'packing': 'best'}, {'split': 'x'}, {'validation_fraction': 1.0},
    {'weights': (1.0,), 'corpus': ('a', 'b')}, {'weights': (1.0, 0.0), 'corpus': ('a', 'b')},
    {'weights': (float('inf'), 1.0), 'corpus': ('a', 'b')}])
def test_bad_config(kwargs):
  with pytest.raises(ConfigError, match=next(iter(kwargs))):
    loader.Config(**kwargs)


def test_config_takes_overrides():
  c = config.override(loader.Config(), "corpus=('a.txt','b.txt')", 'weights=(1,2.5)', 'packing=fit', 'tokenizer=byte')
  assert (c.corpora, c.weights, c.packing) == (('a.txt', 'b.txt'), (1.0, 2.5), 'fit')
  assert config.override(c, 'weights=()', 'corpus=a.txt').corpora == ('a.txt',)
  assert config.from_json(loader.Config, json.loads(json.dumps(config.to_json(c)))) == c


def test_missing_settings_are_named(texts, tmp_path):
  for kwargs, message in (({}, 'data.corpus'), ({'corpus': str(texts / 'one.txt')}, 'data.tokenizer')):
    with pytest.raises(ConfigError, match=message):
      loader.prepare(loader.Config(**kwargs), tmp_path)
  with pytest.raises(ConfigError, match='seed'):
    loader.prepare(loader.Config(str(texts / 'one.txt'), tokenizer='byte'), tmp_path, seed=-1)


def test_a_tokenizer_inside_a_gguf_file(texts, tmp_path):
  """Training goes on from such a file; its tokenizer is then kept as any other."""
  w = gguf.GGUFWriter(tmp_path / 'x.gguf', 'llama')
  w.add_tokenizer_model('gpt2')
  w.add_tokenizer_pre('smollm')
  tokens = ['<|endoftext|>', *sorted(hf_tokenizers.pre_tokenizers.ByteLevel.alphabet()), 'ab']
  w.add_token_list(tokens)
  w.add_token_types([3] + [1] * (len(tokens) - 1))
  w.add_token_merges(['a b'])
  w.add_eos_token_id(0)
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.close()
  c = loader.Config(str(texts / 'one.txt'), tokenizer=str(tmp_path / 'x.gguf'), split='tail', length=16, batch=8)
  data = loader.prepare(c, tmp_path / 'cache')
  assert data.tokenizer.vocab_size == len(tokens) == 258 and data.tokenizer.eos_id == 0
  assert data.datasets[0].tokenizer().sha256 == data.tokenizer.sha256
  ids = loader.host_batch(data, 0)['ids_BT']
  assert (ids == tokens.index('ab')).any() and data.tokenizer.decode(ids[0]) in (texts / 'one.txt').read_text()


HOST = '''
import sys, jax, numpy as np
jax.distributed.initialize(f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]))
from lm import sharding
from lm.data import loader
c = loader.Config(sys.argv[3], length=16, batch=8)
data = loader.prepare(c, sys.argv[4], seed=3)
batches = loader.train_batches(data, sharding.batch_sharding(sharding.make_mesh(sharding.Config(data=2, fsdp=4))), 5)
want = loader.host_batch(data, 5)
batch = next(batches)
for name, whole in want.items():
  shards = getattr(batch, name).addressable_shards
  assert len(shards) == 4 and sum(s.data.shape[0] for s in shards) == 4
  for s in shards:
    np.testing.assert_array_equal(s.data, whole[s.index])
'''


@pytest.mark.slow
def test_two_hosts_build_the_halves_of_one_batch(prepare, tmp_path):
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = str(s.getsockname()[1])
  flags = '--xla_force_host_platform_device_count=4'
  env = os.environ | {'PYTHONPATH': '.', 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
  path = str(prepare().datasets[0].path)
  hosts = [subprocess.Popen([sys.executable, '-c', HOST, port, str(i), path, str(tmp_path)], env=env) for i in range(2)]
  assert [h.wait(120) for h in hosts] == [0, 0]


def test_batch_is_a_tree_of_four_arrays(prepare):
  batch = next(loader.train_batches(prepare(), mesh_sharding()))
  assert len(jax.tree.leaves(batch)) == 4
