"""Softplus attention as it is defined: all pairs at once. The oracle; never optimised."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .variants import Variant


def attend_reference(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B S G K"],
  value: Float[Array, "B S G V"],
  seen: Bool[Array, "B T S"],
  count: Float[Array, "B T"],
  variant: Variant,
) -> Float[Array, "B T H V"]:
  """Weights by the formulas of the paper, in the dtype of `query`; `count` is N.

  `query` and `key` are unit vectors already where the variant wants them.
  """
  c = variant
  dim, groups = query.shape[3], key.shape[2]
  repeat = query.shape[2] // groups
  key, value = (jnp.repeat(x, repeat, axis=2) for x in (key, value))
  n = count[:, None, :, None]  # [B, 1, T, 1]
  seen = seen[:, None]
  scores = factor(c, n, dim) * jnp.einsum("bthk,bshk->bhts", query, key, precision="highest")
  if c.score_bias:
    scores -= jnp.log(n)
  if c.shifted:  # relative to the largest: the l1 norm takes a factor of the row out again
    logs = _log_softplus(scores) if c.score == "softplus" else scores
    logs = jnp.where(seen, logs, -jnp.inf)
    scored = jnp.exp(logs - jax.lax.stop_gradient(jnp.max(logs, -1, keepdims=True)))
  else:
    scored = jnp.where(seen, _scored(c, scores), 0)
  first = scored
  if c.normalization == "l1":
    first = _divided(scored, jnp.sum(jnp.abs(scored), -1, keepdims=True), c, c.eps_first)
  elif c.normalization == "mean":
    first = scored / n
  weights = first
  if c.power is not None:
    offset = jnp.where(n <= c.skip_rows, 0.0, c.offset)
    excess = jnp.where(seen, jax.nn.relu(first * n - offset), 0)
    if c.epsilon == "none":
      largest = jax.lax.stop_gradient(jnp.max(excess, -1, keepdims=True))
      live = largest > c.flat_tolerance
      raised = _power(jnp.where(live, excess / jnp.where(live, largest, 1), 0), c.power)
      total = jnp.sum(raised, -1, keepdims=True)
      weights = raised / jnp.where(live, total, 1)
    else:
      raised = _power(excess, c.power)
      weights = _divided(raised, jnp.sum(raised, -1, keepdims=True), c, c.eps_second)
  return jnp.einsum("bhts,bshv->bthv", weights, value, precision="highest")


def factor(variant: Variant, count: Float[Array, "*N"], dim: int) -> Float[Array, "*N"]:
  """c_i, what the product of query i with a key is multiplied by."""
  logs, log_d, root = jnp.log(count), jnp.log(jnp.asarray(dim, count.dtype)), dim**-0.5
  named = dict(logd_logn=log_d * logs, logn=logs, logd=log_d, inv_sqrt_d=root,
               logn_inv_sqrt_d=root * logs, one=1.0)  # fmt: skip
  given = variant.scale
  return jnp.broadcast_to(named[given] if isinstance(given, str) else given, count.shape)


def _divided(x, total, c, eps):
  total = total + eps if c.epsilon == "add" else total
  total = jnp.maximum(total, eps) if c.epsilon == "clamp" else total
  return jnp.where(total > 0, x / jnp.where(total > 0, total, 1), 0)


def _power(x, p):
  """x^p for x >= 0, with gradient 0 at 0."""
  return jnp.where(x > 0, jnp.where(x > 0, x, 1) ** p, 0)


def _log_softplus(x):
  """ln ln(1 + e^x), also where e^x is no number any more."""
  low = jnp.minimum(x, -20.0)
  e = jnp.exp(low)
  return jnp.where(x < -20, low + jnp.log1p(-e / 2 + e * e / 3), jnp.log(softplus(_floor(x))))


def _floor(x):
  return jnp.maximum(x, -20.0)


def softplus(x):
  return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _scored(c, x):
  """f of the scores."""
  if c.score == "softplus":
    return jax.nn.softplus(x)
  if c.score == "gelu":
    return jax.nn.gelu(x, approximate=False)
  if c.score == "relu_power":
    return _power(jax.nn.relu(x), c.score_power)
  return dict(
    exp=jnp.exp, relu=jax.nn.relu, sigmoid=jax.nn.sigmoid, elu1=lambda x: jax.nn.elu(x) + 1,
    identity=lambda x: x, silu=jax.nn.silu, tanh=jnp.tanh, abs=jnp.abs,
  )[c.score](x)  # fmt: skip
