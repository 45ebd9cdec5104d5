"""TransNormerLLM (TNL): gated lightning attention and gated linear units, pre-normalised.

Papers: TransNormerLLM (2023), Lightning Attention-2 (2024), Various Lengths, Constant Speed (2024).
Where the papers and the released code differ, the defaults follow the code that trained the
released checkpoints, and the other reading is a field of the configuration.
"""

import dataclasses
import math

import numpy as np
from flax import nnx

from ..layers import (
  Block,
  DecoderLM,
  GatedLinearUnit,
  LightningMixer,
  LightningMixerConfig,
  activation,
)
from ..layers.norms import make_norm
from ..pallas_kernels.lightning_attention.decay import LADDERS, decay_rates
from .decoders import check_dtypes, check_sizes, decoder, dtypes_of, refuse

LRPE_LAYERS = ("first", "all", "all_but_first", "none")


@dataclasses.dataclass(frozen=True)
class TransNormerConfig:
  """Sizes and variants. The defaults are the choices of the released models."""

  vocab_size: int
  features: int  # model width
  num_layers: int
  heads: int
  glu_dim: int  # width of the gated linear units
  scale_embedding: bool = True  # multiply embeddings by sqrt(features)
  lrpe_layers: str = "first"  # which layers have learned relative positions
  decay: bool = True
  decay_ladder: str = "alibi"
  layer_factor: bool = True  # deeper layers forget more slowly
  activation: str = "silu"  # of query and key
  value_activation: str = "identity"
  gate: str = "full"  # "full", "low_rank" (with gate_rank) or "none"
  gate_activation: str = "identity"
  gate_rank: int = 0
  glu_activation: str = "identity"
  norm: str = "srms"  # "srms", "rms" or "layer"
  norm_eps: float = 1e-6
  use_bias: bool = False
  pad_id: int | None = 0  # its embedding starts at 0 and is not looked up for learning
  bos_id: int | None = 1
  eos_id: int | None = 2
  init_stddev: float = 0.02
  dtype: str = "float32"  # of activations
  param_dtype: str = "float32"
  remat: str = "none"  # "none", "full" or "dots"
  loss_chunk: int = 256  # positions whose logits exist at once
  implementation: str | None = None  # of lightning_attention
  chunk_size: int | None = None

  def __post_init__(self):
    check_sizes(self, "vocab_size", "features", "num_layers", "heads", "glu_dim", "loss_chunk")
    if self.features % self.heads:
      refuse(self, "features", f"be a multiple of heads ({self.heads})", "heads have equal width")
    if self.lrpe_layers not in LRPE_LAYERS:
      refuse(self, "lrpe_layers", f"be one of {LRPE_LAYERS}", "the released models use 'first'")
    if self.decay_ladder not in LADDERS:
      refuse(self, "decay_ladder", f"be one of {LADDERS}", "the released models use 'alibi'")
    for name in ("activation", "value_activation", "gate_activation", "glu_activation"):
      activation(getattr(self, name))  # raises for an unknown one
    check_dtypes(self)
    if self.pad_id is not None and not 0 <= self.pad_id < self.vocab_size:
      refuse(self, "pad_id", f"lie in [0, {self.vocab_size})", "None for no padding token")

  @property
  def head_dim(self) -> int:
    return self.features // self.heads

  def has_lrpe(self, layer: int) -> bool:
    return {"first": layer == 0, "all": True, "all_but_first": layer > 0, "none": False}[
      self.lrpe_layers
    ]


def build(config: TransNormerConfig, rngs: nnx.Rngs) -> DecoderLM:
  """The model with freshly drawn weights: N(0, 0.02^2) everywhere, biases 0, LRPE ladder."""
  dtypes = dtypes_of(config)
  blocks = [_block(config, layer, dtypes, rngs) for layer in range(config.num_layers)]
  scale = math.sqrt(config.features) if config.scale_embedding else 1.0
  more = dict(embedding_scale=scale, pad_id=config.pad_id)
  return decoder(config, blocks, _norm(config, dtypes), rngs, **more)


def _block(config: TransNormerConfig, layer: int, dtypes: dict, rngs: nnx.Rngs) -> Block:
  c = config
  mixer_config = LightningMixerConfig(
    features=c.features,
    heads=c.heads,
    head_dim=c.head_dim,
    lrpe=c.has_lrpe(layer),
    query_key_activation=c.activation,
    value_activation=c.value_activation,
    gate=c.gate,
    gate_activation=c.gate_activation,
    gate_rank=c.gate_rank,
    norm=c.norm,
    norm_eps=c.norm_eps,
    use_bias=c.use_bias,
    init_stddev=c.init_stddev,
    implementation=c.implementation,
    chunk_size=c.chunk_size,
  )
  feed_forward = GatedLinearUnit(
    c.features,
    c.glu_dim,
    activation=c.glu_activation,
    use_bias=c.use_bias,
    init=nnx.initializers.normal(c.init_stddev),
    rngs=rngs,
    **dtypes,
  )
  mixer = LightningMixer(mixer_config, _rates(c, layer), rngs=rngs, **dtypes)
  return Block(mixer, feed_forward, _norm(c, dtypes), _norm(c, dtypes))


