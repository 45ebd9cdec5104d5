"""Loss and passkey retrieval against length of models trained on short rows."""

import json
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from attnzoo.experiments.data import passkey
from attnzoo.experiments.lengths import published
from attnzoo.experiments.lengths.generalisation_report import where

NAMES = tuple(f"length_extrapolation.{ending}" for ending in ("md", "png", "json"))
_PAPER = tuple(published.EXTRAPOLATION["softmax"])  # lengths


def line(record: Mapping) -> str:
  """One model in one line."""
  (_, first), (longest, last) = (record["by_length"][i] for i in (0, -1))
  text = f"{record['series']}: loss {first:.3f}, {last:.3f} of {longest:,} tokens"
  if "passkey" in record:
    found = record["passkey"]["found"]
    text += f"; keys {found[0]['keys']:.0%}, {found[-1]['keys']:.0%}"
  return f"{text} ({_seconds([record]):.0f} s)"


def write(folder: pathlib.Path, records: Sequence[Mapping], env: Mapping) -> str:
  """Writes the three files; returns the markdown.

  Args:
    records: a dictionary per model, as `length_extrapolation` stores them.
    env: of `benchmarking.report.environment`.
  """
  table, picture, data = (folder / name for name in NAMES)
  theirs = dict(loss=published.EXTRAPOLATION, passkey=published.PASSKEY)
  content = dict(environment=dict(env), models=list(records), published=theirs)
  data.write_text(json.dumps(content, indent=1) + "\n")
  text = markdown(records, env)
  table.write_text(text)
  plot(picture, records, env)
  return text


def markdown(records: Sequence[Mapping], env: Mapping) -> str:
  """Tables of losses and of retrieval, the paper's numbers beside ours."""
  first = records[0]
  lengths = [n for n, _ in first["by_length"]]
  rows = list(_losses(records))
  lines = [
    "# Loss and retrieval at lengths beyond the trained one",
    "",
    f"Models of {first['parameters']:,} parameters, alike but for the attention, trained"
    f" {first['steps']:,} steps of {first['batch_size']} rows of {first['length']:,} tokens: same"
    f" data, seed and first weights. {where(env)}; {_seconds(records):,.0f} s in all.",
    f"Paper: {published.EXTRAPOLATION_SETTING}; from public notes on it.",
    '"Switched on": trained without the re-weighting, read with it.',
    "",
    "## Loss of the same tokens after more and more",
    "",
    f"Nats per token of the last {first['length'] // 4:,} tokens of {first['rows']} held-out texts,"
    " read with so many tokens in all: every column has the same targets.",
    "",
    *_table(
      ["attention", *_multiples(lengths), "change"],
      ([name, *_numbers(x["by_length"], lengths), _change(x["by_length"])] for name, x in rows),
    ),
    "",
    "## Loss of all tokens read",
    "",
    "Mean over windows of so many tokens, the last ones of the same texts: what the paper's table"
    " has. The columns have different tokens, and the first ones of a short window have little"
    " before them.",
    "",
    *_table(
      ["attention", *_multiples(lengths), "change", *(f"paper, {n:,}" for n in _PAPER)],
      (
        [name, *_numbers(x["by_window"], lengths), _change(x["by_window"]), *_published(name)]
        for name, x in rows
      ),
    ),
  ]  # fmt: skip
  if any("passkey" in record for record in records):
    lines += ["", *_passkey_lines(records)]
  return "\n".join(lines) + "\n"


def _passkey_lines(records: Sequence[Mapping]) -> list[str]:
  task = next(record["passkey"] for record in records if "passkey" in record)
  key = "4821395607"[: task["digits"]]
  lengths = [x["length"] for x in task["found"]]
  theirs = sorted({n for shares in published.PASSKEY.values() for n in shares})
  return [
    "## Passkey retrieval",
    "",
    f"Share of keys of {task['digits']} digits that greedy decoding says right, and in brackets of"
    f" digits right after the right ones; {task['trials']} texts a length, depths uniform, the same"
    f' texts for all. "{passkey.FILLER.strip()}" again and again, with'
    f' "{passkey.KEY.format(key).strip()}" somewhere and "{passkey.QUESTION}" at the end.'
    f" Each model was trained {task['steps']:,} more steps on such texts of up to the training"
    " length before; the paper's were not.",
    "",
    *_table(
      ["attention", *_multiples(lengths), *(f"paper, {n:,}" for n in theirs)],
      (
        [
          name,
          *(f"{x['keys']:.0%} ({x['digits']:.0%})" for x in found),
          *(_percent(published.PASSKEY.get(name, {}).get(n)) for n in theirs),
        ]
        for name, found in _retrievals(records)
      ),
    ),
  ]


