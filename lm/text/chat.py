"""Conversations as token ids: fixed templates, and a mask of the tokens that the assistant learns to write.

A template is a function from messages to pieces; `chatml`, `llama2`, `alpaca` and `plain` are four. Each piece is
encoded by itself, in training as in sampling, so nothing that a message says can move, join or mask a token outside its
own words. A template's marks ('<|im_start|>', '[INST]', '### Response:') become control ids where the tokenizer has
them, and those no text can make (`lm.text.tokenizer`). The end of a turn is always one id. A mark without an id of its
own is spelled as text; the same characters in a message then get a space after their first one ('[ INST]',
'# ## Response:'), and one more where spaces stand there already, so that `parse` can take it out again.
"""

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import numpy as np

from lm.errors import DataError
from lm.text import marks
from lm.text.tokenizer import Tokenizer

SMOLLM2 = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'  # what its own template falls back to
ALPACA = 'Below is an instruction that describes a task. Write a response that appropriately completes the request.'
ALPACA_INPUT = ('Below is an instruction that describes a task, paired with an input that provides further context. '
                'Write a response that appropriately completes the request.')
ROLES = ('system', 'user', 'assistant')
_CUT = 60  # characters of a message in an error


class Message(NamedTuple):
  """What one side says. Anything with these attributes will do.

  Attributes:
    role: one of `ROLES`.
    content: all of it.
    input: the part of `content`, after a line break at its end, that an instruction is about; '' = there is none.
  """

  role: str
  content: str
  input: str = ''


class Refused(DataError):
  """Words that a tokenizer or template cannot write; `message` says them, and `why` is the error without its place."""

  def __init__(self, number: int, message: Message, why: str):
    super().__init__(f'message {number}: {why}')
    self.message, self.why = message, why


class Piece(NamedTuple):
  """A part of a conversation as a template writes it down.

  Attributes:
    text: never joined with its neighbours' before it is encoded.
    is_target: the assistant's own words, or the end of its turn.
    is_control: a mark of the template; white space around it is dropped where it becomes a control id.
    message: index of the message whose words these are; None: the template's own text.
  """

  text: str
  is_target: bool = False
  is_control: bool = False
  message: int | None = None


class Rendered(NamedTuple):
  """ids: int32 [n]. mask: bool [n], the assistant's words and ends of turns."""

  ids: np.ndarray
  mask: np.ndarray


Template = Callable[[Sequence[Message]], list[Piece]]
_EXAMPLE = (*(Message(role, 'x') for role in ROLES), Message('user', 'x\nx', 'x'), Message('assistant', 'x'))


def chatml(messages: Sequence[Message], system: str | None = None) -> list[Piece]:
  """<|im_start|>role, a line break, the words, <|im_end|>, a line break; `system` stands in for a missing system turn.

  functools.partial(chatml, system=SMOLLM2) is the template of SmolLM2-Instruct.
  """
  first = [] if system is None or messages[0].role == 'system' else _chatml('system', Piece(system))
  return first + [piece for i, m in enumerate(messages)
                  for piece in _chatml(m.role, Piece(m.content, m.role == 'assistant', message=i))]


def _chatml(role: str, words: Piece) -> list[Piece]:
  return [Piece('<|im_start|>', is_control=True), Piece(f'{role}\n'), words,
          Piece('<|im_end|>', words.is_target, True), Piece('\n')]


def llama2(messages: Sequence[Message]) -> list[Piece]:
  """<s>[INST] <<SYS>> system <</SYS>> user [/INST] assistant </s>, again for each exchange; words are stripped.

  As Llama-2's reference code writes it (arXiv:2307.09288): the space before </s> is the assistant's too.
  """
  pieces = []
  for i, m in enumerate(messages):
    words = m.content.strip()
    if m.role == 'assistant':
      pieces += [Piece(f' {words} ', True, message=i), Piece(marks.END, True, True)]
      continue
    after = i > 0 and messages[i - 1].role == 'system'
    if not after:
      pieces += [Piece(marks.BEGIN, is_control=True), Piece('[INST]', is_control=True)]
    if m.role == 'system':
      pieces += [Piece(' <<SYS>>\n', is_control=True), Piece(words, message=i),
                 Piece('\n<</SYS>>\n\n', is_control=True)]
    else:
      pieces += [Piece(words if after else f' {words}', message=i), Piece(' [/INST]', is_control=True)]
  return pieces


