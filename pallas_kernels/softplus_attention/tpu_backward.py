"""The backward TPU kernels of softplus attention.

With w the weights, a = f(s), m its mean over N keys, t = max(0, a - O m) / g_max and a dot for the
product with the cotangent dO, all of one query:

  dW_j = dO . v_j        D = sum_j w_j dW_j        dv_j = sum over queries of w_j dO
  LSSA:   da_j = (dW_j - D) / sum a
  LSSAR:  y_j = p w_j / g_j (dW_j - D)     da_j = y_j + Gam     Gam = -O sum_j y_j / N
  ds_j = sigmoid(s_j) da_j      dq = c sum_j ds_j k_j      dk_j = sum over queries of c ds_j q

Gam reaches every key, also those below the threshold. D and sum_j y_j come first, from the same
tiles of weights that the rest is made of: where one weight is all there is, dW - D must be 0, and a
D from the rounded output would leave rounding errors that the power multiplies.

Where all keys are one span, row sums and gradients are the two halves of a grid step; scores and dW
stay in VMEM between them if a row of tiles fits. Otherwise they are a kernel each, and the parts of
dq from different spans are added up outside. Gradients of keys stay in VMEM while the queries that
see them go by, over all heads that share them; every sum has one fixed order.
"""

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..dots import NN, NT, TN, dot_f32
from ..tpu_sizes import vmem_limit
from . import tpu_tiles as tiles_of
from . import tpu_tuning
from .tpu_tiles import Grid, Operand, Plan, Tables, panels, statistic

STRIPS = 2  # scores and dW
CLAMPED = 1e-6  # relative; a sum that near to an epsilon counts as clamped


class Refs(NamedTuple):
  """Blocks and scratch of both kernels."""

  q: Any  # [R, key lanes]
  k: Any  # [span, key lanes]
  v: Any  # [span, value lanes]
  d_out: Any  # [R, value lanes]
  rows: Any  # [2, R]: scale in units of log 2, count
  stats: Any  # [STATISTICS * fold, R]
  documents: tuple  # of queries [1, R] and keys [1, span], or nothing
  queries: Any  # [fold, R, key lanes], other heads' lanes 0; d_sums likewise
  d_sums: Any  # [fold, R, value lanes]
  sums: Any  # [4 * fold, R]: sums of w dW, y's two, w (without their factors)
  shared: Any  # [2 * fold, R]: D and Gam
  strips: Any = None  # [2, fold, span, R] of scores and dW, or nothing


class Gradients(NamedTuple):
  dq: Any  # float32 [fold, key lanes, R]
  dk: Any  # float32 [span, key lanes]
  dv: Any  # float32 [span, value lanes]


def _take(refs: list, plan: Plan, given: bool) -> dict:
  """The blocks that come in, by name; `given`: what is shared by a row is one of them."""
  names = ["q", "k", "v", "d_out", "rows", "stats"] + (["shared"] if given else [])
  found = {name: refs.pop(0) for name in names}
  found["documents"] = tuple(refs.pop(0) for _ in range(2 if plan.documents else 0))
  return found


def _rows_kernel(*refs, plan: Plan):
  """Out: `shared`. The grid is (b, u, i, J)."""
  tables, refs = Tables(*refs[:2]), list(refs[2:])
  found = _take(refs, plan, given=False)
  shared, queries, d_sums, sums = refs
  r = Refs(**found, queries=queries, d_sums=d_sums, sums=sums, shared=shared)
  row, block, span = (pl.program_id(axis) for axis in (0, 2, 3))

  @pl.when(span == 0)
  def _():
    _start(plan, r)

  tiles_of.walk(plan, tables, row, block, span, r.documents, functools.partial(_sum, plan, r, span))

  @pl.when(span == pl.num_programs(3) - 1)
  def _():
    _share(plan, r)


def _gradient_kernel(*refs, plan: Plan, strips: int):
  """Out: dq, dk, dv. The grid is (b, g, J, head that shares the keys, i)."""
  tables, refs = Tables(*refs[:2]), list(refs[2:])
  alone = plan.spans == 1
  found = _take(refs, plan, given=not alone)
  dq_ref, dk_ref, dv_ref, *refs = refs
  if strips:
    found["strips"] = refs.pop()
  if alone:
    found["shared"] = refs.pop()
  queries, d_sums, sums, *parts = refs
  r = Refs(**found, queries=queries, d_sums=d_sums, sums=sums)
  grads = Gradients(*parts)
  row, span, turn, block = (pl.program_id(axis) for axis in (0, 2, 3, 4))
  go = functools.partial(tiles_of.walk, plan, tables, row, block, span, r.documents)

  @pl.when((turn == 0) & (block == 0))
  def _():
    grads.dk[...] = jnp.zeros_like(grads.dk)
    grads.dv[...] = jnp.zeros_like(grads.dv)

  _start(plan, r)
  grads.dq[...] = jnp.zeros_like(grads.dq)
  if alone:
    go(functools.partial(_sum, plan, r, span))
    _share(plan, r)
  go(functools.partial(_add_gradients, plan, r, grads, span))
  dq = tiles_of.join_heads(plan, [grads.dq[head] for head in range(plan.fold)])
  dq_ref[...] = dq.astype(dq_ref.dtype)

  @pl.when((turn == plan.repeat - 1) & (block == plan.steps - 1))
  def _():
    dk_ref[...] = grads.dk[...].astype(dk_ref.dtype)
    dv_ref[...] = grads.dv[...].astype(dv_ref.dtype)


