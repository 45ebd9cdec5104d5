"""Membership "causal_recent": the portable path, and which path it is.

Where queries and keys have the same centroid, tokens sorted by it are a sliding window: that
operator runs, with its kernels. Where keys have centroids of their own both are sorted, and a query
sees w sorted keys up to one of them, by more or less than one further than the query before it. So
the sorted keys are cut into blocks of w, and queries that end in the same block share it and the
one before. The Triton kernels take both kinds as they are (`triton_recent.py`), the TPU kernels
blocks and tiles (`tpu_recent.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from .. import compat
from ..segments import pad_length
from ..sliding_window_attention import sliding_window_attention
from .attend import attend_members
from .options import Routing
from .recent_band import Band, by_rows, find_band, find_tiles, inverse, labels
from .state import Tokens

NAME = "routed_attention"


def attend_recent(
  query: Float[Array, "B T H K"],
  tokens: Tokens,
  scores: Float[Array, "B T H C"] | None,
  options: Routing,
  implementation: str,
  interpret: Any,
) -> Float[Array, "B T H V"]:
  """`scores` of the queries where they are not those of `tokens`."""
  if implementation == "triton":
    compat.require_triton(NAME)
    from .triton_recent import attend_band_triton

    return attend_band_triton(query, tokens, scores, options)
  if scores is None:
    return _one_list(query, tokens, options, implementation, interpret)
  if implementation == "tpu":
    compat.require_tpu(NAME, interpret)
    from .tpu_recent import attend_band_tpu  # Pallas' TPU half is loaded only where it is used.

    return attend_band_tpu(query, tokens, scores, options, interpret)
  return _two_lists(query, tokens, scores, options)


def _one_list(query, tokens, options, implementation, interpret):
  batch, length, heads, _ = query.shape
  total = tokens.key.shape[1]
  label = labels(tokens.scores, tokens.documents)
  index = jnp.argsort(label, axis=-1, stable=True)
  place = jnp.argsort(index, axis=-1)
  query = jnp.pad(query, ((0, 0), (total - length, 0), (0, 0), (0, 0)))

  def into(x):  # [B, S, H, K] -> [B H, S, 1, K]
    return move(x.swapaxes(1, 2), index, place).reshape(batch * heads, total, 1, -1)

  output, _ = sliding_window_attention(
    into(query),
    into(tokens.key),
    into(tokens.value),
    left=options.window_size - 1,
    segment_ids=jnp.take_along_axis(label, index, axis=-1).reshape(batch * heads, total),
    scale=options.scale,
    implementation=implementation,
    interpret=interpret,
  )
  output = move(output.reshape(batch, heads, total, -1), place, index)
  return output[:, :, total - length :].swapaxes(1, 2)


@jax.custom_vjp
def move(
  x: Shaped[Array, "B H N K"], index: Int[Array, "B H M"], inverse: Int[Array, "B H N"]
) -> Shaped[Array, "B H M K"]:
  """Row index[m] of x at place m, 0 where that is N. Each row goes to one place, inverse[n].

  The gradient is a gather, too.
  """
  return jnp.take_along_axis(x, index[..., None], axis=2, mode="fill", fill_value=0)


move.defvjp(
  lambda x, index, inverse: (move(x, index, inverse), (index, inverse)),
  lambda saved, dy: (move(dy, saved[1], saved[0]), None, None),
)


def _two_lists(query, tokens, scores, options):
  window = options.window_size
  size = max(window // 2, 1)
  blocks = -(-tokens.key.shape[1] // window)
  band = find_band(scores, tokens, query.shape[1], window)
  plan = by_rows(lambda *one: find_tiles(Band(*one), window, size, blocks), *band)
  key_place = by_rows(inverse, band.key_order)

  def tiles(x):  # [B, H, N I, ...] -> [N, B, H, I, ...]
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, size, *x.shape[3:]), 2, 0)

  def slabs(x):  # [B, S, H, K] -> [N, B, H, 2 w, K], the block of a tile and the one before
    x = move(x.swapaxes(1, 2), band.key_order, key_place)
    x = pad_length(jnp.pad(x, ((0, 0), (0, 0), (window, 0), (0, 0))), window, axis=2)
    x = x.reshape(*x.shape[:2], -1, window, x.shape[-1])
    block = plan.block[..., None, None]
    parts = [jnp.take_along_axis(x, block + n, axis=2) for n in (0, 1)]
    return jnp.moveaxis(jnp.concatenate(parts, axis=3), 2, 0)

  @jax.checkpoint
  def tile(inputs):
    q, k, v, start, stop, block = inputs
    place = (block[..., None] - 1) * window + jnp.arange(2 * window)  # [B, H, 2 w]
    pairs = (place[:, :, None] >= start[..., None]) & (place[:, :, None] < stop[..., None])
    none = jnp.zeros((), bool)
    return attend_members(q, k, v, pairs, none, 0, options, None, None).astype(v.dtype)

  query = tiles(move(query.swapaxes(1, 2), plan.slot_query, plan.query_slot))
  bounds = tiles(plan.start), tiles(plan.stop), jnp.moveaxis(plan.block, 2, 0)
  outputs = jax.lax.map(tile, (query, slabs(tokens.key), slabs(tokens.value), *bounds))
  outputs = jnp.moveaxis(outputs, 0, 2)  # [B, H, N, I, V]
  outputs = outputs.reshape(*outputs.shape[:2], -1, outputs.shape[-1])
  return move(outputs, plan.query_slot, plan.slot_query).swapaxes(1, 2)
