"""Losses that never hold the logits of a whole batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .partitioning import active_axes


class LossSums(NamedTuple):
  """Sums over tokens, float32 scalars; divide by `weight` for means."""

  loss: Float[Array, ""]  # nats, the z-loss not included
  z_loss: Float[Array, ""]  # log(sum of exp(logits))^2
  correct: Float[Array, ""]  # tokens whose largest logit is the target's
  weight: Float[Array, ""]


def chunked_cross_entropy(
  hidden: Float[Array, "B T D"],
  head: Float[Array, "V D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"] | None = None,
  *,
  chunk_size: int = 256,
) -> LossSums:
  """Cross-entropy of softmax(hidden head^T) against `targets`, `chunk_size` positions at a time.

  The logits of a chunk, [B, chunk_size, V] in float32, exist only while it is worked on; the
  backward pass computes them again. Targets outside [0, V) must have weight 0. A length that is
  split over a "seq" mesh axis is cut into chunks within each device's part.

  Raises:
    ValueError: shapes that do not fit.
  """
  batch, length, _ = hidden.shape
  if targets.shape != (batch, length):
    raise ValueError(
      f"chunked_cross_entropy: targets must have shape {(batch, length)}; got {targets.shape}"
      " (one target per position)"
    )
  if weights is None:
    weights = jnp.ones(targets.shape, jnp.float32)
  parts = active_axes().get("seq", 1)
  if length % parts:
    raise ValueError(
      f"chunked_cross_entropy: length must be a multiple of the mesh axis 'seq' ({parts}); got"
      f" {length} (pad the sequences)"
    )

  def chunks(x):  # [B, T, ...] -> [N, B, parts, C, ...]
    x = x.reshape(batch, parts, length // parts, *x.shape[2:])
    size = min(chunk_size, length // parts)
    pad = [(0, 0)] * x.ndim
    pad[2] = (0, -x.shape[2] % size)
    x = jnp.pad(x, pad)
    x = x.reshape(batch, parts, x.shape[2] // size, size, *x.shape[3:])
    return jnp.moveaxis(x, 2, 0)

  @jax.checkpoint
  def add_chunk(sums, inputs):
    h, target, weight = inputs
    logits = jnp.einsum(
      "...d,vd->...v", h, head.astype(h.dtype), preferred_element_type=jnp.float32
    )
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    safe = jnp.clip(target, 0, logits.shape[-1] - 1)
    chosen = jnp.take_along_axis(logits, safe[..., None], axis=-1)[..., 0]
    correct = chosen >= jnp.max(logits, axis=-1)
    terms = (normaliser - chosen, jnp.square(normaliser), correct, jnp.ones_like(weight))
    return LossSums(*(s + jnp.sum(weight * t) for s, t in zip(sums, terms, strict=True))), None

  zero = jnp.zeros((), jnp.float32)
  inputs = (chunks(hidden), chunks(targets), chunks(weights.astype(jnp.float32)))
  return jax.lax.scan(add_chunk, LossSums(zero, zero, zero, zero), inputs)[0]
