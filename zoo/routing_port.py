"""The Routing Transformer as its PyTorch port has it.

A model of its own: pre-norm, local heads first, rotary positions (of routed values, too), clusters
by unit vectors, and routed tokens that see themselves only where they see nothing else. What the
port trains with, membership "official", LEAKS the future (see `zoo.routing` and `Routing`).

Source: the package routing-transformer for PyTorch, version 1.6.1. Its token shift, reversible
layers, product-key memories and mixtures of experts are not here.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from ..layers import (
  Block,
  DecoderLM,
  FactoredEmbedding,
  FeedForward,
  Gained,
  GatedLinearUnit,
  Identity,
  LayerNorm,
  PortRoutedMixer,
  PortRoutedMixerConfig,
  ScaleNorm,
)
from ..layers.positions import positions_from
from ..layers.projections import dense
from .decoders import check_dtypes, check_sizes, decoder, dtypes_of, refuse

FEED_FORWARDS = ("gelu", "geglu")
NORMS = ("layer", "scale", "rezero")


@dataclasses.dataclass(frozen=True)
class RoutingPortConfig:
  """Sizes and variants. The defaults are the port's, but for `membership`."""

  vocab_size: int
  features: int  # model width D
  num_layers: int
  heads: int  # of both kinds
  local_heads: tuple[int, ...]  # of each layer, the first ones; the others are routed
  window_size: int  # members of a cluster
  max_length: int  # clusters are as many as windows fit into it, whatever the text's length
  head_dim: int = 64
  block_size: int | None = None  # of local heads; None: window_size
  look_back: int | None = None  # tokens before the own block seen by local heads; None: one block
  embedding_features: int | None = None  # width of the embedding and before the head; None: D
  membership: str = "causal_recent"  # "official" (the port's), "topk_prefix"; see `Routing`
  shared: bool = True  # routed queries are the keys, too
  memory_slots: int = 0  # keys and values that all members of a cluster see
  feed_forward: str = "gelu"  # or "geglu"; hidden width 4 D
  norm: str = "layer"  # before each mixer; "scale": of one number; "rezero": a gain behind instead
  tied_head: bool = False  # the head is the embedding, without bias
  commitment: float = 1e-4  # weight of the queries' distance to their centroids
  centroid_decay: float = 0.999
  hidden_dropout: float = 0.0  # of the feed-forward's hidden units
  norm_eps: float = 1e-5
  dtype: str = "float32"  # of activations
  param_dtype: str = "float32"
  remat: str = "none"  # "none", "full" or "dots"
  loss_chunk: int = 256  # positions whose logits exist at once
  implementation: str | None = None  # of routed_attention

  def __post_init__(self):
    object.__setattr__(self, "local_heads", tuple(self.local_heads))  # JSON has lists
    sizes = ("vocab_size", "features", "num_layers", "heads", "head_dim", "window_size")
    check_sizes(self, *sizes, "max_length", "loss_chunk")
    if len(self.local_heads) != self.num_layers:
      refuse(self, "local_heads", f"have {self.num_layers} numbers", "one per layer")
    if self.max_length % self.window_size:
      refuse(self, "max_length", f"be a multiple of window_size ({self.window_size})", "clusters")
    for name, known in (("feed_forward", FEED_FORWARDS), ("norm", NORMS)):
      if getattr(self, name) not in known:
        refuse(self, name, f"be one of {known}", "as the port names its options")
    if self.embedding_features is not None and self.embedding_features < 1:
      refuse(self, "embedding_features", "be at least 1", "None for the model's width")
    if not 0 <= self.hidden_dropout < 1:
      refuse(self, "hidden_dropout", "lie in [0, 1)", "a probability")
    check_dtypes(self)
    for layer in range(self.num_layers):
      self.mixer(layer)  # raises for what does not fit

  @property
  def has_dropout(self) -> bool:
    """Whether training needs random numbers."""
    return self.hidden_dropout > 0

  @property
  def width(self) -> int:
    """Of the embedding and before the head."""
    return self.features if self.embedding_features is None else self.embedding_features

  @property
  def clusters(self) -> int:
    return self.max_length // self.window_size

  def mixer(self, layer: int) -> PortRoutedMixerConfig:
    return PortRoutedMixerConfig(
      features=self.features,
      heads=self.heads,
      local_heads=self.local_heads[layer],
      head_dim=self.head_dim,
      clusters=self.clusters,
      window_size=self.window_size,
      block_size=self.window_size if self.block_size is None else self.block_size,
      look_back=self.look_back,
      membership=self.membership,
      shared=self.shared,
      memory_slots=self.memory_slots,
      gain=self.norm == "rezero",
      commitment=self.commitment,
      centroid_decay=self.centroid_decay,
      init=fan_in_uniform,
      implementation=self.implementation,
    )


