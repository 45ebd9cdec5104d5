"""MIMIC-III from invented tables, against what the same invention says before it is written."""

import dataclasses
import gzip
import os
import stat
import traceback

import numpy as np
import pytest

from attnzoo.experiments.data import DataConfig, DataError, load_data
from attnzoo.experiments.data.notes import mimic3, mimic3_counts, mimic3_store
from attnzoo.experiments.data.notes.cleaning import NOTE_BREAK, clean, tokens_with_places
from attnzoo.experiments.data.notes.mimic3 import load_mimic3
from attnzoo.experiments.data.notes.sets import NoteSet
from attnzoo.experiments.data.notes.vocabulary import UNK
from attnzoo_testing.invented_mimic3 import (
  DISCHARGE,
  ICD_HEADER,
  NOTES,
  SPLIT_FULL,
  codes_of,
  expected_text,
  tables,
  top_codes,
)

MARKER = "zyxmarker"


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / "mimic"
  path.mkdir()
  for name, data in tables().items():
    (path / name).write_bytes(data)
  return path


def config(folder, **options) -> DataConfig:
  options = dict(sequence_length=2500) | options
  return DataConfig(source="mimic3", path=str(folder), **options)


@pytest.fixture
def loaded(folder, tmp_path):
  return load_mimic3(config(folder), tmp_path / "cache")


def admissions_of(split, listed) -> list[int]:
  """The admission of each row, told by its text."""
  texts = {NOTE_BREAK.join(expected_text(a)).replace("\x1e", "").split("\n")[0]: a for a in listed}
  return [texts[text.replace("\x1e", "").split("\n")[0]] for text in split.texts]


def test_labels_and_order(loaded):
  labels = top_codes()
  assert loaded.labels == tuple(labels)
  assert "V58.61" in labels  # the tie: admission 102 has it, E849.7 comes with 104
  assert "E849.7" not in labels
  listed = dict(train=[101, 102, 103, 108], validation=[104, 105], test=[106, 107])
  for name, admissions in listed.items():
    split = loaded.splits[name]
    cleaned = {a: " ".join(map(clean, expected_text(a))).split() for a in admissions}
    order = sorted(admissions, key=lambda a: (-len(cleaned[a]), a))
    assert [clean(text).split() for text in split.texts] == [cleaned[a] for a in order]
    expected = [[label in codes_of(a) for label in labels] for a in order]
    np.testing.assert_array_equal(split.targets, expected)
    for number, admission in enumerate(order):
      np.testing.assert_array_equal(
        split.note(number), loaded.vocabulary.encode(cleaned[admission])
      )
  train = loaded.splits["train"]
  counts = [sum(label in codes_of(a) for a in listed["train"]) for label in labels]
  np.testing.assert_array_equal(loaded.label_counts, counts)
  assert train.targets.dtype == np.uint8
  assert train.ids.dtype == np.int32
  assert train.starts.dtype == np.int64


def test_texts_and_vocabulary(loaded):
  (joined,) = [text for text in loaded.splits["train"].texts if "COPD" in text]
  first, second = expected_text(101)
  assert joined == f"{first}\n{NOTE_BREAK}\n{second.replace(NOTE_BREAK, ' ')}"
  assert "Nursing" not in joined
  # A number at the end of a note becomes n's, which it would not before a word.
  words = [token.word for token in tokens_with_places(joined)]
  assert words == clean(first).split() + clean(second.replace(NOTE_BREAK, " ")).split()
  assert any('""no, never"", then\r\n\r\n"left"' in text for text in loaded.splits["train"].texts)
  known = loaded.vocabulary.words
  assert {"copd", "addendum", "zoster", "disord", "depress", "root", "oper"} <= set(known)
  assert not {"urosepsi", "ventil", "type2"} & set(known)  # of no split, no kind of ours
  texts = [clean(t) for a in SPLIT_FULL["train"] for t in expected_text(a)]
  assert {word for text in texts for word in text.split() if len(word) > 1} <= set(known)
  assert loaded.vocabulary.stemmer
  names = dict(zip(loaded.labels, loaded.label_names, strict=True))
  assert names["311"] == "Depressive disorder"
  assert names["96.04"] == "Operation, 9604 type"


