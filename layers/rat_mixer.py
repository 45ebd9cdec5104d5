"""The token mixer of RAT: a gated recurrence inside chunks, softmax attention across them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..pallas_kernels import (
  RatState,
  empty_rat_state,
  rat_attention,
  rat_attention_step,
  sharded_rat_attention,
)
from .partitioning import constrain, logical, operator_axes
from .projections import HeadsIn, HeadsOut

# Initial logit of the gate where every chunk is one token: almost nothing of the token is damped.
OPEN = -8.0


@dataclasses.dataclass(frozen=True)
class RatMixerConfig:
  """Sizes of a layer. The defaults are those of the released models."""

  features: int  # model width D
  heads: int
  head_dim: int
  groups: int = 2  # distinct queries and keys; head h has those of group h mod groups
  chunk_size: int = 16
  rotary_base: float | None = 10000.0  # of the rotation by chunk numbers; None: no positions
  init_stddev: float = 0.02
  implementation: str | None = None  # of rat_attention

  def __post_init__(self):
    if self.groups < 1 or self.heads % self.groups:
      raise ValueError(
        f"RatMixerConfig: groups must divide the {self.heads} heads; got {self.groups} (head h has"
        " query and key of group h mod groups)"
      )
    if self.chunk_size < 1:
      raise ValueError(
        f"RatMixerConfig: chunk_size must be at least 1; got {self.chunk_size} (released models"
        " have 16)"
      )
    if self.rotary_base is not None and self.head_dim % 2:
      raise ValueError(
        f"RatMixerConfig: head_dim must be even for rotary positions; got {self.head_dim}"
        " (rotary_base=None leaves them out)"
      )


class RatMixer(nnx.Module):
  """y = (sigmoid(x W_z) * rat_attention(x W_q, x W_k, x W_v, x W_g + bias)) W_out.

  See `rat_attention` for the equations. W_z, W_v and W_g are one parameter [3, D, H, K], split over
  devices by heads; W_q and W_k are another, [2, D, G, K], which every device has whole, since any
  heads need all groups. The initial `gate_bias` is log(u) with u ~ U(1, L - 1) per channel, so that
  channels forget at different rates; 0 for chunks of L = 2, and -8 for L = 1, where the gate only
  damps the token (the published code leaves that case undefined).
  Paper: RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling (2025), section 3.
  """

  def __init__(
    self,
    config: RatMixerConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.config = c = config
    self.dtype = dtype
    init = nnx.initializers.normal(c.init_stddev)
    kwargs = dict(use_bias=False, init=init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.gated_heads_in = HeadsIn(c.features, c.heads, c.head_dim, parts=3, **kwargs)
    self.query_key_heads_in = HeadsIn(
      c.features, c.groups, c.head_dim, parts=2, heads_axis=None, **kwargs
    )
    shape = (c.heads, c.head_dim)
    bias = initial_gate_bias(rngs.params(), shape, c.chunk_size, param_dtype)
    self.gate_bias = nnx.Param(bias, **logical("heads", None))
    self.heads_out = HeadsOut(c.heads, c.head_dim, c.features, **kwargs)

  def init_state(self, batch: int, max_length: int | None = None) -> RatState:
    """The state before the first token, with a slot for every chunk of `max_length` tokens.

    Raises:
      ValueError: no `max_length`.
    """
    c = self.config
    if max_length is None:
      raise ValueError(
        "RatMixer: max_length must be given; got None (the state has a slot for every chunk)"
      )
    slots = max(1, math.ceil(max_length / c.chunk_size))
    return empty_rat_state(batch, slots, c.heads, c.head_dim, jnp.dtype(self.dtype))

  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    state: RatState | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], RatState]:
    """Mixes a whole sequence; see the mixer protocol in WORKSPACE.md.

    `positions` are not used: chunks are counted from the start of each document, or on from the
    state. Without a `state` the returned one has no slot for further chunks: start from
    `init_state` to go on afterwards.
    """
    del positions, dropout_key  # nothing here is random
    split = operator_axes()
    function = rat_attention if split is None else sharded_rat_attention
    query, key, value, gate, output_logits = self._project(x)
    output, state = function(
      query, key, value, gate, self.gate_bias[...], output_logits,
      segment_ids=segment_ids,
      lengths=lengths,
      initial_state=state,
      implementation=self.config.implementation,
      **self._chunks(),
      **(split or {}),
    )  # fmt: skip
    output = constrain(output, "batch", "length", "heads", None)
    return self.heads_out(output), state

  def step(self, x: Float[Array, "B D"], state: RatState) -> tuple[Float[Array, "B D"], RatState]:
    """One token."""
    query, key, value, gate, output_logits = self._project(x)
    output, state = rat_attention_step(
      query, key, value, gate, self.gate_bias[...], output_logits, state, **self._chunks()
    )
    return self.heads_out(output), state

  def _project(self, x):
    output_logits, value, gate = self.gated_heads_in(x)  # [..., H, K] each
    query, key = self.query_key_heads_in(x)  # [..., G, K]
    return query, key, value, gate, output_logits

  def _chunks(self):
    return dict(chunk_size=self.config.chunk_size, rotary_base=self.config.rotary_base)


def initial_gate_bias(
  rng: jax.Array, shape: tuple[int, ...], span: int, dtype: DTypeLike = jnp.float32
) -> Float[Array, "..."]:
  """log(u) with u ~ U(1, span - 1), which gates a channel's past by u / (1 + u); -8 for span 1.

  `span` is the number of tokens that a recurrence runs over.
  """
  if span == 1:
    return jnp.full(shape, OPEN, dtype)
  return jnp.log(jax.random.uniform(rng, shape, jnp.float32, 1, span - 1)).astype(dtype)
