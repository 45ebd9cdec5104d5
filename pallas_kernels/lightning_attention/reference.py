"""Lightning attention as it is defined: one token after the other. The oracle; never optimised."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def lightning_attention_reference(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T H K"],
  value: Float[Array, "B T H V"],
  log_decay: Float[Array, " H"],
  initial_state: Float[Array, "B H K V"],
  segments: Int[Array, "B T"],
  lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """S_t = exp(log_decay) S_{t-1} + k_t v_t^T and o_t = q_t S_t, in the dtype of `initial_state`.

  `segments` counts documents from 0; the initial state belongs to document 0. Positions at or past
  `lengths` give 0 and leave the state alone.
  """
  dtype = initial_state.dtype
  decay = jnp.exp(log_decay.astype(dtype))[:, None, None]  # [H, 1, 1]
  query, key, value = (jnp.moveaxis(x, 1, 0).astype(dtype) for x in (query, key, value))

  def token(carry, inputs):
    state, segment = carry
    t, q, k, v, seg = inputs
    kept = jnp.where((seg == segment)[:, None, None, None], state, 0)
    updated = decay * kept + k[..., :, None] * v[..., None, :]  # [B, H, K, V]
    output = jnp.einsum("bhk,bhkv->bhv", q, updated, precision="highest")
    real = t < lengths
    state = jnp.where(real[:, None, None, None], updated, state)
    return (state, jnp.where(real, seg, segment)), jnp.where(real[:, None, None], output, 0)

  steps = (jnp.arange(query.shape[0]), query, key, value, segments.T)
  (state, _), output = jax.lax.scan(token, (initial_state, jnp.zeros_like(segments[:, 0])), steps)
  return jnp.moveaxis(output, 0, 1), state
