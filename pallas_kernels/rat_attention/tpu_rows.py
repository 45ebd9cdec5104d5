"""What the TPU kernels of RAT attention share: the plan, rows of chunks, rotation, operands.

A block of rows is worked on with its rows in another order: row l of all n chunks of the block,
then row l + 1 of all of them. So a step of the recurrence is arithmetic on whole registers, a
rotation has one [n, lanes] table for every l, and a chunk's summary is what the last step leaves.
Only loading and storing know the order in memory: rows l, l + L, ... are a load with a stride. Two
bfloat16 rows share a 32-bit word, so those come in pairs.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

LANES = 128
UNROLL = 32  # steps of a recurrence that are not left to a loop
PANEL = 1024  # most rows of a block whose softmax is computed together
GROUP = 8  # steps that a turn of that loop takes


class Plan(NamedTuple):
  """What a kernel is specialised for. A unit is the heads that share a lane tile."""

  batch: int
  length: int  # tokens, padding included: steps * rows
  outer: int  # units of the grid's second axis, a multiple of groups
  inner: int  # units that take their turns inside a step; unit u is u % outer in u // outer
  groups: int  # units of query and key
  width: int  # lanes per head
  fold: int  # heads per unit
  chunk: int  # L, padding included
  chunks: int  # n per block
  tile: int  # summaries per product
  dtype: jnp.dtype
  head_dim: int
  rotary: bool
  gated: bool  # there are output_logits
  documents: bool  # rows have several, each with chunks of its own
  interpret: bool | pltpu.InterpretParams

  @property
  def lanes(self) -> int:
    return self.width * self.fold

  @property
  def rows(self) -> int:
    return self.chunk * self.chunks

  @property
  def steps(self) -> int:
    return self.length // self.rows

  @property
  def filled(self) -> int:
    """Summaries of a row of the batch."""
    return self.steps * self.chunks

  @property
  def slots(self) -> int:
    """Room for them in whole tiles."""
    return -(-self.filled // self.tile) * self.tile

  @property
  def pair(self) -> int:
    """Rows that are loaded and stored together."""
    return 2 if self.dtype == jnp.bfloat16 and self.chunk > 1 else 1

  @property
  def panel(self) -> int:
    """Rows that go through the softmax together."""
    most = max(LANES, PANEL // self.fold)
    return max(p for p in range(LANES, most + 1, LANES) if self.rows % p == 0)

  @property
  def scale(self) -> float:
    """Of scores whose exponential is a power of 2."""
    return self.head_dim**-0.5 * math.log2(math.e)


def iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


class Step(NamedTuple):
  """Which rows of all chunks a turn of a loop loads: base + part, times `plan.pair`.

  In a real loop `base` is traced, and a multiple of GROUP: loads start at whole tiles.
  """

  base: Any
  part: int

  def row(self, plan: Plan, of_pair: int):
    return plan.pair * (self.base + self.part) + of_pair


def load(ref, plan: Plan, step: Step) -> list[jax.Array]:
  """Rows `step` of all chunks, float32 [n, lanes] each."""
  if plan.pair == 1:
    part = _strided(ref, plan.chunks, plan.chunk, step)
    return [part.ref[part.rows, :].astype(jnp.float32)]
  part = _strided(ref.bitcast(jnp.uint32), plan.chunks, plan.chunk // 2, step)
  words = part.ref[part.rows, :]
  low, high = words << 16, words & jnp.uint32(0xFFFF0000)
  return [jax.lax.bitcast_convert_type(x, jnp.float32) for x in (low, high)]


def store(ref, plan: Plan, step: Step, pieces: list[jax.Array]) -> None:
  """The way back, rounded to the dtype of `ref`."""
  if plan.pair == 1 or ref.dtype == jnp.float32:
    for index, piece in enumerate(pieces):
      here = Step(plan.pair * step.base, plan.pair * step.part + index)
      part = _strided(ref, plan.chunks, plan.chunk, here)
      part.ref[part.rows, :] = piece.astype(ref.dtype)
    return
  part = _strided(ref.bitcast(jnp.uint32), plan.chunks, plan.chunk // 2, step)
  part.ref[part.rows, :] = _pack(plan, *pieces)


class _Strided(NamedTuple):
  ref: Any
  rows: Any


def _strided(ref, count, stride, step):
  """`count` rows of `ref`, `stride` apart."""
  if stride == 1:
    return _Strided(ref, slice(None))
  if isinstance(step.base, int):
    return _Strided(ref, pl.ds(step.base + step.part, count, stride=stride))
  start = step.part // GROUP * GROUP  # two float32 rows may be stored for each word loaded
  window = ref.at[pl.ds(pl.multiple_of(step.base + start, GROUP), (count - 1) * stride + GROUP), :]
  return _Strided(window, pl.ds(step.part - start, count, stride=stride))


def _pack(plan, low, high):
  if not plan.interpret:
    return pltpu.pack_elementwise([low, high], packed_dtype=jnp.bfloat16)
  # The interpreter does not know that operation.
  low, high = (jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
               for x in (low, high))  # fmt: skip
  return low.astype(jnp.uint32) | (high.astype(jnp.uint32) << 16)


def for_steps(plan: Plan, body, carry: Any, reverse: bool = False) -> Any:
  """carry = body(step, carry) for the loads of a chunk, in order or in reverse order."""
  count = plan.chunk // plan.pair
  if count <= UNROLL or count % GROUP:
    for step in reversed(range(count)) if reverse else range(count):
      carry = body(Step(step, 0), carry)
    return carry
  parts = list(reversed(range(GROUP)) if reverse else range(GROUP))
  last = count // GROUP - 1

  def some(i, carry):
    base = GROUP * (last - i if reverse else i)
    for part in parts:
      carry = body(Step(base, part), carry)
    return carry

  return jax.lax.fori_loop(0, last + 1, some, carry)


def place(plan: Plan, row):
  """Where row `row` of all chunks lies in a scratch of a block's rows."""
  start = row * plan.chunks
  return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, plan.chunks), plan.chunks)


