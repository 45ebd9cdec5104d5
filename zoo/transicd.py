"""TransICD: an encoder, attention of each medical code over the tokens, a unit per code.

Paper: TransICD: Transformer Based Code-wise Attention Model for Explainable ICD Coding (2021), as
the released code has it where its text is silent. The ablations of the paper's table and a
bidirectional GRU are among the presets. One thing is repaired by default: the released code adds
the position table by the row of the batch, not by the place of the token, so that it is blind to
order; `positions="batch_row"` does so, too.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..layers import Block, FeedForward, LayerNorm
from ..layers.bidirectional_gru import BidirectionalGRU
from ..layers.encoder_mixer import EncoderMixer
from ..layers.label_attention import LabelAttention
from ..layers.label_classifier import POSITIONS, LabelClassifier
from .decoders import check_dtypes, check_sizes, dtypes_of, refuse

ENCODERS = ("transformer", "gru")
POOLS = {"transformer": ("labels", "mean", "mean_of_all"), "gru": ("labels", "mean", "last")}


@dataclasses.dataclass(frozen=True)
class TransICDConfig:
  """Sizes and variants. The defaults are the released code's, but for `positions`."""

  vocab_size: int
  labels: int
  features: int = 128  # of embedding and encoder
  num_layers: int = 2
  heads: int = 8
  hidden: int | None = None  # width of the feed-forward; None: 4 features
  attention_features: int | None = None  # of the tokens' keys for the labels; None: 2 features
  encoder: str = "transformer"  # or "gru": half the features in each direction, one layer
  pool: str = "labels"  # "mean", "mean_of_all" (padding included, as released), "last" (gru)
  positions: str = "sequence"  # "batch_row" as released, or "none"
  max_length: int = 2500  # tokens of a document at most
  dropout: float = 0.1
  embed_dropout_twice: bool = True  # as released
  margin: float = 3.0  # scale of the LDAM margins; 0 is plain cross-entropy
  freeze_embedding: bool = False  # for vectors that are loaded; the released code always does
  independent_layers: bool = False  # released: the layers start as copies of one
  norm_eps: float = 1e-5
  dtype: str = "float32"  # of activations
  param_dtype: str = "float32"
  implementation: str | None = None  # of code_attention

  def __post_init__(self):
    check_sizes(self, "vocab_size", "labels", "features", "num_layers", "heads", "max_length")
    for name in ("hidden", "attention_features"):
      value = getattr(self, name)
      if value is not None and value < 1:
        refuse(self, name, "be at least 1", "None for a multiple of features")
    if self.encoder not in ENCODERS:
      refuse(self, "encoder", f"be one of {ENCODERS}", "the paper's is 'transformer'")
    if self.pool not in POOLS[self.encoder]:
      refuse(self, "pool", f"be one of {POOLS[self.encoder]} with {self.encoder!r}", "what is read")
    if self.positions not in POSITIONS:
      refuse(self, "positions", f"be one of {POSITIONS}", "'batch_row' is the released code's")
    if self.features % self.heads or self.features % 2:
      refuse(self, "features", f"be even and a multiple of heads ({self.heads})", "equal heads")
    if not 0 <= self.dropout < 1:
      refuse(self, "dropout", "lie in [0, 1)", "a probability")
    if self.margin < 0:
      refuse(self, "margin", "be at least 0", "0 for plain cross-entropy")
    check_dtypes(self)

  @property
  def has_dropout(self) -> bool:
    return self.dropout > 0

  @property
  def feed_forward_dim(self) -> int:
    return 4 * self.features if self.hidden is None else self.hidden

  @property
  def attention_dim(self) -> int:
    return 2 * self.features if self.attention_features is None else self.attention_features

  @property
  def table_positions(self) -> str:
    """Recurrent encoders know the order."""
    return self.positions if self.encoder == "transformer" else "none"


