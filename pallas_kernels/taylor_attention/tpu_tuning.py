"""Block sizes of the TPU kernels.

Chosen by the compiled schedules. Cycles per token and head of a whole grid step (512 rows, 8
heads), share of the matrix units' slots used (v5e: in the loop over chunks), spilled registers;
bfloat16, F = 16, jax 0.12.0.1 and libtpu 0.0.50.1; waiting for memory not included:

    V    C          v5e                 v6e
    64   128  fwd   1.58 (0.71,   66)   1.33 (0.48,  133)
              bwd   2.95 (0.77, 1183)   2.32 (0.51, 1274)
         256  fwd                       1.00 (0.55, 1443)
              bwd                       1.81 (0.67, 5482)
    112  128  fwd   1.85 (0.77,  236)
              bwd   3.29 (0.82, 1520)
         256  fwd                       1.09 (0.59, 2172)
              bwd                       2.07 (0.63, 6648)

v5p is as v5e. Memory traffic at V = 64, 374 and 694 bytes, takes about 0.7 and 1.3 cycles on v5e.
On v6e, whose matrix unit holds 256 x 256 weights, loading them takes longer than the products in
chunks of 128. Keeping the scores in VMEM by hand, in panels of 128 rows, spills less (966 and 4100
on v6e) but is no faster.
"""

import math

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from ..compat import target_platform
from ..tpu_sizes import round_up
from .tpu_features import Rows

LANES = 128
CHUNK = 128
WIDE_CHUNK = 256  # of bfloat16 where the matrix unit has 256 columns
MAX_ROWS = 512  # per grid step
MAX_GROUP = 16
# What blocks and scratch of a grid step may take. Chips with more than 16 MiB get a raised limit
# where it is needed; the estimate knows nothing of compiler temporaries.
VMEM_BYTES = 12 * 2**20
LARGE_VMEM_BYTES = 26 * 2**20
DEFAULT_LIMIT = 16 * 2**20
# bfloat16 fills tiles of 16 rows.
ROW_MULTIPLE = 16


def choose_group(heads: int, rows: Rows, value_dim: int) -> tuple[int, int]:
  """(heads per grid step, heads that become rows of the batch).

  A group of heads fills whole lane tiles of [B, T, H * D], or is all heads. Where that would be too
  many, each head becomes a row of the batch.
  """
  group = math.lcm(*(LANES // math.gcd(LANES, dim) for dim in (rows.dim, value_dim)))
  group = min(group, heads)
  state = 4 * rows.total * round_up(value_dim + rows.multiple, LANES)
  if group > 1 and (group > MAX_GROUP or 8 * group * state > _vmem_bytes()):
    return 1, heads
  return group, 1


def choose_blocks(
  length: int, group: int, rows: Rows, value_dim: int, dtype: jnp.dtype, chunk_size: int | None
) -> tuple[int, int]:
  """(rows per chunk, chunks per grid step) for one sequence length and head size.

  A sequence of whole chunks is divided into equal steps where that costs less than half of their
  length: the kernel then needs no masks. Otherwise little of the last step should be padding.
  """
  wide = _matrix_unit_columns() > LANES and jnp.dtype(dtype).itemsize == 2
  best = WIDE_CHUNK if wide else CHUNK
  chunk = round_up(min(chunk_size or best, length), ROW_MULTIPLE)
  count = -(-length // chunk)
  most = max(1, min(MAX_ROWS // chunk, count))
  while most > 1 and vmem_estimate(chunk, most, group, rows, value_dim, dtype) > _vmem_bytes():
    most -= 1
  if length % chunk == 0:
    for unroll in range(most, most // 2, -1):
      if count % unroll == 0:
        return chunk, unroll
  steps = -(-count // most)
  return chunk, -(-count // steps)


def vmem_estimate(
  chunk: int, unroll: int, group: int, rows: Rows, value_dim: int, dtype: jnp.dtype
) -> int:
  """Bytes of the backward kernel's double-buffered blocks and of its scratch."""
  width = jnp.dtype(dtype).itemsize
  lanes = 4 * round_up(group * rows.dim, LANES) + 4 * round_up(group * value_dim, LANES)
  state = group * rows.total * round_up(value_dim + rows.multiple, LANES)
  blocks = 2 * width * chunk * unroll * lanes
  states = state * (4 * 4 + 2 * width + 4 + width * unroll)
  return blocks + states + width * chunk * lanes


def vmem_limit(estimate: int) -> int | None:
  """Bytes of VMEM to ask for; None is the compiler's default, 16 MiB or more.

  Compiler temporaries took up to 45 % of the estimate (float32 in chunks of 256).
  """
  return None if estimate + 4 * 2**20 <= DEFAULT_LIMIT else estimate * 7 // 4


def _vmem_bytes() -> int:
  if target_platform() != "tpu" or pltpu.get_tpu_info().vmem_capacity_bytes < 64 * 2**20:
    return VMEM_BYTES
  return LARGE_VMEM_BYTES


def _matrix_unit_columns() -> int:
  if target_platform() != "tpu":
    return LANES  # the CPU interpreter
  return pltpu.get_tpu_info().mxu_column_size
