"""The backward TPU kernel of RAT attention: one reversed sweep.

When a block of rows has its turn, all later rows are done, so the gradients of its own summaries
are complete and the reverse recurrence can follow at once. Gates and recurrence are computed anew;
the gradients of all summaries stay in VMEM as float32, those of query and key are summed there over
the heads that share them. With p the weights, delta = sum(dO O), * the own chunk:

  dS = p (dO V - delta), dq = scale (R^T(dS K) + dS_* k~)
  dK = scale dS^T R q, dV = p^T dO
  a_t = scale dS_* q, b_t = p_* dO; at a chunk's end + R^T dK, + dV
  lam_t = a_t + g_{t+1} lam_{t+1}, mu_t = b_t + g_{t+1} mu_{t+1}
  dk = (1 - g) lam, dv = (1 - g) mu, dg = lam (k~_{t-1} - k) + mu (v~_{t-1} - v)

A weight and its part of the output's gate come from the stored output y: dO O = dy y.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..tpu_sizes import vmem_limit
from . import tpu_rows as rows_of
from . import tpu_softmax as softmax
from .tpu import turn_queries
from .tpu_rows import Plan
from .tpu_tuning import vmem_estimate


class Inputs(NamedTuple):
  """Blocks: rows [R, lanes], tables [n, lanes]."""

  bias: jax.Array  # [1, lanes]
  tables: tuple  # cos and sin, or nothing
  q: jax.Array
  k: jax.Array
  v: jax.Array
  g: jax.Array
  z: jax.Array | None
  y: jax.Array
  dy: jax.Array
  keys: jax.Array  # [inner, slots, lanes]
  values: jax.Array
  statistics: jax.Array  # [2 fold, R]
  d_keys: jax.Array  # [n, lanes], of the summaries as results
  d_values: jax.Array


class Outputs(NamedTuple):
  """Gradients, blocks of rows but for the last."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  g: jax.Array
  z: jax.Array | None
  bias: jax.Array  # [inner, lanes]


class Scratch(NamedTuple):
  """Rows in the kernels' order, [R, lanes] float32 where nothing else is said."""

  turned: jax.Array  # [fold, R, lanes], queries in the input dtype; d_sums likewise
  d_sums: jax.Array
  keys: jax.Array  # the running chunk
  values: jax.Array
  gates: jax.Array
  d_out: jax.Array  # of the output before its gate
  weight: jax.Array  # [fold, R, LANES], the own chunk's; before that its score
  d_score: jax.Array  # [fold, R, LANES], the own chunk's; before that dO . v~ - delta
  delta: jax.Array  # [fold, R, LANES]
  dq_turned: jax.Array  # sums over heads
  dq_own: jax.Array
  dk: jax.Array
  d_keys: jax.Array  # [inner, slots, lanes]
  d_values: jax.Array


def _backward_kernel(*refs, plan: Plan):
  refs = list(refs)
  take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
  documents = take(2 if plan.documents else 0)
  bias, tables = take(1)[0], tuple(take(2 if plan.rotary else 0))
  ins = Inputs(bias, tables, *take(4), *(take(1) if plan.gated else [None]), *take(7))
  outs = Outputs(*take(4), *(take(1) if plan.gated else [None]), *take(1))
  scratch = Scratch(*refs)
  step, head = plan.steps - 1 - pl.program_id(2), pl.program_id(3)
  masks = rows_of.head_lanes(plan, (plan.chunks, plan.lanes))
  seen = rows_of.seen_tiles(plan, step, pl.program_id(0), documents)

  @pl.when(pl.program_id(2) == 0)
  def _():
    for ref in (scratch.d_keys, scratch.d_values):
      ref[head] = jnp.zeros_like(ref[head])
    outs.bias[pl.ds(head, 1), :] = jnp.zeros((1, plan.lanes), jnp.float32)

  @pl.when(head == 0)
  def _():
    turn_queries(plan, ins.q, ins.tables, masks, scratch.turned)
    for ref in (scratch.dq_turned, scratch.dq_own, scratch.dk):
      ref[...] = jnp.zeros_like(ref)

  _own_chunk(plan, ins, outs, scratch, masks)
  _own_weights(plan, ins, scratch)
  _finished_chunks(plan, ins, scratch, step, head, seen)
  _reverse_recurrence(plan, ins, outs, scratch, masks, step, head)

  @pl.when(head == plan.inner - 1)
  def _():
    def finish(turn, _):
      here = [rows_of.place(plan, turn.row(plan, part)) for part in range(plan.pair)]
      scale = plan.head_dim**-0.5
      turned = [rows_of.turn(plan, scratch.dq_turned[h, :], tables, back=True) for h in here]
      dq = [scale * x + scratch.dq_own[h, :] for x, h in zip(turned, here, strict=True)]
      rows_of.store(outs.q, plan, turn, dq)
      rows_of.store(outs.k, plan, turn, [scratch.dk[h, :] for h in here])

    rows_of.for_steps(plan, finish, None)


