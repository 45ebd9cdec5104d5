"""The backward kernels of label-wise attention for NVIDIA GPUs.

With w the weights of a label's row and dw = do . v, the gradient of a score is w (dw - D), where
D = sum w dw. D is summed from the same products that it is subtracted from: where one token has all
the weight the two are equal, which do . output would not be.

Three kernels: D, and the gradient of the queries, go over tokens; the gradients of the tokens go
over labels. No sum is shared between programs, so that results are the same in every run.

Import this module only where a GPU is compiled for: it imports triton.
"""

import triton
import triton.language as tl

from .triton_kernels import block_start, load_rows, put_rows, scores, share_of_blocks


@triton.jit
def load_label(pointer, rows, L: tl.constexpr):
  """One number per label of a block; 0 beyond the last, which leaves it without weights."""
  return tl.load(pointer + rows, mask=rows < L, other=0.0)


@triton.jit
def load_drop(part_drop, batch, rows, L: tl.constexpr, DROPS: tl.constexpr):
  """D, summed over the splits of a document's tokens."""
  drop = load_label(part_drop + batch * DROPS * L, rows, L)
  for split in tl.static_range(1, DROPS):
    drop += load_label(part_drop + (batch * DROPS + split) * L, rows, L)
  return drop


@triton.jit
def weights_of(x, largest, share, SCALE: tl.constexpr):
  """Of the forward pass; `largest` and `share`, those of labels, broadcast against x."""
  return tl.exp2((x - largest) * SCALE) * share


