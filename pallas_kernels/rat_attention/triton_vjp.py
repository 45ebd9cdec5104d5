"""RAT attention on NVIDIA GPUs: the differentiable function.

Without a state, recurrence and softmax are two launches forward and three backward. Documents have
slots of their own (`layout`), tokens stay where they are. With a state, and where documents are so
short that they need more slots than there are, the portable path's recurrence and slots are used,
with the same softmax kernels.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..rotary import rotary_tables, rotate
from ..segments import zero_padding
from ..triton_call import run_launches, target_gpu, too_old
from . import layout
from .state import RatState, state_of_chunks
from .triton import (
  MAX_DIM,
  Problem,
  attend_gradient_launches,
  attend_launch,
  backward_launches,
  choose_config,
  forward_launches,
)
from .xla import rat_attention_xla

NAME = "rat_attention"


class Documents(NamedTuple):
  """A batch of documents, of which the kernels take the first window."""

  segments: Int[Array, "B T"]
  found: layout.Layout
  window: layout.Window
  fits: Bool[Array, ""] | None


class Residuals(NamedTuple):
  """What the backward pass needs: inputs, output, summaries and 12 bytes per token and head.

  The states inside of the chunks are made anew.
  """

  query: Float[Array, "B T G K"]
  key: Float[Array, "B T G K"]
  value: Float[Array, "B T H K"]
  gate_logits: Float[Array, "B T H K"]
  gate_bias: Float[Array, "H K"]
  output_logits: Float[Array, "B T H K"] | None
  lengths: Int[Array, " B"] | None
  documents: Documents | None
  output: Float[Array, "B T H K"]
  keys: Float[Array, "B S H K"]
  values: Float[Array, "B S H K"]
  own_score: Float[Array, "B T H"]
  top: Float[Array, "B T H"]  # the largest score, and the sum of exp(score - top): their
  total: Float[Array, "B T H"]  # log-sum-exp alone would round away the sum under large scores


def rat_attention_triton(
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
) -> tuple[Float[Array, "B T H K"], RatState]:
  """Output and final state; the arguments are those of `rat_attention_xla`.

  Compiles for NVIDIA GPUs only. float32 inputs are multiplied as three tf32 products.
  """
  _refuse(value)
  tokens = (query, key, value, gate_logits, gate_bias, output_logits)
  if initial_state is not None:
    options = (initial_state, segments, lengths, chunk_size, rotary_base)
    return rat_attention_xla(*tokens, *options, attend=attend_triton)
  if segments is None:
    results = _fused(*tokens, lengths, None, chunk_size, rotary_base)
    return with_state(results, lengths, value.shape[1], chunk_size)
  documents = documents_of(segments, lengths, chunk_size)
  results = _fused(*tokens, lengths, documents, chunk_size, rotary_base)
  output, keys, values, running_key, running_value = results
  state = layout.final_state(
    documents.found, documents.fits, keys, values, running_key, running_value, chunk_size
  )
  return zero_padding(output, lengths), state


def documents_of(
  segments: Int[Array, "B T"], lengths: Int[Array, " B"] | None, chunk_size: int
) -> Documents:
  """`segments` from `run_index`."""
  batch, length = segments.shape
  found = layout.lay_out(segments, lengths, chunk_size)
  slots = layout.capacity(length, chunk_size)
  window = layout.window(found, jnp.zeros((batch,), jnp.int32), slots)
  return Documents(segments, found, window, layout.fits(found, slots))


def _refuse(value):
  """Raises where the kernels cannot do it."""
  dim = value.shape[3]
  if value.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    raise NotImplementedError(
      f"{NAME}: value must be float32, bfloat16 or float16 for the Triton kernels; got "
      f'{value.dtype} (cast it, or use "xla")'
    )
  if dim > MAX_DIM:
    raise NotImplementedError(
      f"{NAME}: value must have at most {MAX_DIM} channels per head for the Triton kernels; got "
      f'{dim} (use "xla")'
    )
  gpu = target_gpu(NAME)
  if reason := too_old(gpu):
    raise NotImplementedError(f'{NAME}: {reason} (use "xla")')


def with_state(
  results: tuple, lengths: Int[Array, " B"] | None, length: int, chunk_size: int
) -> tuple[Float[Array, "B T H K"], RatState]:
  """(output, final state) from `_fused`'s results, without what is behind a row's last token."""
  output, keys, values, running_key, running_value = results
  if lengths is not None:
    some = (lengths > 0)[:, None, None]
    running_key, running_value = (jnp.where(some, x, 0) for x in (running_key, running_value))
  sums = (running_key, running_value)
  state = state_of_chunks(keys, values, *sums, lengths, length, chunk_size)
  return zero_padding(output, lengths), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _fused(
  query, key, value, gate_logits, gate_bias, output_logits, lengths, documents, chunk_size,
  rotary_base,
):  # fmt: skip
  """(output, keys, values, running_key, running_value); padding is left to the caller.

  Keys and values are those of all slots; if documents do not fit, of the final state.
  """
  inputs = (query, key, value, gate_logits, gate_bias, output_logits, lengths, documents)
  return _run_forward(inputs, chunk_size, rotary_base, statistics=False)[0]


def _forward(*args):
  *inputs, chunk_size, rotary_base = args
  return _run_forward(inputs, chunk_size, rotary_base, statistics=True)


RESULTS = ("output", "keys", "values", "running_key", "running_value")
STATISTICS = ("own_score", "top", "total")


def _run_forward(inputs, chunk_size, rotary_base, statistics):
  given = dict(zip(Residuals._fields, inputs, strict=False))
  problem = problem_of(given, chunk_size, rotary_base)
  gpu = target_gpu(NAME)

  def kernels():
    launches = forward_launches(problem, choose_config(problem, gpu), statistics)
    arrays = run_launches(launches, given | prepared(given, chunk_size, rotary_base), gpu)
    return tuple(arrays[name] for name in (*RESULTS, *STATISTICS))

  def general():
    results = _general(inputs, problem.slots, chunk_size, rotary_base)
    sizes = (problem.batch, problem.length, problem.heads)
    none = jnp.zeros(sizes if statistics else (1,), jnp.float32)
    return (*results, jnp.zeros(sizes, jnp.float32), none, none)

  results = layout.either(_fits(given), kernels, general)
  arrays = given | dict(zip((*RESULTS, *STATISTICS), results, strict=True))
  return results[:5], Residuals(*(arrays[name] for name in Residuals._fields))


def _general(inputs, slots, chunk_size, rotary_base):
  """The results of `_fused` by the portable path, row by row."""
  *tokens, lengths, documents = inputs
  output, state = layout.by_rows(
    tuple(tokens), documents.segments, lengths, chunk_size, rotary_base, slots, attend_triton
  )
  return output, *state[:4]


def _fits(arrays):
  return arrays["documents"] and arrays["documents"].fits


def _backward(chunk_size, rotary_base, residuals, cotangents):
  arrays = residuals._asdict()
  problem = problem_of(arrays, chunk_size, rotary_base)
  gpu = target_gpu(NAME)
  names = Residuals._fields[: 6 if problem.gated else 5]

  def kernels():
    given = arrays | prepared(arrays, chunk_size, rotary_base)
    names_of = ("d_output", "d_state_key", "d_state_value", "d_running_key", "d_running_value")
    given |= dict(zip(names_of, cotangents, strict=True))
    results = run_launches(backward_launches(problem, choose_config(problem, gpu)), given, gpu)
    results = finished(results, chunk_size, rotary_base)
    return tuple(results[f"d_{name}"] for name in names)

  def general():
    def run(*tokens):
      inputs = (*tokens, *residuals[len(tokens) : 8])
      return _general(inputs, problem.slots, chunk_size, rotary_base)

    return jax.vjp(run, *residuals[: len(names)])[1](cotangents)

  gradients = layout.either(_fits(arrays), kernels, general)
  return (*gradients, *(None,) * (8 - len(names)))


_fused.defvjp(_forward, _backward)


def problem_of(arrays: dict[str, Any], chunk_size: int, rotary_base: float | None) -> Problem:
  """The problem of arrays under the names of `Residuals`; absent ones are None or not there."""
  value, groups = arrays["value"], arrays["query"].shape[2]
  batch, length, heads, dim = value.shape
  documents = arrays.get("documents")
  slots = max(length // chunk_size, 1) if documents is None else documents.window.number.shape[1]
  has = [arrays.get(name) is not None for name in ("output_logits", "lengths", "documents")]
  sizes = (batch, length, heads, groups, dim, slots, chunk_size)
  return Problem(*sizes, value.dtype.name, rotary_base is not None, *has)


def prepared(arrays: dict[str, Any], chunk_size: int, rotary_base: float | None) -> dict[str, Any]:
  """The query turned and scaled, and the tables of each chunk: cos and sin [C, K / 2].

  With documents also what the kernels read of them.
  """
  query = arrays["query"]
  length, dim = query.shape[1], query.shape[3]
  tables = rotary_tables(jnp.arange(-(-length // chunk_size)), dim, rotary_base)
  turn = _by_token(arrays, chunk_size, rotary_base)
  rotated = (dim**-0.5 * rotate(jnp.asarray(query, jnp.float32), turn)).astype(query.dtype)
  made = dict(rotated=rotated) | dict(zip(("cos", "sin"), tables or (), strict=False))
  documents = arrays.get("documents")
  if documents is None:
    return made
  window, places = documents.window, documents.found.places
  made |= dict(begins=window.begin, numbers=window.number)
  return made | dict(first=places.first, last=places.own)


def finished(arrays: dict[str, Any], chunk_size: int, rotary_base: float | None) -> dict[str, Any]:
  """Gradients from the results of `backward_launches`: sums over programs, the query's turn."""
  query, by_head = arrays["query"], arrays["d_rotated"]
  batch, length, groups, dim = query.shape
  by_group = by_head.reshape(batch, length, -1, groups, dim)
  total = dim**-0.5 * jnp.sum(by_group, 2, dtype=jnp.float32)
  turn = _by_token(arrays, chunk_size, rotary_base)
  back = None if turn is None else (turn[0], -turn[1])
  total = rotate(total, back) + jnp.sum(arrays["d_query_own"], 0)
  bias = arrays["gate_bias"].dtype
  return arrays | dict(
    d_query=total.astype(query.dtype),
    d_key=jnp.sum(arrays["d_key"], 0, dtype=jnp.float32).astype(query.dtype),
    d_gate_bias=jnp.sum(arrays["d_gate_bias"], 0).astype(bias),
  )


