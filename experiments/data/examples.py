"""Ready-made examples instead of a stream of text: each row stands for itself.

A batch of examples with up to n targets each is a dictionary:
  tokens   int32    [rows, T]
  places   int32    [rows, n]  positions of the targets
  targets  int32    [rows, n]
  weights  float32  [rows, n]  of a row they sum to 1, so that accuracy means: of each example the
                               share of its targets that were right, averaged over examples;
                               0 in empty rows, and for what fills up the targets
Blocks of one length are filled up to one n, so that programs are compiled once per length.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from jaxtyping import Int

from attnzoo.experiments.data.config import DataConfig
from attnzoo.experiments.data.errors import refuse
from attnzoo.experiments.data.pipeline import Batch, CountedBatches, rows_per_host

NO_TARGET = -100  # label of positions that nothing is asked at, as in the published code


@dataclasses.dataclass(frozen=True)
class ExampleBlock:
  """Examples of equal length and equally many targets."""

  name: str
  tokens: Int[np.ndarray, "N T"]
  labels: Int[np.ndarray, "N T"]  # NO_TARGET where there is no target

  def __len__(self) -> int:
    return len(self.tokens)

  @property
  def length(self) -> int:
    return self.tokens.shape[1]

  @property
  def targets_per_row(self) -> int:
    return int((self.labels[0] != NO_TARGET).sum())

  def targets_of(
    self, rows: slice = slice(None)
  ) -> tuple[Int[np.ndarray, "N n"], Int[np.ndarray, "N n"]]:
    """(positions of the targets, the targets) of some rows, from left to right."""
    labels = self.labels[rows]
    places = np.nonzero(labels != NO_TARGET)[1].astype(np.int32)
    places = places.reshape(len(labels), self.targets_per_row)
    return places, np.take_along_axis(labels, places, axis=1)


@dataclasses.dataclass(frozen=True)
class ExampleSet:
  """All splits. Takes the place of a `Corpus`: there is no tokenizer and no end id."""

  name: str
  splits: Mapping[str, tuple[ExampleBlock, ...]]
  vocab_size: int
  fingerprint: str  # of what the examples were made from; stored with the position in the data
  tokenizer: None = None
  end_id: None = None

  def describe(self) -> str:
    """One line a split, one a block."""
    lines = [f"data {self.name}, vocabulary {self.vocab_size:,}"]
    for name, blocks in self.splits.items():
      lines += [f"  {name}: {len(block):,} examples of {block.name}" for block in blocks]
    return "\n".join(lines)


class ExampleBatches(CountedBatches):
  """Endless iterator of training batches, with the interface of `pipeline.TrainBatches`.

  No batch mixes blocks; the last one of a block is filled up with rows of weight 0. Every epoch
  visits all batches: in the order of the examples, or (config.mqar_order "mixed") in a new
  random order of batches that depends on the seed and the epoch only.
  """

  def __init__(
    self, examples: ExampleSet, config: DataConfig, *, process_index: int = 0,
    process_count: int = 1,
  ):  # fmt: skip
    self._rows = rows_per_host(config.batch_size, process_index, process_count)
    self._offset, self._batch_size = self._rows * process_index, config.batch_size
    blocks = examples.splits["train"]
    self._targets = target_counts(blocks)
    self._order = [
      (block, start) for block in blocks for start in range(0, len(block), config.batch_size)
    ]
    self._seed = config.seed if config.mqar_order == "mixed" else None
    super().__init__(
      corpus=examples.fingerprint,
      batch_size=config.batch_size,
      seed=config.seed,
      order=config.mqar_order,
    )

  def __next__(self) -> Batch:
    epoch, number = divmod(self.position, len(self._order))
    if self._seed is not None:
      number = np.random.default_rng([self._seed, epoch]).permutation(len(self._order))[number]
    self.position += 1
    block, start = self._order[number]
    return batch_of(block, start + self._offset, self._rows, self._targets[block.length])

  @property
  def steps_per_epoch(self) -> float:
    return len(self._order)

  @property
  def tokens_per_step(self) -> float:
    """Positions of a batch over all hosts, on average."""
    lengths = [block.length for block, _ in self._order]
    return self._batch_size * sum(lengths) / len(lengths)


class ExampleEvaluation:
  """One pass over a split in order, with the interface of `pipeline.EvaluationBatches`.

  `max_tokens` positions or a few more are taken, of every block the same share.
  """

  target_bytes = target_words = None

  def __init__(
    self,
    examples: ExampleSet,
    config: DataConfig,
    *,
    split: str = "validation",
    max_tokens: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
  ):
    if split not in examples.splits:
      raise refuse("split", f"be one of {sorted(examples.splits)}", repr(split), "see the source")
    if max_tokens is not None and max_tokens < 1:
      raise refuse("max_tokens", "be at least 1", max_tokens, "None takes the whole split")
    blocks = examples.splits[split]
    everything = sum(block.tokens.size for block in blocks)
    share = min(1.0, (max_tokens or everything) / everything)
    self._blocks = [
      dataclasses.replace(
        block,
        tokens=block.tokens[: _part(block, share)],
        labels=block.labels[: _part(block, share)],
      )
      for block in blocks
    ]
    self.targets = sum(len(block) * block.targets_per_row for block in self._blocks)
    self._batch_size = config.batch_size
    self._rows = rows_per_host(config.batch_size, process_index, process_count)
    self._offset = self._rows * process_index

  def __len__(self) -> int:
    return sum(-(-len(block) // self._batch_size) for block in self._blocks)

  def __iter__(self) -> Iterator[Batch]:
    targets = target_counts(self._blocks)
    for block in self._blocks:
      for start in range(0, len(block), self._batch_size):
        yield batch_of(block, start + self._offset, self._rows, targets[block.length])


def target_counts(blocks: Iterable[ExampleBlock]) -> dict[int, int]:
  """Length -> most targets that a row of this length has."""
  counts: dict[int, int] = {}
  for block in blocks:
    counts[block.length] = max(block.targets_per_row, counts.get(block.length, 0))
  return counts


def _part(block: ExampleBlock, share: float) -> int:
  return max(1, int(np.ceil(len(block) * share)))


def batch_of(block: ExampleBlock, start: int, rows: int, targets_per_row: int) -> Batch:
  """Rows from `start` on, filled up to so many rows and targets."""
  tokens = block.tokens[start : start + rows]  # fewer at the end of the block
  places, targets = block.targets_of(slice(start, start + rows))
  weights = np.full(targets.shape, 1 / block.targets_per_row, np.float32)
  arrays = dict(tokens=tokens, places=places, targets=targets, weights=weights)
  sizes = dict.fromkeys(("places", "targets", "weights"), targets_per_row)
  return {
    name: np.pad(x, ((0, rows - len(x)), (0, sizes.get(name, x.shape[1]) - x.shape[1])))
    for name, x in arrays.items()
  }
