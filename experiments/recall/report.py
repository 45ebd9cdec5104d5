"""What a sweep is written as: a table, a picture, and JSON; the published figures beside it."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from attnzoo.experiments.recall.points import SERIES
from attnzoo.experiments.recall.published import FIGURE_2
from attnzoo.experiments.recall.tasks import Task

NAMES = ("recall.md", "recall.png", "recall.json")


def write(
  folder: pathlib.Path, records: Sequence[Mapping], task_name: str, task: Task, env: Mapping
) -> str:
  """Writes the three files; returns the markdown.

  Args:
    records: a dictionary per point, as `recall_sweep` stores them.
    env: of `benchmarking.report.environment`.
  """
  table, picture, data = (folder / name for name in NAMES)
  content = dict(task=task_name, environment=dict(env), points=list(records),
                 published=dict(figure_2=FIGURE_2))  # fmt: skip
  data.write_text(json.dumps(content, indent=1) + "\n")
  text = markdown(records, task_name, task, env)
  table.write_text(text)
  plot(picture, records, task_name, task)
  return text


def markdown(records: Sequence[Mapping], task_name: str, task: Task, env: Mapping) -> str:
  """Two tables: measured here and published."""
  device = f"{env['device']} ({env['platform']}; host {env['processor']})"
  versions = f"jax {env['versions']['jax']}, commit {env['commit']}"
  seconds = sum(record["seconds"] for record in records)
  names = [segment["name"] for segment in records[0]["best"]["recall"]["segments"]]
  header = ["model", "size", "bytes", "recall", "rate", *names, "steps", "seconds"]
  if any(record["seeds"] > 1 for record in records):
    header.insert(4, "seeds")
  lines = [
    f"# Recall against state size, task `{task_name}`",
    "",
    f"{describe(task)}. {device}; {versions}; {env['date']}; {seconds:,.0f} s in all.",
    "",
    "| " + " | ".join(header) + " |",
    "|" + "---|" * len(header),
  ]
  for record in records:
    best = record["best"]
    row = [
      SERIES[record["series"]].label,
      record["size"],
      f"{record['bytes']:,}",
      f"**{best['recall']['accuracy']:.3f}**",
      f"{best['learning_rate']:g}",
      *(f"{segment['accuracy']:.3f}" for segment in best["recall"]["segments"]),
      f"{best['curve'][-1][0]:,}",
      f"{record['seconds']:.0f}",
    ]
    if "seeds" in header:
      found = _at_rate(record, best["learning_rate"])
      row.insert(4, f"{min(found):.3f} to {max(found):.3f} of {len(found)}")
    lines.append("| " + " | ".join(row) + " |")
  lines += ["", "Published (figure 2 of the paper, read off it to +-0.005; a larger task: see"
            " `--task=paper`)", "", "| model | bytes | recall |", "|---|---|---|"]  # fmt: skip
  for name, points in FIGURE_2.items():
    lines += [f"| {name} | {size:,} | {accuracy:.3f} |" for size, accuracy in points]
  return "\n".join(lines) + "\n"


def describe(task: Task) -> str:
  """The task in one line."""
  data, train = task.data, task.train
  return (
    f"Multi-query associative recall over {data.mqar_vocab_size:,} ids, trained on"
    f" length:pairs:examples {data.mqar_train}, tested on {data.mqar_test}; batches of"
    f" {data.batch_size}, at most {train.steps:,} steps, ended early above a recall of"
    f" {task.enough:g}; the best of the learning rates"
    f" {', '.join(f'{rate:g}' for rate in task.learning_rates)}"
  )


def plot(path: pathlib.Path, records: Sequence[Mapping], task_name: str, task: Task) -> None:
  """Recall against bytes of state: left what was measured, right what was published."""
  import matplotlib

  matplotlib.use("agg")
  import matplotlib.pyplot as plt

  figure, (ours, theirs) = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True)
  for number, (name, series) in enumerate(SERIES.items()):
    points = [record for record in records if record["series"] == name]
    points.sort(key=lambda record: record["bytes"])
    if not points:
      continue
    sizes = [record["bytes"] for record in points]
    best = [record["best"]["recall"]["accuracy"] for record in points]
    ours.plot(sizes, best, marker="o", color=f"C{number}", label=series.label)
    spread = [_at_rate(record, record["best"]["learning_rate"]) for record in points]
    if any(len(found) > 1 for found in spread):
      ours.vlines(sizes, list(map(min, spread)), list(map(max, spread)), color=f"C{number}")
  colors = {"BASED": "C0", "sliding window": "C1", "full attention": "C3"}
  for number, (name, points) in enumerate(FIGURE_2.items()):
    sizes, recall = zip(*points, strict=True)
    theirs.plot(sizes, recall, marker="s", linestyle="--", label=name,
                color=colors.get(name, f"C{number + 4}"))  # fmt: skip
  segments = f"{task.data.mqar_vocab_size:,} ids, tested on {_shapes(task.data.mqar_test)}"
  ours.set(title=f"measured here, task {task_name}\n{segments}", ylabel="recall")
  theirs.set(title="published: figure 2 of the paper, read off it\n8,192 ids, up to 1024 tokens and"
             " 256 pairs")  # fmt: skip
  for panel in (ours, theirs):
    panel.set_xscale("log", base=2)
    panel.set(xlabel="bytes of state of one sequence", ylim=(-0.03, 1.05))
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  plt.close(figure)


def _shapes(segments: str) -> str:
  """`64:4:256,128:32:256` as `64:4, 128:32`: length and pairs."""
  return ", ".join(part.rpartition(":")[0] for part in segments.split(","))


def _at_rate(record: Mapping[str, Any], rate: float) -> list[float]:
  """Recall of all seeds at one learning rate."""
  return [model["accuracy"] for model in record["models"] if model["learning_rate"] == rate]
