"""Documents, and how they are divided into training and held-out ones without leakage."""

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from attnzoo.experiments.data.errors import refuse

TEXT_SUFFIXES = tuple(
  ".txt .md .rst .py .tex .html .htm .xml .csv .json .c .h .cc .cpp .hpp .java .js .ts .go .rs .sh"
  " .rb .toml .yaml .yml".split()
)

# Two files are near-duplicates if they share half of the sampled shingles of the smaller one; a
# shingle is compared over at most so many neighbours in the order of the files.
_SHINGLE_BYTES = 32
_SAMPLE_ONE_IN = 64
_SMALLEST_SKETCH = 8
_SHARED_SHARE = 0.5
_MOST_LINKS = 256


@dataclasses.dataclass(frozen=True)
class Source:
  """Documents by split. `splits[name]()` starts a fresh pass over UTF-8 bytes, one per document."""

  name: str
  content: str  # sha256 of all that decides the documents and their split
  size: int  # bytes of the files behind it
  splits: Mapping[str, Callable[[], Iterator[bytes]]]
  count_words: Callable[[bytes], int] | None = None  # where word perplexities are published


def digest(*parts: object) -> str:
  """sha256 of the parts; lengths are hashed too, so no two lists of parts are confused."""
  state = hashlib.sha256()
  for part in parts:
    data = part if isinstance(part, bytes) else str(part).encode()
    state.update(len(data).to_bytes(8, "little") + data)
  return state.hexdigest()


def existing(path: str | Path, argument: str = "path") -> Path:
  """The path, which must be there; an empty file is refused as well."""
  path = Path(path).expanduser()
  if not path.exists():
    raise refuse(argument, "name an existing file or folder", str(path),
                 "check the spelling; relative paths start at the working directory")  # fmt: skip
  if path.is_file() and path.stat().st_size == 0:
    raise refuse(argument, "name a file with text in it", f"the empty file {path}",
                 "download or write it again")  # fmt: skip
  return path


