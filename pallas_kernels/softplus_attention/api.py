"""The public function: checks, choice of implementation."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .. import checks, compat
from ..segments import count_seen, count_total, run_index, zero_padding
from ..sliding_window_attention.history import extend
from ..softmax_attention.cache import (
  CacheState,
  cache_after,
  spoil_overflow,
  stored,
)
from .reference import attend_reference
from .variants import LSSAR, Variant
from .xla import DEFAULT_CHUNK, softplus_attention_xla

NAME = "softplus_attention"


def softplus_attention(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T G K"],
  value: Float[Array, "B T G V"],
  *,
  variant: Variant = LSSAR,
  segment_ids: Int[Array, "B T"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  initial_state: CacheState | None = None,
  chunk_size: int | None = None,
  implementation: str | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "B T H V"], CacheState]:
  """Causal attention with softplus for exp, and re-weighting by the excess over a row's mean.

      s_ij = c_i (q_i / |q_i|) . (k_j / |k_j|)      c_i = ln K ln N_i      j <= i, same document
      a_ij = f(s_ij)       f = softplus             A_ij = a_ij / sum_j a_ij
      LSSA:   o_i = sum_j A_ij v_j
      LSSAR:  R_ij = max(0, A_ij N_i - O_i)^p       o_i = sum_j R_ij v_j / sum_j R_ij

  N_i is the number of keys that query i sees; O_i is 1, and 0 in rows with N_i <= 3. `variant` has
  every choice of that as a field: other f, scales, no norm, epsilons, the baselines.
  Paper: Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models
  (2025), equations 4 and 5.

  Args:
    query: float [B, T, H, K]. key, value: [B, T, G, K], [B, T, G, V] of the same dtype, H a
      multiple of G; query head h uses key head h // (H / G).
    variant: see `Variant`; `VARIANTS` has those of the paper by name. The default is LSSAR, p = 15.
    segment_ids: int [B, T]. A change of id starts a new document; no token sees another document.
    lengths: int [B]. Tokens at or past a row's length are padding: their output is 0 and the final
      state is the one after the last real token.
    initial_state: `CacheState` of the tokens before, in the dtypes of key and value. Its keys are
      unit vectors where the variant has them. Its number of slots bounds the document's length.
    chunk_size: queries whose scores exist at once ("xla").
    implementation: "tpu", "triton", "xla", "reference", or None: the kernel of the platform that is
      compiled for, where it takes these arguments, else "xla".
    interpret: runs the TPU kernels on a CPU (True or a `pltpu.InterpretParams`); for tests.

  Returns:
    (output [B, T, H, V] in the dtype of `value`, final `CacheState`). Without an initial state the
    cache has T slots.

  Norms, scores, sums, thresholds and powers are float32 (or wider); unit vectors and weights are
  rounded to the input dtype for their products. Memory is linear in T, forward and backward. Rows
  in which no key stands out from the mean (flat rows) have weights and output 0 under
  epsilon="none". Gradients exist for query, key, value and the state's arrays.
  Cost of a forward pass: B T H T (K + V) FLOPs for what is causal.

  Raises:
    ValueError: wrong rank, shape or dtype, an empty axis, H not a multiple of G.
    NotImplementedError: an explicit `implementation` that cannot run here.
  """
  check_arguments(NAME, query, key, value, segment_ids, lengths, initial_state, chunk_size,
                  implementation)  # fmt: skip
  segments = None if segment_ids is None else run_index(segment_ids)
  before = None if initial_state is None else initial_state.count
  query, key, value = (jnp.asarray(x) for x in (query, key, value))
  if variant.unit:
    query, key = unit(query, variant.unit_eps), unit(key, variant.unit_eps)
  history = None if initial_state is None else stored(initial_state)
  tokens = extend(key, value, segments, history)
  length, wide = query.shape[1], jnp.promote_types(query.dtype, jnp.float32)
  if variant.count == "seen":
    count = count_seen(segments, before, length)
  else:
    count = count_total(segments, lengths, before, length)
  count = count.astype(wide)
  implementation = implementation or _choose(query, tokens, variant)
  if implementation == "xla":
    size = chunk_size or DEFAULT_CHUNK
    output = softplus_attention_xla(query, tokens, count, variant, size)
  elif implementation == "reference":
    output = _reference(query, tokens, count, variant)
  elif implementation == "triton":
    compat.require_triton(NAME)
    from .triton_vjp import softplus_attention_triton

    output = softplus_attention_triton(query, tokens, count, variant)
  else:
    compat.require_tpu(NAME, interpret)
    from .tpu_vjp import softplus_attention_tpu  # Pallas' TPU half is loaded only where it is used.

    output = softplus_attention_tpu(query, tokens, count, variant, interpret)
  state = cache_after(tokens, segments, lengths, before)
  output = zero_padding(output, lengths)
  if initial_state is not None:
    output = spoil_overflow(output, initial_state.count, initial_state.key.shape[1])
  return output, state


def _choose(query, tokens, variant) -> str:
  """The kernel of the platform where it takes these arguments, else the portable path."""
  platform = compat.target_platform()
  if platform == "cuda" and compat.has_jax_triton():
    from .triton import fits

    return "xla" if fits(NAME, query, tokens.value, variant) else "triton"
  if platform == "tpu":
    from .tpu_vjp import fits

    return "xla" if fits(query, tokens, variant) else "tpu"
  return "xla"


def check_arguments(
  function, query, key, value, segment_ids, lengths, state, chunk_size, implementation
):
  """Raises ValueError, in the name of `function`, for arguments the operator does not take."""
  checks.check_implementation(function, implementation)
  checks.check_grouped_sequence(function, query, key, value)
  batch, length = query.shape[:2]
  checks.check_segments(function, segment_ids, batch, length)
  checks.check_shape(function, "lengths", lengths, (batch,), "one length per row")
  checks.check_integer(function, "lengths", lengths)
  if chunk_size is not None and chunk_size < 1:
    checks.fail(function, "chunk_size", "be at least 1", chunk_size, "None picks the measured best")
  if state is None:
    return
  slots = state.key.shape[1]
  checks.check_store(function, state, key, value, slots, "[B, max_length, G, head_dim]")
  if length > slots and segment_ids is None and lengths is None:
    checks.fail(function, "initial_state", f"have a slot for each of the {length} tokens", slots,
                "make the cache longer")  # fmt: skip


def unit(x: Float[Array, "*B K"], eps: float) -> Float[Array, "*B K"]:
  """x / max(|x|, eps) in float32 (or wider), rounded to the dtype of x."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  if compat.target_platform() == "tpu" and x.ndim > 2:
    return unit_flat(wide, eps).astype(x.dtype)
  return (wide / _length(jnp.sum(wide * wide, -1, keepdims=True), eps)).astype(x.dtype)


