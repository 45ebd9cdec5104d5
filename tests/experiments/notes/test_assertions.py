"""The made-up notes: always the same, true to their labels, and not solved without polarity."""

import dataclasses
import hashlib
import re

import numpy as np
import pytest

from attnzoo.experiments import make_icd10_phrases
from attnzoo.experiments.coding import baselines
from attnzoo.experiments.data import DataConfig, DataError, load_data
from attnzoo.experiments.data import notes as notes_package
from attnzoo.experiments.data.notes import assertions
from attnzoo.experiments.data.notes.cleaning import clean

SMALL = dict(train=300, validation=60, test=60)


@pytest.fixture(scope="module")
def small():
  return assertions.load_assertions(sizes=SMALL)


@pytest.mark.parametrize(
  ("difficulty", "expected"),
  [("easy", "a6001002469a1751"), ("hard", "e31ce1f58375f0c9")],
)
def test_notes_never_change(difficulty, expected):
  """Figures that were measured once stay comparable: raise _LAYOUT and measure again, if ever."""
  found = hashlib.sha256()
  for split in assertions.SEEDS:
    for note in assertions.make_notes(difficulty, split, 40):
      found.update(f"{note.text}\n{sorted(note.asserted.items())}\n".encode())
  assert found.hexdigest()[:16] == expected


def test_fewer_notes_are_the_start_of_more():
  assert assertions.make_notes("easy", "test", 5) == assertions.make_notes("easy", "test", 9)[:5]


def test_table_is_what_the_tabular_list_gives():
  tabular = pytest.importorskip("simple_icd_10_cm")
  assert make_icd10_phrases.phrase_table(tabular) == assertions.phrase_table()


class TabularList:
  """Some codes in the form of simple_icd_10_cm."""

  rows = {
    "1": ("Chapter", (), ""),
    "E11": ("Type 2 diabetes, NOS", (), "1"),
    "E11.0": ("Type 2 Diabetes with coma", ("Coma, with type 2 diabetes", "Sugar (high)"), "E11"),
    "E11.0A": ("Type 2 diabetes with coma, first encounter", (), "E11.0"),
    "2": ("Other chapter", (), ""),
    "Q00": ("Anencephaly", ("Diabetes type 7", "Congenital absence of brain"), "2"),
    "20": ("External causes", (), ""),
    "V01": ("Struck by cow", (), "20"),
  }
  get_all_codes = rows.keys

  def get_description(self, code):
    return self.rows[code][0]

  def get_inclusion_term(self, code):
    return list(self.rows[code][1])

  def get_descendants(self, code):
    return [other for other in self.rows if other.startswith(code + ".")]

  def get_ancestors(self, code):
    parent = self.rows[code][2]
    return [parent, *self.get_ancestors(parent)] if parent else []

  def is_category(self, code):
    return len(code) == 3

  def is_extended_subcategory(self, code):
    return code.endswith("A")


def test_phrases_of_a_tabular_list():
  table = make_icd10_phrases.phrase_table(TabularList(), ["E11"])
  # Equal words once, no seventh characters, no other chapter's wording of the same, no cue words.
  phrases = ["type 2 diabetes", "type 2 diabetes with coma", "sugar high"]
  assert table["labels"] == {"E11": dict(title="Type 2 diabetes, NOS", phrases=phrases)}
  assert table["outside"] == ["anencephaly"]


def test_table_names_its_origin():
  table = assertions.phrase_table()
  for origin in ("ICD-10-CM", "simple-icd-10-cm 1.5.0", "MIT"):
    assert origin in table["notice"]
  assert len(table["outside"]) == 2000
  assert set(table["labels"]) == set(assertions.ALL_LABELS)


def test_cues_survive_cleaning():
  sides = {
    positive: [clean(cue).split() for (side, _), cues in assertions.CUES.items() for cue in cues
               if side == positive]
    for positive in (True, False)
  }  # fmt: skip
  for positive, cues in sides.items():
    others = {word for cue in sides[not positive] for word in cue}
    assert all(set(cue) - others for cue in cues), cues


