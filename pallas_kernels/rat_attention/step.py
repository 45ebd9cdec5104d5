"""RAT attention, one token at a time: what decoding runs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..rotary import rotary_tables, rotate
from .state import RatState


def rat_attention_step(
  query: Float[Array, "B G K"],
  key: Float[Array, "B G K"],
  value: Float[Array, "B H K"],
  gate_logits: Float[Array, "B H K"],
  gate_bias: Float[Array, "H K"],
  output_logits: Float[Array, "B H K"] | None,
  state: RatState,
  *,
  chunk_size: int,
  rotary_base: float | None = 10000.0,
) -> tuple[Float[Array, "B H K"], RatState]:
  """One more token; returns (output in the dtype of `value`, new state).

  The running sums are float32, and a summary is written once, when its chunk is finished: nothing
  is rounded twice, and a token reads `position / chunk_size` summaries. `state` needs a slot for
  every chunk that will be finished. Donate `state` to update it in place.
  """
  heads, dim = value.shape[1:]
  slots, wide = state.key.shape[1], state.running_key.dtype
  tile = (1, heads // query.shape[1], 1)  # head h has the query and key of group h mod G
  q, k = (jnp.tile(x.astype(wide), tile) for x in (query, key))
  row, chunk = state.position % chunk_size, state.position // chunk_size
  gate = jax.nn.sigmoid(gate_logits.astype(wide) + gate_bias.astype(wide))
  kept = jnp.where((row == 0)[:, None, None], 0, gate)
  running_key = kept * state.running_key + (1 - gate) * k
  running_value = kept * state.running_value + (1 - gate) * value.astype(wide)

  turn = rotary_tables(chunk[:, None], dim, rotary_base, wide)  # [B, 1, K / 2]
  q, rotated = rotate(q, turn), rotate(running_key, turn)
  # Products and sums, not einsum: one query a head is no matrix, and the cache is read as it lies.
  scores = dim**-0.5 * jnp.sum(q[:, None] * state.key.astype(wide), -1)  # [B, S, H]
  seen = (jnp.arange(slots) < chunk[:, None])[..., None]
  scores = jnp.where(seen, scores, -jnp.inf)
  own = dim**-0.5 * jnp.sum(q * rotated, -1)  # [B, H]
  top = jnp.maximum(jnp.max(scores, 1), own)
  weights, own = jnp.exp(scores - top[:, None]), jnp.exp(own - top)
  output = (
    jnp.sum(weights[..., None] * state.value.astype(wide), 1) + own[..., None] * running_value
  )
  output /= (jnp.sum(weights, 1) + own)[..., None]
  if output_logits is not None:
    output *= jax.nn.sigmoid(output_logits.astype(wide))

  # A slot past the end is dropped; so is every write but that of a chunk's last token.
  slot = jnp.where(row == chunk_size - 1, chunk, slots)
  rows = jnp.arange(slot.shape[0])
  key = state.key.at[rows, slot].set(rotated.astype(state.key.dtype), mode="drop")
  value_cache = state.value.at[rows, slot].set(running_value.astype(state.value.dtype), mode="drop")
  state = RatState(key, value_cache, running_key, running_value, state.position + 1)
  return output.astype(value.dtype), state
