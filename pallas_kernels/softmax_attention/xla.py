"""Full causal attention in plain XLA: chunks of queries, each against all keys, in linear memory.

`jax.nn.dot_product_attention` computes the same T x T weights at once. Forward and backward on a
CPU, this takes half its time at 1024 tokens and less beyond, and no memory for the weights.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..chunks import cut_chunk, join_chunks
from ..dots import einsum_f32
from ..segments import pad_length
from ..sliding_window_attention.history import Tokens

DEFAULT_CHUNK = 64


def softmax_attention_xla(
  query: Float[Array, "B T H K"], tokens: Tokens, scale: float
) -> Float[Array, "B T H V"]:
  """Output; query i sits at key S - T + i and sees those up to it, of its document.

  Symbols below: C queries per chunk, G key heads with R query heads each.
  """
  batch, length, heads, _ = query.shape
  total, groups = tokens.key.shape[1:3]
  dtype = query.dtype
  chunk = min(DEFAULT_CHUNK, length)
  queries = pad_length(query, chunk)
  # Wide where they are closed over, so that their gradient is summed over chunks in float32.
  wide = jnp.promote_types(dtype, jnp.float32)
  keys, values = (x.swapaxes(1, 2).astype(wide) for x in (tokens.key, tokens.value))

  @jax.checkpoint
  def attend(index):
    q = cut_chunk(queries, index, chunk)
    q = q.reshape(batch, groups, -1, query.shape[3])  # [B, G, R C, K]
    k, v = keys.astype(dtype), values.astype(dtype)  # [B, G, S, .]
    scores = scale * einsum_f32("bgck,bgsk->bgcs", q, k)
    # A padded query repeats the last one's mask; what it gives is cut off.
    row = jnp.minimum(index * chunk + jnp.arange(chunk), length - 1)
    position = total - length + row  # [C]
    mask = (jnp.arange(total) <= position[:, None])[None]  # [1 or B, C, S]
    if tokens.documents is not None:
      mask &= tokens.documents[:, position][:, :, None] == tokens.documents[:, None, :]
    split = scores.reshape(batch, groups, -1, chunk, total)
    scores = jnp.where(mask[:, None, None], split, -jnp.inf).reshape(scores.shape)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    output = einsum_f32("bgcs,bgsv->bgcv", weights.astype(dtype), v)
    output /= jnp.sum(weights, axis=-1, keepdims=True)
    output = output.astype(dtype).reshape(batch, heads, chunk, -1)
    return output.swapaxes(1, 2)  # [B, C, H, V]

  indices = jnp.arange(queries.shape[1] // chunk)
  return join_chunks(jax.lax.map(attend, indices), length)
