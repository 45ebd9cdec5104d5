"""Membership "causal_recent" with keys of their own on TPUs: tiles of queries, blocks of keys.

XLA sorts queries into tiles and keys into blocks (`recent_band.Tiles`), each once. A grid step has
a tile and, by the block's number, which is known before the step, the block in which its queries'
last keys are and the one in front: no copy of what tiles share goes through HBM. Logits are
[keys, queries], so that what belongs to a query is a row of lanes. One backward kernel makes the
weights anew and gives all gradients; tiles come in the order of their blocks, so that the sums of a
block are whole when the tiles behind the next one have been.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ..dots import NN, NT, TN, dot_f32
from ..tpu_sizes import round_up, vmem_bytes, vmem_limit
from .options import Routing
from .recent import move
from .recent_band import Band, Tiles, by_rows, find_band, find_tiles, inverse
from .state import Tokens

NAME = "routed_attention"
LANES = 128  # queries of a tile; key blocks are multiples of it
MAX_NUMBERS = 2**17  # half of the SMEM


class Plan(NamedTuple):
  """All that the kernels depend on."""

  rows: int  # B H
  tiles: int
  blocks: int  # of keys, with an empty one behind
  block: int  # keys of a block
  key_dim: int
  value_dim: int
  scale: float
  dtype: Any
  interpret: Any


def fits(query: Any, tokens: Tokens, shared: bool, options: Routing) -> str | None:
  """Why the kernels do not take a problem; None if they do. `shared`: sliding-window attention."""
  if tokens.value.dtype not in (jnp.float32, jnp.bfloat16):
    return (
      "value must be float32 or bfloat16 for the TPU kernels; got "
      f'{tokens.value.dtype} (cast it, or use implementation="xla")'
    )
  if shared:
    return None
  plan = make_plan(query, tokens, options, False)
  if plan.rows * round_up(plan.tiles, LANES) > MAX_NUMBERS:
    return (
      "query must have fewer tiles of tokens in all heads, whose blocks' numbers are in the TPU's "
      f'SMEM; got {query.shape} (use implementation="xla")'
    )
  if vmem_estimate(plan) > vmem_bytes():
    return (
      "Routing.window_size must be small enough for two windows of keys to be in the TPU's VMEM; "
      f'got {options.window_size} (use implementation="xla")'
    )
  return None


def make_plan(query: Any, tokens: Tokens, options: Routing, interpret: Any) -> Plan:
  batch, length, heads, dim = query.shape
  total = tokens.key.shape[1]
  block = round_up(min(options.window_size, total), LANES)
  blocks = -(-total // block) + 1
  tiles = -(-length // LANES) + blocks
  width, dtype = tokens.value.shape[3], tokens.value.dtype
  scale = float(options.scale)
  return Plan(batch * heads, tiles, blocks, block, dim, width, scale, dtype, interpret)


def vmem_estimate(plan: Plan) -> int:
  """Bytes of the backward kernel's blocks, sums, and arrays of pairs."""
  item = jnp.dtype(plan.dtype).itemsize
  lanes = round_up(plan.key_dim, LANES) + round_up(plan.value_dim, LANES)
  of_keys = plan.block * lanes * (2 * 3 * item + 2 * 4 + 2 * item + 2 * 4)
  return of_keys + 4 * 2 * plan.block * LANES * 4 + 2 * 3 * LANES * lanes * item


def attend_band_tpu(
  query: Float[Array, "B T H K"],
  tokens: Tokens,
  scores: Float[Array, "B T H C"],
  options: Routing,
  interpret: Any = False,
) -> Float[Array, "B T H V"]:
  """Output; `scores` are those of the queries. `interpret`: True, or a `pltpu.InterpretParams`.

  Raises:
    NotImplementedError: what `fits` has a reason against.
  """
  if reason := fits(query, tokens, False, options):
    raise NotImplementedError(f"{NAME}: {reason}")
  batch, length, heads, _ = query.shape
  plan = make_plan(query, tokens, options, interpret)
  band = find_band(scores, tokens, length, options.window_size)
  place = by_rows(
    lambda *one: find_tiles(Band(*one), plan.block, LANES, plan.blocks), *band
  )  # fmt: skip
  key_place = by_rows(inverse, band.key_order)

  def blocks(x):  # [B, S, H, K] -> [B H, (blocks + 1) block, K], an empty block in front
    x = move(x.swapaxes(1, 2), band.key_order, key_place)
    behind = plan.blocks * plan.block - x.shape[2]
    x = jnp.pad(x, ((0, 0), (0, 0), (plan.block, behind), (0, 0)))
    return x.reshape(plan.rows, -1, x.shape[-1])

  q = move(query.swapaxes(1, 2), place.slot_query, place.query_slot)
  q = q.reshape(plan.rows, -1, plan.key_dim)
  where = jax.tree.map(lambda x: x.reshape(plan.rows, -1), place)
  output = _attend(q, blocks(tokens.key), blocks(tokens.value), where, plan)
  output = output.reshape(batch, heads, -1, plan.value_dim)
  return move(output, place.query_slot, place.slot_query).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, where: Tiles, plan: Plan):
  """[R, N I, V] of queries in slots, keys in blocks."""
  (output,) = _call(plan, _forward_kernel, "forward", where, query, key, value)
  return output


