"""The differentiable TPU operator: padding, layouts, document numbers per chunk, both kernels."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..dots import einsum_f32
from ..tpu_sizes import round_up
from . import tpu, tpu_backward
from .features import feature_count
from .tpu_chunks import Plan
from .tpu_features import Rows, row_numbers
from .tpu_tuning import choose_blocks, choose_group
from .xla import taylor_attention_xla


class Residuals(NamedTuple):
  """What the backward kernel needs; arrays of tokens as they were given."""

  query: Float[Array, "B T H F"]
  key: Float[Array, "B T H F"]
  value: Float[Array, "B T H V"]
  log_decay: Float[Array, " H"] | None
  initial_state: Float[Array, "B H P V1"]  # for the gradient of log_decay
  segments: Int[Array, "B T"] | None
  lengths: Int[Array, " B"] | None
  output: Float[Array, "B T H V"]
  totals: Float[Array, "..."]  # float32, the sum of weights of every token
  states: Float[Array, "..."]  # before each block, in the input dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def taylor_attention_tpu(
  query: Float[Array, "B T H F"],
  key: Float[Array, "B T H F"],
  value: Float[Array, "B T H V"],
  log_decay: Float[Array, " H"] | None,
  initial_state: Float[Array, "B H P V1"],
  segments: Int[Array, "B T"] | None,
  lengths: Int[Array, " B"] | None,
  normalize: bool = True,
  chunk_size: int | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H P V1"]]:
  """Output and final state, as `taylor_attention_xla`; bfloat16 or float32 inputs.

  `chunk_size` is rounded up to a multiple of 16 rows, None takes the best for the chip. `interpret`
  runs the kernels on the CPU: True, or a `pltpu.InterpretParams` (which can look for races).
  """
  args = (query, key, value, log_decay, initial_state, segments, lengths)
  return _run(args, normalize, chunk_size, interpret, save=False)[:2]


def _forward(*args):
  *args, normalize, chunk_size, interpret = args
  query, key, value, log_decay, initial_state, segments, lengths = args
  output, state, totals, states = _run(args, normalize, chunk_size, interpret, save=True)
  residuals = Residuals(
    query, key, value, log_decay, initial_state, segments, lengths, output, totals, states
  )
  return (output, state), residuals


def _run(args, normalize, chunk_size, interpret, save):
  query, key, value, log_decay, initial_state, segments, lengths = args
  plan = _plan(query, value, log_decay, segments, lengths, normalize, chunk_size, interpret)
  scalars, starts = _prepare(plan, log_decay, segments, lengths)
  query, key = (_to_kernel(plan, x, plan.dim) for x in (query, key))
  values = _to_kernel(plan, value, plan.value_dim)
  state = _state_to_kernel(plan, initial_state)
  output, state, *saved = tpu.forward(plan, scalars, starts, query, key, values, state, save)
  value_dim = value.shape[3]
  output = _from_kernel(plan, output, value_dim)
  return (output, _state_from_kernel(plan, state, value_dim), *saved)


def _backward(normalize, chunk_size, interpret, residuals, cotangents):
  r = residuals
  d_output, d_final_state = cotangents
  plan = _plan(
    r.query, r.value, r.log_decay, r.segments, r.lengths, normalize, chunk_size, interpret
  )
  scalars, starts = _prepare(plan, r.log_decay, r.segments, r.lengths)
  keys = [_to_kernel(plan, x, plan.dim) for x in (r.query, r.key)]
  values = [_to_kernel(plan, x, plan.value_dim) for x in (r.value, r.output, d_output)]
  d_state = _state_to_kernel(plan, d_final_state)
  operands = (*keys, *values, r.totals, d_state, r.states)
  dq, dk, dv, d_state = tpu_backward.backward(plan, scalars, starts, *operands)
  grads = [_from_kernel(plan, x, plan.rows.head_dim) for x in (dq, dk)]
  value_dim = r.value.shape[3]
  grads.append(_from_kernel(plan, dv, value_dim))
  d_log_decay = None
  if r.log_decay is not None:
    # The kernels do not carry the gradient of the decay along. Who asks for it pays for the
    # portable path; where nobody does, compilation removes all of this.
    def portable(log_decay):
      args = (r.query, r.key, r.value, log_decay, r.initial_state, r.segments, r.lengths)
      return taylor_attention_xla(*args, normalize, plan.chunk)

    (d_log_decay,) = jax.vjp(portable, r.log_decay)[1](cotangents)
  return (*grads, d_log_decay, _state_from_kernel(plan, d_state, value_dim), None, None)


taylor_attention_tpu.defvjp(_forward, _backward)


def _plan(query, value, log_decay, segments, lengths, normalize, chunk_size, interpret):
  batch, length, heads, head_dim = query.shape
  if query.dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(
      "taylor_attention: query must be float32 or bfloat16 for the TPU kernels; got "
      f'{query.dtype} (cast it, or use implementation="xla")'
    )
  multiple = 8 * 4 // query.dtype.itemsize  # rows of a tile in VMEM
  rows = Rows(round_up(head_dim, 8), head_dim, multiple)
  value_dim = round_up(value.shape[3], multiple)
  group, folded = choose_group(heads, rows, value_dim)
  chunk, unroll = choose_blocks(length, group, rows, value_dim, query.dtype, chunk_size)
  return Plan(
    batch * folded, length, heads // folded, folded, rows, value_dim, query.dtype, group, chunk,
    unroll, log_decay is not None, lengths is not None or length % (chunk * unroll) != 0,
    segments is not None, normalize, interpret,
  )  # fmt: skip


def _to_kernel(plan, x, dim):
  """[B, T, H, D] -> [B, T, H * dim]; with folded heads [B * H, T, dim]."""
  x = jnp.pad(x, ((0, 0),) * 3 + ((0, dim - x.shape[3]),))
  x = x if plan.folded == 1 else x.swapaxes(1, 2)
  return x.reshape(plan.batch, plan.length, plan.heads * dim)


def _from_kernel(plan, x, dim):
  """The way back to [B, T, H, dim]."""
  x = x.reshape(plan.batch, plan.length, plan.heads, -1)[..., :dim]
  if plan.folded == 1:
    return x
  return x.reshape(-1, plan.folded, plan.length, dim).swapaxes(1, 2)


def _state_to_kernel(plan, state):
  """[B, H, P, V + 1] -> [B, H, R, W]: rows and columns in the kernels' order, unused ones 0.

  Products with 0/1 matrices are exact, and the compiler removes them where the state is zero.
  """
  rows, columns = _selections(plan, state.shape[3] - 1)
  state = einsum_f32("rp,bhpv->bhrv", rows, state)
  state = einsum_f32("bhrv,vw->bhrw", state, columns)
  return state.reshape(plan.batch, plan.heads, *state.shape[2:])


def _state_from_kernel(plan, state, value_dim):
  """The way back, for states and for their cotangents."""
  rows, columns = _selections(plan, value_dim)
  state = state.reshape(plan.batch // plan.folded, -1, *state.shape[2:])
  state = einsum_f32("rp,bhrw->bhpw", rows, state)
  return einsum_f32("bhpw,vw->bhpv", state, columns)


def _selections(plan, value_dim):
  """0/1 matrices [R, P] and [V + 1, W]: the kernels' number of each public row and column."""
  numbers = row_numbers(plan.rows)[:, None]
  rows = numbers == np.arange(feature_count(plan.rows.head_dim))
  columns = np.append(np.arange(value_dim), plan.value_dim)[:, None] == np.arange(plan.wide)
  return jnp.asarray(rows, jnp.float32), jnp.asarray(columns, jnp.float32)


