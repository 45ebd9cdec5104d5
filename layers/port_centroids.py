"""Centroids of the PyTorch port of the Routing Transformer: means that follow directions."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .centroids import Centroids, CentroidsConfig, ClusterSums
from .norms import unit
from .partitioning import logical
from .variables import Tracked


class PortCentroids(Centroids):
  """Means mu [H, C, K] of the unit vectors x nearest to them, where near is a large x . mu.

      mu <- d mu + (1 - d) s / |s|        s: sum of a batch's nearest vectors; none: mu stays

  There are no running sums and no counts, and mu itself is not brought to length 1. At first it is
  noise N(0, 1), or what `start` finds. The port averages s / |s| over the forward passes since the
  last update; here `absorb` gets the sums of the whole batch of one step: the same for one pass per
  step, and another weighting of the passes where there are several.
  """

  def __init__(
    self,
    heads: int,
    clusters: int,
    head_dim: int,
    *,
    decay: float = 0.999,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.config = CentroidsConfig(heads, clusters, head_dim, decay=decay)
    shape = (heads, clusters, head_dim)
    means = jax.random.normal(rngs.params(), shape, param_dtype)
    self.means = Tracked(means, **logical("heads", None, None))

  def absorb(self, sums: ClusterSums) -> None:
    """Moves the centroids; works on the stacked centroids of several layers, too."""
    means, decay = self.means[...], self.config.decay
    found = _directions(sums, means)
    self.means[...] = decay * means + (1 - decay) * found.astype(means.dtype)

  def start(self, x: Float[Array, "B T H K"], key: jax.Array) -> None:
    """Takes the means of `lloyd` on a first batch (of any length), from some of its vectors."""
    batch, length, heads, dim = x.shape
    rows = x.reshape(batch * length, heads, dim)
    clusters, enough = self.config.clusters, batch * length >= self.config.clusters
    chosen = jax.random.choice(key, rows.shape[0], (clusters,), replace=not enough)
    means = lloyd(x, rows[chosen].swapaxes(0, 1))
    self.means[...] = means.astype(self.means[...].dtype)


def lloyd(
  x: Float[Array, "B T H K"], means: Float[Array, "H C K"], iterations: int = 10
) -> Float[Array, "H C K"]:
  """k-means on directions: assign by the largest x . mu, then mu = s / |s|; float32 (or wider).

  A centroid that is nearest to nothing stays where it is.
  """
  wide = jnp.promote_types(x.dtype, jnp.float32)
  x, means = x.astype(wide), means.astype(wide)

  def again(_, means):
    scores = jnp.einsum("bthk,hck->bthc", x, means, precision="highest")
    hot = jax.nn.one_hot(jnp.argmax(scores, -1), means.shape[1], dtype=wide)
    total = jnp.einsum("bthc,bthk->hck", hot, x, precision="highest")
    return _directions(ClusterSums(jnp.sum(hot, (0, 1)), total), means)

  return jax.lax.fori_loop(0, iterations, again, means)


def _directions(sums, means):
  """The sums at unit length, and the means where there is nothing to add up."""
  return jnp.where(sums.count[..., None] > 0, unit(sums.total), means)