def unit_flat(x: Float[Array, "*B H K"], eps: float) -> Float[Array, "*B H K"]:
  """`unit` with heads and channels side by side: sums over a head's channels are a product.

  A TPU's registers hold 8 x 128 of the last two axes, so that separate axes for them mean copies of
  all activations, in float32 and in both directions. On v5e the compiler counts 2.4 million cycles
  for them around kernels that take 1.6 (GPT-2 small), and 0.6 this way.
  """
  *rest, heads, dim = x.shape
  flat = x.reshape(*rest, heads * dim)
  own = jnp.repeat(jnp.eye(heads, dtype=x.dtype), dim, axis=0)  # [H K, H]
  inverse = 1 / _length(jnp.matmul(flat * flat, own, precision="highest"), eps)
  return (flat * jnp.matmul(inverse, own.T, precision="highest")).reshape(x.shape)


def _length(squared, eps):
  some = squared > eps * eps
  norm = jnp.where(some, jnp.sqrt(jnp.where(some, squared, 1)), eps)
  return jnp.where(norm > 0, norm, 1)


def _reference(query, tokens, count, variant):
  batch, length = query.shape[:2]
  wide = jnp.promote_types(query.dtype, jnp.float32)
  query, key, value = (x.astype(wide) for x in (query, tokens.key, tokens.value))
  total = key.shape[1]
  place = jnp.arange(total)
  seen = place <= (total - length + jnp.arange(length))[:, None]
  seen = jnp.broadcast_to(seen, (batch, *seen.shape))
  if tokens.documents is not None:
    seen &= tokens.documents[:, total - length :, None] == tokens.documents[:, None, :]
  count = jnp.broadcast_to(count, (batch, length))
  output = attend_reference(query, key, value, seen, count, variant)
  return output.astype(tokens.value.dtype)
