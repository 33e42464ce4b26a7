"""Examples to fine-tune on (`lm.data.values`): classes, instructions, conversations, preferences; record by record.

The keys are the textbook's, and what others write: 'messages' and 'conversations', ShareGPT's from and value, Alpaca's
instruction, input and output, preferences as TRL and LLaMA-Factory have them. Other keys are not looked at, but for a
classification, whose keys are text, label and perhaps text_pair, they go to the metadata. A label is a string, or an
integer, which is read as its digits.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import os

from lm.data import tables_io, turns
from lm.data.json_io import Fault, Limits, Row
from lm.data.values import Chat, Graded, Instruction, Labelled, Preference
from lm.errors import ConfigError, DataError

SPLITS = ('train', 'validation', 'test')
MOST = 1e30  # below it a grade is a finite f32, and so is a difference of two
SHOWN = 3  # messages that a report keeps of each kind of fault
LEFT_OUT = ('unlabelled',)  # kinds of records that never end a run: they are counted
Example = Labelled | Instruction | Chat | Preference | Graded


@dataclasses.dataclass(frozen=True)
class Report:
  """What reading came to.

  Attributes:
    seen, kept: records of the file; those that became examples.
    cut: examples that lost a last turn, which nobody answered.
    faults: number of records by the kind of their first fault.
    messages: the first few messages of each kind: file, line or row, field, what was found and expected.
    left: names of splits that were not read, see `tables_io.rows`.
  """

  seen: int
  kept: int
  cut: int
  faults: Mapping[str, int]
  messages: Mapping[str, tuple[str, ...]]
  left: tuple[str, ...] = ()

  @property
  def complete(self) -> bool:
    """Is every record in use, as it was?"""
    return self.kept == self.seen and not self.cut and not self.left

  def without(self, faults: Sequence[Fault]) -> 'Report':
    """The report of a file of which these records are left out too."""
    counts, messages = dict(self.faults), dict(self.messages)
    for fault in faults:
      counts[fault.kind] = counts.get(fault.kind, 0) + 1
      messages[fault.kind] = (*messages.get(fault.kind, ()), str(fault))[:SHOWN]
    return dataclasses.replace(self, kept=self.kept - len(faults), faults=counts, messages=messages)

  def table(self) -> str:
    """Counts and shares, one kind a line, the most frequent first, with the messages below; then what was not read."""
    counts = [('records', self.seen), ('kept', self.kept), *([('last turn cut', self.cut)] if self.cut else []),
              *sorted(self.faults.items(), key=lambda item: (-item[1], item[0]))]
    out = []
    for name, count in counts:
      out.append(f'{name:<16}{count:>9}  {count / max(self.seen, 1):7.2%}')
      out += [f'  {message}' for message in self.messages.get(name, ())]
    if self.left:
      out.append(f'not read        {", ".join(self.left)}; to read one, name its own folder or file')
    return '\n'.join(out)


def read(path: str | os.PathLike, kind: str, on_error: str = 'stop', encoding: str = 'utf-8', *,
         classes: Sequence[str] | None = None, rename: Mapping[str, str] | None = None, numbers: bool = False,
         unanswered: str = 'fault', limits: Limits | None = None) -> tuple[list[Example], Report]:
  """The examples of a file or folder (formats: `tables_io.rows`), in order, and what was wrong with the others.

  Args:
    kind: 'classification', 'instruction', 'chat' (which takes instructions too), 'preference', or 'graded' (which takes
      preferences too: grades 1 and 0).
    on_error: 'stop' raises at the first fault, 'skip' leaves the record out and counts it. Records of a test split that
      have no label (none, null, '', or -1 where no other record has it) are left out and counted in any case.
    encoding: of text files.
    classes: the labels there are; None takes any.
    numbers: labels are numbers, and not classes.
    rename: {'sentence': 'text'}: what the file calls a field, and what it is called here.
    unanswered: a chat whose last turn is the user's: 'fault', or 'cut' takes that turn off (and counts it).
    limits: of a record.

  Raises:
    DataError: a fault, if it is to stop; a file damaged as a whole; no record at all, or none to keep.
    ConfigError: an argument that is none of these, or a library that is not installed.
  """
  for name, value, allowed in (('kind', kind, tuple(_PARSERS)), ('on_error', on_error, ('stop', 'skip')),
                               ('unanswered', unanswered, ('fault', 'cut'))):
    if value not in allowed:
      raise ConfigError(f'{name}={value!r}; expected one of {", ".join(allowed)}')
  found, seen, cut, faults, messages = [], 0, [], {}, {}
  options = _Options(tuple(classes or ()), cut if unanswered == 'cut' else None, numbers)
  for item in tables_io.rows(path, encoding, limits):
    seen += 1
    try:
      if isinstance(item, Fault):
        raise item
      found.append(_PARSERS[kind](_with_split(renamed(item, rename or {})), options))
    except Fault as fault:
      if on_error == 'stop' and fault.kind not in LEFT_OUT:
        raise
      faults[fault.kind] = faults.get(fault.kind, 0) + 1
      messages[fault.kind] = (*messages.get(fault.kind, ()), str(fault))[:SHOWN]
  if not seen:
    raise DataError(f'{os.fspath(path)}: no records; expected at least one; check that it is the right file')
  report = Report(seen, len(found), len(cut), faults, messages, tables_io.left_alone(path))
  if kind == 'classification':
    found, none = _told(found, classes)
    report = report.without(none)
  if not found:
    first = next(iter(report.messages.values()))[0]
    raise DataError(f'{os.fspath(path)}: none of {seen} records can be used; the first: {first}')
  return found, report


@dataclasses.dataclass(frozen=True)
class _Options:
  classes: tuple[str, ...]
  cut: list[str] | None  # takes the origins of chats that lose a last turn; None: such a chat is a fault
  numbers: bool


def renamed(row: Row, names: Mapping[str, str]) -> Row:
  """The row with our names of fields; a Fault where it has none, or two by one name."""
  if not isinstance(row.fields, Mapping):
    raise Fault('type', row.origin, f'found {turns.describe(row.fields)}; expected an object with fields')
  fields = {names.get(name, name): value for name, value in row.fields.items()}
  if len(fields) < len(row.fields):
    raise Fault('duplicate key', row.origin, 'two fields are renamed to one; expected distinct names')
  return dataclasses.replace(row, fields=fields)


def split_of(row: Row) -> str | None:
  """The split that a record says, else that of its file; a Fault where it says another one."""
  said = row.fields.get('split')
  split = tables_io.split_of(said) if isinstance(said, str) else None
  if said and not split:
    found = f'a string, {said[:40]!r}' if isinstance(said, str) else turns.describe(said)
    raise Fault('split', row.origin, f'field split: found {found}; expected one of {", ".join(SPLITS)}')
  return split or row.split


def _with_split(row):
  return Row(row.origin, {k: v for k, v in row.fields.items() if k != 'split'}, split_of(row))


def _labelled(row, options):
  label = row.fields.get('label')
  if row.split == 'test' and label in (None, ''):
    raise _no_label(row.origin)
  if isinstance(label, str) and label.lower() == 'nan' and label not in options.classes:
    raise Fault('nan', row.origin, f'field label: found {label!r}, a value that got lost; expected a label')
  label, metadata = number_of(row) if options.numbers else label_of(row), row.fields.get('metadata') or {}
  if options.classes and label not in options.classes and (row.split, label) != ('test', '-1'):
    raise Fault('label', row.origin, f'field label: found {label[:40]!r}; expected one of '
                f'{", ".join(options.classes)[:200]}')
  if not isinstance(metadata, Mapping):
    raise Fault('type', row.origin, f'field metadata: found {turns.describe(metadata)}; expected an object')
  others = {k: v for k, v in row.fields.items() if k not in ('text', 'text_pair', 'label', 'metadata')}
  pair = turns.text(row, 'text_pair') if row.fields.get('text_pair') is not None else None
  return Labelled(turns.text(row, 'text'), label, others | dict(metadata), row.split, row.origin, pair)


def number_of(row: Row) -> float:
  """The label of a record where labels are numbers; CSV has them as text."""
  label = row.fields.get('label')
  if isinstance(label, str) and label:
    with contextlib.suppress(ValueError):
      label = float(label)
  if label is None or label == '':
    turns.text(row, 'label')
  if isinstance(label, bool) or not isinstance(label, int | float) or not abs(label) < MOST:
    raise Fault('nan' if label != label else 'type', row.origin, f'field label: found {turns.describe(label)}; '
                'expected a number below 1e30')
  return float(label)


def label_of(row: Row) -> str:
  """The label of a record, an integer as its digits."""
  label = row.fields.get('label')
  if label is None or isinstance(label, str):
    return turns.text(row, 'label')
  if type(label) is not int:  # nor a bool, which is one
    raise Fault('nan' if label != label else 'type', row.origin, f'field label: found {turns.describe(label)}; '
                'expected a string or an integer')
  return str(label)


def _told(found, classes):
  """(the records, faults of others) of which the test split says -1, GLUE's word for no label, where it is no class."""
  known = set(classes or [e.label for e in found if e.split != 'test'])
  if not known or known & {'-1', -1.0}:
    return found, []
  none = lambda e: e.split == 'test' and e.label in ('-1', -1.0)
  return [e for e in found if not none(e)], [_no_label(e.origin) for e in found if none(e)]


