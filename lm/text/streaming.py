"""Text as its ids come."""

from collections.abc import Callable, Iterable, Iterator, Sequence


def pieces(to_text: Callable[[list[int]], str], ids: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
  """The text of the ids as it stands behind `before`, piece by piece; an unfinished last character is left out.

  Each piece is what its ids add to those of the piece before: a tokenizer may treat the first id of a text specially.
  """
  before, now = list(before), []
  for i in ids:
    now.append(i)
    old, text = to_text(before), to_text(before + now)
    if len(text) > len(old) and not text.endswith('\ufffd'):
      yield text[len(old):]
      before, now = now, []
