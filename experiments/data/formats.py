"""The named formats: enwik8, WikiText, PG-19, token files, Hugging Face datasets on disk."""

import dataclasses
import gzip
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attnzoo.experiments.data.config import DataConfig
from attnzoo.experiments.data.documents import (
  Source,
  digest,
  existing,
  file_digest,
  jsonl,
  place,
  threshold,
)
from attnzoo.experiments.data.errors import refuse

_SCAN = 1 << 24  # token ids checked at a time


@dataclasses.dataclass(frozen=True)
class TokenSource:
  """Text that is already tokens, memory-mapped: uint16 or uint32 [N] by split."""

  name: str
  content: str
  splits: Mapping[str, np.ndarray]
  vocab_size: int
  end_id: int | None  # id between documents, None if the file has none


def enwik8(path: Path, size: int) -> Source:
  """The first 10^8 bytes of a Wikipedia dump, divided in order 90 : 5 : 5, one document a split.

  The file enwik8, as it is or as .zip or .gz, or a folder with it, or with train.txt, valid.txt and
  test.txt: byte values in decimal with spaces between them, as Transformer-XL's script writes them.
  """
  folder = path if path.is_dir() else path.parent
  files = {part: folder / f"{part}.txt" for part in ("train", "valid", "test")}
  names = ("enwik8", "enwik8.zip", "enwik8.gz")
  packed = [folder / name for name in names if (folder / name).is_file()]
  if path == files["train"] or (path.is_dir() and not packed and files["train"].is_file()):
    return _enwik8_numbers(files, size)
  file = path if path.is_file() else existing((packed or [folder / "enwik8"])[0])
  data = _unpacked(file)
  if len(data) != size:
    raise refuse("path", f"name enwik8 of {size:,} bytes", f"{file} with {len(data):,} bytes",
                 "download it again, or set enwik8_bytes for a trial")  # fmt: skip
  first, second = _enwik8_cuts(size)
  pieces = {"train": data[:first], "validation": data[first:second], "test": data[second:]}
  splits = {name: (lambda piece=piece: iter([piece])) for name, piece in pieces.items()}
  return Source("enwik8", digest("enwik8", data), size, splits)


def _enwik8_cuts(size: int) -> tuple[int, int]:
  return size * 90 // 100, size * 95 // 100


