"""The backward kernels of RAT attention for NVIDIA GPUs.

Softmax: one sweep of row blocks for the query's gradient, one of tiles of slots for those of the
summaries; both make the weights anew from scores and saved statistics. Recurrence: the states are
made anew into the arrays that the gradients will overwrite, then the transposed recurrence runs
from the ends of the chunks.

With p the weight of a token's own chunk, do the cotangent of the ungated output and
rest = sum over slots of weight (do . V), the gradient of the own score is
p ((1 - p) (do . v~) - rest): exactly 0 in a first chunk, however o and v~ were rounded.

Import this module only where a GPU is compiled for: it imports triton.
"""

import triton
import triton.language as tl

from .triton_kernels import (
  at,
  channels,
  chunk_rows,
  is_whole,
  lanes,
  may_end,
  numbers_of,
  put,
  seen_slots,
  sees,
  sigmoid,
  tile_of,
)


@triton.jit
def put_tile(pointer, rows, columns, x, real, K: tl.constexpr, FULL: tl.constexpr):
  """Stores [rows, columns] where rows are real and columns below K; rounds."""
  places = pointer + rows[:, None] * K + columns[None, :]
  if FULL:
    tl.store(places, x.to(pointer.dtype.element_ty))
  else:
    mask = real[:, None] & (columns < K)[None, :]
    tl.store(places, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def add_row_gradient(
  state, q, do, top, scale, delta, keys, values, start, lows, ends, base, columns,
  H: tl.constexpr, K: tl.constexpr, L: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr,
  PRECISION: tl.constexpr,
):  # fmt: skip
  """One step over slots: `state` is (query's gradient, `rest`)."""
  dq, rest = state
  slots = start + tl.arange(0, TILE)
  inside = slots < S
  k = tile_of(keys, base + slots.to(tl.int64) * H, columns, inside, K, False)
  v = tile_of(values, base + slots.to(tl.int64) * H, columns, inside, K, False)
  scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, TILE]
  seen = sees(slots[None, :], lows[:, None], ends[:, None], L)
  weights = tl.where(seen, tl.exp(scores - top[:, None]) * scale[:, None], 0.0)
  by_weight = tl.dot(do, tl.trans(v), input_precision=PRECISION)
  rest += tl.sum(weights * by_weight, 1)
  ds = weights * (by_weight - delta[:, None])
  return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION), rest