def test_some_phrases_are_held_out():
  shares = []
  for code, entry in assertions.phrase_table()["labels"].items():
    phrases = assertions.divide(code, entry["phrases"])
    assert phrases.known, code
    assert phrases.held_out, code
    assert assertions.divide(code, entry["phrases"][::2]).known == tuple(
      phrase for phrase in entry["phrases"][::2] if phrase in phrases.known
    )
    shares.append((len(phrases.held_out), len(entry["phrases"])))
  held_out, everything = np.sum(shares, axis=0)
  assert held_out / everything == pytest.approx(assertions.HELD_OUT, abs=0.03)


def read_by_rule(text):
  """Labels that the cues say hold: what a reader with the word lists would find."""
  labels = [code for block in assertions.DIFFICULTIES["easy"].blocks for code in block]
  owners = {p: c for c, own in assertions.label_phrases(labels, held_out=True).items() for p in own}
  longest_first = sorted(owners, key=len, reverse=True)
  pattern = re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})(?=$| and |, )")
  found = set()
  for sentence in re.split(r"\. ", text.removesuffix(".")):
    sentence = sentence[0].lower() + sentence[1:]
    for (positive, side), cues in assertions.CUES.items():
      for cue in cues if positive else ():
        if side == "before" and sentence.startswith(f"{cue} "):
          found |= {owners[phrase] for phrase in pattern.findall(sentence.removeprefix(cue))}
        if side == "behind" and sentence.endswith(f" {cue}"):
          found |= {owners[phrase] for phrase in pattern.findall(sentence.removesuffix(f" {cue}"))}
  return found


def test_a_reader_of_cues_finds_the_labels():
  notes = assertions.make_notes("easy", "test", 150)
  found = [(read_by_rule(note.text), set(note.asserted)) for note in notes]
  assert all(read >= truth for read, truth in found)
  assert np.mean([read == truth for read, truth in found]) > 0.9  # else: parts of other phrases


def test_small_set(small):
  assert small.describe().count("\n") == 3
  assert small.vocab_size == len(small.vocabulary)
  assert list(small.labels) == sorted(small.labels)
  assert len(small.label_names) == len(small.labels) == 50
  assert small.label_names[small.labels.index("I21")] == "Acute myocardial infarction"
  for name, split in small.splits.items():
    notes = assertions.make_notes("easy", name, SMALL[name])
    assert (len(split), len(split.texts)) == (SMALL[name], SMALL[name])
    for number in (0, len(split) - 1):
      assert split.texts[number] == notes[number].text
      words = clean(notes[number].text).split()
      np.testing.assert_array_equal(split.note(number), small.vocabulary.encode(words))
      has = split.targets[number].nonzero()[0]
      assert {small.labels[column] for column in has} == set(notes[number].asserted)
  np.testing.assert_array_equal(small.label_counts, small.splits["train"].targets.sum(axis=0))


def test_seen_says_which_labels_used_phrases_of_training(small):
  known = assertions.label_phrases(small.labels)
  cleaned = {code: {tuple(clean(p).split()) for p in own} for code, own in known.items()}
  split = small.splits["test"]
  for row, note in enumerate(assertions.make_notes("easy", "test", len(split))):
    seen = {small.labels[column] for column in split.seen[row].nonzero()[0]}
    assert seen == {
      c for c, phrase in note.asserted.items() if tuple(clean(phrase).split()) in cleaned[c]
    }
  assert 0.4 < split.seen.sum() / split.targets.sum() < 0.7
  train = small.splits["train"]
  np.testing.assert_array_equal(train.seen, train.targets != 0)


