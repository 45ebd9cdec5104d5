"""Packed documents and padding: the arithmetic every operator shares."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def run_index(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """Numbers the runs of equal ids 0, 1, 2, ...: a change of id starts a new document.

  Ids may repeat later in a row (0 0 1 0); after this they do not, so equal means same document.
  """
  return jnp.cumsum(starts(segment_ids), axis=1, dtype=jnp.int32)


def starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
  """Whether a token is the first of its document; False for the first of the row, which may not be.

  The document of a row's first token may have begun in an earlier call.
  """
  return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def last_segment(segment_ids: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Int[Array, " B"]:
  """Segment of each row's last real token; 0 where the row has none."""
  last = jnp.maximum(lengths - 1, 0)[:, None]
  return jnp.take_along_axis(segment_ids, last, axis=1)[:, 0]


def pad_length(array: jax.Array, multiple: int, axis: int = 1, value: int | float = 0) -> jax.Array:
  """Pads `axis` at its end up to a multiple."""
  short = -array.shape[axis] % multiple
  if not short:
    return jnp.asarray(array)
  widths = [(0, 0)] * array.ndim
  widths[axis] = (0, short)
  return jnp.pad(array, widths, constant_values=value)


def zero_padding(
  output: Float[Array, "B T H V"], lengths: Int[Array, " B"] | None
) -> Float[Array, "B T H V"]:
  """0 at and after each row's length. No real token sees padding, so nothing else need know."""
  if lengths is None:
    return jnp.asarray(output)
  real = jnp.arange(output.shape[1]) < lengths[:, None]
  return jnp.where(real[..., None, None], output, jnp.zeros((), output.dtype))


def count_seen(
  segments: Int[Array, "B T"] | None, before: Int[Array, " B"] | None, length: int
) -> Int[Array, "P T"]:
  """Tokens of its own document up to and including each token.

  Document 0 had `before` tokens already. P is B, or 1 where all rows are alike.
  """
  index = jnp.arange(1, length + 1, dtype=jnp.int32)
  if segments is None:
    return index[None] + (0 if before is None else before[:, None])
  start = jax.lax.cummax(jnp.where(starts(segments), index - 1, 0), axis=1)
  return index - start + (0 if before is None else jnp.where(segments == 0, before[:, None], 0))


def count_total(
  segments: Int[Array, "B T"] | None,
  lengths: Int[Array, " B"] | None,
  before: Int[Array, " B"] | None,
  length: int,
) -> Int[Array, "P T"]:
  """Real tokens of each token's whole document, at least 1; arguments as `count_seen`."""
  batch = next((x.shape[0] for x in (segments, lengths, before) if x is not None), 1)
  real = jnp.full((batch, length), 1, jnp.int32)
  if lengths is not None:
    real = (jnp.arange(length) < lengths[:, None]).astype(jnp.int32)
  if segments is None:
    total = jnp.sum(real, axis=1, keepdims=True) + (0 if before is None else before[:, None])
    return jnp.maximum(jnp.broadcast_to(total, real.shape), 1)
  rows = jnp.arange(batch)[:, None]
  total = jnp.zeros((batch, length), jnp.int32).at[rows, segments].add(real)[rows, segments]
  total += 0 if before is None else jnp.where(segments == 0, before[:, None], 0)
  return jnp.maximum(total, 1)
