"""Routed attention over a device mesh: batch, heads and sequence.

A cluster's members are anywhere in the row, so along the sequence devices exchange: instead of a
part of the row with all heads each gets the whole row with a part of the heads, runs the ordinary
function, and gives the output back. Where there are fewer heads than devices (routed heads are
few), membership "official" divides the clusters of a head, too; the outputs of these parts are then
added up. The other memberships leave the devices without a head idle.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ..mesh import Mesh, axis_names, check_mesh, run_on_mesh
from ..segments import pad_length
from .api import check_arguments, routed_attention
from .members import gather_own, memberships, only, top_members
from .options import Routing
from .state import RoutedState

NAME = "sharded_routed_attention"
TOKENS = ("query", "key", "value", "scores", "key_scores")
MEMORY = ("memory_key", "memory_value")


def sharded_routed_attention(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T H K"],
  value: Float[Array, "B T H V"],
  scores: Float[Array, "B T H C"],
  *,
  options: Routing,
  mesh: Mesh | None = None,
  batch_axes: str | Sequence[str] = ("data",),
  head_axes: str | Sequence[str] = ("model",),
  sequence_axis: str | None = None,
  key_scores: Float[Array, "B T H C"] | None = None,
  relative_keys: Float[Array, "R K"] | None = None,
  relative_values: Float[Array, "R V"] | None = None,
  memory_key: Float[Array, "H C M K"] | None = None,
  memory_value: Float[Array, "H C M V"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  initial_state: RoutedState | None = None,
  implementation: str | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "B T H V"], RoutedState]:
  """`routed_attention` with batch, heads and, if wanted, the sequence over mesh axes.

  Equation, shapes, dtypes, results and gradients are those of `routed_attention`; pass the same
  array as `query` and `key` where they are shared, and it is sent once. Along batch and heads
  nothing is communicated. Along a sequence axis of n devices queries, keys, values and scores are
  exchanged once (all-to-all) and the output once, n / gcd(H, n) times as much with "official" where
  n does not divide the H heads of a device; every device works on whole rows.

  Args:
    mesh: the mesh whose axes are named; None takes the one in force (`jax.set_mesh`).
    batch_axes, head_axes: mesh axes over which batch and heads are split; () splits nothing.
    sequence_axis: mesh axis over which the length is split in equal parts, or None.
    Everything else: see `routed_attention`.

  Returns:
    (output, final state). The final state is split like the batch and the heads and is the same on
    every device of the sequence axis.

  Raises:
    ValueError: as `routed_attention`; also for an unknown or repeated mesh axis, and for a batch,
      number of heads or length that its mesh axes do not divide.
    NotImplementedError: an explicit `implementation` that cannot run here.
  """
  relative = None if relative_keys is None else (relative_keys, relative_values)
  memory = None if memory_key is None else (memory_key, memory_value)
  check_arguments(
    query, key, value, scores, options, key_scores, relative, memory, segment_ids, lengths,
    initial_state, implementation,
  )  # fmt: skip
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  batch_axes, head_axes = axis_names(batch_axes), axis_names(head_axes)
  check_mesh(NAME, mesh, batch_axes, head_axes, axis_names(sequence_axis), query.shape)
  arrays = dict(
    query=query, key=None if key is query else key, value=value,
    scores=jax.lax.stop_gradient(scores), key_scores=key_scores,
    relative_keys=relative_keys, relative_values=relative_values, memory_key=memory_key,
    memory_value=memory_value, segment_ids=segment_ids, lengths=lengths,
    initial_state=initial_state,
  )  # fmt: skip
  batch, heads = batch_axes or None, head_axes or None
  rows, lists = PartitionSpec(batch), PartitionSpec(batch, heads)
  tokens = PartitionSpec(batch, sequence_axis, heads)
  specs: dict[str, Any] = dict.fromkeys(TOKENS, tokens)
  specs |= dict.fromkeys(MEMORY, PartitionSpec(heads))
  specs |= dict.fromkeys(("relative_keys", "relative_values"), PartitionSpec())
  specs |= dict(segment_ids=PartitionSpec(batch, sequence_axis), lengths=rows, initial_state=lists)
  operator = functools.partial(
    routed_attention, options=options, implementation=implementation, interpret=interpret
  )
  local = functools.partial(_local, operator)
  if sequence_axis is not None:
    local = functools.partial(_sequence_shard, operator, options, sequence_axis)
  return run_on_mesh(local, mesh, arrays, specs, (tokens, lists))


def _local(operator, inputs):
  """Queries that are the keys, too, stay one array."""
  return operator(**{"key": inputs["query"]} | inputs)


def _sequence_shard(operator, options, axis, inputs):
  """One device's part: heads for tokens, the operator, tokens for heads."""
  count, (batch, length, heads, clusters) = jax.lax.axis_size(axis), inputs["scores"].shape
  # A head becomes `parts` heads of some of its clusters, and these are filled up to a multiple.
  parts = count // math.gcd(heads, count) if options.membership == "official" else 1
  split = functools.partial(_split_heads, parts=parts, count=count)
  mine = functools.partial(_mine, axis=axis)
  here = {n: inputs[n] for n in ("relative_keys", "relative_values", "lengths") if n in inputs}
  for name in TOKENS:
    if name in inputs:
      x = split(inputs[name], 2, by_cluster="scores" in name, filler=-jnp.inf)
      # Where some heads are constant fillers, XLA may give the parts that it exchanges different
      # layouts, and then refuses them.
      x = jax.lax.optimization_barrier(x)
      here[name] = jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)
  for name in MEMORY:
    if name in inputs:
      x = jnp.moveaxis(inputs[name], 1, -1)  # the clusters last, as in scores
      here[name] = jnp.moveaxis(mine(split(x, 0, by_cluster=True), 0), -1, 1)
  if "segment_ids" in inputs:
    here["segment_ids"] = jax.lax.all_gather(inputs["segment_ids"], axis, axis=1, tiled=True)
  if "initial_state" in inputs:
    state = inputs["initial_state"]
    here["initial_state"] = jax.tree.map(lambda x: mine(split(x, 1), 1), state)
  output, state = _local(operator, here)

  back = functools.partial(
    jax.lax.all_to_all, axis_name=axis, split_axis=1, concat_axis=2, tiled=True
  )
  if parts == 1:
    output = back(output)[:, :, :heads]
  else:  # sums, and numbers of clusters, are added up before they are divided
    wide = jnp.promote_types(output.dtype, jnp.float32)
    number = _memberships(here, options).astype(wide)
    sums = back(output.astype(wide) * (number + options.combine_eps))
    total, number = (
      jnp.sum(x.reshape(batch, length, heads, parts, -1), axis=3) for x in (sums, back(number))
    )
    output = (total / (number + options.combine_eps)).astype(output.dtype)
  return output, jax.tree.map(lambda x: _gather_lists(x, axis, heads, parts, clusters), state)


