"""Attention between the members of a cluster: what the portable path and the step share."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..dots import einsum_f32
from .options import Routing
from .reference import OWN_PAIR


class Drop(NamedTuple):
  """Which weights are dropped: each with probability `rate`, the others are divided by 1 - rate."""

  rate: float
  key: jax.Array


class Extras(NamedTuple):
  """What is learned beside queries, keys and values."""

  relative: tuple[Float[Array, "R K"], Float[Array, "R V"]] | None
  memory: tuple[Float[Array, "H C M K"], Float[Array, "H C M V"]] | None
  drop: Drop | None = None

  def by_cluster(self):
    """The memory with the clusters in front."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), self.memory)


def attend_members(
  q: Float[Array, "*C I K"],
  k: Float[Array, "*C J K"],
  v: Float[Array, "*C J V"],
  pairs: Bool[Array, "..."],
  own: Bool[Array, "..."],
  rank: Int[Array, "..."] | int,
  options: Routing,
  relative: tuple[jax.Array, jax.Array] | None,
  memory: tuple[jax.Array, jax.Array] | None,
  drop: Drop | None = None,
) -> Float[Array, "*C I V"]:
  """Softmax attention, float32; 0 for queries without keys.

  [..., I, J] or what broadcasts to it: `pairs` that are seen, which of them are a token with
  itself (`own`), and by how many members the key is behind the query (`rank`; a number n stands
  for j - i - n).
  """
  logits = options.scale * einsum_f32("...ik,...jk->...ij", q, k)
  ranks = None if relative is None else _by_rank(relative, rank, logits.shape)
  if ranks is not None:
    logits += ranks.spread(einsum_f32("...ik,rk->...ir", q, ranks.keys))
  if options.own_pair == "last_resort":
    logits = jnp.where(own, OWN_PAIR, logits)
  logits = jnp.where(pairs, logits, -jnp.inf)
  count = 0
  if memory is not None:
    extra = options.scale * einsum_f32("bhik,hmk->bhim", q, memory[0])
    count = extra.shape[-1]
    logits = jnp.concatenate([extra, logits], axis=-1)
  top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf))
  weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  weights = weights / jnp.where(total > 0, total, 1)
  if drop is not None:
    kept = jax.random.bernoulli(drop.key, 1 - drop.rate, weights.shape)
    weights = jnp.where(kept, weights / (1 - drop.rate), 0)
  rounded = weights.astype(v.dtype)
  output = einsum_f32("...ij,...jv->...iv", rounded[..., count:], v)
  if memory is not None:
    output += einsum_f32("bhim,hmv->bhiv", rounded[..., :count], memory[1])
  if ranks is not None:  # weights are added up by rank: the transpose of spreading
    by_rank = jax.ShapeDtypeStruct((*logits.shape[:-1], ranks.keys.shape[0]), weights.dtype)
    (sums,) = jax.linear_transpose(ranks.spread, by_rank)(weights[..., count:])
    output += einsum_f32("...ir,rv->...iv", sums.astype(v.dtype), ranks.values)
  return output


class _Ranks(NamedTuple):
  """Rows of both tables, and the function from [..., I, R] to [..., I, J]: every pair's row."""

  keys: Float[Array, "R K"]
  values: Float[Array, "R V"]
  spread: Callable[[jax.Array], jax.Array]


def _by_rank(relative, rank, shape):
  """Each row of the tables once, or, where ranks are distances, once for every distance."""
  limit = relative[0].shape[0] // 2
  if not isinstance(rank, int):
    offset = jnp.broadcast_to(jnp.clip(rank, -limit, limit) + limit, shape)
    spread = lambda rows: jnp.take_along_axis(rows, offset, axis=-1)  # noqa: E731
    return _Ranks(relative[0], relative[1], spread)
  count, seen = shape[-2:]
  ranks = jnp.arange(1 - count, seen + 1) - rank  # one more than there are
  rows = jnp.clip(ranks, -limit, limit) + limit

  def skew(rows):  # entry j - i + I - 1 of row i is i steps of I + J - 1 behind the first
    flat = rows.reshape(*shape[:-2], -1)[..., count - 1 : -1]
    return flat.reshape(*shape[:-1], -1)[..., :seen]

  return _Ranks(relative[0][rows], relative[1][rows], skew)
