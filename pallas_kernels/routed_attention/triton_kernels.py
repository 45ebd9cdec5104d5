"""Attention between the members of clusters for NVIDIA GPUs: the forward kernel and what is shared.

A program has some slots of one cluster in hand and gathers their tokens by pointer; nothing is
gathered by XLA, and what is written is one row per slot. Members stand in the order of their
positions, so with shared members the triangle of slots is exact causality.

A width of one more than a power of two (129, published) is not rounded up to the next one: each
tile is a pair (main, last), and the last column is added by multiplication, number by number.

Import this module only where a GPU is compiled for: it imports triton. Sizes are compile-time
constants.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
OWN = tl.constexpr(-5e4)  # logit of what is a last resort


@triton.jit
def load_rows(
  pointer, index, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr
):
  """(main [N, BLOCK], last [N]) of the rows `index`; 0 where that is below 0."""
  columns = tl.arange(0, BLOCK)
  rows = pointer + index[:, None] * STRIDE
  keep = index[:, None] >= 0
  if D < BLOCK:
    keep = keep & (columns[None, :] < D)
  main = tl.load(rows + columns[None, :], mask=keep, other=0.0)
  last = index
  if LAST:
    last = tl.load(pointer + index * STRIDE + BLOCK, mask=index >= 0, other=0.0).to(tl.float32)
  return main, last


@triton.jit
def store_slots(
  pointer, slots, acc, W: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr
):
  """Writes one row per slot of a cluster."""
  main, last = acc
  columns = tl.arange(0, BLOCK)
  rows = pointer + slots[:, None] * D
  kind = pointer.dtype.element_ty
  inside = slots < W
  tl.store(rows + columns, main.to(kind), mask=inside[:, None] & (columns[None, :] < D))
  if LAST:
    tl.store(pointer + slots * D + BLOCK, last.to(kind), mask=inside)


@triton.jit
def zero_rows(ROWS: tl.constexpr, BLOCK: tl.constexpr):
  """An accumulator (main, last)."""
  return tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS,), tl.float32)


@triton.jit
def products(a, b, LAST: tl.constexpr, PRECISION: tl.constexpr):
  """a b^T in float32 of two tiles of rows."""
  x = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
  if LAST:
    x += a[1][:, None] * b[1][None, :]
  return x


@triton.jit
def turned_products(
  a, b, LAST: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
  """a b^T; TURNED: b a^T.

  float32 is multiplied in one order and turned then: weights that are made anew from logits of
  another rounding than the forward pass's largest do not add up to 1.
  """
  if not TURNED:
    x = products(a, b, LAST, PRECISION)
  elif PRECISION == "tf32x3":
    x = tl.trans(products(a, b, LAST, PRECISION))
  else:
    x = products(b, a, LAST, PRECISION)
  return x


@triton.jit
def add_weighted(acc, weights, rows, LAST: tl.constexpr, PRECISION: tl.constexpr):
  """acc + weights rows, the weights rounded to the dtype of the rows."""
  main, last = acc
  main = tl.dot(weights.to(rows[0].dtype), rows[0], main, input_precision=PRECISION)
  if LAST:
    last += tl.sum(weights * rows[1][None, :], 1)
  return main, last


@triton.jit
def table_rows(
  table, distance, TILE: tl.constexpr, LIMIT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
  LAST: tl.constexpr,
):  # fmt: skip
  """TILE rows of a relative table from a distance on: key minus query, clipped to LIMIT."""
  row = tl.minimum(tl.maximum(distance + tl.arange(0, TILE), -LIMIT), LIMIT) + LIMIT
  return load_rows(table, row, D, D, BLOCK, LAST)


@triton.jit
def by_pair(far, near, TILE: tl.constexpr, BY_KEY: tl.constexpr):
  """[queries, keys] of products with table rows; BY_KEY: the transposed of everything.

  Query i has its key j at j - i - 1 (mod TILE): in the `near` rows, whose distances are 1 .. TILE
  plus that of the tiles, or in the `far` rows, TILE less. One turn of each row is enough.
  """
  one, other = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
  query, key = (other, one) if BY_KEY else (one, other)
  mixed = tl.where(key >= TILE - 1 - query, far, near)
  return tl.gather(mixed, (key - query - 1) & (TILE - 1), 0 if BY_KEY else 1)


@triton.jit
def by_distance(x, TILE: tl.constexpr, BY_KEY: tl.constexpr):
  """(far, near), the transpose of `by_pair`: every pair at its row of the table, 0 elsewhere."""
  one, other = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
  query, row = (other, one) if BY_KEY else (one, other)
  turned = tl.gather(x, (row + query + 1) & (TILE - 1), 0 if BY_KEY else 1)
  far = row >= TILE - 1 - query
  return tl.where(far, turned, 0.0), tl.where(far, 0.0, turned)


@triton.jit
def add_by_distance(
  acc, x, table, distance, TILE: tl.constexpr, LIMIT: tl.constexpr, D: tl.constexpr,
  BLOCK: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """acc + the sum over keys of x [queries, keys] times the table's rows."""
  far, near = by_distance(x, TILE, False)
  rows = table_rows(table, distance + 1 - TILE, TILE, LIMIT, D, BLOCK, LAST)
  acc = add_weighted(acc, far, rows, LAST, PRECISION)
  rows = table_rows(table, distance + 1, TILE, LIMIT, D, BLOCK, LAST)
  return add_weighted(acc, near, rows, LAST, PRECISION)


