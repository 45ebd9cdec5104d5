"""A tokenised corpus: one stream of token ids per split, in memory or mapped from a cache folder.

The stream of documents d1, d2, ... is `[end, d1, end, d2, end, ..., end]`. The end id closes a
document as a target and opens the next one as an input: what follows it starts a new segment. So
every token of every document is predicted exactly once, the first one from the end id alone, and
no prediction looks across documents; generation starts from the end id in the same way.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from attnzoo.experiments.data.cache import written_once
from attnzoo.experiments.data.config import DataConfig
from attnzoo.experiments.data.documents import Source, digest
from attnzoo.experiments.data.errors import refuse
from attnzoo.experiments.data.formats import TokenSource
from attnzoo.experiments.data.sources import open_source
from attnzoo.experiments.data.tokenizers import Tokenizer, load_tokenizer

_LAYOUT = 1  # raise it when the stored form changes
# Turning bytes into ids costs less than reading a cache, so small byte corpora have none.
_SMALL_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class TokenSplit:
  """One split as a stream of ids."""

  tokens: np.ndarray  # [N] uint16 or uint32, documents joined by the end id
  token_bytes: np.ndarray | None  # [N] UTF-8 bytes that each id stands for; held-out splits of text
  documents: int | None  # None where the source does not say
  text_bytes: int | None
  words: int | None = None  # of held-out splits, where the source counts them


@dataclasses.dataclass(frozen=True)
class Corpus:
  """All splits of a source under one tokenizer."""

  name: str
  splits: Mapping[str, TokenSplit]
  vocab_size: int
  end_id: int | None  # None only for token files without one
  tokenizer: Tokenizer | None  # None for token files whose tokenizer is not configured
  fingerprint: str  # of documents, split and tokenizer; stored with the position in the data

  @property
  def train(self) -> TokenSplit:
    return self.splits["train"]

  @property
  def validation(self) -> TokenSplit:
    return self.splits["validation"]

  def describe(self) -> str:
    """One line a split: documents, bytes, tokens."""
    words = self.tokenizer.name if self.tokenizer else "no tokenizer"
    lines = [f"data {self.name}, {words}, vocabulary {self.vocab_size:,}"]
    for name, split in self.splits.items():
      counts = [f"{split.documents:,} documents"] if split.documents is not None else []
      counts += [f"{split.text_bytes:,} bytes"] if split.text_bytes is not None else []
      counts += [f"{split.words:,} words"] if split.words is not None else []
      lines.append(f"  {name}: {', '.join([*counts, f'{len(split.tokens):,} tokens'])}")
    return "\n".join(lines)


def load_corpus(config: DataConfig, cache: str | Path | None = None) -> Corpus:
  """Reads and tokenises what the config names.

  Args:
    config: source and tokenizer.
    cache: folder for tokenised corpora unless `config.cache` names one; None keeps all in memory.
      Entries are keyed by content and tokenizer and written atomically, so runs can share it.

  Raises:
    DataError: a path, file, line, split or tokenizer is missing or unusable.
  """
  if config.sequence_length < 1:
    raise refuse("sequence_length", "be at least 1 for text", config.sequence_length, "such as 512")
  source = open_source(config)
  if isinstance(source, TokenSource):
    return _corpus_of_tokens(source, config)
  tokenizer = load_tokenizer(config.tokenizer, config.end_token)
  key = digest(_LAYOUT, source.content, tokenizer.fingerprint, tokenizer.end_id)
  cache = config.cache or cache
  if cache and not (tokenizer.name == "bytes" and source.size < _SMALL_BYTES):
    splits = _cached(source, tokenizer, Path(cache).expanduser() / key[:32], config)
  else:
    splits = {name: _in_memory(source, name, tokenizer) for name in source.splits}
  _check_splits(splits, source.name, config)
  return Corpus(source.name, splits, tokenizer.vocab_size, tokenizer.end_id, tokenizer, key)


def read_text(config: DataConfig, split: str) -> bytes:
  """The bytes of a split, documents put end to end: what baselines compress and count."""
  source = open_source(config)
  if isinstance(source, TokenSource):
    raise refuse("source", "hold text", "token files", "baselines need the text itself")
  if split not in source.splits:
    raise refuse("split", f"be one of {sorted(source.splits)}", repr(split), "see the source")
  return b"".join(source.splits[split]())


def _corpus_of_tokens(source: TokenSource, config: DataConfig) -> Corpus:
  tokenizer = None
  if config.tokenizer != "bytes" or source.vocab_size == 257:
    tokenizer = load_tokenizer(config.tokenizer, config.end_token)
    if tokenizer.vocab_size > source.vocab_size:
      raise refuse("tokenizer", f"have at most the {source.vocab_size} ids of the token files",
                   f"{tokenizer.name} with {tokenizer.vocab_size}",
                   "point tokenizer at the file they were made with")  # fmt: skip
    if source.end_id not in (None, tokenizer.end_id):
      raise refuse("tokenizer", f"end documents with id {source.end_id} like the token files",
                   f"id {tokenizer.end_id} of {tokenizer.name}", "set end_token")  # fmt: skip
  splits = {name: TokenSplit(ids, None, None, None) for name, ids in source.splits.items()}
  _check_splits(splits, source.name, config)
  key = digest(_LAYOUT, source.content, tokenizer.fingerprint if tokenizer else "")
  return Corpus(source.name, splits, source.vocab_size, source.end_id, tokenizer, key)


def _check_splits(splits: Mapping[str, TokenSplit], name: str, config: DataConfig) -> None:
  for split, content in splits.items():
    if len(content.tokens) < 2:  # nothing, or an end id alone
      raise refuse("path", f"leave a non-empty {split} split", config.path or name,
                   "give more text, or another validation_fraction or validation_path")  # fmt: skip


def _token_dtype(tokenizer: Tokenizer) -> np.dtype:
  return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _encode_split(
  source: Source, name: str, tokenizer: Tokenizer, tally: "_Tally"
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
  """Ids and, for held-out splits, bytes per id, piece by piece; `tally` counts.

  Bytes that a tokenizer drops at the end of a piece count for the end id, so that they sum up to
  the size of the text.
  """
  measure = name != "train"
  dtype = _token_dtype(tokenizer)
  end = np.array([tokenizer.end_id], dtype)
  yield end, np.zeros(1, np.uint32) if measure else None
  dropped = 0
  documents = (document for document in source.splits[name]() if document)
  if measure and source.count_words is not None:
    documents = tally.counting_words(documents, source.count_words)
  for piece in tokenizer.encode_documents(documents, measure):
    lengths = None
    if measure:
      dropped += piece.size - int(piece.lengths.sum(dtype=np.int64))
      lengths = piece.lengths.astype(np.uint32)
    yield piece.ids.astype(dtype), lengths
    if piece.last:
      yield end, np.array([dropped], np.uint32) if measure else None
      dropped = 0
    tally.documents += int(piece.last)
    tally.text_bytes += piece.size


class _Tally:
  def __init__(self):
    self.documents = 0
    self.text_bytes = 0
    self.words: int | None = None

  def counting_words(
    self, documents: Iterator[bytes], count: Callable[[bytes], int]
  ) -> Iterator[bytes]:
    self.words = 0
    for document in documents:
      self.words += count(document)
      yield document


def _in_memory(source: Source, name: str, tokenizer: Tokenizer) -> TokenSplit:
  tally = _Tally()
  ids, lengths = zip(*_encode_split(source, name, tokenizer, tally), strict=True)
  measured = None if name == "train" else np.concatenate(lengths)
  tokens = np.concatenate(ids)
  return TokenSplit(tokens, measured, tally.documents, tally.text_bytes, tally.words)


def _cached(
  source: Source, tokenizer: Tokenizer, entry: Path, config: DataConfig
) -> dict[str, TokenSplit]:
  """Maps the entry of the cache, which is written first where it is not there."""

  def write(folder: Path) -> None:
    meta = {name: _write_split(source, name, tokenizer, folder) for name in source.splits}
    (folder / "meta.json").write_text(json.dumps(meta))

  written_once(entry, write)
  meta = json.loads((entry / "meta.json").read_text())
  return {name: _map_split(entry, name, meta[name], tokenizer) for name in source.splits}


def _write_split(
  source: Source, name: str, tokenizer: Tokenizer, folder: Path
) -> dict[str, int | None]:
  tally, tokens = _Tally(), 0
  with (
    (folder / f"{name}.tokens").open("wb") as ids,
    (folder / f"{name}.bytes").open("wb") as sizes,
  ):
    for piece, lengths in _encode_split(source, name, tokenizer, tally):
      tokens += len(piece)
      ids.write(piece.tobytes())
      if lengths is not None:
        sizes.write(lengths.astype("<u4").tobytes())
  return dict(tokens=tokens, **vars(tally))


def _map_split(entry: Path, name: str, meta: Mapping[str, int], tokenizer: Tokenizer) -> TokenSplit:
  files = {f"{name}.tokens": _token_dtype(tokenizer)}
  if name != "train":
    files[f"{name}.bytes"] = np.dtype("<u4")
  for file, dtype in files.items():
    size = (entry / file).stat().st_size if (entry / file).is_file() else -1
    if size != meta["tokens"] * dtype.itemsize:
      raise refuse("cache", f"hold {meta['tokens']} entries in {file}", f"{size} bytes in {entry}",
                   "delete that folder, it is written again")  # fmt: skip
  maps = [np.memmap(entry / file, dtype, mode="r") for file, dtype in files.items()]
  measured = maps[1] if len(maps) == 2 else None
  words = meta.get("words")  # entries of earlier versions have none
  return TokenSplit(maps[0], measured, meta["documents"], meta["text_bytes"], words)
