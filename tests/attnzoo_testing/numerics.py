"""Errors against a float64 truth, and the tolerance rule of every kernel."""

import jax.numpy as jnp
import numpy as np


def relative_error(got, truth) -> tuple[float, float]:
  """(RMS error, largest error), both relative to the RMS of the truth."""
  got, truth = np.asarray(got, np.float64), np.asarray(truth, np.float64)
  if got.shape != truth.shape:
    raise AssertionError(f"shape {got.shape} where the truth has {truth.shape}")
  if not truth.size:
    return 0.0, 0.0
  scale = np.sqrt(np.mean(truth**2)) or 1.0
  error = got - truth
  return float(np.sqrt(np.mean(error**2)) / scale), float(np.max(np.abs(error)) / scale)


def assert_as_exact(got: dict, portable: dict, truth: dict, dtype) -> dict[str, tuple]:
  """Each array of `got` errs at most 2 x as much as the portable path in the same dtype + 4 eps.

  Both the RMS and the largest error are held to it. Returns name -> (error, portable error).
  """
  eps = float(jnp.finfo(dtype).eps)
  report, wrong = {}, []
  for name, reference in truth.items():
    error, allowed = relative_error(got[name], reference), relative_error(portable[name], reference)
    report[name] = (error, allowed)
    limits = (2 * allowed[0] + 4 * eps, 2 * allowed[1] + 4 * eps * _peak(reference))
    if not (error[0] <= limits[0] and error[1] <= limits[1]):  # `not <=` so that NaN fails
      wrong.append(f"{name}: error {error} above {limits} (rms, max)")
  if wrong:
    raise AssertionError("; ".join(wrong))
  return report


def _peak(truth) -> float:
  """Largest entry relative to the RMS."""
  truth = np.asarray(truth, np.float64)
  if not truth.size:
    return 0.0
  return float(np.max(np.abs(truth)) / (np.sqrt(np.mean(truth**2)) or 1.0))
