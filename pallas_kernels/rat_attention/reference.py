"""RAT attention as it is defined: one token after the other. The oracle; never optimised."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..rotary import rotary_tables, rotate
from .state import RatState


def rat_attention_reference(
  query: Float[Array, "B T G K"],
  key: Float[Array, "B T G K"],
  value: Float[Array, "B T H K"],
  gate_logits: Float[Array, "B T H K"],
  gate_bias: Float[Array, "H K"],
  output_logits: Float[Array, "B T H K"] | None,
  initial_state: RatState,
  segments: Int[Array, "B T"],
  lengths: Int[Array, " B"],
  chunk_size: int,
  rotary_base: float | None,
) -> tuple[Float[Array, "B T H K"], RatState]:
  """The recurrence of the running chunk, then softmax over it and the finished chunks.

  Computes in the dtype of the state's running sums. `segments` counts documents from 0; the initial
  state belongs to document 0. Positions at or past `lengths` give 0 and leave the state alone.
  """
  dtype = initial_state.running_key.dtype
  heads, dim = value.shape[2:]
  slots = initial_state.key.shape[1]
  tiled = [jnp.tile(x, (1, 1, heads // x.shape[2], 1)) for x in (query, key)]
  tokens = [jnp.moveaxis(x, 1, 0).astype(dtype) for x in (*tiled, value, gate_logits)]

  def token(carry, inputs):
    state, segment = carry
    t, q, k, v, gate, seg = inputs
    fresh = (seg != segment)[:, None, None]
    position = jnp.where(seg != segment, 0, state.position)
    row, chunk = position % chunk_size, position // chunk_size
    started = fresh | (row == 0)[:, None, None]
    g = jax.nn.sigmoid(gate + gate_bias.astype(dtype))  # [B, H, K]
    running_key = jnp.where(started, 0, g * state.running_key) + (1 - g) * k
    running_value = jnp.where(started, 0, g * state.running_value) + (1 - g) * v
    turn = rotary_tables(chunk[:, None], dim, rotary_base, dtype)  # [B, 1, K / 2]
    q, rotated = rotate(q, turn), rotate(running_key, turn)
    seen = (jnp.arange(slots) < chunk[:, None])[:, None]  # [B, 1, S]
    scores = jnp.einsum("bhk,bshk->bhs", q, state.key, precision="highest")
    scores = jnp.where(seen, scores, -jnp.inf)
    own = jnp.sum(q * rotated, -1, keepdims=True)
    weights = jax.nn.softmax(jnp.concatenate([scores, own], -1) * dim**-0.5, -1)
    output = weights[..., -1:] * running_value
    output += jnp.einsum("bhs,bshk->bhk", weights[..., :-1], state.value, precision="highest")
    ends = (jnp.arange(slots) == chunk[:, None]) & (row == chunk_size - 1)[:, None]  # [B, S]
    after = RatState(
      jnp.where(ends[..., None, None], rotated[:, None], state.key),
      jnp.where(ends[..., None, None], running_value[:, None], state.value),
      running_key,
      running_value,
      position + 1,
    )
    real = t < lengths
    after = jax.tree.map(functools.partial(_where, real), after, state)
    return (after, jnp.where(real, seg, segment)), jnp.where(real[:, None, None], output, 0)

  summaries = dict(key=initial_state.key.astype(dtype), value=initial_state.value.astype(dtype))
  start = initial_state._replace(**summaries)
  steps = (jnp.arange(query.shape[1]), *tokens, segments.T)
  (state, _), output = jax.lax.scan(token, (start, jnp.zeros_like(segments[:, 0])), steps)
  output = jnp.moveaxis(output, 0, 1)
  filled = (jnp.arange(slots) < (state.position // chunk_size)[:, None])[..., None, None]
  state = state._replace(**{n: jnp.where(filled, getattr(state, n), 0) for n in ("key", "value")})
  if output_logits is not None:
    output *= jax.nn.sigmoid(output_logits.astype(dtype))
  return output, state


def _where(rows, new, old):
  return jnp.where(rows.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
