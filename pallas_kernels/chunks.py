"""Sequences in chunks: the decay and document factors of one chunk, cutting and joining.

Symbols: C rows per chunk, n of them real, i a row; `up` and `down` are decay^(i+1) and
decay^(n-1-i).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .segments import pad_length


class Weights(NamedTuple):
  """Decay factors of one chunk (P is B, or 1 where all rows are alike)."""

  mask: Float[Array, "P H C C"]  # decay^(i-j) for i >= j in the same document, else 0
  up: Float[Array, "P H C 1"]  # from the state before the chunk to row i
  down: Float[Array, "P H C 1"]  # from row i to the state after the chunk
  carry: Float[Array, "P H 1 1"]  # from the state before to the state after
  real: Float[Array, "P 1 C 1"]  # 1 for tokens, 0 for padding
  count: Int[Array, "P 1 1 1"]  # n


def chunk_weights(log_decay, chunk, segments, lengths, length):
  """Returns the function from a chunk's index to its `Weights`.

  What does not depend on the chunk is computed here, once, outside the scan.
  """
  rate = log_decay[:, None, None]  # [H, 1, 1]
  row = jnp.arange(chunk)[:, None]
  distance = row - row.T
  causal = jnp.where(distance >= 0, jnp.exp(rate * jnp.maximum(distance, 0)), 0)[None]
  up = jnp.exp(rate * (row + 1))[None]  # [1, H, C, 1]
  if lengths is None:
    lengths = jnp.full((1,), length)
  if segments is not None:
    segments = pad_length(segments, chunk)

  def weights(index):
    count = jnp.clip(lengths - index * chunk, 0, chunk)[:, None, None, None]  # [P, 1, 1, 1]
    real = (row < count).astype(log_decay.dtype)  # [P, 1, C, 1]
    down = real * jnp.exp(rate * jnp.maximum(count - 1 - row, 0))
    carry = jnp.exp(rate * count)
    if segments is None:
      return Weights(causal, up, down, carry, real, count)
    here = jax.lax.dynamic_slice_in_dim(segments, index * chunk, chunk, axis=1)  # [B, C]
    before = segment_at(segments, jnp.minimum(index * chunk, lengths) - 1)  # [B, 1]
    after = segment_at(segments, jnp.minimum((index + 1) * chunk, lengths) - 1)
    same = (here[:, :, None] == here[:, None, :])[:, None]  # [B, 1, C, C]
    return Weights(
      mask=causal * same,
      up=up * (here == before)[:, None, :, None],
      down=down * (here == after)[:, None, :, None],
      carry=carry * (before == after)[:, :, None, None],
      real=real,
      count=count,
    )

  return weights


def segment_at(segments, position):
  """Document of the token at `position` [B or 1]; before the first, 0, the initial state's."""
  position = jnp.broadcast_to(position, segments.shape[:1])
  found = jnp.take_along_axis(segments, jnp.maximum(position, 0)[:, None], axis=1)
  return jnp.where(position[:, None] < 0, 0, found)


def cut_chunk(x, index, chunk):
  """Rows of one chunk, heads first: [B, N C, H, D] -> [B, H, C, D]."""
  return jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis=1).swapaxes(1, 2)


def join_chunks(x, length):
  """[N, B, C, H, D] -> [B, T, H, D]."""
  count, batch, chunk, heads, dim = x.shape
  return x.swapaxes(0, 1).reshape(batch, count * chunk, heads, dim)[:, :length]
