"""From the scores of whole rows to their weights: what the portable path and the step share.

Equivalent to the definition with fewer operations and no overflow. With m the mean of a = f(s) over
the N keys, A N = a / m, so the second stage needs only the excess g = max(0, a - O m); dividing it
by its largest entry before the power keeps everything in [0, 1]. Row factors cancel in both stages.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .variants import Variant

# 2 artanh(z) / z as a polynomial in z^2 <= 1/9, highest power first; Chebyshev fit, error 4e-9.
_ARTANH = (0.281746573, 0.279614188, 0.400248537, 0.666663159, 2.000000008)


def row_weights(
  scores: Float[Array, "*B S"],
  seen: Bool[Array, "*#B S"],
  count: Float[Array, "*#B 1"],
  variant: Variant,
) -> tuple[Float[Array, "*B S"], Float[Array, "*#B 1"]]:
  """(weights before the last division, what they are to be divided by)."""
  c = variant
  top = None
  if needs_top(c):
    top = jnp.max(jnp.where(seen, scores, -jnp.inf), -1, keepdims=True)
  values = scored(scores, seen, top, c)
  total = first_total(jnp.sum(sizes(values, c), -1, keepdims=True), count, c)
  if c.power is None:
    return values, total
  largest = jax.lax.stop_gradient(jnp.max(values, -1, keepdims=True))
  rows = second_stage(total, count, largest, c)
  raised = raise_excess(values, seen, rows, c)
  return raised, second_total(jnp.sum(raised, -1, keepdims=True), rows, c)


class SecondStage(NamedTuple):
  """What every row of the second stage needs to know of itself, [..., 1]."""

  mean: jax.Array  # m
  taken: jax.Array  # O m, what is taken off
  divisor: jax.Array  # the largest excess
  live: jax.Array  # False in flat rows


def needs_top(variant: Variant) -> bool:
  """Whether `scored` is relative to the largest score of a row."""
  c = variant  # softplus of cosines times c neither overflows nor vanishes
  return c.shifted and not (c.score == "softplus" and c.unit)


def scored(
  scores: Float[Array, "*B S"],
  seen: Bool[Array, "*#B S"],
  top: Float[Array, "*#B 1"] | None,
  variant: Variant,
) -> Float[Array, "*B S"]:
  """f of the scores, 0 where nothing is seen; with `top` a row may be divided by a factor."""
  if top is None:
    return jnp.where(seen, _function(variant, scores), 0)
  top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
  # Keys that are not seen may be above the largest that is, and must not overflow.
  relative = jnp.exp(jnp.where(seen, scores, -jnp.inf) - top)
  if variant.score == "exp":
    return relative
  # Far below 0 softplus is exp, of which the row's factor can be taken off before it vanishes.
  return jnp.where(top < -20, relative, jnp.where(seen, softplus(scores), 0))


def sizes(values: Float[Array, "*B S"], variant: Variant) -> Float[Array, "*B S"]:
  """What the l1 norm adds up."""
  return jnp.abs(values) if variant.score in ("identity", "silu", "gelu", "tanh") else values


def first_total(total: Float[Array, "*B 1"], count: Float[Array, "*#B 1"], variant: Variant):
  """What the first stage divides by, for rows whose sizes sum to `total`."""
  c = variant
  if c.normalization == "mean":
    return jnp.broadcast_to(count, total.shape)
  if c.normalization == "none":
    return jnp.ones_like(total)
  total = total + c.eps_first if c.epsilon == "add" else total
  total = jnp.maximum(total, c.eps_first) if c.epsilon == "clamp" else total
  return jnp.where(total > 0, total, 1)


def second_stage(
  total: Float[Array, "*B 1"],
  count: Float[Array, "*#B 1"],
  largest: Float[Array, "*B 1"],
  variant: Variant,
) -> SecondStage:
  """For rows with the largest entry `largest` of f, which has no gradient: it is a row's factor."""
  c = variant
  mean = total / count
  taken = jnp.where(count <= c.skip_rows, 0.0, c.offset) * mean
  excess = jax.lax.stop_gradient(largest - taken)
  least = c.flat_tolerance * mean if c.epsilon == "none" else 0.0
  live = excess > least
  return SecondStage(mean, taken, jnp.where(live, excess, 1), live)


def raise_excess(
  values: Float[Array, "*B S"], seen: Bool[Array, "*#B S"], rows: SecondStage, variant: Variant
) -> Float[Array, "*B S"]:
  """(max(0, f - O m) / its largest)^p."""
  excess = jnp.maximum(values - jnp.where(seen, rows.taken, 0), 0)
  return power(jnp.where(rows.live, excess / rows.divisor, 0), variant.power or 1)


def second_total(total: Float[Array, "*B 1"], rows: SecondStage, variant: Variant):
  """What the second stage divides by, for rows whose raised excess sums to `total`."""
  c = variant
  if c.epsilon != "none" and c.eps_second:
    # The epsilon belongs to sums of (A N - O)^p; in units of the largest it is this much.
    log_eps = jnp.log(c.eps_second) + (c.power or 1) * (jnp.log(rows.mean) - jnp.log(rows.divisor))
    eps = jnp.exp(jnp.minimum(log_eps, 80.0))
    total = total + eps if c.epsilon == "add" else jnp.maximum(total, eps)
  return jnp.where(rows.live, total, 1)


def power(x: Float[Array, "*B"], p: int | float) -> Float[Array, "*B"]:
  """x^p for x in [0, 1]; whole numbers by squaring."""
  if p != int(p):
    positive = x > 0
    return jnp.where(positive, jnp.exp(p * jnp.log(jnp.where(positive, x, 1))), 0)
  return jax.lax.integer_pow(x, int(p))


def _function(c, x):
  if c.score == "gelu":
    return jax.nn.gelu(x, approximate=False)
  if c.score == "relu_power":
    return power(jax.nn.relu(x), c.score_power)
  return dict(
    softplus=softplus, exp=jnp.exp, relu=jax.nn.relu, sigmoid=jax.nn.sigmoid, elu1=_elu1,
    identity=_same, silu=jax.nn.silu, tanh=jnp.tanh, abs=jnp.abs,
  )[c.score](x)  # fmt: skip


@jax.custom_jvp
def softplus(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
  """ln(1 + e^x) without overflow.

  In float32 from the series of artanh, which a CPU computes four times as fast as log1p:
  ln(1 + e) = 2 artanh(z), z = e / (2 + e), for e = exp(-|x|) in (0, 1].
  """
  e = jnp.exp(-jnp.abs(x))
  if x.dtype != jnp.float32:
    return jnp.maximum(x, 0) + jnp.log1p(e)
  z = e / (2 + e)
  square = z * z
  series = functools.reduce(lambda total, c: total * square + c, _ARTANH)
  return jnp.maximum(x, 0) + z * series


@softplus.defjvp
def _softplus_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  e = jnp.exp(-jnp.abs(x))
  return softplus(x), dx * jnp.where(x > 0, 1, e) / (1 + e)


def _elu1(x):
  return jax.nn.elu(x) + 1


def _same(x):
  return x
