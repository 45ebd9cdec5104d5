"""What to train on, as one validated record."""

import dataclasses

from attnzoo.experiments.data.errors import refuse, suggest

SOURCES = ("auto", "stdlib", "text", "enwik8", "wikitext", "tokens", "huggingface")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the documents come from, how they become tokens, and how tokens become batches."""

  source: str = "auto"  # one of SOURCES; auto looks at `path`: none = stdlib, else by its name
  path: str = ""  # file or folder of every source but stdlib
  validation_path: str = ""  # text and huggingface: held-out documents kept apart by the user
  validation_fraction: float = 0.06  # share of the documents held out where the format has no split
  text_field: str = "text"  # jsonl and huggingface: the field that holds the document
  suffixes: tuple[str, ...] = ()  # file types read from a folder; empty = documents.TEXT_SUFFIXES
  enwik8_bytes: int = 100_000_000  # size that enwik8 must have; another one only for trials
  token_dtype: str = ""  # tokens: uint16 or uint32, where no .json beside the .bin says it
  token_vocab_size: int = 0  # tokens: ids must be smaller; likewise
  token_end_id: int = -1  # tokens: id between documents, -1 = none; likewise
  tokenizer: str = "bytes"  # "bytes", or the path of a tokenizer.json
  end_token: str = ""  # end-of-document token of tokenizer.json; empty = the usual names
  cache: str = ""  # folder for tokenised corpora; empty = the folder that the caller proposes
  sequence_length: int = 512  # tokens per row
  batch_size: int = 16  # rows per step, over all hosts
  seed: int = 0  # order and cuts of the training windows
  workers: int = 1  # threads that assemble batches ahead of the training step; 0 = none
  prefetch: int = 8  # batches held ready by the workers

  def __post_init__(self):
    object.__setattr__(self, "suffixes", tuple(self.suffixes))
    if self.source not in SOURCES:
      raise refuse("source", "be a known source", repr(self.source), suggest(self.source, SOURCES))
    if self.source == "stdlib" and self.path:
      raise refuse("path", "be empty for source 'stdlib'", repr(self.path), "use source 'text'")
    if self.source not in ("auto", "stdlib") and not self.path:
      raise refuse("path", f"be given for source {self.source!r}", "''", "name a file or folder")
    if not 0 < self.validation_fraction < 1:
      raise refuse("validation_fraction", "lie between 0 and 1", self.validation_fraction,
                   "0.06 holds 6 % of the documents out")  # fmt: skip
    for name, least in _LEAST.items():
      if getattr(self, name) < least:
        raise refuse(name, f"be at least {least}", getattr(self, name), "see DataConfig")
    if self.token_dtype not in ("", "uint16", "uint32"):
      raise refuse("token_dtype", "be 'uint16' or 'uint32'", repr(self.token_dtype),
                   "write the tokens in one of these, little-endian")  # fmt: skip


_LEAST = dict(enwik8_bytes=100, token_vocab_size=0, token_end_id=-1, sequence_length=1,
              batch_size=1, seed=0, workers=0, prefetch=1)  # fmt: skip
