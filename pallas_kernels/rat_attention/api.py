"""The public function: checks, choice of implementation."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .. import checks, compat
from ..segments import run_index
from .reference import rat_attention_reference
from .state import RatState, empty_state
from .xla import rat_attention_xla

NAME = "rat_attention"


def rat_attention(
  query: Float[Array, "B T G K"],
  key: Float[Array, "B T G K"],
  value: Float[Array, "B T H K"],
  gate_logits: Float[Array, "B T H K"],
  gate_bias: Float[Array, "H K"],
  output_logits: Float[Array, "B T H K"] | None = None,
  *,
  chunk_size: int,
  rotary_base: float | None = 10000.0,
  segment_ids: Int[Array, "B T"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  initial_state: RatState | None = None,
  implementation: str | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "B T H K"], RatState]:
  """A gated recurrence inside chunks of L tokens, softmax attention across chunks.

      g = sigmoid(gate_logits + gate_bias)
      k~_t = g_t k~_{t-1} + (1 - g_t) k_t      v~_t = g_t v~_{t-1} + (1 - g_t) v_t
      o_t = softmax over [q_t . K_c for finished chunks c, q_t . k~_t] / sqrt(K) times [V_c, v~_t]

  k~ and v~ start from 0 in every chunk; K_c, V_c are k~, v~ at the last token of chunk c. Query and
  summaries are rotated by the number of their chunk. The output is multiplied by
  sigmoid(output_logits). Head h has the query and key of group h mod G.
  Paper: RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling (2025), section 3.

  Args:
    query, key: float [B, T, G, K]. value, gate_logits, output_logits: float [B, T, H, K] of the
      same dtype, H a multiple of G; output_logits may be None.
    gate_bias: float [H, K], the part of the gate's logit that does not depend on the token.
    chunk_size: L >= 1; it need not divide T, and 1 and T are allowed.
    rotary_base: base of the rotary frequencies (K must be even), None for no rotation.
    segment_ids: int [B, T]. A change of id starts a new document, and with it a new chunk; no token
      sees another document. `initial_state` continues the document of the first token. The TPU
      kernels move tokens of documents by products with 0 and 1: none may be infinite or NaN.
    lengths: int [B]. Tokens at or past a row's length are padding: their output is 0 and the final
      state is the one after the last real token.
    initial_state: see `RatState`; None is the state before the first token. With a state, only the
      softmax runs in a kernel, and the recurrence in float32 in XLA.
    implementation: "tpu", "triton", "xla", "reference", or None: the kernel of the platform that is
      compiled for, where it takes these arguments, else "xla".
    interpret: runs the TPU kernels on a CPU (True or a `pltpu.InterpretParams`); for tests.

  Returns:
    (output [B, T, H, K] in the dtype of `value`, final state). The state has as many slots as
    `initial_state`, or T // L of them; a finished chunk for which there is no slot is lost.

  Gates, recurrence, softmax statistics and the running chunk's score are float32 (or wider);
  summaries and the weights they are multiplied with have the input dtype. Gradients exist for every
  float array. Cost of a forward pass: 2 B T^2 H K / L + about 10 B T H K FLOPs.

  Raises:
    ValueError: wrong rank, shape or dtype, an empty axis, a chunk_size below 1.
    NotImplementedError: an explicit `implementation` that cannot run here.
  """
  check_arguments(NAME, query, key, value, gate_logits, gate_bias, output_logits, chunk_size,
                  rotary_base, segment_ids, lengths, initial_state, implementation)  # fmt: skip
  implementation = implementation or _choose(query, value, initial_state, segment_ids, chunk_size)
  segments = None if segment_ids is None else run_index(segment_ids)
  tokens = (query, key, value, gate_logits, gate_bias, output_logits)
  options = (initial_state, segments, lengths, chunk_size, rotary_base)
  if implementation == "xla":
    return rat_attention_xla(*tokens, *options)
  if implementation == "reference":
    return _reference(tokens, *options)
  if implementation == "tpu":
    compat.require_tpu(NAME, interpret)
    from .tpu_vjp import rat_attention_tpu  # Pallas' TPU half is loaded only where it is used.

    return rat_attention_tpu(*tokens, *options, interpret)
  compat.require_triton(NAME)
  from .triton_vjp import rat_attention_triton

  return rat_attention_triton(*tokens, *options)


def _choose(query, value, initial_state, segment_ids, chunk_size) -> str:
  """The kernel of the platform where it takes these arguments, else the portable path."""
  platform = compat.target_platform()
  if platform == "tpu":
    from .tpu_vjp import fits

    return "tpu" if fits(query, value, initial_state, segment_ids, chunk_size) else "xla"
  if platform == "cuda" and compat.has_jax_triton() and value.dtype != jnp.float64:
    from .triton import takes

    return "triton" if takes(NAME, value.shape[3]) else "xla"
  return "xla"


def check_arguments(
  function, query, key, value, gate_logits, gate_bias, output_logits, chunk_size, rotary_base,
  segment_ids, lengths, state, implementation,
):  # fmt: skip
  """Raises ValueError, in the name of `function`, for arguments the operator does not take."""
  checks.check_implementation(function, implementation)
  checks.check_sequence(function, query=query, key=key)
  checks.check_grouped_sequence(function, value, query, query)
  checks.check_sequence(function, value=value, gate_logits=gate_logits)
  checks.check_shape(function, "key", key, query.shape, "as many groups as query")
  batch, length, heads, dim = value.shape
  hint = "one gate for every channel of value"
  checks.check_shape(function, "gate_logits", gate_logits, value.shape, hint)
  checks.check_shape(function, "output_logits", output_logits, value.shape, hint)
  checks.check_shape(function, "gate_bias", gate_bias, (heads, dim), "[H, K]")
  checks.check_segments(function, segment_ids, batch, length)
  checks.check_shape(function, "lengths", lengths, (batch,), "one length per row")
  checks.check_integer(function, "lengths", lengths)
  if chunk_size < 1:
    checks.fail(function, "chunk_size", "be at least 1", chunk_size, "released models have 16")
  if rotary_base is not None and dim % 2:
    checks.fail(function, "value", "have an even head_dim for rotary positions", dim,
                "rotary_base=None leaves them out")  # fmt: skip
  if state is None:
    return
  for name in ("key", "value"):
    array = getattr(state, name)
    slots = array.shape[1] if array.ndim == 4 else 1
    expected = (batch, slots, heads, dim)
    checks.check_shape(function, f"initial_state.{name}", array, expected, "[B, S, H, K]")
  for name in ("running_key", "running_value"):
    array, expected = getattr(state, name), (batch, heads, dim)
    checks.check_shape(function, f"initial_state.{name}", array, expected, "[B, H, K]")
  checks.check_shape(function, "initial_state.position", state.position, (batch,), "one per row")
  checks.check_integer(function, "initial_state.position", state.position)


def _reference(tokens, state, segments, lengths, chunk_size, rotary_base):
  value = tokens[2]
  batch, length, heads, dim = value.shape
  if state is None:
    state = empty_state(batch, max(length // chunk_size, 1), heads, dim, value.dtype)
  if segments is None:
    segments = jnp.zeros((batch, length), jnp.int32)
  if lengths is None:
    lengths = jnp.full((batch,), length, jnp.int32)
  wide = jnp.promote_types(value.dtype, jnp.float32)
  given = state._replace(running_key=jnp.asarray(state.running_key, wide),
                         running_value=jnp.asarray(state.running_value, wide))  # fmt: skip
  output, after = rat_attention_reference(
    *tokens,
    initial_state=given,
    segments=segments,
    lengths=lengths,
    chunk_size=chunk_size,
    rotary_base=rotary_base,
  )
  summaries = dict(key=after.key.astype(value.dtype), value=after.value.astype(value.dtype))
  return output.astype(value.dtype), after._replace(**summaries)
