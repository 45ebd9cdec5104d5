"""The public function: checks, choice of implementation."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .. import checks, compat
from ..segments import run_index
from .features import feature_count
from .reference import taylor_attention_reference
from .xla import DEFAULT_CHUNK, taylor_attention_xla

NAME = "taylor_attention"


def taylor_attention(
  query: Float[Array, "B T H F"],
  key: Float[Array, "B T H F"],
  value: Float[Array, "B T H V"],
  log_decay: Float[Array, " H"] | None = None,
  *,
  segment_ids: Int[Array, "B T"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  initial_state: Float[Array, "B H P V1"] | None = None,
  normalize: bool = True,
  chunk_size: int | None = None,
  implementation: str | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H P V1"]]:
  """Causal linear attention whose weights are exp's second-order Taylor polynomial.

      s_tj = q_t . k_j / sqrt(F)                       a_tj = 1 + s_tj + s_tj^2 / 2
      o_t = sum over j <= t of a_tj v_j / sum over j <= t of a_tj

  a >= 1/2 always, so nothing has to be kept from overflowing or from vanishing. Everything before a
  chunk enters through a state of P = 1 + F + F (F + 1) / 2 rows, the packed features of
  `features.py`, which are made chunk by chunk and never written to memory.
  Paper: Simple linear attention language models balance the recall-throughput tradeoff (2024),
  section 3 and equation 4 (which leaves out the 1 / sqrt(F) of all released code).

  Args:
    query, key: float [B, T, H, F]; F is small, 16 in released models. value: float [B, T, H, V],
      same dtype.
    log_decay: float [H], natural logarithm of the per-token decay, <= 0; None means no decay. It
      multiplies a_tj by exp(log_decay (t - j)) in the numerator only, as in the authors' variant.
    segment_ids: int [B, T]. A change of id starts a new document: the state is reset there and no
      token sees another document. `initial_state` continues the document of the first token.
    lengths: int [B]. Tokens at or past a row's length are padding: their output is 0 and the final
      state is the one after the last real token.
    initial_state: float32 [B, H, P, V + 1], zeros if None. Row 0 sums [v, 1], row 1 + i sums
      k_i [v, 1], the others k_i k_j [v, 1] for i <= j, row-major.
    normalize: False leaves out the division.
    chunk_size: rows handled by one step of the kernel; None picks the measured best.
    implementation: "xla", "tpu" (Pallas), "triton" (jax-triton), "reference", or None: the kernel
      of the platform that is compiled for where there is one, else "xla".
    interpret: run the Pallas TPU kernels in their CPU interpreter (tests): True, or a
      `pltpu.InterpretParams`.

  Returns:
    (output [B, T, H, V] in the dtype of `value`, final state [B, H, P, V + 1] in float32).

  Any T >= 1 and any F, V. Products take operands in the input dtype and accumulate in float32;
  scores, their polynomial, its sum and the state are float32 throughout (float64 for "reference"
  and "xla" with float64 inputs). Gradients exist for query, key, value, log_decay, initial_state.

  Cost of a forward pass with chunks of C: B T H (2 C (F + V + 1) + 4 P (V + 1)) FLOPs and, in
  bfloat16, 4 B T H (F + V) bytes plus 8 P (V + 1) B H for the states.

  Raises:
    ValueError: wrong rank, shape or dtype, an empty axis, a positive `log_decay`.
    NotImplementedError: an explicit `implementation` that cannot run here.
  """
  check_arguments(
    NAME, query, key, value, log_decay, segment_ids, lengths, initial_state, chunk_size,
    implementation,
  )  # fmt: skip
  implementation = implementation or _choose(query, chunk_size)
  state_dtype = jnp.promote_types(query.dtype, jnp.float32)
  if initial_state is None:
    initial_state = jnp.zeros(state_shape(query, value), state_dtype)
  initial_state = jnp.asarray(initial_state, state_dtype)
  log_decay = None if log_decay is None else jnp.asarray(log_decay, state_dtype)
  segments = None if segment_ids is None else run_index(segment_ids)
  args = (query, key, value, log_decay, initial_state, segments, lengths, normalize)

  if implementation == "xla":
    return taylor_attention_xla(*args, chunk_size or DEFAULT_CHUNK)
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
  hint = "[B, H, P, V + 1], P = 1 + F + F (F + 1) / 2"
  checks.check_linear_attention(
    function, query, key, value, log_decay, segment_ids, lengths, initial_state, state_shape, hint,
    chunk_size, implementation,
  )  # fmt: skip


def state_shape(query, value) -> tuple[int, int, int, int]:
  """[B, H, P, V + 1] for query [B, T, H, F] and value [B, T, H, V]."""
  batch, _, heads, dim = query.shape
  return batch, heads, feature_count(dim), value.shape[3] + 1


def _choose(query, chunk_size) -> str:
  """The kernel of the platform where it takes these arguments, else the portable path."""
  platform = compat.target_platform()
  if platform == "tpu" and query.dtype in (jnp.float32, jnp.bfloat16):
    return "tpu"
  if platform == "cuda" and compat.has_jax_triton() and query.dtype != jnp.float64:
    from .triton import takes

    return "triton" if takes(NAME, query.shape[3], query.dtype.name, chunk_size) else "xla"
  return "xla"


def _reference(query, key, value, log_decay, initial_state, segments, lengths, normalize):
  batch, length = query.shape[:2]
  if segments is None:
    segments = jnp.zeros((batch, length), jnp.int32)
  if lengths is None:
    lengths = jnp.full((batch,), length, jnp.int32)
  output, state = taylor_attention_reference(
    query, key, value, log_decay, initial_state, segments, lengths, normalize
  )
  return output.astype(value.dtype), state


def _tpu(args, chunk_size, interpret):
  compat.require_tpu(NAME, interpret)
  from .tpu_vjp import taylor_attention_tpu  # Pallas' TPU half is loaded only where it is used.

  return taylor_attention_tpu(*args, chunk_size, interpret)


def _triton(args, chunk_size):
  compat.require_triton(NAME)
  from .triton_vjp import taylor_attention_triton

  return taylor_attention_triton(*args, chunk_size)
