"""Lightning attention over a device mesh: batch, heads and sequence, without gathering q, k or v.

Along the sequence only states travel. With W shards of n tokens, a_r the first position of shard r:

    local_r = sum over the shard's tokens i of decay^(n-1-i) k_i v_i^T             [K, V]
    state_r = decay^(a_r) initial_state + sum over u < r of decay^(a_r - a_u - n) local_u

and shard r then runs the ordinary kernel with `state_r` as its initial state. Computing `local_r`
reads k and v once more, by one matrix product. Adding `q state_r` to the output of a zero-state
pass would read q and rewrite the output instead, and would round a bfloat16 output twice. This way
the sharded output is as exact as the unsharded one, and the gradients are those of the kernel.
Paper: Linear Attention Sequence Parallelism (2024), in the all-gather form of its sequel.
"""

import difflib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ..checks import fail
from ..dots import einsum_f32
from ..segments import last_segment, run_index
from .api import check_arguments, lightning_attention

NAME = "sharded_lightning_attention"
# Up to this many sequence shards the states are gathered at once; above, log2(W) hops of one state.
GATHER_LIMIT = 16


class Shard(NamedTuple):
  """What one device knows about its place in each row's sequence; documents are numbered globally.

  The state after a shard belongs to the document of the last real token up to its end. `total` and
  `final` are the same on all devices.
  """

  start: Int[Array, " b"]  # real tokens before the shard
  stop: Int[Array, " b"]  # real tokens up to its end
  total: Int[Array, " b"]  # real tokens of the whole row
  first: Int[Array, " b"]  # document of the shard's first token
  before: Int[Array, " b"]  # document of the state that comes in; 0 is that of the initial state
  after: Int[Array, " b"]  # document of the state that goes out
  final: Int[Array, " b"]  # document of the final state


def sharded_lightning_attention(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T H K"],
  value: Float[Array, "B T H V"],
  log_decay: Float[Array, " H"] | None = None,
  *,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
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
  batch_axes, head_axes = _axes(batch_axes), _axes(head_axes)
  _check_mesh(mesh, batch_axes, head_axes, _axes(sequence_axis), query.shape)
  batch, heads = batch_axes or None, head_axes or None
  tokens = PartitionSpec(batch, sequence_axis, heads, None)
  states = PartitionSpec(batch, heads, None, None)
  arrays = dict(query=query, key=key, value=value, log_decay=log_decay, segment_ids=segment_ids,
                lengths=lengths, initial_state=initial_state)  # fmt: skip
  specs = dict(query=tokens, key=tokens, value=tokens, log_decay=PartitionSpec(heads),
               segment_ids=PartitionSpec(batch, sequence_axis), lengths=PartitionSpec(batch),
               initial_state=states)  # fmt: skip
  given = {name: array for name, array in arrays.items() if array is not None}
  options = dict(chunk_size=chunk_size, implementation=implementation, interpret=interpret)

  def local(inputs):
    if sequence_axis is None:
      return lightning_attention(**inputs, **options)
    return _sequence_shard(inputs, sequence_axis, mesh.shape[sequence_axis], options)

  # check_vma: kernels do not declare over which mesh axes their results vary.
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=({name: specs[name] for name in given},),
    out_specs=(tokens, states),
    check_vma=False,
  )(given)


def _axes(names):
  if names is None:
    return ()
  return (names,) if isinstance(names, str) else tuple(names)