def fan_in_uniform(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  """Uniform up to 1 / sqrt(fan in), as PyTorch draws the weights of a linear map.

  Takes matrices [in, out] and the projections of `HeadsIn` [.., D, H, K] and `HeadsOut` [H, K, D].
  """
  fan = {2: shape[0], 3: shape[0] * shape[1]}.get(len(shape), shape[1])
  return jax.random.uniform(key, shape, dtype, -(fan**-0.5), fan**-0.5)


def build(config: RoutingPortConfig, rngs: nnx.Rngs) -> DecoderLM:
  """The model with freshly drawn weights: `fan_in_uniform`, embedding and head N(0, 0.02^2).

  Biases are 0, where the port draws them, too; centroids are noise until `start_centroids`, with
  which training starts.
  """
  c, dtypes = config, dtypes_of(config)
  blocks = [_block(c, layer, dtypes, rngs) for layer in range(c.num_layers)]
  kwargs: dict[str, Any] = dict(init=fan_in_uniform, rngs=rngs, **dtypes)
  last: nnx.Module = LayerNorm(c.width, eps=c.norm_eps, param_dtype=dtypes["param_dtype"])
  embedder = None
  if c.width != c.features:
    table = nnx.initializers.normal(0.02)
    embedder = FactoredEmbedding(c.vocab_size, c.width, c.features, table_init=table, **kwargs)
    out = dense(c.features, c.width, (None, "embed"), use_bias=True, **kwargs)
    last = nnx.Sequential(out, last)
  return decoder(
    c, blocks, last, rngs,
    embedder=embedder,
    tied_head=c.tied_head,
    head_features=c.width,
    head_bias=not c.tied_head,
  )  # fmt: skip


def start_centroids(model: DecoderLM, tokens: Int[Array, "B T"], key: jax.Array) -> None:
  """Sets the centroids by ten rounds of k-means on a first batch, as the port does by itself.

  Layer by layer: what a layer sees comes through layers whose centroids are set.
  """
  positions = positions_from(tokens.shape[1], None)
  embedder = model.embedder
  x = model.embedding[...][tokens] if embedder is None else embedder(tokens, positions)
  x = x.astype(model.residual_dtype)
  layers = iter(model.layers())
  for group in model.groups:
    for index in range(jax.tree.leaves(nnx.state(group[0]))[0].shape[0]):
      for stacked, layer in zip(group, layers, strict=False):
        key, own = jax.random.split(key)
        x, means = _started(*nnx.split(layer), x, own)
        if means is not None:
          old = stacked.mixer.centroids.means
          old[...] = old[...].at[index].set(means)


@functools.partial(jax.jit, static_argnums=0)
def _started(graph, variables, x, key):
  """(a layer's output, its centroids) after these were set."""
  block = nnx.merge(graph, variables)
  block.mixer.start(block.mixer_norm(x).astype(block.mixer.dtype), key)
  centroids = block.mixer.centroids
  return block(x)[0], None if centroids is None else centroids.means[...]


def _block(config: RoutingPortConfig, layer: int, dtypes: dict, rngs: nnx.Rngs) -> Block:
  c, params = config, dict(param_dtype=dtypes["param_dtype"])
  kwargs: dict[str, Any] = dict(init=fan_in_uniform, rngs=rngs, use_bias=True, **dtypes)
  kwargs.update(activation="gelu", dropout=c.hidden_dropout)
  kind = FeedForward if c.feed_forward == "gelu" else GatedLinearUnit
  feed_forward: nnx.Module = kind(c.features, 4 * c.features, **kwargs)
  if c.norm == "rezero":
    feed_forward = Gained(feed_forward, **params)

  def norm() -> nnx.Module:
    if c.norm == "layer":
      return LayerNorm(c.features, eps=c.norm_eps, **params)
    return ScaleNorm(eps=c.norm_eps, **params) if c.norm == "scale" else Identity()

  return Block(PortRoutedMixer(c.mixer(layer), rngs=rngs, **dtypes), feed_forward, norm(), norm())


def parameter_count(config: RoutingPortConfig) -> int:
  """Number of trained weights, centroids not counted; from the sizes alone."""
  c, d, width = config, config.features, config.width
  hidden = 4 * d
  up = 1 if c.feed_forward == "gelu" else 2
  feed_forward = up * (d * hidden + hidden) + hidden * d + d
  norms = 4 * d if c.norm == "layer" else 2
  total = c.num_layers * (feed_forward + norms)
  for local in c.local_heads:
    routed = c.heads - local
    total += 3 * local * c.head_dim * (d + 1) + c.heads * c.head_dim * d
    total += routed * c.head_dim * ((2 if c.shared else 3) * d + 2 * c.clusters * c.memory_slots)
  total += c.vocab_size * width + 2 * width
  if width != d:
    total += 2 * d * width + d + width
  return total + (0 if c.tied_head else c.vocab_size * (width + 1))


PRESETS: dict[str, RoutingPortConfig] = {
  # The port's example, under its membership; it leaks.
  "routing-port-enwik8": RoutingPortConfig(
    256, 512, 6, heads=8, local_heads=(8, 8, 8, 4, 4, 4), window_size=128, max_length=4096,
    membership="official",
  ),
  # Laptop size; does not leak.
  "routing-port-tiny": RoutingPortConfig(
    257, 128, 4, heads=4, local_heads=(4, 4, 2, 2), window_size=64, max_length=512, head_dim=32,
    block_size=32,
  ),
}  # fmt: skip
