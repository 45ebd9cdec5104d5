"""Sliding-window attention over a device mesh: batch, heads and sequence.

Along the sequence only the window travels: every shard gets the `left` keys and values before it
from as many left neighbours as hold them, makes them the state it starts from, and runs the
ordinary function. So the sharded output is exactly as exact as the unsharded one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ..mesh import Mesh, axis_names, check_mesh, run_on_mesh
from ..state_passing import locate
from .api import check_arguments, sliding_window_attention
from .window import WindowState, empty_window, oldest_first

NAME = "sharded_sliding_window_attention"


def sharded_sliding_window_attention(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T G K"],
  value: Float[Array, "B T G V"],
  *,
  left: int,
  mesh: Mesh | None = None,
  batch_axes: str | Sequence[str] = ("data",),
  head_axes: str | Sequence[str] = ("model",),
  sequence_axis: str | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  initial_state: WindowState | None = None,
  scale: float | None = None,
  chunk_size: int | None = None,
  implementation: str | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "B T H V"], WindowState]:
  """`sliding_window_attention` with batch, heads and, if wanted, the sequence over mesh axes.

  Equation, shapes, dtypes, results and gradients are those of `sliding_window_attention`; windows,
  documents and padding may cross shards. Each device runs the kernel on its own part. Along batch
  and heads nothing is communicated; along the sequence `left` keys and values per shard and row
  are, and once more for the final state.

  Args:
    mesh: the mesh whose axes are named; None takes the one in force (`jax.set_mesh`).
    batch_axes, head_axes: mesh axes over which batch and heads are split; () splits nothing.
    sequence_axis: mesh axis over which the length is split in equal parts, or None. Shards may be
      shorter than `left`.
    Everything else: see `sliding_window_attention`.

  Returns:
    (output, final state). The final state is split like the batch and the key heads and is the same
    on every device of the sequence axis.

  Raises:
    ValueError: as `sliding_window_attention`; also for an unknown or repeated mesh axis, and for a
      batch, number of key heads or length that its mesh axes do not divide.
    NotImplementedError: an explicit `implementation` that cannot run here.
  """
  check_arguments(
    NAME, query, key, value, left, segment_ids, lengths, initial_state, chunk_size, implementation
  )
  options = dict(left=left, scale=scale, chunk_size=chunk_size, implementation=implementation,
                 interpret=interpret)  # fmt: skip
  arrays = dict(query=query, key=key, value=value, segment_ids=segment_ids, lengths=lengths,
                initial_state=initial_state)  # fmt: skip
  local = functools.partial(_local, options=options, axis=sequence_axis)
  return over_mesh(NAME, local, arrays, WindowState, mesh, batch_axes, head_axes, sequence_axis)


def over_mesh(
  function: str,
  local: Callable,
  arrays: dict[str, Any],
  state_type: type,
  mesh: Mesh | None,
  batch_axes: str | Sequence[str],
  head_axes: str | Sequence[str],
  sequence_axis: str | None,
) -> tuple[jax.Array, Any]:
  """`local(arrays)` on every device of a mesh; arrays that are None are left out.

  States are `state_type`(key, value, count), split over batch and key heads.
  """
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  batch_axes, head_axes = axis_names(batch_axes), axis_names(head_axes)
  check_mesh(function, mesh, batch_axes, head_axes, axis_names(sequence_axis), arrays["key"].shape)
  batch, heads = batch_axes or None, head_axes or None
  tokens = PartitionSpec(batch, sequence_axis, heads, None)
  store = PartitionSpec(batch, None, heads, None)
  states = state_type(store, store, PartitionSpec(batch))
  specs = dict(query=tokens, key=tokens, value=tokens, lengths=PartitionSpec(batch),
               segment_ids=PartitionSpec(batch, sequence_axis), initial_state=states)  # fmt: skip
  return run_on_mesh(local, mesh, arrays, specs, (tokens, states))


def _local(inputs, options, axis):
  """One device's part."""
  left = options["left"]
  if axis is None:
    return sliding_window_attention(**inputs, **options)
  key, value = inputs["key"], inputs["value"]
  batch, length = key.shape[:2]
  count = jax.lax.axis_size(axis)
  state = inputs.get("initial_state")
  if state is None:
    heads, dim = key.shape[2:]
    state = empty_window(batch, left, heads, dim, value.shape[3], key.dtype)
  lengths = inputs.get("lengths")
  lengths = jnp.full((batch,), length * count, jnp.int32) if lengths is None else lengths
  segments = inputs.get("segment_ids")
  segments = jnp.zeros((batch, length), jnp.int32) if segments is None else segments

  shard, documents = locate(segments, lengths, axis, length)
  stored = oldest_first(state)
  before = _state_before(key, value, documents, stored, left, axis)
  here: dict[str, Any] = dict(inputs, initial_state=before)
  if "lengths" in inputs:
    here["lengths"] = shard.stop - shard.start
  output, _ = sliding_window_attention(**here, **options)
  return output, _state_after(key, value, documents, stored, state.count, shard, left, axis)


