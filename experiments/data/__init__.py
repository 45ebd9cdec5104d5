"""Text for the experiments: sources, tokenizers and batches. See `DataConfig` for the options."""

from .config import SOURCES, DataConfig
from .corpus import Corpus, TokenSplit, load_corpus, read_text
from .errors import DataError
from .pipeline import Batch, EvaluationBatches, TrainBatches, bits_per_byte
from .tokenizers import (
  ByteTokenizer,
  Decoder,
  JsonTokenizer,
  Tokenizer,
  check_tokenizer,
  describe_tokenizer,
  load_tokenizer,
)

__all__ = [
  "SOURCES",
  "Batch",
  "ByteTokenizer",
  "Corpus",
  "DataConfig",
  "DataError",
  "Decoder",
  "EvaluationBatches",
  "JsonTokenizer",
  "TokenSplit",
  "Tokenizer",
  "TrainBatches",
  "bits_per_byte",
  "check_tokenizer",
  "describe_tokenizer",
  "load_corpus",
  "load_tokenizer",
  "read_text",
]
