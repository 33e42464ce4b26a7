"""A tokenizer.json says what the files beside it say."""

import dataclasses
import json

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2
import tokenizers as hf

from lm.errors import DataError
from lm.text import export, tokenizer as tokenizers, training

TEXTS = ['The quick brown fox jumps over the lazy dog.\nIt had 1,234 reasons.\n\n\tIndented, and  twice spaced. \n',
         '天地玄黄，宇宙洪荒。\n日月盈昃，辰宿列张。寒来暑往，秋收冬藏。\n',
         'def f(x):\n    return {x: 1}  # 你好 😀\r\n'] * 20
ODD = ['', ' ', '  ', '\n', ' \n', '\n a', '\t', ' lead', 'trail ', '\r\n', 'a\0b', '😀👍🏽', 'e\u0301', '\u3000全角',
       '\u2581x', ' \u2581', '<0x0A>', 'a<0x41>b', '<unk>', '12345', '\ufeffbom', '龘', 'the 你']
WITH_ANGLES = ['a < b <i> c << d'] * 20  # so that '<' is a piece


@pytest.fixture(scope='module')
def kinds(tmp_path_factory):
  root = tmp_path_factory.mktemp('export')
  train = lambda name, texts, *args: training.train_sentencepiece(
      texts, root / f'{name}.model', *args, control_symbols=['[CLS]', '[SEP]', '[MASK]'])
  bpe = hf.Tokenizer(hf.models.BPE())
  bpe.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.train_from_iterator(TEXTS, hf.trainers.BpeTrainer(
      vocab_size=300, special_tokens=['<|endoftext|>'], show_progress=False,
      initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()))
  bpe.model.save(str(root))
  return {'unigram': train('u', TEXTS, 340), 'unigram <': train('a', TEXTS + WITH_ANGLES, 345),
          'bpe': train('b', TEXTS, 400, 'bpe'), 'byte': tokenizers.byte(), 'char': tokenizers.char([*TEXTS, *ODD]),
          'gpt2': tokenizers.load(root / 'vocab.json')}


KINDS = ['unigram', 'unigram <', 'bpe', 'byte', 'char', 'gpt2']


def written(folder, tokenizer, **kwargs):
  folder.mkdir()
  for name, content in export.files(tokenizer, **kwargs).items():
    (folder / name).write_bytes(content)
  return hf.Tokenizer.from_file(str(folder / 'tokenizer.json'))


@pytest.mark.parametrize('kind', KINDS)
def test_tokenizer_json_gives_the_same_ids_and_texts(kinds, kind, tmp_path):
  tokenizer = kinds[kind]
  other = written(tmp_path / 'x', tokenizer)
  rng = np.random.default_rng(0)
  parts = [*TEXTS[:3], *ODD, ' ', 'a', '<', '0x', '\n', '你', 'fox ']
  mixed = [''.join(rng.choice(parts, rng.integers(1, 9))) for _ in range(500)]
  for text in [*TEXTS[:3], *ODD, *mixed, ''.join(TEXTS)]:
    if kind == 'char':
      text = ''.join(c for c in text if c in tokenizer.files['char.json'].decode() or c in ''.join([*TEXTS, *ODD]))
    want = tokenizer.encode(text).tolist()
    assert other.encode(text, add_special_tokens=False).ids == want, text
    assert other.decode(want) == tokenizer.decode(want), text
  assert other.get_vocab_size() == tokenizer.vocab_size


@pytest.mark.parametrize('kind', KINDS)
def test_the_folder_is_read_as_the_tokenizer_that_was_written(kinds, kind, tmp_path):
  written(tmp_path / 'x', kinds[kind])
  again = tokenizers.load(tmp_path / 'x')
  assert again.kind == kinds[kind].kind and again.sha256 == kinds[kind].sha256
  assert tokenizers.load(tmp_path / 'x' / 'tokenizer.json').kind == 'hf'  # who names it gets it


def test_texts_stand_as_in_training(kinds, tmp_path):
  """A document's begin before a decoder's, [CLS] and [SEP] around an encoder's; the roles are named."""
  tokenizer = kinds['unigram']
  ids, special = tokenizer.encode('fox').tolist(), tokenizer.control
  assert written(tmp_path / 'a', tokenizer).encode('fox').ids == [special['<s>'], *ids] == tokenizer.document(
      'fox').tolist()[:-1]
  encoder = written(tmp_path / 'b', tokenizer, encoder=True)
  assert encoder.encode('fox').ids == [special['[CLS]'], *ids, special['[SEP]']]
  assert encoder.encode('fox', 'fox').ids == [special['[CLS]'], *ids, special['[SEP]'], *ids, special['[SEP]']]
  roles = [json.loads((tmp_path / name / 'tokenizer_config.json').read_text()) for name in 'ab']
  assert roles[0]['bos_token'] == '<s>' and roles[0]['eos_token'] == '</s>' and 'mask_token' not in roles[0]
  assert (roles[1]['cls_token'], roles[1]['sep_token'], roles[1]['mask_token']) == ('[CLS]', '[SEP]', '[MASK]')
  assert written(tmp_path / 'c', tokenizers.byte()).encode('x').ids == [120]  # its bos ends documents, too
  assert written(tmp_path / 'd', tokenizers.byte(), encoder=True).encode('x').ids == [120]


@pytest.mark.parametrize('change', [
    lambda m: setattr(m.normalizer_spec, 'remove_extra_whitespaces', True),
    lambda m: setattr(m.normalizer_spec, 'precompiled_charsmap', b'x'),
    lambda m: setattr(m.trainer_spec, 'model_type', m.trainer_spec.WORD),
    lambda m: setattr(m.trainer_spec, 'treat_whitespace_as_suffix', True),
    lambda m: setattr(m.pieces[-1], 'type', m.pieces[-1].USER_DEFINED)])
def test_what_tokenizer_json_cannot_say_is_left_to_sentencepiece(kinds, tmp_path, change):
  proto = sentencepiece_model_pb2.ModelProto.FromString(kinds['bpe'].files['tokenizer.model'])
  proto.pieces[-1].piece = 'two'
  change(proto)
  changed = dataclasses.replace(kinds['bpe'], files={'tokenizer.model': proto.SerializeToString()})
  assert export.files(changed) == changed.files


def test_a_config_that_says_nonsense_is_named_and_leads_nowhere(kinds, tmp_path):
  kinds['unigram'].save(tmp_path)
  for junk in ('{"made_from": ["x"]}', '{"made_from": "../x.model"}'):
    (tmp_path / 'tokenizer_config.json').write_text(junk)
    assert tokenizers.load(tmp_path).sha256 == kinds['unigram'].sha256
  for junk in ('{', '[]'):
    (tmp_path / 'tokenizer_config.json').write_text(junk)
    with pytest.raises(DataError, match='expected a sentencepiece tokenizer; copy'):
      tokenizers.load(tmp_path)
