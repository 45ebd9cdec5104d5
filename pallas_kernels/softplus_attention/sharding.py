"""Softplus attention over a device mesh: batch, heads and sequence.

Along the sequence keys and values go around the ring of devices (`ring.py`), once for the sums of
the first stage and once for those of the second, and twice more for the gradient. All that is added
up are sums over keys, so nothing has to be rescaled between devices.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..dots import einsum_f32
from ..mesh import Mesh
from ..ring import combine, ring_reduce
from ..segments import count_seen, count_total, last_segment, pad_length, run_index
from ..sliding_window_attention.history import group_queries
from ..sliding_window_attention.sharding import over_mesh
from ..softmax_attention.cache import CacheState, spoil_overflow
from . import weights
from .api import check_arguments, softplus_attention, unit
from .reference import factor
from .variants import LSSAR, Variant
from .xla import DEFAULT_CHUNK, products

NAME = "sharded_softplus_attention"


def sharded_softplus_attention(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T G K"],
  value: Float[Array, "B T G V"],
  *,
  variant: Variant = LSSAR,
  mesh: Mesh | None = None,
  batch_axes: str | Sequence[str] = ("data",),
  head_axes: str | Sequence[str] = ("model",),
  sequence_axis: str | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  initial_state: CacheState | None = None,
  chunk_size: int | None = None,
  implementation: str | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "B T H V"], CacheState]:
  """`softplus_attention` with batch, heads and, if wanted, the sequence over mesh axes.

  Equation, shapes, dtypes, results and gradients are those of `softplus_attention`; documents and
  padding may cross shards. Along batch and heads nothing is communicated. Along the sequence, W
  shards of T / W tokens, keys and values of a shard go around the ring once for each stage (and for
  the largest scores, where a variant needs them first), and again for its gradient. Every shard is
  computed with all others, whether it sees them or not; the final cache is put together only if it
  is used. There the portable path is what runs.

  Args:
    mesh: the mesh whose axes are named; None takes the one in force (`jax.set_mesh`).
    batch_axes, head_axes: mesh axes over which batch and heads are split; () splits nothing.
    sequence_axis: mesh axis over which the length is split in equal parts, or None.
    Everything else: see `softplus_attention`.

  Raises:
    ValueError: as `softplus_attention`; also for an unknown or repeated mesh axis, and for a batch,
      number of key heads or length that its mesh axes do not divide.
    NotImplementedError: an explicit `implementation` that cannot run here.
  """
  check_arguments(NAME, query, key, value, segment_ids, lengths, initial_state, chunk_size,
                  implementation)  # fmt: skip
  arrays = dict(query=query, key=key, value=value, segment_ids=segment_ids, lengths=lengths,
                initial_state=initial_state)  # fmt: skip
  options: dict[str, Any] = dict(variant=variant, chunk_size=chunk_size)
  if sequence_axis is None:
    options |= dict(implementation=implementation, interpret=interpret)
    local = lambda inputs: softplus_attention(**inputs, **options)  # noqa: E731
  elif implementation not in (None, "xla"):
    raise NotImplementedError(
      f'{NAME}: implementation="{implementation}" does not take a sequence_axis (use "xla", or'
      " split batch and heads)"
    )
  else:
    local = functools.partial(_sequence_shard, axis=sequence_axis, **options)
  return over_mesh(NAME, local, arrays, CacheState, mesh, batch_axes, head_axes, sequence_axis)


def _sequence_shard(inputs, variant, chunk_size, axis):
  """One device's part."""
  query, key, value = (inputs[name] for name in ("query", "key", "value"))
  (batch, length, heads, _), groups = query.shape, key.shape[2]
  wide = jnp.promote_types(query.dtype, jnp.float32)
  state, lengths = inputs.get("initial_state"), inputs.get("lengths")
  before = None if state is None else state.count
  if variant.unit:
    query, key = unit(query, variant.unit_eps), unit(key, variant.unit_eps)
  place = jax.lax.axis_index(axis) * length + jnp.arange(length)
  total = length * jax.lax.axis_size(axis)
  segments = None
  if "segment_ids" in inputs:  # whole rows of integers: documents are numbered along all of them
    segments = run_index(jax.lax.all_gather(inputs["segment_ids"], axis, axis=1, tiled=True))
  seen = count_seen(segments, before, total)
  count = seen if variant.count == "seen" else count_total(segments, lengths, before, total)
  number = (seen - 1)[:, place]  # of each token in its document
  documents = jnp.zeros((1, length), jnp.int32) if segments is None else segments[:, place]

  chunk = min(chunk_size or DEFAULT_CHUNK, length)
  rows = functools.partial(_cut, chunk=chunk)
  counts = count[:, place].astype(wide)[:, None, None, :, None]
  grouped = group_queries(query, groups).transpose(0, 2, 3, 1, 4)  # [B, G, R, T, K]
  local = dict(query=rows(grouped), count=rows(counts, value=1))
  fixed = dict(documents=rows(documents[..., None]), place=rows(place[:, None], value=total))
  sources = [((key, value), (documents, place))]
  if state is not None:
    filled = jnp.arange(state.key.shape[1]) < state.count[:, None]
    values = jnp.where(filled[..., None, None], state.value, 0)
    own = jnp.where(filled, 0, -1), jnp.full(filled.shape[1:], -1)
    sources.append(((state.key, values), own))
  run = functools.partial(_over_ring, axis=axis, variant=variant, sources=sources)
  output = _stages(run, local, fixed, variant, value.dtype)  # [N, B, G, R, C, V]
  output = _uncut(output)[..., :length, :].transpose(0, 3, 1, 2, 4)  # [B, T, G, R, V]
  output = output.reshape(batch, length, heads, -1)
  if lengths is not None:
    output = jnp.where((place < lengths[:, None])[..., None, None], output, 0)
  if state is not None:
    output = spoil_overflow(output, state.count, state.key.shape[1])
  after = _state_after(key, value, number, documents, place, segments, lengths, state, total, axis)
  return output, after


