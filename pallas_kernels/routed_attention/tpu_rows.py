"""Rows of tokens in VMEM: packed to words of 32 bits, taken for a cluster's members, added back.

A row of 128 lanes of 32-bit words is what one load or store moves, whatever row it is; rows of
bfloat16 share a register with their neighbours. So two bfloat16 arrays are packed into one of
words, and one load takes a member's row of both. Arrays of more lanes are several of 128.
Row T is for slots without a member: zeros, and a place to which results may be thrown.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
UNROLL = 32  # rows taken at a time
ADDED = 16  # rows added at a time
STATIC = 512  # slots up to which a cluster's rows are moved without a loop


def iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def pack(one: jax.Array, other: jax.Array | None) -> jax.Array:
  """int32 words of one float32 array, or of two of bfloat16: `one` in the upper half."""
  words = pltpu.bitcast(one.astype(jnp.float32), jnp.int32)
  if other is None:
    return words
  low = pltpu.bitcast(other.astype(jnp.float32), jnp.int32)
  return words | jax.lax.shift_right_logical(low, jnp.full_like(low, 16))


def unpack(words: jax.Array, count: int) -> list[jax.Array]:
  """float32 arrays that `pack` packed."""
  if count == 1:
    return [pltpu.bitcast(words, jnp.float32)]
  upper = words & jnp.full_like(words, -(2**16))
  lower = jax.lax.shift_left(words, jnp.full_like(words, 16))
  return [pltpu.bitcast(x, jnp.float32) for x in (upper, lower)]


def chunks(length: int, body: Callable) -> None:
  """body(rows) for every LANES of `length` rows, a multiple of it."""

  def turn(n, _):
    body(pl.ds(pl.multiple_of(n * LANES, LANES), LANES))

  jax.lax.fori_loop(0, length // LANES, turn, None)


def clear(ref) -> None:
  """Zeros for [L, T + 8, 128]."""

  def body(rows):
    for n in range(ref.shape[0]):
      ref[n, rows, :] = jnp.zeros((LANES, ref.shape[2]), ref.dtype)

  chunks(ref.shape[1] - SUBLANES, body)


def lane_tiles(x: jax.Array) -> list[jax.Array]:
  """[..., lanes] in pieces of LANES."""
  return [x[..., at : at + LANES] for at in range(0, x.shape[-1], LANES)]


def gather(members, head, slots: int, sources: Sequence[Any], take: Callable) -> None:
  """take(rows, words) for UNROLL slots at a time; words: int32 [UNROLL, lanes] of each source.

  Row n of the words is row members[head, n] of a source [L, T + 8, 128].
  """

  def some(start):
    places = [members[head, start + i] for i in range(UNROLL)]
    words = []
    for source in sources:
      tiles = range(source.shape[0])
      rows = [[source[tile, pl.ds(at, 1), :] for at in places] for tile in tiles]
      words.append(jnp.concatenate([jnp.concatenate(x, 0) for x in rows], 1))
    take(pl.ds(start, UNROLL), words)

  _in_turn(head, slots, UNROLL, some)


def scatter_add(members, head, pairs: Sequence[tuple[Any, Any]]) -> None:
  """(source [L, W, 128], target [L, T + 8, 128]): source row n is added to row members[n].

  No two slots of a cluster hold the same token, so the loads of several come before their stores.
  (Slots without a member do share a row; nobody reads it.)
  """

  def some(start):
    places = [members[head, start + i] for i in range(ADDED)]
    tiles = [(a, b, tile) for a, b in pairs for tile in range(a.shape[0])]
    sums = [
      [
        target[tile, pl.ds(at, 1), :] + source[tile, pl.ds(start + i, 1), :]
        for i, at in enumerate(places)
      ]
      for source, target, tile in tiles
    ]
    for rows, (_, target, tile) in zip(sums, tiles, strict=True):
      for at, row in zip(places, rows, strict=True):
        target[tile, pl.ds(at, 1), :] = row

  _in_turn(head, pairs[0][0].shape[1], ADDED, some)


def _in_turn(head, count: int, step: int, body: Callable) -> None:
  """body(start) for every `step` slots; without a loop where that makes all addresses constants."""
  if isinstance(head, int) and count <= STATIC:
    for start in range(0, count, step):
      body(start)
    return
  some = next(x for x in (4, 2, 1) if count % (x * step) == 0)

  def turn(n, _):
    for i in range(some):
      body(pl.multiple_of(n * (some * step), step) + i * step)

  jax.lax.fori_loop(0, count // (some * step), turn, None)


def columns(rows: jax.Array, width: int) -> jax.Array:
  """[heads, 128], a number per token and head, -> [128, 128]: tokens as rows, on their lanes."""
  spread = [jnp.broadcast_to(rows[n : n + 1], (LANES, LANES)).T for n in range(rows.shape[0])]
  result = spread[0]
  for head, column in enumerate(spread[1:], 1):
    result = jnp.where(iota(column.shape, 1) // width == head, column, result)
  return result


def reversed_in_eights(x: jax.Array) -> jax.Array:
  """[R, N] float32, every 8 rows in the opposite order."""
  order = SUBLANES - 1 - iota((SUBLANES, LANES), 0)
  return jnp.concatenate(
    [
      jnp.concatenate(
        [jnp.take_along_axis(tile, order, axis=0) for tile in lane_tiles(x[at : at + SUBLANES])], 1
      )
      for at in range(0, x.shape[0], SUBLANES)
    ]
  )


def skew(x: jax.Array, width: int) -> jax.Array:
  """[R, width + R] -> [R, width]: out[a, j] = x[a, j + R - 1 - a], so columns become keys."""
  rows, lanes = x.shape
  return pltpu.roll(x, lanes - rows + 1, axis=1, stride=1, stride_axis=0)[:, :width]


def unskew(x: jax.Array) -> jax.Array:
  """[R, width] -> [R, width + R], rows `reversed_in_eights`: the transpose of `skew` otherwise.

  The hardware turns row n of 8 by n lanes to the right; to turn it to the left, rows are reversed.
  """
  rows, width = x.shape
  x = jnp.concatenate([reversed_in_eights(x), jnp.zeros((rows, rows), x.dtype)], 1)
  return jnp.concatenate(
    [
      pltpu.roll(x[at : at + SUBLANES], rows - SUBLANES - at, axis=1, stride=1, stride_axis=0)
      for at in range(0, rows, SUBLANES)
    ]
  )
