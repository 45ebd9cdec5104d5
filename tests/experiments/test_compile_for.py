"""The training step compiled for TPU slices that are not there."""

import json
import os
import subprocess
import sys

import pytest

from attnzoo import zoo
from attnzoo.experiments import hlo, pods
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config, state
from attnzoo.zoo import models

BATCH, LENGTH, LAYERS, VOCABULARY = 8, 512, 3, 2048
FLOAT32, BFLOAT16 = 4, 2
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def experiment(mesh, **options):
  model = dict(
    vocab_size=VOCABULARY, features=256, heads=2, num_layers=LAYERS, glu_dim=512,
    lrpe_layers="none", dtype="bfloat16", remat="full", loss_chunk=64,
  )  # fmt: skip
  return config.Experiment(
    model=zoo.get_config("transnormer-tiny", **model | options),
    data=DataConfig(batch_size=BATCH, sequence_length=LENGTH),
    mesh=config.MeshConfig(**mesh),
  )


@pytest.fixture(scope="module")
def compile_for():
  pytest.importorskip("libtpu")
  return lambda setup, topology: pods.compile_step(setup, pods.slice_devices(topology))


def parameter_bytes(setup):
  return models.parameter_count(setup.model) * FLOAT32


def program_is_sane(step, setup):
  """What holds on every mesh."""
  program, devices = step.program, step.mesh["data"] * step.mesh["seq"] * step.mesh["model"]
  assert program.unknown_loops == 0
  # Forward, forward again and backward; inside shard_map, so each device has its own part.
  assert sum(program.kernels.values()) == 3 * LAYERS, program.kernels
  assert all(name.startswith("lightning_attention") for name in program.kernels)
  # Parameters and two moments, split over all devices of data and model, and the batch.
  places = devices // step.mesh["seq"]
  batch = 4 * BATCH * LENGTH * FLOAT32 / (devices // step.mesh["model"])
  expected = 3 * parameter_bytes(setup) / places + batch
  assert expected <= step.memory.arguments < 1.02 * expected + 4096
  assert step.memory.aliased >= 3 * parameter_bytes(setup) / places
  assert step.memory.outputs < 2**16
  rows = BATCH * LENGTH // (devices // step.mesh["model"])
  logits = rows * VOCABULARY // step.mesh["model"] * BFLOAT16
  assert program.largest_array[1] < logits, program.largest_array


@pytest.mark.slow
@pytest.mark.tpu_aot
def test_parameters_split_over_data(compile_for):
  setup = experiment(dict(data=4))
  step = compile_for(setup, "v5e:2x2")
  program_is_sane(step, setup)
  totals = step.program.totals()
  weights = models.parameter_count(setup.model) * BFLOAT16
  # Every layer is gathered in the forward pass and again in the backward, the head once.
  layers = weights - VOCABULARY * 256 * BFLOAT16
  gathered = 2 * layers + VOCABULARY * 256 * BFLOAT16
  small = 2 * BATCH * LENGTH * FLOAT32  # the tokens of all rows, for the look-up in the table
  assert gathered <= totals["all-gather"]["bytes"] <= gathered + small
  # Every gradient is summed once.
  summed = sum(totals.get(kind, {"bytes": 0})["bytes"] for kind in ("reduce-scatter", "all-reduce"))
  assert weights <= summed <= weights + 4096
  # The looked-up rows of the table go to their devices, and their gradients back.
  activations = BATCH * LENGTH // 4 * 256
  assert totals["all-to-all"]["bytes"] <= activations * (BFLOAT16 + FLOAT32)


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.parametrize("mesh", [dict(data=2, model=2), dict(data=2, seq=2)], ids=str)
def test_other_meshes(compile_for, mesh):
  setup = experiment(mesh)
  step = compile_for(setup, "v5e:2x2")
  program_is_sane(step, setup)
  # Nowhere is a whole batch of activations, or all heads' queries, on one device.
  activations = BATCH * LENGTH * 256
  for one in step.program.collectives:
    assert one.bytes < activations * FLOAT32, one


HLO = """\
HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input: bf16[64,8]) -> bf16[16,8] {
  %all-reduce.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, to_apply=%add
  ROOT %slice = bf16[16,8]{1,0} dynamic-slice(%all-reduce.1, %zero), dynamic_slice_sizes={16,8}
}

%piece.1 (x: bf16[16,8]) -> bf16[64,8] {
  %all-gather.1 = bf16[64,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), channel_id=7, chain_id="3"
}

%piece.2 (x: bf16[16,8]) -> bf16[64,8] {
  %all-gather.2 = bf16[64,8]{1,0} all-gather(%x), channel_id=7, frontend={chain_id="3"}
}

%inner_body (p: (u32[])) -> (u32[]) {
  %piece.on = bf16[64,8]{1,0} fusion(%x), kind=kOutput, calls=%piece.2
  %k = f32[4] custom-call(%q), custom_call_target="tpu_custom_call", op_name="lightning/pallas_call"
}

%inner_condition (p: (u32[])) -> pred[] {
  %limit.1 = u32[]{:T(128)} constant(5)
  ROOT %less.1 = pred[] compare(%i, %limit.1), direction=LT
}

%outer_body (p: (s32[])) -> (s32[]) {
  %start = bf16[64,8]{1,0} fusion(%x), kind=kOutput, calls=%piece.1
  %scatter = bf16[16,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %while.1 = (u32[]) while(%t), condition=%inner_condition, body=%inner_body
  %shift = (f32[4,4]{1,0}, f32[4,4]{1,0}, u32[], u32[]) collective-permute-start(%y), channel_id=9
}

%outer_condition (p: (s32[])) -> pred[] {
  %limit.2 = s32[]{:T(128)} constant(3)
  ROOT %less.2 = pred[] compare(%j, %limit.2), direction=LT
}

ENTRY %main (p: f32[]) -> f32[] {
  %while.2 = (s32[]) while(%s), condition=%outer_condition, body=%outer_body
  %last = f32[2,8]{1,0} reduce-scatter(%z), replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
}
"""


def test_analysis_of_a_program():
  """Loops multiply, pieces count once, a fused all-reduce and slice is a reduce-scatter."""
  found = hlo.analyse(HLO)
  assert found.kernels == {"lightning": 15}
  assert found.totals() == {
    "all-gather": dict(count=3, bytes=3 * 64 * 8 * 2),
    "collective-permute": dict(count=3, bytes=3 * 4 * 4 * 4),
    "reduce-scatter": dict(count=3 + 1, bytes=3 * 64 * 8 * 2 + 8 * 8 * 4),
  }
  assert found.largest_array == ("bf16[64,8]", 1024)
  assert found.unknown_loops == 0


@pytest.mark.parametrize(
  ("topology", "message"),
  [
    ("v5:4x4", r"must name a known chip; got 'v5:4x4' \(did you mean 'v5p:2x2x4'\?"),
    ("h100:8", "must name a known chip.*v5e:4x4"),
    ("v5e", "must give 2 sides after v5e:; got 'v5e'"),
    ("v5p:4x4", "must give 3 sides after v5p:; got 'v5p:4x4'"),
    ("v5e:0x4", "must give 2 sides"),
  ],
)
def test_wrong_topologies(topology, message):
  with pytest.raises(ValueError, match=message):
    pods.slice_devices(topology)


def test_slices(compile_for):
  devices = pods.slice_devices("v5p:2x2x4")
  assert len(devices) == 16
  assert pods.whole_mesh(config.MeshConfig(model=4), "v5p:2x2x4").data == 4
  with pytest.raises(ValueError, match="must be a slice that exists; got 'v5e:3x5'.*v5e:4x4"):
    pods.slice_devices("v5e:3x5")
  with pytest.raises(
    ValueError, match=r"16 devices of v5e:4x4; got 8 x 1 x 1 = 8 \(leave data out"
  ):
    pods.whole_mesh(config.MeshConfig(data=8), "v5e:4x4")
  # Along the axis with the most traffic each device's neighbour is one link away.
  mesh = state.make_mesh(config.MeshConfig(), pods.slice_devices("v5e:4x4"))
  places = [device.coords for device in mesh.devices.flat]
  steps = [
    sum(abs(a - b) for a, b in zip(x, y, strict=True))
    for x, y in zip(places[:-1], places[1:], strict=True)
  ]
  assert set(steps) == {1}


def test_libtpu_is_missing(monkeypatch):
  monkeypatch.setattr(pods.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(NotImplementedError, match="package libtpu.*pip install"):
    pods.slice_devices("v5e:2x2")


def test_bad_flags():
  """One line and exit code 2, before anything is compiled."""
  pytest.importorskip("libtpu")
  program = (
    "import json, sys\n"
    "from absl import flags\n"
    "from attnzoo.experiments import compile_for\n"
    "for arguments in json.loads(sys.argv[1]):\n"
    "  flags.FLAGS.unparse_flags()\n"
    "  flags.FLAGS(['program', *arguments])\n"
    "  try:\n"
    "    compile_for.main([])\n"
    "  except ValueError as error:\n"
    "    print(error)\n"
  )
  cases = {
    "--model=transnormer-1c": "got 'transnormer-1c' (did you mean 'transnormer-1b'?)",
    "--mesh=dat=8": "axes among data, seq, model; got 'dat=8'",
    "--mesh=data=8": "got 8 x 1 x 1 = 8",
    "--batch_size=20": "multiple of the mesh axis 'data' (16); got 20",
    "--mesh=model=16,data=1,seq=2": "got 1 x 2 x 16 = 32",
  }
  listed = json.dumps([[case] for case in cases])
  result = subprocess.run(
    [sys.executable, "-c", program, listed], env=ENVIRONMENT, capture_output=True, text=True
  )
  lines = result.stdout.splitlines()
  assert len(lines) == len(cases), result.stderr
  for line, message in zip(lines, cases.values(), strict=True):
    assert message in line
  unknown = run("--model=transnormer-1c")
  assert unknown.returncode == 2
  assert unknown.stderr.startswith("error: get_config")


@pytest.mark.tpu_aot
def test_what_does_not_fit(tmp_path):
  """2048 rows of a wide model on one chip: the compiler's refusal becomes a report and advice."""
  pytest.importorskip("libtpu")
  file = tmp_path / "report.json"
  result = run(
    "--model=transnormer-nano", "--topology=v5e:1x1", "--batch_size=256", "--remat=none",
    "--implementation=xla", f"--json={file}",
  )  # fmt: skip
  assert result.returncode == 1, result.stderr
  assert "DOES NOT FIT" in result.stdout
  assert "error: the step must fit into a device" in result.stderr
  assert "--remat=full" in result.stderr
  assert "--batch_size below 256" in result.stderr
  report = json.loads(file.read_text())
  assert not report["fits"]
  assert report["total"] > 15 * pods.GIB


def run(*arguments):
  command = [sys.executable, "-m", "attnzoo.experiments.compile_for", *arguments]
  return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
