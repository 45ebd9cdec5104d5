"""Block attention, one token at a time: what decoding runs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..routed_attention.attend import attend_members
from ..routed_attention.options import Routing
from ..sliding_window_attention.step import store
from ..sliding_window_attention.window import WindowState, slot_numbers
from .api import block_window


def block_attention_step(
  query: Float[Array, "B H K"],
  key: Float[Array, "B H K"],
  value: Float[Array, "B H V"],
  state: WindowState,
  *,
  block_size: int,
  look_back: int | None = None,
  scale: float | None = None,
  relative_keys: Float[Array, "R K"] | None = None,
  relative_values: Float[Array, "R V"] | None = None,
) -> tuple[Float[Array, "B H V"], WindowState]:
  """`block_attention` for one more token of the state's document; (output, new state)."""
  back = block_size if look_back is None else look_back
  left, count = block_window(block_size, back), state.count
  if state.key.shape[1] != left:
    raise ValueError(
      f"block_attention_step: state must have look_back + block_size - 1 = {left} slots; got"
      f" {state.key.shape[1]} (use the state of a call with the same sizes)"
    )
  number = slot_numbers(count, left)  # of the token in each slot, [B, left]
  first = count - count % block_size - back
  seen = (number >= 0) & (number >= first[:, None])
  distance = jnp.pad(number - count[:, None], ((0, 0), (0, 1)))
  seen = jnp.pad(seen, ((0, 0), (0, 1)), constant_values=True)

  def keys(stored, new):  # [B, H, left + 1, K], the new one last; what nobody stored is 0
    stored = jnp.where((number >= 0)[..., None, None], stored, 0)
    return jnp.concatenate([stored.astype(new.dtype), new[:, None]], axis=1).swapaxes(1, 2)

  options = Routing(1, "official", scale=query.shape[-1] ** -0.5 if scale is None else scale)
  relative: tuple[jax.Array, jax.Array] | None = None
  if relative_keys is not None and relative_values is not None:
    relative = (relative_keys, relative_values)
  output = attend_members(
    query[:, :, None], keys(state.key, key), keys(state.value, value),
    seen[:, None, None], jnp.zeros((), bool), distance[:, None, None], options, relative, None,
  )[:, :, 0]  # fmt: skip
  if left:
    slot = count % left
    state = WindowState(store(state.key, key, slot), store(state.value, value, slot), count)
  return output.astype(value.dtype), state._replace(count=count + 1)
