"""Interleaved timing: every candidate once, then every candidate again, in one process."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Spread:
  """Seconds of one run: median, 20th and 80th percentile, and how many runs."""

  median: float
  p20: float
  p80: float
  runs: int


def interleaved(
  candidates: Mapping[str, Callable[[], object]], repeats: int, most_seconds: float
) -> dict[str, Spread]:
  """Times functions that wait for their own results and have been called once (compiled) before.

  A candidate leaves the rounds early when its own runs have taken `most_seconds`, but not before it
  has run three times. Neighbours on a shared machine then disturb all candidates alike.
  """
  seconds = {name: [] for name in candidates}
  for _ in range(repeats):
    for name, run in candidates.items():
      if len(seconds[name]) >= 3 and sum(seconds[name]) >= most_seconds:
        continue
      start = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - start)
  return {name: spread(values) for name, values in seconds.items()}


def spread(seconds: list[float]) -> Spread:
  median, p20, p80 = np.percentile(seconds, (50, 20, 80))
  return Spread(float(median), float(p20), float(p80), len(seconds))


def cpu_threads() -> int:
  """CPUs this process may use: what XLA's own thread pool is sized by. torch is set to the same."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
