"""Notes with labels: what a loader of notes hands out, and what batches are cut from."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from attnzoo.experiments.data.errors import refuse
from attnzoo.experiments.data.notes.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class NoteSplit:
  """N notes, one after the other, each cut to the longest that is read, and their labels."""

  ids: Int[np.ndarray, "n"]  # int32, the tokens of all notes
  starts: Int[np.ndarray, "N+1"]  # int64; note i is ids[starts[i]:starts[i + 1]]
  targets: UInt8[np.ndarray, "N L"]  # 1 where the label holds
  texts: Sequence[str]  # the raw text of note i; may be read from a file when it is asked for
  seen: Bool[np.ndarray, "N L"] | None = None  # icd10: said in words that training has, too

  def __post_init__(self):
    count, labels = len(self.starts) - 1, self.targets.shape
    if len(labels) != 2 or labels[0] != count or len(self.texts) != count:
      raise refuse("notes", "have one row of targets and one text each",
                   f"{count} notes, targets {labels}, {len(self.texts)} texts",
                   "see NoteSplit")  # fmt: skip
    if count < 0 or self.starts[0] != 0 or self.starts[-1] != len(self.ids):
      raise refuse("starts", f"go from 0 to the {len(self.ids)} tokens",
                   f"{self.starts[:1]} .. {self.starts[-1:]}", "see NoteSplit")  # fmt: skip
    if self.seen is not None and self.seen.shape != labels:
      raise refuse("seen", f"have the shape of the targets, {labels}", self.seen.shape,
                   "see NoteSplit")  # fmt: skip

  def __len__(self) -> int:
    return len(self.starts) - 1

  def note(self, number: int) -> Int[np.ndarray, "n"]:
    """The tokens of a note, int32."""
    return np.asarray(self.ids[self.starts[number] : self.starts[number + 1]])

  @property
  def lengths(self) -> Int[np.ndarray, "N"]:
    """Tokens of each note, int64."""
    return np.diff(self.starts)


@dataclasses.dataclass(frozen=True)
class NoteSet:
  """All splits. Takes the place of a `Corpus`: there is no tokenizer and no end id."""

  name: str
  splits: Mapping[str, NoteSplit]  # train, validation, test
  labels: tuple[str, ...]  # codes in the order of the columns
  label_names: tuple[str, ...]  # their titles
  vocabulary: Vocabulary
  rules: str  # how texts were cleaned; see cleaning.py
  fingerprint: str  # of what the notes were made from; stored with the position in the data
  embedding: Float[np.ndarray, "V E"] | None = None  # vectors to start from
  note: str = ""  # origin and licence, and what figures measured on these notes must say
  tokenizer: None = None
  end_id: None = None

  @property
  def vocab_size(self) -> int:
    return len(self.vocabulary)

  @functools.cached_property
  def label_counts(self) -> Int[np.ndarray, "L"]:
    """Notes of the train split that have each label, int64."""
    return self.splits["train"].targets.sum(axis=0, dtype=np.int64)

  def describe(self) -> str:
    """One line a split."""
    first = f"data {self.name}, {len(self.labels)} labels, vocabulary {self.vocab_size:,}"
    lines = [f"{first} ({self.note})" if self.note else first]
    for name, split in self.splits.items():
      notes = max(1, len(split))
      lines.append(
        f"  {name}: {len(split):,} notes, {len(split.ids) / notes:.1f} tokens and "
        f"{split.targets.sum() / notes:.2f} labels a note"
      )
    return "\n".join(lines)
