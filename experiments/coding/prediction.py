"""Probabilities of the codes of notes, by a model in training or a loaded one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float

from attnzoo.experiments.coding.metrics import CodingMetrics, best_threshold, coding_metrics
from attnzoo.experiments.data import DataConfig, NoteSet, evaluation_batches
from attnzoo.experiments.training import state
from attnzoo.experiments.training.batches import place_batch
from attnzoo.layers import label_margins


class Predictions(NamedTuple):
  """Of a split, without the rows that filled up batches."""

  loss: float  # nats per label, margins included
  accuracy: float  # share of notes whose labels are all right
  probabilities: Float[np.ndarray, "N L"]
  numbers: np.ndarray  # [N], which note of the split each row is

  def metrics(self, notes: NoteSet, split: str, threshold: float = 0.5) -> CodingMetrics:
    """The figures at a threshold."""
    return coding_metrics(
      self.probabilities, self.targets(notes, split), threshold=threshold,
      labels=notes.labels, names=notes.label_names,
    )  # fmt: skip

  def threshold(self, notes: NoteSet, split: str) -> float:
    """The one that is best for these predictions."""
    return best_threshold(self.probabilities, self.targets(notes, split))

  def targets(self, notes: NoteSet, split: str) -> np.ndarray:
    return notes.splits[split].targets[self.numbers]


def make_predict_step(parts: state.Parts) -> Callable[[state.Params, dict], tuple[Any, jax.Array]]:
  """(loss sums, probabilities [B, L]) of one batch, as a pure function to be jitted."""

  def step(params, batch):
    model = state.merge(parts, params)
    return model.loss(**batch), jax.nn.sigmoid(model(batch["tokens"]))

  return step


def predict(
  predict_step: Callable,
  params: state.Params,
  notes: NoteSet,
  data: DataConfig,
  mesh: Mesh,
  *,
  split: str = "validation",
  max_tokens: int = 0,
) -> Predictions:
  """Every note of a split, in its order; the first ones up to `max_tokens` tokens if given."""
  part, parts = state.data_part(mesh)
  batches = evaluation_batches(
    notes, data, split=split, max_tokens=max_tokens or None, process_index=part,
    process_count=parts,
  )  # fmt: skip
  totals, rows = np.zeros(3), []
  for batch in batches:
    sums, found = predict_step(params, place_batch(batch, mesh))
    totals += [float(sums.loss), float(sums.correct), float(sums.weight)]
    if not found.is_fully_addressable:
      found = multihost_utils.process_allgather(found, tiled=True)
    rows.append(np.asarray(found))
  numbers = batches.numbers
  loss, correct, weight = totals
  probabilities = np.concatenate(rows)[: len(numbers)]
  return Predictions(loss / weight, correct / weight, probabilities, numbers)


def from_the_data(params: state.Params, notes: NoteSet) -> state.Params:
  """Fresh parameters with the margins of the labels' counts, and the vectors that notes come with.

  Raises:
    ValueError: vectors of another width than the model's.
  """
  changed: dict[str, Any] = dict(margins=label_margins(notes.label_counts))
  table = params["embedding"]
  if notes.embedding is not None:
    if notes.embedding.shape[1] != table.shape[1]:
      raise ValueError(
        f"data.embedding: vectors must have the model's {table.shape[1]} features; got"
        f" {notes.embedding.shape[1]} (set --config.model.features={notes.embedding.shape[1]})"
      )
    values = np.array(jax.device_get(table))
    values[: len(notes.embedding)] = notes.embedding
    changed["embedding"] = values
  placed = {
    name: jax.device_put(np.asarray(value, params[name].dtype), params[name].sharding)
    for name, value in changed.items()
  }
  return params | placed
