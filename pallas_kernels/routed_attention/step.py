"""Routed attention, one token at a time: what decoding runs."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .attend import attend_members
from .members import nearest
from .options import Routing
from .state import RoutedState


def routed_attention_step(
  query: Float[Array, "B H K"],
  key: Float[Array, "B H K"],
  value: Float[Array, "B H V"],
  scores: Float[Array, "B H C"],
  state: RoutedState,
  *,
  options: Routing,
  key_scores: Float[Array, "B H C"] | None = None,
  relative_keys: Float[Array, "R K"] | None = None,
  relative_values: Float[Array, "R V"] | None = None,
) -> tuple[Float[Array, "B H V"], RoutedState]:
  """`routed_attention` for one more token of the state's document; (output, new state).

  With "topk_prefix" the token enters every list whose worst member it beats (an older one stays on
  a tie), with "causal_recent" that of its nearest centroid, from which the oldest leaves; with
  `key_scores` it enters by these, and sees the list of its query's centroid. Where "official" was
  trained, decoding is "topk_prefix": later tokens are not there yet.
  """
  if options.membership == "causal_recent":
    return _recent_step(query, key, value, scores, state, options, key_scores)
  window = state.score.shape[-1]
  scores = scores.astype(state.score.dtype)
  worst = jnp.min(state.score, axis=-1)
  admitted = scores > worst
  # The last of equals: lists are in the order of positions.
  leaves = window - 1 - jnp.argmin(state.score[..., ::-1], axis=-1)
  slot = jnp.arange(window)
  moves = admitted[..., None] & (slot >= leaves[..., None])  # [B, H, C, W]

  def enter(old, new):  # old [B, H, C, W, ...], new [B, H, C or 1, ...]
    new = jnp.broadcast_to(
      new[:, :, :, None].astype(old.dtype), (*old.shape[:3], 1, *old.shape[4:])
    )
    later = jnp.concatenate([old[:, :, :, 1:], new], axis=3)
    return jnp.where(_like(moves, old), later, old)

  state = RoutedState(
    enter(state.score, scores),
    enter(state.key, key[:, :, None]),
    enter(state.value, value[:, :, None]),
  )
  relative = None
  if relative_keys is not None and relative_values is not None:
    relative = (relative_keys, relative_values)
  seen = jnp.isfinite(state.score)[..., None, :]  # [B, H, C, 1, W]
  rank = slot - (window - 1)
  q = jnp.broadcast_to(query[:, :, None, None], (*scores.shape, 1, query.shape[-1]))
  output = attend_members(
    q, state.key, state.value, seen, rank == 0, rank, options, relative, None
  )[..., 0, :]  # [B, H, C, V]
  output = jnp.sum(jnp.where(admitted[..., None], output, 0), axis=2)
  output /= (jnp.sum(admitted, axis=2) + options.combine_eps)[..., None]
  return output.astype(value.dtype), state


def _recent_step(query, key, value, scores, state, options, key_scores):
  """One list per head is written, and one read."""
  batch, heads, _ = query.shape
  by = scores if key_scores is None else key_scores
  rows = (jnp.arange(batch)[:, None], jnp.arange(heads))
  entered = (*rows, nearest(by))

  def enter(lists, new):  # [B, H, C, W, ...], [B, H, ...]
    later = jnp.concatenate([lists[entered][:, :, 1:], new[:, :, None].astype(lists.dtype)], axis=2)
    return lists.at[entered].set(later)

  state = RoutedState(*map(enter, state, (jnp.max(by, axis=-1), key, value)))
  score, keys, values = (lists[(*rows, nearest(scores))] for lists in state)
  none = jnp.zeros((), bool)
  seen = jnp.isfinite(score)[:, :, None]
  output = attend_members(query[:, :, None], keys, values, seen, none, 0, options, None, None)
  return output[:, :, 0].astype(value.dtype), state


def _like(x, other):
  """With axes of 1 behind, as many as `other` has more."""
  return x.reshape(*x.shape, *(1,) * (other.ndim - x.ndim))
