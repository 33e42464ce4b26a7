"""Rewordings that keep the meaning: synonyms (WordNet, Cilin), and clauses in another order.

All of them rather leave a text alone than spoil it: a word is replaced only where it has one usual reading, a clause
moves only across a border that nothing else could be.
"""

from collections.abc import Collection, Mapping
import dataclasses
import functools
import os
import pathlib
import re

import numpy as np

from lm.errors import ConfigError, DataError
from lm.text.augment import Augment, check_rate, edit, HAN, keeps, optional, replace, sentences, some
from lm.text.noise import chinese_words, GO_ON, segmenter

DEBIAN = '/usr/share/wordnet'
# A part of speech, and in it a sense, that text annotated with senses has this often, is what a word means.
POS_SHARE, SENSE_SHARE = 0.8, 0.6
RARER = 20  # a synonym may be this many times as rare as the word
_FILES = {'n': 'noun', 'v': 'verb', 'a': 'adj', 'r': 'adv'}
_TAGS = {'n': ('NN', 'NNS'), 'v': ('VB', 'VBP', 'VBZ', 'VBD', 'VBN', 'VBG'), 'a': ('JJ', 'JJR', 'JJS'),
         'r': ('RB', 'RBR', 'RBS')}
_UNIVERSAL = {'NOUN': 'n', 'VERB': 'v', 'ADJ': 'a', 'ADV': 'r'}
# Closed classes, which WordNet reads as chemical elements, units or states: 'in', 'as', 'he', 'or'.
_CLOSED = frozenset(
    'a about above across after again against all along also although always am among an and another any anything are '
    'around as at away back be because been before behind being below between both but by came can come could did do '
    'does doing done down during each either else enough even ever every everything few for from further get gets go '
    'goes going gone got had has have having he her here hers him his how however i if in inside into is it its just '
    'least less let lets like made make many may me might mine more most much must my near of off on only onto '
    'or other our out outside over own past per put quite rather really said same say says shall she should since so '
    'some something somewhat still such take than that the their them then there these they thing things this those '
    'though through to together too took toward under until up upon us very was we well went were what when where '
    'whether which while who whole whom whose why will with within would yet you your'.split())
_PARTICLES = re.compile(r'\s+(?:up|out|off|on|down|over|away|back|in|into|around|along|through)\b', re.IGNORECASE)
_ARTICLE = re.compile(r'(?<![^\W\d_])(an?)\s+$', re.IGNORECASE)
_AFTER_A, _AFTER_AN = re.compile('(?!hour|hono|hones|heir)[b-df-hj-np-tv-z]'), re.compile('(?!eu|ewe|once|one)[aeio]')
_HAN = re.compile(f'[{HAN}]+')
_DIRECTION, _RESULT = re.compile('[来去]'), '到上下起出开住完掉成着见给'  # these make another word of a verb


@dataclasses.dataclass(frozen=True)
class Sense:
  """The first sense of a lemma: where its synset stands in the data file, and how often it and all others were seen."""

  offset: int
  senses: int
  first: int
  total: int


