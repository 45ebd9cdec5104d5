"""The files of MIMIC-III as they come: tables, the split's lists of admissions, titles of codes.

What is in them is about patients. No message here shows a value or a header that was read (a file
without one starts with a patient's row): errors name the file, the row's number and a column.
"""

import csv
import gzip
import io
import re
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from attnzoo.experiments.data.errors import DataError, refuse
from attnzoo.experiments.data.notes.codes import dotted

NOTES = "NOTEEVENTS"
CODES = {"DIAGNOSES_ICD": False, "PROCEDURES_ICD": True}  # whether they are procedures
TITLES = {"D_ICD_DIAGNOSES": False, "D_ICD_PROCEDURES": True}
MORE_TITLES = "ICD9_descriptions"
SPLITS = dict(train="train", validation="dev", test="test")  # our name -> the files'

_INTEGER = re.compile(r"(\d{1,15})(?:\.0*)?", re.ASCII)
_SECONDS_BETWEEN_LINES = 10.0
_DAMAGED = (csv.Error, UnicodeError, EOFError, OSError, zlib.error)


def find_table(folder: Path, name: str, argument: str = "path") -> Path:
  """The file NAME.csv or NAME.csv.gz of a folder, in upper or lower case."""
  wanted = {f"{name}{end}".lower() for end in (".csv", ".csv.gz")}
  return _find(folder, wanted, f"{name}.csv or {name}.csv.gz", argument)


def find_more_titles(folders: Sequence[Path]) -> Path | None:
  """The file ICD9_descriptions (.txt) of the first folder that has it."""
  wanted = {MORE_TITLES.lower(), f"{MORE_TITLES}.txt".lower()}
  found = [file for folder in folders for file in _matching(folder, wanted)]
  return found[0] if found else None


def _matching(folder: Path, wanted: set[str]) -> list[Path]:
  return sorted(file for file in folder.iterdir() if file.name.lower() in wanted and file.is_file())


def _find(folder: Path, wanted: set[str], names: str, argument: str) -> Path:
  if not folder.is_dir():
    raise refuse(argument, "name a folder", str(folder), f"the one with {names}")
  found = _matching(folder, wanted)
  if not found:
    raise refuse(argument, f"be a folder with {names}", str(folder),
                 "the tables of MIMIC-III v1.4 come from PhysioNet, the lists of admissions from "
                 "CAML, which split_path may name")  # fmt: skip
  if len(found) > 1:
    raise refuse(argument, f"hold one of {names}", ", ".join(file.name for file in found),
                 "move the others away")  # fmt: skip
  return found[0]


def table_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
  """(number of the record, values of the columns) of a table; the header is record 1.

  The file is read as a stream; values may hold line breaks and doubled quotes inside quotes.

  Raises:
    DataError: a column is missing, a row has another number of values, the file is damaged.
  """
  records = _records(path)
  header = [name.strip().upper() for name in next(records, [])]
  missing = [name for name in columns if name not in header]
  if missing:
    raise refuse("path", f"hold {path.name} with the column {missing[0]}",
                 f"a first line of {len(header)} columns without it in {path}",
                 "the first line of a table names its columns")  # fmt: skip
  places = [header.index(name) for name in columns]
  for number, record in enumerate(records, 2):
    if len(record) != len(header):
      raise refuse("path", f"hold rows of {len(header)} values in {path.name}",
                   f"{len(record)} in record {number} of {path}",
                   "copy or download the file again")  # fmt: skip
    yield number, tuple(record[place] for place in places)


def _records(path: Path) -> Iterator[list[str]]:
  """All records that are not empty lines, with a line of progress now and then."""
  fault, number, meter, size = "", 0, Meter(), path.stat().st_size
  try:
    with path.open("rb") as file:
      stream = gzip.GzipFile(fileobj=file) if path.name.lower().endswith(".gz") else file
      with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        for record in csv.reader(text, strict=True):
          number += 1
          if number % 10_000 == 0:
            meter.show(f"{path.name}: {number:,} records, {file.tell() / size:.0%}")
          if record:
            yield record
  except _DAMAGED as error:
    # Messages of csv speak of the format only; the others may quote what was read.
    fault = str(error) if isinstance(error, csv.Error) else type(error).__name__
  if fault:  # raised here, so that nothing is chained to it
    raise refuse("path", f"hold {path.name} whole, as CSV in UTF-8",
                 f"{fault} behind record {number} of {path}",
                 "copy or download the file again")  # fmt: skip


class Meter:
  """Says now and then how far something is that takes minutes."""

  def __init__(self):
    self._last = time.monotonic()

  def show(self, message: str) -> None:
    now = time.monotonic()
    if now - self._last >= _SECONDS_BETWEEN_LINES:
      self._last = now
      say(message)


def say(message: str) -> None:
  """A line on stderr. For numbers and names of files only."""
  print(f"mimic3: {message}", file=sys.stderr, flush=True)


def integer(text: str) -> int | None:
  """The whole number in a field (167853 or 167853.0); None for anything else."""
  match = _INTEGER.fullmatch(text.strip())
  return int(match[1]) if match else None


def no_number(path: Path, column: str, record: int) -> DataError:
  """The error for a field without a number, which does not show the field."""
  found = f"something else in record {record} of {path}"
  return refuse("path", f"hold whole numbers as {column} in {path.name}", found,
                "is this another table?")  # fmt: skip


def coded_admissions(path: Path, procedure: bool) -> Iterator[tuple[int, str]]:
  """(HADM_ID, dotted code) of a table of codes, in the order of the file."""
  for number, (admission, code) in table_rows(path, ("HADM_ID", "ICD9_CODE")):
    key = integer(admission)
    if key is None:
      raise no_number(path, "HADM_ID", number)
    yield key, dotted(code, procedure=procedure)


def read_titles(tables: dict[Path, bool], more: Path | None) -> dict[str, str]:
  """Dotted code -> title: diagnoses, procedures, then what `more` has beyond them."""
  titles: dict[str, str] = {}
  for path, procedure in tables.items():
    for _, (code, title) in table_rows(path, ("ICD9_CODE", "LONG_TITLE")):
      titles.setdefault(dotted(code, procedure=procedure), title)
  if more is not None:
    text = more.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines():
      code, _, title = line.strip().partition("\t")
      if code:  # also the root's, "@", whose words are among the published ones
        titles.setdefault(code.strip(), title.strip())
  return titles


def read_split(path: Path) -> list[int]:
  """The admissions of a split: a HADM_ID a line, no header."""
  admissions = []
  for number, record in enumerate(_records(path), 1):
    key = integer(record[0]) if len(record) == 1 else None
    if key is None:
      raise refuse("split_path", f"hold one HADM_ID a line in {path.name}",
                   f"something else in line {number} of {path}",
                   "the lists of CAML have no header and one column")  # fmt: skip
    admissions.append(key)
  if not admissions:
    raise refuse("split_path", "hold lists of admissions", f"the empty {path}", "download it again")
  return admissions
