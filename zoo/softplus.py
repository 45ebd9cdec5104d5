"""Softplus attention (LSSA, LSSAR): a GPT-2 with rotary positions and its attention swapped.

Paper: Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models
(2025). No attention of the family has parameters of its own, so models that differ in `variant`
have the same weights, and one may be run with another's. The paper says "GPT-2 small with RoPE" and
no more of the model; the rest here is GPT-2: LayerNorm with scale and bias, biases everywhere, tanh
GELU, no dropout, a tied head. GPT-2 itself, with its learned positions and softmax, is among the
presets.
"""

import dataclasses
import math

from flax import nnx

from ..layers import (
  AttentionMixer,
  AttentionMixerConfig,
  Block,
  DecoderLM,
  FeedForward,
  activation,
)
from ..layers.norms import make_norm
from ..pallas_kernels import VARIANTS, Variant
from .decoders import check_dtypes, check_sizes, decoder, dtypes_of, refuse

SOFTMAX = "softmax"  # by softmax_attention and the libraries' kernels


@dataclasses.dataclass(frozen=True)
class SoftplusConfig:
  """Sizes and variants. The defaults are the paper's where it says something, else GPT-2's."""

  vocab_size: int
  features: int  # model width
  num_layers: int
  heads: int
  variant: str = "lssar_p15"  # "softmax", or a name of VARIANTS
  power: float | None = None  # of the second stage, instead of the variant's own
  hidden: int | None = None  # width of the feed-forward; None: 4 features
  activation: str = "gelu_tanh"
  norm: str = "layer"  # or "rms"
  norm_eps: float = 1e-5
  use_bias: bool = True
  rotary_base: float = 10000.0
  learned_positions: int | None = None  # so many, instead of rotary ones; GPT-2 has 1024
  init_stddev: float = 0.02
  residual_in_float32: bool = True  # the stream that the layers add to
  dtype: str = "float32"  # of activations
  param_dtype: str = "float32"
  remat: str = "none"  # "none", "full" or "dots"
  loss_chunk: int = 256  # positions whose logits exist at once
  implementation: str | None = None  # of the operator
  chunk_size: int | None = None

  def __post_init__(self):
    check_sizes(self, "vocab_size", "features", "num_layers", "heads", "loss_chunk")
    if self.hidden is not None and self.hidden < 1:
      refuse(self, "hidden", "be at least 1", "None for 4 features")
    if self.learned_positions is not None and self.learned_positions < 1:
      refuse(self, "learned_positions", "be at least 1", "None for rotary positions")
    if self.features % self.heads:
      refuse(self, "features", f"be a multiple of heads ({self.heads})", "heads have equal width")
    if self.variant != SOFTMAX and self.variant not in VARIANTS:
      refuse(self, "variant", f"be one of {(SOFTMAX, *VARIANTS)}", "the paper's is 'lssar_p15'")
    if self.variant == SOFTMAX and self.power is not None:
      refuse(self, "power", "be None for softmax", "'softmax_rw_p15' re-weights softmax")
    activation(self.activation)  # these raise for what is unknown or does not fit
    check_dtypes(self)
    self.attention()

  @property
  def out_stddev(self) -> float:
    """Of projections back into the residual stream, drawn smaller the more layers add to it."""
    return self.init_stddev / math.sqrt(2 * self.num_layers)

  @property
  def feed_forward_dim(self) -> int:
    return 4 * self.features if self.hidden is None else self.hidden

  def attention_variant(self) -> Variant | None:
    if self.variant == SOFTMAX:
      return None
    variant = VARIANTS[self.variant]
    return variant if self.power is None else dataclasses.replace(variant, power=self.power)

  def attention(self) -> AttentionMixerConfig:
    return AttentionMixerConfig(
      features=self.features,
      heads=self.heads,
      head_dim=self.features // self.heads,
      variant=self.attention_variant(),
      rotary_fraction=1.0 if self.learned_positions is None else 0.0,
      rotary_base=self.rotary_base,
      qkv_bias=self.use_bias,
      out_bias=self.use_bias,
      init_stddev=self.init_stddev,
      out_init_stddev=self.out_stddev,
      implementation=self.implementation,
      chunk_size=self.chunk_size,
    )


