"""What decoding keeps: the members of every cluster."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..segments import last_segment
from .members import gather, gather_own, nearest, only, top_members
from .options import Routing


class RoutedState(NamedTuple):
  """Lists of up to W members in the order of their positions, full ones; empty slots come first.

  A token is in the lists of all clusters that it belongs to. The size does not grow.
  """

  score: Float[Array, "B H C W"]  # -inf in empty slots
  key: Float[Array, "B H C W K"]
  value: Float[Array, "B H C W V"]


class Tokens(NamedTuple):
  """The tokens of a call, members of earlier ones in front; query i is at S - T + i."""

  key: Float[Array, "B S H K"]
  value: Float[Array, "B S H V"]
  scores: Float[Array, "B S H C"]  # -inf for what is no member, or no token
  documents: Int[Array, "B S"] | None


def empty_routed_state(
  batch: int,
  heads: int,
  clusters: int,
  window: int,
  key_dim: int,
  value_dim: int,
  dtype=jnp.float32,
) -> RoutedState:
  """The state before the first token."""
  shape = (batch, heads, clusters, window)
  return RoutedState(
    jnp.full(shape, -jnp.inf, jnp.float32),
    jnp.zeros((*shape, key_dim), dtype),
    jnp.zeros((*shape, value_dim), dtype),
  )


def extend(
  key: Float[Array, "B T H K"],
  value: Float[Array, "B T H V"],
  scores: Float[Array, "B T H C"],
  documents: Int[Array, "B T"] | None,
  state: RoutedState | None,
) -> Tokens:
  """Puts the members in front; each has a score in the cluster of its list alone."""
  if state is None:
    return Tokens(key, value, scores, documents)
  batch, heads, clusters, window = state.score.shape

  def listed(x):  # [B, H, C, W, ...] -> [B, C W, H, ...]
    return jnp.moveaxis(x.reshape(batch, heads, clusters * window, *x.shape[4:]), 1, 2)

  own = jnp.eye(clusters, dtype=bool)[:, None]  # [C, 1, C]
  old = listed(jnp.where(own, state.score[..., None], -jnp.inf).astype(scores.dtype))
  if documents is not None:
    documents = jnp.pad(documents, ((0, 0), (clusters * window, 0)))  # document 0 is theirs
  return Tokens(
    jnp.concatenate([listed(state.key), key], axis=1),
    jnp.concatenate([listed(state.value), value], axis=1),
    jnp.concatenate([old, scores], axis=1),
    documents,
  )


def state_after(
  tokens: Tokens,
  options: Routing,
  segments: Int[Array, "B T"] | None,
  lengths: Int[Array, " B"] | None,
) -> RoutedState:
  """The lists after each row's last real token, of its document."""
  scores, window = tokens.scores, options.window_size
  if segments is not None and tokens.documents is not None:
    batch, length = segments.shape
    stop = jnp.full((batch,), length) if lengths is None else lengths
    scores = only(scores, jnp.equal(tokens.documents, last_segment(segments, stop)[:, None]))
  ranking = scores
  if options.membership == "causal_recent":  # the latest tokens of each centroid
    own = nearest(scores)[..., None] == jnp.arange(scores.shape[-1])
    scores = jnp.where(own, scores, -jnp.inf)
    place = jnp.arange(scores.shape[1], dtype=scores.dtype)[:, None, None]
    ranking = jnp.where(jnp.isfinite(scores), place, -jnp.inf)
  members = top_members(ranking, window)
  # Fillers go to the front, where empty slots are; the others keep their order.
  finite = jnp.isfinite(gather_own(scores, members))
  order = jnp.argsort(finite, axis=-1, stable=True)
  members = jnp.take_along_axis(members, order, axis=-1)
  score = gather_own(scores, members)
  key, value = (gather(x, members) for x in (tokens.key, tokens.value))
  real = jnp.isfinite(score)[..., None]
  state = RoutedState(score, jnp.where(real, key, 0), jnp.where(real, value, 0))
  short = window - score.shape[-1]
  if not short:
    return state
  batch, heads, clusters, _ = score.shape
  dims = key.shape[-1], value.shape[-1]
  empty = empty_routed_state(batch, heads, clusters, short, *dims, key.dtype)
  return jax.tree.map(lambda a, b: jnp.concatenate([a.astype(b.dtype), b], axis=3), empty, state)
