"""The benchmark harness and the numerics report: run small, read back, and seen to notice."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from attnzoo.experiments import benchmark, numerics, operators
from attnzoo.experiments.benchmarking import peers, report, timing
from attnzoo.pallas_kernels.cases import Case, tagged
from attnzoo_testing.marks import slow_but

TINY = Case(
  "tiny", ("bench",), dict(batch=2, length=40, heads=2, key_dim=8, value_dim=8), dict(decay="alibi")
)


@pytest.fixture(scope="module")
def operator():
  return operators.find("lightning_attention")


def session(operator, **changed):
  options = dict(operator=operator, platform="cpu", dtype=np.dtype("float32"),
                 implementations=("xla",), seconds=1.0, memory=1e9, repeats=3)  # fmt: skip
  return benchmark.Session(**options | changed)


@pytest.mark.parametrize("name", slow_but(operators.OPERATORS, "lightning_attention"))
@pytest.mark.parametrize("pass_name", benchmark.PASSES)
def test_measure_times_everyone_and_says_who_did_not_run(name, pass_name):
  operator, skipped = operators.find(name), {}
  small = dict(batch=2, length=40, heads=2, kv_heads=2, key_dim=8, value_dim=8, left=5, chunk=16)
  small |= dict(clusters=4, window=10, labels=3)
  small |= dict(kv_heads=1) if name == "rat_attention" else {}  # queries in groups
  case = tagged(operator.cases.CASES, "bench")[0]
  case = dataclasses.replace(case, sizes=case.sizes | {n: small[n] for n in case.sizes})
  rows = benchmark.measure(session(operator), case, pass_name, skipped)
  if pass_name == "step" and operator.step is None:
    assert not rows
    assert "has no state, and so no step" in report.not_run(skipped)
    return
  ran, own = {row["by"] for row in rows}, "step" if pass_name == "step" else "xla"
  assert ran | {by for _, _, by in skipped} == {own, *(peer.name for peer in operator.peers)}
  assert own in ran
  for row in rows:
    assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
    if row["error"] is None:
      assert row["by"] in (peers.TORCH_SOFTMAX.name, peers.JAX_SOFTMAX.name)
      assert row["flops_per_s"] is None
    else:
      assert row["error"] < 1e-5
      assert row["flops_per_s"] > 0
    assert row["by"] in report.table(rows)
  if peers.CUDNN_SOFTMAX in operator.peers:
    assert "cudnn softmax: runs on cuda only" in report.not_run(skipped)


def test_torch_formula_of_routing_by_the_latest_tokens():
  """Blocks that end in the middle of a centroid's tokens, and a last one that is not full."""
  pytest.importorskip("torch", reason="no torch here: the `bench` extra brings it")
  operator = operators.find("routed_attention")
  (case,) = (case for case in operator.cases.CASES if case.name == "recent")
  inputs, options = operator.cases.make_inputs(case), operator.cases.static_options(case)
  cotangent = operators.cotangents(operator, inputs, **options)
  peer = peers.TORCH_ROUTED.prepare(inputs, cotangent, "forward_backward", "cpu", **options)
  got, truth = peers.to_numpy(peer()), operators.truth(operator, inputs, **options)
  assert set(got) == {"output", "d_query", "d_value"}
  assert operators.largest_error(truth, got)[0] < 1e-6


def test_error_column_sees_a_wrong_implementation(operator, monkeypatch):
  def wrong(log_decay=None, **inputs):
    return operator.function(**inputs, log_decay=log_decay * 1.01)

  broken = operators.dataclasses.replace(operator, function=wrong)
  truth = benchmark.truth
  monkeypatch.setattr(benchmark, "truth", lambda _, *rest: truth(session(operator), *rest))
  (row,) = benchmark.measure(session(broken, with_peers=False), TINY, "forward", {})
  assert row["error"] > 1e-4


