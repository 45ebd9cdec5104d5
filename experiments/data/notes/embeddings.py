"""Vectors of words to start from: trained here (CBOW), read from a file, or random.

Every row has length 1, but that of the padding, which is 0.
"""

import io
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Float

from attnzoo.experiments.data.documents import existing
from attnzoo.experiments.data.errors import refuse
from attnzoo.experiments.data.notes.gensim_files import is_pickle, read_gensim
from attnzoo.experiments.data.notes.vocabulary import PAD, Vocabulary

SIZE, EPOCHS = 128, 30
# The rest of what the published vectors were trained with; gensim's defaults otherwise.
CBOW = dict(sg=0, window=5, negative=5, min_count=0, sample=1e-3)
_EPSILON = 1e-6  # in the length of the unknown word's row, as published
_NEARLY_ONE = 1e-4  # rows of this length are taken as they are

Vectors = Float[np.ndarray, "V E"]


def check_embedding(choice: str) -> None:
  """Raises DataError early where a choice of DataConfig.embedding cannot be had."""
  if choice == "cbow":
    if find_spec("gensim") is None:
      raise refuse("embedding", "have its package installed", "'cbow' without `gensim`",
                   "pip install 'attnzoo[notes]' (Python 3.13 at most), or random")  # fmt: skip
  elif choice != "random":
    existing(choice, "embedding")


def random_vectors(count: int, size: int = SIZE, seed: int = 0) -> Vectors:
  """Rows of random direction and length 1, float32; row PAD is 0."""
  rows = np.random.default_rng([seed, count, size]).standard_normal((count, size), np.float32)
  rows /= np.linalg.norm(rows, axis=1, keepdims=True) + _EPSILON
  rows[PAD] = 0
  return rows


def train_cbow(
  sentences: Iterable[list[str]],
  vocabulary: Vocabulary,
  *,
  size: int = SIZE,
  epochs: int = EPOCHS,
  seed: int = 0,
) -> Vectors:
  """word2vec's continuous bag of words over sentences, of which rows for the vocabulary are taken.

  One thread works, so that the same seed gives the same vectors on every host.

  Args:
    sentences: words; iterated over epochs + 1 times.

  Raises:
    DataError: gensim is missing; there is no word in the sentences.
  """
  check_embedding("cbow")
  from gensim.models import Word2Vec

  model = Word2Vec(vector_size=size, seed=seed, workers=1, **CBOW)
  model.build_vocab(sentences)
  if not len(model.wv):
    raise refuse("cbow_corpus", "hold words", "none", "were the notes cleaned away?")
  model.train(sentences, total_examples=model.corpus_count, epochs=epochs)
  return _rows_for(vocabulary, model.wv.key_to_index, model.wv.vectors, seed)


def read_vectors(path: str | Path, vocabulary: Vocabulary, seed: int = 0) -> tuple[Vectors, int]:
  """(rows for a vocabulary, how many of its words the file has not: they get random ones).

  Read are `word v1 v2 ...` a line with or without word2vec's first line (count and size),
  word2vec's binary format (.bin), and what gensim's `save` wrote (KeyedVectors, Word2Vec). Rows
  are scaled to length 1 unless they have it. PAD and UNK may be among the words.

  Raises:
    DataError: the file is of another form, or has no word of the vocabulary.
  """
  path = existing(path, "embedding")
  if is_pickle(path):
    words, vectors = read_gensim(path)
  elif path.suffix == ".bin":
    words, vectors = _read_binary(path)
  else:
    words, vectors = _read_text(path)
  places = {word: number for number, word in enumerate(words)}
  known = sum(word in places for word in vocabulary.words)
  if not known and vocabulary.words:
    raise refuse("embedding", "have words of the notes", f"none among {len(words):,} in {path}",
                 "are they cleaned by the same rules?")  # fmt: skip
  return _rows_for(vocabulary, places, vectors, seed), len(vocabulary.words) - known


def write_vectors(path: str | Path, vocabulary: Vocabulary, vectors: Vectors) -> None:
  """Writes `word v1 v2 ...` a line, PAD and UNK first, as exactly as float32 is."""
  if vectors.shape[:1] != (len(vocabulary),):
    raise refuse("vectors", f"have a row for each of {len(vocabulary)} ids", vectors.shape,
                 "pass the vocabulary that they were made for")  # fmt: skip
  with Path(path).open("w", encoding="utf-8") as file:
    for word, row in zip(vocabulary.rows, vectors, strict=True):
      file.write(f"{word} {' '.join(f'{value:.9g}' for value in row)}\n")


def _rows_for(vocabulary: Vocabulary, places, vectors: np.ndarray, seed: int) -> Vectors:
  """A row for each id, from those at `places` in `vectors`; random where there is none."""
  rows = random_vectors(len(vocabulary), vectors.shape[1], seed)
  found = [(id, places[word]) for id, word in enumerate(vocabulary.rows) if word in places]
  ids, numbers = np.array(found, np.int64).reshape(-1, 2).T
  rows[ids] = vectors[numbers]
  lengths = np.linalg.norm(rows, axis=1, keepdims=True)
  kept = (np.abs(lengths - 1) < _NEARLY_ONE) | (lengths == 0)
  rows /= np.where(kept, 1, lengths)
  rows[PAD] = 0
  return rows


def _read_text(path: Path) -> tuple[list[str], Vectors]:
  words, rows = [], []
  with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
    for number, line in enumerate(file, 1):
      word, *values = line.rstrip().split(" ")
      if number == 1 and len(values) == 1:
        continue  # word2vec's count and size
      row = _floats(values)
      if row is None or not len(row) or rows and len(row) != len(rows[0]):
        raise refuse("embedding", "hold `word v1 v2 ...` a line, as many numbers in each",
                     f"something else in line {number} of {path}",
                     "name a text file, word2vec's .bin or a file of gensim")  # fmt: skip
      words.append(word)
      rows.append(row)
  if not rows:
    raise refuse("embedding", "hold vectors", f"none in {path}", "write the file again")
  return words, np.stack(rows)


def _floats(values: list[str]) -> np.ndarray | None:
  try:
    row = np.array([value for value in values if value], np.float32)
  except ValueError:
    return None
  return row if np.isfinite(row).all() else None


def _read_binary(path: Path) -> tuple[list[str], Vectors]:
  """A line `count size`, then each word, a space and `size` little-endian float32."""
  data = io.BytesIO(path.read_bytes())
  first = data.readline().split()
  if len(first) != 2 or not all(part.isdigit() for part in first):
    raise _no_binary(path)
  count, size = map(int, first)
  words, content, at = [], data.getvalue(), data.tell()
  if count * size * 4 > len(content) or not size:
    raise _no_binary(path)
  rows = np.empty((count, size), np.float32)
  for row in rows:
    space = content.find(b" ", at)
    end = space + 1 + 4 * size
    if space < 0 or end > len(content):
      raise _no_binary(path)
    words.append(content[at:space].lstrip(b"\n").decode(errors="replace"))
    row[:] = np.frombuffer(content, "<f4", size, space + 1)
    at = end
  return words, rows


def _no_binary(path: Path):
  return refuse("embedding", "be whole in word2vec's binary format", str(path),
                "text files have another ending than .bin")  # fmt: skip
