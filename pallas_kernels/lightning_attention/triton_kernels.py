"""The Triton kernels of lightning attention: one sweep, used for the output and every gradient.

With S_t the state, G_t its cotangent, M the masked decay matrix of a chunk and do the cotangent of
the output, all of these are the same recurrence with other names in the three roles:

    output  query q   key k   value v    state S    [K, V]  in order
    dq      query do  key v   value k    state S^T  [V, K]  in order
    dk      query v   key do  value q    state G^T  [V, K]  from the end
    dv      query k   key q   value do   state G    [K, V]  from the end

A program owns one head, one piece of the sequence and one tile of the value's columns, and walks
over the piece chunk by chunk with its slice of the state in registers. Pieces (where there are few
heads) start from the initial state and the sums of the pieces before, which an earlier launch of
the same sweep, without outputs, wrote.

Import this module only where a GPU is compiled for: it imports triton. Sizes are compile-time
constants (jax knows them), so strides need no arguments and aligned shapes need no masks.
"""

import triton
import triton.language as tl


@triton.jit
def _load_tile(pointer, rows, columns, row_stride, row_end, DIM: tl.constexpr, ROWS_FULL: tl.constexpr, COLUMNS_FULL: tl.constexpr):  # fmt: skip
  """[rows, columns] of a strided matrix; what lies outside reads as 0."""
  tile = pointer + rows[:, None] * row_stride + columns[None, :]
  if ROWS_FULL and COLUMNS_FULL:
    return tl.load(tile)
  if ROWS_FULL:
    return tl.load(tile, mask=columns[None, :] < DIM, other=0.0)
  if COLUMNS_FULL:
    return tl.load(tile, mask=rows[:, None] < row_end, other=0.0)
  return tl.load(tile, mask=(rows[:, None] < row_end) & (columns[None, :] < DIM), other=0.0)


@triton.jit
def _segment_before(segments, position, length):
  """Document of the last real token before `position`; that of the initial state, 0, at the start."""
  last = tl.minimum(position, length) - 1
  return tl.load(segments + tl.maximum(last, 0), mask=last >= 0, other=0)


