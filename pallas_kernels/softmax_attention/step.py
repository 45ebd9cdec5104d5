"""Full attention, one token at a time: what decoding runs."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..sliding_window_attention.step import attend_stored, store
from .cache import CacheState, spoil_overflow


def softmax_attention_step(
  query: Float[Array, "B H K"],
  key: Float[Array, "B G K"],
  value: Float[Array, "B G V"],
  state: CacheState,
  *,
  scale: float | None = None,
) -> tuple[Float[Array, "B H V"], CacheState]:
  """`softmax_attention` for one more token of the state's document; (output, new state).

  Softmax over the token's own key and the filled slots, in float32. Bound by reading the cache, all
  S slots of it; donate `state` to update it in place. A row whose cache was full before gives its
  output still, the token after it NaN.
  """
  slots = state.key.shape[1]
  filled = jnp.arange(slots) < state.count[:, None]
  output = attend_stored(query, key, value, state.key, state.value, filled, scale)
  output = spoil_overflow(output, state.count, slots)
  new_key, new_value = store(state.key, key, state.count), store(state.value, value, state.count)
  return output, CacheState(new_key, new_value, state.count + 1)