@dataclasses.dataclass(frozen=True, eq=False)
class Wordnet:
  """WordNet's database: senses by (lemma, one of n v a r), and the data files as they are."""

  senses: Mapping[tuple[str, str], Sense]
  data: Mapping[str, bytes]

  def reading(self, word: str) -> tuple[str, str] | None:
    """(lemma, part of speech) of a lower-case word, if one part of speech and one sense of it prevail by far."""
    lemmas = [(lemma, _UNIVERSAL[tag]) for tag, forms in optional('lemminflect').getAllLemmas(word).items()
              if tag in _UNIVERSAL for lemma in forms] + [(word, pos) for pos in _FILES]
    found = {key: self.senses[key].total for key in lemmas if key in self.senses}
    if not found:
      return None
    best = max(found, key=found.get)
    if best[0] != word and any((word, pos) in found for pos in _FILES):
      return None  # 'compelling' is more than a form of 'compel'
    sense, total = self.senses[best], sum(found.values())
    one_pos = len(found) == 1 or 0 < POS_SHARE * total <= found[best]
    one_sense = sense.senses == 1 or 0 < SENSE_SHARE * sense.total <= sense.first
    return best if one_pos and one_sense else None

  def synonyms(self, word: str) -> tuple[str, dict[str, int]]:
    """(part of speech, {synonym in the same form: how often it was seen}) of a lower-case word; ('', {}) of most."""
    if word in _CLOSED or (reading := self.reading(word)) is None:
      return '', {}
    lemma, pos = reading
    inflect = lambda lemma, tag: optional('lemminflect').getInflection(lemma, tag, inflect_oov=False)[:1]
    tags = [tag for tag in _TAGS[pos] if word in inflect(lemma, tag)]
    mine, found = self.senses[reading], {}
    for other in self._members(pos, mine.offset) if tags else ():
      its = self.senses.get((other, pos))
      if its is None or its.offset != mine.offset or its.first * RARER < max(mine.first, 1) or (
          other == lemma or other in _CLOSED or self.reading(other) != (other, pos)):
        continue
      forms = set.intersection(*({*inflect(other, tag)} for tag in tags))
      found |= {form: its.first for form in forms if form.isalpha() and form != word}
    return pos, found

  def _members(self, pos, offset):
    """Lemmas of a synset that are one word in lower case, and stand where any word of their class may."""
    line = self.data[pos][offset:self.data[pos].find(b'\n', offset)].decode(errors='replace').split()
    if line[:1] != [f'{offset:08}'] or len(line) < 6:
      raise DataError(f'data.{_FILES[pos]}: no synset at byte {offset}; expected the data file of the same WordNet as '
                      'the index; install it again')
    return [lemma for lemma in line[4:4 + 2 * int(line[3], 16):2] if lemma.isalpha() and lemma.islower()]


def load_wordnet(folder: str | os.PathLike = DEBIAN) -> Wordnet:
  """Reads the database of WordNet 3: index.*, data.* and cntlist.rev (manual page wndb(5)).

  Raises:
    ConfigError: no such files.
    DataError: a file that is none of WordNet's.
  """
  folder = pathlib.Path(folder)
  names = ['cntlist.rev', *(f'{kind}.{name}' for kind in ('index', 'data') for name in _FILES.values())]
  if missing := [name for name in names if not (folder / name).is_file()]:
    raise ConfigError(f'{folder}: no {missing[0]}; expected the files of WordNet; on Debian: apt-get install '
                      'wordnet-base, or unpack it elsewhere with dpkg-deb -x and name the folder to scripts.augment')
  first, total = {}, {}
  for word, number, count in _rows(folder / 'cntlist.rev', _counted):
    total[word] = total.get(word, 0) + count
    if number == 1:
      first[word] = count
  senses = {}
  for pos, name in _FILES.items():
    for lemma, number, offset in _rows(folder / f'index.{name}', _indexed):
      word = lemma, pos
      senses[word] = Sense(offset, number, first.get(word, 0), total.get(word, 0))
  return Wordnet(senses, {pos: (folder / f'data.{name}').read_bytes() for pos, name in _FILES.items()})


def _counted(line):
  key, number, count = line.split()
  lemma, kind = key.split('%')
  return (lemma, 'nvara'[int(kind[0]) - 1]), int(number), int(count)


def _indexed(line):
  lemma, _, number, *rest = line.split()
  return lemma, int(number), int(rest[-int(number)])


def _rows(path, parse):
  for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
    if not line.startswith(' '):  # the licence
      try:
        yield parse(line)
      except (ValueError, IndexError) as error:
        raise DataError(f'{path}:{number}: {line[:60]!r}; expected a line of WordNet; install it again') from error


