"""A TPU kernel that gives the rows of an array new places, in order and with gaps.

A block of results gets its rows from few neighbouring blocks of the source; each pair of blocks is
one product with a matrix of zeros and ones, which rounds nothing. Every block is read once and
written once. (A gather of XLA's reads whole tiles for each of the rows.)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..dots import TN, dot_f32
from ..segments import pad_length
from . import tpu_rows as rows_of
from . import tpu_tuning


class Moves(NamedTuple):
  """Where the rows of a result are found: what `plan_moves` makes."""

  source: Int[Array, "B N R"]  # the row in the source, -1 for none; by blocks of the result
  blocks: Int[Array, " P"]  # of the result, for every pair of blocks of all batch rows
  origins: Int[Array, " P"]  # of the source


def plan_moves(source: Int[Array, "B D"], size: int) -> Moves:
  """`source`: ascending places in `size` rows, or -1 for none, of each of D results.

  The pairs of a batch row are a walk: with each step, one of the two blocks is the next one. There
  are at most as many as blocks of both; the last one is repeated for those that are missing.
  """
  rows = rows_of.LANES
  source = pad_length(source + 1, rows).reshape(source.shape[0], -1, rows) - 1
  count = source.shape[1]
  last = jax.lax.cummax(jnp.max(source, 2), axis=1)  # [B, N]
  first = jnp.min(jnp.where(source < 0, size, source), 2)
  last = jnp.maximum(last, 0) // rows
  first = jnp.minimum(first // rows, last)
  ends = jnp.cumsum(last - first + 1, axis=1)  # [B, N]
  step = jnp.arange(count - (-size // rows))[:, None]
  step = jnp.minimum(step, ends[:, None, -1:] - 1)  # [B, S, 1]
  block = jnp.sum(ends[:, None] <= step, 2)  # [B, S]
  to_go = jnp.take_along_axis(ends, block, axis=1) - 1 - step[..., 0]
  origin = jnp.take_along_axis(last, block, axis=1) - to_go
  flat = (x.reshape(-1).astype(jnp.int32) for x in (block, origin))
  return Moves(source.astype(jnp.int32), *flat)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def move(
  x: Float[Array, "B S N"],
  there: Moves,
  back: Moves,
  count: int,
  fill: float = 0.0,
  interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B D N"]:
  """result[i] = x[there.source[i]], `fill` where there is none; D = `count`.

  N is a multiple of the lanes, x finite. back: the inverse, for the gradient; a row has one place.
  """
  return moved(x, there, count, fill, interpret)


def _forward(x, there, back, count, fill, interpret):
  return moved(x, there, count, fill, interpret), (back, jax.ShapeDtypeStruct(x.shape, x.dtype))


def _backward(count, fill, interpret, residuals, d_result):
  back, shape = residuals
  return moved(d_result, back, shape.shape[1], 0.0, interpret), None, None


move.defvjp(_forward, _backward)


def moved(
  x: Float[Array, "B S N"],
  moves: Moves,
  count: int,
  fill: float,
  interpret: bool | pltpu.InterpretParams,
) -> Float[Array, "B D N"]:
  """`move` without a gradient."""
  batch, size, width = x.shape
  rows = rows_of.LANES
  steps = moves.blocks.shape[0] // batch
  lanes = max(n for n in range(rows, tpu_tuning.MOVED_LANES + 1, rows) if width % n == 0)
  shape = jax.ShapeDtypeStruct((batch, count, width), x.dtype)
  kernel = functools.partial(_move_kernel, size=size, fill=fill)
  return pl.pallas_call(
    kernel,
    out_shape=shape,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(batch, width // lanes, steps),
      in_specs=[
        pl.BlockSpec((None, None, 1, rows), lambda b, n, s, d, o: (b, d[b * steps + s], 0, 0)),
        pl.BlockSpec((None, rows, lanes), lambda b, n, s, d, o: (b, o[b * steps + s], n)),
      ],
      out_specs=pl.BlockSpec((None, rows, lanes), lambda b, n, s, d, o: (b, d[b * steps + s], n)),
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    cost_estimate=pl.CostEstimate(
      flops=2 * batch * steps * rows * rows * width,
      transcendentals=0,
      bytes_accessed=(x.size + batch * count * width) * x.dtype.itemsize,
    ),
    interpret=interpret,
    name="rat_attention_move",
  )(moves.blocks, moves.origins, moves.source[:, :, None], x)


def _move_kernel(blocks, origins, source_ref, x_ref, out_ref, *, size: int, fill: float):
  """Blocks: source [1, R], x and out [R, lanes]."""
  rows = x_ref.shape[0]
  step = pl.program_id(2)
  here = pl.program_id(0) * pl.num_programs(2) + step
  before = jnp.maximum(here - 1, 0)
  fresh = (step == 0) | (blocks[before] != blocks[here])
  start = origins[here] * rows

  def found():
    x = x_ref[...]
    if size % rows:  # what lies behind the last row is anything
      x = jnp.where(rows_of.iota(x.shape, 0) < size - start, x, jnp.zeros_like(x))
    taken = source_ref[...] == start + rows_of.iota((rows, rows), 0)
    return dot_f32(jnp.where(taken, 1.0, 0.0).astype(x.dtype), x, TN)

  @pl.when(fresh)
  def _():
    x = found()
    if fill:
      none = rows_of.as_column(jnp.where(source_ref[...] < 0, fill, 0.0))
      x += rows_of.widen(none, x.shape[1])
    out_ref[...] = x.astype(out_ref.dtype)

  @pl.when(jnp.logical_not(fresh) & (origins[before] != origins[here]))
  def _():
    out_ref[...] = (out_ref[...].astype(jnp.float32) + found()).astype(out_ref.dtype)
