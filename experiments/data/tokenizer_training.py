"""A byte-level BPE tokenizer made from a text."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from attnzoo.experiments.data.config import DataConfig
from attnzoo.experiments.data.errors import refuse
from attnzoo.experiments.data.formats import TokenSource
from attnzoo.experiments.data.sources import open_source

END = "<|endoftext|>"


def train_tokenizer(config: DataConfig, vocab_size: int) -> Tokenizer:
  """A tokenizer of the training documents; held-out ones are not read.

  Raises:
    DataError: the source is no text, or missing.
  """
  source = open_source(config)
  if isinstance(source, TokenSource):
    raise refuse("source", "hold text", "token files", "these have a tokenizer already")
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  documents = (document.decode("utf-8", errors="replace") for document in source.splits["train"]())
  tokenizer.train_from_iterator(documents, trainer)
  return tokenizer