@triton.jit
def drop_kernel(
  query, key, value, real, blocks, filled, top, inverse, d_output,
  part_drop,
  L: tl.constexpr, T: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
  TILE: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
  SIGN: tl.constexpr, SCALE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """D, [B, SPLITS, L], of splits of a document's tokens: grid (label blocks, B * SPLITS)."""
  begin = tl.program_id(0) * ROWS
  place = tl.program_id(1).to(tl.int64)
  batch = place // SPLITS
  low, high = share_of_blocks(filled, batch, place % SPLITS, T, TILE, SPLITS, MASKED)
  rows = begin + tl.arange(0, ROWS)
  real += batch * T
  blocks += batch * ((T + TILE - 1) // TILE)
  key += batch * T * K
  value += batch * T * V
  q = load_rows(query, begin, L, K, ROWS, K_BLOCK)
  do = load_rows(d_output + batch * L * V, begin, L, V, ROWS, V_BLOCK)
  largest = load_label(top + batch * L, rows, L)
  share = load_label(inverse + batch * L, rows, L)
  total = tl.zeros((ROWS,), tl.float32)
  for index in range(low.to(tl.int32), high.to(tl.int32)):
    start = block_start(blocks, index, TILE, MASKED)
    k = load_rows(key, start, T, K, TILE, K_BLOCK)
    v = load_rows(value, start, T, V, TILE, V_BLOCK)
    x = scores(q, k, real, start, T, TILE, SIGN, MASKED, PRECISION)
    by_weight = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [ROWS, TILE]
    total += tl.sum(weights_of(x, largest[:, None], share[:, None], SCALE) * by_weight, 1)
  tl.store(part_drop + place * L + rows, total, mask=rows < L)


@triton.jit
def query_gradient_kernel(
  query, key, value, real, blocks, filled, top, inverse, d_output, part_drop,
  d_query,
  B: tl.constexpr, L: tl.constexpr, T: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
  ROWS: tl.constexpr, TILE: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
  SPLITS: tl.constexpr, PARTS: tl.constexpr, DROPS: tl.constexpr, SIGN: tl.constexpr,
  SCALE: tl.constexpr, FACTOR: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """Gradients of the queries, summed over some documents: grid (label blocks, PARTS * SPLITS).

  A part has every PARTS-th document, a split some of their tokens: `d_query` is [PARTS * SPLITS, L,
  K] in float32. FACTOR is the scale of the scores, SCALE its size in base 2.
  """
  begin = tl.program_id(0) * ROWS
  part = tl.program_id(1) // SPLITS
  split = tl.program_id(1) % SPLITS
  rows = begin + tl.arange(0, ROWS)
  q = load_rows(query, begin, L, K, ROWS, K_BLOCK)
  dq = tl.zeros((ROWS, K_BLOCK), tl.float32)
  for turn in range((B + PARTS - 1) // PARTS):
    document = part + turn * PARTS
    batch = tl.minimum(document, B - 1).to(tl.int64)
    low, high = share_of_blocks(filled, batch, split, T, TILE, SPLITS, MASKED)
    high = tl.where(document < B, high, low)
    do = load_rows(d_output + batch * L * V, begin, L, V, ROWS, V_BLOCK)
    largest = load_label(top + batch * L, rows, L)
    share = load_label(inverse + batch * L, rows, L)
    d = load_drop(part_drop, batch, rows, L, DROPS)
    for index in range(low, high):
      start = block_start(blocks + batch * ((T + TILE - 1) // TILE), index, TILE, MASKED)
      k = load_rows(key + batch * T * K, start, T, K, TILE, K_BLOCK)
      v = load_rows(value + batch * T * V, start, T, V, TILE, V_BLOCK)
      x = scores(q, k, real + batch * T, start, T, TILE, SIGN, MASKED, PRECISION)
      by_weight = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [ROWS, TILE]
      ds = weights_of(x, largest[:, None], share[:, None], SCALE) * (by_weight - d[:, None])
      dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
  place = tl.program_id(1).to(tl.int64)
  put_rows(d_query + place * L * K, begin, dq * FACTOR, L, K, ROWS, K_BLOCK)


@triton.jit
def turned_products(a, b, PRECISION: tl.constexpr):
  """b a^T, every entry added up like that of a b^T: what cancels in one must in the other."""
  if PRECISION == "tf32x3":  # of whose products two are not the same the other way round
    return tl.trans(tl.dot(a, tl.trans(b), input_precision=PRECISION))
  return tl.dot(b, tl.trans(a), input_precision=PRECISION)


@triton.jit
def token_gradient_kernel(
  query, key, value, real, top, inverse, d_output, part_drop,
  d_key, d_value,
  L: tl.constexpr, T: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
  TILE: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, DROPS: tl.constexpr,
  SIGN: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, MASKED: tl.constexpr,
  PRECISION: tl.constexpr,
):  # fmt: skip
  """Gradients of keys and values, summed over the labels: grid (token blocks, B).

  Tokens do not meet here, so that those that are not real may be computed and then set to 0.
  """
  begin = tl.program_id(0) * TILE
  batch = tl.program_id(1).to(tl.int64)
  slots = begin + tl.arange(0, TILE)
  seen = slots < T
  if MASKED:
    seen &= tl.load(real + batch * T + slots, mask=slots < T, other=0) != 0
  labels = tl.where(tl.max(seen.to(tl.int32), 0) > 0, L, 0)
  k = load_rows(key + batch * T * K, begin, T, K, TILE, K_BLOCK)
  v = load_rows(value + batch * T * V, begin, T, V, TILE, V_BLOCK)
  dk = tl.zeros((TILE, K_BLOCK), tl.float32)
  dv = tl.zeros((TILE, V_BLOCK), tl.float32)
  for start in range(0, labels, ROWS):
    rows = start + tl.arange(0, ROWS)
    q = load_rows(query, start, L, K, ROWS, K_BLOCK)
    do = load_rows(d_output + batch * L * V, start, L, V, ROWS, V_BLOCK)
    largest = load_label(top + batch * L, rows, L)
    share = load_label(inverse + batch * L, rows, L)
    d = load_drop(part_drop, batch, rows, L, DROPS)
    x = turned_products(q, k, PRECISION)  # [TILE, ROWS]
    if SIGN != 1:
      x *= SIGN
    weights = weights_of(x, largest[None, :], share[None, :], SCALE)
    dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
    by_weight = turned_products(do, v, PRECISION)
    ds = weights * (by_weight - d[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
  dk = tl.where(seen[:, None], dk * FACTOR, 0.0)
  dv = tl.where(seen[:, None], dv, 0.0)
  put_rows(d_key + batch * T * K, begin, dk, T, K, TILE, K_BLOCK)
  put_rows(d_value + batch * T * V, begin, dv, T, V, TILE, V_BLOCK)
