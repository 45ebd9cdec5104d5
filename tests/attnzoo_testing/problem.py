"""One problem of an operator, and what its kernels are held to: the portable path's error."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.numerics import assert_as_exact

NAMES = ("output",)


class Problem:
  """`call(**arrays, implementation=..., ...)` returns (output,); arrays of query's dtype are free.

  The portable path ("xla") and the definition in float64 ("reference") run once, when it is made,
  so that faults planted later reach neither.
  """

  def __init__(self, call: Callable, arrays: Mapping):
    self.call, self.arrays = call, arrays
    self.dtype = arrays["query"].dtype
    cotangent = cotangents(self._how(implementation="xla"), arrays)
    self.cotangent = tuple(np.asarray(c, self.dtype).astype(np.float64) for c in cotangent)
    self.narrow = self._run(arrays, implementation="xla")
    wide = {n: x.astype(np.float64) if x.dtype == self.dtype else x for n, x in arrays.items()}
    with jax.enable_x64(True):
      self.truth = self._run(wide, implementation="reference")

  def check(self, which: str = "gradients", **how) -> dict[str, np.ndarray]:
    """What `call(**how)` gives, at most 2 x the portable path's error + 4 eps away from the truth.

    which: "gradients" for output and gradients, "output" for the forward pass alone.
    """
    if which == "output":
      arrays = {name: jnp.asarray(x) for name, x in self.arrays.items()}
      got = {"output": jax.jit(self._how(**how))(**arrays)[0]}
    else:
      got = self._run(self.arrays, **how)
    assert_as_exact(got, self.narrow, {name: self.truth[name] for name in got}, self.dtype)
    return got

  def _how(self, **how):
    return lambda **arrays: self.call(**arrays, **how)

  def _run(self, arrays, **how):
    return results_and_gradients(self._how(**how), arrays, self.cotangent, NAMES)
