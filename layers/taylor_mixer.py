"""The global mixer of BASED: linear attention with second-order Taylor features."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..pallas_kernels import (
  sharded_taylor_attention,
  taylor_attention,
  taylor_attention_step,
)
from ..pallas_kernels.taylor_attention.features import feature_count
from .norms import RMSNorm
from .partitioning import constrain, logical, operator_axes
from .projections import HeadsIn, HeadsOut
from .variables import Constant

OUTPUT_NORMS = ("denominator", "rms")


class TaylorState(NamedTuple):
  """All that a layer remembers of the past; its size does not grow with it."""

  memory: Float[Array, "B H P V1"]  # float32; the last column is the normaliser's


@dataclasses.dataclass(frozen=True)
class TaylorMixerConfig:
  """What distinguishes the published variants. The defaults are those of the released models."""

  features: int  # model width D
  heads: int
  head_dim: int  # of values; heads * head_dim need not be the model width
  feature_dim: int = 16  # of queries and keys
  output_norm: str = "denominator"  # or "rms": RMSNorm of the numerator alone, per head
  norm_eps: float = 1e-5  # of "rms"
  decay_offset: float | None = None  # c: head h forgets at 1 - 2^(c - h) per token; None: nothing
  use_bias: bool = False
  init_stddev: float = 0.02
  out_init_stddev: float | None = None  # None: the same
  implementation: str | None = None  # of taylor_attention
  chunk_size: int | None = None

  def __post_init__(self):
    if self.output_norm not in OUTPUT_NORMS:
      raise ValueError(
        f"TaylorMixerConfig: output_norm must be one of {OUTPUT_NORMS}; got {self.output_norm!r}"
        " (released models divide by the denominator)"
      )
    if self.decay_offset is not None and self.decay_offset >= 0:
      raise ValueError(
        f"TaylorMixerConfig: decay_offset must be negative; got {self.decay_offset} (the authors"
        " use -3; None for no decay)"
      )


class TaylorMixer(nnx.Module):
  """y = taylor_attention(x W_q, x W_k, x W_v) W_out: BASED's linear attention.

  No positions: order enters through the causal sum alone. With output_norm "rms" the weighted sum
  is not divided by the sum of its weights but normalised over each head's channels. Paper: Simple
  linear attention language models (2024), section 3; the decay is a variant of its appendix.
  """

  def __init__(
    self,
    config: TaylorMixerConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.config = c = config
    self.dtype = dtype
    kwargs = dict(use_bias=c.use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    init = nnx.initializers.normal(c.init_stddev)
    self.query_key_heads_in = HeadsIn(
      c.features, c.heads, c.feature_dim, parts=2, init=init, **kwargs
    )
    self.value_heads_in = HeadsIn(c.features, c.heads, c.head_dim, parts=1, init=init, **kwargs)
    out_stddev = c.init_stddev if c.out_init_stddev is None else c.out_init_stddev
    init = nnx.initializers.normal(out_stddev)
    self.heads_out = HeadsOut(c.heads, c.head_dim, c.features, init=init, **kwargs)
    rms = c.output_norm == "rms"
    self.norm = RMSNorm(c.head_dim, eps=c.norm_eps, param_dtype=param_dtype) if rms else None
    rates = None if c.decay_offset is None else _log_decay(c.decay_offset, c.heads)
    self.log_decay = None if rates is None else Constant(rates, **logical("heads"))

  def init_state(self, batch: int, max_length: int | None = None) -> TaylorState:
    """The state before the first token. Its size does not depend on `max_length`."""
    c = self.config
    shape = (batch, c.heads, feature_count(c.feature_dim), c.head_dim + 1)
    return TaylorState(jnp.zeros(shape, jnp.promote_types(self.dtype, jnp.float32)))

  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    state: TaylorState | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], TaylorState]:
    """Mixes a whole sequence; see the mixer protocol in WORKSPACE.md."""
    del positions, dropout_key  # there are no positions, and nothing here is random
    query, key, value = self._project(x)
    memory = None if state is None else state.memory
    output, memory = self._attend(query, key, value, memory, segment_ids, lengths)
    output = constrain(output, "batch", "length", "heads", None)
    return self._finish(output), TaylorState(memory)

  def step(
    self, x: Float[Array, "B D"], state: TaylorState
  ) -> tuple[Float[Array, "B D"], TaylorState]:
    """One token."""
    query, key, value = self._project(x)
    output, memory = taylor_attention_step(
      query, key, value, self._rates(), state.memory, normalize=self.norm is None
    )
    return self._finish(output), TaylorState(memory)

  def _project(self, x):
    return *self.query_key_heads_in(x), *self.value_heads_in(x)  # [..., H, F] twice, [..., H, V]

  def _rates(self):
    return None if self.log_decay is None else self.log_decay[...]

  def _attend(self, query, key, value, memory, segment_ids, lengths):
    options = dict(
      segment_ids=segment_ids,
      lengths=lengths,
      initial_state=memory,
      normalize=self.norm is None,
      chunk_size=self.config.chunk_size,
      implementation=self.config.implementation,
    )
    split = operator_axes()
    if split is None:
      return taylor_attention(query, key, value, self._rates(), **options)
    return sharded_taylor_attention(
      query,
      key,
      value,
      self._rates(),
      **split,
      **options,
    )

  def _finish(self, output):
    return self.heads_out(output if self.norm is None else self.norm(output))


def _log_decay(offset, heads):
  """log(1 - 2^(offset - h)) for head h, float32."""
  return jnp.asarray(np.log1p(-(2.0 ** (offset - np.arange(heads)))), jnp.float32)
