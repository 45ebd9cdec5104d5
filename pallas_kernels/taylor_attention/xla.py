"""Taylor attention in plain XLA: one scan over chunks, matrix products inside a chunk.

The portable path (CPU, and any platform without a kernel). Weights inside a chunk are the
polynomial of the scores; everything before it is one [P, V + 1] state per head, whose last column
sums the weights. Features exist for one chunk at a time. Time and memory are linear in T.

The symbols of the comments are those of `chunks.py`; P features, see `features.py`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..chunks import chunk_weights, cut_chunk, join_chunks
from ..dots import einsum_f32
from ..segments import pad_length
from .features import features_transposed, key_features, query_coefficients, query_features

DEFAULT_CHUNK = 128


class Residuals(NamedTuple):
  """What the backward sweep needs. `states` is the state before each chunk, [N, B, H, P, V + 1]."""

  query: Float[Array, "B T H F"]
  key: Float[Array, "B T H F"]
  value: Float[Array, "B T H V"]
  log_decay: Float[Array, " H"] | None
  segments: Int[Array, "B T"] | None
  lengths: Int[Array, " B"] | None
  output: Float[Array, "B T H V"]
  total: Float[Array, "B T H 1"]  # the sum of the weights
  states: Float[Array, "N B H P V1"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def taylor_attention_xla(
  query: Float[Array, "B T H F"],
  key: Float[Array, "B T H F"],
  value: Float[Array, "B T H V"],
  log_decay: Float[Array, " H"] | None,
  initial_state: Float[Array, "B H P V1"],
  segments: Int[Array, "B T"] | None,
  lengths: Int[Array, " B"] | None,
  normalize: bool,
  chunk_size: int = DEFAULT_CHUNK,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H P V1"]]:
  """Output and final state; the arguments are those of `taylor_attention_reference`."""
  args = (query, key, value, log_decay, initial_state, segments, lengths, normalize, chunk_size)
  return _forward(*args)[0]


def _forward(query, key, value, log_decay, initial_state, segments, lengths, normalize, chunk_size):
  length = query.shape[1]
  chunk = min(chunk_size, length)
  weights = _two_weights(log_decay, chunk, segments, lengths, length, initial_state.dtype)

  def step(state, index):
    q, k, v = (cut_chunk(x, index, chunk) for x in padded)  # [B, H, C, D]
    w, plain = weights(index)
    _, polynomial = _polynomial(q, k)  # [B, H, C, C]
    read = einsum_f32("bhcp,bhpv->bhcv", query_features(q), state)  # [B, H, C, V + 1]
    output = einsum_f32("bhcd,bhdv->bhcv", (polynomial * w.mask).astype(v.dtype), v)
    output += w.up * read[..., :-1]
    total = _row_sum(polynomial * plain.mask, v.dtype) + plain.up * read[..., -1:]
    total = jnp.where(plain.real > 0, total, 1)  # padding has no weights to be divided by
    added = einsum_f32("bhcp,bhcv->bhpv", key_features(k), _extended(w.down * v, plain.down))
    after = _columns(w.carry, plain.carry, state) * state + added
    output = plain.real * (output / total if normalize else output)
    return after, (output.astype(v.dtype).swapaxes(1, 2), total.swapaxes(1, 2), state)

  padded = tuple(pad_length(x, chunk) for x in (query, key, value))
  indices = jnp.arange(padded[0].shape[1] // chunk)
  final_state, (output, total, states) = jax.lax.scan(step, initial_state, indices)
  output, total = join_chunks(output, length), join_chunks(total, length)
  residuals = Residuals(query, key, value, log_decay, segments, lengths, output, total, states)
  return (output, final_state), residuals


def _backward(normalize, chunk_size, residuals, cotangents):
  query, key, value, log_decay, segments, lengths, output, total, states = residuals
  d_output, d_final_state = cotangents
  length, scale = query.shape[1], query.shape[3] ** -0.5
  chunk = min(chunk_size, length)
  weights = _two_weights(log_decay, chunk, segments, lengths, length, states.dtype)
  row = jnp.arange(chunk)
  distance = row[:, None] - row  # [C, C]
  coefficients = jnp.asarray(query_coefficients(query.shape[3]), states.dtype)

  def step(carry, inputs):
    d_state, d_decay = carry  # cotangent of the state after the chunk
    index, state = inputs
    q, k, v, do, o, den = (cut_chunk(x, index, chunk) for x in padded)
    w, plain = weights(index)
    do, d_den = _numerator_cotangent(do, o, den, plain.real, normalize)
    s, polynomial = _polynomial(q, k)
    products = einsum_f32("bhcv,bhdv->bhcd", do, v)
    d_scores = ((products * w.mask + d_den * plain.mask) * (1 + s)).astype(q.dtype)
    phi_q, phi_k = query_features(q), key_features(k)
    values = _extended(w.down * v, plain.down)
    d_read = _extended(w.up * do, plain.up * d_den, q.dtype)  # [B, H, C, V + 1]
    d_phi_q = einsum_f32("bhcv,bhpv->bhcp", d_read, state)
    d_phi_k = einsum_f32("bhcv,bhpv->bhcp", values, d_state)
    dq = scale * einsum_f32("bhcd,bhdk->bhck", d_scores, k)
    dq += features_transposed(q, d_phi_q * coefficients)
    dk = scale * einsum_f32("bhcd,bhck->bhdk", d_scores, q) + features_transposed(k, d_phi_k)
    dv = einsum_f32("bhcd,bhcv->bhdv", (polynomial * w.mask).astype(v.dtype), do)
    dv += w.down * einsum_f32("bhcp,bhpv->bhcv", phi_k, d_state[..., :-1])
    if log_decay is not None:  # every decay^m above contributes m times its term
      last = jnp.maximum(w.count - 1 - row[:, None], 0)
      from_state = einsum_f32("bhcp,bhpv->bhcv", phi_q, state[..., :-1])
      to_state = einsum_f32("bhcp,bhpv->bhcv", phi_k, d_state[..., :-1])
      d_decay += jnp.sum(distance * polynomial * w.mask * products, (0, 2, 3))
      d_decay += jnp.sum((row[:, None] + 1) * w.up * do * from_state, (0, 2, 3))
      d_decay += jnp.sum(last * w.down * v * to_state, (0, 2, 3))
      d_decay += jnp.sum((w.count * w.carry * state * d_state)[..., :-1], (0, 2, 3))
    added = einsum_f32("bhcp,bhcv->bhpv", phi_q, d_read)
    grads = tuple(x.astype(q.dtype).swapaxes(1, 2) for x in (dq, dk, dv))  # [B, C, H, D]
    return (_columns(w.carry, plain.carry, d_state) * d_state + added, d_decay), grads

  padded = tuple(pad_length(x, chunk) for x in (query, key, value, d_output, output))
  padded = (*padded, pad_length(total, chunk, value=1))
  start = (d_final_state, jnp.zeros(query.shape[2], states.dtype))
  inputs = (jnp.arange(states.shape[0]), states)
  (d_state, d_decay), grads = jax.lax.scan(step, start, inputs, reverse=True)
  d_decay = None if log_decay is None else d_decay
  return (*(join_chunks(x, length) for x in grads), d_decay, d_state, None, None)


taylor_attention_xla.defvjp(_forward, _backward)


def _two_weights(log_decay, chunk, segments, lengths, length, dtype):
  """From a chunk's index to (the factors of the values, those of the normaliser)."""
  plain = chunk_weights(jnp.zeros(1, dtype), chunk, segments, lengths, length)
  if log_decay is None:
    return lambda index: (plain(index),) * 2
  decayed = chunk_weights(log_decay, chunk, segments, lengths, length)
  return lambda index: (decayed(index), plain(index))


