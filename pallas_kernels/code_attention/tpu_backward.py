"""The backward TPU kernel of code_attention.

With p the weights and dO the cotangent of a document, D_l = dO_l . out_l:

  dp_tl = v_t . dO_l      ds = p (dp - D)      dv_t = sum_l p_tl dO_l
  dq_l = scale sum over b, t of ds_tl k_t      dk_t = scale sum_l ds_tl q_l

The grid is (parts of the batch, documents, spans of tokens, blocks of labels). One kernel makes all
three, so that scores and dp are computed once. Gradients of a span stay in VMEM while the labels go
by, those of the queries over all documents of a part; where VMEM is too small for them, every
document and span writes its share. What is summed outside is float32; every sum has one order.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..dots import NN, NT, TN, dot_f32
from ..tpu_sizes import vmem_limit
from . import tpu_tiles as tiles_of
from . import tpu_tuning
from .tpu import grown, scored
from .tpu_tiles import Grid, Operand, Plan, Tables


class Refs(NamedTuple):
  """Blocks and scratch."""

  q: Any  # [block, K]
  k: Any  # [span, K]
  v: Any  # [span, V]
  real: Any  # float32 [1, span]: 1 for real tokens
  d_out: Any  # [block, V]
  stats: Any  # [2, block]: largest score, 1 / sum of weights
  delta: Any  # [1, block], D
  dq: Any  # [block, K]
  dk: Any  # [span, K]
  dv: Any  # [span, V]
  dq_sums: Any  # float32 [blocks or 1, K, block]
  dk_sums: Any  # float32 [span, K]
  dv_sums: Any  # float32 [span, V]


def _backward_kernel(*refs, plan: Plan):
  tables, refs = Tables(*refs[:2]), refs[2:]
  count = len(Refs._fields)
  r, copies = Refs(*refs[:count]), refs[count:]
  part, turn, span, block = (pl.program_id(axis) for axis in range(4))
  turns = plan.batch // plan.parts
  if plan.ragged:
    tiles_of.copy_labels(plan, block, zip((r.q, r.d_out), copies, strict=True))
    r = r._replace(q=copies[0], d_out=copies[1])
  slot, first, last = 0, True, True  # of the gradient of these queries
  if plan.resident:
    slot = block
    first = (turn == 0) & (span == 0)
    last = (turn == turns - 1) & (span == plan.spans - 1)

  @pl.when(first)
  def _():
    r.dq_sums[slot] = jnp.zeros(r.dq_sums.shape[1:], jnp.float32)

  @pl.when(block == 0)
  def _():
    r.dk_sums[...] = jnp.zeros_like(r.dk_sums)
    r.dv_sums[...] = jnp.zeros_like(r.dv_sums)

  row = part * turns + turn
  tiles_of.walk(plan, tables, row, span, r.real, functools.partial(_add, plan, r, slot))

  @pl.when(last)
  def _():
    r.dq[...] = (plan.scale * r.dq_sums[slot]).T.astype(r.dq.dtype)

  @pl.when(block == plan.blocks - 1)
  def _():
    r.dk[...] = (plan.scale * r.dk_sums[...]).astype(r.dk.dtype)
    r.dv[...] = r.dv_sums[...].astype(r.dv.dtype)


def _add(plan, r, slot, tile):
  """Adds what a tile of tokens and the labels of the block give to each other."""
  k, v, q, d_out = tile.rows(r.k), tile.rows(r.v), r.q[...], r.d_out[...]
  top, inverse = r.stats[0:1, :], r.stats[1:2, :]
  scores = jnp.concatenate(scored(plan, k, r.q), 1)  # [tile, block]
  weights = tile.only(grown(plan, scores - top) * inverse, 0.0)
  d_scores = weights * (dot_f32(v, d_out, NT) - r.delta[...])
  weights, d_scores = (x.astype(plan.dtype) for x in (weights, d_scores))
  r.dv_sums[tile.here, :] += dot_f32(weights, d_out, NN)
  r.dk_sums[tile.here, :] += dot_f32(d_scores, q, NN)
  r.dq_sums[slot] += dot_f32(k, d_scores, TN)  # [K, block]


def backward(plan: Plan, tables: Tables, operands, d_out, stats, delta):
  """(d query [L, K], d key [B, T, K], d value [B, T, V]) in the dtype of the operands.

  operands: as of the forward kernel; d_out: [B, L, V]; stats, delta: float32 [B, 2, L'] and
  [B, 1, L'].
  """
  query, keys, values = (
    tiles_of.query_block(plan), tiles_of.token_block(plan, plan.key_dim),
    tiles_of.token_block(plan, plan.value_dim),
  )  # fmt: skip
  inputs = [query, keys, values, tiles_of.real_block(plan), tiles_of.label_block(plan)]
  inputs += [tiles_of.statistic_block(plan, count) for count in (2, 1)]
  shares = _shares(plan)
  outputs = [shares, tiles_of.token_block(plan, plan.key_dim, result=True),
             tiles_of.token_block(plan, plan.value_dim, result=True)]  # fmt: skip
  scratch = [
    pltpu.VMEM((plan.blocks if plan.resident else 1, plan.key_dim, plan.block), jnp.float32),
    pltpu.VMEM((plan.span, plan.key_dim), jnp.float32),
    pltpu.VMEM((plan.span, plan.value_dim), jnp.float32),
  ]
  if plan.ragged:
    scratch.append(pltpu.VMEM((plan.block, plan.key_dim), plan.dtype))
    scratch.append(pltpu.VMEM((plan.block, plan.value_dim), plan.dtype))
  turns = plan.batch // plan.parts
  size = plan.parts, turns, plan.spans, plan.blocks
  point = lambda part, turn, j, i: (part * turns + turn, i, j)  # noqa: E731
  grid = Grid(size, point, ("parallel", "arbitrary", "arbitrary", "arbitrary"))
  d_query, d_key, d_value = tiles_of.call(
    functools.partial(_backward_kernel, plan=plan), "code_attention_backward", plan, grid, tables,
    (*operands, d_out, stats, delta), inputs, outputs, scratch,
    3 * plan.key_dim + 2 * plan.value_dim, vmem_limit(tpu_tuning.vmem_estimate(plan)),
  )  # fmt: skip
  d_query = d_query[0] if d_query.shape[0] == 1 else jnp.sum(d_query, 0)
  return d_query.astype(plan.dtype), d_key, d_value


def _shares(plan: Plan) -> Operand:
  """The gradient of the queries, [shares, L, K]: of each part, or of each document and span."""
  count = plan.parts if plan.resident else plan.batch * plan.spans
  turns = plan.batch // plan.parts

  def place(at, tables):
    b, i, j = at
    if not plan.resident:
      return b * plan.spans + j, i, 0
    # Nothing is written before the last document and span of a part: block 0 waits for it.
    done = (b % turns == turns - 1) & (j == plan.spans - 1)
    return b // turns, jax.lax.select(done, i, jnp.zeros_like(i)), 0

  dtype = plan.dtype if count == 1 else jnp.float32
  shape, block = (count, plan.labels, plan.key_dim), (None, plan.block, plan.key_dim)
  return Operand(shape, dtype, block, place)
