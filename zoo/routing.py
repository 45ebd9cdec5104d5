"""The Routing Transformer: heads that attend inside clusters of tokens, beside local heads.

Paper: Efficient Content-Based Sparse Attention with Routing Transformers (2021). Where the paper
and the released code differ, the configurations follow the code.

WHAT IS PUBLISHED LEAKS: with membership "official" the tokens that a cluster has depend on the
whole row, so that a loss in one pass over a text is no likelihood (`Routing`). Those models are
evaluated honestly with membership "topk_prefix", which is also what decoding computes; both numbers
are what `experiments.evaluate` prints. "causal_recent", the default, trains without a leak.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..layers import (
  Block,
  DecoderLM,
  FactoredEmbedding,
  FeedForward,
  GatedLinearUnit,
  Identity,
  ImageEmbedding,
  LayerNorm,
  RoutedMixer,
  RoutedMixerConfig,
)
from ..layers.projections import dense
from ..pallas_kernels import Routing
from .decoders import check_dtypes, check_sizes, decoder, dtypes_of, refuse
from .routing_presets import SIZES

FEED_FORWARDS = ("geglu", "relu")
DROPOUTS = ("dropout", "attention_dropout", "hidden_dropout", "table_dropout", "token_dropout")


@dataclasses.dataclass(frozen=True)
class RoutingConfig:
  """Sizes and variants. The defaults are the released text models', but for `membership` and what
  it needs."""

  vocab_size: int  # of images: the levels of a channel
  features: int  # model width D
  num_layers: int
  heads: int  # of both kinds
  routed_heads: int  # of layers from skip_first on; the others are local
  hidden: int  # width of the feed-forward
  block_size: int  # of local heads
  clusters: int = 1
  window_size: int = 1  # members of a cluster
  look_back: int | None = None  # tokens before the own block seen by local heads; None: one block
  skip_first: int = 0  # layers without routed heads
  embedding_features: int | None = None  # width of the embedding and before the head; None: D
  image_height: int = 0  # images: their size, text: 0
  image_width: int = 0
  image_channels: int = 0
  membership: str = "causal_recent"  # or "official", "topk_prefix"; see `Routing`
  routing_scale: float | None = None  # of routed logits; published 1, None: head_dim ** -0.5
  combine_eps: float = 0.01
  routed_keys: str = "queries"  # as published for decoders; or "own", "previous": `RoutedMixer`
  positions: str = "rotary"  # published "shaw" (text) and "none" (images)
  rotary_base: float = 10000.0
  max_distance: int = 513  # of "shaw"
  feed_forward: str = "geglu"  # or "relu", with biases
  head_mix: bool = True
  commitment: float = 1e-4  # weight of the queries' distance to their centroids
  centroid_decay: float = 0.999
  counts: str = "per_head"  # "official" replays a slip of the released code
  initial_count: float = 1.0  # published 0, see `Centroids`
  dropout: float = 0.0  # of what layers add, and of the embedding
  attention_dropout: float = 0.0  # of attention weights, all heads
  hidden_dropout: float = 0.0  # of the feed-forward's hidden units
  table_dropout: float = 0.0  # of the embedding table's vectors
  token_dropout: float = 0.0  # of tokens read as token 0
  norm_eps: float = 1e-6
  dtype: str = "float32"  # of activations
  param_dtype: str = "float32"
  remat: str = "none"  # "none", "full" or "dots"
  loss_chunk: int = 256  # positions whose logits exist at once
  implementation: str | None = None  # of routed_attention

  def __post_init__(self):
    sizes = ("vocab_size", "features", "num_layers", "heads", "hidden", "block_size", "clusters")
    check_sizes(self, *sizes, "window_size", "loss_chunk")
    if self.features % self.heads:
      refuse(self, "features", f"be a multiple of heads ({self.heads})", "heads have equal width")
    if not 0 <= self.skip_first <= self.num_layers:
      refuse(self, "skip_first", f"lie between 0 and {self.num_layers}", "layers without routing")
    if self.feed_forward not in FEED_FORWARDS:
      refuse(self, "feed_forward", f"be one of {FEED_FORWARDS}", "'geglu' has no biases")
    if self.embedding_features is not None and self.embedding_features < 1:
      refuse(self, "embedding_features", "be at least 1", "None for the model's width")
    image = (self.image_height, self.image_width, self.image_channels)
    if any(image) and min(image) < 1:
      refuse(self, "image_height", "be given with image_width and image_channels", "0 for text")
    if any(image) and self.embedding_features is not None:
      refuse(self, "embedding_features", "be None for images", "their tables have width D")
    for name in DROPOUTS:
      if not 0 <= getattr(self, name) < 1:
        refuse(self, name, "lie in [0, 1)", "a probability")
    check_dtypes(self)
    for layer in (0, self.num_layers - 1):
      self.mixer(layer)  # raises for what does not fit

  @property
  def is_image(self) -> bool:
    return self.image_channels > 0

  @property
  def has_dropout(self) -> bool:
    """Whether training needs random numbers."""
    return any(getattr(self, name) for name in DROPOUTS)

  def mixer(self, layer: int) -> RoutedMixerConfig:
    head_dim = self.features // self.heads
    scale = head_dim**-0.5 if self.routing_scale is None else self.routing_scale
    return RoutedMixerConfig(
      features=self.features,
      heads=self.heads,
      routed_heads=0 if layer < self.skip_first else self.routed_heads,
      head_dim=head_dim,
      clusters=self.clusters,
      routing=Routing(self.window_size, self.membership, scale=scale, combine_eps=self.combine_eps),
      block_size=self.block_size,
      look_back=self.look_back,
      routed_keys=self.routed_keys,
      positions=self.positions,
      max_distance=self.max_distance,
      rotary_base=self.rotary_base,
      head_mix=self.head_mix,
      attention_dropout=self.attention_dropout,
      commitment=self.commitment,
      centroid_decay=self.centroid_decay,
      counts=self.counts,
      initial_count=self.initial_count,
      init=fan_average,
      implementation=self.implementation,
    )


def fan_average(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  """Uniform with variance 0.2 / (mean of fan in and fan out), as the released code draws weights.

  Takes matrices [in, out] and the projections of `HeadsIn` [.., D, H, K] and `HeadsOut` [H, K, D].
  """
  if len(shape) == 3:
    fans = shape[0] * shape[1] + shape[2]
  elif len(shape) == 4:
    fans = shape[1] + shape[2] * shape[3]
  else:
    fans = sum(shape)
  limit = math.sqrt(3 * 0.2 / (fans / 2))
  return jax.random.uniform(key, shape, dtype, -limit, limit)


def build(config: RoutingConfig, rngs: nnx.Rngs) -> DecoderLM:
  """The model with freshly drawn weights: `fan_average`, biases 0, norms 1, centroids noise."""
  c, dtypes = config, dtypes_of(config)
  blocks = [_block(c, layer, dtypes, rngs) for layer in range(c.num_layers)]
  kwargs: dict[str, Any] = dict(rngs=rngs, **dtypes)
  width = c.features if c.embedding_features is None else c.embedding_features
  if c.is_image:
    embedder: nnx.Module = ImageEmbedding(
      c.vocab_size, c.features,
      height=c.image_height,
      width=c.image_width,
      channels=c.image_channels,
      param_dtype=dtypes["param_dtype"],
      rngs=rngs,
    )  # fmt: skip
  else:
    embedder = FactoredEmbedding(
      c.vocab_size, width, c.features,
      token_dropout=c.token_dropout,
      table_dropout=c.table_dropout,
      dropout=c.dropout,
      init=fan_average,
      **kwargs,
    )  # fmt: skip
  last: nnx.Module = Identity()
  if width != c.features:
    last = dense(c.features, width, (None, "embed"), use_bias=True, init=fan_average, **kwargs)
  return decoder(
    c, blocks, last, rngs,
    embedder=embedder,
    tied_head=False,
    head_features=width,
    head_bias=True,
    init=fan_average,
  )  # fmt: skip


def _block(config: RoutingConfig, layer: int, dtypes: dict, rngs: nnx.Rngs) -> Block:
  c = config
  kwargs: dict[str, Any] = dict(dropout=c.hidden_dropout, init=fan_average, rngs=rngs, **dtypes)
  if c.feed_forward == "geglu":
    feed_forward: nnx.Module = GatedLinearUnit(
      c.features, c.hidden, activation="gelu_tanh", **kwargs
    )
  else:
    feed_forward = FeedForward(c.features, c.hidden, activation="relu", use_bias=True, **kwargs)
  norms = (
    LayerNorm(c.features, eps=c.norm_eps, param_dtype=dtypes["param_dtype"]) for _ in range(2)
  )
  mixer = RoutedMixer(c.mixer(layer), rngs=rngs, **dtypes)
  return Block(mixer, feed_forward, *norms, post_norm=True, dropout=c.dropout)


def parameter_count(config: RoutingConfig) -> int:
  """Number of trained weights, centroids not counted; from the sizes alone."""
  c, d = config, config.features
  width = d if c.embedding_features is None else c.embedding_features
  head_dim = d // c.heads
  feed_forward = 3 * d * c.hidden if c.feed_forward == "geglu" else 2 * d * c.hidden + c.hidden + d
  layer = 4 * d * d + feed_forward + 4 * d + (head_dim**2 if c.head_mix else 0)
  total = c.num_layers * layer
  if c.positions == "shaw":
    tables = 2 * (2 * c.max_distance + 1) * head_dim
    routed = c.num_layers - c.skip_first if c.routed_heads else 0
    all_routed = routed if c.routed_heads == c.heads else 0
    total += tables * (routed + c.num_layers - all_routed)
  if c.is_image:
    longest = max(c.image_height, c.image_width, 3)
    total += c.image_channels * d * (c.vocab_size + 2 * longest)
  else:
    total += c.vocab_size * width + width * d + d
  if width != d:
    total += d * width + width
  return total + c.vocab_size * (width + 1)


PRESETS: dict[str, RoutingConfig] = {name: RoutingConfig(**sizes) for name, sizes in SIZES.items()}
