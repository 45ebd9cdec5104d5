"""What the TPU kernels of Taylor attention share: the plan, masks of a chunk, tiles in VMEM.

Symbols: G heads per grid step, C rows per chunk, n of them real, F and V the (padded) head sizes, R
feature rows (`tpu_features.py`), W = V plus one tile of rows, the first of them all ones: values
with ones below sum weighted values and weights in one product.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .tpu_features import Rows

LANES = 128


class Plan(NamedTuple):
  """What a kernel is specialised for."""

  batch: int
  length: int
  heads: int
  folded: int  # heads that are rows of the batch instead
  rows: Rows
  value_dim: int  # V, a multiple of a tile's rows
  dtype: jnp.dtype
  group: int  # G
  chunk: int  # C
  unroll: int  # chunks per grid step
  decay: bool
  padded: bool  # some row of some chunk may lie past the end of its sequence
  packed: bool  # documents
  normalize: bool
  interpret: bool | pltpu.InterpretParams

  @property
  def dim(self) -> int:
    return self.rows.dim

  @property
  def wide(self) -> int:
    """W: V and a tile of rows for the ones."""
    return self.value_dim + self.rows.multiple

  @property
  def block(self) -> int:
    """Rows per grid step."""
    return self.chunk * self.unroll

  @property
  def steps(self) -> int:
    return pl.cdiv(self.length, self.block)

  @property
  def groups(self) -> int:
    return pl.cdiv(self.heads, self.group)


class Scalars(NamedTuple):
  """Scalar-prefetched refs; the last two are [B * N] for N chunks, and only there if packed.

  And the place in the grid, which can only be asked for outside of loops.

  Documents are runs, so in a chunk the rows that continue the document before it come first, and
  the rows of the document that goes on after it come last: two numbers per chunk say which.
  """

  log_decay: jax.Array  # float32 [B * groups * G]
  lengths: jax.Array  # int32 [B]
  head_end: jax.Array | None  # rows below it see the state before the chunk
  tail_start: jax.Array | None  # rows from it on enter the state after the chunk
  row: jax.Array  # of the batch
  group: jax.Array  # of heads


class Chunk(NamedTuple):
  """One chunk of one group of heads. Time runs along lanes; scores are [key j, query i]."""

  part: jax.Array  # its number in the block
  here: pl.Slice  # its rows in the block
  count: jax.Array  # n
  mask: jax.Array  # bool [C, C]: i >= j in the same document
  real: jax.Array | None  # bool [1, C], None where all rows are
  sees: jax.Array | None  # bool [1, C]: rows that see the state before; None: all
  enters: jax.Array | None  # bool [1, C]: rows that enter the state after; None: all
  carries: jax.Array | None  # bool []: the state before enters the state after; None: yes


def iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def power(log_decay, exponent):
  """decay^exponent; exponents below 0 (masked by the caller) count as 0, so nothing overflows."""
  return jnp.exp(log_decay * jnp.maximum(exponent, 0).astype(jnp.float32))


def split_scalars(plan, refs):
  prefetched = 4 if plan.packed else 2
  places = pl.program_id(0), pl.program_id(1)
  return Scalars(*refs[:prefetched], *(None,) * (4 - prefetched), *places), refs[prefetched:]


def make_chunk(plan: Plan, scalars: Scalars, step, part, starts_ref) -> Chunk:
  """starts_ref int32 [U, C]: for every row the first row of its document in the chunk."""
  size = plan.chunk
  index = step * plan.unroll + part
  row = iota((1, size), 1)
  mask = iota((size, size), 0) <= iota((size, size), 1)
  count, real, sees, enters, carries = size, None, None, None, None
  if plan.packed:
    chunk_id = scalars.row * plan.steps * plan.unroll + index
    head_end, tail_start = scalars.head_end[chunk_id], scalars.tail_start[chunk_id]
    mask &= iota((size, size), 0) >= starts_ref[pl.ds(part, 1), :]
    sees, enters = row < head_end, row >= tail_start
  if plan.padded:
    count = jnp.clip(scalars.lengths[scalars.row] - index * size, 0, size)
    real = row < count
    mask &= real
    enters = real if enters is None else enters & real
  if plan.packed:
    carries = head_end >= count
  return Chunk(part, pl.ds(part * size, size), count, mask, real, sees, enters, carries)


def for_chunks(plan: Plan, body, reverse: bool = False) -> None:
  """body(part, slot, following) for the chunks of a block, two in a turn of the loop.

  `following` is the chunk whose tiles are fetched meanwhile, None without one; `slot`, 0 or 1, says
  where the tiles of this chunk are.
  """
  together = math.gcd(plan.unroll, 2)

  def turn(index):
    for number in range(together):
      place = index * together + number
      following = jnp.minimum(place + 1, plan.unroll - 1)
      if reverse:
        place, following = plan.unroll - 1 - place, plan.unroll - 1 - following
      slot = number if together == 2 else index % 2
      body(place, slot, following if plan.unroll > 1 else None)

  if plan.unroll == together:
    turn(0)
  else:
    jax.lax.fori_loop(0, plan.unroll // together, lambda index, _: turn(index), None)


def lane_tiles(width: int) -> list[slice]:
  return [slice(low, min(low + LANES, width)) for low in range(0, width, LANES)]


def fetches(ref, tile_ref, chunk: Chunk) -> list:
  """Functions that bring a chunk of a block, [C, D], as [D, C] into tile_ref, a lane tile each.

  Rows past the end of the sequence hold anything, even NaN: they become 0.
  """

  def fetch(lanes):
    tile = ref[chunk.here, lanes].T
    if chunk.real is not None:
      tile = jnp.where(chunk.real, tile, jnp.zeros_like(tile))
    tile_ref[lanes, :] = tile.astype(tile_ref.dtype)

  return [functools.partial(fetch, lanes) for lanes in lane_tiles(ref.shape[1])]


def do_share(jobs: list, head: int, heads: int) -> None:
  """Spreads jobs evenly over heads: transposes run beside the matrix products."""
  for job in jobs[head * len(jobs) // heads : (head + 1) * len(jobs) // heads]:
    job()


def put_back(out_ref, tile_ref, chunk: Chunk, head: int, dim: int) -> None:
  """Writes the lane tiles of a block that head number `head` completes."""
  for lanes in lane_tiles(out_ref.shape[1]):
    if head * dim < lanes.stop <= (head + 1) * dim:
      out_ref[chunk.here, lanes] = tile_ref[lanes, :].T


def fill_decay(plan: Plan, scalars: Scalars, decay_ref) -> None:
  """decay_ref [G, C, C] becomes decay^(i-j) for i >= j, once for all chunks of the heads."""
  distance = iota(decay_ref.shape[1:], 1) - iota(decay_ref.shape[1:], 0)
  for head in range(plan.group):
    rate = _rate(plan, scalars, head)
    decay_ref[head] = jnp.where(distance >= 0, power(rate, distance), 0)


def _rate(plan, scalars, head):
  group = scalars.row * plan.groups + scalars.group
  return scalars.log_decay[group * plan.group + head]


def state_factors(plan: Plan, scalars: Scalars, chunk: Chunk, head: int):
  """(up, down, carry): what a row reads from, writes to and leaves of the state.

  up and down are [W, C] or None for 1, carry [1, W] or None. Rows V.. sum weights: no decay there.
  """
  up, down, carry = (None,) * 3
  if plan.decay:
    rate = _rate(plan, scalars, head)
    row = iota((1, plan.chunk), 1)
    value_row = iota((plan.wide, plan.chunk), 0) < plan.value_dim
    up = jnp.where(value_row, power(rate, row + 1), 1.0)
    down = jnp.where(value_row, power(rate, chunk.count - 1 - row), 1.0)
    value_column = iota((1, plan.wide), 1) < plan.value_dim
    carry = jnp.where(value_column, power(rate, jnp.full((1, 1), chunk.count, jnp.int32)), 1.0)
  if chunk.sees is not None:
    up = _where(chunk.sees, up, (plan.wide, plan.chunk))
  if chunk.enters is not None:
    down = _where(chunk.enters, down, (plan.wide, plan.chunk))
  if chunk.carries is not None:
    carry = _where(chunk.carries, carry, (1, plan.wide))
  return up, down, carry


def _where(keep, factor, shape):
  return jnp.where(keep, jnp.ones(shape, jnp.float32) if factor is None else factor, 0.0)


def times(factor, x):
  """factor * x in the dtype of x; None is 1. A factor 0 makes 0 of anything but NaN."""
  return x if factor is None else (factor * x).astype(x.dtype)


def with_ones(plan: Plan, x):
  """[V, C] -> [W, C]: a row of ones below, then zeros."""
  shape = (plan.rows.multiple, plan.chunk)
  return jnp.concatenate([x, jnp.where(iota(shape, 0) == 0, 1.0, 0.0).astype(x.dtype)])


def head_rows(head: int, dim: int) -> slice:
  return slice(head * dim, (head + 1) * dim)


def clear_other_heads(plan: Plan, scalars: Scalars, tile):
  """[C, G * F]: lanes past the last head hold anything, even NaN, and become 0."""
  if plan.heads % plan.group == 0:
    return tile
  left = plan.heads - scalars.group * plan.group
  return jnp.where(iota(tile.shape, 1) < left * plan.dim, tile, jnp.zeros_like(tile))


def lane_window(plan: Plan, head: int) -> slice:
  """The whole lane tiles that hold a head's lanes in a [C, G * F] tile."""
  first, end = head * plan.dim, (head + 1) * plan.dim
  total = plan.group * plan.dim
  return slice(first // LANES * LANES, min(-(-end // LANES) * LANES, total))


def among_lanes(plan: Plan, head: int, x):
  """[F, C] -> rows for the lanes of `lane_window`, zeros where they are other heads'."""
  window = lane_window(plan, head)
  before, after = head * plan.dim - window.start, window.stop - (head + 1) * plan.dim
  zeros = [jnp.zeros((size, x.shape[1]), x.dtype) for size in (before, after)]
  return jnp.concatenate([part for part in (zeros[0], x, zeros[1]) if part.shape[0]])
