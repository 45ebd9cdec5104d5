"""What to train on, as one validated record."""

import dataclasses

from attnzoo.experiments.data.errors import refuse, suggest

IMAGE_SOURCES = ("digits", "mnist", "cifar10", "imagenet64", "images")
NOTE_SOURCES = ("icd10", "mimic3")  # texts with labels: data/notes
SOURCES = (
  "auto", "stdlib", "text", "enwik8", "wikitext", "pg19", "tokens", "huggingface", "mqar", "sft",
  *IMAGE_SOURCES, *NOTE_SOURCES,
)  # fmt: skip
_MADE = ("stdlib", "mqar", "digits", "icd10")  # sources without a path
_LENGTH_KNOWN = ("mqar", *IMAGE_SOURCES)  # the data say how long a row is

MQAR_ORDERS = ("segments", "mixed")
_CHOICES = dict(  # fields that take one of a few words, and what to know about them
  mqar_order=(MQAR_ORDERS, "the published runs have 'segments'"),
  labels=(("50", "full"), "the 50 most frequent codes, or all"),
  note_rules=(("official", "minimal"), "'minimal' keeps numbers and negations"),
  difficulty=(("easy", "hard"), "'hard' has longer notes and is for long runs"),
  cbow_corpus=(("all", "train"), "the published vectors saw 'all' splits"),
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the documents come from, how they become tokens, and how tokens become batches."""

  source: str = "auto"  # one of SOURCES; auto looks at `path`: none = stdlib, else by its name
  path: str = ""  # file or folder of every source but stdlib, mqar, digits and icd10
  validation_path: str = ""  # text, huggingface, sft: held-out documents kept apart by the user
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
  split_documents: bool = True  # text: no state and no attention from one document to the next
  predict_first: bool = True  # text: the first token of a document is a target, from the end id
  prompt_field: str = "prompt"  # sft: the field of the .jsonl that holds what is not learned
  answer_field: str = "answer"  # sft: ... and what is
  sft_pack: bool = False  # sft: several short examples in a row, as segments of their own
  sft_open: bool = False  # sft: the end id stands before a prompt, as before documents
  mqar_train: str = ""  # mqar: segments as length:pairs:examples,...; see mqar.py
  mqar_test: str = ""  # mqar: likewise, the validation split
  mqar_vocab_size: int = 8192  # mqar: ids altogether
  mqar_power: float = 0.01  # mqar: small asks early, 1 everywhere alike
  mqar_random_fillers: bool = True  # mqar: random ids, not zeros, where nothing is said
  mqar_order: str = "segments"  # mqar: of batches, "segments" one after the other, or "mixed"
  split_path: str = ""  # mimic3: folder of the *_hadm_ids.csv of the splits; empty = `path`
  labels: str = "50"  # mimic3: the "50" most frequent codes, or "full"
  note_rules: str = "official"  # notes: how texts are cleaned, "official" or "minimal"
  difficulty: str = "easy"  # icd10: "easy", or "hard" with longer notes
  embedding: str = "random"  # notes: "random", "cbow" (trained here), or the path of vectors
  cbow_corpus: str = "all"  # notes: what cbow reads, "all" notes or those of "train"
  drop_remainder: bool = False  # notes: without the shortest ones that fill no batch of a split
  sequence_length: int = 512  # tokens per row; mqar: 0; pictures: 0, or one's values; notes: limit
  batch_size: int = 16  # rows per step, over all hosts; a picture is a row
  seed: int = 0  # order and cuts of the training windows; mqar: all numbers of the examples
  workers: int = 1  # threads that assemble batches ahead of the training step; 0 = none
  prefetch: int = 8  # batches held ready by the workers

  def __post_init__(self):
    object.__setattr__(self, "suffixes", tuple(self.suffixes))
    if self.source not in SOURCES:
      raise refuse("source", "be a known source", repr(self.source), suggest(self.source, SOURCES))
    if self.source in _MADE and self.path:
      raise refuse("path", f"be empty for source {self.source!r}", repr(self.path),
                   "use source 'text' or 'images'")  # fmt: skip
    if self.source not in ("auto", *_MADE) and not self.path:
      raise refuse("path", f"be given for source {self.source!r}", "''", "name a file or folder")
    if not 0 < self.validation_fraction < 1:
      raise refuse("validation_fraction", "lie between 0 and 1", self.validation_fraction,
                   "0.06 holds 6 % of the documents out")  # fmt: skip
    if self.source == "mqar" and self.sequence_length:
      raise refuse("sequence_length", "be 0 for source 'mqar'", self.sequence_length,
                   "mqar_train and mqar_test give the lengths")  # fmt: skip
    if self.source == "sft" and self.sequence_length < 4:
      raise refuse("sequence_length", "be at least 4 for source 'sft'", self.sequence_length,
                   "a row holds prompt, answer and end")  # fmt: skip
    if self.prompt_field == self.answer_field:
      raise refuse("answer_field", "differ from prompt_field", repr(self.answer_field),
                   "name two fields of the .jsonl")  # fmt: skip
    for name, (choices, hint) in _CHOICES.items():
      if getattr(self, name) not in choices:
        raise refuse(name, f"be one of {choices}", repr(getattr(self, name)), hint)
    if self.split_path and self.source != "mimic3":
      raise refuse("split_path", "be empty unless the source is 'mimic3'", repr(self.split_path),
                   "other sources bring their splits")  # fmt: skip
    if not self.embedding:
      raise refuse("embedding", "be 'random', 'cbow' or the path of a file with vectors", "''",
                   "random vectors are the default")  # fmt: skip
    for name, least in _LEAST.items():
      if name == "sequence_length" and (
        self.source in _LENGTH_KNOWN or self.source == "auto" and self.path
      ):
        least = 0  # where the path turns out to hold text, `load_corpus` refuses it
      if getattr(self, name) < least:
        raise refuse(name, f"be at least {least}", getattr(self, name), "see DataConfig")
    if self.token_dtype not in ("", "uint16", "uint32"):
      raise refuse("token_dtype", "be 'uint16' or 'uint32'", repr(self.token_dtype),
                   "write the tokens in one of these, little-endian")  # fmt: skip


_LEAST = dict(enwik8_bytes=100, token_vocab_size=0, token_end_id=-1, sequence_length=1,
              batch_size=1, seed=0, workers=0, prefetch=1)  # fmt: skip
