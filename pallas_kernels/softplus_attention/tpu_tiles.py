"""What the TPU kernels of softplus attention share: the plan, the walk over tiles, f and its power.

A tile of scores has keys as rows and queries as columns. Sums over keys are then arithmetic between
registers, and what belongs to a query (scale, mean, threshold, ...) is a row of lanes, in VMEM and
in HBM. A grid step takes `rows` queries and goes over the tiles of a span of keys that it sees. Two
heads of up to 64 channels share a lane tile, as they lie in a layer's [B, T, H * K].
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .variants import Variant

LANES = 128
LOG2_E = math.log2(math.e)
STATISTICS = 4  # rows of a head: see `statistic`


class Plan(NamedTuple):
  """What a kernel is specialised for. A unit is the heads that share a lane tile."""

  batch: int
  length: int  # queries, padding included: a multiple of rows
  total: int  # keys, padding included: a multiple of span
  units: int  # of queries; unit u has the keys of unit u // (units / groups)
  groups: int  # units of keys
  fold: int  # heads per unit
  width: int  # lanes of a head where several share a lane tile
  key_lanes: int  # of a unit
  value_lanes: int
  rows: int  # queries per grid step, and keys per tile
  panel: int  # queries per product
  span: int  # keys in VMEM
  documents: bool
  bounded: bool  # no score overflows as a power of 2
  dtype: jnp.dtype
  variant: Variant
  interpret: bool | pltpu.InterpretParams

  @property
  def steps(self) -> int:
    return self.length // self.rows

  @property
  def spans(self) -> int:
    return self.total // self.span

  @property
  def repeat(self) -> int:
    return self.units // self.groups

  @property
  def tiles(self) -> int:
    """Of keys, per row of the batch."""
    return self.total // self.rows

  @property
  def span_tiles(self) -> int:
    return self.span // self.rows

  @property
  def exact(self) -> bool:
    return self.dtype == jnp.float32


class Tables(NamedTuple):
  """What is known before a kernel starts, int32, in SMEM."""

  blocks: Any  # [4, B * steps]: first tile and the last, its own; least and largest document
  tiles: Any  # [2, B * tiles]: least and largest document of a tile


def iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def panels(plan: Plan) -> list[tuple[int, int]]:
  """(head, first query) of what is computed together."""
  return [(i, at) for at in range(0, plan.rows, plan.panel) for i in range(plan.fold)]


def statistic(which: str, head: int):
  """Row of a head's statistic: O m, 1 / largest excess, 1 / denominator (0 in dead rows), m."""
  return pl.ds(head * STATISTICS + ("taken", "inverse", "weight", "mean").index(which), 1)


def head_lanes(plan: Plan, shape) -> list[jax.Array | None]:
  """For each head of a unit which lanes are its own; None where all are."""
  if plan.fold == 1:
    return [None]
  owner = iota(shape, 1) // plan.width
  return [owner == head for head in range(plan.fold)]


def split_heads(plan: Plan, ref, split_ref) -> None:
  """[R, lanes] -> [fold, R, lanes], other heads' lanes 0."""
  x = ref[...]
  for index, mask in enumerate(head_lanes(plan, x.shape)):
    split_ref[index] = x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


def join_heads(plan: Plan, columns: list[jax.Array]) -> jax.Array:
  """Of [lanes, R] for each head its own lanes: [R, lanes]."""
  rows = [x.T for x in columns]
  result = rows[-1]
  for mask, x in zip(head_lanes(plan, result.shape)[:-1], rows[:-1], strict=True):
    result = jnp.where(mask, x, result)
  return result


def local(plan: Plan, tile, span, count: int):
  """Where the first `count` keys of a tile lie in the span that is in VMEM."""
  return pl.ds(pl.multiple_of((tile - span * plan.span_tiles) * plan.rows, plan.rows), count)


class Seen(NamedTuple):
  """What a panel of queries sees of a tile."""

  count: int  # keys from the first one on that have to be looked at
  mask: Any  # bool [count, panel], None for all of them

  def only(self, x: jax.Array) -> jax.Array:
    return x if self.mask is None else jnp.where(self.mask, x, 0)


