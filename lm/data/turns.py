"""The turns of a conversation: the value, and the ways in which records spell it."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from lm.data.json_io import Fault, Row
from lm.errors import DataError
from lm.text import chat, scan

CONVERSATIONS = ('messages', 'conversation', 'conversations')
_ROLES = {'system': 'system', 'user': 'user', 'human': 'user', 'assistant': 'assistant', 'gpt': 'assistant'}


@dataclasses.dataclass(frozen=True)
class Message:
  """One turn, as `lm.text.chat.Message`.

  Attributes:
    role: 'system', 'user' or 'assistant'.
    content: all that is said.
    input: the part of it, after a line break at its end, that an instruction is about; '' = there is none.
    where: the field or fields of the record that say it, for errors.
  """

  role: str
  content: str
  input: str = dataclasses.field(default='', compare=False)  # the text is the same, however it is divided
  where: str = dataclasses.field(default='', compare=False)


def conversation(row: Row, answered: bool) -> tuple[str, tuple[Message, ...]]:
  """(name of the field, its turns), no turns where the record has neither a conversation nor an instruction.

  An instruction may have a system turn and a history of pairs, as LLaMA-Factory writes it; `answered` adds its output.
  """
  found = [name for name in CONVERSATIONS if row.fields.get(name) is not None]
  if len(found) > 1:
    raise Fault('field', row.origin, f'fields {" and ".join(found)}; expected one of them')
  if found:
    return found[0], system(row) + turns(row, row.fields[found[0]], found[0])
  if row.fields.get('instruction') is None:
    return 'messages', ()
  history = row.fields.get('history') or []
  if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
    raise Fault('type', row.origin, 'field history: found something else; expected a list of pairs of strings')
  said = [text(row, 'turn', {'turn': turn}, f'history[{i}][{j}]') for i, pair in enumerate(history)
          for j, turn in enumerate(pair)]
  before = [Message(('user', 'assistant')[i % 2], turn, where=f'history[{i // 2}][{i % 2}]')
            for i, turn in enumerate(said)]
  asked = instruction(text(row, 'instruction'), text(row, 'input', empty=True))
  answer = (Message('assistant', text(row, 'output'), where='output'),) if answered else ()
  return 'history', (*system(row), *before, asked, *answer)


def system(row: Row) -> tuple[Message, ...]:
  """The turn that a field called system stands for."""
  return (Message('system', row.fields['system'], where='system'),) if text(row, 'system', empty=True) else ()


def instruction(task: str, input: str) -> Message:
  """The user's turn of an instruction."""
  return Message('user', question(task, input), input, 'instruction or input' if input else 'instruction')


def question(instruction: str, input: str) -> str:
  """What it says: the input on a line of its own."""
  return f'{instruction}\n{input}' if input else instruction


def turns(row: Row, value: Any, where: str) -> tuple[Message, ...]:
  """Messages of a list of objects, or of strings that user and assistant say by turns; their order is not checked.

  An object may say in `input` which end of its content is one (`Message`); any other `input` is not looked at.
  """
  if not isinstance(value, list):
    raise Fault('type', row.origin, f'field {where}: found {describe(value)}; expected a list of turns')
  if not value:
    raise Fault('empty', row.origin, f'field {where}: no turns; expected at least one')
  alone = isinstance(value[0], str)
  if alone:
    odd = next((i for i, turn in enumerate(value) if not isinstance(turn, str)), None)
    if odd is not None:
      raise Fault('type', row.origin, f'field {where}[{odd}]: found {describe(value[odd])}; expected a string, as the '
                  'first turn is one')
    value = [{'role': ('user', 'assistant')[i % 2], 'content': turn} for i, turn in enumerate(value)]
  out = []
  for i, turn in enumerate(value):
    at = f'{where}[{i}]'
    if not isinstance(turn, Mapping):
      raise Fault('type', row.origin, f'field {at}: found {describe(turn)}; expected an object with role and content')
    who, what = (a if turn.get(a) is not None or turn.get(b) is None else b
                 for a, b in (('role', 'from'), ('content', 'value')))
    role = text(row, who, turn, f'{at}.{who}')
    if role not in _ROLES:
      raise Fault('role', row.origin, f'field {at}.{who}: found {role[:20]!r}; expected one of {", ".join(_ROLES)}')
    place = at if alone else f'{at}.{what}'
    said, input = text(row, what, turn, place), turn.get('input')
    input = input if isinstance(input, str) and input and said.endswith(f'\n{input}') else ''
    out.append(Message(_ROLES[role], said, input, place))
  return tuple(out)


def alternate(messages: Sequence[Message], last: str, origin: str, where: str) -> None:
  """Raises a Fault unless a system turn or none is followed by user, assistant, user, ... up to one of role `last`."""
  first = int(bool(messages) and messages[0].role == 'system')
  expected = 'user'
  for i, message in enumerate(messages[first:], first):
    if message.role == 'system':
      raise Fault('system', origin, f'field {where}[{i}]: a system turn; expected one at most, before all others')
    if message.role != expected:
      raise Fault('order', origin, f'field {where}[{i}]: found {message.role}; expected {expected}')
    expected = 'assistant' if expected == 'user' else 'user'
  if len(messages) == first or messages[-1].role != last:
    todo = ("answer it, or cut it with unanswered='cut'",) if last == 'assistant' and len(messages) > first else ()
    raise Fault('order', origin, f'field {where}: ends with {messages[-1].role if messages else "nothing"}; expected '
                f'{last}', *todo)


def refused(error: DataError, origin: str) -> Fault:
  """The fault of a record whose turns `lm.text.chat` refuses, with the field that says the words."""
  where = getattr(error.message, 'where', '') if isinstance(error, chat.Refused) else ''
  what, _, todo = (f'field {where}: {error.why}' if where else str(error)).rpartition('; ')
  return Fault('words', origin, what, f'{todo}, or remove the record')


def text(row: Row, name: str, fields: Mapping[str, Any] | None = None, where: str | None = None,
         empty: bool = False) -> str:
  """The string of a field of the row, or of an object in it; `empty`: it may be '', null or missing."""
  fields, where = row.fields if fields is None else fields, where or name
  value = fields.get(name)
  if value is None and empty:
    return ''
  if value is None:
    raise Fault('missing', row.origin, f'field {where}: null; expected a string' if name in fields else
                f'no field {where}{names(fields)}; expected a string')
  if not isinstance(value, str):
    raise Fault('nan' if value != value else 'type', row.origin, f'field {where}: found {describe(value)}; expected a '
                'string')
  if not empty and scan.blank(value):
    raise Fault('empty', row.origin, f'field {where}: nothing but space; expected text')
  return value


def names(fields: Mapping[str, Any]) -> str:
  """The names of the fields, for a message that misses one."""
  return f' (fields: {", ".join(map(str, fields))[:60] or "none"})'


def describe(value: Any) -> str:
  """What kind of value it is, in JSON's words; never a text."""
  if value is None or isinstance(value, bool):
    return {None: 'null', True: 'true', False: 'false'}[value]
  if isinstance(value, int | float):
    return f'the number {value}'[:40]
  named = {str: 'a string', list: 'a list', dict: 'an object', bytes: 'bytes'}
  return named.get(type(value), f'a {type(value).__name__}')
