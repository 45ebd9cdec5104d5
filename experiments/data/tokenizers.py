"""Tokenizers: bytes, or a Hugging Face tokenizer.json. One small interface for both."""

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from attnzoo.experiments.data.documents import existing
from attnzoo.experiments.data.errors import refuse

_BYTES_END = 256
# Documents longer than this are encoded in pieces that end after a line break.
_PIECE_BYTES = 1 << 16
_BATCH_BYTES = 1 << 20
# Undecodable tokens held back while a character may still become complete; then printed as U+FFFD.
_MOST_PENDING = 8
_END_TOKENS = (
  "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>", "<|im_end|>", "[SEP]",
)  # fmt: skip


class Piece(NamedTuple):
  """Part of a document."""

  ids: np.ndarray  # [n]
  lengths: np.ndarray | None  # [n], bytes of text that each id stands for, if asked for
  size: int  # bytes of text
  last: bool  # whether the document ends here


class Tokenizer(Protocol):
  """`end_id` stands between documents and is never produced by `encode`."""

  name: str
  fingerprint: str
  vocab_size: int
  end_id: int

  def encode(self, text: str | bytes) -> Int[np.ndarray, "n"]: ...
  def decode(self, ids: Iterable[int]) -> str: ...
  def encode_documents(self, documents: Iterable[bytes], measure: bool) -> Iterator[Piece]: ...
  def decoder(self) -> "Decoder": ...


class Decoder(Protocol):
  """Decodes a stream: `push` returns the text that became complete, `finish` what is left."""

  def push(self, token: int) -> str: ...
  def finish(self) -> str: ...


class ByteTokenizer:
  """256 bytes and an end of document: ids 0..255 are the bytes of UTF-8 text, 256 ends it."""

  name = "bytes"
  fingerprint = "bytes"
  vocab_size = 257
  end_id = _BYTES_END

  def encode(self, text: str | bytes) -> Int[np.ndarray, "n"]:
    data = text.encode("utf-8", errors="replace") if isinstance(text, str) else text
    return np.frombuffer(data, np.uint8).astype(np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    """Text of the ids. Bytes that are no UTF-8 become U+FFFD, end ids print as nothing."""
    decoder = self.decoder()
    return "".join([decoder.push(int(token)) for token in ids]) + decoder.finish()

  def encode_documents(self, documents: Iterable[bytes], measure: bool) -> Iterator[Piece]:
    for document in documents:
      ids = np.frombuffer(document, np.uint8)
      yield Piece(ids, np.ones(len(ids), np.uint8) if measure else None, len(document), True)

  def decoder(self) -> "Decoder":
    return _ByteDecoder()


class _ByteDecoder:
  def __init__(self):
    self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

  def push(self, token: int) -> str:
    if token == _BYTES_END:
      return self.finish()
    if not 0 <= token < _BYTES_END:
      raise refuse("ids", "be at most 256 for the byte tokenizer", token, "wrong tokenizer?")
    return self._utf8.decode(bytes([token]))

  def finish(self) -> str:
    text = self._utf8.decode(b"", final=True)
    self._utf8.reset()
    return text


class JsonTokenizer:
  """A tokenizer.json as the package `tokenizers` writes it, e.g. of a published model.

  No special token is added, and text that spells one is encoded as the ordinary text it is, so
  that a document cannot end itself.
  """

  def __init__(self, path: str | Path, end_token: str = ""):
    path = existing(path, "tokenizer")
    self._tokenizer = _load_json(path)
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    self.name = path.name
    self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
    self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
    self.end_id = _find_end(vocabulary, end_token, path)

  def encode(self, text: str | bytes) -> Int[np.ndarray, "n"]:
    encoding = self._tokenizer.encode(_as_text(text), add_special_tokens=False)
    return np.array(encoding.ids, np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    ids = [int(token) for token in ids]
    return self._tokenizer.decode([token for token in ids if token != self.end_id])

  def encode_documents(self, documents: Iterable[bytes], measure: bool) -> Iterator[Piece]:
    for batch in _batches(documents):
      texts = [text for text, _ in batch]
      encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
      for (text, last), encoding in zip(batch, encodings, strict=True):
        size = len(text.encode())
        lengths = _byte_lengths(text, encoding.offsets) if measure else None
        yield Piece(np.array(encoding.ids, np.uint32), lengths, size, last)

  def decoder(self) -> "Decoder":
    return _JsonDecoder(self)


class _JsonDecoder:
  """Decodes a short window of the last tokens before and after each new one.

  A token's text depends on those before it (spaces, parts of characters), so the difference of
  two decoded windows is printed, and only once it does not end in half a character.
  """

  def __init__(self, tokenizer: JsonTokenizer):
    self._tokenizer = tokenizer
    self._shown: list[int] = []  # tokens that were printed last, as context
    self._pending: list[int] = []

  def push(self, token: int) -> str:
    if token == self._tokenizer.end_id:
      return self.finish()
    self._pending.append(token)
    text = self._text()
    if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._pending) < _MOST_PENDING:
      return ""
    self._shown, self._pending = self._pending, []
    return text

  def finish(self) -> str:
    text = self._text() if self._pending else ""
    self._shown, self._pending = [], []
    return text

  def _text(self) -> str:
    before = self._tokenizer.decode(self._shown)
    return self._tokenizer.decode(self._shown + self._pending)[len(before) :]


def load_tokenizer(name: str, end_token: str = "") -> Tokenizer:
  """`bytes`, or the path of a tokenizer.json."""
  if name == "bytes":
    return ByteTokenizer()
  return JsonTokenizer(name, end_token)


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, str | int]:
  """What a checkpoint stores so that `check_tokenizer` can refuse another tokenizer."""
  fields = ("name", "fingerprint", "vocab_size", "end_id")
  return {field: getattr(tokenizer, field) for field in fields}


