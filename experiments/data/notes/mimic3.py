"""MIMIC-III discharge summaries and their ICD-9 codes, from the user's own copy of the tables.

What comes out is CAML's benchmark as the published scores used it: notes of an admission joined,
the 50 most frequent codes of all splits (ties go to the code seen first), longest notes first.
Results are kept in the cache, in folders that only their owner may enter; see mimic3_store.py.
"""

import collections
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int

from attnzoo.experiments.data.cache import written_once
from attnzoo.experiments.data.config import DataConfig
from attnzoo.experiments.data.documents import digest, existing, file_digest
from attnzoo.experiments.data.errors import refuse
from attnzoo.experiments.data.notes.cleaning import clean, stemmer_name
from attnzoo.experiments.data.notes.codes import MISSING
from attnzoo.experiments.data.notes.embeddings import (
  CBOW,
  EPOCHS,
  SIZE,
  check_embedding,
  read_vectors,
  train_cbow,
)
from attnzoo.experiments.data.notes.mimic3_counts import differences
from attnzoo.experiments.data.notes.mimic3_store import (
  Store,
  Tables,
  Texts,
  dump_json,
  load_array,
  load_json,
  write_store,
)
from attnzoo.experiments.data.notes.mimic3_tables import (
  SPLITS,
  Meter,
  find_table,
  read_split,
  say,
)
from attnzoo.experiments.data.notes.sets import NoteSet, NoteSplit
from attnzoo.experiments.data.notes.vocabulary import UNK, Vocabulary

_LAYOUT = 1  # raise it when other files come of the same tables
_MOST_FREQUENT = 50
_PUBLISHED_LIMIT = 2500
_NOTE = "MIMIC-III: credentialed data, keep texts and what is made of them to yourself"


def load_mimic3(config: DataConfig, cache: str | Path | None = None) -> NoteSet:
  """Reads the tables in `config.path`, or what an earlier start made of them.

  Targets have a column for each code, sorted as strings. "full" has the codes of all three splits;
  what stands for a missing code is never a label. Admissions of a split's list without a note or
  without a label are left out. Each split is sorted by its notes' uncut length, longest first and
  equal ones by HADM_ID. All of them are kept: `config.drop_remainder` is for the batches.

  Args:
    config: path, split_path, labels, note_rules, embedding, cbow_corpus, seed and sequence_length,
      to which notes are cut.
    cache: folder for the results unless `config.cache` names one.

  Raises:
    DataError: there is no cache; a file or column is missing or damaged; splits overlap or are
      empty. Messages show neither texts nor identifiers.
  """
  root = _private(config.cache or cache)
  check_embedding(config.embedding)
  folder = existing(config.path)
  split_folder = existing(config.split_path, "split_path") if config.split_path else folder
  tables = Tables.find(folder, split_folder)
  lists = {
    ours: find_table(split_folder, f"{theirs}_{config.labels}_hadm_ids", "split_path")
    for ours, theirs in SPLITS.items()
  }
  # The vocabulary is that of the whole training split, whatever the labels.
  lists["words"] = find_table(split_folder, "train_full_hadm_ids", "split_path")

  rules = config.note_rules
  key = digest(_LAYOUT, rules, stemmer_name(rules), *map(_state, tables.files))
  store = Store(_entry(root, key, functools.partial(write_store, tables=tables, rules=rules)))
  key = digest(key, config.labels, *map(_state, lists.values()))
  write = functools.partial(_write_splits, store=store, lists=lists, labels=config.labels,
                            rules=rules)  # fmt: skip
  entry = _entry(root, key, write)
  meta = load_json(entry / "meta.json")
  vocabulary = Vocabulary.load(entry / "vocabulary.json")
  other = differences(store.counts | meta["figures"], config.labels, rules)
  for difference in other:
    say(f"not as in the published run: {difference}")
  return NoteSet(
    name=f"mimic3-{config.labels}",
    splits={name: _load_split(entry, name, store, config.sequence_length) for name in SPLITS},
    labels=tuple(meta["labels"]),
    label_names=tuple(meta["label_names"]),
    vocabulary=vocabulary,
    rules=rules,
    fingerprint=meta["fingerprint"],
    embedding=_embedding(config, store, vocabulary, lists["words"], root, key),
    note=f"{_NOTE}; {len(other)} figures differ from the published run" if other else _NOTE,
  )


