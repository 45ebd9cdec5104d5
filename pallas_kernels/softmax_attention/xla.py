"""Full causal softmax attention in plain XLA, in linear memory: see `strips.py`.

`jax.nn.dot_product_attention` computes the whole T x T weights at once.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..dots import einsum_f32
from ..sliding_window_attention.history import Tokens
from ..strips import attend_strips

DEFAULT_CHUNK = 64


def softmax_attention_xla(
  query: Float[Array, "B T H K"], tokens: Tokens, scale: float
) -> Float[Array, "B T H V"]:
  """Output; query i sits at key S - T + i and sees those up to it, of its document."""

  def attend(q, k, v, seen):
    scores = jnp.where(seen, scale * einsum_f32("bgrck,bgsk->bgrcs", q, k), -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    output = einsum_f32("bgrcs,bgsv->bgrcv", weights.astype(v.dtype), v)
    return (output / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype)

  return attend_strips(attend, query, tokens, DEFAULT_CHUNK)
