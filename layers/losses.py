"""Losses that never hold the logits of a whole batch."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from .partitioning import active_axes


class LossSums(NamedTuple):
  """Sums over tokens, float32 scalars; divide by `weight` for means."""

  loss: Float[Array, ""]  # nats, the z-loss not included
  z_loss: Float[Array, ""]  # log(sum of exp(logits))^2
  correct: Float[Array, ""]  # tokens whose largest logit is the target's
  weight: Float[Array, ""]


def chunked_cross_entropy(
  hidden: Float[Array, "B T D"],
  head: Float[Array, "V D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"] | None = None,
  *,
  bias: Float[Array, " V"] | None = None,
  chunk_size: int = 256,
) -> LossSums:
  """Cross-entropy of softmax(hidden head^T + bias) with targets, `chunk_size` positions at a time.

  The logits of a chunk, [B, chunk_size, V] in float32, exist only while it is worked on; the
  backward pass computes them again. Targets outside [0, V) must have weight 0.

  Under a mesh each device works on its own rows ("data"), its own part of the length ("seq"), cut
  into chunks there, and its own part of the vocabulary ("model"). The head is gathered over "data"
  once, not once a chunk, and its gradient is summed over the devices once.

  Raises:
    ValueError: shapes that do not fit.
  """
  batch, length, features = hidden.shape
  if targets.shape != (batch, length):
    raise ValueError(
      f"chunked_cross_entropy: targets must have shape {(batch, length)}; got {targets.shape}"
      " (one target per position)"
    )
  if weights is None:
    weights = jnp.ones(targets.shape, jnp.float32)
  weights = weights.astype(jnp.float32)
  axes = {name: size for name, size in active_axes().items() if size > 1}
  parts = axes.get("seq", 1)
  if length % parts:
    raise ValueError(
      f"chunked_cross_entropy: length must be a multiple of the mesh axis 'seq' ({parts}); got"
      f" {length} (pad the sequences)"
    )
  if not axes:
    return _sums(hidden, head, bias, targets, weights, chunk_size=chunk_size)

  def split(axis, size):  # an axis that does not divide stays whole, as for parameters
    return axis if axis in axes and size % axes[axis] == 0 else None

  rows, vocab_axis = split("data", batch), split("model", head.shape[0])
  embed_axis = rows and split("data", features)
  tokens = P(rows, split("seq", length))
  local = functools.partial(
    _device_sums,
    chunk_size=chunk_size,
    token_axes=tuple(axis for axis in tokens if axis),
    embed_axis=embed_axis,
    vocab_axis=vocab_axis,
  )
  specs = (P(*tokens, None), P(vocab_axis, embed_axis), P(vocab_axis), tokens, tokens)
  return jax.shard_map(local, in_specs=specs, out_specs=P())(hidden, head, bias, targets, weights)


def _device_sums(
  hidden, head, bias, targets, weights, *, chunk_size, token_axes, embed_axis, vocab_axis
) -> LossSums:
  """The sums over the whole mesh, from one device's rows, positions and part of the head."""
  head = head.astype(hidden.dtype)
  if embed_axis is not None:
    head = jax.lax.all_gather(head, embed_axis, axis=1, tiled=True)  # [V, D]
  # Counts as different on each device from here on: then its gradient is summed here, behind the
  # loop. What was gathered does so already.
  head = _varying(head, [axis for axis in token_axes if axis != embed_axis])
  bias = None if bias is None else _varying(bias, token_axes)
  sums = _sums(
    hidden,
    head,
    bias,
    targets,
    weights,
    chunk_size=chunk_size,
    axes=token_axes,
    vocab_axis=vocab_axis,
  )
  return jax.lax.psum(sums, token_axes)


def _varying(x, axes):
  return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def _sums(
  hidden, head, bias, targets, weights, *, chunk_size, axes=(), vocab_axis=None
) -> LossSums:
  batch, length = targets.shape
  size = min(chunk_size, length)

  def chunks(x):  # [B, T, ...] -> [N, B, C, ...]
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, -length % size)
    x = jnp.pad(x, pad)
    return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

  # The gradients of the chunks are added up in this type.
  head = head.astype(jnp.promote_types(head.dtype, jnp.float32))

  @functools.partial(jax.checkpoint, prevent_cse=False)  # inside a scan nothing is to be merged
  def add_chunk(sums, inputs):
    h, target, weight = inputs
    logits = jnp.einsum("bcd,vd->bcv", h, head.astype(h.dtype), preferred_element_type=jnp.float32)
    if bias is not None:
      logits += bias.astype(logits.dtype)
    normaliser, chosen, largest = _of_vocabulary(logits, target, vocab_axis)
    correct = chosen >= largest
    terms = (normaliser - chosen, jnp.square(normaliser), correct, jnp.ones_like(weight))
    return LossSums(*(s + jnp.sum(weight * t) for s, t in zip(sums, terms, strict=True))), None

  zero = _varying(jnp.zeros((), jnp.float32), axes)
  inputs = (chunks(hidden), chunks(targets), chunks(weights))
  return jax.lax.scan(add_chunk, LossSums(zero, zero, zero, zero), inputs)[0]


def _of_vocabulary(logits, target, axis):
  """(log of the sum of exp(logits), the target's logit, the largest), each [B, C].

  `logits` [B, C, V] may be the part of the vocabulary that this place of mesh axis `axis` has.
  """
  words = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
  largest = jnp.max(jax.lax.stop_gradient(logits), axis=-1)
  if axis is not None:
    words += jax.lax.axis_index(axis) * logits.shape[-1]
    largest = jax.lax.pmax(largest, axis)
  # Not a gather: its gradient would be a scatter into the logits.
  chosen = jnp.sum(jnp.where(words == target[..., None], logits, 0), axis=-1)
  total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
  if axis is not None:
    chosen, total = jax.lax.psum((chosen, total), axis)
  return largest + jnp.log(total), chosen, largest
