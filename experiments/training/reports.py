"""Progress on the terminal, metrics in files, curves in a picture."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping

import numpy as np

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"


class MetricsWriter:
  """One JSON object per line in metrics.jsonl, and the same numbers for TensorBoard.

  Nothing if not `active`: of several processes one writes.
  """

  def __init__(self, workdir: str | pathlib.Path, *, active: bool = True):
    self._path, self._active = pathlib.Path(workdir) / METRICS_FILE, active
    if not active:
      return
    from tensorboardX import SummaryWriter

    self._board = SummaryWriter(str(pathlib.Path(workdir) / "tensorboard"))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    if not self._active:
      return
    with self._path.open("a") as file:
      file.write(json.dumps({"step": step, **values}) + "\n")
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def truncate_after(self, step: int) -> None:
    """Drops lines of steps that a resumed run will do again."""
    if not self._active or not self._path.exists():
      return
    kept = [json.dumps(m) for m in read_metrics(self._path.parent) if m["step"] <= step]
    draft = self._path.with_suffix(".draft")
    draft.write_text("".join(line + "\n" for line in kept))
    draft.replace(self._path)

  def close(self) -> None:
    if self._active:
      self._board.close()


def read_metrics(workdir: str | pathlib.Path) -> list[dict[str, float]]:
  """All lines; one that a killed process left unfinished is passed over."""
  path = pathlib.Path(workdir) / METRICS_FILE
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


class Progress:
  """One line that says how far the run is: redrawn on a terminal, now and then elsewhere.

  Says nothing if not `active`.
  """

  def __init__(
    self,
    first_step: int,
    last_step: int,
    tokens_per_step: float,
    flops_per_token: float,
    peak_flops: float | None,
    *,
    active: bool = True,
  ):
    self._first, self._last = first_step, last_step
    self._tokens, self._flops, self._peak = tokens_per_step, flops_per_token, peak_flops
    self._active = active
    self._start: float | None = None
    self._paused = 0.0
    self._line_open = False
    self._terminal = sys.stderr.isatty()

  def start(self) -> None:
    """Called after the first step, so that compilation does not count."""
    self._start = time.monotonic()
    self._first += 1

  def pause(self, seconds: float) -> None:
    """Time spent on evaluation and the like."""
    self._paused += seconds

  def tokens_per_second(self, step: int) -> float:
    if self._start is None or step <= self._first:
      return 0.0
    seconds = time.monotonic() - self._start - self._paused
    return (step - self._first) * self._tokens / max(seconds, 1e-9)

  def show(self, step: int, loss: float) -> dict[str, float]:
    """Prints the line; returns the speed figures for the metrics."""
    speed = self.tokens_per_second(step)
    figures = {"tokens_per_second": speed}
    parts = [f"step {step}/{self._last}", f"loss {loss:.4f}"]
    if speed:
      left = (self._last - step) * self._tokens / speed
      parts += [f"{speed:,.0f} tokens/s", f"{duration(left)} left"]
    if speed and self._peak:
      figures["mfu"] = speed * self._flops / self._peak
      parts.insert(3, f"MFU {figures['mfu']:.1%}")
    if not self._active:
      return figures
    line = "  ".join(parts)
    self._line_open = self._terminal and step < self._last
    end = "" if self._line_open else "\n"
    print(f"\r\x1b[K{line}" if self._terminal else line, end=end, file=sys.stderr, flush=True)
    return figures

  def say(self, line: str) -> None:
    """A line of its own between two progress lines."""
    if self._active:
      print(f"\r\x1b[K{line}" if self._terminal else line, file=sys.stderr, flush=True)
      self._line_open = False

  def close(self) -> None:
    """Ends a line that would have been redrawn, so that what follows has its own."""
    if self._line_open:
      print(file=sys.stderr, flush=True)
    self._line_open = False


def duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# Dense bfloat16 FLOP/s of one chip, from the vendors' data sheets.
_PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str, devices: int) -> float | None:
  """Of all devices together; None for a kind whose peak is not listed."""
  names = [name for name in _PEAK_FLOPS if device_kind.startswith(name)]
  return _PEAK_FLOPS[max(names, key=len)] * devices if names else None


def draw_curves(
  workdir: str | pathlib.Path, lines: Mapping[str, float] | None = None
) -> pathlib.Path:
  """Writes curves.png: loss against steps in bits per target, `lines` as horizontal marks."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  metrics = read_metrics(workdir)
  figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
  for key, label in (("loss", "training"), ("validation_loss", "validation")):
    steps = [m["step"] for m in metrics if key in m]
    bits = np.array([m[key] / math.log(2) for m in metrics if key in m])
    if not steps:
      continue
    if key == "loss":  # of single batches, and so noisy
      axes.plot(steps, bits, color="C0", alpha=0.3, linewidth=0.8)
      window = max(len(bits) // 20, 1)
      sums = np.cumsum(np.pad(bits, (window, 0), mode="edge"))
      bits = (sums[window:] - sums[:-window]) / window
    marker = "o" if key == "validation_loss" else None
    axes.plot(steps, bits, label=label, marker=marker, markersize=3, linewidth=1.2)
  for number, (name, value) in enumerate((lines or {}).items()):
    axes.axhline(value, linestyle="--", linewidth=1, color=f"C{number + 2}", label=name)
  axes.set(xlabel="step", ylabel="bits per target", title=pathlib.Path(workdir).name)
  axes.grid(alpha=0.3)
  found = [(m["step"], m["validation_micro_f1"]) for m in metrics if "validation_micro_f1" in m]
  if found:  # of notes
    axes.plot([], [], color="C3", linestyle=":", marker="o", markersize=3, label="micro F1, right")
    right = axes.twinx()
    right.plot(*zip(*found, strict=True), color="C3", linestyle=":", marker="o", markersize=3)
    right.set(ylabel="micro F1 on validation, threshold 0.5", ylim=(0, 1))
  axes.legend(loc="center right" if found else "best")
  path = pathlib.Path(workdir) / CURVES_FILE
  figure.savefig(path, dpi=130)
  pyplot.close(figure)
  return path
