"""The window: which keys it holds, and the ring buffer that carries them from call to call."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..checks import fail
from .history import History, Tokens, final_document

CONVENTIONS = ("half", "left", "total")


class WindowState(NamedTuple):
  """The last `left` keys and values of the current document, a ring buffer.

  Token number p of the document (from 0) is in slot p mod left, so `min(count, left)` slots are
  filled; what the others hold does not matter.
  """

  key: Float[Array, "B left G K"]
  value: Float[Array, "B left G V"]
  count: Int[Array, " B"]  # tokens of the current document so far


def left_keys(window_size: int, convention: str = "half") -> int:
  """How many keys to the left of its own a query sees, by what `window_size` means.

  "half": floor(window_size / 2), as the released BASED hands it to flash attention;
  "left": window_size (Zoology); "total": window_size - 1, the own key counted.
  """
  if convention not in CONVENTIONS:
    fail("left_keys", "convention", f"be one of {CONVENTIONS}", repr(convention),
         '"half" is that of the released BASED')  # fmt: skip
  smallest = 1 if convention == "total" else 0
  if window_size < smallest:
    fail("left_keys", "window_size", f"be at least {smallest}", window_size,
         "the window is causal and contains the query's own key")  # fmt: skip
  return {"half": window_size // 2, "left": window_size, "total": window_size - 1}[convention]


def empty_window(
  batch: int, left: int, kv_heads: int, key_dim: int, value_dim: int, dtype: DTypeLike
) -> WindowState:
  """The state before the first token."""
  key = jnp.zeros((batch, left, kv_heads, key_dim), dtype)
  value = jnp.zeros((batch, left, kv_heads, value_dim), dtype)
  return WindowState(key, value, jnp.zeros((batch,), jnp.int32))


def slot_numbers(count: Int[Array, " B"], left: int) -> Int[Array, "B left"]:
  """Number of the token in each slot after `count` tokens, -1 where there is none."""
  if left == 0:
    return jnp.zeros((*count.shape, 0), jnp.int32)
  newest = count[:, None] - 1
  number = newest - (newest - jnp.arange(left)) % left  # the last one <= newest of its slot
  return jnp.maximum(number, -1).astype(jnp.int32)


def oldest_first(state: WindowState) -> History:
  """The stored keys and values in order of age, the newest last; empty slots come first."""
  state = WindowState(*map(jnp.asarray, state))
  left = state.key.shape[1]
  if left == 0:
    return History(state.key, state.value, jnp.zeros(state.key.shape[:2], jnp.int32))
  age = jnp.arange(left)
  slot = (state.count[:, None] + age) % left  # [B, left]
  rows = jnp.arange(slot.shape[0])[:, None]
  filled = age >= left - state.count[:, None]
  return History(
    state.key[rows, slot], state.value[rows, slot], jnp.where(filled, 0, -1).astype(jnp.int32)
  )


def window_after(
  tokens: Tokens,
  segments: Int[Array, "B T"] | None,
  lengths: Int[Array, " B"] | None,
  count: Int[Array, " B"] | None,
  left: int,
) -> WindowState:
  """The state after the last real token: its document's last `left` keys, in their slots.

  `count` is that of the state before; `tokens` are the keys and values with that state in front.
  """
  batch, stored = tokens.key.shape[0], tokens.key.shape[1] - tokens.length
  stop, document, count = final_document(tokens, segments, lengths, count)
  if left == 0:
    return WindowState(tokens.key[:, :0], tokens.value[:, :0], count)
  # Slot s holds the token that is (s - count) mod left places after the oldest of the last `left`.
  place = (jnp.arange(left) - count[:, None]) % left
  position = stored + stop[:, None] - left + place  # [B, left]
  kept = position >= 0
  position = jnp.maximum(position, 0)
  rows = jnp.arange(batch)[:, None]
  if tokens.documents is not None:
    kept &= tokens.documents[rows, position] == document[:, None]
  kept = kept[..., None, None]
  return WindowState(
    jnp.where(kept, tokens.key[rows, position], 0),
    jnp.where(kept, tokens.value[rows, position], 0),
    count,
  )


def filled_slots(state: WindowState) -> jax.Array:
  """bool [B, left]: which slots hold a token of the current document."""
  return jnp.arange(state.key.shape[1]) < state.count[:, None]
