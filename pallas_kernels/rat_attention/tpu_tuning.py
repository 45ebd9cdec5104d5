"""Block sizes of the TPU kernels, and which problems they take.

Chosen by the compiled schedules. Cycles per token and head of a whole grid step with every branch
and loop counted once, share of the matrix units' slots used, spilled registers; K = 128, 1024 rows
(float32: 512), jax 0.12.0.1 and libtpu 0.0.50.1; waiting for memory not included:

    L             v5e                 v5p                 v6e
    16  bf16 fwd  4.35 (0.29,  977)   4.68 (0.27,  979)   3.68 (0.17, 1167)
             bwd  8.25 (0.30, 2263)   8.66 (0.29, 2310)   6.65 (0.19, 2551)
    64       fwd  5.17 (0.24,  866)
             bwd  10.9 (0.23, 1277)
    16  f32  fwd  12.4 (0.61, 1120)
             bwd  23.3 (0.65, 2686)

Two heads of K = 64 in a lane tile take 3.62 and 6.30 each (L = 16, bfloat16, v5e). Where summaries
are many the loop over whole tiles is what counts: tiles of 256 keep the matrix units of v5e 71 %
busy forward and 95 % backward, tiles of 128 about 50 %. Below 512 summaries the tile that is masked
would be too large a part. Memory traffic, 1132 and 2252 bytes, takes about 2.1 and 4.1 cycles on
v5e.

Documents (L = 16, bfloat16) take 4.85, 5.05 and 4.18 cycles forward, 8.47, 8.80 and 7.08 backward,
of rows that are up to a fourth longer. To move rows, 128 of 2048 lanes take 1809, 1944 and 1322
cycles with both branches, of which a step runs one; reading or writing them takes 600 on v5e.
"""

import jax.numpy as jnp

from ..compat import target_platform
from ..tpu_sizes import SMALL_VMEM, round_up, vmem_bytes
from . import tpu_rows as rows_of

MAX_ROWS = 1024  # tokens of one head per grid step, where 16 chunks are not longer
ATTEND_ROWS = 512  # of the softmax alone
TILE = 128  # summaries per product, and where there are more than 4 tiles of them:
WIDE_TILE = 256
LONGEST_CHUNK = 128  # that the fused kernels take
MOVED_LANES = 2048  # that the kernel which moves rows takes together


def padded_chunk(chunk_size: int) -> int:
  """Rows that a chunk takes.

  1 or an even number, since two bfloat16 rows share a word; of longer chunks 16 should fill whole
  lane tiles, for the statistics have time on lanes.
  """
  if chunk_size <= 8:
    return 1 if chunk_size == 1 else round_up(chunk_size, 2)
  return round_up(chunk_size, 4 if chunk_size <= 16 else 8 if chunk_size <= 64 else 16)


def head_width(heads: int, head_dim: int) -> tuple[int, int]:
  """(lanes per head, heads per lane tile)."""
  if head_dim <= rows_of.LANES // 2 and heads % 2 == 0:
    return rows_of.LANES // 2, 2
  return round_up(head_dim, rows_of.LANES), 1


def tile_size(slots: int) -> int:
  return TILE if slots <= 4 * TILE else max(TILE, WIDE_TILE)


def chunks_per_block(chunk: int, length: int, dtype: jnp.dtype, share: int = 16) -> int:
  """A power of two: how many chunks of `chunk` rows (padding included) a grid step takes.

  More rows per step cost less each; but they may not lengthen the sequence by more than 1 / share.
  """
  count = 16 if jnp.dtype(dtype).itemsize == 2 else 8  # rows of a tile in VMEM
  while count * chunk % rows_of.LANES:
    count *= 2
  most = MAX_ROWS * 2 // jnp.dtype(dtype).itemsize  # float32 products take room
  if target_platform() == "tpu" and vmem_bytes() <= SMALL_VMEM:
    most //= 4
  limit = round_up(length, count * chunk) + length // share
  while 2 * count * chunk <= most and round_up(length, 2 * count * chunk) <= limit:
    count *= 2
  return count


def heads_inside(units: int, groups: int, slots: int, rows: int, lanes: int, dtype) -> int:
  """How many heads of a group share the walk over the sequence (one query and key for all).

  0 if the summaries of a single one do not fit in VMEM.
  """
  most = units // groups
  for inside in range(most, 0, -1):
    if most % inside == 0 and vmem_estimate(inside, slots, rows, lanes, dtype) <= vmem_bytes():
      return inside
  return 0


def vmem_estimate(inside: int, slots: int, rows: int, lanes: int, dtype: jnp.dtype) -> int:
  """Bytes of the backward kernel: summaries and their gradients, blocks of rows, scratch."""
  width = jnp.dtype(dtype).itemsize
  summaries = inside * slots * lanes * (2 * width + 2 * 4)
  return summaries + rows * lanes * (2 * 12 * width + 12 * 4)


def attend_estimate(slots: int, rows: int, lanes: int, dtype: jnp.dtype) -> int:
  """Bytes of the gradient kernel of the softmax alone."""
  width = jnp.dtype(dtype).itemsize
  return slots * lanes * 2 * (2 * width + 2 * 4) + rows * lanes * (8 * width + 4 * 4)
