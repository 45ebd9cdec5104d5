"""Sources of documents: the embedded default, files and folders of text, and the named formats."""

import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from attnzoo.experiments.data import formats
from attnzoo.experiments.data.config import IMAGE_SOURCES, DataConfig
from attnzoo.experiments.data.documents import (
  TEXT_SUFFIXES,
  Source,
  digest,
  existing,
  file_digest,
  jsonl,
  place,
  source_of_files,
  threshold,
)
from attnzoo.experiments.data.errors import refuse

# Tests are left out because they are data more than code, the rest because it differs between
# installations of the same Python.
_STDLIB_WITHOUT = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}
_STDLIB_WITHOUT_PREFIXES = ("_sysconfigdata", "config-", "lib-dynload")


def open_source(config: DataConfig) -> Source | formats.TokenSource:
  """Opens what the config names; raises DataError if it is missing, empty or of another shape."""
  kind = config.source if config.source != "auto" else guess_source(config.path)
  if kind == "stdlib":
    return stdlib(config.validation_fraction)
  if kind == "mqar":
    raise refuse("source", "be text or tokens", "'mqar'", "its examples are made, not read")
  if kind in IMAGE_SOURCES:
    raise refuse("source", "be text or tokens", repr(kind), "pictures have no text")
  if kind == "sft":
    raise refuse("source", "be text or tokens", "'sft'", "its prompts and answers are no stream")
  path = existing(config.path)
  if kind == "text":
    return text(path, config)
  if kind == "enwik8":
    return formats.enwik8(path, config.enwik8_bytes)
  if kind == "wikitext":
    return formats.wikitext(path)
  if kind == "pg19":
    return formats.pg19(path, config.text_field)
  if kind == "tokens":
    return formats.tokens(path, config)
  return formats.huggingface(path, config)


def guess_source(path: str) -> str:
  """The source that `auto` stands for, told by the name of the path and the files in it."""
  if not path:
    return "stdlib"
  where = existing(path)
  if where.is_file():
    if where.name in ("enwik8.zip", "enwik8.gz"):
      return "enwik8"
    return {"enwik8": "enwik8", ".bin": "tokens"}.get(where.suffix or where.name, "text")
  if any(where.glob("wiki.train.*")):
    return "wikitext"
  if any((where / name).is_file() for name in ("enwik8", "enwik8.zip", "enwik8.gz")):
    return "enwik8"
  if any(where.glob("*.bin")):
    return "tokens"
  if any((where / name).is_file() for name in ("dataset_dict.json", "state.json")):
    return "huggingface"
  if all(any((where / split).glob("*.txt")) for split in ("train", "validation", "test")):
    return "pg19"
  return "text"


def stdlib(validation_fraction: float = 0.06) -> Source:
  """The source files of the Python standard library that runs us, about 11 MB, without its tests.

  Needs no download and is the same on every machine with the same Python release; figures
  measured on it are comparable only between equal releases (the third number counts too).
  """
  folder = Path(sysconfig.get_paths()["stdlib"])
  files = [path for path in sorted(folder.rglob("*.py")) if _in_stdlib(path.relative_to(folder))]
  if not files:
    raise refuse("source", "find the standard library's .py files", f"none below {folder}",
                 "this Python ships without sources: give a path instead")  # fmt: skip
  return source_of_files("stdlib", folder, files, validation_fraction)


def _in_stdlib(path: Path) -> bool:
  return not _STDLIB_WITHOUT & set(path.parts) and not any(
    part.startswith(_STDLIB_WITHOUT_PREFIXES) for part in path.parts
  )


def text(path: Path, config: DataConfig) -> Source:
  """A text file, a .jsonl file, or a folder of them.

  Held-out documents: those below `validation_path` if given; else by file (folder), by document
  (.jsonl, duplicates stay together), or the last part of the text (one file that is not .jsonl).
  """
  if config.validation_path:
    parts = [path, existing(config.validation_path, "validation_path")]
    readers = [_all_documents(part, config) for part in parts]
    content = digest("text", config.text_field, *(_content(part, config) for part in parts))
    size = sum(file.stat().st_size for part in parts for file in _files(part, config))
    return Source("text", content, size, dict(zip(("train", "validation"), readers, strict=True)))
  files = _files(path, config)
  if any(file.suffix == ".jsonl" for file in files):
    return _split_by_document(path, files, config)
  if len(files) == 1:
    return _split_tail(files[0], config.validation_fraction)
  return source_of_files("text", path, files, config.validation_fraction)


def _files(path: Path, config: DataConfig) -> list[Path]:
  if path.is_file():
    return [path]
  suffixes = config.suffixes or (*TEXT_SUFFIXES, ".jsonl")
  files = [file for file in sorted(path.rglob("*")) if file.suffix in suffixes and file.is_file()]
  files = [file for file in files if file.stat().st_size]
  if not files:
    raise refuse("path", "hold text files", f"{path} with no non-empty file of type {suffixes}",
                 "set suffixes to the types to read")  # fmt: skip
  return files


def _content(path: Path, config: DataConfig) -> str:
  return digest(*(file_digest(file) for file in _files(path, config)))


def _all_documents(path: Path, config: DataConfig):
  files = _files(path, config)
  return lambda: (document for file in files for document in _documents(file, config.text_field))


def _documents(file: Path, field: str) -> Iterator[bytes]:
  if file.suffix == ".jsonl":
    yield from jsonl(file, field)
  else:
    yield file.read_bytes()


def _split_by_document(path: Path, files: list[Path], config: DataConfig) -> Source:
  """Splits by the hash of the document itself, so equal documents fall on the same side."""

  @functools.cache
  def below() -> float:  # reads all lines, so a fault is found before any work is done
    places = [place(document) for document in _all_documents(path, config)()] or [0.0]
    return threshold(min(places), max(places), config.validation_fraction)

  def documents(held: bool) -> Iterator[bytes]:
    everything = _all_documents(path, config)()
    return (document for document in everything if (place(document) < below()) == held)

  content = digest("jsonl", config.text_field, config.validation_fraction, _content(path, config))
  size = sum(file.stat().st_size for file in files)
  splits = {"train": lambda: documents(False), "validation": lambda: documents(True)}
  return Source("text", content, size, splits)


def _split_tail(path: Path, fraction: float) -> Source:
  """One text: its tail is held out, cut after a line end where there is one."""
  data = path.read_bytes()
  cut = data.rfind(b"\n", 0, int(len(data) * (1 - fraction))) + 1 or int(len(data) * (1 - fraction))
  while cut < len(data) and data[cut] & 0xC0 == 0x80:  # not inside a UTF-8 character
    cut += 1
  content = digest("tail", cut, data)
  pieces = {"train": data[:cut], "validation": data[cut:]}
  splits = {name: (lambda piece=piece: iter([piece])) for name, piece in pieces.items()}
  return Source("text", content, len(data), splits)
