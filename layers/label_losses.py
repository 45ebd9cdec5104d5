"""Losses of many independent labels."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .losses import LossSums


def label_margins(counts: ArrayLike) -> Float[Array, " L"]:
  """n^(-1/4) of each of the counts [L], of training documents with the label; 1 for 0."""
  counts = jnp.asarray(counts, jnp.float32)
  return jnp.where(counts > 0, jnp.maximum(counts, 1) ** -0.25, 1)


def binary_cross_entropy(
  logits: Float[Array, "B L"], targets: Float[Array, "B L"]
) -> Float[Array, "B L"]:
  """max(z, 0) - z y + log(1 + exp(-|z|)): nats per label, float32 (or wider)."""
  z = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  return jnp.maximum(z, 0) - z * targets + jnp.log1p(jnp.exp(-jnp.abs(z)))


def ldam_logits(
  logits: Float[Array, "B L"],
  targets: Float[Array, "B L"],
  margins: Float[Array, " L"],
  scale: float,
) -> Float[Array, "B L"]:
  """z - y scale n^(-1/4): positives have to clear a margin, and the rarer the label the wider.

  Multi-label form of the label-distribution-aware margin as TransICD (2021) has it: no softmax,
  no scale behind it, no re-weighting.
  """
  return logits - targets * (scale * margins)


def label_loss_sums(
  logits: Float[Array, "B L"],
  shifted: Float[Array, "B L"],
  targets: Float[Array, "B L"],
  weights: Float[Array, "B 1"],
) -> LossSums:
  """Sums over documents: the mean over labels of the cross-entropy of `shifted`.

  A document counts as correct if all of its labels are, by the sign of `logits`.
  """
  weights = weights[:, 0].astype(jnp.float32)
  loss = jnp.mean(binary_cross_entropy(shifted, targets), axis=1)
  right = jnp.all((logits > 0) == (targets > 0.5), axis=1)
  total = lambda x: jnp.sum(weights * x)  # noqa: E731
  return LossSums(total(loss), jnp.zeros(()), total(right), jnp.sum(weights))
