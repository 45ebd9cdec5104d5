"""Cleaning of notes, codes with their dots, vocabularies."""

import itertools
import random
import sys

import numpy as np
import pytest

from attnzoo.experiments.data import DataError
from attnzoo.experiments.data.notes import cleaning
from attnzoo.experiments.data.notes.cleaning import NOTE_BREAK, clean, tokens_with_places
from attnzoo.experiments.data.notes.codes import MISSING, dotted
from attnzoo.experiments.data.notes.vocabulary import PAD, UNK, Vocabulary

# What the official function makes of these.
CLEANED = {
  "Admission Date:  [**2101-5-3**]   Discharge Date: [**2101-5-9**]": "admiss  discharg nnnnnn",
  "The patient is a 63 year-old man with type-2 diabetes, HbA1c 9.2%.": (
    "yearold man type diabet hbanc"
  ),
  "No evidence of pneumonia; patient denies chest pain.": "evid pneumonia deni chest pain",
  "Name7 (STitle) 1234 was seen on 3-West at 14:30": "name stitl seen nwest",
  "Lasix 40mg PO BID x10 days, B12 1000mcg q6h": "lasix nnmg bid x b nnnnmcg qnh",
  "He doesn't have any CHF because EF=55%": "ani chf becaus",
  "-- 12-15 -- x-ray T4N1M0 5-": " xray tnnnmn",
  "History of COPD, family history of MI. Past medical history:": (
    "histori copd famili histori medic histori"
  ),
  "Temp 98.6 HR 80 BP 120/80 RR16 sat97% on 2L NC 45": "temp rr satnn",
  "A b cd efg": "efg",
}


@pytest.mark.parametrize("text", CLEANED)
def test_official_rules(text):
  assert clean(text) == CLEANED[text]
  tokens = tokens_with_places(text)
  assert [token.word for token in tokens] == CLEANED[text].split()
  # Punctuation parts words, so each place is one piece between what is no word character or `-`.
  for token in tokens:
    stretch = text[token.start : token.end]
    assert stretch
    assert stretch.replace("-", "").isalnum()
    assert not text[token.end : token.end + 1].isalnum()


def test_stop_words_are_those_that_can_match():
  words = cleaning._STOP_WORDS
  assert len(words) == 110
  assert all(clean(f"{word} copd") == "copd" for word in words)
  # Listed in the official code, but they are met as stems.
  survivors = "admission service history hospital course family does because during before above"
  assert len(clean(survivors).split()) == len(survivors.split())
  assert clean("no and not, without; denied") == "without deni"


def strings(count: int):
  generator = random.Random(7)
  alphabet = [
    *"abcXYZeds 0123456789--'\t\n,.;_[*",
    *"’İΣß½²Ⅷ٣é\u2003\x1f\x85",
    "the ",
    "COPD ",
    "12 ",
  ]
  for _ in range(count):
    yield "".join(generator.choices(alphabet, k=generator.randrange(40)))


@pytest.mark.parametrize("rules", cleaning.RULES)
def test_words_with_places_are_the_words(rules):
  several = 0
  for texts in itertools.batched(strings(4000), 2):
    text = NOTE_BREAK.join(texts)
    words = clean(text, rules).split()
    tokens = tokens_with_places(text, rules)
    assert [token.word for token in tokens] == words, repr(text)
    assert clean(text, rules) == " ".join(clean(part, rules) for part in texts)
    places = [place for token in tokens for place in (token.start, token.end)]
    assert places == sorted(places), repr(text)
    assert all(0 <= token.start < token.end <= len(text) for token in tokens), repr(text)
    if rules == "minimal" and not set("İΣ") & set(text):  # whose lower case depends on neighbours
      assert [text[t.start : t.end].lower() for t in tokens] == words, repr(text)
    several += len(words) > 3
  assert several > 500


def test_places_where_lower_case_is_longer():
  text = "İİ denies PAIN"
  assert [text[t.start : t.end] for t in tokens_with_places(text)][-2:] == ["denies", "PAIN"]


def test_minimal_rules_keep_numbers_and_negations():
  text = "No fever; NOT on 2L_NC, type-2 (HbA1c 9.2%)"
  assert clean(text, "minimal") == "no fever not on 2l nc type 2 hba1c 9 2"
  assert cleaning.stemmer_name("minimal") == ""


def test_what_cannot_be_cleaned(monkeypatch):
  with pytest.raises(DataError, match="note_rules must be known.*did you mean 'official'"):
    clean("text", "oficial")
  cleaning._stem_or_nothing.cache_clear()
  monkeypatch.setitem(sys.modules, "nltk.stem.snowball", None)
  with pytest.raises(DataError, match=r"without `nltk` \(pip install 'attnzoo\[data\]'"):
    clean("text")


@pytest.mark.parametrize(
  ("code", "procedure", "expected"),
  [
    ("4019", False, "401.9"),
    ("E8497", False, "E849.7"),
    ("E849", False, "E849"),
    ("V5861", False, "V58.61"),
    ("311", False, "311"),
    ("0389", False, "038.9"),
    ("038.9", False, "038.9"),
    ("9604", True, "96.04"),
    ("966", True, "96.6"),
    ("", False, "nan"),
    ("", True, "na.n"),
  ],
)
def test_dots_of_codes(code, procedure, expected):
  assert dotted(code, procedure=procedure) == expected
  assert code or expected in MISSING


def test_vocabulary(tmp_path):
  vocabulary = Vocabulary.build(["deni pain x  pain", "ani’s chf deni nn"], stemmer="none")
  assert vocabulary.words == ("ani", "chf", "deni", "nn", "pain")  # as sklearn's words: no x, no s
  assert len(vocabulary) == 7
  assert vocabulary.rows == ("PAD", "UNK", *vocabulary.words)
  ids = vocabulary.encode("pain x ani PAD ani’s deni".split())
  np.testing.assert_array_equal(ids, [6, UNK, 2, UNK, UNK, 4])
  assert ids.dtype == np.int32
  assert PAD == 0
  assert Vocabulary.build(["b b a", "c a cc cc"], min_count=2).words == ("cc",)
  path = tmp_path / "vocabulary.json"
  vocabulary.save(path)
  assert Vocabulary.load(path) == vocabulary


def test_words_of_a_damaged_vocabulary_stay_private(tmp_path):
  path = tmp_path / "vocabulary.json"
  path.write_text('{"stemmer": "", "words": ["zebra", "marker"]}')
  with pytest.raises(DataError, match="be a file that Vocabulary.save wrote") as raised:
    Vocabulary.load(path)
  assert "marker" not in str(raised.value)
  assert raised.value.__context__ is None
  with pytest.raises(DataError, match="words must be sorted"):
    Vocabulary(("b", "a"))


def test_vocabulary_is_that_of_the_usual_vectoriser():
  """The published vocabulary came out of scikit-learn."""
  text = pytest.importorskip("sklearn.feature_extraction.text")
  texts = [clean(s) for s in strings(300)]
  theirs = text.CountVectorizer(min_df=1).fit(texts).vocabulary_
  assert Vocabulary.build(texts).words == tuple(sorted(theirs))
