"""From the scores of whole rows to their weights: what the portable path and the step share.

Equivalent to the definition with fewer operations and no overflow. With m the mean of a = f(s) over
the N keys, A N = a / m, so the second stage needs only the excess g = max(0, a - O m); dividing it
by its largest entry before the power keeps everything in [0, 1]. Row factors cancel in both stages.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .variants import Variant


def row_weights(
  scores: Float[Array, "*B S"],
  seen: Bool[Array, "*#B S"],
  count: Float[Array, "*#B 1"],
  variant: Variant,
) -> tuple[Float[Array, "*B S"], Float[Array, "*#B 1"]]:
  """(weights before the last division, what they are to be divided by)."""
  c = variant
  scored = jnp.where(seen, _scored(c, scores, seen), 0)
  total = jnp.ones_like(scored[..., :1])
  if c.normalization == "l1":
    sizes = jnp.abs(scored) if c.score in ("identity", "silu", "gelu", "tanh") else scored
    total = _guarded(jnp.sum(sizes, -1, keepdims=True), c, c.eps_first)
  elif c.normalization == "mean":
    total = jnp.broadcast_to(count, total.shape)
  if c.power is None:
    return scored, total
  mean = total / count
  offset = jnp.where(count <= c.skip_rows, 0.0, c.offset)
  excess = jnp.maximum(scored - jnp.where(seen, offset * mean, 0), 0)
  largest = jax.lax.stop_gradient(jnp.max(excess, -1, keepdims=True))
  least = c.flat_tolerance * mean if c.epsilon == "none" else 0.0
  live = largest > least
  divisor = jnp.where(live, largest, 1)
  raised = power(jnp.where(live, excess / divisor, 0), c.power)
  total = jnp.sum(raised, -1, keepdims=True)
  if c.epsilon != "none" and c.eps_second:
    # The epsilon belongs to sums of (A N - O)^p; in units of `largest` it is this much.
    log_eps = jnp.log(c.eps_second) + c.power * (jnp.log(mean) - jnp.log(divisor))
    eps = jnp.exp(jnp.minimum(log_eps, 80.0))
    total = total + eps if c.epsilon == "add" else jnp.maximum(total, eps)
  return raised, jnp.where(live, total, 1)


def power(x: Float[Array, "*B"], p: int | float) -> Float[Array, "*B"]:
  """x^p for x in [0, 1]; whole numbers by squaring."""
  if p != int(p):
    positive = x > 0
    return jnp.where(positive, jnp.exp(p * jnp.log(jnp.where(positive, x, 1))), 0)
  return jax.lax.integer_pow(x, int(p))


def _scored(c, x, seen):
  """f(s), divided by f of the row's largest score where that is needed and allowed."""
  if c.shifted:  # keys that are not seen may be above the largest that is, and must not overflow
    top = _top(x, seen)
    relative = jnp.exp(jnp.where(seen, x, -jnp.inf) - top)
    if c.score == "exp":
      return relative
    # Far below 0 softplus is exp, of which the row's factor can be taken off before it vanishes.
    return softplus(x) if c.bounded else jnp.where(top < -20, relative, softplus(x))
  if c.score == "softplus":
    return softplus(x)
  if c.score == "exp":
    return jnp.exp(x)
  if c.score == "gelu":
    return jax.nn.gelu(x, approximate=False)
  if c.score == "relu_power":
    return power(jax.nn.relu(x), c.score_power)
  return dict(
    relu=jax.nn.relu, sigmoid=jax.nn.sigmoid, elu1=_elu1, identity=_same, silu=jax.nn.silu,
    tanh=jnp.tanh, abs=jnp.abs,
  )[c.score](x)  # fmt: skip


def softplus(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
  """ln(1 + e^x) without overflow."""
  return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _top(x, seen):
  top = jnp.max(jnp.where(seen, x, -jnp.inf), -1, keepdims=True)
  return jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))


def _elu1(x):
  return jax.nn.elu(x) + 1


def _same(x):
  return x


def _guarded(total, c, eps):
  total = total + eps if c.epsilon == "add" else total
  total = jnp.maximum(total, eps) if c.epsilon == "clamp" else total
  return jnp.where(total > 0, total, 1)
