"""The differentiable TPU operator: layout, document numbers per chunk, forward and backward."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from . import tpu
from .tuning import choose_blocks
from .xla import lightning_attention_xla


class Residuals(NamedTuple):
  """What the backward kernel needs. `states` is the state before each chunk in the input dtype."""

  query: Float[Array, "B T H K"]
  key: Float[Array, "B T H K"]
  value: Float[Array, "B T H V"]
  log_decay: Float[Array, " H"]
  initial_state: Float[Array, "B H K V"]  # for the gradient of log_decay
  segments: Int[Array, "B T"] | None
  lengths: Int[Array, " B"] | None
  states: Float[Array, "B H N K V"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def lightning_attention_tpu(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T H K"],
  value: Float[Array, "B T H V"],
  log_decay: Float[Array, " H"],
  initial_state: Float[Array, "B H K V"],
  segments: Int[Array, "B T"] | None,
  lengths: Int[Array, " B"] | None,
  chunk_size: int | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """Output and final state, as `lightning_attention_xla`; bfloat16 or float32 inputs.

  `chunk_size` is rounded up to a multiple of 16 rows, None takes the best for the chip. `interpret`
  runs the kernels on the CPU: True, or a `pltpu.InterpretParams` (which can look for races).
  """
  args = (query, key, value, log_decay, initial_state, segments, lengths)
  return _run(args, chunk_size, interpret, save_states=False)[:2]


def _forward(*args):
  *args, chunk_size, interpret = args
  query, key, value, log_decay, initial_state, segments, lengths = args
  output, state, states = _run(args, chunk_size, interpret, save_states=True)
  residuals = Residuals(query, key, value, log_decay, initial_state, segments, lengths, states)
  return (output, state), residuals


def _run(args, chunk_size, interpret, save_states):
  query, key, value, log_decay, initial_state, segments, lengths = args
  plan = _plan(query, value, segments, lengths, chunk_size, interpret)
  scalars, documents = _prepare(plan, log_decay, segments, lengths)
  arrays = [tpu.to_kernel_layout(x) for x in (query, key, value)]
  # pyrefly: ignore[bad-argument-count, bad-argument-type]: the length of a list is not a type
  output, *states = tpu.forward(plan, scalars, documents, *arrays, initial_state, save_states)
  return (tpu.from_kernel_layout(output, plan.heads), *states)


def _backward(chunk_size, interpret, residuals, cotangents):
  r = residuals
  d_output, d_final_state = cotangents
  plan = _plan(r.query, r.value, r.segments, r.lengths, chunk_size, interpret)
  scalars, documents = _prepare(plan, r.log_decay, r.segments, r.lengths)
  arrays = [tpu.to_kernel_layout(x) for x in (r.query, r.key, r.value, d_output)]
  # pyrefly: ignore[bad-argument-count, bad-argument-type]: the length of a list is not a type
  *grads, d_state = tpu.backward(plan, scalars, documents, *arrays, d_final_state, r.states)

  # The decay is a constant in every released model, so the kernels do not carry its gradient along.
  # Who asks for it pays for the portable path; where nobody does, compilation removes all of this.
  def portable(log_decay):
    args = (r.query, r.key, r.value, log_decay, r.initial_state, r.segments, r.lengths)
    return lightning_attention_xla(*args, plan.chunk)

  (d_log_decay,) = jax.vjp(portable, r.log_decay)[1](cotangents)
  grads = (tpu.from_kernel_layout(x, plan.heads) for x in grads)
  return (*grads, d_log_decay, d_state, None, None)


lightning_attention_tpu.defvjp(_forward, _backward)


def _plan(query, value, segments, lengths, chunk_size, interpret):
  batch, length, heads, key_dim = query.shape
  value_dim = value.shape[3]
  if query.dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(
      "lightning_attention: query must be float32 or bfloat16 for the TPU kernels; got "
      f'{query.dtype} (cast it, or use implementation="xla")'
    )
  chunk, panel, unroll = choose_blocks(length, key_dim, value_dim, query.dtype, chunk_size)
  padded = lengths is not None or length % (chunk * unroll) != 0
  return tpu.Plan(
    batch, length, heads, key_dim, value_dim, query.dtype, chunk, panel, unroll, padded,
    segments is not None, interpret,
  )  # fmt: skip


def _prepare(plan, log_decay, segments, lengths):
  """(scalars, documents) of the kernels; see `tpu.Scalars` and `tpu._weights`."""
  if lengths is None:
    lengths = jnp.full((plan.batch,), plan.length, jnp.int32)
  lengths = jnp.minimum(lengths.astype(jnp.int32), plan.length)
  if segments is None:
    return (log_decay, lengths), ()
  chunk, count = plan.chunk, plan.steps * plan.unroll
  short = count * chunk - plan.length
  ids = jnp.pad(segments, ((0, 0), (0, short)), mode="edge").reshape(plan.batch, count, chunk)
  row = jnp.arange(chunk)
  # First row of the next document, at or after the one behind this row; C if there is none.
  changes = jnp.where(ids[..., 1:] != ids[..., :-1], row[1:], chunk)
  changes = jnp.pad(changes, ((0, 0), (0, 0), (0, 1)), constant_values=chunk)
  ends = jax.lax.cummin(changes, axis=2, reverse=True)
  before = jnp.pad(ids[:, :-1, -1], ((0, 0), (1, 0)))  # [B, N]; the initial state is document 0's
  head_end = jnp.sum(ids == before[..., None], axis=2, dtype=jnp.int32)
  real = jnp.clip(lengths[:, None] - jnp.arange(count) * chunk, 0, chunk)  # [B, N]
  last = jnp.take_along_axis(ids, jnp.maximum(real - 1, 0)[..., None], axis=2)
  tail_start = jnp.sum(ids < last, axis=2, dtype=jnp.int32)
  documents = ends.astype(jnp.int32).reshape(plan.batch, plan.steps, plan.unroll, chunk)
  return (log_decay, lengths, head_end.reshape(-1), tail_start.reshape(-1)), (documents,)