def test_notes_are_cut_and_rules_kept():
  notes = assertions.load_assertions("hard", rules="minimal", longest=20, sizes=SMALL)
  assert notes.splits["train"].lengths.max() == 20
  assert notes.rules == "minimal"
  assert "with" in notes.vocabulary.words
  assert notes.vocabulary.stemmer == ""
  other = assertions.load_assertions("easy", rules="minimal", longest=20, sizes=SMALL)
  assert other.fingerprint != notes.fingerprint


@pytest.fixture
def short_task(monkeypatch):
  task = assertions.DIFFICULTIES["easy"]._replace(sizes=SMALL)
  monkeypatch.setitem(assertions.DIFFICULTIES, "easy", task)


def test_vectors_of_a_file(small, short_task, tmp_path):
  path = tmp_path / "vectors.txt"
  path.write_text("deni 3 4\n")
  notes = load_data(DataConfig(source="icd10", embedding=str(path)))
  assert notes.fingerprint == small.fingerprint
  assert notes.embedding.shape == (small.vocab_size, 2)
  np.testing.assert_allclose(notes.embedding[notes.vocabulary.ids["deni"]], [0.6, 0.8])
  assert load_data(DataConfig(source="icd10")).embedding is None


def test_trained_vectors_are_kept(short_task, monkeypatch, tmp_path):
  given = []

  def train(sentences, vocabulary, *, seed):
    given.append((len(sentences), seed))
    return np.full((len(vocabulary), 3), len(given), np.float32)

  monkeypatch.setattr(notes_package, "train_cbow", train)
  config = DataConfig(source="icd10", embedding="cbow", seed=5)
  for _ in range(2):
    assert load_data(config, tmp_path).embedding[0, 0] == 1
  train_only = dataclasses.replace(config, cbow_corpus="train")
  assert load_data(train_only, tmp_path).embedding[0, 0] == 2
  assert load_data(config).embedding[0, 0] == 3  # nowhere to keep them
  assert given == [(420, 5), (300, 5), (420, 5)]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(path="here"), "path must be empty for source 'icd10'"),
    (dict(difficulty="medium"), "difficulty must be one of"),
    (dict(note_rules="none"), "note_rules must be one of"),
    (dict(cbow_corpus="test"), "cbow_corpus must be one of"),
    (dict(labels="10"), "labels must be one of"),
    (dict(embedding=""), "embedding must be 'random', 'cbow' or"),
    (dict(split_path="here"), "split_path must be empty unless the source is 'mimic3'"),
    (dict(source="mimic3"), "path must be given for source 'mimic3'"),
    (dict(sequence_length=0), "sequence_length must be at least 1"),
  ],
)
def test_unsuitable_configurations(options, message):
  with pytest.raises(DataError, match=re.escape(message)):
    DataConfig(**dict(source="icd10") | options)


def test_unknown_names():
  with pytest.raises(DataError, match="difficulty must be known; got 'hrad' .did you mean 'hard'"):
    assertions.load_assertions("hrad")
  with pytest.raises(DataError, match="split must be known; got 'dev'"):
    assertions.make_notes("easy", "dev")


@pytest.mark.slow
def test_the_task_is_not_solved_by_words_alone():
  """Whole task. Above these figures, order and polarity would not be what it takes."""
  notes = assertions.load_assertions()
  counts = np.sort(notes.label_counts) / len(notes.splits["train"])
  assert counts[0] > 0.015
  assert counts[-1] < 0.3
  for name, split in notes.splits.items():
    assert 48 < split.lengths.mean() < 56, name
    assert 2.8 < split.targets.sum() / len(split) < 3.2, name
  phrases = assertions.label_phrases(notes.labels, held_out=True)
  match = baselines.string_match(notes, phrases).tuned["test"]
  assert 0.6 < match.micro_f1 < 0.75
  assert min(code.recall for code in match.codes) == 1
  assert baselines.logistic_regression(notes).tuned["test"].micro_f1 < 0.72
  grams = baselines.logistic_regression(notes, 3, 30.0).tuned["test"]
  assert grams.micro_f1 < 0.80
