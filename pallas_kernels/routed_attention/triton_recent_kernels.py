"""Membership "causal_recent" for NVIDIA GPUs: attention inside a band of sorted tokens.

A program has some sorted queries in hand, gathers by pointer the sorted keys that the first to the
last of them see, and writes each output where its query came from; so for keys. The band's ends do
not fall from one query to the next: programs share at most a window of keys, and a key is seen by a
run of queries. No sum is shared between programs: results are the same in every run.

    dW = dO . v     ds = W (dW - D)     D = sum W dW
    dq = sum ds k   dk = sum ds q       dv = sum W dO

Import this module only where a GPU is compiled for: it imports triton. Sizes are compile-time
constants.
"""

import triton
import triton.language as tl

from .triton_kernels import (
  add_weighted,
  exp_behind,
  load_rows,
  products,
  turned_products,
  zero_rows,
)


@triton.jit
def head_of(T: tl.constexpr, S: tl.constexpr, H: tl.constexpr):
  """(this head of B * H, row of its first query, of its first key); grid (blocks, B * H)."""
  head = tl.program_id(1).to(tl.int64)
  return head, (head // H) * T * H + head % H, (head // H) * S * H + head % H


@triton.jit
def places(order, slots, N: tl.constexpr):
  """Tokens of sorted slots; -1 where there are none."""
  return tl.load(order + slots, mask=slots < N, other=-1)


@triton.jit
def bounds(start, stop, slots, T: tl.constexpr, S: tl.constexpr):
  """The keys that sorted queries see: from, to; none where there is no query."""
  inside = slots < T
  first = tl.load(start + slots, mask=inside, other=S)
  return first, tl.load(stop + slots, mask=inside, other=0)


@triton.jit
def store_rows(
  pointer, index, acc, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
  LAST: tl.constexpr,
):  # fmt: skip
  """Writes rows (main, last) to the rows `index`; none where that is below 0."""
  main, last = acc
  columns = tl.arange(0, BLOCK)
  rows = pointer + index[:, None] * STRIDE
  kind = pointer.dtype.element_ty
  keep = (index[:, None] >= 0) & (columns[None, :] < D)
  tl.store(rows + columns[None, :], main.to(kind), mask=keep)
  if LAST:
    tl.store(pointer + index * STRIDE + BLOCK, last.to(kind), mask=index >= 0)


@triton.jit
def band_forward_kernel(
  query, key, value, query_order, key_order, start, stop,
  output, top, inverse,
  T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
  ROWS: tl.constexpr, TILE: tl.constexpr, K_BLOCK: tl.constexpr, K_LAST: tl.constexpr,
  V_BLOCK: tl.constexpr, V_LAST: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
  STATISTICS: tl.constexpr,
):  # fmt: skip
  """output [B, T, H, V], 0 where a query sees nothing.

  STATISTICS: of each sorted query the largest logit `top`, and 1 / its sum of weights, `inverse`,
  or 0: [B, H, T].
  """
  head, first_query, first_key = head_of(T, S, H)
  rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
  here = places(query_order + head * T, rows, T)
  first, end = bounds(start + head * T, stop + head * T, rows, T, S)
  q = load_rows(query + first_query * K, here, H * K, K, K_BLOCK, K_LAST)
  key += first_key * K
  value += first_key * V
  key_order += head * S
  peak = tl.full((ROWS,), -float("inf"), tl.float32)
  summed = tl.zeros((ROWS,), tl.float32)
  acc = zero_rows(ROWS, V_BLOCK)
  for at in range(tl.min(first, 0) // TILE * TILE, tl.max(end, 0), TILE):
    slots = at + tl.arange(0, TILE)
    there = places(key_order, slots, S)
    k = load_rows(key, there, H * K, K, K_BLOCK, K_LAST)
    v = load_rows(value, there, H * V, V, V_BLOCK, V_LAST)
    x = products(q, k, K_LAST, PRECISION) * SCALE
    seen = (slots[None, :] >= first[:, None]) & (slots[None, :] < end[:, None])
    x = tl.where(seen, x, -float("inf"))
    higher = tl.maximum(peak, tl.max(x, 1))
    base = tl.where(higher == -float("inf"), 0.0, higher)
    weights = exp_behind(x, base[:, None])
    shrink = exp_behind(peak, base)
    summed = summed * shrink + tl.sum(weights, 1)
    acc = (acc[0] * shrink[:, None], acc[1] * shrink)
    acc = add_weighted(acc, weights, v, V_LAST, PRECISION)
    peak = higher
  part = tl.where(summed > 0.0, 1.0 / tl.where(summed > 0.0, summed, 1.0), 0.0)
  acc = (acc[0] * part[:, None], acc[1] * part)
  store_rows(output + first_query * V, here, acc, H * V, V, V_BLOCK, V_LAST)
  if STATISTICS:
    inside = rows < T
    tl.store(top + head * T + rows, tl.where(summed > 0.0, peak, 0.0), mask=inside)
    tl.store(inverse + head * T + rows, part, mask=inside)


@triton.jit
def band_query_kernel(
  query, key, value, d_output, query_order, key_order, start, stop, top, inverse,
  d_query, drop,
  T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
  ROWS: tl.constexpr, TILE: tl.constexpr, K_BLOCK: tl.constexpr, K_LAST: tl.constexpr,
  V_BLOCK: tl.constexpr, V_LAST: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """d_query [B, T, H, K], and D of each sorted query, `drop` [B, H, T].

  D is summed first, from the products that it is then subtracted from: where one key has nearly all
  the weight dW - D is near 0, which a sum over the rounded output would not give.
  """
  head, first_query, first_key = head_of(T, S, H)
  rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
  inside = rows < T
  here = places(query_order + head * T, rows, T)
  first, end = bounds(start + head * T, stop + head * T, rows, T, S)
  peak = tl.load(top + head * T + rows, mask=inside, other=0.0)
  part = tl.load(inverse + head * T + rows, mask=inside, other=0.0)
  q = load_rows(query + first_query * K, here, H * K, K, K_BLOCK, K_LAST)
  do = load_rows(d_output + first_query * V, here, H * V, V, V_BLOCK, V_LAST)
  key += first_key * K
  value += first_key * V
  key_order += head * S
  mean = tl.zeros((ROWS,), tl.float32)
  acc = zero_rows(ROWS, K_BLOCK)
  begin = tl.min(first, 0) // TILE * TILE
  for turn in tl.static_range(2):
    for at in range(begin, tl.max(end, 0), TILE):
      slots = at + tl.arange(0, TILE)
      there = places(key_order, slots, S)
      k = load_rows(key, there, H * K, K, K_BLOCK, K_LAST)
      v = load_rows(value, there, H * V, V, V_BLOCK, V_LAST)
      x = products(q, k, K_LAST, PRECISION) * SCALE
      seen = (slots[None, :] >= first[:, None]) & (slots[None, :] < end[:, None])
      x = tl.where(seen, x, -float("inf"))
      weights = exp_behind(x, peak[:, None]) * part[:, None]
      by_weight = products(do, v, V_LAST, PRECISION)
      if turn == 0:
        mean += tl.sum(weights * by_weight, 1)
      else:
        by_logit = weights * (by_weight - mean[:, None]) * SCALE
        acc = add_weighted(acc, by_logit, k, K_LAST, PRECISION)
  store_rows(d_query + first_query * K, here, acc, H * K, K, K_BLOCK, K_LAST)
  tl.store(drop + head * T + rows, mean, mask=inside)


@triton.jit
def band_key_kernel(
  query, key, value, d_output, query_order, key_order, start, stop, top, inverse, drop, seen_by,
  d_key, d_value,
  T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
  ROWS: tl.constexpr, TILE: tl.constexpr, K_BLOCK: tl.constexpr, K_LAST: tl.constexpr,
  V_BLOCK: tl.constexpr, V_LAST: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """d_key [B, S, H, K] and d_value [B, S, H, V] of ROWS sorted keys.

  seen_by [B, H, blocks, 2]: from which sorted query to which one a block of keys is seen.
  """
  head, first_query, first_key = head_of(T, S, H)
  rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
  there = places(key_order + head * S, rows, S)
  k = load_rows(key + first_key * K, there, H * K, K, K_BLOCK, K_LAST)
  v = load_rows(value + first_key * V, there, H * V, V, V_BLOCK, V_LAST)
  query += first_query * K
  d_output += first_query * V
  query_order += head * T
  start += head * T
  stop += head * T
  top += head * T
  inverse += head * T
  drop += head * T
  seen_by += (head * tl.num_programs(0) + tl.program_id(0)) * 2
  by_key = zero_rows(ROWS, K_BLOCK)
  by_value = zero_rows(ROWS, V_BLOCK)
  for at in range(tl.load(seen_by), tl.load(seen_by + 1), TILE):
    slots = at + tl.arange(0, TILE)
    inside = slots < T
    here = places(query_order, slots, T)
    first, end = bounds(start, stop, slots, T, S)
    q = load_rows(query, here, H * K, K, K_BLOCK, K_LAST)
    do = load_rows(d_output, here, H * V, V, V_BLOCK, V_LAST)
    peak = tl.load(top + slots, mask=inside, other=0.0)
    part = tl.load(inverse + slots, mask=inside, other=0.0)
    mean = tl.load(drop + slots, mask=inside, other=0.0)
    x = turned_products(q, k, K_LAST, True, PRECISION) * SCALE  # [keys, queries]
    seen = (rows[:, None] >= first[None, :]) & (rows[:, None] < end[None, :])
    x = tl.where(seen, x, -float("inf"))
    weights = exp_behind(x, peak[None, :]) * part[None, :]
    by_value = add_weighted(by_value, weights, do, V_LAST, PRECISION)
    by_weight = turned_products(do, v, V_LAST, True, PRECISION)
    by_logit = weights * (by_weight - mean[None, :]) * SCALE
    by_key = add_weighted(by_key, by_logit, q, K_LAST, PRECISION)
  store_rows(d_key + first_key * K, there, by_key, H * K, K, K_BLOCK, K_LAST)
  store_rows(d_value + first_key * V, there, by_value, H * V, V, V_BLOCK, V_LAST)
