"""What the programs that train on short rows and read longer ones let the user choose."""

import pathlib
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from absl import flags

from attnzoo import zoo
from attnzoo.experiments import command_line
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config, stored
from attnzoo.zoo import models

flags.disclaim_key_flags()  # so that `--help` of a program lists the flags defined here for it

PIECES = 8  # numbers by position per training length


class Settings(NamedTuple):
  """The flags, read."""

  models: list[str]
  length: int
  times: int
  steps: int
  batch_size: int
  rows: int
  seed: int
  data_path: str
  model_fields: dict[str, Any]
  workdir: pathlib.Path


def define_flags(
  known: Collection[str], default: list[str], **defaults: Any
) -> Callable[[], Settings]:
  """Defines the flags; what it returns reads them once they are parsed.

  Args:
    known: names of models. default: those that are trained if nothing is said.
    defaults: of length, times, steps, batch_size, rows and workdir.

  The reader raises ValueError for an unknown model and for flags that do not go together.
  """
  of = defaults.__getitem__
  flags.DEFINE_list("models", default, f"Of {', '.join(known)}.")
  flags.DEFINE_integer("length", of("length"), "Tokens of a row in training.", lower_bound=16)
  flags.DEFINE_integer(
    "times", of("times"), "Rows of the measurement are so many times as long; a power of 2.",
    lower_bound=2,
  )  # fmt: skip
  flags.DEFINE_integer("steps", of("steps"), "Training steps of each model.", lower_bound=1)
  flags.DEFINE_integer("batch_size", of("batch_size"), "Rows of a step.", lower_bound=1)
  flags.DEFINE_integer("rows", of("rows"), "Most rows to measure with.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Of weights and data.", lower_bound=0)
  flags.DEFINE_string(
    "data_path", "", "Text to train on (file or folder); empty = source of the standard library."
  )
  flags.DEFINE_string(
    "model_fields", "{}", 'Other sizes of all models as JSON, such as {"features": 256}.'
  )
  flags.DEFINE_string("workdir", of("workdir"), "Folder for everything.")
  return lambda: _read(known)


def _read(known: Collection[str]) -> Settings:
  raw = {name: flags.FLAGS[name].value for name in Settings._fields}
  raw["model_fields"] = command_line.json_object("model_fields", raw["model_fields"])
  raw["workdir"] = pathlib.Path(raw["workdir"]).expanduser()
  settings = Settings(**raw)
  for name in settings.models:
    if name not in known:
      hint = models.nearest(name, list(known))
      raise ValueError(f"--models must be of the known series; got {name!r} ({hint})")
  if settings.times & (settings.times - 1) or settings.length % PIECES:
    raise ValueError(
      f"--times must be a power of 2 and --length a multiple of {PIECES}; got {settings.times} and"
      f" {settings.length} (such as 4 and 256)"
    )
  return settings


def experiment_of(
  settings: Settings, series: tuple[str, dict[str, Any]], **sizes: Any
) -> config.Experiment:
  """The run of one model: its preset with these sizes, --model_fields and the series' own fields.

  Raises:
    ValueError: the model has no such field, or not such a value.
  """
  preset, fields = series
  sizes = dict(loss_chunk=512) | sizes | settings.model_fields | fields
  return config.Experiment(
    model=zoo.get_config(preset, **sizes),
    data=DataConfig(
      source="auto", path=settings.data_path, validation_fraction=0.02, seed=settings.seed,
      sequence_length=settings.length, batch_size=settings.batch_size,
    ),
    optimizer=config.OptimizerConfig(
      name="muon", learning_rate=4e-3, schedule="linear", warmup_fraction=0.1
    ),
    train=config.TrainConfig(
      steps=settings.steps, seed=settings.seed, log_every=50, eval_every=0, checkpoint_every=200,
      keep_last=1, sample_tokens=0,
    ),
  )  # fmt: skip


def identity(name: str, experiment: config.Experiment, settings: Settings) -> str:
  """Names a run after its series and, in short, everything that decides its result."""
  raw = config.to_json_dict(experiment)
  return f"{name}-{stored.digest([raw, settings.times, settings.rows])}"
