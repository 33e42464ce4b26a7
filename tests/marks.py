"""What the default suite leaves to CI."""

import pytest


def slow(*values, id=None):
  """A case of parametrize that only `-m slow` runs."""
  return pytest.param(*values, id=id, marks=pytest.mark.slow)


def few(values, *quick):
  """Cases of parametrize: `quick` ones, and the others of `values` as `slow`."""
  return [v if v in quick else slow(v) for v in values]
