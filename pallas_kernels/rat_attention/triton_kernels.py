"""The forward kernels of RAT attention for NVIDIA GPUs: the recurrence, and the softmax.

The recurrence runs along the tokens of a chunk, for many chunks and heads side by side: a step is
arithmetic on one row per chunk, with no exchange between threads but for the own score's sum. The
softmax is flash attention over summaries that starts from the token's own running chunk.

Import this module only where a GPU is compiled for: it imports triton. Sizes are compile-time
constants (jax knows them), so strides need no arguments and aligned shapes need no masks.
"""

import triton
import triton.language as tl


@triton.jit
def lanes(
  H: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr
):
  """(heads, their groups, chunk within the tile, which exist) of a tile's HEADS CHUNKS GROUPS rows.

  HEADS counts heads of one group, which are G apart.
  """
  row = tl.arange(0, HEADS * CHUNKS * GROUPS)
  group = row % GROUPS
  index = tl.program_id(1) * HEADS + row // (CHUNKS * GROUPS)
  return index * G + group, group, row // GROUPS % CHUNKS, (group < G) & (index < H // G)


@triton.jit
def channels(K: tl.constexpr, HALF: tl.constexpr):
  """(channels, which exist) of 2 HALF columns: each half of the channels fills one half."""
  column = tl.arange(0, 2 * HALF)
  if K == 2 * HALF:
    return column, column < K
  middle: tl.constexpr = (K + 1) // 2
  channel = column // HALF * middle + column % HALF
  return channel, (column % HALF < middle) & (channel < K)


@triton.jit
def sigmoid(x):
  return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def at(pointer, rows, columns, real, exists, K: tl.constexpr, FULL: tl.constexpr):
  """float32 [rows, columns] of an array whose last axis has K channels; 0 where nothing is."""
  places = pointer + rows[:, None] * K + columns[None, :]
  if FULL:
    return tl.load(places).to(tl.float32)
  return tl.load(places, mask=real[:, None] & exists[None, :], other=0.0).to(tl.float32)


@triton.jit
def put(pointer, rows, columns, x, real, exists, K: tl.constexpr, FULL: tl.constexpr):
  """The inverse of `at`; rounds."""
  places = pointer + rows[:, None] * K + columns[None, :]
  if FULL:
    tl.store(places, x.to(pointer.dtype.element_ty))
  else:
    tl.store(places, x.to(pointer.dtype.element_ty), mask=real[:, None] & exists[None, :])


@triton.jit
def chunk_rows(
  begins, batch, chunk, T: tl.constexpr, L: tl.constexpr, S: tl.constexpr, CHUNKS: tl.constexpr,
  DOCUMENTS: tl.constexpr,
):  # fmt: skip
  """(first token, end of the tokens) of each chunk, and the steps that a tile of them takes.

  With DOCUMENTS, tokens from begins[c] to below begins[c + 1].
  """
  if DOCUMENTS:
    place = begins + batch * (S + 1) + chunk
    begin = tl.load(place, mask=chunk < S, other=T).to(tl.int64)
    stop = tl.load(place + 1, mask=chunk < S, other=T).to(tl.int64)
    steps = tl.max(stop - begin).to(tl.int32)
  else:
    begin = chunk.to(tl.int64) * L
    stop = begin * 0 + T
    steps = tl.minimum(L, T - tl.program_id(0) * (CHUNKS * L))
  return begin, stop, steps


@triton.jit
def is_whole(begin, stop, T: tl.constexpr, L: tl.constexpr, DOCUMENTS: tl.constexpr):
  """Whether chunks have all of their tokens."""
  if DOCUMENTS:
    whole = stop - begin == L
  else:
    whole = begin + L <= T
  return whole


