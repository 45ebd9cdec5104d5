"""Attention of every token to every real token, as the token mixer of an encoder."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..pallas_kernels import bidirectional_attention, sharded_bidirectional_attention
from .partitioning import constrain, operator_axes
from .projections import HeadsIn, HeadsOut


class EncoderMixer(nnx.Module):
  """y = softmax(q k^T / sqrt(K)) v W_out + b_out, with query, key, value = x W + b.

  The call of the mixer protocol without states and documents: an encoder reads whole rows.
  `dropout` is of attention weights.
  """

  def __init__(
    self,
    features: int,
    heads: int,
    *,
    dropout: float = 0.0,
    init: nnx.Initializer,
    out_init: nnx.Initializer,
    implementation: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.dropout, self.implementation = dropout, implementation
    kwargs = dict(use_bias=True, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    head_dim = features // heads
    self.heads_in = HeadsIn(features, heads, head_dim, parts=3, init=init, **kwargs)
    self.heads_out = HeadsOut(heads, head_dim, features, init=out_init, **kwargs)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    lengths: Int[Array, " B"] | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], None]:
    """(output, no state); padding, behind the first `lengths` tokens, is not seen."""
    query, key, value = self.heads_in(x)  # [B, T, H, K] each
    options: dict[str, Any] = dict(
      lengths=lengths,
      dropout_rate=self.dropout,
      dropout_key=dropout_key,
      implementation=self.implementation,
    )
    split = operator_axes()
    if split is None:
      output = bidirectional_attention(query, key, value, **options)
    else:
      del split["sequence_axis"]  # every query needs all keys: the length is gathered
      output = sharded_bidirectional_attention(query, key, value, **split, **options)
    return self.heads_out(constrain(output, "batch", "length", "heads", None)), None
