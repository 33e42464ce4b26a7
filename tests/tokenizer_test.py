"""Round trips, determinism, and: no text ever makes a control id."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers as hf

from lm.errors import ConfigError, DataError
from lm.text import export, tokenizer as tokenizers, tokenizer_files, training, vocabulary

TEXTS = ['The quick brown fox jumps over the lazy dog.\nIt had 1,234 reasons.\n\n\tIndented, and  twice spaced. \n',
         '天地玄黄，宇宙洪荒。\n日月盈昃，辰宿列张。寒来暑往，秋收冬藏。\n',
         'def f(x):\n    return {x: 1}  # 你好 😀\r\n'] * 20
NASTY = ['', ' ', '\n', '\n\n\n', '\t', ' lead', 'trail ', '\r\n', 'a\0b', '😀👍🏽', 'é e\u0301',
         '\u3000全角', '\ufeffbom', '\u2028',
         '<s></s><pad><unk><|user|>', '<0x0A>', '[CLS] [MASK] [SEP]', '<|endoftext|>', '<|pad|>', '\u2585', '12345']


def small_hf(folder):
  """A byte-level BPE tokenizer.json with special tokens, and a word-level one whose words are special tokens."""
  bpe = hf.Tokenizer(hf.models.BPE())
  bpe.pre_tokenizer, bpe.decoder = hf.pre_tokenizers.ByteLevel(add_prefix_space=False), hf.decoders.ByteLevel()
  trainer = hf.trainers.BpeTrainer(vocab_size=400, special_tokens=['<|endoftext|>', '<|user|>'], show_progress=False,
                                   initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet())
  bpe.train_from_iterator(TEXTS, trainer)
  folder.mkdir()
  bpe.save(str(folder / 'tokenizer.json'))
  return bpe


@pytest.fixture(scope='module')
def kinds(tmp_path_factory):
  root = tmp_path_factory.mktemp('tokenizers')
  bpe = small_hf(root / 'hf')
  model = json.loads(bpe.to_str())['model']
  (root / 'gpt2').mkdir()
  (root / 'gpt2' / 'encoder.json').write_text(json.dumps(model['vocab']))
  merges = [' '.join(m) if isinstance(m, list) else m for m in model['merges']]
  (root / 'gpt2' / 'vocab.bpe').write_text('#version: 0.2\n' + '\n'.join(merges) + '\n')
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdefghijklmnopqrstuvwxyz[]<>|/', '##a', '##b', '##he']
  (root / 'wordpiece').mkdir()
  (root / 'wordpiece' / 'vocab.txt').write_text('\n'.join(words) + '\n')
  return {
      'byte': tokenizers.byte(), 'char': tokenizers.char([*TEXTS, *NASTY]),
      'unigram': training.train_sentencepiece(TEXTS, root / 'u.model', 340, control_symbols=['<|user|>', '[MASK]']),
      'bpe': training.train_sentencepiece(TEXTS, root / 'b.model', 400, 'bpe', control_symbols=['<|user|>']),
      'hf': tokenizers.load(root / 'hf'), 'gpt2': tokenizers.load(root / 'gpt2' / 'vocab.bpe'),
      'wordpiece': tokenizers.load(root / 'wordpiece')}


EXACT = ['byte', 'char', 'unigram', 'bpe', 'hf', 'gpt2']
KINDS = [*EXACT, 'wordpiece']


@pytest.mark.parametrize('kind', EXACT)
def test_gives_text_back_exactly(kinds, kind):
  for text in {*TEXTS, *NASTY}:
    ids = kinds[kind].encode(text)
    assert ids.dtype == np.int32
    assert kinds[kind].decode(ids) == text


def random_texts(tokenizer, n=200):
  rng = np.random.default_rng(0)
  parts = [*tokenizer.control, *NASTY, 'the ', '你', ' ', 'a']
  return [''.join(rng.choice(parts, rng.integers(1, 8))) for _ in range(n)]


@pytest.mark.parametrize('kind', KINDS)
def test_text_never_makes_a_control_id(kinds, kind):
  tokenizer = kinds[kind]
  if kind != 'char':
    assert tokenizer.control
  for text in random_texts(tokenizer):
    if kind == 'char':
      text = ''.join(c for c in text if c in json.loads(tokenizer.files['char.json'])['chars'])
    ids = tokenizer.encode(text)
    assert not np.isin(ids, list(tokenizer.control.values())).any(), text
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)


def test_control_words_in_a_whitespace_vocabulary_are_still_text(tmp_path):
  model = hf.Tokenizer(hf.models.WordLevel({'[UNK]': 0, '[CLS]': 1, 'a': 2}, unk_token='[UNK]'))
  model.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
  model.add_special_tokens(['[UNK]', '[CLS]'])
  model.save(str(tmp_path / 'tokenizer.json'))
  assert tokenizers.load(tmp_path).encode('a [CLS] a').tolist() == [2, 0, 0, 2]


@pytest.mark.parametrize('kind', KINDS)
def test_saved_tokenizer_is_the_same(kinds, kind, tmp_path):
  kinds[kind].save(tmp_path)
  again = tokenizers.load(tmp_path)
  for field in ('sha256', 'kind', 'vocab_size', 'control', 'bos_id', 'eos_id', 'pad_id'):
    assert getattr(again, field) == getattr(kinds[kind], field)
  assert again.encode(TEXTS[0]).tolist() == kinds[kind].encode(TEXTS[0]).tolist()


def test_saving_replaces_another_tokenizer(kinds, tmp_path):
  for kind in (*KINDS, *reversed(KINDS)):
    kinds[kind].save(tmp_path)
    assert tokenizers.load(tmp_path).sha256 == kinds[kind].sha256


def test_files_of_tokenizers_in_a_folder(kinds, tmp_path):
  assert tokenizer_files.names_in(tmp_path / 'none') == []
  for name in ('en.model', 'tokenizer_config.json', 'merges.txt', 'notes.txt', 'config.json', 'encoder.json'):
    (tmp_path / name).touch()
  assert tokenizer_files.names_in(tmp_path) == ['en.model', 'encoder.json', 'merges.txt']


@pytest.mark.parametrize('kind', KINDS)
def test_long_texts_are_encoded_in_parts_of_the_same_ids(kinds, kind, monkeypatch):
  rng = np.random.default_rng(0)
  pieces = [*TEXTS[:3], 'a\n', 'the fox\n', '\n\n  x', ' \n', '你好。\n', '\n', 'the dog.\n\n', '你好。\n\n']
  for _ in range(50):
    text = ''.join(rng.choice(pieces, 40))
    monkeypatch.setattr(tokenizers, 'PART', 10**6)
    want = kinds[kind].encode(text)
    monkeypatch.setattr(tokenizers, 'PART', 16)
    np.testing.assert_array_equal(kinds[kind].encode(text), want)


@pytest.fixture(scope='module')
def joins_breaks(tmp_path_factory):
  """As Llama 3's: an empty line's two breaks are one token, wherever they stand."""
  bpe = hf.Tokenizer(hf.models.BPE())
  split = hf.pre_tokenizers.Split(hf.Regex(r'\s*[\r\n]+|\s+(?!\S)| ?[^\s]+|\s+'), 'isolated')
  bpe.pre_tokenizer = hf.pre_tokenizers.Sequence([split, hf.pre_tokenizers.ByteLevel(False, use_regex=False)])
  bpe.decoder = hf.decoders.ByteLevel()
  bpe.train_from_iterator(['end.\n\nThe'] * 9, hf.trainers.BpeTrainer(
      vocab_size=300, show_progress=False, initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()))
  folder = tmp_path_factory.mktemp('joins')
  bpe.save(str(folder / 'tokenizer.json'))
  return tokenizers.load(folder)


@pytest.mark.parametrize('kind', ['unigram', 'bpe', 'hf', 'gpt2', 'wordpiece', 'joins_breaks'])
def test_a_long_text_of_paragraphs_is_encoded_in_parts_too(kinds, joins_breaks, kind, monkeypatch):
  t, lengths = (kinds | {'joins_breaks': joins_breaks})[kind], []
  text = 'The quick brown fox, at the end.\n\nThe lazy dog. 你好。\n\n' * 400
  want = t.encode(text)
  if kind == 'joins_breaks':
    assert t.encode('a\n\nb').size == 3
  monkeypatch.setattr(tokenizers, 'PART', 1000)
  spied = dataclasses.replace(t, to_ids=lambda text: lengths.append(len(text)) or t.to_ids(text))
  np.testing.assert_array_equal(spied.encode(text), want)
  assert max(lengths) < 1200
  lengths.clear()
  np.testing.assert_array_equal(spied.encode('a' + ' \n\n b' * 400), t.encode('a' + ' \n\n b' * 400))
  assert len(lengths) == 1  # there is no such place: it is encoded as a whole


def test_sha256_tells_tokenizers_apart(kinds):
  assert len({t.sha256 for t in kinds.values()}) == len(kinds)


def test_document_is_bracketed_by_bos_and_eos(kinds):
  assert kinds['byte'].document('é').tolist() == [0xC3, 0xA9, 256]
  assert kinds['unigram'].document('x')[[0, -1]].tolist() == [2, 1]
  assert kinds['gpt2'].document('x').tolist() == [*kinds['gpt2'].encode('x'), kinds['gpt2'].eos_id]
  assert kinds['wordpiece'].document('a')[[0, -1]].tolist() == [2, 3]
  assert kinds['char'].document('The').tolist() == kinds['char'].encode('The').tolist()


def test_decode_skips_control_ids_and_ids_of_a_padded_head(kinds):
  assert kinds['unigram'].decode([2, *kinds['unigram'].encode('fox'), 1, 100000]) == 'fox'
  assert kinds['byte'].decode([104, 105, 256, 257, 300, -1]) == 'hi'


def test_sentencepiece_training_is_deterministic_and_lays_out_the_control_ids(kinds, tmp_path):
  again = training.train_sentencepiece(TEXTS, tmp_path / 'x.model', 340, control_symbols=['<|user|>', '[MASK]'])
  assert again.sha256 == kinds['unigram'].sha256
  assert again.control == {'<pad>': 0, '</s>': 1, '<s>': 2, '<|user|>': 4, '[MASK]': 5}
  assert again.encode('a\nb').tolist().count(6) == 1  # a newline is one token


@pytest.mark.parametrize('text', ['y' * 4096 + 'zq' * 9000, 'zq\u2585' * 300, 'zq\tzq\n' * 300])
def test_sentencepiece_trains_on_lines_that_its_trainer_would_drop(tmp_path, text):
  tokenizer = training.train_sentencepiece(['other ' * 50, text], tmp_path / 'x.model', 280, 'bpe')
  assert len(tokenizer.encode('zqzqzq')) <= 4


def test_training_on_a_sample_of_lines_is_deterministic_too(tmp_path):
  words = np.random.default_rng(0).choice(list('abcdefghij'), (2000, 6))
  lines = [' '.join((''.join(w), ''.join(w[:3]))) for w in words]
  first, again, everything = (
      training.train_sentencepiece(lines, tmp_path / 'x.model', 300, max_lines=n).sha256 for n in (200, 200, 0))
  assert first == again != everything


@pytest.mark.parametrize('kwargs', [{'vocab': 5000}, {'vocab': 10}, {'vocab': 300, 'model_type': 'word'},
                                    {'vocab': 300, 'max_lines': 9}])
def test_untrainable_is_a_config_error(kwargs, tmp_path):
  with pytest.raises(ConfigError, match='vocab|model_type|max_lines'):
    training.train_sentencepiece(['ab'], tmp_path / 'x.model', **kwargs)


def test_char_names_the_character_it_lacks():
  with pytest.raises(DataError, match=r'character 2: U\+0078'):
    tokenizers.char('ab').encode('abx')
  with pytest.raises(DataError, match='empty'):
    tokenizers.char('')


def test_lone_surrogate_is_a_data_error(kinds):
  for tokenizer in kinds.values():
    with pytest.raises(DataError, match='surrogate'):
      tokenizer.encode('a\ud800')


def test_text_that_spells_a_special_token_is_tokenised_like_any_text(kinds):
  plain = json.loads(kinds['hf'].files['tokenizer.json'])
  plain['added_tokens'] = []
  plain = hf.Tokenizer.from_str(json.dumps(plain))
  text = 'a<|endoftext|> b <|user|>'
  assert kinds['hf'].encode(text).tolist() == plain.encode(text).ids


def test_gpt2_files_and_tokenizer_json_of_one_model_agree(kinds):
  for text in {*TEXTS, *NASTY}:
    assert kinds['gpt2'].encode(text).tolist() == kinds['hf'].encode(text).tolist()


@pytest.mark.parametrize(('name', 'content'), [
    ('x.model', b'junk'), ('tokenizer.json', b'{'), ('vocab.txt', b'\xff'), ('char.json', b'{"chars": "ba"}'),
    ('vocab.json', b'{}'), ('x.zip', b''), ('README', b'')])
def test_damaged_or_unknown_file_is_a_data_error(tmp_path, name, content):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError, match=str(tmp_path)):
    tokenizers.load(tmp_path / name)


def test_nothing_there_is_a_data_error(tmp_path):
  with pytest.raises(DataError, match='no tokenizer inside'):
    tokenizers.load(tmp_path)
  with pytest.raises(DataError, match='no such file'):
    tokenizers.load(tmp_path / 'missing.model')


def test_roles_come_from_the_file_beside_tokenizer_json(tmp_path):
  small_hf(tmp_path / 'hf')
  (tmp_path / 'hf' / 'tokenizer_config.json').write_text(json.dumps(
      {'bos_token': '<|user|>', 'eos_token': {'content': '<|endoftext|>'}}))
  tokenizer = tokenizers.load(tmp_path / 'hf' / 'tokenizer.json')
  assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 0)


@pytest.mark.parametrize('bytes_only', [True, False])
def test_an_end_token_that_is_the_unknown_token_too(tmp_path, bytes_only):
  """As GPT's is often trained: it ends texts; where text could be it, that text is refused."""
  end = '<|endoftext|>'
  pieces = sorted(hf.pre_tokenizers.ByteLevel.alphabet()) if bytes_only else ['a', 'b']
  model = hf.Tokenizer(hf.models.BPE({end: 0} | {c: i for i, c in enumerate(pieces, 1)}, [], unk_token=end))
  if bytes_only:
    model.pre_tokenizer, model.decoder = hf.pre_tokenizers.ByteLevel(add_prefix_space=False), hf.decoders.ByteLevel()
  model.add_special_tokens([end])
  model.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': end}))
  tokenizer = tokenizers.load(tmp_path)
  assert tokenizer.eos_id == 0 and tokenizer.document('a')[-1] == 0
  assert tokenizer.decode([*tokenizer.encode('a'), 0]) == 'a'
  if not bytes_only:
    with pytest.raises(DataError, match="'aé': has characters that are '<.endoftext.>' to the tokenizer"):
      tokenizer.encode('aé')


