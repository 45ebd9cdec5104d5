"""What RAT attention remembers between calls, and where tokens stand in their document's chunks."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..segments import count_seen


class RatState(NamedTuple):
  """Summaries of the finished chunks of the current document, and its unfinished chunk.

  Slot c holds chunk c; the `position // L` first slots are filled, the others are never read and 0
  in a state that `rat_attention` returns. T tokens need T // L slots.
  """

  key: Float[Array, "B S H K"]  # rotated by the chunk's number
  value: Float[Array, "B S H K"]
  running_key: Float[Array, "B H K"]  # float32, not rotated; of the chunk that is under way
  running_value: Float[Array, "B H K"]
  position: Int[Array, " B"]  # tokens of the current document so far


class Places(NamedTuple):
  """Where each token stands. Slots count a row's finished chunks: the state's come first.

  A token of chunk c sees the finished chunks of its document, the slots in [first, own).
  """

  chunk: Int[Array, "B T"]  # number of its chunk in its document
  row: Int[Array, "B T"]  # place in its chunk, 0 to L - 1
  first: Int[Array, "B T"]  # slot of its document's first chunk
  own: Int[Array, "B T"]  # slot that its own chunk will have


def empty_state(batch: int, slots: int, heads: int, head_dim: int, dtype=jnp.float32) -> RatState:
  """The state before the first token; summaries in `dtype`, running sums at least float32."""
  wide = jnp.promote_types(dtype, jnp.float32)
  summaries = jnp.zeros((batch, slots, heads, head_dim), dtype)
  running = jnp.zeros((batch, heads, head_dim), wide)
  return RatState(summaries, summaries, running, running, jnp.zeros((batch,), jnp.int32))


def state_of_chunks(
  key: Float[Array, "B S H K"],
  value: Float[Array, "B S H K"],
  running_key: Float[Array, "B H K"],
  running_value: Float[Array, "B H K"],
  lengths: Int[Array, " B"] | None,
  length: int,
  chunk_size: int,
) -> RatState:
  """The state of rows of one document that began here, from the summaries of all their chunks.

  Of the summaries those are kept that lie before a row's length.
  """
  batch = key.shape[0]
  if lengths is None and length >= chunk_size:  # all are kept
    position = jnp.full((batch,), length, jnp.int32)
    return RatState(key, value, running_key, running_value, position)
  position = jnp.full((batch,), length) if lengths is None else jnp.clip(lengths, 0, length)
  return state_at(key, value, running_key, running_value, position, chunk_size)


def state_at(
  key: Float[Array, "B S H K"],
  value: Float[Array, "B S H K"],
  running_key: Float[Array, "B H K"],
  running_value: Float[Array, "B H K"],
  position: Int[Array, " B"],
  chunk_size: int,
) -> RatState:
  """The state after `position` tokens; the summaries may go on behind their chunks."""
  filled = (jnp.arange(key.shape[1]) < (position // chunk_size)[:, None])[..., None, None]
  key, value = (jnp.where(filled, x, 0) for x in (key, value))
  return RatState(key, value, running_key, running_value, position.astype(jnp.int32))


def find_places(
  segments: Int[Array, "B T"] | None, position: Int[Array, " B"], length: int, chunk_size: int
) -> Places:
  """Places of the tokens of rows whose document 0 already has `position` tokens."""
  index = count_seen(segments, position, length) - 1  # [B, T], in the document
  row = index % chunk_size
  finished = jnp.cumsum(row == chunk_size - 1, axis=1) - (row == chunk_size - 1)  # before t
  before = (position // chunk_size)[:, None]
  own = before + finished
  first = own - index // chunk_size
  return Places(index // chunk_size, row, first, own)
