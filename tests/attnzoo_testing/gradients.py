"""Outputs and gradients of an operator under one named dictionary, ready to be compared."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np


def cotangents(function: Callable, inputs: Mapping, seed: int = 1) -> tuple[np.ndarray, ...]:
  """Standard normal cotangents, float64, for every result of `function(**inputs)`."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: function(**inputs))
  return tuple(rng.standard_normal(result.shape) for result in shapes)


def results_and_gradients(
  function: Callable, inputs: Mapping, cotangent: tuple, names: tuple[str, ...]
) -> dict[str, np.ndarray]:
  """Runs forward and backward under jit, with respect to every float input.

  `names` are those of the results; the gradient of `x` is called `d_x`.
  """
  inputs = {name: jnp.asarray(value) for name, value in inputs.items()}
  floats = {n: x for n, x in inputs.items() if jnp.issubdtype(x.dtype, jnp.floating)}
  others = {n: x for n, x in inputs.items() if n not in floats}

  @jax.jit
  def run(floats, others, cotangent):
    results, pull = jax.vjp(lambda f: function(**f, **others), floats)
    cotangent = jax.tree.map(lambda c, r: c.astype(r.dtype), tuple(cotangent), results)
    return results, pull(cotangent)[0]

  results, gradients = jax.device_get(run(floats, others, cotangent))
  named = dict(zip(names, results, strict=True))
  return named | {f"d_{name}": gradient for name, gradient in gradients.items()}