def _private(cache: str | Path | None) -> Path:
  """The folder for everything of patients, made so that nobody else may enter it."""
  if not cache:
    raise refuse("cache", "name a folder for source 'mimic3'", "''",
                 "cleaned notes are kept there, in a folder only you can read")  # fmt: skip
  root = Path(cache).expanduser() / "mimic3"
  root.mkdir(parents=True, exist_ok=True)
  root.chmod(0o700)
  return root


def _entry(root: Path, key: str, write: Callable[[Path], None]) -> Path:
  return written_once(root / key[:32], write)


def _state(path: Path) -> str:
  """What tells that a file is another one: the tables are too large to hash at every start."""
  state = path.stat()
  return f"{path.name} {state.st_size} {state.st_mtime_ns}"


def _write_splits(
  folder: Path, store: Store, lists: Mapping[str, Path], labels: str, rules: str
) -> None:
  """Vocabulary, ids, targets and figures of the splits."""
  chosen = _choose(store, {name: lists[name] for name in SPLITS})
  columns = _label_set(store, chosen, labels)
  words = store.numbers(read_split(lists["words"]))
  titles = (clean(title, rules) for title in store.titles.values())
  vocabulary = Vocabulary.build(
    itertools.chain(store.cleaned(words), titles), stemmer=stemmer_name(rules)
  )
  vocabulary.save(folder / "vocabulary.json")
  figures: dict[str, float] = dict(vocabulary=len(vocabulary))
  for name, numbers in chosen.items():
    measured = _write_split(folder, name, store, numbers, columns, vocabulary)
    figures |= {f"{name}_{figure}": value for figure, value in measured.items()}
  parts = ("ids.npy", "starts.npy", "targets.npy")
  files = [folder / f"{name}.{part}" for name in SPLITS for part in parts]
  meta = dict(
    labels=columns,
    label_names=[store.titles.get(code, code) for code in columns],
    figures=figures,
    fingerprint=digest(*columns, *vocabulary.words, *map(file_digest, files)),
  )
  dump_json(folder / "meta.json", meta)


def _choose(store: Store, lists: Mapping[str, Path]) -> dict[str, Int[np.ndarray, "n"]]:
  """The admissions of each split, by number, ascending."""
  chosen = {}
  for name, path in lists.items():
    listed = set(read_split(path))
    chosen[name] = store.numbers(sorted(listed))
    if absent := len(listed) - len(chosen[name]):
      say(f"{name}: {absent:,} of {len(listed):,} listed admissions have no note or no code")
  for one, other in itertools.combinations(chosen, 2):
    if shared := len(np.intersect1d(chosen[one], chosen[other])):
      raise refuse("split_path", "hold lists without common admissions",
                   f"{shared:,} in both {lists[one].name} and {lists[other].name}",
                   "download the lists again")  # fmt: skip
  return chosen


def _label_set(store: Store, chosen: Mapping[str, np.ndarray], labels: str) -> list[str]:
  """The codes of the columns, sorted."""
  if labels == "full":
    numbers = np.concatenate(list(chosen.values()))
    return sorted({code for n in numbers for code in store.codes[n]} - set(MISSING))
  counts = collections.Counter(itertools.chain.from_iterable(store.codes))  # of all splits
  for code in MISSING:
    del counts[code]
  return sorted(code for code, _ in counts.most_common(_MOST_FREQUENT))


