"""BASED: short convolutions, a little softmax attention, and linear attention with Taylor features.

Paper: Simple linear attention language models balance the recall-throughput tradeoff (2024). Every
layer has one mixer: a gated short convolution, softmax attention over a small window, or linear
attention over everything; all have a gated linear unit. Where the paper and the released code
differ, the defaults follow the code.

The attention models that the paper compares with are configurations of the same family: full
attention in every layer, rotary positions on half of the channels. Its third comparison, Mamba, is
not here: a selective state space is none of the mixers of this zoo.
"""

import dataclasses
import math

from flax import nnx

from ..layers import (
  AttentionMixer,
  AttentionMixerConfig,
  BaseConv,
  BaseConvConfig,
  Block,
  DecoderLM,
  GatedLinearUnit,
  RMSNorm,
  TaylorMixer,
  TaylorMixerConfig,
  activation,
)
from .decoders import check_dtypes, check_sizes, decoder, dtypes_of, refuse

MIXERS = ("conv", "linear", "sliding", "attention")


@dataclasses.dataclass(frozen=True)
class BasedConfig:
  """Sizes and variants. The defaults are the choices of the released models."""

  vocab_size: int  # padded: 50264 rows for the 50257 tokens of GPT-2
  features: int  # model width
  num_layers: int
  heads: int
  glu_dim: int  # width of the gated linear units
  linear_layers: tuple[int, ...] = ()  # with linear attention
  sliding_layers: tuple[int, ...] = ()  # with a window; a layer that is in both lists is of these
  other_layers: str = "conv"  # mixer of all others, one of `MIXERS`
  feature_dim: int = 16  # of queries and keys of linear attention, per head
  linear_heads: int | None = None  # of linear attention; None: as many as heads
  linear_head_dim: int | None = None  # of its values; None: features / linear heads
  output_norm: str = "denominator"  # of linear attention, or "rms"
  decay_offset: float | None = None  # of linear attention, see `TaylorMixerConfig`
  window_size: int = 256  # "half" of it are keys to the left of a token
  window_convention: str = "half"  # or "left", "total"
  key_heads: int | None = None  # of softmax attention; None: as many as heads
  rotary_fraction: float = 1.0  # of the channels of softmax attention
  rotary_base: float = 10000.0
  conv_expand: int = 4  # half of it times the width is convolved
  conv_kernel_size: int = 3
  conv_bias: bool = True  # of the projections around the convolution
  glu_activation: str = "silu"
  norm_eps: float = 1e-5
  init_stddev: float = 0.02
  residual_in_float32: bool = True  # the stream that the layers add to
  dtype: str = "float32"  # of activations
  param_dtype: str = "float32"
  remat: str = "none"  # "none", "full" or "dots"
  loss_chunk: int = 256  # positions whose logits exist at once
  implementation: str | None = None  # of taylor_attention
  chunk_size: int | None = None
  attention_implementation: str | None = None  # of the two softmax operators

  def __post_init__(self):
    for name in ("linear_layers", "sliding_layers"):  # JSON has lists
      object.__setattr__(self, name, tuple(getattr(self, name)))
      if not all(0 <= layer < self.num_layers for layer in getattr(self, name)):
        refuse(self, name, f"lie in [0, {self.num_layers})", "layers are counted from 0")
    sizes = ("vocab_size", "features", "num_layers", "heads", "glu_dim", "loss_chunk")
    check_sizes(self, *sizes, "feature_dim", "window_size")
    if self.features % self.heads:
      refuse(self, "features", f"be a multiple of heads ({self.heads})", "heads have equal width")
    if self.linear_head_dim is None and self.features % (self.linear_heads or self.heads):
      refuse(self, "linear_heads", "divide features", "or give linear_head_dim")
    if self.other_layers not in MIXERS:
      refuse(self, "other_layers", f"be one of {MIXERS}", "released models use 'conv'")
    check_dtypes(self)
    activation(self.glu_activation)  # these three raise for what is unknown or does not fit
    for make in (self.linear, self.sliding, self.conv):
      make()

  @property
  def out_stddev(self) -> float:
    """Of projections back into the residual stream, drawn smaller the more layers add to it."""
    return self.init_stddev / math.sqrt(2 * self.num_layers)

  def mixer_of(self, layer: int) -> str:
    """Which of `MIXERS` a layer has."""
    if layer in self.sliding_layers:
      return "sliding"
    return "linear" if layer in self.linear_layers else self.other_layers

  def linear(self) -> TaylorMixerConfig:
    heads = self.linear_heads or self.heads
    return TaylorMixerConfig(
      features=self.features,
      heads=heads,
      head_dim=self.linear_head_dim or self.features // heads,
      feature_dim=self.feature_dim,
      output_norm=self.output_norm,
      norm_eps=self.norm_eps,
      decay_offset=self.decay_offset,
      init_stddev=self.init_stddev,
      out_init_stddev=self.out_stddev,
      implementation=self.implementation,
      chunk_size=self.chunk_size,
    )

  def sliding(self) -> AttentionMixerConfig:
    return AttentionMixerConfig(
      features=self.features,
      heads=self.heads,
      head_dim=self.features // self.heads,
      key_heads=self.key_heads,
      window_size=self.window_size,
      window_convention=self.window_convention,
      rotary_fraction=self.rotary_fraction,
      rotary_base=self.rotary_base,
      init_stddev=self.init_stddev,
      out_init_stddev=self.out_stddev,
      implementation=self.attention_implementation,
    )

  def attention(self) -> AttentionMixerConfig:
    return dataclasses.replace(self.sliding(), window_size=None)

  def conv(self) -> BaseConvConfig:
    return BaseConvConfig(
      features=self.features,
      expand=self.conv_expand,
      kernel_size=self.conv_kernel_size,
      use_bias=self.conv_bias,
      init_stddev=self.init_stddev,
      out_init_stddev=self.out_stddev,
    )