def _losses(records: Sequence[Mapping]) -> Iterator[tuple[str, Mapping]]:
  for record in records:
    yield record["series"], record
    yield from record["switched"].items()


def _retrievals(records: Sequence[Mapping]) -> Iterator[tuple[str, Sequence[Mapping]]]:
  for record in records:
    if "passkey" in record:
      yield record["series"], record["passkey"]["found"]
      yield from record["passkey"]["switched"].items()


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
  return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _multiples(lengths: Sequence[int]) -> list[str]:
  return [f"{n:,} ({n // lengths[0]}x)" for n in lengths]


def _numbers(losses: Iterable, lengths: Sequence[int]) -> list[str]:
  found = dict(losses)
  return [f"{found[n]:.3f}" for n in lengths]


def _change(losses: Sequence) -> str:
  return f"{losses[-1][1] - losses[0][1]:+.3f}"


def _published(name: str) -> list[str]:
  losses = published.EXTRAPOLATION.get(name, {})
  if name.startswith("softmax, p = 15"):
    losses = published.EXTRAPOLATION_REWEIGHTED_SOFTMAX
  return [f"{losses[n]:.2f}" if n in losses else "-" for n in _PAPER]


def _percent(share: float | None) -> str:
  return "-" if share is None else f"{share:.0%}"


def _seconds(records: Sequence[Mapping]) -> float:
  parts = [*records, *(record["passkey"] for record in records if "passkey" in record)]
  return sum(part["train_seconds"] + part["measure_seconds"] for part in parts)


def plot(path: pathlib.Path, records: Sequence[Mapping], env: Mapping) -> None:
  """Above the loss of the same tokens and the retrieval, below that of all tokens: ours, theirs."""
  import matplotlib

  matplotlib.use("agg")
  import matplotlib.pyplot as plt

  length = records[0]["length"]
  figure, ((same, keys), (window, paper)) = plt.subplots(2, 2, figsize=(12, 9.5))
  styles = {name: _style(name, records) for name, _ in _losses(records)}
  for name, losses in _losses(records):
    _draw(same, losses["by_length"], length, label=name, **styles[name])
    _draw(window, losses["by_window"], length, **styles[name])
  for name, found in _retrievals(records):
    _draw(keys, [(x["length"], x["keys"]) for x in found], length, **styles[name])
  hollow = dict(marker="s", markerfacecolor="white", linestyle=":")
  for record in records:
    name, trained = record["series"], published.EXTRAPOLATION_LENGTH
    _draw(paper, published.EXTRAPOLATION.get(name, {}).items(), trained, **styles[name] | hollow)
    _draw(keys, published.PASSKEY.get(name, {}).items(), trained, **styles[name] | hollow)
  same.set(title="loss of the same tokens after more and more")
  keys.set(title="passkeys retrieved (hollow: the paper's)", ylim=(-0.03, 1.03))
  window.set(title="loss of all tokens read")
  paper.set(title=f"the paper's: {published.EXTRAPOLATION_SETTING}")
  paper.title.set_fontsize(9)
  for panel in (same, keys, window, paper):
    panel.set_xscale("log", base=2)
    panel.set_xticks([n / length for n, _ in records[0]["by_length"]])
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    panel.set(xlabel="tokens read, in training lengths")
    panel.set(ylabel="share of keys" if panel is keys else "nats per token")
    panel.grid(alpha=0.3)
  keys.set_visible(any("passkey" in record for record in records))
  figure.suptitle(
    f"{records[0]['parameters']:,} parameters, trained on rows of {length:,} tokens; {where(env)}",
    fontsize=8,
  )
  figure.legend(loc="lower center", ncols=4, fontsize=9)
  figure.tight_layout(rect=(0, 0.055, 1, 1))
  figure.savefig(path, dpi=120)
  plt.close(figure)


def _style(name: str, records: Sequence[Mapping]) -> dict[str, Any]:
  """A colour for each trained model; dashed where it is read otherwise than it was trained."""
  number, own = next(
    (i, name == record["series"])
    for i, record in enumerate(records)
    if name == record["series"] or name in record["switched"]
  )
  return dict(color=f"C{number}", marker="o", linestyle="-" if own else "--")


def _draw(panel, points: Collection, trained: int, **style) -> None:
  if points:
    lengths, values = zip(*points, strict=True)
    panel.plot([n / trained for n in lengths], values, **style)
