"""The report of errors: operator x implementation x dtype, against the definition in float64.

  python -m attnzoo.experiments.numerics --out=numerics.md

Each number is the RMS error over the RMS of the truth (where that is 0: the RMS error), the worst
over the operator's "ci" cases, for every result and every gradient. Inputs are rounded to the dtype
first and the truth is computed from the rounded ones, so the errors are those of the arithmetic
alone. "reference" in float32 or bfloat16 is the definition itself at that precision: what a
token-by-token loop would lose. The TPU kernels run in their interpreter where there is no TPU, with
the float32 arithmetic of the host.
"""

import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
from absl import app, flags

from attnzoo.experiments import operators
from attnzoo.experiments.benchmarking import report
from attnzoo.pallas_kernels import compat
from attnzoo.pallas_kernels.cases import tagged

IMPLEMENTATIONS = ("reference", "xla", "tpu", "triton", "cudnn")
FLAGS = flags.FLAGS


def define_flags() -> None:
  """Not done at import: other programs of this folder have flags of the same names."""
  flags.DEFINE_list("operators", list(operators.OPERATORS), "Names in the operators' table.")
  flags.DEFINE_list("implementations", list(IMPLEMENTATIONS), "Which to run.")
  flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Input dtypes.")
  flags.DEFINE_string("case", "", "Only cases whose name contains this.")
  flags.DEFINE_string("out", None, "Markdown file; the same as JSON goes beside it (.json).")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"flags begin with --; got {argv[1]!r} (see --help)")
  rows, not_run = [], {}
  for name in FLAGS.operators:
    operator = operators.find(name)
    cases = [c for c in tagged(operator.cases.CASES, "ci") if FLAGS.case in c.name]
    runnable = {}
    has = ("reference", "xla", *operator.kernels.values())
    for implementation in filter(has.__contains__, FLAGS.implementations):
      options, reason = how_to_run(implementation)
      if reason is None:
        runnable[implementation] = options
      else:
        not_run[f"{name} / {implementation}"] = reason
    for dtype in FLAGS.dtypes:
      for case in cases:
        print(f"{name} {dtype} {case.name} ...", file=sys.stderr, flush=True)
        rows += errors(operator, case, jnp.dtype(dtype), runnable, not_run)
  env = report.environment()
  text = render(rows, not_run, env)
  print(text)
  if FLAGS.out:
    path = pathlib.Path(FLAGS.out)
    path.write_text(text + "\n")
    results = dict(environment=env, rows=rows, not_run=not_run)
    path.with_suffix(".json").write_text(json.dumps(results, indent=1))


def how_to_run(implementation: str) -> tuple[dict, str | None]:
  """(options that run an implementation on this machine, or why it cannot run)."""
  platform = compat.target_platform()
  if implementation == "tpu" and platform != "tpu":
    return dict(implementation="tpu", interpret=True), None
  if implementation == "triton" and platform != "cuda":
    return {}, "compiles only for an NVIDIA GPU; its tests run it in Triton's interpreter"
  if implementation == "cudnn" and platform != "cuda":
    return {}, "runs only on an NVIDIA GPU"
  if implementation == "triton" and not compat.has_jax_triton():
    return {}, "jax-triton or triton is not installed"
  return dict(implementation=implementation), None


def errors(operator, case, dtype, runnable, not_run) -> list[dict]:
  """One row per implementation: the relative error of each result and gradient.

  What a kernel does not take is noted in `not_run`.
  """
  inputs = operator.cases.make_inputs(case, dtype)
  static = operator.cases.static_options(case)
  exact = operators.truth(operator, inputs, **static)
  rows = []
  for implementation, options in runnable.items():
    try:
      got = operators.named_results(operator, inputs, **static, **options)
    except NotImplementedError as refusal:
      key = f"{operator.name} / {implementation} / {case.name}"
      not_run[key] = str(refusal).partition("; got")[0]
      continue
    error = {name: operators.relative_error(got[name], exact[name]) for name in exact}
    rows.append(dict(operator=operator.name, implementation=implementation, dtype=str(dtype),
                     case=case.name, interpreted=bool(options.get("interpret")),
                     error=error))  # fmt: skip
  return rows


def render(rows, not_run, env) -> str:
  """Markdown: one line per operator, implementation and dtype, with the worst case in brackets."""
  parts = ["# Errors against float64", report.head_line(env)]
  for operator in dict.fromkeys(row["operator"] for row in rows):
    own = [row for row in rows if row["operator"] == operator]
    names = list(dict.fromkeys(name for row in own for name in row["error"]))
    lines = [("implementation", "dtype", *names), ("---",) * (len(names) + 2)]
    for key in dict.fromkeys((r["implementation"], r["dtype"], r["interpreted"]) for r in own):
      group = [r for r in own if (r["implementation"], r["dtype"], r["interpreted"]) == key]
      label = f"{key[0]} (interpreted)" if key[2] else key[0]
      lines.append((label, key[1], *(worst(group, name) for name in names)))
    cases = len({row["case"] for row in own})
    parts.append(f"## {operator}\n\nWorst of {cases} cases: relative RMS error (case).")
    parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
  parts += [f"Not run: {name}: {reason}." for name, reason in not_run.items()]
  return "\n\n".join(parts)


def worst(group, name) -> str:
  found = [(row["error"][name], row["case"]) for row in group if name in row["error"]]
  if not found:
    return "-"
  # NaN is the worst there is, and no comparison says so.
  error, case = max(found, key=lambda pair: np.inf if np.isnan(pair[0]) else pair[0])
  return f"{error:.1e} ({case})"


if __name__ == "__main__":
  define_flags()
  app.run(main)