def walk(plan: Plan, tables: Tables, row, block, span, documents, visit: Callable) -> None:
  """visit(tile, seen) for every tile of `span` that some query of `block` sees.

  seen(start) is what the panel from query `start` on sees. documents: ids of the queries [1, R] and
  of the span's keys [1, span], or nothing. The last tile of a block is its own: keys are padded in
  front so that the first query's key begins a tile.
  """
  at = row * plan.steps + block
  first, own = tables.blocks[0, at], tables.blocks[1, at]
  begin = span * plan.span_tiles
  first, end = jnp.maximum(first, begin), begin + plan.span_tiles
  if plan.documents:
    end = jnp.minimum(own + 1, end)
    _walk_documents(plan, tables, row, at, first, end, begin, own, documents, visit)
    return
  everything = lambda start: Seen(plan.rows, None)  # noqa: E731
  jax.lax.fori_loop(first, jnp.minimum(own, end), lambda n, _: visit(n, everything), None)

  @pl.when((own >= begin) & (own < end))
  def _():
    visit(own, functools.partial(_causal, plan))


def _causal(plan, start):
  """Of the block's own tile."""
  count = start + plan.panel
  shape = count, plan.panel
  return Seen(count, iota(shape, 0) - iota(shape, 1) <= start)


def _walk_documents(plan, tables, row, at, first, end, begin, own, documents, visit):
  """Tiles of other documents alone are passed over, those of the own one alone are not masked."""
  queries, keys = documents
  low, high = tables.blocks[2, at], tables.blocks[3, at]

  def body(tile, _):
    here = row * plan.tiles + tile
    least, most = tables.tiles[0, here], tables.tiles[1, here]
    whole = (least == low) & (most == low) & (high == low) & (tile < own)

    @pl.when(whole)
    def _():
      visit(tile, lambda start: Seen(plan.rows, None))

    @pl.when(~whole & (least <= high) & (most >= low))
    def _():
      column = as_column(keys, (tile - begin) * plan.rows, plan.rows)

      def seen(start):
        shape = plan.rows, plan.panel
        same = queries[:, start : start + plan.panel] == widen(column, plan.panel)
        ahead = start + (own - tile) * plan.rows
        return Seen(plan.rows, same & (iota(shape, 0) - iota(shape, 1) <= ahead))

      visit(tile, seen)

  jax.lax.fori_loop(first, end, body, None)


def as_column(ref, start, count: int):
  """Lanes [1, start to start + count] of a reference as [count, LANES] with equal lanes."""
  pieces = []
  for at in range(0, count, LANES):
    here = pl.ds(pl.multiple_of(start + at, LANES), LANES)
    pieces.append(jnp.broadcast_to(ref[:, here], (LANES, LANES)).T)
  return jnp.concatenate(pieces, 0)