def test_peers_that_do_not_fit_or_are_missing_are_named(operator, monkeypatch):
  formula = peers.TORCH_DECAYED_LINEAR
  small, slow = session(operator, memory=1000), session(operator)
  monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)  # all are installed
  assert "buffers take" in benchmark.peer_obstacle(small, formula, TINY, "forward")
  slow.pace[formula.name, "forward"] = 1.0
  assert "would take about" in benchmark.peer_obstacle(slow, formula, TINY, "forward")
  assert "cuda only" in benchmark.peer_obstacle(slow, peers.CUDNN_SOFTMAX, TINY, "forward")
  monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
  assert "not installed (torch)" in benchmark.peer_obstacle(slow, formula, TINY, "forward")
  on_gpu = session(operator, platform="cuda")
  fla = peers.FLA_SIMPLE_GLA
  assert "not installed (fla)" in benchmark.peer_obstacle(on_gpu, fla, TINY, "forward")
  assert "takes bfloat16 only" in benchmark.peer_obstacle(
    on_gpu, peers.CUDNN_SOFTMAX, TINY, "forward"
  )


def test_peer_memory_is_its_quadratic_buffers():
  # query key^T, the mask and the masked scores: three [T, T] per row and head.
  assert peers.TORCH_DECAYED_LINEAR.memory(TINY, "forward", "float32") == 3 * 4 * 40 * 40 * 4


def test_interleaved_order_and_early_stop():
  order = []
  spreads = timing.interleaved(
    {"quick": lambda: order.append("quick"), "slow": lambda: order.append(time.sleep(0.02))},
    repeats=6,
    most_seconds=0.05,
  )
  assert order[:4] == ["quick", None, "quick", None]
  assert spreads["quick"].runs == 6
  assert spreads["slow"].runs == 3


def test_spread_is_percentiles():
  spread = timing.spread([1.0, 2.0, 3.0, 4.0, 10.0])
  assert (spread.median, spread.runs) == (3.0, 5)
  assert (spread.p20, spread.p80) == pytest.approx((1.8, 5.2))


def result(by="xla", median=1.0, width=0.1, length=1024):
  return {"case": f"length_{length}", "pass": "forward", "by": by, "dtype": "float32",
          "sizes": dict(batch=1, length=length, heads=2), "median_s": median,
          "p20_s": median - width, "p80_s": median + width}  # fmt: skip


def test_compare_flags_only_what_lies_beyond_the_spread():
  env = dict(device="cpu")
  names = ("slower", "faster", "wobbly", "gone")
  old = dict(environment=env, rows=[result(by) for by in names])
  new = [result("slower", 1.3), result("faster", 0.7), result("wobbly", 1.15), result("added")]
  text, regressions = report.compare(new, old, env)
  lines = {line.split()[2]: line for line in text.splitlines() if line.startswith("length")}
  assert regressions == 1
  assert "SLOWER" in lines["slower"]
  assert "1.30" in lines["slower"]
  assert "faster" in lines["faster"].split()[-1]
  assert "same within spread" in lines["wobbly"]
  assert "new here: length_1024 / forward / added / float32" in text
  assert "only in the old run: length_1024 / forward / gone / float32" in text
  assert "NOT THE SAME DEVICE" in report.compare(new, old, dict(device="other"))[0]


def test_plot_is_a_picture(tmp_path):
  pytest.importorskip("matplotlib")
  rows = [result(by, t * 1e-6, t * 1e-7, t) for by in ("xla", "peer") for t in (1024, 2048, 4096)]
  report.plot(rows, str(tmp_path / "plot.png"), "title")
  assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
  with pytest.raises(ValueError, match="--passes must include forward"):
    report.plot([row | {"pass": "step"} for row in rows], "never.png", "title")


def test_environment_outside_git(monkeypatch):
  def fails(*args, **kwargs):
    raise subprocess.CalledProcessError(128, "git")

  monkeypatch.setattr(report.subprocess, "run", fails)
  env = report.environment()
  assert env["commit"] is None
  assert env["versions"]["jax"] == benchmark.jax.__version__
  assert env["cpu_threads"] == timing.cpu_threads() >= 1
  assert env["versions"]["jax"] in report.head_line(env)


def test_oracle_case_is_cut_and_says_so(operator):
  (long,) = (case for case in operator.cases.CASES if case.name == "length_4k")
  small, words = operators.oracle_case(long)
  assert words == "length 1024 of 4096, heads 1 of 8"
  assert small.sizes["key_dim"] == long.sizes["key_dim"]


