"""Time of one layer against length, as tables and as a picture."""

import json
import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

from attnzoo.experiments.benchmarking.report import head_line
from attnzoo.experiments.lengths.layers import PASSES, TORCH
from attnzoo.experiments.lengths.published import LATENCY, LATENCY_SETTING

NAMES = ("speed.md", "speed.png", "speed.json")
_BASES = ("attention", TORCH)  # ratios compare with the faster one of these
_TITLES = {
  "train": "training: forward and backward",
  "prefill": "reading: forward",
  "decode": "decoding: one token of every sequence",
}


def write(folder: pathlib.Path, result: Mapping) -> str:
  """Writes the three files; returns the markdown.

  Args:
    result: environment, setting, rows and what was not run, as `length_speed` has them.
  """
  folder.mkdir(parents=True, exist_ok=True)
  table, picture, data = (folder / name for name in NAMES)
  data.write_text(json.dumps(dict(result, published=LATENCY), indent=1) + "\n")
  text = markdown(result)
  table.write_text(text + "\n")
  plot(result, picture)
  return text


def markdown(result: Mapping) -> str:
  """A table per pass, measured and published milliseconds side by side."""
  setting = result["setting"]
  lines = [
    "# Time of one layer against length",
    "",
    head_line(result["environment"]),
    "",
    f"Width {setting['features']}, {setting['heads']} heads, {setting['tokens']:,} tokens a call,"
    f" decoding {setting['decode_batch']} sequences; {setting['dtype']}. Milliseconds, medians;"
    " ratios are those of the fastest attention layer.",
    f"Published: {LATENCY_SETTING}; read off the figure.",
  ]
  times = _times(result["rows"])
  for pass_name in PASSES:
    if pass_name in times:
      lines += ["", f"## {_TITLES[pass_name]}", "", *_table(times[pass_name], LATENCY[pass_name])]
  lines += ["", *(f"not run: {note}" for note in result["not_run"])] if result["not_run"] else []
  return "\n".join(lines)


def _times(rows: Sequence[Mapping]) -> dict[str, dict[int, dict[str, float]]]:
  """pass -> length -> layer -> milliseconds, as the published ones are kept."""
  times: dict = defaultdict(lambda: defaultdict(dict))
  for row in rows:
    times[row["pass"]][row["length"]][row["layer"]] = row["median_s"] * 1e3
  return times


def _table(ours: Mapping, theirs: Mapping) -> list[str]:
  found = list(dict.fromkeys(layer for by_layer in ours.values() for layer in by_layer))
  ratios = [name for name in found if name.startswith("rat")]
  known = ("attention", "rat-16", "rnn")  # in all published tables
  header = [
    "tokens",
    *found,
    *(f"attention / {name}" for name in ratios),
    *(f"published {name}" for name in known),
    "published attention / rat-16",
  ]
  lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
  for length in sorted({*ours, *theirs}):
    here, there = ours.get(length, {}), theirs.get(length, {})
    cells = [
      f"{length:,}",
      *(_number(here.get(name)) for name in found),
      *(_ratio(here, name) for name in ratios),
      *(_published(there, name) for name in known),
      _ratio(there, "rat-16"),
    ]
    lines.append("| " + " | ".join(cells) + " |")
  return lines


def _number(value: float | None) -> str:
  return "-" if value is None else f"{value:.3g}"


def _published(times: Mapping, name: str) -> str:
  return "out of memory" if times.get(name, 0) is None else _number(times.get(name))


def _ratio(times: Mapping, name: str) -> str:
  bases = [times[base] for base in _BASES if times.get(base) is not None]
  if not bases or times.get(name) is None:
    return "-"
  return f"{min(bases) / times[name]:.2f}"


def plot(result: Mapping, path: pathlib.Path) -> None:
  """Log-log time against length, one panel per pass."""
  import matplotlib

  matplotlib.use("agg")
  import matplotlib.pyplot as plt

  curves: dict = defaultdict(lambda: defaultdict(list))
  for row in result["rows"]:
    point = (row["length"], *(row[f"{name}_s"] * 1e3 for name in ("median", "p20", "p80")))
    curves[row["pass"]][row["layer"]].append(point)
  passes = [name for name in PASSES if name in curves]
  figure, panels = plt.subplots(1, len(passes), figsize=(5 * len(passes), 4.5), squeeze=False)
  for panel, name in zip(panels[0], passes, strict=True):
    for layer, points in curves[name].items():
      length, median, p20, p80 = zip(*sorted(points), strict=True)
      (line,) = panel.loglog(length, median, marker="o", label=layer)
      panel.fill_between(length, p20, p80, alpha=0.2, color=line.get_color())
    panel.set(title=_TITLES[name], xlabel="tokens of a row", ylabel="milliseconds")
    panel.set_xscale("log", base=2)
    panel.grid(which="major", alpha=0.3)
    panel.legend(fontsize=8)
  setting, env = result["setting"], result["environment"]
  figure.suptitle(
    f"one layer of width {setting['features']}, {setting['tokens']:,} tokens a call,"
    f" {setting['dtype']}; {env['device']} ({env['processor']}), jax {env['versions']['jax']},"
    f" {env['date'][:10]}",
    fontsize=8,
  )
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  plt.close(figure)
