"""Block sizes of the TPU kernels, and how much of the keys they hold in VMEM.

Chosen by the compiled schedules. Cycles per 1024 pairs of query and key of a whole grid step with
every branch and loop counted once (a tile all of which is seen and a block's own), share of the
matrix units' slots used, spilled registers; jax 0.12.0.1 and libtpu 0.0.50.1; waiting for memory
not included:

                              v5e                v5p                v6e
    K =  64, T = 1024   fwd    8.2 (0.49,  614)   8.5 (0.47,  615)   7.7 (0.20, 1269)
                        bwd   17.7 (0.57,  664)  17.8 (0.56,  731)  15.6 (0.29, 3073)
       LSSA             fwd    7.3 (0.54,  617)
                        bwd   13.3 (0.75,  385)
    K = 128, T = 4096   fwd   12.1 (0.33,  255)  12.4 (0.32,  259)  11.6 (0.13,  543)
                        bwd   22.9 (0.44,  199)  23.5 (0.43,  240)  19.7 (0.23, 1306)
       float32          fwd   28.2 (0.85, 2416)
                        bwd   71.1 (0.84, 8213)
    K = 128, T = 65536  fwd   16.1 (0.37,  366)
                        bwd   30.1 (0.46, 1988)

The vector units are what bounds bfloat16: 71 to 82 % of their slots are used on v5e and v6e at
K = 64. Two heads of K = 64 share a lane tile and are computed together; each uses half of a product
with 128 lanes, as it would alone. The last row computes f anew in every pass: keeping strips of it
in VMEM takes 9.1 cycles instead of 13.7 forward, of scores and dW 18.5 instead of 21.8 backward
(K = 128, v5e, 512 keys and queries to a tile; 11.2 forward with 256 keys). A grid step, forward and
backward, takes 4331 and 8891 cycles with panels of 256 queries, 4305 and 8664 with 128, which is
twice as much code, 4630 and 9644 with 512.

Traffic is every array once up to the length whose keys fit in VMEM. Beyond, a block of 512 queries
loads the keys that it sees again.
"""

import jax.numpy as jnp

from ..tpu_sizes import round_up, vmem_bytes
from . import tpu_tiles as tiles_of
from .tpu_tiles import Plan

ROWS = 512  # most queries per grid step, and keys per product
PANEL = 256  # queries per product
SPAN = 8192  # keys in VMEM at a time where they do not all fit


def block_rows(length: int) -> int:
  """A power of two times the lanes that lengthens the queries by at most 1/8, if there is one."""
  rows = ROWS
  while rows > tiles_of.LANES and round_up(length, rows) > length + length // 8:
    rows //= 2
  return rows


def head_width(heads: int, repeat: int, key_dim: int, value_dim: int) -> tuple[int, int]:
  """(lanes per head, heads per unit); a lane tile takes two narrow heads."""
  narrow = max(key_dim, value_dim) <= tiles_of.LANES // 2
  if narrow and heads % 2 == 0 and (repeat == 1 or repeat % 2 == 0):
    return tiles_of.LANES // 2, 2
  return tiles_of.LANES, 1


def span_of(total: int, rows: int, lanes: int, dtype: jnp.dtype) -> int:
  """Keys in VMEM at a time: all of them if they fit; lanes: of key and value."""
  most = vmem_bytes() * 3 // 4 // _bytes_per_key(lanes, dtype)
  return total if total <= most else max(rows, min(SPAN, most) // rows * rows)


def _bytes_per_key(lanes: int, dtype: jnp.dtype) -> int:
  """Of the backward kernel: key and value, their gradients as results, and as float32 sums."""
  return lanes * (4 * jnp.dtype(dtype).itemsize + 4)


def vmem_estimate(plan: Plan, strips: int) -> int:
  """Bytes of blocks and scratch with so many [span, R] strips for each head."""
  lanes, width = plan.key_lanes + plan.value_lanes, jnp.dtype(plan.dtype).itemsize
  keys = plan.span * _bytes_per_key(lanes, plan.dtype)
  queries = plan.rows * lanes * (4 * width + plan.fold * (width + 4))
  return keys + queries + strips * plan.fold * plan.span * plan.rows * 4


def strips_fit(plan: Plan, strips: int) -> bool:
  """Whether so many strips of the rows of a block can be kept between its two halves."""
  return plan.spans == 1 and vmem_estimate(plan, strips) <= vmem_bytes()
