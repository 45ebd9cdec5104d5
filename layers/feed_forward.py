"""Channel mixers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .activations import activation
from .dropout import dropout
from .partitioning import constrain, logical
from .projections import dense


class GatedLinearUnit(nnx.Module):
  """y = (f(x W_gate) * (x W_up)) W_down.

  With f = identity this is the SGLU of TransNormerLLM, with silu SwiGLU, with gelu GEGLU.
  `down_init` draws W_down, if it differs from `init`. `dropout` drops hidden units.
  """

  def __init__(
    self,
    features: int,
    hidden: int,
    *,
    activation: str = "identity",
    use_bias: bool = False,
    dropout: float = 0.0,
    init: nnx.Initializer,
    down_init: nnx.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.activation, self.dropout = activation, dropout
    kwargs = dict(use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.gate = dense(features, hidden, ("embed", "mlp"), init=init, **kwargs)
    self.up = dense(features, hidden, ("embed", "mlp"), init=init, **kwargs)
    self.down = dense(hidden, features, ("mlp", "embed"), init=down_init or init, **kwargs)

  def __call__(
    self, x: Float[Array, "*B D"], *, dropout_key: jax.Array | None = None
  ) -> Float[Array, "*B D"]:
    hidden = activation(self.activation)(self.gate(x)) * self.up(x)
    if hidden.ndim == 3:
      hidden = constrain(hidden, "batch", "length", "mlp")
    return self.down(dropout(hidden, self.dropout, dropout_key))


class FeedForward(nnx.Module):
  """y = f(x W_1) W_2. With f = "gelu" (the exact one, by erf) RAT's, with "gelu_tanh" GPT-2's.

  `down_init` draws W_2, if it differs from `init`. `dropout` drops hidden units.
  """

  def __init__(
    self,
    features: int,
    hidden: int,
    *,
    activation: str = "gelu",
    use_bias: bool = False,
    dropout: float = 0.0,
    init: nnx.Initializer,
    down_init: nnx.Initializer | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.activation, self.dropout = activation, dropout
    kwargs = dict(use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.fc1 = dense(features, hidden, ("embed", "mlp"), init=init, **kwargs)
    self.fc2 = dense(hidden, features, ("mlp", "embed"), init=down_init or init, **kwargs)

  def __call__(
    self, x: Float[Array, "*B D"], *, dropout_key: jax.Array | None = None
  ) -> Float[Array, "*B D"]:
    hidden = activation(self.activation)(self.fc1(x))
    if hidden.ndim == 3:
      hidden = constrain(hidden, "batch", "length", "mlp")
    return self.fc2(dropout(hidden, self.dropout, dropout_key))


class Identity(nnx.Module):
  """Stands for a channel mixer where there is none; the block adds its normalised input still."""

  def __call__(
    self, x: Float[Array, "*B D"], *, dropout_key: jax.Array | None = None
  ) -> Float[Array, "*B D"]:
    del dropout_key
    return x


class Gained(nnx.Module):
  """g f(x) with one learned number g, at first 0: a channel mixer under ReZero."""

  def __init__(self, inner: nnx.Module, *, param_dtype: DTypeLike = jnp.float32):
    self.inner = inner
    self.gain = nnx.Param(jnp.zeros((1,), param_dtype), **logical(None))

  def __call__(
    self, x: Float[Array, "*B D"], *, dropout_key: jax.Array | None = None
  ) -> Float[Array, "*B D"]:
    y = self.inner(x, dropout_key=dropout_key)
    return y * self.gain[...].astype(y.dtype)
