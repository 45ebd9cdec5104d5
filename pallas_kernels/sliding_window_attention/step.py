"""One token: what decoding runs. The attention over a store is shared with softmax_attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .history import group_queries
from .window import WindowState, filled_slots


def sliding_window_attention_step(
  query: Float[Array, "B H K"],
  key: Float[Array, "B G K"],
  value: Float[Array, "B G V"],
  state: WindowState,
  *,
  left: int,
  scale: float | None = None,
) -> tuple[Float[Array, "B H V"], WindowState]:
  """`sliding_window_attention` for one more token of the state's document; (output, new state).

  Softmax over the token's own key and the filled slots, in float32; the token then takes the slot
  of the oldest one. 2 H (left + 1) (K + V) FLOPs per row, bound by reading the buffer; donate
  `state` to update it in place.
  """
  if state.key.shape[1] != left:
    raise ValueError(
      f"sliding_window_attention_step: state must have left = {left} slots; got "
      f"{state.key.shape[1]} (use the state of a call with the same window)"
    )
  output = attend_stored(query, key, value, state.key, state.value, filled_slots(state), scale)
  count = state.count + 1
  if left == 0:
    return output, state._replace(count=count)
  slot = state.count % left
  return output, WindowState(store(state.key, key, slot), store(state.value, value, slot), count)


def attend_stored(
  query: Float[Array, "B H K"],
  key: Float[Array, "B G K"],
  value: Float[Array, "B G V"],
  stored_key: Float[Array, "B S G K"],
  stored_value: Float[Array, "B S G V"],
  filled: Bool[Array, "B S"],
  scale: float | None,
) -> Float[Array, "B H V"]:
  """Softmax attention of one query per head over its own key and the filled slots of a store."""
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  query = group_queries(query, key.shape[1])  # [B, G, R, K]

  def product(equation, a, b):
    return jnp.einsum(equation, a.astype(dtype), b.astype(dtype), precision="highest")

  own = scale * product("bgrk,bgk->bgr", query, key)[..., None]  # [B, G, R, 1]
  others = scale * product("bgrk,bsgk->bgrs", query, stored_key)
  others = jnp.where(filled[:, None, None], others, -jnp.inf)
  weights = jax.nn.softmax(jnp.concatenate([own, others], axis=-1), axis=-1)
  # Empty slots may hold anything: 0 times it must be 0.
  stored_value = jnp.where(filled[..., None, None], stored_value, 0)
  output = weights[..., :1] * value[:, :, None].astype(dtype)
  output += product("bgrs,bsgv->bgrv", weights[..., 1:], stored_value)
  return output.reshape(*value.shape[:1], -1, value.shape[-1]).astype(value.dtype)


def store(buffer: jax.Array, token: jax.Array, slot: jax.Array) -> jax.Array:
  """[B, S, G, D] with token [B, G, D] in slot [B] of each row; slots past the end store nothing."""
  rows = jnp.arange(buffer.shape[0])
  return buffer.at[rows, slot].set(token.astype(buffer.dtype), mode="drop")
