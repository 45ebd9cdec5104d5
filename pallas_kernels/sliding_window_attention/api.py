"""The public function: checks, choice of implementation."""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .. import checks
from ..segments import run_index, zero_padding
from .history import extend
from .kernels import attend_cudnn, attend_tpu, check_tokens, choose
from .reference import attention_reference
from .window import WindowState, empty_window, oldest_first, slot_numbers, window_after
from .xla import DEFAULT_CHUNK, window_attention_xla

NAME = "sliding_window_attention"


def sliding_window_attention(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T G K"],
  value: Float[Array, "B T G V"],
  *,
  left: int,
  segment_ids: Int[Array, "B T"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  initial_state: WindowState | None = None,
  scale: float | None = None,
  chunk_size: int | None = None,
  implementation: str | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "B T H V"], WindowState]:
  """Causal softmax attention over the last `left` keys and the own one.

      o_i = sum over j of softmax_j(scale q_i . k_j) v_j      i - left <= j <= i, same document

  Paper: BASED (2024), section 4, where `left` is 32 to 64; the released code halves its
  `window_size` (`left_keys`). Query head h uses key head h // (H / G): grouped-query attention.

  Args:
    query: float [B, T, H, K]. key: [B, T, G, K]. value: [B, T, G, V]. One dtype; H a multiple of G.
    left: keys to the left of its own that a query sees, >= 0.
    segment_ids: int [B, T]. A change of id starts a new document; no token sees another one.
      `initial_state` continues the document of the first token.
    lengths: int [B]. Tokens at or past a row's length are padding: their output is 0 and the final
      state is the one after the last real token.
    initial_state: `WindowState` of the tokens before, in the dtypes of key and value; None: none.
    scale: factor of the scores, K ** -0.5 if None.
    chunk_size: queries handled by one step; None picks the measured best.
    implementation: "xla", "tpu" (splash attention), "cudnn" (through jax.nn; no documents, no
      initial state, 16-bit), "reference", or None: the kernel of the platform that is compiled for
      where it takes the arguments, else "xla".
    interpret: run the Pallas TPU kernel in its CPU interpreter (tests).

  Returns:
    (output [B, T, H, V] in the dtype of `value`, final `WindowState`).

  Any T >= 1 and any K, V. Scores, softmax and sums are float32 or better; products take operands in
  the input dtype. Gradients exist for query, key, value and the keys and values of the state.

  Cost of a forward pass with chunks of C: 2 B T H (C + left) (K + V) FLOPs, of which the window
  needs 2 B T H (left + 1) (K + V), and, in bfloat16, 2 B T (H + G) (K + V) bytes.

  Raises:
    ValueError: wrong rank, shape or dtype, an empty axis, H not a multiple of G, a negative `left`.
    NotImplementedError: an explicit `implementation` that cannot run here.
  """
  check_arguments(
    NAME, query, key, value, left, segment_ids, lengths, initial_state, chunk_size, implementation
  )
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  segments = None if segment_ids is None else run_index(segment_ids)
  if implementation is None:
    implementation = choose(query, key, value, segments, initial_state)
  if implementation == "reference":
    return _reference(query, key, value, left, segments, lengths, initial_state, scale)

  history = None if initial_state is None else oldest_first(initial_state)
  tokens = extend(key, value, segments, history)
  if implementation == "xla":
    chunk = chunk_size or DEFAULT_CHUNK
    output = window_attention_xla(
      query, tokens.key, tokens.value, tokens.documents, left, scale, chunk
    )
  elif implementation == "tpu":
    output = attend_tpu(NAME, query, tokens, left, scale, chunk_size, interpret)
  else:
    output = attend_cudnn(NAME, query, key, value, left, segments, initial_state, scale)
  count = None if initial_state is None else initial_state.count
  state = window_after(tokens, segments, lengths, count, left)
  return zero_padding(output, lengths), state


def check_arguments(
  function, query, key, value, left, segment_ids, lengths, initial_state, chunk_size,
  implementation,
):  # fmt: skip
  """Raises ValueError, in the name of `function`, for arguments the operator does not take."""
  check_tokens(function, query, key, value, segment_ids, lengths, implementation)
  if left < 0:
    checks.fail(function, "left", "be at least 0", left, "0 sees the own key only")
  if initial_state is not None:
    checks.check_store(function, initial_state, key, value, left, "[B, left, G, head_dim]")
  if chunk_size is not None and chunk_size < 1:
    checks.fail(function, "chunk_size", "be at least 1", chunk_size, "None picks the measured best")


def _reference(query, key, value, left, segments, lengths, initial_state, scale):
  batch, length = query.shape[:2]
  if segments is None:
    segments = jnp.zeros((batch, length), jnp.int32)
  if lengths is None:
    lengths = jnp.full((batch,), length, jnp.int32)
  if initial_state is None:
    heads, dim = key.shape[2:]
    initial_state = empty_window(batch, left, heads, dim, value.shape[3], key.dtype)
  output, (new_key, new_value, count) = attention_reference(
    query,
    key,
    value,
    initial_state.key,
    initial_state.value,
    initial_state.count,
    segments,
    lengths,
    left=left,
    slot_numbers=functools.partial(slot_numbers, left=left),
    scale=scale,
  )
  state = WindowState(new_key.astype(key.dtype), new_value.astype(value.dtype), count)
  return output.astype(value.dtype), state
