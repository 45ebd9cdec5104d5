"""What is made of MIMIC-III's tables once and then kept in the cache: notes and codes by admission.

Reading and cleaning the table of notes takes minutes, so its result is a folder of the cache:
  raw.txt, cleaned.txt   the kept notes in the order of the table
  notes.npy [N, 4]       where each note begins and ends in both, by admission
  admissions.npy [A]     HADM_IDs, ascending
  first.npy [A + 1]      an admission's notes are notes[first[a]:first[a + 1]]
  codes.json, titles.json, meta.json (counts)
It holds patients' texts as the tables do, so nobody but its owner may enter it.
"""

import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
from jaxtyping import Int

from attnzoo.experiments.data.errors import refuse
from attnzoo.experiments.data.notes.cleaning import NOTE_BREAK, clean
from attnzoo.experiments.data.notes.mimic3_tables import (
  CODES,
  NOTES,
  TITLES,
  coded_admissions,
  find_more_titles,
  find_table,
  integer,
  no_number,
  read_titles,
  say,
  table_rows,
)

_CATEGORY = "Discharge summary"  # reports and addenda
_BREAK = f"\n{NOTE_BREAK}\n"


@dataclasses.dataclass(frozen=True)
class Tables:
  """The files that were found."""

  notes: Path
  codes: Mapping[Path, bool]  # whether they are procedures
  titles: Mapping[Path, bool]
  more_titles: Path | None

  @classmethod
  def find(cls, folder: Path, split_folder: Path) -> "Tables":
    """All tables in a folder, and the titles that may lie beside the split; see DataError."""
    more = find_more_titles((folder, split_folder))
    if more is None:
      say("no file ICD9_descriptions: the vocabulary has the titles of the D_ICD tables only, and "
          "will be smaller than the published one")  # fmt: skip
    return cls(
      find_table(folder, NOTES),
      {find_table(folder, name): procedure for name, procedure in CODES.items()},
      {find_table(folder, name): procedure for name, procedure in TITLES.items()},
      more,
    )

  @property
  def files(self) -> list[Path]:
    more = [self.more_titles] if self.more_titles else []
    return [self.notes, *self.codes, *self.titles, *more]


class Store:
  """A folder of the cache that `write_store` filled. Admissions go by number, from 0 on."""

  def __init__(self, folder: Path):
    self.folder = folder
    self.admissions = self._array("admissions")
    self._notes, self._first = self._array("notes"), self._array("first")

  def _array(self, name: str) -> np.ndarray:
    return load_array(self.folder / f"{name}.npy")

  def _json(self, name: str) -> Any:
    return load_json(self.folder / f"{name}.json")

  @functools.cached_property
  def codes(self) -> list[list[str]]:
    """The codes of each admission, dotted: diagnoses, then procedures, as often as they occur."""
    return self._json("codes")

  @functools.cached_property
  def titles(self) -> dict[str, str]:
    """Code -> title."""
    return self._json("titles")

  @functools.cached_property
  def counts(self) -> dict[str, int]:
    """What was counted while the tables were read."""
    return self._json("meta")

  def numbers(self, admissions: Sequence[int]) -> Int[np.ndarray, "n"]:
    """Numbers of those of the admissions that are here, ascending, each once."""
    return np.flatnonzero(np.isin(self.admissions, admissions))

  def cleaned(self, numbers: Sequence[int] | np.ndarray) -> Iterator[str]:
    """The cleaned text of admissions: their notes joined by a space."""
    with (self.folder / "cleaned.txt").open("rb") as file:
      for number in numbers:
        yield " ".join(self._pieces(file, number, 2))

  def notes(self, numbers: Sequence[int] | np.ndarray | None = None) -> Iterator[str]:
    """The cleaned notes one by one, of some admissions or (None) of all."""
    with (self.folder / "cleaned.txt").open("rb") as file:
      for number in range(len(self.admissions)) if numbers is None else numbers:
        yield from self._pieces(file, number, 2)

  def raw(self, number: int) -> str:
    """The text of an admission as it was written, its notes parted by a NOTE_BREAK."""
    with (self.folder / "raw.txt").open("rb") as file:
      return _BREAK.join(self._pieces(file, number, 0))

  def _pieces(self, file: IO[bytes], number: int, column: int) -> Iterator[str]:
    for row in self._notes[self._first[number] : self._first[number + 1]]:
      start, end = int(row[column]), int(row[column + 1])
      file.seek(start)
      yield file.read(end - start).decode()