def check_tokenizer(stored: Mapping[str, str | int], tokenizer: Tokenizer) -> None:
  """Raises DataError if the checkpoint that stored this was made with another tokenizer."""
  ours = describe_tokenizer(tokenizer)
  different = [key for key in ours if key != "name" and stored.get(key) != ours[key]]
  if different:
    was = {key: stored.get(key) for key in ("name", *different)}
    now = {key: ours[key] for key in ("name", *different)}
    raise refuse("tokenizer", f"be the checkpoint's {was}", now, "point tokenizer at that file")


def _load_json(path: Path):
  try:
    import tokenizers
  except ImportError as error:
    raise refuse("tokenizer", "have its package installed", f"{path} without `tokenizers`",
                 "pip install tokenizers, or use tokenizer=bytes") from error  # fmt: skip
  try:
    loaded = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the package raises bare Exception
    raise refuse("tokenizer", "be 'bytes' or a readable tokenizer.json", f"{path}: {error}",
                 "save it with tokenizer.save(path)") from error  # fmt: skip
  loaded.no_truncation()
  loaded.no_padding()
  loaded.encode_special_tokens = True
  return loaded


def _find_end(vocabulary: Mapping[str, int], end_token: str, path: Path) -> int:
  if end_token:
    if end_token not in vocabulary:
      raise refuse("end_token", f"be a token of {path}", repr(end_token), "see its added_tokens")
    return vocabulary[end_token]
  for token in _END_TOKENS:
    if token in vocabulary:
      return vocabulary[token]
  raise refuse("end_token", f"be given, as {path} has none of the usual names", "''",
               "usual are " + " ".join(_END_TOKENS))  # fmt: skip


def _as_text(text: str | bytes) -> str:
  return text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text


def _batches(documents: Iterable[bytes]) -> Iterator[list[tuple[str, bool]]]:
  """Lists of (piece, whether its document ends) of a few megabytes, to be encoded in parallel."""
  batch, size = [], 0
  for document in documents:
    for piece, last in _pieces(_as_text(document)):
      batch.append((piece, last))
      size += len(piece)
      if size >= _BATCH_BYTES:
        yield batch
        batch, size = [], 0
  if batch:
    yield batch


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
  start = 0
  while len(text) - start > _PIECE_BYTES:
    cut = text.rfind("\n", start, start + _PIECE_BYTES) + 1 or start + _PIECE_BYTES
    yield text[start:cut], False
    start = cut
  yield text[start:], True


def _byte_lengths(text: str, offsets: list[tuple[int, int]]) -> Int[np.ndarray, "n"]:
  """UTF-8 bytes from the end of the previous token to the end of each token.

  What a tokenizer drops between tokens (spaces, say) so counts for the token after it.
  """
  points = np.frombuffer(text.encode("utf-32-le"), "<u4")
  widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
  upto = np.concatenate([[0], np.cumsum(widths)])  # [characters + 1]
  ends = np.maximum.accumulate(np.array([end for _, end in offsets], np.int64).reshape(-1))
  return np.diff(upto[ends], prepend=0)
