"""Words and their ids: 0 fills up short notes, 1 is every word that is not known."""

import collections
import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int

from attnzoo.experiments.data.errors import refuse

PAD, UNK = 0, 1
# Upper case: cleaned texts have none, so no word of a note can be taken for them.
SPECIAL_WORDS = ("PAD", "UNK")

# As published: two word characters at least, so a letter alone is never known.
_WORD = re.compile(r"\b\w\w+\b")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The known words, sorted; word i has the id i + 2."""

  words: tuple[str, ...]
  stemmer: str = ""  # what made the words of the texts; "" = nothing

  def __post_init__(self):
    if any(a >= b for a, b in zip(self.words, self.words[1:], strict=False)):
      raise refuse("words", "be sorted and different", f"{len(self.words)} words that are not",
                   "Vocabulary.build makes them from texts")  # fmt: skip

  @classmethod
  def build(cls, texts: Iterable[str], min_count: int = 1, stemmer: str = "") -> "Vocabulary":
    """Every word of two letters or more that occurs `min_count` times in cleaned texts."""
    if min_count < 1:
      raise refuse("min_count", "be at least 1", min_count, "1 takes every word")
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
      counts.update(_WORD.findall(text))
    return cls(tuple(sorted(w for w, n in counts.items() if n >= min_count)), stemmer)

  def __len__(self) -> int:
    return len(self.words) + len(SPECIAL_WORDS)

  @functools.cached_property
  def ids(self) -> Mapping[str, int]:
    """Known word -> id."""
    return {word: number for number, word in enumerate(self.words, len(SPECIAL_WORDS))}

  @property
  def rows(self) -> tuple[str, ...]:
    """A name for each id, from 0 on."""
    return (*SPECIAL_WORDS, *self.words)

  def encode(self, words: Iterable[str]) -> Int[np.ndarray, "n"]:
    """int32 ids of words; UNK for those that are not known."""
    known = self.ids
    return np.fromiter((known.get(word, UNK) for word in words), np.int32)

  def save(self, path: str | Path) -> None:
    """Writes words and stemmer as JSON."""
    record = dict(stemmer=self.stemmer, words=self.words)
    Path(path).write_text(json.dumps(record), encoding="utf-8")

  @classmethod
  def load(cls, path: str | Path) -> "Vocabulary":
    """Reads what `save` wrote; raises DataError for anything else."""
    try:
      record = json.loads(Path(path).read_text(encoding="utf-8"))
      vocabulary = cls(tuple(map(str, record["words"])), str(record["stemmer"]))
    except (OSError, ValueError, KeyError, TypeError):
      vocabulary = None  # raised below: the words of patients' notes must not be in a traceback
    if vocabulary is None:
      raise refuse("vocabulary", "be a file that Vocabulary.save wrote", str(path),
                   "delete the folder that it is in, it is written again")  # fmt: skip
    return vocabulary
