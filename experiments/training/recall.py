"""What a model recalls of ready-made examples: by their shape, and by how far back the key is."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attnzoo.experiments.data import DataConfig, ExampleBlock, ExampleSet
from attnzoo.experiments.data.examples import batch_of, target_counts
from attnzoo.experiments.data.mqar import distances
from attnzoo.experiments.training import state


class SegmentRecall(NamedTuple):
  """Of the examples of one shape."""

  name: str
  length: int
  pairs: int
  examples: int
  accuracy: float  # mean over examples of the share of queries answered with the right token
  by_distance: tuple[tuple[int, int, float], ...]  # (largest distance, queries, accuracy)


class Recall(NamedTuple):
  """Of a split."""

  accuracy: float  # mean over all examples: the figure of the papers
  segments: tuple[SegmentRecall, ...]

  def to_json(self) -> dict[str, Any]:
    segments = [segment._asdict() for segment in self.segments]
    return dict(accuracy=self.accuracy, segments=segments)

  def describe(self) -> str:
    """A table: segments below each other, distances side by side."""
    edges = sorted({edge for segment in self.segments for edge, _, _ in segment.by_distance})
    lines = [["segment", "examples", "recall", *(f"<= {edge}" for edge in edges)]]
    for segment in self.segments:
      found = {edge: f"{accuracy:.3f}" for edge, _, accuracy in segment.by_distance}
      cells = [found.get(edge, "") for edge in edges]
      lines.append([segment.name, f"{segment.examples:,}", f"{segment.accuracy:.3f}", *cells])
    lines.append(["all", "", f"{self.accuracy:.3f}"])
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(lines[0]))]
    rows = (zip(line, widths[: len(line)], strict=True) for line in lines)
    return "\n".join("  ".join(cell.ljust(width) for cell, width in row).rstrip() for row in rows)


def make_predict(parts: state.Parts) -> Callable[..., Int[Array, "B n"]]:
  """(params, tokens [B, T], places [B, n]) -> the likeliest token at each place, to be jitted.

  Logits exist for these places only.
  """

  def predict(params, tokens, places):
    model = state.merge(parts, params)
    hidden, _ = model.hidden(tokens)  # [B, T, D]
    asked = jnp.take_along_axis(hidden, places[..., None], axis=1)  # [B, n, D]
    return jnp.argmax(model.logits(asked), axis=-1).astype(jnp.int32)

  return predict


def right_answers(
  predict: Callable, params: Any, blocks: Sequence[ExampleBlock], batch_size: int
) -> list[Bool[np.ndarray, "*M N n"]]:
  """Which queries of each block are answered rightly.

  `predict` is that of `make_predict`; it may put axes of several models in front.
  """
  counts, right = target_counts(blocks), []
  for block in blocks:
    found = []
    for start in range(0, len(block), batch_size):
      batch = batch_of(block, start, batch_size, counts[block.length])
      answers = np.asarray(predict(params, batch["tokens"], batch["places"]))
      found.append(answers == batch["targets"])
    everything = np.concatenate(found, axis=-2)  # filled up to whole batches and to most targets
    right.append(everything[..., : len(block), : block.targets_per_row])
  return right


def summarize(blocks: Sequence[ExampleBlock], right: Sequence[Bool[np.ndarray, "N n"]]) -> Recall:
  """The figures of one model from which of its answers were right."""
  segments = []
  for block, answers in zip(blocks, right, strict=True):
    edges = 1 << np.ceil(np.log2(distances(block))).astype(int)  # 1, 2, 4, 8, ...
    by_distance = tuple(
      (int(edge), int((edges == edge).sum()), float(answers[edges == edge].mean()))
      for edge in np.unique(edges)
    )
    segments.append(
      SegmentRecall(block.name, block.length, block.targets_per_row, len(block),
                    float(answers.mean()), by_distance)
    )  # fmt: skip
  total = sum(segment.examples for segment in segments)
  accuracy = sum(segment.accuracy * segment.examples for segment in segments) / total
  return Recall(accuracy, tuple(segments))


def measure(
  parts: state.Parts,
  params: state.Params,
  examples: ExampleSet,
  data: DataConfig,
  *,
  split: str = "validation",
) -> Recall:
  """Recall on a whole split."""
  predict, blocks = jax.jit(make_predict(parts)), examples.splits[split]
  return summarize(blocks, right_answers(predict, params, blocks, data.batch_size))
