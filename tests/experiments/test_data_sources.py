"""Sources: what is read, how it is split, and what is said when it cannot be read."""

import gzip
import importlib.util
import json
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from attnzoo.experiments.data import DataConfig, DataError, load_corpus, read_text, sources
from attnzoo.experiments.data.sources import guess_source, open_source

WIKITEXT = Path(__file__).parents[3] / "shared/data/wikitext-2.valid.txt"


def documents(source, split):
  return list(source.splits[split]())


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def prose(seed, words=400):
  """Text that shares no long run with that of another seed."""
  draw = np.random.default_rng(seed).integers(10**6, size=words)
  return " ".join(f"w{number}" for number in draw).encode()


def write_jsonl(path, texts, field="text"):
  return write(path, "".join(json.dumps({field: text}) + "\n" for text in texts))


def test_stdlib_is_split_by_file_without_leakage():
  source = sources.stdlib()
  train, validation = documents(source, "train"), documents(source, "validation")
  sizes = [sum(map(len, part)) for part in (train, validation)]
  assert sizes[0] > 5_000_000
  assert 0.02 < sizes[1] / sum(sizes) < 0.15
  assert len(set(train) & set(validation)) == 0
  # Charmap codecs are near-copies of each other: all of them are on one side.
  charmaps = [sum(b"cp1251" in text[:200] or b"iso8859" in text[:200] for text in part)
              for part in (train, validation)]  # fmt: skip
  assert min(charmaps) == 0
  assert max(charmaps) > 10
  assert sources.stdlib().content == source.content


def test_files_keep_copies_and_near_copies_on_one_side(tmp_path):
  texts = {f"{i:02}.txt": prose(i) for i in range(40)}
  for name, text in texts.items():
    write(tmp_path / "a" / name, text)
    write(tmp_path / "b" / name, text)  # exact
    write(tmp_path / "c" / name, prose(1000 + int(name[:2]), 60) + b"\n" + text)  # near
  source = open_source(DataConfig(path=str(tmp_path), validation_fraction=0.3))
  sides = {split: documents(source, split) for split in ("train", "validation")}
  assert sorted(map(len, sides.values()))[0] > 0
  assert sum(map(len, sides.values())) == 120
  for text in texts.values():
    found = [split for split, part in sides.items() for doc in part if doc.endswith(text)]
    assert len(found) == 3
    assert len(set(found)) == 1


def test_split_of_a_file_depends_on_no_other_file(tmp_path):
  for i in range(60):
    write(tmp_path / f"{i:02}.md", prose(i))
  config = DataConfig(path=str(tmp_path), validation_fraction=0.3)
  before = open_source(config)
  sides = {split: set(documents(before, split)) for split in ("train", "validation")}
  (tmp_path / "00.md").unlink()
  after = open_source(config)
  for split, side in sides.items():
    assert set(documents(after, split)) == side - {prose(0)}
  assert after.content != before.content


def test_two_files_fill_both_splits(tmp_path):
  write(tmp_path / "one.txt", prose(1))
  write(tmp_path / "two.txt", prose(2))
  source = open_source(DataConfig(path=str(tmp_path), validation_fraction=1e-6))
  assert [len(documents(source, split)) for split in ("train", "validation")] == [1, 1]


def test_one_file_holds_out_its_tail_at_a_line_end(tmp_path):
  lines = [f"line {i} – ü\n" for i in range(1000)]
  path = write(tmp_path / "book.txt", "".join(lines))
  source = open_source(DataConfig(path=str(path), validation_fraction=0.1))
  (train,), (validation,) = documents(source, "train"), documents(source, "validation")
  assert train + validation == path.read_bytes()
  assert train.endswith(b"\n")
  assert validation.startswith(b"line ")
  assert 0.09 < len(validation) / path.stat().st_size < 0.11


def test_one_file_without_lines_is_not_cut_inside_a_character(tmp_path):
  path = write(tmp_path / "book.txt", "€" * 101)
  source = open_source(DataConfig(path=str(path), validation_fraction=0.5))
  for split in ("train", "validation"):
    assert set(documents(source, split)[0].decode()) == {"€"}


def test_jsonl_is_split_by_document_and_duplicates_stay_together(tmp_path):
  texts = [f"document {i} ü\nmore" for i in range(200)]
  path = write_jsonl(tmp_path / "a.jsonl", texts + texts, field="body")
  config = DataConfig(path=str(path), text_field="body", validation_fraction=0.2)
  source = open_source(config)
  train, validation = documents(source, "train"), documents(source, "validation")
  assert sorted(train + validation) == sorted(text.encode() for text in texts + texts)
  assert not set(train) & set(validation)
  assert 20 < len(validation) < 140


