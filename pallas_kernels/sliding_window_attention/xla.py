"""Sliding-window attention in plain XLA: a scan over chunks of queries, each with its slab of keys.

The portable path (CPU, and any platform without a kernel). C queries see the C + left keys up to
the last of them, so time and memory are linear in T, forward and backward. The scan cuts its chunk
out of the arrays as they are given and brings the heads forward there, in cache. The backward
recomputes the weights of a chunk from the saved log-sum-exp; it runs from the last chunk to the
first and carries the gradient of the `left` keys that a chunk shares with the ones after it.
Differentiating the scan instead would store that carry for every chunk, or, where slices of whole
arrays are differentiated, add up whole arrays per chunk: quadratic in T.

Symbols of the comments: C queries per chunk, D = E + C keys in its slab (E is `left`, or what there
is if that is less), G key heads with R query heads each, P rows of the mask (B, or 1 where all rows
are alike).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..chunks import cut_chunk, join_chunks
from ..dots import einsum_f32
from ..segments import pad_length

# Forward and backward on a CPU, head_dim 64, windows of 16 to 512: no slower than 32 and 128.
DEFAULT_CHUNK = 64


class Residuals(NamedTuple):
  """What the backward sweep needs."""

  query: Float[Array, "B T H K"]
  key: Float[Array, "B S G K"]
  value: Float[Array, "B S G V"]
  documents: Int[Array, "B S"] | None
  log_sum: Float[Array, "N B G RC"]  # log-sum-exp of each query's scores


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def window_attention_xla(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B S G K"],
  value: Float[Array, "B S G V"],
  documents: Int[Array, "B S"] | None,
  left: int,
  scale: float,
  chunk_size: int,
) -> Float[Array, "B T H V"]:
  """Output. Query i sits at key S - T + i and sees it and the `left` before, of its document.

  `documents` None: there is only one.
  """
  return _forward(query, key, value, documents, left, scale, chunk_size)[0]


def _forward(query, key, value, documents, left, scale, chunk_size):
  length = query.shape[1]
  chunk, reach, front = _sizes(query, key, left, chunk_size)
  mask = _mask_function(documents, front, length, left, reach, chunk)
  queries = pad_length(query, chunk)
  keys, values = (_pad(x, front, -length % chunk) for x in (key, value))

  def step(_, index):
    q = _cut_queries(queries, index, chunk, key.shape[2])  # [B, G, R C, K]
    k, v = (_cut_slab(x, index, chunk, reach) for x in (keys, values))  # [B, G, D, .]
    scores = _masked(scale * einsum_f32("bgck,bgdk->bgcd", q, k), mask(index))
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    output = einsum_f32("bgcd,bgdv->bgcv", weights.astype(v.dtype), v) / total
    output = _uncut_queries(output.astype(v.dtype), query.shape[2])  # [B, C, H, V]
    return None, (output, (largest + jnp.log(total))[..., 0])

  _, (output, log_sum) = jax.lax.scan(step, None, jnp.arange(queries.shape[1] // chunk))
  return join_chunks(output, length), Residuals(query, key, value, documents, log_sum)


def _backward(left, scale, chunk_size, residuals, d_output):
  query, key, value, documents, log_sum = residuals
  length = query.shape[1]
  (batch, _, groups, key_dim), value_dim = key.shape, value.shape[3]
  chunk, reach, front = _sizes(query, key, left, chunk_size)
  mask = _mask_function(documents, front, length, left, reach, chunk)
  queries, d_outputs = (pad_length(x, chunk) for x in (query, d_output))
  keys, values = (_pad(x, front, -length % chunk) for x in (key, value))

  def step(carry, inputs):
    index, log_sum = inputs
    q, do = (_cut_queries(x, index, chunk, groups) for x in (queries, d_outputs))
    k, v = (_cut_slab(x, index, chunk, reach) for x in (keys, values))
    scores = _masked(scale * einsum_f32("bgck,bgdk->bgcd", q, k), mask(index))
    weights = jnp.exp(scores - log_sum[..., None])  # [B, G, R C, D]
    d_weights = einsum_f32("bgcv,bgdv->bgcd", do, v)
    mean = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
    d_scores = (scale * weights * (d_weights - mean)).astype(q.dtype)
    dq = einsum_f32("bgcd,bgdk->bgck", d_scores, k)
    dk = einsum_f32("bgcd,bgck->bgdk", d_scores, q)
    dv = einsum_f32("bgcd,bgcv->bgdv", weights.astype(v.dtype), do)
    # The slab's last E keys are the next slab's first.
    front_of_slab = ((0, 0), (0, 0), (chunk, 0), (0, 0))
    dk, dv = (x + jnp.pad(later, front_of_slab) for x, later in zip((dk, dv), carry, strict=True))
    own = tuple(x[:, :, reach:].astype(key.dtype).swapaxes(1, 2) for x in (dk, dv))
    dq = _uncut_queries(dq.astype(query.dtype), query.shape[2])
    return tuple(x[:, :, :reach] for x in (dk, dv)), (dq, *own)

  dtype = jnp.promote_types(query.dtype, jnp.float32)
  zero = tuple(jnp.zeros((batch, groups, reach, n), dtype) for n in (key_dim, value_dim))
  indices = jnp.arange(queries.shape[1] // chunk)
  before, (dq, dk, dv) = jax.lax.scan(step, zero, (indices, log_sum), reverse=True)
  # Slabs start with the padding in front; what follows it is stored keys, then those of the call.
  before = (x.astype(key.dtype).swapaxes(1, 2) for x in before)
  dk, dv = (
    jnp.concatenate([first, join_chunks(rest, length)], axis=1)[:, front:]
    for first, rest in zip(before, (dk, dv), strict=True)
  )
  return join_chunks(dq, length), dk, dv, None


window_attention_xla.defvjp(_forward, _backward)


def _sizes(query, key, left, chunk_size):
  """(C, E, padding before the first key so that there are E before the first query's)."""
  length, keys = query.shape[1], key.shape[1]
  stored = keys - length
  reach = max(min(left, keys - 1), stored)
  return min(chunk_size, length), reach, reach - stored


def _pad(x, front, end):
  return jnp.pad(x, ((0, 0), (front, end), (0, 0), (0, 0)))


def _mask_function(documents, front, length, left, reach, chunk):
  """Returns the function from a chunk's index to its mask [P, 1, 1, C, D]."""
  row, column = jnp.arange(chunk)[:, None] + reach, jnp.arange(chunk + reach)
  band = ((column >= row - left) & (column <= row))[None, None, None]
  if documents is None:
    # Padding behind is seen by queries of padding only.
    return lambda index: band & (column >= front - index * chunk)
  documents = jnp.pad(documents, ((0, 0), (front, 0)), constant_values=-1)
  # Padding behind is a document of its own: every query sees at least its own key.
  documents = jnp.pad(documents, ((0, 0), (0, -length % chunk)), constant_values=-2)

  def mask(index):
    here = jax.lax.dynamic_slice_in_dim(documents, index * chunk, chunk + reach, axis=1)  # [P, D]
    same = (here[:, reach:, None] == here[:, None, :])[:, None, None]
    # Made once, and not anew for every head by the loop that it would be fused into.
    return jax.lax.optimization_barrier(band & same)

  return mask


def _masked(scores, mask):
  """scores [B, G, R C, D]; mask [P, 1, 1, C, D]."""
  batch, groups, rows, width = scores.shape
  split = scores.reshape(batch, groups, -1, mask.shape[3], width)
  return jnp.where(mask, split, -jnp.inf).reshape(scores.shape)


def _cut_queries(x, index, chunk, groups):
  """[B, N C, H, K] -> [B, G, R C, K], the queries of one key head together."""
  batch, _, heads, dim = x.shape
  return cut_chunk(x, index, chunk).reshape(batch, groups, heads // groups * chunk, dim)


def _uncut_queries(x, heads):
  """[B, G, R C, K] -> [B, C, H, K]."""
  batch, _, _, dim = x.shape
  return x.reshape(batch, heads, -1, dim).swapaxes(1, 2)


def _cut_slab(x, index, chunk, reach):
  """[B, E + N C, G, K] -> [B, G, D, K]."""
  slab = jax.lax.dynamic_slice_in_dim(x, index * chunk, reach + chunk, axis=1)
  return slab.swapaxes(1, 2)
