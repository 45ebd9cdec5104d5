"""Data for the experiments: sources, tokenizers and batches. See `DataConfig` for the options."""

from attnzoo.experiments.data.config import IMAGE_SOURCES, NOTE_SOURCES, SOURCES, DataConfig
from attnzoo.experiments.data.corpus import Corpus, TokenSplit, load_corpus, read_text
from attnzoo.experiments.data.errors import DataError
from attnzoo.experiments.data.examples import ExampleBlock, ExampleSet
from attnzoo.experiments.data.images import ImageSet
from attnzoo.experiments.data.loading import Data, evaluation_batches, load_data, train_batches
from attnzoo.experiments.data.notes import NoteSet, NoteSplit, Vocabulary
from attnzoo.experiments.data.pipeline import Batch, EvaluationBatches, TrainBatches, bits_per_byte
from attnzoo.experiments.data.sft import PairSet
from attnzoo.experiments.data.tokenizers import (
  ByteTokenizer,
  Decoder,
  JsonTokenizer,
  Tokenizer,
  check_tokenizer,
  describe_tokenizer,
  load_tokenizer,
)

__all__ = [
  "IMAGE_SOURCES",
  "NOTE_SOURCES",
  "SOURCES",
  "Batch",
  "ByteTokenizer",
  "Corpus",
  "Data",
  "DataConfig",
  "DataError",
  "Decoder",
  "EvaluationBatches",
  "ExampleBlock",
  "ExampleSet",
  "ImageSet",
  "JsonTokenizer",
  "NoteSet",
  "NoteSplit",
  "PairSet",
  "TokenSplit",
  "Tokenizer",
  "TrainBatches",
  "Vocabulary",
  "bits_per_byte",
  "check_tokenizer",
  "describe_tokenizer",
  "evaluation_batches",
  "load_corpus",
  "load_data",
  "load_tokenizer",
  "read_text",
  "train_batches",
]