def test_a_padding_token_that_is_the_unknown_token_too_refuses_no_text(tmp_path):
  model = hf.Tokenizer(hf.models.WordLevel({'<unk>': 0, 'a': 1}, unk_token='<unk>'))
  model.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
  model.add_special_tokens(['<unk>'])
  model.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'pad_token': '<unk>'}))
  assert tokenizers.load(tmp_path).encode('a 你').tolist() == [1, 0]


def test_a_sentencepiece_model_has_what_the_files_beside_it_add(kinds, tmp_path):
  """As chat models of the Llama-2 kind are laid out: ids beyond the model, another end, no bos."""
  kinds['bpe'].save(tmp_path)
  (tmp_path / 'added_tokens.json').write_text('{"<|im_end|>": 400, "<|im_start|>": 401}')
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(
      {'add_bos_token': False, 'eos_token': '<|im_end|>', 'bos_token': {'content': '<s>'}, 'added_tokens_decoder': {
          '2': {'content': '<s>', 'special': True}, '401': {'content': '<|im_start|>', 'special': True}}}))
  found = tokenizers.load(tmp_path)
  assert (found.vocab_size, found.bos_id, found.eos_id, found.pad_id, found.begin) == (402, 2, 400, 0, [])
  assert found.control == kinds['bpe'].control | {'<|im_end|>': 400, '<|im_start|>': 401}
  assert found.encode('the <|im_end|>').tolist() == kinds['bpe'].encode('the <|im_end|>').tolist()
  assert found.decode([401, *found.encode('fox'), 400]) == 'fox'
  found.save(tmp_path / 'again')
  assert tokenizers.load(tmp_path / 'again').sha256 == found.sha256 != kinds['bpe'].sha256
  (tmp_path / 'exported').mkdir()
  for name, content in export.files(found).items():
    (tmp_path / 'exported' / name).write_bytes(content)
  back = tokenizers.load(tmp_path / 'exported')
  assert (back.vocab_size, back.bos_id, back.eos_id, back.begin) == (402, 2, 400, [])
  assert found.control.items() <= back.control.items()
  assert back.encode('the fox\n 你').tolist() == found.encode('the fox\n 你').tolist()