def build(config: BasedConfig, rngs: nnx.Rngs) -> DecoderLM:
  """The model with freshly drawn weights, N(0, 0.02^2) with these exceptions of the released code.

  Projections back into the residual stream have 0.02 / sqrt(2 layers), convolutions are uniform in
  +-1/sqrt(taps), biases 0 and norms 1.
  """
  dtypes = dtypes_of(config)
  blocks = [_block(config, layer, dtypes, rngs) for layer in range(config.num_layers)]
  return decoder(config, blocks, _norm(config, dtypes), rngs)


def _block(config: BasedConfig, layer: int, dtypes: dict, rngs: nnx.Rngs) -> Block:
  c, kind = config, config.mixer_of(layer)
  module = dict(conv=BaseConv, linear=TaylorMixer).get(kind, AttentionMixer)
  feed_forward = GatedLinearUnit(
    c.features,
    c.glu_dim,
    activation=c.glu_activation,
    init=nnx.initializers.normal(c.init_stddev),
    down_init=nnx.initializers.normal(c.out_stddev),
    rngs=rngs,
    **dtypes,
  )
  mixer = module(getattr(c, kind)(), rngs=rngs, **dtypes)
  return Block(mixer, feed_forward, _norm(c, dtypes), _norm(c, dtypes))


def _norm(config: BasedConfig, dtypes: dict) -> RMSNorm:
  return RMSNorm(config.features, eps=config.norm_eps, param_dtype=dtypes["param_dtype"])


def parameter_count(config: BasedConfig) -> int:
  """Number of trained weights, the tied embedding counted once; from the sizes alone."""
  c, d = config, config.features
  linear, conv = c.linear(), c.conv()
  keys = (c.key_heads or c.heads) * (d // c.heads)
  softmax = 2 * d * d + 2 * d * keys
  mixers = dict(
    conv=3 * d * conv.width + conv.kernel_size * conv.width + c.conv_bias * (2 * conv.width + d),
    linear=2 * d * linear.heads * (linear.feature_dim + linear.head_dim)
    + linear.head_dim * (linear.output_norm == "rms"),
    sliding=softmax,
    attention=softmax,
  )
  layers = sum(mixers[c.mixer_of(layer)] for layer in range(c.num_layers))
  return layers + c.num_layers * (3 * d * c.glu_dim + 2 * d) + d + c.vocab_size * d


_360M = dict(
  vocab_size=50264,
  features=1024,
  num_layers=27,
  heads=16,
  glu_dim=2048,
  linear_layers=(1, 6, 11, 16, 21),
  sliding_layers=(2, 7, 12, 17, 22),
  dtype="bfloat16",
)
_1B = dict(
  vocab_size=50264,
  features=1792,
  num_layers=36,
  heads=16,
  glu_dim=3584,
  linear_layers=(1, 6, 11, 16, 21, 27, 33),
  sliding_layers=(2, 7, 12, 17, 22, 28, 34),
  dtype="bfloat16",
)
_FULL = dict(other_layers="attention", rotary_fraction=0.5, dtype="bfloat16")
PRESETS: dict[str, BasedConfig] = {
  # The released sizes. Tokens of the Pile seen: 10 B, 10 B, 50 B. The older models, and copies of
  # the small one, say window_size 128 (64 keys to the left), as in parts of the paper.
  "based-360m": BasedConfig(**_360M),
  "based-360m-w128": BasedConfig(**_360M, window_size=128),
  "based-1b": BasedConfig(**_1B),
  "based-1b-50b": BasedConfig(**_1B),
  "based-1.3b": BasedConfig(**_1B, window_size=128),
  # What the authors' throughput was measured with: 28 heads of 64, numerators normalised by RMS.
  "based-1b-throughput": BasedConfig(**_1B, window_size=128, linear_heads=28, output_norm="rms"),
  # Full attention, the paper's Transformer++. Of the large one files of two widths are about.
  "attn-360m": BasedConfig(50272, 1024, 24, 16, 2816, **_FULL),
  "attn-1b": BasedConfig(50272, 1680, 36, 24, 4608, **_FULL),
  "attn-1b-glu4480": BasedConfig(50272, 1680, 36, 24, 4480, **_FULL),
  # Laptop sizes over bytes, with equally many parameters (within 1 %).
  "based-tiny": BasedConfig(
    257, 128, 5, 4, 256, linear_layers=(1,), sliding_layers=(2,), window_size=64
  ),
  "attn-tiny": BasedConfig(257, 128, 4, 4, 416, other_layers="attention", rotary_fraction=0.5),
}

# Presets that cannot take a published checkpoint, and why.
NO_IMPORT = {
  "based-1b-throughput": "it was timed with random weights; no such model was published",
}
