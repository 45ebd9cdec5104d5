"""Adafactor: Adam's second moment as a product of rows and columns, steps relative to the weight.

For a matrix W [r, c] with gradient G, at step n = 0, 1, ...

  b   = 1 - (n + 1)^-0.8
  R   = b R + (1 - b) mean_c(G^2 + 1e-30)         [r]
  C   = b C + (1 - b) mean_r(G^2 + 1e-30)         [c]
  U   = G / sqrt(R C^T / mean(R))
  U   = U / max(1, RMS(U))
  W  -= rate(n) max(RMS(W), 1e-3) U

A vector has its second moment as it is. Tensors of higher rank are factored over their last two
axes. There is no first moment. Paper: Adafactor (2018), section 7, in the form that the Routing
Transformer was trained with.

Why not `optax.adafactor`: it factors the two largest axes, and it would take the layers that we
stack for one tensor, with one RMS for all of them. What is one weight of a published model has to
be told by the name, see `separate_axes`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

_TINY_SQUARE = 1e-30
_SMALLEST_SCALE = 1e-3
_DECAY_EXPONENT = 0.8
_LARGEST_RMS = 1.0


class AdafactorState(NamedTuple):
  """Second moments by the parameter's name: (rows [*S r], columns [*S c]), or as it is [*S n]."""

  count: Array  # int32, steps done
  moments: dict[str, tuple[Array, ...]]


def adafactor(rate: optax.Schedule) -> optax.GradientTransformation:
  """The transformation above of a flat dictionary of parameters, by their path.

  Moments are float32 (float64 for float64 parameters), whatever the parameters' dtype.
  """

  def init(params):
    moments = {}
    for name, param in params.items():
      front, tensor = _view(name, param.shape)
      shapes = [tensor] if len(tensor) < 2 else [tensor[:-1], (*tensor[:-2], tensor[-1])]
      moments[name] = tuple(jnp.zeros(front + shape, _wide(param)) for shape in shapes)
    return AdafactorState(jnp.zeros((), jnp.int32), moments)

  def update(grads, state, params=None):
    if params is None:
      raise ValueError("adafactor: params must be given; got None (steps are relative to them)")
    updates, moments = {}, {}
    for name, grad in grads.items():
      param = params[name]
      step, moments[name] = _step(name, grad, param, state.moments[name], state.count)
      updates[name] = (-rate(state.count) * step).reshape(param.shape).astype(grad.dtype)
    return updates, AdafactorState(optax.safe_increment(state.count), moments)

  return optax.GradientTransformation(init, update)


def separate_axes(name: str) -> int:
  """How many leading axes of a parameter count tensors that are optimised each for itself.

  Those of layers are stacked along one axis; the projections of `HeadsIn`, and tables for keys and
  values, along a second one.
  """
  stacked = int(name.startswith("groups."))
  return stacked + ("heads_in." in name or name.endswith("_tables"))


def _view(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """(axes of separate tensors, shape of one) as published models have them.

  Heads and their channels are one axis of a matrix, as are the values of a pixel and their
  channels; an image's table of rows [Y, 1, C D] is factored where there is nothing to factor.
  """
  count = separate_axes(name)
  front, tensor = shape[:count], shape[count:]
  if name.endswith(("bias", "embedder.rows")):
    return front, (math.prod(tensor),)
  if name.endswith(("heads_in.kernel", "embedder.columns")):  # [D, H, K], [X, C, D]
    return front, (tensor[0], math.prod(tensor[1:]))
  if name.endswith("heads_out.kernel"):  # [H, V, D]
    return front, (math.prod(tensor[:-1]), tensor[-1])
  return front, tensor


def _step(name, grad, param, moments, count):
  """(step [*S ...] before the rate, new moments) of one parameter."""
  front, tensor = _view(name, param.shape)
  dtype = _wide(param)
  grad = grad.astype(dtype).reshape(front + tensor)
  axes = tuple(range(len(front), grad.ndim))
  square = jnp.square(grad) + _TINY_SQUARE
  keep = 1 - (count + 1).astype(dtype) ** -_DECAY_EXPONENT
  means = [square] if len(tensor) < 2 else [jnp.mean(square, -1), jnp.mean(square, -2)]
  moments = tuple(keep * old + (1 - keep) * new for old, new in zip(moments, means, strict=True))
  if len(tensor) < 2:
    step = grad * jax.lax.rsqrt(moments[0])
  else:
    rows, columns = moments
    rows = rows / jnp.mean(rows, -1, keepdims=True)
    step = grad * jax.lax.rsqrt(rows)[..., None] * jax.lax.rsqrt(columns)[..., None, :]
  step = step / jnp.maximum(1, _rms(step, axes) / _LARGEST_RMS)
  param = param.astype(dtype).reshape(front + tensor)
  return step * jnp.maximum(_rms(param, axes), _SMALLEST_SCALE), moments


def _rms(x: Array, axes: tuple[int, ...]) -> Array:
  """Over `axes`, which stay with length 1."""
  return jnp.sqrt(jnp.mean(jnp.square(x), axes, keepdims=True))


def _wide(x: Array) -> jnp.dtype:
  return jnp.promote_types(x.dtype, jnp.float32)