def _over_ring(function, local, fixed, *, axis, variant, sources):
  """`function` of every chunk of queries with the keys of every device, and of the state.

  It returns (what is summed over keys, what the largest is taken of); so does this.
  """
  whole = functools.partial(_by_chunks, function, variant)
  result = ring_reduce(whole, axis, local, fixed, *sources[0])
  for moving, labels in sources[1:]:
    result = combine(result, whole(local, fixed, moving, labels))
  return result


def _by_chunks(function, variant, local, fixed, moving, labels):
  def one(chunk):
    own, where = chunk
    key, value = (x.swapaxes(1, 2) for x in moving)  # [B, G, S, .]
    scores = factor(variant, own["count"], key.shape[-1]) * products(own["query"], key)
    if variant.score_bias:
      scores -= jnp.log(own["count"])
    documents, place = labels
    seen = (where["documents"] == documents[:, None, :]) & (place <= where["place"])  # [P, C, S]
    return function(scores, seen[:, None, None], own, where, value, variant)

  return jax.lax.map(jax.checkpoint(one), (local, fixed))


def _stages(run, local, fixed, variant, dtype):
  """The weights' sums, stage by stage; what is largest in a row first, where it is needed."""
  c = variant
  if weights.needs_top(c):
    local = local | dict(top=run(_top, local, fixed)[1])
  if c.power is None:
    (mixed, total), _ = run(_first_and_mix, local, fixed)
    return _divide(mixed, weights.first_total(total, local["count"], c), dtype)
  total, largest = run(_first, local, fixed)
  total = weights.first_total(total, local["count"], c)
  rows = weights.second_stage(total, local["count"], largest, c)
  second = local | {n: x for n, x in rows._asdict().items() if n != "live"}
  (mixed, total), _ = run(_second, second, fixed | dict(live=rows.live))
  return _divide(mixed, weights.second_total(total, rows, c), dtype)


def _values(scores, seen, own, c):
  return weights.scored(scores, seen, own.get("top"), c)


