"""Argument checks shared by the operators. Everything is raised at trace time.

Message form: `<function>: <argument> must <rule>; got <value> (<hint>)`.
"""

import jax
import jax.numpy as jnp
import numpy as np

IMPLEMENTATIONS = ("reference", "xla", "tpu", "triton")


def fail(function: str, argument: str, rule: str, got: object, hint: str) -> None:
  raise ValueError(f"{function}: {argument} must {rule}; got {got} ({hint})")


def check_sequence(function: str, **arrays: jax.Array) -> None:
  """Every array is float [B, T, H, D] with equal B, T and H, and nothing is empty."""
  first_name, first = next(iter(arrays.items()))
  for name, array in arrays.items():
    if array.ndim != 4:
      fail(function, name, "have 4 axes [batch, length, heads, head_dim]", array.shape,
           "add or split axes")  # fmt: skip
    if not jnp.issubdtype(array.dtype, jnp.floating):
      fail(function, name, "be floating point", array.dtype, "cast it to float32 or bfloat16")
    if 0 in array.shape:
      fail(function, name, "have no empty axis", array.shape, "length must be at least 1")
    if array.shape[:3] != first.shape[:3]:
      fail(function, name, f"agree with {first_name} in batch, length and heads {first.shape[:3]}",
           array.shape[:3], "check the axis order [batch, length, heads, head_dim]")  # fmt: skip
    if array.dtype != first.dtype:
      fail(function, name, f"have the dtype of {first_name}, {first.dtype}", array.dtype,
           "cast all of them to one dtype")  # fmt: skip


def check_shape(function: str, name: str, array: jax.Array | None, shape: tuple, hint: str) -> None:
  if array is not None and array.shape != shape:
    fail(function, name, f"have shape {shape}", array.shape, hint)


def check_segments(function: str, segment_ids: jax.Array | None, batch: int, length: int) -> None:
  check_shape(function, "segment_ids", segment_ids, (batch, length), "one id per token")
  check_integer(function, "segment_ids", segment_ids)


def check_integer(function: str, name: str, array: jax.Array | None) -> None:
  if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
    fail(function, name, "be integers", array.dtype, "cast to int32")


def check_not_positive(function: str, name: str, array: jax.Array | None, hint: str) -> None:
  """Refuses positive entries where the values are known at trace time."""
  if array is None or isinstance(array, jax.core.Tracer):
    return
  largest = float(np.max(np.asarray(array, np.float64)))
  if not largest <= 0:
    fail(function, name, "be <= 0 everywhere", f"a largest value of {largest:g}", hint)


def check_implementation(function: str, implementation: str | None) -> None:
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    choices = ", ".join(map(repr, IMPLEMENTATIONS))
    fail(function, "implementation", f"be None or one of {choices}", repr(implementation),
         "None chooses by platform")  # fmt: skip
