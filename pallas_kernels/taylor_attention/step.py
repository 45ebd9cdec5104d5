"""Taylor attention, one token at a time: what decoding runs."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .features import key_features, query_features


def taylor_attention_step(
  query: Float[Array, "B H F"],
  key: Float[Array, "B H F"],
  value: Float[Array, "B H V"],
  log_decay: Float[Array, " H"] | None,
  state: Float[Array, "B H P V1"],
  *,
  normalize: bool = True,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H P V1"]]:
  """S' = decay S + phi(k) [v, 1]^T and [num, den] = phi(q) S'; returns (num / den, S').

  float32 inside (the counting entry of a bfloat16 state would stop at 256). Costs about
  4 P (V + 1) FLOPs per head and is bound by reading and writing the float32 state once, which one
  fused elementwise pass on every platform does; donate `state` to update it in place.
  """
  q, k, v = (x.astype(state.dtype) for x in (query, key, value))
  if log_decay is not None:
    rate = log_decay.astype(state.dtype)[:, None, None]
    values = jnp.arange(state.shape[-1]) < value.shape[-1]  # the normaliser does not decay
    state = jnp.where(values, jnp.exp(rate), 1) * state
  v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)  # [B, H, V + 1]
  state = state + key_features(k)[..., :, None] * v[..., None, :]  # [B, H, P, V + 1]
  output = jnp.sum(query_features(q)[..., :, None] * state, axis=-2)
  output = output[..., :-1] / output[..., -1:] if normalize else output[..., :-1]
  return output.astype(value.dtype), state