def _prepare(plan, log_decay, segments, lengths):
  """(scalars, starts) of the kernels; see `tpu_chunks.Scalars` and `make_chunk`."""
  public_batch = plan.batch // plan.folded
  if lengths is None:
    lengths = jnp.full((public_batch,), plan.length, jnp.int32)
  lengths = jnp.repeat(jnp.minimum(lengths.astype(jnp.int32), plan.length), plan.folded)
  if log_decay is None:
    log_decay = jnp.zeros((plan.heads * plan.folded,), jnp.float32)
  rates = jnp.tile(log_decay, public_batch).reshape(plan.batch, plan.heads)
  rates = jnp.pad(rates, ((0, 0), (0, plan.groups * plan.group - plan.heads))).reshape(-1)
  if segments is None:
    return (rates, lengths), ()
  segments = jnp.repeat(segments, plan.folded, axis=0)
  chunk, count = plan.chunk, plan.steps * plan.unroll
  short = count * chunk - plan.length
  ids = jnp.pad(segments, ((0, 0), (0, short)), mode="edge").reshape(plan.batch, count, chunk)
  # First row of the document of each row.
  changes = jnp.where(ids[..., 1:] != ids[..., :-1], jnp.arange(1, chunk), 0)
  changes = jnp.pad(changes, ((0, 0), (0, 0), (1, 0)))
  starts = jax.lax.cummax(changes, axis=2)
  before = jnp.pad(ids[:, :-1, -1], ((0, 0), (1, 0)))  # [B, N]; the initial state is document 0's
  head_end = jnp.sum(ids == before[..., None], axis=2, dtype=jnp.int32)
  real = jnp.clip(lengths[:, None] - jnp.arange(count) * chunk, 0, chunk)  # [B, N]
  last = jnp.take_along_axis(ids, jnp.maximum(real - 1, 0)[..., None], axis=2)
  tail_start = jnp.sum(ids < last, axis=2, dtype=jnp.int32)
  starts = starts.astype(jnp.int32).reshape(plan.batch, plan.steps, plan.unroll, chunk)
  return (rates, lengths, head_end.reshape(-1), tail_start.reshape(-1)), (starts,)
