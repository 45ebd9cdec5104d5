"""Gated short convolutions: the mixers that see the last few tokens, exactly and for little."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..pallas_kernels.segments import last_segment, run_index
from .partitioning import constrain, logical
from .projections import dense


def short_convolution(
  x: Float[Array, "B T D"],
  taps: Float[Array, "K D"],
  *,
  segment_ids: Int[Array, "B T"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  state: Float[Array, "B K-1 D"],
) -> tuple[Float[Array, "B T D"], Float[Array, "B K-1 D"]]:
  """y_t = sum over i < K of taps[i] x_{t-K+1+i}, channel by channel; the last tap is the token's.

  Inputs before the first token are those of `state` (oldest first), which belong to the document
  of that token; no tap reaches into another document. Tokens at or past `lengths` are padding and
  do not enter the new state. K shifted multiply-adds, in float32 (or wider), that the compiler
  fuses into one pass; a length that is split over devices costs K - 1 tokens of exchange.

  Returns:
    (y in the dtype of x, the last K-1 inputs of the document that goes on).
  """
  length, reach = x.shape[1], taps.shape[0] - 1
  wide = jnp.promote_types(x.dtype, jnp.float32)
  padded = jnp.concatenate([state.astype(x.dtype), x], axis=1)  # [B, K-1+T, D]
  documents = None if segment_ids is None else run_index(segment_ids)
  # The state belongs to document 0.
  before = None if documents is None else jnp.pad(documents, ((0, 0), (reach, 0)))
  total = jnp.zeros(x.shape, wide)
  for i in range(reach + 1):
    term = padded[:, i : i + length].astype(wide) * taps[i].astype(wide)
    if before is not None and i < reach:
      term = jnp.where(jnp.equal(before[:, i : i + length], before[:, reach:])[..., None], term, 0)
    total += term

  def ending(x):  # the K-1 entries that end at each row's last real token
    if lengths is None:
      return x[:, length:]
    rows = lengths[:, None] + jnp.arange(reach)
    return jnp.take_along_axis(x, rows.reshape(*rows.shape, *(1,) * (x.ndim - 2)), axis=1)

  state = ending(padded)
  if documents is not None:
    last = documents[:, -1] if lengths is None else last_segment(documents, lengths)
    owner = ending(before)
    state = jnp.where((owner == last[:, None])[..., None], state, 0)
  return total.astype(x.dtype), state


def short_convolution_step(
  x: Float[Array, "B D"], taps: Float[Array, "K D"], state: Float[Array, "B K-1 D"]
) -> tuple[Float[Array, "B D"], Float[Array, "B K-1 D"]]:
  """One token of `short_convolution`."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  window = jnp.concatenate([state.astype(x.dtype), x[:, None]], axis=1)  # [B, K, D]
  y = jnp.sum(window.astype(wide) * taps.astype(wide), axis=1)
  return y.astype(x.dtype), window[:, 1:]


def convolution_init(key: jax.Array, shape: tuple[int, ...], taps: int, dtype: DTypeLike):
  """Uniform in +-1/sqrt(taps), as PyTorch draws depthwise convolutions and their biases."""
  bound = 1 / math.sqrt(taps)
  return jax.random.uniform(key, shape, dtype, -bound, bound)


@dataclasses.dataclass(frozen=True)
class BaseConvConfig:
  """Sizes of `BaseConv`. The defaults are those of the released models."""

  features: int  # model width D
  expand: int = 4  # width of the input projection relative to D; half of it is convolved
  kernel_size: int = 3
  use_bias: bool = True  # of the two projections; the convolution has none
  init_stddev: float = 0.02
  out_init_stddev: float | None = None  # None: the same

  def __post_init__(self):
    if self.kernel_size < 1:
      raise ValueError(
        f"BaseConvConfig: kernel_size must be at least 1; got {self.kernel_size} (released: 3)"
      )
    if self.expand * self.features % 2 or self.expand < 1:
      raise ValueError(
        f"BaseConvConfig: expand must make an even width; got {self.expand} with {self.features}"
        " features (the projection is cut in halves)"
      )

  @property
  def width(self) -> int:
    return self.expand * self.features // 2


