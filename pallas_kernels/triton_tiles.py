"""What the Triton kernels of several operators share: tiles of token arrays, documents.

Import this module only where a GPU is compiled for: it imports triton.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(
  pointer,
  rows,
  columns,
  row_end,
  H: tl.constexpr,
  DIM: tl.constexpr,
  ROWS_FULL: tl.constexpr,
  COLUMNS_FULL: tl.constexpr,
):
  """[rows, columns] of one head of a [T, H, DIM] array; what lies outside reads as 0."""
  tile = pointer + rows[:, None] * (H * DIM) + columns[None, :]
  if ROWS_FULL and COLUMNS_FULL:
    return tl.load(tile)
  if ROWS_FULL:
    return tl.load(tile, mask=columns[None, :] < DIM, other=0.0)
  if COLUMNS_FULL:
    return tl.load(tile, mask=rows[:, None] < row_end, other=0.0)
  return tl.load(tile, mask=(rows[:, None] < row_end) & (columns[None, :] < DIM), other=0.0)


@triton.jit
def put_tile(
  pointer, rows, columns, x, row_end,
  H: tl.constexpr, DIM: tl.constexpr, ROWS_FULL: tl.constexpr, COLUMNS_FULL: tl.constexpr,
):  # fmt: skip
  """The inverse of `load_tile`; rounds."""
  tile = pointer + rows[:, None] * (H * DIM) + columns[None, :]
  x = x.to(pointer.dtype.element_ty)
  if ROWS_FULL and COLUMNS_FULL:
    tl.store(tile, x)
  else:
    tl.store(tile, x, mask=(rows[:, None] < row_end) & (columns[None, :] < DIM))


@triton.jit
def segment_before(segments, position, length):
  """Document of the last real token before `position`; 0, the initial state's, at the start."""
  last = tl.minimum(position, length) - 1
  return tl.load(segments + tl.maximum(last, 0), mask=last >= 0, other=0)
