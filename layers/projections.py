"""Linear maps between the model width and the heads."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .partitioning import logical


class HeadsIn(nnx.Module):
  """Several projections [B, T, D] -> [B, T, H, K] of the same input, kept as one parameter.

  The parts are the leading axis of the kernel [parts, D, H, K]: each is a contiguous matrix, and
  splitting the heads over devices splits every part alike. `heads_axis` is the logical name of H;
  None keeps the heads whole on every device, for projections that all of them need.
  """

  def __init__(
    self,
    features: int,
    heads: int,
    head_dim: int,
    *,
    parts: int,
    use_bias: bool,
    init: nnx.Initializer,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
    heads_axis: str | None = "heads",
  ):
    self.dtype = dtype
    shape = (parts, features, heads, head_dim)
    kernel = init(rngs.params(), shape, param_dtype)
    self.kernel = nnx.Param(kernel, **logical(None, "embed", heads_axis, None))
    bias = jnp.zeros((parts, heads, head_dim), param_dtype)
    self.bias = nnx.Param(bias, **logical(None, heads_axis, None)) if use_bias else None

  def __call__(self, x: Float[Array, "*B D"]) -> list[Float[Array, "*B H K"]]:
    kernel = self.kernel[...].astype(self.dtype)
    x = x.astype(self.dtype)
    parts = [jnp.einsum("...d,dhk->...hk", x, kernel[i]) for i in range(kernel.shape[0])]
    if self.bias is None:
      return parts
    bias = self.bias[...].astype(self.dtype)
    return [part + bias[i] for i, part in enumerate(parts)]


class HeadsOut(nnx.Module):
  """The way back, [B, T, H, V] -> [B, T, D]; kernel [H, V, D]."""

  def __init__(
    self,
    heads: int,
    head_dim: int,
    features: int,
    *,
    use_bias: bool,
    init: nnx.Initializer,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.dtype = dtype
    kernel = init(rngs.params(), (heads, head_dim, features), param_dtype)
    self.kernel = nnx.Param(kernel, **logical("heads", None, "embed"))
    bias = jnp.zeros((features,), param_dtype)
    self.bias = nnx.Param(bias, **logical("embed")) if use_bias else None

  def __call__(self, x: Float[Array, "*B H V"]) -> Float[Array, "*B D"]:
    kernel = self.kernel[...].astype(self.dtype)
    y = jnp.einsum("...hv,hvd->...d", x.astype(self.dtype), kernel)
    return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def dense(
  features_in: int,
  features_out: int,
  axes: tuple[str | None, str | None],
  *,
  use_bias: bool,
  init: nnx.Initializer,
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  rngs: nnx.Rngs,
) -> nnx.Linear:
  """`nnx.Linear` with the logical names of its kernel's axes."""
  return nnx.Linear(
    features_in,
    features_out,
    use_bias=use_bias,
    kernel_init=init,
    dtype=dtype,
    param_dtype=param_dtype,
    rngs=rngs,
    kernel_metadata=logical(*axes),
    bias_metadata=logical(axes[1]),
  )
