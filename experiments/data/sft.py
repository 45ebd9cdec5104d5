"""Prompts with answers, for fine-tuning: only the answers are learned.

An example is prompt + answer + end id. A row holds one example (the layout of RAT's fine-tuning),
or with `sft_pack` as many as fit, each a segment of its own; only then are there segment_ids.
Inputs are all tokens of an example but the last one, targets the tokens after them; of these the
answer and the end id have weight 1. What is left of a row is padding: end ids of weight 0, and of
segment 0.

Prompt and answer of more than T - 1 tokens, T the length of a row, lose their middle: the first
(T - 1) // 2 tokens stay, and as many of the last as fill T - 1. So question and answer survive a
long text between them, and there is always something to learn.
"""

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from attnzoo.experiments.data.config import DataConfig
from attnzoo.experiments.data.documents import (
  digest,
  existing,
  file_digest,
  jsonl_fields,
  place,
  threshold,
)
from attnzoo.experiments.data.errors import refuse
from attnzoo.experiments.data.pipeline import Batch, OrderedRows, ShuffledRows
from attnzoo.experiments.data.tokenizers import Tokenizer, load_tokenizer

_LAYOUT = 1  # raise it when other tokens come of the same files


@dataclasses.dataclass(frozen=True)
class PairSplit:
  """Examples one after the other, whole and without their end ids."""

  tokens: Int[np.ndarray, "N"]
  starts: Int[np.ndarray, "examples+1"]  # of each example, and the end of the last one
  answers: Int[np.ndarray, "examples"]  # where in its example the answer starts

  def __len__(self) -> int:
    return len(self.answers)

  def prompt(self, number: int, length: int) -> list[int]:
    """What comes before the answer in a row of so many tokens."""
    tokens, learned = self.sequence(number, length, 0)
    return tokens[: np.argmax(learned)].tolist()

  def sequence(
    self, number: int, length: int, end_id: int
  ) -> tuple[Int[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """(tokens of one example with its end id, at most `length`; which of them are learned)."""
    tokens = self.tokens[self.starts[number] : self.starts[number + 1]]
    learned = np.arange(len(tokens)) >= self.answers[number]
    most = length - 1
    if len(tokens) > most:
      head, tail = most // 2, len(tokens) - (most - most // 2)
      tokens = np.concatenate([tokens[:head], tokens[tail:]])
      learned = np.concatenate([learned[:head], learned[tail:]])
    return np.append(tokens, np.int32(end_id)), np.append(learned, True)


@dataclasses.dataclass(frozen=True)
class PairSet:
  """All splits. Takes the place of a `Corpus`."""

  name: str
  splits: Mapping[str, PairSplit]
  vocab_size: int
  end_id: int
  tokenizer: Tokenizer
  fingerprint: str  # of files, split, fields and tokenizer; stored with the position in the data

  def describe(self) -> str:
    """One line a split."""
    lines = [f"data {self.name}, {self.tokenizer.name}, vocabulary {self.vocab_size:,}"]
    for name, split in self.splits.items():
      sizes = np.diff(split.starts)
      lines.append(
        f"  {name}: {len(split):,} prompts with answers, {sizes.sum():,} tokens,"
        f" {(sizes - split.answers).sum():,} of them in answers, the longest {sizes.max():,}"
      )
    return "\n".join(lines)


def load_pairs(config: DataConfig) -> PairSet:
  """Reads and tokenises the .jsonl file or files that the config names.

  Without `validation_path` a share of the prompts is held out by their hash, so that several
  answers to one prompt stay together. Prompt and answer are encoded each for itself and joined as
  they are: a space between them belongs to one of the two.

  Raises:
    DataError: a file or field is missing, a line cannot be read, a prompt, an answer or a split is
      empty.
  """
  tokenizer = load_tokenizer(config.tokenizer, config.end_token)
  files = dict(train=_files(config.path, "path"))
  if config.validation_path:
    files["validation"] = _files(config.validation_path, "validation_path")
  pairs = {name: list(_pairs(group, config)) for name, group in files.items()}
  if not config.validation_path:
    pairs = _hold_out(pairs["train"], config.validation_fraction)
  for name, found in pairs.items():
    if not found:
      raise refuse("path", f"leave a non-empty {name} split", config.path,
                   "give more lines, or a validation_path")  # fmt: skip
  splits = {name: _encode(found, tokenizer, config) for name, found in pairs.items()}
  options = (config.prompt_field, config.answer_field, config.sft_open)
  held = config.validation_path != "" or config.validation_fraction
  content = [file_digest(file) for group in files.values() for file in group]
  key = digest(_LAYOUT, *options, held, tokenizer.fingerprint, tokenizer.end_id, *content)
  return PairSet("sft", splits, tokenizer.vocab_size, tokenizer.end_id, tokenizer, key)


def _files(name: str, argument: str) -> list[Path]:
  path = existing(name, argument)
  files = [path] if path.is_file() else sorted(path.rglob("*.jsonl"))
  if not files:
    raise refuse(argument, "hold .jsonl files", f"{path} without any", "one object per line")
  return files


def _pairs(files: Iterable[Path], config: DataConfig) -> Iterator[tuple[str, bytes, bytes]]:
  """(where it stands, prompt, answer) of every line."""
  fields = dict(prompt_field=config.prompt_field, answer_field=config.answer_field)
  for file in files:
    for number, texts in jsonl_fields(file, **fields):
      where = f"{file}, line {number}"
      for (option, field), text in zip(fields.items(), texts, strict=True):
        if not text.strip():
          raise _empty(option, field, where)
      prompt, answer = texts
      yield where, prompt, answer


def _empty(option: str, field: str, where: str):
  return refuse(option, "name a field with text in every line", f"an empty {field!r} at {where}",
                "remove the line or fill it in")  # fmt: skip


def _hold_out(pairs: list[tuple[str, bytes, bytes]], fraction: float) -> dict[str, list]:
  places = [place(prompt) for _, prompt, _ in pairs]
  below = threshold(min(places, default=0.0), max(places, default=0.0), fraction)
  held = [value < below for value in places]
  return {
    name: [pair for pair, mark in zip(pairs, held, strict=True) if mark == (name == "validation")]
    for name in ("train", "validation")
  }


def _encode(
  pairs: Sequence[tuple[str, bytes, bytes]], tokenizer: Tokenizer, config: DataConfig
) -> PairSplit:
  texts = (text for _, prompt, answer in pairs for text in (prompt, answer))
  encoded = _whole_texts(texts, tokenizer)
  opening = [np.array([tokenizer.end_id], np.int32)] if config.sft_open else []
  pieces, sizes, answers = [], [], []
  for (where, _, _), prompt, answer in zip(pairs, encoded, encoded, strict=True):
    for option, ids in ((config.prompt_field, prompt), (config.answer_field, answer)):
      if not len(ids):  # the tokenizer drops what the text consists of
        raise _empty(option, option, where)
    example = [*opening, prompt, answer]
    pieces += example
    sizes.append(sum(map(len, example)))
    answers.append(sizes[-1] - len(answer))
  starts = np.concatenate([[0], np.cumsum(sizes)])
  return PairSplit(np.concatenate(pieces), starts, np.array(answers))


def _whole_texts(texts: Iterable[bytes], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
  """The ids of each text; tokenizers hand them out in pieces."""
  parts: list[np.ndarray] = []
  for piece in tokenizer.encode_documents(texts, False):
    parts.append(piece.ids.astype(np.int32))
    if piece.last:
      yield np.concatenate(parts)
      parts = []


def packed(sizes: Sequence[int], length: int) -> list[list[int]]:
  """Rows of numbers of examples, which need `sizes` positions, at most `length` a row.

  The longest first, each into the fullest row that still has room; in order inside a row. The same
  for every epoch, so that rows can be numbered.
  """
  rows: list[list[int]] = []
  with_room: dict[int, list[int]] = {}  # positions left -> rows
  rooms: list[int] = []  # its keys, sorted
  for example in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
    at = bisect.bisect_left(rooms, sizes[example])
    if at == len(rooms):
      row, room = len(rows), length
      rows.append([])
    else:
      room = rooms[at]
      row = with_room[room].pop()
      if not with_room[room]:
        del with_room[room], rooms[at]
    rows[row].append(example)
    room -= sizes[example]
    if room not in with_room:
      with_room[room] = []
      bisect.insort(rooms, room)
    with_room[room].append(row)
  return [sorted(row) for row in rows]


class _Rows:
  """The rows of a split, by number."""

  def __init__(self, split: PairSplit, end_id: int, config: DataConfig):
    self._split, self._end_id, self._length = split, end_id, config.sequence_length
    self._packed = config.sft_pack
    self._rows: Sequence[Sequence[int]] = [[number] for number in range(len(split))]
    if config.sft_pack:
      # Of n tokens n - 1 are inputs; one is the end id, not counted in `starts`.
      sizes = np.minimum(np.diff(split.starts), config.sequence_length - 1)
      self._rows = packed(sizes.tolist(), config.sequence_length)

  def __len__(self) -> int:
    return len(self._rows)

  def __call__(self, number: int, epoch: int = 0) -> Batch:
    """The arrays [T] of a row; an empty row behind the last one."""
    del epoch  # every epoch has the same rows
    row = dict(
      tokens=np.full(self._length, self._end_id, np.int32),
      targets=np.full(self._length, self._end_id, np.int32),
      weights=np.zeros(self._length, np.float32),
    )
    if self._packed:
      row["segment_ids"] = np.zeros(self._length, np.int32)
    at, examples = 0, self._rows[number] if number < len(self) else ()
    for segment, example in enumerate(examples, 1):
      tokens, learned = self._split.sequence(example, self._length, self._end_id)
      part = slice(at, at + len(tokens) - 1)
      row["tokens"][part], row["targets"][part] = tokens[:-1], tokens[1:]
      row["weights"][part] = learned[1:]
      if self._packed:
        row["segment_ids"][part] = segment
      at = part.stop
    return row


class PairBatches(ShuffledRows):
  """Endless training batches; every epoch has all rows once, in an order of its own."""

  def __init__(
    self, pairs: PairSet, config: DataConfig, *, process_index: int = 0, process_count: int = 1
  ):
    rows = _Rows(pairs.splits["train"], pairs.end_id, config)
    super().__init__(
      len(rows), rows, config, corpus=pairs.fingerprint, packed=config.sft_pack,
      process_index=process_index, process_count=process_count,
    )  # fmt: skip


class PairEvaluation(OrderedRows):
  """One pass over a split in order, with the interface of `pipeline.EvaluationBatches`."""

  def __init__(self, pairs: PairSet, config: DataConfig, **options):
    rows = lambda split: _Rows(split, pairs.end_id, config)  # noqa: E731
    super().__init__(pairs.splits, rows, config, **options)