def _write_split(
  folder: Path,
  name: str,
  store: Store,
  numbers: Int[np.ndarray, "n"],
  columns: list[str],
  vocabulary: Vocabulary,
) -> dict[str, float]:
  """Writes one split, uncut, and returns its figures."""
  column = {code: place for place, code in enumerate(columns)}
  numbers = np.array([n for n in numbers if any(c in column for c in store.codes[n])], np.int64)
  if not len(numbers):
    raise refuse("split_path", f"leave admissions in the {name} split", "none with note and label",
                 "are the lists those of these tables?")  # fmt: skip
  notes = [vocabulary.encode(text.split()) for text in store.cleaned(numbers)]
  order = np.argsort([-len(ids) for ids in notes], kind="stable")
  numbers, notes = numbers[order], [notes[place] for place in order]
  lengths = np.array([len(ids) for ids in notes], np.int64)
  np.save(folder / f"{name}.ids.npy", np.concatenate(notes))
  np.save(folder / f"{name}.starts.npy", np.append(0, np.cumsum(lengths)))
  np.save(folder / f"{name}.numbers.npy", numbers)
  targets = np.lib.format.open_memmap(
    folder / f"{name}.targets.npy", "w+", np.uint8, (len(numbers), len(columns))
  )
  for row, number in zip(targets, numbers, strict=True):
    row[[column[code] for code in store.codes[number] if code in column]] = 1
  targets.flush()
  if unused := int((targets.max(axis=0) == 0).sum()):
    say(f"{name}: {unused:,} of {len(columns):,} codes occur in no note of this split")
  return dict(
    notes=len(numbers),
    labels_per_note=float(targets.sum(dtype=np.int64) / len(numbers)),
    mean_tokens=float(lengths.mean()),
    median_tokens=float(np.median(lengths)),
    min_tokens=int(lengths.min()),
    max_tokens=int(lengths.max()),
    # As published: of each note's beginning, then the mean.
    unknown_share=float(
      np.mean([(ids[:_PUBLISHED_LIMIT] == UNK).mean() for ids in notes if len(ids)] or [0.0])
    ),
  )


def _load_split(entry: Path, name: str, store: Store, limit: int) -> NoteSplit:
  ids, starts, targets, numbers = (
    load_array(entry / f"{name}.{part}.npy") for part in ("ids", "starts", "targets", "numbers")
  )
  ids, starts = _cut(ids, np.asarray(starts), limit)
  return NoteSplit(ids, starts, targets, Texts(store, np.asarray(numbers)))


def _cut(
  ids: Int[np.ndarray, "n"], starts: Int[np.ndarray, "N+1"], limit: int
) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "N+1"]]:
  """The first `limit` tokens of each note; the given arrays where no note has more."""
  lengths = np.diff(starts)
  if lengths.max(initial=0) <= limit:
    return ids, starts
  kept = np.minimum(lengths, limit)
  parts = [ids[start : start + n] for start, n in zip(starts, kept, strict=False)]
  return np.concatenate(parts), np.append(0, np.cumsum(kept))


class _Sentences:
  """Every cleaned note as a list of words, then every title; may be iterated again and again."""

  def __init__(self, store: Store, numbers: np.ndarray | None, rules: str):
    self._store, self._numbers = store, numbers
    self._titles = [clean(title, rules).split() for title in store.titles.values()]
    self._meter, self._passes = Meter(), 0

  def __iter__(self) -> Iterator[list[str]]:
    self._meter.show(f"vectors: {self._passes} passes over the notes done")
    self._passes += 1
    for note in self._store.notes(self._numbers):
      yield note.split()
    yield from self._titles


def _embedding(
  config: DataConfig, store: Store, vocabulary: Vocabulary, words: Path, root: Path, key: str
) -> np.ndarray | None:
  """Vectors as configured; None leaves it to the model to draw random ones of its own width."""
  if config.embedding == "random":
    return None
  if config.embedding != "cbow":
    vectors, missing = read_vectors(config.embedding, vocabulary, config.seed)
    if missing:
      say(f"{missing:,} of {len(vocabulary):,} words have no vector there and get random ones")
    return vectors

  def write(folder: Path) -> None:
    numbers = store.numbers(read_split(words)) if config.cbow_corpus == "train" else None
    say(
      f"training vectors of {SIZE} numbers in {EPOCHS} passes over {config.cbow_corpus} notes ..."
    )
    sentences = _Sentences(store, numbers, config.note_rules)
    np.save(folder / "vectors.npy", train_cbow(sentences, vocabulary, seed=config.seed))
    dump_json(folder / "meta.json", CBOW)

  key = digest(key, "cbow", json.dumps(CBOW), SIZE, EPOCHS, config.cbow_corpus, config.seed)
  return load_array(_entry(root, key, write) / "vectors.npy")
