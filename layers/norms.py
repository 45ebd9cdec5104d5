"""Normalisations. All compute in float32 (or wider); all but `unit` return the dtype of their
input."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .partitioning import logical


def srms_norm(
  x: Float[Array, "..."], eps: float = 1e-6, axes: int | tuple[int, ...] = -1
) -> Float[Array, "..."]:
  """x / sqrt(mean(x^2) + eps) over `axes`, without parameters.

  Paper: Various Lengths, Constant Speed (2024), SimpleRMSNorm; the released code has the eps.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  mean_square = jnp.mean(jnp.square(wide), axis=axes, keepdims=True)
  return (wide * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)


def standardise(x: Float[Array, "..."], eps: float = 1e-6) -> Float[Array, "..."]:
  """(x - mean) / sqrt(variance + eps) over the last axis, without parameters."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def unit(x: Float[Array, "*B K"], eps: float = 1e-12) -> Float[Array, "*B K"]:
  """x / max(|x|, eps) over the last axis, in float32 (or wider), which is what it returns."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  # Below the root, so that the gradient at 0 is a number.
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), eps**2))


class SRMSNorm(nnx.Module):
  """`srms_norm` over the last axis as a module."""

  def __init__(self, eps: float = 1e-6):
    self.eps = eps

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return srms_norm(x, self.eps)


class RMSNorm(nnx.Module):
  """`srms_norm` times a learned scale per feature."""

  def __init__(self, features: int, *, eps: float = 1e-6, param_dtype=jnp.float32):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((features,), param_dtype), **logical("embed"))

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return srms_norm(x, self.eps) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
  """(x - mean) / sqrt(variance + eps), times a learned scale plus a learned bias."""

  def __init__(self, features: int, *, eps: float = 1e-5, param_dtype=jnp.float32):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((features,), param_dtype), **logical("embed"))
    self.bias = nnx.Param(jnp.zeros((features,), param_dtype), **logical("embed"))

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    normed = standardise(x.astype(jnp.promote_types(x.dtype, jnp.float32)), self.eps)
    return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


class ScaleNorm(nnx.Module):
  """g x / max(|x|, eps) with one learned number g."""

  def __init__(self, *, eps: float = 1e-5, param_dtype=jnp.float32):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((1,), param_dtype), **logical(None))

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return (unit(x, self.eps) * self.scale[...]).astype(x.dtype)


def make_norm(name: str, features: int, *, eps: float, param_dtype=jnp.float32) -> nnx.Module:
  """ "srms" (no parameters), "rms" or "layer"."""
  if name == "srms":
    return SRMSNorm(eps)
  if name == "rms":
    return RMSNorm(features, eps=eps, param_dtype=param_dtype)
  if name == "layer":
    return LayerNorm(features, eps=eps, param_dtype=param_dtype)
  raise ValueError(
    f"make_norm: name must be 'srms', 'rms' or 'layer'; got {name!r} ('srms' has no parameters)"
  )