def file_digest(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def place(data: bytes | str) -> float:
  """Where a name or document lies between 0 and 1, by its hash."""
  return int(digest(data)[:13], 16) / 16**13


def threshold(lowest: float, highest: float, fraction: float) -> float:
  """Places below this are held out: `fraction`, moved only as far as both splits need to be filled.

  `lowest` and `highest` are the extreme places of the corpus. Which side a document falls on thus
  depends on no other document unless the corpus is tiny.
  """
  if lowest >= fraction:
    return float(np.nextafter(lowest, 1))
  return min(fraction, highest) if highest > lowest else fraction


def held_out(names: Sequence[str], groups: Sequence[int], fraction: float) -> list[bool]:
  """Marks the held-out names. A group goes by the place of its alphabetically first name."""
  first: dict[int, str] = {}
  for name, group in zip(names, groups, strict=True):
    first[group] = min(name, first.get(group, name))
  places = {group: place(name) for group, name in first.items()}
  below = threshold(min(places.values()), max(places.values()), fraction)
  return [places[group] < below for group in groups]


def sketch(data: bytes) -> np.ndarray:
  """A sample of the hashes of all 32-byte shingles, sorted uint64 [S].

  The sample keeps the hashes divisible by 64, so a shingle is sampled in every file or in none and
  overlaps of sketches estimate overlaps of files.
  """
  count = len(data) - _SHINGLE_BYTES + 1
  if count < 1:
    return np.zeros(0, np.uint64)
  mixed = np.zeros(count, np.uint64)
  for offset in range(0, _SHINGLE_BYTES, 8):
    words = np.ndarray((count,), "<u8", buffer=data, offset=offset, strides=(1,))  # at every byte
    mixed = (mixed ^ words) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
  return np.unique(mixed[mixed % np.uint64(_SAMPLE_ONE_IN) == 0])


def duplicate_groups(digests: Sequence[str], sketches: Sequence[np.ndarray]) -> list[int]:
  """A group number per file, equal for exact and for near-duplicates.

  A shingle links each file to the next 256 that have it, so the cost is linear in the sketches.
  """
  parent = list(range(len(digests)))

  def root(i: int) -> int:
    while parent[i] != i:
      parent[i] = parent[parent[i]]
      i = parent[i]
    return i

  seen = {}
  for i, value in enumerate(digests):
    parent[root(i)] = root(seen.setdefault(value, i))
  for i, j, shared in _shared_shingles(sketches):
    if shared >= _SHARED_SHARE * min(len(sketches[i]), len(sketches[j])):
      parent[root(j)] = root(i)
  return [root(i) for i in range(len(digests))]


def _shared_shingles(sketches: Sequence[np.ndarray]) -> list[tuple[int, int, int]]:
  """(i, j, how many sampled shingles they share), for files i < j that share any."""
  owners = [np.full(len(s), i) for i, s in enumerate(sketches) if len(s) >= _SMALLEST_SKETCH]
  if not owners:
    return []
  owner = np.concatenate(owners)
  shingle = np.concatenate([s for s in sketches if len(s) >= _SMALLEST_SKETCH])
  order = np.argsort(shingle, kind="stable")
  owner, shingle = owner[order], shingle[order]
  at, pairs = np.arange(len(shingle)), []
  for distance in range(1, _MOST_LINKS + 1):
    at = at[at + distance < len(shingle)]
    at = at[shingle[at] == shingle[at + distance]]  # sorted: none further on if not here
    if not len(at):
      break
    pairs.append(owner[at] * len(sketches) + owner[at + distance])
  if not pairs:
    return []
  codes, shared = np.unique(np.concatenate(pairs), return_counts=True)
  first, second = np.divmod(codes, len(sketches))
  return list(zip(first.tolist(), second.tolist(), shared.tolist(), strict=True))


def source_of_files(name: str, folder: Path, files: Sequence[Path], fraction: float) -> Source:
  """One document per file, split by file; copies and near-copies stay on one side."""
  paths, digests, sketches, size = [], [], [], 0
  for path in files:
    data = path.read_bytes()
    if data.strip():  # empty package markers are no documents
      paths.append(path)
      digests.append(hashlib.sha256(data).hexdigest())
      sketches.append(sketch(data))
      size += len(data)
  names = [path.relative_to(folder).as_posix() for path in paths]
  marks = held_out(names, duplicate_groups(digests, sketches), fraction) if paths else []
  chosen = defaultdict(list)
  for path, mark in zip(paths, marks, strict=True):
    chosen["validation" if mark else "train"].append(path)
  splits = {split: _reader(chosen[split]) for split in ("train", "validation")}
  content = digest(name, *(part for row in zip(names, digests, marks, strict=True) for part in row))
  return Source(name, content, size, splits)


def _reader(paths: Iterable[Path]) -> Callable[[], Iterator[bytes]]:
  return lambda: (path.read_bytes() for path in paths)


def jsonl(path: Path, field: str) -> Iterator[bytes]:
  """The documents of a .jsonl file in order; blank lines are skipped, any other fault is raised."""
  return (document for _, (document,) in jsonl_fields(path, text_field=field))


def jsonl_fields(path: Path, **fields: str) -> Iterator[tuple[int, tuple[bytes, ...]]]:
  """(number of the line, its fields as UTF-8) of a .jsonl file; fields are option=name."""
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        record = json.loads(line)
      except ValueError as error:  # covers bad JSON and bad UTF-8
        raise refuse("path", "hold one JSON object per line", f"{path}, line {number}: {error}",
                     "repair or remove the line") from error  # fmt: skip
      for option, field in fields.items():
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
          found = sorted(record) if isinstance(record, dict) else type(record).__name__
          raise refuse(option, "name a string field of every line",
                       f"{field!r} at {path}, line {number}, which has {found}",
                       f"set {option} to the field that holds the text")  # fmt: skip
      # Lone surrogates have no UTF-8.
      yield number, tuple(record[f].encode("utf-8", errors="replace") for f in fields.values())
