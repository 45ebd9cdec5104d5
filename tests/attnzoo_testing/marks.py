"""Which of many like tests `make test-fast` runs."""

from collections.abc import Iterable

import pytest


def slow_but(parameters: Iterable, *quick) -> list:
  """For `pytest.mark.parametrize`: all parameters, marked slow but for the `quick` ones."""
  parameters = list(parameters)
  if missing := [one for one in quick if one not in parameters]:
    raise ValueError(f"slow_but: quick must be among the parameters; got {missing}")
  return [
    one if one in quick else pytest.param(*_values(one), marks=pytest.mark.slow)
    for one in parameters
  ]


def _values(parameter):
  return parameter if isinstance(parameter, tuple) else (parameter,)