@triton.jit
def may_end(
  last, step, begin, stop, L: tl.constexpr, CHUNKS: tl.constexpr, DOCUMENTS: tl.constexpr
):
  """Whether the row's last token can be that of one of the tile's chunks in this step."""
  if DOCUMENTS:
    here = (last >= tl.min(begin)) & (last < tl.max(stop))
  else:
    here = (last % L == step) & (last // (CHUNKS * L) == tl.program_id(0))
  return here


@triton.jit
def numbers_of(numbers, batch, chunk, S: tl.constexpr, DOCUMENTS: tl.constexpr):
  """Chunks' numbers in their documents."""
  if DOCUMENTS:
    return tl.load(numbers + batch * S + chunk, mask=chunk < S, other=0)
  return chunk


@triton.jit
def recurrence_kernel(
  query, key, value, gate_logits, gate_bias, cos, sin, begins, numbers, lengths,
  own_score, own_value, keys, values, running_key, running_value,
  T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
  S: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr,
  HALF: tl.constexpr, ROTARY: tl.constexpr, LENGTHS: tl.constexpr, FULL: tl.constexpr,
  DOCUMENTS: tl.constexpr,
):  # fmt: skip
  """Own scores and values, summaries, final running chunk: grid (chunks / CHUNKS, heads, B).

  FULL: every row, channel and token of the tiles exists.
  """
  heads, groups, chunk, exist = lanes(H, G, HEADS, CHUNKS, GROUPS)
  columns, exists = channels(K, HALF)
  batch = tl.program_id(2).to(tl.int64)
  chunk += tl.program_id(0) * CHUNKS
  begin, stop, steps = chunk_rows(begins, batch, chunk, T, L, S, CHUNKS, DOCUMENTS)
  bias = at(gate_bias, heads, columns, exist, exists, K, FULL)
  length = tl.minimum(tl.load(lengths + batch), T) if LENGTHS else T
  last = tl.maximum(length - 1, 0)
  k = tl.zeros((HEADS * CHUNKS * GROUPS, 2 * HALF), tl.float32)
  v = tl.zeros((HEADS * CHUNKS * GROUPS, 2 * HALF), tl.float32)
  for step in range(steps):
    token = begin + step
    real = exist & (token < stop)
    row = (batch * T + token) * H + heads
    shared = (batch * T + token) * G + groups
    gate = sigmoid(at(gate_logits, row, columns, real, exists, K, FULL) + bias)
    k = gate * k + (1 - gate) * at(key, shared, columns, real, exists, K, FULL)
    v = gate * v + (1 - gate) * at(value, row, columns, real, exists, K, FULL)
    score = tl.sum(at(query, shared, columns, real, exists, K, FULL) * k, 1) * K**-0.5
    tl.store(own_score + row, score, mask=real)
    put(own_value, row, columns, v, real, exists, K, FULL)
    if may_end(last, step, begin, stop, L, CHUNKS, DOCUMENTS):
      ends = real & (token == last)
      put(running_key, batch * H + heads, columns, k, ends, exists, K, False)
      put(running_value, batch * H + heads, columns, v, ends, exists, K, False)

  slot = (batch * S + chunk) * H + heads
  stored = exist & (chunk < S)
  # Slots of partial chunks, also of a row's only one, stay 0.
  whole = is_whole(begin, stop, T, L, DOCUMENTS)[:, None]
  put(values, slot, columns, tl.where(whole, v, 0.0), stored, exists, K, FULL)
  k = tl.where(whole, k, 0.0)
  if ROTARY:
    pairs = tl.arange(0, HALF)
    there = stored[:, None] & (pairs < K // 2)[None, :]
    number = numbers_of(numbers, batch, chunk, S, DOCUMENTS)
    angle = number[:, None] * (K // 2) + pairs[None, :]
    c = tl.load(cos + angle, mask=there, other=0.0)
    s = tl.load(sin + angle, mask=there, other=0.0)
    low, high = tl.split(tl.permute(tl.reshape(k, (HEADS * CHUNKS * GROUPS, 2, HALF)), (0, 2, 1)))
    places = keys + slot[:, None] * K + pairs[None, :]
    tl.store(places, (low * c - high * s).to(keys.dtype.element_ty), mask=there)
    tl.store(places + K // 2, (high * c + low * s).to(keys.dtype.element_ty), mask=there)
  else:
    put(keys, slot, columns, k, stored, exists, K, FULL)


@triton.jit
def tile_of(pointer, rows, columns, real, K: tl.constexpr, FULL: tl.constexpr):
  """[rows, columns] in the array's dtype; `real` says which rows exist, columns exist below K."""
  places = pointer + rows[:, None] * K + columns[None, :]
  if FULL:
    return tl.load(places)
  return tl.load(places, mask=real[:, None] & (columns < K)[None, :], other=0.0)


@triton.jit
def seen_slots(first, last, batch, rows, T: tl.constexpr, S: tl.constexpr, L: tl.constexpr):
  """(first slot, end of the slots) that each row sees; of rows in step where L > 0."""
  if L > 0:
    lows = rows * 0
    ends = rows // L
  else:
    lows = tl.load(first + batch * T + rows, mask=rows < T, other=S)
    ends = tl.load(last + batch * T + rows, mask=rows < T, other=0)
  return lows, ends


@triton.jit
def sees(slots, lows, ends, L: tl.constexpr):
  """Whether slots are among those of `seen_slots`; broadcasts."""
  if L > 0:
    seen = slots < ends
  else:
    seen = (slots >= lows) & (slots < ends)
  return seen


@triton.jit
def add_slots(
  state, q, keys, values, start, lows, ends, base, columns,
  H: tl.constexpr, K: tl.constexpr, L: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr,
  MASKED: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """One step of the softmax: `state` is (largest score, sum of weights, weighted values)."""
  top, total, acc = state
  slots = start + tl.arange(0, TILE)
  inside = slots < S
  ROWS_FULL: tl.constexpr = FULL and not MASKED
  k = tile_of(keys, base + slots.to(tl.int64) * H, columns, inside, K, ROWS_FULL)
  v = tile_of(values, base + slots.to(tl.int64) * H, columns, inside, K, ROWS_FULL)
  scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, TILE]
  if MASKED:
    seen = sees(slots[None, :], lows[:, None], ends[:, None], L)
    scores = tl.where(seen, scores, -float("inf"))
  higher = tl.maximum(top, tl.max(scores, 1))
  weights = tl.exp(scores - higher[:, None])
  kept = tl.exp(top - higher)
  total = kept * total + tl.sum(weights, 1)
  acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision=PRECISION)
  return higher, total, acc


@triton.jit
def attend_kernel(
  query, keys, values, own_score, own_value, first, last, output_logits,
  output, top, total,
  T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
  S: tl.constexpr, K_BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
  GATED: tl.constexpr, STATISTICS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """Softmax over the seen slots and the own running chunk: grid (row blocks * H, B).

  The last rows, which see most, come first; heads of one block are neighbours.
  """
  head = tl.program_id(0) % H
  batch = tl.program_id(1).to(tl.int64)
  begin = ((T - 1) // ROWS - tl.program_id(0) // H) * ROWS
  rows = begin + tl.arange(0, ROWS)
  columns = tl.arange(0, K_BLOCK)
  inside = rows < T
  FULL: tl.constexpr = (T % ROWS == 0) and (K == K_BLOCK)
  tokens = batch * T + rows
  q = tile_of(query, tokens * G + head % G, columns, inside, K, FULL)
  score = tl.load(own_score + tokens * H + head, mask=inside, other=0.0)
  own = tile_of(own_value, tokens * H + head, columns, inside, K, FULL).to(tl.float32)
  state = (score, tl.full((ROWS,), 1.0, tl.float32), own)
  lows, ends = seen_slots(first, last, batch, rows, T, S, L)
  base = batch * S * H + head
  stop = tl.minimum(tl.max(ends), S)
  if L > 0:
    masked = begin // L // TILE * TILE  # every row sees all slots before
    for start in range(0, masked, TILE):
      state = add_slots(
        state, q, keys, values, start, lows, ends, base, columns,
        H, K, L, S, TILE, False, K == K_BLOCK, PRECISION,
      )  # fmt: skip
  else:
    masked = tl.min(lows) // TILE * TILE
  for start in range(masked, stop, TILE):
    state = add_slots(
      state, q, keys, values, start, lows, ends, base, columns,
      H, K, L, S, TILE, True, K == K_BLOCK, PRECISION,
    )  # fmt: skip
  largest, summed, acc = state
  acc = acc / summed[:, None]
  if GATED:
    logits = tile_of(output_logits, tokens * H + head, columns, inside, K, FULL)
    acc *= sigmoid(logits.to(tl.float32))
  places = output + (tokens * H + head)[:, None] * K + columns[None, :]
  acc = acc.to(output.dtype.element_ty)
  if FULL:
    tl.store(places, acc)
  else:
    tl.store(places, acc, mask=inside[:, None] & (columns < K)[None, :])
  if STATISTICS:
    tl.store(top + tokens * H + head, largest, mask=inside)
    tl.store(total + tokens * H + head, summed, mask=inside)
