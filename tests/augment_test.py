"""Augmentation keeps what a label may hang on; a function of (text, generator). Noise, back-translation, files."""

from collections import Counter
import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pypinyin
import pytest

from lm.data.corpora import Document
from lm.errors import ConfigError, DataError
from lm.text import augment, noise, synonyms
from lm.text.augment import chain, choose, fixed, keeps, with_probability

ROOT = pathlib.Path(__file__).parent.parent
ENGLISH = ('The staff were friendly and helpful, but the narrow room smelled of cigarette smoke. However, breakfast '
           'was excellent! If the price stays low, travellers will certainly return here. We liked the garden because '
           'the children could play outside; the swimming pool was clean.')
CHINESE = ('这家宾馆的服务员很热情，房间也非常干净。早餐的品种比较丰富，味道很好！因为宾馆就在火车站旁边，'
           '所以出门很方便。价钱便宜；环境安静。如果下次来旅游，我们会选择这里。')
TRADITIONAL = '這間旅館的服務很好，房間很乾淨。因為離車站很近，所以出門很方便。'
KEPT = ("I don't think it isn't good, no: see https://a.com/x?y=1, mail me.too@mail.co.uk or run `rm -rf x` 3.5 times! "
        'Twenty-one people never saw GPT-4 cost $1,000.50 on 2024-01-02; {name} <|im_start|> [MASK] cannot. '
        '我没有看过3部电影，不是吗？未来无法预测，请别在2024年12月31日访问www.x.cn，一共五千六百元。'
        'Zoe Kowalski likes 小明的书.')
PROTECTED = ("don't", "isn't", 'no', 'https://a.com/x?y=1', 'me.too@mail.co.uk', '`rm -rf x`', '3.5', 'Twenty', 'one',
             'never', 'GPT-4', '$1,000.50', '2024-01-02', '{name}', '<|im_start|>', '[MASK]', 'cannot', '没', '3', '不',
             '未', '无', '别', '2024', '12', '31', 'www.x.cn', '五千六百', 'Kowalski', '小明')
TEXTS = [
    '', ' ', '\n\n', 'a', 'I', '好', '!', '。', '3', '不', '😀', '👩\u200d👩\u200d👧❤\ufe0f 1\ufe0f\u20e3', 'No.',
    '不。', 'ok 😀 好的', 'Hi!Hi!', '。。。', '\u0301x', 'e\u0301te\u0301s', 'ЖИЗНЬ хороша, और हिन्दी भी। ภาษาไทย',
    'العربية 한국어 かな', '<b>bold</b> & [INST] {x}', '"Quoted. Text." (A. B.) end', 'Mr. X.\n\n1. One.\n2. Two.',
    '𠀀𠀁𠀂', '我用iPhone拍了3张照片, very nice! 真的不错。', 'x' * 300, '好' * 300, 'No numbers? None. 无。',
    '\r\nline\u2028sep\t tab', ENGLISH, CHINESE, TRADITIONAL, KEPT]
BACK = {'excellent': 'superb', '热情': '友好', 'good': 'not good'}  # the last one must never come through


def rng(seed=0):
  return np.random.default_rng(seed)


def reverse(texts):
  return [text[::-1] for text in texts]


def back(texts):
  out = reverse(texts)
  for old, new in BACK.items():
    out = [text.replace(old, new) for text in out]
  return out


def augments(rate, protect=()):
  return {
      'typos': noise.typos(rate, protect=protect),
      'typos of words': noise.typos(rate, choose(noise.exchange, noise.omit), protect, noise.chinese_words),
      'misread': noise.typos(rate, noise.misread, protect),
      'homophones': noise.homophones(rate, protect),
      'punctuation': noise.punctuation(rate, protect),
      'case': noise.case(rate, protect),
      'sentences': noise.shuffle_sentences(rate, protect),
      'clauses': synonyms.reorder_clauses(rate, protect),
      'cilin': synonyms.cilin(rate, protect),
      'back translation': augment.back_translate(reverse, back, rate, protect),
  }


