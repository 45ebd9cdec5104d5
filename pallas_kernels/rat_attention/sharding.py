"""RAT attention over a device mesh: batch, heads and sequence.

Along the sequence the summaries of finished chunks travel, 2 T / L rows of H K instead of the 2 T
of attention, and the running chunks at the shards' ends. From them every shard makes the state that
the tokens before it leave behind and runs the ordinary function, so the sharded output is exactly
as exact as the unsharded one.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ..mesh import Mesh, axis_names, check_mesh, run_on_mesh
from ..rotary import rotary_tables, rotate
from ..segments import run_index
from ..state_passing import locate
from .api import check_arguments, rat_attention
from .recurrence import linear_recurrence
from .state import RatState, empty_state, find_places
from .xla import recurrence_terms, run_recurrences, summaries_in_slots

NAME = "sharded_rat_attention"


def sharded_rat_attention(
  query: Float[Array, "B T G K"],
  key: Float[Array, "B T G K"],
  value: Float[Array, "B T H K"],
  gate_logits: Float[Array, "B T H K"],
  gate_bias: Float[Array, "H K"],
  output_logits: Float[Array, "B T H K"] | None = None,
  *,
  mesh: Mesh | None = None,
  batch_axes: str | Sequence[str] = ("data",),
  head_axes: str | Sequence[str] = ("model",),
  sequence_axis: str | None = None,
  chunk_size: int,
  rotary_base: float | None = 10000.0,
  segment_ids: Int[Array, "B T"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  initial_state: RatState | None = None,
  implementation: str | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "B T H K"], RatState]:
  """`rat_attention` with batch, heads and, if wanted, the sequence over mesh axes.

  Equation, shapes, dtypes, results and gradients are those of `rat_attention`; chunks, documents
  and padding may cross shards, whose length need not be a multiple of the chunk's. Each device runs
  the kernel on its own part. Along batch and heads a forward pass communicates nothing. Every
  device of `head_axes` has all groups of query and key, and a backward pass sums their gradients.

  Along the sequence every device gets the summaries of all shards, [B, T / L, H, K] of keys and of
  values in their dtype, and three float32 [B, H, K] per shard for the chunks under way. A shard
  runs its recurrence twice, first to find the summaries it sends: work linear in its T / W tokens,
  little beside the softmax. Later shards see more summaries, the last one twice the average.

  Args:
    mesh: the mesh whose axes are named; None takes the one in force (`jax.set_mesh`).
    batch_axes, head_axes: mesh axes over which batch and heads are split; () splits nothing. The
      heads of a device need not be a multiple of the groups.
    sequence_axis: mesh axis over which the length is split in equal parts, or None.
    Everything else: see `rat_attention`.

  Returns:
    (output, final state). The final state is split like the batch and the heads and is the same on
    every device of the sequence axis.

  Raises:
    ValueError: as `rat_attention`; also for an unknown or repeated mesh axis, and for a batch,
      number of heads or length that its mesh axes do not divide.
    NotImplementedError: an explicit `implementation` that cannot run here.
  """
  check_arguments(NAME, query, key, value, gate_logits, gate_bias, output_logits, chunk_size,
                  rotary_base, segment_ids, lengths, initial_state, implementation)  # fmt: skip
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  batch_axes, head_axes = axis_names(batch_axes), axis_names(head_axes)
  check_mesh(NAME, mesh, batch_axes, head_axes, axis_names(sequence_axis), value.shape)
  batch, heads = batch_axes or None, head_axes or None
  groups = PartitionSpec(batch, sequence_axis, None, None)
  tokens = PartitionSpec(batch, sequence_axis, heads, None)
  store, running = PartitionSpec(batch, None, heads, None), PartitionSpec(batch, heads, None)
  states: Any = (store, store, running, running, PartitionSpec(batch))
  states = RatState(*states)
  arrays = dict(query=query, key=key, value=value, gate_logits=gate_logits, gate_bias=gate_bias,
                output_logits=output_logits, segment_ids=segment_ids, lengths=lengths,
                initial_state=initial_state)  # fmt: skip
  specs = dict(query=groups, key=groups, value=tokens, gate_logits=tokens, output_logits=tokens,
               gate_bias=PartitionSpec(heads, None), lengths=PartitionSpec(batch),
               segment_ids=PartitionSpec(batch, sequence_axis), initial_state=states)  # fmt: skip
  operator = functools.partial(
    rat_attention,
    chunk_size=chunk_size,
    rotary_base=rotary_base,
    implementation=implementation,
    interpret=interpret,
  )

  def local(inputs):
    inputs = inputs | _own_groups(inputs, head_axes)
    if sequence_axis is None:
      return operator(**inputs)
    return _sequence_shard(operator, inputs, sequence_axis, chunk_size, rotary_base)

  return run_on_mesh(local, mesh, arrays, specs, (tokens, states))


def _own_groups(inputs, head_axes):
  """Query and key such that head h of this device has group h mod their number."""
  heads, groups = inputs["value"].shape[2], inputs["query"].shape[2]
  if not head_axes or heads % groups == 0:
    return {}
  own = (jax.lax.axis_index(head_axes) * heads + jnp.arange(heads)) % groups
  return {name: inputs[name][:, :, own] for name in ("query", "key")}


class _Past(NamedTuple):
  """What a row's W shards tell each other, and the state before the first of them."""

  after: Int[Array, "W B"]  # document of the last real token up to the shard's end
  tail: Int[Array, "W B"]  # real tokens of that document in the shard
  finished: Int[Array, "W B"]  # chunks that real tokens of the shard finish
  keys: Float[Array, "B S H K"]  # the state's slots, then those of each shard
  values: Float[Array, "B S H K"]
  running_key: Float[Array, "B W1 H K"]  # before each shard, and after the last
  running_value: Float[Array, "B W1 H K"]
  position: Int[Array, " B"]  # of the state
  slots: int  # of the state


