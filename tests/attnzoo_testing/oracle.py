"""An operator's named cases against its definition in float64: what every form is held to."""

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from attnzoo.pallas_kernels.cases import tagged
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.numerics import assert_as_exact, relative_error


class Expected(NamedTuple):
  inputs: dict[str, np.ndarray]
  cotangent: tuple[np.ndarray, ...]
  narrow: dict[str, np.ndarray]  # of the definition in float32
  truth: dict[str, np.ndarray]  # of the definition in float64


def widen(inputs: dict) -> dict:
  return {n: x.astype(np.float64) if x.dtype == np.float32 else x for n, x in inputs.items()}


class Oracle:
  """The truth of an operator's "ci" cases; computed once per case and process.

  `operator(**arrays, implementation=..., **options)` returns the arrays called `names`; `cases` is
  the operator's module of cases.
  """

  def __init__(self, operator: Callable, cases: types.ModuleType, names: tuple[str, ...]):
    self.operator, self.cases, self.names = operator, cases, names
    self.ci = {case.name: case for case in tagged(cases.CASES, "ci")}
    self.expected = functools.cache(self._expected)

  def options(self, name: str) -> dict[str, Any]:
    return self.cases.static_options(self.ci[name])

  def _expected(self, name: str) -> Expected:
    inputs = self.cases.make_inputs(self.ci[name])
    options = dict(self.options(name), implementation="reference")
    reference = functools.partial(self.operator, **options)
    cotangent = cotangents(reference, inputs)
    narrow = results_and_gradients(reference, inputs, cotangent, self.names)
    with jax.enable_x64(True):
      truth = results_and_gradients(reference, widen(inputs), cotangent, self.names)
    return Expected(inputs, cotangent, narrow, truth)

  def compare(self, name: str, **options) -> dict[str, tuple]:
    """In float32 at most 2 x the error of the definition itself + 4 eps, gradients included."""
    inputs, cotangent, narrow, truth = self.expected(name)
    function = functools.partial(self.operator, **self.options(name), **options)
    got = results_and_gradients(function, inputs, cotangent, self.names)
    return assert_as_exact(got, narrow, truth, np.float32)

  def compare_wide(self, name: str, **options) -> None:
    """In float64 nothing but rounding is left, so no mistake can hide in a tolerance.

    Rounding: that of a sum over the tokens, or, where terms cancel, twice what the definition
    itself loses in float32, in units of the last place.
    """
    inputs, cotangent, narrow, truth = self.expected(name)
    function = functools.partial(self.operator, **self.options(name), **options)
    with jax.enable_x64(True):
      got = results_and_gradients(function, widen(inputs), cotangent, self.names)
    for result, array in truth.items():
      if np.max(np.abs(array), initial=0) < 64 * np.finfo(np.float64).eps:  # exactly 0, rounded
        assert np.max(np.abs(got[result]), initial=0) < 64 * np.finfo(np.float64).eps, result
        continue
      lost = relative_error(narrow[result], array)[0] / np.finfo(np.float32).eps
      limit = max(64, inputs["query"].shape[1], 2 * lost) * np.finfo(np.float64).eps
      error = relative_error(got[result], array)[0]
      assert error <= limit, f"{result}: error {error} above {limit}"