def test_full_labels(folder, tmp_path):
  full = load_mimic3(config(folder, labels="full"), tmp_path / "cache")
  admissions = [a for ids in SPLIT_FULL.values() for a in ids]
  assert full.labels == tuple(sorted({code for a in admissions for code in codes_of(a)}))
  assert {"053.9", "V12.34", "E849.7"} <= set(full.labels)
  assert not {"nan", "na.n"} & set(full.labels)
  assert len(full.splits["train"]) == 5  # with the admission of rare codes
  total = sum(split.targets.sum() for split in full.splits.values())
  assert total == sum(len(set(codes_of(a))) for a in admissions)


def test_notes_of_equal_length_keep_their_order(folder, tmp_path):
  added = range(300, 340)
  with (folder / "NOTEEVENTS.csv").open("a") as notes:
    for key in reversed(added):
      notes.write(f'1,1,{key},,,,"{DISCHARGE}",,,,"pain {key}{" copd" * (key % 2)}"\n')
  with (folder / "DIAGNOSES_ICD.csv").open("a") as codes:
    codes.writelines(f'1,1,{key},1,"4011"\n' for key in added)
  for kind in ("50", "full"):
    (folder / f"train_{kind}_hadm_ids.csv").write_text("\n".join(map(str, added)))
  split = load_mimic3(config(folder), tmp_path / "cache").splits["train"]
  found = [int(text.split()[1]) for text in split.texts]
  assert found == [*added[1::2], *added[::2]]


def test_notes_are_cut(folder, tmp_path, loaded):
  cut = load_mimic3(config(folder, sequence_length=5), tmp_path / "cache")
  assert cut.fingerprint == loaded.fingerprint
  for name, split in cut.splits.items():
    whole = loaded.splits[name]
    assert max(whole.lengths) > 5
    for number in range(len(split)):
      np.testing.assert_array_equal(split.note(number), whole.note(number)[:5])


def test_other_files_give_the_same(folder, tmp_path, loaded):
  """Compressed, in lower case, lists apart, floats for ids, a byte order mark."""
  lists = tmp_path / "caml"
  lists.mkdir()
  for path in list(folder.iterdir()):
    if path.name.endswith("hadm_ids.csv"):
      path.rename(lists / path.name)
    elif path.suffix == ".csv":
      data = path.read_bytes()
      if path.name == "DIAGNOSES_ICD.csv":
        lines = [line.split(",") for line in data.decode().splitlines()]
        lines[1:] = [[*line[:2], f"{line[2]}.0", *line[3:]] for line in lines[1:]]
        data = "\r\n".join(map(",".join, lines)).lower().upper().encode("utf-8-sig")
      (folder / f"{path.name.lower()}.gz").write_bytes(gzip.compress(data))
      path.unlink()
  options = config(folder, split_path=str(lists))
  assert load_mimic3(options, tmp_path / "other").fingerprint == loaded.fingerprint


def test_second_start_reads_the_cache(folder, tmp_path, loaded, monkeypatch, capsys):
  root = tmp_path / "cache" / "mimic3"
  entries = [root, *root.iterdir()]
  assert len(entries) == 3
  assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in entries)
  monkeypatch.setattr(mimic3_store, "clean", None)  # nothing is cleaned again
  monkeypatch.setattr(mimic3, "clean", None)
  again = load_data(config(folder), tmp_path / "cache")
  assert isinstance(again, NoteSet)
  assert again.fingerprint == loaded.fingerprint
  assert list(again.splits["test"].texts) == list(loaded.splits["test"].texts)
  monkeypatch.undo()
  rules = load_mimic3(config(folder, note_rules="minimal"), tmp_path / "cache")
  assert "no" in rules.vocabulary.words
  assert rules.fingerprint != loaded.fingerprint
  # Another list of admissions, another fingerprint.
  (folder / "train_50_hadm_ids.csv").write_text("101\n102\n")
  assert load_mimic3(config(folder), tmp_path / "cache").fingerprint != loaded.fingerprint
  for entry in root.iterdir():
    (entry / "titles.json").unlink(missing_ok=True)
    (entry / "test.ids.npy").write_bytes(b"")
  with pytest.raises(
    DataError, match=r"cache must hold test.ids.npy whole; .*\(delete that folder"
  ):
    load_mimic3(config(folder), tmp_path / "cache")


