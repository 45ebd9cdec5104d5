"""Rows of several documents, laid out so that every document starts a chunk of its own.

Then chunks never hold tokens of two documents, the kernels' recurrences need to know nothing of
documents, and of the softmax only from which slot on a token sees. A document's last chunk may have
fewer than L tokens; nobody sees its summary. How many chunks are worked on together is fixed
beforehand (`capacity`). Rows of more, very short documents do not fit; they are walked through in
windows of whole documents, or left to the portable path (`by_rows`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..segments import count_seen, last_segment
from .state import Places, RatState, state_at
from .xla import rat_attention_xla

SHARE = 8  # one chunk more for so many that the tokens fill,
LEAST = 8  # but at least so many


class Layout(NamedTuple):
  """Where tokens are. Slots count the chunks of a row, finished or not, however many they are."""

  places: Places  # `first` and `own`: slots of its document's first chunk, and of its own
  end: Int[Array, "B T"]  # slot of its document's last chunk
  total: Int[Array, " B"]  # slots of the row
  # Of each row's last document:
  first: Int[Array, " B"]  # slot
  position: Int[Array, " B"]  # tokens that it has
  row: Int[Array, " B"]  # of its last token in the chunk


class Window(NamedTuple):
  """The documents that start at or after some slot and end before C slots more."""

  start: Int[Array, " B"]
  stop: Int[Array, " B"]  # where the next window starts
  inside: Bool[Array, "B T"]  # tokens
  begin: Int[Array, "B C1"]  # first token of each slot (none: that behind all), and the last's end
  number: Int[Array, "B C"]  # of the slot's chunk in its document


def capacity(length: int, chunk_size: int) -> int:
  """Slots of a row: an eighth more than it would need as one document, or what any row needs.

  Of N documents each takes at most one chunk more than its tokens fill.
  """
  whole = -(-length // chunk_size)
  return min(length, whole + max(LEAST, whole // SHARE))


def lay_out(
  segments: Int[Array, "B T"], lengths: Int[Array, " B"] | None, chunk_size: int
) -> Layout:
  """The layout of rows whose first tokens all start documents; `segments` from `run_index`.

  Tokens at or past `lengths` belong to the last document.
  """
  batch, length = segments.shape
  last = jnp.full((batch,), length - 1, jnp.int32)
  if lengths is not None:
    segments = jnp.minimum(segments, last_segment(segments, lengths)[:, None])
    last = jnp.clip(lengths.astype(jnp.int32), 0, length) - 1
  index = count_seen(segments, None, length) - 1  # [B, T], in the document
  chunk, row = index // chunk_size, index % chunk_size
  own = jnp.cumsum(row == 0, axis=1, dtype=jnp.int32) - 1
  places = Places(chunk, row, own - chunk, own)
  ends = jnp.pad(index[:, 1:], ((0, 0), (0, 1))) == 0  # the next token is a first one
  end = jax.lax.cummin(jnp.where(ends, own, length), axis=1, reverse=True)
  at_last = lambda x: jnp.take_along_axis(x, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]  # noqa: E731
  position = jnp.where(last < 0, 0, at_last(index) + 1)
  return Layout(places, end, own[:, -1] + 1, at_last(places.first), position, at_last(row))


def window(found: Layout, start: Int[Array, " B"], slots: int) -> Window:
  """The window from `start` on, where a document starts or all slots end."""
  places, length = found.places, found.end.shape[1]
  early = found.end < start[:, None] + slots  # [B, T], ends before the window does
  inside = early & (places.first >= start[:, None])
  tokens = jnp.sum(early, axis=1, dtype=jnp.int32)
  later = jnp.take_along_axis(places.first, jnp.minimum(tokens, length - 1)[:, None], axis=1)[:, 0]
  stop = jnp.where(tokens < length, later, found.total)
  slot = jnp.arange(slots + 1)[:, None] + start[:, None, None]
  begin = jnp.sum(places.own[:, None] < slot, axis=2, dtype=jnp.int32)  # as many are before
  begin = jnp.minimum(begin, tokens[:, None])
  at = jnp.minimum(begin[:, :-1], length - 1)
  number = jnp.take_along_axis(places.chunk, at, axis=1)
  number = jnp.where(begin[:, :-1] < tokens[:, None], number, 0)
  return Window(start, stop, inside, begin, number)


def fits(found: Layout, slots: int) -> Bool[Array, ""] | None:
  """Whether the first window has all of all rows; None: always."""
  return None if slots >= found.end.shape[1] else jnp.all(found.total <= slots)


def final_state(
  found: Layout,
  all_fit: Bool[Array, ""] | None,
  keys: Float[Array, "B C H K"],
  values: Float[Array, "B C H K"],
  running_key: Float[Array, "B H K"],
  running_value: Float[Array, "B H K"],
  chunk_size: int,
) -> RatState:
  """The state after each row's last document, from all summaries and the last tokens' sums.

  Where not all rows fit, the summaries are that document's from slot 0 on.
  """
  first = found.first if all_fit is None else jnp.where(all_fit, found.first, 0)
  slots = max(found.places.row.shape[1] // chunk_size, 1)
  index = jnp.minimum(first[:, None] + jnp.arange(slots), keys.shape[1] - 1)
  index = index[..., None, None]
  keys, values = (jnp.take_along_axis(x, index, axis=1) for x in (keys, values))
  some = (found.position > 0)[:, None, None]
  running_key, running_value = (jnp.where(some, x, 0) for x in (running_key, running_value))
  return state_at(keys, values, running_key, running_value, found.position, chunk_size)


def either(all_fit: Bool[Array, ""] | None, kernel: Callable, general: Callable):
  """What `kernel` returns where rows fit, else what `general` does, which has the same form."""
  return kernel() if all_fit is None else jax.lax.cond(all_fit, kernel, general)


def by_rows(
  tokens: tuple,
  segments: Int[Array, "B T"],
  lengths: Int[Array, " B"] | None,
  chunk_size: int,
  rotary_base: float | None,
  slots: int,
  attend: Callable,
) -> tuple[Float[Array, "B T H K"], RatState]:
  """Output and final state of `slots` slots by the portable path with another softmax, `attend`.

  tokens: query, key, value, gate_logits, gate_bias, output_logits. One row after the other, and
  nothing of it is kept for the gradient: the program needs float32 arrays for one row.
  """
  batch, length = segments.shape
  bias = tokens[4]
  arrays = (*tokens[:4], tokens[5])
  lengths = jnp.full((batch,), length, jnp.int32) if lengths is None else lengths

  @jax.checkpoint
  def row(inputs):
    (query, key, value, gate_logits, output_logits), segments, lengths = jax.tree.map(
      lambda x: x[None], inputs
    )
    results = rat_attention_xla(
      query, key, value, gate_logits, bias, output_logits, None, segments, lengths, chunk_size,
      rotary_base, attend=attend,
    )  # fmt: skip
    return jax.tree.map(lambda x: x[0], results)

  output, state = jax.lax.map(row, (arrays, segments, lengths))
  room = ((0, 0), (0, slots - state.key.shape[1]), (0, 0), (0, 0))
  return output, state._replace(key=jnp.pad(state.key, room), value=jnp.pad(state.value, room))
