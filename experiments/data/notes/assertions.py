"""Embedded task: which diagnoses does a made-up note assert, and which does it only mention?

A note mentions diagnoses in the words of ICD-10-CM: some as found, some as denied, excluded or a
relative's. The labels of a note are the categories of what it asserts. A bag of words does not
solve this: siblings of a category share most words, and a mention counts only with its cue, which
stands before or behind it and may be shared by several mentions. In the held-out splits half of
the mentions use phrases that training never has.

The phrases are shipped (icd10_phrases.json.gz). They are titles and inclusion terms of ICD-10-CM,
April 2026 release, of the National Center for Health Statistics (CDC) and the Centers for Medicare
& Medicaid Services, read from the package simple-icd-10-cm 1.5.0 ((c) Stefano Travasci, MIT); the
file carries the notice, `make_icd10_phrases.py` rebuilds it. Everything else is invented here.

The notes never change: they are a function of that table, of this file and of the generator behind
random.Random.random, whose numbers Python promises to keep.
"""

import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple, TypeVar

import numpy as np

from attnzoo.experiments.data.documents import digest
from attnzoo.experiments.data.errors import refuse, suggest
from attnzoo.experiments.data.notes.cleaning import clean, stemmer_name
from attnzoo.experiments.data.notes.sets import NoteSet, NoteSplit
from attnzoo.experiments.data.notes.vocabulary import Vocabulary

T = TypeVar("T")

_LAYOUT = 1  # raise it when other notes or tokens come of the same table
SEEDS = dict(train=1, validation=2, test=3)

# Blocks of siblings.
_BLOCKS = """
E08 E09 E11 E13 E16|I20 I21 I22 I24 I25|K25 K26 K27 K28 K29|J10 J11 J15 J44 J45|N03 N04 N05 N17 N18
I60 I61 I63 I65 I66|I05 I06 I07 I34 I35|C81 C82 C83 C84 C85|F10 F11 F13 F14 F15|D50 D51 D52 D55 D56
""".strip().replace("\n", "|")
_EASY = tuple(tuple(block.split()) for block in _BLOCKS.split("|"))
_HARD = (("E08", "E09", "E10", "E11", "E13"), *_EASY[1:])
ALL_LABELS = tuple(sorted({code for block in (*_EASY, *_HARD) for code in block}))


class Difficulty(NamedTuple):
  """How notes are drawn. Means are of Poisson distributions."""

  blocks: tuple[tuple[str, ...], ...]
  sizes: Mapping[str, int]  # notes of each split
  positives: float  # labels that hold, 1 to `most`
  most: int
  negatives: float  # labels drawn to be only mentioned; those drawn before are left out
  outside: float  # mentions of no label: so many that hold, as many that do not
  fillers: float  # sentences about something else
  lists: tuple[float, ...]  # shares of frames with 1, 2, ... phrases


# Official cleaning drops numbers, and with them what tells E10 (diabetes of type 1) from E11, so
# the hard task cannot be solved without error. The longer notes and lists are the other part of it.
DIFFICULTIES = {
  "easy": Difficulty(_EASY, dict(train=12_000, validation=800, test=1600),
                     3.0, 8, 3.2, 0.7, 2.0, (0.7, 0.3)),
  "hard": Difficulty(_HARD, dict(train=8000, validation=800, test=1600),
                     4.5, 12, 6.0, 1.2, 3.5, (0.5, 0.3, 0.2)),
}  # fmt: skip

HELD_OUT = 0.3  # share of a label's phrases that training never has
_FROM_HELD_OUT = 0.5  # share of the mentions of other splits that use them
_SIBLING = 0.3  # chance that a label that holds is followed by one of its siblings
_NEGATED_SIBLING = 0.5  # share of the other labels that are siblings of one that holds
_CUE_FIRST = 0.6

# Each cue has a word that survives the official cleaning and that no cue of the other polarity has.
CUES = {
  (True, "before"): (
    "admitted with", "treated for", "presented with", "diagnosed with", "found to have", "known",
    "worsening",
  ),
  (True, "behind"): (
    "confirmed", "demonstrated on imaging", "managed medically", "remains active",
  ),
  (False, "before"): (
    "denies", "negative for", "mother had", "father died of", "screened for", "absence of",
    "low suspicion for",
  ),
  (False, "behind"): (
    "ruled out", "considered unlikely", "excluded by imaging", "never documented",
  ),
}  # fmt: skip

