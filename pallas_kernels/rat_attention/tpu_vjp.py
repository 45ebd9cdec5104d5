"""The differentiable TPU operator: plan, layouts, the state, both kernels."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..segments import zero_padding
from ..tpu_sizes import round_up
from . import layout, tpu, tpu_arrays, tpu_attend, tpu_backward, tpu_packed, tpu_rows, tpu_tuning
from .state import RatState, state_of_chunks
from .tpu_arrays import CLOSED
from .tpu_move import move
from .tpu_packed import Packed
from .tpu_rows import Plan
from .xla import rat_attention_xla, recurrence_terms, run_recurrences


class Residuals(NamedTuple):
  """What the backward kernel needs, in the kernels' layout (`tpu_rows`)."""

  tokens: tuple[jax.Array, ...]
  bias: jax.Array
  documents: Packed | None
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

  Without a state everything is one kernel in each direction, if K is at most 128 and chunks are not
  longer than `tpu_tuning.LONGEST_CHUNK`. Tokens of documents, which must then be finite, are moved
  there and back; where documents are so short that a row needs more than `layout.capacity`
  chunks, that is done for one window of it after the other. Otherwise, so with an `initial_state`,
  the portable path's recurrence and slots are used, with a kernel for the softmax. Either way the
  summaries of a head must fit in VMEM, or NotImplementedError is raised. `interpret` runs the
  kernels on the CPU: True, or a `pltpu.InterpretParams` (which can look for races).
  """
  if value.dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(
      "rat_attention: value must be float32 or bfloat16 for the TPU kernels; got "
      f'{value.dtype} (cast it, or use implementation="xla")'
    )
  tokens = (query, key, value, gate_logits, gate_bias, output_logits)
  plan = None
  if initial_state is None:
    documents = segments is not None
    plan = make_plan(query, value, output_logits, chunk_size, rotary_base, interpret, documents)
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
  if segments is not None:
    output, state = _packed(plan, tokens, segments, lengths, chunk_size, rotary_base)
    return zero_padding(output, lengths), state
  output, *summaries = _aligned(plan, *tokens, chunk_size, rotary_base)
  running = _last_chunk(key, value, gate_logits, gate_bias, lengths, chunk_size)
  state = state_of_chunks(*summaries, *running, lengths, value.shape[1], chunk_size)
  return zero_padding(output, lengths), state


def fits(query, value, initial_state, segments, chunk_size) -> bool:
  """Whether there is a kernel for a problem on the chip that is compiled for."""
  if value.dtype not in (jnp.float32, jnp.bfloat16):
    return False
  if initial_state is None:
    if make_plan(query, value, None, chunk_size, None, False, segments is not None) is not None:
      return True
  return tpu_attend.fits(value, _slots(value, initial_state, chunk_size))


def _slots(value, initial_state, chunk_size):
  before = 0 if initial_state is None else initial_state.key.shape[1]
  return before - (-value.shape[1] // chunk_size)


def _aligned(
  plan, query, key, value, gate_logits, gate_bias, output_logits, chunk_size, rotary_base
):
  """(output, key and value summaries of the finished chunks, [B, S, H, K])."""
  length = value.shape[1]
  kernel = functools.partial(tpu_arrays.to_kernel, plan, chunk_size)
  tokens = _in_order(plan, query, key, value, gate_logits, output_logits)
  tokens = tuple(
    kernel(x, CLOSED if index == tpu_packed.GATES else 0.0) for index, x in enumerate(tokens)
  )
  output, *summaries = _rat(tokens, _bias(plan, gate_bias), None, plan, chunk_size, rotary_base)
  slots = max(length // chunk_size, 1)
  summaries = (tpu_arrays.from_summaries(plan, x[..., :slots, :]) for x in summaries)
  return tpu_arrays.from_kernel(plan, chunk_size, output, length), *summaries


def _packed(plan, tokens, segments, lengths, chunk_size, rotary_base):
  """(output, final state) of rows of documents."""
  query, key, value, gate_logits, gate_bias, output_logits = tokens
  packed, ways = tpu_packed.arrange(plan, segments, lengths, chunk_size)

  def placed(index, x):
    filling = tpu_packed.fill(plan, chunk_size, index)
    x = move(tpu_arrays.flat(plan, x), *ways, plan.length, filling, plan.interpret)
    return x.reshape(-1, x.shape[2])

  tokens = _in_order(plan, query, key, value, gate_logits, output_logits)
  tokens = tuple(placed(index, x) for index, x in enumerate(tokens))
  output, *summaries = _rat(tokens, _bias(plan, gate_bias), packed, plan, chunk_size, rotary_base)
  output = output.reshape(plan.batch, plan.length, -1)
  output = move(output, ways.back, ways.there, value.shape[1], 0.0, plan.interpret)
  summaries = (tpu_arrays.from_summaries(plan, x) for x in summaries)
  sums = _last_chunk(key, value, gate_logits, gate_bias, lengths, chunk_size, packed.found.row)
  state = layout.final_state(packed.found, packed.fits, *summaries, *sums, chunk_size)
  return tpu_arrays.heads_of(plan, output), state


def _in_order(plan, query, key, value, gate_logits, output_logits):
  """The kernels' tokens; the gates are number `tpu_packed.GATES`."""
  groups = [tpu_arrays.group_tokens(plan, x) for x in (query, key)]
  return *groups, value, gate_logits, *([] if output_logits is None else [output_logits])


def _bias(plan, gate_bias):
  return tpu_arrays.to_lanes(plan, gate_bias.astype(jnp.float32)).reshape(1, -1)


