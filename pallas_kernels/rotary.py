"""Rotary positions as arithmetic on arrays: tables of cosines and sines, and the turn itself."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Tables = tuple[jax.Array, jax.Array]


def rotary_tables(
  positions: Int[Array, "*B"], dim: int, base: float | None, dtype=jnp.float32
) -> Tables | None:
  """cos and sin of position base^(-2 i / dim) for the dim / 2 pairs, each [*B, dim / 2].

  An odd dim has (dim + 1) / 2 pairs. None for base None, which `rotate` takes for no turn.
  """
  if base is None:
    return None
  # In float64 first: a rounded exponent would be a wrong angle at far positions.
  rates = base ** (-2.0 * np.arange((dim + 1) // 2) / dim)
  angles = positions[..., None].astype(dtype) * jnp.asarray(rates, dtype)
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "*B K"], tables: Tables | None) -> Float[Array, "*B K"]:
  """Turns channel i together with channel i + K / 2 (halves, not neighbours), in float32 or wider.

  The tables broadcast against x.
  """
  if tables is None:
    return x
  cos, sin = tables
  first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, cos.dtype)), 2, -1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
  return turned.astype(x.dtype)
