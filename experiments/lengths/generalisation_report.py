"""Loss against length of models trained on short rows: table, picture, JSON."""

import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from attnzoo.experiments.lengths.published import GENERALISATION, GENERALISATION_SETTING

NAMES = ("lengths.md", "lengths.png", "lengths.json")


def line(record: Mapping) -> str:
  """One model in one line."""
  losses = ", ".join(f"{loss:.3f} at {n:,}" for n, loss in record["by_length"])
  return f"{record['series']}: loss {losses} ({record['train_seconds']:.0f} s of training)"


def write(folder: pathlib.Path, records: Sequence[Mapping], env: Mapping) -> str:
  """Writes the three files; returns the markdown.

  Args:
    records: a dictionary per model, as `length_generalisation` stores them.
    env: of `benchmarking.report.environment`.
  """
  table, picture, data = (folder / name for name in NAMES)
  content = dict(environment=dict(env), models=list(records), published=GENERALISATION)
  data.write_text(json.dumps(content, indent=1) + "\n")
  text = markdown(records, env)
  table.write_text(text)
  plot(picture, records, env)
  return text


def markdown(records: Sequence[Mapping], env: Mapping) -> str:
  """Measured and published losses side by side."""
  first = records[0]
  ends = [n for n, _ in first["by_length"]]
  seconds = sum(record["train_seconds"] + record["measure_seconds"] for record in records)
  header = ["model", "parameters", *(f"{n:,} tokens" for n in ends), "change", "seconds"]
  header += ["published, 4,096", "16,384"]
  lines = [
    "# Loss against length after training on short rows",
    "",
    f"Nats per token of the last {first['length'] // 4:,} tokens of {first['rows']} held-out texts,"
    " read with so many tokens in all: every column has the same targets. \"change\" is from the"
    f" training length to the last column. Trained {first['steps']:,} steps of"
    f" {first['batch_size']} rows of {first['length']:,} tokens."
    f" {where(env)}; {seconds:,.0f} s in all.",
    f"Published: figure 6 of the paper, read off it; {GENERALISATION_SETTING}.",
    "",
    "| " + " | ".join(header) + " |",
    "|" + "---|" * len(header),
  ]  # fmt: skip
  for record in records:
    found = dict(record["by_length"])
    row = [
      record["series"],
      f"{record['parameters']:,}",
      *(f"{found[n]:.3f}" for n in ends),
      f"{found[ends[-1]] - found[record['length']]:+.3f}",
      f"{record['train_seconds']:.0f}",
      *GENERALISATION.get(record["series"], ("-", "-")),
    ]
    lines.append("| " + " | ".join(row) + " |")
  return "\n".join(lines) + "\n"


def plot(path: pathlib.Path, records: Sequence[Mapping], env: Mapping) -> None:
  """Left the loss of the same tokens against how much is read, right the loss by position."""
  import matplotlib

  matplotlib.use("agg")
  import matplotlib.pyplot as plt

  figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
  for number, record in enumerate(records):
    style = dict(color=f"C{number}", linestyle="--" if record["series"].endswith("nope") else "-")
    left.plot(*zip(*record["by_length"], strict=True), marker="o", label=record["series"], **style)
    centres = (np.arange(len(record["by_position"])) + 0.5) * record["piece"]
    right.plot(centres, record["by_position"], **style)
  # What happens beyond the training length is the subject; the first tokens would hide it.
  shown = [loss for record in records for _, loss in record["by_length"]]
  shown += [loss for record in records for loss in record["by_position"][1:]]
  shown = [loss for loss in shown if np.isfinite(loss)]
  if shown:
    left.set_ylim(min(shown) - 0.05, min(max(shown), min(shown) + 4) + 0.05)
  left.set(xlabel="tokens read", ylabel="loss, nats per token",
           title="the same tokens after more and more")  # fmt: skip
  right.set(xlabel="position in the row", title="other tokens at every position")
  for panel in (left, right):
    panel.axvline(records[0]["length"], color="gray", linewidth=1)
    panel.set_xscale("log", base=2)
    panel.grid(alpha=0.3)
  left.legend(fontsize=8)
  figure.suptitle(
    f"trained on rows of {records[0]['length']:,} tokens (grey line); {where(env)}", fontsize=8
  )
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  plt.close(figure)


def where(env: Mapping) -> str:
  """Device, version, commit and date of a report."""
  return (
    f"{env['device']} ({env['platform']}; host {env['processor']}), jax {env['versions']['jax']},"
    f" commit {env['commit']}, {env['date']}"
  )
