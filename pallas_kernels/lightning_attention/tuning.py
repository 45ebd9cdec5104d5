"""Block sizes of the TPU kernels.

Chosen by cycles per token of the compiled schedules (one head, bfloat16, K = V = 128, jax 0.12.0.1
with libtpu 0.0.50.1; forward / backward, 2048 rows per grid step):

    C, panel     v5e            v5p            v6e
    128, 128     1.85 / 4.78    2.08 / 4.76    1.45 / 4.45
    256, 128     1.65 / 3.87    1.77 / 3.73    1.79 / 3.57
    256, 256     1.89 / 4.43    -              1.25 / 2.81

Against these stand 1024 and 1920 bytes of memory traffic per token and head, on v5e about 1.9 and
3.5 cycles. Panels skip the products above the diagonal and need fewer registers; a matrix unit of
256 columns loses more by narrow operands than that gains. Long grid steps pay the fixed cost of a
step, about 600 to 800 cycles, once per 2048 rows.
"""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from ..compat import target_platform

CHUNK = 256
PANEL = 128
MAX_ROWS = 2048  # per grid step
# Half of the smallest default limit (16 MiB): the estimate knows nothing of compiler temporaries.
VMEM_BYTES = 9 * 2**20
# bfloat16 fills tiles of 16 rows.
ROW_MULTIPLE = 16


def choose_blocks(
  length: int, key_dim: int, value_dim: int, dtype: jnp.dtype, chunk_size: int | None
) -> tuple[int, int, int]:
  """(rows per chunk, rows per panel, chunks per grid step) for one sequence length and head size.

  The grid steps of a sequence are made as equal as possible, so that little of the last is padding.
  """
  wide = _matrix_unit_columns() > PANEL
  chunk = _round_up(min(chunk_size or CHUNK, length), ROW_MULTIPLE)
  panel = chunk if wide or chunk % PANEL else PANEL
  count = -(-length // chunk)
  most = max(1, min(MAX_ROWS // chunk, count))
  while most > 1 and vmem_estimate(chunk, most, key_dim, value_dim, dtype) > VMEM_BYTES:
    most -= 1
  steps = -(-count // most)
  return chunk, panel, -(-count // steps)


def vmem_estimate(chunk: int, unroll: int, key_dim: int, value_dim: int, dtype: jnp.dtype) -> int:
  """Bytes of the backward kernel's double-buffered blocks and of its scratch."""
  width = jnp.dtype(dtype).itemsize
  key_dim, value_dim = (_round_up(dim, 128) for dim in (key_dim, value_dim))
  blocks = 2 * width * chunk * unroll * (4 * key_dim + 3 * value_dim)
  states = 3 * width * unroll * key_dim * value_dim + 4 * 4 * key_dim * value_dim
  scratch = 4 * chunk * (chunk + 3 * max(key_dim, value_dim)) + 4 * width * chunk * chunk
  return blocks + states + scratch


def _matrix_unit_columns() -> int:
  if target_platform() != "tpu":
    return PANEL  # the CPU interpreter
  return pltpu.get_tpu_info().mxu_column_size


def _round_up(value: int, multiple: int) -> int:
  return -(-value // multiple) * multiple