def widen(x, lanes: int):
  """[R, LANES] with equal lanes -> [R, lanes]."""
  return x if lanes == LANES else jnp.concatenate([x] * (lanes // LANES), 1)


class Softplus(NamedTuple):
  """ln(1 + 2^s), and what its derivative is made of."""

  value: jax.Array
  power: jax.Array  # 2^s (exact: 2^-|s|)
  score: jax.Array  # s


def softplus(plan: Plan, score) -> Softplus:
  """`score` is in units of log 2.

  For bfloat16 in few operations: below 2^-8 the series, above the logarithm, which has then lost at
  most 16 of its 24 bits.
  """
  if plan.exact:
    power = jnp.exp2(-jnp.abs(score))
    return Softplus(math.log(2) * jnp.maximum(score, 0) + jnp.log1p(power), power, score)
  power = jnp.exp2(score if plan.bounded else jnp.minimum(score, 120.0))
  value = jnp.where(power < 2**-8, power * (1 - 0.5 * power), jnp.log(1 + power))
  if not plan.bounded:
    value = jnp.maximum(value, score * math.log(2))
  return Softplus(value, power, score)


def sigmoid(plan: Plan, f: Softplus):
  """The derivative of softplus."""
  if plan.exact:
    return jnp.where(f.score >= 0, 1.0, f.power) / (1 + f.power)
  return f.power * pltpu.reciprocal(1 + f.power, approx=True)


def whole_power(x, p: int):
  """x^p with few products: 5 for p = 15."""
  if p == 0:
    return jnp.ones_like(x)
  for factor in (2, 3, 5):
    if p > factor and p % factor == 0:
      return whole_power(whole_power(x, factor), p // factor)
  return x if p == 1 else x * whole_power(x, p - 1)


def power(x, p: float):
  """x^p for x in [0, 1]."""
  if p == int(p):
    return whole_power(x, int(p))
  return jnp.exp2(p * LOG2_E * jnp.log(jnp.maximum(x, 2.0**-126)))


def powers(x, p: float):
  """x^(p - 1), 0 for x = 0 whatever p is, and x^p."""
  below = power(x, p - 1)
  if p == int(p):
    return (jnp.where(x > 0, 1.0, 0.0) if p == 1 else below), x * below
  below = jnp.where(x > 0, below, 0)
  return below, x * below


class Operand(NamedTuple):
  """Full shape, dtype, block shape and where the block lies at a grid point, given the tables."""

  shape: tuple[int, ...]
  dtype: Any
  block: tuple[int | None, ...]
  place: Callable


class Grid(NamedTuple):
  """(b, u, i, J): row of the batch, unit of queries, block of queries, span of keys, by name."""

  size: tuple[int, ...]
  point: Callable  # (grid indices, tables) -> (b, u, i, J), those of blocks that are needed
  semantics: tuple[str, ...]


def needed_span(plan: Plan, tables: Tables, row, block, span):
  """`span`, or the nearest one of which the block sees something: so nothing else is loaded."""
  if plan.spans == 1:
    return span
  first, last = (tables.blocks[n, row * plan.steps + block] // plan.span_tiles for n in range(2))
  return jnp.clip(span, first, last)


def query_block(plan: Plan, lanes: int, dtype=None) -> Operand:
  shape = (plan.batch * plan.length, plan.units * lanes)
  place = lambda b, u, i, j: (b * plan.steps + i, u)  # noqa: E731
  return Operand(shape, dtype or plan.dtype, (plan.rows, lanes), place)


def key_block(plan: Plan, lanes: int) -> Operand:
  shape = (plan.batch * plan.total, plan.groups * lanes)
  place = lambda b, u, i, j: (b * plan.spans + j, u // plan.repeat)  # noqa: E731
  return Operand(shape, plan.dtype, (plan.span, lanes), place)


def row_block(plan: Plan, batch: int, count: int, dtype=jnp.float32) -> Operand:
  """What all heads share of a query; batch is 1 where all rows are alike."""
  place = lambda b, u, i, j: (b if batch > 1 else 0, 0, i)  # noqa: E731
  return Operand((batch, count, plan.length), dtype, (None, count, plan.rows), place)


def key_row_block(plan: Plan) -> Operand:
  """Documents of the keys."""
  place = lambda b, u, i, j: (b, 0, j)  # noqa: E731
  return Operand((plan.batch, 1, plan.total), jnp.int32, (None, 1, plan.span), place)


def head_block(plan: Plan, count: int) -> Operand:
  """`count` rows for each head."""
  rows = plan.fold * count
  shape, block = (plan.batch, plan.units, rows, plan.length), (None, None, rows, plan.rows)
  return Operand(shape, jnp.float32, block, lambda b, u, i, j: (b, u, 0, i))


def call(kernel, name, plan, grid: Grid, tables, operands, inputs, outputs, scratch, cost, limit):
  """Runs a kernel; cost: products and transcendentals per pair of query and key."""
  specs = [
    [
      pl.BlockSpec(x.block, lambda *g, place=x.place: place(*grid.point(g[:-2], Tables(*g[-2:]))))
      for x in side
    ]
    for side in (inputs, outputs)
  ]
  out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs]
  pairs = plan.batch * plan.units * plan.fold * plan.length * plan.total // 2
  return pl.pallas_call(
    kernel,
    out_shape=out_shape,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(Tables._fields),
      grid=grid.size,
      in_specs=specs[0],
      out_specs=specs[1],
      scratch_shapes=scratch,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=grid.semantics, vmem_limit_bytes=limit
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * cost[0] * pairs * max(plan.width, plan.key_lanes // plan.fold),
      transcendentals=cost[1] * pairs,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*operands, *out_shape)),
    ),
    interpret=plan.interpret,
    name=name,
  )(*tables, *operands)
