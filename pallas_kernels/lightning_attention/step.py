"""Lightning attention, one token at a time: what decoding runs."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def lightning_attention_step(
  query: Float[Array, "B H K"],
  key: Float[Array, "B H K"],
  value: Float[Array, "B H V"],
  log_decay: Float[Array, " H"] | None,
  state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
  """S' = exp(log_decay) S + k v^T and o = q S', float32 inside; returns (output, new state).

  Costs about 5 K V FLOPs per head and is bound by reading and writing the float32 state, which one
  fused elementwise pass on every platform does; donate `state` to update it in place.
  Paper: Various Lengths, Constant Speed (2024), section 3.
  """
  q, k, v = (x.astype(state.dtype) for x in (query, key, value))
  decay = 1.0 if log_decay is None else jnp.exp(log_decay.astype(state.dtype))[:, None, None]
  state = decay * state + k[..., :, None] * v[..., None, :]  # [B, H, K, V]
  output = jnp.sum(q[..., :, None] * state, axis=-2)
  return output.astype(value.dtype), state
