"""Taylor attention over a device mesh: batch, heads and sequence, without gathering q, k or v.

Along the sequence only states travel (`state_passing.py`), 40 KB per head at F = 16, V = 64.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ..dots import einsum_f32
from ..mesh import Mesh, axis_names, check_mesh, run_on_mesh
from ..segments import pad_length
from ..state_passing import run_sequence_shard
from .api import check_arguments, state_shape, taylor_attention
from .features import key_features
from .xla import DEFAULT_CHUNK

NAME = "sharded_taylor_attention"


def sharded_taylor_attention(
  query: Float[Array, "B T H F"],
  key: Float[Array, "B T H F"],
  value: Float[Array, "B T H V"],
  log_decay: Float[Array, " H"] | None = None,
  *,
  mesh: Mesh | None = None,
  batch_axes: str | Sequence[str] = ("data",),
  head_axes: str | Sequence[str] = ("model",),
  sequence_axis: str | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  initial_state: Float[Array, "B H P V1"] | None = None,
  normalize: bool = True,
  chunk_size: int | None = None,
  implementation: str | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H P V1"]]:
  """`taylor_attention` with the batch, the heads and, if wanted, the sequence over mesh axes.

  Equation, shapes, dtypes, results and gradients are those of `taylor_attention`; documents and
  padding may cross shards. Each device runs the kernel on its own part. Along batch and heads
  nothing is communicated; along the sequence one float32 state [P, V + 1] per shard, row and head.

  Args:
    mesh: the mesh whose axes are named; None takes the one in force (`jax.set_mesh`).
    batch_axes, head_axes: mesh axes over which batch and heads are split; () splits nothing.
    sequence_axis: mesh axis over which the length is split in equal parts, or None.
    Everything else: see `taylor_attention`.

  Returns:
    (output, final state). The final state is split like the batch and the heads and is the same on
    every device of the sequence axis.

  Raises:
    ValueError: as `taylor_attention`; also for an unknown or repeated mesh axis, and for a
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
  options = dict(
    normalize=normalize, chunk_size=chunk_size, implementation=implementation, interpret=interpret
  )

  def local(inputs):
    if sequence_axis is None:
      return taylor_attention(**inputs, **options)
    return _sequence_shard(inputs, sequence_axis, mesh.shape[sequence_axis], options)

  return run_on_mesh(local, mesh, arrays, specs, (tokens, states))


def _sequence_shard(inputs, axis, count, options):
  key, value = inputs["key"], inputs["value"]
  dtype = jnp.promote_types(key.dtype, jnp.float32)
  state = inputs.get("initial_state")
  state = jnp.zeros(state_shape(key, value)) if state is None else state
  rate = inputs.get("log_decay")
  rate = (jnp.zeros((key.shape[2],)) if rate is None else rate).astype(dtype)

  def contribution(steps, kept):
    down = jnp.where(kept[..., None], jnp.exp(rate * steps[..., None]), 0)  # [B, T / W, H]
    ones = jnp.broadcast_to(kept[..., None, None], (*value.shape[:3], 1)).astype(value.dtype)
    values = (down[..., None] * value).astype(value.dtype)
    return _summed(key, jnp.concatenate([values, ones], -1))

  def decay(steps):
    factor = jnp.exp(rate * steps[..., None])[..., None, None]  # [..., H, 1, 1]
    columns = jnp.arange(value.shape[3] + 1) < value.shape[3]
    return jnp.where(columns, factor, 1)  # [..., H, 1, V + 1]

  def operator(**inputs):
    return taylor_attention(**inputs, **options)

  inputs = dict(inputs, initial_state=state.astype(dtype))
  return run_sequence_shard(operator, inputs, axis, count, contribution, decay)


def _summed(key, values):
  """Sum over the tokens of phi(k) values^T, [B, H, P, V + 1]; features of one chunk at a time."""
  chunk = min(DEFAULT_CHUNK, key.shape[1])

  @jax.checkpoint
  def step(total, parts):
    k, v = parts  # [B, C, H, .]
    return total + einsum_f32("bchp,bchv->bhpv", key_features(k), v), None

  chunks = tuple(_chunked(x, chunk) for x in (key, values))
  shape = (*state_shape(key, values)[:3], values.shape[3])
  start = jnp.zeros(shape, jnp.promote_types(key.dtype, jnp.float32))
  return jax.lax.scan(step, start, chunks)[0]


def _chunked(x, chunk):
  """[B, T, H, D] -> [N, B, C, H, D]."""
  x = pad_length(x, chunk)
  return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)
