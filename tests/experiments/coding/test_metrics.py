"""Figures of coding: small cases worked out by hand, and scikit-learn's where it has them."""

import json

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from attnzoo.experiments.coding.metrics import (
  area_under_roc,
  best_threshold,
  coding_metrics,
  precision_at,
)

# Columns: found twice and missed once; found wrongly; nothing to find and nothing found.
TARGETS = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]], np.uint8)
PROBABILITIES = np.array(
  [[0.9, 0.6, 0.1], [0.8, 0.5, 0.2], [0.3, 0.2, 0.4], [0.4, 0.1, 0.3]], np.float32
)


def drawn(documents=60, codes=7, seed=0):
  """Scores with ties that say something about targets in which every code is there and is not."""
  draw = np.random.default_rng(seed)
  targets = (draw.uniform(size=(documents, codes)) < 0.3).astype(np.uint8)
  targets[0], targets[1] = 1, 0
  scores = (0.4 * targets + 0.6 * draw.uniform(size=targets.shape)).round(2)
  return scores, targets


def test_figures_by_hand():
  found = coding_metrics(PROBABILITIES, TARGETS, labels="abc", names=("A", "B", "C"), ks=(1, 2, 5))
  # Predicted (above 0.5, so not the 0.5 itself): (0, a), (0, b), (1, a). TP 2, FP 1, FN 2.
  assert found.micro_f1 == pytest.approx(4 / 7)
  assert [code.f1 for code in found.codes] == pytest.approx([0.8, 0, 0])
  assert found.macro_f1 == pytest.approx(0.8 / 3)
  # Mean precision 1/3, mean recall (2/3) / 3.
  assert found.macro_f1_caml == pytest.approx(2 * (1 / 3) * (2 / 9) / (1 / 3 + 2 / 9))
  # a: 0.9 and 0.8 above 0.4, 0.3 not. b: 0.5 above all but 0.6. c: no positive.
  assert [code.auc for code in found.codes] == pytest.approx([2 / 3, 2 / 3, None])
  assert found.macro_auc == pytest.approx(2 / 3)
  assert found.codes_without_auc == 1
  # Positives 0.9, 0.8, 0.5, 0.3 against 0.6, 0.4, 0.4, 0.3, 0.2, 0.2, 0.1, 0.1.
  assert found.micro_auc == pytest.approx((8 + 8 + 7 + 4.5) / 32)
  # Best: a, a, c, a; best two: ab, ab, ca, ac.
  assert found.precision_at == pytest.approx({1: 2 / 4, 2: (1 + 2 + 1 + 0) / 8})
  assert found.accuracy == 1 / 4  # the last document
  first = found.codes[0]
  assert (first.label, first.name, first.positives) == ("a", "A", 3)
  assert (first.precision, first.recall) == pytest.approx((1, 2 / 3))
  assert "micro_f1 0.5714" in found.describe()


def test_figures_are_scikit_learns():
  scores, targets = drawn()
  found = coding_metrics(scores, targets, threshold=0.45)
  predicted = scores > 0.45
  for average in ("micro", "macro"):
    expected = sklearn_metrics.f1_score(targets, predicted, average=average, zero_division=0)
    assert getattr(found, f"{average}_f1") == pytest.approx(expected, abs=1e-12)
    expected = sklearn_metrics.roc_auc_score(targets, scores, average=average)
    assert getattr(found, f"{average}_auc") == pytest.approx(expected, abs=1e-12)
  expected = sklearn_metrics.accuracy_score(targets, predicted)
  assert found.accuracy == pytest.approx(expected)
  per_code = sklearn_metrics.precision_recall_fscore_support(targets, predicted, zero_division=0)
  ours = [(code.precision, code.recall, code.f1, code.positives) for code in found.codes]
  np.testing.assert_allclose(np.transpose(per_code), ours, atol=1e-12)
  assert found.codes_without_auc == 0