def alpaca(messages: Sequence[Message], system: str | None = None) -> list[Piece]:
  """A paragraph, '### Instruction:', '### Input:' where there is one, '### Response:' and right behind it the answer.

  So Stanford Alpaca writes an instruction and its answer, with `ALPACA_INPUT` or `ALPACA` as the first paragraph. It
  has no more than that: here a system turn, or else `system`, is the paragraph instead ('': none), the first user turn
  decides which of the two is written, and further exchanges follow the end of the one before and a blank line.
  """
  pieces = [Piece(marks.BEGIN, is_control=True)]
  if messages[0].role != 'system':
    first = (ALPACA_INPUT if messages[0].input else ALPACA) if system is None else system
    pieces += [Piece(first)] if first else []
  for i, m in enumerate(messages):
    if m.role == 'user':
      gap = '\n\n' if len(pieces) > 1 else ''
      task = m.content.removesuffix(f'\n{m.input}') if m.input else m.content
      pieces += [Piece(f'{gap}### Instruction:\n', is_control=True), Piece(task, message=i)]
      if m.input:
        pieces += [Piece('\n\n### Input:\n', is_control=True), Piece(m.input, message=i)]
      pieces.append(Piece('\n\n### Response:', is_control=True))
    elif m.role == 'assistant':
      pieces += [Piece(m.content, True, message=i), Piece(marks.END, True, True)]
    else:
      pieces.append(Piece(m.content, message=i))
  return pieces


def plain(messages: Sequence[Message], between: str = '\n') -> list[Piece]:
  """The words alone, `between` after each turn that is not the assistant's; its turns end as documents do."""
  pieces = [Piece(marks.BEGIN, is_control=True)]
  for i, m in enumerate(messages):
    own = m.role == 'assistant'
    pieces += [Piece(m.content, own, message=i), Piece(marks.END, True, True) if own else Piece(between)]
  return pieces


def check(messages: Sequence[Message]) -> None:
  """A system turn or none, then user and assistant in turn.

  Raises:
    DataError: another order or role, no message, content that is no text, or an input that is not its end.
  """
  if not messages:
    raise DataError('conversation: no message; expected a user turn at least; remove it')
  before = None
  for i, m in enumerate(messages):
    want = ('system', 'user') if before is None else ('assistant',) if before == 'user' else ('user',)
    if m.role not in want:
      raise DataError(f'message {i}: role {str(m.role)[:_CUT]!r}; expected {" or ".join(want)} here; mend the order of '
                      'the turns')
    if not isinstance(m.content, str):
      raise DataError(f'message {i}: content of type {type(m.content).__name__}; expected text; mend the record')
    if m.input and not m.content.endswith(f'\n{m.input}'):
      raise DataError(f'message {i}: its content does not end with a line break and its input; expected both; mend the '
                      'record')
    before = m.role
  if before == 'system':
    raise DataError('conversation: a system turn alone; expected a user turn after it; remove it')


def encode(template: Template, messages: Sequence[Message], tokenizer: Tokenizer) -> Rendered:
  """The whole conversation.

  Raises:
    DataError: see `check`.
    Refused: words that the tokenizer lacks, or cannot tell from a mark of the template.
    ConfigError: a tokenizer without a token that ends a turn.
  """
  found = tokenise(template, messages, tokenizer)
  return Rendered(np.concatenate([ids for _, ids in found]),
                  np.repeat([piece.is_target for piece, _ in found], [len(ids) for _, ids in found]))


