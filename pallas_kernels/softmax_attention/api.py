"""The public function: checks, choice of implementation."""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .. import checks
from ..segments import run_index, zero_padding
from ..sliding_window_attention.history import extend
from ..sliding_window_attention.kernels import (
  attend_cudnn,
  attend_tpu,
  check_tokens,
  choose,
)
from ..sliding_window_attention.reference import attention_reference
from .cache import (
  CacheState,
  cache_after,
  empty_cache,
  slot_numbers,
  spoil_overflow,
  stored,
)
from .xla import softmax_attention_xla

NAME = "softmax_attention"


def softmax_attention(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T G K"],
  value: Float[Array, "B T G V"],
  *,
  segment_ids: Int[Array, "B T"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  initial_state: CacheState | None = None,
  scale: float | None = None,
  implementation: str | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "B T H V"], CacheState]:
  """Full causal softmax attention.

      o_i = sum over j of softmax_j(scale q_i . k_j) v_j      j <= i, same document

  The baseline of the zoo: a thin layer over the libraries' kernels with the arguments, documents,
  padding and results of `sliding_window_attention`, whose arguments not named here are the same.

  Args:
    initial_state: `CacheState` of the tokens before, in the dtypes of key and value. Its number of
      slots is the length up to which the document may grow.
    implementation: "xla" (chunked, linear memory), "tpu" (splash attention), "cudnn" (through
      jax.nn; no documents, no initial state, 16-bit), "reference", or None: the kernel of the
      platform that is compiled for where it takes the arguments, else "xla".

  Returns:
    (output [B, T, H, V] in the dtype of `value`, final `CacheState`). Without an initial state the
    cache has T slots.

  Cost of a forward pass: B T H T (K + V) FLOPs for what is causal; "xla" computes twice that.

  Raises:
    ValueError: wrong rank, shape or dtype, an empty axis, H not a multiple of G.
    NotImplementedError: an explicit `implementation` that cannot run here.
  """
  check_arguments(NAME, query, key, value, segment_ids, lengths, initial_state, implementation)
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  segments = None if segment_ids is None else run_index(segment_ids)
  if implementation is None:
    implementation = choose(query, key, value, segments, initial_state)
  if implementation == "reference":
    output, state = _reference(query, key, value, segments, lengths, initial_state, scale)
  else:
    history = None if initial_state is None else stored(initial_state)
    tokens = extend(key, value, segments, history)
    if implementation == "xla":
      output = softmax_attention_xla(query, tokens, scale)
    elif implementation == "tpu":
      output = attend_tpu(NAME, query, tokens, None, scale, None, interpret)
    else:
      output = attend_cudnn(NAME, query, key, value, None, segments, initial_state, scale)
    count = None if initial_state is None else initial_state.count
    state = cache_after(tokens, segments, lengths, count)
    output = zero_padding(output, lengths)
  if initial_state is not None:
    output = spoil_overflow(output, initial_state.count, initial_state.key.shape[1])
  return output, state


def check_arguments(
  function, query, key, value, segment_ids, lengths, initial_state, implementation
):
  """Raises ValueError, in the name of `function`, for arguments the operator does not take."""
  check_tokens(function, query, key, value, segment_ids, lengths, implementation)
  if initial_state is not None:
    length, slots = query.shape[1], initial_state.key.shape[1]
    checks.check_store(function, initial_state, key, value, slots, "[B, max_length, G, head_dim]")
    if length > slots and segment_ids is None and lengths is None:
      checks.fail(function, "initial_state", f"have a slot for each of the {length} tokens", slots,
                  "make the cache longer")  # fmt: skip


def _reference(query, key, value, segments, lengths, initial_state, scale):
  batch, length = query.shape[:2]
  if segments is None:
    segments = jnp.zeros((batch, length), jnp.int32)
  if lengths is None:
    lengths = jnp.full((batch,), length, jnp.int32)
  if initial_state is None:
    heads, dim = key.shape[2:]
    initial_state = empty_cache(batch, length, heads, dim, value.shape[3], key.dtype)
  numbers = functools.partial(slot_numbers, slots=initial_state.key.shape[1])
  output, (new_key, new_value, count) = attention_reference(
    query,
    key,
    value,
    initial_state.key,
    initial_state.value,
    initial_state.count,
    segments,
    lengths,
    left=None,
    slot_numbers=numbers,
    scale=scale,
  )
  state = CacheState(new_key.astype(key.dtype), new_value.astype(value.dtype), count)
  return output.astype(value.dtype), state
