"""Errors that end a run, each with its exit status.

A message names where (flag, field or file), what was found, what was expected and one thing to do.
"""


class Error(Exception):
  """A failure that a person can mend; the front door prints it on one line, without a traceback."""

  code = 1


class ConfigError(Error):
  """A flag or a config field is wrong: found before anything is compiled."""

  code = 2


class DataError(Error):
  """A corpus, tokenizer, shard or document is missing, damaged or does not fit the model."""

  code = 3


class CheckpointError(Error):
  """A checkpoint cannot be written, or none can be trusted."""

  code = 4


class Diverged(Error):
  """The loss or the gradient stayed non-finite; the last good checkpoint is kept."""

  code = 5


class Lost(Error):
  """Another process of the job is stuck or gone; starting the job again resumes."""

  code = 70


class Preempted(Error):
  """SIGTERM arrived and the state was saved; starting again resumes (EX_TEMPFAIL)."""

  code = 75


class Interrupted(Error):
  """Ctrl-C, after the state was saved."""

  code = 130
