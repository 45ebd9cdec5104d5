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

Tiles are multiplied transposed, columns of the value first: the state is then the left operand of
the next chunk's product as it lies in registers, and needs no way through shared memory.

Import this module only where a GPU is compiled for: it imports triton. Sizes are compile-time
constants (jax knows them), so strides need no arguments and aligned shapes need no masks.
"""

import triton
import triton.language as tl

from ..triton_tiles import load_tile, segment_before


@triton.jit
def _carry(segments, rate, start, length, COUNT: tl.constexpr, SEGMENTS: tl.constexpr):
  """How much of a state is left after `COUNT` tokens; those past `length` do nothing."""
  count = tl.minimum(tl.maximum(length - start, 0), COUNT)
  carry = tl.exp(rate * count)
  if SEGMENTS:
    before = segment_before(segments, start, length)
    after = segment_before(segments, start + COUNT, length)
    carry = tl.where(before == after, carry, 0.0)
  return carry


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
  sums,  # [PIECES - 1, B, H, DIM, WIDTH] likewise; else written: what a piece adds to a state
  end_state,  # [B, H, DIM, WIDTH], written by the piece swept last
  head_index,  # of B * H
  piece,
  tile,
  reverse,  # sweeps from the end of the sequence
  store_end,  # whether `end_state` is wanted
  state_row,  # strides of the states that are read
  state_column,
  HEADS_ALL: tl.constexpr,  # B * H
  T: tl.constexpr,
  H: tl.constexpr,
  DIM: tl.constexpr,
  WIDTH: tl.constexpr,
  DIM_BLOCK: tl.constexpr,
  WIDTH_BLOCK: tl.constexpr,
  CHUNK: tl.constexpr,
  PIECE: tl.constexpr,  # tokens of a piece, a multiple of CHUNK
  PIECES: tl.constexpr,
  OUTPUT: tl.constexpr,
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
  state_mask = (columns[:, None] < WIDTH) & (dims[None, :] < DIM)
  state_tile = columns[:, None] * state_column + dims[None, :] * state_row
  state_base = head_index.to(tl.int64) * (DIM * WIDTH)
  sums_stride = tl.full((), HEADS_ALL * DIM * WIDTH, tl.int64)
  shift = tl.where(reverse, 1, 0)  # the piece that is swept last has no sum

  state = tl.zeros((WIDTH_BLOCK, DIM_BLOCK), tl.float32)
  if OUTPUT:
    state = tl.load(start_state + state_base + state_tile, mask=state_mask, other=0.0)
    if PIECES > 1:
      for step in range(tl.where(reverse, PIECES - 1 - piece, piece)):
        other = tl.where(reverse, PIECES - 1 - step, step)
        carry = _carry(segments, rate, other * PIECE, length, PIECE, SEGMENTS)
        added = sums + (other - shift) * sums_stride + state_base + state_tile
        state = state * carry + tl.load(added, mask=state_mask, other=0.0)

  ALIGNED: tl.constexpr = (T % CHUNK == 0) and not LENGTHS
  DIMS_FULL: tl.constexpr = DIM == DIM_BLOCK
  WIDTH_FULL: tl.constexpr = WIDTH % WIDTH_BLOCK == 0
  distance = (rows[None, :] - rows[:, None]) * tl.where(reverse, -1, 1)
  causal = tl.where(distance >= 0, tl.exp(rate * tl.maximum(distance, 0)), 0.0)  # as scores
  piece_start = piece * PIECE
  chunks = (tl.minimum(PIECE, T - piece_start) + CHUNK - 1) // CHUNK
  for step in range(chunks):
    start = piece_start + tl.where(reverse, chunks - 1 - step, step) * CHUNK
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
      before = segment_before(segments, start, length)
      after = segment_before(segments, start + CHUNK, length)
      up = tl.where(here == before, up, 0.0)
      down = tl.where(here == after, down, 0.0)
      carry = tl.where(before == after, carry, 0.0)
      weights = tl.where(here[:, None] == here[None, :], causal, 0.0)
    leave = tl.where(reverse, down, up)
    enter = tl.where(reverse, up, down)

    offset = start.to(tl.int64) * H
    of_key = key_base + offset * DIM
    of_value = value_base + offset * WIDTH
    k = load_tile(key + of_key, rows, dims, count, H, DIM, ALIGNED, DIMS_FULL)  # [C, DIM]
    v = load_tile(value + of_value, rows, columns, count, H, WIDTH, ALIGNED, WIDTH_FULL)
    if OUTPUT:
      q = load_tile(query + of_key, rows, dims, count, H, DIM, ALIGNED, DIMS_FULL)
      scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * weights  # [C keys, C queries]
      out = tl.dot(state.to(q.dtype), tl.trans(q), input_precision=PRECISION) * leave[None, :]
      out = tl.dot(tl.trans(v), scores.to(v.dtype), out, input_precision=PRECISION)
      out = tl.trans(out).to(output.dtype.element_ty)  # [C, WIDTH_BLOCK]
      place = output + of_value + rows[:, None] * (H * WIDTH) + columns[None, :]
      if ALIGNED and WIDTH_FULL:
        tl.store(place, out)
      else:
        # Rows of padding are stored too: their query read as 0, so they are 0.
        tl.store(place, out, mask=(start + rows[:, None] < T) & (columns[None, :] < WIDTH))
    entering = (v * enter[:, None]).to(v.dtype)
    state = tl.dot(tl.trans(entering), k, state * carry, input_precision=PRECISION)

  # States are only stored as [DIM, WIDTH]. The constant strides matter: with `state_tile` the
  # compiler keeps its offsets, a register for each element of the state, all through the loop.
  end_tile = columns[:, None] + dims[None, :] * WIDTH
  if not OUTPUT:
    added = sums + (piece - shift) * sums_stride + state_base + end_tile
    tl.store(added, state, mask=state_mask)
  if OUTPUT:
    if piece == tl.where(reverse, 0, PIECES - 1) and store_end:
      tl.store(end_state + state_base + end_tile, state, mask=state_mask)


@triton.jit
def sums_kernel(
  key, value, log_decay, segments, lengths, sums,
  HEADS_ALL: tl.constexpr, T: tl.constexpr, H: tl.constexpr, DIM: tl.constexpr,
  WIDTH: tl.constexpr, DIM_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
  PIECE: tl.constexpr, PIECES: tl.constexpr, SEGMENTS: tl.constexpr, LENGTHS: tl.constexpr,
  PRECISION: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
  """What each piece but the last swept adds to a state: grid (tiles * B H * (PIECES - 1),)."""
  TILES: tl.constexpr = (WIDTH + WIDTH_BLOCK - 1) // WIDTH_BLOCK
  program = tl.program_id(0)
  rest = program // TILES
  _sweep(
    key, key, value, value, log_decay, segments, lengths, sums, sums, sums,
    rest % HEADS_ALL, rest // HEADS_ALL + (1 if REVERSE else 0), program % TILES,
    REVERSE, False, WIDTH, 1,
    HEADS_ALL, T, H, DIM, WIDTH, DIM_BLOCK, WIDTH_BLOCK, CHUNK, PIECE, PIECES,
    False, SEGMENTS, LENGTHS, PRECISION,
  )  # fmt: skip


@triton.jit
def forward_kernel(
  query, key, value, log_decay, segments, lengths, initial_state, sums, output, final_state,
  HEADS_ALL: tl.constexpr, T: tl.constexpr, H: tl.constexpr, DIM: tl.constexpr,
  WIDTH: tl.constexpr, DIM_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
  PIECE: tl.constexpr, PIECES: tl.constexpr, SEGMENTS: tl.constexpr, LENGTHS: tl.constexpr,
  PRECISION: tl.constexpr,
):  # fmt: skip
  """Output and final state: grid (value tiles * B H * PIECES,).

  Tiles of one head are neighbours in the grid, so that all but one read its q and k from L2.
  """
  TILES: tl.constexpr = (WIDTH + WIDTH_BLOCK - 1) // WIDTH_BLOCK
  program = tl.program_id(0)
  rest = program // TILES
  _sweep(
    query, key, value, output, log_decay, segments, lengths, initial_state, sums, final_state,
    rest % HEADS_ALL, rest // HEADS_ALL, program % TILES, False, True, WIDTH, 1,
    HEADS_ALL, T, H, DIM, WIDTH, DIM_BLOCK, WIDTH_BLOCK, CHUNK, PIECE, PIECES,
    True, SEGMENTS, LENGTHS, PRECISION,
  )  # fmt: skip


@triton.jit
def gradients_kernel(
  query, key, value, log_decay, segments, lengths, initial_state, sums, d_output, d_final_state,
  d_sums, d_value, d_initial_state, d_key, d_query,
  HEADS_ALL: tl.constexpr, T: tl.constexpr, H: tl.constexpr, DIM: tl.constexpr,
  WIDTH: tl.constexpr, DIM_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
  PIECE: tl.constexpr, PIECES: tl.constexpr, SEGMENTS: tl.constexpr, LENGTHS: tl.constexpr,
  PRECISION: tl.constexpr,
):  # fmt: skip
  """All gradients where K = V: grid (3 * value tiles * B H * PIECES,).

  The three programs of a tile are neighbours in the grid: those of dk and dv read the same four
  arrays in the same order at the same time, from L2 but for the first, and there are three times
  as many programs as one gradient has to fill the GPU.
  """
  TILES: tl.constexpr = (WIDTH + WIDTH_BLOCK - 1) // WIDTH_BLOCK
  program = tl.program_id(0)
  role = program % 3
  rest = program // (3 * TILES)
  # role 0 is dv, 1 dk and 2 dq; the table at the top.
  q = tl.where(role == 0, key, tl.where(role == 1, value, d_output))
  k = tl.where(role == 0, query, tl.where(role == 1, d_output, value))
  v = tl.where(role == 0, d_output, tl.where(role == 1, query, key))
  out = tl.where(role == 0, d_value, tl.where(role == 1, d_key, d_query))
  start = tl.where(role == 2, initial_state, d_final_state)
  added = tl.where(role == 2, sums, d_sums)
  _sweep(
    q, k, v, out, log_decay, segments, lengths, start, added, d_initial_state,
    rest % HEADS_ALL, rest // HEADS_ALL, program // 3 % TILES,
    role != 2, role == 0, tl.where(role == 0, WIDTH, 1), tl.where(role == 0, 1, DIM),
    HEADS_ALL, T, H, DIM, WIDTH, DIM_BLOCK, WIDTH_BLOCK, CHUNK, PIECE, PIECES,
    True, SEGMENTS, LENGTHS, PRECISION,
  )  # fmt: skip


@triton.jit
def value_gradient_kernel(
  query, key, log_decay, segments, lengths, d_output, d_final_state, d_sums,
  d_value, d_initial_state,
  HEADS_ALL: tl.constexpr, T: tl.constexpr, H: tl.constexpr, DIM: tl.constexpr,
  WIDTH: tl.constexpr, DIM_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
  PIECE: tl.constexpr, PIECES: tl.constexpr, SEGMENTS: tl.constexpr, LENGTHS: tl.constexpr,
  PRECISION: tl.constexpr,
):  # fmt: skip
  """dv and the gradient of the initial state: grid (value tiles * B H * PIECES,); DIM is K."""
  TILES: tl.constexpr = (WIDTH + WIDTH_BLOCK - 1) // WIDTH_BLOCK
  program = tl.program_id(0)
  rest = program // TILES
  _sweep(
    key, query, d_output, d_value, log_decay, segments, lengths, d_final_state, d_sums,
    d_initial_state, rest % HEADS_ALL, rest // HEADS_ALL, program % TILES, True, True, WIDTH, 1,
    HEADS_ALL, T, H, DIM, WIDTH, DIM_BLOCK, WIDTH_BLOCK, CHUNK, PIECE, PIECES,
    True, SEGMENTS, LENGTHS, PRECISION,
  )  # fmt: skip


@triton.jit
def key_query_gradient_kernel(
  query, key, value, log_decay, segments, lengths, initial_state, sums, d_output, d_final_state,
  d_sums, d_key, d_query,
  HEADS_ALL: tl.constexpr, T: tl.constexpr, H: tl.constexpr, DIM: tl.constexpr,
  WIDTH: tl.constexpr, DIM_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
  PIECE: tl.constexpr, PIECES: tl.constexpr, SEGMENTS: tl.constexpr, LENGTHS: tl.constexpr,
  PRECISION: tl.constexpr,
):  # fmt: skip
  """dk and dq: grid (2 * key tiles * B H * PIECES,); DIM is V and WIDTH is K."""
  TILES: tl.constexpr = (WIDTH + WIDTH_BLOCK - 1) // WIDTH_BLOCK
  program = tl.program_id(0)
  of_key = program % 2 == 0
  rest = program // (2 * TILES)
  _sweep(
    tl.where(of_key, value, d_output), tl.where(of_key, d_output, value),
    tl.where(of_key, query, key), tl.where(of_key, d_key, d_query),
    log_decay, segments, lengths, tl.where(of_key, d_final_state, initial_state),
    tl.where(of_key, d_sums, sums), d_sums,
    rest % HEADS_ALL, rest // HEADS_ALL, program // 2 % TILES, of_key, False, 1, DIM,
    HEADS_ALL, T, H, DIM, WIDTH, DIM_BLOCK, WIDTH_BLOCK, CHUNK, PIECE, PIECES,
    True, SEGMENTS, LENGTHS, PRECISION,
  )  # fmt: skip