def _top(scores, seen, own, where, value, c):
  return (), jnp.max(jnp.where(seen, scores, -jnp.inf), -1, keepdims=True)


def _first(scores, seen, own, where, value, c):
  values = _values(scores, seen, own, c)
  total = jnp.sum(weights.sizes(values, c), -1, keepdims=True)
  return total, jnp.max(values, -1, keepdims=True)


def _first_and_mix(scores, seen, own, where, value, c):
  values = _values(scores, seen, own, c)
  return (_mix(values, value), jnp.sum(weights.sizes(values, c), -1, keepdims=True)), ()


def _second(scores, seen, own, where, value, c):
  rows = weights.SecondStage(own["mean"], own["taken"], own["divisor"], where["live"])
  raised = weights.raise_excess(_values(scores, seen, own, c), seen, rows, c)
  return (_mix(raised, value), jnp.sum(raised, -1, keepdims=True)), ()


@jax.custom_vjp
def _mix(share, value):
  return einsum_f32("bgrcs,bgsv->bgrcv", share.astype(value.dtype), value)


def _mix_backward(residuals, d_mixed):
  share, value = residuals
  d_mixed = d_mixed.astype(value.dtype)
  d_share = einsum_f32("bgrcv,bgsv->bgrcs", d_mixed, value)
  d_value = einsum_f32("bgrcs,bgrcv->bgsv", share.astype(value.dtype), d_mixed)
  return d_share, d_value.astype(value.dtype)


_mix.defvjp(lambda share, value: (_mix(share, value), (share, value)), _mix_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _divide(mixed, total, dtype):
  """mixed / total in `dtype`; the cotangent of both is of the one that `_mix` will round to."""
  return (mixed / total).astype(dtype)


def _divide_backward(dtype, residuals, d_output):
  mixed, total = residuals
  d_mixed = (d_output.astype(mixed.dtype) / total).astype(dtype).astype(mixed.dtype)
  return d_mixed, -jnp.sum(d_mixed * mixed, -1, keepdims=True) / total


_divide.defvjp(lambda *x: (_divide(*x), x[:2]), _divide_backward)


def _cut(x, chunk, value=0):
  """[..., T, D] -> [N, ..., C, D]."""
  x = pad_length(x, chunk, axis=x.ndim - 2, value=value)
  x = x.reshape(*x.shape[:-2], -1, chunk, x.shape[-1])
  return jnp.moveaxis(x, -3, 0)


def _uncut(x):
  """[N, ..., C, D] -> [..., N C, D]."""
  x = jnp.moveaxis(x, 0, -3)
  return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _state_after(key, value, number, documents, place, segments, lengths, state, total, axis):
  """The cache after each row's last real token, the same on every device."""
  batch = key.shape[0]
  before = jnp.zeros((batch,), jnp.int32) if state is None else state.count
  stop = jnp.full((batch,), total) if lengths is None else jnp.clip(lengths, 0, total)
  final = jnp.zeros((batch,), jnp.int32)
  if segments is not None:
    final = last_segment(segments, stop)
  kept = (documents == final[:, None]) & (place < stop[:, None])  # [B, t]
  here = jax.lax.psum(jnp.sum(kept, 1, dtype=jnp.int32), axis)
  count = here + jnp.where(final == 0, before, 0)
  slots = total if state is None else state.key.shape[1]
  slot = jnp.where(kept, jnp.broadcast_to(number, kept.shape), slots)
  rows = jnp.arange(batch)[:, None]

  def collect(new, old):
    stored = (
      jnp.zeros((batch, slots, *new.shape[2:]), new.dtype).at[rows, slot].set(new, mode="drop")
    )
    stored = jax.lax.psum(stored, axis)
    if old is None:
      return stored
    keep = (jnp.arange(slots) < before[:, None]) & (final == 0)[:, None]
    return stored + jnp.where(keep[..., None, None], old, 0)

  olds = (None, None) if state is None else (state.key, state.value)
  return CacheState(collect(key, olds[0]), collect(value, olds[1]), count)
