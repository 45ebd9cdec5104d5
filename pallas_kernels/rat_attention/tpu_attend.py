"""The softmax alone as TPU kernels, for rows that continue a state.

Same arguments and result as `attend.attend`. The grid is (batch, units of heads, blocks of rows);
which tiles of summaries a block sees is known before it starts.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..segments import pad_length
from ..tpu_sizes import round_up, vmem_bytes, vmem_limit
from . import tpu_rows as rows_of
from . import tpu_softmax as softmax
from . import tpu_tuning


class AttendPlan(NamedTuple):
  """What a kernel is specialised for; see `tpu_rows.Plan`."""

  batch: int
  length: int  # tokens, padding included
  units: int
  width: int
  fold: int
  rows: int
  slots: int  # padding included
  tile: int
  dtype: jnp.dtype
  interpret: bool | pltpu.InterpretParams

  @property
  def lanes(self) -> int:
    return self.width * self.fold

  @property
  def steps(self) -> int:
    return self.length // self.rows

  @property
  def panel(self) -> int:
    return min(self.rows, max(rows_of.LANES, rows_of.PANEL // self.fold))


def _bounds_here(plan, bounds):
  """First tile that the block's tokens see, and the one behind the last."""
  block = pl.program_id(0) * plan.steps + pl.program_id(2)
  return bounds[0, block], bounds[1, block]


def _seen(plan, limits_ref, tile, start, shape):
  columns = slice(start, start + plan.panel)
  slot = tile * plan.tile + rows_of.iota(shape, 0)
  return (slot >= limits_ref[0:1, columns]) & (slot < limits_ref[1:2, columns])


def _split_heads(plan, ref, split_ref, scale=1.0):
  """[R, lanes] -> [fold, R, lanes], each head's lanes apart."""
  x = (scale * ref[...].astype(jnp.float32)) if scale != 1.0 else ref[...]
  for index, mask in enumerate(rows_of.head_lanes(plan, x.shape)):
    split_ref[index] = rows_of.only(mask, x).astype(plan.dtype)


