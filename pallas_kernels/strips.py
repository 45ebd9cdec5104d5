"""Causal attention in plain XLA, some queries at a time against all keys they may see.

The scores of a chunk of queries are a strip [C, S]; it is made, used and forgotten, and made again
in the backward pass, so memory is linear in the length for any function of whole rows. Chunks are
taken in a few runs, each with the keys up to its last query: with n runs (n + 1) / 2 n of all
pairs are computed, where a causal loop over single chunks would compute half.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .chunks import cut_chunk, join_chunks
from .segments import pad_length
from .sliding_window_attention.history import Tokens

RUNS = 6


def attend_strips(
  attend: Callable[..., jax.Array],
  query: Float[Array, "B T H K"],
  tokens: Tokens,
  chunk_size: int,
  rows: Sequence[Shaped[Array, "P T"]] = (),
) -> Float[Array, "B T H V"]:
  """`attend(query, key, value, seen, *rows)` on every strip, put together.

  It gets query [B, G, R, C, K] (R query heads for each of G key heads), key [B, G, S, K], value
  [B, G, S, V], seen [P, 1, 1, C, S] (P is B, or 1 where all rows are alike) and, of `rows`, the
  chunk's part [P, 1, 1, C, 1], and returns [B, G, R, C, V]. Query i sits at key S - T + i and sees
  those up to it, of its document.
  """
  batch, length, heads, _ = query.shape
  total, groups = tokens.key.shape[1:3]
  dtype = query.dtype
  chunk = min(chunk_size, length)
  queries = pad_length(query, chunk)
  count = queries.shape[1] // chunk
  # Wide where they are closed over, so that their gradient is summed over chunks in float32.
  wide = jnp.promote_types(dtype, jnp.float32)
  keys, values = (x.swapaxes(1, 2).astype(wide) for x in (tokens.key, tokens.value))

  def run(first, last):
    extent = min(total, total - length + last * chunk)
    some_keys, some_values = (x[:, :, :extent] for x in (keys, values))

    @jax.checkpoint
    def strip(index):
      q = cut_chunk(queries, index, chunk).reshape(batch, groups, -1, chunk, query.shape[3])
      # A padded query repeats the last one's mask; what it gives is cut off.
      row = jnp.minimum(index * chunk + jnp.arange(chunk), length - 1)
      position = total - length + row  # [C]
      seen = (jnp.arange(extent) <= position[:, None])[None]  # [P, C, S]
      if tokens.documents is not None:
        own = tokens.documents[:, position][:, :, None]
        seen &= own == tokens.documents[:, None, :extent]
      cut = [x[:, row][:, None, None, :, None] for x in rows]
      k, v = some_keys.astype(dtype), some_values.astype(dtype)
      output = attend(q, k, v, seen[:, None, None], *cut)
      return output.reshape(batch, heads, chunk, -1).swapaxes(1, 2)  # [B, C, H, V]

    return jax.lax.map(strip, jnp.arange(first, last))

  runs = min(RUNS, count)
  borders = [count * n // runs for n in range(runs + 1)]
  parts = [run(*pair) for pair in zip(borders, borders[1:], strict=False)]
  return join_chunks(jnp.concatenate(parts), length)