@triton.jit
def _sweep(
  query,  # [B, T, H, DIM], read where OUTPUT
  key,  # [B, T, H, DIM]
  value,  # [B, T, H, WIDTH]
  output,  # [B, T, H, WIDTH], written where OUTPUT
  log_decay,  # [H]
  segments,  # [B, T], read where SEGMENTS
  lengths,  # [B], read where LENGTHS
  start_state,  # [B, H, DIM, WIDTH] by the strides below, read where OUTPUT
  sums,  # [PIECES - 1, B, H, DIM, WIDTH] likewise: what each piece adds to a state that was 0
  end_state,  # [B, H, DIM, WIDTH] likewise, written by the last piece where END
  head_index,  # of B * H
  piece,
  tile,
  HEADS_ALL: tl.constexpr,  # B * H
  T: tl.constexpr,
  H: tl.constexpr,
  DIM: tl.constexpr,
  WIDTH: tl.constexpr,
  DIM_BLOCK: tl.constexpr,
  WIDTH_BLOCK: tl.constexpr,
  STATE_ROW: tl.constexpr,  # strides of the states
  STATE_COLUMN: tl.constexpr,
  CHUNK: tl.constexpr,
  PIECE: tl.constexpr,  # tokens of a piece, a multiple of CHUNK
  PIECES: tl.constexpr,
  REVERSE: tl.constexpr,
  OUTPUT: tl.constexpr,
  END: tl.constexpr,
  SEGMENTS: tl.constexpr,
  LENGTHS: tl.constexpr,
  PRECISION: tl.constexpr,
):
  batch = (head_index // H).to(tl.int64)
  head = head_index % H
  rows = tl.arange(0, CHUNK)
  dims = tl.arange(0, DIM_BLOCK)
  columns = tile * WIDTH_BLOCK + tl.arange(0, WIDTH_BLOCK)
  rate = tl.load(log_decay + head).to(tl.float32)
  length = T
  if LENGTHS:
    length = tl.minimum(tl.load(lengths + batch), T)
  if SEGMENTS:
    segments += batch * T
  # Offsets beyond 2^31 elements happen (a million tokens of 16 heads of 128), so these are int64.
  key_base = (batch * T * H + head) * DIM
  value_base = (batch * T * H + head) * WIDTH
  state_mask = (dims[:, None] < DIM) & (columns[None, :] < WIDTH)
  state_tile = dims[:, None] * STATE_ROW + columns[None, :] * STATE_COLUMN
  state_base = head_index.to(tl.int64) * (DIM * WIDTH)
  sums_stride = tl.full((), HEADS_ALL * DIM * WIDTH, tl.int64)
  SHIFT: tl.constexpr = 1 if REVERSE else 0  # the piece that is swept last has no sum

  state = tl.zeros((DIM_BLOCK, WIDTH_BLOCK), tl.float32)
  if OUTPUT:
    state = tl.load(start_state + state_base + state_tile, mask=state_mask, other=0.0)
    if PIECES > 1:
      for step in range(PIECES - 1 - piece if REVERSE else piece):
        other = PIECES - 1 - step if REVERSE else step
        count = tl.minimum(tl.maximum(length - other * PIECE, 0), PIECE)
        carry = tl.exp(rate * count)
        if SEGMENTS:
          before = _segment_before(segments, other * PIECE, length)
          after = _segment_before(segments, (other + 1) * PIECE, length)
          carry = tl.where(before == after, carry, 0.0)
        added = sums + (other - SHIFT) * sums_stride + state_base + state_tile
        state = state * carry + tl.load(added, mask=state_mask, other=0.0)

  ALIGNED: tl.constexpr = (T % CHUNK == 0) and not LENGTHS
  DIMS_FULL: tl.constexpr = DIM == DIM_BLOCK
  WIDTH_FULL: tl.constexpr = WIDTH % WIDTH_BLOCK == 0
  distance = rows[None, :] - rows[:, None] if REVERSE else rows[:, None] - rows[None, :]
  causal = tl.where(distance >= 0, tl.exp(rate * tl.maximum(distance, 0)), 0.0)  # [C, C]
  piece_start = piece * PIECE
  chunks = (tl.minimum(PIECE, T - piece_start) + CHUNK - 1) // CHUNK
  for step in range(chunks):
    start = piece_start + (chunks - 1 - step if REVERSE else step) * CHUNK
    count = CHUNK
    if not ALIGNED:
      count = tl.minimum(tl.maximum(length - start, 0), CHUNK)
    # Weights from the state before the chunk to a row, from a row to the state after, and across.
    up = tl.exp(rate * (rows + 1))
    down = tl.exp(rate * tl.maximum(count - 1 - rows, 0))
    carry = tl.exp(rate * count)
    weights = causal
    if SEGMENTS:
      here = tl.load(segments + start + rows, mask=start + rows < T, other=0)
      before = _segment_before(segments, start, length)
      after = _segment_before(segments, start + CHUNK, length)
      up = tl.where(here == before, up, 0.0)
      down = tl.where(here == after, down, 0.0)
      carry = tl.where(before == after, carry, 0.0)
      weights = tl.where(here[:, None] == here[None, :], causal, 0.0)
    leave, enter = up, down
    if REVERSE:
      leave, enter = down, up

    offset = start.to(tl.int64) * H
    k = _load_tile(key + key_base + offset * DIM, rows, dims, H * DIM, count, DIM, ALIGNED, DIMS_FULL)  # fmt: skip
    v = _load_tile(value + value_base + offset * WIDTH, rows, columns, H * WIDTH, count, WIDTH, ALIGNED, WIDTH_FULL)  # fmt: skip
    if OUTPUT:
      q = _load_tile(query + key_base + offset * DIM, rows, dims, H * DIM, count, DIM, ALIGNED, DIMS_FULL)  # fmt: skip
      scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * weights  # [C, C]
      out = tl.dot(q, state.to(q.dtype), input_precision=PRECISION) * leave[:, None]
      out = tl.dot(scores.to(v.dtype), v, out, input_precision=PRECISION)  # [C, WIDTH_BLOCK]
      place = output + value_base + offset * WIDTH + rows[:, None] * (H * WIDTH) + columns[None, :]
      if ALIGNED and WIDTH_FULL:
        tl.store(place, out.to(output.dtype.element_ty))
      else:
        # Rows of padding are stored too: their query read as 0, so they are 0.
        kept = (start + rows[:, None] < T) & (columns[None, :] < WIDTH)
        tl.store(place, out.to(output.dtype.element_ty), mask=kept)
    # Scaling the value and not the key keeps the smaller tile in registers.
    entering = (v * enter[:, None]).to(v.dtype)
    state = tl.dot(tl.trans(k), entering, state * carry, input_precision=PRECISION)

  if not OUTPUT:
    added = sums + (piece - SHIFT) * sums_stride + state_base + state_tile
    tl.store(added, state, mask=state_mask)
  if END:
    if piece == (0 if REVERSE else PIECES - 1):
      tl.store(end_state + state_base + state_tile, state, mask=state_mask)


@triton.jit
def sums_kernel(
  key, value, log_decay, segments, lengths, sums,
  HEADS_ALL: tl.constexpr, T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
  KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, CHUNK: tl.constexpr, PIECE: tl.constexpr,
  PIECES: tl.constexpr, REVERSE: tl.constexpr, SEGMENTS: tl.constexpr, LENGTHS: tl.constexpr,
  PRECISION: tl.constexpr,
):  # fmt: skip
  """What every piece but the last swept adds to the state: grid (value tiles * B H * (PIECES - 1),)."""
  TILES: tl.constexpr = (V + VALUE_BLOCK - 1) // VALUE_BLOCK
  program = tl.program_id(0)
  rest = program // TILES
  piece = rest // HEADS_ALL + (1 if REVERSE else 0)
  _sweep(
    key, key, value, value, log_decay, segments, lengths, sums, sums, sums,
    rest % HEADS_ALL, piece, program % TILES,
    HEADS_ALL, T, H, K, V, KEY_BLOCK, VALUE_BLOCK, V, 1, CHUNK, PIECE, PIECES,
    REVERSE, False, False, SEGMENTS, LENGTHS, PRECISION,
  )  # fmt: skip


@triton.jit
def forward_kernel(
  query, key, value, log_decay, segments, lengths, initial_state, sums, output, final_state,
  HEADS_ALL: tl.constexpr, T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
  KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, CHUNK: tl.constexpr, PIECE: tl.constexpr,
  PIECES: tl.constexpr, SEGMENTS: tl.constexpr, LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """Output and final state: grid (value tiles * B H * PIECES,).

  Tiles of one head are neighbours in the grid, so that all but one read its q and k from L2.
  """
  TILES: tl.constexpr = (V + VALUE_BLOCK - 1) // VALUE_BLOCK
  program = tl.program_id(0)
  rest = program // TILES
  _sweep(
    query, key, value, output, log_decay, segments, lengths, initial_state, sums, final_state,
    rest % HEADS_ALL, rest // HEADS_ALL, program % TILES,
    HEADS_ALL, T, H, K, V, KEY_BLOCK, VALUE_BLOCK, V, 1, CHUNK, PIECE, PIECES,
    False, True, True, SEGMENTS, LENGTHS, PRECISION,
  )  # fmt: skip


@triton.jit
def backward_kernel(
  query, key, value, log_decay, segments, lengths, initial_state, sums, d_output, d_final_state,
  d_sums, d_query, d_key, d_value, d_initial_state,
  HEADS_ALL: tl.constexpr, T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
  KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,  # contracted axes, whole
  KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr,  # columns of one program
  CHUNK: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
  SEGMENTS: tl.constexpr, LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """All gradients in one launch: grid ((2 key tiles + value tiles) * B H * PIECES,).

  A head's programs for dk, dv and dq are neighbours in the grid: dk and dv read the same four
  arrays in the same order at the same time, from L2 but for the first, and three times as many
  programs as one gradient has fill the GPU.
  """
  KEY_TILES: tl.constexpr = (K + KEY_TILE - 1) // KEY_TILE
  VALUE_TILES: tl.constexpr = (V + VALUE_TILE - 1) // VALUE_TILE
  program = tl.program_id(0)
  tile = program % (2 * KEY_TILES + VALUE_TILES)
  rest = program // (2 * KEY_TILES + VALUE_TILES)
  head_index = rest % HEADS_ALL
  piece = rest // HEADS_ALL
  if tile < KEY_TILES:
    _sweep(
      value, d_output, query, d_key, log_decay, segments, lengths, d_final_state, d_sums, d_key,
      head_index, piece, tile,
      HEADS_ALL, T, H, V, K, VALUE_BLOCK, KEY_TILE, 1, V, CHUNK, PIECE, PIECES,
      True, True, False, SEGMENTS, LENGTHS, PRECISION,
    )  # fmt: skip
  elif tile < KEY_TILES + VALUE_TILES:
    _sweep(
      key, query, d_output, d_value, log_decay, segments, lengths, d_final_state, d_sums,
      d_initial_state, head_index, piece, tile - KEY_TILES,
      HEADS_ALL, T, H, K, V, KEY_BLOCK, VALUE_TILE, V, 1, CHUNK, PIECE, PIECES,
      True, True, True, SEGMENTS, LENGTHS, PRECISION,
    )  # fmt: skip
  else:
    _sweep(
      d_output, value, key, d_query, log_decay, segments, lengths, initial_state, sums, d_query,
      head_index, piece, tile - KEY_TILES - VALUE_TILES,
      HEADS_ALL, T, H, V, K, VALUE_BLOCK, KEY_TILE, 1, V, CHUNK, PIECE, PIECES,
      False, True, False, SEGMENTS, LENGTHS, PRECISION,
    )  # fmt: skip
