"""The backward kernels of softplus attention for NVIDIA GPUs.

With W the weights and dW = do . v, the gradient of the score of a pair is, both stages together,

    ds = c sigmoid(s) (p W / g (dW - D) + L)      D = sum W dW
    L = -O / N sum p W / g (dW - D)

g the excess over the mean, and L a number per row for every key that the row sees, below the mean
too; epsilons add to it. LSSA: ds = c sigmoid(s) (dW - D) / Z. D is summed from the same products
that it is subtracted from: in a row of one large weight the two are equal, which a sum over the
rounded output would not be.

The kernel of the rows goes over the keys once for D and L, and once for the gradient of the query;
the kernel of the keys goes over the rows. No sum is shared between programs, so that results are
the same in every run.

Import this module only where a GPU is compiled for: it imports triton.
"""

import triton
import triton.language as tl

from ..triton_tiles import load_tile, put_tile
from .triton_kernels import (
  documents_of_keys,
  first_stage,
  hide,
  keys_of_rows,
  load_keys,
  powers,
  products,
  row_block,
  second_total,
  softplus,
  softplus_and_slope,
)


@triton.jit
def pair_tile(
  q, do, key, value, start, positions, own, c, documents, free, whole,
  S: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr,
  K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr, ALWAYS: tl.constexpr,
  PRECISION: tl.constexpr,
):  # fmt: skip
  """(scores in base 2, do . v, keys) of the rows and a tile of keys."""
  slots = tl.arange(0, TILE)
  k = load_keys(key, start, S, G, K, TILE, K_BLOCK)
  v = load_keys(value, start, S, G, V, TILE, V_BLOCK)
  x = products(q, k, PRECISION) * c[:, None]  # [ROWS, TILE]
  if ALWAYS or (start < free) | (start >= whole):
    theirs = documents_of_keys(documents, start + slots, S, DOCUMENTS)
    x = hide(
      x, (start + slots)[None, :], positions[:, None], theirs[None, :], own[:, None], DOCUMENTS
    )  # fmt: skip
  return x, products(do, v, PRECISION), k


@triton.jit
def add_row_sums(
  state, x, by_weight, taken, rise,
  WHOLE: tl.constexpr, POWER: tl.constexpr, DEGREE: tl.constexpr,
):  # fmt: skip
  """One tile: `state` is sums over the keys of weights and of t^(p-1), both also times dW."""
  total, weighted, lower_total, lower_weighted = state
  weights = softplus(x, DEGREE)
  if POWER > 0:
    excess = tl.maximum(weights - taken[:, None], 0.0) * rise[:, None]
    lower, weights = powers(excess, WHOLE, POWER)
    lower_total += tl.sum(lower, 1)
    lower_weighted += tl.sum(lower * by_weight, 1)
  total += tl.sum(weights, 1)
  weighted += tl.sum(weights * by_weight, 1)
  return total, weighted, lower_total, lower_weighted


@triton.jit
def score_gradient(
  x, by_weight, c, taken, rise, share, drop, lift,
  WHOLE: tl.constexpr, POWER: tl.constexpr, DEGREE: tl.constexpr,
):  # fmt: skip
  """(gradient of the products q . k, weights); the arguments of rows broadcast against x."""
  a, slope = softplus_and_slope(x, DEGREE)
  if POWER > 0:
    lower, raised = powers(tl.maximum(a - taken, 0.0) * rise, WHOLE, POWER)
    pulled = lower * (POWER * c * rise * share) * (by_weight - drop)
    return slope * (pulled + c * lift), raised * share
  return slope * (c * share) * (by_weight - drop), a * share


