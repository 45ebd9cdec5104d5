"""The public function: checks, choice of implementation."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .. import checks, compat
from ..segments import run_index
from .reference import lightning_attention_reference
from .xla import DEFAULT_CHUNK, lightning_attention_xla

NAME = "lightning_attention"


def lightning_attention(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T H K"],
  value: Float[Array, "B T H V"],
  log_decay: Float[Array, " H"] | None = None,
  *,
  segment_ids: Int[Array, "B T"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  initial_state: Float[Array, "B H K V"] | None = None,
  chunk_size: int | None = None,
  implementation: str | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """Causal linear attention with a constant decay per head.

      S_t = exp(log_decay) S_{t-1} + k_t v_t^T        o_t = q_t S_t

  that is o_t = sum over j <= t of exp(log_decay (t - j)) (q_t . k_j) v_j: the token's own term is
  not decayed, queries are not scaled, nothing is normalised. Papers: TransNormerLLM (2023) and
  Lightning Attention-2 (2024), equations 3 to 9; the decay rates are those of the released code.

  Args:
    query, key: float [B, T, H, K]. value: float [B, T, H, V], same dtype; V need not equal K.
    log_decay: float [H], natural logarithm of the per-token decay, <= 0; None means no decay.
    segment_ids: int [B, T]. A change of id starts a new document: the state is reset there and no
      token sees another document. `initial_state` continues the document of the first token.
    lengths: int [B]. Tokens at or past a row's length are padding: their output is 0 and the final
      state is the one after the last real token.
    initial_state: float32 [B, H, K, V], zeros if None.
    chunk_size: rows handled by one step of the kernel; None picks the measured best.
    implementation: "xla", "tpu" (Pallas), "triton" (jax-triton), "reference", or None: the kernel
      of the platform that is compiled for where there is one, else "xla".
    interpret: run the Pallas TPU kernels in their CPU interpreter (tests): True, or a
      `pltpu.InterpretParams`.

  Returns:
    (output [B, T, H, V] in the dtype of `value`, final state [B, H, K, V] in float32).

  Any T >= 1 and any K, V. Products take operands in the input dtype and accumulate in float32; the
  state and the decay factors are float32 throughout (float64 for "reference" with float64 inputs).
  Gradients exist for query, key, value, log_decay and initial_state.

  Cost of a forward pass with chunks of C: B T H (2 C (K + V) + 4 K V) FLOPs and, in bfloat16,
  4 B T H (K + V) bytes plus 8 K V B H for the states.

  Raises:
    ValueError: wrong rank, shape or dtype, an empty axis, a positive `log_decay`.
    NotImplementedError: an explicit `implementation` that cannot run here.
  """
  check_arguments(
    NAME, query, key, value, log_decay, segment_ids, lengths, initial_state, chunk_size,
    implementation,
  )  # fmt: skip
  heads, state_shape = query.shape[2], _state_shape(query, value)
  implementation = implementation or _choose(query, value, chunk_size)
  state_dtype = jnp.promote_types(query.dtype, jnp.float32)
  if log_decay is None:
    log_decay = jnp.zeros((heads,), state_dtype)
  if initial_state is None:
    initial_state = jnp.zeros(state_shape, state_dtype)
  log_decay = jnp.asarray(log_decay, state_dtype)
  initial_state = jnp.asarray(initial_state, state_dtype)
  segments = None if segment_ids is None else run_index(segment_ids)
  args = (query, key, value, log_decay, initial_state, segments, lengths)

  if implementation == "xla":
    return lightning_attention_xla(*args, chunk_size or DEFAULT_CHUNK)
  if implementation == "reference":
    return _reference(*args)
  if implementation == "tpu":
    return _tpu(args, chunk_size, interpret)
  return _triton(args, chunk_size)


def check_arguments(
  function, query, key, value, log_decay, segment_ids, lengths, initial_state, chunk_size,
  implementation,
):  # fmt: skip
  """Raises ValueError, in the name of `function`, for arguments the operator does not take."""
  hint = "[B, H, K, V]"
  checks.check_linear_attention(
    function, query, key, value, log_decay, segment_ids, lengths, initial_state, _state_shape, hint,
    chunk_size, implementation,
  )  # fmt: skip


def _state_shape(query, value):
  return (query.shape[0], *query.shape[2:], value.shape[3])


def _choose(query, value, chunk_size) -> str:
  """The kernel of the platform where it takes these arguments, else the portable path."""
  platform = compat.target_platform()
  if platform == "tpu" and query.dtype in (jnp.float32, jnp.bfloat16):
    return "tpu"
  if platform == "cuda" and compat.has_jax_triton():
    from .triton import CHUNKS, MAX_DIM

    fits = max(query.shape[3], value.shape[3]) <= MAX_DIM
    return "triton" if fits and chunk_size in (None, *CHUNKS) else "xla"
  return "xla"


def _reference(query, key, value, log_decay, initial_state, segments, lengths):
  batch, length = query.shape[:2]
  if segments is None:
    segments = jnp.zeros((batch, length), jnp.int32)
  if lengths is None:
    lengths = jnp.full((batch,), length, jnp.int32)
  output, state = lightning_attention_reference(
    query, key, value, log_decay, initial_state, segments, lengths
  )
  return output.astype(value.dtype), state


def _tpu(args, chunk_size, interpret):
  compat.require_tpu(NAME, interpret)
  from .tpu_vjp import lightning_attention_tpu  # Pallas' TPU half is loaded only where it is used.

  return lightning_attention_tpu(*args, chunk_size, interpret)


def _triton(args, chunk_size):
  compat.require_triton(NAME)
  from .triton_vjp import lightning_attention_triton

  return lightning_attention_triton(*args, chunk_size)