class Texts(Sequence[str]):
  """Raw texts of some admissions, read when they are asked for. Never shows them by itself."""

  def __init__(self, store: Store, numbers: Int[np.ndarray, "n"]):
    self._store, self._numbers = store, numbers

  def __len__(self) -> int:
    return len(self._numbers)

  @overload
  def __getitem__(self, index: int) -> str: ...

  @overload
  def __getitem__(self, index: slice) -> "Texts": ...

  def __getitem__(self, index):
    chosen = self._numbers[index]
    if isinstance(index, slice):
      return Texts(self._store, chosen)
    return self._store.raw(int(chosen))

  def __repr__(self) -> str:
    return f"<{len(self)} texts>"


def write_store(folder: Path, tables: Tables, rules: str) -> None:
  """Reads the tables and writes what the module's docstring says."""
  places, counts = _write_notes(folder, tables.notes, rules)
  # By admission, in it by patient as the tables of the official code are, then as in the file.
  places = places[np.lexsort((places[:, 0], places[:, 1]))]
  if not len(places):
    raise refuse("path", f"hold notes of category {_CATEGORY!r} with a HADM_ID",
                 f"none among the {counts['rows']:,} rows of {tables.notes}",
                 "an extract without texts has none")  # fmt: skip
  noted = np.unique(places[:, 1])
  codes, everywhere = _read_codes(tables, set(noted.tolist()))
  kept = np.array([key for key in noted.tolist() if key in codes], np.int64)
  counts |= dict(
    admissions_with_notes=len(noted),
    admissions_with_codes=len(everywhere),
    admissions=len(kept),
    codes=len({code for listed in codes.values() for code in listed}),
  )
  if not len(kept):
    raise refuse(
      "path", "hold codes of admissions that have notes",
      f"none for {len(noted):,} admissions", "are the tables of one release?"
    )  # fmt: skip
  places = places[np.isin(places[:, 1], kept)]
  first = np.searchsorted(places[:, 1], kept)
  np.save(folder / "notes.npy", places[:, 2:])
  np.save(folder / "first.npy", np.append(first, len(places)))
  np.save(folder / "admissions.npy", kept)
  titles = read_titles(dict(tables.titles), tables.more_titles)
  dump_json(folder / "titles.json", titles)
  dump_json(folder / "codes.json", [codes[key] for key in kept.tolist()])
  dump_json(folder / "meta.json", counts)


def _write_notes(folder: Path, path: Path, rules: str) -> tuple[np.ndarray, dict[str, int]]:
  """Writes kept notes; returns rows (patient, admission, their 4 places) and counts."""
  places, rows, unknown = [], 0, 0
  raw_end = cleaned_end = 0
  columns = ("SUBJECT_ID", "HADM_ID", "CATEGORY", "TEXT")
  with (folder / "raw.txt").open("wb") as raw, (folder / "cleaned.txt").open("wb") as cleaned:
    for number, (patient, admission, category, text) in table_rows(path, columns):
      rows += 1
      if category != _CATEGORY:
        continue
      if not admission.strip():
        unknown += 1
        continue
      keys = integer(patient), integer(admission)
      for column, key in zip(columns, keys, strict=False):
        if key is None:
          raise no_number(path, column, number)
      text = text.replace(NOTE_BREAK, " ")  # white space like another to the rules of cleaning
      raw_start, cleaned_start = raw_end, cleaned_end
      raw_end += raw.write(text.encode())
      cleaned_end += cleaned.write(clean(text, rules).encode())
      places.append((*keys, raw_start, raw_end, cleaned_start, cleaned_end))
  if unknown:
    say(f"{unknown:,} discharge summaries without HADM_ID are left out")
  table = np.array(places, np.int64).reshape(-1, 6)
  return table, dict(rows=rows, notes=len(places))


def _read_codes(tables: Tables, noted: set[int]) -> tuple[dict[int, list[str]], set[int]]:
  """(codes of the admissions that have notes, all admissions with codes)."""
  codes, everywhere = defaultdict(list), set()
  for path, procedure in tables.codes.items():
    for admission, code in coded_admissions(path, procedure):
      everywhere.add(admission)
      if admission in noted:
        codes[admission].append(code)
  return dict(codes), everywhere


def load_array(path: Path) -> np.ndarray:
  """Maps an array of the cache; raises DataError where it is not there or not whole."""
  array = None
  try:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
  except (OSError, ValueError, EOFError):
    pass
  if array is None:
    raise _damaged(path)
  return array


def load_json(path: Path) -> Any:
  """Reads a record of the cache; raises DataError where it is not there or not whole."""
  record = None
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    pass
  if record is None:
    raise _damaged(path)
  return record


def dump_json(path: Path, record: Any) -> None:
  path.write_text(json.dumps(record), encoding="utf-8")


def _damaged(path: Path):
  return refuse("cache", f"hold {path.name} whole", str(path.parent),
                "delete that folder, it is written again")  # fmt: skip