def _polynomial(q, k):
  """(s, 1 + s + s^2 / 2) of the scores of one chunk, [B, H, C, C]."""
  s = q.shape[-1] ** -0.5 * einsum_f32("bhck,bhdk->bhcd", q, k)
  return s, 1 + s + 0.5 * s * s


def _row_sum(weights, dtype):
  """Sums what is multiplied with the values, rounded as it is there: weights average exactly."""
  return jnp.sum(weights.astype(dtype).astype(weights.dtype), -1, keepdims=True)


def _extended(values, ones, dtype=None):
  """[values, ones] along the last axis, in the dtype of the products."""
  dtype = values.dtype if dtype is None else dtype
  ones = jnp.broadcast_to(ones, (*values.shape[:-1], 1))
  return jnp.concatenate([values.astype(dtype), ones.astype(dtype)], -1)


def _columns(values, ones, state):
  """A factor per column of the state: `values` for all but the last."""
  return jnp.where(jnp.arange(state.shape[-1]) < state.shape[-1] - 1, values, ones)


def _numerator_cotangent(d_output, output, total, real, normalize):
  """Cotangents of the sum of weighted values and of the sum of weights: o = num / den."""
  wide = real * d_output
  if not normalize:
    return wide.astype(d_output.dtype), jnp.zeros_like(total)
  d_total = -jnp.sum(wide * output, -1, keepdims=True) / total
  return (wide / total).astype(d_output.dtype), d_total