def test_unknown_names_are_refused(operator):
  with pytest.raises(ValueError, match=r"got 'lightening_attention' \(did you mean lightning_att"):
    operators.find("lightening_attention")
  with pytest.raises(benchmark.app.UsageError, match=r"got 'nonsense' \(there are: .*length_1k"):
    benchmark.choose_cases(session(operator), "nonsense")
  chosen = benchmark.choose_cases(session(operator), "")
  assert not any(case.options.get("gpu") for case in chosen)


def test_command_line(tmp_path, capsys, monkeypatch):
  """--json, --compare and the table, through the absl entry."""
  monkeypatch.setattr(benchmark, "choose_cases", lambda *_: [TINY])
  path = str(tmp_path / "run.json")
  values = benchmark.flags.FlagValues()
  benchmark.define_flags(values)
  monkeypatch.setattr(benchmark, "FLAGS", values)
  common = ["benchmark", "--nopeers", "--passes=forward,step", "--repeats=3"]
  benchmark.main(values([*common, f"--json={path}"]))
  with open(path) as file:
    written = json.load(file)
  assert [row["pass"] for row in written["rows"]] == ["forward", "step"]
  assert written["environment"]["commit"] is None or len(written["environment"]["commit"]) >= 40
  benchmark.main(values([*common, f"--compare={path}"]))
  assert "new/old" in capsys.readouterr().out
  values.passes = ["sideways"]
  with pytest.raises(benchmark.app.UsageError, match="--passes must be among"):
    benchmark.main(["benchmark"])


@pytest.mark.slow
def test_help_is_one_screen_of_what_it_does():
  command = [sys.executable, "-m", "attnzoo.experiments.benchmark", "--help"]
  env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
  shown = subprocess.run(command, capture_output=True, text=True, check=False, env=env).stdout
  for word in ("--operator", "--compare", "--plot", "percentile", "float64"):
    assert word in shown


def test_numerics_rows_and_worst_case(operator):
  small = [case for case in operator.cases.CASES if case.name in ("one_token", "no_decay")]
  runnable = dict(xla=dict(implementation="xla"))
  rows = [numerics.errors(operator, case, np.dtype("float32"), runnable, {})[0] for case in small]
  wanted = {"output", "final_state", "d_query", "d_key", "d_value"}
  for row in rows:
    assert wanted <= set(row["error"])
    assert max(row["error"].values()) < 1e-5
  assert set(rows[0]["error"]) - wanted == {"d_log_decay", "d_initial_state"}
  rows[0]["error"]["d_key"] = float("nan")
  text = numerics.render(rows, {"lightning_attention / triton": "no GPU"}, report.environment())
  assert "nan (one_token)" in text
  assert "| xla | float32 |" in text
  assert "Not run: lightning_attention / triton: no GPU." in text


def test_relative_error_where_the_truth_is_zero():
  """The query's gradient of a softmax over one chunk is 0 but for the rounding of the truth."""
  assert operators.relative_error([3e-8, 4e-8], [1e-17, 0]) == pytest.approx(3.5e-8, rel=0.02)
  assert operators.relative_error([3.0, 5.0], [3.0, 4.0]) == pytest.approx(0.2)


def test_numerics_never_drops_an_implementation():
  options, reason = numerics.how_to_run("tpu")
  assert options == dict(implementation="tpu", interpret=True)
  assert reason is None
  assert "NVIDIA GPU" in numerics.how_to_run("triton")[1]
  softplus, not_run = operators.find("softplus_attention"), {}
  (case,) = (case for case in softplus.cases.CASES if case.name == "sigmoid_packed")
  runnable = {name: numerics.how_to_run(name)[0] for name in ("xla", "tpu")}
  rows = numerics.errors(softplus, case, np.dtype("float32"), runnable, not_run)
  assert [row["implementation"] for row in rows] == ["xla"]
  assert "variant must be LSSA or LSSAR" in not_run["softplus_attention / tpu / sigmoid_packed"]
