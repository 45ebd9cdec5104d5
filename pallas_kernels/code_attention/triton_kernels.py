"""The forward kernels of label-wise attention for NVIDIA GPUs, and what the backward kernels share.

A program has a block of labels and goes over blocks of tokens with a running maximum. Weights are
2^((x - largest) SCALE), x the product of query and key: a scaled x would be rounded before the
difference is taken, or not, as the compiler likes, and large scores would not cancel between
kernels. Which blocks have real tokens is a list made beforehand: the loop has no branch that would
keep loads and products from overlapping, and every block that it meets has a finite maximum. Where
labels are few, several programs share the tokens of a document, and a second kernel joins what they
found.

Import this module only where a GPU is compiled for: it imports triton. Sizes are compile-time
constants (jax knows them), so strides need no arguments and aligned shapes need no masks.
"""

import triton
import triton.language as tl

from ..triton_tiles import load_tile, put_tile


@triton.jit
def load_rows(
  pointer, begin, SIZE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
  """[ROWS, BLOCK] of a [SIZE, DIM] array, from row `begin` on; what lies outside reads as 0."""
  return load_tile(
    pointer + begin * tl.full((), DIM, tl.int64), tl.arange(0, ROWS), tl.arange(0, BLOCK),
    SIZE - begin, 1, DIM, SIZE % ROWS == 0, DIM == BLOCK,
  )  # fmt: skip


@triton.jit
def put_rows(
  pointer, begin, x, SIZE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
  """The inverse of `load_rows`; rounds."""
  put_tile(
    pointer + begin * tl.full((), DIM, tl.int64), tl.arange(0, ROWS), tl.arange(0, BLOCK), x,
    SIZE - begin, 1, DIM, SIZE % ROWS == 0, DIM == BLOCK,
  )  # fmt: skip


@triton.jit
def share_of_blocks(
  filled, batch, split, T: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
  MASKED: tl.constexpr,
):  # fmt: skip
  """Range of a document's blocks with real tokens that are a split's."""
  count = (T + TILE - 1) // TILE
  if MASKED:
    count = tl.load(filled + batch)
  return count * split // SPLITS, count * (split + 1) // SPLITS


@triton.jit
def block_start(blocks, index, TILE: tl.constexpr, MASKED: tl.constexpr):
  """First token of a block with real tokens."""
  if MASKED:
    return tl.load(blocks + index) * TILE
  return index * TILE


@triton.jit
def scores(
  q, k, real, start, T: tl.constexpr, TILE: tl.constexpr, SIGN: tl.constexpr,
  MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """Products of queries and keys, [ROWS, TILE], with the scale's sign; -inf where nothing is."""
  x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
  if SIGN != 1:
    x *= SIGN
  slots = start + tl.arange(0, TILE)
  if MASKED:
    seen = tl.load(real + slots, mask=slots < T, other=0) != 0
    x = tl.where(seen[None, :], x, -float("inf"))
  elif T % TILE != 0:
    x = tl.where((slots < T)[None, :], x, -float("inf"))
  return x


@triton.jit
def put_results(
  output, top, inverse, place, begin, acc, largest, summed,
  L: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, V_BLOCK: tl.constexpr,
  STATISTICS: tl.constexpr,
):  # fmt: skip
  """Stores rows: sums over weights, and with STATISTICS what makes weights of scores."""
  rows = begin + tl.arange(0, ROWS)
  some = summed > 0.0
  divisor = tl.where(some, summed, 1.0)
  put_rows(output + place * L * V, begin, acc / divisor[:, None], L, V, ROWS, V_BLOCK)
  if STATISTICS:
    tl.store(top + place * L + rows, largest, mask=rows < L)
    tl.store(inverse + place * L + rows, tl.where(some, 1.0 / divisor, 0.0), mask=rows < L)


@triton.jit
def forward_kernel(
  query, key, value, real, blocks, filled,
  output, top, inverse,
  L: tl.constexpr, T: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
  TILE: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
  SIGN: tl.constexpr, SCALE: tl.constexpr, MASKED: tl.constexpr, STATISTICS: tl.constexpr,
  PRECISION: tl.constexpr,
):  # fmt: skip
  """What labels read from a split of a document's tokens: grid (label blocks, B * SPLITS).

  `real` is [B, T]; `blocks` [B, T / TILE] has those with real tokens first, `filled` [B] says how
  many they are. One split: `output` [B, L, V], and with STATISTICS `top`, the largest product, and
  `inverse`, 1 / the sum of weights, [B, L]; 0, -inf and 0 without tokens. Several: [B, SPLITS, ...]
  of weighted sums that are not divided, top, and sums of weights.
  """
  begin = tl.program_id(0) * ROWS
  place = tl.program_id(1).to(tl.int64)
  batch = place // SPLITS
  low, high = share_of_blocks(filled, batch, place % SPLITS, T, TILE, SPLITS, MASKED)
  real += batch * T
  blocks += batch * ((T + TILE - 1) // TILE)
  key += batch * T * K
  value += batch * T * V
  q = load_rows(query, begin, L, K, ROWS, K_BLOCK)
  largest = tl.full((ROWS,), -float("inf"), tl.float32)
  summed = tl.zeros((ROWS,), tl.float32)
  acc = tl.zeros((ROWS, V_BLOCK), tl.float32)
  for index in range(low.to(tl.int32), high.to(tl.int32)):
    start = block_start(blocks, index, TILE, MASKED)
    k = load_rows(key, start, T, K, TILE, K_BLOCK)
    v = load_rows(value, start, T, V, TILE, V_BLOCK)
    x = scores(q, k, real, start, T, TILE, SIGN, MASKED, PRECISION)
    larger = tl.maximum(largest, tl.max(x, 1))
    shrink = tl.exp2((largest - larger) * SCALE)
    weights = tl.exp2((x - larger[:, None]) * SCALE)
    summed = summed * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    largest = larger
  if SPLITS == 1:
    put_results(
      output, top, inverse, place, begin, acc, largest, summed, L, V, ROWS, V_BLOCK, STATISTICS
    )
  else:
    rows = begin + tl.arange(0, ROWS)
    put_rows(output + place * L * V, begin, acc, L, V, ROWS, V_BLOCK)
    tl.store(top + place * L + rows, largest, mask=rows < L)
    tl.store(inverse + place * L + rows, summed, mask=rows < L)


@triton.jit
def join_kernel(
  parts, part_top, part_sum,
  output, top, inverse,
  L: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, V_BLOCK: tl.constexpr,
  SPLITS: tl.constexpr, SCALE: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
  """Joins what splits of a document gave: grid (label blocks, B)."""
  begin = tl.program_id(0) * ROWS
  batch = tl.program_id(1).to(tl.int64)
  rows = begin + tl.arange(0, ROWS)
  part_top += batch * SPLITS * L + rows
  part_sum += batch * SPLITS * L + rows
  largest = tl.full((ROWS,), -float("inf"), tl.float32)
  for split in range(SPLITS):
    theirs = tl.load(part_top + split * L, mask=rows < L, other=-float("inf"))
    largest = tl.maximum(largest, theirs)
  finite = tl.where(largest == -float("inf"), 0.0, largest)
  summed = tl.zeros((ROWS,), tl.float32)
  acc = tl.zeros((ROWS, V_BLOCK), tl.float32)
  for split in range(SPLITS):
    theirs = tl.load(part_top + split * L, mask=rows < L, other=-float("inf"))
    shrink = tl.exp2((theirs - finite) * SCALE)
    summed += shrink * tl.load(part_sum + split * L, mask=rows < L, other=0.0)
    part = load_rows(parts + (batch * SPLITS + split) * L * V, begin, L, V, ROWS, V_BLOCK)
    acc += shrink[:, None] * part
  put_results(
    output, top, inverse, batch, begin, acc, largest, summed, L, V, ROWS, V_BLOCK, STATISTICS
  )
