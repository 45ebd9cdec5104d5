"""What the TPU kernels of code_attention share: the plan, the walk over tiles, blocks and grids.

A tile of scores has tokens as rows and labels as columns. Maxima and sums over tokens are then
arithmetic between registers, and what belongs to a label (maximum, sum, log-sum-exp) is a row of
lanes. A grid step takes a block of labels and goes over the tiles of a span of tokens in VMEM;
tiles without a real token are passed over, those of real tokens alone are not masked.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LOG2_E = math.log2(math.e)
EMPTY, MIXED, WHOLE = range(3)  # how many of a tile's tokens are real: none, some, all


class Plan(NamedTuple):
  """What the kernels are specialised for. Blocks may reach beyond the last label and token."""

  batch: int
  labels: int
  length: int
  key_dim: int
  value_dim: int
  tile: int  # tokens per product
  span: int  # tokens in VMEM, a multiple of tile
  block: int  # labels per grid step
  panel: int  # labels per product, a divisor of block
  parts: int  # of the batch, whose gradients of the queries are summed apart: one per core
  resident: bool  # the gradients of all queries stay in VMEM
  scale: float
  dtype: jnp.dtype
  interpret: bool | pltpu.InterpretParams

  @property
  def blocks(self) -> int:
    return pl.cdiv(self.labels, self.block)

  @property
  def spans(self) -> int:
    return pl.cdiv(self.length, self.span)

  @property
  def span_tiles(self) -> int:
    return self.span // self.tile

  @property
  def padded_length(self) -> int:
    return self.spans * self.span

  @property
  def padded_labels(self) -> int:
    return self.blocks * self.block

  @property
  def ragged(self) -> bool:
    """Whether the last block of labels reaches beyond the last label."""
    return self.padded_labels != self.labels


class Tables(NamedTuple):
  """What is known before a kernel starts, int32, in SMEM."""

  states: Any  # [B * tiles]: EMPTY, MIXED or WHOLE
  spans: Any  # [B * spans]: the span, or where it has no real token the nearest one loaded anyway


def iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def panels(plan: Plan) -> list[slice]:
  """Labels of a block that are computed together."""
  return [slice(at, at + plan.panel) for at in range(0, plan.block, plan.panel)]


def describe(plan: Plan, real: jax.Array) -> Tables:
  """real: bool [B, padded_length]."""
  tiles = real.reshape(plan.batch, -1, plan.tile)
  some, every = jnp.any(tiles, 2), jnp.all(tiles, 2)
  states = jnp.where(every, WHOLE, jnp.where(some, MIXED, EMPTY)).astype(jnp.int32)
  live = jnp.any(some.reshape(plan.batch, plan.spans, -1), 2)  # [B, spans]
  number = jnp.arange(plan.spans, dtype=jnp.int32)
  before = jax.lax.cummax(jnp.where(live, number, -1), axis=1)
  first = jnp.argmax(live, axis=1).astype(jnp.int32)[:, None]
  return Tables(states.reshape(-1), jnp.where(before < 0, first, before).reshape(-1))


class Tile(NamedTuple):
  """The tokens of one tile."""

  here: Any  # where they lie in the span
  real: Any  # float32 [tile, 1], 0 or 1; None where all are real

  def rows(self, ref) -> jax.Array:
    """The tokens' rows of a reference, 0 where they are not real (or beyond the array's end)."""
    x = ref[self.here, :]
    return x if self.real is None else jnp.where(self._mask(x.shape), x, jnp.zeros_like(x))

  def only(self, x: jax.Array, other: float) -> jax.Array:
    """`other` in the rows of tokens that are not real."""
    return x if self.real is None else jnp.where(self._mask(x.shape), x, other)

  def _mask(self, shape):
    return jnp.broadcast_to(self.real, shape) > 0


def walk(plan: Plan, tables: Tables, row, span, real_ref, visit: Callable) -> None:
  """visit(tile) for every tile of a span that has a real token; real_ref: float32 [1, span]."""

  def body(n, _):
    state = tables.states[(row * plan.spans + span) * plan.span_tiles + n]
    here = pl.ds(pl.multiple_of(n * plan.tile, plan.tile), plan.tile)

    @pl.when(state == WHOLE)
    def _():
      visit(Tile(here, None))

    @pl.when(state == MIXED)
    def _():
      visit(Tile(here, real_ref[:, here].T))

  jax.lax.fori_loop(0, plan.span_tiles, body, None)


def copy_labels(plan: Plan, block, pairs) -> None:
  """Copies a block's rows from each (source, target), with zeros for what is no label."""
  for source, target in pairs:
    x = source[...]
    row = block * plan.block + iota(x.shape, 0)
    target[...] = jnp.where(row < plan.labels, x, jnp.zeros_like(x))


class Operand(NamedTuple):
  """Full shape, dtype, block shape and where the block lies at a grid point, given the tables."""

  shape: tuple[int, ...]
  dtype: Any
  block: tuple[int | None, ...]
  place: Callable  # ((b, i, j), tables): row of the batch, block of labels, span of tokens


def query_block(plan: Plan) -> Operand:
  place = lambda at, tables: (at[1], 0)  # noqa: E731
  return Operand((plan.labels, plan.key_dim), plan.dtype, (plan.block, plan.key_dim), place)


def label_block(plan: Plan) -> Operand:
  """What documents have of labels: output and its gradient."""
  shape, block = (plan.batch, plan.labels, plan.value_dim), (None, plan.block, plan.value_dim)
  return Operand(shape, plan.dtype, block, lambda at, tables: (at[0], at[1], 0))


def statistic_block(plan: Plan, count: int) -> Operand:
  """So many numbers for each label of a document."""
  shape, block = (plan.batch, count, plan.padded_labels), (None, count, plan.block)
  return Operand(shape, jnp.float32, block, lambda at, tables: (at[0], 0, at[1]))


def token_block(plan: Plan, dim: int, result: bool = False) -> Operand:
  """Keys or values; spans without a real token are not loaded, but as a `result` written."""

  def place(at, tables):
    b, _, j = at
    return b, j if result else needed_span(plan, tables, b, j), 0

  return Operand((plan.batch, plan.length, dim), plan.dtype, (None, plan.span, dim), place)


def real_block(plan: Plan) -> Operand:
  shape, block = (plan.batch, 1, plan.padded_length), (None, 1, plan.span)
  place = lambda at, tables: (at[0], 0, needed_span(plan, tables, at[0], at[2]))  # noqa: E731
  return Operand(shape, jnp.float32, block, place)


def needed_span(plan: Plan, tables: Tables, row, span):
  return span if plan.spans == 1 else tables.spans[row * plan.spans + span]


class Grid(NamedTuple):
  size: tuple[int, ...]
  point: Callable  # grid indices -> (b, i, j)
  semantics: tuple[Any, ...]  # of str


def call(kernel, name, plan, grid: Grid, tables, operands, inputs, outputs, scratch, products,
         limit):  # fmt: skip
  """Runs a kernel; products: multiply-adds per pair of label and token."""
  specs = [
    [
      pl.BlockSpec(x.block, lambda *g, place=x.place: place(grid.point(*g[:-2]), Tables(*g[-2:])))
      for x in side
    ]
    for side in (inputs, outputs)
  ]
  out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs]
  pairs = plan.batch * plan.labels * plan.length
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
      flops=2 * products * pairs,
      transcendentals=pairs,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*operands, *out_shape)),
    ),
    interpret=plan.interpret,
    name=name,
  )(*tables, *operands)
