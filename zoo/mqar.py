"""The small recall models: two layers of token mixers, without channel mixers.

What the experiment on multi-query associative recall trains, to compare how much each mixer
recalls with how many bytes of state. Paper: Simple linear attention language models balance the
recall-throughput tradeoff (2024), figures 2 and 3, as the code of Zoology (2023) has the model:
r += mixer(norm1(r)); r += norm2(r), and the head is the embedding. The added norm2(r) is what is
left there of the channel mixer, an identity.

Two details of that code are left out: dropout of 0.1 on the embeddings (no model here draws random
numbers) and on attention weights.
"""

import dataclasses
import math

from flax import nnx

from ..layers import (
  AttentionMixer,
  AttentionMixerConfig,
  Block,
  DecoderLM,
  Identity,
  LayerNorm,
  ProjectedConv,
  TaylorMixer,
  TaylorMixerConfig,
)
from ..pallas_kernels.taylor_attention.features import feature_count
from .decoders import check_dtypes, check_sizes, decoder, dtypes_of, refuse

MIXERS = ("conv", "taylor", "sliding", "attention")


@dataclasses.dataclass(frozen=True)
class MQARConfig:
  """Sizes and variants. The defaults are the published experiment's."""

  features: int = 128  # model width
  mixers: tuple[str, ...] = ("conv", "taylor")  # layer by layer, each one of `MIXERS`
  feature_dim: int = 16  # of the queries and keys of "taylor"
  window: int = 64  # earlier tokens that a token of "sliding" sees beside itself
  vocab_size: int = 8192
  heads: int = 1
  kernel_size: int = 3  # of "conv"
  norm_eps: float = 1e-5
  init_stddev: float = 0.02
  dtype: str = "float32"  # of activations
  param_dtype: str = "float32"
  remat: str = "none"
  loss_chunk: int = 256  # positions whose logits exist at once
  implementation: str | None = None  # of the operators
  chunk_size: int | None = None  # of taylor_attention

  def __post_init__(self):
    object.__setattr__(self, "mixers", tuple(self.mixers))  # JSON has lists
    check_sizes(self, "features", "feature_dim", "vocab_size", "heads", "kernel_size", "loss_chunk")
    if not self.mixers or not set(self.mixers) <= set(MIXERS):
      refuse(self, "mixers", f"be one or more of {MIXERS}", "one per layer")
    if self.features % self.heads:
      refuse(self, "features", f"be a multiple of heads ({self.heads})", "heads have equal width")
    if self.window < 0:
      refuse(self, "window", "be at least 0", "0: a token sees itself alone")
    check_dtypes(self)


def build(config: MQARConfig, rngs: nnx.Rngs) -> DecoderLM:
  """The model with fresh weights: N(0, 0.02^2), biases 0, convolutions uniform.

  The output projection of softmax attention is drawn smaller by 1/sqrt(2 layers), as published;
  that of "taylor" is not, because it has another name there.
  """
  c = config
  dtypes = dtypes_of(c)
  norm = lambda: LayerNorm(c.features, eps=c.norm_eps, param_dtype=dtypes["param_dtype"])  # noqa: E731
  blocks = [Block(_mixer(c, kind, dtypes, rngs), Identity(), norm(), norm()) for kind in c.mixers]
  return decoder(c, blocks, norm(), rngs)


def _mixer(config: MQARConfig, kind: str, dtypes: dict, rngs: nnx.Rngs) -> nnx.Module:
  c = config
  if kind == "conv":
    return ProjectedConv(
      c.features, kernel_size=c.kernel_size, init_stddev=c.init_stddev, rngs=rngs, **dtypes
    )
  sizes = dict(
    features=c.features,
    heads=c.heads,
    head_dim=c.features // c.heads,
    init_stddev=c.init_stddev,
    implementation=c.implementation,
  )
  if kind == "taylor":
    taylor = TaylorMixerConfig(feature_dim=c.feature_dim, chunk_size=c.chunk_size, **sizes)
    return TaylorMixer(taylor, rngs=rngs, **dtypes)
  attention = AttentionMixerConfig(
    window_size=c.window if kind == "sliding" else None,
    window_convention="left",
    rotary_fraction=0.0,
    qkv_bias=True,
    out_bias=True,
    out_init_stddev=c.init_stddev / math.sqrt(2 * len(c.mixers)),
    **sizes,
  )
  return AttentionMixer(attention, rngs=rngs, **dtypes)


def parameter_count(config: MQARConfig) -> int:
  """Number of trained weights, the tied embedding counted once; from the sizes alone."""
  c, d = config, config.features
  softmax = 4 * d * d + 4 * d
  mixers = dict(
    conv=d * d + d + c.kernel_size * d + d,
    taylor=2 * c.heads * c.feature_dim * d + 2 * d * d,
    sliding=softmax,
    attention=softmax,
  )
  norms = (2 * len(c.mixers) + 1) * 2 * d
  return sum(mixers[kind] for kind in c.mixers) + norms + c.vocab_size * d


def state_bytes(config: MQARConfig, length: int, *, with_conv: bool = False) -> int:
  """Bytes that the state of one sequence needs after `length` tokens, as the paper counts them.

  4 bytes a number: (V + 1) P per head of "taylor", the keys and values of `window` or `length`
  tokens of "sliding" or "attention". The paper's figures leave out the convolution, 3 inputs;
  later ones (2025) count it.
  """
  c, d = config, config.features
  numbers = dict(
    conv=c.kernel_size * d * with_conv,
    taylor=(d + c.heads) * feature_count(c.feature_dim),
    sliding=2 * d * c.window,
    attention=2 * d * length,
  )
  return 4 * sum(numbers[kind] for kind in c.mixers)


def _taylor(features: int, feature_dim: int) -> MQARConfig:
  return MQARConfig(features, ("conv", "taylor"), feature_dim)


# Points of figure 2: BASED's linear attention by (width, feature_dim), windows by their size, and
# full attention. Then other mixers in place of the convolution: both of BASED's, or one alone.
PRESETS: dict[str, MQARConfig] = {
  "mqar-tiny": MQARConfig(32, feature_dim=8, window=8, vocab_size=256),
  **{
    f"mqar-based-{features}-{feature_dim}": _taylor(features, feature_dim)
    for features, feature_dim in (
      (32, 8),
      (64, 8),
      (128, 8),
      (256, 8),
      (512, 8),
      (64, 16),
      (128, 16),
      (256, 16),
      (512, 16),
      (64, 24),
      (512, 24),
    )
  },  # fmt: skip
  **{
    f"mqar-sliding-{window}": MQARConfig(128, ("conv", "sliding"), window=window)
    for window in (8, 16, 32, 64, 128, 256, 512, 1024)
  },
  "mqar-attention-64": MQARConfig(64, ("conv", "attention")),
  "mqar-attention-128": MQARConfig(128, ("conv", "attention")),
  "mqar-hybrid": MQARConfig(64, ("sliding", "taylor"), window=16),
  "mqar-linear-only": MQARConfig(64, ("taylor", "taylor")),
  "mqar-window-only": MQARConfig(64, ("sliding", "sliding"), window=16),
}
