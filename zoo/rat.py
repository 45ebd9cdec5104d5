"""RAT: a gated recurrence inside chunks of tokens, softmax attention across the chunks.

Paper: RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling (2025). Every block
has one mixer and a plain feed-forward; the models that the paper compares with are configurations
of the same family: full attention, or a recurrence over the whole sequence, in place of RAT. In the
hybrids every other block has attention over a window. Without `rotary_base` no mixer knows
positions. Where the paper and the released code differ, the defaults follow the code.
"""

import dataclasses

from flax import nnx

from ..layers import (
  AttentionMixer,
  AttentionMixerConfig,
  Block,
  DecoderLM,
  FeedForward,
  RatMixer,
  RatMixerConfig,
  RecurrentMixer,
  RecurrentMixerConfig,
  RMSNorm,
)
from .decoders import check_dtypes, check_sizes, decoder, dtypes_of, refuse

MIXERS = ("rat", "attention", "rnn")
OTHER_MIXERS = (None, "local")


@dataclasses.dataclass(frozen=True)
class RatConfig:
  """Sizes and variants. The defaults are the choices of the released models."""

  vocab_size: int
  features: int  # model width
  num_layers: int
  heads: int
  mixer: str = "rat"  # or "attention", "rnn"
  other_mixer: str | None = None  # "local": of blocks whose number interleave_step does not divide
  interleave_step: int = 2
  groups: int = 2  # of RAT's queries and keys
  chunk_size: int = 16  # of RAT
  window_size: int = 1024  # keys that local attention sees to the left of a token
  rotary_base: float | None = 10000.0  # None: no positions anywhere
  train_length: int = 4096  # what the initial gates of "rnn" are spread over
  hidden: int | None = None  # width of the feed-forward; None: 4 features
  norm_eps: float = 1e-6
  init_stddev: float = 0.02
  residual_in_float32: bool = True  # the stream that the layers add to
  dtype: str = "float32"  # of activations
  param_dtype: str = "float32"
  remat: str = "none"  # "none", "full" or "dots"
  loss_chunk: int = 256  # positions whose logits exist at once
  implementation: str | None = None  # of rat_attention
  attention_implementation: str | None = None  # of the two softmax operators

  def __post_init__(self):
    sizes = ("vocab_size", "features", "num_layers", "heads", "interleave_step", "loss_chunk")
    check_sizes(self, *sizes, "window_size")
    if self.hidden is not None and self.hidden < 1:
      refuse(self, "hidden", "be at least 1", "None for 4 features")
    if self.features % self.heads:
      refuse(self, "features", f"be a multiple of heads ({self.heads})", "heads have equal width")
    if self.mixer not in MIXERS:
      refuse(self, "mixer", f"be one of {MIXERS}", "'rat' is the paper's own")
    if self.other_mixer not in OTHER_MIXERS:
      refuse(self, "other_mixer", f"be one of {OTHER_MIXERS}", "None for equal blocks")
    check_dtypes(self)
    for kind in {self.mixer_of(layer) for layer in range(self.num_layers)}:
      getattr(self, kind)()  # these raise for what does not fit

  @property
  def feed_forward_dim(self) -> int:
    return 4 * self.features if self.hidden is None else self.hidden

  def mixer_of(self, layer: int) -> str:
    """What a block mixes tokens with: "rat", "attention", "rnn" or "local"."""
    if self.other_mixer is None or layer % self.interleave_step == 0:
      return self.mixer
    return self.other_mixer

  def rat(self) -> RatMixerConfig:
    return RatMixerConfig(
      **self._sizes(),
      groups=self.groups,
      chunk_size=self.chunk_size,
      rotary_base=self.rotary_base,
      implementation=self.implementation,
    )

  def rnn(self) -> RecurrentMixerConfig:
    return RecurrentMixerConfig(**self._sizes(), train_length=self.train_length)

  def attention(self) -> AttentionMixerConfig:
    base = self.rotary_base
    return AttentionMixerConfig(
      **self._sizes(),
      rotary_fraction=0.0 if base is None else 1.0,
      rotary_base=10000.0 if base is None else base,
      implementation=self.attention_implementation,
    )

  def local(self) -> AttentionMixerConfig:
    window = dict(window_size=self.window_size, window_convention="left")
    return dataclasses.replace(self.attention(), **window)

  def _sizes(self):
    return dict(
      features=self.features,
      heads=self.heads,
      head_dim=self.features // self.heads,
      init_stddev=self.init_stddev,
    )


def build(config: RatConfig, rngs: nnx.Rngs) -> DecoderLM:
  """The model with freshly drawn weights: N(0, 0.02^2), norms 1, gates as `RatMixer` says."""
  dtypes = dtypes_of(config)
  blocks = [_block(config, layer, dtypes, rngs) for layer in range(config.num_layers)]
  return decoder(config, blocks, _norm(config, dtypes), rngs)


def _block(config: RatConfig, layer: int, dtypes: dict, rngs: nnx.Rngs) -> Block:
  c, kind = config, config.mixer_of(layer)
  module = dict(rat=RatMixer, rnn=RecurrentMixer).get(kind, AttentionMixer)
  mixer = module(getattr(c, kind)(), rngs=rngs, **dtypes)
  init = nnx.initializers.normal(c.init_stddev)
  feed_forward = FeedForward(c.features, c.feed_forward_dim, init=init, rngs=rngs, **dtypes)
  return Block(mixer, feed_forward, _norm(c, dtypes), _norm(c, dtypes))


def _norm(config: RatConfig, dtypes: dict) -> RMSNorm:
  return RMSNorm(config.features, eps=config.norm_eps, param_dtype=dtypes["param_dtype"])


def parameter_count(config: RatConfig) -> int:
  """Number of trained weights, the tied embedding counted once; from the sizes alone."""
  c, d = config, config.features
  mixers = dict(
    rat=4 * d * d + 2 * d * c.groups * (d // c.heads) + d,
    rnn=4 * d * d + d,
    attention=4 * d * d,
    local=4 * d * d,
  )
  layers = sum(mixers[c.mixer_of(layer)] for layer in range(c.num_layers))
  return layers + c.num_layers * 2 * (d * c.feed_forward_dim + d) + d + c.vocab_size * d


_XL = dict(vocab_size=32000, features=2048, num_layers=24, heads=16, dtype="bfloat16")
_TINY = dict(vocab_size=257, features=128, num_layers=4, heads=4, window_size=64)
PRESETS: dict[str, RatConfig] = {
  # The released models, 1.3 billion weights each; 110 B tokens of FineWeb-Edu seen in rows of 4096.
  "rat-xl": RatConfig(**_XL),
  "rat-swa-xl": RatConfig(**_XL, other_mixer="local"),
  "rat-rnn-xl": RatConfig(**_XL, mixer="rnn"),
  "rat-attention-xl": RatConfig(**_XL, mixer="attention"),
  "rat-attention-swa-xl": RatConfig(**_XL, mixer="attention", other_mixer="local"),
  # The same five at laptop size, over bytes.
  "rat-tiny": RatConfig(**_TINY),
  "rat-swa-tiny": RatConfig(**_TINY, other_mixer="local"),
  "rat-rnn-tiny": RatConfig(**_TINY, mixer="rnn"),
  "rat-attention-tiny": RatConfig(**_TINY, mixer="attention"),
  "rat-attention-swa-tiny": RatConfig(**_TINY, mixer="attention", other_mixer="local"),
}
