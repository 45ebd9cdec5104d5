"""Taylor attention as it is defined: one token after the other. The oracle; never optimised."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def taylor_attention_reference(
  query: Float[Array, "B T H F"],
  key: Float[Array, "B T H F"],
  value: Float[Array, "B T H V"],
  log_decay: Float[Array, " H"] | None,
  initial_state: Float[Array, "B H P V1"],
  segments: Int[Array, "B T"],
  lengths: Int[Array, " B"],
  normalize: bool,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H P V1"]]:
  """Adds phi(k_t) [v_t, 1]^T to the state, then reads it with phi(q_t); dtype of `initial_state`.

  `segments` counts documents from 0; the initial state belongs to document 0. Positions at or past
  `lengths` give 0 and leave the state alone. The decay acts on the value columns only.
  """
  dtype, (heads, dim) = initial_state.dtype, query.shape[2:]
  rate = jnp.zeros(heads, dtype) if log_decay is None else log_decay.astype(dtype)
  columns = jnp.arange(value.shape[3] + 1) < value.shape[3]
  decay = jnp.where(columns, jnp.exp(rate)[:, None, None], 1)  # [H, 1, V + 1]
  query, key, value = (jnp.moveaxis(x, 1, 0).astype(dtype) for x in (query, key, value))
  i, j = np.triu_indices(dim)
  coefficients = jnp.asarray(np.where(i == j, 0.5, 1.0) / dim, dtype)

  def features(x):
    return [jnp.ones_like(x[..., :1]), x, x[..., i] * x[..., j]]

  def token(carry, inputs):
    state, segment = carry
    t, q, k, v, seg = inputs
    kept = jnp.where((seg == segment)[:, None, None, None], state, 0)
    ones = jnp.ones_like(v[..., :1])
    k = jnp.concatenate(features(k), -1)  # [B, H, P]
    updated = decay * kept + k[..., :, None] * jnp.concatenate([v, ones], -1)[..., None, :]
    one, first, second = features(q)
    q = jnp.concatenate([one, first / jnp.sqrt(jnp.asarray(dim, dtype)), coefficients * second], -1)
    output = jnp.einsum("bhp,bhpv->bhv", q, updated, precision="highest")
    real = t < lengths
    # Padding has no weights to be divided by.
    total = jnp.where(real[:, None, None], output[..., -1:], 1)
    output = output[..., :-1] / total if normalize else output[..., :-1]
    state = jnp.where(real[:, None, None, None], updated, state)
    return (state, jnp.where(real, seg, segment)), jnp.where(real[:, None, None], output, 0)

  steps = (jnp.arange(query.shape[0]), query, key, value, segments.T)
  (state, _), output = jax.lax.scan(token, (initial_state, jnp.zeros_like(segments[:, 0])), steps)
  return jnp.moveaxis(output, 0, 1), state
