"""Loss of a model over a split of the data."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from attnzoo.experiments.coding.metrics import CodingMetrics
from attnzoo.experiments.coding.prediction import make_predict_step, predict
from attnzoo.experiments.data import (
  Data,
  DataConfig,
  ImageSet,
  NoteSet,
  bits_per_byte,
  evaluation_batches,
)
from attnzoo.experiments.training import state
from attnzoo.experiments.training.batches import place_batch

_MORE_IS_BETTER = ("micro_f1", "macro_f1", "micro_auc", "p_at_5")  # of config.CRITERIA


class Evaluation(NamedTuple):
  """Of a whole split."""

  loss: float  # nats per target
  accuracy: float  # share of targets that were the likeliest token
  bits_per_byte: float | None  # None where the text's bytes are not known
  bits_per_dim: float | None = None  # of pictures
  word_perplexity: float | None = None  # of whole splits whose source counts words
  coding: CodingMetrics | None = None  # of notes, at the threshold 0.5

  def describe(self) -> str:
    parts = [f"loss {self.loss:.4f}"]
    if self.bits_per_byte is not None:
      parts.append(f"{self.bits_per_byte:.4f} bits per byte")
    if self.bits_per_dim is not None:
      parts.append(f"{self.bits_per_dim:.4f} bits per dim")
    if self.word_perplexity is not None:
      parts.append(f"{self.word_perplexity:.2f} perplexity of a word")
    if self.coding is not None:
      figures = {"micro F1": self.coding.micro_f1, "macro F1": self.coding.macro_f1}
      figures |= {"micro AUC": self.coding.micro_auc, "P@5": self.coding.precision_at.get(5)}
      parts += [f"{name} {value:.4f}" for name, value in figures.items() if value is not None]
    return "  ".join([*parts, f"accuracy {self.accuracy:.1%}"])

  def to_json(self) -> dict[str, object]:
    coding = None if self.coding is None else self.coding.to_json()
    return self._asdict() | dict(coding=coding)

  def badness(self, criterion: str) -> float:
    """By one of config.CRITERIA, or "": micro F1 of notes, loss of everything else. Less is better.

    Raises:
      ValueError: the data have no such figure.
    """
    found = self.badness_of(self.metrics(), criterion)
    if found is None:
      raise ValueError(
        f"train.best_by: must be a figure of these data; got {criterion!r} ('loss' is one of all)"
      )
    return found

  def badness_of(self, metrics: Mapping[str, float], criterion: str) -> float | None:
    """The same of a line of metrics.jsonl; None where it is no evaluation."""
    name = criterion or ("micro_f1" if self.coding else "loss")
    value = metrics.get(f"validation_{name}")
    return -value if value is not None and name in _MORE_IS_BETTER else value

  def metrics(self) -> dict[str, float]:
    values = {"validation_loss": self.loss, "validation_accuracy": self.accuracy}
    for name in ("bits_per_byte", "bits_per_dim", "word_perplexity"):
      if getattr(self, name) is not None:
        values[f"validation_{name}"] = getattr(self, name)
    if self.coding is not None:
      c = self.coding
      figures = dict(micro_f1=c.micro_f1, macro_f1=c.macro_f1, micro_auc=c.micro_auc,
                     macro_auc=c.macro_auc, p_at_5=c.precision_at.get(5))  # fmt: skip
      values |= {f"validation_{n}": value for n, value in figures.items() if value is not None}
    return values


def make_step(parts: state.Parts, corpus: Data) -> Callable:
  """What `evaluate` runs on each batch, compiled on its first call."""
  make = make_predict_step if isinstance(corpus, NoteSet) else state.make_eval_step
  return jax.jit(make(parts))


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
    eval_step: `make_step`.
    max_tokens: stop after so many targets; 0 = all.
    overlap: tokens of context that each row repeats from the one before it, without counting them.
  """
  if isinstance(corpus, NoteSet):
    options = dict(split=split, max_tokens=max_tokens)
    found = predict(eval_step, params, corpus, data, mesh, **options)
    figures = found.metrics(corpus, split)
    return Evaluation(found.loss, found.accuracy, None, coding=figures)
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
