"""The form of an operator's named cases, shared by tests, benchmarks, numerics and AOT compiles.

Each operator folder has a `cases.py` with `CASES` (a tuple of `Case`), `make_inputs(case, dtype)`
(the arguments as numpy arrays), `static_options(case)` (those that are not arrays), `flops(case)`
and `minimum_bytes(case, dtype)`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

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


def make_rows(
  options: Mapping[str, Any], rng: np.random.Generator, batch: int, length: int
) -> dict[str, np.ndarray]:
  """`segment_ids` and `lengths` as the options `segments` and `lengths` say, if they do."""
  rows = {}
  if options.get("segments") == "packed":
    starts = rng.random((batch, length)) < 4 / length
    rows["segment_ids"] = np.cumsum(starts, axis=1, dtype=np.int32)
  elif options.get("segments") == "single":
    rows["segment_ids"] = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
  if options.get("lengths"):
    rows["lengths"] = rng.integers(1, length + 1, batch).astype(np.int32)
    rows["lengths"][:2] = length, 0
  return rows