ALL = augments(1.0, ('Kowalski', '小明'))
NONE = augments(0.0)


@pytest.mark.parametrize('name', ALL)
def test_every_augmentation_of_every_text_keeps_what_is_protected_and_is_never_empty(name):
  for text in TEXTS:
    for seed in range(8):
      new = ALL[name](text, rng(seed))
      assert bool(new.strip()) == bool(text.strip()), (text, new)
      assert keeps(text, new, ('Kowalski', '小明')), (text, new)
      new.encode()


@pytest.mark.parametrize('name', ALL)
def test_protected_parts_are_there_letter_by_letter(name):
  for seed in range(20):
    new = ALL[name](KEPT, rng(seed))
    assert [new.count(part) >= KEPT.count(part) for part in PROTECTED] == [True] * len(PROTECTED), new
    assert sorted(re.findall(r'\d+', new)) == sorted(re.findall(r'\d+', KEPT)), new


@pytest.mark.parametrize('name', ALL)
def test_a_generator_decides_everything(name):
  for text in TEXTS:
    assert ALL[name](text, rng(5)) == ALL[name](text, rng(5))


@pytest.mark.parametrize('name', ALL)
def test_each_language_changes_where_it_should(name):
  for text, others in ((ENGLISH, ('homophones', 'cilin')), (CHINESE, ('typos', 'case'))):
    found = {ALL[name](text, rng(seed)) for seed in range(20)}
    assert found == {text} if name in others else found - {text}


@pytest.mark.parametrize('name', NONE)
def test_rate_zero_is_the_identity(name):
  assert [NONE[name](text, rng(seed)) for text in TEXTS for seed in range(3)] == [t for t in TEXTS for _ in range(3)]


def share(f, text, segment, draws=150):
  """Mean share of the words of `text` that differ, for augmentations that keep the number of words."""
  before, changed = [text[a:b] for a, b in segment(text)], 0
  for seed in range(draws):
    new = f(text, rng(seed))
    after = [new[a:b] for a, b in segment(new)]
    assert len(after) == len(before), new
    changed += sum(x != y for x, y in zip(before, after, strict=True))
  return changed / draws / len(before)


@pytest.mark.slow
@pytest.mark.parametrize('rate', [0.03, 0.1, 0.3])
def test_the_share_of_changed_words_is_the_rate(rate):
  for f in (noise.typos(rate), noise.case(rate), noise.typos(rate, noise.misread)):
    assert share(f, ENGLISH, augment.words) == pytest.approx(rate, abs=0.1 * rate + 0.002)
  assert share(noise.homophones(rate), CHINESE, augment.words) == pytest.approx(rate, abs=0.1 * rate + 0.002)


def test_the_share_of_marks_and_sentences_is_the_rate():
  text = 'a, b; c: d? ' * 10
  def marks(text):
    return [m[0] for m in re.finditer(r'(?<=[a-d])\W+', text)]
  changed = [sum(x != y for x, y in zip(marks(text), marks(noise.punctuation(0.25)(text, rng(s))), strict=True))
             for s in range(50)]
  assert set(changed) == {10}  # a quarter of 40, dropped or doubled
  text = ' '.join(f'Sentence {c} here.' for c in 'abcdefghij')
  moved = [sum(x != y for x, y in zip(text.split('.'), noise.shuffle_sentences(0.25)(text, rng(s)).split('.'),
                                      strict=True)) for s in range(400)]
  assert np.mean(moved) / 10 == pytest.approx(0.25, abs=0.04)


def test_fewer_change_where_fewer_can():
  assert noise.homophones(1.0)('ok 好', rng()) != 'ok 好'
  assert noise.homophones(1.0)('ok ok', rng()) == 'ok ok'
  assert noise.typos(1.0)('no 3 not never', rng()) == 'no 3 not never'


