"""Batches of notes: those of like length together, so that little of a batch is filling.

A batch of B notes is a dictionary:
  tokens   int32    [rows, S']  0 behind the end of a note
  targets  float32  [rows, L]   1 where the label holds
  weights  float32  [rows, 1]   0 for rows that fill up the last batch of a pass
S' is the longest note of the batch (over all hosts), rounded up to one of four lengths that depend
on the longest note of the set, so that programs are compiled four times at most.
"""

import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from attnzoo.experiments.data.config import DataConfig
from attnzoo.experiments.data.errors import refuse
from attnzoo.experiments.data.notes.sets import NoteSet, NoteSplit
from attnzoo.experiments.data.pipeline import Batch, CountedBatches, check_choice, rows_per_host

_BUCKETS = 4
_MULTIPLE = 16  # of the lengths but the limit: what kernels' tiles divide
_POOL = 32  # batches whose notes are sorted by length


class NoteBatches(CountedBatches):
  """Endless iterator of training batches, with the interface of `pipeline.TrainBatches`.

  An epoch shuffles all notes, cuts them into pools of 32 batches, sorts each pool by length and
  shuffles its batches: every note comes once, and which ones and in what order depends on the seed
  and the epoch only. The last batch of a pass is filled up with rows of weight 0, or, with
  `drop_remainder`, the shortest notes of the split are left out for good.
  """

  def __init__(
    self, notes: NoteSet, config: DataConfig, *, process_index: int = 0, process_count: int = 1
  ):
    self._split, self._config = notes.splits["train"], config
    self._rows = rows_per_host(config.batch_size, process_index, process_count)
    self._first_row = self._rows * process_index
    self._numbers = kept_notes(self._split, config)
    self._lengths = bucket_lengths(notes, config)
    self._epoch_order = functools.lru_cache(2)(self._order)
    super().__init__(
      corpus=notes.fingerprint,
      sequence_length=config.sequence_length,
      batch_size=config.batch_size,
      seed=config.seed,
      drop_remainder=config.drop_remainder,
    )

  def __next__(self) -> Batch:
    epoch, number = divmod(self.position, self.steps_per_epoch)
    self.position += 1
    rows = slice(self._first_row, self._first_row + self._rows)
    return batch_of(self._split, self._epoch_order(epoch)[number], self._lengths, rows)

  @property
  def steps_per_epoch(self) -> int:
    return -(-len(self._numbers) // self._config.batch_size)

  @functools.cached_property
  def tokens_per_step(self) -> float:
    """Positions of a batch over all hosts, filling included, on average over the first epoch."""
    lengths = self._split.lengths
    widths = [padded_length(lengths[batch], self._lengths) for batch in self._epoch_order(0)]
    return float(self._config.batch_size * np.mean(widths))

  def _order(self, epoch: int) -> list[Int[np.ndarray, "n"]]:
    """The notes of each batch of an epoch."""
    draw = np.random.default_rng([self._config.seed, epoch])
    size, batches = self._config.batch_size, []
    shuffled = self._numbers[draw.permutation(len(self._numbers))]
    for start in range(0, len(shuffled), _POOL * size):
      pool = shuffled[start : start + _POOL * size]
      pool = pool[np.argsort(self._split.lengths[pool], kind="stable")]
      cut = [pool[i : i + size] for i in range(0, len(pool), size)]
      batches += [cut[i] for i in draw.permutation(len(cut))]
    return batches


class NoteEvaluation:
  """One pass over a split in its own order, with the interface of `pipeline.EvaluationBatches`.

  `max_tokens` tokens or a few more are taken: notes are taken whole. With `drop_remainder` the
  shortest notes are left out instead of filling up the last batch.

  Attributes:
    numbers: the notes of the split in the order in which they come; row i of the pass (rows of
      weight 0 aside) is note numbers[i].
    targets: decisions that count, notes times labels.
  """

  target_bytes = target_words = None

  def __init__(
    self,
    notes: NoteSet,
    config: DataConfig,
    *,
    split: str = "validation",
    max_tokens: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
  ):
    check_choice(notes.splits, split, max_tokens)
    self._split, self._config = notes.splits[split], config
    self._lengths = bucket_lengths(notes, config)
    numbers = kept_notes(self._split, config)
    if max_tokens is not None:
      before = np.cumsum(self._split.lengths[numbers]) - self._split.lengths[numbers]
      numbers = numbers[before < max_tokens]
    self.numbers = numbers  # int64 [n]
    self.targets = len(numbers) * len(notes.labels)
    self._host_rows = rows_per_host(config.batch_size, process_index, process_count)
    self._first_row = self._host_rows * process_index

  def __len__(self) -> int:
    return -(-len(self.numbers) // self._config.batch_size)

  def __iter__(self) -> Iterator[Batch]:
    size = self._config.batch_size
    rows = slice(self._first_row, self._first_row + self._host_rows)
    for start in range(0, len(self.numbers), size):
      chosen = self.numbers[start : start + size]
      yield batch_of(self._split, chosen, self._lengths, rows)


def kept_notes(split: NoteSplit, config: DataConfig) -> Int[np.ndarray, "n"]:
  """The notes that are read, in the order of the split: all, or as many as fill batches.

  Raises:
    DataError: no note is left.
  """
  count = len(split)
  if config.drop_remainder:
    count -= count % config.batch_size
  if not count:
    raise refuse("batch_size", "leave notes in each split", f"{config.batch_size} for {len(split)}",
                 "make it smaller, or keep the remainder")  # fmt: skip
  longest_first = np.argsort(-split.lengths, kind="stable")
  return np.sort(longest_first[:count])


def bucket_lengths(notes: NoteSet, config: DataConfig) -> tuple[int, ...]:
  """At most four lengths that rows are filled up to, the last one for the longest note of all."""
  longest = max(1, *(int(split.lengths.max(initial=1)) for split in notes.splits.values()))
  if longest > config.sequence_length:
    raise refuse("sequence_length", f"be at least {longest}, as when the notes were read",
                 config.sequence_length, "load the notes with this configuration")  # fmt: skip
  shares = (longest * part / _BUCKETS for part in range(1, _BUCKETS + 1))
  rounded = (int(-(-share // _MULTIPLE) * _MULTIPLE) for share in shares)
  return tuple(sorted({min(length, config.sequence_length) for length in rounded}))


def padded_length(lengths: Int[np.ndarray, "n"], buckets: tuple[int, ...]) -> int:
  """The shortest bucket that holds notes of these lengths."""
  return buckets[int(np.searchsorted(buckets, lengths.max(initial=0)))]


def batch_of(
  split: NoteSplit,
  numbers: Int[np.ndarray, "n"],
  buckets: tuple[int, ...],
  rows: slice,
) -> Batch:
  """The rows of one host of the batch that holds these notes; rows behind the last are empty."""
  width = padded_length(split.lengths[numbers], buckets)
  mine = numbers[rows]  # fewer at the end of a pass
  count = rows.stop - rows.start
  tokens = np.zeros((count, width), np.int32)
  targets = np.zeros((count, split.targets.shape[1]), np.float32)
  weights = np.zeros((count, 1), np.float32)
  for row, number in enumerate(mine):
    note = split.note(number)
    tokens[row, : len(note)] = note
  targets[: len(mine)] = split.targets[mine]
  weights[: len(mine)] = 1
  return dict(tokens=tokens, targets=targets, weights=weights)