def _unpacked(file: Path) -> bytes:
  """The bytes of a file; of a .zip or .gz those of the one file in it."""
  try:
    if file.suffix == ".gz":
      return gzip.decompress(file.read_bytes())
    if file.suffix == ".zip":
      with zipfile.ZipFile(file) as archive:
        members = archive.namelist()
        if len(members) != 1:
          raise zipfile.BadZipFile(f"{len(members)} files in it, not one")
        return archive.read(members[0])
  except (EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
    raise refuse("path", "name a whole archive of one file", f"{file}: {error}",
                 "download it again") from error  # fmt: skip
  return file.read_bytes()


def _enwik8_numbers(files: Mapping[str, Path], size: int) -> Source:
  """The same splits from files of numbers, which are read when they are asked for."""
  for file in files.values():
    existing(file)
  first, second = _enwik8_cuts(size)
  sizes = dict(train=first, valid=second - first, test=size - second)
  names = dict(train="train", valid="validation", test="test")
  readers = {
    names[part]: (lambda file=file, count=sizes[part]: iter([_numbers(file, count)]))
    for part, file in files.items()
  }
  content = digest("enwik8 numbers", size, *(file_digest(file) for file in files.values()))
  return Source("enwik8", content, size, readers)


def _numbers(file: Path, count: int) -> bytes:
  """Byte values in decimal. Where 10 is not among them, the ends of the lines stand for it."""
  lines = []
  with file.open("rb") as stream:
    for number, line in enumerate(stream, 1):
      try:
        lines.append(bytes(map(int, line.split())))
      except ValueError as error:
        raise refuse("path", "hold byte values with spaces between them",
                     f"{file}, line {number}: {error}",
                     "write 0 to 255 in decimal") from error  # fmt: skip
  ends = bool(lines) and line.endswith(b"\n")  # whether the last line has one
  if any(10 in values for values in lines):
    data = b"".join(lines)
  else:
    data = b"\n".join(lines) + b"\n" * ends
  if len(data) != count:
    raise refuse("path", f"name a part of enwik8 with {count:,} byte values",
                 f"{file} with {len(data):,}",
                 "write it again, or set enwik8_bytes for a trial")  # fmt: skip
  return data


def wikitext(path: Path) -> Source:
  """WikiText-2 or -103: a folder with wiki.{train,valid,test}.raw or .tokens.

  Each split is one document, as published perplexities take it. Where a folder has both forms, the
  raw one is read; name a .tokens file to read the other. The ends of lines count as words.
  """
  folder, ending = (path, None) if path.is_dir() else (path.parent, path.suffix)
  if ending is None:
    ending = ".raw" if (folder / "wiki.train.raw").exists() else ".tokens"
  files = {
    split: existing(folder / f"wiki.{part}{ending}")
    for split, part in dict(train="train", validation="valid", test="test").items()
  }
  content = digest("wikitext", *(file_digest(file) for file in files.values()))
  size = sum(file.stat().st_size for file in files.values())
  splits = {name: (lambda file=file: iter([file.read_bytes()])) for name, file in files.items()}
  return Source("wikitext", content, size, splits, lambda text: words(text) + text.count(b"\n"))


def words(text: bytes) -> int:
  """Runs of characters between white space."""
  return len(text.decode("utf-8", errors="replace").split())


def pg19(path: Path, text_field: str) -> Source:
  """PG-19: folders train, validation and test with a .txt for each book, in the order of the names.

  Instead of .txt files there may be .jsonl files with a book per line, in these folders or beside
  them as train.jsonl and so on. metadata.csv is not needed. Words are counted as those between
  white space; published perplexities divide by 3,007,061 (validation) and 6,966,499 (test).
  """
  books = {split: _books(path, split) for split in ("train", "validation", "test")}
  if not books["test"]:
    del books["test"]
  for split, files in books.items():
    if not files:
      raise refuse("path", f"hold {split}/*.txt, {split}/*.jsonl or {split}.jsonl", path,
                   "name the folder that has the splits")  # fmt: skip

  def read(files: Sequence[Path]) -> Iterator[bytes]:
    for file in files:
      if file.suffix == ".jsonl":
        yield from jsonl(file, text_field)
      else:
        yield file.read_bytes()

  everything = [file for files in books.values() for file in files]
  content = digest("pg19", text_field, *(f"{split} {len(files)}" for split, files in books.items()),
                   *(file_digest(file) for file in everything))  # fmt: skip
  splits = {split: (lambda files=files: read(files)) for split, files in books.items()}
  return Source("pg19", content, sum(file.stat().st_size for file in everything), splits, words)


def _books(path: Path, split: str) -> list[Path]:
  folders = [path / name for name in (split, split.removesuffix("ation"))]  # also "valid"
  for pattern in ("*.txt", "*.jsonl"):
    for folder in folders:
      if files := sorted(folder.glob(pattern)):
        return [existing(file) for file in files]
  beside = [folder.with_name(f"{folder.name}.jsonl") for folder in folders]
  return [existing(file) for file in beside if file.is_file()][:1]


def tokens(path: Path, config: DataConfig) -> TokenSource:
  """Token files: a .bin (its tail is held out), or a folder with train.bin and validation.bin.

  Ids are little-endian uint16 or uint32 without a header. `<file>.json` or `meta.json` beside them
  says {"dtype": "uint16", "vocab_size": 50257, "end_id": 50256}; config fields go before it.
  """
  files = {"": path} if path.is_file() else _token_files(path)
  first = next(iter(files.values()))
  dtype, vocab_size, end_id = _token_layout(first, config)
  splits = {name: _map_tokens(file, dtype, vocab_size) for name, file in files.items()}
  if "" in splits:
    whole = splits.pop("")
    cut = int(len(whole) * (1 - config.validation_fraction))
    splits = {"train": whole[:cut], "validation": whole[cut:]}
  content = digest("tokens", vocab_size, end_id, config.validation_fraction,
                   *(file_digest(file) for file in files.values()))  # fmt: skip
  return TokenSource("tokens", content, splits, vocab_size, end_id)


def _token_files(folder: Path) -> dict[str, Path]:
  names = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
  found = {
    split: folder / f"{name}.bin"
    for split, choices in names.items()
    for name in choices
    if (folder / f"{name}.bin").is_file()
  }
  for split in ("train", "validation"):
    if split not in found:
      there = sorted(file.name for file in folder.glob("*.bin"))
      raise refuse("path", f"hold {split}.bin", f"{folder} with {there}",
                   "name one .bin file to have its tail held out")  # fmt: skip
  return {split: existing(file) for split, file in found.items()}


def _token_layout(file: Path, config: DataConfig) -> tuple[np.dtype, int, int | None]:
  """dtype, vocabulary size and end id from the config, else from the .json beside the file."""
  beside = [file.with_suffix(".json"), file.with_name("meta.json")]
  meta: dict[str, Any] = {}
  for candidate in beside:
    if candidate.is_file():
      try:
        meta = json.loads(candidate.read_text())
      except ValueError as error:
        raise refuse("path", "have readable JSON beside the .bin", f"{candidate}: {error}",
                     'write {"dtype": "uint16", "vocab_size": ...}') from error  # fmt: skip
      break
  dtype = config.token_dtype or meta.get("dtype")
  vocab_size = config.token_vocab_size or meta.get("vocab_size")
  if dtype not in ("uint16", "uint32") or not vocab_size:
    raise refuse("path", "come with a dtype (uint16 or uint32) and a vocabulary size",
                 f"dtype {dtype}, vocab_size {vocab_size} for {file}",
                 f"set them in the config or write {beside[0].name} beside it")  # fmt: skip
  end_id = config.token_end_id if config.token_end_id >= 0 else meta.get("end_id")
  if end_id is not None and not 0 <= end_id < vocab_size:
    raise refuse("token_end_id", f"be below the vocabulary size {vocab_size}", end_id,
                 "set token_end_id or end_id of the .json")  # fmt: skip
  return np.dtype(dtype).newbyteorder("<"), int(vocab_size), end_id


def _map_tokens(file: Path, dtype: np.dtype, vocab_size: int) -> np.ndarray:
  size = file.stat().st_size
  if size % dtype.itemsize:
    raise refuse("path", f"hold whole {dtype.name} ids", f"{file} with {size} bytes",
                 "set token_dtype to what it was written with")  # fmt: skip
  ids = np.memmap(file, dtype, mode="r")
  for start in range(0, len(ids), _SCAN):
    block = ids[start : start + _SCAN]
    if int(block.max()) >= vocab_size:
      at = int(np.argmax(block >= vocab_size))
      raise refuse("path", f"hold ids below the vocabulary size {vocab_size}",
                   f"{int(block[at])} at position {start + at} of {file}",
                   "check token_dtype and token_vocab_size")  # fmt: skip
  return ids


def huggingface(path: Path, config: DataConfig) -> Source:
  """A dataset or a dictionary of splits written by `save_to_disk`; needs the package datasets.

  Without a validation split, documents are held out by their hash.
  """
  datasets = _import_datasets()
  loaded = datasets.load_from_disk(str(path))
  splits = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
  if config.validation_path:
    held = existing(config.validation_path, "validation_path")
    splits["validation"] = datasets.load_from_disk(str(held))
  for name, split in splits.items():
    if config.text_field not in split.column_names:
      raise refuse("text_field", f"name a column of split {name!r} of {path}",
                   f"{config.text_field!r}, columns are {split.column_names}",
                   "set text_field to the column that holds the text")  # fmt: skip
  if "train" not in splits:
    raise refuse("path", "hold a split 'train'", f"{path} with {sorted(splits)}",
                 "rename the split, or name the folder of one split")  # fmt: skip
  files = sorted(file for file in path.rglob("*") if file.is_file())
  content = digest("huggingface", config.text_field, config.validation_fraction,
                   *(file_digest(file) for file in files))  # fmt: skip
  readers = {name: _rows(split, config.text_field) for name, split in splits.items()}
  if "validation" not in readers:
    readers |= _split_rows(readers["train"], config.validation_fraction)
  readers = {name: readers[name] for name in ("train", "validation", "test") if name in readers}
  return Source("huggingface", content, sum(file.stat().st_size for file in files), readers)


def _import_datasets():
  try:
    import datasets
  except ImportError as error:
    raise refuse("source", "have its package installed", "'huggingface' without `datasets`",
                 "pip install datasets, or export the data to .jsonl") from error  # fmt: skip
  return datasets


def _rows(split, field: str):
  return lambda: (row[field].encode("utf-8", errors="replace") for row in split)


def _split_rows(rows, fraction: float) -> dict:
  def documents(held: bool) -> Iterator[bytes]:
    places = [place(document) for document in rows()]
    below = threshold(min(places), max(places), fraction) if places else 0.0
    return (row for row, where in zip(rows(), places, strict=True) if (where < below) == held)

  return {"train": lambda: documents(False), "validation": lambda: documents(True)}