def _start(plan, r):
  tiles_of.split_heads(plan, r.q, r.queries)
  tiles_of.split_heads(plan, r.d_out, r.d_sums)
  r.sums[...] = jnp.zeros_like(r.sums)


def _tile(plan, r, here, head, start, again=False):
  """(f, dW) of a panel, float32 [keys, panel]; nothing is masked yet. again: it was made before."""
  queries = pl.ds(start, plan.panel)
  columns = slice(start, start + plan.panel)
  if r.strips is not None and again:
    score, d_weights = (r.strips[i, head, here, columns] for i in range(2))
    return tiles_of.softplus(plan, score), d_weights
  score = r.rows[0:1, columns] * dot_f32(r.k[here, :], r.queries[head, queries, :], NT)
  d_weights = dot_f32(r.v[here, :], r.d_sums[head, queries, :], NT)
  if r.strips is not None:
    for index, x in enumerate((score, d_weights)):
      r.strips[index, head, here, columns] = x
  return tiles_of.softplus(plan, score), d_weights


def _raised(plan, r, f, head, columns):
  """(t^(p - 1), t^p) of f, [keys, panel]; without a power (None, f)."""
  if plan.variant.power is None:
    return None, f
  taken, inverse = (r.stats[statistic(x, head), columns] for x in ("taken", "inverse"))
  return tiles_of.powers(jnp.maximum(f - taken, 0) * inverse, plan.variant.power)


def _sum(plan, r, span, tile, seen):
  """Adds a tile to the row sums."""
  for head, start in panels(plan):
    sight, columns = seen(start), slice(start, start + plan.panel)
    here = tiles_of.local(plan, tile, span, sight.count)
    f, d_weights = _tile(plan, r, here, head, start)
    below, weights = _raised(plan, r, sight.only(f.value), head, columns)
    added = [weights * d_weights]
    if below is not None:
      added += [below * d_weights, below]
      added += [weights] if plan.variant.epsilon != "none" else []
    for index, x in enumerate(added):
      r.sums[pl.ds(4 * head + index, 1), columns] += jnp.sum(x, 0, keepdims=True)


def _share(plan, r):
  """D and Gam from the row sums."""
  c = plan.variant
  count = r.rows[1:2, :]
  for head in range(plan.fold):
    stat = lambda which, head=head: r.stats[statistic(which, head), :]  # noqa: E731
    total, with_d, plain, weights = (r.sums[pl.ds(4 * head + i, 1), :] for i in range(4))
    weight, mean = stat("weight"), stat("mean")
    delta, gamma = weight * total, jnp.zeros_like(total)
    fixed = jnp.full(mean.shape, False)  # the mean is an epsilon
    if c.epsilon == "clamp":
      fixed = mean * count <= c.eps_first * (1 + CLAMPED)
    if c.power is None:
      delta = jnp.where(fixed, 0, delta)
    else:
      whole = delta
      if c.epsilon == "clamp":
        delta = jnp.where(weights * weight < 1 - CLAMPED, 0, delta)
      of_power = c.power * stat("inverse") * weight * (with_d - delta * plain)  # sum of y
      of_mean = -jnp.where(count <= c.skip_rows, 0.0, c.offset) * of_power
      if c.epsilon != "none":  # the weights' sum depends on the unit of g, which is m
        of_mean -= c.power * (whole - delta * weights * weight) / mean
      gamma = jnp.where(fixed, 0, of_mean / count)
    r.shared[pl.ds(2 * head, 1), :] = delta
    r.shared[pl.ds(2 * head + 1, 1), :] = gamma


