"""What a model that codes notes has to beat: frequencies, known phrases, linear models of n-grams.

Each baseline learns from the train split of a `NoteSet` and gives probabilities [N, L] for the
validation and the test split, with the figures at the threshold 0.5 and at the one threshold that
is best (micro F1) on the validation split.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from attnzoo.experiments.coding.metrics import CodingMetrics, best_threshold, coding_metrics
from attnzoo.experiments.data.notes.cleaning import clean
from attnzoo.experiments.data.notes.sets import NoteSet

HELD_OUT = ("validation", "test")


@dataclasses.dataclass(frozen=True)
class Baseline:
  """What a baseline says, and how good it is. Keys of the mappings: validation, test."""

  name: str
  probabilities: Mapping[str, Float[np.ndarray, "N L"]]
  plain: Mapping[str, CodingMetrics]  # at 0.5
  tuned: Mapping[str, CodingMetrics]  # at the threshold that is best on the validation split
  threshold: float


def score(
  name: str, notes: NoteSet, probabilities: Mapping[str, Float[np.ndarray, "N L"]]
) -> Baseline:
  """The figures of probabilities of both held-out splits, whatever they come from."""
  targets = {split: notes.splits[split].targets for split in HELD_OUT}
  tuned = best_threshold(probabilities["validation"], targets["validation"])

  def figures(threshold: float) -> dict[str, CodingMetrics]:
    return {
      split: coding_metrics(
        probabilities[split], targets[split], threshold=threshold,
        labels=notes.labels, names=notes.label_names,
      )
      for split in HELD_OUT
    }  # fmt: skip

  return Baseline(name, probabilities, figures(0.5), figures(tuned), tuned)


def label_frequency(notes: NoteSet) -> Baseline:
  """Every note gets the share of training notes that have a label."""
  share = notes.label_counts / len(notes.splits["train"])
  probabilities = {
    split: np.tile(share, (len(notes.splits[split]), 1)).astype(np.float64) for split in HELD_OUT
  }
  return score("label frequency", notes, probabilities)


def logistic_regression(notes: NoteSet, longest: int = 1, strength: float = 1.0) -> Baseline:
  """One logistic regression a label on TF-IDF of n-grams of what a model reads.

  The n-grams are those of the words within the length limit, the unknown one included, that at
  least two training notes have; they weigh (1 + log tf) idf, rows have unit length.

  Args:
    longest: n-grams of 1 to so many words.
    strength: C, the inverse of the penalty.
  """
  from sklearn.feature_extraction.text import TfidfVectorizer

  count = TfidfVectorizer(
    preprocessor=_as_it_is, tokenizer=_as_it_is, token_pattern=None,
    ngram_range=(1, longest), min_df=2, sublinear_tf=True,
  )  # fmt: skip
  train = count.fit_transform(_words(notes, "train"))  # sparse [N, F]
  held_out = {split: count.transform(_words(notes, split)) for split in HELD_OUT}
  targets = notes.splits["train"].targets
  columns = [_one_label(train, column, held_out, strength) for column in targets.T]
  probabilities = {split: np.stack([c[split] for c in columns], axis=1) for split in HELD_OUT}
  grams = "1-grams" if longest == 1 else f"1- to {longest}-grams"
  return score(f"logistic regression, {grams}, C = {strength:g}", notes, probabilities)


def string_match(
  notes: NoteSet, phrases: Mapping[str, Iterable[str]], name: str = "string match"
) -> Baseline:
  """Probability 1 of each label one of whose phrases stands in the note, whoever has it or not.

  A phrase must be there word by word, cleaned as the text is. Of phrases that share words of the
  note the longest counts: "asthma" is not found in "asthma with status asthmaticus".

  Args:
    phrases: label -> its phrases, raw.
  """
  owners: dict[tuple[str, ...], set[int]] = {}  # cleaned phrase -> columns
  for column, label in enumerate(notes.labels):
    for phrase in phrases.get(label, ()):
      owners.setdefault(tuple(clean(phrase, notes.rules).split()), set()).add(column)
  owners.pop((), None)
  lengths = sorted({len(phrase) for phrase in owners}, reverse=True)
  probabilities = {
    split: np.zeros(notes.splits[split].targets.shape, np.float64) for split in HELD_OUT
  }
  for split, found in probabilities.items():
    for row, text in zip(found, notes.splits[split].texts, strict=True):
      row[_longest_matches(clean(text, notes.rules).split(), owners, lengths)] = 1
  return score(name, notes, probabilities)


def _longest_matches(
  words: Sequence[str], owners: Mapping[tuple[str, ...], set[int]], lengths: Sequence[int]
) -> list[int]:
  """Columns of the phrases that are found, the longest first; none shares a word with another."""
  free, columns = [True] * len(words), []
  for length in lengths:
    for start in range(len(words) - length + 1):
      stretch = slice(start, start + length)
      if all(free[stretch]) and (owner := owners.get(tuple(words[stretch]))):
        columns += sorted(owner)
        free[stretch] = [False] * length
  return columns


def _words(notes: NoteSet, split: str) -> Iterator[list[str]]:
  rows, held = notes.vocabulary.rows, notes.splits[split]
  return ([rows[i] for i in held.note(number)] for number in range(len(held)))


def _as_it_is(words: list[str]) -> list[str]:
  return words


def _one_label(
  train, truth: np.ndarray, held_out: Mapping, strength: float
) -> dict[str, Float[np.ndarray, "N"]]:
  """Probabilities of one label for sparse rows [N, F]."""
  from sklearn.linear_model import LogisticRegression

  if truth.min() == truth.max():  # nothing to tell apart
    return {split: np.full(rows.shape[0], float(truth[0])) for split, rows in held_out.items()}
  # The dual is several times faster than the primal where there are more n-grams than notes.
  model = LogisticRegression(
    C=strength, solver="liblinear", dual=True, max_iter=1000, random_state=0
  )
  model.fit(train, truth)
  return {split: model.predict_proba(rows)[:, 1] for split, rows in held_out.items()}