_FILLERS = (
  "Vital signs were stable overnight and she slept through",
  "Lives with her husband and two cats in a small house",
  "Works as a carpenter and drives a truck",
  "Tolerated a regular diet and drank plenty of water",
  "Ambulated in the hallway with a walker twice",
  "Temp 98.6, BP 128/74, pulse 72, comfortable at rest",
  "Appetite improved over the weekend, weight 81.4 kg",
  "Will see the primary care doctor in 2 weeks",
  "Home pills were continued in the usual doses",
  "Pain was controlled with tablets every 6 hours",
  "The nurse explained the papers and gave a printed plan",
  "IV fluids were given at 75 ml/hr until the evening shift",
  "Oxygen was weaned to room air on the second morning",
  "Allergic to penicillin, which gave a rash in childhood",
  "Interpreter was present during rounds",
  "Physical therapy came by and recommended exercises",
  "Family meeting was held on 3-West with the social worker",
  "Foley was taken out on day 2, voiding freely",
  "Labs were drawn in the morning",
  "Skin was warm and dry, speech clear and fluent",
  "Hearing aids and glasses were left at home",
  "Asked to follow the low salt plan",
  "Transferred to the floor by stretcher",
  "Heart sounds regular, abdomen soft, bowel sounds heard",
  "Drove here by himself after calling the clinic",
  "Retired teacher, walks a mile every day",
  "Insurance forms were signed and copied",
  "Bed alarm was set, call light within reach",
)  # fmt: skip


class Phrases(NamedTuple):
  """Phrases of one label: those of training, and those that only the other splits have."""

  known: tuple[str, ...]
  held_out: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Note:
  """A note and what it asserts: label -> the phrase that says so."""

  text: str
  asserted: Mapping[str, str]


@functools.cache
def phrase_table() -> dict[str, Any]:
  """The shipped table; see make_icd10_phrases.py for its form."""
  file = resources.files(__package__).joinpath("icd10_phrases.json.gz")
  return json.loads(gzip.decompress(file.read_bytes()))


def divide(owner: str, phrases: Sequence[str]) -> Phrases:
  """Holds phrases out by their MD5 together with the label: it depends on no other phrase."""

  def held_out(phrase: str) -> bool:
    hashed = hashlib.md5(f"{owner}\t{phrase}".encode(), usedforsecurity=False).digest()
    return int.from_bytes(hashed[:8], "big") < HELD_OUT * 2**64

  parts = {side: tuple(p for p in phrases if held_out(p) == side) for side in (False, True)}
  return Phrases(parts[False], parts[True])


def label_phrases(labels: Iterable[str], held_out: bool = False) -> dict[str, tuple[str, ...]]:
  """Label -> its phrases of training, or (held_out) all of them."""
  table = phrase_table()["labels"]
  parts = {code: divide(code, table[code]["phrases"]) for code in labels}
  return {code: part.known + part.held_out * held_out for code, part in parts.items()}


class Draw:
  """Random choices that only use uniform numbers, which stay the same for ever."""

  def __init__(self, seed: int):
    self.uniform = random.Random(seed).random

  def below(self, count: int) -> int:
    return int(self.uniform() * count)

  def pick(self, choices: Sequence[T]) -> T:
    return choices[self.below(len(choices))]

  def poisson(self, mean: float) -> int:
    count, share, left = 0, math.exp(-mean), self.uniform()
    while left >= share and count < 100:
      left, count = left - share, count + 1
      share *= mean / count
    return count

  def by_share(self, cumulative: Sequence[float]) -> int:
    """Index i with probability cumulative[i] - cumulative[i - 1], of the last."""
    place = self.uniform() * cumulative[-1]
    return next(i for i, edge in enumerate(cumulative) if place < edge)

  def shuffled(self, items: Sequence[T]) -> list[T]:
    result = list(items)
    for last in range(len(result) - 1, 0, -1):
      other = self.below(last + 1)
      result[last], result[other] = result[other], result[last]
    return result


def make_notes(difficulty: str, split: str, count: int | None = None) -> list[Note]:
  """The first `count` notes of a split (None: all); fewer are always the start of more.

  Args:
    difficulty: a key of DIFFICULTIES.
    split: train, validation or test.

  Raises:
    DataError: there is no such difficulty or split.
  """
  task = _task(difficulty)
  if split not in SEEDS:
    raise refuse("split", "be known", repr(split), suggest(split, SEEDS))
  labels = [code for block in task.blocks for code in block]
  table = phrase_table()
  phrases = {code: divide(code, table["labels"][code]["phrases"]) for code in labels}
  phrases[""] = divide("", table["outside"])
  labels.sort(key=lambda code: hashlib.md5(code.encode(), usedforsecurity=False).digest())
  law = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(labels))))
  siblings = {
    code: tuple(other for other in block if other != code)
    for block in task.blocks
    for code in block
  }
  draw = Draw(SEEDS[split])

  def said(code: str) -> str:
    known, held_out = phrases[code]
    unheard = split != "train" and draw.uniform() < _FROM_HELD_OUT and held_out
    return draw.pick(held_out if unheard else known)

  def note() -> Note:
    positive, negative = _labels(task, draw, lambda: labels[draw.by_share(law)], siblings)
    asserted = {code: said(code) for code in positive}
    mentions = {
      True: [*asserted.values(), *(said("") for _ in range(draw.poisson(task.outside)))],
      False: [said(code) for code in (*negative, *[""] * draw.poisson(task.outside))],
    }
    sentences = [
      text for side, found in mentions.items() for text in _frames(draw, task, side, found)
    ]
    sentences += [draw.pick(_FILLERS) for _ in range(draw.poisson(task.fillers))]
    text = " ".join(f"{line[0].upper()}{line[1:]}." for line in draw.shuffled(sentences))
    return Note(text, asserted)

  return [note() for _ in range(task.sizes[split] if count is None else count)]


