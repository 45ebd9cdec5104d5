"""The Triton kernels of Taylor attention's backward pass.

With g = do / total and h = -(do . o) / total, the cotangents of the numerator and of the sum of the
weights, and s = q . k / sqrt(F), the cotangent of a score is (g_i . v_j + h_i) (1 + s_ij). Scores
inside a chunk are made again. What comes from before a chunk goes through the state S, which a
sweep in order makes again; what goes to later chunks through G, the sums of query features times
[g, h], which a sweep from the end makes:

    dq_i from S   (g_i S^T + h_i z^T) are the cotangents of the features of q_i
    dk_j from G   (v_j G^T + y^T) are those of the features of k_j; z and y are the normalisers
    dv_j from G   the features of k_j read G

The cotangents of a feature's two factors go back to the entries they were picked from by a product
with the transposed 0/1 matrix. A program owns a tile of the value's columns, over which the
cotangents of q and k are sums: where there are several tiles each writes its part, float32.

Import this module only where a GPU is compiled for: it imports triton.
"""

import triton
import triton.language as tl

from .triton_state import (
  add,
  begin,
  block_factors,
  end_block,
  numerator_cotangent,
  pick,
  query_matrices,
  split,
  tokens,
  weigh,
)


@triton.jit
def total_gradient_kernel(
  output, d_output, total, d_total,
  COUNT: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
  """d_total = -(d_output . output) / total for all B T H = COUNT rows: grid (COUNT / BLOCK,)."""
  rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
  columns = tl.arange(0, V_BLOCK)
  index = rows[:, None] * V + columns[None, :]
  mask = (rows[:, None] < COUNT) & (columns[None, :] < V)
  product = tl.load(output + index, mask=mask, other=0.0).to(tl.float32)
  product *= tl.load(d_output + index, mask=mask, other=0.0).to(tl.float32)
  by = tl.load(total + rows, mask=rows < COUNT, other=1.0)
  tl.store(d_total + rows, -tl.sum(product, 1) / by, mask=rows < COUNT)


@triton.jit
def put_back(dx, d_factor, matrix, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
  """Adds to dx [C, F] the cotangents [C, features] of factors that `matrix` had picked."""
  high, low = split(d_factor, PRECISION)
  dx = tl.dot(high.to(DTYPE), tl.trans(matrix), dx, input_precision="tf32")
  if PRECISION == "tf32x3":
    dx = tl.dot(low, tl.trans(matrix), dx, input_precision="tf32")
  return dx


@triton.jit
def back(dx, x, y, extra, weight, norm_weight, state, norm, first, second,
         PAIRS: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
  """Adds to dx [C, F] the cotangent through one block of the features of x [C, F].

  y [C, W] and `extra` [C] multiply the state and the normaliser. Also returns the features and the
  state that they read, both in the dtype of the products.
  """
  read = state.to(x.dtype)  # [rows, W]
  d_features = tl.dot(y, tl.trans(read), input_precision=PRECISION)  # [C, rows]
  if WEIGHTED:
    d_features *= weight[:, None]
    extra *= norm_weight
  d_features += extra[:, None] * norm[None, :]
  to_one, to_other = query_matrices(first, second, x.shape[1], PAIRS, x.dtype)  # [F, rows]
  other = pick(x, to_other, second, PAIRS, PRECISION)
  dx = put_back(dx, d_features * other, to_one, x.dtype, PRECISION)
  one = pick(x, to_one, first, PAIRS, PRECISION)
  dx = put_back(dx, d_features * one, to_other, x.dtype, PRECISION)
  return dx, (one * other).to(x.dtype), read


@triton.jit
def query_gradient_kernel(
  query, key, value, log_decay, segments, lengths, initial_state, sums, d_output, total, d_total,
  d_query,
  HEADS_ALL: tl.constexpr, T: tl.constexpr, H: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
  P: tl.constexpr, F_BLOCK: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr,
  START: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PIECE: tl.constexpr,
  PIECES: tl.constexpr, NORMALIZE: tl.constexpr, DECAY: tl.constexpr, SEGMENTS: tl.constexpr,
  LENGTHS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """d_query, or its part per value tile: grid (value tiles * B H * PIECES,)."""
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
  base = batch * T * H + head
  state_base = head_index.to(tl.int64) * (P * (V + 1))
  sums_stride = tl.full((), HEADS_ALL * P * (V + 1), tl.int64)
  d_query += tile.to(tl.int64) * (HEADS_ALL * T * F)
  ALIGNED: tl.constexpr = (T % CHUNK == 0) and not LENGTHS
  F_FULL: tl.constexpr = F == F_BLOCK
  V_FULL: tl.constexpr = V % WIDTH == 0
  WEIGHTED: tl.constexpr = DECAY or SEGMENTS or not ALIGNED
  first0, second0, by0 = block_factors(START, P, ROWS, F)
  first1, second1, by1 = block_factors(START + ROWS, P, ROWS, F)
  first2, second2, by2 = block_factors(0, START, TAIL, F)
  state0, norm0 = begin(
    initial_state, sums, segments, rate, length, state_base, sums_stride, piece, tile, columns,
    START, P, by0, ROWS, V, PIECE, PIECES, False, DECAY, SEGMENTS)  # fmt: skip
  state1, norm1 = begin(
    initial_state, sums, segments, rate, length, state_base, sums_stride, piece, tile, columns,
    START + ROWS, P, by1, ROWS, V, PIECE, PIECES, False, DECAY, SEGMENTS)  # fmt: skip
  state2, norm2 = begin(
    initial_state, sums, segments, rate, length, state_base, sums_stride, piece, tile, columns,
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
    g = tokens(d_output + here_base * V, rows, columns, count, H, V, ALIGNED, V_FULL, WIDE)
    g, h = numerator_cotangent(
      g, total + here_base, d_total + here_base, rows, count, H, ALIGNED, NORMALIZE)  # fmt: skip
    h = tl.where(tile == 0, h, 0.0)
    # From before the chunk.
    dq = tl.zeros((CHUNK, F_BLOCK), tl.float32)
    dq, _, _ = back(dq, q, g, h, up, norm_up, state0, norm0, first0, second0,
                    True, WEIGHTED, PRECISION)  # fmt: skip
    dq, _, _ = back(dq, q, g, h, up, norm_up, state1, norm1, first1, second1,
                    True, WEIGHTED, PRECISION)  # fmt: skip
    dq *= 1.0 / F
    dq, _, _ = back(dq, q, g, h, up, norm_up, state2 * by2[:, None], norm2 * by2, first2, second2,
                    False, WEIGHTED, PRECISION)  # fmt: skip
    # Within the chunk.
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * F**-0.5  # [C, C]
    d_scores = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    seen = rows[:, None] >= rows[None, :]
    if SEGMENTS:
      seen &= here[:, None] == here[None, :]
    if DECAY:
      d_scores *= tl.exp(rate * tl.maximum(rows[:, None] - rows[None, :], 0))
    d_scores = (d_scores + h[:, None]) * (1.0 + scores)
    d_scores = tl.where(seen, d_scores * F**-0.5, 0.0)
    dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)
    if not ALIGNED:
      dq = tl.where(rows[:, None] < count, dq, 0.0)
    place = d_query + here_base * F + rows[:, None] * (H * F) + dims[None, :]
    inside = (start + rows[:, None] < T) & (dims[None, :] < F)
    tl.store(place, dq.to(d_query.dtype.element_ty), mask=inside)
    state0, norm0 = add(state0, norm0, k, v, down, norm_down, carry, norm_carry, first0, second0,
                        True, WEIGHTED, WEIGHTED, PRECISION)  # fmt: skip
    state1, norm1 = add(state1, norm1, k, v, down, norm_down, carry, norm_carry, first1, second1,
                        True, WEIGHTED, WEIGHTED, PRECISION)  # fmt: skip
    state2, norm2 = add(state2, norm2, k, v, down, norm_down, carry, norm_carry, first2, second2,
                        False, WEIGHTED, WEIGHTED, PRECISION)  # fmt: skip


@triton.jit
def key_value_gradient_kernel(
  query, key, value, log_decay, segments, lengths, d_final_state, d_sums, d_output, total, d_total,
  d_key, d_value, d_initial_state,
  HEADS_ALL: tl.constexpr, T: tl.constexpr, H: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
  P: tl.constexpr, F_BLOCK: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr,
  START: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PIECE: tl.constexpr,
  PIECES: tl.constexpr, NORMALIZE: tl.constexpr, DECAY: tl.constexpr, SEGMENTS: tl.constexpr,
  LENGTHS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """d_key (or its part per value tile), d_value and d_initial_state, from the end of the sequence.

  Grid (value tiles * B H * PIECES,).
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
  base = batch * T * H + head
  state_base = head_index.to(tl.int64) * (P * (V + 1))
  sums_stride = tl.full((), HEADS_ALL * P * (V + 1), tl.int64)
  d_key += tile.to(tl.int64) * (HEADS_ALL * T * F)
  ALIGNED: tl.constexpr = (T % CHUNK == 0) and not LENGTHS
  F_FULL: tl.constexpr = F == F_BLOCK
  V_FULL: tl.constexpr = V % WIDTH == 0
  WEIGHTED: tl.constexpr = DECAY or SEGMENTS or not ALIGNED
  first0, second0, by0 = block_factors(START, P, ROWS, F)
  first1, second1, by1 = block_factors(START + ROWS, P, ROWS, F)
  first2, second2, by2 = block_factors(0, START, TAIL, F)
  state0, norm0 = begin(
    d_final_state, d_sums, segments, rate, length, state_base, sums_stride, piece, tile, columns,
    START, P, by0, ROWS, V, PIECE, PIECES, True, DECAY, SEGMENTS)  # fmt: skip
  state1, norm1 = begin(
    d_final_state, d_sums, segments, rate, length, state_base, sums_stride, piece, tile, columns,
    START + ROWS, P, by1, ROWS, V, PIECE, PIECES, True, DECAY, SEGMENTS)  # fmt: skip
  state2, norm2 = begin(
    d_final_state, d_sums, segments, rate, length, state_base, sums_stride, piece, tile, columns,
    0, START, by2, TAIL, V, PIECE, PIECES, True, DECAY, SEGMENTS)  # fmt: skip
  piece_start = piece * PIECE
  chunks = (tl.minimum(PIECE, T - piece_start) + CHUNK - 1) // CHUNK
  for step in range(chunks):
    start = piece_start + (chunks - 1 - step) * CHUNK
    count, here, up, down, carry, norm_up, norm_down, norm_carry = weigh(
      segments, rate, start, length, rows, T, CHUNK, ALIGNED, DECAY, SEGMENTS
    )
    here_base = base + start.to(tl.int64) * H
    q = tokens(query + here_base * F, rows, dims, count, H, F, ALIGNED, F_FULL, WIDE)
    k = tokens(key + here_base * F, rows, dims, count, H, F, ALIGNED, F_FULL, WIDE)
    v = tokens(value + here_base * V, rows, columns, count, H, V, ALIGNED, V_FULL, WIDE)
    g = tokens(d_output + here_base * V, rows, columns, count, H, V, ALIGNED, V_FULL, WIDE)
    g, h = numerator_cotangent(
      g, total + here_base, d_total + here_base, rows, count, H, ALIGNED, NORMALIZE)  # fmt: skip
    h = tl.where(tile == 0, h, 0.0)
    # To after the chunk. The normaliser's column of [v, 1] is 1.
    dk = tl.zeros((CHUNK, F_BLOCK), tl.float32)
    ones = tl.full((CHUNK,), 1.0, tl.float32)
    dk, features, read = back(dk, k, v, ones, down, norm_down, state0, norm0, first0, second0,
                              True, WEIGHTED, PRECISION)  # fmt: skip
    dv = tl.dot(features, read, input_precision=PRECISION)  # [C, W]
    dk, features, read = back(dk, k, v, ones, down, norm_down, state1, norm1, first1, second1,
                              True, WEIGHTED, PRECISION)  # fmt: skip
    dv = tl.dot(features, read, dv, input_precision=PRECISION)
    dk *= 1.0 / F
    dv *= 1.0 / F
    dk, features, read = back(dk, k, v, ones, down, norm_down, state2 * by2[:, None], norm2 * by2,
                              first2, second2, False, WEIGHTED, PRECISION)  # fmt: skip
    dv = tl.dot(features, read, dv, input_precision=PRECISION)
    if WEIGHTED:
      dv *= down[:, None]
    # Within the chunk, keys in rows.
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * F**-0.5  # [C, C]
    seen = rows[:, None] <= rows[None, :]
    if SEGMENTS:
      seen &= here[:, None] == here[None, :]
    weights = tl.where(seen, 1.0 + scores + 0.5 * scores * scores, 0.0)
    d_scores = tl.dot(v, tl.trans(g), input_precision=PRECISION)
    if DECAY:
      decay = tl.exp(rate * tl.maximum(rows[None, :] - rows[:, None], 0))
      weights *= decay
      d_scores *= decay
    d_scores = (d_scores + h[None, :]) * (1.0 + scores)
    d_scores = tl.where(seen, d_scores * F**-0.5, 0.0)
    dv = tl.dot(weights.to(g.dtype), g, dv, input_precision=PRECISION)
    dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)
    if not ALIGNED:
      dk = tl.where(rows[:, None] < count, dk, 0.0)
      dv = tl.where(rows[:, None] < count, dv, 0.0)
    inside = start + rows[:, None] < T
    place = d_key + here_base * F + rows[:, None] * (H * F) + dims[None, :]
    tl.store(place, dk.to(d_key.dtype.element_ty), mask=inside & (dims[None, :] < F))
    place = d_value + here_base * V + rows[:, None] * (H * V) + columns[None, :]
    tl.store(place, dv.to(d_value.dtype.element_ty), mask=inside & (columns[None, :] < V))
    norm_weight = norm_up * h
    state0, norm0 = add(state0, norm0, q, g, up, norm_weight, carry, norm_carry, first0, second0,
                        True, WEIGHTED, True, PRECISION)  # fmt: skip
    state1, norm1 = add(state1, norm1, q, g, up, norm_weight, carry, norm_carry, first1, second1,
                        True, WEIGHTED, True, PRECISION)  # fmt: skip
    state2, norm2 = add(state2, norm2, q, g, up, norm_weight, carry, norm_carry, first2, second2,
                        False, WEIGHTED, True, PRECISION)  # fmt: skip
  if piece == 0:
    state0, norm0 = state0 * by0[:, None], norm0 * by0
    state1, norm1 = state1 * by1[:, None], norm1 * by1
    state2, norm2 = state2 * by2[:, None], norm2 * by2
    end_block(d_initial_state, state_base, tile, columns, state0, norm0, START, P, ROWS, V)
    end_block(d_initial_state, state_base, tile, columns, state1, norm1, START + ROWS, P, ROWS, V)
    end_block(d_initial_state, state_base, tile, columns, state2, norm2, 0, START, TAIL, V)
