"""Which of many like tests `make test-fast`, `make test` and `make test-all` run."""

from collections.abc import Iterable

import pytest


def slow_but(parameters: Iterable, *quick) -> list:
  """For `pytest.mark.parametrize`: all parameters, marked slow but for the `quick` ones."""
  return thinned(parameters, quick, slow=parameters)


def thinned(parameters: Iterable, quick: Iterable = (), slow: Iterable = ()) -> list:
  """All parameters: `quick` ones unmarked, `slow` ones marked so, the others "exhaustive".

  For variations of what the others run: nothing may be left to "exhaustive" tests alone.
  """
  parameters, quick, slow = list(parameters), list(quick), list(slow)
  if missing := [one for one in (*quick, *slow) if one not in parameters]:
    raise ValueError(f"thinned: quick and slow must be among the parameters; got {missing}")

  def marked(one):
    if one in quick:
      return one
    mark = pytest.mark.slow if one in slow else pytest.mark.exhaustive
    return pytest.param(*_values(one), marks=mark)

  return [marked(one) for one in parameters]


def some_faults(faults: Iterable, *quick) -> list:
  """Seeded faults that tests must see: the first three and the `quick` ones, else exhaustive."""
  faults = list(faults)
  return thinned(faults, quick, slow=[f for f in faults[:3] if f not in quick])


def each_once(parameters: Iterable[tuple], *quick: tuple) -> list:
  """Of combinations as few as have every value of every column; the others are exhaustive."""
  parameters, seen, slow = list(parameters), set(), []
  for one in (*quick, *parameters):
    values = set(enumerate(map(repr, one)))
    if values - seen and one not in quick:
      slow.append(one)
    seen |= values
  return thinned(parameters, quick, slow)


def _values(parameter):
  return parameter if isinstance(parameter, tuple) else (parameter,)
