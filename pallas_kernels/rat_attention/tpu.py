"""The forward TPU kernel of RAT attention.

The grid is (batch, outer, blocks of rows, inner): the blocks of a row run in order on one core, and
in each the heads of one group take turns, so query and key are loaded once for all of them. A turn
computes the gates and the recurrence in float32 registers, appends the summaries of the block's
chunks to those in VMEM, and loops over tiles of summaries with running maximum and sum, which start
from the row's own running chunk: no row is without a weight, and nothing has to be merged.
Scores are in units of log 2.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tpu_sizes import vmem_limit
from . import tpu_rows as rows_of
from . import tpu_softmax as softmax
from .tpu_rows import Plan
from .tpu_tuning import vmem_estimate


def _forward_kernel(*refs, plan: Plan, save: bool):
  """Blocks: bias [1, lanes], maybe cos and sin [n, lanes], q, k, v, g, maybe z [R, lanes].

  With documents, before all others: oldest tiles (scalars), first slots [1, R].

  Out: y [R, lanes], summaries of keys and values [n, lanes], maybe statistics [2 fold, R].
  Scratch: summaries so far; queries, the own chunks' scores and running values (later the result),
  weighted sums [fold, lanes, R], statistics where they are no output.
  """
  documents, refs = (refs[:2], refs[2:]) if plan.documents else ((), refs)
  bias_ref, refs = refs[0], refs[1:]
  tables, refs = (refs[:2], refs[2:]) if plan.rotary else ((), refs)
  (q_ref, k_ref, v_ref, g_ref), refs = refs[:4], refs[4:]
  z_ref, refs = (refs[0], refs[1:]) if plan.gated else (None, refs)
  (y_ref, new_keys_ref, new_values_ref), refs = refs[:3], refs[3:]
  if save:
    refs = (*refs[1:], refs[0])
  keys_ref, values_ref, turned_ref, own_ref, sums_ref, weighted_ref, stats_ref = refs
  step, head = pl.program_id(2), pl.program_id(3)
  masks = rows_of.head_lanes(plan, (plan.chunks, plan.lanes))
  seen = rows_of.seen_tiles(plan, step, pl.program_id(0), documents)

  @pl.when(step == 0)
  def _():  # a weight of 0 times what is not yet there must be 0
    keys_ref[head] = jnp.zeros_like(keys_ref[head])
    values_ref[head] = jnp.zeros_like(values_ref[head])

  @pl.when(head == 0)
  def _():
    turn_queries(plan, q_ref, tables, masks, turned_ref)

  def own_chunk(turn, carry):
    pieces = [rows_of.load(ref, plan, turn) for ref in (q_ref, k_ref, v_ref, g_ref)]
    for part, (q, k, v, g) in enumerate(zip(*pieces, strict=True)):
      here = rows_of.place(plan, turn.row(plan, part))
      gate = rows_of.sigmoid(plan, g + bias_ref[...])
      carry = [new + gate * (old - new) for old, new in zip(carry, (k, v), strict=True)]
      sums_ref[here, :] = carry[1]
      product = q * carry[0]
      for index, mask in enumerate(masks):
        score = plan.scale * rows_of.lane_sum(mask, product)
        own_ref[index, here, :] = jnp.broadcast_to(score, (plan.chunks, rows_of.LANES))
    return carry

  zeros = jnp.zeros((plan.chunks, plan.lanes), jnp.float32)
  key, value = rows_of.for_steps(plan, own_chunk, [zeros, zeros])
  key = rows_of.turn(plan, key, tables).astype(plan.dtype)
  value = value.astype(plan.dtype)
  here = pl.ds(pl.multiple_of(step * plan.chunks, plan.chunks), plan.chunks)
  keys_ref[head, here, :], values_ref[head, here, :] = key, value
  new_keys_ref[...], new_values_ref[...] = key, value

  refs = softmax.Forward(
    keys_ref.at[head], values_ref.at[head], turned_ref, weighted_ref, stats_ref
  )
  _finished_chunks(plan, step, seen, own_ref, sums_ref, refs)

  def finish(turn, _):
    gates = rows_of.load(z_ref, plan, turn) if plan.gated else [None] * plan.pair
    pieces = []
    for part, z in enumerate(gates):
      here = rows_of.place(plan, turn.row(plan, part))
      pieces.append(
        sums_ref[here, :] if z is None else sums_ref[here, :] * rows_of.sigmoid(plan, z)
      )
    rows_of.store(y_ref, plan, turn, pieces)

  rows_of.for_steps(plan, finish, None)


def turn_queries(plan: Plan, q_ref, tables, masks, turned_ref):
  """Fills the scaled and rotated queries, in the order of the kernels; each head's lanes apart."""

  def body(turn, _):
    for part, q in enumerate(rows_of.load(q_ref, plan, turn)):
      q = plan.scale * rows_of.turn(plan, q, tables)
      here = rows_of.place(plan, turn.row(plan, part))
      for index, mask in enumerate(masks):
        turned_ref[index, here, :] = rows_of.only(mask, q).astype(plan.dtype)

  rows_of.for_steps(plan, body, None)


