"""Compiles for an NVIDIA GPU that is not there: Triton launches, and whole programs by XLA."""

import contextlib
import os
import re
import subprocess
import tempfile
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from attnzoo.pallas_kernels.triton_call import Gpu, Launch, load_kernel

A100 = Gpu(80, 108, 166912)
H100 = Gpu(90, 132, 232448)

_POINTERS = {
  "float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32", "int16": "*i16",
}  # fmt: skip


class Resources(NamedTuple):
  """What the assembler says of one kernel. `spills` are bytes per thread, stored."""

  registers: int
  spills: int
  shared_memory: int
  tensor_cores: int  # matrix instructions in the program text
  serialized: bool  # the assembler gave up on overlapping warpgroup products


def compile_launch(launch: Launch, dtypes: dict[str, str], gpu: Gpu) -> Resources:
  """Compiles one launch to machine code; `dtypes` are those of the arrays that are inputs."""
  import triton
  from triton.backends.compiler import GPUTarget
  from triton.compiler import ASTSource

  # jax-triton 0.3 sets this to "" when it is imported, which triton takes for a missing folder.
  if os.environ.get("TRITON_CACHE_DIR") == "":
    del os.environ["TRITON_CACHE_DIR"]
  kernel = load_kernel(launch)
  dtypes = dict(dtypes) | {name: shape.dtype.name for name, shape in launch.outputs.items()}
  pointers = [_POINTERS[dtypes[name]] for name in (*launch.inputs, *launch.outputs)]
  names = kernel.arg_names
  if len(pointers) + len(launch.constants) != len(names):
    raise ValueError(f"compile_launch: the launch must give each of {names} once; got {launch}")
  signature = dict(zip(names, pointers, strict=False)) | dict.fromkeys(
    launch.constants, "constexpr"
  )
  source = ASTSource(
    fn=kernel,
    signature={name: signature[name] for name in names},
    constexprs=dict(launch.constants),
    # jax aligns every array, and jax-triton tells the compiler so.
    attrs={(index,): [["tt.divisibility", 16]] for index in range(len(pointers))},
  )
  options = dict(
    num_warps=launch.num_warps, num_stages=launch.num_stages, maxnreg=launch.max_registers,
    enable_fp_fusion=True,
  )  # fmt: skip
  target = GPUTarget("cuda", gpu.compute_capability, 32)
  compiled = triton.compile(source, target=target, options=options)
  return _resources(compiled.asm["ptx"], compiled.metadata.shared, gpu)


def _resources(ptx, shared_memory, gpu):
  from triton.backends.nvidia.compiler import get_ptxas

  chip = re.search(r"\.target (sm_\w+)", ptx)[1]
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "kernel.ptx")
    with open(path, "w") as file:
      file.write(ptx)
    command = [get_ptxas(gpu.compute_capability).path, "-v", f"--gpu-name={chip}", path]
    command += ["-o", os.path.join(folder, "kernel.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
  return Resources(
    registers=int(re.search(r"Used (\d+) registers", report)[1]),
    spills=int(re.search(r"(\d+) bytes spill stores", report)[1]),
    shared_memory=shared_memory,
    tensor_cores=len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
    serialized="serialized" in report,
  )


@contextlib.contextmanager
def abstract_gpu(kind: str = "NVIDIA H100"):
  """Traces inside are for a GPU of this kind."""
  device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
  mesh = AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    yield


# XLA's description of an H100 SXM, as a text proto.
_H100 = """gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 threads_per_warp: 32 threads_per_block_limit: 1024
  threads_per_core_limit: 2048 registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072 device_address_bits: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  name: "NVIDIA H100 80GB HBM3" device_vendor: "NVIDIA Corporation" driver_version: "13.0.0"
  runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
}
platform_name: "CUDA" runtime_version { major: 13 } dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def compile_for_h100(function, *args):
  """XLA's executable of `function` for one H100; args: arrays or ShapeDtypeStructs."""
  from jax.experimental import topologies

  topology = topologies.get_topology_desc("h100", "cuda", target_config=_H100, topology="1x1x1")
  mesh = Mesh(np.array(topology.devices), ("device",))
  whole = NamedSharding(mesh, PartitionSpec())
  args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), args)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(function).lower(*args).compile()