def _sequence_shard(operator, inputs, axis, chunk_size, rotary_base):
  """One device's part: (its output, the final state of the whole row)."""
  value = inputs["value"]
  batch, length, heads, dim = value.shape
  count = jax.lax.axis_size(axis)
  index = jax.lax.axis_index(axis)
  given = inputs.get("initial_state")
  state = empty_state(batch, 0, heads, dim, value.dtype) if given is None else given
  lengths = inputs.get("lengths")
  lengths = jnp.full((batch,), length * count, jnp.int32) if lengths is None else lengths
  segments = inputs.get("segment_ids")
  segments = jnp.zeros((batch, length), jnp.int32) if segments is None else segments

  shard, documents = locate(segments, lengths, axis, length)
  real = shard.stop - shard.start
  past = _share(inputs, state, documents, shard, axis, chunk_size, rotary_base)
  slots = state.key.shape[1] + -(-length * (count - 1) // chunk_size)
  before = _state_after(past, index, shard.first, max(slots, 1), chunk_size)
  here: dict[str, Any] = dict(inputs, initial_state=before)
  if "lengths" in inputs:
    here["lengths"] = real
  output, _ = operator(**here)
  slots = max(length * count // chunk_size, 1) if given is None else state.key.shape[1]
  return output, _state_after(past, count, shard.final, slots, chunk_size)


def _share(inputs, state, documents, shard, axis, chunk_size, rotary_base) -> _Past:
  """Everything that is communicated."""
  key, value = inputs["key"], inputs["value"]
  length, dtype = value.shape[1], value.dtype
  wide = jnp.promote_types(dtype, jnp.float32)
  arrays = [key, value, inputs["gate_logits"], inputs["gate_bias"]]
  real = shard.stop - shard.start  # [B]
  own = jnp.arange(length) < real[:, None]
  tail = jnp.sum(own & (documents == shard.after[:, None]), axis=1, dtype=jnp.int32)
  afters, tails = jax.lax.all_gather(jnp.stack([shard.after, tail]), axis, axis=1)  # [W, B]

  index = jax.lax.axis_index(axis)
  position = _position_after(afters, tails, state.position, index, shard.first)
  places = find_places(run_index(documents), position, length, chunk_size)
  finished = jnp.sum(own & (places.row == chunk_size - 1), axis=1, dtype=jnp.int32)
  finished = jax.lax.all_gather(finished, axis)

  # Factor, k~, v~, [B, H, K] each.
  ends = _ends(*arrays, row=places.row, real=real, chunk_size=chunk_size)
  ends = jax.lax.all_gather(jnp.stack(ends), axis, axis=2)  # [3, B, W, H, K]
  start = (state.running_key.astype(wide), state.running_value.astype(wide))
  running = run_recurrences(ends[0], ends[1:], state._replace(running_key=start[0],
                                                              running_value=start[1]))  # fmt: skip
  running_key, running_value = running = [
    jnp.concatenate([x[:, None], y], 1) for x, y in zip(start, running, strict=True)
  ]

  @jax.checkpoint  # float32 arrays as large as the inputs, and little work
  def summaries(arrays, running):
    kept, added = recurrence_terms(*arrays, row=places.row)
    before = state._replace(running_key=running[0], running_value=running[1])
    running_key, running_value = run_recurrences(kept, added, before)
    turn = rotary_tables(places.chunk[..., None], value.shape[3], rotary_base, wide)
    rows = (rotate(running_key, turn), running_value)
    return [summaries_in_slots(x.astype(dtype), None, places, chunk_size) for x in rows]

  sent = summaries(arrays, [x[:, index] for x in running])  # [B, N, H, K] each
  gathered = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in sent)  # [B, W N, H, K]
  keys, values = (
    jnp.concatenate([old.astype(dtype), new], 1)
    for old, new in zip((state.key, state.value), gathered, strict=True)
  )
  stored = state.key.shape[1]
  return _Past(
    afters, tails, finished, keys, values, running_key, running_value, state.position, stored
  )


def _ends(key, value, gate_logits, gate_bias, row, real, chunk_size):
  """(factor, k~, v~), [B, H, K]: the running chunk after the shard is factor * before + k~ or v~.

  A chunk has L tokens at most, so the last L real ones tell.
  """
  length = value.shape[1]
  window = min(length, chunk_size)
  token = jnp.maximum(real - window, 0)[:, None] + jnp.arange(window)  # [B, window]

  def last(x):
    return jnp.take_along_axis(x, token.reshape(*token.shape, *(1,) * (x.ndim - 2)), axis=1)

  kept, added = recurrence_terms(last(key), last(value), last(gate_logits), gate_bias, last(row))
  padding = (token >= real[:, None])[..., None, None]
  kept = jnp.where(padding, 1, kept)
  added = [jnp.where(padding, 0, x) for x in added]
  return jnp.prod(kept, axis=1), *(linear_recurrence(kept, x)[:, -1] for x in added)


def _position_after(after, tail, start, shards, document):
  """Tokens that `document` has had after the first `shards` shards, [B]."""
  earlier = (jnp.arange(len(after)) < shards)[:, None] & (after == document)
  return jnp.where(document == 0, start, 0) + jnp.sum(tail * earlier, axis=0)


def _state_after(past: _Past, shards, document, slots, chunk_size) -> RatState:
  """The state of `document` [B] after the first `shards` shards."""
  position = _position_after(past.after, past.tail, past.position, shards, document)
  chunks = position // chunk_size
  stored = past.position // chunk_size
  ends = jnp.cumsum(past.finished, axis=0)  # [W, B]
  before = jnp.pad(ends, ((1, 0), (0, 0)))[shards]
  # Finished chunks in order: the state's, then those of all shards; the document's are the last.
  number = jnp.arange(slots) + (stored + before - chunks)[:, None]  # [B, slots]
  new = number - stored[:, None]
  shard = jnp.sum(ends[..., None] <= new, axis=0)  # that finished it
  shard = jnp.minimum(shard, len(ends) - 1)
  first = jnp.take_along_axis((ends - past.finished).T, shard, axis=1)
  each = (past.keys.shape[1] - past.slots) // len(ends)
  source = jnp.where(new < 0, number, past.slots + shard * each + new - first)
  source = jnp.clip(source, 0, past.keys.shape[1] - 1)[..., None, None]
  filled = (jnp.arange(slots) < chunks[:, None])[..., None, None]
  key, value = (
    jnp.where(filled, jnp.take_along_axis(x, source, axis=1), 0) for x in (past.keys, past.values)
  )
  return RatState(
    key, value, past.running_key[:, shards], past.running_value[:, shards],
    position.astype(jnp.int32),
  )  # fmt: skip
