"""The TPU kernels of code_attention, compiled for absent TPUs."""

import jax
import jax.numpy as jnp
import pytest

from attnzoo.pallas_kernels.code_attention import api
from attnzoo.pallas_kernels.code_attention.cases import CASES, minimum_bytes, operator
from attnzoo_testing.marks import slow_but
from attnzoo_testing.tpu_aot import (
  check_schedules,
  compile_for_tpu,
  kernels,
  needs_libtpu,
)

BY_NAME = {case.name: case for case in CASES}


def program(case, dtype):
  """(function, shapes): training forward and backward of a case."""
  size = case.sizes
  shape = lambda *names: jax.ShapeDtypeStruct([size[n] for n in names], dtype)  # noqa: E731
  arrays = (
    shape("labels", "key_dim"),
    shape("batch", "length", "key_dim"),
    shape("batch", "length", "value_dim"),
  )
  mask = jax.ShapeDtypeStruct(arrays[1].shape[:2], jnp.bool_)

  def step(arrays, mask, d_output):
    attend = lambda q, k, v: operator(query=q, key=k, value=v, mask=mask, implementation="tpu")[0]  # noqa: E731
    output, vjp = jax.vjp(attend, *arrays)
    return output, vjp(d_output)

  return step, (arrays, mask, shape("batch", "labels", "value_dim"))


def check_compiled(case, dtype, chip):
  """Compiles a case; VMEM, memory traffic, and nothing of labels x tokens."""
  fn, shapes = program(case, dtype)
  compiled = compile_for_tpu(fn, *shapes, chip=chip)
  found = kernels(compiled)
  assert len(found) == 2, found
  assert all(0 < kernel.vmem_bytes <= 125 * 2**20 for kernel in found.values()), found
  # Every array once, where the minimum has the results of the forward pass three times; on two
  # cores twice a float32 gradient of the queries. Queries and labels' cotangents that are loaded
  # again for every document are not in it.
  moved = sum(kernel.hbm_bytes for kernel in found.values())
  least = minimum_bytes(case, dtype, backward=True)
  shares = 2 * 4 * case.sizes["labels"] * case.sizes["key_dim"] if chip == "v5p" else 0
  assert moved <= 1.05 * least + shares, moved / least
  # For the full code set the scores of one pass would be 6 times that.
  assert compiled.memory_analysis().temp_size_in_bytes < least


QUICK = ("top50", "v6e", "bfloat16")
# Instruction bundles of the whole kernel (loops once, for tiles with and without padding), share of
# the matrix units' slots, spilled registers. The limits leave 5 % to what jax 0.12.0.1 with
# libtpu 0.0.50.1 makes; `tpu_tuning.py` has the cycles per tile.
SCHEDULES = {
  ("full", "v5e", "bfloat16"): {
    "forward": (9120, 0.67, 2460),
    "backward": (21530, 0.76, 2640),
  },
  ("top50", "v6e", "bfloat16"): {
    "forward": (2530, 0.15, 81),
    "backward": (3490, 0.29, 122),
  },
  ("ragged", "v5p", "float32"): {
    "forward": (9740, 0.74, 2510),
    "backward": (26030, 0.85, 6380),
  },
}


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize(("name", "chip", "dtype"), slow_but(SCHEDULES, QUICK))
def test_compiled(name, chip, dtype):
  limits = SCHEDULES[name, chip, dtype]
  check_schedules(__file__, "code_attention", name, chip, dtype, limits)


@needs_libtpu
@pytest.mark.tpu_aot
@pytest.mark.parametrize("chip", ["v4", "v7x"])
def test_odd_sizes_compile(chip):
  """Those chips that have no schedules above; one of them with little VMEM. Without a mask."""
  query, key, value = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((300, 80), (2, 200, 80), (2, 200, 200))
  )
  loss = lambda q, k, v: jnp.sum(operator(query=q, key=k, value=v, implementation="tpu")[0])  # noqa: E731
  gradient = jax.grad(loss, (0, 1, 2))
  assert len(kernels(compile_for_tpu(gradient, query, key, value, chip=chip))) == 2


@needs_libtpu
@pytest.mark.tpu_aot
def test_the_kernel_is_chosen_where_it_fits():
  chosen = {}

  def trace(x):
    for name, dtype, dim in (
      ("half", jnp.float16, 64),
      ("single", jnp.float32, 64),
      ("brain", jnp.bfloat16, 64),
      ("wide", jnp.bfloat16, 2**20),
    ):
      key = jax.ShapeDtypeStruct((1, 100, dim), dtype)
      chosen[name] = api._choose(jax.ShapeDtypeStruct((9, dim), dtype), key, key)
    return x

  compile_for_tpu(trace, jax.ShapeDtypeStruct((1,), jnp.float32))
  assert {name for name, which in chosen.items() if which == "tpu"} == {"single", "brain"}
