"""The backward kernels of attention between the members of clusters, for NVIDIA GPUs.

With W the weights, dO the gradient of the combined output, r its share 1 / (m + eps) per slot:

    dW = dO . v     ds = r W (dW - D)     D = sum W dW
    dq = sum ds k   dk = sum ds q         dv = sum r W dO

D is summed from the products that it is subtracted from, in a launch of its own: a token that is
nearly all of its own attention has dW - D near 0, which a sum over the rounded output would not
give. The second launch has the slots of a program in hand once, as queries and as keys, so that
where query and key are one array their gradients leave in one sum. No sum is shared between
programs: results are the same in every run.

Import this module only where a GPU is compiled for: it imports triton.
"""

import triton
import triton.language as tl

from .triton_kernels import (
  add_by_distance,
  add_weighted,
  by_distance,
  cluster_of,
  exp_behind,
  hide,
  key_range,
  load_rows,
  member_tile,
  not_zero,
  pair_products,
  store_slots,
  zero_rows,
)


@triton.jit
def statistics_of(
  slots, here, top, inverse, share, drop, W: tl.constexpr
):  # fmt: skip
  """(top, inverse, share, drop) of slots; a share of 0 where there is no member."""
  inside = slots < W
  return (
    tl.load(top + slots, mask=inside, other=0.0),
    tl.load(inverse + slots, mask=inside, other=0.0),
    tl.load(share + here, mask=here >= 0, other=0.0),
    tl.load(drop + slots, mask=inside, other=0.0),
  )


