"""What the sweeps of the Triton kernels of Taylor attention share: features, states, weights.

Features are never stored. Each is a product of two factors, and a factor is an entry of the query
or key, or 1: the entries of all features are picked by a product with a 0/1 matrix, which is exact
and runs on the tensor cores. States hold plain products of keys; the coefficients of the query side
are left to the reader. The state G of the backward pass (sums of query features times cotangents)
is kept the same way, without coefficients.

A state [P, columns] is three blocks of rows: of the P packed rows (`features.py`) the last
2 * ROWS, all pairs, and the rest, at most TAIL; for F = 16 that is 64 + 64 + 25 (of 32). The
normaliser, the state's last column, is a vector [P] beside them, float32 also when it is read.

Import this module only where a GPU is compiled for: it imports triton.
"""

import triton
import triton.language as tl

from ..triton_tiles import load_tile, segment_before


@triton.jit
def tokens(pointer, rows, columns, count, H: tl.constexpr, DIM: tl.constexpr,
           ROWS_FULL: tl.constexpr, COLUMNS_FULL: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
  """`load_tile`, widened to float32 where WIDE: scores and features overflow float16."""
  tile = load_tile(pointer, rows, columns, count, H, DIM, ROWS_FULL, COLUMNS_FULL)
  return tile.to(tl.float32) if WIDE else tile


@triton.jit
def block_factors(start, end, COUNT: tl.constexpr, F: tl.constexpr):
  """(first factor, second factor, coefficient) of the packed rows start, ..., each [COUNT].

  Factors are indices of entries; -1 is the constant 1 and -2, at `end` and after, 0.
  """
  row = start + tl.arange(0, COUNT)
  pair = row - (1 + F)
  first = tl.zeros((COUNT,), tl.int32)
  for i in range(1, F):  # the pairs (i, i), (i, i + 1), ... come after i F - i (i - 1) / 2 others
    first += tl.where(pair >= i * F - i * (i - 1) // 2, 1, 0)
  second = pair - (first * F - first * (first - 1) // 2) + first
  coefficient = tl.where(first == second, 0.5 / F, 1.0 / F)
  coefficient = tl.where(row <= F, F**-0.5, coefficient)
  coefficient = tl.where((row == 0) | (row >= end), 1.0, coefficient)
  first = tl.where(row <= F, row - 1, first)
  second = tl.where(row <= F, -1, second)
  return tl.where(row < end, first, -2), tl.where(row < end, second, -2), coefficient


@triton.jit
def split(x, PRECISION: tl.constexpr):
  """x as a sum of two numbers that tf32 holds (the second but for its last digits).

  Times a matrix of 0, 1/2 and 1, which tf32 holds too, two products are enough for float32; three
  would also need that matrix in two parts, which the compiler keeps in registers.
  """
  high = x
  if PRECISION == "tf32x3":
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
  return high, x - high


@triton.jit
def query_matrices(first, second, DIMS: tl.constexpr, PAIRS: tl.constexpr,
                   DTYPE: tl.constexpr):  # fmt: skip
  """What picks both factors on the query side, [F, features] each.

  Where PAIRS the first one carries the 1/2 of the diagonal; 1 / F is left to the caller.
  """
  dims = tl.arange(0, DIMS)
  one = dims[:, None] == first[None, :]
  other = dims[:, None] == second[None, :]
  if PAIRS:
    half = tl.where(first == second, 0.5, 1.0)
    return tl.where(one, half[None, :], 0.0).to(DTYPE), other.to(DTYPE)
  return one.to(DTYPE), other.to(DTYPE)


@triton.jit
def pick(x, matrix, index, PAIRS: tl.constexpr, PRECISION: tl.constexpr):
  """One factor of every feature of every row: x [C, F] to float32 [C, features]."""
  high, low = split(x, PRECISION)
  picked = tl.dot(high, matrix, input_precision="tf32")
  if PRECISION == "tf32x3":
    picked = tl.dot(low, matrix, picked, input_precision="tf32")
  if not PAIRS:
    picked += tl.where(index == -1, 1.0, 0.0)[None, :]
  return picked


@triton.jit
def key_factor(x, index, PAIRS: tl.constexpr, PRECISION: tl.constexpr):
  """`pick` on the key side, features first: x [C, F] to float32 [features, C]."""
  dims = tl.arange(0, x.shape[1])
  matrix = (index[:, None] == dims[None, :]).to(x.dtype)
  high, low = split(x, PRECISION)
  picked = tl.dot(matrix, tl.trans(high), input_precision="tf32")
  if PRECISION == "tf32x3":
    picked = tl.dot(matrix, tl.trans(low), picked, input_precision="tf32")
  if not PAIRS:
    picked += tl.where(index == -1, 1.0, 0.0)[:, None]
  return picked


@triton.jit
def add(state, norm, x, y, weight, norm_weight, carry, norm_carry, first, second,
        PAIRS: tl.constexpr, WEIGHTED: tl.constexpr, NORM_WEIGHTED: tl.constexpr,
        PRECISION: tl.constexpr):  # fmt: skip
  """State [rows, W] and normaliser [rows] after a chunk: features of x [C, F] times y [C, W]."""
  features = key_factor(x, first, PAIRS, PRECISION)
  features *= key_factor(x, second, PAIRS, PRECISION)  # [rows, C]
  if NORM_WEIGHTED:
    norm = norm * norm_carry + tl.sum(features * norm_weight[None, :], 1)
  else:
    norm += tl.sum(features, 1)
  if WEIGHTED:
    features *= weight[None, :]
    state *= carry
  return tl.dot(features.to(y.dtype), y, state, input_precision=PRECISION), norm


@triton.jit
def read(out, total, x, state, norm, first, second, PAIRS: tl.constexpr,
         PRECISION: tl.constexpr):  # fmt: skip
  """Adds what the features of x [C, F] read to `out` [C, W] and `total` [C]."""
  one, other = query_matrices(first, second, x.shape[1], PAIRS, x.dtype)
  features = pick(x, one, first, PAIRS, PRECISION) * pick(x, other, second, PAIRS, PRECISION)
  features = features.to(x.dtype)  # [C, rows]
  total += tl.sum(features.to(tl.float32) * norm[None, :], 1)
  return tl.dot(features, state.to(x.dtype), out, input_precision=PRECISION), total


@triton.jit
def begin(start_state, sums, segments, rate, length, base, sums_stride, piece, tile, columns,
          start, end, coefficient, COUNT: tl.constexpr, V: tl.constexpr, PIECE: tl.constexpr,
          PIECES: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr,
          SEGMENTS: tl.constexpr):  # fmt: skip
  """One block of the state and the normaliser before a piece (after it where REVERSE).

  The normaliser's column belongs to the first tile; the others see zeros.
  """
  row = start + tl.arange(0, COUNT)
  index = base + row[:, None] * (V + 1) + columns[None, :]
  mask = (row[:, None] < end) & (columns[None, :] < V)
  norm_index = base + row * (V + 1) + V
  norm_mask = row < tl.where(tile == 0, end, 0)
  state = tl.load(start_state + index, mask=mask, other=0.0)
  norm = tl.load(start_state + norm_index, mask=norm_mask, other=0.0)
  if REVERSE:  # G has no coefficients, the cotangent of the state has
    state /= coefficient[:, None]
    norm /= coefficient
  if PIECES > 1:
    for step in range(PIECES - 1 - piece if REVERSE else piece):
      other = PIECES - 1 - step if REVERSE else step
      count = tl.minimum(tl.maximum(length - other * PIECE, 0), PIECE)
      norm_carry = 1.0
      if SEGMENTS:
        before = segment_before(segments, other * PIECE, length)
        after = segment_before(segments, other * PIECE + PIECE, length)
        norm_carry = tl.where(before == after, 1.0, 0.0)
      carry = norm_carry
      if DECAY:
        carry *= tl.exp(rate * count)
      added = sums + (other - 1 if REVERSE else other) * sums_stride
      state = state * carry + tl.load(added + index, mask=mask, other=0.0)
      norm = norm * norm_carry + tl.load(added + norm_index, mask=norm_mask, other=0.0)
  return state, norm


@triton.jit
def end_block(pointer, base, tile, columns, state, norm, start, end, COUNT: tl.constexpr,
              V: tl.constexpr):  # fmt: skip
  """Stores one block of a state, and its normaliser where the tile is the first."""
  row = start + tl.arange(0, COUNT)
  place = pointer + base + row[:, None] * (V + 1) + columns[None, :]
  tl.store(place, state, mask=(row[:, None] < end) & (columns[None, :] < V))
  tl.store(pointer + base + row * (V + 1) + V, norm, mask=row < tl.where(tile == 0, end, 0))


@triton.jit
def weigh(segments, rate, start, length, rows, T: tl.constexpr, CHUNK: tl.constexpr,
          ALIGNED: tl.constexpr, DECAY: tl.constexpr, SEGMENTS: tl.constexpr):  # fmt: skip
  """Tokens of a chunk, documents of its rows, and the weights of the values and the normaliser.

  Each triple is: from the state before the chunk to a row, from a row to the state after, and
  across; a normaliser never decays.
  """
  count = CHUNK
  if not ALIGNED:
    count = tl.minimum(tl.maximum(length - start, 0), CHUNK)
  norm_up = tl.where(rows < count, 1.0, 0.0)
  norm_down = norm_up
  norm_carry = 1.0
  here = rows
  if SEGMENTS:
    here = tl.load(segments + start + rows, mask=start + rows < T, other=0)
    before = segment_before(segments, start, length)
    after = segment_before(segments, start + CHUNK, length)
    norm_up = tl.where(here == before, norm_up, 0.0)
    norm_down = tl.where(here == after, norm_down, 0.0)
    norm_carry = tl.where(before == after, 1.0, 0.0)
  up = norm_up
  down = norm_down
  carry = norm_carry
  if DECAY:
    up *= tl.exp(rate * (rows + 1))
    down *= tl.exp(rate * tl.maximum(count - 1 - rows, 0))
    carry *= tl.exp(rate * count)
  return count, here, up, down, carry, norm_up, norm_down, norm_carry


@triton.jit
def numerator_cotangent(d_output, total, d_total, rows, count, H: tl.constexpr,
                        ALIGNED: tl.constexpr, NORMALIZE: tl.constexpr):  # fmt: skip
  """Cotangents of the sums of weighted values [C, W] and of the sums of weights [C]."""
  d_norm = tl.zeros(rows.shape, tl.float32)
  if NORMALIZE:
    if ALIGNED:
      by = tl.load(total + rows * H)
      d_norm = tl.load(d_total + rows * H)
    else:
      by = tl.load(total + rows * H, mask=rows < count, other=1.0)
      d_norm = tl.load(d_total + rows * H, mask=rows < count, other=0.0)
    d_output = (d_output.to(tl.float32) / by[:, None]).to(d_output.dtype)
  return d_output, d_norm
