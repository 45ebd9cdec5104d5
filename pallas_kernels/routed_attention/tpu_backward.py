"""The backward TPU kernel of routed attention.

With P the weights of a cluster, d the cotangent of the output over its divisor and i, j slots:

  dP_ij = d_i . (v_j + B[j - i])    dL = P (dP - sum_j P dP)      dv_j = sum_i P_ij d_i
  dq_i = sum_j dL_ij (scale k_j + A[j - i])    dk_j = scale sum_i dL_ij q_i
  dA[r] = sum_{j - i = r} dL_ij q_i            dB[r] = sum_{j - i = r} P_ij d_i

All keys of a panel of queries are in VMEM as strips of P and dP, so that the softmax is made again
without statistics from the forward kernel, and the sum of P dP needs no output. Gradients of a
cluster's members are added to those of the tokens as in the forward kernel.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..dots import NN, NT, TN, dot_f32
from . import tpu, tpu_rows, tpu_tuning
from . import tpu_tiles as tiles_of
from .tpu_rows import chunks, lane_tiles, reversed_in_eights, scatter_add, skew, unskew
from .tpu_tiles import Plan


class Gradients(NamedTuple):
  """float32 sums."""

  members: dict  # by name, [L, W, 128]: of a cluster's slots
  keys_table: Any  # [offsets, lanes], or None; values_table alike
  values_table: Any


def _backward_kernel(*refs, plan: Plan):
  names = tiles_of.token_names(plan, backward=True)
  refs = list(refs)
  take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
  members, places, (weights,) = take(plan.sides), take(plan.sides), take(1)
  blocks = dict(zip(names, take(len(names)), strict=True))
  tables = take(2) if plan.relative else [None, None]
  results = dict(zip(names[:-1], take(len(names) - 1), strict=True))
  d_tables = take(2) if plan.relative else [None, None]
  strips, words, rows, cluster, refs = tiles_of.split_scratch(plan, refs, True, 2)
  take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
  sums = dict(zip(results, take(len(results)), strict=True))
  parts = dict(zip(results, take(len(results)), strict=True))
  around = cluster._replace(keys_table=tables[0], values_table=tables[1])
  g = Gradients(parts, *d_tables)

  if plan.relative:

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
      for ref in d_tables:
        ref[...] = jnp.zeros_like(ref)

  @pl.when(pl.program_id(2) == 0)
  def _():
    tiles_of.pack_tokens(plan, blocks, words, weights, backward=True)
    for ref in sums.values():
      tpu_rows.clear(ref)

  def attend(head):
    c = around._replace(head=head)
    tiles_of.take_members(plan, head, members, words, rows, backward=True)
    tiles_of.find_unseen(plan, places, c)
    for ref in parts.values():
      ref[...] = jnp.zeros_like(ref)
    tiles_of.panels(plan, functools.partial(_panel, plan, c, strips, g))
    for side in range(plan.sides):
      mine = [x for x in parts if plan.sides == 1 or (x != "q") == side]
      scatter_add(members[side], head, [(parts[x], sums[x]) for x in mine])

  tiles_of.heads(plan, attend)

  @pl.when(pl.program_id(2) == plan.clusters - 1)
  def _():
    def write(here):
      for name, ref in results.items():
        x = [sums[name][n, here, :] for n in range(plan.lane_tiles)]
        ref[here, :] = jnp.concatenate(x, 1).astype(ref.dtype)

    chunks(plan.length, write)


def _add(ref, rows, x):
  """x [R, lanes] to rows of [L, W, 128]."""
  for n, tile in enumerate(lane_tiles(x)):
    ref[n, rows, :] += tile


def _panel(plan, c, strips, g, panel):
  """Gradients from a panel's queries."""
  here = tiles_of.panel_rows(plan, panel)
  q, d = c.q[here, :], c.d[here, :]
  of_weights, of_d_weights = strips
  top = tpu.find_tops(plan, c, of_weights, panel)

  def weigh(t, carry):
    total, delta = carry
    weights = tpu.weigh(plan, of_weights.get(t), top)
    d_weights = dot_f32(d, c.v[pl.ds(t.start, t.width), :], NT)
    if plan.relative:
      table = c.values_table[tiles_of.table_rows(plan, panel, t), :]
      d_weights += skew(dot_f32(d, table, NT), t.width)
    of_weights.put(t, weights)
    of_d_weights.put(t, d_weights)
    total += tiles_of.lanes_sum(weights)
    return total, delta + tiles_of.lanes_sum(weights * d_weights)

  start = tpu.zeros(plan, *[tpu_rows.LANES] * 2)
  total, delta = tiles_of.tiles(plan, panel, weigh, start)
  inverse = tpu.over_total(total)
  delta = _mean(delta, inverse)
  if plan.relative:
    turned = [reversed_in_eights(x.astype(jnp.float32)).astype(plan.dtype) for x in (q, d)]

  def add(t, d_query):
    d_query = list(d_query)
    weights = of_weights.get(t) * inverse
    d_logits = weights * (of_d_weights.get(t) - delta)
    if plan.own_last:
      d_logits = jnp.where(tiles_of.own_pairs(plan, c, panel, t), 0, d_logits)
    keys, rounded = pl.ds(t.start, t.width), d_logits.astype(plan.dtype)
    _add(g.members["v"], keys, dot_f32(weights.astype(plan.dtype), d, TN))
    d_keys = dot_f32(rounded, q, TN)
    _add(g.members["q" if plan.shared_keys else "k"], keys, _scaled(plan, d_keys))
    d_query[0] += _scaled(plan, dot_f32(rounded, c.k[keys, :], NN))
    if plan.relative:
      offsets = tiles_of.table_rows(plan, panel, t)
      g.values_table[offsets, :] += dot_f32(unskew(weights).astype(plan.dtype), turned[1], TN)
      by_offset = unskew(d_logits).astype(plan.dtype)
      g.keys_table[offsets, :] += dot_f32(by_offset, turned[0], TN)
      d_query[1] += dot_f32(by_offset, c.keys_table[offsets, :], NN)
    return tuple(d_query)

  start = tpu.zeros(plan, *[plan.lanes] * (1 + plan.relative))
  d_query = tiles_of.tiles(plan, panel, add, start)
  _add(g.members["q"], here, tiles_of.with_table(plan, c, d_query))