@pytest.mark.parametrize('text, want', [
    ("I don't, isn’t and can't", ["don't", 'isn’t', "can't"]),
    ('No nothing notable; noon, none, NEVER', ['No', 'nothing', 'none', 'NEVER']),
    ('v1.2.3 3rd 1,000.50 50% 12:30 $5 -4 x2', ['v1.2.3', '3rd', '1,000.50', '50%', '12:30', '$5', '-4', 'x2']),
    ('COVID-19 and GPT-4o', ['COVID-19', 'GPT-4o']),
    ('one someone Twenty-two first', ['one', 'Twenty', 'two', 'first']),
    ('见https://a.com/b?c=1，a@b.co和www.x.cn。', ['https://a.com/b?c=1', 'a@b.co', 'www.x.cn']),
    ('go to example.com/a or end.Start', ['example.com/a']),
    ('`a b` ```c\nd``` `e', ['`a b`', '```c\nd```']),
    ('<s> a < b </s> <|user|> [INST] [x] {a} @me #tag', ['<s>', '</s>', '<|user|>', '[INST]', '{a}', '@me', '#tag']),
    ('我不知道，没人来，别去，二十一个，３个', ['不', '没', '别', '二十一', '３']),
    ("one's own; nobody's", ["one's", "nobody's"]),
    ("isn´t isn`t doesn‘t wouldn't've noone unable", ['isn´t', 'isn`t', 'doesn‘t', "wouldn't've", 'noone', 'unable']),
    ('唔好睇，冇意思', ['唔', '冇']),
    ('today :( and :-D; a:b (x) http://a.b/c', [':(', ':-D', 'http://a.b/c']),
])
def test_what_is_fixed(text, want):
  assert [text[a:b] for a, b in fixed(text)] == want


def test_protected_words_are_whole_words_in_any_case_or_chinese_anywhere():
  text = 'Apple apples APPLE; 用Apple的苹果。New York, a.b'
  found = [text[a:b] for a, b in fixed(text, ['apple', '苹果', 'new york', 'a.b'])]
  assert found == ['Apple', 'APPLE', 'Apple', '苹果', 'New York', 'a.b']


@pytest.mark.parametrize('before, after, kept', [
    ("It isn't bad.", 'It is not bad.', True),
    ("It isn't bad.", 'It is bad.', False),
    ('It isn´t bad.', 'It is bad.', False),
    ('It is bad.', 'It is no bad.', False),
    ('3 of 5', '5 of 3', True),
    ('3 of 5', '3 of 4', False),
    ('他不来', '他来', False),
    ('他不来', '他没来', True),
    ('Ann left', 'she left', False),
])
def test_keeps(before, after, kept):
  assert keeps(before, after, ['Ann']) == kept


@pytest.mark.parametrize('text, want', [
    ('Mr. Smith came. He left! Why? Ok', ['Mr. Smith came.', 'He left!', 'Why?', 'Ok']),
    ('It cost 3.14 at a.com. So "it is. That" ended.', ['It cost 3.14 at a.com.', 'So "it is. That" ended.']),
    ('你好！今天“真好。走吧。”是吗？走了', ['你好！', '今天“真好。走吧。”', '是吗？', '走了']),
    ('好!真棒!! end\nnew  \n\nline', ['好!', '真棒!!', 'end', 'new', 'line']),
    ('1. First. 2. Second.', ['1. First.', '2. Second.']),
    ('Wait ... for it. (One. Two.) Three.', ['Wait ... for it.', '(One. Two.)', 'Three.']),
    ('', []), ('  \n ', []),
])
def test_sentences(text, want):
  assert [text[a:b] for a, b in augment.sentences(text)] == want


def test_words():
  text = "Don't 我们用iPhone拍 café e\u0301te\u0301 'quoted' naïve—yes x2 😀 かな"
  assert [text[a:b] for a, b in augment.words(text)] == [
      "Don't", '我', '们', '用', 'iPhone', '拍', 'café', 'e\u0301te\u0301', 'quoted', 'naïve', 'yes', 'x', 'か', 'な']