def turn(plan: Plan, x, tables, back: bool = False):
  """Rotates float32 [n, lanes] by its chunks' numbers; `tables`: cos and sin refs, or nothing.

  The sine's table has the sign of the first half.
  """
  if not tables:
    return x
  half, lanes = plan.width // 2, plan.lanes
  other = pltpu.roll(x, half, 1)
  if plan.fold > 1:
    first = iota(x.shape, 1) & (plan.width - 1) < half
    other = jnp.where(first, pltpu.roll(x, lanes - half, 1), other)
  cos, sin = (ref[...] for ref in tables)
  return x * cos - other * sin if back else x * cos + other * sin


def head_lanes(plan, shape) -> list[jax.Array | None]:
  """For each head of a unit which lanes are its own; None where all are."""
  if plan.fold == 1:
    return [None]
  owner = iota(shape, 1) // plan.width
  return [owner == head for head in range(plan.fold)]


def only(mask, x):
  return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


def lane_sum(mask, x):
  """[n, lanes] -> [n, 1]."""
  return jnp.sum(only(mask, x), axis=1, keepdims=True)


def per_head(masks, columns):
  """[n, lanes] that has each head's column (or array) in its lanes."""
  result = columns[-1]
  for mask, column in zip(masks[:-1], columns[:-1], strict=True):
    result = jnp.where(mask, column, result)
  return result


