"""Membership "causal_recent" in plain XLA.

Where queries and keys have the same centroid, tokens sorted by it are a sliding window: that
operator runs, with its kernels. Where keys have centroids of their own both are sorted, and a query
sees w sorted keys up to one of them, by more or less than one further than the query before it. So
the sorted keys are cut into blocks of w, and queries that end in the same block share it and the
one before. How many they are depends on the data: they come in tiles of w / 2, and T / (w / 2) +
S / w tiles are enough for any division.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from ..segments import pad_length
from ..sliding_window_attention import sliding_window_attention
from .attend import attend_members
from .members import nearest
from .options import Routing
from .state import Tokens


def attend_recent(
  query: Float[Array, "B T H K"],
  tokens: Tokens,
  scores: Float[Array, "B T H C"] | None,
  options: Routing,
) -> Float[Array, "B T H V"]:
  """`scores` of the queries where they are not those of `tokens`."""
  if scores is None:
    return _one_list(query, tokens, options)
  return _two_lists(query, tokens, scores, options)


def _one_list(query, tokens, options):
  batch, length, heads, _ = query.shape
  total = tokens.key.shape[1]
  label = _labels(tokens.scores, tokens.documents)
  index = jnp.argsort(label, axis=-1, stable=True)
  place = jnp.argsort(index, axis=-1)
  query = jnp.pad(query, ((0, 0), (total - length, 0), (0, 0), (0, 0)))

  def into(x):  # [B, S, H, K] -> [B H, S, 1, K]
    return move(x.swapaxes(1, 2), index, place).reshape(batch * heads, total, 1, -1)

  output, _ = sliding_window_attention(
    into(query),
    into(tokens.key),
    into(tokens.value),
    left=options.window_size - 1,
    segment_ids=jnp.take_along_axis(label, index, axis=-1).reshape(batch * heads, total),
    scale=options.scale,
  )
  output = move(output.reshape(batch, heads, total, -1), place, index)
  return output[:, :, total - length :].swapaxes(1, 2)


def _labels(scores, documents):
  """[B, H, S]: equal for tokens of one centroid and document."""
  clusters = scores.shape[-1]
  own = jnp.where(jnp.isfinite(jnp.max(scores, axis=-1)), nearest(scores), clusters)
  if documents is not None:
    own += (clusters + 1) * documents[..., None]
  return own.swapaxes(1, 2)


@jax.custom_vjp
def move(
  x: Shaped[Array, "B H N K"], index: Int[Array, "B H M"], inverse: Int[Array, "B H N"]
) -> Shaped[Array, "B H M K"]:
  """Row index[m] of x at place m, 0 where that is N. Each row goes to one place, inverse[n].

  The gradient is a gather, too.
  """
  return jnp.take_along_axis(x, index[..., None], axis=2, mode="fill", fill_value=0)


move.defvjp(
  lambda x, index, inverse: (move(x, index, inverse), (index, inverse)),
  lambda saved, dy: (move(dy, saved[1], saved[0]), None, None),
)


class Plan(NamedTuple):
  """Who meets whom; for each row [B, H] of queries and keys."""

  key_index: Int[Array, "*R S"]  # the key at each place of the sorted ones
  key_place: Int[Array, "*R S"]
  slot_query: Int[Array, "*R NI"]  # the query in each slot of N tiles of I, T for none
  query_slot: Int[Array, "*R T"]
  start: Int[Array, "*R T"]  # the sorted keys that a query sees
  stop: Int[Array, "*R T"]
  block: Int[Array, "*R N"]  # of w sorted keys, in which a tile's queries end


def _order(labels):
  return jnp.argsort(labels, stable=True).astype(jnp.int32)


def _numbers(count):
  return jnp.arange(count, dtype=jnp.int32)


def _plan(query_label, key_label, window, size) -> Plan:
  """For one row: labels [T] and [S]."""
  length, total = query_label.shape[0], key_label.shape[0]
  before = total - length
  key_index = _order(key_label)
  # Keys and queries in one list, a query behind its own key: sorted, keys in front can be counted.
  pairs = jnp.stack([key_label[before:], query_label], axis=-1).ravel()
  merged = _order(jnp.concatenate([key_label[:before], pairs]))
  is_query = (merged >= before) & ((merged - before) % 2 == 1)
  keys_up_to = jnp.cumsum(~is_query, dtype=jnp.int32)
  where = jnp.zeros_like(merged).at[merged].set(_numbers(merged.shape[0]))
  stop = keys_up_to[where[before + 1 :: 2]]
  first = jnp.searchsorted(key_label[key_index], query_label, side="left")
  start = jnp.maximum(first, stop - window)
  blocks = -(-total // window)
  order = _order(query_label)
  block = (jnp.maximum(stop - 1, 0) // window)[order]  # does not fall
  edge = jnp.searchsorted(block, _numbers(blocks + 1))
  tiles = jnp.cumsum(-(-jnp.diff(edge) // size))
  tile = jnp.pad(tiles, (1, 0))[block] + (_numbers(length) - edge[block]) // size
  slot = tile * size + (_numbers(length) - edge[block]) % size
  count = -(-length // size) + blocks
  slot_query = jnp.full((count * size,), length, jnp.int32).at[slot].set(order)
  query_slot = jnp.zeros((length,), jnp.int32).at[order].set(slot)
  of_tile = jnp.searchsorted(tiles, _numbers(count), side="right")
  key_place = jnp.zeros_like(key_index).at[key_index].set(_numbers(total))
  return Plan(
    key_index, key_place, slot_query, query_slot, start, stop, jnp.minimum(of_tile, blocks - 1)
  )


def _two_lists(query, tokens, scores, options):
  window = options.window_size
  total = tokens.key.shape[1]
  size = max(window // 2, 1)
  documents = tokens.documents
  own = None if documents is None else documents[:, total - query.shape[1] :]
  labels = _labels(scores, own), _labels(tokens.scores, documents)
  plan = jax.vmap(jax.vmap(lambda q, k: _plan(q, k, window, size)))(*labels)

  def tiles(x):  # [B, T, H, K] -> [N, B, H, I, K]
    x = move(x.swapaxes(1, 2), plan.slot_query, plan.query_slot)
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, size, x.shape[-1]), 2, 0)

  def slabs(x):  # [B, S, H, K] -> [N, B, H, 2 w, K], the block of a tile and the one before
    x = move(x.swapaxes(1, 2), plan.key_index, plan.key_place)
    x = pad_length(jnp.pad(x, ((0, 0), (0, 0), (window, 0), (0, 0))), window, axis=2)
    x = x.reshape(*x.shape[:2], -1, window, x.shape[-1])
    block = plan.block[..., None, None]
    parts = [jnp.take_along_axis(x, block + n, axis=2) for n in (0, 1)]
    return jnp.moveaxis(jnp.concatenate(parts, axis=3), 2, 0)

  def bounds(x):  # [B, H, T] -> [N, B, H, I], 0 in empty slots
    x = jnp.take_along_axis(jnp.pad(x, ((0, 0), (0, 0), (0, 1))), plan.slot_query, axis=-1)
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, size), 2, 0)

  @jax.checkpoint
  def tile(inputs):
    q, k, v, start, stop, block = inputs
    place = (block[..., None] - 1) * window + jnp.arange(2 * window)  # [B, H, 2 w]
    pairs = (place[:, :, None] >= start[..., None]) & (place[:, :, None] < stop[..., None])
    none = jnp.zeros((), bool)
    return attend_members(q, k, v, pairs, none, 0, options, None, None).astype(v.dtype)

  outputs = jax.lax.map(
    tile,
    (tiles(query), slabs(tokens.key), slabs(tokens.value), bounds(plan.start), bounds(plan.stop),
     jnp.moveaxis(plan.block, 2, 0)),
  )  # fmt: skip
  outputs = jnp.moveaxis(outputs, 0, 2)  # [B, H, N, I, V]
  outputs = outputs.reshape(*outputs.shape[:2], -1, outputs.shape[-1])
  return move(outputs, plan.query_slot, plan.slot_query).swapaxes(1, 2)