def _no_label(origin):
  return Fault('unlabelled', origin, 'field label: none, of the test split; expected a label to score by',
               'it is left out')


def _instruction(row, options):
  del options
  for name in ('history', 'system'):
    if row.fields.get(name):
      raise Fault('field', row.origin, f'field {name}: turns that an instruction cannot hold; expected none',
                  "read the file as 'chat'")
  return Instruction(*(turns.text(row, name, empty=name in ('input', 'task_type')) for name in (
      'instruction', 'input', 'output', 'task_type')), row.split, row.origin)


def _chat(row, options):
  name, messages = turns.conversation(row, answered=True)
  if not messages:
    raise Fault('missing', row.origin, f'no field {" or ".join(turns.CONVERSATIONS)}{turns.names(row.fields)}; '
                'expected turns')
  cut = options.cut is not None and len(messages) > 1 and messages[-1].role == 'user'
  messages = messages[:-1] if cut else messages
  turns.alternate(messages, 'assistant', row.origin, name)
  if cut:
    options.cut.append(row.origin)
  return Chat(messages, row.split, row.origin)


def _preference(row, options):
  del options
  name, prompt = _asked(row)
  (begin, chosen), (other, rejected) = (_answer(row, name) for name in ('chosen', 'rejected'))
  if not prompt and not begin:
    raise Fault('missing', row.origin, f'no field prompt{turns.names(row.fields)}; expected a string or turns')
  prompt = prompt or begin  # TRL: both answers may repeat the prompt, or hold it instead
  for field, before in (('chosen', begin), ('rejected', other)):
    if before not in ((), prompt):
      raise Fault('order', row.origin, f'field {field}: begins with other turns than {name}; expected the same')
  turns.alternate(prompt, 'user', row.origin, name)
  return Preference(prompt, chosen, rejected, row.split, row.origin)


