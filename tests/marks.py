"""What the default suite leaves to CI."""

import pytest


def slow(*values, id=None):
  """A case of parametrize that only `-m slow` runs."""
  return pytest.param(*values, id=id, marks=pytest.mark.slow)
