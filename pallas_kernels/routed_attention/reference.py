"""Routed attention as it is defined: every cluster as a mask over all pairs. The oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .options import Routing

OWN_PAIR = -5e4  # logit of what is a last resort


def routed_reference(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T H K"],
  value: Float[Array, "B T H V"],
  scores: Float[Array, "B T H C"],
  key_scores: Float[Array, "B T H C"] | None,
  options: Routing,
  relative: tuple[Float[Array, "R K"], Float[Array, "R V"]] | None,
  memory: tuple[Float[Array, "H C M K"], Float[Array, "H C M V"]] | None,
  real: Bool[Array, "B T"] | None,
  documents: Int[Array, "B T"] | None,
) -> Float[Array, "B T H V"]:
  """The arguments are those of `routed_attention`; all in the dtype of `query`."""
  o = options
  batch, length, heads, _ = query.shape
  q, k, v = (x.swapaxes(1, 2)[:, :, None] for x in (query, key, value))  # [B, H, 1, T, K]
  s = scores.transpose(0, 2, 3, 1)  # [B, H, C, T]
  place = jnp.arange(length)
  real = jnp.ones((batch, length), bool) if real is None else real
  same = real[:, None] & real[:, :, None]
  if documents is not None:
    same &= documents[:, None] == documents[:, :, None]
  same = same[:, None, None]  # [B, 1, 1, T, T]
  past = place <= place[:, None]
  if o.membership == "causal_recent":
    own = jnp.argmax(s, axis=2)[:, :, None]  # [B, H, 1, T]
    of_key = own
    if key_scores is not None:
      of_key = jnp.argmax(key_scores.transpose(0, 2, 3, 1), axis=2)[:, :, None]
    pairs = (own[..., None] == of_key[..., None, :]) & past & same
    pairs &= _after(pairs) < o.window_size
    queries, distance = jnp.broadcast_to(real[:, None, None], own.shape), None
  elif o.membership == "topk_prefix":
    beaten = _beats(s) & same  # [B, H, C, i, j]: i beats j
    losses = jnp.cumsum(beaten, axis=-2)  # [t, j]: by tokens up to t
    pairs = (losses < o.window_size) & past & same
    queries = jnp.diagonal(pairs, axis1=-2, axis2=-1)
    pairs &= queries[..., None]
    distance = -_after(pairs)
  else:
    queries = jnp.sum(_beats(s) & same, axis=-2) < o.window_size
    queries &= real[:, None, None]
    keys = queries
    if key_scores is not None:
      keys = jnp.sum(_beats(key_scores.transpose(0, 2, 3, 1)) & same, axis=-2) < o.window_size
      keys &= real[:, None, None]
    slot_of_query, slot_of_key = (jnp.cumsum(x, axis=-1) for x in (queries, keys))
    distance = slot_of_key[..., None, :] - slot_of_query[..., None]
    pairs = queries[..., None] & keys[..., None, :]
    if o.causal:
      pairs &= past if o.mask == "position" else distance <= 0
    if not o.zero_values_seen:
      pairs &= jnp.any(v != 0, axis=-1)[..., None, :]
  output = _attend(q, k, v, pairs, distance, o, relative, memory)
  output = jnp.sum(jnp.where(queries[..., None], output, 0), axis=2)  # [B, H, T, V]
  if o.membership != "causal_recent":
    output /= (jnp.sum(queries, axis=2) + o.combine_eps)[..., None]
  return output.swapaxes(1, 2).astype(value.dtype)


def _attend(q, k, v, pairs, distance, options, relative, memory):
  """[B, H, C, T, V]: what each cluster gives each query; 0 where it shows it no key."""
  logits = options.scale * jnp.einsum("...ik,...jk->...ij", q, k, precision="highest")
  limit = 0
  if relative is not None:
    limit = relative[0].shape[0] // 2
    offset = jnp.clip(distance, -limit, limit) + limit
    logits += jnp.take_along_axis(
      jnp.einsum("...ik,rk->...ir", q, relative[0], precision="highest"), offset, axis=-1
    )
  if options.own_pair == "last_resort":
    logits = jnp.where(jnp.eye(q.shape[-2], dtype=bool), OWN_PAIR, logits)
  logits = jnp.where(pairs, logits, -jnp.inf)
  if memory is not None:
    extra = options.scale * jnp.einsum("bhxtk,hcmk->bhctm", q, memory[0], precision="highest")
    logits = jnp.concatenate([extra, logits], axis=-1)
  weights = _softmax(logits)
  learned, weights = weights[..., : weights.shape[-1] - q.shape[-2]], weights[..., -q.shape[-2] :]
  output = jnp.einsum("...ij,...jv->...iv", weights, v, precision="highest")
  if memory is not None:
    output += jnp.einsum("bhctm,hcmv->bhctv", learned, memory[1], precision="highest")
  if relative is not None:
    rows = relative[1][jnp.clip(distance, -limit, limit) + limit]  # [B, H, C, T, T, V]
    output += jnp.einsum("...ij,...ijv->...iv", weights, rows, precision="highest")
  return output


def _beats(s):
  """[..., i, j]: whether i is nearer to the centroid than j; the earlier of equals is."""
  place = jnp.arange(s.shape[-1])
  one, other = s[..., :, None], s[..., None, :]
  return (one > other) | ((one == other) & (place[:, None] < place))


def _after(pairs):
  """How many of a row's pairs lie behind each."""
  total = jnp.cumsum(pairs, axis=-1)
  return total[..., -1:] - total


def _softmax(logits):
  """Softmax over the last axis; all 0 where everything is masked."""
  top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return weights / jnp.where(total > 0, total, 1)
