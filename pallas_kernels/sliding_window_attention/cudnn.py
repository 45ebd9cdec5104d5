"""Attention on NVIDIA GPUs by cuDNN, through `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MAX_DIM = 128
ALIGNMENT = 8  # of head_dim


def reason_against(query, key, value, segments, initial_state) -> str | None:
  """Why cuDNN does not take these arguments; None if it does."""
  if segments is not None:
    return "knows no documents; segment_ids must be None"
  if initial_state is not None:
    return "takes no initial_state"
  if query.dtype not in (jnp.bfloat16, jnp.float16):
    return f"takes bfloat16 or float16; got {query.dtype}"
  if max(query.shape[3], value.shape[3]) > MAX_DIM:
    return f"takes a head_dim up to {MAX_DIM}; got {max(query.shape[3], value.shape[3])}"
  return None


def attention_cudnn(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T G K"],
  value: Float[Array, "B T G V"],
  left: int | None,
  scale: float,
) -> Float[Array, "B T H V"]:
  """Output; `left` None means every earlier key.

  Zeros give keys and values one head_dim, a multiple of 8: they add nothing to a score and make
  columns that are cut off. An odd length gets one more token, since jax refuses the gradient of it;
  no earlier token sees it. Nor does any real token see padding, so cuDNN need not know the lengths.
  """
  length, value_dim = value.shape[1], value.shape[3]
  padded = _padded(query, key, value)
  # (left, 0) keeps the `left` keys before the query's own, and its own.
  window = None if left is None else (left, 0)
  output = jax.nn.dot_product_attention(
    *padded, scale=scale, is_causal=True, local_window_size=window, implementation="cudnn"
  )
  return output[:, :length, :, :value_dim]


def attention_to_all_cudnn(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T H K"],
  value: Float[Array, "B T H V"],
  lengths: Int[Array, " B"] | None,
  scale: float,
) -> Float[Array, "B T H V"]:
  """Every token sees the first `lengths` ones. What rows with none of those give is arbitrary.

  `lengths` None is all of them, too, as numbers: an odd length gets one more token.
  """
  batch, length, _, value_dim = value.shape
  padded = _padded(query, key, value)
  seen = jnp.full((batch,), length) if lengths is None else jnp.maximum(lengths, 1)
  output = jax.nn.dot_product_attention(
    *padded,
    scale=scale,
    query_seq_lengths=jnp.full((batch,), length, jnp.int32),
    key_value_seq_lengths=seen.astype(jnp.int32),
    implementation="cudnn",
  )
  return output[:, :length, :, :value_dim]


def _padded(query, key, value):
  """Of even length, and of one head_dim that is a multiple of 8."""
  length = value.shape[1]
  dim = -(-max(query.shape[3], value.shape[3]) // ALIGNMENT) * ALIGNMENT
  return [
    jnp.pad(x, ((0, 0), (0, length % 2), (0, 0), (0, dim - x.shape[3])))
    for x in (query, key, value)
  ]