def test_validation_path_is_taken_as_it_is(tmp_path):
  train = write_jsonl(tmp_path / "train.jsonl", ["a", "b"])
  held = write(tmp_path / "held.txt", "c")
  source = open_source(DataConfig(path=str(train), validation_path=str(held)))
  assert documents(source, "train") == [b"a", b"b"]
  assert documents(source, "validation") == [b"c"]


def test_enwik8_is_divided_in_order(tmp_path):
  data = np.random.default_rng(0).integers(256, size=1000).astype(np.uint8).tobytes()
  path = write(tmp_path / "enwik8", data)
  source = open_source(DataConfig(path=str(path), enwik8_bytes=1000))
  assert source.name == "enwik8"
  parts = [documents(source, split) for split in ("train", "validation", "test")]
  assert parts == [[data[:900]], [data[900:950]], [data[950:]]]


def numbers(data):
  """As Transformer-XL's script writes bytes: in decimal, the ends of lines as they are."""
  return " ".join("\n" if byte == 10 else str(byte) for byte in data)


@pytest.mark.parametrize("form", ["zip", "gz", "lines", "numbers"])
def test_enwik8_packed_or_as_numbers(tmp_path, form):
  data = np.random.default_rng(0).integers(256, size=1000).astype(np.uint8)
  data[[100, 899, 940]] = 10  # within a split, and as its last byte
  data = data.tobytes()
  if form == "gz":
    write(tmp_path / "enwik8.gz", gzip.compress(data))
  elif form == "zip":
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as archive:
      archive.writestr("enwik8", data)
  else:
    for name, part in (("train", data[:900]), ("valid", data[900:950]), ("test", data[950:])):
      lines = "\n".join(" ".join(map(str, part[i : i + 50])) for i in range(0, len(part), 50))
      write(tmp_path / f"{name}.txt", numbers(part) if form == "numbers" else lines + "\n")
    if form == "lines":  # which must have a 10 in each file, or ends of lines would stand for it
      data = data[:-1] + b"\n"
      write(tmp_path / "test.txt", " ".join(map(str, data[950:])))
  source = open_source(DataConfig(source="enwik8", path=str(tmp_path), enwik8_bytes=1000))
  parts = [documents(source, split) for split in ("train", "validation", "test")]
  assert parts == [[data[:900]], [data[900:950]], [data[950:]]]
  if form in ("zip", "gz"):
    file = tmp_path / f"enwik8.{form}"
    assert guess_source(str(file)) == guess_source(str(tmp_path)) == "enwik8"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=f"whole archive of one file; got {file}: "):
      open_source(DataConfig(path=str(file), enwik8_bytes=1000))
  else:
    for wrong, message in (("7 256", "line 1: "), ("7 8", "with 900 byte values; got .* with 2 ")):
      write(tmp_path / "train.txt", wrong)
      with pytest.raises(DataError, match=message):
        documents(source, "train")


@pytest.mark.parametrize("form", ["txt", "jsonl", "beside"])
def test_pg19_by_its_folders(tmp_path, form):
  books = dict(
    train=["a book\nof  words\n", "another"], validation=["two\u00a0words"], test=["x y"]
  )
  for split, texts in books.items():
    if form == "txt":
      for i, text in enumerate(texts):
        write(tmp_path / split / f"{i}.txt", text)
    else:
      write_jsonl(tmp_path / (f"{split}.jsonl" if form == "beside" else f"{split}/a.jsonl"), texts)
  write(tmp_path / "metadata.csv", "0,a book,1900,link\n")
  corpus = load_corpus(DataConfig(source="pg19", path=str(tmp_path)))
  for split, texts in books.items():
    assert corpus.splits[split].documents == len(texts)
    joined = [256, *(token for text in texts for token in (*text.encode(), 256))]
    assert corpus.splits[split].tokens.tolist() == joined
  counted = {split: content.words for split, content in corpus.splits.items()}
  assert counted == dict(train=None, validation=2, test=2)
  assert "validation: 1 documents, 10 bytes, 2 words" in corpus.describe()
  if form == "txt":
    assert guess_source(str(tmp_path)) == "pg19"