def _rates(config: TransNormerConfig, layer: int) -> np.ndarray | None:
  if not config.decay:
    return None
  return decay_rates(
    config.heads,
    layer,
    config.num_layers,
    ladder=config.decay_ladder,
    layer_factor=config.layer_factor,
  )


def _norm(config: TransNormerConfig, dtypes: dict) -> nnx.Module:
  return make_norm(
    config.norm, config.features, eps=config.norm_eps, param_dtype=dtypes["param_dtype"]
  )


def parameter_count(config: TransNormerConfig) -> int:
  """Number of trained weights, the tied embedding counted once; from the sizes alone."""
  c = config
  gate = {"full": c.features**2, "low_rank": 2 * c.features * c.gate_rank, "none": 0}[c.gate]
  parts = {"full": 4}.get(c.gate, 3)
  layer = 4 * c.features**2 + gate + 3 * c.features * c.glu_dim
  layer += (parts * c.features + c.features + 2 * c.glu_dim + c.features) * c.use_bias
  norm = {"srms": 0, "rms": c.features, "layer": 2 * c.features}[c.norm]
  lrpe = sum(c.has_lrpe(layer) for layer in range(c.num_layers)) * c.features
  return c.num_layers * (layer + 3 * norm) + norm + lrpe + c.vocab_size * c.features


_BF16 = dict(dtype="bfloat16")
PRESETS: dict[str, TransNormerConfig] = {
  # The released sizes. Tokens seen: 1.0 T (385M), 1.2 T (1B), 1.4 T (7B), 300 B (TNL2).
  "transnormer-385m": TransNormerConfig(64000, 1024, 24, 8, 2816, **_BF16),
  "transnormer-385m-10b": TransNormerConfig(50272, 1024, 24, 8, 2816, **_BF16),
  "transnormer-1b": TransNormerConfig(64000, 2048, 16, 16, 5632, **_BF16),
  "transnormer-7b": TransNormerConfig(64000, 4096, 30, 32, 11008, scale_embedding=False, **_BF16),
  "transnormer2-1b": TransNormerConfig(64000, 2048, 16, 16, 5632, scale_embedding=False, **_BF16),
  "transnormer2-3b": TransNormerConfig(64000, 2560, 32, 20, 6912, scale_embedding=False, **_BF16),
  # Code unpublished. The rank-16 gate is inferred from the published parameter count, 14.83 B.
  "transnormer3-15b": TransNormerConfig(
    100280,
    5120,
    42,
    40,
    15360,
    gate="low_rank",
    gate_activation="sigmoid",
    gate_rank=16,
    pad_id=100262,
    bos_id=100261,
    eos_id=100257,
    **_BF16,
  ),
  # The first author's small runs: GPT-2 BPE on OpenWebText, and characters. There LRPE is on every
  # layer but the first, and embeddings are not scaled.
  "transnormer-nano": TransNormerConfig(
    50304,
    768,
    12,
    12,
    1536,
    scale_embedding=False,
    lrpe_layers="all_but_first",
    pad_id=None,
    bos_id=None,
    eos_id=None,
    **_BF16,
  ),
  "transnormer-nano-char": TransNormerConfig(
    256,
    384,
    6,
    3,
    768,
    scale_embedding=False,
    lrpe_layers="all_but_first",
    pad_id=None,
    bos_id=None,
    eos_id=None,
  ),
  # The same authors' later code base: affine RMSNorm, sigmoid gate of rank head_dim, SwiGLU.
  "transnormer-xmixers-385m": TransNormerConfig(
    64000,
    1024,
    24,
    8,
    2816,
    lrpe_layers="none",
    decay_ladder="geometric",
    value_activation="silu",
    gate="low_rank",
    gate_activation="sigmoid",
    gate_rank=128,
    glu_activation="silu",
    norm="rms",
    **_BF16,
  ),
  # Laptop sizes over bytes.
  "transnormer-tiny": TransNormerConfig(257, 128, 4, 4, 384, pad_id=None, bos_id=None, eos_id=256),
}

# Presets that cannot take a published checkpoint, and why.
NO_IMPORT = {
  "transnormer3-15b": (
    "the code and the weight layout of the 15B model were never published; the preset's low-rank"
    " gate is inferred from the parameter count"
  ),
}