def _own_chunk(plan, ins, outs, scratch, masks):
  """The recurrence once more; the gradient of the output gate; the own chunk's weight and score."""
  refs = [ins.q, ins.k, ins.v, ins.g, ins.y, ins.dy] + ([ins.z] if plan.gated else [])

  def body(turn, carry):
    d_gates = []
    for part, rows in enumerate(zip(*(rows_of.load(x, plan, turn) for x in refs), strict=True)):
      q, k, v, g, y, dy, *z = rows
      here = rows_of.place(plan, turn.row(plan, part))
      gate = rows_of.sigmoid(plan, g + ins.bias[...])
      key, value = carry = [
        new + gate * (old - new) for old, new in zip(carry, (k, v), strict=True)
      ]
      scratch.gates[here, :], scratch.keys[here, :], scratch.values[here, :] = gate, key, value
      product, d_out, alone = dy * y, dy, value
      if plan.gated:
        opened = rows_of.sigmoid(plan, z[0])
        d_gates.append(product * (1 - opened))
        d_out, alone = opened * dy, opened * value
      d_score = dy * (alone - y)  # its sum is dO . v~ - delta
      scratch.d_out[here, :] = d_out
      for index, mask in enumerate(masks):
        scratch.d_sums[index, here, :] = rows_of.only(mask, d_out).astype(plan.dtype)
        sums = [rows_of.lane_sum(mask, x) for x in (q * key, d_score, product)]
        columns = scratch.weight, scratch.d_score, scratch.delta
        for ref, x in zip(columns, sums, strict=True):
          ref[index, here, :] = jnp.broadcast_to(x, (plan.chunks, rows_of.LANES))
    if plan.gated:
      rows_of.store(outs.z, plan, turn, d_gates)
    return carry

  zeros = jnp.zeros((plan.chunks, plan.lanes), jnp.float32)
  rows_of.for_steps(plan, body, [zeros, zeros])


def _own_weights(plan, ins, scratch):
  """From what `_own_chunk` left: own weight, scaled gradient of the own score, and its dq."""
  for index in range(plan.fold):
    top, total = (ins.statistics[row, :] for row in softmax.stat_rows(index))
    score = plan.scale * rows_of.as_row(scratch.weight.at[index])
    # Where the own chunk is all there is, its weight is exactly 1 and its score has no gradient,
    # whatever the score's last bit is this time.
    alone = (total == 1) & (score > top - 1)
    weight = rows_of.as_column(jnp.where(alone, 1.0, jnp.exp2(score - top) * (1 / total)))
    scratch.weight[index] = weight
    factor = jnp.where(weight == 1, 0.0, plan.head_dim**-0.5 * weight)
    scratch.d_score[index] *= factor
  masks = rows_of.head_lanes(plan, (plan.rows, plan.lanes))
  columns = [rows_of.widen(scratch.d_score[index], plan.lanes) for index in range(plan.fold)]
  scratch.dq_own[...] += rows_of.per_head(masks, columns) * scratch.keys[...]


def _finished_chunks(plan, ins, scratch, step, head, seen):
  """Adds to the gradients of queries (rotated) and of the summaries that the block's rows see."""
  deltas = [rows_of.as_row(scratch.delta.at[index]) for index in range(plan.fold)]
  inverses = [1 / ins.statistics[softmax.stat_rows(i)[1], :] for i in range(plan.fold)]
  refs = softmax.Backward(
    ins.keys.at[head], ins.values.at[head], scratch.turned, scratch.d_sums, ins.statistics,
    scratch.dq_turned, scratch.d_keys.at[head], scratch.d_values.at[head],
  )  # fmt: skip
  oldest, seen_before, seen_here = seen

  def add(tile, seen):
    softmax.add_tile_gradients(plan, refs, tile, deltas, inverses, seen)

  tiles = rows_of.own_tiles(plan, step)
  for tile in tiles:
    add(tile, seen_here)
  jax.lax.fori_loop(oldest, tiles[0], lambda tile, _: add(tile, seen_before), None)


