"""Block attention in plain XLA."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..routed_attention.attend import Drop, attend_members
from ..routed_attention.options import Routing
from ..segments import pad_length
from ..sliding_window_attention.history import Tokens


def attend_blocks(
  query: Float[Array, "B T H K"],
  tokens: Tokens,
  key_seen: Bool[Array, "B T #H"] | None,
  place: Int[Array, "#B T"] | None,
  *,
  block_size: int,
  look_back: int,
  causal: bool,
  scale: float,
  relative: tuple[jax.Array, jax.Array] | None,
  drop: Drop | None = None,
) -> Float[Array, "B T H V"]:
  """Blocks of queries one after the other, each with its slab of keys, recomputed in the backward.

  `place` is where each query is in the block of its document; None: where it is in the row's. Only
  in that case do the blocks of queries and of keys fall together, else a slab is a block longer.
  """
  size, length = block_size, tokens.length
  stored = tokens.key.shape[1] - length
  back = look_back // size + (place is not None)  # blocks
  ahead = 0 if causal else look_back // size
  blocks = -(-length // size)

  def slabs(x, fill=0):  # [B, S, ...] -> [N, B, W, ...], W keys around each block
    front, behind = back * size - stored, (blocks + ahead) * size - length
    x = jnp.pad(x, ((0, 0), (front, behind)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    x = jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)  # [N', B, b, ...]
    return jnp.concatenate([x[o : o + blocks] for o in range(back + ahead + 1)], axis=2)

  def cut(x):  # [B, T, ...] -> [N, B, b, ...]
    x = pad_length(x, size)
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)

  batch, total = tokens.key.shape[:2]
  documents = tokens.documents
  if documents is None:
    documents = jnp.zeros((1, total), jnp.int32)
  if place is None:
    place = jnp.arange(length)[None] % size
  seen = jnp.ones((1, total, 1), bool) if key_seen is None else key_seen
  inputs = (cut(query), slabs(tokens.key), slabs(tokens.value), slabs(documents, -2),
            slabs(seen, False), cut(documents[:, stored:]), cut(place),
            None if drop is None else jax.random.split(drop.key, blocks))  # fmt: skip
  width = (back + ahead + 1) * size
  distance = jnp.arange(width) - back * size - jnp.arange(size)[:, None]  # key - query, [b, W]
  options = Routing(1, "official", scale=scale)

  @jax.checkpoint
  def block(inputs):
    q, k, v, key_documents, seen, own_documents, place, key = inputs
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, H, b or W, K]
    pairs = own_documents[..., None] == key_documents[:, None]  # [B, b, W]
    pairs &= distance >= -(place[..., None] + look_back)
    if causal:
      pairs &= distance <= 0
    pairs = pairs[:, None] & seen.swapaxes(1, 2)[:, :, None]  # [B, H, b, W]
    own = None if drop is None or key is None else Drop(drop.rate, key)
    output = attend_members(
      q, k, v, pairs, distance == 0, back * size, options, relative, None, own
    )
    return output.swapaxes(1, 2).astype(v.dtype)

  output = jnp.moveaxis(jax.lax.map(block, inputs), 0, 1)
  return output.reshape(batch, blocks * size, *output.shape[3:])[:, :length]
