"""The definition, in the dtype of its arguments."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attention_weights(
  query: Float[Array, "L K"],
  key: Float[Array, "B T K"],
  mask: Bool[Array, "B T"] | None,
  scale: float,
) -> Float[Array, "B L T"]:
  """softmax over the real tokens of a document; zeros where it has none."""
  scores = scale * jnp.einsum("lk,btk->blt", query, key, precision=jax.lax.Precision.HIGHEST)
  if mask is None:
    return jax.nn.softmax(scores, axis=-1)
  real = mask[:, None, :]
  # A document without tokens is taken as if all were real, and then set to 0.
  some = jnp.any(real, axis=-1, keepdims=True)
  return jnp.where(real, jax.nn.softmax(jnp.where(real | ~some, scores, -jnp.inf), axis=-1), 0)


def code_attention_reference(
  query: Float[Array, "L K"],
  key: Float[Array, "B T K"],
  value: Float[Array, "B T V"],
  mask: Bool[Array, "B T"] | None,
  scale: float,
) -> Float[Array, "B L V"]:
  weights = attention_weights(query, key, mask, scale)
  return jnp.einsum("blt,btv->blv", weights, value, precision=jax.lax.Precision.HIGHEST)