@triton.jit
def row_gradient_kernel(
  query, keys, values, own_score, first, last, output_logits, output, top, total, d_output,
  d_query, d_output_logits, d_ungated, own, rest, delta,
  T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
  S: tl.constexpr, K_BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
  GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """Gradients of query (per head) and output gate, and what the other two need of each row.

  The grid is the forward kernel's. `d_ungated` is written where GATED, and d_output otherwise.
  """
  head = tl.program_id(0) % H
  batch = tl.program_id(1).to(tl.int64)
  begin = ((T - 1) // ROWS - tl.program_id(0) // H) * ROWS
  rows = begin + tl.arange(0, ROWS)
  columns = tl.arange(0, K_BLOCK)
  inside = rows < T
  FULL: tl.constexpr = (T % ROWS == 0) and (K == K_BLOCK)
  tokens = batch * T + rows
  per_head = tokens * H + head
  q = tile_of(query, tokens * G + head % G, columns, inside, K, FULL)
  do = tile_of(d_output, per_head, columns, inside, K, FULL).to(tl.float32)
  by_output = do * tile_of(output, per_head, columns, inside, K, FULL).to(tl.float32)
  drop = tl.sum(by_output, 1)  # the ungated output times its cotangent
  if GATED:
    logits = tile_of(output_logits, per_head, columns, inside, K, FULL).to(tl.float32)
    gate = sigmoid(logits)
    put_tile(d_output_logits, per_head, columns, by_output * (1 - gate), inside, K, FULL)
    do *= gate
    put_tile(d_ungated, per_head, columns, do, inside, K, FULL)
  do = do.to(q.dtype)
  largest = tl.load(top + per_head, mask=inside, other=0.0)
  scale = 1.0 / tl.load(total + per_head, mask=inside, other=1.0)
  score = tl.load(own_score + per_head, mask=inside, other=0.0)
  tl.store(own + per_head, tl.exp(score - largest) * scale, mask=inside)
  tl.store(delta + per_head, drop, mask=inside)
  state = (tl.zeros((ROWS, K_BLOCK), tl.float32), tl.zeros((ROWS,), tl.float32))
  lows, ends = seen_slots(first, last, batch, rows, T, S, L)
  base = batch * S * H + head
  stop = tl.minimum(tl.max(ends), S)
  # Always masked: with a second loop for the slots that all rows see, which come first, the
  # assembler gives up on overlapping Hopper's products.
  begin = 0 if L > 0 else tl.min(lows) // TILE * TILE
  for start in range(begin, stop, TILE):
    state = add_row_gradient(
      state, q, do, largest, scale, drop, keys, values, start, lows, ends, base, columns,
      H, K, L, S, TILE, PRECISION,
    )  # fmt: skip
  dq, left = state
  put_tile(d_query, per_head, columns, dq, inside, K, FULL)
  tl.store(rest + per_head, left, mask=inside)


@triton.jit
def rows_not_above(numbers, bound, T: tl.constexpr):
  """How many of T ascending numbers are at most `bound`."""
  low = bound * 0
  high = low + T
  for _ in range(32):
    middle = (low + high) // 2
    above = tl.load(numbers + tl.minimum(middle, T - 1)) > bound
    high = tl.where((low < high) & above, middle, high)
    low = tl.where((low < high) & (above == 0), middle + 1, low)
  return low


@triton.jit
def add_slot_gradient(
  state, k, v, slots, query, d_ungated, first, last, top, total, delta, start, batch, head, columns,
  T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
  S: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """One step over rows: `state` is the gradients of (keys, values), [TILE, K_BLOCK]."""
  dk, dv = state
  rows = start + tl.arange(0, ROWS)
  inside = rows < T
  tokens = batch * T + rows
  per_head = tokens * H + head
  q = tile_of(query, tokens * G + head % G, columns, inside, K, FULL)
  do = tile_of(d_ungated, per_head, columns, inside, K, FULL).to(q.dtype)
  largest = tl.load(top + per_head, mask=inside, other=0.0)
  scale = 1.0 / tl.load(total + per_head, mask=inside, other=1.0)
  drop = tl.load(delta + per_head, mask=inside, other=0.0)
  lows, ends = seen_slots(first, last, batch, rows, T, S, L)
  if PRECISION == "tf32x3":  # in the forward kernel's order: a largest score must be `top` itself
    scores = tl.trans(tl.dot(q, tl.trans(k), input_precision=PRECISION))
  else:
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [TILE, ROWS]
  seen = sees(slots[:, None], lows[None, :], ends[None, :], L) & inside[None, :]
  weights = tl.where(seen, tl.exp(scores - largest[None, :]) * scale[None, :], 0.0)
  dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
  by_weight = tl.dot(v, tl.trans(do), input_precision=PRECISION)
  ds = (weights * (by_weight - drop[None, :])).to(q.dtype)
  return tl.dot(ds, q, dk, input_precision=PRECISION), dv


@triton.jit
def slot_gradient_kernel(
  query, keys, values, first, last, d_ungated, top, total, delta,
  d_keys, d_values,
  T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
  S: tl.constexpr, K_BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
  SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """Gradients of the summaries in float32, in SPLITS parts: grid (slot tiles * H, B, SPLITS).

  A part has every SPLITS-th block of the rows that see the tile. The first slots, which most rows
  see, come first.
  """
  head = tl.program_id(0) % H
  batch = tl.program_id(1).to(tl.int64)
  begin = tl.program_id(0) // H * TILE
  slots = begin + tl.arange(0, TILE)
  columns = tl.arange(0, K_BLOCK)
  inside = slots < S
  place = (batch * S + slots) * H + head
  FULL: tl.constexpr = (S % TILE == 0) and (K == K_BLOCK)
  k = tile_of(keys, place, columns, inside, K, FULL)
  v = tile_of(values, place, columns, inside, K, FULL)
  if L > 0:
    low = tl.minimum((begin + 1) * L, T) // ROWS * ROWS
    high = T
  else:
    low = rows_not_above(last + batch * T, begin, T) // ROWS * ROWS
    high = rows_not_above(first + batch * T, begin + TILE - 1, T)
  state = (tl.zeros((TILE, K_BLOCK), tl.float32), tl.zeros((TILE, K_BLOCK), tl.float32))
  for start in range(low + tl.program_id(2) * ROWS, high, SPLITS * ROWS):
    state = add_slot_gradient(
      state, k, v, slots, query, d_ungated, first, last, top, total, delta, start, batch, head,
      columns, T, H, G, K, L, S, ROWS, (T % ROWS == 0) and (K == K_BLOCK), PRECISION,
    )  # fmt: skip
  dk, dv = state
  place += tl.program_id(2) * tl.num_programs(1).to(tl.int64) * (S * H)
  put_tile(d_keys, place, columns, dk, inside, K, FULL)
  put_tile(d_values, place, columns, dv, inside, K, FULL)


@triton.jit
def recurrence_gradient_kernel(
  query, key, value, gate_logits, gate_bias, cos, sin, begins, numbers, lengths,
  d_ungated, own, rest, d_keys, d_values, d_state_key, d_state_value, d_running_key,
  d_running_value,
  d_query_own, d_key, d_value, d_gate_logits, d_gate_bias,
  T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
  S: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr,
  HALF: tl.constexpr, ROTARY: tl.constexpr, LENGTHS: tl.constexpr, FULL: tl.constexpr,
  DOCUMENTS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
  """Gradients through recurrence and own score: grid as `recurrence_kernel`.

  d_query_own and d_key are sums over the HEADS heads of each group, d_gate_bias over the tile's
  tokens: their leading axes count the programs that add to the same result.
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
  # States, in the arrays that the gradients of the same tokens overwrite below.
  for step in range(steps):
    token = begin + step
    real = exist & (token < stop)
    row = (batch * T + token) * H + heads
    shared = (batch * T + token) * G + groups
    gate = sigmoid(at(gate_logits, row, columns, real, exists, K, FULL) + bias)
    k = gate * k + (1 - gate) * at(key, shared, columns, real, exists, K, FULL)
    v = gate * v + (1 - gate) * at(value, row, columns, real, exists, K, FULL)
    put(d_gate_logits, row, columns, k, real, exists, K, FULL)
    put(d_value, row, columns, v, real, exists, K, FULL)
  tl.debug_barrier()

  # Cotangents of the states from later: at first those of the summaries, where the chunk is whole.
  slot = (batch * S + chunk) * H + heads
  stored = exist & is_whole(begin, stop, T, L, DOCUMENTS)
  lam = at(d_state_key, slot, columns, stored, exists, K, FULL)
  mu = at(d_state_value, slot, columns, stored, exists, K, FULL)
  partner = tl.where(columns < K // 2, columns + K // 2, columns - K // 2)
  turned = at(d_state_key, slot, partner, stored, exists, K, FULL) if ROTARY else lam
  for split in range(SPLITS):
    part = split * tl.num_programs(2).to(tl.int64) * (S * H) + slot
    lam += at(d_keys, part, columns, stored, exists, K, FULL)
    mu += at(d_values, part, columns, stored, exists, K, FULL)
    if ROTARY:
      turned += at(d_keys, part, partner, stored, exists, K, FULL)
  if ROTARY:
    pair = tl.minimum(columns, partner)
    number = numbers_of(numbers, batch, chunk, S, DOCUMENTS)
    c = at(cos, number, pair, stored, exists, K // 2, FULL)
    s = at(sin, number, pair, stored, exists, K // 2, FULL)
    lam = lam * c + tl.where(columns < K // 2, s, -s) * turned

  bias_sum = tl.zeros((HEADS * CHUNKS * GROUPS, 2 * HALF), tl.float32)
  narrow = tl.arange(0, CHUNKS * GROUPS)
  group, narrow_chunk = narrow % GROUPS, tl.program_id(0) * CHUNKS + narrow // GROUPS
  narrow_begin, narrow_stop, _ = chunk_rows(begins, batch, narrow_chunk, T, L, S, CHUNKS, DOCUMENTS)
  for back in range(steps):
    step = steps - 1 - back
    token = begin + step
    real = exist & (token < stop)
    row = (batch * T + token) * H + heads
    shared = (batch * T + token) * G + groups
    q = at(query, shared, columns, real, exists, K, FULL)
    do = at(d_ungated, row, columns, real, exists, K, FULL)
    weight = tl.load(own + row, mask=real, other=0.0)
    others = tl.load(rest + row, mask=real, other=0.0)
    ds = weight * ((1 - weight) * tl.sum(do * v, 1) - others) * K**-0.5
    lam += ds[:, None] * q
    mu += weight[:, None] * do
    if may_end(last, step, begin, stop, L, CHUNKS, DOCUMENTS):
      ends = real & (token == last)
      lam += at(d_running_key, batch * H + heads, columns, ends, exists, K, False)
      mu += at(d_running_value, batch * H + heads, columns, ends, exists, K, False)
    dq = ds[:, None] * k
    gate = sigmoid(at(gate_logits, row, columns, real, exists, K, FULL) + bias)
    before = exist & (token <= stop) & (token > begin)
    k = at(d_gate_logits, row - H, columns, before, exists, K, False)
    v = at(d_value, row - H, columns, before, exists, K, False)
    d_gate = lam * (k - at(key, shared, columns, real, exists, K, FULL))
    d_gate += mu * (v - at(value, row, columns, real, exists, K, FULL))
    d_logits = d_gate * gate * (1 - gate)
    tl.debug_barrier()  # all states of this step were read a step ago, by every thread
    put(d_gate_logits, row, columns, d_logits, real, exists, K, FULL)
    put(d_value, row, columns, (1 - gate) * mu, real, exists, K, FULL)
    bias_sum += tl.where(real[:, None], d_logits, 0.0)
    dk = (1 - gate) * lam
    lam *= gate
    mu *= gate
    dq = tl.sum(tl.reshape(dq, (HEADS, CHUNKS * GROUPS, 2 * HALF)), 0)
    dk = tl.sum(tl.reshape(dk, (HEADS, CHUNKS * GROUPS, 2 * HALF)), 0)
    token = narrow_begin + step
    real = (group < G) & (token < narrow_stop)
    part = tl.program_id(1) * tl.num_programs(2) + batch
    row = (part * T + token) * G + group
    put(d_query_own, row, columns, dq, real, exists, K, FULL)
    put(d_key, row, columns, dk, real, exists, K, FULL)

  total = tl.sum(tl.reshape(bias_sum, (HEADS, CHUNKS, GROUPS, 2 * HALF)), 1)
  wide = tl.arange(0, HEADS * GROUPS)
  index = tl.program_id(1) * HEADS + wide // GROUPS
  exist = (index < H // G) & (wide % GROUPS < G)
  row = (batch * tl.num_programs(0) + tl.program_id(0)) * H + index * G + wide % GROUPS
  total = tl.reshape(total, (HEADS * GROUPS, 2 * HALF))
  put(d_gate_bias, row, columns, total, exist, exists, K, FULL)