@triton.jit
def row_gradient_kernel(
  query, key, value, scale, count, documents, first, total, rise, d_output,
  d_query, taken, share, drop, lift,
  T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
  V: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, K_BLOCK: tl.constexpr,
  V_BLOCK: tl.constexpr, WHOLE: tl.constexpr, POWER: tl.constexpr, OFFSET: tl.constexpr,
  SKIP: tl.constexpr, EPSILON: tl.constexpr, EPS_FIRST: tl.constexpr, EPS_SECOND: tl.constexpr,
  DEGREE: tl.constexpr, SHARED_COUNT: tl.constexpr, DOCUMENTS: tl.constexpr,
  ALWAYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """The query's gradient, and of each row what the keys' gradients need: the forward's grid.

  `taken` O m, `share` 1 / what the weights are divided by, `drop` D, `lift` L: [B, H, T].
  """
  begin, head = row_block(T, H, ROWS)
  batch = tl.program_id(1).to(tl.int64)
  rows = begin + tl.arange(0, ROWS)
  inside = rows < T
  positions = rows + (S - T)
  shared = 0 if SHARED_COUNT else batch * T
  documents += batch * S
  key += (batch * S * G + head // (H // G)) * K
  value += (batch * S * G + head // (H // G)) * V
  here = (batch * T + begin) * H + head
  left = T - begin
  q = load_tile(
    query + here * K, tl.arange(0, ROWS), tl.arange(0, K_BLOCK), left, H, K,
    T % ROWS == 0, K == K_BLOCK,
  )  # fmt: skip
  do = load_tile(
    d_output + here * V, tl.arange(0, ROWS), tl.arange(0, V_BLOCK), left, H, V,
    T % ROWS == 0, V == V_BLOCK,
  )  # fmt: skip
  c = tl.load(scale + shared + rows, mask=inside, other=0.0)
  n = tl.load(count + shared + rows, mask=inside, other=1.0)
  row = (batch * H + head) * T + rows
  divisor = tl.load(total + row, mask=inside, other=1.0)
  own, low, free, whole, stop = keys_of_rows(
    begin, rows, documents, first + batch * T, T, S, ROWS, TILE, DOCUMENTS
  )
  zeros = tl.zeros((ROWS,), tl.float32)
  mean, off, up, gam = zeros, zeros, zeros, zeros
  if POWER > 0:
    divisor, mean, off = first_stage(divisor, n, "none", 0.0, SKIP, OFFSET)
    up = tl.load(rise + row, mask=inside, other=0.0)

  state = (zeros, zeros, zeros, zeros)
  for start in range(low, stop, TILE):
    x, by_weight, _ = pair_tile(
      q, do, key, value, start, positions, own, c, documents, free, whole,
      S, G, K, V, TILE, K_BLOCK, V_BLOCK, DOCUMENTS, ALWAYS, PRECISION,
    )  # fmt: skip
    state = add_row_sums(state, x, by_weight, off, up, WHOLE, POWER, DEGREE)
  summed, weighted, lower, lower_weighted = state
  constant = divisor <= EPS_FIRST  # a clamped first stage: its sum has no gradient
  if POWER > 0:
    last, part = second_total(summed, mean, up, EPSILON, EPS_SECOND, POWER)
    inverse = 1.0 / last
    full = weighted * inverse
    d = tl.where(part == 1.0, 0.0, full) if EPSILON == "clamp" else full
    gam = (-OFFSET * POWER) * up * inverse * (lower_weighted - d * lower)
    gam = tl.where(n <= SKIP, 0.0, gam)
    if EPSILON != "none":
      gam = gam - POWER * full * part / mean
    gam = gam / n
    if EPSILON == "clamp":
      gam = tl.where(constant, 0.0, gam)
    tl.store(taken + row, off, mask=inside)
    tl.store(lift + row, gam, mask=inside)
  else:
    inverse = 1.0 / divisor
    d = weighted * inverse
    if EPSILON == "clamp":
      d = tl.where(constant, 0.0, d)
  tl.store(share + row, inverse, mask=inside)
  tl.store(drop + row, d, mask=inside)

  dq = tl.zeros((ROWS, K_BLOCK), tl.float32)
  for start in range(low, stop, TILE):
    x, by_weight, k = pair_tile(
      q, do, key, value, start, positions, own, c, documents, free, whole,
      S, G, K, V, TILE, K_BLOCK, V_BLOCK, DOCUMENTS, ALWAYS, PRECISION,
    )  # fmt: skip
    ds, _ = score_gradient(
      x, by_weight, c[:, None], off[:, None], up[:, None], inverse[:, None], d[:, None],
      gam[:, None], WHOLE, POWER, DEGREE,
    )  # fmt: skip
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
  put_tile(
    d_query + here * K, tl.arange(0, ROWS), tl.arange(0, K_BLOCK), dq, left, H, K,
    T % ROWS == 0, K == K_BLOCK,
  )  # fmt: skip


@triton.jit
def turned_products(a, b, PRECISION: tl.constexpr):
  """b a^T, every entry added up like that of a b^T: what cancels in one must in the other."""
  if PRECISION == "tf32x3":  # of whose products two are not the same the other way round
    return tl.trans(products(a, b, PRECISION))
  return products(b, a, PRECISION)


@triton.jit
def add_rows(
  state, k, v, slots, theirs, query, d_output, scale, documents, rise, taken, share, drop, lift,
  batch, head, start, stop,
  T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
  ROWS: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, WHOLE: tl.constexpr,
  POWER: tl.constexpr, DEGREE: tl.constexpr, DOCUMENTS: tl.constexpr, ALWAYS: tl.constexpr,
  PRECISION: tl.constexpr,
):  # fmt: skip
  """One block of rows: `state` is the gradients of (keys, values), [TILE, ...]."""
  dk, dv = state
  rows = start + tl.arange(0, ROWS)
  inside = rows < T
  here = (batch * T + start) * H + head
  row = (batch * H + head) * T + rows
  # What lies outside reads as 0, and so do its weights and gradients.
  q = load_tile(
    query + here * K, tl.arange(0, ROWS), tl.arange(0, K_BLOCK), T - start, H, K,
    T % ROWS == 0, K == K_BLOCK,
  )  # fmt: skip
  do = load_tile(
    d_output + here * V, tl.arange(0, ROWS), tl.arange(0, V_BLOCK), T - start, H, V,
    T % ROWS == 0, V == V_BLOCK,
  )  # fmt: skip
  c = tl.load(scale + rows, mask=inside, other=0.0)
  inverse = tl.load(share + row, mask=inside, other=0.0)
  d = tl.load(drop + row, mask=inside, other=0.0)
  off, up, gam = inverse, inverse, inverse
  if POWER > 0:
    off = tl.load(taken + row, mask=inside, other=0.0)
    up = tl.load(rise + row, mask=inside, other=0.0)
    gam = tl.load(lift + row, mask=inside, other=0.0)
  own = rows
  if DOCUMENTS:
    own = tl.load(documents + (S - T) + rows, mask=inside, other=-3)
  x = turned_products(q, k, PRECISION) * c[None, :]  # [TILE, ROWS]
  if DOCUMENTS or ALWAYS or start + (S - T) < stop - 1:  # the first row does not see the last key
    x = hide(x, slots[:, None], (rows + (S - T))[None, :], theirs[:, None], own[None, :], DOCUMENTS)
  by_weight = turned_products(do, v, PRECISION)
  ds, weights = score_gradient(
    x, by_weight, c[None, :], off[None, :], up[None, :], inverse[None, :], d[None, :],
    gam[None, :], WHOLE, POWER, DEGREE,
  )  # fmt: skip
  dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
  return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit
def key_gradient_kernel(
  query, key, value, scale, documents, stop, rise, d_output, taken, share, drop, lift,
  d_key, d_value,
  T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
  V: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, K_BLOCK: tl.constexpr,
  V_BLOCK: tl.constexpr, WHOLE: tl.constexpr, POWER: tl.constexpr, DEGREE: tl.constexpr,
  SHARED_COUNT: tl.constexpr, DOCUMENTS: tl.constexpr, ALWAYS: tl.constexpr,
  PRECISION: tl.constexpr,
):  # fmt: skip
  """Gradients of keys and values, summed over the query heads of each: grid (key tiles * G, B).

  The first keys, which most rows see, come first.
  """
  group = tl.program_id(0) % G
  batch = tl.program_id(1).to(tl.int64)
  begin = tl.program_id(0) // G * TILE
  slots = begin + tl.arange(0, TILE)
  scale += 0 if SHARED_COUNT else batch * T
  documents += batch * S
  here = (batch * S + begin) * G + group
  k = load_tile(
    key + here * K, tl.arange(0, TILE), tl.arange(0, K_BLOCK), S - begin, G, K,
    S % TILE == 0, K == K_BLOCK,
  )  # fmt: skip
  v = load_tile(
    value + here * V, tl.arange(0, TILE), tl.arange(0, V_BLOCK), S - begin, G, V,
    S % TILE == 0, V == V_BLOCK,
  )  # fmt: skip
  low = tl.maximum(begin - (S - T), 0) // ROWS * ROWS
  high = T
  if DOCUMENTS:
    high = tl.max(tl.load(stop + batch * S + slots, mask=slots < S, other=0))
  blocks = tl.maximum((high - low + ROWS - 1) // ROWS, 0)
  theirs = documents_of_keys(documents, slots, S, DOCUMENTS)
  state = (tl.zeros((TILE, K_BLOCK), tl.float32), tl.zeros((TILE, V_BLOCK), tl.float32))
  for step in range(blocks * (H // G)):
    turn = 0 if H == G else step // blocks
    state = add_rows(
      state, k, v, slots, theirs, query, d_output, scale, documents, rise, taken, share, drop, lift,
      batch, group * (H // G) + turn, low + (step - turn * blocks) * ROWS, begin + TILE,
      T, S, H, K, V, ROWS, K_BLOCK, V_BLOCK, WHOLE, POWER, DEGREE, DOCUMENTS, ALWAYS, PRECISION,
    )  # fmt: skip
  dk, dv = state
  put_tile(
    d_key + here * K, tl.arange(0, TILE), tl.arange(0, K_BLOCK), dk, S - begin, G, K,
    S % TILE == 0, K == K_BLOCK,
  )  # fmt: skip
  put_tile(
    d_value + here * V, tl.arange(0, TILE), tl.arange(0, V_BLOCK), dv, S - begin, G, V,
    S % TILE == 0, V == V_BLOCK,
  )  # fmt: skip
