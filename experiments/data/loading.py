"""What the loop sees of the data: text or ready-made examples, and batches of either."""

from pathlib import Path

from attnzoo.experiments.data.config import DataConfig
from attnzoo.experiments.data.corpus import Corpus, load_corpus
from attnzoo.experiments.data.errors import refuse
from attnzoo.experiments.data.examples import ExampleBatches, ExampleEvaluation, ExampleSet
from attnzoo.experiments.data.mqar import load_mqar
from attnzoo.experiments.data.pipeline import EvaluationBatches, TrainBatches

Data = Corpus | ExampleSet


def load_data(config: DataConfig, cache: str | Path | None = None) -> Data:
  """Reads or makes what the config names; `cache` as in `load_corpus`."""
  return load_mqar(config) if config.source == "mqar" else load_corpus(config, cache)


def train_batches(data: Data, config: DataConfig, **process) -> TrainBatches | ExampleBatches:
  """Endless batches with a position; `process` says which block of rows this process has."""
  kind = ExampleBatches if isinstance(data, ExampleSet) else TrainBatches
  return kind(data, config, **process)


def evaluation_batches(
  data: Data, config: DataConfig, *, overlap: int = 0, **options
) -> EvaluationBatches | ExampleEvaluation:
  """One pass over a split; options are those of the two classes."""
  if not isinstance(data, ExampleSet):
    return EvaluationBatches(data, config, overlap=overlap, **options)
  if overlap:
    raise refuse("overlap", "be 0 for ready-made examples", overlap, "each is whole in itself")
  return ExampleEvaluation(data, config, **options)
