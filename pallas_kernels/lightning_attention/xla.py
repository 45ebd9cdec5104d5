"""Lightning attention in plain XLA: one scan over chunks, matrix products inside a chunk.

The portable path (CPU, and any platform without a kernel). Forward and backward both carry only
the [K, V] state from chunk to chunk, so time and memory are linear in T. Each step cuts its chunk
out of the arrays as they are given and brings the heads forward there, in cache: transposing whole
arrays first took 20 to 50 % longer on a CPU.

The symbols of the comments are those of `chunks.py`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..chunks import chunk_weights, cut_chunk, join_chunks
from ..dots import einsum_f32
from ..segments import pad_length

# Forward and backward on a CPU, K = V = 32, 64 and 128: 64 is the fastest of 32, 64, 128 and 256.
DEFAULT_CHUNK = 64


class Residuals(NamedTuple):
  """What the backward sweep needs. `states` is the state before each chunk, [N, B, H, K, V]."""

  query: Float[Array, "B T H K"]
  key: Float[Array, "B T H K"]
  value: Float[Array, "B T H V"]
  log_decay: Float[Array, " H"]
  segments: Int[Array, "B T"] | None
  lengths: Int[Array, " B"] | None
  states: Float[Array, "N B H K V"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def lightning_attention_xla(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T H K"],
  value: Float[Array, "B T H V"],
  log_decay: Float[Array, " H"],
  initial_state: Float[Array, "B H K V"],
  segments: Int[Array, "B T"] | None,
  lengths: Int[Array, " B"] | None,
  chunk_size: int = DEFAULT_CHUNK,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """Output and final state; the arguments are those of `lightning_attention_reference`."""
  args = (query, key, value, log_decay, initial_state, segments, lengths, chunk_size)
  return _forward(*args)[0]


def _forward(query, key, value, log_decay, initial_state, segments, lengths, chunk_size):
  length = query.shape[1]
  chunk = min(chunk_size, length)
  weights = chunk_weights(log_decay, chunk, segments, lengths, length)

  def step(state, index):
    q, k, v = (cut_chunk(x, index, chunk) for x in padded)  # [B, H, C, D]
    w = weights(index)
    scores = (einsum_f32("bhck,bhdk->bhcd", q, k) * w.mask).astype(v.dtype)  # [B, H, C, C]
    output = einsum_f32("bhcd,bhdv->bhcv", scores, v)
    output += w.up * einsum_f32("bhck,bhkv->bhcv", q, state)
    added = einsum_f32("bhck,bhcv->bhkv", (w.down * k).astype(k.dtype), v)
    output = (w.real * output).astype(v.dtype).swapaxes(1, 2)  # [B, C, H, V]
    return w.carry * state + added, (output, state)

  padded = tuple(pad_length(x, chunk) for x in (query, key, value))
  indices = jnp.arange(padded[0].shape[1] // chunk)
  final_state, (output, states) = jax.lax.scan(step, initial_state, indices)
  residuals = Residuals(query, key, value, log_decay, segments, lengths, states)
  return (join_chunks(output, length), final_state), residuals


def _backward(chunk_size, residuals, cotangents):
  query, key, value, log_decay, segments, lengths, states = residuals
  d_output, d_final_state = cotangents
  length = query.shape[1]
  chunk = min(chunk_size, length)
  weights = chunk_weights(log_decay, chunk, segments, lengths, length)
  row = jnp.arange(chunk)
  distance = row[:, None] - row  # [C, C]

  def step(carry, inputs):
    d_state, d_decay = carry  # cotangent of the state after the chunk
    index, state = inputs
    q, k, v, do = (cut_chunk(x, index, chunk) for x in padded)
    w = weights(index)
    do = (w.real * do).astype(do.dtype)
    masked_scores = einsum_f32("bhck,bhdk->bhcd", q, k) * w.mask
    products = einsum_f32("bhcv,bhdv->bhcd", do, v)
    scores, d_scores = masked_scores.astype(v.dtype), (products * w.mask).astype(q.dtype)
    q_state = w.up * einsum_f32("bhcv,bhkv->bhck", do, state)
    k_state = w.down * einsum_f32("bhcv,bhkv->bhck", v, d_state)
    dq = einsum_f32("bhcd,bhdk->bhck", d_scores, k) + q_state
    dk = einsum_f32("bhcd,bhck->bhdk", d_scores, q) + k_state
    dv = einsum_f32("bhcd,bhcv->bhdv", scores, do)
    dv += w.down * einsum_f32("bhck,bhkv->bhcv", k, d_state)
    # Every decay^m above contributes m times its term.
    last = jnp.maximum(w.count - 1 - row[:, None], 0)
    d_decay += jnp.sum(distance * masked_scores * products, (0, 2, 3))
    d_decay += jnp.sum((row[:, None] + 1) * q * q_state + last * k * k_state, (0, 2, 3))
    d_decay += jnp.sum(w.count * w.carry * state * d_state, (0, 2, 3))
    added = einsum_f32("bhck,bhcv->bhkv", (w.up * w.real * q).astype(q.dtype), do)
    grads = tuple(x.astype(q.dtype).swapaxes(1, 2) for x in (dq, dk, dv))  # [B, C, H, D]
    return (w.carry * d_state + added, d_decay), grads

  padded = tuple(pad_length(x, chunk) for x in (query, key, value, d_output))
  start = (d_final_state, jnp.zeros_like(log_decay))
  inputs = (jnp.arange(states.shape[0]), states)
  (d_state, d_decay), grads = jax.lax.scan(step, start, inputs, reverse=True)
  return (*(join_chunks(x, length) for x in grads), d_decay, d_state, None, None)


lightning_attention_xla.defvjp(_forward, _backward)