def test_what_begins_a_document_is_said_by_the_files(tmp_path):
  """bos, unless they say that none is added, or it begins the turns of a chat."""
  small_hf(tmp_path / 'hf')
  config = tmp_path / 'hf' / 'tokenizer_config.json'
  plain = hf.Tokenizer.from_file(str(tmp_path / 'hf' / 'tokenizer.json'))
  for adds in (False, True):
    if adds:  # as transformers 5 saves it, which writes no add_bos_token
      plain.post_processor = hf.processors.TemplateProcessing('<|user|> $A', special_tokens=[('<|user|>', 1)])
      plain.save(str(tmp_path / 'hf' / 'tokenizer.json'))
    for said, begin in (({}, [1] * adds), ({'add_bos_token': True}, [1]), ({'add_bos_token': False}, [])):
      config.write_text(json.dumps({'bos_token': '<|user|>', 'eos_token': '<|endoftext|>'} | said))
      tokenizer = tokenizers.load(tmp_path / 'hf')
      assert tokenizer.begin == begin and tokenizer.bos_id == 1
      assert tokenizer.document('x').tolist() == [*begin, *tokenizer.encode('x'), 0]
  turns = dataclasses.replace(tokenizers.byte(), control={'<|im_start|>': 5}, bos_id=5)
  assert turns.begin == [] and dataclasses.replace(turns, control={}).begin == [5]


