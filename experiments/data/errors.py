"""The error of everything that reads data: one line that names the path and says what to do."""

import difflib
from collections.abc import Iterable


class DataError(ValueError):
  """What the user asked for cannot be read. The message is meant for the user as it stands."""


def refuse(argument: str, rule: str, got: object, hint: str) -> DataError:
  """The error `data: <argument> must <rule>; got <got> (<hint>)`, for the caller to raise."""
  return DataError(f"data: {argument} must {rule}; got {got} ({hint})")


def suggest(name: str, choices: Iterable[str]) -> str:
  """`did you mean 'x'? the choices are ...`, for an unknown name."""
  choices = sorted(choices)
  nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.4)
  listed = "the choices are " + ", ".join(map(repr, choices))
  return f"did you mean {nearest[0]!r}? {listed}" if nearest else listed