@pytest.mark.parametrize("ending", ["raw", "tokens"])
def test_wikitext_by_its_standard_names(tmp_path, ending):
  for part in ("train", "valid", "test"):
    write(tmp_path / f"wiki.{part}.{ending}", f" = {part} = \n")
  source = open_source(DataConfig(path=str(tmp_path)))
  assert source.name == "wikitext"
  texts = {split: documents(source, split) for split in source.splits}
  assert texts == dict(train=[b" = train = \n"], validation=[b" = valid = \n"],
                       test=[b" = test = \n"])  # fmt: skip


@pytest.mark.skipif(not WIKITEXT.exists(), reason="no WikiText-2 file beside the repository")
def test_real_wikitext_bytes_are_all_counted(tmp_path):
  for part in ("train", "valid", "test"):
    (tmp_path / f"wiki.{part}.tokens").symlink_to(WIKITEXT)
  corpus = load_corpus(DataConfig(path=str(tmp_path)))
  assert corpus.validation.text_bytes == WIKITEXT.stat().st_size
  assert corpus.validation.token_bytes.sum() == WIKITEXT.stat().st_size
  assert corpus.tokenizer.decode(corpus.validation.tokens[:2000]).startswith(" \n = ")


def write_tokens(path, ids, dtype="uint16", meta=None):
  write(path, np.array(ids, np.dtype(dtype).newbyteorder("<")).tobytes())
  if meta is not None:
    write(path.with_suffix(".json"), json.dumps(meta))
  return path


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_file_holds_out_its_tail(tmp_path, dtype):
  meta = dict(dtype=dtype, vocab_size=100, end_id=99)
  path = write_tokens(tmp_path / "all.bin", range(100), dtype, meta)
  corpus = load_corpus(DataConfig(path=str(path), validation_fraction=0.25))
  np.testing.assert_array_equal(corpus.train.tokens, np.arange(75))
  np.testing.assert_array_equal(corpus.validation.tokens, np.arange(75, 100))
  assert isinstance(corpus.train.tokens, np.memmap)
  assert (corpus.vocab_size, corpus.end_id, corpus.tokenizer) == (100, 99, None)


def test_token_folder_with_layout_from_the_config(tmp_path):
  write_tokens(tmp_path / "train.bin", range(50))
  write_tokens(tmp_path / "val.bin", range(50, 60))
  config = DataConfig(path=str(tmp_path), token_dtype="uint16", token_vocab_size=60)
  corpus = load_corpus(config)
  np.testing.assert_array_equal(corpus.validation.tokens, np.arange(50, 60))
  assert corpus.end_id is None


class Rows(list):
  """What the loaders use of a `datasets.Dataset`: rows by field, and column names."""

  column_names = ("body",)


@pytest.fixture
def fake_datasets(monkeypatch, tmp_path):
  """Stands in for the package, which is optional; its on-disk format is not ours to test."""
  write(tmp_path / "dataset_dict.json", "{}")
  rows = Rows({"body": f"text {i}"} for i in range(100))
  module = types.SimpleNamespace(load_from_disk=lambda path: {"train": rows})
  monkeypatch.setitem(sys.modules, "datasets", module)
  return tmp_path


def test_huggingface_rows_are_split_by_document(fake_datasets):
  config = DataConfig(path=str(fake_datasets), text_field="body", validation_fraction=0.2)
  source = open_source(config)
  train, validation = documents(source, "train"), documents(source, "validation")
  assert sorted(train + validation) == sorted(f"text {i}".encode() for i in range(100))
  assert 5 < len(validation) < 40


def test_huggingface_names_the_columns(fake_datasets):
  with pytest.raises(DataError, match=r"text_field must name a column .* columns are \('body',\)"):
    open_source(DataConfig(path=str(fake_datasets)))


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is there")
def test_huggingface_without_the_package(tmp_path):
  write(tmp_path / "state.json", "{}")
  with pytest.raises(DataError, match="without `datasets` .pip install datasets"):
    open_source(DataConfig(path=str(tmp_path)))


def test_huggingface_round_trip_on_disk(tmp_path):
  datasets = pytest.importorskip("datasets")
  datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).save_to_disk(str(tmp_path / "set"))
  source = open_source(DataConfig(path=str(tmp_path / "set"), validation_fraction=0.3))
  assert source.name == "huggingface"
  both = documents(source, "train") + documents(source, "validation")
  assert sorted(both) == [b"a", b"b", b"c"]