@pytest.mark.parametrize('kind', KINDS)
def test_pieces_spell_the_text(kinds, kind):
  """Put one after another they are the text's bytes; SentencePiece and WordPiece add a space where a word begins."""
  tokenizer = kinds[kind]
  pieces = vocabulary.pieces(tokenizer)
  assert len(pieces) == tokenizer.vocab_size and all(not pieces[i] for i in tokenizer.control.values())
  for text in ['abb che < d'] if kind == 'wordpiece' else TEXTS[:2]:
    spelled = b''.join(pieces[i] for i in tokenizer.encode(text)).decode()
    assert spelled.removeprefix(' ' if kind in ('unigram', 'bpe', 'wordpiece') else '') == text


def starts_of(tokenizer, text):
  starts = vocabulary.word_starts(tokenizer)
  assert starts.dtype == bool and starts.shape == (tokenizer.vocab_size,)
  assert not starts[list(tokenizer.control.values())].any()
  words, pieces = [], vocabulary.pieces(tokenizer)
  for i in tokenizer.encode(text):
    words += [b''] if starts[i] or not words else []
    words[-1] += pieces[i]
  return [w.decode() for w in words]


@pytest.mark.parametrize('kind', ['unigram', 'bpe', 'hf', 'gpt2', 'byte', 'char'])
def test_words_begin_after_spaces_and_at_every_chinese_character(kinds, kind):
  words = starts_of(kinds[kind], 'The lazy dog jumps,\nover 天地。')
  words = [w for w in words if w.strip(' ')]
  assert [w.strip(' ') for w in words[:5]] == ['The', 'lazy', 'dog', 'jumps', ',']
  assert ''.join(w.strip(' \n') for w in words[5:]) == 'over天地。'
  assert [w.strip(' ') for w in words[-3:]] == ['天', '地', '。']