@triton.jit
def pair_products(
  q, k, table, distance, FACTOR: tl.constexpr, TILE: tl.constexpr, LIMIT: tl.constexpr,
  D: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr, BY_KEY: tl.constexpr,
  PRECISION: tl.constexpr,
):  # fmt: skip
  """FACTOR q . k + q . table[distance of the pair]: [queries, keys]; BY_KEY: [keys, queries].

  `distance` is that of the first key and the first query. LIMIT < 0: there is no table; else there
  are TILE of both.
  """
  x = turned_products(q, k, LAST, BY_KEY, PRECISION)
  if FACTOR != 1.0:
    x *= FACTOR
  if LIMIT >= 0:
    rows = table_rows(table, distance + 1 - TILE, TILE, LIMIT, D, BLOCK, LAST)
    far = turned_products(q, rows, LAST, BY_KEY, PRECISION)
    rows = table_rows(table, distance + 1, TILE, LIMIT, D, BLOCK, LAST)
    near = turned_products(q, rows, LAST, BY_KEY, PRECISION)
    x += by_pair(far, near, TILE, BY_KEY)
  return x


@triton.jit
def hide(x, query_slot, key_slot, here, there, CAUSAL: tl.constexpr, LAST_RESORT: tl.constexpr):
  """x, -inf where a query does not see a key; slots and positions of both broadcast against x.

  CAUSAL: "slot", "position" or "none".
  """
  if LAST_RESORT:
    x = tl.where(here == there, OWN, x)
  keep = there >= 0
  if CAUSAL == "slot":
    keep &= key_slot <= query_slot
  elif CAUSAL == "position":
    keep &= there <= here
  return tl.where(keep, x, -float("inf"))


@triton.jit
def exp_behind(x, top):
  """e^(x - top): rounding the factor of base 2 after the difference costs nothing where it is 0."""
  return tl.exp2((x - top) * LOG2E)


@triton.jit
def not_zero(rows, LAST: tl.constexpr):
  """Which rows have anything but zeros."""
  largest = tl.max(tl.abs(rows[0].to(tl.float32)), 1)
  if LAST:
    largest = tl.maximum(largest, tl.abs(rows[1]))
  return largest != 0.0


@triton.jit
def member_tile(members, slots, W: tl.constexpr):
  """Positions of slots; -1 where there are none."""
  return tl.load(members + slots, mask=slots < W, other=-1)


