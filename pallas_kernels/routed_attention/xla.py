"""Routed attention in plain XLA."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..segments import pad_length
from .attend import Drop, Extras, attend_members
from .members import gather, gather_own, memberships, top_members
from .options import Routing
from .state import Tokens

PREFIX_CHUNK = 64
# Of the causal pairs of a cluster, (1 + 1 / n) / 2 of all are computed with n blocks.
BLOCKS, SMALLEST_BLOCK = 8, 64


def attend_clusters(
  query: Float[Array, "B T H K"],
  tokens: Tokens,
  scores: Float[Array, "B T H C"],
  options: Routing,
  extras: Extras,
) -> Float[Array, "B T H V"]:
  """Membership "official": `scores` of the queries, those of `tokens` of the keys.

  Members are gathered once; logits exist for one cluster and block of queries at a time.
  """
  o = options
  members = others = top_members(scores, o.window_size)
  together = tokens.scores is scores  # then slots are in the order of positions on both sides
  if not together:
    others = top_members(tokens.scores, o.window_size)
  seen = jnp.isfinite(gather_own(tokens.scores, others))
  if not o.zero_values_seen:
    seen &= gather(jnp.any(tokens.value != 0, axis=-1), others)
  q = k = gather(query, members)
  if tokens.key is not query or not together:
    k = gather(tokens.key, others)
  parts = (q, k, gather(tokens.value, others), members, others, seen)
  parts = tuple(jnp.moveaxis(x, 2, 0) for x in parts)  # [C, B, H, W, ...]
  window = members.shape[-1]
  blocks = min(BLOCKS, -(-window // SMALLEST_BLOCK)) if o.causal and together else 1
  borders = [window * n // blocks for n in range(blocks + 1)]

  @jax.checkpoint
  def one(inputs):
    parts, memory, keys = inputs

    def rows(first, last, key):
      """What these slots see: all, or where slots are in order, those up to the last of them."""
      stop = last if blocks > 1 else window
      q, here = (x[:, :, first:last] for x in (parts[0], parts[3]))
      k, v, there, seen = (x[:, :, :stop] for x in (parts[1], parts[2], *parts[4:]))
      pairs = seen[..., None, :]
      if o.causal and o.mask == "position":
        pairs &= there[..., None, :] <= here[..., None]
      elif o.causal:
        pairs &= jnp.arange(stop) <= jnp.arange(first, last)[:, None]
      own = there[..., None, :] == here[..., None]
      drop = None if key is None else Drop(rate, key)
      return attend_members(q, k, v, pairs, own, first, o, extras.relative, memory, drop)

    keys = [None] * blocks if keys is None else jax.random.split(keys, blocks)
    outputs = [rows(*pair) for pair in zip(borders, borders[1:], keys, strict=False)]
    return jnp.concatenate(outputs, axis=2)

  keys = None if extras.drop is None else jax.random.split(extras.drop.key, members.shape[2])
  rate = 0.0 if extras.drop is None else extras.drop.rate
  outputs = jax.lax.map(one, (parts, extras.by_cluster(), keys))
  outputs = jnp.moveaxis(outputs, 0, 2)  # [B, H, C, W, V] float32
  real = jnp.isfinite(gather_own(scores, members))
  return _combine(outputs, members, real, query.shape[1], o).astype(tokens.value.dtype)


def attend_prefix(
  query: Float[Array, "B T H K"], tokens: Tokens, options: Routing, extras: Extras
) -> Float[Array, "B T H V"]:
  """Membership "topk_prefix", some queries at a time, and for these one cluster after the other.

  A key is a member for a query if fewer than W tokens up to the query beat it; how many do is
  carried from chunk to chunk. O(T^2 C) comparisons: for evaluation.
  """
  o = options
  batch, length, heads, _ = query.shape
  total = tokens.key.shape[1]
  before = total - length
  size = min(PREFIX_CHUNK, length)
  q = pad_length(query, size).swapaxes(1, 2)  # [B, H, T', K]
  k, v, scores = (x.swapaxes(1, 2) for x in (tokens.key, tokens.value, tokens.scores))
  scores = jnp.moveaxis(scores, -1, 0)  # [C, B, H, S]
  place = jnp.arange(total)
  memory = extras.by_cluster()
  wide = jnp.promote_types(query.dtype, jnp.float32)

  def chunk(losses, start):
    rows = before + jnp.minimum(start + jnp.arange(size), length - 1)
    own = place == rows[:, None]
    past, same = place <= rows[:, None], _same_document(tokens, rows)
    counted = (start + jnp.arange(size) < length)[:, None]  # a padded query is not a token

    @jax.checkpoint
    def cluster(carry, inputs):
      lost, theirs, memory = inputs
      beats = _beaten(theirs, rows) & same & counted
      losses = lost[..., None, :] + jnp.cumsum(beats, axis=-2, dtype=jnp.int32)
      pairs = (losses < o.window_size) & past & same & jnp.isfinite(theirs)[..., None, :]
      admitted = jnp.any(pairs & own, axis=-1)  # [B, H, size]
      upto = jnp.cumsum(pairs, axis=-1, dtype=jnp.int32)
      rank = upto - upto[..., -1:]
      rows_of_q = jax.lax.dynamic_slice_in_dim(q, start, size, 2)
      output = attend_members(rows_of_q, k, v, pairs, own, rank, o, extras.relative, memory)
      sums, count = carry
      sums += jnp.where(admitted[..., None], output, 0)
      return (sums, count + admitted), losses[..., -1, :]

    zeros = (
      jnp.zeros((batch, heads, size, v.shape[-1]), wide),
      jnp.zeros((batch, heads, size), wide),
    )
    (sums, count), losses = jax.lax.scan(cluster, zeros, (losses, scores, memory))
    return losses, sums / (count + o.combine_eps)[..., None]

  losses = jnp.zeros(scores.shape, jnp.int32)
  if before:
    losses = jax.lax.map(lambda theirs: _losses_by_members(tokens, theirs, before), scores)
  _, outputs = jax.lax.scan(chunk, losses, jnp.arange(0, q.shape[2], size))
  output = outputs.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, v.shape[-1])
  return output[:, :length].astype(tokens.value.dtype)


def _beaten(scores, rows):
  """Whom the tokens `rows` beat, [..., rows, S]: they are nearer, or as near and earlier."""
  mine, theirs = scores[..., rows, None], scores[..., None, :]
  return (mine > theirs) | ((mine == theirs) & (rows[:, None] < jnp.arange(scores.shape[-1])))


def _same_document(tokens, rows):
  """[B, 1, rows, S]."""
  if tokens.documents is None:
    return jnp.ones((1, 1, 1, 1), bool)
  own = tokens.documents[:, rows]
  return (own[:, :, None] == tokens.documents[:, None])[:, None]


def _losses_by_members(tokens, scores, count):
  """How many of the `count` members in front beat each token of one cluster, [B, H, S]."""
  rows = jnp.arange(count)
  beats = _beaten(scores, rows) & _same_document(tokens, rows)
  return jnp.sum(beats & jnp.isfinite(scores[..., :count, None]), axis=-2, dtype=jnp.int32)


def _combine(outputs, members, real, length, options):
  """[B, H, C, W, V] -> [B, T, H, V]: sums over the slots of a token, over their number + eps."""
  batch, heads = members.shape[:2]
  rows = (jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None])
  where = (*rows, members.reshape(batch, heads, -1))
  outputs = jnp.where(real[..., None], outputs, 0).reshape(batch, heads, -1, outputs.shape[-1])
  total = jnp.zeros((batch, heads, length, outputs.shape[-1]), outputs.dtype)
  total = total.at[where].add(outputs)
  count = memberships(members, real, length).astype(total.dtype)
  return (total / (count + options.combine_eps)[..., None]).swapaxes(1, 2)
