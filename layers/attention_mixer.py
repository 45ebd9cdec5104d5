"""Attention as a token mixer: softmax over a sliding window or over everything, or softplus."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..pallas_kernels import (
  Variant,
  empty_cache,
  empty_window,
  left_keys,
  sharded_sliding_window_attention,
  sharded_softmax_attention,
  sharded_softplus_attention,
  sliding_window_attention,
  sliding_window_attention_step,
  softmax_attention,
  softmax_attention_step,
  softplus_attention,
  softplus_attention_step,
)
from .partitioning import constrain, operator_axes
from .positions import position_after, positions_from, rotary, rotary_pairs
from .projections import HeadsIn, HeadsOut


class AttentionState(NamedTuple):
  """The keys (after rotation) and values that the next token may see."""

  memory: Any  # WindowState, or CacheState without a window
  position: Int[Array, " B"]  # of the next token


@dataclasses.dataclass(frozen=True)
class AttentionMixerConfig:
  """Sizes and variants of attention. The defaults are those of BASED."""

  features: int  # model width D
  heads: int
  head_dim: int
  key_heads: int | None = None  # of keys and values, fewer than heads; None: as many
  window_size: int | None = None  # None: every earlier token is seen
  window_convention: str = "half"  # what window_size counts, see `left_keys`
  variant: Variant | None = None  # of softplus_attention; None: softmax
  rotary_fraction: float = 1.0  # part of the channels of each head; 0 for no positions
  rotary_base: float = 10000.0
  qkv_bias: bool = False
  out_bias: bool = False
  init_stddev: float = 0.02
  out_init_stddev: float | None = None  # None: the same
  implementation: str | None = None  # of the operator
  chunk_size: int | None = None  # of the operators that have one

  def __post_init__(self):
    rotary_pairs(self.head_dim, self.rotary_fraction)  # raises for what cannot be turned
    if self.key_heads is not None and (self.key_heads < 1 or self.heads % self.key_heads):
      raise ValueError(
        f"AttentionMixerConfig: key_heads must divide the {self.heads} heads; got"
        f" {self.key_heads} (None for one per head)"
      )
    if self.window_size is not None and self.variant is not None:
      raise ValueError(
        f"AttentionMixerConfig: window_size must be None with a variant; got {self.window_size}"
        " (softplus attention has no window)"
      )
    if self.window_size is not None:
      left_keys(self.window_size, self.window_convention)  # raises for an unknown convention

  @property
  def left(self) -> int | None:
    """Keys to the left of a token that it sees beside itself; None for all."""
    if self.window_size is None:
      return None
    return left_keys(self.window_size, self.window_convention)


class AttentionMixer(nnx.Module):
  """y = softmax(q k^T / sqrt(K)) v W_out, causal, with rotary q and k; see `AttentionMixerConfig`.

  With a `variant` it is `softplus_attention` of the same queries, keys and values, which has no
  parameters of its own: a model can be trained with one and run with another.

  With a window the state is a ring buffer of the last keys and values and does not grow; without
  one it is a cache of `max_length` tokens. Keys are stored after their rotation.
  """

  def __init__(
    self,
    config: AttentionMixerConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.config = c = config
    self.dtype = dtype
    kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    kwargs_in = dict(use_bias=c.qkv_bias, init=nnx.initializers.normal(c.init_stddev), **kwargs)
    if c.key_heads is None:
      self.heads_in = HeadsIn(c.features, c.heads, c.head_dim, parts=3, **kwargs_in)
    else:
      self.query_heads_in = HeadsIn(c.features, c.heads, c.head_dim, parts=1, **kwargs_in)
      self.key_value_heads_in = HeadsIn(c.features, c.key_heads, c.head_dim, parts=2, **kwargs_in)
    out_stddev = c.init_stddev if c.out_init_stddev is None else c.out_init_stddev
    init = nnx.initializers.normal(out_stddev)
    self.heads_out = HeadsOut(
      c.heads, c.head_dim, c.features, use_bias=c.out_bias, init=init, **kwargs
    )

  def init_state(self, batch: int, max_length: int | None = None) -> AttentionState:
    """The state before the first token. Without a window it has room for `max_length` tokens.

    Raises:
      ValueError: no `max_length` where there is no window either.
    """
    c = self.config
    sizes = (c.key_heads or c.heads, c.head_dim, c.head_dim, jnp.dtype(self.dtype))
    position = jnp.zeros((batch,), jnp.int32)
    if c.left is not None:
      return AttentionState(empty_window(batch, c.left, *sizes), position)
    if max_length is None:
      raise ValueError(
        "AttentionMixer: max_length must be given for attention without a window; got None (its"
        " state is a cache of that many tokens)"
      )
    return AttentionState(empty_cache(batch, max_length, *sizes), position)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    state: AttentionState | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], AttentionState]:
    """Mixes a whole sequence; see the mixer protocol in WORKSPACE.md.

    Without a window and without a `state`, the returned cache is full: start from `init_state` to
    go on afterwards.
    """
    del dropout_key  # nothing here is random
    batch, length, _ = x.shape
    if positions is None:
      positions = positions_from(length, None if state is None else state.position)
    query, key, value = self._project(x, positions)
    memory = None if state is None else state.memory
    output, memory = self._attend(query, key, value, memory, segment_ids, lengths)
    output = constrain(output, "batch", "length", "heads", None)
    before = jnp.zeros((batch,), jnp.int32) if state is None else state.position
    following = position_after(positions, lengths, before)
    return self.heads_out(output), AttentionState(memory, following)

  def step(
    self, x: Float[Array, "B D"], state: AttentionState
  ) -> tuple[Float[Array, "B D"], AttentionState]:
    """One token."""
    projected = self._project(x[:, None], state.position[:, None])
    query, key, value = (part[:, 0] for part in projected)
    if self.config.variant is not None:
      output, memory = softplus_attention_step(
        query, key, value, state.memory, variant=self.config.variant
      )
    elif self.config.left is None:
      output, memory = softmax_attention_step(query, key, value, state.memory)
    else:
      output, memory = sliding_window_attention_step(
        query, key, value, state.memory, left=self.config.left
      )
    return self.heads_out(output), AttentionState(memory, state.position + 1)

  def _project(self, x, positions):
    c = self.config
    if c.key_heads is None:
      query, key, value = self.heads_in(x)  # [B, T, H, K] each
    else:
      (query,), (key, value) = self.query_heads_in(x), self.key_value_heads_in(x)  # [B, T, G, K]
    turn = dict(fraction=c.rotary_fraction, base=c.rotary_base)
    return rotary(query, positions, **turn), rotary(key, positions, **turn), value

  def _attend(self, query, key, value, memory, segment_ids, lengths):
    c = self.config
    options: dict[str, Any] = dict(
      segment_ids=segment_ids,
      lengths=lengths,
      initial_state=memory,
      implementation=c.implementation,
    )
    if c.left is not None:
      options |= dict(left=c.left, chunk_size=c.chunk_size)
    split = operator_axes()
    if c.variant is not None:
      function = softplus_attention if split is None else sharded_softplus_attention
      options |= dict(variant=c.variant, chunk_size=c.chunk_size)
      return function(query, key, value, **(split or {}), **options)
    if split is None:
      function = softmax_attention if c.left is None else sliding_window_attention
      return function(query, key, value, **options)
    if c.left is None:  # every query needs all keys: the length is gathered
      del split["sequence_axis"]
      return sharded_softmax_attention(query, key, value, **split, **options)
    return sharded_sliding_window_attention(query, key, value, **split, **options)
