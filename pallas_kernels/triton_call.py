"""Launching raw Triton kernels through jax-triton, whatever its version.

An operator describes its launches as data (`Launch`), from sizes alone, without importing triton.
The same list is run here by jax on a GPU, and in the tests by Triton's interpreter on a CPU or by
the compiler for a GPU that is not there: what is tested is what runs.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Mapping

import jax
from jax.interpreters import partial_eval


@dataclasses.dataclass(frozen=True)
class Launch:
  """One kernel launch. The kernel takes the inputs, then the outputs, then `constants` by name."""

  kernel: str  # "package.module:function"; the module is imported when the launch is run
  grid: tuple[int, ...]
  inputs: tuple[str, ...]  # names in the dictionary of arrays, in the kernel's order
  outputs: Mapping[str, jax.ShapeDtypeStruct]  # added to that dictionary
  constants: Mapping[str, object]
  num_warps: int
  num_stages: int
  max_registers: int | None = None  # per thread, for more programs side by side (jax-triton >= 0.4)


@dataclasses.dataclass(frozen=True)
class Gpu:
  """What choosing block sizes needs to know about a GPU."""

  compute_capability: int  # 90 for 9.0
  multiprocessors: int
  shared_memory: int  # bytes that one block may use


MIN_CAPABILITY = 80  # older ones have less than half of the shared memory, and no bfloat16
# CUDA programming guide, technical specifications per compute capability.
_SHARED_MEMORY = {
  75: 65536, 80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448,
  120: 101376, 121: 101376,
}  # fmt: skip
# For ahead-of-time compilation: (part of the device kind, compute capability, multiprocessors).
_GPUS = (
  ("A100", 80, 108),
  ("GH200", 90, 132),
  ("H100", 90, 132),
  ("H200", 90, 132),
  ("B200", 100, 148),
)


def target_gpu(function: str) -> Gpu:
  """The GPU that the current trace is for: the abstract mesh's if one is in force, or the first."""
  device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  if device is None or (
    jax.default_backend() == "gpu" and jax.devices()[0].device_kind == device.device_kind
  ):
    device = jax.devices()[0]
    major, minor = str(device.compute_capability).split(".")
    capability, multiprocessors = int(major) * 10 + int(minor), int(device.core_count)
  else:
    found = [row for row in _GPUS if row[0] in device.device_kind]
    if not found:
      names = ", ".join(row[0] for row in _GPUS)
      raise NotImplementedError(
        f"{function}: the device kind must be one of {names} to compile Triton kernels ahead of "
        f'time; got {device.device_kind!r} (compile on such a machine, or use "xla")'
      )
    _, capability, multiprocessors = found[0]
  if capability not in _SHARED_MEMORY:
    raise NotImplementedError(
      f"{function}: the compute capability must be one of {sorted(_SHARED_MEMORY)} for the Triton "
      f'kernels; got {capability} (use "xla")'
    )
  return Gpu(capability, multiprocessors, _SHARED_MEMORY[capability])


def too_old(gpu: Gpu) -> str | None:
  """Why kernels that want `MIN_CAPABILITY` do not run on a GPU; None: they do."""
  if gpu.compute_capability >= MIN_CAPABILITY:
    return None
  return (
    f"the compute capability must be at least {MIN_CAPABILITY / 10}; got"
    f" {gpu.compute_capability / 10}"
  )


def block_of(size: int, least: int = 16) -> int:
  """Power of two that covers `size`; matrix products need 16."""
  return max(least, 1 << (size - 1).bit_length())


def run_launches(
  launches: tuple[Launch, ...], arrays: dict[str, jax.Array], gpu: Gpu
) -> dict[str, jax.Array]:
  """`arrays` with the outputs of the launches, in order, added."""
  arrays = dict(arrays)
  for launch in launches:
    results = _call(launch, [arrays[name] for name in launch.inputs], gpu)
    arrays.update(zip(launch.outputs, results, strict=True))
  return arrays


def load_kernel(launch: Launch):
  """The @triton.jit function of a launch; imports its module."""
  module, function = launch.kernel.split(":")
  return getattr(importlib.import_module(module), function)


def _call(launch, operands, gpu):
  import jax_triton

  _use_default_dead_code_rule()
  options = dict(
    kernel=load_kernel(launch),
    grid=launch.grid,
    name=launch.kernel.split(":")[1],
    num_warps=launch.num_warps,
    num_stages=launch.num_stages,
    compute_capability=gpu.compute_capability,
  )
  shapes = list(launch.outputs.values())
  if "out_type" in inspect.signature(jax_triton.triton_call).parameters:  # jax-triton >= 0.4
    # PTX 9.0 is CUDA 13.0's, the oldest that jax[cuda13] runs with; triton's own assembler may be
    # newer than the one that will read it. Fusing a * b + c is what older versions do by default.
    backend = dict(ptx_version=90, enable_fp_fusion=True, maxnreg=launch.max_registers)
    options |= dict(out_type=shapes, backend_options=backend)
  else:
    options |= dict(out_shape=shapes)

  @jax.custom_batching.sequential_vmap  # jax-triton has no rule of its own for vmap
  def call(*operands):
    return jax_triton.triton_call(*operands, **options, **launch.constants)

  return call(*operands)


def _use_default_dead_code_rule() -> None:
  """Drops jax-triton's own rule for dead code, so that jax's applies.

  That of 0.4.1 takes two arguments where jax 0.12 passes three; jax's own also removes launches
  whose results nobody reads.
  """
  from jax_triton.triton_lib import triton_kernel_call_p

  partial_eval.dce_rules.pop(triton_kernel_call_p, None)
