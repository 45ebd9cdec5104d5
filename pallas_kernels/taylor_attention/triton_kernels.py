"""The Triton kernels of Taylor attention: the forward sweep, and the sums of pieces.

A program owns one head, one piece of the sequence and one tile of the value's columns, and walks
over the piece chunk by chunk with its slice of the state in registers. Pieces (where there are few
heads) start from the initial state and the sums of the pieces before, which an earlier launch
wrote. How states and features are held is in `triton_state.py`.

Import this module only where a GPU is compiled for: it imports triton. Sizes are compile-time
constants (jax knows them), so strides need no arguments and aligned shapes need no masks.
"""

import triton
import triton.language as tl

from .triton_state import (
  add,
  begin,
  block_factors,
  end_block,
  numerator_cotangent,
  read,
  tokens,
  weigh,
)


@triton.jit
def forward_kernel(
  query, key, value, log_decay, segments, lengths, initial_state, sums,
  output, total, final_state,
  HEADS_ALL: tl.constexpr, T: tl.constexpr, H: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
  P: tl.constexpr, F_BLOCK: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr,
  START: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PIECE: tl.constexpr,
  PIECES: tl.constexpr, NORMALIZE: tl.constexpr, DECAY: tl.constexpr, SEGMENTS: tl.constexpr,
  LENGTHS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """Output, sums of weights [B, T, H] and final state: grid (value tiles * B H * PIECES,).

  Tiles of one head are neighbours in the grid, so that all but one read its q and k from L2.
  """
  TILES: tl.constexpr = (V + WIDTH - 1) // WIDTH
  tile = tl.program_id(0) % TILES
  head_index = tl.program_id(0) // TILES % HEADS_ALL
  piece = tl.program_id(0) // (TILES * HEADS_ALL)
  batch = (head_index // H).to(tl.int64)
  head = head_index % H
  rows = tl.arange(0, CHUNK)
  dims = tl.arange(0, F_BLOCK)
  columns = tile * WIDTH + tl.arange(0, WIDTH)
  rate = tl.load(log_decay + head).to(tl.float32) if DECAY else 0.0
  length = tl.minimum(tl.load(lengths + batch), T) if LENGTHS else T
  if SEGMENTS:
    segments += batch * T
  # Offsets beyond 2^31 elements happen, so these are int64.
  base = batch * T * H + head
  state_base = head_index.to(tl.int64) * (P * (V + 1))
  sums_stride = tl.full((), HEADS_ALL * P * (V + 1), tl.int64)
  ALIGNED: tl.constexpr = (T % CHUNK == 0) and not LENGTHS
  F_FULL: tl.constexpr = F == F_BLOCK
  V_FULL: tl.constexpr = V % WIDTH == 0
  WEIGHTED: tl.constexpr = DECAY or SEGMENTS or not ALIGNED

  first0, second0, by0 = block_factors(START, P, ROWS, F)
  first1, second1, by1 = block_factors(START + ROWS, P, ROWS, F)
  first2, second2, by2 = block_factors(0, START, TAIL, F)
  state0, norm0 = begin(
    initial_state, sums, segments, rate, length, state_base, sums_stride, piece, 0, columns,
    START, P, by0, ROWS, V, PIECE, PIECES, False, DECAY, SEGMENTS)  # fmt: skip
  state1, norm1 = begin(
    initial_state, sums, segments, rate, length, state_base, sums_stride, piece, 0, columns,
    START + ROWS, P, by1, ROWS, V, PIECE, PIECES, False, DECAY, SEGMENTS)  # fmt: skip
  state2, norm2 = begin(
    initial_state, sums, segments, rate, length, state_base, sums_stride, piece, 0, columns,
    0, START, by2, TAIL, V, PIECE, PIECES, False, DECAY, SEGMENTS)  # fmt: skip

  piece_start = piece * PIECE
  for step in range((tl.minimum(PIECE, T - piece_start) + CHUNK - 1) // CHUNK):
    start = piece_start + step * CHUNK
    count, here, up, down, carry, norm_up, norm_down, norm_carry = weigh(
      segments, rate, start, length, rows, T, CHUNK, ALIGNED, DECAY, SEGMENTS
    )
    here_base = base + start.to(tl.int64) * H
    q = tokens(query + here_base * F, rows, dims, count, H, F, ALIGNED, F_FULL, WIDE)
    k = tokens(key + here_base * F, rows, dims, count, H, F, ALIGNED, F_FULL, WIDE)
    v = tokens(value + here_base * V, rows, columns, count, H, V, ALIGNED, V_FULL, WIDE)
    # From before the chunk.
    out = tl.zeros((CHUNK, WIDTH), tl.float32)
    sum_ = tl.zeros((CHUNK,), tl.float32)
    out, sum_ = read(out, sum_, q, state0, norm0, first0, second0, True, PRECISION)
    out, sum_ = read(out, sum_, q, state1, norm1, first1, second1, True, PRECISION)
    out *= 1.0 / F
    sum_ *= 1.0 / F
    out, sum_ = read(out, sum_, q, state2 * by2[:, None], norm2 * by2, first2, second2, 
                     False, PRECISION)  # fmt: skip
    if WEIGHTED:
      out *= up[:, None]
      sum_ *= norm_up
    # Within the chunk.
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * F**-0.5  # [C, C]
    weights = 1.0 + scores + 0.5 * scores * scores
    seen = rows[:, None] >= rows[None, :]
    if SEGMENTS:
      seen &= here[:, None] == here[None, :]
    weights = tl.where(seen, weights, 0.0)
    # Summed as it is multiplied with the values, rounded: weights then average exactly.
    sum_ += tl.sum(weights.to(v.dtype).to(tl.float32), 1)
    if DECAY:
      weights *= tl.exp(rate * tl.maximum(rows[:, None] - rows[None, :], 0))
    out = tl.dot(weights.to(v.dtype), v, out, input_precision=PRECISION)
    if NORMALIZE:
      out /= sum_[:, None]
    if not ALIGNED:
      out = tl.where(rows[:, None] < count, out, 0.0)
    inside = start + rows < T
    place = output + here_base * V + rows[:, None] * (H * V) + columns[None, :]
    out = out.to(output.dtype.element_ty)
    tl.store(place, out, mask=inside[:, None] & (columns[None, :] < V))
    tl.store(total + here_base + rows * H, sum_, mask=rows < tl.where(tile == 0, T - start, 0))
    state0, norm0 = add(state0, norm0, k, v, down, norm_down, carry, norm_carry, first0, second0,
                        True, WEIGHTED, WEIGHTED, PRECISION)  # fmt: skip
    state1, norm1 = add(state1, norm1, k, v, down, norm_down, carry, norm_carry, first1, second1,
                        True, WEIGHTED, WEIGHTED, PRECISION)  # fmt: skip
    state2, norm2 = add(state2, norm2, k, v, down, norm_down, carry, norm_carry, first2, second2,
                        False, WEIGHTED, WEIGHTED, PRECISION)  # fmt: skip

  if piece == PIECES - 1:
    end_block(final_state, state_base, tile, columns, state0, norm0, START, P, ROWS, V)
    end_block(final_state, state_base, tile, columns, state1, norm1, START + ROWS, P, ROWS, V)
    end_block(final_state, state_base, tile, columns, state2, norm2, 0, START, TAIL, V)


@triton.jit
def sums_kernel(
  features, values, total, d_total, log_decay, segments, lengths, sums,
  HEADS_ALL: tl.constexpr, T: tl.constexpr, H: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
  P: tl.constexpr, F_BLOCK: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr,
  START: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PIECE: tl.constexpr,
  PIECES: tl.constexpr, NORMALIZE: tl.constexpr, DECAY: tl.constexpr, SEGMENTS: tl.constexpr,
  LENGTHS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
  """What each piece but the last swept adds to a state: grid (value tiles * B H * (PIECES - 1),).

  Forward `features` and `values` are key and value; where REVERSE query and d_output, and only then
  are `total` and `d_total` read.
  """
  TILES: tl.constexpr = (V + WIDTH - 1) // WIDTH
  tile = tl.program_id(0) % TILES
  head_index = tl.program_id(0) // TILES % HEADS_ALL
  added = tl.program_id(0) // (TILES * HEADS_ALL)
  piece = added + (1 if REVERSE else 0)
  batch = (head_index // H).to(tl.int64)
  head = head_index % H
  rows = tl.arange(0, CHUNK)
  dims = tl.arange(0, F_BLOCK)
  columns = tile * WIDTH + tl.arange(0, WIDTH)
  rate = tl.load(log_decay + head).to(tl.float32) if DECAY else 0.0
  length = tl.minimum(tl.load(lengths + batch), T) if LENGTHS else T
  if SEGMENTS:
    segments += batch * T
  base = batch * T * H + head
  ALIGNED: tl.constexpr = (T % CHUNK == 0) and not LENGTHS
  F_FULL: tl.constexpr = F == F_BLOCK
  V_FULL: tl.constexpr = V % WIDTH == 0
  WEIGHTED: tl.constexpr = DECAY or SEGMENTS or not ALIGNED
  NORM: tl.constexpr = WEIGHTED or REVERSE
  first0, second0, by0 = block_factors(START, P, ROWS, F)
  first1, second1, by1 = block_factors(START + ROWS, P, ROWS, F)
  first2, second2, by2 = block_factors(0, START, TAIL, F)
  state0 = tl.zeros((ROWS, WIDTH), tl.float32)
  state1 = tl.zeros((ROWS, WIDTH), tl.float32)
  state2 = tl.zeros((TAIL, WIDTH), tl.float32)
  norm0 = tl.zeros((ROWS,), tl.float32)
  norm1 = tl.zeros((ROWS,), tl.float32)
  norm2 = tl.zeros((TAIL,), tl.float32)
  piece_start = piece * PIECE
  chunks = (tl.minimum(PIECE, T - piece_start) + CHUNK - 1) // CHUNK
  for step in range(chunks):
    start = piece_start + (chunks - 1 - step if REVERSE else step) * CHUNK
    count, here, up, down, carry, norm_up, norm_down, norm_carry = weigh(
      segments, rate, start, length, rows, T, CHUNK, ALIGNED, DECAY, SEGMENTS
    )
    here_base = base + start.to(tl.int64) * H
    x = tokens(features + here_base * F, rows, dims, count, H, F, ALIGNED, F_FULL, WIDE)
    y = tokens(values + here_base * V, rows, columns, count, H, V, ALIGNED, V_FULL, WIDE)
    weight = up if REVERSE else down
    norm_weight = norm_up if REVERSE else norm_down
    if REVERSE:
      y, d_norm = numerator_cotangent(
        y, total + here_base, d_total + here_base, rows, count, H, ALIGNED, NORMALIZE)  # fmt: skip
      norm_weight *= d_norm
    state0, norm0 = add(state0, norm0, x, y, weight, norm_weight, carry, norm_carry, first0,
                        second0, True, WEIGHTED, NORM, PRECISION)  # fmt: skip
    state1, norm1 = add(state1, norm1, x, y, weight, norm_weight, carry, norm_carry, first1,
                        second1, True, WEIGHTED, NORM, PRECISION)  # fmt: skip
    state2, norm2 = add(state2, norm2, x, y, weight, norm_weight, carry, norm_carry, first2,
                        second2, False, WEIGHTED, NORM, PRECISION)  # fmt: skip
  state_base = (added.to(tl.int64) * HEADS_ALL + head_index) * (P * (V + 1))
  end_block(sums, state_base, tile, columns, state0, norm0, START, P, ROWS, V)
  end_block(sums, state_base, tile, columns, state1, norm1, START + ROWS, P, ROWS, V)
  end_block(sums, state_base, tile, columns, state2, norm2, 0, START, TAIL, V)
