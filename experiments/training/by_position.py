"""Loss of a model by the position of the target: how it uses the past, and how far it can look."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnzoo.experiments.data import Data, DataConfig, evaluation_batches
from attnzoo.experiments.training import state


def make_position_losses(parts: state.Parts, piece: int) -> Callable[..., Float[Array, " T"]]:
  """(params, tokens [B, T], targets [B, T]) -> nats by position, summed over rows; to be jitted.

  Rows are one document each. Logits exist for `piece` positions at a time, which divides T.
  """

  def losses(params, tokens, targets):
    model = state.merge(parts, params)
    hidden, _ = model.hidden(tokens)  # [B, T, D]

    def of_piece(inputs):
      h, target = inputs  # [piece, B, D], [piece, B]
      logits = model.logits(h)
      chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
      return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - chosen, axis=-1)  # [piece]

    pieces = (hidden.swapaxes(0, 1), targets.T)
    pieces = jax.tree.map(lambda x: x.reshape(-1, piece, *x.shape[1:]), pieces)
    return jax.lax.map(of_piece, pieces).reshape(-1)

  return losses


def whole_rows(
  data: Data, config: DataConfig, length: int, most: int, *, split: str = "validation"
) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, "N T"]]:
  """(tokens, targets) of up to `most` rows of a split that lie within one document each.

  So all positions are averaged over the same documents. The rows are spread over the split.

  Raises:
    ValueError: there is none.
  """
  config = dataclasses.replace(
    config, sequence_length=length, batch_size=1, split_documents=True, predict_first=True
  )
  rows = [
    (batch["tokens"][0], batch["targets"][0])
    for batch in evaluation_batches(data, config, split=split)
    if (batch["segment_ids"] == 1).all()
  ]
  if not rows:
    raise ValueError(
      f"whole_rows: length must fit into a document of the {split} split; got {length} tokens (take"
      " fewer, or longer documents)"
    )
  chosen = np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))
  tokens, targets = zip(*(rows[i] for i in chosen), strict=True)
  return np.stack(tokens), np.stack(targets)


def loss_by_position(
  parts: state.Parts,
  params: state.Params,
  tokens: Int[np.ndarray, "N T"],
  targets: Int[np.ndarray, "N T"],
  *,
  piece: int,
  batch_size: int,
) -> Float[np.ndarray, "pieces"]:
  """Mean loss in nats of the positions of each piece, over all rows.

  Args:
    piece: positions of one number, dividing T.
    batch_size: rows at a time; as many of the last as do not fill a batch are left out, unless
      there are no others.
  """
  batch_size = min(batch_size, len(tokens))
  count = len(tokens) - len(tokens) % batch_size
  losses = jax.jit(make_position_losses(parts, piece))
  total = np.zeros(tokens.shape[1])
  for start in range(0, count, batch_size):
    rows = slice(start, start + batch_size)
    total += np.asarray(losses(params, tokens[rows], targets[rows]), np.float64)
  return (total / count).reshape(-1, piece).mean(1)
