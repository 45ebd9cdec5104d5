"""The forward kernel of softplus attention for NVIDIA GPUs, and what the backward kernels share.

Softplus is taken in base 2: with x = s log2(e), A = log2(1 + 2^x) is softplus(s) / ln 2, and the
rows' divisions take the factor out again. Writing y = 2^-|x|, A = max(x, 0) + log2(1 + y); the
logarithm is y times a polynomial. That is one special function per pair, and exact also where y is
small, where log2 of the rounded 1 + y would be all error.

Import this module only where a GPU is compiled for: it imports triton. Sizes are compile-time
constants (jax knows them), so strides need no arguments and aligned shapes need no masks.
"""

import triton
import triton.language as tl

from ..triton_tiles import load_tile, put_tile


@triton.jit
def log2_of_one_plus(y, DEGREE: tl.constexpr):
  """log2(1 + y) for y in [0, 1]: y times the polynomial of least relative error.

  Errors: degree 3 4e-4, 4 6e-5, 6 1.4e-6, 8 1.8e-7, that of float32.
  """
  if DEGREE == 8:
    p = 0.00754918 * y - 0.042567052
    p = p * y + 0.11285618
    p = p * y - 0.19711895
    p = p * y + 0.2756414
    p = p * y - 0.35840848
    p = p * y + 0.48069295
    p = p * y - 0.7213402
    p = p * y + 1.442695
  elif DEGREE == 6:
    p = 0.02040118 * y - 0.09579753
    p = p * y + 0.21528453
    p = p * y - 0.339089
    p = p * y + 0.47766837
    p = p * y - 0.72115946
    p = p * y + 1.4426932
  elif DEGREE == 4:
    p = 0.05965153 * y - 0.22711942
    p = p * y + 0.44189882
    p = p * y - 0.71698743
    p = p * y + 1.4426132
  else:
    p = 0.36648059 - 0.10725441 * y
    p = p * y - 0.70174725
    p = p * y + 1.4421281
  return p * y


@triton.jit
def softplus(x, DEGREE: tl.constexpr):
  """log2(1 + 2^x); 0 for -inf."""
  return tl.maximum(x, 0.0) + log2_of_one_plus(tl.exp2(-tl.abs(x)), DEGREE)


@triton.jit
def softplus_and_slope(x, DEGREE: tl.constexpr):
  """(log2(1 + 2^x), its derivative, the sigmoid of the score); 0 and 0 for -inf."""
  log = log2_of_one_plus(tl.exp2(-tl.abs(x)), DEGREE)
  return tl.maximum(x, 0.0) + log, tl.exp2(tl.minimum(x, 0.0) - log)


@triton.jit
def whole_power(x, P: tl.constexpr):
  """x^P by squaring; a factor 3 of P first, for the fewest products for 15."""
  square = x
  rest: tl.constexpr = P // 3 if P % 3 == 0 else P
  if P % 3 == 0:
    square = x * x * x
  result = square
  for bit in tl.static_range(10):
    if (rest >> bit) & 1:
      if rest % (1 << bit) == 0:  # the first factor
        result = square
      else:
        result = result * square
    if (rest >> bit) > 1:
      square = square * square
  return result


@triton.jit
def power(t, WHOLE: tl.constexpr, POWER: tl.constexpr):
  """t^POWER for t >= 0; WHOLE is POWER if it is a whole number, else 0."""
  if WHOLE > 0:
    return whole_power(t, WHOLE)
  return tl.where(t > 0.0, tl.exp2(POWER * tl.log2(tl.where(t > 0.0, t, 1.0))), 0.0)


@triton.jit
def powers(t, WHOLE: tl.constexpr, POWER: tl.constexpr):
  """(t^(POWER - 1), t^POWER); both 0 for t = 0."""
  if WHOLE > 1:
    lower = whole_power(t, WHOLE - 1)
    return lower, lower * t
  if WHOLE == 1:
    return tl.where(t > 0.0, 1.0, 0.0), t
  log = tl.log2(tl.where(t > 0.0, t, 1.0))
  lower = tl.where(t > 0.0, tl.exp2((POWER - 1) * log), 0.0)
  return lower, lower * t


@triton.jit
def products(a, b, PRECISION: tl.constexpr):
  """a b^T in float32."""
  return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def documents_of_keys(documents, slots, S: tl.constexpr, DOCUMENTS: tl.constexpr):
  if DOCUMENTS:
    return tl.load(documents + slots, mask=slots < S, other=-2)
  return slots


@triton.jit
def hide(x, slots, positions, theirs, own, DOCUMENTS: tl.constexpr):
  """x, -inf where a query does not see a key; slots and documents of both broadcast against x."""
  seen = slots <= positions
  if DOCUMENTS:
    seen &= theirs == own
  return tl.where(seen, x, -float("inf"))


