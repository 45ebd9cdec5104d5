"""A gated recurrence over the whole sequence: RAT with a single chunk, its RNN baseline."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..pallas_kernels import linear_recurrence
from ..pallas_kernels.segments import starts, zero_padding
from .partitioning import constrain, logical
from .projections import HeadsIn, HeadsOut
from .rat_mixer import initial_gate_bias


class RecurrentState(NamedTuple):
  """All that a layer remembers of the past; its size does not grow with it."""

  running_value: Float[Array, "B H K"]  # float32


@dataclasses.dataclass(frozen=True)
class RecurrentMixerConfig:
  """Sizes of a layer. Heads are how channels are split over devices; they change no number."""

  features: int  # model width D
  heads: int
  head_dim: int
  train_length: int = 4096  # tokens that the initial gates are spread over
  init_stddev: float = 0.02

  def __post_init__(self):
    if self.train_length < 1:
      raise ValueError(
        f"RecurrentMixerConfig: train_length must be at least 1; got {self.train_length} (released"
        " models have 4096)"
      )


class RecurrentMixer(nnx.Module):
  """y = (sigmoid(x W_z) * v~) W_out with v~_t = g_t v~_{t-1} + (1 - g_t) v_t, per channel.

  g = sigmoid(x W_g + bias), v = x W_v; W_z, W_v and W_g are one parameter [3, D, H, K]. The initial
  bias is log(u) with u ~ U(1, T - 1), T the `train_length`. Gates and recurrence are float32 (or
  wider); the work is linear in the length. Over a mesh every device has all positions of its heads.
  Paper: RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling (2025), baselines.
  """

  def __init__(
    self,
    config: RecurrentMixerConfig,
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
    shape = (c.heads, c.head_dim)
    bias = initial_gate_bias(rngs.params(), shape, c.train_length, param_dtype)
    self.gate_bias = nnx.Param(bias, **logical("heads", None))
    self.heads_out = HeadsOut(c.heads, c.head_dim, c.features, **kwargs)

  def init_state(self, batch: int, max_length: int | None = None) -> RecurrentState:
    """The state before the first token. Its size does not depend on `max_length`."""
    shape = (batch, self.config.heads, self.config.head_dim)
    return RecurrentState(jnp.zeros(shape, self._wide()))

  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    state: RecurrentState | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], RecurrentState]:
    """Mixes a whole sequence; see the mixer protocol in WORKSPACE.md."""
    del positions, dropout_key  # there are no positions, and nothing here is random
    before = (self.init_state(x.shape[0]) if state is None else state).running_value
    output_gate, value, gate = self._project(x)  # [B, T, H, K] each
    kept = gate if segment_ids is None else jnp.where(starts(segment_ids)[..., None, None], 0, gate)
    added = (1 - gate) * value
    added = added.at[:, 0].add(kept[:, 0] * before)  # the past enters with the first token
    # One token needs the one before it, whichever device has it: the length is not split here.
    kept, added = (constrain(part, "batch", None, "heads", None) for part in (kept, added))
    running = linear_recurrence(kept, added)
    after = running[:, -1]
    output = output_gate * running
    if lengths is not None:
      last = jnp.maximum(lengths - 1, 0)[:, None, None, None]
      after = jnp.take_along_axis(running, last, axis=1)[:, 0]
      after = jnp.where((lengths == 0)[:, None, None], before, after)
      output = zero_padding(output, lengths)
    output = constrain(output.astype(self.dtype), "batch", "length", "heads", None)
    return self.heads_out(output), RecurrentState(after)

  def step(
    self, x: Float[Array, "B D"], state: RecurrentState
  ) -> tuple[Float[Array, "B D"], RecurrentState]:
    """One token."""
    output_gate, value, gate = self._project(x)  # [B, H, K] each
    running = gate * state.running_value + (1 - gate) * value
    return self.heads_out((output_gate * running).astype(self.dtype)), RecurrentState(running)

  def _project(self, x):
    output_logits, value, gate_logits = (p.astype(self._wide()) for p in self.gated_heads_in(x))
    gate = jax.nn.sigmoid(gate_logits + self.gate_bias[...].astype(self._wide()))
    return jax.nn.sigmoid(output_logits), value, gate

  def _wide(self):
    return jnp.promote_types(self.dtype, jnp.float32)