@pytest.mark.parametrize('more, said, lower', [
    ((), None, True), (('<S>', '<T>'), None, True), (('Paris',), None, False), (('<S>', '<T>'), False, False),
    (('Paris',), True, True)])
def test_case_of_wordpiece(tmp_path, more, said, lower):
  """What the config beside the vocabulary says, else whether it has capitals; Chinese BERT's <S> and <T> are none."""
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *more, 'a', '##i', '好']
  (tmp_path / 'vocab.txt').write_text('\n'.join(words) + '\n', encoding='utf-8')
  if said is not None:
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'do_lower_case': said}))
  found = tokenizers.load(tmp_path / 'vocab.txt')
  assert (found.encode('AI好').tolist() == found.encode('ai好').tolist()) == lower
  found.save(tmp_path / 'kept')
  assert tokenizers.load(tmp_path / 'kept').encode('AI好').tolist() == found.encode('AI好').tolist()


def test_words_of_wordpiece(kinds, tmp_path):
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'un', '##aff', '##able', '天', '地', ',', 'a']
  (tmp_path / 'vocab.txt').write_text('\n'.join(words) + '\n')
  found = starts_of(tokenizers.load(tmp_path / 'vocab.txt'), 'unaffable, a 天地')
  assert found == [' unaffable', ' ,', ' a', ' 天', ' 地']
  assert vocabulary.word_starts(kinds['wordpiece'])[-3:].tolist() == [False] * 3


