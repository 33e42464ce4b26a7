"""What one fine-tunes on, as values: `lm.data.examples` reads them and has their names too."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from lm.data import turns
from lm.data.json_io import Fault
from lm.data.turns import Message


@dataclasses.dataclass(frozen=True)
class Labelled:
  """A text of one class, or two texts of which one class is said: a premise and a hypothesis, two questions.

  Attributes (split and origin are those of all examples):
    label: a class, or a number where labels are such; None: it has none.
    metadata: whatever else the record had, by name: a domain, a group, a time.
    split: 'train', 'validation', 'test', or None: not said.
    origin: 'file:line' or 'file, row N'; no part of the value.
    text_pair: the second text, None where there is one text only.
  """

  text: str
  label: str | float | None
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
  split: str | None = None
  origin: str = dataclasses.field(default='', compare=False)
  text_pair: str | None = None

  @property
  def texts(self) -> tuple[str, ...]:
    """The text, or both in order."""
    return (self.text,) if self.text_pair is None else (self.text, self.text_pair)


@dataclasses.dataclass(frozen=True)
class Chat:
  """A system turn or none, then user and assistant by turns, the last from the assistant."""

  messages: tuple[Message, ...]
  split: str | None = None
  origin: str = dataclasses.field(default='', compare=False)

  def __post_init__(self):
    turns.alternate(self.messages, 'assistant', self.origin, 'messages')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A task, what it is to be done on ('' where the task says all), and the answer."""

  instruction: str
  input: str
  output: str
  task_type: str = ''
  split: str | None = None
  origin: str = dataclasses.field(default='', compare=False)

  def as_chat(self) -> Chat:
    """One user turn, which ends with the input, and one assistant turn."""
    answer = Message('assistant', self.output, where='output')
    return Chat((turns.instruction(self.instruction, self.input), answer), self.split, self.origin)


@dataclasses.dataclass(frozen=True)
class Preference:
  """Two answers to a conversation that ends with the user's turn."""

  prompt: tuple[Message, ...]
  chosen: str
  rejected: str
  split: str | None = None
  origin: str = dataclasses.field(default='', compare=False)

  def __post_init__(self):
    turns.alternate(self.prompt, 'user', self.origin, 'prompt')
    if self.chosen.strip() == self.rejected.strip():
      raise Fault('same', self.origin, 'fields chosen and rejected are the same; expected two answers')

  def as_chats(self) -> tuple[Chat, Chat]:
    """(the conversation with the chosen answer, that with the rejected one)."""
    chosen, rejected = (Chat((*self.prompt, Message('assistant', answer)), self.split, self.origin)
                        for answer in (self.chosen, self.rejected))
    return chosen, rejected


@dataclasses.dataclass(frozen=True)
class Graded:
  """Answers to a conversation that ends with the user's turn, or to none (prompt ()); a higher grade is better."""

  prompt: tuple[Message, ...]
  answers: tuple[str, ...]
  grades: tuple[float, ...]
  split: str | None = None
  origin: str = dataclasses.field(default='', compare=False)
