"""y_t = a_t y_{t-1} + x_t along the length, without a loop over it."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..segments import pad_length

BLOCK = 16  # steps taken one after the other; all blocks of a sequence take them together


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear_recurrence(
  decay: Float[Array, "B T *D"], x: Float[Array, "B T *D"], period: int | None = None
) -> Float[Array, "B T *D"]:
  """y_t = decay_t y_{t-1} + x_t with y_{-1} = 0, in the dtype of `x`.

  period: promises that decay is 0 at every multiple of it, which saves combining the blocks.
  Work is linear in T and the longest chain of dependent steps is BLOCK log T / log BLOCK.
  """
  return _recurrence(decay, x, period)


def _forward(decay, x, period):
  y = _recurrence(decay, x, period)
  return y, (decay, y)


def _backward(period, residuals, dy):
  decay, y = residuals
  # The transposed recurrence runs from the end, and its factor at t is decay_{t+1}.
  shifted = jnp.pad(decay[:, 1:], ((0, 0), (0, 1)) + ((0, 0),) * (decay.ndim - 2))
  if period is not None:  # from the end, whole periods come first only where they divide T
    period = period if decay.shape[1] % period == 0 else None
  dx = jnp.flip(_recurrence(jnp.flip(shifted, 1), jnp.flip(dy, 1), period), 1)
  before = jnp.pad(y[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (y.ndim - 2))
  return dx * before, dx


linear_recurrence.defvjp(_forward, _backward)


def _recurrence(decay, x, period):
  length = x.shape[1]
  block = BLOCK if period is None or period > 4 * BLOCK else period
  if length <= block:
    return _steps(decay, x)[1]
  decay, x = (_blocks(part, block) for part in (decay, x))  # [B, N, C, ...]
  products, local = _steps(decay, x, axis=2)
  if block != period:
    ends = _recurrence(products[:, :, -1], local[:, :, -1], None)  # [B, N, ...]
    before = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (ends.ndim - 2))
    local += products * before[:, :, None]
  return local.reshape(local.shape[0], -1, *local.shape[3:])[:, :length]


def _steps(decay, x, axis=1):
  """(running products of `decay`, y), one step after the other along `axis`."""
  product, y = jax.lax.index_in_dim(decay, 0, axis, False), jax.lax.index_in_dim(x, 0, axis, False)
  products, results = [product], [y]
  for t in range(1, x.shape[axis]):
    a = jax.lax.index_in_dim(decay, t, axis, False)
    product, y = a * product, a * y + jax.lax.index_in_dim(x, t, axis, False)
    products.append(product)
    results.append(y)
  return jnp.stack(products, axis), jnp.stack(results, axis)


def _blocks(x, block):
  """[B, T, ...] -> [B, N, C, ...]."""
  x = pad_length(x, block)
  return x.reshape(x.shape[0], -1, block, *x.shape[2:])
