"""Pictures: what is drawn is what was given, no character becomes a box, and a file is written whole or not at all."""

import math
import os
import pathlib
import subprocess
import sys
import warnings

from fontTools import fontBuilder
from fontTools.pens import ttGlyphPen
from matplotlib import font_manager
import matplotlib.collections
import matplotlib.figure
import matplotlib.text
import numpy as np
from PIL import Image
import pytest

from lm import metrics, pictures
from lm.errors import CheckpointError, ConfigError

ROOT = pathlib.Path(__file__).parent.parent
XS = np.arange(0, 50, 10)
RUNS = {'full': [(XS, XS / 50), (XS, XS / 40), (XS, XS / 60)], 'lora': [(XS[:2], [0.1, 0.2]), (XS, np.full(5, 0.3))]}
INTERVALS = {'full': metrics.interval([0.86, 0.87, 0.865]), 'lora': metrics.interval([0.8]),
             'lost': metrics.interval([float('nan')])}


@pytest.fixture
def drawn(monkeypatch):
  """The figures that were saved; matplotlib's warnings, as of a glyph that is missing, fail the test."""
  figures = []
  save = matplotlib.figure.Figure.savefig
  monkeypatch.setattr(matplotlib.figure.Figure, 'savefig',
                      lambda figure, *args, **kwargs: (figures.append(figure), save(figure, *args, **kwargs))[1])
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    yield figures


@pytest.fixture
def bare(monkeypatch):
  """Only the fonts that matplotlib ships."""
  shipped = [f for f in font_manager.fontManager.ttflist if 'mpl-data' in f.fname]
  monkeypatch.setattr(font_manager.fontManager, 'ttflist', shipped)


def opened(path):
  with Image.open(path) as image:
    image.load()
  return image


def texts(figure):
  return {t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()}


def font(path, name, characters):
  """A font that draws each of the characters as a full square."""
  builder = fontBuilder.FontBuilder(1000, isTTF=True)
  names = {ord(c): f'u{ord(c):x}' for c in characters}
  builder.setupGlyphOrder(['.notdef', *names.values()])
  builder.setupCharacterMap(names)
  pen = ttGlyphPen.TTGlyphPen(None)
  for i, point in enumerate([(50, 0), (50, 800), (950, 800), (950, 0)]):
    (pen.lineTo if i else pen.moveTo)(point)
  pen.closePath()
  square = pen.glyph()
  builder.setupGlyf({glyph: square for glyph in builder.font.getGlyphOrder()})
  builder.setupHorizontalMetrics({glyph: (1000, 50) for glyph in builder.font.getGlyphOrder()})
  builder.setupHorizontalHeader(ascent=800, descent=-200)
  builder.setupNameTable({'familyName': name, 'styleName': 'Regular'})
  builder.setupOS2()
  builder.setupPost()
  builder.save(path)


def test_confusion_shows_the_counts(tmp_path, drawn):
  counts = np.array([[8, 2, 0], [1, 1, 2], [0, 0, 0]])
  path = pictures.confusion(tmp_path / 'c.png', counts, ['pos', 'neg', 'none'], 'movies')
  assert path == tmp_path / 'c.png' and opened(path).format == 'PNG'
  image = drawn[0].axes[0].images[0]
  assert image.get_array().filled() == pytest.approx(np.array([[0.8, 0.2, 0], [0.25, 0.25, 0.5], [0, 0, 0]]))
  cells = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in drawn[0].axes[0].texts}
  assert cells == {(i, j): str(counts[i, j]) for i in range(3) for j in range(3)}
  labels = [t.get_text() for t in drawn[0].axes[0].get_yticklabels()]
  assert labels == [t.get_text() for t in drawn[0].axes[0].get_xticklabels()] == ['pos', 'neg', 'none']
  assert {'movies', 'predicted', 'target'} <= texts(drawn[0])