class BaseConv(nnx.Module):
  """y = (silu(conv(x W_a + b_a)) * (x W_g + b_g)) W_out + b_out: BASED's gated short convolution.

  Paper: Simple linear attention language models (2024), BaseConv, as the released code has it. The
  state is the last K-1 inputs of the convolution, [B, K-1, width].
  """

  def __init__(
    self,
    config: BaseConvConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.config = c = config
    self.dtype = dtype
    kwargs = dict(use_bias=c.use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    init = nnx.initializers.normal(c.init_stddev)
    self.conv_in = dense(c.features, c.width, ("embed", "mlp"), init=init, **kwargs)
    self.gate_in = dense(c.features, c.width, ("embed", "mlp"), init=init, **kwargs)
    out_stddev = c.init_stddev if c.out_init_stddev is None else c.out_init_stddev
    init = nnx.initializers.normal(out_stddev)
    self.out = dense(c.width, c.features, ("mlp", "embed"), init=init, **kwargs)
    taps = convolution_init(rngs.params(), (c.kernel_size, c.width), c.kernel_size, param_dtype)
    self.taps = nnx.Param(taps, **logical(None, "mlp"))

  def init_state(self, batch: int, max_length: int | None = None) -> Float[Array, "B S D"]:
    """The state before the first token. Its size does not depend on `max_length`."""
    c = self.config
    return jnp.zeros((batch, c.kernel_size - 1, c.width), self.dtype)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    state: Float[Array, "B S W"] | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], Float[Array, "B S W"]]:
    """Mixes a whole sequence; see the mixer protocol in WORKSPACE.md."""
    del positions, dropout_key  # a convolution knows distances only; nothing here is random
    state = self.init_state(x.shape[0]) if state is None else state
    inputs = constrain(self.conv_in(x), "batch", "length", "mlp")
    mixed, state = short_convolution(
      inputs, self.taps[...], segment_ids=segment_ids, lengths=lengths, state=state
    )
    return self.out(jax.nn.silu(mixed) * self.gate_in(x)), state

  def step(
    self, x: Float[Array, "B D"], state: Float[Array, "B S W"]
  ) -> tuple[Float[Array, "B D"], Float[Array, "B S W"]]:
    """One token."""
    mixed, state = short_convolution_step(self.conv_in(x), self.taps[...], state)
    return self.out(jax.nn.silu(mixed) * self.gate_in(x)), state


class ProjectedConv(nnx.Module):
  """y = (conv(x) + b_c) * (x W + b) + x: the short convolution of the recall experiments.

  The same idea with another layout: the input itself is convolved, the gate is a projection
  without activation, and the layer has a residual of its own. State: the last K-1 inputs [B, K-1,
  D]. Paper: Zoology (2023), as its code for the synthetic task has it.
  """

  def __init__(
    self,
    features: int,
    *,
    kernel_size: int = 3,
    init_stddev: float = 0.02,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.features, self.kernel_size, self.dtype = features, kernel_size, dtype
    self.gate_in = dense(
      features,
      features,
      ("embed", None),
      use_bias=True,
      init=nnx.initializers.normal(init_stddev),
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    taps, bias = (
      convolution_init(rngs.params(), shape, kernel_size, param_dtype)
      for shape in ((kernel_size, features), (features,))
    )
    self.taps = nnx.Param(taps, **logical(None, "embed"))
    self.bias = nnx.Param(bias, **logical("embed"))

  def init_state(self, batch: int, max_length: int | None = None) -> Float[Array, "B S D"]:
    """The state before the first token. Its size does not depend on `max_length`."""
    return jnp.zeros((batch, self.kernel_size - 1, self.features), self.dtype)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    state: Float[Array, "B S D"] | None = None,
    dropout_key: jax.Array | None = None,
  ) -> tuple[Float[Array, "B T D"], Float[Array, "B S D"]]:
    """Mixes a whole sequence; see the mixer protocol in WORKSPACE.md."""
    del positions, dropout_key
    state = self.init_state(x.shape[0]) if state is None else state
    x = x.astype(self.dtype)
    mixed, state = short_convolution(
      x, self.taps[...], segment_ids=segment_ids, lengths=lengths, state=state
    )
    return self._finish(x, mixed), state

  def step(
    self, x: Float[Array, "B D"], state: Float[Array, "B S D"]
  ) -> tuple[Float[Array, "B D"], Float[Array, "B S D"]]:
    """One token."""
    x = x.astype(self.dtype)
    mixed, state = short_convolution_step(x, self.taps[...], state)
    return self._finish(x, mixed), state

  def _finish(self, x, mixed):
    return (mixed + self.bias[...].astype(self.dtype)) * self.gate_in(x) + x
