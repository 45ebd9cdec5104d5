"""Baselines on notes so small that one sees what each of them can know."""

import numpy as np
import pytest

from attnzoo.experiments.coding import baselines
from attnzoo.experiments.data.notes.cleaning import clean
from attnzoo.experiments.data.notes.sets import NoteSet, NoteSplit
from attnzoo.experiments.data.notes.vocabulary import Vocabulary

TEXTS = dict(
  train=("gout", "asthma", "gout asthma", "nothing", "denies gout", "gout denies asthma",
         "asthma denies gout") * 10,
  validation=("gout and severe asthma", "denies gout", "nothing else"),
  test=("severe asthma", "gout denies asthma", "asthma denies gout"),
)  # fmt: skip


def truth(text):
  """gout and asthma hold unless the word before is `denies`; the last label is of every note."""
  words = text.split()
  before = dict(zip(words, ["", *words[:-1]], strict=True))
  return [*(before.get(name, "denies") != "denies" for name in ("asthma", "gout")), True]


def make_notes():
  cleaned = {name: [clean(text, "minimal") for text in texts] for name, texts in TEXTS.items()}
  vocabulary = Vocabulary.build(cleaned["train"])
  splits = {}
  for name, texts in cleaned.items():
    ids = [vocabulary.encode(text.split()) for text in texts]
    starts = np.cumsum([0, *map(len, ids)])
    targets = np.array([truth(text) for text in texts], np.uint8)
    splits[name] = NoteSplit(np.concatenate(ids), starts, targets, TEXTS[name])
  labels = ("asthma", "gout", "note")
  return NoteSet("notes", splits, labels, labels, vocabulary, "minimal", "f")


@pytest.fixture(scope="module")
def notes():
  return make_notes()


def test_frequency_says_the_same_of_every_note(notes):
  found = baselines.label_frequency(notes)
  np.testing.assert_allclose(found.probabilities["test"], [[3 / 7, 3 / 7, 1]] * 3)
  assert found.plain["test"].codes[2].f1 == 1
  assert found.plain["test"].codes_without_auc == 1  # that of every note


def test_words_in_order_tell_a_denial(notes):
  """1-grams cannot know whom `denies` means, pairs of words do."""
  words = baselines.logistic_regression(notes, 1, 100.0)
  pairs = baselines.logistic_regression(notes, 2, 100.0)
  assert pairs.plain["test"].accuracy == 1
  one, other = words.probabilities["test"][1:]  # the same words in another order
  np.testing.assert_allclose(one, other, rtol=1e-12)
  assert words.plain["test"].accuracy < 1
  for found in (words, pairs):
    assert found.probabilities["validation"].shape == (3, 3)
    assert (found.probabilities["test"][:, 2] == 1).all()  # the label of every training note
  again = baselines.logistic_regression(notes, 2, 100.0)
  np.testing.assert_array_equal(again.probabilities["test"], pairs.probabilities["test"])


def test_match_is_blind_to_denials(notes):
  phrases = dict(asthma=["asthma", "Severe asthma"], gout=["gout"])
  found = baselines.string_match(notes, phrases)
  expected = [[1, 0, 0], [1, 1, 0], [1, 1, 0]]
  np.testing.assert_array_equal(found.probabilities["test"], expected)


def test_match_takes_the_longest_phrase(notes):
  phrases = dict(asthma=["severe asthma", ""], gout=["asthma"])
  found = baselines.string_match(notes, phrases).probabilities["test"]
  np.testing.assert_array_equal(found, [[1, 0, 0], [0, 1, 0], [0, 1, 0]])


def test_threshold_comes_from_the_validation_split(notes):
  targets = notes.splits["validation"].targets
  probabilities = dict(
    validation=np.where(targets, 0.3, 0.1), test=np.full(notes.splits["test"].targets.shape, 0.25)
  )
  found = baselines.score("mine", notes, probabilities)
  assert found.threshold == pytest.approx(0.2)
  assert found.tuned["validation"].micro_f1 == 1
  assert found.tuned["test"].threshold == found.threshold
  assert found.plain["test"].micro_f1 == 0
  assert found.tuned["test"].micro_f1 > 0
  assert [code.label for code in found.plain["test"].codes] == list(notes.labels)
