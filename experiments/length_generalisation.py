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

import functools
from typing import Any

from attnzoo.experiments import command_line
from attnzoo.experiments.benchmarking.report import environment
from attnzoo.experiments.lengths import generalisation_report as report
from attnzoo.experiments.lengths import measuring
from attnzoo.experiments.lengths.settings import define_flags, experiment_of, identity

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

_settings = define_flags(
  SERIES,
  DEFAULT,
  length=256,
  times=4,
  steps=400,
  batch_size=8,
  rows=128,
  workdir="runs/length_generalisation",
)


def main(_) -> None:
  settings = _settings()
  experiments = {
    name: experiment_of(settings, SERIES[name], train_length=settings.length)
    for name in settings.models
  }
  workdir = settings.workdir
  (workdir / "points").mkdir(parents=True, exist_ok=True)
  rows = functools.cache(lambda: measuring.held_out(next(iter(experiments.values())), settings))
  records = []
  for number, (name, experiment) in enumerate(experiments.items(), 1):
    place, point = f"{number}/{len(experiments)}", identity(name, experiment, settings)

    def measured(name=name, experiment=experiment, place=place, point=point) -> dict[str, Any]:
      print(f"{place}  {name}", flush=True)
      shortest = settings.length // 2
      folder = workdir / point
      record, _ = measuring.train_and_measure(experiment, folder, rows(), shortest=shortest)
      return dict(series=name, **record)

    records.append(measuring.stored_or(workdir / "points" / f"{point}.json", measured))
    print(f"{place}  {report.line(records[-1])}", flush=True)
  print()
  print(report.write(workdir, records, environment()))
  print(" ".join(str(workdir / name) for name in report.NAMES))


if __name__ == "__main__":
  command_line.run(main)
