"""The public function: checks, and what the state has in front of the tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .. import checks
from ..routed_attention.attend import Drop
from ..segments import count_seen, run_index, zero_padding
from ..sliding_window_attention.history import extend
from ..sliding_window_attention.window import WindowState, oldest_first, window_after
from .xla import attend_blocks

NAME = "block_attention"


def block_window(block_size: int, look_back: int) -> int:
  """Keys to the left of its own that a token sees at most: `left` of the `WindowState`."""
  return look_back + block_size - 1


def block_attention(
  query: Float[Array, "B T H K"],
  key: Float[Array, "B T H K"],
  value: Float[Array, "B T H V"],
  *,
  block_size: int,
  look_back: int | None = None,
  causal: bool = True,
  scale: float | None = None,
  relative_keys: Float[Array, "R K"] | None = None,
  relative_values: Float[Array, "R V"] | None = None,
  key_seen: Bool[Array, "B T H"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  initial_state: WindowState | None = None,
  dropout_rate: float = 0.0,
  dropout_key: jax.Array | None = None,
) -> tuple[Float[Array, "B T H V"], WindowState]:
  """Softmax attention to the own block of `block_size` tokens and `look_back` tokens before it.

      o_i = sum_j softmax_j(scale q_i . k_j + q_i . A[r]) (v_j + B[r])
      j from (the first token of i's block) - look_back to i

  Blocks are counted from the start of each document, so that a token sees look_back + 1 to
  look_back + block_size keys. r is the distance j - i, clipped to the tables A (`relative_keys`)
  and B (`relative_values`), whose middle row is the token itself. The local heads of: Efficient
  Content-Based Sparse Attention with Routing Transformers (2021), section 4, as the released code
  has them. Plain XLA, a block at a time, linear memory; a window of fixed width with kernels is
  `sliding_window_attention`.

  Args:
    query, key: float [B, T, H, K]. value: [B, T, H, V]. One dtype.
    block_size: tokens of a block. look_back: a multiple of it; None: one block.
    causal: False lets a token see all of its block, and `look_back` tokens after it, too.
    scale: factor of q . k, K ** -0.5 if None.
    relative_keys, relative_values: [2 R + 1, K] and [2 R + 1, V], or neither.
    key_seen: keys that nobody sees where False.
    segment_ids: int [B, T]. A change of id starts a new document; only where causal.
    lengths: int [B]. Tokens at or past a row's length are padding: seen by nobody, output 0.
    initial_state: `WindowState` with left = `block_window(...)` of the tokens before; only where
      causal, and not with `key_seen`.
    dropout_rate, dropout_key: with a key, weights are dropped with this probability.

  Returns:
    (output [B, T, H, V] in the dtype of `value`, final `WindowState`). Queries that see no key have
    output 0. Softmax and sums are float32 (or wider). Gradients exist for all float arguments.

  Raises:
    ValueError: wrong rank, shape or dtype, sizes that do not fit, or arguments that do not go
      together.
  """
  back = block_size if look_back is None else look_back
  _check(query, key, value, block_size, back, causal, relative_keys, relative_values, key_seen,
         segment_ids, lengths, initial_state)  # fmt: skip
  length = query.shape[1]
  left = block_window(block_size, back)
  segments = None if segment_ids is None else run_index(segment_ids)
  history = None if initial_state is None else oldest_first(initial_state)
  count = None if initial_state is None else initial_state.count
  tokens = extend(key, value, segments, history)
  place = None  # of each query in its block, where it is not that of the row
  if segments is not None or count is not None:
    before = jnp.zeros(query.shape[:1], jnp.int32) if count is None else count
    place = (count_seen(segments, before, length) - 1) % block_size
  if lengths is not None and not causal:
    real = (jnp.arange(length) < lengths[:, None])[..., None]
    key_seen = real if key_seen is None else key_seen & real
  relative = None
  if relative_keys is not None and relative_values is not None:
    relative = (relative_keys, relative_values)
  output = attend_blocks(
    query, tokens, key_seen, place,
    block_size=block_size,
    look_back=back,
    causal=causal,
    scale=query.shape[-1] ** -0.5 if scale is None else scale,
    relative=relative,
    drop=Drop(dropout_rate, dropout_key) if dropout_rate and dropout_key is not None else None,
  )  # fmt: skip
  return zero_padding(output, lengths), window_after(tokens, segments, lengths, count, left)


def _check(query, key, value, block_size, look_back, causal, relative_keys, relative_values,
           key_seen, segment_ids, lengths, state):  # fmt: skip
  checks.check_grouped_sequence(NAME, query, key, value)
  batch, length, heads, dim = query.shape
  if key.shape[2] != heads:
    checks.fail(NAME, "key", f"have the {heads} heads of query", key.shape, "one per head")
  if block_size < 1:
    checks.fail(NAME, "block_size", "be at least 1", block_size, "tokens of a block")
  if look_back < 0 or look_back % block_size:
    checks.fail(NAME, "look_back", f"be a multiple of block_size ({block_size})", look_back,
                "whole blocks are seen")  # fmt: skip
  if (relative_keys is None) != (relative_values is None):
    checks.fail(NAME, "relative_keys", "be given with relative_values", None, "both or neither")
  if relative_keys is not None:
    rows = relative_keys.shape[0]
    if rows % 2 == 0:
      checks.fail(NAME, "relative_keys", "have an odd number of rows", rows, "-R .. R")
    checks.check_shape(NAME, "relative_keys", relative_keys, (rows, dim), "[2 R + 1, K]")
    width = (rows, value.shape[3])
    checks.check_shape(NAME, "relative_values", relative_values, width, "[2 R + 1, V]")
  checks.check_segments(NAME, segment_ids, batch, length)
  checks.check_shape(NAME, "lengths", lengths, (batch,), "one length per row")
  checks.check_integer(NAME, "lengths", lengths)
  checks.check_shape(NAME, "key_seen", key_seen, (batch, length, heads), "per token and head")
  for name, given in (("segment_ids", segment_ids), ("initial_state", state)):
    if given is not None and not causal:
      checks.fail(NAME, name, "be None where causal is False", "an array", "for decoders")
  if state is not None:
    if key_seen is not None:
      checks.fail(NAME, "key_seen", "be None with an initial_state", "an array", "not stored")
    left = block_window(block_size, look_back)
    checks.check_store(NAME, state, key, value, left, "[B, look_back + block_size - 1, H, K]")
