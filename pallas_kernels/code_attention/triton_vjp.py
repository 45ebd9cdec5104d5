"""Label-wise attention on NVIDIA GPUs: the differentiable function."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..triton_call import run_launches, target_gpu
from .triton import NAME, Problem, backward_launches, choose_config, fits, forward_launches


class Residuals(NamedTuple):
  """What the backward pass needs: the inputs, and 8 bytes per document and label."""

  query: Float[Array, "L K"]
  key: Float[Array, "B T K"]
  value: Float[Array, "B T V"]
  mask: Bool[Array, "B T"] | None
  top: Float[Array, "B L"]  # the largest product, with the scale's sign; -inf without tokens
  inverse: Float[Array, "B L"]  # 1 / the sum of e^(scale (product - top)); 0 without tokens


INPUTS = Residuals._fields[:4]


def code_attention_triton(
  query: Float[Array, "L K"],
  key: Float[Array, "B T K"],
  value: Float[Array, "B T V"],
  mask: Bool[Array, "B T"] | None,
  scale: float,
) -> Float[Array, "B L V"]:
  """Output; the arguments are those of `code_attention_xla`.

  Compiles for NVIDIA GPUs only. float32 inputs are multiplied as three tf32 products. Gradients for
  query, key and value.
  """
  if reason := fits(query, key, value):
    raise NotImplementedError(f'{NAME}: {reason} for the Triton kernels (use "xla")')
  return _attend(query, key, value, mask, float(scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, mask, scale):
  return _run_forward((query, key, value, mask), scale, statistics=False)["output"]


def _forward(query, key, value, mask, scale):
  arrays = _run_forward((query, key, value, mask), scale, statistics=True)
  kept = Residuals(query, key, value, mask, arrays["top"], arrays["inverse"])
  return arrays["output"], kept


def _run_forward(inputs, scale, statistics):
  arrays = dict(zip(INPUTS, inputs, strict=True))
  problem, gpu = problem_of(arrays, scale), target_gpu(NAME)
  config = choose_config(problem, gpu)
  given = prepared(arrays, config.forward.tokens)
  return run_launches(forward_launches(problem, config, statistics), given, gpu)


def _backward(scale, residuals, d_output):
  arrays = residuals._asdict() | dict(d_output=d_output)
  problem, gpu = problem_of(arrays, scale), target_gpu(NAME)
  config = choose_config(problem, gpu)
  given = prepared(arrays, config.query_gradient.tokens)
  arrays = run_launches(backward_launches(problem, config), given, gpu)
  d_query = sum_of_parts(arrays["d_query_parts"], problem)
  return d_query, arrays["d_key"], arrays["d_value"], None


_attend.defvjp(_forward, _backward)


def problem_of(arrays: dict[str, Any], scale: float) -> Problem:
  """The problem of arrays under the names of `Residuals`; an absent mask is None or not there."""
  query, value = arrays["query"], arrays["value"]
  (labels, dim), (batch, length, value_dim) = query.shape, value.shape
  masked = arrays.get("mask") is not None
  return Problem(batch, labels, length, dim, value_dim, query.dtype.name, masked, scale)


def prepared(arrays: dict[str, Any], tile: int) -> dict[str, Any]:
  """The arrays, the mask as the kernels want it: `real`, and the list of blocks with real tokens.

  `blocks`, [B, T / tile], has the numbers of those with real tokens first, in order; `filled`, [B],
  says how many they are.
  """
  mask = arrays.get("mask")
  if mask is None:
    return arrays
  batch, length = mask.shape
  padded = jnp.pad(mask, ((0, 0), (0, -length % tile)))
  some = jnp.any(padded.reshape(batch, -1, tile), axis=2)
  blocks = jnp.argsort(~some, axis=1, stable=True).astype(jnp.int32)
  filled = jnp.sum(some, axis=1, dtype=jnp.int32)
  return arrays | dict(real=jnp.asarray(mask, jnp.int32), blocks=blocks, filled=filled)


def sum_of_parts(parts: Float[Array, "P L K"], problem: Problem) -> Float[Array, "L K"]:
  """The gradient of the queries from those of parts of the batch."""
  return jnp.sum(parts, axis=0).astype(problem.dtype)