@triton.jit
def cluster_of(blocks, T: tl.constexpr, H: tl.constexpr, C: tl.constexpr, W: tl.constexpr):
  """(block, first row of the head's tokens, first slot of the cluster); grid (blocks * C, B * H).

  Later blocks, which have more keys, start first.
  """
  head = tl.program_id(1).to(tl.int64)
  block = blocks - 1 - tl.program_id(0) % blocks
  return block, (head // H) * T * H + head % H, (head * C + tl.program_id(0) // blocks) * W


@triton.jit
def key_range(
  begin, here, W: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SHARED: tl.constexpr,
  CAUSAL: tl.constexpr,
):  # fmt: skip
  """(up to where tiles of keys need no mask, end): nothing for slots without members."""
  tiles: tl.constexpr = (W + TILE - 1) // TILE * TILE
  end = tl.minimum(begin + ROWS, tiles) if CAUSAL == "slot" else tiles
  free = begin if CAUSAL == "slot" and SHARED else 0
  some = tl.max(here, 0) >= 0
  return tl.where(some, free, 0), tl.where(some, end, 0)


@triton.jit
def add_keys(
  state, q, key, value, key_members, tables, begin, here, start,
  H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
  TILE: tl.constexpr, K_BLOCK: tl.constexpr, K_LAST: tl.constexpr,
  V_BLOCK: tl.constexpr, V_LAST: tl.constexpr, LIMIT: tl.constexpr, SCALE: tl.constexpr,
  CAUSAL: tl.constexpr, LAST_RESORT: tl.constexpr, ZEROS_SEEN: tl.constexpr,
  MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """One tile of keys: `state` is (largest logit, sum of weights, weighted values main, last)."""
  top, summed, main, last = state
  slots = start + tl.arange(0, TILE)
  there = member_tile(key_members, slots, W)
  k = load_rows(key, there, H * K, K, K_BLOCK, K_LAST)
  v = load_rows(value, there, H * V, V, V_BLOCK, V_LAST)
  x = pair_products(
    q, k, tables[0], start - begin, SCALE, TILE, LIMIT, K, K_BLOCK, K_LAST, False,
    PRECISION,
  )  # fmt: skip
  if MASKED:
    rows = begin + tl.arange(0, ROWS)
    x = hide(x, rows[:, None], slots[None, :], here[:, None], there[None, :], CAUSAL, LAST_RESORT)
  if not ZEROS_SEEN:
    x = tl.where(not_zero(v, V_LAST)[None, :], x, -float("inf"))
  peak = tl.maximum(top, tl.max(x, 1))
  base = tl.where(peak == -float("inf"), 0.0, peak)
  weights = exp_behind(x, base[:, None])
  shrink = exp_behind(top, base)
  summed = summed * shrink + tl.sum(weights, 1)
  acc = add_weighted((main * shrink[:, None], last * shrink), weights, v, V_LAST, PRECISION)
  if LIMIT >= 0:
    acc = add_by_distance(
      acc, weights, tables[1], start - begin, TILE, LIMIT, V, V_BLOCK, V_LAST, PRECISION
    )
  return peak, summed, acc[0], acc[1]


@triton.jit
def forward_kernel(
  query, key, value, members, key_members, relative_keys, relative_values,
  slots, top, inverse,
  T: tl.constexpr, H: tl.constexpr, C: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
  V: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
  K_BLOCK: tl.constexpr, K_LAST: tl.constexpr, V_BLOCK: tl.constexpr, V_LAST: tl.constexpr,
  LIMIT: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, SHARED: tl.constexpr,
  LAST_RESORT: tl.constexpr, ZEROS_SEEN: tl.constexpr, PRECISION: tl.constexpr,
  STATISTICS: tl.constexpr,
):  # fmt: skip
  """slots [B, H, C, W, V]: what each member gets of its cluster; 0 where it sees nothing.

  STATISTICS: of each slot the largest logit `top`, and 1 / its sum of weights, `inverse`, or 0:
  [B, H, C, W]. Their log-sum-exp alone would round away the sum under large logits.
  """
  block, token, slot = cluster_of((W + ROWS - 1) // ROWS, T, H, C, W)
  begin = block * ROWS
  rows = begin + tl.arange(0, ROWS)
  here = member_tile(members + slot, rows, W)
  key_members += slot
  key += token * K
  value += token * V
  tables = (relative_keys, relative_values)
  q = load_rows(query + token * K, here, H * K, K, K_BLOCK, K_LAST)
  main, last = zero_rows(ROWS, V_BLOCK)
  state = (
    tl.full((ROWS,), -float("inf"), tl.float32), tl.zeros((ROWS,), tl.float32), main, last
  )  # fmt: skip
  free, end = key_range(begin, here, W, ROWS, TILE, SHARED, CAUSAL)
  for start in range(0, free, TILE):
    state = add_keys(
      state, q, key, value, key_members, tables, begin, here, start,
      H, W, K, V, ROWS, TILE, K_BLOCK, K_LAST, V_BLOCK, V_LAST, LIMIT, SCALE, CAUSAL,
      LAST_RESORT, ZEROS_SEEN, False, PRECISION,
    )  # fmt: skip
  for start in range(free, end, TILE):
    state = add_keys(
      state, q, key, value, key_members, tables, begin, here, start,
      H, W, K, V, ROWS, TILE, K_BLOCK, K_LAST, V_BLOCK, V_LAST, LIMIT, SCALE, CAUSAL,
      LAST_RESORT, ZEROS_SEEN, True, PRECISION,
    )  # fmt: skip
  peak, summed, main, last = state
  part = tl.where(summed > 0.0, 1.0 / tl.where(summed > 0.0, summed, 1.0), 0.0)
  store_slots(slots + slot * V, rows, (main * part[:, None], last * part), W, V, V_BLOCK, V_LAST)
  if STATISTICS:
    inside = rows < W
    tl.store(top + slot + rows, tl.where(summed > 0.0, peak, 0.0), mask=inside)
    tl.store(inverse + slot + rows, part, mask=inside)
