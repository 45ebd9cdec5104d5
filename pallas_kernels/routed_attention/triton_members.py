"""Who belongs to a cluster, for NVIDIA GPUs: one program per cluster of a head, without sorting.

The w-th largest of the T scores is found by bisection on integers that are ordered as the scores
are; a prefix sum then gives the members their slots in the order of their positions. That is
`lax.top_k` and a sort, and the rule that ties go to the earlier token, in 31 counts at most.

Import this module only where a GPU is compiled for: it imports triton.
"""

import triton
import triton.language as tl


@triton.jit
def ordered(x):
  """int32 in the order of the finite float32 numbers x; all others get the lowest, -2^31."""
  x = tl.where(x == 0.0, 0.0, x)  # -0 is as near as 0
  bits = x.to(tl.int32, bitcast=True)
  number = bits ^ ((bits >> 31) & 0x7FFFFFFF)
  return tl.where(tl.abs(x) < float("inf"), number, -2147483648)


@triton.jit
def nth_largest(numbers, count):
  """A number that at least `count` reach: exactly so many, or it is the count-th largest."""
  reached = tl.sum((numbers >= 0).to(tl.int32), 0)
  enough = reached >= count
  threshold = tl.where(enough, 0, -2147483648)
  reached = tl.where(enough, reached, numbers.shape[0])
  step = tl.full((), 1 << 30, tl.int32)
  while (step > 0) & (reached != count):
    trial = threshold + step
    reach_it = tl.sum((numbers >= trial).to(tl.int32), 0)
    enough = reach_it >= count
    threshold = tl.where(enough, trial, threshold)
    reached = tl.where(enough, reach_it, reached)
    step = step >> 1
  return threshold


@triton.jit
def members_kernel(
  scores,
  members, slot_of,
  T: tl.constexpr, H: tl.constexpr, C: tl.constexpr, W: tl.constexpr, T_BLOCK: tl.constexpr,
):  # fmt: skip
  """Grid (C, B * H). members [B, H, C, W]: positions, ascending, then -1 where there are fewer.

  slot_of [B, H, C, T]: where each token stands in `members`, -1 if it does not. `scores` are
  [B, T, H, C]: the C programs that share a sector of memory run side by side.
  """
  cluster = tl.program_id(0)
  head = tl.program_id(1).to(tl.int64)
  places = tl.arange(0, T_BLOCK)
  inside = places < T
  scores += ((head // H) * T * H + head % H) * C + cluster
  near = tl.load(scores + places * (H * C), mask=inside, other=-float("inf"))
  numbers = ordered(near)
  real = tl.sum((numbers > -2147483648).to(tl.int32), 0)
  count = tl.minimum(real, W)
  threshold = nth_largest(numbers, count)
  above, equal = numbers > threshold, numbers == threshold
  wanted = count - tl.sum(above.to(tl.int32), 0)  # of those that are equal
  # Both prefix sums in one, 16 bits each: T is at most 2^15.
  so_far = tl.cumsum((above.to(tl.int32) << 16) | equal.to(tl.int32), 0)
  equal_so_far = so_far & 0xFFFF
  member = above | (equal & (equal_so_far <= wanted))
  slot = ((so_far >> 16) & 0xFFFF) + tl.minimum(equal_so_far, wanted) - 1
  members += (head * C + cluster) * W
  tl.store(members + slot, places, mask=member)
  none = tl.full((T_BLOCK,), -1, tl.int32)
  tl.store(members + places, none, mask=(places >= count) & (places < W))
  slot_of += (head * C + cluster) * T
  tl.store(slot_of + places, tl.where(member, slot, none).to(tl.int16), mask=inside)


@triton.jit
def combine_kernel(
  slots, slot_of,
  output, share,
  T: tl.constexpr, H: tl.constexpr, C: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
  WIDTH: tl.constexpr, ROWS: tl.constexpr, C_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr,
  EPSILON: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
  """Grid (blocks of T, B * H). Sums over a token's slots, in the order of clusters: [B, T, H, D].

  slots [B, H, C, W, WIDTH], of which D are used. MEAN: times `share` [B, H, T], which is written:
  1 / (how many + EPSILON). The loop runs as often as the token of the block
  that is in most clusters needs.
  """
  rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
  head = tl.program_id(1).to(tl.int64)
  clusters, columns = tl.arange(0, C_BLOCK), tl.arange(0, D_BLOCK)
  slots += head * C * W * WIDTH
  inside = rows < T
  found = tl.load(
    slot_of + (head * C + clusters[None, :]) * T + rows[:, None],
    mask=inside[:, None] & (clusters[None, :] < C),
    other=-1,
  ).to(tl.int32)  # [ROWS, C_BLOCK]
  nowhere: tl.constexpr = C * W
  place = tl.where(found >= 0, clusters[None, :] * W + found, nowhere)
  count = tl.sum((found >= 0).to(tl.int32), 1)
  acc = tl.zeros((ROWS, D_BLOCK), tl.float32)
  last = tl.full((ROWS,), -1, tl.int32)
  for _ in range(tl.max(count, 0)):
    last = tl.min(tl.where(place > last[:, None], place, nowhere), 1)  # their next slots
    acc += tl.load(
      slots + last[:, None].to(tl.int64) * WIDTH + columns[None, :],
      mask=(last[:, None] < nowhere) & (columns[None, :] < D),
      other=0.0,
    ).to(tl.float32)
  if MEAN:
    part = 1.0 / (tl.maximum(count, 1) + EPSILON)
    acc *= part[:, None]
    tl.store(share + head * T + rows, part, mask=inside)
  output += ((head // H) * T * H + head % H) * D
  tl.store(
    output + rows[:, None] * (H * D) + columns[None, :],
    acc.to(output.dtype.element_ty),
    mask=inside[:, None] & (columns[None, :] < D),
  )
