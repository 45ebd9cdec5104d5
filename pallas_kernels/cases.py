"""The form of an operator's named cases, shared by tests, benchmarks, numerics and AOT compiles.

Each operator folder has a `cases.py` with `CASES` (a tuple of `Case`), `make_inputs(case, dtype)`
(the arguments as numpy arrays), `static_options(case)` (those that are not arrays), `flops(case)`
and `minimum_bytes(case, dtype)`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

# ci: small, run against the oracle; bench: timed; aot: compiled for accelerators that are not here.
TAGS = ("ci", "bench", "aot")


@dataclasses.dataclass(frozen=True)
class Case:
  """One named shape. `sizes` has the operator's axis sizes, `options` what else sets it apart."""

  name: str
  tags: tuple[str, ...]
  sizes: Mapping[str, int]
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if unknown := set(self.tags) - set(TAGS):
      raise ValueError(f"Case: tags must be among {TAGS}; got {sorted(unknown)} in {self.name}")


def tagged(cases: tuple[Case, ...], tag: str) -> tuple[Case, ...]:
  return tuple(case for case in cases if tag in case.tags)
