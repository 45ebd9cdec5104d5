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
  if options.membership == "causal_recent":
    admitted = nearest(scores)[..., None] == jnp.arange(scores.shape[-1])
    leaves = jnp.zeros(scores.shape, jnp.int32)
  else:
    worst = jnp.min(state.score, axis=-1)
    admitted = scores > worst
    # The last of equals: lists are in the order of positions.
    leaves = window - 1 - jnp.argmin(state.score[..., ::-1], axis=-1)
  slot = jnp.arange(window)
  source = jnp.minimum(slot + (slot >= leaves[..., None]), window - 1)  # [B, H, C, W]

  def enter(old, new):  # old [B, H, C, W, ...], new [B, H, (C or 1), ...]
    more = (1,) * (old.ndim - 4)
    moved = jnp.take_along_axis(old, source.reshape(*source.shape, *more), axis=3)
    moved = jnp.where((slot == window - 1).reshape(window, *more), new[:, :, :, None], moved)
    return jnp.where(admitted.reshape(*admitted.shape, 1, *more), moved, old)

  state = RoutedState(
    enter(state.score, scores),
    enter(state.key, key[:, :, None].astype(state.key.dtype)),
    enter(state.value, value[:, :, None].astype(state.value.dtype)),
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
  if options.membership != "causal_recent":
    output /= (jnp.sum(admitted, axis=2) + options.combine_eps)[..., None]
  return output.astype(value.dtype), state
