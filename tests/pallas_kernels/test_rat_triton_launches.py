"""The Triton kernels of RAT attention: block sizes, refusals, and a run on a GPU."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import compat
from attnzoo.pallas_kernels.cases import Case
from attnzoo.pallas_kernels.rat_attention import cases, rat_attention, triton, triton_vjp
from attnzoo.pallas_kernels.triton_call import Gpu
from attnzoo_testing.cuda_aot import A100, H100, abstract_gpu
from attnzoo_testing.gradients import cotangents, results_and_gradients
from attnzoo_testing.numerics import assert_as_exact

needs_triton = pytest.mark.skipif(not compat.has_jax_triton(), reason="no jax-triton here")
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here")


def choose(batch, length, heads, groups, dim, chunk_size, dtype="bfloat16", gpu=H100):
  slots = max(length // chunk_size, 1)
  sizes = (batch, length, heads, groups, dim, slots, chunk_size)
  problem = triton.Problem(*sizes, dtype, True, True, False)
  return problem, triton.choose_config(problem, gpu)


def is_power_of_two(number):
  return number & (number - 1) == 0


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gpu", [A100, H100], ids=["a100", "h100"])
def test_launches_cover_everything(case, dtype, gpu):
  size = case.sizes
  shape = (size[n] for n in ("batch", "length", "heads", "kv_heads", "key_dim", "chunk"))
  problem, config = choose(*shape, dtype, gpu)
  written = {}
  launches = triton.forward_launches(problem, config) + triton.backward_launches(problem, config)
  for launch in launches:
    constants, grid = launch.constants, launch.grid
    written |= launch.outputs
    if "HALF" in constants:
      heads, chunks, groups = (constants[n] for n in ("HEADS", "CHUNKS", "GROUPS"))
      assert all(map(is_power_of_two, (heads, chunks, groups, constants["HALF"])))
      assert 0 <= grid[0] * chunks * problem.chunk_size - problem.length
      assert grid[0] * chunks < problem.chunks + chunks
      assert groups >= problem.groups
      assert grid[1] * heads * problem.groups >= problem.heads
      assert 2 * constants["HALF"] >= problem.dim
      whole = grid[0] * chunks * problem.chunk_size == problem.length
      assert whole or not constants["FULL"]
      assert grid[2] == problem.batch
    else:
      by_slot = "slot" in launch.kernel
      block, total = (
        (constants["TILE"], problem.slots) if by_slot else (constants["ROWS"], problem.length)
      )
      assert grid[0] == -(-total // block) * problem.heads
      assert grid[1:] == ((problem.batch, config.splits) if by_slot else (problem.batch,))
      assert constants["K_BLOCK"] >= problem.dim
  wanted = {"output", "keys", "values", "running_key", "running_value", "d_rotated", "d_query_own"}
  wanted |= {"d_key", "d_value", "d_gate_logits", "d_gate_bias", "d_output_logits"}
  assert wanted <= written.keys()
  inputs = {name for launch in launches for name in launch.inputs}
  given = {"rotated", "query", "key", "value", "gate_logits", "gate_bias", "output_logits"}
  given |= {"cos", "sin", "d_output", "d_state_key", "d_state_value"}
  given |= {"d_running_key", "d_running_value"}
  assert inputs <= written.keys() | given


@pytest.mark.parametrize(
  ("sizes", "heads", "chunks", "parts"),
  [
    ((4, 4096, 16, 2, 128, 16), 8, 1, 1),  # all heads of a group: their gradients are summed there
    ((4, 4096, 16, 16, 128, 16), 1, 1, 1),
    ((1, 4096, 64, 2, 128, 16), 16, 1, 2),  # 4096 numbers are the most
    ((8, 4096, 4, 2, 32, 16), 2, 4, 1),  # few heads: several chunks
    ((1, 4096, 4, 2, 32, 16), 2, 4, 1),
    ((1, 30, 2, 2, 8, 16), 1, 2, 1),
  ],
)
def test_lanes(sizes, heads, chunks, parts):
  problem, config = choose(*sizes)
  lanes = config.lanes
  assert (lanes.heads, lanes.chunks) == (heads, chunks)
  assert triton.recurrence_launch(problem, config).grid[1] == parts


@pytest.mark.parametrize(
  ("sizes", "splits"),
  [
    ((4, 4096, 16, 2, 128, 16), 1),  # 256 programs
    ((1, 8192, 16, 2, 128, 64), 8),  # 32 programs
    ((1, 500, 1, 1, 128, 4), 2),  # no part shorter than four blocks
  ],
)
def test_few_slots_split_the_rows(sizes, splits):
  assert choose(*sizes)[1].splits == splits


# --- Refusals -------------------------------------------------------------------------------------


def shapes(dtype="bfloat16", dim=16):
  query = jax.ShapeDtypeStruct((1, 64, 2, dim), np.dtype(dtype))
  value = jax.ShapeDtypeStruct((1, 64, 4, dim), np.dtype(dtype))
  return query, query, value, value, jax.ShapeDtypeStruct((4, dim), np.dtype("float32"))


@needs_triton
@pytest.mark.parametrize(
  ("dtype", "dim", "kind", "message"),
  [
    ("float64", 16, "NVIDIA H100", "value must be float32, bfloat16 or float16"),
    ("bfloat16", 272, "NVIDIA H100", "value must have at most 256 channels"),
    ("bfloat16", 16, "Voodoo 5", "device kind must be one of"),
  ],
)
def test_refuses(dtype, dim, kind, message):
  attention = functools.partial(rat_attention, implementation="triton", chunk_size=4)
  raises = pytest.raises(NotImplementedError, match=message)
  with abstract_gpu(kind), jax.enable_x64(dtype == "float64"), raises:
    jax.eval_shape(attention, *shapes(dtype, dim))


def test_refuses_an_old_gpu(monkeypatch):
  monkeypatch.setattr(compat, "require_triton", lambda _: None)
  monkeypatch.setattr(triton_vjp, "target_gpu", lambda _: Gpu(75, 40, 65536))
  with pytest.raises(NotImplementedError, match="must be at least 8.0; got 7.5"):
    jax.eval_shape(
      functools.partial(rat_attention, implementation="triton", chunk_size=4), *shapes()
    )


def test_refuses_a_cpu():
  message = "compiles only for an NVIDIA GPU|needs the packages"
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(
      functools.partial(rat_attention, implementation="triton", chunk_size=4), *shapes()
    )


def test_triton_is_imported_only_to_launch():
  code = (
    "import sys, attnzoo.pallas_kernels.rat_attention.triton_vjp\n"
    "assert not {'triton', 'jax_triton'} & set(sys.modules)"
  )
  environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
  child = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
  assert child.returncode == 0


# --- On a GPU -------------------------------------------------------------------------------------


def make_case(name, batch, length, heads, dim, chunk, groups, **options):
  sizes = dict(batch=batch, length=length, heads=heads, kv_heads=groups, key_dim=dim, value_dim=dim)
  return Case(name, (), sizes | dict(chunk=chunk), options)


GPU_CASES = (
  make_case("layer", 2, 2048, 16, 128, 16, 2),
  make_case("long_chunks", 1, 4096, 4, 64, 256, 2),
  make_case("odd", 2, 777, 6, 72, 7, 3, lengths=True),
  make_case("no_chunk_ends", 1, 300, 2, 64, 512, 1, output=False),
  make_case("chunks_of_one", 1, 1024, 2, 64, 1, 2),
  make_case("packed", 2, 1501, 4, 128, 16, 2, segments="packed", lengths=True, state=40),
)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_gpu(case, dtype):
  inputs = cases.make_inputs(case, jnp.dtype(dtype))
  xla, kernel, definition = (
    functools.partial(cases.operator, implementation=name, **cases.static_options(case))
    for name in ("xla", "triton", "reference")
  )
  cotangent = cotangents(xla, inputs)
  portable = results_and_gradients(xla, inputs, cotangent, cases.RESULTS)
  got = results_and_gradients(kernel, inputs, cotangent, cases.RESULTS)
  with jax.enable_x64(True):
    wide = {
      n: x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
      for n, x in inputs.items()
    }
    truth = results_and_gradients(definition, wide, cotangent, cases.RESULTS)
  if case.name == "no_chunk_ends":  # exactly 0, of which rounding errors are no measure
    truth.pop("d_query")
    assert not np.any(got["d_query"])
  assert_as_exact(got, portable, truth, jnp.dtype(dtype))
