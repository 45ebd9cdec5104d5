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
  relative_keys: Float[Array, "R K"] | None = None,
  relative_values: Float[Array, "R V"] | None = None,
) -> tuple[Float[Array, "B H V"], RoutedState]:
  """`routed_attention` for one more token of the state's document; (output, new state).

  With "topk_prefix" the token enters every list whose worst member it beats (an older one stays on
  a tie), with "causal_recent" that of its nearest centroid, from which the oldest leaves. Where
  "official" was trained, decoding is "topk_prefix": later tokens are not there yet.
  """
  window = state.score.shape[-1]
  scores = scores.astype(state.score.dtype)
  every = state
  own = nearest(scores)[..., None] if options.membership == "causal_recent" else None
  if own is not None:  # one list per head is read and written
    state = RoutedState(*(jnp.take_along_axis(x, _like(own, x), axis=2) for x in state))
    scores = jnp.take_along_axis(scores, own, axis=2)
    admitted = jnp.ones(scores.shape, bool)
    leaves = jnp.zeros(scores.shape, jnp.int32)
  else:
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
  if own is not None:
    batch, heads = own.shape[:2]
    where = (jnp.arange(batch)[:, None], jnp.arange(heads), own[..., 0])
    put = lambda x, part: x.at[where].set(part[:, :, 0])  # noqa: E731
    return output.astype(value.dtype), RoutedState(*map(put, every, state))
  output /= (jnp.sum(admitted, axis=2) + options.combine_eps)[..., None]
  return output.astype(value.dtype), state


def _like(x, other):
  """With axes of 1 behind, as many as `other` has more."""
  return x.reshape(*x.shape, *(1,) * (other.ndim - x.ndim))
