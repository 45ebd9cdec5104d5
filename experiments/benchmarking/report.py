"""What a benchmark run is written as: environment, table, comparison with an older run, plot."""

import datetime
import importlib.metadata
import pathlib
import platform
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence

import jax

from attnzoo.experiments.benchmarking.timing import cpu_threads

_VERSIONS = ("attnzoo", "jax", "jaxlib", "numpy", "torch", "triton", "jax-triton",
             "flash-linear-attention", "libtpu")  # fmt: skip


def environment() -> dict:
  """Device, versions, commit (None outside a git checkout) and date."""
  versions = {"python": platform.python_version()}
  for name in _VERSIONS:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return dict(
    device=jax.devices()[0].device_kind,
    platform=jax.default_backend(),
    processor=_processor(),
    cpu_threads=cpu_threads(),
    versions=versions,
    commit=_commit(),
    date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  )


def _processor() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()


def _commit() -> str | None:
  """The commit of this checkout, with "+" if files differ from it."""
  folder = pathlib.Path(__file__).resolve().parent

  def git(*arguments):
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()

  try:
    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
  except (OSError, subprocess.CalledProcessError):
    return None


def head_line(env: Mapping) -> str:
  versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
  return (
    f"{env['device']} ({env['platform']}; host {env['processor']}), {env['cpu_threads']} CPU "
    f"threads for XLA and torch alike; {versions}; commit {env['commit']}; {env['date']}"
  )


_COLUMNS = (
  ("case", lambda r: r["case"]),
  ("pass", lambda r: r["pass"]),
  ("by", lambda r: r["by"]),
  ("ms", lambda r: f"{r['median_s'] * 1e3:.3g}"),
  ("p20-p80", lambda r: f"{r['p20_s'] * 1e3:.3g}-{r['p80_s'] * 1e3:.3g}"),
  ("us/token", lambda r: f"{r['median_s'] * 1e6 / r['tokens']:.3g}"),
  ("GB/s", lambda r: _number(r["bytes_per_s"], 1e9)),
  ("GFLOP/s", lambda r: _number(r["flops_per_s"], 1e9)),
  ("error", lambda r: "other function" if r["error"] is None else f"{r['error']:.1e}"),
  ("of", lambda r: r["error_of"] or "-"),
)


def _number(value, unit):
  return "-" if value is None else f"{value / unit:.3g}"


def table(rows: Sequence[Mapping]) -> str:
  header = tuple(name for name, _ in _COLUMNS)
  return _aligned([header, *(tuple(cell(row) for _, cell in _COLUMNS) for row in rows)])


def not_run(skipped: Mapping) -> str:
  """One line per candidate and reason, from {(case, pass, candidate): reason}."""
  grouped = defaultdict(list)
  for (case, pass_name, by), reason in skipped.items():
    grouped[by, reason].append(f"{case} {pass_name}")
  return "\n".join(f"not run: {by}: {reason} [{', '.join(where)}]"
                   for (by, reason), where in grouped.items())  # fmt: skip


def _aligned(lines):
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def compare(rows: Sequence[Mapping], old: Mapping, env: Mapping) -> tuple[str, int]:
  """(table of new / old, number of regressions).

  Slower: the new 20th percentile lies above the old 80th; faster: the reverse; else no difference.
  """
  key = lambda r: (r["case"], r["pass"], r["by"], r["dtype"])  # noqa: E731
  before, notes = {key(row): row for row in old["rows"]}, []
  if old["environment"]["device"] != env["device"]:
    notes.append(f"NOT THE SAME DEVICE: old {old['environment']['device']}, new {env['device']}")
  lines, regressions = [("case", "pass", "by", "old ms", "new ms", "new/old", "verdict")], 0
  for row in rows:
    if (was := before.pop(key(row), None)) is None:
      notes.append(f"new here: {' / '.join(key(row))}")
      continue
    slower, faster = row["p20_s"] > was["p80_s"], row["p80_s"] < was["p20_s"]
    regressions += slower
    verdict = "SLOWER" if slower else "faster" if faster else "same within spread"
    times = (f"{r['median_s'] * 1e3:.3g}" for r in (was, row))
    ratio = f"{row['median_s'] / was['median_s']:.2f}"
    lines.append((row["case"], row["pass"], row["by"], *times, ratio, verdict))
  notes += [f"only in the old run: {' / '.join(missing)}" for missing in before]
  return "\n".join([_aligned(lines), *notes, f"{regressions} regressions"]), regressions


def plot(rows: Sequence[Mapping], path: str, title: str) -> None:
  """Log-log time against length, one panel per pass, for the cases that differ in length only."""
  import matplotlib

  matplotlib.use("agg")
  import matplotlib.pyplot as plt

  groups = defaultdict(set)
  for row in rows:
    groups[_other_sizes(row)].add(row["sizes"]["length"])
  chosen = max(groups, key=lambda sizes: len(groups[sizes]))
  curves = defaultdict(lambda: defaultdict(list))
  for row in rows:
    if _other_sizes(row) == chosen and row["pass"] != "step":
      point = (row["sizes"]["length"], row["median_s"], row["p20_s"], row["p80_s"])
      curves[row["pass"]][row["by"]].append(point)
  if not curves:
    raise ValueError("plot: --passes must include forward or forward_backward; got step alone")
  figure, panels = plt.subplots(1, len(curves), figsize=(6 * len(curves), 4.5), squeeze=False)
  for panel, (name, lines) in zip(panels[0], curves.items(), strict=True):
    for by, points in lines.items():
      length, median, p20, p80 = zip(*sorted(points), strict=True)
      (line,) = panel.loglog(length, median, marker="o", label=by)
      panel.fill_between(length, p20, p80, alpha=0.2, color=line.get_color())
    panel.set(title=name.replace("_", " + "), xlabel="tokens", ylabel="seconds a run")
    panel.set_xscale("log", base=2)
    panel.grid(which="major", alpha=0.3)
    panel.legend()
  figure.suptitle(title, fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  plt.close(figure)


def _other_sizes(row):
  return tuple((name, size) for name, size in row["sizes"].items() if name != "length")
