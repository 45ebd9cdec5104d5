"""What the tests of operators with Triton kernels share: on a CPU, on no device, on a GPU."""

import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import compat
from attnzoo.pallas_kernels.cases import Case
from attnzoo.pallas_kernels.triton_call import Gpu, Launch
from attnzoo_testing.cuda_aot import Resources, compile_launch
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.numerics import assert_as_exact
from attnzoo_testing.triton_interpreter import interpret

needs_triton = pytest.mark.skipif(
  importlib.util.find_spec("triton") is None, reason="no triton here"
)
needs_plugin = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None
  or importlib.util.find_spec("jax_triton") is None,
  reason="no CUDA plugin or jax-triton here",
)
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here")


def changed(
  launches: Iterable[Launch], kernel: str, constants=None, **inputs
) -> tuple[Launch, ...]:
  """A fault: launches of kernels with such a name have other constants or read other arrays."""
  return tuple(
    dataclasses.replace(
      launch,
      constants=launch.constants | (constants or {}),
      inputs=tuple(inputs.get(name, name) for name in launch.inputs),
    )
    if kernel in launch.kernel
    else launch
    for launch in launches
  )


def interpret_operator(
  monkeypatch: pytest.MonkeyPatch, triton: types.ModuleType, vjp: types.ModuleType, gpu: Gpu
) -> None:
  """An operator's modules `triton` and `triton_vjp` think there is such a GPU; launches, also those
  under a jit, are run by the interpreter."""

  def run_launches(launches, arrays, _):
    shapes = {name: shape for launch in launches for name, shape in launch.outputs.items()}
    names = sorted({name for launch in launches for name in launch.inputs} - shapes.keys())

    def host(*values):
      got = interpret([(launches, dict(zip(names, map(np.asarray, values), strict=True)))])[0]
      return {name: got[name] for name in shapes}

    return arrays | jax.pure_callback(host, shapes, *(arrays[name] for name in names))

  monkeypatch.setattr(compat, "require_triton", lambda _: None)
  monkeypatch.setattr(vjp, "run_launches", run_launches)
  for module in (triton, vjp):
    monkeypatch.setattr(module, "target_gpu", lambda _: gpu)


def resources_of(
  launches: Iterable[Launch], dtypes: dict[str, str], gpu: Gpu
) -> dict[str, Resources]:
  """What the assembler says of each kernel; `dtypes` are those of the arrays given."""
  launches = tuple(launches)
  dtypes = dtypes | {n: s.dtype.name for one in launches for n, s in one.outputs.items()}
  return {one.kernel.split(":")[1]: compile_launch(one, dtypes, gpu) for one in launches}


def operations(compiled) -> tuple[int, int, int]:
  """(kernel calls, loops, elements of the largest array) of an XLA executable."""
  text = compiled.as_text()
  shapes = re.findall(r"\b(?:f32|bf16|f16|s32|s16|pred)\[([\d,]+)\]", text)
  largest = max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)
  calls = len(re.findall(r'custom_call_target="triton_kernel_call', text))
  return calls, len(re.findall(r" while\(", text)), largest


def compare_on_gpu(cases: types.ModuleType, case: Case, dtype: str, fixed=()) -> None:
  """The kernels of this machine's GPU against the definition in float64, gradients included.

  `fixed` are inputs without gradient that keep their dtype.
  """
  inputs = cases.make_inputs(case, jnp.dtype(dtype))
  given = {name: inputs.pop(name) for name in fixed if name in inputs}
  xla, kernel, definition = (
    functools.partial(cases.operator, implementation=name, **given, **cases.static_options(case))
    for name in ("xla", "triton", "reference")
  )
  cotangent = cotangents(xla, inputs)
  portable = results_and_gradients(xla, inputs, cotangent, cases.RESULTS)
  got = results_and_gradients(kernel, inputs, cotangent, cases.RESULTS)
  with jax.enable_x64(True):
    truth = results_and_gradients(definition, widest(inputs), cotangent, cases.RESULTS)
  assert_as_exact(got, portable, truth, jnp.dtype(dtype))


def widest(inputs: dict) -> dict:
  """Floating-point arrays in float64."""
  floating: Callable = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
  return {n: np.asarray(x, np.float64) if floating(x) else x for n, x in inputs.items()}


def assert_imports_no_triton(module: str) -> None:
  """That `module` can be imported where there is no triton."""
  code = f"import sys, {module}\nassert not {{'triton', 'jax_triton'}} & set(sys.modules)"
  environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
  child = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
  assert child.returncode == 0


def check_other_machines_refused(monkeypatch, refused, triton) -> None:
  """`refused(message)` calls the operator; without a GPU, and for one that is too old.

  `triton`: the operator's module that asks which GPU is compiled for.
  """
  refused("compiles only for an NVIDIA GPU|needs the packages")
  monkeypatch.setattr(compat, "require_triton", lambda _: None)
  monkeypatch.setattr(triton, "target_gpu", lambda _: Gpu(75, 40, 65536))
  refused("must be at least 8.0; got 7.5")