def _by_token(arrays, chunk_size, rotary_base):
  """Rotary tables [T, 1, K / 2] of tokens, [B, T, 1, K / 2] with documents."""
  length, dim = arrays["query"].shape[1::2]
  if arrays.get("documents") is not None:
    return rotary_tables(arrays["documents"].found.places.chunk[..., None], dim, rotary_base)
  tables = rotary_tables(jnp.arange(-(-length // chunk_size)), dim, rotary_base)
  if tables is None:
    return None
  cos, sin = (jnp.repeat(x, chunk_size, 0)[:length, None] for x in tables)
  return cos, sin


# --- Softmax alone, for rows whose chunks do not start together -----------------------------------


@jax.custom_vjp
def attend_triton(
  query: Float[Array, "B T H K"],
  keys: Float[Array, "B S H K"],
  values: Float[Array, "B S H K"],
  own_score: Float[Array, "B T H"],
  own_value: Float[Array, "B T H K"],
  first: Int[Array, "B T"],
  last: Int[Array, "B T"],
) -> Float[Array, "B T H K"]:
  """softmax over [q . keys_s for first <= s < last, own_score] times [values_s, own_value].

  `attend` of the portable path, which has the same arguments and result. Both `first` and `last`
  ascend along a row.
  """
  return _attend((query, keys, values, own_score, own_value, first, last), statistics=False)[0]


ATTEND_INPUTS = ("rotated", "keys", "values", "own_score", "own_value", "first", "last")


def _attend(inputs, statistics):
  arrays = dict(zip(ATTEND_INPUTS, inputs, strict=True))
  arrays |= {name: arrays[name].astype(jnp.int32) for name in ("first", "last")}
  problem, gpu = attend_problem(arrays), target_gpu(NAME)
  launch = attend_launch(problem, choose_config(problem, gpu), statistics)
  arrays = run_launches((launch,), arrays, gpu)
  return arrays["output"], arrays


def _attend_forward(*inputs):
  return _attend(inputs, statistics=True)


def _attend_backward(arrays, d_output):
  problem, gpu = attend_problem(arrays), target_gpu(NAME)
  launches = attend_gradient_launches(problem, choose_config(problem, gpu))
  return attend_gradients(run_launches(launches, arrays | dict(d_output=d_output), gpu))


attend_triton.defvjp(_attend_forward, _attend_backward)


def attend_problem(arrays: dict[str, Any]) -> Problem:
  """The problem of arrays under the names of ATTEND_INPUTS."""
  query, slots = arrays["rotated"], arrays["keys"].shape[1]
  batch, length, heads, dim = query.shape
  return Problem(
    batch, length, heads, heads, dim, slots, 0, query.dtype.name, False, False, False
  )  # fmt: skip


def attend_gradients(arrays: dict[str, Any]) -> tuple[Any, ...]:
  """Cotangents of `attend_triton`'s arguments from the results of `attend_gradient_launches`."""
  own, d_output, own_value = arrays["own"], arrays["d_output"], arrays["own_value"]
  inner = jnp.sum(d_output * own_value, -1)
  d_own_score = own * ((1 - own) * inner - arrays["rest"])
  d_keys, d_values = (
    jnp.sum(arrays[f"d_{name}"], 0).astype(arrays[name].dtype) for name in ("keys", "values")
  )
  d_own_value = own[..., None] * d_output
  return arrays["d_rotated"], d_keys, d_values, d_own_score, d_own_value, None, None
