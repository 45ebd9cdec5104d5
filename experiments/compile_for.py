"""Compiles the training step for a TPU slice that is not there, and says whether it would fit.

    python -m attnzoo.experiments.compile_for --model=transnormer-1b --topology=v5e:4x4
    python -m attnzoo.experiments.compile_for --model=transnormer-7b --topology=v5p:8x8x8 \
        --mesh=data=128,model=4 --batch_size=512 --json=runs/7b.json

Needs the package libtpu and no TPU: it is the compiler that pods use, on the step that `train`
runs. Prints the memory of one chip, the collectives with loops multiplied out, and the Pallas
kernels. Exit code 0 if the step fits, 1 if it does not, 2 for what cannot be compiled.

A collective's bytes are those of the whole array, once a run. Where the compiler takes a gather of
weights apart to work on each part as it arrives, its parts are listed as collective-permutes.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import sys
from typing import Any

from absl import flags

from attnzoo import zoo
from attnzoo.experiments import command_line, pods
from attnzoo.experiments.data import DataConfig
from attnzoo.experiments.training import config
from attnzoo.layers.decoder import REMAT_POLICIES
from attnzoo.layers.partitioning import MESH_AXES
from attnzoo.zoo import models

_MODEL = flags.DEFINE_string("model", "transnormer-1b", "A preset of the zoo.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "<chip>:<shape> of the slice.")
_MESH = flags.DEFINE_string(
  "mesh", "", "Devices along each axis, such as data=8,model=2; what is left goes to data."
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 0, "Rows of a step over all chips; 0 = 4 along each place of data.", lower_bound=0
)
_LENGTH = flags.DEFINE_integer("sequence_length", 2048, "Tokens of a row.", lower_bound=1)
_ACCUMULATION = flags.DEFINE_integer("grad_accumulation", 1, "Parts of a batch.", lower_bound=1)
_REMAT = flags.DEFINE_enum("remat", "full", list(REMAT_POLICIES), "What is computed twice.")
_IMPLEMENTATION = flags.DEFINE_enum(
  "implementation", None, ["tpu", "xla"], "Of the operators; by default the TPU kernels."
)
_OPTIMIZER = flags.DEFINE_enum("optimizer", "adamw", config.OPTIMIZERS, "Its state takes memory.")
_JSON = flags.DEFINE_string("json", "", "Write the report here too.")


def main(_) -> None:
  pods.prepare()
  experiment, chip = _experiment(), pods.chip_of(_TOPOLOGY.value)
  devices = pods.slice_devices(_TOPOLOGY.value)
  report = dict(_what(experiment, len(devices)), hbm=chip.hbm_gib * pods.GIB)
  try:
    step = pods.compile_step(experiment, devices)
    report.update(_figures(step))
  except pods.DoesNotFit as error:  # the compiler's own limit keeps a little for the system
    report.update(total=error.used, hbm=error.limit, refused_by_compiler=True)
  report["fits"] = report["total"] <= report["hbm"]
  print(_text(report))
  if _JSON.value:
    path = pathlib.Path(_JSON.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
  if not report["fits"]:
    print(f"error: {_advice(experiment, report)}", file=sys.stderr)
    sys.exit(1)


def _experiment() -> config.Experiment:
  mesh = _mesh(_MESH.value, _TOPOLOGY.value)
  if hasattr(zoo.get_config(_MODEL.value), "labels"):
    raise NotImplementedError(
      f"--model must be a language model; got {_MODEL.value!r}, which codes notes (its kernels are"
      " compiled for TPUs in the tests)"
    )
  model = zoo.get_config(
    _MODEL.value, dtype="bfloat16", remat=_REMAT.value, implementation=_IMPLEMENTATION.value
  )
  pieces = _ACCUMULATION.value
  return config.Experiment(
    model=model,
    data=DataConfig(
      sequence_length=_LENGTH.value, batch_size=_BATCH_SIZE.value or 4 * mesh.data * pieces
    ),
    optimizer=config.OptimizerConfig(name=_OPTIMIZER.value),
    train=config.TrainConfig(grad_accumulation=pieces),
    mesh=mesh,
  )


def _mesh(text: str, topology: str) -> config.MeshConfig:
  """`data=8,model=2` as a mesh of all devices of the slice."""
  sizes = {}
  for entry in filter(None, text.split(",")):
    name, _, size = entry.partition("=")
    if name not in MESH_AXES or not size.isdigit():
      raise ValueError(
        f"--mesh must be <axis>=<devices>,... with axes among {', '.join(MESH_AXES)}; got {entry!r}"
        " (such as data=8,model=2)"
      )
    sizes[name] = int(size)
  return pods.whole_mesh(config.MeshConfig(**sizes), topology)


def _what(experiment: config.Experiment, devices: int) -> dict[str, Any]:
  data, model = experiment.data, experiment.model
  return dict(
    model=_MODEL.value,
    parameters=models.parameter_count(model),
    topology=_TOPOLOGY.value,
    devices=devices,
    mesh=dataclasses.asdict(experiment.mesh),
    batch_size=data.batch_size,
    sequence_length=data.sequence_length,
    grad_accumulation=experiment.train.grad_accumulation,
    remat=model.remat,
    implementation=model.implementation or "tpu",
    optimizer=experiment.optimizer.name,
    versions={name: importlib.metadata.version(name) for name in ("jax", "libtpu", "flax")},
  )


def _figures(step: pods.CompiledStep) -> dict[str, Any]:
  program = step.program
  return dict(
    memory=dataclasses.asdict(step.memory),
    total=step.memory.total,
    collectives=program.totals(),
    largest_collectives=[dataclasses.asdict(one) for one in program.collectives[:20]],
    kernels=program.kernels,
    largest_array=program.largest_array,
    unknown_loops=program.unknown_loops,
    lower_seconds=round(step.lower_seconds, 1),
    compile_seconds=round(step.compile_seconds, 1),
  )


def _text(report: dict[str, Any]) -> str:
  r = report
  mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items())
  lines = [
    f"{r['model']}  {r['parameters']:,} parameters on {r['topology']} ({r['devices']} devices):"
    f" {mesh}",
    f"step  {r['batch_size']} x {r['sequence_length']} tokens, remat {r['remat']},"
    f" {r['implementation']} operators, {r['optimizer']}, in"
    f" {r['grad_accumulation']} part{'s' * (r['grad_accumulation'] > 1)}",
    "versions  " + ", ".join(f"{name} {version}" for name, version in r["versions"].items()),
  ]
  if "memory" in r:
    lines += _compiled_text(r)
  verdict = "fits" if r["fits"] else "DOES NOT FIT"
  lines.append(f"{verdict}: {_gib(r['total'])} of {_gib(r['hbm'])} GiB of a device's memory")
  return "\n".join(lines)


def _compiled_text(r: dict[str, Any]) -> list[str]:
  memory, (shape, size) = r["memory"], r["largest_array"]
  lines = [f"compiled  in {r['compile_seconds']} s, traced in {r['lower_seconds']} s", "", "memory"]
  lines += [f"  {name:<20}{_gib(size):>9} GiB" for name, size in memory.items()]
  lines += [f"  largest array {shape}, {_gib(size)} GiB", "", "collectives (of a step)"]
  for kind, row in r["collectives"].items():
    lines.append(f"  {kind:<20}{row['count']:>9} x{_gib(row['bytes']):>9} GiB in all")
  calls = [f"  {name:<40}{count:>6} calls" for name, count in r["kernels"].items()]
  lines += ["", "Pallas kernels", *(calls or ["  none"]), ""]
  if r["unknown_loops"]:
    lines.append(f"{r['unknown_loops']} loops of unknown length are counted once")
  return lines


def _advice(experiment: config.Experiment, report: dict[str, Any]) -> str:
  """One line: that it does not fit, and what would change that."""
  ways = []
  if experiment.model.remat != "full":
    ways.append("--remat=full")
  rows = experiment.data.batch_size // experiment.train.grad_accumulation
  if rows > experiment.mesh.data:
    ways.append(f"--batch_size below {experiment.data.batch_size} or more --grad_accumulation")
  elif experiment.data.sequence_length > 1024:
    ways.append("--mesh with seq=2 or a shorter --sequence_length")
  ways.append("--mesh with more model, or a larger --topology")
  missing = report["total"] - report["hbm"]
  return (
    f"the step must fit into a device; it is {_gib(missing)} GiB too large (try {'; '.join(ways)})"
  )


def _gib(size: int) -> str:
  return f"{size / pods.GIB:.3f}"


if __name__ == "__main__":
  command_line.run(main)
