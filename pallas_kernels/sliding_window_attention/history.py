"""Keys of earlier calls in front of those of this call: what every softmax operator works on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..segments import last_segment


class History(NamedTuple):
  """What a state stores, in the order in which it goes before the first token of a call."""

  key: Float[Array, "B P G K"]
  value: Float[Array, "B P G V"]
  documents: Int[Array, "B P"]  # 0, the document of the first token; -1 where nothing is stored


class Tokens(NamedTuple):
  """Keys and values of a call, those of its state in front; query i is at S - T + i.

  A query sees keys of its own document only; `documents` None: all belong to one.
  """

  key: Float[Array, "B S G K"]
  value: Float[Array, "B S G V"]
  documents: Int[Array, "B S"] | None
  length: int  # T


def extend(
  key: Float[Array, "B T G K"],
  value: Float[Array, "B T G V"],
  segments: Int[Array, "B T"] | None,
  history: History | None,
) -> Tokens:
  """Puts `history` in front; `segments` counts documents from 0, the history's."""
  batch, length = key.shape[:2]
  if history is None:
    return Tokens(key, value, segments, length)
  documents = jnp.zeros((batch, length), jnp.int32) if segments is None else segments
  return Tokens(
    jnp.concatenate([history.key, key], axis=1),
    jnp.concatenate([history.value, value], axis=1),
    jnp.concatenate([history.documents, documents], axis=1),
    length,
  )


def final_document(
  tokens: Tokens,
  segments: Int[Array, "B T"] | None,
  lengths: Int[Array, " B"] | None,
  count: Int[Array, " B"] | None,
) -> tuple[Int[Array, " B"], Int[Array, " B"], Int[Array, " B"]]:
  """(real tokens, document of the last of them, tokens that document has had so far), each [B].

  `count` is what document 0 had before this call. A row without real tokens stays in document 0.
  """
  batch = tokens.key.shape[0]
  stop = jnp.full((batch,), tokens.length, jnp.int32) if lengths is None else lengths
  stop = jnp.clip(stop, 0, tokens.length).astype(jnp.int32)
  before = jnp.zeros((batch,), jnp.int32) if count is None else count.astype(jnp.int32)
  if segments is None:
    return stop, jnp.zeros((batch,), jnp.int32), before + stop
  document = last_segment(segments, stop)
  real = jnp.arange(tokens.length) < stop[:, None]
  here = jnp.sum(real & (segments == document[:, None]), axis=1, dtype=jnp.int32)
  return stop, document, here + jnp.where(document == 0, before, 0)


def group_queries(query: jax.Array, kv_heads: int) -> jax.Array:
  """[..., H, K] -> [..., G, H / G, K]: query head h uses key head h // (H / G)."""
  *rest, heads, dim = query.shape
  return query.reshape(*rest, kv_heads, heads // kv_heads, dim)
