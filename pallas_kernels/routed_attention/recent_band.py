"""Who sees whom with membership "causal_recent": the band that sorting makes of it.

Sorted by document and centroid, what a query sees is a run of the sorted keys: the w of its own
label up to itself. Neither end of that run falls from one sorted query to the next.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .members import nearest
from .state import Tokens


class Band(NamedTuple):
  """Sorted query n sees the sorted keys from start[n] to stop[n] - 1; for each row [B, H]."""

  query_order: Int[Array, "*R T"]  # the query at each place of the sorted ones
  key_order: Int[Array, "*R S"]
  start: Int[Array, "*R T"]
  stop: Int[Array, "*R T"]


class Tiles(NamedTuple):
  """Sorted keys in blocks, and sorted queries in tiles whose last keys are in one block.

  How many queries these are depends on the data. Every block has a tile at least, so there are
  N = T / I + blocks of them, whatever the data; those behind have none and the last block.
  """

  slot_query: Int[Array, "*R NI"]  # the query in each slot of N tiles of I, T for none
  query_slot: Int[Array, "*R T"]
  start: Int[Array, "*R NI"]  # of the slot's query; 0, like stop, where there is none
  stop: Int[Array, "*R NI"]
  block: Int[Array, "*R N"]  # does not fall


def labels(scores: Float[Array, "B S H C"], documents: Int[Array, "B S"] | None):
  """[B, H, S]: equal for tokens of one centroid and document."""
  clusters = scores.shape[-1]
  own = jnp.where(jnp.isfinite(jnp.max(scores, axis=-1)), nearest(scores), clusters)
  if documents is not None:
    own += (clusters + 1) * documents[..., None]
  return own.swapaxes(1, 2)


def find_band(
  scores: Float[Array, "B T H C"] | None, tokens: Tokens, length: int, window: int
) -> Band:
  """`scores` of the `length` queries; None where they are those of the last tokens."""
  of_key = labels(tokens.scores, tokens.documents)
  if scores is None:
    of_query = of_key[..., of_key.shape[-1] - length :]
  else:
    documents = tokens.documents
    own = None if documents is None else documents[:, documents.shape[1] - length :]
    of_query = labels(scores, own)
  return by_rows(lambda q, k: _band(q, k, window), of_query, of_key)


def by_rows(function, *arrays):
  """function of one row, for all [B, H]."""
  return jax.vmap(jax.vmap(function))(*arrays)


def _band(query_label, key_label, window) -> Band:
  """For one row: labels [T] and [S]; query i is token S - T + i."""
  before = key_label.shape[0] - query_label.shape[0]
  key_order, query_order = order(key_label), order(query_label)
  # Keys and queries in one list, a query behind its own key: sorted, keys in front can be counted.
  pairs = jnp.stack([key_label[before:], query_label], axis=-1).ravel()
  merged = order(jnp.concatenate([key_label[:before], pairs]))
  is_query = (merged >= before) & ((merged - before) % 2 == 1)
  keys_up_to = jnp.cumsum(~is_query, dtype=jnp.int32)
  stop = keys_up_to[inverse(merged)[before + 1 :: 2]][query_order]
  first = jnp.searchsorted(key_label[key_order], query_label[query_order], side="left")
  return Band(query_order, key_order, jnp.maximum(first.astype(jnp.int32), stop - window), stop)


def order(labels: Int[Array, " N"]) -> Int[Array, " N"]:
  return jnp.argsort(labels, stable=True).astype(jnp.int32)


def inverse(permutation: Int[Array, " N"]) -> Int[Array, " N"]:
  return jnp.zeros_like(permutation).at[permutation].set(numbers(permutation.shape[0]))


def numbers(count: int) -> Int[Array, " N"]:
  return jnp.arange(count, dtype=jnp.int32)


def find_tiles(band: Band, block_size: int, size: int, blocks: int) -> Tiles:
  """For one row, in tiles of `size` queries; what a query sees must reach no further than into the
  block in front of its last key's."""
  length = band.stop.shape[0]
  block = jnp.maximum(band.stop - 1, 0) // block_size
  edge = jnp.searchsorted(block, numbers(blocks + 1)).astype(jnp.int32)
  tiles = jnp.cumsum(jnp.maximum(-(-jnp.diff(edge) // size), 1))
  behind = numbers(length) - edge[block]  # the first query of its block
  slot = (jnp.pad(tiles, (1, 0))[block] + behind // size) * size + behind % size
  count = -(-length // size) + blocks
  put = lambda fill, x: jnp.full((count * size,), fill, jnp.int32).at[slot].set(x)  # noqa: E731
  of_tile = jnp.searchsorted(tiles, numbers(count), side="right").astype(jnp.int32)
  return Tiles(
    slot_query=put(length, band.query_order),
    query_slot=jnp.zeros((length,), jnp.int32).at[band.query_order].set(slot),
    start=put(0, band.start),
    stop=put(0, band.stop),
    block=jnp.minimum(of_tile, blocks - 1),
  )
