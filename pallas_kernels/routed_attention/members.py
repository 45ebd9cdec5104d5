"""Who belongs to a cluster. A token whose score is -inf belongs to none."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


def top_members(scores: Float[Array, "B T H C"], window: int) -> Int[Array, "B H C W"]:
  """The W = min(window, T) tokens with the highest scores of each cluster, in their own order.

  Ties go to the earlier token. Where fewer tokens can be members, others fill up.
  """
  by_cluster = scores.transpose(0, 2, 3, 1)  # [B, H, C, T]
  _, index = jax.lax.top_k(by_cluster, min(window, by_cluster.shape[-1]))
  return jnp.sort(index, axis=-1)


def nearest(scores: Float[Array, "*B C"]) -> Int[Array, "*B"]:
  """The centroid with the highest score; the first of equals."""
  return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def only(scores: Float[Array, "B T H C"], real: Bool[Array, "B T"] | None):
  """The scores, -inf for tokens that are not `real`."""
  return scores if real is None else jnp.where(real[..., None, None], scores, -jnp.inf)


def gather(
  x: Shaped[Array, "B T H *K"], members: Int[Array, "B H C W"]
) -> Shaped[Array, "B H C W *K"]:
  """The rows of the members."""
  batch, heads, clusters, window = members.shape
  index = members.reshape(batch, heads, clusters * window)
  rows = x.swapaxes(1, 2)
  index = index.reshape(*index.shape, *(1,) * (x.ndim - 3))
  return jnp.take_along_axis(rows, index, axis=2).reshape(*members.shape, *x.shape[3:])


def gather_own(
  scores: Float[Array, "B T H C"], members: Int[Array, "B H C W"]
) -> Float[Array, "B H C W"]:
  """Each member's score in its own cluster."""
  return jnp.take_along_axis(scores.transpose(0, 2, 3, 1), members, axis=-1)


def memberships(
  members: Int[Array, "B H C W"], real: Bool[Array, "B H C W"], length: int
) -> Int[Array, "B H {length}"]:
  """In how many lists each token is; fillers are not `real`."""
  batch, heads = members.shape[:2]
  rows = (jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None])
  where = (*rows, members.reshape(batch, heads, -1))
  count = jnp.zeros((batch, heads, length), jnp.int32)
  return count.at[where].add(real.reshape(batch, heads, -1).astype(jnp.int32))