def build(config: TransICDConfig, rngs: nnx.Rngs) -> LabelClassifier:
  """The model with fresh weights, drawn as the released code does.

  Dense layers, biases too, are uniform within 1 / sqrt(what goes in); the projection to query, key
  and value Xavier uniform over all three at once, without bias. Embeddings have unit length, that
  of padding is 0.
  """
  c, dtypes = config, dtypes_of(config)
  init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
  if c.encoder == "gru":
    encoder = BidirectionalGRU(c.features, c.features // 2, rngs=rngs, **dtypes)
  else:
    encoder = [_block(c, init, dtypes, rngs)]
    for _ in range(1, c.num_layers):
      fresh = _block(c, init, dtypes, rngs) if c.independent_layers else nnx.clone(encoder[0])
      encoder.append(fresh)
  attention = None
  if c.pool == "labels":
    attention = LabelAttention(
      c.features, c.attention_dim, c.labels, init=init, implementation=c.implementation, rngs=rngs,
      **dtypes,
    )  # fmt: skip
    _draw_bias(attention.key.bias, c.features, rngs)
    _draw_bias(attention.label_bias, c.attention_dim, rngs)
  table = jax.random.normal(rngs.params(), (c.vocab_size, c.features), jnp.float32)
  table = (table / jnp.linalg.norm(table, axis=1, keepdims=True)).at[0].set(0)
  model = LabelClassifier(
    encoder,
    attention,
    table=table,
    labels=c.labels,
    head_features=c.features,
    pool=c.pool,
    positions=c.table_positions,
    max_length=c.max_length,
    dropout=c.dropout,
    dropouts=2 if c.embed_dropout_twice else 1,
    frozen=c.freeze_embedding,
    margin=c.margin,
    head_init=init,
    rngs=rngs,
    **dtypes,
  )
  _draw_bias(model.head_bias, c.features, rngs)
  return model


def _block(config: TransICDConfig, init, dtypes: dict, rngs: nnx.Rngs) -> Block:
  c = config

  def xavier(key, shape, dtype):  # [3, D, H, K], one matrix from D to 3 D
    return jax.random.uniform(key, shape, dtype, -1, 1) * math.sqrt(6 / (4 * c.features))

  def out(key, shape, dtype):  # [H, K, D], a matrix from D to D
    return jax.random.uniform(key, shape, dtype, -1, 1) / math.sqrt(c.features)

  mixer = EncoderMixer(
    c.features, c.heads, dropout=c.dropout, init=xavier, out_init=out, rngs=rngs, **dtypes
  )
  feed_forward = FeedForward(
    c.features, c.feed_forward_dim, activation="relu", use_bias=True, dropout=c.dropout, init=init,
    rngs=rngs, **dtypes,
  )  # fmt: skip
  _draw_bias(feed_forward.fc1.bias, c.features, rngs)
  _draw_bias(feed_forward.fc2.bias, c.feed_forward_dim, rngs)
  norms = [
    LayerNorm(c.features, eps=c.norm_eps, param_dtype=dtypes["param_dtype"]) for _ in range(2)
  ]
  return Block(mixer, feed_forward, *norms, post_norm=True, dropout=c.dropout)


def _draw_bias(bias: nnx.Param | None, features_in: int, rngs: nnx.Rngs) -> None:
  assert bias is not None  # for the type checker
  drawn = jax.random.uniform(rngs.params(), bias.shape, jnp.float32, -1, 1)
  bias.set_value((drawn / math.sqrt(features_in)).astype(bias.dtype))


def parameter_count(config: TransICDConfig) -> int:
  """Number of trained weights; from the sizes alone."""
  c, d, hidden = config, config.features, config.feed_forward_dim
  if c.encoder == "gru":
    half = d // 2
    encoder = 2 * 3 * (d * half + half + half * half)
  else:
    layer = 4 * d * d + 4 * d + 2 * d * hidden + hidden + d + 4 * d
    encoder = c.num_layers * layer
  attention = c.pool == "labels" and d * c.attention_dim + c.attention_dim + (
    c.labels * (c.attention_dim + 1)
  )
  embedding = 0 if c.freeze_embedding else c.vocab_size * d
  return embedding + encoder + attention + c.labels * (d + 1)


_MIMIC: dict[str, Any] = dict(vocab_size=123_918, labels=50, freeze_embedding=True)
# The embedded task: short notes, so a small model; its vocabulary has fewer words than this.
_SMALL: dict[str, Any] = dict(vocab_size=5120, labels=50, features=64, heads=4, max_length=160)
_MEAN: dict[str, Any] = dict(pool="mean", margin=0.0)
_GRU: dict[str, Any] = dict(encoder="gru", pool="last", margin=0.0)
PRESETS: dict[str, TransICDConfig] = {
  # MIMIC-III, the 50 most frequent codes: the rows of the paper's table.
  "transicd-50": TransICDConfig(**_MIMIC),
  "transicd-bce-50": TransICDConfig(**_MIMIC, margin=0.0),
  "transicd-mean-50": TransICDConfig(**_MIMIC, **_MEAN),
  "transicd-gru-50": TransICDConfig(**_MIMIC, **_GRU),
  # As released, position by row of the batch and padding in the mean.
  "transicd-released-50": TransICDConfig(**_MIMIC, positions="batch_row"),
  "transicd-released-mean-50": TransICDConfig(
    **_MIMIC, pool="mean_of_all", margin=0.0, positions="batch_row"
  ),
  # All codes of MIMIC-III's three splits.
  "transicd-full": dataclasses.replace(TransICDConfig(**_MIMIC), labels=8922),
  # Laptop size, for the embedded task.
  "transicd-small": TransICDConfig(**_SMALL),
  "transicd-bce-small": TransICDConfig(**_SMALL, margin=0.0),
  "transicd-mean-small": TransICDConfig(**_SMALL, **_MEAN),
  "transicd-gru-small": TransICDConfig(**_SMALL, **_GRU),
}
