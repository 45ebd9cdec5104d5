"""Documents in, a probability for each label out."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from .decoder import Notes
from .dropout import dropout, split_key
from .label_attention import LabelAttention
from .label_losses import label_loss_sums, ldam_logits
from .losses import LossSums
from .partitioning import constrain, logical
from .positions import sinusoids
from .variables import Constant, Tracked

PAD = 0  # id of padding, which stands behind the tokens of a row and nowhere else
POSITIONS = ("sequence", "batch_row", "none")
POOLS = ("labels", "mean", "mean_of_all", "last")


class LabelClassifier(nnx.Module):
  """Embedding, encoder, one vector per label or one for all, and a dense unit per label.

  `tokens` are [B, T] with `PAD` behind the end of each document. The encoder is a list of blocks
  without states, or a module `encoder(x, lengths) -> ([B, T, D], [B, D])` such as
  `BidirectionalGRU`, whose second result "last" pools.

  Args:
    pool: what the dense units see: "labels" (`attention`, a vector each), "mean" over real tokens,
      "mean_of_all" with padding, or "last".
    positions: "sequence" adds row t of a table of sinusoids to token t; "batch_row" adds row b to
      all tokens of document b, as the released code of TransICD does by mistake; or "none".
    dropouts: how often the embedded tokens are dropped from, one after the other.
    frozen: the embedding is saved but not trained.
    margin: scale of the LDAM margins (`ldam_logits`); 0 leaves plain cross-entropy. The margins of
      the labels are a variable that is set from the data; before, they are 0.
  """

  def __init__(
    self,
    encoder: Any,  # a list of blocks, or a module
    attention: LabelAttention | None,
    *,
    table: Float[Array, "V D"],
    labels: int,
    head_features: int,
    pool: str = "labels",
    positions: str = "sequence",
    max_length: int = 2500,
    dropout: float = 0.0,
    dropouts: int = 2,
    frozen: bool = False,
    margin: float = 0.0,
    head_init: nnx.Initializer,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.pool, self.positions, self.dtype = pool, positions, dtype
    self.dropout, self.dropouts, self.margin = dropout, dropouts, margin
    kind = Tracked if frozen else nnx.Param
    self.embedding = kind(table.astype(param_dtype), **logical("vocab", "embed"))
    wide = jnp.promote_types(param_dtype, jnp.float32)
    rows = None if positions == "none" else sinusoids(max_length, table.shape[1])
    self.position_table = None if rows is None else Constant(jnp.asarray(rows, wide))
    self.encoder = nnx.List(encoder) if isinstance(encoder, Sequence) else encoder
    self.attention = attention
    head = head_init(rngs.params(), (head_features, labels), param_dtype).T
    self.head = nnx.Param(head, **logical("vocab", None))
    self.head_bias = nnx.Param(jnp.zeros((labels,), param_dtype), **logical("vocab"))
    self.margins = Tracked(jnp.zeros((labels,), wide), **logical("vocab"))

  def __call__(
    self, tokens: Int[Array, "B T"], *, dropout_key: jax.Array | None = None
  ) -> Float[Array, "B L"]:
    """Logits, float32 (or wider); their sigmoid is the probability of each label.

    A document of padding alone has the bias of each label where `pool` is "labels".
    """
    lengths = self._lengths(tokens)
    x, last = self._encode(tokens, lengths, dropout_key)
    mask = jnp.arange(tokens.shape[1]) < lengths[:, None]
    head = self.head[...]
    wide = jnp.promote_types(self.dtype, jnp.float32)
    if self.attention is not None:
      read = self.attention(x, mask).astype(wide)
      logits = jnp.einsum("bld,ld->bl", read, head.astype(wide))
    else:
      read = last
      if read is None or self.pool != "last":
        read = _mean(x, mask if self.pool == "mean" else None)
      logits = read.astype(wide) @ head.astype(wide).T
    return logits + self.head_bias[...].astype(wide)

  def encode(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Activations of the tokens behind the encoder."""
    return self._encode(tokens, self._lengths(tokens), None)[0]

  def weights(self, tokens: Int[Array, "B T"], labels: Int[Array, " P"]) -> Float[Array, "B P T"]:
    """How much each of the chosen labels reads from each token: the explanation of its logit.

    Raises:
      ValueError: a model without attention per label.
    """
    if self.attention is None:
      raise ValueError(
        f"LabelClassifier: pool must be 'labels' for weights; got {self.pool!r} (it has none)"
      )
    lengths = self._lengths(tokens)
    x, _ = self._encode(tokens, lengths, None)
    return self.attention.weights(x, labels, jnp.arange(tokens.shape[1]) < lengths[:, None])

  def embed(
    self, tokens: Int[Array, "B T"], dropout_key: jax.Array | None = None
  ) -> Float[Array, "B T D"]:
    """sqrt(D) E[tokens] plus the positions."""
    x = self.embedding[...][tokens]
    # The row of padding learns nothing.
    x = jnp.where((tokens == PAD)[..., None], jax.lax.stop_gradient(x), x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32)) * x.shape[-1] ** 0.5
    if self.position_table is not None:
      batch, length = tokens.shape
      count, rows = (length, "length") if self.positions == "sequence" else (batch, "rows")
      if count > self.position_table.shape[0]:
        raise ValueError(
          f"LabelClassifier: tokens must have at most max_length"
          f" ({self.position_table.shape[0]}) {rows} with positions {self.positions!r}; got {count}"
          " (cut the documents, or build it with a larger max_length)"
        )
      table = self.position_table[...][:count].astype(x.dtype)
      x += table[None] if self.positions == "sequence" else table[:, None]
    for key in split_key(dropout_key, self.dropouts):
      x = dropout(x, self.dropout, key)
    return constrain(x.astype(self.dtype), "batch", "length", None)

  def loss_and_notes(
    self,
    tokens: Int[Array, "B T"],
    targets: Float[Array, "B L"],
    weights: Float[Array, "B 1"],
    *,
    dropout_key: jax.Array | None = None,
  ) -> tuple[LossSums, Notes]:
    """Sums over the documents of a batch; nothing to note."""
    logits = self(tokens, dropout_key=dropout_key)
    shifted = logits
    if self.margin:
      shifted = ldam_logits(logits, targets, self.margins[...], self.margin)
    sums = label_loss_sums(logits, shifted, targets, weights)
    return sums, Notes(jnp.zeros((), jnp.float32), ())

  def loss(
    self, tokens: Int[Array, "B T"], targets: Float[Array, "B L"], weights: Float[Array, "B 1"]
  ) -> LossSums:
    """`loss_and_notes` without dropout and notes."""
    return self.loss_and_notes(tokens, targets, weights)[0]

  def _lengths(self, tokens):
    return jnp.sum(tokens != PAD, axis=1, dtype=jnp.int32)

  def _encode(self, tokens, lengths, dropout_key):
    keys = split_key(dropout_key, 2)
    x = self.embed(tokens, keys[0])
    if not isinstance(self.encoder, nnx.List):
      return self.encoder(x, lengths)
    for block, key in zip(self.encoder, split_key(keys[1], len(self.encoder)), strict=True):
      x, _, _ = block.with_note(x, lengths=lengths, dropout_key=key)
    return x, None


def _mean(x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None) -> Float[Array, "B D"]:
  """Over the tokens of the mask, at least one; over all without it."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  if mask is None:
    return jnp.mean(x, axis=1)
  total = jnp.sum(jnp.where(mask[..., None], x, 0), axis=1)
  return total / jnp.maximum(jnp.sum(mask, axis=1), 1)[:, None]
