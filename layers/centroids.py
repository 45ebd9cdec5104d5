"""Centroids that follow the vectors assigned to them: online k-means."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .norms import standardise
from .partitioning import logical
from .variables import Tracked

COUNTS = ("per_head", "official")


class ClusterSums(NamedTuple):
  """Over all vectors of a batch, by the centroid they are nearest to."""

  count: Float[Array, "*L H C"]
  total: Float[Array, "*L H C K"]


@dataclasses.dataclass(frozen=True)
class CentroidsConfig:
  """Sizes of a layer's centroids and how they move. The defaults are the published ones, but for
  `counts`."""

  heads: int
  clusters: int
  head_dim: int
  decay: float = 0.999
  counts: str = "per_head"  # "official": the released code's, which mixes heads up
  initial_count: float = 0.0  # 1 keeps the length of the first centroids that move
  eps: float = 1e-5

  def __post_init__(self):
    if self.counts not in COUNTS:
      self._refuse("counts", f"be one of {COUNTS}", "'official' replays the released code")
    if not 0 <= self.decay < 1:
      self._refuse("decay", "lie in [0, 1)", "0.999 as published")
    for name in ("heads", "clusters", "head_dim"):
      if getattr(self, name) < 1:
        self._refuse(name, "be at least 1", "a size")

  def _refuse(self, name, rule, hint):
    raise ValueError(f"CentroidsConfig: {name} must {rule}; got {getattr(self, name)!r} ({hint})")


class Centroids(nnx.Module):
  """Means mu [H, C, K] of the vectors x that are nearest to them, where near is a large x . mu.

      count <- d count + (1 - d) n        n, s: number and sum of a batch's nearest vectors
      sums  <- d sums + (1 - d) s         mu = sums / smoothed count

  `sums_of` adds up a batch and `absorb` moves the centroids, once per step of the optimiser: under
  data parallelism and with gradient accumulation the sums are those of the whole batch. No gradient
  moves them. At first mu is standardised noise and `ema_means` = mu; since counts start at 0, the
  first update multiplies mu by about 1000 / n (as published; `initial_count=1` does not).
  Paper: Efficient Content-Based Sparse Attention with Routing Transformers (2021), section 4.1, in
  the form of the released code, which differs from the paper's.
  """

  def __init__(self, config: CentroidsConfig, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
    self.config = c = config
    shape = (c.heads, c.clusters, c.head_dim)
    means = standardise(jax.random.normal(rngs.params(), shape, param_dtype))
    axes = logical("heads", None, None)
    self.means = Tracked(means, **axes)
    self.ema_means = Tracked(means, **axes)
    count = jnp.full(shape[:2], c.initial_count, param_dtype)
    self.ema_count = Tracked(count, **logical("heads", None))

  def scores(self, x: Float[Array, "*B H K"]) -> Float[Array, "*B H C"]:
    """x . mu in float32 (or wider): rounding would change who is near."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    means = jax.lax.stop_gradient(self.means[...]).astype(wide)
    return jnp.einsum("...hk,hck->...hc", x.astype(wide), means, precision="highest")

  def spread(
    self, x: Float[Array, "B T H K"], scores: Float[Array, "B T H C"]
  ) -> tuple[Float[Array, ""], ClusterSums]:
    """(mean square distance of x to its nearest centroids, with a gradient for x; sums of x)."""
    hot = jax.nn.one_hot(jnp.argmax(scores, -1), scores.shape[-1], dtype=scores.dtype)
    means = jax.lax.stop_gradient(self.means[...]).astype(scores.dtype)
    nearest = jnp.einsum("bthc,hck->bthk", hot, means, precision="highest")
    distance = jnp.mean(jnp.square(x.astype(scores.dtype) - nearest))
    x = jax.lax.stop_gradient(x).astype(scores.dtype)
    hot *= jnp.any(x != 0, axis=-1, keepdims=True)
    total = jnp.einsum("bthc,bthk->hck", hot, x, precision="highest")
    return distance, ClusterSums(self._count(hot), total)

  def absorb(self, sums: ClusterSums) -> None:
    """Moves the centroids; works on the stacked centroids of several layers, too."""
    c = self.config
    count, means = self.ema_count[...], self.ema_means[...]
    count = c.decay * count + (1 - c.decay) * sums.count.astype(count.dtype)
    means = c.decay * means + (1 - c.decay) * sums.total.astype(means.dtype)
    total = jnp.sum(count, axis=-1, keepdims=True)
    smoothed = (count + c.eps) / (total + c.clusters * c.eps) * total
    # Without a single vector so far the centroids stay.
    moved = means / jnp.where(smoothed > 0, smoothed, 1)[..., None]
    self.means[...] = jnp.where(smoothed[..., None] > 0, moved, self.means[...])
    self.ema_count[...], self.ema_means[...] = count, means

  def _count(self, hot):
    if self.config.counts == "per_head":
      return jnp.sum(hot, axis=(0, 1))
    # The released code reads [B, H, T, C] as [B H T / H, H, C]: "head" h counts every H-th row.
    rows = hot.transpose(0, 2, 1, 3)
    return jnp.sum(rows.reshape(-1, hot.shape[2], hot.shape[3]), axis=0)


def clusters_in_use(sums: Any) -> Float[Array, ""]:
  """The share of a head's centroids that a batch used, averaged over all `ClusterSums` of a tree.

  exp(entropy of who is nearest) / C: 1 where all centroids are nearest to equally many vectors, 1/C
  where one takes them all.
  """
  shares = []
  for one in jax.tree.leaves(sums, is_leaf=lambda x: isinstance(x, ClusterSums)):
    part = one.count / jnp.maximum(jnp.sum(one.count, axis=-1, keepdims=True), 1)
    entropy = -jnp.sum(part * jnp.log(jnp.where(part > 0, part, 1)), axis=-1)
    shares.append(jnp.ravel(jnp.exp(entropy) / part.shape[-1]))
  return jnp.mean(jnp.concatenate(shares))
