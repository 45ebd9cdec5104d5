"""Softplus attention, one token at a time: what decoding runs."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..sliding_window_attention.history import group_queries
from ..sliding_window_attention.step import store
from ..softmax_attention.cache import CacheState, spoil_overflow
from .api import unit
from .reference import factor
from .variants import LSSAR, Variant
from .weights import row_weights


def softplus_attention_step(
  query: Float[Array, "B H K"],
  key: Float[Array, "B G K"],
  value: Float[Array, "B G V"],
  state: CacheState,
  *,
  variant: Variant = LSSAR,
) -> tuple[Float[Array, "B H V"], CacheState]:
  """`softplus_attention` for one more token of the state's document; (output, new state).

  The cache keeps unit keys; the scale depends on the query's position alone, so they never change.
  Bound by reading the cache. Donate `state` to update it in place.
  """
  wide = jnp.promote_types(value.dtype, jnp.float32)
  slots, groups = state.key.shape[1:3]
  if variant.unit:
    query, key = unit(query, variant.unit_eps), unit(key, variant.unit_eps)
  # The own key beside the cache, which need not have a slot for it.
  q = group_queries(query, groups).astype(key.dtype)  # [B, G, R, K]
  products = jnp.einsum("bgrk,bsgk->bgrs", q, state.key, preferred_element_type=wide)
  own = jnp.sum(q.astype(wide) * key[:, :, None].astype(wide), -1, keepdims=True)
  n = (state.count + 1).astype(wide)[:, None, None, None]
  scores = factor(variant, n, key.shape[-1]) * jnp.concatenate([products, own], -1)
  if variant.score_bias:
    scores -= jnp.log(n)
  seen = jnp.arange(slots + 1) < state.count[:, None]
  seen = seen.at[:, slots].set(True)[:, None, None]
  weights, total = row_weights(scores, seen, n, variant)
  stored, mine = weights[..., :-1].astype(value.dtype), weights[..., -1:]
  # Empty slots may hold anything: 0 times it must be 0.
  values = jnp.where(seen[:, 0, 0, :slots, None, None], state.value, 0)
  output = jnp.einsum("bgrs,bsgv->bgrv", stored, values, preferred_element_type=wide)
  output = (output + mine * value[:, :, None]) / total
  output = output.reshape(query.shape[0], query.shape[1], -1).astype(value.dtype)
  output = spoil_overflow(output, state.count, slots)
  new_key, new_value = store(state.key, key, state.count), store(state.value, value, state.count)
  return output, CacheState(new_key, new_value, state.count + 1)