def wordnet(rate: float, folder: str | os.PathLike = DEBIAN, protect: Collection[str] = ()) -> Augment:
  """English: a share `rate` of the words becomes a synonym, in the same form and case; the usual ones more often.

  About one word in 25 has one, so that shares beyond that mean: all that have. Names, closed classes, phrasal
  verbs and parts of compounds stay, and 'a' and 'an' stay right.

  Raises:
    ConfigError: no WordNet in `folder`, or lemminflect is missing.
  """
  optional('lemminflect')
  lookup = functools.lru_cache(maxsize=1 << 16)(load_wordnet(folder).synonyms)

  def change(text: str, a: int, b: int, rng: np.random.Generator) -> str:
    word = text[a:b]
    starts = not text[:a].rstrip(' "“‘(') or text[:a].rstrip(' "“‘(')[-1] in '.!?\n。！？：:'
    if text[a - 1:a] in ('-', '_', '/', '\\') or text[b:b + 1] in ('-', '_', '/') or not (
        word.islower() or word.isupper() and len(word) > 3 or word.istitle() and starts):
      return word
    pos, found = lookup(word.lower())
    article = _ARTICLE.search(text, max(a - 5, 0), a)
    fits = {'a': _AFTER_A, 'an': _AFTER_AN}[article[1].lower()].match if article else lambda _: True
    if pos == 'v' and _PARTICLES.match(text, b):
      return word
    new = _draw({w: n for w, n in found.items() if fits(w)}, rng) or word
    return new if word.islower() else new.upper() if word.isupper() else new.capitalize()
  return edit(rate, change, protect)


def _draw(counts, rng):
  """One of the words, as often as they are counted; None of none."""
  if not counts:
    return None
  options, n = sorted(counts), np.array([counts[w] for w in sorted(counts)], float)
  return options[rng.choice(len(options), p=n / n.sum())]


def cilin(rate: float, protect: Collection[str] = ()) -> Augment:
  """Simplified Chinese: a share `rate` of the words becomes a synonym, the usual ones more often.

  A word of two characters at least, which the thesaurus (Tongyici Cilin, extended) has in one group of equals, and
  that group under the part of speech that jieba gives the word: nouns A-D, adjectives E, verbs F-J. The synonym has
  the same part of speech and no other group either, is not 20 times as rare, and shares a character unless the group
  is small. About one word in 20 has one.

  Raises:
    ConfigError: cilin or rjieba is missing.
  """
  groups: dict[str, list[tuple[str, list[str]]]] = {}
  for code, group in _equals(optional('cilin').Cilin(trad=False).data):
    for word in group:
      groups.setdefault(word, []).append((code, group))
  jieba = segmenter()
  tag = lambda word: [t for _, t in jieba.tag(word)]

  @functools.lru_cache(maxsize=1 << 16)
  def synonyms(word: str) -> Mapping[str, int]:
    tags = tag(word)
    if len(word) < 2 or len(groups.get(word, ())) != 1 or tags not in (['n'], ['v'], ['vn'], ['a'], ['an'], ['ad']):
      return {}
    code, group = groups[word][0]
    if code[0] not in {'n': 'ABCD', 'v': 'FGHIJ', 'a': 'E'}[tags[0][0]] or _DIRECTION.search(word):
      return {}
    count = jieba.suggest_freq  # of a word that is in the dictionary, how often it was counted
    return {w: count(w) for w in group if w != word and len(w) > 1 and len(groups[w]) == 1 and jieba.has_word(w)
            and tag(w) == tags and count(w) * RARER >= count(word) and (set(w) & set(word) or len(group) <= 3)
            and (w[-1] == word[-1] or w[-1] not in _RESULT and word[-1] not in _RESULT)}
  return edit(rate, lambda text, a, b, rng: _draw(synonyms(text[a:b]), rng) or text[a:b], protect, chinese_words)


def _equals(tree, code=''):
  """(code, words) of each group of the thesaurus whose words mean the same: those marked '='."""
  for key, below in tree.items():
    if isinstance(below, dict):
      yield from _equals(below['sub'], code + key)
    elif key.endswith('='):
      yield code + key, below


_SUBORDINATE = ('because|although|even though|though|even if|if|whenever|when|while|unless|as soon as|as long as|'
                'before|after|until|once|since|whereas')
_BODY, _END = r'[^,;:.!?"“”()\s]+(?:\s+[^,;:.!?"“”()\s]+)+?', r'(\s*[.!]*)'  # two words at least
_FIRST = re.compile(rf'({_SUBORDINATE})\s+({_BODY})\s*,\s+(?:then\s+)?({_BODY}){_END}', re.IGNORECASE)
_LAST = re.compile(rf'({_BODY})\s*,?\s+(because|although|even though|unless|whenever|whereas)\s+({_BODY}){_END}',
                   re.IGNORECASE)
