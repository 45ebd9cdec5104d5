"""Matrix products with float32 accumulation, the same rounding rule in every implementation."""

import jax
import jax.numpy as jnp

# Contractions of two 2-D tiles: a @ b, a @ b.T and a.T @ b.
NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))
TN = (((0,), (0,)), ((), ()))


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision:
  """float32 operands are multiplied as float32 (TPUs would round them to bfloat16 by default)."""
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def einsum_f32(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Two-operand einsum that accumulates at least in float32; `b` is rounded to the dtype of `a`."""
  accumulator = jnp.promote_types(a.dtype, jnp.float32)
  return jnp.einsum(
    equation,
    a,
    b.astype(a.dtype),
    precision=precision_of(a.dtype),
    preferred_element_type=accumulator,
  )


def dot_f32(a: jax.Array, b: jax.Array, contraction: tuple) -> jax.Array:
  """Product of two 2-D tiles inside a kernel, float32 out; `b` is rounded to the dtype of `a`."""
  return jax.lax.dot_general(
    a,
    b.astype(a.dtype),
    contraction,
    precision=precision_of(a.dtype),
    preferred_element_type=jnp.float32,
  )
