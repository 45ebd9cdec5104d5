"""Loss of a model over a split of the data."""

import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from attnzoo.experiments.data import (
  Data,
  DataConfig,
  ImageSet,
  bits_per_byte,
  evaluation_batches,
)
from attnzoo.experiments.training import state


class Evaluation(NamedTuple):
  """Of a whole split."""

  loss: float  # nats per target
  accuracy: float  # share of targets that were the likeliest token
  bits_per_byte: float | None  # None where the text's bytes are not known
  bits_per_dim: float | None = None  # of pictures
  word_perplexity: float | None = None  # of whole splits whose source counts words

  def describe(self) -> str:
    parts = [f"loss {self.loss:.4f}"]
    if self.bits_per_byte is not None:
      parts.append(f"{self.bits_per_byte:.4f} bits per byte")
    if self.bits_per_dim is not None:
      parts.append(f"{self.bits_per_dim:.4f} bits per dim")
    if self.word_perplexity is not None:
      parts.append(f"{self.word_perplexity:.2f} perplexity of a word")
    return "  ".join([*parts, f"accuracy {self.accuracy:.1%}"])

  def metrics(self) -> dict[str, float]:
    values = {"validation_loss": self.loss, "validation_accuracy": self.accuracy}
    for name in ("bits_per_byte", "bits_per_dim", "word_perplexity"):
      if getattr(self, name) is not None:
        values[f"validation_{name}"] = getattr(self, name)
    return values


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This host's rows, whole in length, as arrays over the whole mesh."""
  sharding = state.batch_sharding(mesh)
  _, parts = state.data_part(mesh)
  return {
    name: jax.make_array_from_process_local_data(
      sharding, rows, (rows.shape[0] * parts, *rows.shape[1:])
    )
    for name, rows in batch.items()
  }


def evaluate(
  eval_step,
  params: state.Params,
  corpus: Data,
  data: DataConfig,
  mesh: Mesh,
  *,
  split: str = "validation",
  max_tokens: int = 0,
  overlap: int = 0,
) -> Evaluation:
  """Every target of the split once; text in rows of `data.sequence_length` tokens.

  Of ready-made examples each counts 1, its targets equal parts of that.

  Args:
    eval_step: jitted `state.make_eval_step`.
    max_tokens: stop after so many targets; 0 = all.
    overlap: tokens of context that each row repeats from the one before it, without counting them.
  """
  part, parts = state.data_part(mesh)
  batches = evaluation_batches(
    corpus,
    data,
    split=split,
    max_tokens=max_tokens or None,
    overlap=overlap,
    process_index=part,
    process_count=parts,
  )
  totals = np.zeros(3)
  for batch in batches:
    sums = eval_step(params, place_batch(batch, mesh))
    totals += [float(sums.loss), float(sums.correct), float(sums.weight)]
  loss, correct, weight = totals
  per_byte = bits_per_byte(loss, batches.target_bytes) if batches.target_bytes else None
  per_dim = loss / weight / math.log(2) if isinstance(corpus, ImageSet) else None
  per_word = _perplexity(loss / batches.target_words) if batches.target_words else None
  return Evaluation(loss / weight, correct / weight, per_byte, per_dim, per_word)


def _perplexity(nats: float) -> float:
  try:
    return math.exp(nats)
  except OverflowError:  # of a model that learned nothing
    return math.inf
