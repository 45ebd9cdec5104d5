"""Softmax over summaries in VMEM, tile by tile, inside of the TPU kernels.

Summaries are rows here and tokens columns: maximum and sum over summaries are then arithmetic
between registers, and what belongs to a token is a row. Scores are in units of log 2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..dots import NN, NT, TN, dot_f32
from . import tpu_rows as rows_of


class Forward(NamedTuple):
  """References of a running softmax; F heads share a lane tile, and each has its own lanes."""

  keys: Any  # [slots, lanes]
  values: Any
  queries: Any  # [F, R, lanes], scaled, other heads' lanes 0
  weighted: Any  # float32 [F, lanes, R], sums of weighted values
  stats: Any  # float32 [2 F, R], of each head the largest score and the sum of weights


class Backward(NamedTuple):
  keys: Any
  values: Any
  queries: Any
  d_sums: Any  # like queries: gradient of the result
  stats: Any
  dq: Any  # float32 [R, lanes]; these three are added to
  d_keys: Any  # float32 [slots, lanes]
  d_values: Any


def panels(plan) -> list[tuple[int, int]]:
  """(head, first row) of what is computed together."""
  return [(i, at) for at in range(0, plan.rows, plan.panel) for i in range(plan.fold)]


def _slots(plan, tile):
  return pl.ds(pl.multiple_of(tile * plan.tile, plan.tile), plan.tile)


def stat_rows(index: int) -> tuple:
  """Rows of `stats`: largest score, sum."""
  return pl.ds(2 * index, 1), pl.ds(2 * index + 1, 1)


def tile_scores(plan, refs: Forward, tile) -> list:
  """Scores of one tile of summaries, float32 [tile, panel] for each panel."""
  keys = refs.keys[_slots(plan, tile), :]
  return [
    dot_f32(keys, refs.queries[index, pl.ds(start, plan.panel), :], NT)
    for index, start in panels(plan)
  ]


def add_tile(plan, refs: Forward, tile, scores, seen=None, own=None) -> None:
  """Adds one tile of summaries to the running softmax.

  seen(tile, start, shape) masks. own(head, start): scores [1, panel] of the own chunks, with weight
  1 each, where the tile is the first one.
  """
  values = refs.values[_slots(plan, tile), :]
  for (index, start), s in zip(panels(plan), scores, strict=True):
    columns, (top_row, total_row) = slice(start, start + plan.panel), stat_rows(index)
    if seen is not None:
      s = jnp.where(seen(tile, start, s.shape), s, -jnp.inf)
    top = refs.stats[top_row, columns] if own is None else own(index, start)
    new_top = jnp.maximum(top, jnp.max(s, 0, keepdims=True))
    weights, kept = jnp.exp2(s - new_top), jnp.exp2(top - new_top)
    total = jnp.sum(weights, 0, keepdims=True)
    sums = dot_f32(values, weights.astype(plan.dtype), TN)  # [lanes, panel]
    if own is None:
      total += kept * refs.stats[total_row, columns]
      sums += kept * refs.weighted[index, :, columns]
    else:
      total += kept
    refs.stats[top_row, columns], refs.stats[total_row, columns] = new_top, total
    refs.weighted[index, :, columns] = sums


def add_tiles(plan, refs: Forward, first, stop, scores, seen=None) -> None:
  """All tiles from `first` to below `stop`; the scores of the next one are made meanwhile.

  scores: of the first tile; if there is none, of any.
  """

  def body(tile, scores):
    later = tile_scores(plan, refs, jnp.minimum(tile + 1, stop - 1))
    add_tile(plan, refs, tile, scores, seen)
    return later

  jax.lax.fori_loop(first, stop, body, scores)


def result(plan, refs: Forward, own, own_values):
  """Yields (rows, weighted means [panel, lanes]); own_values: [R, lanes] of the own chunks."""
  masks = rows_of.head_lanes(plan, (plan.panel, plan.lanes))
  for start in range(0, plan.rows, plan.panel):
    rows, columns = pl.ds(start, plan.panel), slice(start, start + plan.panel)
    parts = []
    for index in range(plan.fold):
      top, total = (refs.stats[row, columns] for row in stat_rows(index))
      weight = rows_of.as_column(jnp.exp2(own(index, start) - top) * (1 / total))
      means = (refs.weighted[index, :, columns] * (1 / total)).T
      parts.append(means + rows_of.widen(weight, plan.lanes) * own_values[rows, :])
    yield rows, rows_of.per_head(masks, parts)


def add_tile_gradients(plan, refs: Backward, tile, deltas, inverses, seen=None) -> None:
  """Adds one tile's share to dq, d_keys and d_values; scores were in units of log 2.

  deltas, inverses: for each head [1, R], sum(dO O) and 1 / sum of weights.
  """
  here = _slots(plan, tile)
  keys, values = refs.keys[here, :], refs.values[here, :]
  owners = rows_of.head_lanes(plan, keys.shape)
  dk, dv = refs.d_keys[here, :], refs.d_values[here, :]
  for index, start in panels(plan):
    rows, columns = pl.ds(start, plan.panel), slice(start, start + plan.panel)
    q, d_sum = refs.queries[index, rows, :], refs.d_sums[index, rows, :]
    scores = dot_f32(keys, q, NT)  # [tile, panel]
    weights = jnp.exp2(scores - refs.stats[stat_rows(index)[0], columns])
    weights *= inverses[index][:, columns]
    d_scores = weights * (dot_f32(values, d_sum, NT) - deltas[index][:, columns])
    if seen is not None:
      visible = seen(tile, start, scores.shape)
      weights, d_scores = (jnp.where(visible, x, 0) for x in (weights, d_scores))
    d_scores = d_scores.astype(plan.dtype)
    dv += dot_f32(weights.astype(plan.dtype), d_sum, NN)
    dk += dot_f32(d_scores, q, NN)
    refs.dq[rows, :] += dot_f32(d_scores, rows_of.only(owners[index], keys), TN)
  refs.d_keys[here, :], refs.d_values[here, :] = dk, dv
