"""Dropout as a function of a key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dropout(x: Float[Array, "..."], rate: float, key: jax.Array | None) -> Float[Array, "..."]:
  """Zeroes entries with probability `rate` and divides the others by 1 - rate; x without a key."""
  if key is None or not rate:
    return x
  kept = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def split_key(key: jax.Array | None, count: int) -> list[jax.Array | None]:
  """Keys for `count` uses; as many None without a key."""
  return [None] * count if key is None else list(jax.random.split(key, count))