def test_combinators():
  up, mark = (lambda text, _: text.upper()), (lambda text, _: text + '!')
  assert chain()('a', rng()) == 'a' and chain(up, mark, mark)('a', rng()) == 'A!!'
  found = Counter(choose(up, mark)('a', rng(s)) for s in range(400))
  assert set(found) == {'A', 'a!'} and abs(found['A'] - 200) < 60
  found = Counter(with_probability(0.25, up)('a', rng(s)) for s in range(400))
  assert 60 < found['A'] < 140
  assert with_probability(0, up)('a', rng()) == 'a' and with_probability(1, up)('a', rng()) == 'A'


@pytest.mark.parametrize('make', [
    lambda: choose(), lambda: with_probability(1.5, chain()), lambda: noise.typos(-0.1), lambda: noise.homophones(2),
    lambda: noise.shuffle_sentences(float('nan')), lambda: synonyms.reorder_clauses(7),
    lambda: augment.back_translate(reverse, reverse, 1.1), lambda: augment.optional('no_such_package')])
def test_what_cannot_be_is_a_config_error(make):
  with pytest.raises(ConfigError, match='expected'):
    make()


def test_an_epoch_sees_the_same_text_on_every_host_and_after_every_resume():
  f = noise.typos(0.3)
  see = lambda index, epoch, seed: augment.augmented(ENGLISH, f, index, epoch, seed)
  want = {(i, e, s): see(i, e, s) for i in range(3) for e in range(3) for s in range(2)}
  assert len(set(want.values())) == len(want)
  assert {key: see(*key) for key in reversed(want)} == want


def test_slips_of_single_words():
  keys = {noise.neighbour('cat', rng(s)) for s in range(200)}
  assert {'cst', 'cqt', 'cwt', 'czt', 'car', 'cay'} <= keys and all(k[0] == 'c' and len(k) == 3 for k in keys)
  assert {noise.neighbour('CAT', rng(s))[0] for s in range(9)} == {'C'} and noise.neighbour('CAT', rng()).isupper()
  assert {noise.exchange('abcd', rng(s)) for s in range(50)} == {'acbd', 'abdc'}
  assert noise.exchange('高兴', rng()) == '兴高' and noise.exchange('好', rng()) == '好'
  assert {noise.omit('abcd', rng(s)) for s in range(50)} == {'acd', 'abd', 'abc'} and noise.omit('abc', rng()) == 'abc'
  assert {noise.repeat('abc', rng(s)) for s in range(50)} == {'abbc', 'abcc'}
  assert {noise.misread('modern', rng(s)) for s in range(200)} >= {'rnodern', 'modem', 'modcrn', 'nnodern'}
  assert noise.misread('己', rng()) == '已' and noise.misread('e\u0301e', rng()) == 'e\u0301e'


def test_homophones_sound_the_same_in_their_context_and_stay_in_their_script():
  f = noise.homophones(1.0)
  for seed in range(30):
    assert pypinyin.lazy_pinyin(f('银行很忙', rng(seed))[1]) == ['hang']  # as 行 is read here, not xing
  for text, code in (('说话头门', 'gb2312'), ('說話頭門', 'big5')):
    found = {c for seed in range(60) for c in f(text, rng(seed))}
    assert len(found) > 12 and ''.join(found).encode(code)
  for seed in range(9):  # pypinyin knows the readings of 银行 and 音乐 only as these
    assert [f('銀行音樂', rng(seed))[i] for i in (1, 3)] == ['行', '樂']
  assert '卖' not in ''.join(f('买书', rng(seed)) for seed in range(99))
  assert not fixed(''.join(f('是不是试一试', rng(seed)).replace('不', '').replace('一', '') for seed in range(60)))