def widen(x, lanes: int):
  """[R, LANES] with equal lanes -> [R, lanes]."""
  return x if lanes == LANES else jnp.concatenate([x] * (lanes // LANES), 1)


def visible(plan: Plan, step, tile, start, shape):
  """Which summaries (axis 0) of a tile a block's rows from `start` on see: of earlier chunks."""
  chunk = (start + iota(shape, 1)) & (plan.chunks - 1)
  return iota(shape, 0) - chunk < step * plan.chunks - tile * plan.tile


def of_document(plan: Plan, first_ref, tile, start, shape):
  """Which summaries of a tile are of the rows' own documents, if they are of earlier chunks."""
  first = first_ref[:, start : start + shape[1]] - tile * plan.tile
  return iota(shape, 0) >= first


def seen_tiles(plan: Plan, step, row, refs) -> tuple:
  """(oldest tile, mask of older tiles, mask of the block's own) of block `step` of batch row `row`.

  refs: those of `documents` in the order of the kernels' operands, or nothing; then all is seen of
  older tiles.
  """
  own = functools.partial(visible, plan, step)
  if not refs:
    return 0, None, own
  oldest_ref, first_ref = refs
  older = functools.partial(of_document, plan, first_ref)
  both = lambda *where: own(*where) & older(*where)  # noqa: E731
  return oldest_ref[row * plan.steps + step], older, both


def as_row(ref, start: int = 0, count: int | None = None):
  """[R, LANES] with equal lanes -> [1, R], rows from `start` on."""
  pieces = []
  for first in range(start, start + (count or ref.shape[0]), LANES):
    block = ref[pl.ds(first, LANES), :]
    diagonal = iota(block.shape, 0) == iota(block.shape, 1)
    pieces.append(jnp.sum(jnp.where(diagonal, block, 0.0), 0, keepdims=True))
  return jnp.concatenate(pieces, 1)


def as_column(row):
  """[1, R] -> [R, LANES] with equal lanes."""
  starts = range(0, row.shape[1], LANES)
  return jnp.concatenate(
    [jnp.broadcast_to(row[:, at : at + LANES], (LANES, LANES)).T for at in starts], 0
  )


def sigmoid(plan: Plan, x):
  """1 / (1 + exp(-x)), float32.

  As a tanh, which is one instruction, it takes 4 operations instead of 16; but it has no small
  values of full relative precision, so float32 inputs get the general form.
  """
  return 0.5 + 0.5 * jnp.tanh(0.5 * x) if plan.dtype == jnp.bfloat16 else jax.nn.sigmoid(x)


def own_tiles(plan: Plan, step) -> list:
  """The tiles that have summaries of the block itself; all before the first are seen as a whole."""
  whole = step * plan.chunks // plan.tile
  return [whole + i for i in range(max(1, plan.chunks // plan.tile))]


class Operand(NamedTuple):
  """Full shape, dtype, block shape and where the block lies at grid point (b, p, t, j)."""

  shape: tuple[int, ...]
  dtype: DTypeLike
  block: tuple[int | None, ...]
  place: Any
  constant: bool = False  # the block changes at most once per row of the batch


def _token_blocks(plan, units, dtype, column):
  shape, block = (plan.batch * plan.length, units * plan.lanes), (plan.rows, plan.lanes)
  return Operand(shape, dtype, block, lambda b, p, t, j: (b * plan.steps + t, column(p, j)))


def tokens(plan: Plan) -> Operand:
  """[B * T, U * lanes]: a unit is a column block, no transpose is needed."""
  units = plan.outer * plan.inner
  return _token_blocks(plan, units, plan.dtype, lambda p, j: p + plan.outer * j)


def group_tokens(plan: Plan) -> Operand:
  return _token_blocks(plan, plan.groups, plan.dtype, lambda p, j: p % plan.groups)


def group_gradients(plan: Plan) -> Operand:
  """Of query or key, summed over the units that take their turns inside."""
  return _token_blocks(plan, plan.outer, plan.dtype, lambda p, j: p)


def bias(plan: Plan) -> Operand:
  shape = (1, plan.outer * plan.inner * plan.lanes)
  return Operand(shape, jnp.float32, (1, plan.lanes), lambda b, p, t, j: (0, p + plan.outer * j))


def table(plan: Plan) -> Operand:
  """[C, lanes], or [B, C, lanes] where chunks are counted from the starts of documents."""
  shape, block = (plan.filled, plan.lanes), (plan.chunks, plan.lanes)
  if plan.documents:
    shape = (plan.batch, *shape)
    return Operand(shape, jnp.float32, (None, *block), lambda b, p, t, j: (b, t, 0))
  return Operand(shape, jnp.float32, block, lambda b, p, t, j: (t, 0))


def first_slots(plan: Plan) -> Operand:
  """[B, 1, T], for each row the slot where its document begins; in the kernels' order."""
  shape, block = (plan.batch, 1, plan.length), (None, 1, plan.rows)
  return Operand(shape, jnp.int32, block, lambda b, p, t, j: (b, 0, t))


def summaries(plan: Plan) -> Operand:
  """[B, outer, inner, filled, lanes]; a block is what one step makes."""
  shape = (plan.batch, plan.outer, plan.inner, plan.filled, plan.lanes)
  block = (None, None, None, plan.chunks, plan.lanes)
  return Operand(shape, plan.dtype, block, lambda b, p, t, j: (b, p, j, t, 0))


def all_summaries(plan: Plan) -> Operand:
  """[B, outer, inner, slots, lanes] as a whole; what is not filled is 0."""
  shape = (plan.batch, plan.outer, plan.inner, plan.slots, plan.lanes)
  block = (None, None, plan.inner, plan.slots, plan.lanes)
  return Operand(shape, plan.dtype, block, lambda b, p, t, j: (b, p, 0, 0, 0), True)


def statistics(plan: Plan) -> Operand:
  """Largest score and sum of the weights for each head of a unit, time on lanes."""
  shape = (plan.batch, plan.outer, plan.inner, 2 * plan.fold, plan.length)
  block = (None, None, None, 2 * plan.fold, plan.rows)
  return Operand(shape, jnp.float32, block, lambda b, p, t, j: (b, p, j, 0, t))


def bias_gradients(plan: Plan) -> Operand:
  """[B, outer, inner, lanes], summed over the sequence."""
  shape = (plan.batch, plan.outer, plan.inner, plan.lanes)
  block = (None, None, plan.inner, plan.lanes)
  return Operand(shape, jnp.float32, block, lambda b, p, t, j: (b, p, 0, 0))


def call(kernel, name, plan, scalars, operands, inputs, outputs, scratch, cost, limit,
         reverse=False):  # fmt: skip
  """Runs a kernel over (batch, outer, steps, inner); `cost`: (flops, exponentials).

  scalars: int arrays that the kernel gets before its operands, in SMEM.
  """

  def spec(item):
    def index(b, p, t, j, *_):
      return item.place(b, p, plan.steps - 1 - t if reverse else t, j)

    mode = dict(pipeline_mode=pl.Buffered(1)) if item.constant and not plan.interpret else {}
    return pl.BlockSpec(item.block, index, **mode)

  out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs]
  moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*operands, *out_shape))
  return pl.pallas_call(
    kernel,
    out_shape=out_shape,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(plan.batch, plan.outer, plan.steps, plan.inner),
      in_specs=[spec(x) for x in inputs],
      out_specs=[spec(x) for x in outputs],
      scratch_shapes=scratch,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=limit,
    ),
    cost_estimate=pl.CostEstimate(flops=cost[0], transcendentals=cost[1], bytes_accessed=moved),
    interpret=plan.interpret,
    name=name,
  )(*scalars, *operands)