def _check_mesh(mesh, batch_axes, head_axes, sequence_axes, shape):
  if mesh.empty:
    fail(NAME, "mesh", "be given or be in force", "None and no mesh in force",
         "pass mesh=..., or call it under jax.set_mesh")  # fmt: skip
  used = (*batch_axes, *head_axes, *sequence_axes)
  parts = (("batch_axes", "batch", batch_axes, shape[0]),
           ("sequence_axis", "length", sequence_axes, shape[1]),
           ("head_axes", "heads", head_axes, shape[2]))  # fmt: skip
  for argument, what, axes, size in parts:
    for axis in axes:
      if axis not in mesh.axis_names:
        near = difflib.get_close_matches(axis, mesh.axis_names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "() leaves that axis whole"
        fail(NAME, argument, f"name axes of the mesh {tuple(mesh.axis_names)}", repr(axis), hint)
      if used.count(axis) > 1:
        fail(NAME, argument, "use each mesh axis once", repr(axis), f"all axes named: {used}")
    count = math.prod(mesh.shape[axis] for axis in axes)
    if size % count:
      fail(NAME, what, f"be divisible by the {count} devices along {axes}", size,
           f"pad it, or change {argument}")  # fmt: skip


def _sequence_shard(inputs, axis, count, options):
  """One device's part: its own contribution, the state from its left, then the kernel."""
  query, key, value = inputs["query"], inputs["key"], inputs["value"]
  batch, length, heads, key_dim = query.shape
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  state = inputs.get("initial_state")
  state = jnp.zeros((batch, heads, key_dim, value.shape[3]), dtype) if state is None else state
  rate = inputs.get("log_decay")
  rate = (jnp.zeros((heads,)) if rate is None else rate).astype(dtype)
  lengths = inputs.get("lengths")
  lengths = jnp.full((batch,), length * count, jnp.int32) if lengths is None else lengths
  segments = inputs.get("segment_ids")
  segments = jnp.zeros((batch, length), jnp.int32) if segments is None else segments

  shard, documents = _locate(segments, lengths, axis, length)
  contribution = _contribution(key, value, rate, documents, shard)  # [B, H, K, V]
  pass_on = _pass_by_gather if count <= GATHER_LIMIT else _pass_by_doubling
  incoming, final = pass_on(contribution, state.astype(dtype), rate, shard, axis, count)
  here: dict[str, Any] = dict(inputs, initial_state=_where(shard.first == shard.before, incoming))
  if "lengths" in inputs:
    here["lengths"] = shard.stop - shard.start
  output, _ = lightning_attention(**here, **options)
  return output, final


def _locate(segments, lengths, axis, length):
  """(the device's `Shard`, its tokens' documents numbered over the whole row, int32 [B, T / W]).

  Only the ids at the shards' edges and the number of documents of each are exchanged.
  """
  index = jax.lax.axis_index(axis)
  local = run_index(segments)
  edges = jnp.stack([segments[:, 0], segments[:, -1], local[:, -1]])
  firsts, lasts, changes = jnp.moveaxis(jax.lax.all_gather(edges, axis), 1, 0)  # [W, B]
  starts_new = jnp.pad(firsts[1:] != lasts[:-1], ((1, 0), (0, 0)))
  # Document number of each shard's first token.
  offsets = jnp.cumsum(starts_new + jnp.pad(changes[:-1], ((1, 0), (0, 0))), axis=0)
  documents = local + offsets[index][:, None]
  start, stop, total = (jnp.clip(lengths, 0, length * i) for i in (index, index + 1, len(firsts)))
  last = jnp.where(stop > start, last_segment(documents, stop - start), -1)
  # Numbers only grow along a row, so the largest so far is that of the last real token so far.
  history = jax.lax.cummax(jax.lax.all_gather(last, axis), axis=0)  # [W, B]
  history = jnp.maximum(jnp.pad(history, ((1, 0), (0, 0))), 0)  # a row starts in document 0
  shard = Shard(start, stop, total, documents[:, 0], history[index], history[index + 1],
                history[-1])  # fmt: skip
  return shard, documents


def _contribution(key, value, rate, documents, shard):
  """What the shard's tokens add to the state after it, [B, H, K, V]: those of its last document."""
  row = jnp.arange(key.shape[1])
  count = (shard.stop - shard.start)[:, None]  # [B, 1]
  kept = (row < count) & (documents == shard.after[:, None])  # [B, T]
  steps = jnp.maximum(count - 1 - row, 0)[..., None]  # [B, T, 1]
  down = jnp.where(kept[..., None], jnp.exp(rate * steps), 0)  # [B, T, H]
  return einsum_f32("bthk,bthv->bhkv", (down[..., None] * key).astype(key.dtype), value)


def _pass_by_gather(contribution, initial_state, rate, shard, axis, count):
  """(state before the shard, final state): every contribution to every device, one collective."""
  stops, afters = jax.lax.all_gather((shard.stop, shard.after), axis)  # [W, B]
  gathered = jax.lax.all_gather(contribution, axis)  # [W, B, H, K, V]

  def state_at(position, document, shards):
    """The state of `document` after `position` tokens, from the contributions of `shards` [W]."""
    steps, alive = position - stops, (afters == document) & shards[:, None]  # [W, B]
    weights = jnp.exp(rate * jnp.maximum(steps, 0)[..., None]) * alive[..., None]  # [W, B, H]
    first = jnp.exp(rate * position[:, None]) * (document == 0)[:, None]  # [B, H]
    added = jnp.sum(weights[..., None, None] * gathered, axis=0)
    return added + first[..., None, None] * initial_state

  shards = jnp.arange(count)
  incoming = state_at(shard.start, shard.before, shards < jax.lax.axis_index(axis))
  return incoming, state_at(shard.total, shard.final, shards >= 0)


def _pass_by_doubling(contribution, initial_state, rate, shard, axis, count):
  """The same by log2(W) hops: pairs (factor, state) compose as (f' f, f' s + s')."""
  index = jax.lax.axis_index(axis)
  kept = (shard.before == shard.after)[:, None]
  factor = jnp.exp(rate * (shard.stop - shard.start)[:, None]) * kept  # [B, H]
  first = factor[..., None, None] * initial_state + contribution
  state = jnp.where(index == 0, first, contribution)
  hop = 1
  while hop < count:
    pairs = [(source, source + hop) for source in range(count - hop)]
    left_factor, left_state = jax.lax.ppermute((factor, state), axis, pairs)
    arrived = index >= hop
    state = state + jnp.where(arrived, factor[..., None, None] * left_state, 0)
    factor = jnp.where(arrived, factor * left_factor, factor)
    hop *= 2
  # `state` is now the one after the shard.
  left = jax.lax.ppermute(state, axis, [(source, source + 1) for source in range(count - 1)])
  final = jax.lax.psum(jnp.where(index == count - 1, state, 0), axis)
  return jnp.where(index == 0, initial_state, left), final


def _where(rows, state):
  return jnp.where(rows[:, None, None, None], state, 0)