def _state_before(key, value, documents, stored, left, axis):
  """The state that the tokens before the shard leave behind for its first one."""
  batch, length = key.shape[:2]
  if left == 0:
    return WindowState(key[:, :0], value[:, :0], jnp.zeros((batch,), jnp.int32))
  # Place i of `left` is token start - left + i of the row; those below 0 are the initial state's.
  place = jnp.arange(left) + jax.lax.axis_index(axis) * length
  from_state = place < left

  def fetch(local, stored):
    halo = _halo(local, left, axis)
    rows = from_state.reshape(1, left, *(1,) * (local.ndim - 2))
    return jnp.where(rows, stored[:, jnp.minimum(place, left - 1)], halo)

  history = [fetch(*x) for x in zip((key, value, documents), stored, strict=True)]
  # A document's tokens are together, so those of the first one's are the last places.
  filled = jnp.sum(history[2] == documents[:, :1], axis=1, dtype=jnp.int32)
  slot = (jnp.arange(left) - filled[:, None]) % left  # slot 0 is the oldest one's
  rows = jnp.arange(batch)[:, None]
  return WindowState(history[0][rows, slot], history[1][rows, slot], filled)


def _halo(x, left, axis):
  """The `left` rows of axis 1 before the shard's first, zeros before the first shard's."""
  length, count, parts = x.shape[1], jax.lax.axis_size(axis), []
  missing = left
  for hop in range(1, count):
    if not missing:
      break
    rows = min(missing, length)
    pairs = [(source, source + hop) for source in range(count - hop)]
    parts.insert(0, jax.lax.ppermute(x[:, length - rows :], axis, pairs))
    missing -= rows
  front = jnp.zeros((x.shape[0], missing, *x.shape[2:]), x.dtype)
  return jnp.concatenate([front, *parts], axis=1)


def _state_after(key, value, documents, stored, count, shard, left, axis):
  """The state after the row's last real token: every slot comes from the one shard that has it."""
  batch, length = key.shape[:2]
  index = jax.lax.axis_index(axis)
  token = index * length + jnp.arange(length)
  final = (documents == shard.final[:, None]) & (token < shard.total[:, None])
  seen = jax.lax.psum(jnp.sum(final, axis=1, dtype=jnp.int32), axis)
  count = seen + jnp.where(shard.final == 0, count.astype(jnp.int32), 0)
  if left == 0:
    return WindowState(key[:, :0], value[:, :0], count)
  place = (jnp.arange(left) - count[:, None]) % left
  wanted = shard.total[:, None] - left + place  # [B, left], token of the row; below 0: stored
  rows = jnp.arange(batch)[:, None]
  local = jnp.clip(wanted - index * length, 0, length - 1)
  mine = (wanted - index * length == local) & final[rows, local]
  old = jnp.clip(wanted + left, 0, left - 1)
  kept = (wanted < 0) & (index == 0) & (stored.documents[rows, old] == shard.final[:, None])

  def collect(local_rows, stored_rows):
    here = jnp.where(mine[..., None, None], local_rows[rows, local], 0)
    here += jnp.where(kept[..., None, None], stored_rows[rows, old], 0)
    return jax.lax.psum(here, axis)

  return WindowState(collect(key, stored.key), collect(value, stored.value), count)
