"""TPU slices that are not there, and the training step compiled for them.

libtpu compiles for any slice on any host. `prepare` before jax looks for devices, `slice_devices`
for the devices of a slice, `compile_step` for the step that training runs, on a mesh of them.
"""

import dataclasses
import difflib
import importlib.util
import os
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnzoo.experiments import hlo
from attnzoo.experiments.training import state
from attnzoo.experiments.training.config import Experiment, MeshConfig

GIB = 2**30
# What libtpu asks of a host that has no TPU; read when it is loaded.
_ENVIRONMENT = dict(
  TPU_SKIP_MDS_QUERY="1",
  TPU_WORKER_HOSTNAMES="localhost",
  TPU_ACCELERATOR_TYPE="v5litepod-4",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",
  TPU_LOG_DIR="disabled",
)


class Chip(NamedTuple):
  """One generation. A device is what jax lists: the chip, or on tpu7x one of its two halves."""

  hbm_gib: int  # of a device
  dimensions: int  # of the slices' shapes
  example: str  # of a slice
  options: dict[str, str]  # of `get_topology_desc`


CHIPS = {
  "v4": Chip(32, 3, "v4:2x2x4", {"chip_config_name": "megacore"}),
  "v5e": Chip(16, 2, "v5e:4x4", {}),
  "v5p": Chip(95, 3, "v5p:2x2x4", {}),
  "v6e": Chip(32, 2, "v6e:4x4", {}),
  "tpu7x": Chip(96, 3, "tpu7x:2x2x4", {}),
}


def prepare() -> None:
  """Makes this process ready to compile for absent TPUs. Call before jax looks for devices."""
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  jax.config.update("jax_platforms", "cpu")


def chip_of(topology: str) -> Chip:
  """The generation that a topology such as "v5e:4x4" names.

  Raises:
    ValueError: the name is not `<chip>:<shape>` of a known chip.
  """
  name, colon, shape = topology.partition(":")
  examples = ", ".join(chip.example for chip in CHIPS.values())
  if name not in CHIPS:
    near = difflib.get_close_matches(name, CHIPS, n=1, cutoff=0.4)
    hint = f"did you mean {CHIPS[near[0]].example!r}? " if near else ""
    _fail("name a known chip", topology, f"{hint}such as {examples}")
  chip = CHIPS[name]
  sides = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape)
  if not colon or not sides or shape.count("x") + 1 != chip.dimensions:
    rule = f"give {chip.dimensions} sides after {name}:"
    _fail(rule, topology, f"such as {chip.example}; its sides multiply to the number of chips")
  return chip


def slice_devices(topology: str) -> list[jax.Device]:
  """The devices of a slice, to compile for.

  Raises:
    ValueError: a name or shape that there is not.
    NotImplementedError: libtpu is not installed.
  """
  chip = chip_of(topology)
  if importlib.util.find_spec("libtpu") is None:
    raise NotImplementedError(
      "slice_devices: compiling for a TPU needs the package libtpu, which is not installed (pip"
      ' install "libtpu>=0.0.50.1", on Linux x86-64; no TPU is needed)'
    )
  from jax.experimental import topologies

  try:
    return list(topologies.get_topology_desc(topology, "tpu", **chip.options).devices)
  except jax.errors.JaxRuntimeError as error:
    _fail("be a slice that exists", topology, f"such as {chip.example}; libtpu: {error}")


def whole_mesh(mesh: MeshConfig, topology: str) -> MeshConfig:
  """The mesh with `data` filled in: what the other axes leave of the slice.

  Raises:
    ValueError: the axes do not multiply to the number of devices.
  """
  count = len(slice_devices(topology))
  data = mesh.data or max(count // (mesh.seq * mesh.model), 1)
  if data * mesh.seq * mesh.model != count:
    raise ValueError(
      f"mesh: data x seq x model must be the {count} devices of {topology}; got {data} x"
      f" {mesh.seq} x {mesh.model} = {data * mesh.seq * mesh.model} (leave data out to fill up)"
    )
  return dataclasses.replace(mesh, data=data)


def _fail(rule: str, topology: str, hint: str):
  raise ValueError(f"topology: must {rule}; got {topology!r} ({hint})")


@dataclasses.dataclass(frozen=True)
class Memory:
  """HBM of one device, in bytes, as the compiler has laid it out."""

  arguments: int  # parameters, moments, batch
  outputs: int  # without those that take the place of arguments
  aliased: int  # outputs that do
  temporaries: int  # activations, gradients, gathered weights
  code: int

  @property
  def total(self) -> int:
    return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """The training step of an experiment, compiled for a mesh of absent devices."""

  mesh: dict[str, int]
  memory: Memory
  program: hlo.Analysis
  lower_seconds: float
  compile_seconds: float


class DoesNotFit(Exception):
  """The compiler found no way to keep the step in the memory of a device."""

  def __init__(self, used: int, limit: int):
    super().__init__(f"{used / GIB:.2f} GiB needed, {limit / GIB:.2f} GiB there")
    self.used, self.limit = used, limit


def compile_step(experiment: Experiment, devices: list[jax.Device]) -> CompiledStep:
  """Compiles what `training.loop` runs, with the state given away, for `devices`.

  No array of the model is made; the kernels are those of the devices.

  Raises:
    ValueError: a mesh that is not the devices, or does not divide batch, length or heads.
    NotImplementedError: an implementation that these devices have not.
    DoesNotFit: too large for the memory of a device.
  """
  mesh = state.make_mesh(experiment.mesh, devices)
  state.check_divides(experiment, mesh)
  constants = state.model_constants(experiment)
  with jax.set_mesh(mesh):
    parts, abstract = state.abstract_state(experiment)
    shardings = state.state_shardings(parts, abstract, mesh)
    place = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      abstract,
      shardings,
    )
    step = state.make_train_step(experiment, parts._replace(constants=constants))
    began = time.monotonic()
    lowered = jax.jit(step, donate_argnums=0).lower(place, _batch(experiment, mesh))
    lowered_at = time.monotonic()
    compiled = _compile(lowered)
  sizes = compiled.memory_analysis()
  memory = Memory(
    arguments=sizes.argument_size_in_bytes,
    outputs=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
    aliased=sizes.alias_size_in_bytes,
    temporaries=sizes.temp_size_in_bytes,
    code=sizes.generated_code_size_in_bytes,
  )
  seconds = (lowered_at - began, time.monotonic() - lowered_at)
  return CompiledStep(dict(mesh.shape), memory, hlo.analyse(compiled.as_text()), *seconds)


def _batch(experiment: Experiment, mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """A batch as `experiments.data` makes them."""
  shape = (experiment.data.batch_size, experiment.data.sequence_length)
  kinds = dict(tokens=jnp.int32, targets=jnp.int32, weights=jnp.float32, segment_ids=jnp.int32)
  sharding = state.batch_sharding(mesh)
  return {n: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for n, kind in kinds.items()}


_SIZE = r"([\d.]+)([KMGT]?)"
# What the compiler says of HBM, found out early by an estimate or late by the layout.
_OVERFLOWS = (rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", rf"Used {_SIZE} of {_SIZE} hbm")


def _compile(lowered):
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    for pattern in _OVERFLOWS:
      if found := re.search(pattern, str(error)):
        number, unit, limit, limit_unit = found.groups()
        raise DoesNotFit(_to_bytes(number, unit), _to_bytes(limit, limit_unit)) from error
    raise  # such as a kernel that needs more VMEM than there is


def _to_bytes(number: str, unit: str) -> int:
  return round(float(number) * 2 ** (10 * " KMGT".index(unit or " ")))