@triton.jit
def first_stage(
  summed, count, EPSILON: tl.constexpr, EPS_FIRST: tl.constexpr, SKIP: tl.constexpr,
  OFFSET: tl.constexpr,
):  # fmt: skip
  """(what the first stage divides by, mean, what is taken off) of rows; EPS_FIRST is in base 2."""
  if EPSILON == "add":
    summed += EPS_FIRST
  elif EPSILON == "clamp":
    summed = tl.maximum(summed, EPS_FIRST)
  total = tl.where(summed > 0.0, summed, 1.0)
  mean = total / count
  return total, mean, tl.where(count <= SKIP, 0.0, OFFSET) * mean


@triton.jit
def second_total(
  summed, mean, rise, EPSILON: tl.constexpr, EPS_SECOND: tl.constexpr, POWER: tl.constexpr
):
  """(what the second stage divides by, the epsilon's part of that), EPS_SECOND as its log2.

  The epsilon belongs to sums of (A N - O)^p; in units of the largest it is that much. A clamped
  row's part is 1.
  """
  part = summed * 0.0
  if EPSILON != "none":
    log = EPS_SECOND + POWER * tl.log2(mean * tl.where(rise > 0.0, rise, 1.0))
    eps = tl.exp2(tl.minimum(log, 115.0))
    if EPSILON == "add":
      summed += eps
      part = tl.where(rise > 0.0, eps / tl.where(rise > 0.0, summed, 1.0), 0.0)
    else:
      part = tl.where(eps > summed, 1.0, 0.0)
      summed = tl.maximum(summed, eps)
  return tl.where(rise > 0.0, summed, 1.0), part