def test_confusion_of_many_classes_stays_readable(tmp_path, drawn):
  path = pictures.confusion(tmp_path / 'c.png', np.eye(150, dtype=int), [f'class {i}' for i in range(150)])
  assert max(opened(path).size) < 2000 and not drawn[0].axes[0].texts
  assert [t.get_text() for t in drawn[0].axes[0].get_yticklabels()] == [f'class {i}' for i in range(0, 150, 3)]


def test_curves_are_means_and_bands(tmp_path, drawn):
  pictures.curves(tmp_path / 'k.png', RUNS, ylabel='accuracy')
  axes = drawn[0].axes[0]
  lines = {line.get_label(): line for line in axes.lines}
  assert lines['full (3)'].get_xdata() == pytest.approx(XS)
  assert lines['full (3)'].get_ydata() == pytest.approx(np.mean([ys for _, ys in RUNS['full']], 0))
  assert lines['lora (2)'].get_ydata() == pytest.approx([0.2, 0.25, 0.3, 0.3, 0.3])
  assert len(axes.lines) == 2 + 3 + 2  # the runs themselves too
  band = axes.findobj(matplotlib.collections.FillBetweenPolyCollection)[0].get_paths()[0].vertices
  at_40 = metrics.interval([40 / 50, 1, 40 / 60])
  assert sorted(set(band[band[:, 0] == 40][:, 1].round(9))) == pytest.approx([at_40.low, at_40.high])
  assert {'accuracy', 'step'} <= texts(drawn[0])


def test_curves_leave_out_what_is_not_finite(tmp_path, drawn):
  pictures.curves(tmp_path / 'k.png', {'a': [([1, 2], [1.0, math.nan]), ([1, 2], [3.0, 5.0]), ([1], [math.inf])]})
  line, = [x for x in drawn[0].axes[0].lines if x.get_label() == 'a (3)']
  assert line.get_ydata() == pytest.approx([2, 5])


def test_what_a_legend_would_hide_is_shown(tmp_path, drawn):
  pictures.lengths(tmp_path / 'l.png', {'__label__pos': [3, 4], '__label__neg': [5]})
  assert [t.get_text().strip() for t in drawn[0].axes[0].get_legend().get_texts()] == ['__label__pos', '__label__neg']


def test_bars_may_lie_outside_their_intervals(tmp_path, drawn):
  pictures.bars(tmp_path / 'b.png', {'b': metrics.Interval(0.5, 0.52, 0.6, 0.95, 3)})
  segments = drawn[0].axes[0].findobj(matplotlib.collections.LineCollection)[0].get_segments()
  assert segments[0][:, 0] == pytest.approx([0.5, 0.6])


def test_bars_have_their_intervals(tmp_path, drawn):
  pictures.bars(tmp_path / 'b.png', INTERVALS, 'accuracy', 'methods')
  axes = drawn[0].axes[0]
  assert [p.get_width() for p in axes.patches] == pytest.approx([0.865, 0.8, 0])
  segments = axes.findobj(matplotlib.collections.LineCollection)[0].get_segments()
  full = INTERVALS['full']
  assert segments[0][:, 0] == pytest.approx([full.low, full.high])
  assert [t.get_text() for t in axes.texts] == [str(full), '0.8', 'nan']
  assert [t.get_text() for t in axes.get_yticklabels()] == list(INTERVALS)
  assert axes.yaxis_inverted() and axes.get_xlim()[0] == 0


def test_without_a_font_names_are_escaped(tmp_path, drawn, bare):
  names = ['好评', 'neg\n ative', 'a $5 or $x', 'é\U0001F9E0', 'x' * 99]
  pictures.confusion(tmp_path / 'c.png', np.eye(5, dtype=int), names, '评论')
  shown = [t.get_text() for t in drawn[0].axes[0].get_yticklabels()]
  assert shown == [r'\u597d\u8bc4', 'neg ative', r'a \$5 or \$x', r'é\U0001f9e0', 'x' * 31 + '…']
  assert r'\u8bc4\u8bba' in texts(drawn[0])
  pictures.curves(tmp_path / 'k.png', {'微调': RUNS['full']}, '步', '准确率', '曲线')
  assert {r'\u5fae\u8c03 (3)', r'\u6b65', r'\u51c6\u786e\u7387'} <= texts(drawn[1])
  pictures.bars(tmp_path / 'b.png', {'微调': INTERVALS['full']}, '准', '图')
  assert {r'\u5fae\u8c03', r'\u51c6', r'\u56fe'} <= texts(drawn[2])