@pytest.mark.parametrize('kind', KINDS)
def test_sentence_ends(kinds, kind):
  pieces = [p.decode(errors='replace') for p in vocabulary.pieces(kinds[kind])]
  ends, closers = vocabulary.sentence_ends(kinds[kind])
  assert ends.dtype == closers.dtype == bool and not (ends & closers).any()
  for i, piece in enumerate(pieces):
    assert ends[i] == (piece.rstrip(' )]}"\'”’」』）》】〉\r')[-1:] in tuple('.!?。！？；…｡\n')), piece
    assert not closers[i] or piece.strip(' ')[0] in ')]}"\'”’」』）》】〉\r'
  if kind in ('unigram', 'hf', 'char'):
    assert {'.', '\n'} <= {p.strip(' ') or p for i, p in enumerate(pieces) if ends[i]}


def test_special_ids(kinds, tmp_path):
  assert vocabulary.special_ids(kinds['wordpiece']) == vocabulary.Special(2, 3, 4, 0)
  assert vocabulary.special_ids(kinds['unigram']) == vocabulary.Special(cls=2, sep=1, mask=5, pad=0)
  trained = training.train_sentencepiece(TEXTS, tmp_path / 'x.model', 340,
                                           control_symbols=['[CLS]', '[SEP]', '[MASK]'])
  assert vocabulary.special_ids(trained) == vocabulary.Special(4, 5, 6, 0)
  assert not np.isin(trained.encode('[CLS] 天地[MASK]<pad>[SEP]'), [0, 4, 5, 6]).any()
  names = ['<s>', '<pad>', '</s>', '<unk>', '<mask>']
  model = hf.Tokenizer(hf.models.BPE({n: i for i, n in enumerate([*names, 'a', 'Ġ'])}, []))
  model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.add_special_tokens(names)
  model.save(str(tmp_path / 'tokenizer.json'))
  roberta = tokenizers.load(tmp_path / 'tokenizer.json')
  assert vocabulary.special_ids(roberta) == vocabulary.Special(0, 2, 4, 1)
  assert vocabulary.pieces(roberta) == [b''] * 5 + [b'a', b' ']


@pytest.mark.parametrize('kind', ['byte', 'char', 'bpe', 'hf', 'gpt2'])
def test_without_a_mask_token_one_line_says_what_to_do(kinds, kind):
  with pytest.raises(ConfigError, match=r"vocabulary without a mask token.*--control_symbols='\[CLS\]") as error:
    vocabulary.special_ids(kinds[kind])
  assert '\n' not in str(error.value)
