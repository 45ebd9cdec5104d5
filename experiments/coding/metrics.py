"""How well probabilities of codes agree with the codes that were given.

With N documents, L codes, targets y in {0, 1} and probabilities p, both [N, L], a code is
predicted where p > threshold; TP, FP and FN count cells.
  micro F1     2 TP / (2 TP + FP + FN) over all cells
  macro F1     mean over codes of the same, 0 for a code without a true positive
  CAML's       F1 of the mean precision and the mean recall of the codes: another number, which the
  macro F1     literature calls by the same name
  micro AUC    area under the ROC curve of all cells; ties count one half
  macro AUC    mean of the area of each code; a code that all documents or none have is left out
  P@k          true codes among a document's k most probable ones / k, mean over documents
  accuracy     share of documents whose L cells are all right
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Num

KS = (1, 5, 8, 10, 15)


@dataclasses.dataclass(frozen=True)
class CodeScores:
  """The figures of one code."""

  label: str
  name: str
  positives: int  # documents that have it
  precision: float  # 0 where nothing is predicted
  recall: float  # 0 where nothing is to be found
  f1: float
  auc: float | None  # None where all documents have it, or none


@dataclasses.dataclass(frozen=True)
class CodingMetrics:
  """The figures of a split, see the module. Figures that do not exist are None."""

  documents: int
  threshold: float
  micro_f1: float
  macro_f1: float
  macro_f1_caml: float
  micro_auc: float | None  # None where all cells are alike
  macro_auc: float | None  # None where every code is left out
  codes_without_auc: int  # left out of macro_auc
  precision_at: Mapping[int, float]  # k -> P@k; no k above the number of codes
  accuracy: float
  codes: tuple[CodeScores, ...]

  def to_json(self) -> dict[str, object]:
    """Plain values; the keys of precision_at become strings, as JSON has them."""
    record = dataclasses.asdict(self)
    precision = {str(k): value for k, value in self.precision_at.items()}
    return record | dict(precision_at=precision, codes=list(record["codes"]))

  @classmethod
  def from_json(cls, record: Mapping[str, Any]) -> "CodingMetrics":
    """Reads `to_json` back."""
    precision = {int(k): value for k, value in record["precision_at"].items()}
    codes = tuple(CodeScores(**code) for code in record["codes"])
    return cls(**(dict(record) | dict(precision_at=precision, codes=codes)))

  def describe(self) -> str:
    """One line."""
    shown = dict(
      micro_f1=self.micro_f1, macro_f1=self.macro_f1,
      micro_auc=self.micro_auc, macro_auc=self.macro_auc,
    )  # fmt: skip
    shown |= {f"P@{k}": value for k, value in self.precision_at.items()}
    figures = [f"{name} {value:.4f}" for name, value in shown.items() if value is not None]
    return ", ".join([*figures, f"threshold {self.threshold:.3f}"])


def coding_metrics(
  probabilities: Float[np.ndarray, "N L"],
  targets: Num[np.ndarray, "N L"],
  *,
  threshold: float = 0.5,
  labels: Sequence[str] = (),
  names: Sequence[str] = (),
  ks: Sequence[int] = KS,
) -> CodingMetrics:
  """All figures of the module.

  Args:
    probabilities: or any scores that sort the same way; float, finite.
    targets: 0 and 1.
    threshold: a code is predicted above it, not at it.
    labels: codes of the columns, and `names` their titles; without them columns are numbered.
    ks: of P@k; those above L are left out.

  Raises:
    ValueError: shapes that differ or are empty, targets besides 0 and 1, scores that are no number.
  """
  truth = _check(probabilities, targets)
  probabilities = np.asarray(probabilities, np.float64)  # or the threshold would be rounded
  count = truth.shape[1]
  labels = _columns("labels", labels, count) or tuple(map(str, range(count)))
  names = _columns("names", names, count) or labels
  found = probabilities > threshold
  right, predicted, positives = (cells.sum(axis=0) for cells in (truth & found, found, truth))
  precision, recall = right / np.maximum(predicted, 1), right / np.maximum(positives, 1)
  f1 = 2 * right / np.maximum(predicted + positives, 1)
  areas = [area_under_roc(probabilities[:, code], truth[:, code]) for code in range(count)]
  known = [area for area in areas if area is not None]
  columns = zip(labels, names, positives, precision, recall, f1, areas, strict=True)
  return CodingMetrics(
    documents=len(truth),
    threshold=float(threshold),
    micro_f1=float(2 * right.sum() / max(predicted.sum() + positives.sum(), 1)),
    macro_f1=float(np.mean(f1)),
    macro_f1_caml=_harmonic_mean(float(np.mean(precision)), float(np.mean(recall))),
    micro_auc=area_under_roc(probabilities.ravel(), truth.ravel()),
    macro_auc=float(np.mean(known)) if known else None,
    codes_without_auc=count - len(known),
    precision_at={k: precision_at(probabilities, truth, k) for k in ks if k <= count},
    accuracy=float((truth == found).all(axis=1).mean()),
    codes=tuple(
      CodeScores(label, name, int(n), float(p), float(r), float(f), area)
      for label, name, n, p, r, f, area in columns
    ),
  )


def area_under_roc(scores: Float[np.ndarray, "n"], truth: Num[np.ndarray, "n"]) -> float | None:
  """Chance that a positive scores above a negative, ties one half; None without both."""
  from sklearn.metrics import roc_auc_score

  positives = int(np.count_nonzero(truth))
  return None if positives in (0, len(truth)) else float(roc_auc_score(truth, scores))


def precision_at(
  probabilities: Float[np.ndarray, "N L"], targets: Num[np.ndarray, "N L"], k: int
) -> float:
  """Mean over documents of (true codes among the k most probable) / k; of ties the later column."""
  if not 1 <= k <= probabilities.shape[1]:
    raise ValueError(
      f"precision_at: k must lie in 1..{probabilities.shape[1]}; got {k} (the number of codes)"
    )
  best = np.argsort(probabilities, axis=1, kind="stable")[:, -k:]
  return float(np.take_along_axis(np.asarray(targets) != 0, best, axis=1).mean())


def best_threshold(
  probabilities: Float[np.ndarray, "N L"], targets: Num[np.ndarray, "N L"]
) -> float:
  """The threshold for all codes that gives the best micro F1; meant for the held-out dev split.

  Every set of predictions that a threshold can make is tried. The result lies halfway between two
  neighbouring scores; of equally good ones it is the highest. Where no threshold finds anything
  true, it is the highest score, so that nothing is predicted.
  """
  truth = _check(probabilities, targets)
  scores = np.asarray(probabilities, np.float64).ravel()
  order = np.argsort(-scores, kind="stable")
  scores, hits = scores[order], truth.ravel()[order]
  last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of each run of equal scores
  right, predicted = np.cumsum(hits)[last], last + 1
  if not right[-1]:
    return float(scores[0])
  best = int(np.argmax(2 * right / (predicted + hits.sum())))
  above, below = scores[last[best]], scores[min(last[best] + 1, len(scores) - 1)]
  if above == below:  # everything is predicted
    return float(np.nextafter(above, -np.inf))
  middle = (above + below) / 2
  return float(middle if below <= middle < above else below)


def _check(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
  """The targets as bool."""
  if probabilities.ndim != 2 or probabilities.shape != targets.shape or not probabilities.size:
    raise ValueError(
      "coding_metrics: probabilities and targets must both be [documents, codes], not empty; got "
      f"{probabilities.shape} and {targets.shape} (one row a document)"
    )
  if not np.isfinite(probabilities).all():
    raise ValueError(
      "coding_metrics: probabilities must be finite; got "
      f"{int((~np.isfinite(probabilities)).sum())} that are not (has training diverged?)"
    )
  if not np.isin(targets, (0, 1)).all():
    raise ValueError("coding_metrics: targets must be 0 or 1; got other values (one column a code)")
  return targets != 0


def _columns(name: str, given: Sequence[str], count: int) -> tuple[str, ...]:
  if given and len(given) != count:
    raise ValueError(
      f"coding_metrics: {name} must be one for each of the {count} columns; got {len(given)} "
      "(in the order of the columns)"
    )
  return tuple(given)


def _harmonic_mean(first: float, second: float) -> float:
  total = first + second
  return 2 * first * second / total if total else 0.0
