"""RAT attention in plain XLA: the recurrence in blocks, softmax over summaries in tiles.

The portable path (CPU, and any platform without a kernel). Where all rows start their chunks
together (no documents, no state in the middle of a chunk) summaries are every L-th row; otherwise a
row's finished chunks are gathered into its slots, behind those of the state (`state.Places`).
Time is linear in T but for the softmax, T^2 / L; memory is linear.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..rotary import rotary_tables, rotate
from ..segments import zero_padding
from .attend import attend
from .recurrence import linear_recurrence
from .state import Places, RatState, find_places


def rat_attention_xla(
  query: Float[Array, "B T G K"],
  key: Float[Array, "B T G K"],
  value: Float[Array, "B T H K"],
  gate_logits: Float[Array, "B T H K"],
  gate_bias: Float[Array, "H K"],
  output_logits: Float[Array, "B T H K"] | None,
  initial_state: RatState | None,
  segments: Int[Array, "B T"] | None,
  lengths: Int[Array, " B"] | None,
  chunk_size: int,
  rotary_base: float | None,
  attend: Callable = attend,
) -> tuple[Float[Array, "B T H K"], RatState]:
  """Output and final state; the arguments are those of `rat_attention_reference`.

  attend: the softmax, with arguments and result of `attend.attend`.
  """
  batch, length, heads, dim = value.shape
  wide = jnp.promote_types(value.dtype, jnp.float32)
  aligned = segments is None and initial_state is None
  position = jnp.zeros((batch,), jnp.int32) if aligned else _position(initial_state, batch)
  places = find_places(segments, position, length, chunk_size)
  kept, added = recurrence_terms(key, value, gate_logits, gate_bias, places.row)
  running = run_recurrences(kept, added, initial_state, chunk_size if aligned else None)
  running_key, running_value = running

  turn = rotary_tables(places.chunk[..., None], dim, rotary_base, wide)  # [B, T, 1, K / 2]
  rotated = rotate(running_key, turn)
  query = jnp.tile(query, (1, 1, heads // query.shape[2], 1))
  own_score = dim**-0.5 * jnp.sum(query * running_key, -1)  # the same turn of both cancels
  scaled = (dim**-0.5 * rotate(query.astype(wide), turn)).astype(value.dtype)
  summaries = [
    summaries_in_slots(x.astype(value.dtype), old, places, chunk_size, aligned)
    for x, old in zip((rotated, running_value), _old(initial_state), strict=True)
  ]
  output = attend(scaled, *summaries, own_score, running_value, places.first, places.own)
  if output_logits is not None:
    output *= jax.nn.sigmoid(output_logits.astype(wide))
  output = zero_padding(output, lengths)
  state = _final_state(
    summaries, running, places, initial_state, position, segments, lengths, chunk_size
  )
  return output.astype(value.dtype), state


def recurrence_terms(key, value, gate_logits, gate_bias, row):
  """(factors [B, T, H, K] of the running sums, (what is added to k~, to v~)); `row` in the chunk.

  Float32 or wider. Head h has the key of group h mod G.
  """
  wide = jnp.promote_types(value.dtype, jnp.float32)
  gate = jax.nn.sigmoid(gate_logits.astype(wide) + gate_bias.astype(wide))
  kept = jnp.where((row == 0)[..., None, None], 0, gate)
  key = jnp.tile(key, (1, 1, value.shape[2] // key.shape[2], 1))
  return kept, ((1 - gate) * key, (1 - gate) * value)


def run_recurrences(kept, added, state: RatState | None, period: int | None = None):
  """[k~, v~], each [B, T, H, K]; the state's sums enter as if they were part of the first token."""
  if state is not None:
    sums = (state.running_key, state.running_value)
    added = [x.at[:, 0].add(kept[:, 0] * old) for x, old in zip(added, sums, strict=True)]
  return [linear_recurrence(kept, x, period) for x in added]


def _position(state, batch):
  return jnp.zeros((batch,), jnp.int32) if state is None else state.position


def _old(state):
  return (None, None) if state is None else (state.key, state.value)


def summaries_in_slots(x, old, places: Places, chunk_size, aligned=False):
  """[B, S, H, K]: what the state has, then the last row of every chunk that is finished here."""
  batch, length = x.shape[:2]
  if aligned:
    ends = x[:, chunk_size - 1 :: chunk_size]
    return ends if ends.shape[1] else x[:, :1]  # an empty axis would need cases everywhere
  slots = -(-length // chunk_size)  # a chunk under way may end at once
  before = places.own[:, 0]  # finished before the first token
  finished = places.row == chunk_size - 1
  slot = jnp.where(finished, places.own - before[:, None], slots)
  token = jnp.zeros((batch, slots + 1), jnp.int32)
  token = token.at[jnp.arange(batch)[:, None], slot].set(jnp.arange(length, dtype=jnp.int32))[
    :, :slots
  ]
  new = jnp.take_along_axis(x, token[..., None, None], axis=1)
  if old is None:
    return new
  total = old.shape[1] + slots
  index = jnp.arange(total)
  both = jnp.concatenate([old.astype(x.dtype), new], 1)
  source = jnp.where(index < before[:, None], index, index - before[:, None] + old.shape[1])
  return jnp.take_along_axis(both, jnp.minimum(source, total - 1)[..., None, None], axis=1)


def _final_state(summaries, running, places, state, position, segments, lengths, chunk_size):
  """State after the last real token: its document's slots, moved to the front, and its chunk."""
  batch, length = places.row.shape
  lengths = jnp.full((batch,), length) if lengths is None else lengths
  last = jnp.maximum(lengths - 1, 0)[:, None]  # [B, 1]
  empty = lengths == 0

  def at_last(x):
    return jnp.take_along_axis(x, last.reshape(batch, *(1,) * (x.ndim - 1)), axis=1)[:, 0]

  slots = max(length // chunk_size, 1) if state is None else state.key.shape[1]
  first = jnp.where(empty, 0, at_last(places.first))
  source = jnp.minimum(first[:, None] + jnp.arange(slots), summaries[0].shape[1] - 1)
  after = at_last(places.chunk) * chunk_size + at_last(places.row) + 1
  after = jnp.where(empty, position, after)
  filled = jnp.arange(slots) < (after // chunk_size)[:, None]

  def moved(x):
    found = jnp.take_along_axis(x, source[..., None, None], axis=1)
    return jnp.where(filled[..., None, None], found, 0)

  def ran(x, name):
    before = 0 if state is None else getattr(state, name)
    return jnp.where(empty[:, None, None], before, at_last(x))

  return RatState(
    key=moved(summaries[0]),
    value=moved(summaries[1]),
    running_key=ran(running[0], "running_key"),
    running_value=ran(running[1], "running_value"),
    position=after.astype(jnp.int32),
  )