def _task(difficulty: str) -> Difficulty:
  if difficulty not in DIFFICULTIES:
    raise refuse("difficulty", "be known", repr(difficulty), suggest(difficulty, DIFFICULTIES))
  return DIFFICULTIES[difficulty]


def _labels(
  task: Difficulty, draw: Draw, any_label: Callable[[], str], siblings: Mapping[str, Sequence[str]]
) -> tuple[list[str], list[str]]:
  """The labels that hold, and those that are mentioned but do not."""
  positive: list[str] = []
  count = min(task.most, max(1, draw.poisson(task.positives)))
  while len(positive) < count:
    near = positive and draw.uniform() < _SIBLING
    code = draw.pick(siblings[positive[-1]]) if near else any_label()
    if code not in positive:
      positive.append(code)
  negative: list[str] = []
  for _ in range(draw.poisson(task.negatives)):
    near = draw.uniform() < _NEGATED_SIBLING
    code = draw.pick(siblings[draw.pick(positive)]) if near else any_label()
    if code not in positive and code not in negative:  # or else there is one mention less
      negative.append(code)
  return positive, negative


def _frames(draw: Draw, task: Difficulty, positive: bool, phrases: Sequence[str]) -> list[str]:
  """Sentences of one polarity that hold all the phrases."""
  left, sentences = draw.shuffled(phrases), []
  shares = list(itertools.accumulate(task.lists))
  while left:
    size = 1 + draw.by_share(shares)
    listed, left = left[:size], left[size:]
    what = " and ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)
    side = "before" if draw.uniform() < _CUE_FIRST else "behind"
    cue = draw.pick(CUES[positive, side])
    sentences.append(f"{cue} {what}" if side == "before" else f"{what} {cue}")
  return sentences


def load_assertions(
  difficulty: str = "easy",
  *,
  rules: str = "official",
  longest: int = 512,
  sizes: Mapping[str, int] | None = None,
) -> NoteSet:
  """Makes, cleans and encodes the notes.

  Args:
    difficulty: a key of DIFFICULTIES.
    rules: of `clean`.
    longest: tokens of a note that are kept.
    sizes: notes of each split, where fewer than usual are wanted.

  Raises:
    DataError: unknown difficulty or rules; the package for stems is missing.
  """
  task, table = _task(difficulty), phrase_table()["labels"]
  labels = tuple(sorted(code for block in task.blocks for code in block))
  known = {code: {_words(p, rules) for p in own} for code, own in label_phrases(labels).items()}
  notes = {name: make_notes(difficulty, name, size) for name, size in (sizes or task.sizes).items()}
  cleaned = {name: [clean(note.text, rules) for note in split] for name, split in notes.items()}
  vocabulary = Vocabulary.build(cleaned["train"], min_count=2, stemmer=stemmer_name(rules))
  splits = {}
  for name, split in notes.items():
    ids = [vocabulary.encode(text.split())[:longest] for text in cleaned[name]]
    targets = np.array([[code in n.asserted for code in labels] for n in split], np.uint8)
    seen = np.array(
      [
        [c in n.asserted and _words(n.asserted[c], rules) in known[c] for c in labels]
        for n in split
      ]
    )
    starts = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    splits[name] = NoteSplit(
      np.concatenate(ids).astype(np.int32), starts, targets, tuple(n.text for n in split), seen
    )
  contents = [digest(*split.texts) for split in splits.values()]
  return NoteSet(
    name=f"icd10-assertions ({difficulty})",
    splits=splits,
    labels=labels,
    label_names=tuple(table[code]["title"] for code in labels),
    vocabulary=vocabulary,
    rules=rules,
    fingerprint=digest(_LAYOUT, difficulty, rules, longest, *vocabulary.words, *contents),
    note="made-up notes in the words of ICD-10-CM; no patient's text",
  )


@functools.lru_cache(1 << 14)
def _words(phrase: str, rules: str) -> tuple[str, ...]:
  return tuple(clean(phrase, rules).split())
