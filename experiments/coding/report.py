"""The report on a model that codes notes: systems side by side, every code, which words helped."""

import csv
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from attnzoo.experiments.coding import baselines
from attnzoo.experiments.coding.metrics import CodingMetrics
from attnzoo.experiments.coding.prediction import Predictions, predict
from attnzoo.experiments.data import DataConfig, NoteSet
from attnzoo.experiments.training import state

CODES_FILE, CHART_FILE = "codes.csv", "codes.png"


class System(NamedTuple):
  """A row of the table: figures on the test split."""

  name: str
  plain: CodingMetrics  # at the threshold 0.5
  tuned: CodingMetrics  # at the threshold that is best on the validation split


class Tried(NamedTuple):
  """A model on a split."""

  system: System
  recall: Mapping[str, float]  # tuned; of codes said in words that training has, and in others


def try_model(
  name: str,
  predict_step: Callable,
  params: state.Params,
  notes: NoteSet,
  data: DataConfig,
  mesh: Mesh,
  *,
  split: str = "test",
) -> Tried:
  """Tunes the threshold on the validation split and takes the figures of another one."""
  found = {
    part: predict(predict_step, params, notes, data, mesh, split=part)
    for part in {"validation", split}
  }
  threshold, tried = found["validation"].threshold(notes, "validation"), found[split]
  system = System(name, *(tried.metrics(notes, split, at) for at in (0.5, threshold)))
  return Tried(system, _recall_by_words(notes, split, tried, threshold))


def _recall_by_words(notes, split, tried: Predictions, threshold: float) -> dict[str, float]:
  seen = notes.splits[split].seen
  if seen is None:
    return {}
  seen, truth = seen[tried.numbers], tried.targets(notes, split) != 0
  hits = tried.probabilities > threshold
  parts = {"words of training": truth & seen, "other words": truth & ~seen}
  return {name: float(hits[cells].mean()) for name, cells in parts.items() if cells.any()}


def try_baselines(notes: NoteSet, file: pathlib.Path) -> list[System]:
  """What needs no neural network; computed once per workdir and data."""
  try:
    stored = json.loads(file.read_text()) if file.exists() else {}
  except ValueError:  # written by a run that was killed
    stored = {}
  systems: list[dict[str, Any]] = stored.get("systems", [])
  if stored.get("notes") != notes.fingerprint:
    found = [
      baselines.label_frequency(notes),
      baselines.logistic_regression(notes),
      baselines.logistic_regression(notes, longest=3, strength=30.0),
    ]
    systems = [
      dict(name=b.name, plain=b.plain["test"].to_json(), tuned=b.tuned["test"].to_json())
      for b in found
    ]
    file.write_text(json.dumps(dict(notes=notes.fingerprint, systems=systems), indent=2) + "\n")
  return [
    System(one["name"], *(CodingMetrics.from_json(one[part]) for part in ("plain", "tuned")))
    for one in systems
  ]


_COLUMNS: dict[str, Callable[[CodingMetrics], float | None]] = {
  "micro F1": lambda m: m.micro_f1,
  "macro F1": lambda m: m.macro_f1,
  "micro AUC": lambda m: m.micro_auc,
  "macro AUC": lambda m: m.macro_auc,
  "P@5": lambda m: m.precision_at.get(5),
}
_TUNED = ("micro F1", "macro F1")  # what a threshold changes


def table(systems: Iterable[System], split: str = "test") -> str:
  """Figures at 0.5; behind those that a threshold changes, in brackets, at the tuned one."""
  rows = [[f"{split} split", *_COLUMNS]]
  for system in systems:
    cells = [system.name]
    for name, of in _COLUMNS.items():
      value, tuned = of(system.plain), of(system.tuned)
      shown = "-" if value is None else f"{value:.4f}"
      cells.append(f"{shown} ({tuned:.4f})" if name in _TUNED else shown)
    rows.append(cells)
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
  return "\n".join([*lines, "(in brackets: at the one threshold that is best on validation)"])


def write_codes(folder: pathlib.Path, figures: CodingMetrics) -> list[pathlib.Path]:
  """codes.csv and codes.png: every code's figures, the chart sorted by AUC."""
  path = folder / CODES_FILE
  with path.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["code", "title", "notes", "precision", "recall", "f1", "auc"])
    for code in figures.codes:
      numbers = (code.precision, code.recall, code.f1, code.auc)
      shown = ["" if x is None else f"{x:.4f}" for x in numbers]
      writer.writerow([code.label, code.name, code.positives, *shown])
  return [path, _draw_codes(folder / CHART_FILE, figures)]


def _draw_codes(path: pathlib.Path, figures: CodingMetrics) -> pathlib.Path:
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  codes = sorted(figures.codes, key=lambda code: -1 if code.auc is None else code.auc)[-60:]
  figure, axes = pyplot.subplots(figsize=(max(6, 0.24 * len(codes)), 4.5), layout="constrained")
  places = np.arange(len(codes))
  axes.bar(places - 0.2, [c.auc or 0 for c in codes], 0.4, label="AUC")
  axes.bar(places + 0.2, [c.f1 for c in codes], 0.4, label="F1")
  axes.set_xticks(places, [c.label for c in codes], rotation=90, fontsize=8)
  axes.set(ylim=(0, 1))
  axes.set_title(f"figures of each code, F1 at {figures.threshold:.2f}", loc="left")
  axes.margins(x=0.01)
  axes.grid(axis="y", alpha=0.3)
  axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
  figure.savefig(path, dpi=130)
  pyplot.close(figure)
  return path


def to_json(systems: Iterable[System], recall: Mapping[str, float]) -> dict[str, Any]:
  return dict(
    systems={s.name: dict(plain=s.plain.to_json(), tuned=s.tuned.to_json()) for s in systems},
    recall_by_words=dict(recall),
  )
