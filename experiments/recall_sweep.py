"""Draws recall against the size of the state, for models of the zoo.

  python -m attnzoo.experiments.recall_sweep                     (a quarter of an hour on two cores)
  python -m attnzoo.experiments.recall_sweep --task=paper --workdir=runs/recall_paper    (on a GPU)
  python -m attnzoo.experiments.recall_sweep --series=based,sliding --seeds=3

Trains every model with each learning rate of the task on multi-query associative recall and writes
recall.md, recall.png and recall.json into the workdir, the published figures beside what was
measured. A finished point is stored in points/ and not trained again; delete its file to do so.
"""

import pathlib
import re
import time
from typing import Any

import jax
from absl import flags

from attnzoo.experiments import command_line
from attnzoo.experiments.benchmarking.report import environment
from attnzoo.experiments.data import load_data
from attnzoo.experiments.data.mqar import segments_of
from attnzoo.experiments.recall import points, report
from attnzoo.experiments.recall.tasks import TASKS, Task
from attnzoo.experiments.recall.training import Trained, train_point
from attnzoo.experiments.training import config, reports, stored

_TASK = flags.DEFINE_enum("task", "small", list(TASKS), "Size of examples and models.")
_SERIES = flags.DEFINE_list("series", list(points.SERIES), "Kinds of models.")
_ONLY = flags.DEFINE_string("only", "", "Regular expression: only such points (`based, width 32`).")
_SEEDS = flags.DEFINE_integer("seeds", 1, "Models per learning rate.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 0, "Other number of steps; 0 = the task's.", lower_bound=0)
_RATES = flags.DEFINE_list("learning_rates", [], "Others than the task's.")
_TRAIN = flags.DEFINE_string("train", "", "Other training examples, as length:pairs:examples,...")
_TEST = flags.DEFINE_string("test", "", "Other test examples, likewise.")
_CORES = flags.DEFINE_integer(
  "cores", 2, "CPU cores to divide the models of a point among.", lower_bound=1
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/recall", "Folder for the results.")


def main(_) -> None:
  task = _changed(TASKS[_TASK.value])
  wanted = _wanted()
  workdir = pathlib.Path(_WORKDIR.value).expanduser()
  if jax.config.jax_platforms == "cpu":
    jax.config.update("jax_num_cpu_devices", _CORES.value)
  folder = workdir / "points"
  folder.mkdir(parents=True, exist_ok=True)
  began, examples, records = time.monotonic(), None, []
  for number, point in enumerate(wanted, 1):
    name = f"{number}/{len(wanted)}  {points.SERIES[point.series].label}, {point.size}"
    file = folder / f"{_file_name(point, task)}.json"
    record = stored.read(file)
    if record is None:
      if examples is None:
        examples = load_data(task.data)
        print(examples.describe(), flush=True)
      print(f"{name}: {_elapsed(began)} so far", flush=True)
      start = time.monotonic()
      trained = train_point(point.model, task, examples, seeds=_SEEDS.value)
      record = _record(point, task, trained, time.monotonic() - start)
      stored.write(file, record)
    accuracy = record["best"]["recall"]["accuracy"]
    print(f"{name}: recall {accuracy:.3f} with {record['bytes']:,} bytes", flush=True)
    records.append(record)
  print()
  print(report.write(workdir, records, _TASK.value, task, environment()))
  print(" ".join(str(workdir / name) for name in report.NAMES))


def _wanted() -> list[points.Point]:
  try:
    pattern = re.compile(_ONLY.value)
  except re.error as error:
    raise ValueError(
      f"--only must be a regular expression; got {_ONLY.value!r} ({error})"
    ) from None
  known = points.points(_TASK.value, _SERIES.value)
  wanted = [point for point in known if pattern.search(f"{point.series}, {point.size}")]
  if not wanted:
    listed = "; ".join(f"{point.series}, {point.size}" for point in known)
    raise ValueError(f"--only must leave a point; got {_ONLY.value!r} (there are: {listed})")
  return wanted


def _changed(task: Task) -> Task:
  """The task with what the flags replace.

  Raises:
    ValueError: what they say cannot be.
  """
  raw = config.to_json_dict(task.experiment(points.points("small", ["based"])[0].model))
  data, train = raw["data"], raw["train"]
  data |= {f"mqar_{name}": text for name, text in (("train", _TRAIN.value), ("test", _TEST.value))
           if text}  # fmt: skip
  if _STEPS.value:
    train["steps"] = _STEPS.value
  changed = config.from_config_dict(raw)
  segments_of(changed.data)  # what is wrong with them is said before anything is written
  rates = task.learning_rates
  if _RATES.value:
    rates = tuple(map(_rate, _RATES.value))
  return task._replace(data=changed.data, train=changed.train, learning_rates=rates)


def _rate(text: str) -> float:
  try:
    rate = float(text)
  except ValueError:
    rate = 0.0
  if not rate > 0:
    raise ValueError(f"--learning_rates must be positive numbers; got {text!r} (such as 0.01,0.03)")
  return rate


def _file_name(point: points.Point, task: Task) -> str:
  """Names the point and, in short, everything that decides its result."""
  identity = [_SEEDS.value, task.learning_rates, task.enough]
  identity.append(config.to_json_dict(task.experiment(point.model)))
  words = point.size.replace(",", "").replace(" ", "-")
  return f"{point.series}-{words}-{stored.digest(identity)}"


def _record(
  point: points.Point, task: Task, trained: list[Trained], seconds: float
) -> dict[str, Any]:
  best = max(trained, key=lambda model: model.recall.accuracy)
  longest = max(segment.length for segment in segments_of(task.data)["validation"])
  models = [
    dict(learning_rate=model.learning_rate, seed=model.seed, accuracy=model.recall.accuracy,
         loss=model.loss, curve=model.curve)
    for model in trained
  ]  # fmt: skip
  return dict(
    series=point.series,
    size=point.size,
    bytes=points.state_bytes(point.model, longest),
    seeds=_SEEDS.value,
    seconds=seconds,
    best=dict(learning_rate=best.learning_rate, seed=best.seed, recall=best.recall.to_json(),
              curve=best.curve),
    models=models,
  )  # fmt: skip


def _elapsed(began: float) -> str:
  return reports.duration(time.monotonic() - began)


if __name__ == "__main__":
  command_line.run(main)