def _forward(query, key, value, where, plan):
  return _attend(query, key, value, where, plan), (query, key, value, where)


def _backward(plan, residuals, d_output):
  query, key, value, where = residuals
  d_query, *others = _call(plan, _backward_kernel, "backward", where, query, key, value, d_output)
  behind = key.shape[1] - others[0].shape[1]
  d_key, d_value = (jnp.pad(x, ((0, 0), (0, behind), (0, 0))) for x in others)
  return d_query, d_key, d_value, None


_attend.defvjp(_forward, _backward)


def _call(plan: Plan, kernel, name, where, *arrays) -> tuple:
  backward = len(arrays) == 4
  tile = lambda dim: pl.BlockSpec((None, LANES, dim), lambda r, n, block: (r, n, 0))  # noqa: E731
  bound = pl.BlockSpec((None, None, 1, LANES), lambda r, n, block: (r, n, 0, 0))

  def keys(dim, behind):
    return pl.BlockSpec((None, plan.block, dim), lambda r, n, block: (r, block[r, n] + behind, 0))

  k, v = plan.key_dim, plan.value_dim
  in_specs = [bound, bound, tile(k), keys(k, 0), keys(k, 1), keys(v, 0), keys(v, 1)]
  slots = plan.tiles * LANES
  shapes, out_specs, scratch = [(slots, v)], [tile(v)], []
  if backward:
    in_specs.append(tile(v))
    shapes = [(slots, k), *((plan.blocks * plan.block, dim) for dim in (k, v))]
    out_specs = [tile(k), keys(k, 0), keys(v, 0)]
    scratch = [pltpu.VMEM((2, plan.block, dim), jnp.float32) for dim in (k, v)]
  query, key, value, *rest = arrays
  bounds = (x.reshape(plan.rows, plan.tiles, 1, LANES) for x in (where.start, where.stop))
  operands = (*bounds, query, key, key, value, value, *rest)
  pairs = plan.rows * plan.tiles * LANES * 2 * plan.block
  products = 3 * k + 2 * v if backward else k + v
  out_shape = [jax.ShapeDtypeStruct((plan.rows, *shape), plan.dtype) for shape in shapes]
  moved = sum(x.size * x.dtype.itemsize for x in (query, key, value, *rest, *out_shape))
  return pl.pallas_call(
    functools.partial(kernel, plan=plan),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(plan.rows, plan.tiles),
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=scratch,
    ),
    out_shape=out_shape,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=vmem_limit(vmem_estimate(plan)),
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * pairs * products, transcendentals=pairs, bytes_accessed=moved
    ),
    interpret=plan.interpret,
    name=f"recent_attention_{name}",
  )(where.block, *operands)


def _weights(plan: Plan, blocks, start, stop, query, key) -> jax.Array:
  """float32 [keys, queries]; columns of queries that see nothing are 0."""
  logits = plan.scale * dot_f32(key, query, NT)
  first = (blocks[pl.program_id(0), pl.program_id(1)] - 1) * plan.block
  place = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
  logits = jnp.where((place >= start) & (place < stop), logits, -jnp.inf)
  top = jnp.max(logits, 0, keepdims=True)
  weights = jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0))
  total = jnp.sum(weights, 0, keepdims=True)
  return weights * (1 / jnp.where(total > 0, total, 1))


def _pair(front, behind) -> jax.Array:
  return jnp.concatenate([front[...], behind[...]], 0)


def _forward_kernel(blocks, start, stop, q, k_front, k, v_front, v, out, *, plan: Plan):
  weights = _weights(plan, blocks, start[...], stop[...], q[...], _pair(k_front, k))
  value = _pair(v_front, v)
  out[...] = dot_f32(weights.astype(plan.dtype), value, TN).astype(out.dtype)


def _backward_kernel(
  blocks, start, stop, q, k_front, k, v_front, v, d_out, d_q, d_k, d_v, k_sums, v_sums, *,
  plan: Plan,
):  # fmt: skip
  """d_k, d_v: of the front block, whose tiles are over with this one's block."""
  row, n = pl.program_id(0), pl.program_id(1)
  key, value = _pair(k_front, k), _pair(v_front, v)
  weights = _weights(plan, blocks, start[...], stop[...], q[...], key)
  by_weight = dot_f32(value, d_out[...], NT)
  mean = jnp.sum(weights * by_weight, 0, keepdims=True)
  by_logit = (plan.scale * weights * (by_weight - mean)).astype(plan.dtype)
  d_q[...] = dot_f32(by_logit, key, TN).astype(d_q.dtype)

  @pl.when(n == 0)
  def _():
    for sums in (k_sums, v_sums):
      sums[...] = jnp.zeros_like(sums)

  @pl.when((n > 0) & (blocks[row, n] != blocks[row, jnp.maximum(n - 1, 0)]))
  def _():
    for sums in (k_sums, v_sums):
      sums[0] = sums[1]
      sums[1] = jnp.zeros_like(sums[1])

  parts = dot_f32(by_logit, q[...], NN), dot_f32(weights.astype(plan.dtype), d_out[...], NN)
  for sums, part, out in zip((k_sums, v_sums), parts, (d_k, d_v), strict=True):
    sums[0] += part[: plan.block]
    sums[1] += part[plan.block :]
    out[...] = sums[0].astype(out.dtype)