def _memberships(here, options):
  """In how many of its clusters each head of this device has each token, [B, T, H, 1]."""
  scores, lengths = here["scores"], here.get("lengths")
  length = scores.shape[1]
  scores = only(scores, None if lengths is None else jnp.arange(length) < lengths[:, None])
  members = top_members(scores, options.window_size)
  real = jnp.isfinite(gather_own(scores, members))
  return memberships(members, real, length).swapaxes(1, 2)[..., None]


def _split_heads(x, axis, parts, count, by_cluster=False, filler=0.0):
  """H heads along `axis` become H x parts, filled up to a multiple of the `count` devices.

  Part p of a head has the p-th part of the clusters (the last axis) if `by_cluster`, else all.
  """
  if by_cluster and parts > 1:
    x = pad_length(x, parts, axis=x.ndim - 1, value=filler)
    x = x.reshape(*x.shape[:-1], parts, -1)
    x = jnp.moveaxis(x, -2, axis + 1)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
  elif parts > 1:
    x = jnp.repeat(x, parts, axis=axis)
  return pad_length(x, count, axis=axis)


def _mine(x, dimension, axis):
  """This device's part of what all have."""
  size = x.shape[dimension] // jax.lax.axis_size(axis)
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * size, size, dimension)


def _gather_lists(x, axis, heads, parts, clusters):
  """The lists of all heads, [B, H, C, W, ...], the same on every device."""
  x = jax.lax.all_gather(x, axis, axis=1, tiled=True)[:, : heads * parts]
  return x.reshape(x.shape[0], heads, -1, *x.shape[3:])[:, :, :clusters]