def test_punctuation_makes_no_number_and_joins_no_words():
  for seed in range(60):
    new = noise.punctuation(1.0)('他说：3，5和a.b都好，好。', rng(seed))
    assert '3，5' in new and 'a.b' in new
  found = {noise.punctuation(1.0)('好，好', rng(s)) for s in range(40)}
  assert found == {'好好', '好，，好', '好,好'}


def test_sentences_move_with_what_refers_to_them():
  text = 'The room was big. However, it smelled. Was breakfast good? Yes. I left\nA new line.'
  found = {noise.shuffle_sentences(1.0)(text, rng(s)) for s in range(20)}
  assert found == {'Was breakfast good? Yes. The room was big. However, it smelled. I left\nA new line.'}
  assert noise.shuffle_sentences(1.0)('房间很大。但是很贵。早餐好。', rng()) == '早餐好。房间很大。但是很贵。'
  mixed = 'One here. 好的。Two here.'
  assert {noise.shuffle_sentences(1.0)(mixed, rng(s)) for s in range(9)} == {mixed}


def test_back_translation_takes_sentences_in_batches_and_rejects_what_changes_the_label():
  calls = []

  def to(texts):
    calls.append(len(texts))
    return reverse(texts)
  texts = ['Breakfast was excellent. It was good. It was good.', '服务员很热情。', 'excellent 5']
  f = augment.back_translate(to, back, texts=texts, batch=3)
  assert calls == [3, 1]
  assert [f(text, rng()) for text in texts] == [
      'Breakfast was superb. It was good. It was good.', '服务员很友好。', 'Superb 5'.lower()]
  assert calls == [3, 1]
  assert f('An excellent day.', rng()) == 'An superb day.' and calls == [3, 1, 1]
  for bad in ('', 'x', 'A day at a.com.', 'A 4 day.', 'Words that are many times as long as they were before, indeed.'):
    worse = augment.back_translate(lambda texts: texts, lambda texts, bad=bad: [bad] * len(texts))
    assert worse('A long day.', rng()) == 'A long day.'
  with pytest.raises(DataError, match='0 texts for 1'):
    augment.back_translate(lambda texts: [], reverse)('A day.', rng())


def test_a_rate_of_the_sentences_is_translated():
  text = ' '.join(['An excellent day.'] * 20)
  f = augment.back_translate(reverse, back, rate=0.25, texts=[text])
  assert np.mean([f(text, rng(s)).count('superb') for s in range(50)]) == pytest.approx(5, abs=0.01)


PROGRAM = '''#!/bin/sh
if [ "$1" = -l ]; then printf '  eng-xyz\\n  xyz-eng\\n  bad-bad\\n'; exit; fi
[ "$2" = bad-bad ] && { echo broken >&2; exit 7; }
tr a-z A-Z
'''


