"""Taylor attention as Pallas-Mosaic TPU kernels: the forward, and what calls a kernel.

The grid is (batch, groups of heads, steps); the steps of one group run in order on one core, each
taking `unroll` chunks, and hand the float32 states on through VMEM. Arrays stay [B, T, H * D]: a
group fills whole lane tiles (8 heads of F = 16), and its chunk is transposed in VMEM. With time on
lanes a head is a band of sublanes, features are rolls of it (`tpu_features.py`), values narrower
than 128 waste nothing, and the state is [R, W] with the rows of the public one in other order.

Per head and chunk of 128 rows 528 rows go through a 128 x 128 matrix unit (V = 64, bfloat16): 128
for the scores, 80 weights times values, 2 x 80 reading the state and 160 adding to it. While one
head is at it, the scores of the next are made and tiles of the next chunk transposed.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from ..dots import NN, NT, TN, dot_f32
from .tpu_chunks import (
  Plan,
  among_lanes,
  clear_other_heads,
  do_share,
  fetches,
  fill_decay,
  for_chunks,
  head_rows,
  lane_window,
  make_chunk,
  put_back,
  split_scalars,
  state_factors,
  times,
  with_ones,
)
from .tpu_features import key_features, query_features
from .tpu_tuning import vmem_estimate, vmem_limit


def _forward_kernel(*refs, plan: Plan, save: bool):
  """Blocks: q, k [U C, G F], v [U C, G V], state [G, R, W], maybe starts [U, C].

  Out: o [U C, G V], state, maybe totals [U, G, C] and the state before the block.
  """
  scalars, refs = split_scalars(plan, refs)
  (q_ref, k_ref, v_ref, initial_ref), refs = refs[:4], refs[4:]
  starts_ref, refs = (refs[0], refs[1:]) if plan.packed else (None, refs)
  (o_ref, state_ref), refs = refs[:2], refs[2:]
  (totals_ref, before_ref), refs = (refs[:2], refs[2:]) if save else ((None, None), refs)
  # Queries, keys and values with time on lanes, two slots; the output likewise; decay factors.
  (*tile_refs, output_ref), decay = refs[:4], refs[4:]
  step = pl.program_id(2)

  @pl.when(step == 0)
  def _():
    if plan.decay:
      fill_decay(plan, scalars, decay[0])
    state_ref[...] = initial_ref[...]  # the output block stays in VMEM until the heads are done

  if save:
    before_ref[...] = state_ref[...].astype(before_ref.dtype)

  def fetch_all(part, slot):
    chunk = make_chunk(plan, scalars, step, part, starts_ref)
    pairs = zip((q_ref, k_ref, v_ref), tile_refs, strict=True)
    return [job for ref, tiles in pairs for job in fetches(ref, tiles.at[slot], chunk)]

  def body(part, slot, following):
    chunk = make_chunk(plan, scalars, step, part, starts_ref)
    key_rows = clear_other_heads(plan, scalars, k_ref[chunk.here, :])  # [C, G F]
    jobs = [] if following is None else fetch_all(following, 1 - slot)

    def of_head(head):
      dims = zip(tile_refs, (plan.dim, plan.dim, plan.value_dim), strict=True)
      return [ref[slot, head_rows(head, dim), :] for ref, dim in dims]

    def weights_of(head):
      return polynomial(plan, chunk, head, key_rows, of_head(head)[0])[1]

    totals, weights = [], weights_of(0)
    for head in range(plan.group):
      later = weights_of(head + 1) if head + 1 < plan.group else None  # the matrix unit never waits
      do_share(jobs, head, plan.group)
      output, total, state_ref[head] = _one_head(
        plan, scalars, chunk, head, of_head(head), weights, state_ref[head], *decay
      )
      output_ref[head_rows(head, plan.value_dim), :] = output
      put_back(o_ref, output_ref, chunk, head, plan.value_dim)
      totals.append(total)
      weights = later
    if save:
      totals_ref[part] = jnp.concatenate(totals)

  for job in fetch_all(0, 0):
    job()
  for_chunks(plan, body)


def _one_head(plan, scalars, chunk, head, tiles, weights, state, decay_ref=None):
  """(output [V, C], sum of weights [1, C], the state after the chunk [R, W]) of one head."""
  q, k, values = tiles
  up, down, carry = state_factors(plan, scalars, chunk, head)
  v = with_ones(plan, values)  # [W, C]
  psi = query_features(q, plan.rows).astype(plan.dtype)
  read = times(up, dot_f32(state.astype(plan.dtype), psi, TN))  # [W, C]
  if plan.decay:
    sums = dot_f32(values, (decay_ref[head] * weights).astype(v.dtype), NN)
    ones = dot_f32(v[plan.value_dim :], weights.astype(v.dtype), NN)
    sums = jnp.concatenate([sums, ones]) + read
  else:
    sums = dot_f32(v, weights.astype(v.dtype), NN) + read
  output, total = sums[: plan.value_dim], sums[plan.value_dim : plan.value_dim + 1]
  if chunk.real is not None:
    total = jnp.where(chunk.real, total, 1.0)  # padding has no weights to be divided by
  output = output * (1 / total) if plan.normalize else output
  if chunk.real is not None:
    output = jnp.where(chunk.real, output, 0.0)
  added = dot_f32(key_features(k, plan.rows).astype(plan.dtype), times(down, v), NT)  # [R, W]
  return output.astype(plan.dtype), total, times(carry, state) + added


def polynomial(plan: Plan, chunk, head: int, key_rows, q):
  """(1 + s, masked 1 + s + s^2 / 2) of one chunk, float32 [C, C] as [key, query].

  The scores are a product over whole lane tiles of keys, with zeros for other heads' lanes.
  """
  scale = plan.rows.scale
  early = plan.dtype == jnp.float32 or math.frexp(scale)[0] == 0.5  # scaling q rounds nothing
  q = among_lanes(plan, head, scale * q if early else q).astype(plan.dtype)
  t = dot_f32(key_rows[:, lane_window(plan, head)], q, NN)
  t = 1 + (t if early else scale * t)
  return t, jnp.where(chunk.mask, 0.5 * t * t + 0.5, 0.0)


def forward(plan: Plan, scalars, starts, query, key, value, initial_state, save: bool):
  """(output, final state[, totals [B, H / G, N, G, C], states before the blocks]).

  query, key, value and output are [B, T, H * D], states [B, H, R, W].
  """
  f, v = plan.dim, plan.value_dim
  out = [array(plan, v), state_block(plan)]
  if save:
    out += [totals_block(plan), before_block(plan)]
  scratch = [
    pltpu.VMEM((2, plan.group * f, plan.chunk), jnp.float32),
    pltpu.VMEM((2, plan.group * f, plan.chunk), jnp.float32),
    pltpu.VMEM((2, plan.group * v, plan.chunk), plan.dtype),
    pltpu.VMEM((plan.group * v, plan.chunk), plan.dtype),
  ]
  inputs = [array(plan, f), array(plan, f), array(plan, v), state_block(plan)]
  work = plan.chunk * (f + plan.wide) + 2 * plan.rows.total * plan.wide
  return call(
    functools.partial(_forward_kernel, plan=plan, save=save), "taylor_attention_forward", plan,
    scalars, (query, key, value, initial_state, *starts), inputs, out, scratch, work,
  )  # fmt: skip


class Block(NamedTuple):
  """An operand: full shape, dtype, block shape and where the block lies at grid point (b, g, t)."""

  shape: tuple[int, ...]
  dtype: DTypeLike
  block: tuple[int | None, ...]
  place: object


def array(plan, dim):
  """[B, T, H * D]: a group of heads is a column block, no transpose is needed."""
  shape = (plan.batch, plan.length, plan.heads * dim)
  block = (None, plan.block, plan.group * dim)
  return Block(shape, plan.dtype, block, lambda b, g, t: (b, t, g))


def state_block(plan):
  dims = (plan.rows.total, plan.wide)
  shape, block = (plan.batch, plan.heads, *dims), (None, plan.group, *dims)
  return Block(shape, jnp.float32, block, lambda b, g, t: (b, g, 0, 0))


def before_block(plan):
  """The state before each block, in the dtype in which it enters products."""
  dims = (plan.rows.total, plan.wide)
  shape, block = (plan.batch, plan.steps, plan.heads, *dims), (None, None, plan.group, *dims)
  return Block(shape, plan.dtype, block, lambda b, g, t: (b, t, g, 0, 0))


def totals_block(plan):
  dims = (plan.group, plan.chunk)
  shape = (plan.batch, plan.groups, plan.steps * plan.unroll, *dims)
  block = (None, None, plan.unroll, *dims)
  return Block(shape, jnp.float32, block, lambda b, g, t: (b, g, t, 0, 0))


def _starts(plan):
  shape = (plan.batch, plan.steps, plan.unroll, plan.chunk)
  block = (None, None, plan.unroll, plan.chunk)
  return Block(shape, jnp.int32, block, lambda b, g, t: (b, t, 0, 0))


def call(kernel, name, plan, scalars, operands, inputs, outputs, scratch, work, reverse=False):
  """Runs a kernel over (batch, groups, steps); `work`: multiply-adds per token and head."""

  def spec(item):
    def index(b, g, t, *_):
      return item.place(b, g, plan.steps - 1 - t if reverse else t)

    return pl.BlockSpec(item.block, index)

  if plan.packed:
    inputs = [*inputs, _starts(plan)]
  if plan.decay:
    scratch = [*scratch, pltpu.VMEM((plan.group, plan.chunk, plan.chunk), jnp.float32)]
  out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs]
  moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*operands, *out_shape))
  return pl.pallas_call(
    kernel,
    out_shape=out_shape,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(plan.batch, plan.groups, plan.steps),
      in_specs=[spec(x) for x in inputs],
      out_specs=[spec(x) for x in outputs],
      scratch_shapes=scratch,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=vmem_limit(
        vmem_estimate(plan.chunk, plan.unroll, plan.group, plan.rows, plan.value_dim, plan.dtype)
      ),
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * plan.batch * plan.heads * plan.length * work,
      transcendentals=plan.batch * plan.heads * plan.chunk**2 if plan.decay else 0,
      bytes_accessed=moved,
    ),
    interpret=plan.interpret,
    name=name,
  )(*scalars, *operands)
