"""The forward TPU kernel of softplus attention.

The grid is (batch, units of heads, blocks of queries, passes, spans of keys). LSSA is one pass: f
needs no running maximum, sums over keys just add. The re-weighting needs the mean and the largest f
of the whole row first, so it takes two, and a tile's f is computed anew in the second, or kept in
VMEM where a row of tiles fits. Where all keys are one span both passes are one grid step.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..dots import NT, TN, dot_f32
from ..tpu_sizes import vmem_limit
from . import tpu_tiles as tiles_of
from . import tpu_tuning
from .tpu_tiles import Grid, Plan, Tables, panels, statistic


class Refs(NamedTuple):
  """Blocks and scratch."""

  q: Any  # [R, key lanes]
  k: Any  # [span, key lanes]
  v: Any  # [span, value lanes]
  rows: Any  # [2, R]: scale in units of log 2, count
  documents: tuple  # of queries [1, R] and keys [1, span], or nothing
  out: Any  # [R, value lanes]
  stats: Any  # [STATISTICS * fold, R]
  queries: Any  # [fold, R, key lanes], other heads' lanes 0
  sums: Any  # float32 [fold, value lanes, R]
  totals: Any  # [2 * fold, R]: sum and largest f; then sum of weights
  strip: Any  # [fold, tiles, R] of f, or nothing


def _forward_kernel(*refs, plan: Plan, strip: bool, save: bool):
  tables, refs = Tables(*refs[:2]), list(refs[2:])
  take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
  ins, documents, out = take(4), tuple(take(2 if plan.documents else 0)), take(1)
  stats = take(1) if save else [refs.pop()]
  r = Refs(*ins, documents, *out, *stats, *take(3), refs[0] if strip else None)
  row, block = pl.program_id(0), pl.program_id(2)
  phase, span = pl.program_id(3), pl.program_id(4)
  go = functools.partial(tiles_of.walk, plan, tables, row, block, span, documents)
  last = pl.num_programs(4) - 1
  two = plan.variant.power is not None

  @pl.when((phase == 0) & (span == 0))
  def _():
    tiles_of.split_heads(plan, r.q, r.queries)
    r.totals[...] = jnp.zeros_like(r.totals)
    r.sums[...] = jnp.zeros_like(r.sums)

  if plan.spans == 1:
    go(functools.partial(_first, plan, r, span))
    if two:
      _thresholds(plan, r)
      go(functools.partial(_second, plan, r, span))
    _finish(plan, r)
    return

  @pl.when(phase == 0)
  def _():
    go(functools.partial(_first, plan, r, span))

  if two:

    @pl.when((phase == 1) & (span == 0))
    def _():
      _thresholds(plan, r)

    @pl.when(phase == 1)
    def _():
      go(functools.partial(_second, plan, r, span))

  @pl.when((phase == int(two)) & (span == last))
  def _():
    _finish(plan, r)


def _scored(plan, r, here, head, start, sight):
  """f of a panel, float32 [keys, panel]."""
  q = r.queries[head, pl.ds(start, plan.panel), :]
  score = r.rows[0:1, start : start + plan.panel] * dot_f32(r.k[here, :], q, NT)
  return sight.only(tiles_of.softplus(plan, score).value)


def _first(plan, r, span, tile, seen):
  """Adds a tile to the sum of f, and to the largest, or to the weighted values if that is all."""
  for head, start in panels(plan):
    sight, columns = seen(start), slice(start, start + plan.panel)
    here = tiles_of.local(plan, tile, span, sight.count)
    f = _scored(plan, r, here, head, start, sight)
    total, top = pl.ds(2 * head, 1), pl.ds(2 * head + 1, 1)
    r.totals[total, columns] += jnp.sum(f, 0, keepdims=True)
    if plan.variant.power is None:
      r.sums[head, :, columns] += dot_f32(r.v[here, :], f.astype(plan.dtype), TN)
      continue
    r.totals[top, columns] = jnp.maximum(r.totals[top, columns], jnp.max(f, 0, keepdims=True))
    if r.strip is not None:
      r.strip[head, here, columns] = f


def _second(plan, r, span, tile, seen):
  """Adds a tile to the sum of the weights and to the weighted values."""
  for head, start in panels(plan):
    sight, columns = seen(start), slice(start, start + plan.panel)
    here = tiles_of.local(plan, tile, span, sight.count)
    if r.strip is not None:
      f = r.strip[head, here, columns]
    else:
      f = _scored(plan, r, here, head, start, sight)
    taken, inverse = (r.stats[statistic(x, head), columns] for x in ("taken", "inverse"))
    excess = jnp.maximum(f - taken, 0) * inverse
    weights = tiles_of.power(excess, plan.variant.power)
    total = pl.ds(2 * head, 1)
    r.totals[total, columns] += jnp.sum(weights, 0, keepdims=True)
    r.sums[head, :, columns] += dot_f32(r.v[here, :], weights.astype(plan.dtype), TN)


def _first_total(plan, total):
  c = plan.variant
  total = total + c.eps_first if c.epsilon == "add" else total
  return jnp.maximum(total, c.eps_first) if c.epsilon == "clamp" else total


def _thresholds(plan, r):
  """From sum and largest f to the statistics of the second pass."""
  c = plan.variant
  count = r.rows[1:2, :]
  for head in range(plan.fold):
    total, top = r.totals[pl.ds(2 * head, 1), :], r.totals[pl.ds(2 * head + 1, 1), :]
    mean = _first_total(plan, total) / count
    taken = jnp.where(count <= c.skip_rows, 0.0, c.offset) * mean
    excess = top - taken
    live = excess > (c.flat_tolerance * mean if c.epsilon == "none" else 0.0)
    r.stats[statistic("mean", head), :] = mean
    r.stats[statistic("taken", head), :] = taken
    r.stats[statistic("inverse", head), :] = jnp.where(live, 1 / jnp.where(live, excess, 1), 0)
    r.totals[pl.ds(2 * head, 1), :] = jnp.zeros_like(total)


def _denominator(plan, r, head, total):
  """1 / what the weights are divided by; 0 in rows without a weight."""
  c = plan.variant
  if c.power is None:
    total = _first_total(plan, total)
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
  inverse = r.stats[statistic("inverse", head), :]
  live = inverse > 0
  if c.epsilon != "none" and c.eps_second:
    # The epsilon belongs to sums of (A N - O)^p; in units of the largest it is this much.
    unit = jnp.where(live, r.stats[statistic("mean", head), :] * inverse, 1)
    eps = jnp.exp(jnp.minimum(jnp.log(c.eps_second) + c.power * jnp.log(unit), 80.0))
    total = total + eps if c.epsilon == "add" else jnp.maximum(total, eps)
  return jnp.where(live, 1 / jnp.where(live, total, 1), 0)


def _finish(plan, r):
  means = []
  for head in range(plan.fold):
    total = r.totals[pl.ds(2 * head, 1), :]
    weight = _denominator(plan, r, head, total)
    means.append(r.sums[head] * weight)
    r.stats[statistic("weight", head), :] = weight
    if plan.variant.power is None:
      r.stats[statistic("mean", head), :] = _first_total(plan, total) / r.rows[1:2, :]
      for unused in ("taken", "inverse"):
        r.stats[statistic(unused, head), :] = jnp.zeros_like(weight)
  r.out[...] = tiles_of.join_heads(plan, means).astype(r.out.dtype)


def forward(plan: Plan, tables: Tables, operands, save: bool):
  """[output [B T', U * value lanes]], with `save` also the statistics; layouts in `tpu_tiles`.

  operands: q, k, v, rows [P, 2, T'] and maybe the documents of queries and keys.
  """
  two = plan.variant.power is not None
  strip = two and tpu_tuning.strips_fit(plan, 1)
  limit = vmem_limit(tpu_tuning.vmem_estimate(plan, int(strip)))
  rows = tiles_of.row_block(plan, operands[3].shape[0], 2)
  inputs = [tiles_of.query_block(plan, plan.key_lanes), tiles_of.key_block(plan, plan.key_lanes),
            tiles_of.key_block(plan, plan.value_lanes), rows]  # fmt: skip
  if plan.documents:
    inputs += [tiles_of.row_block(plan, plan.batch, 1, jnp.int32), tiles_of.key_row_block(plan)]
  outputs = [tiles_of.query_block(plan, plan.value_lanes)]
  statistics = tiles_of.head_block(plan, tiles_of.STATISTICS)
  scratch = [
    pltpu.VMEM((plan.fold, plan.rows, plan.key_lanes), plan.dtype),
    pltpu.VMEM((plan.fold, plan.value_lanes, plan.rows), jnp.float32),
    pltpu.VMEM((2 * plan.fold, plan.rows), jnp.float32),
  ]
  if strip:
    scratch.append(pltpu.VMEM((plan.fold, plan.span, plan.rows), jnp.float32))
  if save:
    outputs.append(statistics)
  else:
    scratch.append(pltpu.VMEM(statistics.block[2:], jnp.float32))
  products, functions = (2, 2) if not two or strip else (3, 4)
  return tiles_of.call(
    functools.partial(_forward_kernel, plan=plan, strip=strip, save=save),
    "softplus_attention_forward", plan, _grid(plan, two), tables, operands, inputs, outputs,
    scratch, (products, functions), limit,
  )  # fmt: skip


def _grid(plan, two):
  phases = 2 if two and plan.spans > 1 else 1

  def point(at, tables):
    b, u, i, _, j = at
    return b, u, i, tiles_of.needed_span(plan, tables, b, i, j)

  size = plan.batch, plan.units, plan.steps, phases, plan.spans
  return Grid(size, point, ("parallel",) * 3 + ("arbitrary",) * 2)