def _attend_kernel(bounds, q_ref, keys_ref, values_ref, own_ref, own_values_ref, limits_ref,
                   out_ref, stats_ref, queries_ref, weighted_ref, *, plan: AttendPlan):  # fmt: skip
  """Blocks: q, own values [R, lanes], keys, values [slots, lanes], own scores [fold, R], limits.

  limits [2, R] are the slots that a token sees: from the first row to below the second.
  Out: result [R, lanes] float32, statistics [2 fold, R].
  """
  _split_heads(plan, q_ref, queries_ref)
  refs = softmax.Forward(keys_ref, values_ref, queries_ref, weighted_ref, stats_ref)
  own = lambda index, start: own_ref[pl.ds(index, 1), slice(start, start + plan.panel)]  # noqa: E731
  for index in range(plan.fold):
    top, total = softmax.stat_rows(index)
    stats_ref[top, :] = own_ref[pl.ds(index, 1), :]
    stats_ref[total, :] = jnp.ones((1, plan.rows), jnp.float32)
  weighted_ref[...] = jnp.zeros_like(weighted_ref)
  seen = functools.partial(_seen, plan, limits_ref)
  first, stop = _bounds_here(plan, bounds)
  scores = softmax.tile_scores(plan, refs, jnp.minimum(first, plan.slots // plan.tile - 1))
  softmax.add_tiles(plan, refs, first, stop, scores, seen)
  for rows, means in softmax.result(plan, refs, own, own_values_ref):
    out_ref[rows, :] = means


def _gradient_kernel(bounds, q_ref, keys_ref, values_ref, d_out_ref, delta_ref, stats_ref,
                     limits_ref, dq_ref, d_keys_ref, d_values_ref, queries_ref, d_sums_ref,
                     sum_ref, *, plan: AttendPlan):  # fmt: skip
  """Blocks as in the forward, dO [R, lanes], delta [fold, R]. Out: dq, float32 d_keys, d_values."""

  @pl.when(pl.program_id(2) == 0)
  def _():
    d_keys_ref[...] = jnp.zeros_like(d_keys_ref)
    d_values_ref[...] = jnp.zeros_like(d_values_ref)

  _split_heads(plan, q_ref, queries_ref)
  _split_heads(plan, d_out_ref, d_sums_ref)
  sum_ref[...] = jnp.zeros_like(sum_ref)
  deltas = [delta_ref[pl.ds(index, 1), :] for index in range(plan.fold)]
  inverses = [1 / stats_ref[softmax.stat_rows(index)[1], :] for index in range(plan.fold)]
  refs = softmax.Backward(keys_ref, values_ref, queries_ref, d_sums_ref, stats_ref, sum_ref,
                          d_keys_ref, d_values_ref)  # fmt: skip
  seen = functools.partial(_seen, plan, limits_ref)

  def body(tile, _):
    softmax.add_tile_gradients(plan, refs, tile, deltas, inverses, seen)

  jax.lax.fori_loop(*_bounds_here(plan, bounds), body, None)
  dq_ref[...] = sum_ref[...].astype(dq_ref.dtype)


def fits(value, slots: int) -> bool:
  """Whether `slots` summaries of a head fit in VMEM."""
  width, fold = tpu_tuning.head_width(*value.shape[2:])
  size = slots, tpu_tuning.ATTEND_ROWS, width * fold, value.dtype
  return tpu_tuning.attend_estimate(*size) <= vmem_bytes()


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def attend_tpu(
  query: Float[Array, "B T H K"],
  keys: Float[Array, "B S H K"],
  values: Float[Array, "B S H K"],
  own_score: Float[Array, "B T H"],
  own_value: Float[Array, "B T H K"],
  first: Int[Array, "B T"],
  last: Int[Array, "B T"],
  interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B T H K"]:
  """softmax over [q . keys_s for first <= s < last, own_score] times [values_s, own_value].

  `query` carries the scale and has the dtype of keys and values. float32 out.
  """
  return _forward(query, keys, values, own_score, own_value, first, last, interpret)[0]


def _forward(query, keys, values, own_score, own_value, first, last, interpret):
  plan = _plan(query, keys, interpret)
  # Computed once: its weight must be the same in both directions.
  own_score = jax.lax.optimization_barrier(own_score)
  base_2 = math.log2(math.e)
  operands = (
    _tokens(plan, base_2 * query.astype(jnp.float32), plan.dtype), _slots(plan, keys),
    _slots(plan, values), _columns(plan, base_2 * own_score),
    _tokens(plan, own_value, jnp.float32), _limits(plan, first, last),
  )  # fmt: skip
  rows, wide, every = _token_block(plan), _token_block(plan, jnp.float32), _slot_block(plan)
  output, stats = _call(
    functools.partial(_attend_kernel, plan=plan), "rat_attention_softmax_forward", plan,
    _bounds(plan, first, last), operands,
    [rows, every, every, _column_block(plan, plan.fold), wide, _limit_block(plan)],
    [wide, _column_block(plan, 2 * plan.fold)],
    [pltpu.VMEM((plan.fold, plan.rows, plan.lanes), plan.dtype),
     pltpu.VMEM((plan.fold, plan.lanes, plan.rows), jnp.float32)], products=2,
  )  # fmt: skip
  output = _from_tokens(plan, output, query.shape)
  return output, (query, keys, values, own_score, own_value, first, last, output, stats)


def _backward(interpret, residuals, d_output):
  query, keys, values, own_score, own_value, first, last, output, stats = residuals
  plan, length = _plan(query, keys, interpret), query.shape[1]
  delta = jnp.sum(d_output * output, -1)  # [B, T, H]
  stats_by_head = stats.reshape(plan.batch, -1, 2, plan.length)[..., :length]
  top, total = stats_by_head.transpose(2, 0, 3, 1)  # [B, T, H]
  own = jnp.exp2(math.log2(math.e) * own_score - top) / total
  d_own_score = own * (jnp.sum(d_output * own_value, -1) - delta)
  operands = (
    _tokens(plan, math.log2(math.e) * query.astype(jnp.float32), plan.dtype), _slots(plan, keys),
    _slots(plan, values), _tokens(plan, d_output, plan.dtype), _columns(plan, delta), stats,
    _limits(plan, first, last),
  )  # fmt: skip
  rows, every = _token_block(plan), _slot_block(plan)
  sums = every._replace(dtype=jnp.float32)
  wide = pltpu.VMEM((plan.rows, plan.lanes), jnp.float32)
  split = pltpu.VMEM((plan.fold, plan.rows, plan.lanes), plan.dtype)
  dq, dk, dv = _call(
    functools.partial(_gradient_kernel, plan=plan), "rat_attention_softmax_backward", plan,
    _bounds(plan, first, last), operands,
    [rows, every, every, rows, _column_block(plan, plan.fold), _column_block(plan, 2 * plan.fold),
     _limit_block(plan)], [rows, sums, sums], [split, split, wide], products=5,
  )  # fmt: skip
  dq = _from_tokens(plan, dq, query.shape)
  dk, dv = (_from_slots(plan, x, keys.shape) for x in (math.log(2) * dk, dv))
  dk, dv = dk.astype(keys.dtype), dv.astype(values.dtype)
  return dq, dk, dv, d_own_score, own[..., None] * d_output, None, None


attend_tpu.defvjp(_forward, _backward)


def _plan(query, keys, interpret):
  batch, length, heads, dim = query.shape
  width, fold = tpu_tuning.head_width(heads, dim)
  rows = min(round_up(length, rows_of.LANES), tpu_tuning.ATTEND_ROWS)
  tile = tpu_tuning.tile_size(keys.shape[1])
  slots = round_up(keys.shape[1], tile)
  return AttendPlan(
    batch, round_up(length, rows), heads // fold, width, fold, rows, slots,
    tile, query.dtype, interpret,
  )  # fmt: skip


def _tokens(plan, x, dtype):
  """[B, T, H, K] -> [B * T', H * width]."""
  x = jnp.pad(x.astype(dtype), ((0, 0),) * 3 + ((0, plan.width - x.shape[3]),))
  return pad_length(x, plan.rows).reshape(plan.batch * plan.length, -1)


def _from_tokens(plan, x, shape):
  x = x.reshape(plan.batch, plan.length, -1, plan.width)
  return x[:, : shape[1], :, : shape[3]]


def _slots(plan, x):
  """[B, S, H, K] -> [B, S', H * width]."""
  x = jnp.pad(x, ((0, 0),) * 3 + ((0, plan.width - x.shape[3]),))
  return pad_length(x, plan.tile).reshape(plan.batch, plan.slots, -1)


def _from_slots(plan, x, shape):
  return x.reshape(plan.batch, plan.slots, -1, plan.width)[:, : shape[1], :, : shape[3]]


def _columns(plan, x):
  """[B, T, H] -> [B, units, fold, T']."""
  x = pad_length(x, plan.rows).swapaxes(1, 2)
  return x.reshape(plan.batch, plan.units, plan.fold, plan.length)


def _limits(plan, first, last):
  """[B, 2, T']; padding sees nothing but itself."""
  return pad_length(jnp.stack([first, last], 1), plan.rows, axis=2)


def _bounds(plan, first, last):
  """First tile and the one behind the last of each block, [2, B * steps]."""
  first = pad_length(first, plan.rows, value=plan.slots).reshape(-1, plan.rows)
  last = pad_length(last, plan.rows).reshape(-1, plan.rows)
  stop = (jnp.max(last, 1) + plan.tile - 1) // plan.tile
  return jnp.stack([jnp.min(first, 1) // plan.tile, stop]).astype(jnp.int32)


def _token_block(plan, dtype=None):
  shape, block = (plan.batch * plan.length, plan.units * plan.lanes), (plan.rows, plan.lanes)
  place = lambda b, u, t: (b * plan.steps + t, u)  # noqa: E731
  return rows_of.Operand(shape, dtype or plan.dtype, block, place)


def _slot_block(plan):
  shape = (plan.batch, plan.slots, plan.units * plan.lanes)
  place = lambda b, u, t: (b, 0, u)  # noqa: E731
  return rows_of.Operand(shape, plan.dtype, (None, plan.slots, plan.lanes), place)


def _column_block(plan, rows):
  shape, block = (plan.batch, plan.units, rows, plan.length), (None, None, rows, plan.rows)
  return rows_of.Operand(shape, jnp.float32, block, lambda b, u, t: (b, u, 0, t))


def _limit_block(plan):
  shape, block = (plan.batch, 2, plan.length), (None, 2, plan.rows)
  return rows_of.Operand(shape, jnp.int32, block, lambda b, u, t: (b, 0, t))


def _call(kernel, name, plan, bounds, operands, inputs, outputs, scratch, products):
  specs = [
    [pl.BlockSpec(x.block, lambda b, u, t, _, place=x.place: place(b, u, t)) for x in side]
    for side in (inputs, outputs)
  ]
  out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs]
  pairs = plan.batch * plan.units * plan.fold * plan.length * plan.slots // 2
  return pl.pallas_call(
    kernel,
    out_shape=out_shape,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(plan.batch, plan.units, plan.steps),
      in_specs=specs[0],
      out_specs=specs[1],
      scratch_shapes=scratch,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=vmem_limit(
        tpu_tuning.attend_estimate(plan.slots, plan.rows, plan.lanes, plan.dtype)
      ),
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * products * pairs * plan.width,
      transcendentals=pairs,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*operands, *out_shape)),
    ),
    interpret=plan.interpret,
    name=name,
  )(bounds, *operands)