@triton.jit
def row_block(T: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr):
  """(first row, head) of a program of a grid of (row blocks * H, B).

  The last rows, which see most, come first; heads of one block are neighbours.
  """
  return ((T - 1) // ROWS - tl.program_id(0) // H) * ROWS, tl.program_id(0) % H


@triton.jit
def keys_of_rows(
  begin, rows, documents, first,
  T: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
  DOCUMENTS: tl.constexpr,
):  # fmt: skip
  """(documents of the rows, first tile, range of the tiles that all rows see whole, end of all).

  In a block of one document the keys from its first on; in a block of several none.
  """
  stop = tl.minimum(begin + (S - T) + ROWS, S)
  whole = (begin + (S - T) + 1) // TILE * TILE
  own = rows
  low = 0
  free = 0
  if DOCUMENTS:
    own = tl.load(documents + (S - T) + rows, mask=rows < T, other=-3)
    earliest = tl.min(tl.load(first + rows, mask=rows < T, other=S))
    latest = tl.max(tl.load(first + rows, mask=rows < T, other=0))
    low = earliest // TILE * TILE
    # Between keys of a state, where a document begins at 0, there may be empty slots.
    one = (earliest == latest) & ((earliest > 0) | (S == T))
    free = tl.where(one, (latest + TILE - 1) // TILE * TILE, S)
  return own, low, free, whole, stop


@triton.jit
def load_keys(
  pointer, start, S: tl.constexpr, G: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
  BLOCK: tl.constexpr,
):  # fmt: skip
  """[TILE, BLOCK] of one head of keys or values, from `start` on."""
  if S * G * DIM < 2**31:
    pointer += start * (G * DIM)
  else:
    pointer += start * tl.full((), G * DIM, tl.int64)
  slots, columns = tl.arange(0, TILE), tl.arange(0, BLOCK)
  return load_tile(pointer, slots, columns, S - start, G, DIM, S % TILE == 0, DIM == BLOCK)


@triton.jit
def add_keys(
  state, q, key, value, start, positions, own, c, taken, rise, documents, free, whole,
  S: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
  TILE: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
  SECOND: tl.constexpr, WHOLE: tl.constexpr, POWER: tl.constexpr, DEGREE: tl.constexpr,
  DOCUMENTS: tl.constexpr, ALWAYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """One tile of keys: `state` is (sum of weights, weighted values); SECOND: of the second stage."""
  summed, acc = state
  slots = tl.arange(0, TILE)
  k = load_keys(key, start, S, G, K, TILE, K_BLOCK)
  v = load_keys(value, start, S, G, V, TILE, V_BLOCK)
  x = products(q, k, PRECISION) * c[:, None]  # [ROWS, TILE]
  if ALWAYS or (start < free) | (start >= whole):
    theirs = documents_of_keys(documents, start + slots, S, DOCUMENTS)
    x = hide(
      x, (start + slots)[None, :], positions[:, None], theirs[None, :], own[:, None], DOCUMENTS
    )  # fmt: skip
  weights = softplus(x, DEGREE)
  if SECOND:
    excess = tl.maximum(weights - taken[:, None], 0.0) * rise[:, None]
    weights = power(excess, WHOLE, POWER)
  summed += tl.sum(weights, 1)
  return summed, tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)


@triton.jit
def add_statistics(
  state, q, key, start, positions, own, c, documents, free, whole,
  S: tl.constexpr, G: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, K_BLOCK: tl.constexpr,
  DEGREE: tl.constexpr, DOCUMENTS: tl.constexpr, ALWAYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """One tile of keys: `state` is (sum of softplus, its largest) of the rows."""
  summed, top = state
  slots = tl.arange(0, TILE)
  k = load_keys(key, start, S, G, K, TILE, K_BLOCK)
  x = products(q, k, PRECISION) * c[:, None]
  if ALWAYS or (start < free) | (start >= whole):
    theirs = documents_of_keys(documents, start + slots, S, DOCUMENTS)
    x = hide(
      x, (start + slots)[None, :], positions[:, None], theirs[None, :], own[:, None], DOCUMENTS
    )  # fmt: skip
  a = softplus(x, DEGREE)
  return summed + tl.sum(a, 1), tl.maximum(top, tl.max(a, 1))


@triton.jit
def forward_kernel(
  query, key, value, scale, count, documents, first,
  output, total, rise,
  T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
  V: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, K_BLOCK: tl.constexpr,
  V_BLOCK: tl.constexpr, WHOLE: tl.constexpr, POWER: tl.constexpr, OFFSET: tl.constexpr,
  SKIP: tl.constexpr, EPSILON: tl.constexpr, EPS_FIRST: tl.constexpr, EPS_SECOND: tl.constexpr,
  FLAT: tl.constexpr, DEGREE: tl.constexpr, SHARED_COUNT: tl.constexpr, DOCUMENTS: tl.constexpr,
  ALWAYS: tl.constexpr, STATISTICS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """Output: grid (row blocks * H, B). POWER 0: one loop over keys; else one for the row's mean.

  `scale` and `count` are [B or 1, T]. STATISTICS: `total`, what the first stage divides by, and
  `rise`, 1 / the largest excess, or 0 in a flat row, both [B, H, T].
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
  c = tl.load(scale + shared + rows, mask=inside, other=0.0)
  n = tl.load(count + shared + rows, mask=inside, other=1.0)
  own, low, free, whole, stop = keys_of_rows(
    begin, rows, documents, first + batch * T, T, S, ROWS, TILE, DOCUMENTS
  )
  zeros = tl.zeros((ROWS,), tl.float32)
  mean, taken, divisor, lift = zeros, zeros, zeros, zeros
  if POWER > 0:
    state = (zeros, zeros)
    for start in range(low, stop, TILE):
      state = add_statistics(
        state, q, key, start, positions, own, c, documents, free, whole,
        S, G, K, TILE, K_BLOCK, DEGREE, DOCUMENTS, ALWAYS, PRECISION,
      )  # fmt: skip
    summed, top = state
    divisor, mean, taken = first_stage(summed, n, EPSILON, EPS_FIRST, SKIP, OFFSET)
    excess = top - taken
    least = tl.maximum(FLAT * mean, 1e-37)  # whose reciprocal is a float32
    lift = tl.where(excess > least, 1.0 / tl.maximum(excess, 1e-37), 0.0)

  state = (zeros, tl.zeros((ROWS, V_BLOCK), tl.float32))
  for start in range(low, stop, TILE):
    state = add_keys(
      state, q, key, value, start, positions, own, c, taken, lift, documents, free, whole,
      S, G, K, V, TILE, K_BLOCK, V_BLOCK, POWER > 0, WHOLE, POWER, DEGREE, DOCUMENTS, ALWAYS,
      PRECISION,
    )  # fmt: skip
  summed, acc = state
  if POWER > 0:
    last, _ = second_total(summed, mean, lift, EPSILON, EPS_SECOND, POWER)
  else:
    last, _, _ = first_stage(summed, n, EPSILON, EPS_FIRST, SKIP, OFFSET)
    divisor = last
  put_tile(
    output + here * V, tl.arange(0, ROWS), tl.arange(0, V_BLOCK), acc / last[:, None], left, H, V,
    T % ROWS == 0, V == V_BLOCK,
  )  # fmt: skip
  if STATISTICS:
    row = (batch * H + head) * T + rows
    tl.store(total + row, divisor, mask=inside)
    if POWER > 0:
      tl.store(rise + row, lift, mask=inside)
