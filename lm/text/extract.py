"""Plain text out of markup: HTML pages and roff manual pages."""

from html.parser import HTMLParser
import re


class _Text(HTMLParser):
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


def html(source: str) -> str:
  """A page's running text: navigation and scripts dropped, one line per block, <pre> kept as it is."""
  page = _Text()
  page.feed(source)
  page.close()
  return _tidy(''.join(page.parts))


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


def roff(source: str) -> str:
  """A manual page's text: macros' arguments stay, fonts and definitions go. Good enough for a corpus."""
  lines, depth, ending = [], 0, ''
  for line in source.split('\n'):
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
  return re.sub(r'\n{3,}', '\n\n', '\n'.join(lines)).strip()


def _unescape(text):
  def glyph(match):
    glyph = match[3] or match[4]
    if match[0].startswith('\\*'):
      return _ROFF_GLYPHS.get(match[1] or match[2], '')
    if glyph and re.fullmatch('u[0-9A-F]{4,5}', glyph):
      return chr(int(glyph[1:], 16))
    return _ROFF_GLYPHS.get(glyph, '') if glyph else {'e': '\\', '~': ' ', '0': ' '}.get(match[5], match[5] or '')
  return _ROFF_ESCAPE.sub(glyph, text)