def _reverse_recurrence(plan, ins, outs, scratch, masks, step, head):
  """The gradients of key (added up over heads), value and gate."""
  own = pl.ds(pl.multiple_of(step * plan.chunks, plan.chunks), plan.chunks)
  given = [ref[...].astype(jnp.float32) for ref in (ins.d_keys, ins.d_values)]
  # The queries in the products carry the factor log2(e) of the scores.
  d_key = math.log(2) * scratch.d_keys[head, own, :] + given[0]
  d_value = scratch.d_values[head, own, :] + given[1]

  def body(turn, carry):
    lam, mu, total = carry
    dv, dg = [None] * plan.pair, [None] * plan.pair
    rows = zip(*(rows_of.load(ref, plan, turn) for ref in (ins.q, ins.k, ins.v)), strict=True)
    for part, (q, k, v) in reversed(list(enumerate(rows))):
      row = turn.row(plan, part)
      here = rows_of.place(plan, row)
      gate = scratch.gates[here, :]
      weight, d_score = (
        rows_of.per_head(
          masks, [rows_of.widen(ref[i, here, :], plan.lanes) for i in range(plan.fold)]
        )
        for ref in (scratch.weight, scratch.d_score)
      )
      lam += d_score * q
      mu += weight * scratch.d_out[here, :]
      before = [_before(plan, ref, row) for ref in (scratch.keys, scratch.values)]
      open_lam, open_mu = lam - gate * lam, mu - gate * mu
      dg[part] = gate * (open_lam * (before[0] - k) + open_mu * (before[1] - v))
      dv[part] = open_mu
      scratch.dk[here, :] += open_lam
      total += dg[part]
      lam, mu = lam - open_lam, mu - open_mu
    rows_of.store(outs.v, plan, turn, dv)
    rows_of.store(outs.g, plan, turn, dg)
    return lam, mu, total

  start = (rows_of.turn(plan, d_key, ins.tables, back=True), d_value, jnp.zeros_like(d_key))
  *_, total = rows_of.for_steps(plan, body, start, reverse=True)
  outs.bias[pl.ds(head, 1), :] += jnp.sum(total, 0, keepdims=True)


def _before(plan, ref, row):
  """The running chunk one row earlier; 0 before the first."""
  if isinstance(row, int):
    return ref[rows_of.place(plan, row - 1), :] if row else 0.0
  found = ref[rows_of.place(plan, jnp.maximum(row - 1, 0)), :]
  return jnp.where(row > 0, found, 0.0)


def backward(plan: Plan, documents, bias, tables, operands):
  """Gradients of tokens (query and key [B T, outer * lanes]) and bias [B, outer, inner, lanes]."""
  one, group, every = (
    f(plan) for f in (rows_of.tokens, rows_of.group_tokens, rows_of.all_summaries)
  )
  summed, new = rows_of.group_gradients(plan), rows_of.summaries(plan)
  gated = [one] * plan.gated
  scalars, firsts = documents[:1], documents[1:]
  inputs = [*(rows_of.first_slots(plan) for _ in firsts), rows_of.bias(plan)]
  inputs += [*(rows_of.table(plan) for _ in tables), group, group, one, one]
  inputs += [*gated, one, one, every, every, rows_of.statistics(plan), new, new]
  outputs = [summed, summed, one, one, *gated, rows_of.bias_gradients(plan)]
  rounded = pltpu.VMEM((plan.fold, plan.rows, plan.lanes), plan.dtype)
  wide = pltpu.VMEM((plan.rows, plan.lanes), jnp.float32)
  columns = pltpu.VMEM((plan.fold, plan.rows, rows_of.LANES), jnp.float32)
  sums = pltpu.VMEM((plan.inner, plan.slots, plan.lanes), jnp.float32)
  scratch = Scratch(
    rounded,
    rounded,
    wide,
    wide,
    wide,
    wide,
    columns,
    columns,
    columns,
    wide,
    wide,
    wide,
    sums,
    sums,
  )
  limit = vmem_limit(vmem_estimate(plan.inner, plan.slots, plan.rows, plan.lanes, plan.dtype))
  heads = plan.batch * plan.outer * plan.inner * plan.fold
  pairs = heads * plan.length * plan.slots // 2
  return rows_of.call(
    functools.partial(_backward_kernel, plan=plan), "rat_attention_backward", plan,
    scalars, (*firsts, bias, *tables, *operands), inputs, outputs, scratch,
    (10 * pairs * plan.width, pairs + 3 * heads * plan.length * plan.width), limit, reverse=True,
  )  # fmt: skip