_SECOND = re.compile(rf'\b(?:{_SUBORDINATE}|and|but|or|so|yet|who|what|which|that)\b', re.IGNORECASE)
_REFERS = re.compile(r'(?:it|he|she|they|its|his|hers?|theirs?|this|these|those)\b', re.IGNORECASE)
_JUST = re.compile(r"\b(?:just|only|simply|partly|mainly|perhaps|is|was|are|were|not|'s|it|this|that)$", re.IGNORECASE)
_HALF = r'([^;:.!?"“”()；：。！？（）\n]+?)'
_HALVES = re.compile(rf'{_HALF}(\s*;\s+|；){_HALF}(\s*[.!。！]*)')
_MOVABLE = frozenset(('the a an this that these those it he she we you they i my your his her its our their there all '
                      'some many most every each no ' + _SUBORDINATE.replace('|', ' ')).split())
# Conjunctions, and what answers them: it goes when the clauses change places, and comes back with them.
_ZH = {word: answer for words, answer in (('因为 由于 因為 由於', '所以'), ('虽然 尽管 雖然 儘管', '但是'),
                                          ('如果 要是 假如 只要', '')) for word in words.split()}
_ZH_BODY = r'([^，,。！!？?；;：:、“”"（）()\s]{2,}?)'
_ZH_FIRST = re.compile(rf'({"|".join(_ZH)}){_ZH_BODY}([，,])(?:所以|因此|因而|但是|可是|但(?!愿|願)|那么|那麼)?'
                       rf'(?![就便则則却卻才也都他她它这這那其]){_ZH_BODY}([。！!.]*)')
_ZH_LAST = re.compile(rf'{_ZH_BODY}([，,])({"|".join(_ZH)}){_ZH_BODY}([。！!.]*)')


def reorder_clauses(rate: float, protect: Collection[str] = ()) -> Augment:
  """In a share `rate` of the sentences, clauses change places: 'If x, y.' and 'y if x.', '因为x，所以y' and 'y，因为x'.

  Only where the border is certain: one comma or conjunction, no quotes, no question; halves around a semicolon, too.
  Fewer sentences change where fewer can.
  """
  check_rate(rate, 'reorder_clauses')

  def augment(text: str, rng: np.random.Generator) -> str:
    spans = sentences(text, protect)
    wanted, new = some(rate, len(spans), rng), {}
    for i in rng.permutation(len(spans)):
      if len(new) < wanted:
        old = text[slice(*spans[i])]
        turned = _turned(old)
        if turned and turned != old and keeps(old, turned, protect):
          new[spans[i]] = turned
    return replace(text, new, protect)
  return augment


def _turned(sentence):
  """The sentence in its other order; None where it has none that is safe."""
  if m := _ZH_FIRST.fullmatch(sentence):
    return m[4] + m[3] + m[1] + m[2] + m[5]
  if (m := _ZH_LAST.fullmatch(sentence)) and not any(w in m[1] for w in (*_ZH, '之所以')):
    return m[3] + m[4] + m[2] + _ZH[m[3]] + m[1] + m[5]
  if (m := _HALVES.fullmatch(sentence)) and not GO_ON.match(m[3]):
    return _joined(m[3], m[2], m[1], m[4])
  if (m := _FIRST.fullmatch(sentence)) and not _SECOND.search(m[2] + ' ' + m[3]) and not _REFERS.match(m[3]):
    return _joined(m[3], ' ', f'{m[1]} {m[2]}', m[4])
  if (m := _LAST.fullmatch(sentence)) and not _SECOND.search(m[1] + ' ' + m[3]) and not (
      _JUST.search(m[1]) or m[2].lower() == 'because' and not keeps(m[1], '')):
    return _joined(f'{m[2]} {m[3]}', ', ', m[1], m[4])
  return None


def _joined(first, by, second, end):
  """The halves of a sentence with its capital where it belongs now; None where a capital may be a name's."""
  if second[0].isupper():  # it began the sentence
    word = re.split(r"[\s'’]", second)[0]
    if word[1:] != word[1:].lower() or word.lower() not in _MOVABLE:
      return None
    second = second if word == 'I' else second[0].lower() + second[1:]
    first = first[0].upper() + first[1:]
  return first + by + second + end