@triton.jit
def pairs_by_query(
  q, do, key, value, key_members, tables, begin, here, start, top, inverse,
  H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
  TILE: tl.constexpr, K_BLOCK: tl.constexpr, K_LAST: tl.constexpr,
  V_BLOCK: tl.constexpr, V_LAST: tl.constexpr, LIMIT: tl.constexpr, SCALE: tl.constexpr,
  CAUSAL: tl.constexpr, LAST_RESORT: tl.constexpr, ZEROS_SEEN: tl.constexpr,
  MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """(weights, their gradients dW [ROWS, TILE], positions of the keys, keys)."""
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
  weights = exp_behind(x, top[:, None]) * inverse[:, None]
  by_weight = pair_products(
    do, v, tables[1], start - begin, 1.0, TILE, LIMIT, V, V_BLOCK, V_LAST, False,
    PRECISION,
  )  # fmt: skip
  return weights, by_weight, there, k


@triton.jit
def pairs_by_key(
  q, do, k, v, tables, query_start, key_start, here, there, statistics,
  ROWS: tl.constexpr, TILE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
  K_BLOCK: tl.constexpr, K_LAST: tl.constexpr, V_BLOCK: tl.constexpr, V_LAST: tl.constexpr,
  LIMIT: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, LAST_RESORT: tl.constexpr,
  ZEROS_SEEN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """(weights times share, gradients of the logits): [TILE of keys, ROWS of queries]."""
  top, inverse, share, drop = statistics
  x = pair_products(
    q, k, tables[0], key_start - query_start, SCALE, TILE, LIMIT, K, K_BLOCK, K_LAST,
    True, PRECISION,
  )  # fmt: skip
  if MASKED:
    rows, slots = query_start + tl.arange(0, ROWS), key_start + tl.arange(0, TILE)
    x = hide(x, rows[None, :], slots[:, None], here[None, :], there[:, None], CAUSAL, LAST_RESORT)
  if not ZEROS_SEEN:
    x = tl.where(not_zero(v, V_LAST)[:, None], x, -float("inf"))
  weights = exp_behind(x, top[None, :]) * (inverse * share)[None, :]
  by_weight = pair_products(
    do, v, tables[1], key_start - query_start, 1.0, TILE, LIMIT, V, V_BLOCK, V_LAST,
    True, PRECISION,
  )  # fmt: skip
  by_logit = weights * (by_weight - drop[None, :])
  if LAST_RESORT:
    by_logit = tl.where(here[None, :] == there[:, None], 0.0, by_logit)
  return weights, by_logit


@triton.jit
def drop_kernel(
  query, key, value, d_output, members, key_members, relative_keys, relative_values, top, inverse,
  drop,
  T: tl.constexpr, H: tl.constexpr, C: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
  V: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
  K_BLOCK: tl.constexpr, K_LAST: tl.constexpr, V_BLOCK: tl.constexpr, V_LAST: tl.constexpr,
  LIMIT: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, SHARED: tl.constexpr,
  LAST_RESORT: tl.constexpr, ZEROS_SEEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """drop [B, H, C, W]: D of each slot, without the share. The forward's grid."""
  block, token, slot = cluster_of((W + ROWS - 1) // ROWS, T, H, C, W)
  begin = block * ROWS
  rows = begin + tl.arange(0, ROWS)
  inside = rows < W
  here = member_tile(members + slot, rows, W)
  key_members += slot
  key += token * K
  value += token * V
  tables = (relative_keys, relative_values)
  q = load_rows(query + token * K, here, H * K, K, K_BLOCK, K_LAST)
  do = load_rows(d_output + token * V, here, H * V, V, V_BLOCK, V_LAST)
  peak = tl.load(top + slot + rows, mask=inside, other=0.0)
  part = tl.load(inverse + slot + rows, mask=inside, other=0.0)
  summed = tl.zeros((ROWS,), tl.float32)
  free, end = key_range(begin, here, W, ROWS, TILE, SHARED, CAUSAL)
  for start in range(0, free, TILE):
    weights, by_weight, _, _ = pairs_by_query(
      q, do, key, value, key_members, tables, begin, here, start, peak, part,
      H, W, K, V, ROWS, TILE, K_BLOCK, K_LAST, V_BLOCK, V_LAST, LIMIT, SCALE, CAUSAL,
      LAST_RESORT, ZEROS_SEEN, False, PRECISION,
    )  # fmt: skip
    summed += tl.sum(weights * by_weight, 1)
  for start in range(free, end, TILE):
    weights, by_weight, _, _ = pairs_by_query(
      q, do, key, value, key_members, tables, begin, here, start, peak, part,
      H, W, K, V, ROWS, TILE, K_BLOCK, K_LAST, V_BLOCK, V_LAST, LIMIT, SCALE, CAUSAL,
      LAST_RESORT, ZEROS_SEEN, True, PRECISION,
    )  # fmt: skip
    summed += tl.sum(weights * by_weight, 1)
  tl.store(drop + slot + rows, summed, mask=inside)


@triton.jit
def add_query_gradient(
  acc, q, do, key, value, key_members, tables, begin, here, start, statistics,
  H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
  TILE: tl.constexpr, K_BLOCK: tl.constexpr, K_LAST: tl.constexpr,
  V_BLOCK: tl.constexpr, V_LAST: tl.constexpr, LIMIT: tl.constexpr, SCALE: tl.constexpr,
  CAUSAL: tl.constexpr, LAST_RESORT: tl.constexpr, ZEROS_SEEN: tl.constexpr,
  MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """The slots of the program as queries, one tile of keys."""
  top, inverse, share, drop = statistics
  weights, by_weight, there, k = pairs_by_query(
    q, do, key, value, key_members, tables, begin, here, start, top, inverse,
    H, W, K, V, ROWS, TILE, K_BLOCK, K_LAST, V_BLOCK, V_LAST, LIMIT, SCALE, CAUSAL,
    LAST_RESORT, ZEROS_SEEN, MASKED, PRECISION,
  )  # fmt: skip
  by_logit = weights * share[:, None] * (by_weight - drop[:, None])
  if MASKED and LAST_RESORT:
    by_logit = tl.where(here[:, None] == there[None, :], 0.0, by_logit)
  acc = add_weighted(acc, by_logit * SCALE, k, K_LAST, PRECISION)
  if LIMIT >= 0:
    acc = add_by_distance(
      acc, by_logit, tables[0], start - begin, TILE, LIMIT, K, K_BLOCK, K_LAST, PRECISION
    )
  return acc


@triton.jit
def add_key_gradients(
  acc, d_v, k, v, query, d_output, members, tables, begin, there, start, top, inverse, share, drop,
  H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
  TILE: tl.constexpr, K_BLOCK: tl.constexpr, K_LAST: tl.constexpr,
  V_BLOCK: tl.constexpr, V_LAST: tl.constexpr, LIMIT: tl.constexpr, SCALE: tl.constexpr,
  CAUSAL: tl.constexpr, LAST_RESORT: tl.constexpr, ZEROS_SEEN: tl.constexpr,
  MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """The slots of the program as TILE keys, one tile of ROWS queries."""
  slots = start + tl.arange(0, ROWS)
  here = member_tile(members, slots, W)
  q = load_rows(query, here, H * K, K, K_BLOCK, K_LAST)
  do = load_rows(d_output, here, H * V, V, V_BLOCK, V_LAST)
  statistics = statistics_of(slots, here, top, inverse, share, drop, W)
  weights, by_logit = pairs_by_key(
    q, do, k, v, tables, start, begin, here, there, statistics,
    ROWS, TILE, K, V, K_BLOCK, K_LAST, V_BLOCK, V_LAST, LIMIT, SCALE, CAUSAL, LAST_RESORT,
    ZEROS_SEEN, MASKED, PRECISION,
  )  # fmt: skip
  d_v = add_weighted(d_v, weights, do, V_LAST, PRECISION)
  acc = add_weighted(acc, by_logit * SCALE, q, K_LAST, PRECISION)
  return acc, d_v


@triton.jit
def gradient_kernel(
  query, key, value, d_output, members, key_members, relative_keys, relative_values, top, inverse,
  share, drop,
  d_query_slots, d_key_slots, d_value_slots,
  T: tl.constexpr, H: tl.constexpr, C: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
  V: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
  K_BLOCK: tl.constexpr, K_LAST: tl.constexpr, V_BLOCK: tl.constexpr, V_LAST: tl.constexpr,
  LIMIT: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, SHARED: tl.constexpr,
  LAST_RESORT: tl.constexpr, ZEROS_SEEN: tl.constexpr, PRECISION: tl.constexpr,
  SHARED_KEY: tl.constexpr,
):  # fmt: skip
  """ROWS slots of a cluster as queries, then as keys: [B, H, C, W, K], V. The forward's grid.

  SHARED_KEY: query and key are one array; `d_query_slots` is the sum of both gradients.
  """
  block, token, slot = cluster_of((W + ROWS - 1) // ROWS, T, H, C, W)
  begin = block * ROWS
  rows = begin + tl.arange(0, ROWS)
  query += token * K
  key += token * K
  value += token * V
  d_output += token * V
  members += slot
  key_members += slot
  top += slot
  inverse += slot
  drop += slot
  share += tl.program_id(1).to(tl.int64) * T
  tables = (relative_keys, relative_values)
  here = member_tile(members, rows, W)
  q = load_rows(query, here, H * K, K, K_BLOCK, K_LAST)
  do = load_rows(d_output, here, H * V, V, V_BLOCK, V_LAST)
  statistics = statistics_of(rows, here, top, inverse, share, drop, W)
  acc = zero_rows(ROWS, K_BLOCK)
  free, end = key_range(begin, here, W, ROWS, TILE, SHARED, CAUSAL)
  for start in range(0, free, TILE):
    acc = add_query_gradient(
      acc, q, do, key, value, key_members, tables, begin, here, start, statistics,
      H, W, K, V, ROWS, TILE, K_BLOCK, K_LAST, V_BLOCK, V_LAST, LIMIT, SCALE, CAUSAL,
      LAST_RESORT, ZEROS_SEEN, False, PRECISION,
    )  # fmt: skip
  for start in range(free, end, TILE):
    acc = add_query_gradient(
      acc, q, do, key, value, key_members, tables, begin, here, start, statistics,
      H, W, K, V, ROWS, TILE, K_BLOCK, K_LAST, V_BLOCK, V_LAST, LIMIT, SCALE, CAUSAL,
      LAST_RESORT, ZEROS_SEEN, True, PRECISION,
    )  # fmt: skip
  target = d_query_slots
  if not SHARED_KEY:
    store_slots(d_query_slots + slot * K, rows, acc, W, K, K_BLOCK, K_LAST)
    acc = zero_rows(ROWS, K_BLOCK)
    target = d_key_slots

  there = here
  if not SHARED:
    there = member_tile(key_members, rows, W)
  k = q
  if not SHARED_KEY:
    k = load_rows(key, there, H * K, K, K_BLOCK, K_LAST)
  v = load_rows(value, there, H * V, V, V_BLOCK, V_LAST)
  d_v = zero_rows(ROWS, V_BLOCK)
  some = tl.max(there, 0) >= 0
  end = tl.where(some, (W + TILE - 1) // TILE * TILE, 0)
  first = begin if CAUSAL == "slot" else 0
  whole = tl.minimum(begin + ROWS, end) if CAUSAL == "slot" and SHARED else end
  for start in range(first, whole, TILE):
    acc, d_v = add_key_gradients(
      acc, d_v, k, v, query, d_output, members, tables, begin, there, start, top, inverse, share,
      drop, H, W, K, V, TILE, ROWS, K_BLOCK, K_LAST, V_BLOCK, V_LAST, LIMIT, SCALE, CAUSAL,
      LAST_RESORT, ZEROS_SEEN, True, PRECISION,
    )  # fmt: skip
  for start in range(whole, end, TILE):
    acc, d_v = add_key_gradients(
      acc, d_v, k, v, query, d_output, members, tables, begin, there, start, top, inverse, share,
      drop, H, W, K, V, TILE, ROWS, K_BLOCK, K_LAST, V_BLOCK, V_LAST, LIMIT, SCALE, CAUSAL,
      LAST_RESORT, ZEROS_SEEN, False, PRECISION,
    )  # fmt: skip
  store_slots(target + slot * K, rows, acc, W, K, K_BLOCK, K_LAST)
  store_slots(d_value_slots + slot * V, rows, d_v, W, V, V_BLOCK, V_LAST)


@triton.jit
def table_gradient_kernel(
  query, key, value, d_output, members, key_members, relative_keys, relative_values, top, inverse,
  share, drop,
  d_relative_keys, d_relative_values,
  T: tl.constexpr, H: tl.constexpr, C: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
  V: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
  K_BLOCK: tl.constexpr, K_LAST: tl.constexpr, V_BLOCK: tl.constexpr, V_LAST: tl.constexpr,
  LIMIT: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, SHARED: tl.constexpr,
  LAST_RESORT: tl.constexpr, ZEROS_SEEN: tl.constexpr, PRECISION: tl.constexpr,
  BATCH: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
  """Grid (splits, distances): all tiles of pairs whose keys lie so many tiles behind the queries.

  The rows of the tables that they need are the same, and their gradients stay in the program:
  float32 [distances, splits, 2 TILE, K], V. Distances count from FIRST; ROWS and TILE are equal.
  """
  split, splits = tl.program_id(0), tl.num_programs(0)
  behind = tl.program_id(1) + FIRST
  tiles: tl.constexpr = (W + TILE - 1) // TILE
  far_keys, near_keys = zero_rows(TILE, K_BLOCK), zero_rows(TILE, K_BLOCK)
  far_values, near_values = zero_rows(TILE, V_BLOCK), zero_rows(TILE, V_BLOCK)
  tables = (relative_keys, relative_values)
  lowest = tl.maximum(behind, 0)
  count = tl.minimum(tiles + behind, tiles) - lowest
  for item in range(split, BATCH * H * C * count, splits):
    cluster = (item // count).to(tl.int64)
    head, slot = cluster // C, cluster * W
    token = (head // H) * T * H + head % H
    query_start = (lowest + item % count) * ROWS
    key_start = query_start - behind * TILE
    slots = query_start + tl.arange(0, ROWS)
    here = member_tile(members + slot, slots, W)
    there = member_tile(key_members + slot, key_start + tl.arange(0, TILE), W)
    q = load_rows(query + token * K, here, H * K, K, K_BLOCK, K_LAST)
    do = load_rows(d_output + token * V, here, H * V, V, V_BLOCK, V_LAST)
    k = load_rows(key + token * K, there, H * K, K, K_BLOCK, K_LAST)
    v = load_rows(value + token * V, there, H * V, V, V_BLOCK, V_LAST)
    statistics = statistics_of(
      slots, here, top + slot, inverse + slot, share + head * T, drop + slot, W
    )
    weights, by_logit = pairs_by_key(
      q, do, k, v, tables, query_start, key_start, here, there, statistics,
      ROWS, TILE, K, V, K_BLOCK, K_LAST, V_BLOCK, V_LAST, LIMIT, SCALE, CAUSAL, LAST_RESORT,
      ZEROS_SEEN, True, PRECISION,
    )  # fmt: skip
    far, near = by_distance(by_logit, TILE, True)
    far_keys = add_weighted(far_keys, far, q, K_LAST, PRECISION)
    near_keys = add_weighted(near_keys, near, q, K_LAST, PRECISION)
    far, near = by_distance(weights, TILE, True)
    far_values = add_weighted(far_values, far, do, V_LAST, PRECISION)
    near_values = add_weighted(near_values, near, do, V_LAST, PRECISION)
  rows = tl.arange(0, TILE)
  end: tl.constexpr = 2 * TILE
  place = (tl.program_id(1) * splits + split).to(tl.int64) * end
  keys, values = d_relative_keys + place * K, d_relative_values + place * V
  store_slots(keys, rows, far_keys, end, K, K_BLOCK, K_LAST)
  store_slots(keys, TILE + rows, near_keys, end, K, K_BLOCK, K_LAST)
  store_slots(values, rows, far_values, end, V, V_BLOCK, V_LAST)
  store_slots(values, TILE + rows, near_values, end, V, V_BLOCK, V_LAST)
