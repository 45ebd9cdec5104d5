"""Block sizes of the TPU kernels, and how much VMEM they take.

Chosen by the compiled schedules. Cycles per 1024 pairs of label and token of a tile all of which is
real (share of the matrix units' slots); K = 256, V = 128, jax 0.12.0.1 and libtpu 0.0.50.1; waiting
for memory not included:

                                  v5e            v6e
    8922 labels           fwd    7.4 (0.81)     4.1 (0.37)
                          bwd   17.1 (0.93)     6.4 (0.78)
       float32            fwd   38.8 (0.93)
                          bwd   98.4 (0.98)
    50 labels (of 128)    fwd   17.2 (0.35)    14.3 (0.21)
                          bwd   22.5 (0.71)    16.4 (0.49)

The first row forward takes 9.2 cycles where panels come one after the other, and 8.0 with blocks of
512 labels; panels of 128 or 512 labels instead of 256 are 8 % slower on a v6e or a v5e. A grid step
takes 526 cycles forward beside its tiles.

Traffic for 8922 labels and 8 documents of 2500 tokens, bfloat16, forward and backward: 71 + 91 MB,
and 37 MB for D; queries are loaded again for every document (2 x 32 MB), all else once. That is
0.24 of 3.1 ms at the peak of a v5e. For 50 labels it is every array once, but for spans of padding.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..compat import target_platform
from ..tpu_sizes import round_up, vmem_bytes
from .tpu_tiles import Plan

LANES = 128
TILE = 512  # most tokens per product
# Most labels per grid step: the first that VMEM has room for, float32 from the second on.
BLOCKS = (1024, 512, 128)
PANEL = 256  # labels per product, forward
FEW = 1024  # tokens in VMEM at a time where a document meets all labels in one grid step


def even(total: int, most: int) -> int:
  """The size of the fewest blocks of up to `most`, in lane tiles, that cover `total`."""
  return round_up(pl.cdiv(total, pl.cdiv(total, most)), LANES)


def sized(plan: Plan) -> Plan | None:
  """The plan with its sizes; None if VMEM is too small for any."""
  tile = even(plan.length, TILE)
  tiles = pl.cdiv(plan.length, tile)
  plan = plan._replace(tile=tile, parts=_cores(plan.batch))
  for resident in (True, False):
    for labels in BLOCKS if plan.dtype == jnp.bfloat16 else BLOCKS[1:]:
      block = even(plan.labels, labels)
      panel = PANEL if block % PANEL == 0 else LANES
      plan = plan._replace(block=block, panel=panel, resident=resident)
      # Where the keys are used once, small spans pass over more of the padding.
      fewest = pl.cdiv(tiles, max(FEW // tile, 1)) if plan.blocks == 1 else 1
      for count in range(fewest, tiles + 1):
        found = plan._replace(span=tile * pl.cdiv(tiles, count))
        if vmem_estimate(found) <= vmem_bytes():
          return found
  return None


def _cores(batch: int) -> int:
  """Into how many parts a batch is split: what looks like one TPU may have two cores."""
  if target_platform() != "tpu":
    return 1
  cores = pltpu.get_tpu_info().num_cores
  return cores if batch % cores == 0 else 1


def vmem_estimate(plan: Plan) -> int:
  """Bytes of blocks and scratch of the backward kernel, which has more of each."""
  item = jnp.dtype(plan.dtype).itemsize
  key, value = round_up(plan.key_dim, LANES), round_up(plan.value_dim, LANES)
  tokens = plan.span * (key + value) * (4 * item + 4)
  labels = plan.block * (2 * (2 * key + 2 * value) * item + (key + value) * (item + 4))
  return tokens + labels + (plan.blocks if plan.resident else 1) * plan.block * key * 4
