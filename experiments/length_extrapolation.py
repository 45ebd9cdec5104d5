"""Trains softmax, softplus and other attention on short rows and reads rows 16 times as long.

  python -m attnzoo.experiments.length_extrapolation             (a quarter of an hour on two cores)
  make length-extrapolation ARGS="--steps=2000 --workdir=runs/extrapolation_long"
  python -m attnzoo.experiments.length_extrapolation --models=softmax,lssar-p15 --passkey_steps=0

All models have the same data, seed and number of steps and, before training, the same weights. Each
is an ordinary run in a folder of the workdir, so that `generate` and `evaluate` take it; a stopped
program goes on where it was, and what is finished is stored in points/ and not measured again.

Loss: of the same tokens for all models and lengths (the last quarter of a training length of
held-out texts, read with ever more of what is before them), and of all tokens read, which is what
the paper's table has. Two models are also read with the re-weighting switched on after training.

Passkey retrieval: each trained model goes on for some steps on texts of up to the training length
that hide a number and ask for it (`data/passkey.py`), then is asked about longer ones. Models of
this size retrieve nothing without it; the paper's are asked without such practice.

Writes length_extrapolation.md, .png and .json into the workdir, the paper's numbers beside ours.
The paper's own size is the experiment `softplus_fineweb`, with `evaluate --sequence_length`.
"""

import functools
import pathlib
import time
from typing import Any

from absl import flags

from attnzoo.experiments import command_line
from attnzoo.experiments.benchmarking.report import environment
from attnzoo.experiments.data.passkey import shortest
from attnzoo.experiments.lengths import extrapolation_report as report
from attnzoo.experiments.lengths import measuring, passkeys
from attnzoo.experiments.lengths.settings import (
  Settings,
  define_flags,
  experiment_of,
  identity,
)
from attnzoo.experiments.training import config, runs, stored

# Series -> (preset at laptop size, fields that differ).
SERIES: dict[str, tuple[str, dict[str, Any]]] = {
  "softmax": ("softplus-softmax-tiny", {}),
  "lssa": ("softplus-lssa-tiny", {}),
  "lssar-p3": ("softplus-p3-tiny", {}),
  "lssar-p15": ("softplus-tiny", {}),
  "sigmoid": ("softplus-sigmoid-tiny", {}),
  "relu": ("softplus-relu-tiny", {}),
}
# Series -> (name, variant) that its trained model is read with as well.
SWITCHED = {
  "softmax": ("softmax, p = 15 switched on", "softmax_rw_p15"),
  "lssa": ("lssa, p = 15 switched on", "lssar_p15"),
}

_settings = define_flags(
  SERIES,
  list(SERIES),
  length=128,
  times=16,
  steps=450,
  batch_size=16,
  rows=64,
  workdir="runs/length_extrapolation",
)
_PASSKEY_STEPS = flags.DEFINE_integer(
  "passkey_steps", 300, "Steps of practice in retrieval; 0 leaves it out.", lower_bound=0
)
_PASSKEY_DIGITS = flags.DEFINE_integer(
  "passkey_digits", 2, "Of a key; none comes twice in it.", lower_bound=1, upper_bound=10
)
_PASSKEY_TRIALS = flags.DEFINE_integer(
  "passkey_trials", 128, "Texts asked about at each length.", lower_bound=1
)


def main(_) -> None:
  settings = _settings()
  task = passkeys.Task(_PASSKEY_STEPS.value, _PASSKEY_DIGITS.value, _PASSKEY_TRIALS.value)
  if task.steps and settings.length < shortest(task.digits):
    raise ValueError(
      f"--length must be at least {shortest(task.digits)} for keys of {task.digits} digits; got"
      f" {settings.length} (or --passkey_steps=0)"
    )
  experiments = {name: experiment_of(settings, SERIES[name]) for name in settings.models}
  (settings.workdir / "points").mkdir(parents=True, exist_ok=True)
  rows = functools.cache(lambda: measuring.held_out(next(iter(experiments.values())), settings))
  records = []
  for number, (name, experiment) in enumerate(experiments.items(), 1):
    print(f"{number}/{len(experiments)}  {name}", flush=True)
    records.append(_record(name, experiment, settings, task, rows))
    print(f"{number}/{len(experiments)}  {report.line(records[-1])}", flush=True)
  print()
  print(report.write(settings.workdir, records, environment()))
  print(" ".join(str(settings.workdir / name) for name in report.NAMES))


def _record(
  name: str, experiment: config.Experiment, settings: Settings, task: passkeys.Task, rows
) -> dict[str, Any]:
  """What is stored of a model, or measured now."""
  run = identity(name, experiment, settings)
  points, folder = settings.workdir / "points", settings.workdir / run

  def losses():
    record, _ = measuring.train_and_measure(experiment, folder, rows(), shortest=settings.length)
    began = time.monotonic()
    record["switched"] = {
      label: measuring.losses_by_length(
        loaded.parts, loaded.params, experiment.data, rows(), shortest=settings.length
      )
      for label, loaded in _switched(name, folder).items()
    }
    record["measure_seconds"] += time.monotonic() - began
    return dict(series=name, **record)

  record = measuring.stored_or(points / f"{run}.json", losses)
  if task.steps:
    keys = f"{run}-passkey-{stored.digest(task)}"
    record["passkey"] = measuring.stored_or(
      points / f"{keys}.json",
      lambda: _passkey(name, experiment, folder, settings, task, settings.workdir / keys),
    )
  return record


def _passkey(
  name: str,
  experiment: config.Experiment,
  source: pathlib.Path,
  settings: Settings,
  task: passkeys.Task,
  folder: pathlib.Path,
) -> dict[str, Any]:
  began = time.monotonic()
  run = passkeys.tuning(experiment, source, task, settings.workdir / "passkeys")
  outcome = measuring.trained(run, folder)
  middle = time.monotonic()
  lengths = [settings.length << n for n in range(settings.times.bit_length())]
  ask = functools.partial(
    passkeys.retrieval, task=task, lengths=lengths, seed=settings.seed,
    tokens=settings.length * settings.batch_size,
  )  # fmt: skip
  return dict(
    **task._asdict(),
    found=ask(outcome.run.parts, outcome.state.params),
    switched={
      label: ask(loaded.parts, loaded.params) for label, loaded in _switched(name, folder).items()
    },
    validation=outcome.evaluation._asdict(),
    train_seconds=middle - began,
    measure_seconds=time.monotonic() - middle,
  )


def _switched(name: str, folder: pathlib.Path) -> dict[str, runs.LoadedRun]:
  """The weights in `folder`, run with another variant than they were trained with."""
  if name not in SWITCHED:
    return {}
  label, variant = SWITCHED[name]
  return {label: runs.load(folder, "last", dict(variant=variant))}


if __name__ == "__main__":
  command_line.run(main)