def test_apertium_is_called_once_for_many_texts(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(ConfigError, match='apertium: no such program'):
    augment.apertium('eng-xyz')
  (tmp_path / 'apertium').write_text(PROGRAM)
  (tmp_path / 'apertium').chmod(0o755)
  monkeypatch.setenv('PATH', f'{tmp_path}:/usr/bin:/bin')
  translate = augment.apertium('eng-xyz')
  assert translate(['one\ntwo', '', '好 three']) == ['ONE TWO', '', '好 THREE'] and translate([]) == []
  with pytest.raises(ConfigError, match="'fra-eng' is not installed; expected one of eng-xyz, xyz-eng"):
    augment.apertium('fra-eng')
  with pytest.raises(DataError, match='exit status 7'):
    augment.apertium('bad-bad')(['x'])


@dataclasses.dataclass(frozen=True)
class Labelled:
  text: str
  label: str
  split: str | None
  metadata: dict = dataclasses.field(default_factory=dict)


EXAMPLES = [Document('a', ENGLISH, 'train', 'pos'), Document('b', CHINESE, 'train', 'neg'),
            Document('c', ENGLISH + ' Yes.', 'validation', 'pos'), Document('d', '😀', 'train', 'neg'),
            Document('e', 'kept', 'test', 'neg')]


def test_apply_copies_training_examples_only_and_says_from_where():
  f = chain(noise.typos(0.1), noise.homophones(0.1))
  made = augment.apply(EXAMPLES, f, seed=3, copies=2)
  assert [d.id for d in made] == ['a', 'a#0', 'a#1', 'b', 'b#0', 'b#1', 'c', 'd', 'e']
  assert [d for d in made if '#' not in d.id] == EXAMPLES
  for index, original in enumerate(EXAMPLES[:2]):
    copies = [d for d in made if d.id.startswith(original.id + '#')]
    assert {(d.label, d.split) for d in copies} == {(original.label, 'train')}
    assert [d.text for d in copies] == [augment.augmented(original.text, f, index, n, 3) for n in range(2)]
  assert made == augment.apply(EXAMPLES, f, seed=3, copies=2) != augment.apply(EXAMPLES, f, seed=4, copies=2)


def test_apply_leaves_out_what_is_there_already():
  examples = [Document('a', 'one', 'train'), Document('b', 'two', 'train'), Document('c', 'ONE', 'validation')]
  assert augment.apply(examples, lambda text, _: text.upper(), 0, copies=5) == [
      examples[0], examples[1], Document('b#0', 'TWO', 'train'), examples[2]]


def test_apply_marks_metadata_where_there_is_no_id():
  made = augment.apply([Labelled('x', 'l', 'train', {'k': 1})], lambda text, _: 'y', 0)
  assert made[1] == Labelled('y', 'l', 'train', {'k': 1, 'origin': '0#0'})


@dataclasses.dataclass(frozen=True)
class Bare:
  text: str
  split: str


@pytest.mark.parametrize('examples, split, part', [
    (EXAMPLES, 'validation', 'held-out examples stay'), (EXAMPLES, 'test', 'held-out'), (EXAMPLES, 'dev', 'held-out'),
    (EXAMPLES, '', 'held-out'), (EXAMPLES, 'train2', 'no example'), ([], 'train', 'no example'),
    ([*EXAMPLES, Document('f', 'x')], 'train', 'example 5: no split'), ([Bare('x', 'train')], 'train', 'no field to m'),
])
def test_apply_refuses(examples, split, part):
  with pytest.raises(ConfigError, match=part):
    augment.apply(examples, lambda text, _: text + '!', 0, split=split)


@pytest.mark.slow
def test_the_script_writes_copies_of_training_examples(tmp_path):
  rows = [{'text': ENGLISH, 'label': 'pos', 'split': 'train', 'stars': 5},
          {'text': CHINESE, 'split': 'train', 'id': 'z'}, {'text': CHINESE + '嗯。', 'label': 1, 'split': 'test'}]
  (tmp_path / 'in.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  arguments = (f'--in={tmp_path}/in.jsonl', f'--out={tmp_path}/new/out.jsonl', '--copies=2', '--protect=staff',
               '--methods=clauses+typos:0.1+homophones:0.2')
  done = subprocess.run([sys.executable, '-m', 'scripts.augment', *arguments], cwd=ROOT, capture_output=True, text=True,
                        timeout=120, check=False)
  assert done.returncode == 0, done.stderr
  out = [json.loads(line) for line in (tmp_path / 'new' / 'out.jsonl').read_text(encoding='utf-8').splitlines()]
  assert [row for row in out if 'origin' not in row] == [
      rows[0] | {'id': '1'}, rows[1], rows[2] | {'id': '3'}]  # so that copies can be told to be of them
  assert [(row['id'], row['origin']) for row in out if 'origin' in row] == [
      ('1#0', '1'), ('1#1', '1'), ('z#0', 'z'), ('z#1', 'z')]
  assert out[1] == rows[0] | {'id': '1#0', 'origin': '1', 'text': out[1]['text']} and 'staff' in out[1]['text']
  assert 'train        pos                      1         2         0' in done.stdout and '+ ' in done.stdout


@pytest.mark.slow
def test_both_texts_of_a_pair_are_reworded_and_no_copy_is_a_held_out_text(tmp_path):
  rows = [{'text': ENGLISH, 'text_pair': CHINESE, 'split': 'train'}, {'text': 'ab', 'split': 'train'},
          {'text': 'AB ', 'split': 'test'}, {'text': 'aB', 'split': 'validation'}]
  (tmp_path / 'in.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  flags = [f'--in={tmp_path}/in.jsonl', f'--out={tmp_path}/out.jsonl', '--methods=typos:0.3+homophones:0.3+case:1']
  done = subprocess.run([sys.executable, '-c', DRIVER], cwd=ROOT, input=json.dumps([flags]), capture_output=True,
                        text=True, timeout=120, check=False)
  assert done.returncode == 0, done.stderr
  out = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text(encoding='utf-8').splitlines()]
  assert [row['id'] for row in out] == ['1', '1#0', '2', '3', '4']
  first, second = out[1]['text'], out[1]['text_pair']
  assert first != ENGLISH and keeps(ENGLISH, first) and second != CHINESE and keeps(CHINESE, second)


FAULTS = [
    ('{"text": "a", "text_pair": 3, "split": "train"}', ['--methods=typos'], 3, '.jsonl:1: text_pair is no string'),
    ('{"text": "a", "split": "train"}', ['--methods=typo'], 2, 'did you mean typos?'),
    ('{"text": "a", "split": "train"}', ['--methods=typos:x'], 2, "'x' is no number"),
    ('{"text": "a", "split": "train"}', ['--methods=typos:2'], 2, 'expected 0 to 1'),
    ('{"text": "a", "split": "train"}', [], 2, '--methods: not given'),
    ('{"text": "a", "split": "train"}', ['--methods=typos', '--out=README.md'], 2, 'README.md: exists already'),
    ('{"text": "a", "split": "train"}', ['--methods=typos', '--split=validation'], 2, 'held-out'),
    ('{"text": "a", "split": "train"}', ['--methods=synonyms_en', '--wordnet=nowhere'], 2, 'nowhere: no cntlist.rev'),
    ('{"text": "a", "split": "train"}', ['--methods=back_translation', '--translate=eng-spa'], 2, 'expected two pairs'),
    ('{"text": "a"}', ['--methods=typos'], 3, '.jsonl:1: no split'),
    ('{"text": 3, "split": "train"}', ['--methods=typos'], 3, '.jsonl:1: no text'),
    ('[1]', ['--methods=typos'], 3, '.jsonl:1: no text'),
    ('{"text": "a"', ['--methods=typos'], 3, '.jsonl:1: '),
]
# One process for all: starting one takes longer than the rest.
DRIVER = """
import json, sys
from absl import flags
from lm.errors import Error
from scripts import augment
for arguments in json.load(sys.stdin):
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()
  flags.FLAGS(['augment', *arguments])
  try:
    print(augment.main([]))
  except Error as error:
    print(error.code, error)
"""


@pytest.mark.slow
def test_the_script_says_what_is_wrong(tmp_path):
  arguments = []
  for number, (line, flags, _, _) in enumerate(FAULTS):
    (tmp_path / f'{number}.jsonl').write_text(line)
    arguments.append([f'--in={tmp_path}/{number}.jsonl', f'--out={tmp_path}/out.jsonl', *flags])
  done = subprocess.run([sys.executable, '-c', DRIVER], cwd=ROOT, input=json.dumps(arguments), capture_output=True,
                        text=True, timeout=120, check=False)
  found = done.stdout.splitlines()
  assert len(found) == len(FAULTS), done.stderr
  for (line, flags, code, part), message in zip(FAULTS, found, strict=True):
    assert message.startswith(f'{code} ') and part in message, (line, flags, message)
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f'{n}.jsonl' for n in range(len(FAULTS)))
