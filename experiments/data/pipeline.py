"""Batches: endless shuffled windows to train on, and one exact pass over a held-out split.

A batch is a dictionary of arrays [rows, sequence_length]:
  tokens       int32    inputs
  targets      int32    the next token of each input
  weights      float32  1 where the target counts, else 0
  segment_ids  int32    1, 2, ... in each row, one number a document; 0 only for padding

The end id opens a segment (see `corpus`), so an input and its target are never in two documents:
the target of a document's last token is the end id, which says that the document ends, and the
first token of a document is predicted from the end id. All training windows therefore have weight
1 everywhere. Where token files have no end id, each row is one segment.

Two options of the configuration make the rows of recipes that know no documents: without
`split_documents` there are no segment_ids, and each row is read as one (which lets operators take
their fastest path), without `predict_first` the end id as an input has
weight 0, so that the first token of a document is no target.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from attnzoo.experiments.data.config import DataConfig
from attnzoo.experiments.data.corpus import Corpus, TokenSplit
from attnzoo.experiments.data.errors import refuse

Batch = dict[str, np.ndarray]


class CountedBatches:
  """Endless batches whose number is all that there is to remember; `steps_per_epoch` is theirs."""

  def __init__(self, **identity: Any):
    self._identity = identity
    self.position = 0  # global batches handed out so far

  def __iter__(self) -> Iterator[Batch]:
    return self

  @property
  def steps_per_epoch(self) -> float:
    raise NotImplementedError

  @property
  def epoch(self) -> float:
    return self.position / self.steps_per_epoch

  def get_state(self) -> bytes:
    """The position and what it counts, as JSON."""
    return json.dumps(dict(position=self.position, **self._identity)).encode()

  def set_state(self, state: bytes) -> None:
    """Continues after the batch that was handed out last when the state was taken.

    Raises:
      DataError: the state belongs to other data, or to batches of another size or order.
    """
    self.position = check_identity(state, self._identity)

  def close(self) -> None:
    """There is nothing to end."""


class ShuffledRows:
  """Endless iterator of training batches with a position that can be saved and restored.

  Each epoch visits all rows in a new random order that depends on the seed and the epoch only.
  Global batch number n has the same rows whatever the number of hosts and of workers; each host
  holds a block of them, in the order of `process_index`.

  Args:
    count: rows in all.
    row: (number of a row, epoch) -> its arrays [sequence_length].
    corpus: fingerprint of what the rows are cut from.
    layout: whatever else decides what is in the rows; stored with the position.
  """

  def __init__(
    self,
    count: int,
    row: Callable[[int, int], Batch],
    config: DataConfig,
    *,
    corpus: str,
    process_index: int = 0,
    process_count: int = 1,
    **layout: Any,
  ):
    rows = rows_per_host(config.batch_size, process_index, process_count)
    self.steps_per_epoch = count / config.batch_size
    self._identity = dict(
      corpus=corpus,
      sequence_length=config.sequence_length,
      batch_size=config.batch_size,
      seed=config.seed,
      **layout,
    )
    import grain

    order = grain.MapDataset.range(count).seed(config.seed).shuffle().repeat()

    def assemble(step: int) -> Batch:
      start = step * config.batch_size + rows * process_index
      return stack([row(int(order[i]), i // count) for i in range(start, start + rows)])

    # Threads, not processes: the arrays are shared, and the position stays one number that does
    # not depend on how many work ahead of it.
    options = grain.ReadOptions(
      num_threads=config.workers, prefetch_buffer_size=max(config.prefetch, config.workers)
    )
    steps = grain.MapDataset.range(sys.maxsize // config.batch_size)
    self._batches = iter(steps.map(assemble).to_iter_dataset(options))

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    return next(self._batches)

  @property
  def position(self) -> int:
    """Global batches handed out so far."""
    return self._batches.get_state()["next_index"]

  @property
  def epoch(self) -> float:
    return self.position / self.steps_per_epoch

  @property
  def tokens_per_step(self) -> float:
    """Positions of a batch over all hosts."""
    return self._identity["batch_size"] * self._identity["sequence_length"]

  def get_state(self) -> bytes:
    """The position and what it counts, as JSON."""
    return json.dumps(dict(position=self.position, **self._identity)).encode()

  def set_state(self, state: bytes) -> None:
    """Continues after the batch that was handed out last when the state was taken.

    Raises:
      DataError: the state belongs to other data, or to batches of another shape or order.
    """
    position = check_identity(state, self._identity)
    self._batches.set_state({"next_index": position})

  def close(self) -> None:
    """Ends the worker threads."""
    self._batches.close()


class TrainBatches(ShuffledRows):
  """Training batches of a stream.

  Each epoch cuts the stream at a new random offset into windows of `sequence_length` + 1 tokens
  that overlap by one; fewer than two windows' worth of tokens at the ends of the stream are left
  out, others in each epoch.
  """

  def __init__(
    self, corpus: Corpus, config: DataConfig, *, process_index: int = 0, process_count: int = 1
  ):
    tokens, length = corpus.train.tokens, config.sequence_length
    windows, slack = _windows(len(tokens), length)
    first_offset = functools.lru_cache(4)(functools.partial(_epoch_offset, config.seed, slack))

    def row(number: int, epoch: int) -> Batch:
      at = first_offset(epoch) + number * length
      return _row(tokens[at : at + length + 1], corpus.end_id, config)

    super().__init__(
      windows, row, config, corpus=corpus.fingerprint,
      process_index=process_index, process_count=process_count,
    )  # fmt: skip


class EvaluationBatches:
  """One pass over a split, in order: every token but the first is the target exactly once.

  Rows start with an empty state. `overlap` tokens at the start of each row but the first repeat
  the end of the row before with weight 0, which gives the targets at least that much context.
  What is left of the last batch is padding. Hosts hold blocks of rows as in training, and
  equally many batches. Can be iterated any number of times.

  Attributes:
    targets: targets that count, over all hosts.
    target_bytes: UTF-8 bytes that these stand for; None for token files without a tokenizer.
      Sum of losses in nats / (ln 2 * target_bytes) = bits per byte.
    target_words: words that they stand for; None where only a part of the split is taken, or where
      the source does not count them. exp(sum of losses / target_words) = perplexity of a word.
  """

  def __init__(
    self,
    corpus: Corpus,
    config: DataConfig,
    *,
    split: str = "validation",
    max_tokens: int | None = None,
    overlap: int = 0,
    process_index: int = 0,
    process_count: int = 1,
  ):
    check_choice(corpus.splits, split, max_tokens)
    if not 0 <= overlap < config.sequence_length:
      raise refuse("overlap", f"lie in 0..{config.sequence_length - 1}", overlap,
                   "it is part of the sequence length")  # fmt: skip
    content = corpus.splits[split]
    self._positions = min(len(content.tokens) - 1, max_tokens or len(content.tokens))
    self._tokens = content.tokens[: self._positions + 1]
    self._end_id, self._config = corpus.end_id, config
    counted = slice(None)  # of the targets, [positions]
    if not config.predict_first and corpus.end_id is not None:
      counted = np.asarray(self._tokens[:-1]) != corpus.end_id
    self.targets = len(self._tokens[1:][counted])
    self.target_bytes = _target_bytes(corpus, content, self._positions, counted)
    whole = self.targets == len(content.tokens) - 1
    self.target_words = content.words if whole else None
    self._length, self._overlap = config.sequence_length, overlap
    self._batch_size = config.batch_size
    self._host_rows = rows_per_host(config.batch_size, process_index, process_count)
    self._first_row = self._host_rows * process_index

  def __len__(self) -> int:
    stride = self._length - self._overlap
    rows = 1 + -(-max(0, self._positions - self._length) // stride)
    return -(-rows // self._batch_size)

  def __iter__(self) -> Iterator[Batch]:
    for batch in range(len(self)):
      first = batch * self._batch_size + self._first_row
      yield stack([self._row(first + i) for i in range(self._host_rows)])

  def _row(self, number: int) -> Batch:
    start = number * (self._length - self._overlap)
    ids = self._tokens[start : start + self._length + 1]
    filled = max(0, len(ids) - 1)  # positions with a target
    if number and filled <= self._overlap:  # nothing new: behind the last target
      filled = 0
    padded = _padding(self._length, self._config)
    if filled:
      for name, values in _row(ids, self._end_id, self._config).items():
        padded[name][:filled] = values
    padded["weights"][: self._overlap if number else 0] = 0
    return padded


class OrderedRows:
  """One pass over the numbered rows of a split, with the interface of `EvaluationBatches`.

  `max_tokens` counts positions; rows are taken whole. What is left of the last batch is empty rows.

  Args:
    splits: by name.
    rows: a split -> its rows, with a length and a row (arrays [sequence_length]) by number; behind
      the last one come empty rows.
  """

  target_bytes = target_words = None

  def __init__(
    self,
    splits: Mapping[str, Any],
    rows: Callable[[Any], Any],
    config: DataConfig,
    *,
    split: str = "validation",
    max_tokens: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
  ):
    check_choice(splits, split, max_tokens)
    self._row = rows(splits[split])
    self._count = len(self._row)
    if max_tokens is not None:
      self._count = min(self._count, -(-max_tokens // config.sequence_length))
    self._batch_size = config.batch_size
    self._host_rows = rows_per_host(config.batch_size, process_index, process_count)
    self._first_row = self._host_rows * process_index

  def __len__(self) -> int:
    return -(-self._count // self._batch_size)

  def __iter__(self) -> Iterator[Batch]:
    for batch in range(len(self)):
      first = batch * self._batch_size + self._first_row
      numbers = range(first, first + self._host_rows)
      yield stack([self._row(n if n < self._count else len(self._row)) for n in numbers])


def bits_per_byte(nats: float, target_bytes: int) -> float:
  """Sum of the losses of all targets, in nats, as bits per byte of the text."""
  return nats / (np.log(2) * target_bytes)


def check_identity(state: bytes, identity: dict[str, Any]) -> int:
  """The position in a state of `get_state`, which must be of the same data in the same batches."""
  stored = json.loads(state)
  position = stored.pop("position")
  different = [key for key, value in identity.items() if stored.get(key) != value]
  if different:
    raise refuse("set_state", f"get a state of these data {_some(identity, different)}",
                 _some(stored, different),
                 "resume with the settings of the checkpoint, or start a new run")  # fmt: skip
  return position


def rows_per_host(batch_size: int, process_index: int, process_count: int) -> int:
  if not 0 <= process_index < process_count:
    raise refuse("process_index", f"lie in 0..{process_count - 1}", process_index, "count from 0")
  if batch_size % process_count:
    raise refuse("batch_size", f"be a multiple of the {process_count} hosts", batch_size,
                 "it counts the rows of all hosts")  # fmt: skip
  return batch_size // process_count


def check_choice(splits: Mapping[str, Any], split: str, max_tokens: int | None) -> None:
  if split not in splits:
    raise refuse("split", f"be one of {sorted(splits)}", repr(split), "see the source")
  if max_tokens is not None and max_tokens < 1:
    raise refuse("max_tokens", "be at least 1", max_tokens, "None takes the whole split")


def _windows(tokens: int, length: int) -> tuple[int, int]:
  """Windows an epoch and the largest offset of the first one."""
  if tokens < length + 1:
    raise refuse("sequence_length", f"be below the {tokens} tokens of the train split", length,
                 "shorten it or give more text")  # fmt: skip
  windows = max(1, tokens // length - 1)
  return windows, min(length - 1, tokens - 1 - windows * length)


def _epoch_offset(seed: int, slack: int, epoch: int) -> int:
  return int(np.random.default_rng([seed, epoch]).integers(slack + 1))


def _row(ids: Int[np.ndarray, "n"], end_id: int | None, config: DataConfig) -> Batch:
  """Inputs, targets, weights and segments of n tokens: arrays [n - 1]."""
  ids = np.asarray(ids).astype(np.int32)
  tokens, targets = ids[:-1], ids[1:]
  weights = np.ones(len(tokens), np.float32)
  if end_id is not None and not config.predict_first:
    weights[tokens == end_id] = 0
  row = dict(tokens=tokens, targets=targets, weights=weights)
  if not config.split_documents:
    return row
  segments = np.ones(len(tokens), np.int32)
  if end_id is not None:
    np.cumsum(tokens == end_id, out=segments)
    segments += 1 - segments[0]  # the row may start inside a document
  return row | dict(segment_ids=segments)


def stack(rows: list[Batch]) -> Batch:
  """Rows below each other."""
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _padding(length: int, config: DataConfig) -> Batch:
  names = ("tokens", "targets", *(("segment_ids",) if config.split_documents else ()))
  integers = {name: np.zeros(length, np.int32) for name in names}
  return integers | dict(weights=np.zeros(length, np.float32))


def _target_bytes(corpus: Corpus, split: TokenSplit, positions: int, counted) -> int | None:
  """UTF-8 bytes of the targets that `counted` picks of the first so many."""
  if split.token_bytes is not None:
    return int(split.token_bytes[1 : positions + 1][counted].sum(dtype=np.int64))
  if corpus.tokenizer is None:
    return None
  return len(corpus.tokenizer.decode(split.tokens[1 : positions + 1][counted]).encode())


def _some(values: dict[str, Any], keys: list[str]) -> dict[str, Any]:
  return {key: values.get(key) for key in keys}
