"""Linear attention with the sequence split over devices: only states travel.

A linear operator's state after a run of n tokens is D(n) state + local, where `local` is what the
run itself contributes and D(n) the decay over n tokens. With W shards of n tokens, a_r the first
position of shard r:

    state_r = D(a_r) initial_state + sum over u < r of D(a_r - a_u - n) local_u

and shard r then runs the ordinary kernel with `state_r` as its initial state. Computing `local_r`
reads keys and values once more, by one matrix product. Adding the queries' product with `state_r`
to the output of a zero-state pass would read the queries and rewrite the output instead, and would
round a bfloat16 output twice. This way the sharded output is as exact as the unsharded one, and the
gradients are those of the kernel.
Paper: Linear Attention Sequence Parallelism (2024), in the all-gather form of its sequel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .segments import last_segment, run_index

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


def run_sequence_shard(
  operator: Callable,
  inputs: dict[str, Any],
  axis: str,
  count: int,
  contribution: Callable,
  decay: Callable,
) -> tuple[jax.Array, jax.Array]:
  """One device's part, inside `shard_map`: (its output, the final state of the whole sequence).

  Args:
    operator: (**inputs) -> (output, final state); its state starts with the axes [B, H].
    inputs: the arrays of `operator` on this device; "initial_state" and "key" are among them.
    axis, count: the mesh axis of the sequence and its size W.
    contribution: (steps, kept), both [B, T / W] -> what the tokens `kept` add to the state that
      many `steps` after them.
    decay: steps [...] -> factor of the state after that many tokens, [..., H, ., .].
  """
  batch, length = inputs["key"].shape[:2]
  state = inputs["initial_state"]
  lengths = inputs.get("lengths")
  lengths = jnp.full((batch,), length * count, jnp.int32) if lengths is None else lengths
  segments = inputs.get("segment_ids")
  segments = jnp.zeros((batch, length), jnp.int32) if segments is None else segments

  shard, documents = locate(segments, lengths, axis, length)
  row = jnp.arange(length)
  real = (shard.stop - shard.start)[:, None]  # [B, 1]
  kept = (row < real) & (documents == shard.after[:, None])  # only the last document's tokens
  local = contribution(jnp.maximum(real - 1 - row, 0), kept)
  pass_on = _pass_by_gather if count <= GATHER_LIMIT else _pass_by_doubling
  incoming, final = pass_on(local, state, decay, shard, axis, count)
  here = dict(inputs, initial_state=_rows(shard.first == shard.before, incoming))
  if "lengths" in inputs:
    here["lengths"] = shard.stop - shard.start
  output, _ = operator(**here)
  return output, final


def locate(segments, lengths, axis, length):
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


def _pass_by_gather(local, initial_state, decay, shard, axis, count):
  """(state before the shard, final state): every contribution to every device, one collective."""
  stops, afters = jax.lax.all_gather((shard.stop, shard.after), axis)  # [W, B]
  gathered = jax.lax.all_gather(local, axis)  # [W, B, H, ., .]

  def state_at(position, document, shards):
    """The state of `document` after `position` tokens, from the contributions of `shards` [W]."""
    alive = (afters == document) & shards[:, None]  # [W, B]
    kept = decay(jnp.maximum(position - stops, 0)) * alive[..., None, None, None]
    first = _rows(document == 0, decay(position) * initial_state)
    return jnp.sum(kept * gathered, axis=0) + first

  shards = jnp.arange(count)
  incoming = state_at(shard.start, shard.before, shards < jax.lax.axis_index(axis))
  return incoming, state_at(shard.total, shard.final, shards >= 0)


def _pass_by_doubling(local, initial_state, decay, shard, axis, count):
  """The same by log2(W) hops: pairs (factor, state) compose as (f' f, f' s + s')."""
  index = jax.lax.axis_index(axis)
  factor = _rows(shard.before == shard.after, decay(shard.stop - shard.start))
  state = jnp.where(index == 0, factor * initial_state + local, local)
  hop = 1
  while hop < count:
    pairs = [(source, source + hop) for source in range(count - hop)]
    left_factor, left_state = jax.lax.ppermute((factor, state), axis, pairs)
    arrived = index >= hop
    state = state + jnp.where(arrived, factor * left_state, 0)
    factor = jnp.where(arrived, factor * left_factor, factor)
    hop *= 2
  # `state` is now the one after the shard.
  left = jax.lax.ppermute(state, axis, [(source, source + 1) for source in range(count - 1)])
  final = jax.lax.psum(jnp.where(index == count - 1, state, 0), axis)
  return jnp.where(index == 0, initial_state, left), final


def _rows(rows, state):
  return jnp.where(rows[:, None, None, None], state, 0)
