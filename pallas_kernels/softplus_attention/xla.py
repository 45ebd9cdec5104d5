"""Softplus attention in plain XLA, in linear memory: see `strips.py`.

Every member of the family is a function of whole rows, so a strip's rows are turned into weights as
they are; its backward pass is that of the strip, with the products' rounding in our hands.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..dots import einsum_f32
from ..sliding_window_attention.history import Tokens
from ..strips import attend_strips
from .reference import factor
from .variants import Variant
from .weights import row_weights

DEFAULT_CHUNK = 64


def softplus_attention_xla(
  query: Float[Array, "B T H K"],
  tokens: Tokens,
  count: Float[Array, "P T"],
  variant: Variant,
  chunk_size: int,
) -> Float[Array, "B T H V"]:
  """Output; query and keys are unit vectors already where the variant wants them."""
  dim = query.shape[-1]

  def attend(q, k, v, seen, n):
    scores = factor(variant, n, dim) * products(q, k)
    if variant.score_bias:
      scores -= jnp.log(n)
    weights, total = row_weights(scores, seen, n, variant)
    return mix(weights, total, v)

  return attend_strips(attend, query, tokens, chunk_size, (count,))


@jax.custom_vjp
def products(q: Float[Array, "B G R C K"], k: Float[Array, "B G S K"]) -> Float[Array, "..."]:
  """q k^T in float32 (or wider). Cotangents are rounded once, to the dtype of the operands."""
  return einsum_f32("bgrck,bgsk->bgrcs", q, k)


def _products_backward(residuals, d_scores):
  q, k = residuals
  d_scores = d_scores.astype(q.dtype)
  dq = einsum_f32("bgrcs,bgsk->bgrck", d_scores, k).astype(q.dtype)
  dk = einsum_f32("bgrcs,bgrck->bgsk", d_scores, q).astype(k.dtype)
  return dq, dk


products.defvjp(lambda q, k: (products(q, k), (q, k)), _products_backward)


@jax.custom_vjp
def mix(
  weights: Float[Array, "B G R C S"], total: Float[Array, "B G R C 1"], v: Float[Array, "B G S V"]
) -> Float[Array, "B G R C V"]:
  """weights v / total in the dtype of v.

  The gradient of a row of one weight is a difference of equal numbers; it is 0 only if both are
  rounded alike, so the cotangent is used as it came, and the output as it was before rounding.
  """
  return _mix_forward(weights, total, v)[0]


def _mix_forward(weights, total, v):
  output = einsum_f32("bgrcs,bgsv->bgrcv", weights.astype(v.dtype), v) / total
  return output.astype(v.dtype), (weights, total, v, output)


def _mix_backward(residuals, d_output):
  weights, total, v, output = residuals
  d_weights = einsum_f32("bgrcv,bgsv->bgrcs", d_output, v) / total
  wide = d_output.astype(output.dtype)
  d_total = -jnp.sum(wide * output, -1, keepdims=True) / total
  shares = (weights / total).astype(v.dtype)
  dv = einsum_f32("bgrcs,bgrcv->bgsv", shares, d_output).astype(v.dtype)
  return d_weights, d_total, dv


mix.defvjp(_mix_forward, _mix_backward)
