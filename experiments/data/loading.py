"""What the loop sees of the data: text, examples, answers, pictures or notes, in batches."""

from pathlib import Path

from attnzoo.experiments.data.config import NOTE_SOURCES, DataConfig
from attnzoo.experiments.data.corpus import Corpus, load_corpus
from attnzoo.experiments.data.errors import refuse
from attnzoo.experiments.data.examples import ExampleBatches, ExampleEvaluation, ExampleSet
from attnzoo.experiments.data.images import (
  ImageBatches,
  ImageEvaluation,
  ImageSet,
  image_kind,
  load_images,
)
from attnzoo.experiments.data.mqar import load_mqar
from attnzoo.experiments.data.notes import NoteSet, load_notes
from attnzoo.experiments.data.notes.batches import NoteBatches, NoteEvaluation
from attnzoo.experiments.data.pipeline import EvaluationBatches, TrainBatches
from attnzoo.experiments.data.sft import PairBatches, PairEvaluation, PairSet, load_pairs

Data = Corpus | ExampleSet | PairSet | ImageSet | NoteSet


def load_data(config: DataConfig, cache: str | Path | None = None) -> Data:
  """Reads or makes what the config names; `cache` as in `load_corpus`."""
  if config.source == "mqar":
    return load_mqar(config)
  if image_kind(config):
    return load_images(config, cache)
  if config.source in NOTE_SOURCES:
    return load_notes(config, cache)
  return load_pairs(config) if config.source == "sft" else load_corpus(config, cache)


def train_batches(
  data: Data, config: DataConfig, **process
) -> TrainBatches | ExampleBatches | PairBatches | ImageBatches | NoteBatches:
  """Endless batches with a position; `process` says which block of rows this process has."""
  if isinstance(data, ExampleSet):
    return ExampleBatches(data, config, **process)
  if isinstance(data, ImageSet):
    return ImageBatches(data, config, **process)
  if isinstance(data, NoteSet):
    return NoteBatches(data, config, **process)
  kind = PairBatches if isinstance(data, PairSet) else TrainBatches
  return kind(data, config, **process)


def evaluation_batches(
  data: Data, config: DataConfig, *, overlap: int = 0, **options
) -> EvaluationBatches | ExampleEvaluation | PairEvaluation | ImageEvaluation | NoteEvaluation:
  """One pass over a split; options are those of the classes."""
  if isinstance(data, Corpus):
    return EvaluationBatches(data, config, overlap=overlap, **options)
  if overlap:
    raise refuse("overlap", "be 0 for ready-made examples", overlap, "each is whole in itself")
  if isinstance(data, ImageSet):
    return ImageEvaluation(data, config, **options)
  if isinstance(data, NoteSet):
    return NoteEvaluation(data, config, **options)
  kind = ExampleEvaluation if isinstance(data, ExampleSet) else PairEvaluation
  return kind(data, config, **options)