def _last_chunk(key, value, gate_logits, gate_bias, lengths, chunk_size, last_row=None):
  """[k~, v~] after each row's last token, [B, H, K]: the recurrence of its chunk once more.

  last_row: where in its chunk it is; None where chunks start at multiples of their length.
  """
  batch, length = value.shape[:2]
  count = min(chunk_size, length)
  last = (jnp.full((batch,), length) if lengths is None else jnp.clip(lengths, 0, length)) - 1
  start = last - (last % chunk_size if last_row is None else last_row)
  if lengths is None and last_row is None:  # a slice has the cheaper gradient
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _rat(tokens, bias, packed, plan, chunk_size, rotary_base):
  """(y [B * T', H * width], summaries of keys and values [B, outer, inner, filled, lanes])."""
  return _run(tokens, bias, packed, plan, chunk_size, rotary_base, save=False)


def _run(tokens, bias, packed, plan, chunk_size, rotary_base, save):
  """Results of `_rat` and, with `save`, the statistics."""
  kernel = functools.partial(_run_kernel, plan, rotary_base, bias)
  if packed is None:
    return kernel(None, tokens, save)

  def general():
    run = functools.partial(kernel, save=False)
    results = tpu_packed.general(plan, chunk_size, packed, tokens, run)
    shape = tpu_rows.statistics(plan).shape
    return (*results, jnp.zeros(shape, jnp.float32)) if save else results

  return layout.either(packed.fits, lambda: kernel(packed.window, tokens, save), general)


def _forward(tokens, bias, packed, plan, chunk_size, rotary_base):
  results = _run(tokens, bias, packed, plan, chunk_size, rotary_base, save=True)
  return results[:3], Residuals(tokens, bias, packed, *results)


def _backward(plan, chunk_size, rotary_base, residuals, cotangents):
  r = residuals
  gradients = functools.partial(_run_gradients, plan, rotary_base, r.bias)
  if r.documents is None:
    return *gradients(None, r.tokens, r[3:], cotangents), None

  def again(documents, tokens, cotangents):
    results = _run_kernel(plan, rotary_base, r.bias, documents, tokens, save=True)
    return gradients(documents, tokens, results, cotangents)

  def general():
    given = (r.tokens, cotangents, r.bias)
    return tpu_packed.general_gradients(plan, chunk_size, r.documents, *given, again)

  def kernel():
    return gradients(r.documents.window, r.tokens, r[3:], cotangents)

  return *layout.either(r.documents.fits, kernel, general), None


_rat.defvjp(_forward, _backward)


def _run_kernel(plan, rotary_base, bias, documents, tokens, save):
  """(y, summaries of keys, of values[, statistics])."""
  tables = _tables(plan, documents, rotary_base)
  return tuple(tpu.forward(plan, _for_kernel(documents), bias, tables, tokens, save))


def _run_gradients(plan, rotary_base, bias, documents, tokens, results, cotangents):
  """(gradients of the tokens, of the bias); `results` are those of `_run_kernel`, all of them."""
  output, *summaries, statistics = results
  d_output, *d_summaries = cotangents
  room = ((0, 0),) * 3 + ((0, plan.slots - plan.filled), (0, 0))
  summaries = [jnp.pad(x, room) for x in summaries]
  operands = (*tokens, output, d_output, *summaries, statistics, *d_summaries)
  tables = _tables(plan, documents, rotary_base)
  grads = tpu_backward.backward(plan, _for_kernel(documents), bias, tables, operands)
  dq, dk, *rest, d_bias = grads
  tokens = (*(tpu_arrays.sum_over_heads(plan, x) for x in (dq, dk)), *rest)
  return tokens, jnp.sum(d_bias, 0).swapaxes(0, 1).reshape(1, -1)


def _for_kernel(documents):
  return () if documents is None else (documents.oldest, documents.first)


def _tables(plan, documents, rotary_base):
  numbers = jnp.arange(plan.filled) if documents is None else documents.number
  return tpu_arrays.turns(plan, numbers, rotary_base)


def make_plan(
  query, value, output_logits, chunk_size, rotary_base, interpret, documents=False
) -> Plan | None:
  """How the fused kernels would do it; None if heads, chunks or sequence are too long for them."""
  batch, length, heads, dim = value.shape
  width, fold = tpu_tuning.head_width(heads, dim)
  # Loads with a stride have LANES lanes.
  if chunk_size > tpu_tuning.LONGEST_CHUNK or width > tpu_rows.LANES:
    return None
  groups = query.shape[2] if query.shape[2] % fold else query.shape[2] // fold
  chunk = tpu_tuning.padded_chunk(chunk_size)
  chunks = layout.capacity(length, chunk_size) if documents else -(-length // chunk_size)
  padded = chunks * chunk
  # What documents get beyond their capacity is more room for them.
  chunks = tpu_tuning.chunks_per_block(chunk, padded, value.dtype, 8 if documents else 16)
  rows = chunk * chunks
  padded = round_up(padded, rows)
  tile = tpu_tuning.tile_size(padded // chunk)
  slots = round_up(padded // chunk, tile)
  units = heads // fold
  inner = tpu_tuning.heads_inside(units, groups, slots, rows, width * fold, value.dtype)
  if not inner:
    return None
  return Plan(
    batch=batch, length=padded, outer=units // inner, inner=inner, groups=groups, width=width,
    fold=fold, chunk=chunk, chunks=chunks, tile=tile, dtype=value.dtype, head_dim=dim,
    rotary=rotary_base is not None, gated=output_logits is not None,
    documents=documents, interpret=interpret,
  )  # fmt: skip
