"""Notes with labels: made-up ones in the words of ICD-10-CM, and MIMIC-III's summaries."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from attnzoo.experiments.data.cache import written_once
from attnzoo.experiments.data.config import DataConfig
from attnzoo.experiments.data.documents import digest
from attnzoo.experiments.data.notes.assertions import load_assertions
from attnzoo.experiments.data.notes.cleaning import clean
from attnzoo.experiments.data.notes.embeddings import (
  CBOW,
  EPOCHS,
  SIZE,
  check_embedding,
  read_vectors,
  train_cbow,
)
from attnzoo.experiments.data.notes.mimic3 import load_mimic3
from attnzoo.experiments.data.notes.sets import NoteSet, NoteSplit
from attnzoo.experiments.data.notes.vocabulary import Vocabulary

__all__ = ["NoteSet", "NoteSplit", "Vocabulary", "load_notes"]


def load_notes(config: DataConfig, cache: str | Path | None = None) -> NoteSet:
  """Makes or reads the notes that the config names.

  Args:
    config: source "icd10" or "mimic3"; `sequence_length` is the number of tokens that a note is
      cut to.
    cache: folder for what takes long, unless `config.cache` names one; "mimic3" must have one.

  Raises:
    DataError: what the source, or the package for its cleaning or its vectors, lacks.
  """
  if config.source == "mimic3":
    return load_mimic3(config, cache)
  check_embedding(config.embedding)
  notes = load_assertions(
    config.difficulty, rules=config.note_rules, longest=config.sequence_length
  )
  if config.embedding == "random":
    return notes  # the model draws vectors of its own width
  return dataclasses.replace(notes, embedding=_vectors(notes, config, config.cache or cache))


def _vectors(notes: NoteSet, config: DataConfig, cache: str | Path | None) -> np.ndarray:
  """Vectors from a file, or trained on the notes; the latter are kept where there is a cache."""
  if config.embedding != "cbow":
    return read_vectors(config.embedding, notes.vocabulary, config.seed)[0]
  names = ("train",) if config.cbow_corpus == "train" else tuple(notes.splits)

  def trained() -> np.ndarray:
    texts = (text for name in names for text in notes.splits[name].texts)
    sentences = [clean(text, notes.rules).split() for text in texts]
    return train_cbow(sentences, notes.vocabulary, seed=config.seed)

  def write(folder: Path) -> None:
    np.save(folder / "vectors.npy", trained())
    (folder / "meta.json").write_text(json.dumps(dict(notes=notes.name, splits=names)))

  if not cache:
    return trained()
  key = digest("cbow", notes.fingerprint, CBOW, SIZE, EPOCHS, names, config.seed)
  entry = written_once(Path(cache).expanduser() / key[:32], write)
  return np.load(entry / "vectors.npy", mmap_mode="r")
