"""Causal softmax attention as it is defined, over a dense mask. The oracle; never optimised."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attention_reference(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T G K"],
  value: Float[Array, "B T G V"],
  stored_key: Float[Array, "B S G K"],
  stored_value: Float[Array, "B S G V"],
  count: Int[Array, " B"],
  segments: Int[Array, "B T"],
  lengths: Int[Array, " B"],
  *,
  left: int | None,
  slot_numbers: Callable,
  scale: float,
) -> tuple[
  Float[Array, "B T H V"],
  tuple[Float[Array, "B S G K"], Float[Array, "B S G V"], Int[Array, " B"]],
]:
  """o_i = sum_j softmax_j(scale q_i . k_j) v_j over the keys of token i's document with j <= i.

  `left` keeps those with i - j <= left (None: all). Tokens are numbered within their document;
  document 0 has had `count` tokens before this call, and `slot_numbers(count)` [B, S] says which of
  them each slot stores, -1 for none. Returns the output and the state (key, value, count) after the
  last real token, all in float32 or better.
  """
  batch, length, heads, _ = query.shape
  groups = key.shape[2]
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  query, key, value, stored_key, stored_value = (
    x.astype(dtype) for x in (query, key, value, stored_key, stored_value)
  )
  position = jnp.arange(length)
  same = segments[:, :, None] == segments[:, None, :]
  start = jnp.argmax(same, axis=2)  # first position of each token's document
  number = position - start + jnp.where(segments == 0, count[:, None], 0)  # [B, T]
  stored = slot_numbers(count)  # [B, S]

  keys = jnp.concatenate([stored_key, key], axis=1)  # [B, S + T, G, K]
  values = jnp.concatenate([stored_value, value], axis=1)
  numbers = jnp.concatenate([stored, number], axis=1)[:, None, :]  # [B, 1, S + T]
  documents = jnp.concatenate([jnp.where(stored >= 0, 0, -1), segments], axis=1)[:, None, :]
  distance = number[:, :, None] - numbers  # [B, T, S + T]
  seen = (documents == segments[:, :, None]) & (distance >= 0)
  if left is not None:
    seen &= distance <= left

  grouped = query.reshape(batch, length, groups, heads // groups, -1)
  logits = scale * jnp.einsum("btgrk,bsgk->bgrts", grouped, keys, precision="highest")
  weights = jax.nn.softmax(jnp.where(seen[:, None, None], logits, -jnp.inf), axis=-1)
  output = jnp.einsum("bgrts,bsgv->btgrv", weights, values, precision="highest")
  output = output.reshape(batch, length, heads, -1)
  real = position < lengths[:, None]  # [B, T]
  output = jnp.where(real[..., None, None], output, 0)

  last = jnp.maximum(lengths - 1, 0)[:, None]
  document = jnp.where(lengths > 0, jnp.take_along_axis(segments, last, axis=1)[:, 0], 0)
  after = jnp.where(lengths > 0, jnp.take_along_axis(number, last, axis=1)[:, 0] + 1, count)
  usable = jnp.concatenate([jnp.ones(stored.shape, bool), real], axis=1)[:, None, :]
  chosen = (numbers == slot_numbers(after)[:, :, None]) & (numbers >= 0)  # [B, S, S + T]
  chosen &= usable & (documents == document[:, None, None])
  new_key = jnp.einsum("bns,bsgk->bngk", chosen.astype(dtype), keys, precision="highest")
  new_value = jnp.einsum("bns,bsgv->bngv", chosen.astype(dtype), values, precision="highest")
  return output, (new_key, new_value, after.astype(jnp.int32))