def _mean(sums, inverse):
  return jnp.sum(sums, 1, keepdims=True) * inverse


def _scaled(plan, x):
  return x if plan.scale == 1 else x * plan.scale


def backward(plan: Plan, members, weights, tokens, tables):
  """(gradients of the tokens by name, [B, T, U * lanes]; of the tables, float32).

  Arguments as `tpu.forward`; `tokens` has "d" for the cotangent of the output.
  """
  names = tiles_of.token_names(plan, backward=True)
  operands = [*members, *members, weights, *(tokens[x] for x in names), *tables]
  sums = pltpu.VMEM((plan.lane_tiles, plan.length + tpu_rows.SUBLANES, tpu_rows.LANES), jnp.float32)
  parts = pltpu.VMEM((plan.lane_tiles, plan.slots, tpu_rows.LANES), jnp.float32)
  scratch = [
    *tiles_of.scratch(plan, True, 2),
    *(x for x in (sums, parts) for _ in names[:-1]),
  ]
  specs = [*tiles_of.member_specs(plan), tiles_of.weight_spec(plan)]
  specs += [tiles_of.token_spec(plan) for _ in names]
  specs += [tiles_of.table_spec(plan) for _ in tables]
  flat = jax.ShapeDtypeStruct((plan.batch, plan.length, plan.units * plan.lanes), plan.dtype)
  table = jax.ShapeDtypeStruct((plan.batch, plan.offsets, plan.lanes), jnp.float32)
  shapes = [*(flat for _ in names[:-1]), *(table for _ in tables)]
  results = [tiles_of.token_spec(plan) for _ in names[:-1]]
  results += [
    pl.BlockSpec((None, plan.offsets, plan.lanes), lambda b, u, c: (b, 0, 0)) for _ in tables
  ]
  pairs = tiles_of.pairs(plan)
  grads = pl.pallas_call(
    functools.partial(_backward_kernel, plan=plan),
    out_shape=shapes,
    grid=(plan.batch, plan.units, plan.clusters),
    in_specs=specs,
    out_specs=results,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=tpu_tuning.vmem_limit(plan, backward=True),
    ),
    cost_estimate=tiles_of.cost(plan, operands, shapes, pairs, 5 + 5 * plan.relative),
    interpret=plan.interpret,
    name="routed_attention_backward",
  )(*operands)
  count = len(names) - 1
  return dict(zip(names, grads[:count], strict=False)), [jnp.sum(x, 0) for x in grads[count:]]
