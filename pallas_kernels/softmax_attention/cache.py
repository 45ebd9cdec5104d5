"""The cache of keys and values that decoding with full attention fills."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..sliding_window_attention.history import History, Tokens, final_document


class CacheState(NamedTuple):
  """All keys and values of the current document: token number p (from 0) is in slot p.

  What the slots from `count` on hold does not matter. A document of more than S tokens does not
  fit; `count` then exceeds S, and a call or step that continues it gives NaN.
  """

  key: Float[Array, "B S G K"]
  value: Float[Array, "B S G V"]
  count: Int[Array, " B"]


def empty_cache(
  batch: int, max_length: int, kv_heads: int, key_dim: int, value_dim: int, dtype: DTypeLike
) -> CacheState:
  """The state before the first token of documents of up to `max_length` tokens."""
  key = jnp.zeros((batch, max_length, kv_heads, key_dim), dtype)
  value = jnp.zeros((batch, max_length, kv_heads, value_dim), dtype)
  return CacheState(key, value, jnp.zeros((batch,), jnp.int32))


def slot_numbers(count: Int[Array, " B"], slots: int) -> Int[Array, "B S"]:
  """Number of the token in each slot after `count` tokens, -1 where there is none."""
  slot = jnp.arange(slots, dtype=jnp.int32)
  return jnp.where(slot < count[:, None], slot, -1)


def stored(state: CacheState) -> History:
  """The cache in front of the tokens of a call; all of it, slots without a token included."""
  documents = jnp.minimum(slot_numbers(state.count, state.key.shape[1]), 0)
  return History(state.key, state.value, documents)


def cache_after(
  tokens: Tokens,
  segments: Int[Array, "B T"] | None,
  lengths: Int[Array, " B"] | None,
  count: Int[Array, " B"] | None,
) -> CacheState:
  """The state after the last real token; `tokens` has the state before, with `count`, in front.

  As many slots as before; where there was no state before, as many as the call has tokens.
  """
  batch, total = tokens.key.shape[:2]
  before = total - tokens.length
  stop, document, new_count = final_document(tokens, segments, lengths, count)
  slots = before or tokens.length
  slot = jnp.arange(slots)
  # The final document's tokens of this call are the last before `stop`, in order.
  position = before + (stop - new_count)[:, None] + slot  # [B, S]
  if count is not None:
    kept = (document[:, None] == 0) & (slot < count[:, None])
    position = jnp.where(kept, slot, position)
  filled = (slot < new_count[:, None])[..., None, None]
  position = jnp.clip(position, 0, total - 1)
  rows = jnp.arange(batch)[:, None]
  return CacheState(
    jnp.where(filled, tokens.key[rows, position], 0),
    jnp.where(filled, tokens.value[rows, position], 0),
    new_count,
  )


def spoil_overflow(output: Array, count: Int[Array, " B"], slots: int) -> Array:
  """NaN in rows that continue a document of which the cache lacks tokens; output [B, ...]."""
  full = (count > slots).reshape(-1, *(1,) * (output.ndim - 1))
  return jnp.where(full, jnp.asarray(jnp.nan, output.dtype), output)