def test_order_of_documents_and_codes_does_not_matter():
  scores, targets = drawn()
  rows, columns = np.random.default_rng(1).permutation(60), np.arange(7)[::-1]
  one, other = (coding_metrics(s, t) for s, t in (
    (scores, targets), (scores[rows][:, columns], targets[rows][:, columns])
  ))  # fmt: skip
  for name in ("micro_f1", "macro_f1", "macro_f1_caml", "micro_auc", "macro_auc", "accuracy"):
    assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-12)


def test_nothing_predicted_and_one_class():
  targets = np.ones((3, 1), np.uint8)
  found = coding_metrics(np.full((3, 1), 0.2), targets, ks=(1, 5))
  assert (found.micro_f1, found.macro_f1, found.macro_f1_caml, found.accuracy) == (0, 0, 0, 0)
  assert (found.micro_auc, found.macro_auc, found.codes_without_auc) == (None, None, 1)
  assert found.precision_at == {1: 1.0}
  assert "auc" not in found.describe()


def test_precision_counts_fewer_codes_than_k():
  assert precision_at(np.array([[0.9, 0.1, 0.5]]), np.array([[1, 0, 0]]), 2) == 0.5
  with pytest.raises(ValueError, match=r"precision_at: k must lie in 1..3; got 4"):
    precision_at(np.zeros((1, 3)), np.zeros((1, 3)), 4)


def test_area_counts_ties_one_half():
  assert area_under_roc(np.array([0.5, 0.5]), np.array([1, 0])) == 0.5


@pytest.mark.parametrize("seed", range(3))
def test_best_threshold_is_the_best(seed):
  scores, targets = drawn(20, 4, seed)
  best = coding_metrics(scores, targets, threshold=best_threshold(scores, targets)).micro_f1
  tried = [-1.0, *np.unique(scores)]  # predictions change nowhere else
  others = [coding_metrics(scores, targets, threshold=t).micro_f1 for t in tried]
  assert best == pytest.approx(max(others), abs=1e-12)


@pytest.mark.parametrize(
  ("scores", "targets", "predicted"),
  [
    ([[0.2, 0.7, 0.7]], [[0, 1, 0]], [[False, True, True]]),  # equal scores stay together
    ([[0.2, 0.7]], [[1, 1]], [[True, True]]),
    ([[0.2, 0.7]], [[0, 0]], [[False, False]]),
    ([[0.5, 0.5]], [[0, 1]], [[True, True]]),
  ],
)
def test_best_threshold_at_its_edges(scores, targets, predicted):
  for kind in (np.float32, np.float64):
    scores = np.array(scores, kind)
    threshold = best_threshold(scores, np.array(targets))
    np.testing.assert_array_equal(scores.astype(np.float64) > threshold, predicted)


def test_neighbouring_floats_are_told_apart():
  below = np.float32(0.3)
  scores = np.array([[below, np.nextafter(below, np.float32(1))]])
  targets = np.array([[0, 1]])
  found = coding_metrics(scores, targets, threshold=best_threshold(scores, targets))
  assert found.micro_f1 == 1


def test_record_is_json():
  record = json.loads(json.dumps(coding_metrics(PROBABILITIES, TARGETS, ks=(1,)).to_json()))
  assert record["precision_at"] == {"1": 0.5}
  assert record["codes"][2]["auc"] is None
  assert record["codes"][0]["label"] == "0"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(probabilities=PROBABILITIES[:2]), "must both be .documents, codes., not empty; got"),
    (dict(probabilities=PROBABILITIES[:0], targets=TARGETS[:0]), "not empty"),
    (dict(probabilities=PROBABILITIES * np.nan), "must be finite; got 12"),
    (dict(targets=TARGETS * 2), "targets must be 0 or 1"),
    (dict(labels="ab"), "labels must be one for each of the 3 columns; got 2"),
    (dict(names="ab"), "names must be one for each"),
  ],
)
def test_unsuitable_arguments(change, message):
  options = dict(probabilities=PROBABILITIES, targets=TARGETS) | change
  with pytest.raises(ValueError, match=message):
    coding_metrics(**options)
