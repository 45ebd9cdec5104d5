"""Trains models on short rows and measures their loss on rows several times as long.

  python -m attnzoo.experiments.length_generalisation            (a quarter of an hour on two cores)
  make length-generalisation ARGS="--steps=2000 --workdir=runs/length_long"
  python -m attnzoo.experiments.length_generalisation --models=rat,rat-nope,attention --length=512

All models have the same data, seed and number of steps. Each is an ordinary run in a folder of the
workdir, so that `generate` and `evaluate` take it; a stopped program goes on where it was, and a
finished model is stored in points/ and not measured again.

Losses are those of the same tokens for all models and lengths: the last ones of held-out texts, a
quarter of a training length, read with ever more of what is before them. The loss by position in
the longest rows is drawn as well; there every position has other tokens.
"""

import json
import pathlib
import time
from typing import Any

from absl import flags

from attnzoo import zoo
from attnzoo.experiments import command_line
from attnzoo.experiments.benchmarking.report import environment
from attnzoo.experiments.data import DataConfig, load_data
from attnzoo.experiments.lengths import generalisation_report as report
from attnzoo.experiments.training import by_position, config, loop, stored
from attnzoo.zoo import models

# Series -> (preset at laptop size, fields that differ).
_NOPE = dict(rotary_base=None)
SERIES: dict[str, tuple[str, dict[str, Any]]] = {
  "rat": ("rat-tiny", {}),
  "rat-nope": ("rat-tiny", _NOPE),
  "rat-swa": ("rat-swa-tiny", {}),
  "rat-swa-nope": ("rat-swa-tiny", _NOPE),
  "attention": ("rat-attention-tiny", {}),
  "attention-nope": ("rat-attention-tiny", _NOPE),
  "attention-swa": ("rat-attention-swa-tiny", {}),
  "attention-swa-nope": ("rat-attention-swa-tiny", _NOPE),
  "rnn": ("rat-rnn-tiny", {}),
}
DEFAULT = ["rat", "rat-swa", "rat-swa-nope", "attention-swa", "attention-swa-nope", "rnn"]

_MODELS = flags.DEFINE_list("models", DEFAULT, f"Of {', '.join(SERIES)}.")
_LENGTH = flags.DEFINE_integer("length", 256, "Tokens of a row in training.", lower_bound=16)
_TIMES = flags.DEFINE_integer(
  "times", 4, "Rows of the measurement are so many times as long; a power of 2.", lower_bound=2
)
_STEPS = flags.DEFINE_integer("steps", 400, "Training steps of each model.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 8, "Rows of a step.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 128, "Most rows to measure with.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of weights and data.", lower_bound=0)
_PATH = flags.DEFINE_string(
  "data_path", "", "Text to train on (file or folder); empty = source of the standard library."
)
_MODEL_FIELDS = flags.DEFINE_string(
  "model_fields", "{}", 'Other sizes of all models as JSON, such as {"features": 256}.'
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/length_generalisation", "Folder for everything.")

_PIECES = 8  # numbers by position per training length


def main(_) -> None:
  experiments = {name: experiment_of(name) for name in _MODELS.value}
  workdir = pathlib.Path(_WORKDIR.value).expanduser()
  (workdir / "points").mkdir(parents=True, exist_ok=True)
  records, rows = [], None
  for number, (name, experiment) in enumerate(experiments.items(), 1):
    identity = _identity(name, experiment)
    file = workdir / "points" / f"{identity}.json"
    record = stored.read(file)
    if record is None:
      print(f"{number}/{len(experiments)}  {name}", flush=True)
      if rows is None:
        data = load_data(experiment.data, cache=workdir / "corpus")
        longest = _LENGTH.value * _TIMES.value
        rows = by_position.whole_rows(data, experiment.data, longest, _ROWS.value)
      record = dict(series=name, **_measured(experiment, workdir / identity, *rows))
      stored.write(file, record)
    print(f"{number}/{len(experiments)}  {report.line(record)}", flush=True)
    records.append(record)
  print()
  print(report.write(workdir, records, environment()))
  print(" ".join(str(workdir / name) for name in report.NAMES))


def experiment_of(name: str) -> config.Experiment:
  """The run of one series.

  Raises:
    ValueError: an unknown series, or flags that do not go together.
  """
  if name not in SERIES:
    hint = models.nearest(name, list(SERIES))
    raise ValueError(f"--models must be of the known series; got {name!r} ({hint})")
  if _TIMES.value & (_TIMES.value - 1) or _LENGTH.value % _PIECES:
    raise ValueError(
      f"--times must be a power of 2 and --length a multiple of {_PIECES}; got {_TIMES.value} and"
      f" {_LENGTH.value} (such as 4 and 256)"
    )
  preset, fields = SERIES[name]
  sizes = dict(train_length=_LENGTH.value, loss_chunk=512) | _fields()
  return config.Experiment(
    model=zoo.get_config(preset, **(sizes | fields)),
    data=DataConfig(
      source="auto", path=_PATH.value, validation_fraction=0.02, seed=_SEED.value,
      sequence_length=_LENGTH.value, batch_size=_BATCH.value,
    ),
    optimizer=config.OptimizerConfig(
      name="muon", learning_rate=4e-3, schedule="linear", warmup_fraction=0.1
    ),
    train=config.TrainConfig(
      steps=_STEPS.value, seed=_SEED.value, log_every=50, eval_every=0, checkpoint_every=200,
      keep_last=1, sample_tokens=0,
    ),
  )  # fmt: skip


def _fields() -> dict[str, Any]:
  try:
    fields = json.loads(_MODEL_FIELDS.value)
    if not isinstance(fields, dict):
      raise ValueError("no object")
  except ValueError as error:
    raise ValueError(
      f"--model_fields must be a JSON object; got {_MODEL_FIELDS.value!r} ({error}; such as"
      ' {"features": 256})'
    ) from None
  return fields


def _measured(experiment: config.Experiment, folder: pathlib.Path, tokens, targets) -> dict:
  """Trains, or goes on with what is in the folder, and measures."""
  began = time.monotonic()
  outcome = loop.train(experiment, folder)
  if outcome.evaluation is None:
    raise InterruptedError("stopped by a signal; the same command goes on from there")
  trained = time.monotonic()
  length = experiment.data.sequence_length
  piece = length // _PIECES
  by_length, count = [], length // 2
  while count <= tokens.shape[1]:
    losses = by_position.loss_by_position(
      outcome.run.parts,
      outcome.state.params,
      tokens[:, -count:],
      targets[:, -count:],
      piece=piece,
      batch_size=max(1, experiment.data.batch_size * length // count),
    )
    by_length.append((count, float(losses[-(_PIECES // 4) :].mean())))
    count *= 2
  return dict(
    length=length,
    piece=piece,
    by_length=by_length,
    by_position=losses.tolist(),
    rows=len(tokens),
    steps=int(outcome.state.step),
    batch_size=experiment.data.batch_size,
    parameters=models.parameter_count(experiment.model),
    validation=outcome.evaluation._asdict(),
    train_seconds=trained - began,
    measure_seconds=time.monotonic() - trained,
    experiment=config.to_json_dict(experiment),
  )


def _identity(name: str, experiment: config.Experiment) -> str:
  """Names a run after its series and, in short, everything that decides its result."""
  raw = config.to_json_dict(experiment)
  return f"{name}-{stored.digest([raw, _TIMES.value, _ROWS.value])}"


if __name__ == "__main__":
  command_line.run(main)