def test_what_is_said_is_about_numbers(folder, tmp_path, capsys):
  (folder / "ICD9_descriptions").unlink()
  notes = load_mimic3(config(folder), tmp_path / "cache")
  told = capsys.readouterr()
  assert not told.out
  assert "no file ICD9_descriptions" in told.err
  assert "train: 1 of 6 listed admissions have no note or no code" in told.err
  assert "1 discharge summaries without HADM_ID" in told.err
  words = {w for *_, text in NOTES for w in text.lower().split() if len(w) > 3}
  assert not words & set(told.err.lower().split())
  assert "COPD" not in notes.describe() + repr(notes.splits["train"].texts)


def test_published_figures_are_compared(folder, tmp_path, loaded, monkeypatch, capsys):
  assert "published" not in capsys.readouterr().err  # not the real tables
  monkeypatch.setattr(mimic3_counts, "REAL_ROWS", 10)
  monkeypatch.setattr(
    mimic3_counts, "_50", dict(notes=((4, 3, 2), 0.0), labels_per_note=((1.0, 1.0, 1.0), 99.0))
  )
  again = load_mimic3(config(folder), tmp_path / "cache")
  told = capsys.readouterr().err
  assert "validation_notes 2 instead of 3" in told
  assert "notes 11 instead of 59,652" in told
  assert not any(f in told for f in ("train_notes", "test_notes", "labels_per_note"))
  assert "figures differ" in again.note
  kept = mimic3_store.Store(max((tmp_path / "cache" / "mimic3").iterdir(),
                                key=lambda entry: (entry / "raw.txt").exists()))  # fmt: skip
  assert kept.counts == dict(rows=len(NOTES), notes=11, admissions_with_notes=10,
                             admissions_with_codes=11, admissions=10, codes=len(
    {c for a in range(101, 111) for c in codes_of(a)} | {"nan", "na.n"}))  # fmt: skip


def test_vectors(folder, tmp_path, monkeypatch):
  pytest.importorskip("gensim")  # without wheels for the newest Python
  monkeypatch.setattr(mimic3, "EPOCHS", 2)
  seen = []
  train = mimic3.train_cbow

  def spy(sentences, vocabulary, **options):
    seen.append([list(sentence) for sentence in sentences])
    return train(sentences, vocabulary, epochs=2, **options)

  monkeypatch.setattr(mimic3, "train_cbow", spy)
  notes = load_mimic3(config(folder, embedding="cbow"), tmp_path / "cache")
  again = load_mimic3(config(folder, embedding="cbow"), tmp_path / "cache")
  assert notes.embedding.shape == (notes.vocab_size, 128)
  np.testing.assert_array_equal(notes.embedding, again.embedding)
  load_mimic3(config(folder, embedding="cbow", cbow_corpus="train"), tmp_path / "cache")
  everything, training = seen  # the second start read the cache
  assert clean("Outside of every split, urosepsis").split() in everything
  assert not any("urosepsi" in sentence for sentence in training)
  assert len(everything) - len(training) == 11 - 6
  path = tmp_path / "vectors.txt"
  path.write_text("pain 3 4\nUNK 0 1\n")
  read = load_mimic3(config(folder, embedding=str(path)), tmp_path / "cache").embedding
  np.testing.assert_allclose(read[notes.vocabulary.ids["pain"]], [0.6, 0.8], rtol=1e-6)
  np.testing.assert_array_equal(read[UNK], [0, 1])


def replaced(name: str, old: bytes, new: bytes):
  def change(folder):
    data = (folder / name).read_bytes()
    assert old in data
    (folder / name).write_bytes(data.replace(old, new, 1))

  return change