def _add_gradients(plan, r, grads, span, tile, seen):
  """Adds a tile's share to dq, dk and dv."""
  for head, start in panels(plan):
    sight, columns = seen(start), slice(start, start + plan.panel)
    here, queries = tiles_of.local(plan, tile, span, sight.count), pl.ds(start, plan.panel)
    delta, gamma = (r.shared[pl.ds(2 * head + i, 1), columns] for i in range(2))
    weight, inverse = (r.stats[statistic(x, head), columns] for x in ("weight", "inverse"))
    scale = math.log(2) * r.rows[0:1, columns]
    f, d_weights = _tile(plan, r, here, head, start, again=True)
    below, weights = _raised(plan, r, sight.only(f.value), head, columns)
    if below is None:
      d_scores = (weight * scale) * (d_weights - delta)
    else:
      factor = plan.variant.power * inverse * weight * scale
      d_scores = below * (factor * (d_weights - delta)) + gamma * scale
    d_scores = sight.only(tiles_of.sigmoid(plan, f) * d_scores).astype(plan.dtype)
    weights = (weights * weight).astype(plan.dtype)
    grads.dv[here, :] += dot_f32(weights, r.d_sums[head, queries, :], NN)
    grads.dk[here, :] += dot_f32(d_scores, r.queries[head, queries, :], NN)
    grads.dq[head, :, columns] += dot_f32(r.k[here, :], d_scores, TN)


def backward(plan: Plan, tables: Tables, operands, statistics, d_output):
  """(dq [B T', U * key lanes], dk, dv [B S', G * lanes]); operands as `tpu.forward`."""
  strips = STRIPS if tpu_tuning.strips_fit(plan, STRIPS) else 0
  limit = vmem_limit(tpu_tuning.vmem_estimate(plan, strips))
  q, k, v, rows, *documents = operands
  inputs = [tiles_of.query_block(plan, plan.key_lanes), tiles_of.key_block(plan, plan.key_lanes),
            tiles_of.key_block(plan, plan.value_lanes),
            tiles_of.query_block(plan, plan.value_lanes),
            tiles_of.row_block(plan, rows.shape[0], 2),
            tiles_of.head_block(plan, tiles_of.STATISTICS)]  # fmt: skip
  shared, of_documents = tiles_of.head_block(plan, 2), []
  if plan.documents:
    of_documents = [tiles_of.row_block(plan, plan.batch, 1, jnp.int32),
                    tiles_of.key_row_block(plan)]  # fmt: skip
  arrays = [q, k, v, d_output, rows, statistics]
  scratch = [
    pltpu.VMEM((plan.fold, plan.rows, plan.key_lanes), plan.dtype),
    pltpu.VMEM((plan.fold, plan.rows, plan.value_lanes), plan.dtype),
    pltpu.VMEM((4 * plan.fold, plan.rows), jnp.float32),
  ]
  gradients = [
    pltpu.VMEM((plan.fold, plan.key_lanes, plan.rows), jnp.float32),
    pltpu.VMEM((plan.span, plan.key_lanes), jnp.float32),
    pltpu.VMEM((plan.span, plan.value_lanes), jnp.float32),
  ]
  if plan.spans == 1:
    of_rows, blocks, cost = [], [], (5 if strips else 7, 5)
    gradients.append(pltpu.VMEM((2 * plan.fold, plan.rows), jnp.float32))
    if strips:
      gradients.append(pltpu.VMEM((strips, plan.fold, plan.span, plan.rows), jnp.float32))
  else:
    of_rows = tiles_of.call(
      functools.partial(_rows_kernel, plan=plan), "softplus_attention_row_sums", plan,
      _rows_grid(plan), tables, (*arrays, *documents), [*inputs, *of_documents], [shared], scratch,
      (2, 2), limit,
    )  # fmt: skip
    blocks, cost = [shared], (5, 3)
  dq, dk, dv = tiles_of.call(
    functools.partial(_gradient_kernel, plan=plan, strips=strips), "softplus_attention_backward",
    plan, _gradient_grid(plan), tables, (*arrays, *of_rows, *documents),
    [*inputs, *blocks, *of_documents],
    [_dq_block(plan), *(tiles_of.key_block(plan, x) for x in (plan.key_lanes, plan.value_lanes))],
    [*scratch, *gradients], cost, limit,
  )  # fmt: skip
  return jnp.sum(dq, 0).astype(plan.dtype), dk, dv


def _dq_block(plan):
  """A part for every span; in float32 where there are several to add."""
  shape = (plan.spans, plan.batch * plan.length, plan.units * plan.key_lanes)
  dtype = plan.dtype if plan.spans == 1 else jnp.float32
  place = lambda b, u, i, j: (j, b * plan.steps + i, u)  # noqa: E731
  return Operand(shape, dtype, (None, plan.rows, plan.key_lanes), place)


def _rows_grid(plan):
  def point(at, tables):
    b, u, i, j = at
    return b, u, i, tiles_of.needed_span(plan, tables, b, i, j)

  size = plan.batch, plan.units, plan.steps, plan.spans
  return Grid(size, point, ("parallel",) * 3 + ("arbitrary",))


def _gradient_grid(plan):
  def point(at, tables):
    b, g, j, turn, i = at
    return b, g * plan.repeat + turn, i, j

  size = plan.batch, plan.groups, plan.spans, plan.repeat, plan.steps
  return Grid(size, point, ("parallel",) * 3 + ("arbitrary",) * 2)
