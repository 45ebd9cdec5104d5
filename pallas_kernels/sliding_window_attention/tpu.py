"""Attention on TPUs by the Pallas kernels that come with jax ("splash attention").

Their grid holds only the pairs of query and key blocks that the mask leaves: with a window of up to
a block two key blocks per query block, so work is linear in T. Here: head layout, padding to whole
blocks, stored keys in front (a distance between first query and first key that the mask knows),
documents as segment ids.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as masks,
)
from jaxtyping import Array, Float, Int

from .history import Tokens

LANES = 128  # blocks are multiples of it
# Static schedules on v5e, head_dim 64, window 64, bundles per 512 queries of forward, dq and dkv
# together: 19,300 in blocks of 128, 14,400 of 256, 14,000 of 512, and a fourth of the grid steps.
DEFAULT_BLOCK = 512
# Documents of keys that nobody sees; queries have those of tokens, or that of padding behind.
EMPTY, PADDING = -1, -2


def attention_tpu(
  query: Float[Array, "B T H K"],
  tokens: Tokens,
  left: int | None,
  scale: float,
  block_size: int | None,
  interpret: Any,
) -> Float[Array, "B T H V"]:
  """Output; `left` None means every earlier key of the document. Any T, K and V."""
  length = query.shape[1]
  stored = tokens.key.shape[1] - length
  block = min(_lanes(block_size or DEFAULT_BLOCK), _lanes(length))
  front = -stored % LANES
  padded = -(-length // block) * block
  total = -(-(front + stored + padded) // block) * block

  def heads_first(x, before, length):
    behind = length - before - x.shape[1]
    return jnp.pad(x, ((0, 0), (before, behind), (0, 0), (0, 0))).swapaxes(1, 2)

  q = heads_first((query * scale).astype(query.dtype), 0, padded)  # [B, H, T', K]
  k, v = (heads_first(x, front, total) for x in (tokens.key, tokens.value))
  segments = _segments(tokens, length, front, padded, total)
  window = dict(window_size=(left, 0), offset=front + stored)
  output = _splash(q, k, v, segments, (window, block, interpret))
  return output.swapaxes(1, 2)[:, :length]


def attention_to_all_tpu(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T H K"],
  value: Float[Array, "B T H V"],
  lengths: Int[Array, " B"] | None,
  scale: float,
  interpret: Any,
) -> Float[Array, "B T H V"]:
  """Every token sees the first `lengths` ones. What rows with none of those give is arbitrary."""
  batch, length = query.shape[:2]
  block = min(DEFAULT_BLOCK, _lanes(length))
  padded = -(-length // block) * block

  def heads_first(x):
    return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

  q = heads_first((query * scale).astype(query.dtype))
  seen = length if lengths is None else lengths[:, None]
  keys = jnp.broadcast_to(jnp.where(jnp.arange(padded) < seen, 0, PADDING), (batch, padded))
  segments = jnp.zeros((batch, padded), jnp.int32), keys.astype(jnp.int32)
  output = _splash(q, heads_first(key), heads_first(value), segments, (None, block, interpret))
  return output.swapaxes(1, 2)[:, :length]


def _lanes(size):
  return -(-size // LANES) * LANES


class Window(masks.LocalMask):
  """The causal window; blocks of which it sees nothing or everything are not looked at.

  The kernels' set-up asks for every block of the T x S mask, on the host.
  """

  def __getitem__(self, idx):
    rows, columns = idx
    left = self.window_size[0]
    first, last = rows.start + self.offset, rows.stop - 1 + self.offset  # where the queries sit
    if columns.start > last or (left is not None and columns.stop - 1 < first - left):
      return np.zeros((1, 1), bool)
    if columns.stop - 1 <= first and (left is None or columns.start >= last - left):
      return np.ones((1, 1), bool)
    return super().__getitem__(idx)


def _segments(tokens: Tokens, length, front, padded, total):
  """(documents of the queries [B, T'], of the keys [B, S']), None where the mask says it all.

  Padding behind comes after every real query, so that it needs no ids of its own without documents.
  """
  if tokens.documents is None:
    return None
  documents = tokens.documents
  behind = total - front - documents.shape[1]
  keys = jnp.pad(documents, ((0, 0), (front, 0)), constant_values=EMPTY)
  keys = jnp.pad(keys, ((0, 0), (0, behind)), constant_values=PADDING)
  queries = jnp.pad(documents[:, -length:], ((0, 0), (0, padded - length)), constant_values=PADDING)
  return queries, keys


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _splash(
  query: Float[Array, "B H T K"],
  key: Float[Array, "B G S K"],
  value: Float[Array, "B G S V"],
  segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
  options: tuple,
) -> Float[Array, "B H T V"]:
  """The kernel over the batch. Its products take the precision in force, hence the own gradient."""
  with _precision(query.dtype):
    return _run(options, query, key, value, segments)


def _run(options, query, key, value, segments) -> Any:
  window, block, interpret = options  # None as window: no mask but that of the segments
  shape = (query.shape[2], key.shape[2])
  mask = masks.FullMask(shape) if window is None else Window(shape, **window)
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([mask] * query.shape[1]),
    block_sizes=splash.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  if segments is None:
    return jax.vmap(kernel)(query, key, value)
  return jax.vmap(kernel)(query, key, value, splash.SegmentIds(*segments))


def _forward(query, key, value, segments, options):
  with _precision(query.dtype):
    run = functools.partial(_run, options, segments=segments)
    return jax.vjp(run, query, key, value)


def _backward(options, pull, d_output):
  with _precision(d_output.dtype):
    return (*pull(d_output), None)


_splash.defvjp(_forward, _backward)


def _precision(dtype):
  """float32 is multiplied as float32; a TPU would round it to bfloat16 by default."""
  return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")