def prompt(template: Template, messages: Sequence[Message], tokenizer: Tokenizer) -> np.ndarray:
  """int32 ids up to where the assistant's answer to the last message begins.

  They are how `encode` of the conversation begins, once the answer is there.
  """
  check(messages)
  if messages[-1].role != 'user':
    raise DataError(f'message {len(messages) - 1}: role {messages[-1].role!r}; expected the user to speak last; add '
                    'what is to be answered')
  found = tokenise(template, [*messages, Message('assistant', '')], tokenizer)
  at = [piece.message for piece, _ in found].index(len(messages))
  return np.concatenate([ids for _, ids in found[:at]])


def stop_ids(template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
  """The ids that end the assistant's turn (and eos): for `sampler.Sampling.stop`."""
  ends = [marks.ids(piece.text, tokenizer)[0] for piece in template(_EXAMPLE) if piece.is_target and piece.is_control]
  return tuple(dict.fromkeys(i for i in (*ends, tokenizer.eos_id) if i is not None))


def parse(template: Template, ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> tuple[str, bool]:
  """(what the assistant said, whether its turn is over), of the ids sampled after `prompt`."""
  ids = np.asarray(ids, np.int32).reshape(-1)
  ends = np.flatnonzero(np.isin(ids, stop_ids(template, tokenizer)))
  ids = ids[:ends[0]] if len(ends) else ids
  text = continued(ids, tokenizer)
  before, after = next(piece.text for piece in template(_EXAMPLE) if piece.message == 2).split(_EXAMPLE[2].content)
  return _guard(template, tokenizer).restore(text.removeprefix(before).removesuffix(after)), len(ends) > 0


def continued(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> str:
  """The text of `ids` as it stands behind other text: of ids alone, some tokenizers drop the space at the start."""
  if not marks.adds_space(tokenizer):
    return tokenizer.decode(ids)
  return tokenizer.decode([*tokenizer.encode(marks.ANCHORS[0]), *ids]).removeprefix(marks.ANCHORS[0])


def tokenise(template: Template, messages: Sequence[Message], tokenizer: Tokenizer) -> list[tuple[Piece, np.ndarray]]:
  """Every piece of the conversation with its int32 ids; `encode` joins them. Raises what `encode` does."""
  check(messages)
  guard, found, inside = _guard(template, tokenizer), [], False
  for piece in template(messages):
    ids = marks.ids(piece.text, tokenizer) if piece.is_control else None
    if ids is not None:
      found.append((piece, np.array(ids, np.int32)))
    elif piece.message is None:
      found.append((piece, marks.text_ids(piece.text, tokenizer, inside)))
    else:
      try:
        found.append((piece, _words(piece.text, guard, tokenizer, inside)))
      except DataError as error:
        raise Refused(piece.message, messages[piece.message], str(error)) from error
    inside = ids is None
  return found


@functools.lru_cache(maxsize=64)
def _guard(template: Template, tokenizer: Tokenizer) -> marks.Guard:
  spelled = [name for piece in template(_EXAMPLE) if piece.is_control and (name := piece.text.strip()) and (
      marks.ids(name, tokenizer) is None or marks.is_word(name, tokenizer))]
  seen = [tokenizer.decode(tokenizer.encode(m)).strip() for m in spelled]  # other letters, where it normalises text
  return marks.Guard(tuple(dict.fromkeys(m for m in (*spelled, *seen) if m)))


def _words(text: str, guard: marks.Guard, tokenizer: Tokenizer, inside: bool) -> np.ndarray:
  """Ids of a message's words, in which no mark is left even once the tokenizer has normalised them."""
  for _ in range(2):
    ids = marks.text_ids(guard.neutralise(text), tokenizer, inside)
    text = tokenizer.decode(ids) if guard.marks else ''
    bad = [m for m in guard.marks if m in text]
    if not bad:
      return ids
  raise DataError(f'the tokenizer cannot tell its words from {bad[0]!r} of the template; expected one that keeps '
                  'spaces and case; choose another template or tokenizer')
