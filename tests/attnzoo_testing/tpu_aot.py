"""Compiling for TPUs on a machine that has none, and reading what the compiler made of it.

    compiled = compile_for_tpu(fn, *shapes, chip="v5e")     # shapes: arrays or ShapeDtypeStructs
    kernels(compiled)["name"].vmem_bytes, .hbm_bytes        # every Pallas call of the program
    layout_copies(compiled)                                 # copies and transposes around them
    schedules(code)["name"].cycles, .mxu, .spills           # `code` runs in a child process

`tests/conftest.py` sets the environment that libtpu needs. Schedules are the compiler's own static
ones: exact counts of instruction bundles for one pass over a kernel's body, every branch counted
once, waiting for memory not included. Nothing here measures time.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

CHIPS = dict(v4="v4:2x2x1", v5e="v5e:2x2", v5p="v5p:2x2x1", v6e="v6e:2x2", v7x="tpu7x:2x2x1")

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)

_ITEM_BITS = dict(pred=8, s8=8, u8=8, bf16=16, f16=16, s32=32, u32=32, f32=32, s64=64, u64=64)
_DUMP = "pre-delay_hlo-static-per-bundle-utilization.txt"


class Kernel(NamedTuple):
  """One Pallas call of a compiled program."""

  vmem_bytes: int  # scoped VMEM: blocks, scratch and compiler temporaries
  hbm_bytes: int  # operands and results, each counted once


class Schedule(NamedTuple):
  """One pass over a kernel's body, that is one grid step."""

  cycles: int  # instruction bundles
  mxu: float  # share of the matrix units' issue slots that is used
  spills: int  # stores of registers to VMEM


def compile_for_tpu(fn: Callable, *args, chip: str = "v5e") -> jax.stages.Compiled:
  """Compiles `fn` for one chip; `args` are pytrees of arrays or ShapeDtypeStructs."""
  devices = topologies.get_topology_desc(CHIPS[chip], "tpu").devices
  mesh = Mesh(np.array(devices[:1]), ("chip",))
  everywhere = NamedSharding(mesh, PartitionSpec())
  args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), args)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # what the trace is for
    return jax.jit(fn).lower(*args).compile()


def kernels(compiled: jax.stages.Compiled) -> dict[str, Kernel]:
  """The Pallas calls of a program by HLO name."""
  shapes, found = {}, {}
  for line in compiled.as_text().splitlines():
    if not (match := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)", line)):
      continue
    name, definition = match.groups()
    shapes[name] = re.split(r" [a-z][\w\-]*\(", definition, maxsplit=1)[0]
    if 'custom_call_target="tpu_custom_call"' not in definition:
      continue
    operands = re.findall(r"%([\w.\-]+)", definition.split("custom-call(")[1].split(")")[0])
    vmem = re.search(
      r'scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)', line
    )
    moved = _bytes_of(shapes[name]) + sum(_bytes_of(shapes[operand]) for operand in operands)
    found[name] = Kernel(int(vmem[1]) if vmem else 0, moved)
  return found


def layout_copies(compiled: jax.stages.Compiled, at_least: int = 2**16) -> list[str]:
  """HLO lines that copy or transpose `at_least` bytes or more, fused or not."""
  lines = []
  for line in compiled.as_text().splitlines():
    match = re.search(r" = (\S+) (copy|transpose|copy-start)\(", line)
    if match and _bytes_of(match[1]) >= at_least:
      lines.append(line.strip())
  return lines


def schedules(code: str) -> dict[str, Schedule]:
  """Runs Python `code` (which calls `compile_for_tpu`) in a child process and reads its schedules.

  The key is the kernel's HLO name without its number; give kernels different names to tell them
  apart. libtpu takes the options for writing them only when it is loaded, hence the child.
  """
  with tempfile.TemporaryDirectory() as folder:
    options = (
      f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
      "--xla_jf_dump_llo_pass_label_regex=.*utilization.*"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    environment = dict(os.environ, LIBTPU_INIT_ARGS=options, PYTHONPATH=path)
    run = subprocess.run(
      [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    if run.returncode:
      raise RuntimeError(f"the child process failed:\n{run.stderr[-3000:]}")
    found = {}
    for file in sorted(pathlib.Path(folder).glob(f"*{_DUMP}")):
      name = re.sub(r"^\d+-|(\.\d+)?-\d+-" + re.escape(_DUMP) + "$", "", file.name)
      found[name] = _read_schedule(file)
    return found


def check_schedule(found: dict[str, Schedule], kernel: str, limits: tuple[int, float, int]) -> None:
  """The one kernel with `kernel` in its name keeps to (most cycles, least mxu, most spills)."""
  (schedule,) = (schedule for name, schedule in found.items() if kernel in name)
  cycles, mxu, spills = limits
  assert schedule.cycles <= cycles, (kernel, schedule)
  assert schedule.mxu >= mxu, (kernel, schedule)
  assert schedule.spills <= spills, (kernel, schedule)


def check_schedules(
  file: str, operator: str, name: str, chip: str, dtype: str, limits: dict[str, tuple]
) -> None:
  """Runs `check_compiled(BY_NAME[name], dtype, chip)` of a test file in a child process.

  Then holds the schedules of its kernels, `operator`_forward for the key "forward", to `limits`.
  """
  path = pathlib.Path(file)
  found = schedules(
    f"import sys; sys.path.insert(0, {str(path.parent)!r})\n"
    f"import jax.numpy as jnp, {path.stem} as test\n"
    f"test.check_compiled(test.BY_NAME[{name!r}], jnp.{dtype}, {chip!r})"
  )
  for which, limit in limits.items():
    check_schedule(found, f"{operator}_{which}", limit)


def _read_schedule(file: pathlib.Path) -> Schedule:
  """Line 2 names the issue slots, line 3 how many of each there are, then one line a bundle."""
  lines = file.read_text().splitlines()
  columns = [name.strip() for name in lines[1].split(",")]
  slots = dict(zip(columns, map(int, lines[2].split()), strict=True))
  rows = np.array([[int(x) for x in line.split()] for line in lines[4:] if line.strip()])
  used = dict(zip(columns, rows.sum(0), strict=True))
  mxu = "MATMUL" if "MATMUL" in columns else "MXU"  # renamed between libtpu versions
  return Schedule(len(rows), float(used[mxu] / slots[mxu] / len(rows)), int(used["VSTORE:SPILL"]))


def _bytes_of(shapes: str) -> int:
  """Bytes of all array shapes named in a piece of HLO."""
  total = 0
  for item, dims in re.findall(r"\b([a-z]+\d+|pred)\[([\d,]*)\]", shapes):
    total += _ITEM_BITS.get(item, 0) * int(np.prod([int(d) for d in dims.split(",") if d])) // 8
  return total