def _graded(row, options):
  if 'answers' not in row.fields:
    p = _preference(row, options)
    return Graded(p.prompt, (p.chosen, p.rejected), (1.0, 0.0), p.split, p.origin)
  answers, grades = (row.fields.get(name) for name in ('answers', 'grades'))
  if not isinstance(answers, list) or not isinstance(grades, list) or not len(answers) == len(grades) >= 2:
    shown = ' and '.join(f'{len(x)} of them' if isinstance(x, list) else turns.describe(x) for x in (answers, grades))
    raise Fault('answers', row.origin, f'fields answers and grades: found {shown}; expected two lists of one length, '
                'at least 2')
  texts = tuple(turns.text(row, 'answer', {'answer': x}, f'answers[{i}]') for i, x in enumerate(answers))
  for i, x in enumerate(grades):
    if isinstance(x, bool) or not isinstance(x, int | float) or not abs(x) < MOST:
      raise Fault('grade', row.origin, f'field grades[{i}]: found {turns.describe(x)}; expected a number below 1e30')
  name, prompt = ('prompt', ()) if row.fields.get('prompt') == '' else _asked(row)
  if not prompt and name != 'prompt':
    raise Fault('missing', row.origin, f"no field prompt{turns.names(row.fields)}; expected a string or turns, or ''")
  if prompt:
    turns.alternate(prompt, 'user', row.origin, name)
  return Graded(prompt, texts, tuple(map(float, grades)), row.split, row.origin)


def _asked(row):
  """(name of the field, the turns that are to be answered)."""
  asked = row.fields.get('prompt')
  if asked is None:
    return turns.conversation(row, answered=False)
  prompt = turns.turns(row, [turns.text(row, 'prompt')] if isinstance(asked, str) else asked, 'prompt')
  return 'prompt', turns.system(row) + prompt


def _answer(row, name):
  """(turns before the answer, the answer)."""
  value = row.fields.get(name)
  if not isinstance(value, Mapping | list):
    return (), turns.text(row, name)
  messages = turns.turns(row, [value] if isinstance(value, Mapping) else value, name)
  if messages[-1].role != 'assistant':
    raise Fault('order', row.origin, f'field {name}: ends with {messages[-1].role}; expected assistant')
  return messages[:-1], messages[-1].content


_PARSERS = {'classification': _labelled, 'instruction': _instruction, 'chat': _chat, 'preference': _preference,
            'graded': _graded}