def removed(name: str):
  return lambda folder: (folder / name).unlink()


M = MARKER.encode()
BROKEN = {
  "no table": (removed("NOTEEVENTS.csv"), "NOTEEVENTS.csv or NOTEEVENTS.csv.gz"),
  "two tables": (
    lambda folder: (folder / "noteevents.csv.gz").write_bytes(b""), "hold one of NOTEEVENTS.csv"
  ),
  "no list": (removed("dev_50_hadm_ids.csv"), "split_path must be a folder with dev_50_hadm_ids"),
  "no full list": (removed("train_full_hadm_ids.csv"), "train_full_hadm_ids.csv"),
  "column": (
    replaced("NOTEEVENTS.csv", b"CATEGORY", M), "NOTEEVENTS.csv with the column CATEGORY"
  ),
  "no header": (replaced("DIAGNOSES_ICD.csv", ICD_HEADER.encode(), M + b",1"), "column HADM_ID"),
  "too few values": (
    replaced("PROCEDURES_ICD.csv", b"\n0,", b"\n" + M + b"\n0,"), "1 in record 2 of"
  ),
  "quote in the text": (
    replaced("NOTEEVENTS.csv", b'"Short note', b'"' + M + b'"Short note'), "behind record"
  ),
  "cut off": (
    lambda f: (f / "NOTEEVENTS.csv").write_bytes(tables()["NOTEEVENTS.csv"][:-30]),
    "unexpected end of data behind record 14",
  ),
  "no UTF-8": (
    replaced("NOTEEVENTS.csv", b"Short note", M + b"\xff"), "UnicodeDecodeError behind record"
  ),
  "no number": (
    replaced("NOTEEVENTS.csv", b"2,102,", b"2," + M + b","), "as HADM_ID in NOTEEVENTS.csv"
  ),
  "no number of codes": (
    replaced("DIAGNOSES_ICD.csv", b"\n0,", b"\n0,1," + M + b',1,"4019"\n0,'),
    "whole numbers as HADM_ID in DIAGNOSES_ICD.csv; got something else in record 2",
  ),
  "list": (replaced("test_50_hadm_ids.csv", b"106", M), "line 1 of"),
  "overlap": (
    replaced("test_50_hadm_ids.csv", b"106", b"104"), "1 in both dev_50_hadm_ids.csv and test_50"
  ),
  "other lists": (replaced("test_50_hadm_ids.csv", b"106\n107", b"900001"), "leave admissions in"),
  "no summaries": (
    lambda f: (f / "NOTEEVENTS.csv").write_bytes(
      tables()["NOTEEVENTS.csv"].replace(DISCHARGE.encode(), M)
    ),
    "none among the 14 rows",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_errors_show_no_content(case, folder, tmp_path, capsys):
  change, message = BROKEN[case]
  change(folder)
  with pytest.raises(DataError) as raised:
    load_mimic3(config(folder), tmp_path / "cache")
  assert message in str(raised.value)
  told = "".join(traceback.format_exception(raised.value)) + "".join(capsys.readouterr())
  assert MARKER not in told
  assert "900001" not in told
  error = raised.value
  assert error.__context__ is None
  assert error.__cause__ is None
  assert not list((tmp_path / "cache" / "mimic3").glob("*.tmp"))


def test_large_fields_are_refused(folder, tmp_path):
  """A quote that is never closed would take the rest of the table for one text."""
  replaced("NOTEEVENTS.csv", b'"Short note', b'"' + MARKER.encode() * 20_000)(folder)
  with pytest.raises(DataError, match="field larger than field limit .* behind record 4"):
    load_mimic3(config(folder), tmp_path / "cache")


def test_where_there_is_no_cache(folder, tmp_path):
  with pytest.raises(DataError, match="cache must name a folder for source 'mimic3'"):
    load_mimic3(config(folder))
  named = dataclasses.replace(config(folder), cache=str(tmp_path / "named"))
  load_mimic3(named, tmp_path / "not this")
  assert os.listdir(tmp_path / "named") == ["mimic3"]
  assert not (tmp_path / "not this").exists()
