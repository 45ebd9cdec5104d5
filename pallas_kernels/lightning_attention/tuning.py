"""Block sizes of the TPU kernels.

Chosen by the compiled schedules. Cycles per token (share of the matrix units' slots used, spilled
registers), one head, bfloat16, K = V = 128, 2048 rows per grid step, jax 0.12.0.1 and libtpu
0.0.50.1; v5e and v5p in panels of 128 rows, v6e in one:

    C         v5e                v5p                v6e
    128  fwd  1.58 (0.63,   0)   1.69 (0.59,   0)   1.04 (0.48,   18)
         bwd  3.24 (0.70, 375)   3.10 (0.73, 375)   3.89 (0.29,    0)
    256  fwd  1.65 (0.76,   0)   1.77 (0.71,   0)   1.25 (0.60,   41)
         bwd  3.87 (0.74,   0)   3.73 (0.77,   0)   2.81 (0.62,  315)
    512  fwd  2.44 (0.72,   2)   2.48 (0.71,   2)   1.76 (0.71,  642)
         bwd  5.14 (0.80,   0)   5.12 (0.81,   0)   3.78 (0.79, 1905)

Memory traffic of 1152 and 1920 bytes per token and head (C = 256) takes about 2.1 and 3.5 cycles on
v5e, so 128 would gain nothing in the forward, little in the backward, and stores twice the states.
Panels skip the products above the diagonal and need few registers; on v6e, whose matrix unit has
256 columns, they cost more than they save (256 rows in panels of 128: 1.79 and 3.6).
Long grid steps pay the fixed cost of a step, 600 to 800 cycles, once per 2048 rows.
"""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from ..compat import target_platform
from ..tpu_sizes import round_up

CHUNK = 256
PANEL = 128
MAX_ROWS = 2048  # per grid step
# Below the smallest default limit, 16 MiB: the estimate knows nothing of compiler temporaries.
VMEM_BYTES = 10 * 2**20
# bfloat16 fills tiles of 16 rows.
ROW_MULTIPLE = 16


def choose_blocks(
  length: int, key_dim: int, value_dim: int, dtype: jnp.dtype, chunk_size: int | None
) -> tuple[int, int, int]:
  """(rows per chunk, rows per panel, chunks per grid step) for one sequence length and head size.

  A sequence of whole chunks is divided into equal steps where that costs less than half of their
  length: the kernel then needs no masks. Otherwise little of the last step should be padding.
  """
  wide = _matrix_unit_columns() > PANEL
  chunk = round_up(min(chunk_size or CHUNK, length), ROW_MULTIPLE)
  panel = chunk if wide or chunk % PANEL else PANEL
  count = -(-length // chunk)
  most = max(1, min(MAX_ROWS // chunk, count))
  while most > 1 and vmem_estimate(chunk, most, key_dim, value_dim, dtype) > VMEM_BYTES:
    most -= 1
  if length % chunk == 0:
    for unroll in range(most, most // 2, -1):
      if count % unroll == 0:
        return chunk, panel, unroll
  steps = -(-count // most)
  return chunk, panel, -(-count // steps)


def vmem_estimate(chunk: int, unroll: int, key_dim: int, value_dim: int, dtype: jnp.dtype) -> int:
  """Bytes of the backward kernel's double-buffered blocks and of its scratch."""
  width = jnp.dtype(dtype).itemsize
  key_dim, value_dim = (round_up(dim, 128) for dim in (key_dim, value_dim))
  blocks = 2 * width * chunk * unroll * (4 * key_dim + 3 * value_dim)
  states = 3 * width * unroll * key_dim * value_dim + 4 * 4 * key_dim * value_dim
  scratch = 4 * chunk * (chunk + 3 * max(key_dim, value_dim)) + 4 * width * chunk * chunk
  return blocks + states + scratch


def _matrix_unit_columns() -> int:
  if target_platform() != "tpu":
    return PANEL  # the CPU interpreter
  return pltpu.get_tpu_info().mxu_column_size
