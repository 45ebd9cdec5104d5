"""Softmax over finished chunks and the running one, block by block, for the portable path.

Queries come in blocks of rows; for each, a loop over tiles of summaries keeps a running maximum and
sum that start from the query's own running chunk, which is always seen. The loop's bounds are the
slots that the block's tokens can see, so the work is the causal half, and no [T, chunks] array
exists.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..dots import einsum_f32
from ..segments import pad_length

ROWS, TILE = 256, 256


class Residuals(NamedTuple):
  query: Float[Array, "B T H K"]
  keys: Float[Array, "B S H K"]
  values: Float[Array, "B S H K"]
  own_score: Float[Array, "B T H"]
  own_value: Float[Array, "B T H K"]
  first: Int[Array, "B T"]
  last: Int[Array, "B T"]
  output: Float[Array, "B T H K"]
  top: Float[Array, "B T H"]  # the largest score, and the sum of exp(score - top): their
  total: Float[Array, "B T H"]  # log-sum-exp alone would round away the sum under large scores


@jax.custom_vjp
def attend(
  query: Float[Array, "B T H K"],
  keys: Float[Array, "B S H K"],
  values: Float[Array, "B S H K"],
  own_score: Float[Array, "B T H"],
  own_value: Float[Array, "B T H K"],
  first: Int[Array, "B T"],
  last: Int[Array, "B T"],
) -> Float[Array, "B T H K"]:
  """softmax over [q . keys_s for first <= s < last, own_score] times [values_s, own_value].

  `query` carries the scale. float32 (or wider) out.
  """
  return _forward(query, keys, values, own_score, own_value, first, last)[0]


def _forward(query, keys, values, own_score, own_value, first, last):
  length, wide = query.shape[1], own_value.dtype
  # Computed once: where it is the largest score, exp(own - top) must be exactly 1 both times.
  own_score = jax.lax.optimization_barrier(own_score)
  rows, tile = _sizes(length, keys.shape[1])
  tiles = [_heads_first(pad_length(x, tile)) for x in (keys, values)]  # [B, H, S, K]

  def block(_, parts):
    q, score, value, lo, hi = parts
    q, value = q.swapaxes(1, 2), value.swapaxes(1, 2)  # [B, H, R, K]

    def add(n, carry):
      top, total, acc = carry
      k, v = (jax.lax.dynamic_slice_in_dim(x, n * tile, tile, 2) for x in tiles)
      s = _masked(einsum_f32("bhrk,bhsk->bhrs", q, k), n * tile, lo, hi)
      new_top = jnp.maximum(top, jnp.max(s, -1, keepdims=True))
      p, kept = jnp.exp(s - new_top), jnp.exp(top - new_top)
      acc = kept * acc + einsum_f32("bhrs,bhsk->bhrk", p.astype(v.dtype), v)
      return new_top, kept * total + jnp.sum(p, -1, keepdims=True), acc

    top = score.swapaxes(1, 2)[..., None]  # [B, H, R, 1]
    start = (top, jnp.ones_like(top), value.astype(wide))
    top, total, acc = jax.lax.fori_loop(*_bounds(lo, hi, tile), add, start)
    return None, tuple(x.swapaxes(1, 2) for x in (acc / total, top[..., 0], total[..., 0]))

  blocks = tuple(_split(x, rows) for x in (query, own_score, own_value, first, last))
  results = tuple(_merge(x, length) for x in jax.lax.scan(block, None, blocks)[1])
  return results[0], Residuals(query, keys, values, own_score, own_value, first, last, *results)


def _backward(residuals, d_output):
  query, keys, values, own_score, own_value, first, last, output, top, total = residuals
  length, slots, wide = query.shape[1], keys.shape[1], own_value.dtype
  rows, tile = _sizes(length, slots)
  tiles = [_heads_first(pad_length(x, tile)) for x in (keys, values)]
  delta = jnp.sum(d_output * output, -1)  # [B, T, H]
  own = jnp.exp(own_score - top) / total
  d_own_score = own * (jnp.sum(d_output * own_value, -1) - delta)
  d_own_value = own[..., None] * d_output

  def block(carry, parts):
    q, do, *rows_of, lo, hi = parts
    q, do = q.swapaxes(1, 2), do.swapaxes(1, 2).astype(q.dtype)
    largest, summed, drop = (x.swapaxes(1, 2)[..., None] for x in rows_of)  # [B, H, R, 1]

    def add(n, carry):
      dq, dk, dv = carry
      k, v = (jax.lax.dynamic_slice_in_dim(x, n * tile, tile, 2) for x in tiles)
      s = _masked(einsum_f32("bhrk,bhsk->bhrs", q, k), n * tile, lo, hi)
      p = jnp.exp(s - largest) / summed
      ds = (p * (einsum_f32("bhrk,bhsk->bhrs", do, v) - drop)).astype(q.dtype)
      dq += einsum_f32("bhrs,bhsk->bhrk", ds, k)
      dk = _add_at(dk, einsum_f32("bhrs,bhrk->bhsk", ds, q), n * tile)
      return dq, dk, _add_at(dv, einsum_f32("bhrs,bhrk->bhsk", p.astype(q.dtype), do), n * tile)

    bounds = _bounds(lo, hi, tile)
    dq, *carry = jax.lax.fori_loop(*bounds, add, (jnp.zeros(q.shape, wide), *carry))
    return tuple(carry), dq.swapaxes(1, 2).astype(q.dtype)

  total = pad_length(total, rows, value=1)  # what follows the last row is divided by it
  blocks = tuple(_split(x, rows) for x in (query, d_output, top, total, delta, first, last))
  zeros = jnp.zeros(tiles[0].shape, wide)
  (dk, dv), dq = jax.lax.scan(block, (zeros, zeros), blocks)
  dk, dv = (_heads_first(x)[:, :slots].astype(keys.dtype) for x in (dk, dv))
  return _merge(dq, length), dk, dv, d_own_score, d_own_value, None, None


attend.defvjp(_forward, _backward)


def _sizes(length, slots):
  return min(ROWS, length), min(TILE, slots)


def _bounds(first, last, tile):
  """Tiles that any token of the block sees."""
  return jnp.min(first) // tile, (jnp.max(last) + tile - 1) // tile


def _masked(scores, start, first, last):
  slot = start + jnp.arange(scores.shape[-1])
  seen = (slot >= first[..., None]) & (slot < last[..., None])  # [B, R, tile]
  return jnp.where(seen[:, None], scores, -jnp.inf)


def _add_at(total, part, start):
  old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[2], 2)
  return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, 2)


def _heads_first(x):
  return x.swapaxes(1, 2)


def _split(x, rows):
  """[B, T, ...] -> [N, B, R, ...]; padding sees nothing but itself."""
  x = pad_length(x, rows)
  return jnp.moveaxis(x.reshape(x.shape[0], -1, rows, *x.shape[2:]), 1, 0)


def _merge(x, length):
  """[N, B, R, ...] -> [B, T, ...]."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
