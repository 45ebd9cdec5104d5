"""Packed documents and padding: the arithmetic every operator shares."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def run_index(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """Numbers the runs of equal ids 0, 1, 2, ...: a change of id starts a new document.

  Ids may repeat later in a row (0 0 1 0); after this they do not, so equal means same document.
  """
  changed = segment_ids[:, 1:] != segment_ids[:, :-1]
  return jnp.pad(jnp.cumsum(changed, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def last_segment(segment_ids: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Int[Array, " B"]:
  """Segment of each row's last real token; 0 where the row has none."""
  last = jnp.maximum(lengths - 1, 0)[:, None]
  return jnp.take_along_axis(segment_ids, last, axis=1)[:, 0]


def pad_length(array: jax.Array, multiple: int, axis: int = 1, value: int = 0) -> jax.Array:
  """Pads `axis` at its end up to a multiple."""
  short = -array.shape[axis] % multiple
  if not short:
    return jnp.asarray(array)
  widths = [(0, 0)] * array.ndim
  widths[axis] = (0, short)
  return jnp.pad(array, widths, constant_values=value)
