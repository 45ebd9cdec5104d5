"""What turns tokens into activations where a plain table does not."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .dropout import dropout, split_key
from .partitioning import logical
from .projections import dense


class FactoredEmbedding(nnx.Module):
  """A table of another width than the model's, and a dense map with bias behind it.

  While training, `token_dropout` is the probability that a token is read as token 0,
  `table_dropout` and `dropout` are of the table's vectors and of the model's.
  """

  def __init__(
    self,
    vocab_size: int,
    table_features: int,
    features: int,
    *,
    token_dropout: float = 0.0,
    table_dropout: float = 0.0,
    dropout: float = 0.0,
    init: nnx.Initializer,
    table_init: nnx.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.token_dropout, self.table_dropout, self.dropout = token_dropout, table_dropout, dropout
    shape = (vocab_size, table_features)
    table = (table_init or init)(rngs.params(), shape, param_dtype)
    self.table = nnx.Param(table, **logical("vocab", "embed"))
    kwargs = dict(use_bias=True, init=init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.dense = dense(table_features, features, ("embed", None), **kwargs)

  def __call__(
    self,
    tokens: Int[Array, "*B"],
    positions: Int[Array, "..."],
    *,
    dropout_key: jax.Array | None = None,
  ) -> Float[Array, "*B D"]:
    del positions
    keys = split_key(dropout_key, 3)
    if keys[0] is not None and self.token_dropout:
      tokens = jnp.where(jax.random.bernoulli(keys[0], self.token_dropout, tokens.shape), 0, tokens)
    x = dropout(self.table[...][tokens], self.table_dropout, keys[1])
    return dropout(self.dense(x), self.dropout, keys[2])


class ImageEmbedding(nnx.Module):
  """Values of an image's pixels in raster order, the channels of a pixel one after the other.

      x_p = sqrt(D) table[c levels + value] + sqrt(C D) (rows[y, c] + columns[x, c])

  p = (y width + x) C + c is the position that is to be predicted; its value is that of the
  position before. Paper: Efficient Content-Based Sparse Attention with Routing Transformers (2021),
  as the released code has it.
  """

  def __init__(
    self,
    levels: int,
    features: int,
    *,
    height: int,
    width: int,
    channels: int,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.levels, self.features = levels, features
    self.height, self.width, self.channels = height, width, channels

    def normal(width, *shape):
      values = jax.random.normal(rngs.params(), shape, param_dtype) * width**-0.5
      return nnx.Param(values, **logical(*(None,) * (len(shape) - 1), "embed"))

    longest = max(height, width, 3)
    self.table = normal(features, channels * levels, features)
    self.rows = normal(channels * features, longest, channels, features)
    self.columns = normal(channels * features, longest, channels, features)

  def __call__(
    self,
    tokens: Int[Array, "*B"],
    positions: Int[Array, "..."],
    *,
    dropout_key: jax.Array | None = None,
  ) -> Float[Array, "*B D"]:
    """Positions outside the image give NaN."""
    del dropout_key
    pixel, channel = positions // self.channels, positions % self.channels
    y, x = pixel // self.width, pixel % self.width
    value = self.table[...][channel * self.levels + tokens] * self.features**0.5
    place = self.rows[...][y, channel] + self.columns[...][x, channel]
    out = value + place * (self.channels * self.features) ** 0.5
    inside = positions < self.height * self.width * self.channels
    return jnp.where(inside[..., None], out, jnp.nan)
