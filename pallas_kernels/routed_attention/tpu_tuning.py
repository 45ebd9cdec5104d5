"""Block sizes of the TPU kernels, and how much VMEM they take.

Chosen by the compiled schedules. Cycles per 1024 pairs of query and key of a cluster, with all that
belongs to it: taking the rows, attention, adding them back (share of the matrix units' slots in
the whole kernel, spilled registers); v5e, bfloat16, jax 0.12.0.1 and libtpu 0.0.50.1; waiting for
memory not included:

                                     forward             backward
    K =  64, w = 512                  19 (0.25,  559)     45 (0.30, 1863)
             with relative tables     37 (0.28,  895)     77 (0.36, 2322)
    K = 128, w = 512                  23 (0.15,  189)     46 (0.23,  785)
             with relative tables     43 (0.20,  390)     78 (0.31, 1062)

Attention alone takes 9 and 23 cycles, with tables 30 and 62. A row costs 1 to 2 cycles to take and
2.5 to add, bound by scalar units; where all is straight code the compiler does that beside the
attention (up to `SMALL` slots: 3076 cycles a cluster at K = 128, against 4540 with loops). Larger
clusters are loops over tiles. Tables double the work: a tile of R queries and N keys meets N + R
of their rows, so that panels are as narrow as a lane tile.

Members by bisection take 28000 cycles for 8 heads of 8 clusters among 4096 tokens; XLA's two sorts
and the counts about 140000 (their loops' bodies times the registers that they go over).
"""

import jax.numpy as jnp

from ..tpu_sizes import SMALL_VMEM, round_up, vmem_bytes
from ..tpu_sizes import TEMPORARIES as USUAL_TEMPORARIES
from . import tpu_rows
from .tpu_tiles import Plan, token_names

PANEL = 256  # queries of a tile
TEMPORARIES = 10 * 2**20  # bytes of VMEM for the compiler
SMALL = 512  # slots of a cluster whose panels meet all keys in one tile


def head_width(heads: int, dim: int) -> tuple[int, int, int]:
  """(heads per unit, lanes per head, lanes of a unit); a lane tile takes two narrow heads."""
  if dim <= tpu_rows.LANES // 2 and heads % 2 == 0:
    return 2, tpu_rows.LANES // 2, tpu_rows.LANES
  lanes = round_up(dim, tpu_rows.LANES)
  return 1, lanes, lanes


def sized(plan: Plan, window: int) -> Plan | None:
  """The plan with sizes and buffers for clusters of `window` members; None if VMEM is too small."""
  slots = round_up(window, tpu_rows.LANES)
  panels = [tpu_rows.LANES]
  if slots % PANEL == 0 and not plan.relative:
    panels.insert(0, PANEL)
  room = vmem_bytes()
  if room > SMALL_VMEM:
    room += USUAL_TEMPORARIES - TEMPORARIES
  for panel in panels:
    for buffers in (2, 1):
      tile = 0 if slots <= SMALL else panel
      found = plan._replace(slots=slots, panel=panel, tile=tile, buffers=buffers)
      if vmem_estimate(found, backward=True) <= room:
        return found
  return None


def vmem_estimate(plan: Plan, backward: bool) -> int:
  """Bytes of blocks and scratch."""
  item = jnp.dtype(plan.dtype).itemsize
  inputs = len(token_names(plan, backward))
  results = inputs - 1 if backward else 1
  per_token = (inputs + results) * plan.buffers * item
  per_token += (len(plan.groups(backward)) + results) * 4  # words and sums
  per_slot = inputs * item + results * 4
  count, width = plan.tile_shape
  strips = (1 + backward) * count * plan.panel * width * 4 if plan.tile else 0
  tables = (2 * item + 4 * 2 * backward) * 2 * plan.offsets * plan.lanes if plan.relative else 0
  rows = 2 * 4 * tpu_rows.SUBLANES * (plan.sides * plan.slots + plan.length)
  return plan.lanes * (per_token * plan.length + per_slot * plan.slots) + strips + tables + rows


def vmem_limit(plan: Plan, backward: bool) -> int | None:
  """Bytes of VMEM to ask for; None is the compiler's default."""
  return None if vmem_bytes() == SMALL_VMEM else vmem_estimate(plan, backward) + TEMPORARIES
