"""The token mixer of TransNormerLLM and its relatives: gated, normalised lightning attention."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..pallas_kernels import (
  lightning_attention,
  lightning_attention_step,
  sharded_lightning_attention,
)
from .activations import activation
from .norms import make_norm
from .partitioning import constrain, logical, operator_axes
from .positions import LRPE, position_after, positions_from
from .projections import HeadsIn, HeadsOut, dense
from .variables import Constant


class LightningState(NamedTuple):
  """All that a layer remembers of the past; its size does not grow with it."""

  memory: Float[Array, "B H K V"]  # float32; K is twice the head_dim under LRPE
  position: Int[Array, " B"]  # of the next token


@dataclasses.dataclass(frozen=True)
class LightningMixerConfig:
  """What distinguishes the published variants. The defaults are TransNormerLLM's."""

  features: int  # model width D
  heads: int
  head_dim: int
  lrpe: bool = False  # learned relative positions on query and key
  query_key_activation: str = "silu"
  value_activation: str = "identity"
  gate: str = "full"  # "full": x W_u; "low_rank": x G1 G2 with `gate_rank`; "none"
  gate_activation: str = "identity"
  gate_rank: int = 0
  norm: str = "srms"  # over the joined heads, before the gate: "srms", "rms", "layer"
  norm_eps: float = 1e-6
  use_bias: bool = False
  init_stddev: float = 0.02
  implementation: str | None = None  # of lightning_attention
  chunk_size: int | None = None

  def __post_init__(self):
    if self.gate not in ("full", "low_rank", "none"):
      raise ValueError(
        f"LightningMixerConfig: gate must be 'full', 'low_rank' or 'none'; got {self.gate!r}"
        " (low_rank also needs gate_rank)"
      )
    if self.gate == "low_rank" and self.gate_rank < 1:
      raise ValueError(
        f"LightningMixerConfig: gate_rank must be at least 1; got {self.gate_rank}"
        " (the rank of the low-rank gate)"
      )


class LightningMixer(nnx.Module):
  """y = (gate(x) * norm(lightning_attention(f(x W_q), f(x W_k), g(x W_v)))) W_out.

  Paper: Various Lengths, Constant Speed (2024), gated linear attention. See `LightningMixerConfig`
  for the variants; `decay_rates` (one rate >= 0 per head, or None for no decay) belongs to a layer.
  """

  def __init__(
    self,
    config: LightningMixerConfig,
    decay_rates: np.ndarray | None,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.config = c = config
    self.dtype = dtype
    kwargs = dict(
      use_bias=c.use_bias,
      init=nnx.initializers.normal(c.init_stddev),
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    inner = c.heads * c.head_dim
    parts = 4 if c.gate == "full" else 3  # query, key, value and perhaps the gate
    self.heads_in = HeadsIn(c.features, c.heads, c.head_dim, parts=parts, **kwargs)
    self.heads_out = HeadsOut(c.heads, c.head_dim, c.features, **kwargs)
    self.norm = make_norm(c.norm, inner, eps=c.norm_eps, param_dtype=param_dtype)
    if c.gate == "low_rank":
      kwargs["use_bias"] = False
      self.gate_down = dense(c.features, c.gate_rank, ("embed", None), **kwargs)
      self.gate_up = dense(c.gate_rank, inner, (None, "heads"), **kwargs)
    self.lrpe = LRPE(c.heads, c.head_dim, param_dtype=jnp.float32) if c.lrpe else None
    rates = np.zeros(c.heads) if decay_rates is None else np.asarray(decay_rates)
    if rates.shape != (c.heads,) or np.any(rates < 0):
      raise ValueError(
        f"LightningMixer: decay_rates must be {c.heads} numbers >= 0, one per head; got"
        f" {rates.tolist()} (see pallas_kernels.lightning_attention.decay_rates)"
      )
    self.log_decay = Constant(jnp.asarray(-rates, jnp.float32), **logical("heads"))

  def init_state(self, batch: int, max_length: int | None = None) -> LightningState:
    """The state before the first token. Its size does not depend on `max_length`."""
    c = self.config
    shape = (batch, c.heads, c.head_dim * (2 if c.lrpe else 1), c.head_dim)
    wide = jnp.promote_types(self.dtype, jnp.float32)
    return LightningState(jnp.zeros(shape, wide), jnp.zeros((batch,), jnp.int32))

  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    state: LightningState | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], LightningState]:
    """Mixes a whole sequence; returns (y, state after the last token).

    segment_ids: packed documents, a change of id is a boundary. positions: of the tokens, by
    default counted on from the state. lengths: tokens past a row's length are padding and leave the
    state alone. state: continues the document of the first token.
    """
    del dropout_key  # nothing here is random
    batch, length, _ = x.shape
    fresh = state is None
    state = self.init_state(batch) if fresh else state
    if positions is None:
      positions = positions_from(length, None if fresh else state.position)
    query, key, value, gate = self._project(x, positions)
    output, memory = self._attend(query, key, value, state.memory, segment_ids, lengths)
    output = constrain(output, "batch", "length", "heads", None)
    following = position_after(positions, lengths, state.position)
    return self._finish(output, gate), LightningState(memory, following)

  def step(
    self, x: Float[Array, "B D"], state: LightningState
  ) -> tuple[Float[Array, "B D"], LightningState]:
    """One token."""
    query, key, value, gate = self._project(x[:, None], state.position[:, None])
    output, memory = lightning_attention_step(
      query[:, 0], key[:, 0], value[:, 0], self.log_decay[...], state.memory
    )
    return self._finish(output[:, None], gate)[:, 0], LightningState(memory, state.position + 1)

  def _project(self, x, positions):
    c = self.config
    query, key, value, *gate = self.heads_in(x)  # each [B, T, H, K]
    query, key = (activation(c.query_key_activation)(part) for part in (query, key))
    value = activation(c.value_activation)(value)
    if self.lrpe is not None:
      query, key = self.lrpe(query, positions), self.lrpe(key, positions)  # [B, T, H, 2 K]
    if c.gate == "low_rank":
      gate = [self.gate_up(self.gate_down(x)).reshape(value.shape)]
    return query, key, value, activation(c.gate_activation)(gate[0]) if gate else None

  def _attend(self, query, key, value, memory, segment_ids, lengths):
    options = dict(
      segment_ids=segment_ids,
      lengths=lengths,
      initial_state=memory,
      chunk_size=self.config.chunk_size,
      implementation=self.config.implementation,
    )
    split = operator_axes()
    if split is None:
      return lightning_attention(query, key, value, self.log_decay[...], **options)
    return sharded_lightning_attention(
      query,
      key,
      value,
      self.log_decay[...],
      **split,
      **options,
    )

  def _finish(self, output, gate):
    joined = output.reshape(*output.shape[:2], -1)
    output = self.norm(joined).reshape(output.shape)
    return self.heads_out(output if gate is None else gate * output)
