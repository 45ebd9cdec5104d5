"""The forward TPU kernel of code_attention.

The grid is (batch, blocks of labels, spans of tokens): a softmax that is rescaled from tile to tile
of tokens. Where a document is one span its keys and values are loaded once, and the queries once
for each document.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..dots import NT, TN, dot_f32
from ..tpu_sizes import vmem_limit
from . import tpu_tiles as tiles_of
from . import tpu_tuning
from .tpu_tiles import Grid, Plan, Tables, panels

SMALLEST = 1e-30  # for a factor of 0: minus infinity times it is what it was


class Refs(NamedTuple):
  """Blocks and scratch."""

  q: Any  # [block, K]
  k: Any  # [span, K]
  v: Any  # [span, V]
  real: Any  # float32 [1, span]: 1 for real tokens
  out: Any  # [block, V]
  top: Any  # [1, block], largest score so far
  total: Any  # [1, block], sum of exp(score - top)
  sums: Any  # float32 [V, block], values by exp(score - top)
  stats: Any = None  # [2, block]: largest score, 1 / sum of weights (0 without a token); if saved


def _forward_kernel(*refs, plan: Plan, save: bool):
  tables, refs = Tables(*refs[:2]), list(refs[2:])
  names = ["q", "k", "v", "real", "out", *(["stats"] if save else []), "top", "total", "sums"]
  r = Refs(**{name: refs.pop(0) for name in names})
  row, block, span = (pl.program_id(axis) for axis in range(3))
  if plan.ragged:
    tiles_of.copy_labels(plan, block, [(r.q, refs[0])])
    r = r._replace(q=refs[0])

  @pl.when(span == 0)
  def _():
    r.top[...] = jnp.full_like(r.top, -jnp.inf)
    r.total[...] = jnp.zeros_like(r.total)
    r.sums[...] = jnp.zeros_like(r.sums)

  tiles_of.walk(plan, tables, row, span, r.real, functools.partial(_add, plan, r))

  @pl.when(span == plan.spans - 1)
  def _():
    _finish(r)


def scored(plan: Plan, k, q_ref) -> list[jax.Array]:
  """For each panel the scores but for the size of their factor, float32 [tile, panel].

  Forward and backward make them by the same products: weights made again must be those whose sum
  is known, to the last bit where one of them is all there is.
  """
  scores = [dot_f32(k, q_ref[labels, :], NT) for labels in panels(plan)]
  return [-score for score in scores] if plan.scale < 0 else scores


def grown(plan: Plan, difference):
  """exp of a difference of scores; what is near the largest score loses nothing."""
  factor = abs(plan.scale) * tiles_of.LOG2_E
  return jnp.exp2(max(factor, SMALLEST) * difference)


def _add(plan, r, tile):
  """Adds a tile of tokens to the sums of all labels of the block.

  The panels' steps are side by side, so that products run beside other panels' exponentials.
  """
  k, v = tile.rows(r.k), tile.rows(r.v)
  each = panels(plan)
  scores = [tile.only(score, -jnp.inf) for score in scored(plan, k, r.q)]
  olds = [r.top[:, labels] for labels in each]
  tops = [
    jnp.maximum(old, jnp.max(score, 0, keepdims=True))
    for old, score in zip(olds, scores, strict=True)
  ]
  weights = [grown(plan, score - top) for score, top in zip(scores, tops, strict=True)]
  for labels, old, top, weight in zip(each, olds, tops, weights, strict=True):
    shrink = grown(plan, old - top)
    r.top[:, labels] = top
    r.total[:, labels] = shrink * r.total[:, labels] + jnp.sum(weight, 0, keepdims=True)
    r.sums[:, labels] = shrink * r.sums[:, labels] + dot_f32(v, weight, TN)


def _finish(r):
  total = r.total[...]
  some = total > 0
  inverse = jnp.where(some, 1 / jnp.where(some, total, 1), 0)
  r.out[...] = (r.sums[...] * inverse).T.astype(r.out.dtype)
  if r.stats is not None:
    r.stats[0:1, :] = jnp.where(some, r.top[...], 0)
    r.stats[1:2, :] = inverse


def forward(plan: Plan, tables: Tables, operands, save: bool):
  """[output [B, L, V]]; with `save` also the statistics, float32 [B, 2, L'].

  operands: query, key, value and real float32 [B, 1, T'].
  """
  inputs = [tiles_of.query_block(plan), tiles_of.token_block(plan, plan.key_dim),
            tiles_of.token_block(plan, plan.value_dim), tiles_of.real_block(plan)]  # fmt: skip
  outputs = [tiles_of.label_block(plan)]
  if save:
    outputs.append(tiles_of.statistic_block(plan, 2))
  scratch = [
    pltpu.VMEM((1, plan.block), jnp.float32),
    pltpu.VMEM((1, plan.block), jnp.float32),
    pltpu.VMEM((plan.value_dim, plan.block), jnp.float32),
  ]
  if plan.ragged:
    scratch.append(pltpu.VMEM((plan.block, plan.key_dim), plan.dtype))
  size = plan.batch, plan.blocks, plan.spans
  grid = Grid(size, lambda b, i, j: (b, i, j), ("parallel", "parallel", "arbitrary"))
  return tiles_of.call(
    functools.partial(_forward_kernel, plan=plan, save=save), "code_attention_forward", plan, grid,
    tables, operands, inputs, outputs, scratch, plan.key_dim + plan.value_dim,
    vmem_limit(tpu_tuning.vmem_estimate(plan)),
  )  # fmt: skip