def test_guesses():
  assert guess_source("") == "stdlib"
  assert guess_source(__file__) == "text"
  assert guess_source(str(Path(__file__).parent)) == "text"


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(source="stdlb"), "source must be a known source; got 'stdlb' .did you mean 'stdlib'"),
    (dict(source="enwik8"), "path must be given for source 'enwik8'"),
    (dict(source="stdlib", path="x"), "path must be empty for source 'stdlib'; got 'x'"),
    (dict(validation_fraction=1.0), "validation_fraction must lie between 0 and 1; got 1.0"),
    (dict(sequence_length=0), "sequence_length must be at least 1; got 0"),
    (dict(token_dtype="int8"), "token_dtype must be 'uint16' or 'uint32'; got 'int8'"),
  ],
)
def test_config_errors(options, message):
  with pytest.raises(DataError, match=message):
    DataConfig(**options)


FILE_ERRORS = {
  "missing": ({}, "none", {}, "path must name an existing file or folder; got {path}"),
  "empty": ({"a.txt": ""}, "a.txt", {}, "the empty file {path}"),
  "empty folder": ({"a.xyz": "x"}, "", {}, "{path} with no non-empty file of type"),
  "one document": ({"a.jsonl": '{"text": "a"}'}, "a.jsonl", {}, "a non-empty train split; got"),
  "no documents": ({"a.jsonl": "\n"}, "a.jsonl", {}, "leave a non-empty train split; got {path}"),
  "bad line": ({"a.jsonl": '{"text": "a"}\n\n{"text'}, "a.jsonl", {}, "{path}, line 3: "),
  "bad utf-8": ({"a.jsonl": b'{"text": "\xff"}'}, "a.jsonl", {}, "{path}, line 1: "),
  "bad field": ({"a.jsonl": '{"b": 1}'}, "a.jsonl", {}, "at {path}, line 1, which has ['b']"),
  "no object": ({"a.jsonl": "[1]"}, "a.jsonl", {}, "'text' at {path}, line 1, which has list"),
  "validation": ({"a.txt": "x"}, "a.txt", dict(validation_path="/no"), "validation_path must name"),
  "enwik8 size": ({"enwik8": "x"}, "enwik8", {}, "enwik8 of 100,000,000 bytes; got {path} with 1 "),
  "wikitext part": ({"wiki.train.raw": "x"}, "", {}, "got {path}/wiki.valid.raw"),
  "pg19 part": ({"train/a.txt": "x"}, "", dict(source="pg19"), "validation/*.txt, validation/*.j"),
  "token layout": ({"t.bin": b"1234"}, "t.bin", {}, "dtype None, vocab_size None for {path}"),
  "token json": ({"t.bin": b"12", "t.json": "{"}, "t.bin", {}, "readable JSON beside the .bin"),
  "token size": ({"t.bin": b"123"}, "t.bin", dict(token_dtype="uint16", token_vocab_size=9),
                 "whole uint16 ids; got {path} with 3 bytes"),
  "token range": ({"t.bin": b"\1\0\7\0\2\0"}, "t.bin",
                  dict(token_dtype="uint16", token_vocab_size=7), "got 7 at position 1 of {path}"),
  "token end": ({"t.bin": b"\1\0"}, "t.bin",
                dict(token_dtype="uint16", token_vocab_size=7, token_end_id=7), "size 7; got 7"),
  "token splits": ({"train.bin": b"\1\0"}, "", {}, "hold validation.bin; got {path}"),
  "tokenizer": ({"a.txt": "x\ny\n"}, "a.txt", dict(tokenizer="/no.json"),
                "tokenizer must name an existing file or folder; got /no.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILE_ERRORS)
def test_file_errors_name_the_path(tmp_path, case):
  files, path, options, message = FILE_ERRORS[case]
  for name, content in files.items():
    write(tmp_path / name, content)
  place = tmp_path / path if path else tmp_path
  with pytest.raises(DataError) as caught:
    load_corpus(DataConfig(path=str(place), **options))
  assert message.format(path=place) in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_bad_line_far_down_is_found_before_any_document_is_handed_out(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", map(str, range(50)))
  with path.open("a") as file:
    file.write("{\n")
  source = open_source(DataConfig(path=str(path)))
  with pytest.raises(DataError, match="line 51"):
    next(source.splits["train"]())


def test_read_text_joins_the_documents(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
  held = write(tmp_path / "b.txt", "c")
  config = DataConfig(path=str(path), validation_path=str(held))
  assert read_text(config, "train") == b"ab"
  with pytest.raises(DataError, match="split must be one of"):
    read_text(config, "test")
