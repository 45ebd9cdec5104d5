"""The differentiable TPU operator: padding, layouts, the state, both kernels."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..rotary import rotary_tables
from ..segments import pad_length, zero_padding
from . import tpu, tpu_attend, tpu_backward, tpu_rows, tpu_tuning
from .state import RatState, state_of_chunks
from .tpu_rows import Plan
from .xla import rat_attention_xla, recurrence_terms, run_recurrences

CLOSED = 1e4  # a gate's logit that leaves the running sums as they are


class Residuals(NamedTuple):
  """What the backward kernel needs, in the kernels' layout (`tpu_rows`)."""

  tokens: tuple[jax.Array, ...]
  bias: jax.Array
  output: jax.Array
  keys: jax.Array
  values: jax.Array
  statistics: jax.Array


def rat_attention_tpu(
  query: Float[Array, "B T G K"],
  key: Float[Array, "B T G K"],
  value: Float[Array, "B T H K"],
  gate_logits: Float[Array, "B T H K"],
  gate_bias: Float[Array, "H K"],
  output_logits: Float[Array, "B T H K"] | None,
  initial_state: RatState | None,
  segments: Int[Array, "B T"] | None,
  lengths: Int[Array, " B"] | None,
  chunk_size: int,
  rotary_base: float | None,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B T H K"], RatState]:
  """Output and final state, as `rat_attention_xla`; bfloat16 or float32 inputs.

  Where rows start their chunks together (no documents, no state) everything is one kernel in each
  direction, if K is at most 128 and chunks are not longer than `tpu_tuning.LONGEST_CHUNK`.
  Otherwise the portable path's recurrence and slots are used, with a kernel for the softmax. Either
  way the summaries of a head must fit in VMEM, or NotImplementedError is raised. `interpret` runs
  the kernels on the CPU: True, or a `pltpu.InterpretParams` (which can look for races).
  """
  if value.dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(
      "rat_attention: value must be float32 or bfloat16 for the TPU kernels; got "
      f'{value.dtype} (cast it, or use implementation="xla")'
    )
  tokens = (query, key, value, gate_logits, gate_bias, output_logits)
  plan = None
  if initial_state is None and segments is None:
    plan = make_plan(query, value, output_logits, chunk_size, rotary_base, interpret)
  if plan is None:
    slots = _slots(value, initial_state, chunk_size)
    if not tpu_attend.fits(value, slots):
      raise NotImplementedError(
        "rat_attention: value must have few enough chunks for the TPU's VMEM; got "
        f'{slots}, of which a head attends to all (implementation="xla" takes any number)'
      )
    options = (initial_state, segments, lengths, chunk_size, rotary_base)
    softmax = functools.partial(tpu_attend.attend_tpu, interpret=interpret)
    return rat_attention_xla(*tokens, *options, attend=softmax)
  output, *summaries = _aligned(plan, *tokens, chunk_size, rotary_base)
  running = _last_chunk(key, value, gate_logits, gate_bias, lengths, chunk_size)
  state = state_of_chunks(*summaries, *running, lengths, value.shape[1], chunk_size)
  return zero_padding(output, lengths), state


def fits(query, value, initial_state, segments, chunk_size) -> bool:
  """Whether there is a kernel for a problem on the chip that is compiled for."""
  if value.dtype not in (jnp.float32, jnp.bfloat16):
    return False
  if initial_state is None and segments is None:
    if make_plan(query, value, None, chunk_size, None, False) is not None:
      return True
  return tpu_attend.fits(value, _slots(value, initial_state, chunk_size))


def _slots(value, initial_state, chunk_size):
  before = 0 if initial_state is None else initial_state.key.shape[1]
  return before - (-value.shape[1] // chunk_size)


def _aligned(
  plan, query, key, value, gate_logits, gate_bias, output_logits, chunk_size, rotary_base
):
  """(output, key and value summaries of the finished chunks, [B, S, H, K])."""
  length, heads = value.shape[1:3]
  kernel = functools.partial(_to_kernel, plan, chunk_size)
  groups = [_group_tokens(plan, x) for x in (query, key)]
  plain = [*groups, value] if output_logits is None else [*groups, value, output_logits]
  tokens = [kernel(x, 0) for x in plain]
  tokens.insert(3, kernel(gate_logits, CLOSED))
  bias = _to_lanes(plan, gate_bias.astype(jnp.float32)).reshape(1, -1)
  output, *summaries = _rat(tuple(tokens), bias, plan, rotary_base)
  slots = max(length // chunk_size, 1)
  summaries = [x[..., :slots, :].transpose(0, 3, 2, 1, 4) for x in summaries]
  summaries = [x.reshape(plan.batch, slots, heads, plan.width) for x in summaries]
  output = _from_kernel(plan, chunk_size, output, length, heads)
  return output, *(_from_lanes(plan, x) for x in summaries)


def _last_chunk(key, value, gate_logits, gate_bias, lengths, chunk_size):
  """[k~, v~] after each row's last token, [B, H, K]: the recurrence of its chunk once more."""
  batch, length = value.shape[:2]
  count = min(chunk_size, length)
  last = (jnp.full((batch,), length) if lengths is None else jnp.clip(lengths, 0, length)) - 1
  start = last // chunk_size * chunk_size
  if lengths is None:  # a slice has the cheaper gradient
    first = (length - 1) // chunk_size * chunk_size
    parts = [x[:, first:] for x in (key, value, gate_logits)]
  else:
    index = jnp.clip(start[:, None] + jnp.arange(count), 0, length - 1)[..., None, None]
    parts = [jnp.take_along_axis(x, index, axis=1) for x in (key, value, gate_logits)]
  kept, added = recurrence_terms(*parts, gate_bias, jnp.arange(parts[0].shape[1])[None])
  running = run_recurrences(kept, added, None)
  at = jnp.maximum(last - start, 0)[:, None, None, None]
  ends = [jnp.take_along_axis(x, at, axis=1)[:, 0] for x in running]
  return [jnp.where((last >= 0)[:, None, None], x, 0) for x in ends]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rat(tokens, bias, plan, rotary_base):
  """(y [B * T', H * width], summaries of keys and values [B, outer, inner, slots, lanes])."""
  return tuple(tpu.forward(plan, bias, _tables(plan, rotary_base), tokens, save=False))


def _forward(tokens, bias, plan, rotary_base):
  tables = _tables(plan, rotary_base)
  output, keys, values, statistics = tpu.forward(plan, bias, tables, tokens, save=True)
  return (output, keys, values), Residuals(tokens, bias, output, keys, values, statistics)


def _backward(plan, rotary_base, residuals, cotangents):
  r = residuals
  d_output, *d_summaries = cotangents
  room = ((0, 0),) * 3 + ((0, plan.slots - plan.filled), (0, 0))
  summaries = [jnp.pad(x, room) for x in (r.keys, r.values)]
  operands = (*r.tokens, r.output, d_output, *summaries, r.statistics, *d_summaries)
  dq, dk, *rest, d_bias = tpu_backward.backward(plan, r.bias, _tables(plan, rotary_base), operands)
  grads = (*(_sum_over_heads(plan, x) for x in (dq, dk)), *rest)
  return grads, jnp.sum(d_bias, 0).swapaxes(0, 1).reshape(1, -1)


_rat.defvjp(_forward, _backward)


def make_plan(query, value, output_logits, chunk_size, rotary_base, interpret) -> Plan | None:
  """How the fused kernels would do it; None if heads, chunks or sequence are too long for them."""
  batch, length, heads, dim = value.shape
  width, fold = tpu_tuning.head_width(heads, dim)
  # Loads with a stride have LANES lanes.
  if chunk_size > tpu_tuning.LONGEST_CHUNK or width > tpu_rows.LANES:
    return None
  groups = query.shape[2] if query.shape[2] % fold else query.shape[2] // fold
  chunk = tpu_tuning.padded_chunk(chunk_size)
  padded = -(-length // chunk_size) * chunk
  chunks = tpu_tuning.chunks_per_block(chunk, padded, value.dtype)
  rows = chunk * chunks
  padded = tpu_tuning.round_up(padded, rows)
  tile = tpu_tuning.tile_size(padded // chunk)
  slots = tpu_tuning.round_up(padded // chunk, tile)
  units = heads // fold
  inner = tpu_tuning.heads_inside(units, groups, slots, rows, width * fold, value.dtype)
  if not inner:
    return None
  return Plan(
    batch=batch, length=padded, outer=units // inner, inner=inner, groups=groups, width=width,
    fold=fold, chunk=chunk, chunks=chunks, tile=tile, dtype=value.dtype, head_dim=dim,
    rotary=rotary_base is not None, gated=output_logits is not None, interpret=interpret,
  )  # fmt: skip


def _tables(plan, base):
  """Cosines and signed sines of the chunks' numbers, float32 [chunks, lanes]; () for no turn."""
  tables = rotary_tables(jnp.arange(plan.steps * plan.chunks), plan.head_dim, base)
  if tables is None:
    return ()
  short = plan.width // 2 - tables[0].shape[1]
  cos, sin = (jnp.pad(x, ((0, 0), (0, short))) for x in tables)
  whole = jnp.concatenate([cos, cos], 1), jnp.concatenate([-sin, sin], 1)
  return tuple(jnp.tile(x, (1, plan.fold)) for x in whole)


def _group_tokens(plan, x):
  """Repeats the groups where a unit's heads would need more than there are."""
  return jnp.tile(x, (1, 1, plan.groups * plan.fold // x.shape[2], 1))


def _sum_over_heads(plan, x):
  """[B T', outer * lanes] -> [B T', groups * lanes]."""
  if plan.outer == plan.groups:
    return x
  return jnp.sum(x.reshape(x.shape[0], -1, plan.groups * plan.lanes), 1).astype(plan.dtype)


def _to_lanes(plan, x):
  """[..., K] -> [..., width]; both halves of a head are padded, so that pairs stay W / 2 apart."""
  dim = x.shape[-1]
  if dim == plan.width:
    return x
  if dim % 2:
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, plan.width - dim),))
  halves = x.reshape(*x.shape[:-1], 2, dim // 2)
  widths = ((0, 0),) * x.ndim + ((0, (plan.width - dim) // 2),)
  return jnp.pad(halves, widths).reshape(*x.shape[:-1], plan.width)


def _from_lanes(plan, x):
  """The way back, [..., width] -> [..., K]."""
  dim = plan.head_dim
  if dim == plan.width or dim % 2:
    return x[..., :dim]
  halves = x.reshape(*x.shape[:-1], 2, plan.width // 2)[..., : dim // 2]
  return halves.reshape(*x.shape[:-1], dim)


def _to_kernel(plan, chunk_size, x, closed):
  """[B, T, N, K] -> [B * T', N * width]; `closed` fills rows that only lengthen a chunk."""
  x = _to_lanes(plan, x)
  x = x.reshape(*x.shape[:2], -1)
  if plan.chunk != chunk_size:
    x = pad_length(x, chunk_size).reshape(plan.batch, -1, chunk_size, x.shape[2])
    short = ((0, 0), (0, 0), (0, plan.chunk - chunk_size), (0, 0))
    x = jnp.pad(x, short, constant_values=closed).reshape(plan.batch, -1, x.shape[3])
  x = jnp.pad(x, ((0, 0), (0, plan.length - x.shape[1]), (0, 0)))
  return x.reshape(-1, x.shape[2])


def _from_kernel(plan, chunk_size, x, length, count):
  """The way back, [B * T', N * width] -> [B, T, N, K]."""
  x = x.reshape(plan.batch, plan.length, -1)
  if plan.chunk != chunk_size:
    x = x.reshape(plan.batch, -1, plan.chunk, x.shape[2])[:, :, :chunk_size]
    x = x.reshape(plan.batch, -1, x.shape[3])
  x = x[:, :length].reshape(plan.batch, length, count, plan.width)
  return _from_lanes(plan, x)
