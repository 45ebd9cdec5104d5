"""The backward kernels of label-wise attention for NVIDIA GPUs.

With w the weights of a label's row and dw = do . v, the gradient of a score is w (dw - D), where
D = sum w dw = do . r, r the output before it was rounded: where one token has all the weight the
two are equal. The kernel of the queries goes over documents and their tokens, the kernel of the
tokens over labels. No sum is shared between programs, so that results are the same in every run.

Import this module only where a GPU is compiled for: it imports triton.
"""

import triton
import triton.language as tl

from .triton_kernels import block_start, load_rows, put_rows, scores, share_of_blocks


@triton.jit
def query_gradient_kernel(
  query, key, value, real, blocks, filled, wide, lse, d_output,
  d_query, drop,
  B: tl.constexpr, L: tl.constexpr, T: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
  ROWS: tl.constexpr, TILE: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
  SPLITS: tl.constexpr, PARTS: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr,
  MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """Gradients of the queries, summed over some documents: grid (label blocks, PARTS * SPLITS).

  A part has every PARTS-th document, a split some of their tokens: `d_query` is [PARTS * SPLITS, L,
  K] in float32. `drop` is D, [B, L]. SCALE is FACTOR, that of the scores, in base 2.
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
    result = load_rows(wide + batch * L * V, begin, L, V, ROWS, V_BLOCK)
    d = tl.sum(do.to(tl.float32) * result, 1)
    tl.store(drop + batch * L + rows, d, mask=rows < tl.where(split == 0, L, 0))
    log = tl.load(lse + batch * L + rows, mask=rows < L, other=float("inf"))
    for index in range(low, high):
      start = block_start(blocks + batch * ((T + TILE - 1) // TILE), index, TILE, MASKED)
      k = load_rows(key + batch * T * K, start, T, K, TILE, K_BLOCK)
      v = load_rows(value + batch * T * V, start, T, V, TILE, V_BLOCK)
      x = scores(q, k, real + batch * T, start, T, TILE, SCALE, MASKED, PRECISION)
      by_weight = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [ROWS, TILE]
      ds = tl.exp2(x - log[:, None]) * (by_weight - d[:, None])
      dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
  place = tl.program_id(1).to(tl.int64)
  put_rows(d_query + place * L * K, begin, dq * FACTOR, L, K, ROWS, K_BLOCK)


@triton.jit
def token_gradient_kernel(
  query, key, value, real, lse, d_output, drop,
  d_key, d_value,
  L: tl.constexpr, T: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
  TILE: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, SCALE: tl.constexpr,
  FACTOR: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
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
  d_output += batch * L * V
  lse += batch * L
  drop += batch * L
  dk = tl.zeros((TILE, K_BLOCK), tl.float32)
  dv = tl.zeros((TILE, V_BLOCK), tl.float32)
  for start in range(0, labels, ROWS):
    rows = start + tl.arange(0, ROWS)
    q = load_rows(query, start, L, K, ROWS, K_BLOCK)
    do = load_rows(d_output, start, L, V, ROWS, V_BLOCK)
    log = tl.load(lse + rows, mask=rows < L, other=float("inf"))  # no weights beyond the last
    d = tl.load(drop + rows, mask=rows < L, other=0.0)
    x = tl.dot(k, tl.trans(q), input_precision=PRECISION) * SCALE  # [TILE, ROWS]
    weights = tl.exp2(x - log[None, :])
    dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
    by_weight = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = weights * (by_weight - d[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
  dk = tl.where(seen[:, None], dk * FACTOR, 0.0)
  dv = tl.where(seen[:, None], dv, 0.0)
  put_rows(d_key + batch * T * K, begin, dk, T, K, TILE, K_BLOCK)
  put_rows(d_value + batch * T * V, begin, dv, T, V, TILE, V_BLOCK)
