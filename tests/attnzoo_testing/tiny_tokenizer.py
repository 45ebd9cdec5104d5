"""A tokenizer.json of a few hundred tokens, made with the package `tokenizers`."""

from pathlib import Path

_SAMPLE = (
  "plain words and more plain words, naïve; seven quick brown foxes jumped over every lazy dog "
  "near a river bank while nobody was looking, which tells something about foxes"
)


def train_json(
  path: Path, *, end: str = "<|endoftext|>", vocabulary: int = 300, byte_level: bool = True
) -> Path:
  """Writes byte-level BPE, or else a Metaspace BPE that drops characters it does not know."""
  import tokenizers

  built = tokenizers.Tokenizer(tokenizers.models.BPE())
  options = dict(vocab_size=vocabulary, special_tokens=[end], show_progress=False)
  if byte_level:
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    options["initial_alphabet"] = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  else:
    built.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    built.decoder = tokenizers.decoders.Metaspace()
  trainer = tokenizers.trainers.BpeTrainer(**options)
  built.train_from_iterator([_SAMPLE] * 4, trainer)
  built.save(str(path))
  return path
