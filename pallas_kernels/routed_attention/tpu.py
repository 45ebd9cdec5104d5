"""The forward TPU kernel of routed attention, membership "official".

The grid is (batch, units of heads, clusters). A unit's tokens are read once, packed to words of 32
bits in VMEM; every cluster takes its members' rows from there, attends among them, and adds what
comes out to float32 sums in VMEM, which the last cluster divides and writes. So nothing that is
gathered goes through HBM.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..dots import NN, dot_f32
from . import tpu_rows, tpu_tuning
from . import tpu_tiles as tiles_of
from .tpu_rows import chunks, columns, lane_tiles, scatter_add, unskew
from .tpu_tiles import Cluster, Plan, Strip

LOG2_E = math.log2(math.e)


def _forward_kernel(*refs, plan: Plan):
  names = tiles_of.token_names(plan, backward=False)
  refs = list(refs)
  take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
  members, places, (weights,) = take(plan.sides), take(plan.sides), take(1)
  blocks = dict(zip(names, take(len(names)), strict=True))
  tables = take(2) if plan.relative else [None, None]
  (out,) = take(1)
  (strip,), words, rows, cluster, refs = tiles_of.split_scratch(plan, refs, False, 1)
  around = cluster._replace(keys_table=tables[0], values_table=tables[1])
  sums, part = refs

  @pl.when(pl.program_id(2) == 0)
  def _():
    tiles_of.pack_tokens(plan, blocks, words, weights, backward=False)
    tpu_rows.clear(sums)

  def attend(head):
    c = around._replace(head=head)
    tiles_of.take_members(plan, head, members, words, rows, backward=False)
    tiles_of.find_unseen(plan, places, c)
    tiles_of.panels(plan, functools.partial(_panel, plan, c, strip, part))
    scatter_add(members[0], head, [(part, sums)])

  tiles_of.heads(plan, attend)

  @pl.when(pl.program_id(2) == plan.clusters - 1)
  def _():
    def write(here):
      factor = columns(weights[:, here], plan.width)
      x = [sums[n, here, :] * factor for n in range(plan.lane_tiles)]
      out[here, :] = jnp.concatenate(x, 1).astype(out.dtype)

    chunks(plan.length, write)


def find_tops(plan: Plan, c: Cluster, strip: Strip, panel) -> jax.Array:
  """Fills the strip with logits; the largest of each row [panel, 1], 0 where there is none."""

  def tile(t, top):
    scores = tiles_of.logits(plan, c, panel, t)
    strip.put(t, scores)
    return jnp.maximum(top, tiles_of.lanes_sum(scores, jnp.maximum))

  start = jnp.full((plan.panel, tpu_rows.LANES), -jnp.inf, jnp.float32)
  top = jnp.max(tiles_of.tiles(plan, panel, tile, start), 1, keepdims=True)
  return jnp.where(top > -jnp.inf, top, 0)


def weigh(plan: Plan, logits, top) -> jax.Array:
  """Weights without their divisor, float32 [panel, keys]."""
  unit = plan.scale * LOG2_E if tiles_of.in_raw_units(plan) else LOG2_E
  return jnp.exp2((logits - top) * unit)


def over_total(total) -> jax.Array:
  """1 / sum of the weights [panel, 128], [panel, 1]; of 1 where a query sees no key."""
  total = jnp.sum(total, 1, keepdims=True)
  return 1 / jnp.where(total > 0, total, 1)


def zeros(plan: Plan, *lanes: int) -> tuple[jax.Array, ...]:
  return tuple(jnp.zeros((plan.panel, count), jnp.float32) for count in lanes)


def _panel(plan, c, strip, part, panel):
  """Attention of a panel's queries, to `part`."""
  top = find_tops(plan, c, strip, panel)

  def tile(t, carry):
    total, *outputs = carry
    weights = weigh(plan, strip.get(t), top)
    total += tiles_of.lanes_sum(weights)
    outputs[0] += dot_f32(weights.astype(plan.dtype), c.v[pl.ds(t.start, t.width), :], NN)
    if plan.relative:
      table = c.values_table[tiles_of.table_rows(plan, panel, t), :]
      outputs[1] += dot_f32(unskew(weights).astype(plan.dtype), table, NN)
    return total, *outputs

  start = zeros(plan, tpu_rows.LANES, *[plan.lanes] * (1 + plan.relative))
  total, *outputs = tiles_of.tiles(plan, panel, tile, start)
  output = tiles_of.with_table(plan, c, outputs) * over_total(total)
  for n, x in enumerate(lane_tiles(output)):
    part[n, tiles_of.panel_rows(plan, panel), :] = x


def forward(plan: Plan, members, weights, tokens, tables) -> jax.Array:
  """Output [B, T, U * lanes].

  members: int32 [B, U, C, fold, W] for each side, T where a slot is empty. weights: float32
  [B, U, fold, T], what outputs are multiplied by. tokens: by name, [B, T, U * lanes]. tables:
  none or two [offsets, lanes].
  """
  names = tiles_of.token_names(plan, backward=False)
  operands = [*members, *members, weights, *(tokens[x] for x in names), *tables]
  scratch = [
    *tiles_of.scratch(plan, False, 1),
    pltpu.VMEM((plan.lane_tiles, plan.length + tpu_rows.SUBLANES, tpu_rows.LANES), jnp.float32),
    pltpu.VMEM((plan.lane_tiles, plan.slots, tpu_rows.LANES), jnp.float32),
  ]
  specs = [*tiles_of.member_specs(plan), tiles_of.weight_spec(plan)]
  specs += [tiles_of.token_spec(plan) for _ in names]
  specs += [tiles_of.table_spec(plan) for _ in tables]
  shape = jax.ShapeDtypeStruct((plan.batch, plan.length, plan.units * plan.lanes), plan.dtype)
  pairs = tiles_of.pairs(plan)
  return pl.pallas_call(
    functools.partial(_forward_kernel, plan=plan),
    out_shape=shape,
    grid=(plan.batch, plan.units, plan.clusters),
    in_specs=specs,
    out_specs=tiles_of.token_spec(plan),
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=tpu_tuning.vmem_limit(plan, backward=False),
    ),
    cost_estimate=tiles_of.cost(plan, operands, [shape], pairs, 2 + 2 * plan.relative),
    interpret=plan.interpret,
    name="routed_attention_forward",
  )(*operands)
