"""Label-wise attention compiled for GPUs that are not here: machine code and whole programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.pallas_kernels import code_attention
from attnzoo.pallas_kernels.code_attention import cases, triton
from attnzoo_testing.cuda_aot import A100, H100, compile_for_h100
from attnzoo_testing.triton_launches import needs_plugin, needs_triton, operations, resources_of

CASES = {case.name: case for case in cases.CASES}
SIZES = ("batch", "labels", "length", "key_dim", "value_dim")
# (GPU, case, dtype, most shared memory, most registers of the forward kernel, most bytes spilled).
COMPILED = {
  "h100-full": (H100, "full", "bfloat16", 196608, 184, 0),
  "a100-top50": (A100, "top50", "bfloat16", 106752, 255, 0),
  "h100-full-float32": (H100, "full", "float32", 81920, 255, 208),
}


@needs_triton
@pytest.mark.cuda_aot
@pytest.mark.parametrize("name", COMPILED)
def test_machine_code(name):
  gpu, case, dtype, shared_memory, registers, spills = COMPILED[name]
  problem = triton.Problem(*(CASES[case].sizes[n] for n in SIZES), dtype, True, 1.0)
  config = triton.choose_config(problem, gpu)
  launches = triton.forward_launches(problem, config) + triton.backward_launches(problem, config)
  dtypes = dict.fromkeys(("query", "key", "value", "d_output"), dtype)
  dtypes |= dict.fromkeys(("real", "blocks", "filled"), "int32")
  found = resources_of(launches, dtypes, gpu)
  for kernel, resources in found.items():
    print(name, kernel, resources)
  products = {f"{n}_kernel" for n in ("forward", "drop", "query_gradient", "token_gradient")}
  assert set(found) == products | ({"join_kernel"} if config.splits > 1 else set())
  assert found["forward_kernel"].registers <= registers
  for kernel, resources in found.items():
    assert resources.spills <= spills, kernel
    assert resources.shared_memory <= shared_memory, kernel
    assert not resources.serialized, kernel
    assert (resources.tensor_cores > 0) == (kernel in products), kernel


def arrays_of(case, dtype=jnp.bfloat16):
  inputs = cases.make_inputs(CASES[case])
  kind = lambda x: dtype if x.dtype == np.float32 else x.dtype  # noqa: E731
  return {n: jax.ShapeDtypeStruct(x.shape, kind(x)) for n, x in inputs.items()}


def loss(floats, **others):
  return jnp.sum(code_attention(**floats, **others).astype(jnp.float32) ** 2)


def gradient(query, key, value, mask=None):
  return jax.grad(loss)(dict(query=query, key=key, value=value), mask=mask, scale=0.5)


def compiled(function, arrays):
  return compile_for_h100(lambda arrays: function(**arrays), arrays)


@needs_plugin
@pytest.mark.cuda_aot
def test_whole_program():
  """On a GPU the kernels are the default, and nothing of [B, L, T] is made."""
  arrays, size = arrays_of("full"), CASES["full"].sizes
  calls, loops, _ = operations(compiled(code_attention, arrays))
  assert (calls, loops) == (1, 0)
  program = compiled(gradient, arrays)
  calls, loops, largest = operations(program)
  assert (calls, loops) == (4, 0)
  assert size["batch"] * size["labels"] * size["length"] > 1.7e8
  assert largest < 1e7
  # Output and its gradient, partial gradients of the queries, rows of statistics.
  assert program.memory_analysis().temp_size_in_bytes < 100e6


@needs_plugin
@pytest.mark.cuda_aot
def test_few_labels():
  """Programs share a document's tokens; no mask, no list of blocks."""
  arrays = {n: x for n, x in arrays_of("top50").items() if n != "mask"}
  calls, loops, _ = operations(compiled(code_attention, arrays))
  assert (calls, loops) == (2, 0)


@needs_plugin
@pytest.mark.cuda_aot
def test_vmap():
  """Sequences of a vmap run one after the other."""
  arrays = arrays_of("one_label")
  arrays = {n: jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for n, x in arrays.items()}
  calls, loops, _ = operations(compiled(jax.vmap(lambda **x: code_attention(**x)), arrays))
  assert calls == 1
  assert loops >= 1


@needs_plugin
@pytest.mark.cuda_aot
def test_others_are_left_to_the_portable_path():
  shapes = dict(query=(5, 260), key=(2, 40, 260), value=(2, 40, 8))
  arrays = {n: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for n, shape in shapes.items()}
  assert operations(compiled(code_attention, arrays))[0] == 0