def test_an_installed_font_draws_the_names(tmp_path, drawn, bare):
  font(tmp_path / 'a.ttf', 'Noto Sans CJK Test', '好评')
  font(tmp_path / 'b.ttf', 'Another Test', '好评差')
  font(tmp_path / 'c.ttf', 'Last Resort Test', '好评差的\U0001F9E0')
  (tmp_path / 'd.ttf').write_bytes(b'no font')
  for letter in 'abc':
    font_manager.fontManager.addfont(tmp_path / f'{letter}.ttf')
  font_manager.fontManager.ttflist.append(font_manager.FontEntry(str(tmp_path / 'd.ttf'), 0, 'Broken Test'))
  path = pictures.confusion(tmp_path / 'c.png', np.eye(3, dtype=int), ['好评', '差评', '的'])
  labels = drawn[0].axes[0].get_yticklabels()
  assert [t.get_text() for t in labels] == ['好评', '差评', r'\u7684']
  assert labels[0].get_fontfamily() == ['sans-serif', 'Noto Sans CJK Test', 'Another Test']
  pixels = np.asarray(opened(path).convert('L'))
  box = labels[0].get_window_extent()
  scale = 120 / drawn[0].dpi
  rows, columns = pixels.shape[0] - np.array([box.y1, box.y0]) * scale, np.array([box.x0, box.x1]) * scale
  ink = pixels[round(rows[0]):round(rows[1]), round(columns[0]):round(columns[1])] < 128
  assert ink.mean() > 0.4  # squares full of ink: those of the font above, not the outline of a missing glyph


@pytest.mark.parametrize('call, part', [
    (lambda p: pictures.confusion(p, np.eye(2), ['a']), r'shape \(2, 2\) for 1 names'),
    (lambda p: pictures.confusion(p, np.zeros((0, 0)), []), 'expected'),
    (lambda p: pictures.confusion(p, np.zeros(2), ['a', 'b']), r'shape \(2,\)'),
    (lambda p: pictures.curves(p, {}), 'at least one name'),
    (lambda p: pictures.curves(p, {'a': []}), 'at least one run'),
    (lambda p: pictures.curves(p, {'a': [([1, 2], [1])]}), 'a y for every x'),
    (lambda p: pictures.bars(p, {}), 'intervals: none'),
])
def test_nothing_to_draw_is_an_error(call, part, tmp_path):
  with pytest.raises(ConfigError, match=part):
    call(tmp_path / 'x.png')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('draw', [lambda p: pictures.confusion(p, np.eye(2), ['a', 'b']),
                                  lambda p: pictures.curves(p, RUNS), lambda p: pictures.bars(p, INTERVALS)])
def test_a_picture_is_written_whole_or_not_at_all(draw, tmp_path, monkeypatch):
  path = tmp_path / 'x.png'
  path.write_bytes(b'old')

  def full(source, target):
    raise OSError(28, 'No space left on device')
  with monkeypatch.context() as patch:
    patch.setattr(os, 'replace', full)
    with pytest.raises(CheckpointError, match=r'x.png: cannot write.*No space left.*choose another path'):
      draw(path)
  assert path.read_bytes() == b'old'
  with pytest.raises(CheckpointError):
    draw(tmp_path / 'nowhere' / 'x.png')
  draw(path)
  assert opened(path).format == 'PNG'


def test_pyplot_stays_out(tmp_path):
  code = ("import sys, numpy as np; from lm import pictures; assert 'matplotlib' not in sys.modules; "
          "pictures.confusion(sys.argv[1], np.eye(2), ['a', 'b']); assert 'matplotlib.pyplot' not in sys.modules")
  subprocess.run([sys.executable, '-c', code, tmp_path / 'x.png'], check=True, cwd=ROOT)