def build(config: SoftplusConfig, rngs: nnx.Rngs) -> DecoderLM:
  """The model with freshly drawn weights, N(0, 0.02^2); 0.02 / sqrt(2 layers) out of a mixer."""
  dtypes = dtypes_of(config)
  blocks = [_block(config, dtypes, rngs) for _ in range(config.num_layers)]
  positions = dict(learned_positions=config.learned_positions)
  return decoder(config, blocks, _norm(config, dtypes), rngs, **positions)


def _block(config: SoftplusConfig, dtypes: dict, rngs: nnx.Rngs) -> Block:
  c = config
  feed_forward = FeedForward(
    c.features,
    c.feed_forward_dim,
    activation=c.activation,
    use_bias=c.use_bias,
    init=nnx.initializers.normal(c.init_stddev),
    down_init=nnx.initializers.normal(c.out_stddev),
    rngs=rngs,
    **dtypes,
  )
  mixer = AttentionMixer(c.attention(), rngs=rngs, **dtypes)
  return Block(mixer, feed_forward, _norm(c, dtypes), _norm(c, dtypes))


def _norm(config: SoftplusConfig, dtypes: dict) -> nnx.Module:
  options = dict(eps=config.norm_eps, param_dtype=dtypes["param_dtype"])
  return make_norm(config.norm, config.features, **options)


def parameter_count(config: SoftplusConfig) -> int:
  """Number of trained weights, the tied embedding counted once; from the sizes alone."""
  c, d, hidden = config, config.features, config.feed_forward_dim
  norm = {"layer": 2 * d, "rms": d, "srms": 0}[c.norm]
  biases = c.use_bias * (4 * d + hidden + d)
  layer = 4 * d * d + 2 * d * hidden + biases + 2 * norm
  return c.num_layers * layer + norm + (c.vocab_size + (c.learned_positions or 0)) * d


_124M = dict(vocab_size=50304, features=768, num_layers=12, heads=12, dtype="bfloat16")
_GPT2 = dict(vocab_size=50257, variant=SOFTMAX, learned_positions=1024)
_TINY = dict(vocab_size=257, features=128, num_layers=3, heads=2)
PRESETS: dict[str, SoftplusConfig] = {
  # GPT-2 small (50257 tokens, padded), each attention of the paper's table of losses.
  "softplus-124m": SoftplusConfig(**_124M),
  "softplus-p3-124m": SoftplusConfig(**_124M, variant="lssar_p3"),
  "softplus-lssa-124m": SoftplusConfig(**_124M, variant="lssa"),
  "softplus-softmax-124m": SoftplusConfig(**_124M, variant=SOFTMAX),
  "softplus-sigmoid-124m": SoftplusConfig(**_124M, variant="sigmoid_bias"),
  "softplus-relu-124m": SoftplusConfig(**_124M, variant="relu_mean"),
  # GPT-2 as published: softmax, learned positions.
  "gpt2": SoftplusConfig(features=768, num_layers=12, heads=12, **_GPT2),
  "gpt2-medium": SoftplusConfig(features=1024, num_layers=24, heads=16, **_GPT2),
  "gpt2-large": SoftplusConfig(features=1280, num_layers=36, heads=20, **_GPT2),
  "gpt2-xl": SoftplusConfig(features=1600, num_layers=48, heads=25, **_GPT2),
  # The first at laptop size, over bytes.
  "softplus-tiny": SoftplusConfig(**_TINY),
  "softplus-p3-tiny": SoftplusConfig(**_TINY, variant="lssar_p3"),
  "softplus-lssa-tiny": SoftplusConfig(**_TINY, variant="lssa"),
  "softplus-softmax-tiny": SoftplusConfig(**_TINY, variant=SOFTMAX),
  "softplus-sigmoid-tiny": SoftplusConfig(**_TINY, variant="sigmoid_bias"),
  "softplus-relu-tiny": SoftplusConfig(**_TINY, variant="relu_mean"),
}