def _finished_chunks(plan, step, seen, own_ref, sums_ref, refs):
  """Goes on from the own chunk's score and value with all finished ones.

  The summaries of the block itself come first; those before them are seen by all of its rows, as
  far as they are of the same document.
  `sums_ref` has the own chunks' values, and then the result.
  """
  rows = {
    (index, start): rows_of.as_row(own_ref.at[index], start, plan.panel)
    for index, start in softmax.panels(plan)
  }
  own = lambda index, start: rows[index, start]  # noqa: E731
  oldest, seen_before, seen_here = seen
  tiles = rows_of.own_tiles(plan, step)
  scores = [softmax.tile_scores(plan, refs, tile) for tile in (*tiles, oldest)]
  for tile, of_tile in zip(tiles, scores[:-1], strict=True):
    softmax.add_tile(plan, refs, tile, of_tile, seen_here, own if tile is tiles[0] else None)
  softmax.add_tiles(plan, refs, oldest, tiles[0], scores[-1], seen_before)
  for here, mean in softmax.result(plan, refs, own, sums_ref):
    sums_ref[here, :] = mean


def forward(plan: Plan, documents, bias, tables, tokens, save: bool):
  """(y, key summaries, value summaries[, statistics]); see `tpu_rows` for the layouts.

  documents: (oldest tiles, first slots), or nothing. tokens: query, key, value, gate_logits, maybe
  output_logits.
  """
  one, group = rows_of.tokens(plan), rows_of.group_tokens(plan)
  scalars, firsts = documents[:1], documents[1:]
  inputs = [*(rows_of.first_slots(plan) for _ in firsts), rows_of.bias(plan)]
  inputs += [*(rows_of.table(plan) for _ in tables), group, group]
  inputs += [one] * (len(tokens) - 2)
  outputs = [one, rows_of.summaries(plan), rows_of.summaries(plan)]
  if save:
    outputs.append(rows_of.statistics(plan))
  summaries = pltpu.VMEM((plan.inner, plan.slots, plan.lanes), plan.dtype)
  columns = pltpu.VMEM((plan.fold, plan.rows, rows_of.LANES), jnp.float32)
  scratch = [
    summaries,
    summaries,
    pltpu.VMEM((plan.fold, plan.rows, plan.lanes), plan.dtype),
    columns,
    pltpu.VMEM((plan.rows, plan.lanes), jnp.float32),
    pltpu.VMEM((plan.fold, plan.lanes, plan.rows), jnp.float32),
  ]
  if not save:
    scratch.append(pltpu.VMEM((2 * plan.fold, plan.rows), jnp.float32))
  limit = vmem_limit(vmem_estimate(plan.inner, plan.slots, plan.rows, plan.lanes, plan.dtype))
  heads = plan.batch * plan.outer * plan.inner * plan.fold
  pairs = heads * plan.length * plan.slots // 2
  return rows_of.call(
    functools.partial(_forward_kernel, plan=plan, save=save), "rat_attention_forward", plan,
    scalars, (*firsts, bias, *tables, *tokens), inputs, outputs, scratch,
    (4 * pairs * plan.width, pairs + 2 * heads * plan.length * plan.width), limit,
  )  # fmt: skip
