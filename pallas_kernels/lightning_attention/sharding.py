"""Lightning attention over a device mesh: batch, heads and sequence, without gathering q, k or v.

Along the sequence only states travel (`state_passing.py`): decay^n is the factor over n tokens, and
a shard contributes the sum over its tokens i of decay^(n-1-i) k_i v_i^T, [K, V].
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ..dots import einsum_f32
from ..mesh import Mesh, axis_names, check_mesh, run_on_mesh
from ..state_passing import run_sequence_shard
from .api import check_arguments, lightning_attention

NAME = "sharded_lightning_attention"


def sharded_lightning_attention(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T H K"],
  value: Float[Array, "B T H V"],
  log_decay: Float[Array, " H"] | None = None,
  *,
  mesh: Mesh | None = None,
  batch_axes: str | Sequence[str] = ("data",),
  head_axes: str | Sequence[str] = ("model",),
  sequence_axis: str | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  initial_state: Float[Array, "B H K V"] | None = None,
  chunk_size: int | None = None,
  implementation: str | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """`lightning_attention` with the batch, the heads and, if wanted, the sequence over mesh axes.

  Equation, shapes, dtypes, results and gradients are those of `lightning_attention`; documents and
  padding may cross shards. Each device runs the kernel on its own part. Along batch and heads
  nothing is communicated; along the sequence one float32 state [K, V] per shard, row and head is.

  Args:
    mesh: the mesh whose axes are named; None takes the one in force (`jax.set_mesh`).
    batch_axes, head_axes: mesh axes over which batch and heads are split; () splits nothing.
    sequence_axis: mesh axis over which the length is split in equal parts, or None.
    Everything else: see `lightning_attention`.

  Returns:
    (output, final state). The final state is split like the batch and the heads and is the same on
    every device of the sequence axis.

  Raises:
    ValueError: as `lightning_attention`; also for an unknown or repeated mesh axis, and for a
      batch, head count or length that its mesh axes do not divide.
    NotImplementedError: an explicit `implementation` that cannot run here.
  """
  check_arguments(
    NAME, query, key, value, log_decay, segment_ids, lengths, initial_state, chunk_size,
    implementation,
  )  # fmt: skip
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  batch_axes, head_axes = axis_names(batch_axes), axis_names(head_axes)
  check_mesh(NAME, mesh, batch_axes, head_axes, axis_names(sequence_axis), query.shape)
  batch, heads = batch_axes or None, head_axes or None
  tokens = PartitionSpec(batch, sequence_axis, heads, None)
  states = PartitionSpec(batch, heads, None, None)
  arrays = dict(query=query, key=key, value=value, log_decay=log_decay, segment_ids=segment_ids,
                lengths=lengths, initial_state=initial_state)  # fmt: skip
  specs = dict(query=tokens, key=tokens, value=tokens, log_decay=PartitionSpec(heads),
               segment_ids=PartitionSpec(batch, sequence_axis), lengths=PartitionSpec(batch),
               initial_state=states)  # fmt: skip
  options = dict(chunk_size=chunk_size, implementation=implementation, interpret=interpret)

  def local(inputs):
    if sequence_axis is None:
      return lightning_attention(**inputs, **options)
    return _sequence_shard(inputs, sequence_axis, mesh.shape[sequence_axis], options)

  return run_on_mesh(local, mesh, arrays, specs, (tokens, states))


def _sequence_shard(inputs, axis, count, options):
  key, value = inputs["key"], inputs["value"]
  batch, _, heads, key_dim = key.shape
  dtype = jnp.promote_types(key.dtype, jnp.float32)
  state = inputs.get("initial_state")
  state = jnp.zeros((batch, heads, key_dim, value.shape[3])) if state is None else state
  rate = inputs.get("log_decay")
  rate = (jnp.zeros((heads,)) if rate is None else rate).astype(dtype)

  def contribution(steps, kept):
    down = jnp.where(kept[..., None], jnp.exp(rate * steps[..., None]), 0)  # [B, T / W, H]
    return einsum_f32("bthk,bthv->bhkv", (down[..., None] * key).astype(key.dtype), value)

  def decay(steps):
    return jnp.exp(rate * steps[..., None])[..., None, None]  # [..., H, 1, 1]

  def operator(**inputs):
    return lightning_attention(**inputs, **options)

  inputs = dict(inputs, initial_state=state.astype(dtype))
  return run_sequence_shard(operator, inputs, axis, count, contribution, decay)
